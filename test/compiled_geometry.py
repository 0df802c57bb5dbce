"""Shared functions for tests of the compiled geometry: calls to the NumPy version, and builds from the sources."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kpmatch_ros.geometry import compiled

ROOT = Path(__file__).resolve().parent.parent
_NAMES = (
    *("geometry.h", "two_view.h"),
    *("five_point.c", "flow.c", "geometry.c", "lens.c", "points.c", "structure.c", "two_view.c", "two_view_profile.c"),
)
SOURCES = [ROOT / "src" / name for name in _NAMES]

needed = pytest.mark.skipif(not compiled.available(), reason="the compiled part is not built")
with_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")


def with_numpy(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function as if the compiled part were not built, and return its result."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(invalid="ignore"):
        patch.setattr(compiled, "available", lambda: False)
        return call(*arguments, **options)


def build(library: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the library from its sources with the system's compiler."""
    files = [each for each in SOURCES if each.suffix == ".c"]
    words = ["cc", "-std=c99", *options, "-shared", "-fPIC", "-o", library, *files, "-lm"]
    return subprocess.run(words, capture_output=True, text=True)
