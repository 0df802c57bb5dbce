"""Tests that each image gets its own calibration, and that suspicious baselines and topic names are reported."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bag_harness import QUICK, by_topic
from rosbags.highlevel import AnyReader

from kpmatch_ros.bags import BagWriter, camera_info_message, image_message, read_messages
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.ros.monitor import Monitor
from kpmatch_ros.sync.calibration import Calibration
from node_harness import running_node
from simulation.bags import write_demo_bag

SIZE = (640, 480)
MEMORY = 10**7  # bytes
MATRIX = np.array([[500.0, 0, 320], [0, 500.0, 240], [0, 0, 1]])


def info(distortion: tuple[float, ...] = (), baseline: float = 0.0) -> Any:
    camera = Camera(*SIZE, MATRIX, "plumb_bob" if distortion else "", np.array(distortion))
    return camera_info_message(camera, 0, "camera", baseline)


def doubts(topics: list[str], rectified: bool, *infos: Any) -> list[tuple[str, str]]:
    calibration = Calibration(topics, rectified, MEMORY)
    for side, message in enumerate(infos):
        calibration.update(side, 0, message)
    calibration.camera_for([SIZE] * len(infos), [0] * len(infos), [])
    return [tuple(doubt) for doubt in calibration.doubts]


@pytest.mark.parametrize(("baseline", "shown"), [(0.0009, "0.0009"), (10.5, "10.5"), (120.0, "120"), (1e6, "1e+06")])
def test_an_implausible_baseline_is_reported_with_its_value(baseline: float, shown: str) -> None:
    ((kind, explanation),) = doubts(["left", "right"], True, info(), info(baseline=baseline))
    assert kind == "baseline"
    assert f"the cameras are {shown} m apart" in explanation and "millimetres" in explanation


@pytest.mark.parametrize("baseline", [0.001, 0.004, 0.11, 2.0, 10.0])
def test_a_plausible_baseline_is_not_reported(baseline: float) -> None:
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
def test_a_topic_name_that_contradicts_the_parameter_rectified_is_reported(
    topic: str, rectified: bool, advice: str
) -> None:
    ((kind, explanation),) = doubts([topic], rectified, info(LENS))
    assert kind == f"rectified on {topic}"
    assert topic in explanation and advice in explanation and "-0.2" in explanation


@pytest.mark.parametrize(
    ("topic", "rectified", "distortion"),
    [
        ("/camera/image_rect", True, LENS),
        ("/camera/image_rect", False, ()),  # without distortion K and P are equal
        ("/camera/image_raw", False, LENS),
        ("/camera/image_raw", True, ()),
        ("/camera/image", False, LENS),
        ("/camera/image", True, LENS),
        ("/directory/correct/image", False, LENS),  # "rect" is only part of a word
        ("/straw_cam/image", True, LENS),
    ],
)
def test_a_topic_name_that_agrees_with_rectified_or_is_neutral_is_not_reported(
    topic: str, rectified: bool, distortion: tuple[float, ...]
) -> None:
    assert doubts([topic], rectified, info(distortion)) == []


def with_matrix(focal: float, cx: float, cy: float, model: str = "plumb_bob", distortion: Any = LENS) -> Any:
    """Return the camera_info of a 640x480 image, with values that may belong to another image or lens."""
    message = info()
    message.k = message.k * 0 + [focal, 0, cx, 0, focal, cy, 0, 0, 1]
    message.p = message.p * 0 + [focal, 0, cx, 0, 0, focal, cy, 0, 0, 0, 1, 0]
    message.distortion_model, message.d = model, np.array(distortion)
    return message


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(("scale", "size"), [(2, "1280x960"), (1.25, "800x600"), (0.75, "480x360"), (0.5, "320x240")])
def test_a_camera_matrix_for_another_resolution_is_reported(scale: float, size: str, rectified: bool) -> None:
    message = with_matrix(500 * scale, 320 * scale - 0.5, 240 * scale - 0.5)
    ((kind, explanation),) = doubts(["/camera/image"], rectified, message)
    assert kind == "principal point on /camera/image"
    assert size in explanation and "640x480" in explanation and "/camera/image" in explanation


def test_a_camera_matrix_for_another_aspect_ratio_is_reported() -> None:
    ((kind, explanation),) = doubts(["/camera/image"], False, with_matrix(900, 640, 360))  # values of a 1280x720 image
    assert kind == "principal point on /camera/image" and "(640, 360)" in explanation


@pytest.mark.parametrize("centre", [(320, -0.5), (-0.5, -0.5), (-0.5, 240), (455, 240), (250, 180)])
def test_an_implausible_principal_point_is_reported(centre: tuple[float, float]) -> None:
    ((kind, _),) = doubts(["/camera/image"], False, with_matrix(500, *centre))
    assert kind == "principal point on /camera/image"


def test_a_region_of_interest_beyond_the_full_image_is_reported() -> None:
    message = with_matrix(500, 320, 240)
    message.roi.x_offset, message.roi.y_offset, message.roi.width, message.roi.height = 100, 60, 640, 480
    ((kind, explanation),) = doubts(["/camera/image"], False, message)
    assert kind == "region on /camera/image" and "640x480 pixels at (100, 60), reaches beyond" in explanation
    message.width, message.height = 740, 540
    message.k[2], message.k[5] = 370, 270
    assert doubts(["/camera/image"], False, message) == []


@pytest.mark.parametrize("centre", [(320, 240), (288, 264), (260, 250), (320, 310), (440, 240), (250, 150)])
def test_a_plausible_principal_point_is_not_reported(centre: tuple[float, float]) -> None:
    assert doubts(["/camera/image"], False, with_matrix(500, *centre)) == []


@pytest.mark.parametrize("distortion", [(-0.01, 0.02, -0.015, 0.003), (-0.007, 0.046, -0.043, 0.008, 0.0)])
def test_fisheye_coefficients_under_another_model_name_are_reported(distortion: tuple[float, ...]) -> None:
    ((kind, explanation),) = doubts(["/camera/image"], False, with_matrix(330, 320, 240, "plumb_bob", distortion))
    assert kind == "lens on /camera/image" and "equidistant" in explanation and str(distortion[2]) in explanation
    assert doubts(["/camera/image"], True, with_matrix(330, 320, 240, "plumb_bob", distortion)) == []
    assert doubts(["/camera/image"], False, with_matrix(330, 320, 240, "fisheye", distortion[:4])) == []
    crooked = (-0.3, 0.1, 0.005, -0.008, 0.0)
    assert doubts(["/camera/image"], False, with_matrix(500, 320, 240, "plumb_bob", crooked)) == []


@pytest.mark.parametrize(
    ("frame_ids", "doubted"),
    [
        (["camera"], False),
        (["/camera"], False),
        ([""], False),
        ([], False),
        (["lidar"], True),
        (["camera", "right"], False),
    ],
)
def test_a_calibration_with_another_frame_id_than_the_images_is_reported(frame_ids: list[str], doubted: bool) -> None:
    images = max(len(frame_ids), 1)
    calibration = Calibration(["/front/image", "/right"][:images], False, MEMORY)
    for side in range(images):
        calibration.update(side, 0, info(baseline=0.1 * side))
    assert calibration.camera_for([SIZE] * images, [0] * images, frame_ids) is not None
    named = [doubt.explanation for doubt in calibration.doubts]
    assert len(named) == doubted
    assert not doubted or all(word in named[0] for word in ("/front/image", "'lidar'", "'camera'"))
    calibration.camera_for([SIZE] * images, [0] * images, ["camera"] * images)
    assert calibration.doubts == [], "the doubt ends with the frame_id that caused it"


def test_the_same_doubt_about_both_cameras_of_a_pair_is_reported_for_each() -> None:
    off = [with_matrix(500, 60, 45, distortion=(-0.01, 0.02, -0.015, 0.003)) for _ in range(2)]
    off[1].p[3] = -50.0
    for message in off:
        message.roi.x_offset, message.roi.width, message.roi.height = 100, 640, 480
    topics, monitor = ["/left/image_rect", "/right/image_rect"], Monitor()
    for kind, explanation in doubts(topics, False, *off):
        monitor.doubted(kind, explanation)
    assert {problem.kind for problem in monitor.problems()} == {
        f"{what} on {topic}" for what in ("rectified", "principal point", "region", "lens") for topic in topics
    }


def test_a_doubt_ends_when_its_calibration_is_replaced() -> None:
    calibration = Calibration(["left", "right"], True, MEMORY)
    for baseline in (110.0, 0.11):
        calibration.update(0, 0, info())
        calibration.update(1, 0, info(baseline=baseline))
        calibration.camera_for([SIZE] * 2, [0] * 2, [])
        assert len(calibration.doubts) == (baseline > 10)


def test_the_monitor_reports_a_doubt_and_forgets_it_when_it_no_longer_occurs() -> None:
    now = 0.0
    monitor = Monitor(clock=lambda: now)
    monitor.doubted("camera_info: baseline", "the cameras are 110 m apart")
    assert monitor.problems() == [("camera_info: baseline", "the cameras are 110 m apart")]
    now = 60.0
    assert monitor.problems() == []


def test_the_bag_command_reports_doubts_in_its_table_and_on_stderr(kpmatch: Any, tmp_path: Path) -> None:
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


# One calibration for each image


def info_with_focal_length(focal: float) -> Any:
    return camera_info_message(Camera(*SIZE, np.diag([focal, focal, 1.0])), 0, "camera")


def focal_lengths(calibration: Calibration, *stamps: int) -> list[float]:
    found = [calibration.camera_for([SIZE], [stamp], []) for stamp in stamps]
    return [camera.focal for camera in found if isinstance(camera, Camera)]


def test_an_image_gets_the_calibration_of_its_stamp_or_the_latest_earlier_one() -> None:
    calibration = Calibration(["image"], False, MEMORY)
    assert calibration.camera_for([SIZE], [10], []) is calibration.camera_for([SIZE], [5], []) is None
    for stamp, value in ((10, 500.0), (20, 600.0), (30, 700.0)):
        calibration.update(0, stamp, info_with_focal_length(value))
    assert focal_lengths(calibration, 10, 20, 30) == [500, 600, 700]
    assert focal_lengths(calibration, 25, 40) == [600, 700], "later calibrations are not used"
    assert focal_lengths(calibration, 0) == [700], "without an earlier calibration the latest is used"
    calibration.update(0, 10, info_with_focal_length(550.0))  # a bag starts again
    assert focal_lengths(calibration, 10, 20, 15) == [550, 600, 550]
    for stamp in range(100, 300):
        calibration.update(0, stamp, info_with_focal_length(800.0))
    assert focal_lengths(calibration, 10) == [550], "waiting images may still need it"
    assert focal_lengths(calibration, 299, 10) == [800, 800], "old ones are not kept for ever"


def test_thousands_of_waiting_images_keep_their_calibrations() -> None:
    calibration = Calibration(["image"], False, MEMORY)
    stamps = range(3000)
    for stamp in stamps:
        calibration.update(0, stamp, info_with_focal_length(500.0 + stamp))
    assert focal_lengths(calibration, *stamps) == [500.0 + stamp for stamp in stamps]


def test_waiting_images_keep_their_calibrations_after_the_bag_restarts() -> None:
    calibration = Calibration(["image"], False, MEMORY)
    first, again = range(500), range(300)
    for stamp in [*first, *again]:
        calibration.update(0, stamp, info_with_focal_length(500.0 + stamp))
    assert focal_lengths(calibration, *first, *again) == [500.0 + stamp for stamp in [*first, *again]]


def test_calibrations_of_processed_images_are_dropped_even_after_time_went_back() -> None:
    calibration = Calibration(["image"], False, MEMORY)
    for stamp in [*range(1000, 1400), *range(400)]:
        calibration.update(0, stamp, info_with_focal_length(500.0 + stamp))
        assert focal_lengths(calibration, stamp) == [500.0 + stamp]
    assert focal_lengths(calibration, 1399) == [899], "the calibrations from before the time jump were dropped"


def test_calibrations_of_a_camera_without_images_are_limited_in_memory() -> None:
    calibration = Calibration(["image"], False, 10**6)
    for stamp in range(1000):
        calibration.update(0, stamp, info_with_focal_length(500.0 + stamp))
    assert focal_lengths(calibration, 100) == [1499], "it was dropped: 1,000 calibrations take 2 MB"


def test_the_memory_for_calibrations_is_limited() -> None:
    long = info_with_focal_length(600.0)
    long.d = np.full(10**6, 0.1)  # 8 MB
    long.distortion_model = "plumb_bob"
    calibration = Calibration(["image"], False, MEMORY)
    calibration.update(0, 0, info_with_focal_length(500.0))
    for stamp in (1, 1, 1):  # a calibration with the same stamp replaces the old one
        calibration.update(0, stamp, long)
    assert focal_lengths(calibration, 0) == [500]
    calibration.update(0, 2, long)
    with pytest.raises(CalibrationError, match="not 1000000"):
        calibration.camera_for([SIZE], [0], [])
    calibration.update(0, 3, info_with_focal_length(700.0))
    assert focal_lengths(calibration, 3) == [700]


@pytest.mark.parametrize("value", [0.1, float("nan")])
@pytest.mark.parametrize("rectified", [True, False])
def test_the_message_about_a_huge_distortion_array_is_short(value: float, rectified: bool) -> None:
    calibration = Calibration(["image_raw"], rectified, MEMORY)
    long = info(baseline=0.1)
    long.d, long.distortion_model, long.header.frame_id = np.full(10**5, value), "plumb_bob" + "!" * 10**5, "a" * 10**5
    calibration.update(0, 0, long)
    said = []
    try:
        calibration.camera_for([SIZE], [0], ["camera"])
        said = [doubt.explanation for doubt in calibration.doubts]
    except CalibrationError as error:
        said = [str(error)]
    assert said and max(map(len, said)) < 1000


def test_an_image_waits_only_for_a_calibration_that_comes_with_each_image() -> None:
    calibration = Calibration(["image"], False, MEMORY)
    assert calibration.complete([10]), "the first image: nothing is known"
    calibration.update(0, 10, info_with_focal_length(500.0))
    calibration.camera_for([SIZE], [10], [])
    assert calibration.complete([10]) and not calibration.complete([20])
    sender = threading.Timer(0.05, lambda: calibration.update(0, 20, info_with_focal_length(600.0)))
    sender.start()
    begun = time.monotonic()
    calibration.wait([20], 60.0)
    assert time.monotonic() - begun < 30 and focal_lengths(calibration, 20) == [600]
    sender.join()
    calibration.wait([30], 0.05)  # the message was lost
    calibration.camera_for([SIZE], [30], [])
    assert calibration.complete([40]), "the calibration of the previous image is missing too"
    calibration.update(0, 50, info_with_focal_length(700.0))
    calibration.camera_for([SIZE], [20], [])
    assert calibration.complete([45]), "calibrations arrive in order, and a later one has arrived"
    calibration.camera_for([SIZE], [50], [])
    assert not calibration.complete([5]), "time went back: the stored calibrations are from before"
    calibration.update(0, 7, info_with_focal_length(800.0))
    assert calibration.complete([5]), "its own calibration was lost"


@pytest.fixture(scope="module")
def bag_with_size_change(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A camera whose images grow after the third one. Each image is recorded before its calibration."""
    folder = tmp_path_factory.mktemp("changing")
    write_demo_bag(folder / "walk", num_frames=6, size=(160, 120), encoding="mono8")
    with BagWriter(folder / "bag", "mcap") as writer:
        images, infos = (read_messages(folder / "walk", [f"/camera/{name}"]) for name in ("image_raw", "camera_info"))
        for number, ((*_, stamp, image), (*_, given)) in enumerate(zip(images, infos)):
            scale = 1 if number < 3 else 2
            pixels = cv2.resize(to_array(image), None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
            matrix = np.reshape(given.k, (3, 3))
            matrix = np.diag([scale, scale, 1.0]) @ (matrix + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]))
            matrix[:2, 2] -= 0.5
            camera = Camera(160 * scale, 120 * scale, matrix, given.distortion_model, given.d)
            writer.write("/camera/image_raw", image_message(pixels, stamp, "camera", "mono8"), stamp)
            writer.write("/camera/camera_info", camera_info_message(camera, stamp, "camera"), stamp + 1000)
    return folder / "bag"


def test_a_change_of_the_image_size_in_a_bag_costs_no_pose(
    bag_with_size_change: Path, tmp_path: Path, kpmatch: Any
) -> None:
    status, _, err = kpmatch("bag", bag_with_size_change, tmp_path / "out", *QUICK)
    assert status == 0 and "camera_info" not in err
    statuses = [record.message.status for record in by_topic(tmp_path / "out")["/relative_pose"]]
    assert len(statuses) == 5 and 1 not in statuses, "one is NO_CALIBRATION"


def test_waiting_frames_keep_their_calibrations_in_the_node(bag_with_size_change: Path, tmp_path: Path) -> None:
    with (
        running_node(tmp_path, profile="fast", max_keypoints=256, matcher="nearest") as node,
        AnyReader([bag_with_size_change]) as reader,
    ):
        node.wait_until_connected()
        assert node.infos is not None
        for connection, _, raw in reader.messages():  # all at once, so most of them have to wait
            (node.images if connection.topic == "/camera/image_raw" else node.infos).publish(bytes(raw))
        node.wait_for(lambda: len(node.poses) == 5, "every pair")
        assert 1 not in [pose.status for pose in node.poses], "one is NO_CALIBRATION"
