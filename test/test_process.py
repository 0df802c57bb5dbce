"""Tests of the settings that the node's and the command's processes make before PyTorch and its OpenMP are loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpmatch_ros.process import configure_process

SPINS = "GOMP_SPINCOUNT = "  # the output of GCC's OpenMP

MAPPED = Path("/proc/self/maps")  # the libraries loaded in this process, with PyTorch's OpenMP
pytestmark = pytest.mark.skipif(
    not (torch.backends.openmp.is_available() and MAPPED.exists() and "libgomp" in MAPPED.read_text()),
    reason="PyTorch has another OpenMP than GCC's",
)


def openmp_spin_count(program: str, *words: str) -> str:
    """Return the number of spinning rounds of waiting threads, in a process of the program."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: make build")
    done = subprocess.run(
        [sys.executable, path, *words],
        env={**os.environ, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line.strip() for line in done.stderr.splitlines() if SPINS in line]
    assert lines, done.stderr
    return lines[0].removeprefix(SPINS)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", [("matcher", "--ros-args", "-p", "mode:=nonsense"), ("kpmatch", "doctor")])
def test_waiting_openmp_threads_spin_only_briefly(words: tuple[str, ...]) -> None:
    assert openmp_spin_count(*words) == "'1000'"


def test_existing_environment_variables_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    before = dict(os.environ)
    configure_process()
    assert dict(os.environ) == before


def test_loaded_objects_are_excluded_from_garbage_collection_at_exit() -> None:
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count()))\n"  # runs after later ones
        "from kpmatch_ros.process import configure_process; configure_process(); import numpy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1000
