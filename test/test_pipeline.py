"""Tests of the data flow that the node and `kpmatch bag` share, without DDS or files."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from kpmatch_ros import pipeline as pipeline_module
from kpmatch_ros.bags import camera_info_message, image_message, new_message
from kpmatch_ros.frames import Result
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.imaging.images import ImageError
from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.pipeline import Pipeline
from kpmatch_ros.sync.calibration import Calibration

SECOND = 1_000_000_000


class FrontEndStub:
    """Replaces the front end with its networks: stores its parameters and finds nothing."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.resets = 0

    def configure(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def reset(self) -> None:
        self.resets += 1

    def interruption(self, stamp: int, frame_ids: Any, overtaken: int) -> str:
        return ""

    def register(self, images: Any, stamps: Any, camera: Any, frame_ids: Any, masks: Any) -> Result:
        frame: Any = SimpleNamespace(
            stamp=stamps[0], frame_id=frame_ids[0], keypoints=range(100), mask=masks[0], masks=masks
        )
        return Result(frame, None, None)


class RecordedOutput:
    """Stores everything that a pipeline publishes and reports."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.statuses: list[PoseStatus] = []
        self.reports: list[tuple[str, ...]] = []

    def publish(self, topic: str, message: Any) -> None:
        self.messages.append((topic, message))

    def pose(self, status: PoseStatus) -> None:
        self.statuses.append(status)

    def rejected(self, reason: str, explanation: str) -> None:
        self.reports.append(("rejected", reason, explanation))

    def calibration_refused(self, reason: str, explanation: str) -> None:
        self.reports.append(("refused", reason, explanation))

    def doubted(self, kind: str, explanation: str) -> None:
        self.reports.append(("doubted", kind, explanation))

    def interrupted(self, explanation: str) -> None:
        self.reports.append(("interrupted", explanation))

    def unpaired(self, topic: str, images: int, explanation: str) -> None:
        self.reports.append(("unpaired", topic, str(images), explanation))

    def stamp_fault(self, fault: str, topic: str, explanation: str) -> None:
        self.reports.append((fault, topic, explanation))

    def mask_fault(self, fault: str, topic: str, explanation: str) -> None:
        self.reports.append((fault, topic, explanation))

    def matched(self, fault: str) -> None:
        self.reports += [("barren", fault)] if fault else []

    def odometry(self, breaks: int, explanation: str) -> None:
        self.reports.append(("odometry", str(breaks), explanation))


def make(*topics: str, **parameters: Any) -> tuple[Pipeline, RecordedOutput]:
    mode = "stereo" if len(topics) == 2 else "mono"
    front_end: Any = FrontEndStub(Parameters(mode=mode, **parameters))
    heard = RecordedOutput()
    return Pipeline(front_end, topics, heard.publish, lambda topic: False, heard, new_message), heard


def image(stamp: int, frame: str = "camera") -> Any:
    return image_message(np.zeros((8, 8), np.uint8), stamp, frame, "mono8")


def interrupted_at(step: int, work: Callable[[], Any], meanwhile: Callable[[], None]) -> bool:
    """Do the work, with something else before its bytecode instruction number ``step``. False if it has fewer.

    Another thread could do this at that point. Only instructions of the pipeline's own code count.
    """
    passed = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.endswith("kpmatch_ros/pipeline.py"):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            passed += 1
            if passed == step + 1:
                sys.settrace(None)
                meanwhile()
                sys.settrace(trace)
        return trace

    before = sys.gettrace()
    frame = inspect.currentframe()
    assert frame is not None
    frame.f_trace_opcodes = True  # Python 3.12 reports instructions only if a frame asks before settrace
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return passed > step


def test_a_parameter_changed_at_any_moment_during_a_frame_applies_to_the_next_one() -> None:
    step = 0
    while True:
        pipeline, _ = make("/image")
        pipeline.configure(Parameters(max_keypoints=100))
        changed = Parameters(max_keypoints=200)

        def work(pipeline: Pipeline = pipeline) -> None:
            pipeline.process([image(SECOND)])

        def meanwhile(pipeline: Pipeline = pipeline, changed: Parameters = changed) -> None:
            pipeline.configure(changed)

        if not interrupted_at(step, work, meanwhile):
            break
        pipeline.process([image(2 * SECOND)])
        assert pipeline.front_end.parameters is changed, f"lost before instruction {step}"
        step += 1
    assert step > 50, "the frame was not followed instruction by instruction"


def test_odometry_is_refused_for_a_single_camera() -> None:
    with pytest.raises(ParameterError, match="publish_odometry needs mode stereo"):
        make("/image", publish_odometry=True)


def test_an_unusable_calibration_is_reported_for_every_frame_and_no_frame_is_lost() -> None:
    pipeline, heard = make("/image")
    info = camera_info_message(Camera(8, 8, np.eye(3)), SECOND, "camera")
    info.k = np.zeros(9)
    pipeline.add_info(0, info)
    for number in range(3):
        assert pipeline.process([image(number * SECOND)]) is not None
    assert [report[:2] for report in heard.reports] == [("refused", "uncalibrated")] * 3


@pytest.mark.parametrize("side", [0, 1])
def test_a_rejected_image_of_a_pair_is_reported_with_its_topic(side: int) -> None:
    pipeline, heard = make("/left/image", "/right/image")
    images = [image(SECOND), image(SECOND)]
    images[side].step = 3
    assert pipeline.process(images) is None
    (report,) = heard.reports
    assert report[:2] == ("rejected", "step") and f"/{['left', 'right'][side]}/image: mono8" in report[2]


@pytest.mark.parametrize("mask", [False, True])
def test_a_rejected_image_is_not_reported_as_processed_without_its_mask(mask: bool) -> None:
    pipeline, heard = make("image")
    pipeline.masks.expected = [0]
    if mask:
        pipeline.add_mask(0, image_message(np.zeros((8, 8, 3), np.uint8), SECOND, "camera", "rgb8"))  # not a valid mask
    message = image(SECOND)
    message.encoding = "32SC1"
    assert pipeline.process([message]) is None
    assert [report[0] for report in heard.reports] == ["rejected"]


def test_the_traceback_of_an_error_raised_for_every_frame_does_not_grow() -> None:
    calibration = Calibration(["/image"], rectified=False, memory=10**7)
    info = camera_info_message(Camera(8, 8, np.eye(3)), SECOND, "camera")
    info.k = np.zeros(9)
    calibration.update(0, SECOND, info)
    depths = []
    for _ in range(5):
        with pytest.raises(CalibrationError) as caught:
            calibration.camera_for([(8, 8)], [SECOND], [])
        trace, depth = caught.value.__traceback__, 0
        while trace is not None:
            trace, depth = trace.tb_next, depth + 1
        depths.append(depth)
    assert len(set(depths)) == 1


def watch(pipeline: Pipeline, now: float) -> None:
    """Let time pass for an idle pipeline."""
    alone = pipeline.watch(now)
    if alone is not None:
        pipeline.interrupt(alone)


def test_unpaired_images_are_reported_at_most_once_a_second() -> None:
    pipeline, heard = make("/left/image", "/right/image")
    for tenth in range(31):
        assert pipeline.add_image(0, image(tenth * SECOND // 10, "left")) is None
        watch(pipeline, 0.1 * tenth)
    assert {topic for topic, _ in heard.messages} == {"relative_pose"}
    assert 2 <= len(heard.messages) <= 3
    assert heard.statuses == [PoseStatus.INTERRUPTED] * len(heard.messages)
    assert all(message.header.frame_id == "left" for _, message in heard.messages)


@pytest.mark.parametrize("offset", [20_000_000, 1000 * SECOND])
def test_images_whose_stamps_never_fit_are_reported_once_a_second(offset: int) -> None:
    pipeline, heard = make("/left/image", "/right/image")
    for tenth in range(31):
        stamp = SECOND + tenth * SECOND // 10
        assert pipeline.add_image(0, image(stamp, "left")) is None
        assert pipeline.add_image(1, image(stamp + offset, "right")) is None
        watch(pipeline, 0.1 * tenth)
    assert 2 <= len(heard.messages) <= 3
    assert heard.statuses == [PoseStatus.INTERRUPTED] * len(heard.messages)


def test_with_queue_all_an_unpaired_image_is_reported_only_after_about_five_seconds() -> None:
    pipeline, heard = make("/left/image", "/right/image", queue="all")
    pipeline.add_image(0, image(SECOND, "left"))
    for tenth in range(49):
        watch(pipeline, 0.1 * tenth)
    assert heard.messages == []
    for tenth in range(49, 70):
        watch(pipeline, 0.1 * tenth)
    assert heard.statuses == [PoseStatus.INTERRUPTED]


def test_watching_publishes_nothing_and_returns_an_unpaired_image_until_it_is_reported() -> None:
    pipeline, heard = make("/left/image", "/right/image")
    pipeline.add_image(0, image(SECOND, "left"))
    found = [alone for tenth in range(31) if (alone := pipeline.watch(0.1 * tenth)) is not None]
    assert len(found) == 3 and len({id(alone) for alone in found}) == 1 and heard.messages == []
    for alone in found:
        pipeline.interrupt(alone)
    assert heard.statuses == [PoseStatus.INTERRUPTED], "one image is reported once"
    assert not any(pipeline.watch(3 + 0.1 * tenth) for tenth in range(31))


def test_the_memory_of_images_that_wait_for_a_partner_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "_UNPAIRED_MEMORY", 2 * len(image(SECOND).data))
    pipeline, heard = make("/left/image", "/right/image", queue="all")
    for number in range(5):
        pipeline.add_image(0, image(number * SECOND))
    assert [report[:2] for report in heard.reports if report[0] == "unpaired"] == [("unpaired", "/left/image")] * 3


def test_a_requested_reset_is_done_once() -> None:
    pipeline, _ = make("image")
    before = pipeline.front_end.resets  # type: ignore[attr-defined]
    pipeline.request_reset()
    for number in range(1, 4):
        pipeline.process((image(number * SECOND),))
    assert pipeline.front_end.resets == before + 1  # type: ignore[attr-defined]


def test_images_that_still_wait_for_a_partner_at_the_end_are_reported() -> None:
    pipeline, heard = make("/left/image", "/right/image")
    assert pipeline.add_image(0, image(SECOND)) is None
    assert pipeline.add_image(0, image(2 * SECOND)) is None
    assert pipeline.add_image(1, image(2 * SECOND)) is not None
    assert pipeline.add_image(1, image(3 * SECOND)) is None
    pipeline.finish()
    assert [report[:3] for report in heard.reports] == [
        ("unpaired", "/left/image", "1"),
        ("unpaired", "/right/image", "1"),
    ]


def test_images_with_zero_or_repeated_stamps_are_reported_with_their_topic() -> None:
    pipeline, heard = make("/left/image", "/right/image")
    for stamp in (SECOND, SECOND, 2 * SECOND):
        pipeline.add_image(0, image(stamp))
    pipeline.add_image(1, image(0))

    def about_stamps() -> list[tuple[str, str, str]]:  # on a slow machine there may be reports of late images, too
        return [report for report in heard.reports if "stamps" in report[0]]

    assert [report[:2] for report in about_stamps()] == [
        ("repeated stamps", "/left/image"),
        ("zero stamps", "/right/image"),
    ]
    assert "they cannot be paired with the other camera's images, which have stamps" in about_stamps()[-1][2]
    pipeline.add_image(0, image(0))
    pipeline.add_image(1, image(0))
    assert "tracks and poses are correct, but their times are not" in about_stamps()[-1][2]


def test_an_implausible_calibration_is_reported_with_every_frame() -> None:
    pipeline, heard = make("/camera/image_rect")
    lens = Camera(8, 8, np.array([[8.0, 0, 4], [0, 8.0, 4], [0, 0, 1]]), "plumb_bob", np.array([-0.1, 0, 0, 0]))
    pipeline.add_info(0, camera_info_message(lens, 0, "camera"))
    for stamp in (1, 2):
        pipeline.process((image(stamp * SECOND),))
    doubts = [report for report in heard.reports if report[0] == "doubted"]
    assert len(doubts) == 2
    assert doubts[0][1] == "camera_info: rectified on /camera/image_rect" and "/camera/image_rect" in doubts[0][2]


def test_thousands_of_images_that_wait_keep_their_masks_and_calibrations() -> None:
    pipeline, heard = make("image", queue="all")
    pipeline.masks.expected = [0]
    stamps = [number * SECOND // 60 for number in range(6000)]
    small, large = (Camera(n, n, np.array([[10.0, 0, n / 2], [0, 10.0, n / 2], [0, 0, 1]])) for n in (8, 16))
    for number, stamp in enumerate(stamps):
        pipeline.add_info(0, camera_info_message(small if number < 1000 else large, stamp, "camera"))
        pipeline.add_mask(0, image(stamp))
    for stamp in stamps[:1000:10]:
        pipeline.process([image(stamp)])
    assert {report[0] for report in heard.reports} == {"mask hides everything"}


@pytest.mark.parametrize(("resize", "decoded"), [(0, False), (640, True)])
def test_a_compressed_image_too_large_for_the_networks_is_not_decoded_without_resize(
    resize: int, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = cv2.imencode(".jpg", np.zeros((3000, 3000), np.uint8))[1].tobytes()
    calls: list[int] = []
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: calls.append(1) or decode(*args))
    pipeline, heard = make("/image/compressed", resize=resize)
    header = image(SECOND).header
    message = new_message(
        "sensor_msgs/msg/CompressedImage", header=header, format="jpeg", data=np.frombuffer(large, np.uint8)
    )
    pipeline.process((message,))
    assert bool(calls) == decoded
    rejected = [report for report in heard.reports if report[0] == "rejected"]
    assert len(rejected) == (not decoded)
    if rejected:
        assert rejected[0][1] == "size"
        assert "3000 x 3000 pixels, more than the 8.4 million" in rejected[0][2] and "set resize" in rejected[0][2]


def test_an_interruption_is_reported_once_even_if_many_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, heard = make("image")
    front_end: Any = pipeline.front_end
    register = front_end.register
    monkeypatch.setattr(front_end, "interruption", lambda stamp, frame_ids, overtaken: "the frame_id changed")

    def refuse(*arguments: Any) -> Result:
        raise ImageError("size", "too many pixels")

    for each in (refuse, refuse, register):
        monkeypatch.setattr(front_end, "register", each)
        pipeline.process([image(SECOND)])
    assert [report[0] for report in heard.reports] == ["rejected", "rejected", "interrupted"]


# Restarting


def test_a_restarted_pipeline_keeps_only_the_calibration() -> None:
    pipeline, heard = make("left", "right")
    pipeline.add_info(0, camera_info_message(Camera(8, 8, np.eye(3)), SECOND, "camera"))
    pipeline.masks.expected = [0]
    pipeline.add_mask(0, image(SECOND))
    assert pipeline.add_image(0, image(SECOND)) is None
    resets = pipeline.front_end.resets  # type: ignore[attr-defined]
    pipeline.restart()
    assert pipeline.front_end.resets == resets + 1  # type: ignore[attr-defined]
    assert pipeline.add_image(1, image(SECOND)) is None, "its partner was from before the restart"
    left = image(SECOND)
    assert pipeline.add_image(0, left) is not None
    assert heard.reports == [], "stamps from before the restart are forgotten"
    assert pipeline.masks.take(0, SECOND) is None
    assert pipeline.calibration.camera_for([(8, 8)] * 2, [SECOND] * 2, []) is None  # the right camera_info is missing
    pipeline.add_info(1, camera_info_message(Camera(8, 8, np.eye(3)), SECOND, "camera", 0.1))
    assert pipeline.calibration.camera_for([(8, 8)] * 2, [SECOND] * 2, []) is not None


def test_a_camera_without_images_of_the_other_is_reported_once_a_second() -> None:
    pipeline, heard = make("left", "right")
    for step in range(51):
        assert pipeline.add_image(0, image((step + 1) * SECOND // 10)) is None
        watch(pipeline, step / 10)
    reported = [message.header.stamp for topic, message in heard.messages if topic == "relative_pose"]
    times = [stamp.sec + stamp.nanosec * 1e-9 for stamp in reported]
    assert len(times) == 5
    assert np.diff(times) == pytest.approx(1.0, abs=0.11)
