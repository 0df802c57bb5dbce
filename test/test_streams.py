"""Tests of the commands with closed or full standard streams and with a closed terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bag_harness import QUICK, SIZE, by_topic, stamps

from simulation import demo_camera
from simulation.bags import write_camera_bag

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def bag(texture: Any, tmp_path: Path) -> Path:
    wide = texture(150, 240, 5)
    views = [wide[i : i + SIZE[1], 4 * i : 4 * i + SIZE[0]] for i in range(4)]
    write_camera_bag(tmp_path / "in", views, stamps(4), demo_camera(*SIZE))
    return tmp_path / "in"


def closing(*descriptors: int) -> Callable[[], None]:
    """Return a function that does what a shell does for `<&-`, `>&-` and `2>&-`."""
    return lambda: [os.close(descriptor) for descriptor in descriptors] and None


@pytest.mark.parametrize("closed", [(0, 2), (0, 1, 2)], ids=["all but stdout", "all"])
def test_kpmatch_bag_works_with_closed_standard_streams(bag: Path, tmp_path: Path, closed: tuple[int, ...]) -> None:
    command = ["kpmatch", "bag", "in", "out", "--json", "--poses", "poses.txt", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, preexec_fn=closing(*closed), capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout == b"" if 1 in closed else json.loads(done.stdout)["frames"] == 4
    assert len(by_topic(tmp_path / "out")["/matches"]) == 3
    assert len((tmp_path / "poses.txt").read_text().splitlines()) == 5


@pytest.mark.parametrize("closed", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
def test_kpmatch_weights_list_works_with_any_one_stream_closed(closed: int) -> None:
    done = subprocess.run(["kpmatch", "weights", "list"], preexec_fn=closing(closed), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and ("superpoint-open" in done.stdout) == (closed != 1)


def test_errors_are_not_printed_to_stdout_if_stderr_is_closed(tmp_path: Path) -> None:
    done = subprocess.run(["kpmatch", "bag", "none", "out"], cwd=tmp_path, preexec_fn=closing(2), capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_full_output_device_is_reported() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(["kpmatch", "weights", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "kpmatch weights list: the output cannot be written: No space left on device\n"


def test_a_closed_terminal_leaves_no_incomplete_bag(bag: Path, tmp_path: Path) -> None:
    def restore_default() -> None:  # the tests may run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command = ["kpmatch", "bag", "in", "out", *QUICK]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, preexec_fn=restore_default, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".kpmatch.*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.communicate()[1] == "kpmatch bag: stopped\n" and process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_kpmatch_bag_continues_under_nohup(bag: Path, tmp_path: Path) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = ["kpmatch", "bag", "in", "out", *QUICK]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, preexec_fn=ignore)
    while not list(tmp_path.glob(".kpmatch.*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0 and (tmp_path / "out" / "metadata.yaml").exists()
