"""Tests of 16-bit images with a small range, of images without keypoints, and of the reports about both."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from kpmatch_ros.bags import camera_info_message, image_message
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.imaging.contrast import Stretch, appearance
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.pipeline import Pipeline
from kpmatch_ros.ros.monitor import Monitor, Problem
from kpmatch_ros.weights import WeightsError
from simulation import demo_camera


def thermal_image(view: np.ndarray, span: int = 600, level: int = 7000) -> np.ndarray:
    """Return a 14-bit image of a scene that uses a small part of the 16-bit range, with two defective pixels."""
    image = level + np.round(view.astype(float) / 255 * span).astype(np.uint16)
    image[3, 3], image[5, 9] = 0, 65535
    return image.astype(np.uint16)


def mono16_message(pixels: np.ndarray) -> Any:
    height, width = pixels.shape
    layout = {"height": height, "width": width, "step": 2 * width, "encoding": "mono16", "is_bigendian": 0}
    return SimpleNamespace(**layout, data=pixels.astype("<u2").tobytes())


@pytest.fixture(scope="module")
def views(texture: Any) -> list[np.ndarray]:
    wide = texture(140, 220, 5)
    return [np.ascontiguousarray(wide[i : i + 120, 4 * i : 4 * i + 160]) for i in range(3)]


def matches_of(images: list[np.ndarray]) -> int:
    matcher = FeatureMatcher(matcher="nearest", device="cpu", precision="float32", max_keypoints=256)
    first, second = (matcher.extract(image) for image in images)
    return len(matcher.match(first, second).scores)


def test_a_thermal_pair_matches_nearly_as_well_as_its_8_bit_version(views: list[np.ndarray]) -> None:
    stretch = Stretch()
    stretched = [to_array(mono16_message(thermal_image(view)), scale=stretch.to_8_bits) for view in views[:2]]
    divided = [to_array(mono16_message(thermal_image(view))) for view in views[:2]]
    assert matches_of(stretched) > 0.9 * matches_of(views[:2]) > 50
    assert 3 * matches_of(divided) < matches_of(views[:2])
    assert stretch.used is not None and stretch.used == pytest.approx(400 / 65535, rel=0.3)


def test_the_brightness_adapts_slowly_and_restarts_after_a_jump(views: list[np.ndarray]) -> None:
    stretch = Stretch()
    before = stretch.to_8_bits(thermal_image(views[0])[..., None])
    lamp = thermal_image(views[0])
    lamp[:10, :20] = 12000  # 1 % of the pixels: a percentile of the frame alone would darken everything else
    after = stretch.to_8_bits(lamp[..., None])
    assert abs(float(np.median(before)) - float(np.median(after))) < 25
    jumped = stretch.to_8_bits(thermal_image(views[0], level=9000)[..., None])
    assert np.abs(before[20:].astype(int) - jumped[20:]).max() <= 2


def test_full_range_images_and_images_without_stretch_are_divided_by_257(views: list[np.ndarray]) -> None:
    full = np.linspace(0, 65535, 160 * 120).reshape(120, 160, 1).astype(np.uint16)
    stretch = Stretch()
    np.testing.assert_array_equal(stretch.to_8_bits(full), np.round(full / 257).astype(np.uint8))
    stretch.enabled = False
    dark = thermal_image(views[0])[..., None]
    np.testing.assert_array_equal(stretch.to_8_bits(dark), np.round(dark / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("pixels", "used", "said"),
    [
        (np.zeros((60, 80), np.uint8), None, "all dark"),
        (np.full((60, 80), 255, np.uint8), None, "all white"),
        (np.full((60, 80, 3), 90, np.uint8), None, "all one value (90 of 255)"),
        (np.random.default_rng(0).integers(2, 12, (60, 80)).astype(np.uint8), 0.01, "use 1 % of the range"),
        (np.tile(np.linspace(110, 140, 80).astype(np.uint8), (60, 1)), None, "almost no contrast (values 110 to 140"),
        (np.tile(np.linspace(0, 255, 80).astype(np.uint8), (60, 1)), None, ""),
    ],
)
def test_the_appearance_of_an_image_without_keypoints_is_described(
    pixels: np.ndarray, used: float | None, said: str
) -> None:
    text = appearance(pixels, used)
    assert said in text and bool(said) == bool(text)


class MonitorWithClock(Monitor):
    """A monitor with its own clock, to which a pipeline can report."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(clock=lambda: self.now)


