"""Runs a robot with /tf_static together with the node, for test_base_frame.py, in an environment with tf2_msgs.

Prints a JSON object: the node's diagnostics before it knew the camera's transform, its diagnostics about an
incompatible publisher, and what it published afterwards.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.serialization import deserialize_message
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import CameraInfo, Image

from node_harness import NodeUnderTest, running_node


def play(node: NodeUnderTest, bag: Path, peers: dict[str, Any], seconds: int) -> None:
    """Publish the bag's images and calibrations, with stamps shifted by ``seconds``."""
    kinds = {"image_rect": Image, "camera_info": CameraInfo}
    with AnyReader([bag]) as reader:
        for connection, _, raw in reader.messages():
            if connection.topic in peers:
                message = deserialize_message(bytes(raw), kinds[connection.topic.rsplit("/", 1)[1]])
                message.header.stamp.sec += seconds
                peers[connection.topic].publish(message)
                node.spin(0.02)


def main(bag: Path, folder: Path) -> None:
    from tf2_msgs.msg import TFMessage

    parameters = {"mode": "stereo", "rectified": True, "publish_odometry": True, "base_frame": "base_link"}
    with running_node(folder, profile="fast", matcher="nearest", max_keypoints=256, **parameters) as node:
        odometry: list[Odometry] = []
        transforms: list[Any] = []
        node.subscribe(Odometry, "odometry", odometry.append)
        node.subscribe(TFMessage, "/tf", transforms.append)
        peers = {
            f"/{side}/{name}": node.node.create_publisher(kind, f"{side}/{topic}", QoSProfile(depth=100))
            for side in ("left", "right")
            for name, kind, topic in (("image_rect", Image, "image"), ("camera_info", CameraInfo, "camera_info"))
        }
        node.wait_for(lambda: all(peer.get_subscription_count() for peer in peers.values()), "the node to subscribe")
        node.wait_for(lambda: node.node.count_publishers("odometry"), "the topic")
        node.wait_until_known()

        def base_frame_warning() -> str:
            return next((a.status[0].message for a in node.diagnostics if "base_frame" in a.status[0].message), "")

        play(node, bag, peers, 0)
        node.wait_for(base_frame_warning, "a warning")
        before = len(odometry)
        volatile = node.node.create_publisher(TFMessage, "/tf_static", 10)
        not_received = "the publisher of /tf_static offers another durability"
        node.wait_for(
            lambda: not_received in node.message() and not_received in node.log,
            "the warning about the incompatible publisher",
        )
        volatility = node.message()
        node.node.destroy_publisher(volatile)
        with AnyReader([bag]) as reader:
            connections = [each for each in reader.connections if each.topic == "/tf_static"]
            (static,) = [bytes(raw) for _, _, raw in reader.messages(connections)]
        qos = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        publisher = node.node.create_publisher(TFMessage, "/tf_static", qos)
        publisher.publish(static)
        node.wait_for(lambda: not_received not in node.message(), "the end of that warning")
        node.wait_for(lambda: publisher.get_subscription_count(), "the node to subscribe to /tf_static")
        replays = itertools.count(1)

        def is_placed() -> bool:  # repeated, because the first images may arrive before the node has /tf_static
            play(node, bag, peers, next(replays))
            node.spin(1.0)
            return bool(odometry and transforms)

        node.wait_for(is_placed, "odometry")
        last, placed = odometry[-1], transforms[-1].transforms[0]
        position = last.pose.pose.position
        print(
            json.dumps(
                {
                    "said": base_frame_warning(),
                    "volatility": volatility,
                    "before": before,
                    "frames": [last.header.frame_id, last.child_frame_id],
                    "tf": [placed.header.frame_id, placed.child_frame_id],
                    "position": [position.x, position.y, position.z],
                }
            )
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
