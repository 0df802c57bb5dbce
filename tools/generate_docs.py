"""Write config/matcher.yaml and the table in docs/parameters.md from kpmatch_ros/parameters.py."""

import re
from pathlib import Path

from kpmatch_ros.parameters import PROFILES, Declaration, declarations

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = {name for chosen in PROFILES.values() for name in chosen}


def shown_default(item: Declaration) -> str:
    """The default value, written as in YAML."""
    return str(item.default).lower() if item.type is bool else str(item.default) or '""'


def config_file() -> str:
    """The text of config/matcher.yaml: every parameter with its default and its description."""
    lines = [
        "# The matcher node's parameters at their defaults, written from kpmatch_ros/parameters.py by `make docs`.",
        "# Those with ° may change while the node runs (ros2 param set). Those that a profile sets are commented out.",
        "/**:",
        "  ros__parameters:",
    ]
    for item in declarations():
        notes = ", ".join(part for part in (item.constraint, item.unit) if part)
        lines.append(f"    # {'° ' if item.dynamic else ''}{item.description}{f' ({notes})' if notes else ''}")
        # Parameters that a profile chooses are commented out: a value in the file would override the profile.
        lines.append(f"    {'# ' if item.name in CHOSEN else ''}{item.name}: {shown_default(item)}")
    return "\n".join(lines) + "\n"


def markdown_table() -> str:
    """The table for docs/parameters.md."""
    rows = ["| parameter | type | default | allowed | unit | description |", "|---|---|---|---|---|---|"]
    for item in declarations():
        mark = "°" if item.dynamic else ""
        rows.append(
            f"| `{item.name}`{mark} | {item.type.__name__} | `{shown_default(item)}` | {item.constraint} | {item.unit} "
            f"| {item.description} |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    (ROOT / "config" / "matcher.yaml").write_text(config_file())
    page = ROOT / "docs" / "parameters.md"
    text = re.sub(
        r"(<!-- parameters: written by make docs -->\n).*?(<!-- end of parameters -->)",
        lambda found: found[1] + markdown_table() + found[2],
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(text)