def reports(images: Iterable[np.ndarray], parameters: Parameters, **changes: Any) -> list[list[str]]:
    """Return what is reported after each image, two of them a second; parameters change after the third one."""
    monitor = MonitorWithClock()
    front_end = FrontEnd(parameters)
    pipeline = Pipeline(front_end, ["/image"], lambda *_: None, lambda _: False, monitor, lambda *_, **__: _message())
    found = []
    for number, pixels in enumerate(images):
        if number == 3:
            pipeline.configure(parameters.replace(changes))
        monitor.now = 0.5 * number
        height, width = pixels.shape[:2]
        stamp = (number + 1) * 500_000_000
        pipeline.add_info(0, camera_info_message(demo_camera(width, height), stamp, ""))
        pipeline.process([image_message(pixels, stamp, "", "mono8")])
        found.append([problem.explanation for problem in monitor.problems()])
    return found


QUICK = Parameters(matcher="nearest", device="cpu", precision="float32", max_keypoints=128)


def test_frames_without_matches_for_a_second_are_reported_with_their_appearance(views: list[np.ndarray]) -> None:
    reported = reports([views[0], *[np.zeros_like(views[0])] * 4, views[1], views[2]], QUICK)
    assert reported[:3] == [[]] * 3 and not reported[-1]
    (text,) = reported[4]
    assert "nothing has matched for 2 s" in text and "0 keypoints" in text and "all dark" in text


def corner(folder: Path) -> str:
    """A mask that leaves only the corner of an image."""
    mask = np.zeros((120, 160), np.uint8)
    mask[:20, :20] = 255
    cv2.imwrite(str(folder / "mask.png"), mask)
    return str(folder / "mask.png")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_keypoints": 12}, "max_keypoints (12) is below min_inliers (15)"),
        ({"min_inliers": 150}, "max_keypoints (128) is below min_inliers (150)"),
        ({"keypoint_threshold": 0.999}, "keypoint_threshold is 0.999"),
        ({"mask": "corner"}, "the mask hides 98 % of the image"),
        ({"smooth": True}, "they may be blurred"),
    ],
)
def test_the_reason_why_nothing_matches_is_named(
    views: list[np.ndarray], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    images, changes = [*views, *views[:2]], dict(changes)
    if changes.pop("smooth", False):
        images = [np.tile(np.linspace(0, 255, 160).astype(np.uint8), (120, 1))] * 5
    if "mask" in changes:
        changes["mask"] = corner(tmp_path)
    (text,) = reports(images, QUICK.replace(changes))[-1]
    assert "nothing has matched for 2 s" in text and said in text


def test_nothing_is_reported_if_tracks_give_poses_although_few_keypoints_are_detected(walk: list[np.ndarray]) -> None:
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in walk[:7]]
    assert reports(grey, QUICK.replace({"max_keypoints": 256}), keypoint_threshold=0.999) == [[]] * 7


def test_a_dark_frame_before_an_activation_does_not_count_after_it() -> None:
    monitor = MonitorWithClock()
    for monitor.now in (0.0, 600.0):
        Pipeline(FrontEnd(QUICK), ["/image"], lambda *_: None, lambda _: False, monitor).restart()
        monitor.matched("dark")
        assert monitor.problems() == []


def _message() -> Any:
    return SimpleNamespace(header=SimpleNamespace())


def test_many_problems_give_one_sentence_per_kind_with_limited_length() -> None:
    monitor = MonitorWithClock()
    for number in range(300):
        monitor.rejected("data", f"an image was rejected: holds {number} bytes of data " + 100 * "x")
        monitor.rejected(f"reason {number % 9}", 5000 * "y" + str(number % 9))
    problems = monitor.problems()
    assert len(problems) == 10 and "299 bytes" in problems[0].explanation
    diagnostics = pytest.importorskip("kpmatch_ros.ros.diagnostics")
    text = diagnostics.in_short([*problems, Problem("a", "one\ntwo")])
    assert len(text) < 4000 and text.count("bytes of data") == 1 and "\n" not in text


def test_weights_that_are_a_fifo_are_refused_without_waiting(tmp_path: Path) -> None:
    for name in ("weights.safetensors", "weights.pth"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(WeightsError, match="FIFO"):
            FeatureMatcher(extractor=str(tmp_path / name))
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "superpoint"}')
    with pytest.raises(WeightsError):
        FeatureMatcher(extractor=str(tmp_path))


def test_a_full_range_camera_is_not_stretched_after_a_dark_image() -> None:
    stretch, random = Stretch(), np.random.default_rng(0)
    full = random.integers(5000, 60000, (120, 160, 1), dtype=np.uint16)
    before = stretch.to_8_bits(full)
    stretch.to_8_bits(random.integers(300, 500, (120, 160, 1), dtype=np.uint16))
    np.testing.assert_array_equal(stretch.to_8_bits(full), before)
