"""Plays a recording to a matcher node over DDS and collects what the node publishes. Used by `kpmatch demo`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import rclpy
from rcl_interfaces.srv import GetParameterTypes
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image
from tqdm import tqdm

from kpmatch_ros.msg import MatchArray, RelativePose
from kpmatch_ros.ros.start import why_ros_cannot_start

__all__ = ["Answers", "RecordedFrame", "nanoseconds", "play", "send"]

_START_TIMEOUT = 120.0  # seconds for the node to load its networks and subscribe
_FRAME_TIMEOUT = 60.0  # seconds for the results of one frame
_PATIENCE = 1.0  # seconds after which the request to the node is repeated


class RecordedFrame(NamedTuple):
    """An image and its calibration, as serialised messages."""

    stamp: int  # nanoseconds
    camera_info: bytes
    image: bytes


@dataclass
class Answers:
    """The messages that a node published, by the stamp of the image in nanoseconds.

    Attributes:
        matches: MatchArray messages.
        poses: RelativePose messages.
        pictures: match images.
        latencies: milliseconds from publishing an image to receiving both its matches and its pose.
    """

    matches: dict[int, MatchArray] = field(default_factory=dict)
    poses: dict[int, RelativePose] = field(default_factory=dict)
    pictures: dict[int, Image] = field(default_factory=dict)
    latencies: dict[int, float] = field(default_factory=dict)


class _Participant:
    """A ROS node with its own context, in the domain of the matcher node."""

    def __init__(self, name: str, domain: int) -> None:
        self._context = rclpy.Context()
        try:
            rclpy.init(args=[], context=self._context, domain_id=domain)
        except RuntimeError as error:
            raise OSError(why_ros_cannot_start(error)) from error
        self.node = rclpy.create_node(name, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)

    def spin(self) -> None:
        """Handle one callback, or wait 20 ms for one."""
        self._executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        """Destroy the node and shut its context down."""
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)


def play(
    frames: Sequence[RecordedFrame], image_topic: str, info_topic: str, domain: int, check: Callable[[], None]
) -> Answers:
    """Publish frame by frame, and collect what the node publishes.

    Each frame is sent only after the results of the previous one have arrived. So the latencies contain no queueing.

    Args:
        frames: frames in the order of their stamps.
        image_topic: the node's image topic.
        info_topic: the node's camera_info topic.
        domain: the node's ROS domain.
        check: called while waiting; raises an exception if the node has failed.

    Raises:
        TimeoutError: if the node does not start or does not answer.
    """
    source, listener = _Participant("demo_camera", domain), _Participant("demo_listener", domain)
    try:
        qos = QoSProfile(depth=100)  # reliable: nothing is lost on the way
        images = source.node.create_publisher(Image, image_topic, qos)
        infos = source.node.create_publisher(CameraInfo, info_topic, qos)
        answers = Answers()
        for kind, topic, received in (
            (MatchArray, "matches", answers.matches),
            (RelativePose, "relative_pose", answers.poses),
            (Image, "match_image", answers.pictures),
        ):
            listener.node.create_subscription(kind, topic, _keep_in(received), qos)

        def wait_for(condition: Callable[[], bool], what: str, timeout: float) -> None:
            end = time.monotonic() + timeout
            while not condition():
                check()
                if time.monotonic() > end:
                    raise TimeoutError(f"timed out after {timeout:.0f} s waiting for {what}")
                listener.spin()

        def connected() -> bool:
            heard = images.get_subscription_count() and infos.get_subscription_count()
            return bool(heard) and all(
                listener.node.count_publishers(topic) for topic in ("matches", "relative_pose", "match_image")
            )

        wait_for(connected, "the node to start", _START_TIMEOUT)
        # Messages that the node publishes before it has discovered the listener's subscriptions are lost. An answer to
        # a service request proves that it has discovered everything that the listener created before the request. An
        # answer may be lost for the same reason, so the request is repeated.
        client = listener.node.create_client(GetParameterTypes, "matcher/get_parameter_types")
        asked: list[tuple[float, Any]] = []

        def known() -> bool:
            if client.service_is_ready() and (not asked or time.monotonic() > asked[-1][0] + _PATIENCE):
                asked.append((time.monotonic(), client.call_async(GetParameterTypes.Request())))
            return any(answer.done() for _, answer in asked)

        wait_for(known, "the node to discover its subscribers", _START_TIMEOUT)
        # disable=None: no progress bar if stderr is not a terminal
        for number, frame in enumerate(tqdm(frames, desc="frames", unit="frame", disable=None, leave=False)):
            sent = send(frame, infos, images)
            if number:

                def answered(stamp: int = frame.stamp) -> bool:
                    return stamp in answers.matches and stamp in answers.poses

                wait_for(answered, "the results of a frame", _FRAME_TIMEOUT)
                answers.latencies[frame.stamp] = (time.monotonic() - sent) * 1e3
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: len(answers.pictures) >= len(frames) - 1, "the pictures", 2.0)
        return answers
    finally:
        source.close()
        listener.close()


def send(frame: RecordedFrame, infos: Any, images: Any) -> float:
    """Publish a frame, its calibration first, and return the time when its image was sent, in monotonic seconds.

    The image is sent after the calibration has been acknowledged. On a busy machine, a calibration published right
    before its image was seen to arrive up to three seconds after it. A subscriber that has disappeared causes no wait.
    """
    infos.publish(frame.camera_info)
    infos.wait_for_all_acked(Duration(seconds=_FRAME_TIMEOUT))
    sent = time.monotonic()
    images.publish(frame.image)
    return sent


def _keep_in(received: dict[int, Any]) -> Callable[[Any], None]:
    return lambda message: received.__setitem__(nanoseconds(message.header.stamp), message)


def nanoseconds(stamp: Any) -> int:
    """Return a builtin_interfaces/Time in nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)
