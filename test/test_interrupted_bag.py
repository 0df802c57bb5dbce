"""Tests that kpmatch bag writes each of its files whole or not at all, and leaves older files as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from bag_harness import QUICK, SIZE, stamps
from numpy.typing import NDArray

from simulation import demo_camera
from simulation.bags import write_camera_bag


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_partial_file(
    views: list[NDArray[np.uint8]], tmp_path: Path, sent: signal.Signals
) -> None:
    write_camera_bag(tmp_path / "in", views * 150, stamps(1800), demo_camera(*SIZE))
    files = ["--poses", "poses.txt", "--report", "page.html", *(["--rerun", "new.rrd"] if find_spec("rerun") else [])]
    (tmp_path / "page.html").write_text("of an earlier run")
    command = [sys.executable, "-m", "kpmatch_ros.cli", "bag", "in", "out", *files, *QUICK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".kpmatch.*/out/*")):  # until the command is writing
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # a shell reports both as 130
    assert err == "kpmatch bag: stopped\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "page.html"]
    assert (tmp_path / "page.html").read_text() == "of an earlier run"
