"""What the repository promises of itself: checked code, and documents that follow from their sources."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kpmatch_ros
from kpmatch_ros import parameters

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_passes_ruff() -> None:
    run("ruff", "check", ".")


def test_the_types_hold() -> None:
    run("mypy")


def test_the_config_file_follows_from_the_declaration_of_the_parameters() -> None:
    assert (ROOT / "config" / "matcher.yaml").read_text() == parameters.config_file(), "run make docs"


def test_the_readme_lists_the_parameters_as_declared() -> None:
    assert parameters.markdown_table() in (ROOT / "README.md").read_text(), "run make docs"


def test_package_and_python_agree_on_the_version() -> None:
    version = re.search(r"<version>(.*)</version>", (ROOT / "package.xml").read_text())
    assert version and version[1] == kpmatch_ros.__version__
