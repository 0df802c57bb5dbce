"""Sends thousands of broken, odd and valid messages: none may end the node, produce NaN, or spoil a later good frame.

Every run sends the same MESSAGES. KPMATCH_FUZZ sets a larger number; 10,000 messages take a minute.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kpmatch_ros.imaging.images import LAYOUTS
from kpmatch_ros.msg import MatchArray, RelativePose
from node_harness import NodeUnderTest, running_node

MESSAGES = int(os.environ.get("KPMATCH_FUZZ", "2000"))
BATCH = 250  # number of messages between two checks that a valid frame is processed

# All names in sensor_msgs/image_encodings, and some that no camera should send.
ENCODINGS = [
    *(f"{kind}C{channels}" for kind in ("8U", "8S", "16U", "16S", "32S", "32F", "64F") for channels in (1, 2, 3, 4)),
    *(f"{colour}{bits}" for colour in ("mono", "rgb", "bgr", "rgba", "bgra") for bits in (8, 16)),
    *(f"bayer_{pattern}{bits}" for pattern in ("rggb", "bggr", "gbrg", "grbg") for bits in (8, 16)),
    *("yuv422", "yuv422_yuy2", "uyvy", "yuyv", "nv12", "nv21", "nv24"),
    *("", " ", "rgb7", "MONO8", "mono8 ", "8UC", "8UC0", "8UC99", "jpeg", "ü" * 30, "A" * 5000, "../../etc", "%s%n"),
]
SIDES = [0, 1, 2, 3, 5, 7, 8, 9, 16, 31, 40, 64, 97]
STAMPS = [0.0, 1.0, 1.0, 1e-9, 5.0, 1000.0, 31_557_600.0, 2_147_483_647.0]
DISTORTIONS = ["plumb_bob", "rational_polynomial", "equidistant", "fisheye", "", "thin_prism", "Ω"]
NUMBERS = [0.0, 1.0, -1.0, 30.0, 300.0, 1e300, -1e300, 1e-300, float("nan"), float("inf"), float("-inf")]


def stamped(message: Any, seconds: float, frame: str) -> Any:
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(int(seconds * 1e9), 1_000_000_000)
    message.header.frame_id = frame
    return message


def random_stamp(rng: np.random.Generator) -> float:
    return float(rng.choice(STAMPS)) if rng.random() < 0.3 else 1000.0 + 10 * float(rng.random())


def random_frame(rng: np.random.Generator) -> str:
    return str(rng.choice(["camera", "camera", "", "/", "ü" * 50, "a/b/c", "x" * 3000]))


def random_image(rng: np.random.Generator) -> Image:
    """Return an image message. Any part of it may be wrong, but often nothing is."""
    encoding = str(rng.choice(ENCODINGS))
    width, height = (int(side) for side in rng.choice(SIDES, 2))
    layout = LAYOUTS.get(encoding)
    pixel = layout.channels * np.dtype(layout.dtype).itemsize if layout else int(rng.integers(1, 9))
    step, rows = width * pixel, height * {"nv12": 2, "nv21": 2, "nv24": 3}.get(encoding, 1)
    if rng.random() < 0.2:
        step += int(rng.choice([1, 3, 64]))
    size = step * rows
    message = Image(encoding=encoding, width=width, height=height, is_bigendian=int(rng.choice([0, 0, 0, 1, 255])))
    if rng.random() < 0.1:
        step = int(rng.choice([0, 1, max(step - 1, 0), 2**31, 2**32 - 1]))
    if rng.random() < 0.05:
        setattr(message, str(rng.choice(["width", "height"])), int(rng.choice([65_536, 2**31, 2**32 - 1, 7680])))
    if rng.random() < 0.001:
        message.encoding, layout = "mono8", LAYOUTS["mono8"]
        message.width, message.height, step, size = 7680, 4320, 7680, 7680 * 4320
    elif rng.random() < 0.15:
        size = int(rng.choice([0, 1, max(size - 1, 0), size // 2, size + 1, 2 * size]))
    message.step = step
    message.data = random_bytes(rng, size, layout.dtype if layout else "u1")
    return message


def random_bytes(rng: np.random.Generator, size: int, dtype: str) -> bytes:
    """Return noise, a constant, or floats that are a valid or an invalid picture."""
    if dtype.startswith("f") and rng.random() < 0.8:
        values = rng.random(size // np.dtype(dtype).itemsize + 1).astype(dtype)
        if rng.random() < 0.5:
            with np.errstate(over="ignore"):
                values[rng.integers(0, len(values))] = rng.choice(NUMBERS)
        return values.tobytes()[:size]
    if rng.random() < 0.3:
        return bytes([int(rng.choice([0, 127, 255]))]) * size
    return rng.bytes(size)


def random_calibration(rng: np.random.Generator) -> CameraInfo:
    info = CameraInfo(width=int(rng.choice([*SIDES, WIDTH])), height=int(rng.choice([*SIDES, HEIGHT])))
    info.distortion_model = str(rng.choice(DISTORTIONS))
    count = int(rng.choice([0, 4, 5, 8, 3]))
    info.d = [float(rng.choice(NUMBERS)) if rng.random() < 0.2 else 0.01 for _ in range(count)]
    for name in ("k", "r", "p"):
        good = calibration()
        values = np.array(getattr(good, name), float)
        if rng.random() < 0.3:
            values[rng.integers(0, len(values))] = rng.choice(NUMBERS)
        setattr(info, name, values)
    info.binning_x = int(rng.choice([0, 1, 2, 1000]))
    info.roi.width = int(rng.choice([0, 10, 2**31]))
    return info


WIDTH, HEIGHT = 128, 96


def calibration() -> CameraInfo:
    info = CameraInfo(width=WIDTH, height=HEIGHT, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k = [100.0, 0.0, WIDTH / 2, 0.0, 100.0, HEIGHT / 2, 0.0, 0.0, 1.0]
    info.r = np.eye(3).ravel()
    info.p = [100.0, 0.0, WIDTH / 2, 0.0, 0.0, 100.0, HEIGHT / 2, 0.0, 0.0, 0.0, 1.0, 0.0]
    return info


def good_images(texture: Any) -> list[Image]:
    """Two views, the second shifted by 16 pixels to the right and 8 down."""
    picture = texture(HEIGHT + 8, WIDTH + 16, 7)
    views = [picture[:HEIGHT, :WIDTH], np.ascontiguousarray(picture[8:, 16:])]
    return [Image(encoding="mono8", width=WIDTH, height=HEIGHT, step=WIDTH, data=view.tobytes()) for view in views]


def assert_finite_and_consistent(matches: list[MatchArray], poses: list[RelativePose]) -> None:
    """Check that all published values are finite, and that the arrays of a message fit together."""
    for message in matches:
        count = len(message.scores)
        assert len(message.points) == len(message.reference_points) == 2 * count
        assert len(message.indices) == len(message.reference_indices) == count
        assert len(message.track_ids) == (0 if message.pairing == MatchArray.STEREO else count)
        assert len(message.inliers) in (0, count)
        for values in (message.points, message.reference_points, message.scores, message.sigmas):
            assert np.isfinite(np.asarray(values)).all()
        detected = [index for index in message.indices if index != MatchArray.NOT_DETECTED]
        assert max(detected, default=-1) < message.num_keypoints
    for pose in poses:
        position, orientation = pose.pose.pose.position, pose.pose.pose.orientation
        numbers = [position.x, position.y, position.z, orientation.x, orientation.y, orientation.z, orientation.w]
        assert np.isfinite([*numbers, *pose.pose.covariance, pose.median_parallax]).all()
        assert np.linalg.norm(numbers[3:]) == pytest.approx(1, abs=1e-6)


def assert_good_frames_are_processed(node: NodeUnderTest, images: list[Image], seconds: float) -> None:
    assert_finite_and_consistent(node.matches, node.poses)
    node.matches.clear()
    node.poses.clear()
    for i, message in enumerate(images):
        node.send(stamped(message, seconds + i, "good"), stamped(calibration(), seconds + i, "good"))

    def arrived() -> bool:
        return any(each.reference.frame_id == each.header.frame_id == "good" for each in node.matches)

    node.wait_for(arrived, f"the pair at {seconds} s after bad input")
    last = node.matches[-1]
    moved = np.reshape(last.reference_points, (-1, 2)) - np.reshape(last.points, (-1, 2))
    assert (np.linalg.norm(moved - (16, 8), axis=1) < 2).sum() > 5


def assert_figures_add_up(node: NodeUnderTest) -> None:
    """Check that each diagnostics message accounts for each received frame once."""
    for array in node.diagnostics:
        counts = {item.key: int(item.value) for item in array.status[0].values if item.key.startswith("frames ")}
        parts = ("processed", "dropped", "rejected", "waiting")
        assert counts["frames received"] == sum(counts[f"frames {part}"] for part in parts)
        assert min(counts.values()) >= 0


@pytest.mark.timeout(900)
def test_the_node_survives_thousands_of_random_images_and_calibrations(
    tmp_path: Path, random_folder: Callable[..., Path], texture: Any
) -> None:
    rng = np.random.default_rng(2026)
    folder = str(random_folder())
    images = good_images(texture)
    sent = MESSAGES + 2 * (MESSAGES // BATCH)
    calibrations = 0
    with running_node(tmp_path, extractor=folder, matcher=folder, max_keypoints=100) as node:
        node.wait_until_connected()
        for number in range(MESSAGES):
            if rng.random() < 0.1:
                node.infos.publish(stamped(random_calibration(rng), random_stamp(rng), random_frame(rng)))
                calibrations += 1
            node.images.publish(stamped(random_image(rng), random_stamp(rng), random_frame(rng)))
            if number % BATCH == BATCH - 1:
                assert_good_frames_are_processed(node, images, 3000.0 + number)
        figures = node.wait_for_figure("frames received", str(sent))
        figures = node.wait_for_figure("frames waiting", "0")
        assert_figures_add_up(node)
        reasons = {key: int(value) for key, value in figures.items() if key.startswith("rejected: ")}
        expected = {f"rejected: {reason}" for reason in ("data", "encoding", "size", "step", "value")}
        assert set(reasons) == expected, node.log
        assert min(reasons.values()) > 20
        assert int(figures["frames processed"]) > sent / 5
        assert calibrations > MESSAGES / 20
        assert "Traceback" not in node.log
        assert node.stop() == 0


def unusable_calibrations() -> dict[str, CameraInfo]:
    """Return one calibration for each reason of a refusal."""
    infos = {reason: calibration() for reason in ("uncalibrated", "size", "model", "value")}
    infos["uncalibrated"].k = [0.0] * 9
    infos["size"].width = 2 * WIDTH
    infos["model"].distortion_model = "Ω"
    infos["model"].d = [0.1] * 5
    infos["value"].k[0] = float("nan")
    return infos


def test_refused_calibrations_are_counted_by_reason_and_cost_no_frame(
    tmp_path: Path, random_folder: Callable[..., Path], texture: Any
) -> None:
    folder = str(random_folder())
    images = good_images(texture)
    with running_node(tmp_path, extractor=folder, matcher=folder, max_keypoints=100) as node:
        node.wait_until_connected()
        node.wait_for(lambda: node.diagnostics, "diagnostics")
        sent = 0

        def is_refused(reason: str, info: CameraInfo) -> bool:
            nonlocal sent
            node.send(stamped(images[sent % 2], 10.0 + sent, "camera"), stamped(info, 10.0 + sent, "camera"))
            sent += 1
            node.spin(0.5)
            return f"camera_info refused: {reason}" in node.figures()

        for reason, info in unusable_calibrations().items():
            node.wait_for(functools.partial(is_refused, reason, info), f"a calibration to be refused: {reason}")
        node.wait_for(lambda: len(node.poses) == sent - 1, "every frame")
        assert {pose.status for pose in node.poses} == {RelativePose.NO_CALIBRATION}
        assert node.stop() == 0


def random_compressed_images(rng: np.random.Generator, texture: Any) -> Iterator[CompressedImage]:
    """Yield JPEG and PNG files, valid and broken in any way, with correct and wrong names."""
    for number in range(400):
        pixels = texture(64, 64, number % 5)[: int(rng.choice([1, 8, 33, 64])), : int(rng.choice([1, 8, 33, 64]))]
        extension = str(rng.choice([".jpg", ".png"]))
        content = bytearray(cv2.imencode(extension, pixels)[1].tobytes())
        kind = rng.integers(0, 5)
        if kind == 1:
            del content[rng.integers(0, len(content)) :]
        elif kind == 2:
            for place in rng.integers(0, len(content), 10):
                content[place] = rng.integers(0, 256)
        elif kind == 3:
            content = bytearray(rng.bytes(int(rng.integers(0, 500))))
        elif kind == 4:
            content += rng.bytes(100)
        names = ["jpeg", "png", "rgb8; jpeg compressed bgr8", "", "32FC1; compressedDepth png", "bayer_rggb8; png"]
        yield CompressedImage(format=str(rng.choice(names)), data=bytes(content))


def test_the_node_survives_random_compressed_images(
    tmp_path: Path, random_folder: Callable[..., Path], texture: Any
) -> None:
    rng = np.random.default_rng(7)
    folder = str(random_folder())
    with running_node(
        tmp_path, calibrated=False, extractor=folder, matcher=folder, max_keypoints=100, image_transport="compressed"
    ) as node:
        publisher = node.node.create_publisher(CompressedImage, "image/compressed", 1000)
        node.wait_for(publisher.get_subscription_count, "the node to come up")
        node.wait_for(lambda: node.node.count_publishers("matches"), "its topics")
        node.wait_until_known()
        for message in random_compressed_images(rng, texture):
            publisher.publish(stamped(message, random_stamp(rng), random_frame(rng)))
        for i, good in enumerate(good_images(texture)):
            pixels = np.frombuffer(good.data, np.uint8).reshape(HEIGHT, WIDTH)
            png = cv2.imencode(".png", pixels)[1].tobytes()
            publisher.publish(stamped(CompressedImage(format="png", data=png), 5000.0 + i, "good"))
        node.wait_for(lambda: any(each.reference.frame_id == "good" for each in node.matches), "the good pair")
        assert_finite_and_consistent(node.matches, node.poses)
        figures = node.wait_for_figure("frames waiting", "0")
        assert int(figures["rejected: decode"]) > 50 and int(figures["frames processed"]) > 50
        assert figures["frames received"] == "402"
        assert_figures_add_up(node)
        assert "Traceback" not in node.log
        assert node.stop() == 0
