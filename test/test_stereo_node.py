"""Tests of the real node with a stereo pair over DDS: its messages, and its reports about incorrect pairs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from nav_msgs.msg import Odometry
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header
from test_node import change_state

from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from node_harness import NodeUnderTest, running_node, stamp_of

WIDTH, HEIGHT, FOCAL, BASELINE = 320, 240, 300.0, 0.1
NEAR, FAR = 2.0, 5.0  # metres
PARAMETERS = {"profile": "fast", "mode": "stereo", "rectified": True, "max_keypoints": 200}


def picture(seed: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    pixels = np.full((HEIGHT, width), 128, np.uint8)
    for _ in range(width):
        x, y = (int(value) for value in random.integers((0, 0), (width, HEIGHT)))
        size, shade = int(random.integers(5, 25)), int(random.integers(0, 256))
        cv2.rectangle(pixels, (x, y), (x + size, y + size), shade, -1)
    return cv2.GaussianBlur(pixels, (0, 0), 0.8)


UPPER, LOWER = picture(1, 1000), picture(2, 1000)


def view(x: float) -> np.ndarray:
    """Return the image of a far wall in the upper half and a near one in the lower, from `x` metres to the right."""
    image = np.empty((HEIGHT, WIDTH), np.uint8)
    for rows, wall, depth in ((slice(0, 120), UPPER, FAR), (slice(120, 240), LOWER, NEAR)):
        shift = np.float32([[1, 0, -300 - FOCAL * x / depth], [0, 1, 0]])
        image[rows] = cv2.warpAffine(wall, shift, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)[rows]
    return image


def stamped(message: Any, seconds: float, frame: str) -> Any:
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(seconds * 1e9), 1_000_000_000)
    message.header.frame_id = frame
    return message


def info(seconds: float, side: str, baseline: float = BASELINE, size: tuple[int, int] = (WIDTH, HEIGHT)) -> CameraInfo:
    message = CameraInfo(width=size[0], height=size[1], distortion_model="plumb_bob", d=[0.0] * 5)
    offset = -FOCAL * baseline if side == "right" else 0.0
    message.k = [FOCAL, 0.0, WIDTH / 2, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 1.0]
    message.p = [FOCAL, 0.0, WIDTH / 2, offset, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 0.0, 1.0, 0.0]
    return stamped(message, seconds, f"{side}_optical")


class Rig:
    """A stereo camera driver and its node."""

    def __init__(self, node: NodeUnderTest, compressed: bool) -> None:
        self.node, self.compressed = node, compressed
        self._waited = True
        self._publishers = {}
        for side in ("left", "right"):
            kind, name = (CompressedImage, "/image/compressed") if compressed else (Image, "/image")
            self._publishers[side] = node.node.create_publisher(kind, side + name, QoSProfile(depth=100))
            self._publishers[side + " info"] = node.node.create_publisher(
                CameraInfo, f"{side}/camera_info", QoSProfile(depth=100)
            )
        self.wait_until_connected()

    def wait_until_connected(self) -> None:
        """Wait until the node is active: it has subscribed, and this side has discovered its publishers."""
        node, publishers = self.node, self._publishers.values()
        node.wait_for(lambda: all(one.get_subscription_count() for one in publishers), "the node to subscribe")
        topics = ("stereo_matches", "relative_pose", "matches")
        node.wait_for(lambda: all(node.node.count_publishers(topic) for topic in topics), "its topics")
        node.wait_until_known()

    def wait_until_gone(self) -> None:
        """Wait until this side has discovered that the deactivated node has unsubscribed."""
        publishers = self._publishers.values()
        self.node.wait_for(lambda: not any(one.get_subscription_count() for one in publishers), "it to unsubscribe")

    def send(
        self,
        seconds: float,
        x: float,
        late: float = 0.0,
        images: str = "left right",
        swapped: bool = False,
        **calibration: Any,
    ) -> None:
        """Send a frame from `x` metres to the right. The right image's stamp is `late` seconds later."""
        if self._waited:  # the next warning is about images sent from here on
            self.node.diagnostics.clear()
            self._waited = False
        stamps = {"left": seconds, "right": seconds + late}
        self.node.calibrate(
            *((self._publishers[f"{side} info"], info(stamp, side, **calibration)) for side, stamp in stamps.items())
        )
        for side, offset in (("left", BASELINE * swapped), ("right", BASELINE * (not swapped))):
            stamp = stamps[side]
            if side in images:
                pixels = view(x + offset)
                if self.compressed:
                    message = CompressedImage(format="png", data=cv2.imencode(".png", pixels)[1].tobytes())
                else:
                    message = Image(encoding="mono8", width=WIDTH, height=HEIGHT, step=WIDTH, data=pixels.tobytes())
                self._publishers[side].publish(stamped(message, stamp, f"{side}_optical"))
        self.node.spin(0.02)

    def wait_for_warning(self, text: str) -> None:
        def named() -> bool:
            return any(text in array.status[0].message for array in self.node.diagnostics)

        self.node.wait_for(named, f"the warning {text!r}")
        self._waited = True


