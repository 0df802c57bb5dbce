"""Tests that the documentation agrees with the code: its links work, and its commands, options and names exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.parameters import declarations
from kpmatch_ros.ros.monitor import Monitor
from kpmatch_ros.weights import REGISTRY
from tools import generate_docs

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "training/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "kpmatch_ros" / "data").glob("*/README.md")),
]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub creates for a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_lines() -> Iterator[tuple[str, str]]:
    """Yield each command of the pages' shell blocks, without its comment, with the name of the page."""
    for page in PAGES:
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                command = re.sub(r"(^|\s)#.*", "", line).strip()
                if command:
                    yield str(page.relative_to(ROOT)), command


def cells(page: str) -> list[list[str]]:
    """Return the cells of all table rows of a page."""
    return [line.strip("| ").split(" | ") for line in text_of(page).splitlines() if line.startswith("|")]


def test_links_have_existing_targets() -> None:
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                lost.append((page.name, link))
    assert not lost


def test_options_in_the_shown_commands_exist(kpmatch: Run) -> None:
    known: dict[str, set[str]] = {}
    wrong = []
    shown = 0
    for page, line in shell_lines():
        found = re.search(r"\bkpmatch ((?:weights )?[a-z]+)\b(.*)", line)
        if found is None or "eval" in line:
            continue
        shown += 1
        command = found[1]
        if command not in known:
            status, out, _ = kpmatch(*command.split(), "--help")
            known[command] = set(OPTION.findall(out)) if status == 0 else set()
        wrong += [(page, command, option) for option in OPTION.findall(found[2]) if option not in known[command]]
        if not known[command]:
            wrong.append((page, command, "no such command"))
    assert shown > 30 and not wrong


@pytest.mark.parametrize("page", ["docs/command_line.md", "docs/archive.md", "docs/export.md"])
def test_options_that_a_page_names_exist(page: str, kpmatch: Run) -> None:
    helps = "".join(kpmatch(command, "--help")[1] for command in ("match", "bag", "archive", "bench", "export", "demo"))
    named = re.findall(r"`(--[a-z][a-z0-9-]+)", text_of(page))
    assert named and set(named) <= set(OPTION.findall(helps))


def test_scripts_that_the_pages_run_exist_with_their_options() -> None:
    wrong = []
    shown = 0
    for page, line in shell_lines():
        found = re.search(r"\b((?:benchmarks|training|examples|test|tools)/\w+\.(?:py|sh))(.*)", line)
        if found is None or line.startswith("make"):
            continue
        shown += 1
        script = ROOT / found[1]
        sources = "".join(file.read_text() for file in script.parent.glob("*.*") if file.suffix in (".py", ".sh"))
        options = OPTION.findall(found[2])
        missing = [name for name in options if f'"{name}"' not in sources and f"{name})" not in sources]
        wrong += [(page, found[1], option) for option in missing] if script.is_file() else [(page, found[1])]
    assert shown > 10 and not wrong


def test_make_has_the_targets_that_the_pages_name() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text_of("Makefile"), re.MULTILINE))
    named = {found for page in PAGES for found in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", page.read_text(), re.M)}
    assert named and named <= targets


def test_the_readme_shows_the_default_of_each_parameter() -> None:
    items = {item.name: item for item in declarations()}
    rows = [row for row in cells("README.md") if len(row) == 3 and row[0].strip("`°") in items]
    assert len(rows) >= 5
    for name, default, _ in rows:
        item = items[name.strip("`°")]
        assert default.strip("`") == generate_docs.shown_default(item)
        assert name.endswith("°") == item.dynamic


def test_the_readme_and_the_topics_page_list_the_same_topics() -> None:
    def published(page: str) -> set[str]:
        rows = [row[0] for row in cells(page) if re.search(r"\((out|service)\)$", row[0])]
        return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}

    assert len(published("README.md")) >= 9
    assert published("README.md") == published("docs/topics.md")


def test_every_pose_status_is_explained_on_the_pages_about_poses() -> None:
    for page in ("docs/messages.md", "docs/front_end.md"):
        explained = {name for row in cells(page) for name in re.findall(r"`([A-Z_]+)`", row[0])}
        assert explained >= {status.name for status in PoseStatus}, page


def test_every_figure_of_the_diagnostics_is_explained() -> None:
    explained = {name for row in cells("docs/diagnostics.md") for name in re.findall(r"`([^`]+)`", row[0] + row[-1])}
    figures = {re.sub(r"^frames (?!received)|,.*| \(.*", "", name) for name in Monitor().values()}
    figures = {name for name in figures if not name.startswith("poses ")}
    assert not figures - {name.removesuffix(" …") for name in explained}


def test_every_registered_weight_is_listed_with_its_licence() -> None:
    rows = [row for row in cells("docs/weights.md") if len(row) == 4]
    for item in REGISTRY.values():
        tail = item.name.rpartition("/")[2]
        found = [row for row in rows if f"`{item.name}`" in row[0] or f"…/{tail}`" in row[0]]
        assert found, item.name
        if " " not in item.licence:
            assert found[0][2] == item.licence, item.name
