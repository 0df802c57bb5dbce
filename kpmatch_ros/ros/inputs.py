"""The node's subscriptions: images and their calibration, of one camera or of a stereo pair."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kpmatch_ros.parameters import Parameters
from kpmatch_ros.ros.monitor import Problem
from kpmatch_ros.ros.qos import SubscriptionEventCallbacks, or_override, overridable, policy_of
from kpmatch_ros.stereo_sync import StereoSynchroniser

__all__ = ["Inputs"]

_SILENT_AFTER = 2.0  # seconds without an image that are worth a warning
# Seconds that the very first frame waits for a camera_info that somebody publishes. A replay (queue: all) has the time.
_CALIBRATION_WAIT = {"latest": 1.0, "all": 10.0}


@dataclass
class _Camera:
    """One camera's topics, resolved, and the subscriptions to them."""

    name: str  # the image topic without /compressed
    image_topic: str
    info_topic: str
    image: Any = None
    info: Any = None
    calibrated: bool = False
    arrived: float | None = None  # the last image, monotonic seconds


class Inputs:
    """Subscribes to the cameras, and says why nothing arrives.

    Args:
        node: subscribes.
        parameters: mode, queue and image_transport are used.
        take_image: is called with every image, and with 0 (one camera, or the left one) or 1 (the right one).
        take_info: is called likewise with every camera_info.
    """

    def __init__(
        self,
        node: LifecycleNode,
        parameters: Parameters,
        take_image: Callable[[int, Any], None],
        take_info: Callable[[int, Any], None],
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._take_image, self._take_info = take_image, take_info
        self._compressed = parameters.image_transport == "compressed"
        self._cameras = []
        for prefix in ("left/", "right/") if parameters.mode == "stereo" else ("",):
            name = image = node.resolve_topic_name(f"{prefix}image")
            if self._compressed:
                image = node.resolve_topic_name(f"{image}/compressed")  # it may be remapped too
            self._cameras.append(_Camera(name, image, node.resolve_topic_name(f"{prefix}camera_info")))
        self._incompatible: dict[str, str] = {}  # publishers with another quality of service, by topic
        self._best_effort_wanted = False
        self._subscribed_at = 0.0
        self._calibrated = threading.Event()

    @property
    def topics(self) -> list[str]:
        """The image topics."""
        return [camera.image_topic for camera in self._cameras]

    @property
    def hardware(self) -> str:
        """The cameras, for diagnostics."""
        return " and ".join(camera.name for camera in self._cameras)

    def subscribe(self) -> None:
        """Begin to receive: best effort, as drivers send, or with queue 'all' reliably, so that nothing is lost."""
        self._incompatible.clear()
        self._best_effort_wanted = False
        self._subscribed_at = time.monotonic()
        self._create(reliable=self._parameters.queue == "all")

    def unsubscribe(self) -> None:
        """Receive no more."""
        for camera in self._cameras:
            for subscription in (camera.image, camera.info):
                if subscription is not None:
                    self._node.destroy_subscription(subscription)
            camera.image = camera.info = None

    def adapt(self) -> None:
        """Subscribe best effort where a publisher turned out to offer no more: to be called now and then."""
        if self._best_effort_wanted:
            self.unsubscribe()
            self._create(reliable=False)
            self._best_effort_wanted = False

    def wait_for_calibration(self) -> None:
        """Wait once for the first calibration, if somebody publishes it; called by the thread that processes."""
        if not self._calibrated.is_set() and all(
            self._node.count_publishers(camera.info_topic) for camera in self._cameras
        ):
            self._calibrated.wait(_CALIBRATION_WAIT[self._parameters.queue])
            self._calibrated.set()

    def problems(self, synchroniser: StereoSynchroniser[Any]) -> list[Problem]:
        """Why nothing arrives on a topic.

        Args:
            synchroniser: knows of a stereo pair's cameras which one has fallen silent.
        """
        found = [Problem(f"QoS: {topic}", explanation) for topic, explanation in self._incompatible.items()]
        now = time.monotonic()
        waited = now - self._subscribed_at
        for side, camera in enumerate(self._cameras):
            if camera.image is None:
                continue
            silent = waited if camera.arrived is None else min(now - camera.arrived, waited)
            stereo = len(self._cameras) == 2
            missed, alone = (synchroniser.since[side], synchroniser.silent(side)) if stereo else (0, False)
            if (silent > _SILENT_AFTER or alone) and camera.image_topic not in self._incompatible:
                found.append(self._silence(camera.image_topic, silent, missed))
            info = camera.info_topic
            if not camera.calibrated and waited > _SILENT_AFTER and info not in self._incompatible:
                why = "sends nothing" if self._node.count_publishers(info) else "nobody publishes it"
                explanation = f"no calibration on {info}, so no relative pose: {why}"
                found.append(Problem(f"no calibration: {info}", explanation))
        return found

    def _silence(self, topic: str, silent: float, missed: int) -> Problem:
        why = "nobody publishes it"
        if publishers := self._node.count_publishers(topic):
            why = (
                f"it has {publishers} publisher(s), but nothing comes; large images are easily lost best "
                f"effort, which qos_overrides.{topic}.subscription.reliability: reliable prevents"
            )
        meanwhile = f", {missed} images of the other camera" if missed else ""
        return Problem(f"silent: {topic}", f"no image on {topic} for {silent:.1f} s{meanwhile}: {why}")

    def _create(self, reliable: bool) -> None:
        # The partner of a stereo pair's image may come some images later.
        newest = 1 if len(self._cameras) == 1 else 5
        image_qos = QoSProfile(
            depth=newest if self._parameters.queue == "latest" else 1000,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        )
        info_qos = QoSProfile(depth=10, reliability=image_qos.reliability)
        kind = CompressedImage if self._compressed else Image
        for side, camera in enumerate(self._cameras):
            receive = functools.partial(self._receive_image, side)
            camera.image = self._subscribe_to(kind, camera.image_topic, receive, image_qos)
            receive = functools.partial(self._receive_info, side)
            camera.info = self._subscribe_to(CameraInfo, camera.info_topic, receive, info_qos)

    def _subscribe_to(self, kind: type, topic: str, callback: Callable[[Any], None], qos: QoSProfile) -> Any:
        report = functools.partial(self._report_publisher, topic, qos.reliability == ReliabilityPolicy.RELIABLE)
        return self._node.create_subscription(
            kind,
            topic,
            callback,
            qos,
            event_callbacks=SubscriptionEventCallbacks(incompatible_qos=report, use_default_callbacks=False),
            qos_overriding_options=None if self._best_effort_wanted else overridable(),
        )

    def _report_publisher(self, topic: str, reliable: bool, event: Any) -> None:
        policy = policy_of(event)
        if policy == "reliability" and reliable:
            self._best_effort_wanted = True
            remedy = "receiving it best effort instead: frames may be lost on the way"
        else:
            remedy = f"no message arrives; change the publisher{or_override(topic, 'subscription', policy)}"
            self._incompatible[topic] = f"the publisher of {topic} offers another {policy}: {remedy}"
        self._node.get_logger().warning(f"the publisher of {topic} offers another {policy}: {remedy}")

    def _receive_image(self, side: int, message: Any) -> None:
        self._cameras[side].arrived = time.monotonic()
        self._take_image(side, message)

    def _receive_info(self, side: int, message: Any) -> None:
        self._take_info(side, message)
        self._cameras[side].calibrated = True
        if all(camera.calibrated for camera in self._cameras):
            self._calibrated.set()
