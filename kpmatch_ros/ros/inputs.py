"""The node's subscriptions: images, calibrations and masks of one camera or of a stereo pair."""

from __future__ import annotations

import difflib
import functools
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kpmatch_ros.parameters import Parameters
from kpmatch_ros.ros.monitor import Problem
from kpmatch_ros.ros.qos import SubscriptionEventCallbacks, mismatch, or_override, overridable, with_events
from kpmatch_ros.ros.senders import Senders, full_name, listed
from kpmatch_ros.ros.tf import TFMessage
from kpmatch_ros.sync.stereo_sync import StereoSynchroniser

__all__ = ["Inputs"]

# A camera counts as silent after three of its usual intervals, but not before 2 s and not later than 60 s.
_SILENT_AFTER, _SILENT_INTERVALS, _SILENT_AT_MOST = 2.0, 3.0, 60.0
# Seconds that the first frame waits for a camera_info if there is a publisher. A replay (queue: all) can wait longer.
_CALIBRATION_WAIT = {"latest": 1.0, "all": 10.0}
_KNOWN_AFTER = 1.0  # seconds after the first frame; by then all publishers of its driver are known

# For the type of the image subscription: the other image type, and the image_transport that receives it.
_OTHER_TRANSPORT = {
    "sensor_msgs/msg/Image": ("sensor_msgs/msg/CompressedImage", "compressed"),
    "sensor_msgs/msg/CompressedImage": ("sensor_msgs/msg/Image", "raw"),
}


@dataclass
class _Camera:
    """The resolved topics of one camera, and the subscriptions to them."""

    name: str  # the image topic without /compressed
    image_topic: str
    info_topic: str
    mask_topic: str
    image: Any = None
    info: Any = None
    mask: Any = None
    latched_info: Any = None  # only if a publisher sends the camera_info once (transient_local)
    calibrated: bool = False
    informed: bool = False  # whether a camera_info arrived since the node was activated
    arrived: float | None = None  # arrival of the last image since the node was activated, monotonic seconds
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=10))  # seconds between the last images

    @property
    def topics(self) -> dict[str, str]:
        """The topics of the subscriptions, by the names of the attributes above."""
        return {"image": self.image_topic, "info": self.info_topic, "mask": self.mask_topic}

    @property
    def silent_after(self) -> float:
        """Seconds without an image before a warning. They depend on the rate: some cameras send one image in 10 s."""
        usual = statistics.median(self.intervals) if self.intervals else 0.0
        return max(_SILENT_AFTER, min(_SILENT_INTERVALS * usual, _SILENT_AT_MOST))

    def receive(self, now: float) -> None:
        """Record the arrival of an image."""
        if self.arrived is not None:
            self.intervals.append(now - self.arrived)
        self.arrived = now


