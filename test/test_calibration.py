"""What is odd about a calibration is said: a baseline that no rig has, a topic's name that contradicts `rectified`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import QUICK

from kpmatch_ros.bags.files import BagWriter, camera_info_message, read_messages
from kpmatch_ros.calibration import Calibration
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.ros.monitor import Monitor
from simulation.bags import write_demo_bag

SIZE = (640, 480)
MATRIX = np.array([[500.0, 0, 320], [0, 500.0, 240], [0, 0, 1]])


def info(distortion: tuple[float, ...] = (), baseline: float = 0.0) -> Any:
    camera = Camera(*SIZE, MATRIX, "plumb_bob" if distortion else "", np.array(distortion))
    return camera_info_message(camera, 0, "camera", baseline)


def doubts(topics: list[str], rectified: bool, *infos: Any) -> list[tuple[str, str]]:
    calibration = Calibration(topics, rectified)
    for side, message in enumerate(infos):
        calibration.update(side, message)
    calibration.camera_for([SIZE] * len(infos))
    return [tuple(doubt) for doubt in calibration.doubts]


@pytest.mark.parametrize(("baseline", "shown"), [(0.0009, "0.0009"), (10.5, "10.5"), (120.0, "120"), (1e6, "1e+06")])
def test_a_baseline_that_no_rig_has_is_named_with_its_value(baseline: float, shown: str) -> None:
    ((kind, explanation),) = doubts(["left", "right"], True, info(), info(baseline=baseline))
    assert kind == "baseline"
    assert f"the cameras are {shown} m apart" in explanation and "millimetres" in explanation


@pytest.mark.parametrize("baseline", [0.001, 0.004, 0.11, 2.0, 10.0])
def test_a_baseline_that_a_rig_may_have_is_none_to_name(baseline: float) -> None:
    assert doubts(["left", "right"], True, info(), info(baseline=baseline)) == []


LENS = (-0.2, 0.05, 0.0, 0.0)


@pytest.mark.parametrize(
    ("topic", "rectified", "advice"),
    [
        ("/camera/image_rect", False, "set rectified to true"),
        ("/camera/image_rect_color/compressed", False, "set rectified to true"),
        ("/camera/rect/image", False, "set rectified to true"),
        ("/camera/rectified/image", False, "set rectified to true"),
        ("/camera/image_raw", True, "set rectified to false"),
        ("/camera/image_raw/compressed", True, "set rectified to false"),
    ],
)
def test_a_name_that_contradicts_the_parameter_is_named(topic: str, rectified: bool, advice: str) -> None:
    ((kind, explanation),) = doubts([topic], rectified, info(LENS))
    assert kind == "rectified"
    assert topic in explanation and advice in explanation and "-0.2" in explanation


@pytest.mark.parametrize(
    ("topic", "rectified", "distortion"),
    [
        ("/camera/image_rect", True, LENS),
        ("/camera/image_rect", False, ()),  # without distortion K and P are the same
        ("/camera/image_raw", False, LENS),
        ("/camera/image_raw", True, ()),
        ("/camera/image", False, LENS),
        ("/camera/image", True, LENS),
        ("/directory/correct/image", False, LENS),  # "rect" is no word of its own
        ("/straw_cam/image", True, LENS),
    ],
)
def test_what_fits_or_says_nothing_is_passed_over(topic: str, rectified: bool, distortion: tuple[float, ...]) -> None:
    assert doubts([topic], rectified, info(distortion)) == []


def test_a_doubt_goes_with_the_calibration_that_it_was_about() -> None:
    calibration = Calibration(["left", "right"], True)
    for baseline in (110.0, 0.11):
        calibration.update(0, info())
        calibration.update(1, info(baseline=baseline))
        calibration.camera_for([SIZE] * 2)
        assert len(calibration.doubts) == (baseline > 10)


def test_diagnostics_repeat_a_doubt_while_it_lasts() -> None:
    now = 0.0
    monitor = Monitor(clock=lambda: now)
    monitor.doubted("camera_info: baseline", "the cameras are 110 m apart")
    assert monitor.problems() == [("camera_info: baseline", "the cameras are 110 m apart")]
    now = 60.0
    assert monitor.problems() == []


def test_the_bag_command_says_so_in_its_table_and_on_stderr(kpmatch: Any, tmp_path: Path) -> None:
    write_demo_bag(tmp_path / "metres", num_frames=2, size=(160, 120), baseline=0.5, encoding="mono8")
    with BagWriter(tmp_path / "in", "mcap") as writer:
        for topic, _, stamp, message in read_messages(tmp_path / "metres"):
            if topic == "/right/camera_info":
                message.p = message.p * np.where(np.arange(12) == 3, 1000, 1)
            writer.write(topic, message, stamp)
    words = ["bag", tmp_path / "in", tmp_path / "out", *QUICK, "--mode", "stereo"]
    status, out, err = kpmatch(*map(str, words), "--rectified")
    assert status == 0
    assert "doubts" in out and "camera_info: baseline 2" in out
    assert "the cameras are 500 m apart" in err