@contextmanager
def rig(tmp_path: Path, compressed: bool = False, **parameters: Any) -> Iterator[Rig]:
    if compressed:
        parameters["image_transport"] = "compressed"
    with running_node(tmp_path, **PARAMETERS, **parameters) as node:
        yield Rig(node, compressed)


def test_landmarks_are_on_the_two_walls(tmp_path: Path) -> None:
    kind = np.dtype([("xyz", "<f4", 3), ("track_id", "<u8"), ("sigma", "<f4"), ("rgb", "<u4")])
    with rig(tmp_path) as camera:
        node = camera.node
        clouds: list[PointCloud2] = []
        node.subscribe(PointCloud2, "landmarks", clouds.append)
        node.wait_for(lambda: node.node.count_publishers("landmarks"), "the topic")
        node.wait_until_known()
        for number in range(2):
            camera.send(10.0 + 0.1 * number, 0.02 * number)
            node.wait_for(lambda: len(clouds) == number + 1, "the landmarks")  # noqa: B023
        node.wait_for(lambda: node.matches, "the matches")
        for number, cloud in enumerate(clouds):
            assert cloud.header.frame_id == "left_optical" and cloud.header.stamp.nanosec == number * 100_000_000
            points = np.frombuffer(cloud.data, kind)
            x, y, z = points["xyz"].T
            wall = np.where(y < 0, FAR, NEAR)
            assert len(points) > 50 and np.median(abs(z - wall) / points["sigma"]) < 1.5
            assert np.median(abs(z - wall) / wall) < 0.02
            assert (points["track_id"] > 0).mean() > (0.5 if number else -1)
        assert set(points["track_id"].tolist()) - {0} <= set(node.matches[0].track_ids)


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_every_frame_gives_stereo_matches_and_a_pose_in_metres(tmp_path: Path, compressed: bool) -> None:
    with rig(tmp_path, compressed) as camera:
        node = camera.node
        features: list[FeatureArray] = []
        node.subscribe(FeatureArray, "features", features.append)
        node.wait_for(lambda: node.node.count_publishers("features"), "the topic")
        node.wait_until_known()
        for i in range(4):
            camera.send(10 + 0.1 * i, 0.05 * i, late=0.004)
        node.wait_for(lambda: len(node.poses) == len(node.matches) == 3 and len(node.stereo_matches) == 4, "the frames")
        node.wait_for(lambda: len(features) == 8, "left and right features of four frames")
        assert [message.header.frame_id for message in features] == 4 * ["left_optical", "right_optical"]
        for pose, matches in zip(node.poses, node.matches):
            assert pose.status == RelativePose.OK and pose.metric
            position = pose.pose.pose.position
            assert [position.x, position.y, position.z] == pytest.approx([0.05, 0, 0], abs=0.003)
            assert pose.header == matches.header and pose.header.frame_id == "left_optical"
            assert matches.pairing == MatchArray.CONSECUTIVE and len(matches.track_ids) == len(matches.scores) > 50
        for i, stereo in enumerate(node.stereo_matches):
            assert stereo.pairing == MatchArray.STEREO and len(stereo.track_ids) == 0
            assert (stereo.reference.frame_id, stereo.header.frame_id) == ("left_optical", "right_optical")
            assert stereo.header.stamp.nanosec == 4_000_000 + 100_000_000 * i
            inliers = np.array(stereo.inliers, bool)
            assert inliers.sum() > 50 and stereo.num_keypoints <= 200
            points, reference = (np.array(a).reshape(-1, 2) for a in (stereo.points, stereo.reference_points))
            assert (np.abs((reference - points)[inliers, 1]) <= 1).all() and (reference - points)[inliers, 0].min() > 0
        figures = node.wait_for_figure("frames processed", "4")
        assert figures["frames received"] == "4" and int(figures["stereo matches"]) > 50
        assert node.stop() == 0


