"""Stereo SLAM on the matcher's topics, as an example of a back-end.

    python -m stereo_slam.node --ros-args -p rectified:=true -p picture:=trajectory.png  # in examples/

It subscribes to `matches`, `stereo_matches`, `relative_pose`, `features` and the two `camera_info` topics, and calls
the service `match_features`. It publishes `path` and TF: map to odom (the correction by loop closures), and odom to the
left camera. It needs GTSAM; a picture also needs matplotlib.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gtsam
import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point, Pose, PoseStamped, Quaternion, Transform, TransformStamped, Vector3
from nav_msgs.msg import Path as PathMessage
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rclpy.task import Future
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header

from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from kpmatch_ros.srv import MatchFeatures

from .pose_graph import Keyframes
from .slam import LoopRequest, StereoSlam, nanoseconds

try:
    from tf2_msgs.msg import TFMessage
except ImportError:  # a minimal ROS installation does not have it
    TFMessage = None

_TOPICS = {
    "matches": MatchArray,
    "stereo_matches": MatchArray,
    "relative_pose": RelativePose,
    "features": FeatureArray,
}
_SIDES = "left", "right"
_EARLY = 100  # largest number of messages that wait for the calibration
_PATIENCE = 5.0  # seconds without a calibration before the node warns


class SlamNode(Node):
    """Passes messages to :class:`StereoSlam`, answers its requests through the service, and publishes its poses."""

    def __init__(self) -> None:
        super().__init__("stereo_slam")
        self._rectified = self.declare_parameter("rectified", False).value
        self._lag = self.declare_parameter("lag", 20).value
        self._keyframe_step = self.declare_parameter("keyframe_step", 0.4).value  # metres
        self._loop_path = self.declare_parameter(
            "loop_path", 6.0
        ).value  # metres walked before a place counts as seen again
        self._loops = self.declare_parameter("loops", True).value
        self._map, self._odom = (self.declare_parameter(f"{name}_frame", name).value for name in ("map", "odom"))
        self._picture = self.declare_parameter("picture", "").value
        self._slam: StereoSlam | None = None
        self._infos: dict[str, CameraInfo] = {}
        self._early: list[tuple[str, Any]] = []
        self._truth: dict[int, list[float]] = {}
        self._path = self.create_publisher(PathMessage, "path", 10)
        self._tf = None if TFMessage is None else self.create_publisher(TFMessage, "/tf", 100)
        for side in _SIDES:
            self._hear_info(side, qos_profile_sensor_data)
        self._latched: set[str] = set()  # sides with a second, transient_local subscription
        self._started = time.monotonic()
        steady = Clock(clock_type=ClockType.STEADY_TIME)  # the clock of a simulation may stand still
        self._seeking = self.create_timer(1.0, self._seek_infos, clock=steady)
        for topic, kind in _TOPICS.items():
            if topic != "features" or self._loops:
                receive = functools.partial(self._on_message, topic)
                self.create_subscription(kind, topic, receive, QoSProfile(depth=1000))
        self.create_subscription(PoseStamped, "ground_truth/pose", self._on_truth, QoSProfile(depth=1000))
        self._client = self.create_client(MatchFeatures, "match_features")

    def _hear_info(self, side: str, qos: QoSProfile) -> None:
        self.create_subscription(CameraInfo, f"{side}/camera_info", functools.partial(self._on_info, side), qos)

    def _seek_infos(self) -> None:
        """Subscribe to a camera_info that was sent once, before this node started, and warn if none arrives.

        Such a message (durability transient_local) reaches only transient_local subscriptions, and these do not receive
        messages from volatile publishers. So both subscriptions are needed.
        """
        for side in _SIDES:
            offers = self.get_publishers_info_by_topic(f"{side}/camera_info")
            latched = (offer.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers)
            if side not in self._latched and any(latched):
                self._latched.add(side)
                self._hear_info(side, QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL))
        missing = [self.resolve_topic_name(f"{side}/camera_info") for side in _SIDES if side not in self._infos]
        if missing and time.monotonic() - self._started > _PATIENCE:
            self.get_logger().warning(f"no poses: no message has arrived on {' and '.join(missing)}", once=True)

    def _on_info(self, side: str, info: CameraInfo) -> None:
        self._infos[side] = info
        if self._slam is not None or len(self._infos) < 2:
            return
        try:
            self._slam = StereoSlam(
                self._infos["left"],
                self._infos["right"],
                rectified=self._rectified,
                lag=self._lag,
                keyframes=Keyframes(step=self._keyframe_step, least_path=self._loop_path),
            )
        except ValueError as error:
            self.get_logger().error(f"camera_info cannot be used: {error}", once=True)
            return
        self._seeking.cancel()
        early, self._early = self._early, []
        for topic, message in early:
            self._on_message(topic, message)

    def _on_truth(self, message: PoseStamped) -> None:
        position = message.pose.position
        self._truth[nanoseconds(message.header.stamp)] = [position.x, position.y, position.z]

    def _on_message(self, topic: str, message: Any) -> None:
        if self._slam is None:
            self._early = [*self._early[-_EARLY:], (topic, message)]
            return
        breaks = self._slam.breaks
        frames = self._slam.add(topic, message)
        if self._slam.breaks > breaks:
            self.get_logger().warning(
                "all tracks began again: the motion between the frames before and after is only a guess"
            )
        requests, self._slam.requests = self._slam.requests, []
        for request in requests:
            self._ask(request)
        if frames:
            self._publish(message.header.frame_id)

    def _ask(self, request: LoopRequest) -> None:
        """Request the matches of two keyframes.

        The request has no calibrations, because a relative pose of two left images would have no scale. The stereo
        points of the keyframes give the scale.
        """
        if not self._client.service_is_ready():
            self.get_logger().warning("no loops: the service match_features is not available", once=True)
            return
        question = MatchFeatures.Request(
            reference_features=request.reference.features, features=request.current.features
        )
        self._client.call_async(question).add_done_callback(lambda answer: self._on_answer(request, answer))

    def _on_answer(self, request: LoopRequest, answer: Future) -> None:
        response = answer.result()
        if not response.success:
            self.get_logger().warning(f"match_features: {response.message}")
        elif self._slam is not None and self._slam.add_answer(request, response.matches):
            self.get_logger().info(
                f"loop closed: frame {request.current.number} shows the place of frame {request.reference.number}"
            )

    def _publish(self, camera_frame: str) -> None:
        assert self._slam is not None
        poses, smoothed, stamps = self._slam.poses(), self._slam.smoothed()[-1], self._slam.stamps
        header = _header(stamps[-1], self._map)
        if self._path.get_subscription_count():
            steps = [
                PoseStamped(header=_header(stamp, self._map), pose=_pose(pose)) for stamp, pose in zip(stamps, poses)
            ]
            self._path.publish(PathMessage(header=header, poses=steps))
        if self._tf is not None:
            correction = poses[-1].compose(smoothed.inverse())
            links = [(self._map, self._odom, correction), (self._odom, camera_frame, smoothed)]
            transforms = [
                TransformStamped(header=_header(stamps[-1], parent), child_frame_id=child, transform=_transform(pose))
                for parent, child, pose in links
            ]
            self._tf.publish(TFMessage(transforms=transforms))

    def save_picture(self) -> None:
        """Save a picture of the trajectory if the parameter `picture` names a file.

        It shows the ground truth too if that arrived on ground_truth/pose.
        """
        if not self._picture or self._slam is None or len(self._slam.stamps) < 2:
            return
        from .picture import draw

        stamps = self._slam.stamps
        rows = [row for row, stamp in enumerate(stamps) if stamp in self._truth]
        truth = np.array([self._truth[stamps[row]] for row in rows]) if len(rows) > 2 else None
        shown = {"smoothed": self._slam.smoothed(), "with loops": self._slam.poses()}
        rows = list(range(len(stamps))) if truth is None else rows
        draw(Path(self._picture), {name: positions(poses)[rows] for name, poses in shown.items()}, truth)


def positions(poses: Sequence[gtsam.Pose3]) -> np.ndarray:
    """The positions of N poses, (N, 3), metres."""
    return np.array([pose.translation() for pose in poses])


def _header(stamp: int, frame_id: str) -> Header:
    seconds, nanosec = divmod(stamp, 1_000_000_000)
    return Header(stamp=Time(sec=seconds, nanosec=nanosec), frame_id=frame_id)


def _quaternion(pose: gtsam.Pose3) -> Quaternion:
    x, y, z, w = Rotation.from_matrix(pose.rotation().matrix()).as_quat().tolist()
    return Quaternion(x=x, y=y, z=z, w=w)


def _pose(pose: gtsam.Pose3) -> Pose:
    x, y, z = pose.translation().tolist()
    return Pose(position=Point(x=x, y=y, z=z), orientation=_quaternion(pose))


def _transform(pose: gtsam.Pose3) -> Transform:
    x, y, z = pose.translation().tolist()
    return Transform(translation=Vector3(x=x, y=y, z=z), rotation=_quaternion(pose))


def main() -> None:
    """Run the node until Ctrl-C."""
    rclpy.init()
    node = SlamNode()
    try:
        while rclpy.ok():  # not rclpy.spin: after SIGTERM it may wake before the shutdown, see none, and sleep on
            rclpy.spin_once(node, timeout_sec=1.0)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        time.sleep(1.0)  # a signal may interrupt rclpy anywhere, and a separate thread shuts ROS down: wait for it
        if rclpy.ok():
            raise
    finally:
        node.save_picture()
        node.destroy_node()  # ends the middleware's threads: they may crash if its libraries are unloaded first
        with contextlib.suppress(RuntimeError):  # the signal's shutdown may be in progress (ros2/rclpy#1352)
            rclpy.try_shutdown()


if __name__ == "__main__":
    main()
