"""The node's publishers."""

from __future__ import annotations

import functools
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, PointCloud2

from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.ros.monitor import Problem
from kpmatch_ros.ros.qos import PublisherEventCallbacks, or_override, overridable, policy_of, with_events
from kpmatch_ros.ros.senders import Senders, listed
from kpmatch_ros.ros.tf import INSTALL, TFMessage

__all__ = ["Outputs", "output_names"]

_ON_DEMAND = ("features", "landmarks", "match_image")  # published only while there is a subscriber
# With queue 'all', a replay may be faster than a subscriber for a while, and no message should be lost.
_DEPTH = {"latest": 10, "all": 1000}
_LARGE_DEPTH = {"latest": 2, "all": 100}  # for example, the features of a frame take 1 MB


class Outputs:
    """Creates the publishers of the output topics, and publishes on them."""

    def __init__(self, node: LifecycleNode, parameters: Parameters) -> None:
        self._node = node
        self._senders = Senders()
        self._refused: dict[str, str] = {}  # by topic: text about a subscriber with incompatible QoS
        if parameters.publish_odometry and parameters.publish_tf and TFMessage is None:
            node.get_logger().warning(f"odometry is published, but not to TF: {INSTALL}", once=True)
        self._publishers: dict[str, Any] = {}
        try:
            for name, (kind, depth) in _kinds(parameters).items():
                self._publishers[name] = self._offer(name, kind, depth)
        except BaseException:
            self.destroy()
            raise

    def _offer(self, name: str, kind: Any, depth: int) -> Any:
        report = functools.partial(self._report_subscriber, self._node.resolve_topic_name(name))
        return with_events(
            self._node.create_lifecycle_publisher,
            kind,
            name,
            QoSProfile(depth=depth),
            qos_overriding_options=overridable(),
            event_callbacks=PublisherEventCallbacks(incompatible_qos=report, use_default_callbacks=False),
        )

    def publish(self, topic: str, message: Any) -> None:
        """Publish a message from the pipeline."""
        self._publishers[topic].publish(message)

    def wanted(self, topic: str) -> bool:
        """Whether the messages of a topic are needed."""
        publisher = self._publishers.get(topic)
        return publisher is not None and (topic not in _ON_DEMAND or publisher.get_subscription_count() > 0)

    def problems(self) -> list[Problem]:
        """Return the problems of the outputs: subscribers with incompatible QoS, and topics with another publisher."""
        found = []
        for publisher in self._publishers.values():
            topic = publisher.topic_name
            refused = self._refused.get(topic)
            if refused and self._node.count_subscribers(topic) > publisher.get_subscription_count():
                found.append(Problem(f"QoS: {topic}", refused))  # the incompatible subscriber still exists
        return found + self._shared()

    def _shared(self) -> list[Problem]:
        """Report topics on which another node publishes too, for example because the node was started twice."""
        own = self._node.get_fully_qualified_name()
        topics, names = [], []
        for name in self._publishers:
            topic = self._node.resolve_topic_name(name)
            if name == "/tf" or self._node.count_publishers(topic) < 2:
                continue
            publishers = self._senders.on(topic, self._node.get_publishers_info_by_topic(name))  # rclpy remaps the name
            if len(publishers) > 1 and own in publishers:
                topics.append(topic)
                publishers.remove(own)
                names += publishers
        if not topics:
            return []
        others = listed(names) + (", another node of this name" if own in names else "")
        text = (
            f"another node publishes on {', '.join(topics)} too ({others}): subscribers receive both, mixed. Stop one "
            "of them, or give each a namespace of its own"
        )
        return [Problem("publishers: outputs", text)]

    def destroy(self) -> None:
        """Destroy the publishers."""
        for publisher in self._publishers.values():
            self._node.destroy_lifecycle_publisher(publisher)
        self._publishers = {}

    def _report_subscriber(self, topic: str, event: Any) -> None:
        policy = policy_of(event)
        explanation = (
            f"a subscriber of {topic} asks for another {policy} and receives nothing; change it"
            f"{or_override(topic, 'publisher', policy)}"
        )
        self._refused[topic] = explanation
        self._node.get_logger().warning(explanation)


def _kinds(parameters: Parameters) -> dict[str, tuple[Any, int]]:
    """Return message type and queue depth of each topic that is published with these parameters."""
    depth, large = _DEPTH[parameters.queue], _LARGE_DEPTH[parameters.queue]
    kinds: dict[str, tuple[Any, int]] = {
        "matches": (MatchArray, depth),
        "relative_pose": (RelativePose, depth),
        "features": (FeatureArray, large),
        "match_image": (Image, 2),
    }
    if parameters.mode == "stereo":
        kinds["stereo_matches"] = (MatchArray, depth)
        kinds["landmarks"] = (PointCloud2, large)
    if parameters.publish_odometry:
        kinds["odometry"] = (Odometry, depth)
        if TFMessage is not None:
            kinds["/tf"] = (TFMessage, 100)
    return kinds


def output_names(parameters: Parameters) -> dict[str, str]:
    """Return the topic names before remapping, each with its content, for :func:`check_topics`."""
    return {name: name for name in _kinds(parameters)}