def test_an_unusable_calibration_is_reported_and_gives_no_pose(tmp_path: Path) -> None:
    with rig(tmp_path) as camera:
        node, seconds, frames = camera.node, 10.0, 0
        for changes, reason in (
            ({"baseline": 0.0}, "the baseline is zero"),
            ({"baseline": -BASELINE}, "left and right are swapped"),
            ({"size": (640, 480)}, "its calibration is for 640x480"),
            ({"swapped": True}, "left and right images are swapped"),
        ):
            for _ in range(2):
                seconds += 0.1
                camera.send(seconds, 0.0, **changes)
            camera.wait_for_warning(reason)
            frames += 2
            node.wait_for(lambda frames=frames: len(node.poses) == frames - 1, "both frames")
        assert [pose.status for pose in node.poses] == [RelativePose.NO_CALIBRATION] * 7
        assert len(node.stereo_matches[-1].scores) > 50
        for i in range(2):
            camera.send(seconds + 0.1 + 0.1 * i, 0.05 * i)
        node.wait_for(lambda: node.poses[-1].status == RelativePose.OK, "a pose with the right calibration")


def test_a_silent_camera_and_unpaired_stamps_are_reported(tmp_path: Path) -> None:
    with rig(tmp_path) as camera:
        for i in range(5):
            camera.send(10 + 0.05 * i, 0.0, images="left")
        camera.wait_for_warning(f"no image on {camera.node.namespace}/right/image")
        node = camera.node
        node.wait_for(lambda: node.poses, "an INTERRUPTED pose")
        pose = node.poses[0]
        assert pose.status == RelativePose.INTERRUPTED and pose.num_matches == 0
        assert (pose.header.frame_id, pose.header.stamp.sec) == ("left_optical", 10) and pose.reference == Header()
        for i in range(24):
            camera.send(20 + 0.05 * i, 0.0, late=0.02)
        camera.wait_for_warning(
            "have no partner within sync_tolerance of their stamps; the closest stamps last differed by 0.020000 s"
        )
        figures = camera.node.figures()
        assert int(figures[f"unpaired: {node.namespace}/left/image"]) > 0 and figures["frames received"] == "0"


def test_a_silent_camera_is_reported_after_the_poses_of_the_earlier_frames(tmp_path: Path) -> None:
    """An offered mask that does not arrive delays a frame, for twice as long as it takes to report a silent camera."""
    with rig(tmp_path, queue="latest", sync_tolerance=1.0) as camera:
        node = camera.node
        mask = node.node.create_publisher(Image, "left/mask", 10)
        node.wait_for(mask.get_subscription_count, "the node to subscribe to masks")
        camera.send(10.0, 0.0)
        node.wait_for(lambda: node.stereo_matches, "the first frame")
        camera.send(10.1, 0.0)
        camera.send(10.2, 0.0, images="left")
        node.wait_for(lambda: len(node.poses) == 2, "a pose, and the report of the image without a partner")
        reported = [(stamp_of(pose.header), pose.status == RelativePose.INTERRUPTED) for pose in node.poses]
        assert reported == [(10.1, False), (10.2, True)]


def test_a_new_fault_is_reported_before_the_next_regular_diagnostics(tmp_path: Path) -> None:
    """Diagnostics come once a second, but the first one after a fault's result already reports it."""
    with rig(tmp_path) as camera:
        node = camera.node
        camera.send(10.0, 0.0)
        node.wait_for(lambda: node.stereo_matches and len(node.diagnostics) > 1, "the first frame")
        for number, (reason, changes) in enumerate(
            {
                "the baseline is zero": {"baseline": 0.0},
                "left and right images are swapped": {"swapped": True},
                "the stamps went back by": {"seconds": 5.0},
            }.items()
        ):
            frames = number + 2
            camera.send(changes.pop("seconds", 10.1 + 0.1 * number), 0.0, **changes)
            node.wait_for(lambda frames=frames: len(node.stereo_matches) == frames, "the frame's result")
            assert reason in node.wait_for_news().status[0].message
            node.spin(1.5)  # for a regular message
        # Regular messages are 1 s apart, except after a pause of the machine. An early message divides such a second.
        stamps = [stamp_of(array.header) for array in node.diagnostics]
        early = sum(max(0.0, 1 - (later - sooner)) for sooner, later in pairwise(stamps))
        assert early >= 1, stamps
        assert [pose.status for pose in node.poses] == [RelativePose.NO_CALIBRATION] * 2 + [RelativePose.INTERRUPTED]


