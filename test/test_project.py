"""Tests of the repository itself: checked code, and documents that agree with their sources."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

import kpmatch_ros
from kpmatch_ros.parameters import declarations
from tools import generate_docs

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_passes_ruff() -> None:
    run("ruff", "check", ".")


def test_the_code_is_formatted_by_ruff() -> None:
    run("ruff", "format", "--check", ".")


def test_the_types_pass_mypy() -> None:
    run("mypy")


def test_imports_keep_the_contracts_of_pyproject() -> None:
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_over_500_lines() -> None:
    files = [path for folder in ("kpmatch_ros", "simulation", "test") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    lengths.pop("test/test_training.py", None)  # has the size of training/, which is handled separately
    assert not {name: length for name, length in lengths.items() if length > 500}


def test_no_line_of_the_c_sources_has_more_than_120_characters() -> None:
    lines = [(path.name, line) for path in (ROOT / "src").glob("*.[ch]") for line in path.read_text().splitlines()]
    assert not [each for each in lines if len(each[1]) > 120]


def test_no_test_imports_private_names() -> None:
    """ruff checks attributes (SLF001)."""
    private = re.compile(r"^\s*from (?:kpmatch_ros|simulation|benchmarks)\S* import [^#\n]*\b_\w", re.MULTILINE)
    assert not [path.name for path in (ROOT / "test").glob("*.py") if private.search(path.read_text())]


def test_the_config_file_agrees_with_the_declared_parameters() -> None:
    assert (ROOT / "config" / "matcher.yaml").read_text() == generate_docs.config_file(), "run make docs"


def test_the_documentation_lists_the_parameters_as_declared() -> None:
    table = generate_docs.markdown_table()
    assert table in (ROOT / "docs" / "parameters.md").read_text(), "run make docs"
    _, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for row, item in zip(rows, declarations(), strict=True):
        name = f"`{item.name}`{'°' if item.dynamic else ''}"
        assert [row[0], row[1], *row[3:]] == [name, item.type.__name__, item.constraint, item.unit, item.description]
        assert yaml.safe_load(row[2].strip("`")) == item.default


def test_the_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_no_document_says_to_install_the_package_from_pypi() -> None:
    """It is not on PyPI. Such a command would fail, or install a foreign package with that name."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "kpmatch_ros").rglob("*.py")]
    assert not [str(path) for path in files if re.search(r"pip install [^\n`]*kpmatch_ros", path.read_text())]


def test_package_and_python_agree_on_the_version() -> None:
    version = re.search(r"<version>(.*)</version>", (ROOT / "package.xml").read_text())
    assert version and version[1] == kpmatch_ros.__version__


def test_the_changelog_begins_with_the_version() -> None:
    headings = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == kpmatch_ros.__version__


def test_containers_pin_the_versions_of_the_development_environment() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))
    for name in ("Dockerfile", "Dockerfile.jetson"):
        found = re.findall(r"([\w.-]+)==(\d[\w.]*)", (ROOT / "docker" / name).read_text())
        assert len(found) >= 4
        assert {package: pinned[package] for package, _ in found} == dict(found), name
