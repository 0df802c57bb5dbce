"""Tests of what a C++ front end reads: a separate program finds the package with CMake and reads bytes sent over DDS.

The program, cpp/read_message.cpp, refuses a message that violates the contract, and prints any other message as JSON.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

rclpy = pytest.importorskip("rclpy")

from builtin_interfaces.msg import Time  # noqa: E402
from domain_coordinator import domain_id  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from kpmatch_ros.geometry.pose import PoseStatus  # noqa: E402
from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose  # noqa: E402
from node_harness import running_node  # noqa: E402

Pixels = NDArray[np.uint8]
Program = Callable[[type, bytes], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def program(cpp_programs: Path) -> Program:
    """The C++ program that reads messages."""

    def run(kind: type, message: bytes) -> subprocess.CompletedProcess[str]:
        command = [str(cpp_programs / "read_message"), kind.__name__]
        done = subprocess.run(command, input=message, capture_output=True, timeout=60)
        return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


def read(program: Program, kind: type, message: bytes) -> dict[str, Any]:
    """Return the fields of a valid message as C++ reads them."""
    done = program(kind, message)
    assert (done.returncode, done.stderr) == (0, "")
    fields: dict[str, Any] = json.loads(done.stdout)
    return fields


def to_plain(value: Any) -> Any:
    """Convert a message to dicts, lists, numbers and text, as in the expected JSON."""
    if hasattr(value, "get_fields_and_field_types"):
        return {name: to_plain(getattr(value, name)) for name in value.get_fields_and_field_types()}
    return value.tolist() if isinstance(value, array | np.ndarray) else value


@pytest.fixture(scope="module")
def over_dds() -> Iterator[Callable[[Any], bytes]]:
    """Publishes a message and returns the bytes that a subscriber receives."""
    context = rclpy.Context()
    numbers = itertools.count()
    # A subscriber that is matched late receives the message, too.
    qos = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    with domain_id() as domain, pytest.MonkeyPatch.context() as environment:
        environment.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        rclpy.init(context=context, domain_id=domain)
        node = rclpy.create_node("message_peer", context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)

        def send(message: Any) -> bytes:
            received: list[bytes] = []
            topic = f"message_{next(numbers)}"
            subscription = node.create_subscription(type(message), topic, received.append, qos, raw=True)
            publisher = node.create_publisher(type(message), topic, qos)
            publisher.publish(message)
            end = time.monotonic() + 30
            while not received and time.monotonic() < end:
                executor.spin_once(timeout_sec=0.1)
            node.destroy_publisher(publisher)
            node.destroy_subscription(subscription)
            assert len(received) == 1, f"no {type(message).__name__} came back within 30 s"
            return received[0]

        yield send
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown(context=context)


# Messages with random contents that keep the contract


def to_array_of(typecode: str, values: np.ndarray[Any, Any]) -> array[Any]:
    return array(typecode, values.astype(typecode).tobytes())


def float32(rng: np.random.Generator) -> float:
    return float(np.float32(rng.exponential(20.0)))


def text(rng: np.random.Generator) -> str:
    """Return text, sometimes empty, with characters that JSON escapes and characters of 1 to 4 bytes in UTF-8."""
    return "".join(rng.choice(list('az/_ "\\\n\t\x01é左🤖'), rng.integers(0, 12)))


def header(rng: np.random.Generator) -> Header:
    stamp = Time(sec=int(rng.integers(-(2**31), 2**31)), nanosec=int(rng.integers(0, 10**9)))
    return Header(stamp=stamp, frame_id=text(rng))


def pixels(rng: np.random.Generator, count: int, width: int, height: int) -> array[Any]:
    return to_array_of("f", rng.uniform(-0.5, (width - 0.5, height - 0.5), (count, 2)))


def some_not_detected(rng: np.random.Generator, indices: np.ndarray) -> array[Any]:
    """Return keypoint indices, about every fourth of which is NOT_DETECTED, except for the first two."""
    carried = (rng.uniform(size=len(indices)) < 0.25) & (np.arange(len(indices)) > 1)
    return to_array_of("I", np.where(carried, MatchArray.NOT_DETECTED, indices))


def random_matches(rng: np.random.Generator, count: int, pairing: int, estimated: bool) -> MatchArray:
    width, height, reference_width, reference_height = (int(side) for side in rng.integers(1, 5000, 4))
    detected, reference_detected = (count + int(more) for more in rng.integers(0, 100, 2))
    consecutive = pairing == MatchArray.CONSECUTIVE
    return MatchArray(
        header=header(rng),
        reference=header(rng),
        pairing=pairing,
        width=width,
        height=height,
        reference_width=reference_width,
        reference_height=reference_height,
        num_keypoints=detected,
        reference_num_keypoints=reference_detected,
        points=pixels(rng, count, width, height),
        reference_points=pixels(rng, count, reference_width, reference_height),
        indices=some_not_detected(rng, rng.permutation(detected)[:count]),
        reference_indices=some_not_detected(rng, rng.permutation(reference_detected)[:count]),
        scores=to_array_of("f", rng.uniform(0, 1, count)),
        track_ids=to_array_of("Q", rng.integers(0, 2**64, count if consecutive else 0, np.uint64)),
        inliers=to_array_of("B", rng.integers(0, 2, count if estimated else 0)),
        layers=int(rng.integers(0, 256)),
        reset=bool(rng.integers(0, 2)),
        extract_ms=float32(rng),
        match_ms=float32(rng),
        extractor=text(rng),
        matcher=text(rng),
        sigmas=to_array_of("f", rng.uniform(0.01, 2, count)),
    )


def random_pose(rng: np.random.Generator, status: int, metric: bool = False) -> RelativePose:
    num_matches = int(rng.integers(0, 2**32))
    message = RelativePose(
        header=header(rng),
        reference=header(rng),
        metric=metric,
        status=status,
        num_matches=num_matches,
        num_inliers=int(rng.integers(0, num_matches, endpoint=True)),
        median_parallax=float32(rng),
    )
    pose = message.pose.pose
    if status == RelativePose.INTERRUPTED:
        message.reference = Header()
    if status in (RelativePose.OK, RelativePose.NO_TRANSLATION, RelativePose.AMBIGUOUS):
        quaternion = rng.normal(size=4)
        quaternion /= np.linalg.norm(quaternion)
        pose.orientation.x, pose.orientation.y, pose.orientation.z, pose.orientation.w = map(float, quaternion)
        spread = rng.normal(size=(6, 6))
        message.pose.covariance = (spread @ spread.T).ravel()
    if status in (RelativePose.OK, RelativePose.AMBIGUOUS):
        translation = rng.normal(size=3)
        translation *= 1 if metric else 1 / np.linalg.norm(translation)
        pose.position.x, pose.position.y, pose.position.z = map(float, translation)
    return message


def random_features(rng: np.random.Generator, count: int, descriptor_size: int = 256) -> FeatureArray:
    width, height = (int(side) for side in rng.integers(1, 5000, 2))
    descriptors = rng.normal(size=(count, descriptor_size))
    return FeatureArray(
        header=header(rng),
        width=width,
        height=height,
        points=pixels(rng, count, width, height),
        scores=to_array_of("f", rng.uniform(0, 1, count)),
        descriptor_size=descriptor_size,
        descriptors=to_array_of("f", descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)),
        extractor=text(rng),
    )


@pytest.mark.parametrize("estimated", [True, False], ids=["with inliers", "without inliers"])
@pytest.mark.parametrize("pairing", [MatchArray.CONSECUTIVE, MatchArray.STEREO], ids=["consecutive", "stereo"])
@pytest.mark.parametrize("count", [0, 1, 1000, 20_000])
def test_cpp_reads_every_field_of_a_match_array(
    program: Program, over_dds: Callable[[Any], bytes], count: int, pairing: int, estimated: bool
) -> None:
    message = random_matches(np.random.default_rng([count, pairing, estimated]), count, pairing, estimated)
    assert read(program, MatchArray, over_dds(message)) == to_plain(message)


@pytest.mark.parametrize("seed", range(8))
def test_cpp_reads_arbitrary_names_and_stamps(program: Program, over_dds: Callable[[Any], bytes], seed: int) -> None:
    message = random_matches(np.random.default_rng(seed), 3, MatchArray.CONSECUTIVE, True)
    assert read(program, MatchArray, over_dds(message)) == to_plain(message)


@pytest.mark.parametrize("metric", [True, False], ids=["metric", "unit"])
@pytest.mark.parametrize("status", [status.name for status in PoseStatus])
def test_cpp_reads_every_field_of_a_relative_pose(
    program: Program, over_dds: Callable[[Any], bytes], status: str, metric: bool
) -> None:
    value = getattr(RelativePose, status)
    message = random_pose(np.random.default_rng([value, metric]), value, metric)
    assert read(program, RelativePose, over_dds(message)) == to_plain(message)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_cpp_reads_every_field_of_a_feature_array(
    program: Program, over_dds: Callable[[Any], bytes], count: int
) -> None:
    message = random_features(np.random.default_rng(count), count)
    assert read(program, FeatureArray, over_dds(message)) == to_plain(message)


def without_last(field: str) -> Callable[[Any], None]:
    return lambda message: getattr(message, field).pop()


def with_first(field: str, value: float) -> Callable[[Any], None]:
    return lambda message: getattr(message, field).__setitem__(0, value)


def with_field(field: str, value: Any) -> Callable[[Any], None]:
    return lambda message: setattr(message, field, value)


def repeated(field: str) -> Callable[[Any], None]:
    return lambda message: getattr(message, field).__setitem__(0, getattr(message, field)[1])


NAN = float("nan")
BROKEN_MATCHES = [
    (with_field("pairing", 7), "pairing is CONSECUTIVE, STEREO or REQUESTED"),
    (with_field("pairing", MatchArray.STEREO), "track_ids is as long as scores for CONSECUTIVE, or empty"),
    (without_last("points"), "points holds two numbers for each score"),
    (without_last("reference_points"), "reference_points holds two numbers for each score"),
    (without_last("indices"), "indices is as long as scores"),
    (without_last("reference_indices"), "reference_indices is as long as scores"),
    (without_last("track_ids"), "track_ids is as long as scores for CONSECUTIVE, or empty"),
    (without_last("sigmas"), "sigmas is as long as scores"),
    (with_first("sigmas", NAN), "sigmas are finite and positive"),
    (with_first("sigmas", 0.0), "sigmas are finite and positive"),
    (without_last("inliers"), "inliers is empty or as long as scores"),
    (with_first("points", NAN), "points lie in the current image"),
    (with_first("points", -0.6), "points lie in the current image"),
    (with_field("width", 0), "points lie in the current image"),
    (with_field("reference_height", 0), "reference_points lie in the reference image"),
    (with_field("num_keypoints", 3), "indices are below num_keypoints"),
    (with_field("reference_num_keypoints", 3), "reference_indices are below reference_num_keypoints"),
    (repeated("indices"), "a keypoint of the current image is matched once"),
    (repeated("reference_indices"), "a keypoint of the reference image is matched once"),
    (repeated("track_ids"), "track_ids differ within an image"),
    (with_first("scores", 1.01), "scores lie in [0, 1]"),
    (with_first("scores", NAN), "scores lie in [0, 1]"),
    (with_first("inliers", 2), "inliers are 0 or 1"),
    (with_field("match_ms", NAN), "extract_ms and match_ms are finite and not negative"),
]


@pytest.mark.parametrize(("break_it", "rule"), BROKEN_MATCHES, ids=[rule for _, rule in BROKEN_MATCHES])
def test_cpp_refuses_a_match_array_that_breaks_the_contract(
    program: Program, break_it: Callable[[Any], None], rule: str
) -> None:
    message = random_matches(np.random.default_rng(0), 20, MatchArray.CONSECUTIVE, True)
    break_it(message)
    done = program(MatchArray, serialize_message(message))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"broken: {rule}\n")


def with_pose(part: str, **values: float) -> Callable[[Any], None]:
    def break_it(message: RelativePose) -> None:
        for name, value in values.items():
            setattr(getattr(message.pose.pose, part), name, value)

    return break_it


def with_variance(place: int, value: float) -> Callable[[Any], None]:
    return lambda message: message.pose.covariance.__setitem__(place, value)


BROKEN_POSES = [
    ("OK", with_pose("position", x=0.0, y=0.0, z=0.9), "t is a unit vector where it is not metric"),
    ("OK", with_pose("orientation", x=0.0, y=0.0, z=0.0, w=0.0), "the quaternion has length one"),
    ("OK", with_field("median_parallax", NAN), "every number is finite"),
    ("OK", with_variance(35, np.inf), "every number is finite"),
    ("AMBIGUOUS", with_pose("position", x=0.0, y=0.0, z=0.0), "t is a unit vector where it is not metric"),
    ("NO_TRANSLATION", with_pose("position", x=0.1), "without a translation t is zero"),
    ("OK", with_variance(7, -1e-6), "the covariance is symmetric, and no variance is negative"),
    ("AMBIGUOUS", with_variance(1, 9.0), "the covariance is symmetric, and no variance is negative"),
    ("TOO_FEW_MATCHES", with_variance(0, 1.0), "without a pose the covariance is zero"),
    ("INTERRUPTED", with_field("reference", Header(frame_id="camera")), "an INTERRUPTED pose has no reference"),
    ("FAILED", with_pose("orientation", y=1.0, w=0.0), "without a pose the rotation is the identity"),
    ("FAILED", with_field("status", 7), "status is one of the constants"),
    ("NO_CALIBRATION", with_field("num_matches", 0), "num_inliers is at most num_matches"),
]


@pytest.mark.parametrize(
    ("status", "break_it", "rule"), BROKEN_POSES, ids=[f"{status}: {rule}" for status, _, rule in BROKEN_POSES]
)
def test_cpp_refuses_a_relative_pose_that_breaks_the_contract(
    program: Program, status: str, break_it: Callable[[Any], None], rule: str
) -> None:
    message = random_pose(np.random.default_rng(0), getattr(RelativePose, status))
    break_it(message)
    done = program(RelativePose, serialize_message(message))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"broken: {rule}\n")


@pytest.mark.parametrize("length", [0, 3, 4, 50, -1], ids=["no bytes", "a part of the head", "the head", "50", "most"])
def test_cpp_refuses_a_truncated_message(program: Program, length: int) -> None:
    message = serialize_message(random_matches(np.random.default_rng(0), 20, MatchArray.CONSECUTIVE, True))
    cut = message[:length] if length >= 0 else message[:-40]
    done = program(MatchArray, cut)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"the {len(cut)} bytes are no such message" in done.stderr


# The node itself


def mono8(image: Pixels, sec: int) -> Image:
    height, width = image.shape
    head = Header(stamp=Time(sec=sec, nanosec=5), frame_id="camera_optical")
    return Image(header=head, height=height, width=width, encoding="mono8", step=width, data=to_array_of("B", image))


def test_cpp_reads_the_messages_of_the_node(
    program: Program, tmp_path: Path, texture: Callable[[int, int, int], Pixels]
) -> None:
    topics = {"matches": MatchArray, "relative_pose": RelativePose, "features": FeatureArray}
    raw: dict[str, list[bytes]] = {topic: [] for topic in topics}
    # Two windows of one picture: a point at p in the first window is at p - (9, 5) in the second.
    picture = texture(280, 360, 0)
    reference_image, image = picture[:240, :320], picture[5:245, 9:329]
    with running_node(tmp_path, calibrated=False, max_keypoints=512) as peer:
        for topic, kind in topics.items():
            peer.node.create_subscription(kind, topic, raw[topic].append, 10, raw=True)
        peer.subscribe(FeatureArray, "features", peer.features.append)
        peer.wait_until_connected()
        peer.send(mono8(reference_image, 1))
        peer.send(mono8(image, 2))
        received = {"matches": peer.matches, "relative_pose": peer.poses, "features": peer.features}
        expected = {"matches": 1, "relative_pose": 1, "features": 2}  # two frames, but only one pair

        def arrived() -> bool:
            return all(len(raw[topic]) >= count <= len(received[topic]) for topic, count in expected.items())

        peer.wait_for(arrived, f"messages: {expected}")

    for topic, kind in topics.items():
        assert [read(program, kind, message) for message in raw[topic]] == [to_plain(item) for item in received[topic]]

    matches = read(program, MatchArray, raw["matches"][0])
    assert matches["header"] == {"stamp": {"sec": 2, "nanosec": 5}, "frame_id": "camera_optical"}
    assert matches["reference"] == {"stamp": {"sec": 1, "nanosec": 5}, "frame_id": "camera_optical"}
    assert matches["reset"] is True
    assert len(matches["scores"]) >= 50
    moved = np.reshape(matches["reference_points"], (-1, 2)) - np.reshape(matches["points"], (-1, 2))
    assert np.median(moved, axis=0) == pytest.approx([9, 5], abs=0.5)

    pose = read(program, RelativePose, raw["relative_pose"][0])
    assert pose["status"] == RelativePose.NO_CALIBRATION
    assert pose["num_matches"] == len(matches["scores"])

    reference, current = (read(program, FeatureArray, message) for message in raw["features"])
    assert reference["header"] == matches["reference"]
    assert current["header"] == matches["header"]
    # The match indices point to the features, at the pixels near which the points are.
    for features, points, indices in (
        (current, matches["points"], matches["indices"]),
        (reference, matches["reference_points"], matches["reference_indices"]),
    ):
        known = np.array(indices) != MatchArray.NOT_DETECTED
        keypoints = np.reshape(features["points"], (-1, 2))[np.array(indices)[known]]
        away = np.linalg.norm(keypoints - np.reshape(points, (-1, 2))[known], axis=1)
        assert known.sum() >= 50 and away.max() <= 3
