"""Tests that `pip install .` builds the compiled part with a C compiler, and works without one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg", "setup.py")
ASK = (
    "from kpmatch_ros.geometry import compiled as geometry; from kpmatch_ros.models import compiled as networks; "
    "print(geometry.LIBRARY.exists(), geometry.available(), networks.transforms())"
)


def install(folder: Path, compiler: str) -> str:
    """Install, and return whether the package has its compiled parts and can open them."""
    source, place = folder / "source", folder / "place"
    for name in PARTS:
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in ("kpmatch_ros", "msg", "src"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "*.safetensors", "*.pyc"))
    environment = {name: value for name, value in os.environ.items() if name not in ("CFLAGS", "LDFLAGS", "PYTHONPATH")}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", place]
    subprocess.run([*pip, source], env={**environment, "CC": compiler}, check=True, capture_output=True, cwd=folder)
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**environment, "PYTHONPATH": str(place)},
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert asked.stderr == ""
    return asked.stdout.strip()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")
def test_with_a_compiler_the_compiled_parts_are_built_and_can_be_loaded(tmp_path: Path) -> None:
    # Without optimisation, which takes three quarters of the time. The tests of the build by CMake run with it.
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("cc")} "$@" -O0\n')
    compiler.chmod(0o755)
    assert install(tmp_path, str(compiler)) == "True True True"


def test_without_a_compiler_the_package_is_installed_without_compiled_parts(tmp_path: Path) -> None:
    assert install(tmp_path, "false") == "False False False"