def test_a_slow_camera_that_falls_silent_is_reported_after_one_image_of_the_other(tmp_path: Path) -> None:
    with rig(tmp_path) as camera:
        node, seconds = camera.node, itertools.count(10)
        right = f"{node.namespace}/right/image"
        pattern = re.compile(rf"no image on {right} for ([0-9.]+) s, (\d+) images of the other camera")

        def named() -> list[tuple[str, str]]:
            return [found.groups() for each in node.diagnostics if (found := pattern.search(each.status[0].message))]

        def is_named_early() -> bool:
            """Whether the report comes before the general one about silent cameras after 2 s. Slow machines fail."""
            frames = len(node.stereo_matches) + 1
            camera.send(next(seconds), 0.0)
            node.wait_for(lambda: len(node.stereo_matches) == frames, "the frame")
            node.diagnostics.clear()  # at once, because waiting for the next message would take half of the time
            camera.send(next(seconds), 0.0, images="left")
            node.wait_for(named, "the warning of the silent camera")
            silent, images = named()[0]
            return float(silent) < 2 and images == "1"

        assert any(is_named_early() for _ in range(10))


def test_stamps_that_go_back_reset_the_matcher_and_are_reported(tmp_path: Path) -> None:
    with rig(tmp_path) as camera:
        node = camera.node
        for seconds in (100.0, 100.1, 50.0, 50.1):
            camera.send(seconds, 0.0)
        node.wait_for(
            lambda: len(node.matches) == 2 and len(node.poses) == 3 and len(node.stereo_matches) == 4,
            "a pair before the jump and one after it",
        )
        assert [matches.reset for matches in node.matches] == [True, True]
        assert [matches.reset for matches in node.stereo_matches] == [True, False, True, False]
        camera.wait_for_warning("the stamps went back by 50.1")
        assert node.figures()["interruptions"] == "1"
        still, broken = RelativePose.NO_TRANSLATION, RelativePose.INTERRUPTED
        assert [pose.status for pose in node.poses] == [still, broken, still]
        assert (node.poses[1].header.stamp.sec, node.poses[1].reference) == (50, Header())


def test_odometry_bridges_one_lost_pose_and_starts_a_new_frame_id_after_two(tmp_path: Path) -> None:
    with rig(tmp_path, publish_odometry=True) as camera:
        node = camera.node
        found: list[Odometry] = []
        node.subscribe(Odometry, "odometry", found.append)
        node.wait_for(lambda: node.node.count_publishers("odometry"), "the topic")
        node.wait_until_known()
        for i in range(4):
            camera.send(10 + 0.1 * i, 0.05 * i)
        node.wait_for(lambda: len(found) == 3, "three poses")
        positions = np.array([[p.x, p.y, p.z] for p in (message.pose.pose.position for message in found)])
        # The camera's right is -y in a frame with x forward.
        np.testing.assert_allclose(positions, [[0, -0.05, 0], [0, -0.10, 0], [0, -0.15, 0]], atol=0.008)
        assert {message.header.frame_id for message in found} == {"odom"}
        assert {message.child_frame_id for message in found} == {"left_optical"}
        spread = [np.trace(np.reshape(message.pose.covariance, (6, 6))) for message in found]
        assert 0 < spread[0] < spread[1] < spread[2]
        for i, baseline in enumerate([0.0, BASELINE, 0.0, 0.0, BASELINE, BASELINE]):
            camera.send(10.4 + 0.1 * i, 0.05 * i, baseline=baseline)
            node.wait_for(lambda frames=4 + i: len(node.poses) == frames, "the pair")
        node.wait_for(lambda: len(found) == 5, "poses after the lost ones")
        frames = [(message.header.frame_id, message.header.stamp.nanosec // 10**8) for message in found[3:]]
        assert frames == [("odom", 5), ("odom_1", 9)]
        camera.wait_for_warning("odometry starts again in the frame odom_1")
        assert node.figures()["odometry breaks"] == "1"
        for transitions, frame in ((("deactivate",), "odom_2"), (("deactivate", "cleanup", "configure"), "odom_3")):
            for transition in transitions:
                assert change_state(node, transition)
            camera.wait_until_gone()
            assert change_state(node, "activate")
            camera.wait_until_connected()
            for i in range(2):
                camera.send(11 + 0.1 * i, 0.05 * i)
            node.wait_for(lambda frame=frame: found[-1].header.frame_id == frame, frame)


def test_a_baseline_in_millimetres_is_reported_with_its_value(tmp_path: Path) -> None:
    with rig(tmp_path) as camera:
        for i in range(2):
            camera.send(1.0 + 0.1 * i, 0.02 * i, baseline=1000 * BASELINE)
        camera.wait_for_warning(f"the cameras are {1000 * BASELINE:g} m apart according to their camera_infos")
