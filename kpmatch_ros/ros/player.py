"""Sends a camera's recording to a matcher node, and receives its answers: what `kpmatch demo` does over DDS."""

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
_PATIENCE = 1.0  # seconds after which the node is asked again


class RecordedFrame(NamedTuple):
    """An image and its calibration as serialised messages."""

    stamp: int  # nanoseconds
    camera_info: bytes
    image: bytes


@dataclass
class Answers:
    """What a node published, by the stamp of the image.

    Attributes:
        matches: its MatchArrays.
        poses: its RelativePoses.
        pictures: its match images.
        latencies: milliseconds from publishing an image to having its matches and its pose.
    """

    matches: dict[int, MatchArray] = field(default_factory=dict)
    poses: dict[int, RelativePose] = field(default_factory=dict)
    pictures: dict[int, Image] = field(default_factory=dict)
    latencies: dict[int, float] = field(default_factory=dict)


class _Participant:
    """A ROS node of its own in the domain of the node under test."""

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
        """Receive for a moment."""
        self._executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        """Leave the domain."""
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)


def play(
    frames: Sequence[RecordedFrame], image_topic: str, info_topic: str, domain: int, check: Callable[[], None]
) -> Answers:
    """Publish frame by frame, and collect what the node publishes.

    Each frame is sent when the results of the one before have arrived. So the latency is that of a frame, not of a
    queue.

    Args:
        frames: in the order of their stamps.
        image_topic: where the node expects the images.
        info_topic: where it expects their calibration.
        domain: the node's ROS domain.
        check: called while waiting; raises an exception when the node has failed.

    Raises:
        TimeoutError: when the node does not come up or does not answer.
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
                    raise TimeoutError(f"waited {timeout:.0f} s in vain for {what}")
                listener.spin()

        def connected() -> bool:
            heard = images.get_subscription_count() and infos.get_subscription_count()
            return bool(heard) and all(
                listener.node.count_publishers(topic) for topic in ("matches", "relative_pose", "match_image")
            )

        wait_for(connected, "the node to come up", _START_TIMEOUT)
        # What the node publishes before it knows the listener is lost. Whoever answers knows of all that the listener
        # has made before it asked; an answer to one that is not known yet is lost too, so it is asked again.
        client = listener.node.create_client(GetParameterTypes, "matcher/get_parameter_types")
        asked: list[tuple[float, Any]] = []

        def known() -> bool:
            if client.service_is_ready() and (not asked or time.monotonic() > asked[-1][0] + _PATIENCE):
                asked.append((time.monotonic(), client.call_async(GetParameterTypes.Request())))
            return any(answer.done() for _, answer in asked)

        wait_for(known, "the node to know who listens", _START_TIMEOUT)
        # disable=None: no bar where stderr is no terminal
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
    """Publish a frame, its calibration first, and return when its image was sent, in monotonic seconds.

    On a busy machine a calibration that was published right before its image was seen to arrive up to three seconds
    later. So the image waits until the calibration has arrived. Nobody waits for one who is gone.
    """
    infos.publish(frame.camera_info)
    infos.wait_for_all_acked(Duration(seconds=_FRAME_TIMEOUT))
    sent = time.monotonic()
    images.publish(frame.image)
    return sent


def _keep_in(received: dict[int, Any]) -> Callable[[Any], None]:
    return lambda message: received.__setitem__(nanoseconds(message.header.stamp), message)


def nanoseconds(stamp: Any) -> int:
    """A builtin_interfaces/Time as one number."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)