class Inputs:
    """Subscribes to the cameras, and explains why no messages arrive.

    Args:
        node: creates the subscriptions.
        parameters: mode, queue, image_transport and publish_odometry are used.
        take_image: called with the side, 0 (single or left camera) or 1 (right camera), and an image.
        take_info: called with the side and a camera_info.
        take_mask: called with the side and a mask.
        take_transforms: called with every message on /tf_static; with odometry only.
    """

    def __init__(
        self,
        node: LifecycleNode,
        parameters: Parameters,
        take_image: Callable[[int, Any], None],
        take_info: Callable[[int, Any], None],
        take_mask: Callable[[int, Any], None],
        take_transforms: Callable[[Any], None],
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._take_image, self._take_info, self._take_mask = take_image, take_info, take_mask
        self._take_transforms = take_transforms
        self._transforms: Any = None  # the subscription to /tf_static
        self._compressed = parameters.image_transport == "compressed"
        self._cameras = []
        # The names to pass to rclpy, by resolved topic. rclpy remaps the name that it gets. With the resolved topic it
        # would remap twice, and cameras that were swapped by remapping would be swapped back.
        self._asked: dict[str, str] = {}
        for prefix in _prefixes(parameters):
            asked = f"{prefix}image"
            name = image = node.resolve_topic_name(asked)
            if self._compressed and image.endswith("/compressed"):  # the user named the compressed topic itself
                name = image.removesuffix("/compressed")
            elif self._compressed:
                asked = f"{image}/compressed"
                image = node.resolve_topic_name(asked)  # this name may be remapped, too
            info, mask = (node.resolve_topic_name(f"{prefix}{other}") for other in ("camera_info", "mask"))
            self._asked |= {image: asked, info: f"{prefix}camera_info", mask: f"{prefix}mask"}
            self._cameras.append(_Camera(name, image, info, mask))
        self._static = node.resolve_topic_name("/tf_static")
        self._asked[self._static] = "/tf_static"
        self._best_effort: set[str] = set()  # topics whose publishers offer only best effort
        self._warned: set[str] = set()  # texts that were logged
        self._senders = Senders()
        self._subscribed_at = 0.0
        self._calibrated = threading.Event()
        self._first_frame_at: float | None = None  # monotonic seconds

    @property
    def topics(self) -> list[str]:
        """The image topics."""
        return [camera.image_topic for camera in self._cameras]

    @property
    def names(self) -> dict[str, str]:
        """The topic names before remapping, each with its content, for :func:`check_topics`."""
        held: dict[str, str] = {}
        for prefix in _prefixes(self._parameters):
            # Two cameras may share a mask topic, but neither image nor camera_info topics.
            held |= {f"{prefix}image": f"{prefix}image", f"{prefix}camera_info": f"{prefix}camera_info"}
            held[f"{prefix}mask"] = "mask"
        return held

    @property
    def hardware(self) -> str:
        """The cameras, for diagnostics."""
        return " and ".join(camera.name for camera in self._cameras)

    def subscribe(self) -> None:
        """Create the subscriptions: best effort, as drivers publish, or reliable with queue 'all', to lose nothing."""
        self._best_effort.clear()
        self._warned.clear()
        self._subscribed_at = time.monotonic()
        self._calibrated.clear()
        self._first_frame_at = None
        for camera in self._cameras:
            camera.informed, camera.arrived = False, None  # the driver may have changed since
            camera.intervals.clear()
        try:
            self._create()
        except BaseException:
            self.unsubscribe()
            raise

    def end(self) -> None:
        """Unsubscribe, and release the thread that may be waiting for a calibration."""
        self.unsubscribe()
        self._calibrated.set()

    def unsubscribe(self) -> None:
        """Destroy the subscriptions."""
        if self._transforms is not None:
            self._node.destroy_subscription(self._transforms)
            self._transforms = None
        for camera in self._cameras:
            for subscription in (camera.image, camera.info, camera.latched_info, camera.mask):
                if subscription is not None:
                    self._node.destroy_subscription(subscription)
            camera.image = camera.info = camera.latched_info = camera.mask = None

    def adapt(self) -> None:
        """Fall back to best effort where a publisher offers no more, and warn about QoS mismatches.

        To be called periodically. Only subscriptions that queue 'all' made reliable fall back.
        """
        for side, camera in enumerate(self._cameras):
            for what, topic in camera.topics.items():
                policy, _ = self._qos_mismatch(topic, getattr(camera, what))
                if not policy:
                    continue
                text = self._mismatch_text(topic, policy)
                if self._falls_back(policy):
                    text = (
                        f"the publisher of {topic} offers another {policy}: the node receives best effort instead, so "
                        "frames may be lost"
                    )
                    self._best_effort.add(topic)
                    self._node.destroy_subscription(getattr(camera, what))
                    self._subscribe_to(side, what)
                self._warn(text)
        for problem in self._transforms_mismatch():
            self._warn(problem.explanation)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._node.get_logger().warning(text)

    def subscribe_to_latched(self) -> None:
        """Subscribe to calibrations that are published only once, maybe before this node started.

        To be called periodically. A latched message reaches only subscriptions with durability transient_local, and
        these receive nothing from publishers that are volatile. So there is an additional subscription if such a
        publisher exists. The subscription stays, because a restarted driver sends its calibration only once again.
        """
        for side, camera in enumerate(self._cameras):
            if camera.info is None or camera.latched_info is not None:
                continue
            offers = self._publishers(camera.info_topic)
            if any(offer.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for offer in offers):
                camera.latched_info = self._node.create_subscription(
                    CameraInfo,
                    self._asked[camera.info_topic],
                    functools.partial(self._receive_info, side),
                    QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL),
                    event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
                )

    def wait_for_calibration(self) -> None:
        """Wait once for the first calibration, if all camera_infos have publishers. For the inference thread.

        A publisher that appears later must not stop the frames.
        """
        if self._calibrated.is_set():
            return
        now = time.monotonic()
        if self._first_frame_at is None:
            self._first_frame_at = now
        if all(self._node.count_publishers(camera.info_topic) for camera in self._cameras):
            self._calibrated.wait(_CALIBRATION_WAIT[self._parameters.queue])
            self._calibrated.set()
        elif now - self._first_frame_at > _KNOWN_AFTER:
            self._calibrated.set()

    @property
    def masked(self) -> list[int]:
        """The cameras, 0 or 1, whose mask topic has a publisher."""
        return [side for side, camera in enumerate(self._cameras) if self._node.count_publishers(camera.mask_topic)]

    def problems(self, synchroniser: StereoSynchroniser[Any]) -> list[Problem]:
        """Return the problems of the inputs: silent topics, QoS mismatches, wrong types, mixed publishers.

        Args:
            synchroniser: knows which camera of a stereo pair is silent.
        """
        found = self._transforms_mismatch()
        now = time.monotonic()
        waited = now - self._subscribed_at
        for side, camera in enumerate(self._cameras):
            if camera.image is None:
                continue
            blocked: dict[str, bool] = {}  # whether there are publishers, but all with incompatible QoS
            for what, topic in camera.topics.items():
                policy, blocked[what] = self._qos_mismatch(topic, getattr(camera, what))
                if policy and not self._falls_back(policy):
                    found.append(Problem(f"QoS: {topic}", self._mismatch_text(topic, policy)))
            silent = waited if camera.arrived is None else now - camera.arrived
            stereo = len(self._cameras) == 2
            missed, alone = (synchroniser.since[side], synchroniser.silent(side)) if stereo else (0, False)
            if (silent > camera.silent_after or alone) and not blocked["image"]:
                found.append(self._silence(camera, silent, missed))
            found += self._mixed_publishers(camera.image_topic, _type_name(self._image_type), "images")
            found += self._mixed_publishers(camera.info_topic, _type_name(CameraInfo), "calibrations")
            mask = camera.mask_topic
            if self._node.count_publishers(mask) and (why := self._wrong_publishers(mask, _type_name(Image))):
                found.append(Problem(f"no mask: {mask}", f"no mask on {mask}: {why}"))
            info = camera.info_topic
            if not camera.calibrated and waited > _SILENT_AFTER and not blocked["info"]:
                why = self._wrong_publishers(info, _type_name(CameraInfo)) or "its publisher has sent nothing"
                explanation = f"no calibration on {info}, so no relative pose: {why}"
                found.append(Problem(f"no calibration: {info}", explanation))
        return found

    def _silence(self, camera: _Camera, silent: float, missed: int) -> Problem:
        topic = camera.image_topic
        why = self._wrong_publishers(topic, _type_name(self._image_type))
        if not why:
            why = f"it has {self._node.count_publishers(topic)} publisher(s), but nothing arrives; "
            if camera.image.qos_profile.reliability == ReliabilityPolicy.RELIABLE:
                why += f"the subscription is reliable, so check whether they publish: ros2 topic hz {topic}"
            else:
                why += (
                    "large images are easily lost with best effort: set "
                    f"qos_overrides.{topic}.subscription.reliability to reliable"
                )
            if others := _other_users_of_shared_memory():
                why += (
                    f"; or the publisher is a process of another user on this machine (user {', '.join(others)}), "
                    "from which Fast DDS's shared memory delivers nothing: start both as one user, or one of the two "
                    "with FASTDDS_BUILTIN_TRANSPORTS=UDPv4"
                )
        meanwhile = f", {missed} images of the other camera" if missed else ""
        return Problem(f"silent: {topic}", f"no image on {topic} for {silent:.1f} s{meanwhile}: {why}")

    def _wrong_publishers(self, topic: str, wanted: str) -> str:
        """Explain that a topic has no publisher of the wanted type, and what to do. Empty if it has one."""
        types = {offer.topic_type for offer in self._publishers(topic)}
        if wanted in types:
            return ""
        other, transport = _OTHER_TRANSPORT[wanted] if topic in self.topics else ("", "")
        if types:
            remedy = f"set image_transport to {transport}" if other in types else f"remap to a topic of type {wanted}"
            return f"its publisher sends {' and '.join(sorted(types))}, not {wanted}; {remedy}"
        near = self._nearest(topic, wanted)
        sent = self._nearest(topic, other, "/compressed" if transport == "compressed" else "") if other else ""
        if sent and sent.removesuffix("/compressed") == topic.removesuffix("/compressed"):
            return f"nobody publishes it; {sent} is published: set image_transport to {transport}"
        if near:
            return f"nobody publishes it; {near} is published: remap to it if it is the correct topic"
        if sent:
            remedy = f"remap to it, and set image_transport to {transport}, if it is the correct topic"
            return f"nobody publishes it; {sent} is published: {remedy}"
        return "nobody publishes it"

    def _nearest(self, topic: str, kind: str, ending: str = "") -> str:
        """Return the topic with the most similar name on which another node publishes a type; empty if none exists."""
        own = self._node.get_fully_qualified_name()
        published = [
            name
            for name, kinds in self._node.get_topic_names_and_types()
            if kind in kinds
            and name != topic
            and name.endswith(ending)
            and (
                # get_publishers_info_by_topic remaps the name that it gets; count_publishers does not.
                self._node.count_publishers(name)
                if self._node.resolve_topic_name(name) != name
                else any(
                    offer.topic_type == kind and full_name(offer) not in ("", own)
                    for offer in self._node.get_publishers_info_by_topic(name)
                )
            )
        ]
        return next(iter(difflib.get_close_matches(topic, published, n=1, cutoff=0.0)), "")

    def _mixed_publishers(self, topic: str, wanted: str, what: str) -> list[Problem]:
        """Report several publishers of images or calibrations on one topic, which cannot be told apart."""
        names = self._senders.on(topic, [offer for offer in self._publishers(topic) if offer.topic_type == wanted])
        if len(names) < 2:
            return []
        text = f"{len(names)} publishers send on {topic} ({listed(names)}): {what} of several cameras are mixed"
        return [Problem(f"publishers: {topic}", text)]

    def _publishers(self, topic: str) -> list[Any]:
        """Return the publishers on one of the topics, of any type."""
        return self._node.get_publishers_info_by_topic(self._asked[topic])  # rclpy remaps this name, too

    def _qos_mismatch(self, topic: str, subscription: Any) -> tuple[str, bool]:
        """Return the QoS policy of the first incompatible publisher, and whether all publishers are incompatible."""
        wanted = _type_name(subscription.msg_type)
        offers = [offer for offer in self._publishers(topic) if offer.topic_type == wanted]
        policies = [mismatch(offer.qos_profile, subscription.qos_profile) for offer in offers]
        return next(filter(None, policies), ""), bool(policies) and all(policies)

    def _transforms_mismatch(self) -> list[Problem]:
        """Report an incompatible publisher of /tf_static, if there is one."""
        policy, _ = ("", False) if self._transforms is None else self._qos_mismatch(self._static, self._transforms)
        return [Problem(f"QoS: {self._static}", self._mismatch_text(self._static, policy))] if policy else []

    def _falls_back(self, policy: str) -> bool:
        """Whether :meth:`adapt` resolves a mismatch, by making a subscription of queue 'all' best effort."""
        return policy == "reliability" and self._parameters.queue == "all"

    def _mismatch_text(self, topic: str, policy: str) -> str:
        remedy = f"change the publisher{or_override(topic, 'subscription', policy)}"
        return f"the publisher of {topic} offers another {policy}: its messages do not arrive; {remedy}"

    def _type_of(self, what: str) -> type:
        images = CompressedImage if self._compressed else Image
        return {"image": images, "info": CameraInfo, "mask": Image}[what]

    @property
    def _image_type(self) -> type:
        return self._type_of("image")

    def _create(self) -> None:
        for side, camera in enumerate(self._cameras):
            for what in camera.topics:
                self._subscribe_to(side, what)
        if self._parameters.publish_odometry and TFMessage is not None:
            self._transforms = with_events(
                self._node.create_subscription,
                TFMessage,
                "/tf_static",
                self._take_transforms,
                QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL),
                event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
                qos_overriding_options=overridable(),
            )

    def _subscribe_to(self, side: int, what: str) -> None:
        """Subscribe to a camera's image, info or mask."""
        camera = self._cameras[side]
        topic = camera.topics[what]
        receive, least = {
            # In a stereo pair, several images may arrive before the partner of the first one.
            "image": (self._receive_image, 1 if len(self._cameras) == 1 else 5),
            "info": (self._receive_info, 10),
            "mask": (self._take_mask, 5),
        }[what]
        reliable = self._parameters.queue == "all" and topic not in self._best_effort
        qos = QoSProfile(
            depth=least if self._parameters.queue == "latest" else 1000,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        )
        subscription = with_events(
            self._node.create_subscription,
            self._type_of(what),
            self._asked[topic],
            functools.partial(receive, side),
            qos,
            event_callbacks=SubscriptionEventCallbacks(use_default_callbacks=False),
            qos_overriding_options=None if topic in self._best_effort else overridable(),
        )
        setattr(camera, what, subscription)

    def _receive_image(self, side: int, message: Any) -> None:
        self._cameras[side].receive(time.monotonic())
        self._take_image(side, message)

    def _receive_info(self, side: int, message: Any) -> None:
        self._take_info(side, message)
        self._cameras[side].calibrated = self._cameras[side].informed = True
        if all(camera.informed for camera in self._cameras):
            self._calibrated.set()


def _prefixes(parameters: Parameters) -> tuple[str, ...]:
    """Return the prefix of each camera's topic names."""
    return ("left/", "right/") if parameters.mode == "stereo" else ("",)


def _other_users_of_shared_memory() -> list[str]:
    """Return the ids of other users with Fast DDS files in shared memory; none if this process does not use any.

    Only the owner can write to a Fast DDS file, so no message passes between two users, or from root to another user.
    A file may be left over from a process that has ended.
    """
    try:
        if "/dev/shm/fast" not in Path("/proc/self/maps").read_text():
            return []
        owners = {found.stat().st_uid for found in Path("/dev/shm").glob("fast*_*")}
    except OSError:  # not Linux, or a file was deleted meanwhile: the next message, a second later, tries again
        return []
    return [str(owner) for owner in sorted(owners - {os.getuid()})]


def _type_name(kind: type) -> str:
    """Return the type name of a message class, as in the ROS graph."""
    return f"{kind.__module__.partition('.')[0]}/msg/{kind.__name__}"
