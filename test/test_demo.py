"""Tests of kpmatch demo: the complete demonstration over DDS, as a user starts it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from kpmatch_ros.bags import BagWriter, bag_topics, new_message, read_ground_truth
from kpmatch_ros.bags.demo import demo_frames, unpack_demo_bag
from kpmatch_ros.cli import main

FRAMES = 4


def test_the_demo_prints_accurate_figures_and_writes_images_bag_and_log(tmp_path: Path) -> None:
    # A single test for everything, because it starts a node.
    command = [sys.executable, "-m", "kpmatch_ros.cli", "demo", "--out", "the demo", "--frames", str(FRAMES)]
    # The output of an earlier run is replaced.
    unpack_demo_bag(tmp_path / "the demo" / "bag", 2)
    for name in ("frame0.png", "node.log"):
        (tmp_path / "the demo" / name).write_text("old")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr

    lines = re.findall(
        r"^ *\d+ -> \d+ +(\d+) +(\d+) % +(\d+) ms +([\d.]+) ° +([\d.]+) ° +OK$", done.stdout, flags=re.MULTILINE
    )
    assert len(lines) == FRAMES - 1, done.stdout
    matches, inliers, latency, rotation, direction = np.array(lines, float).T
    assert matches.min() > 200 and inliers.min() > 50 and latency.min() > 0
    assert rotation.max() < 0.05 and np.median(direction) < 0.5
    assert "3 of 3 OK" in done.stdout and "the demo/matches.png" in done.stdout

    assert "kpmatch match 'the demo/frame0.png' 'the demo/frame1.png' --save 'the demo/pair.png'" in done.stdout

    out = tmp_path / "the demo"
    assert all(cv2.imread(str(out / f"frame{number}.png")).shape == (480, 640, 3) for number in (0, 1))
    picture = cv2.imread(str(out / "matches.png"))
    assert picture.shape[0] == 480 and picture.shape[1] > 1280
    counts = {topic.name: topic.num_messages for topic in bag_topics(out / "bag")}
    assert counts["/camera/image_raw"] == counts["/camera/camera_info"] == FRAMES
    assert len(read_ground_truth(out / "bag")[0]) == FRAMES
    assert "superpoint-open" in (out / "node.log").read_text()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_node_ends_with_the_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kpmatch_ros.cli", "demo", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        end = time.monotonic() + 60
        while not (nodes := children(process.pid)) and time.monotonic() < end:
            time.sleep(0.1)
        assert nodes
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    # A shell reports both as 130. Python ends by the signal itself if it arrives during the import of a module.
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err
    assert not any(Path(f"/proc/{node}").exists() for node in nodes)


@pytest.mark.parametrize(
    ("module", "said"),
    [("rclpy", "ROS 2 is not installed"), ("kpmatch_ros.msg", "messages of kpmatch_ros are not built")],
)
def test_without_ros_or_messages_the_demo_prints_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, module: str, said: str
) -> None:
    monkeypatch.delitem(sys.modules, "kpmatch_ros.ros.player", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    assert main(["demo", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err and "make demo" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unwritable_ros_log_folder_is_reported_with_a_remedy(tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    done = subprocess.run(
        [sys.executable, "-m", "kpmatch_ros.cli", "demo", "--out", "out", "--frames", "2"],
        env={**os.environ, "ROS_LOG_DIR": "/proc/log"},  # a place where not even root can create a folder
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=280,
    )  # fmt: skip
    assert done.returncode == 2 and "/proc/log" in done.stderr and "set ROS_LOG_DIR" in done.stderr


def test_a_file_with_the_name_of_the_output_folder_is_not_changed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["bag", "frame0.png", "frame1.png", "matches.png", "node.log"])
def test_files_that_the_demo_did_not_write_are_not_changed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("rclpy")
    if name == "bag":
        with BagWriter(tmp_path / name) as bag:
            bag.write("/chatter", new_message("std_msgs/msg/String", data="mine"), 1)
    else:
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["demo", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / name}: exists already, and nothing shows that kpmatch demo made it" in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_demo_bag_with_foreign_files_is_not_replaced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("rclpy")
    unpack_demo_bag(tmp_path / "bag", 2)
    for path in (tmp_path / "bag" / "notes.txt", tmp_path / "frame0.png"):
        path.write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds notes.txt, which does not belong to the bag" in capsys.readouterr().err
    assert (tmp_path / "bag" / "notes.txt").read_text() == (tmp_path / "frame0.png").read_text() == "mine"


def test_an_image_is_sent_after_its_calibration_is_acknowledged() -> None:
    pytest.importorskip("rclpy")
    from kpmatch_ros.ros.player import RecordedFrame, send

    done: list[Any] = []
    infos = SimpleNamespace(publish=done.append, wait_for_all_acked=lambda timeout: done.append("it has arrived"))
    send(RecordedFrame(1, b"calibration", b"image"), infos, SimpleNamespace(publish=done.append))
    assert done == [b"calibration", "it has arrived", b"image"]


def test_a_single_frame_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--frames", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_a_demo_longer_than_its_bag_plays_it_forwards_and_backwards() -> None:
    frames = list(demo_frames(24))
    assert all(later.stamp - earlier.stamp == 10**8 for earlier, later in itertools.pairwise(frames))
    for number, again in ((10, 12), (1, 21), (0, 22), (1, 23)):  # of 12 frames
        assert np.array_equal(frames[number].image, frames[again].image)
        assert np.array_equal(frames[number].pose.position, frames[again].pose.position)
    assert frames[23].camera_info.header.stamp.nanosec == frames[23].stamp % 10**9


def test_reading_the_demo_bag_imports_no_renderer(tmp_path: Path) -> None:
    code = (
        "import sys; from kpmatch_ros.bags.demo import demo_frames; list(demo_frames(1))\n"
        "print([name for name in ('simulation', 'torch', 'rclpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
