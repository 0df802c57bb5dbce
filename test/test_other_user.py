"""Tests with another user's camera process, as in a container, which Fast DDS's shared memory does not reach."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node_harness import NodeUnderTest, running_node

USER = 54321  # does not exist on this machine, so its files in shared memory are from this test

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")


@contextmanager
def camera_of_another_user(node: NodeUnderTest, environment: dict[str, str]) -> Iterator[None]:
    """Publish images to the node as another user."""
    words = [str(node.node.context.get_domain_id()), node.namespace]
    camera = subprocess.Popen(
        [sys.executable, __file__, *words], stdin=subprocess.PIPE, env={**os.environ, **environment}
    )
    try:
        yield
    finally:
        camera.communicate(timeout=30)
        for left in Path("/dev/shm").glob("*fast*"):
            if left.stat().st_uid == USER:
                left.unlink()


def test_another_users_camera_is_reported_and_is_received_over_udp(tmp_path: Path) -> None:
    # With LOCALHOST, rmw_fastrtps uses shared memory regardless of the environment.
    parameters = {"profile": "fast", "matcher": "nearest", "max_keypoints": 60}
    with running_node(tmp_path, calibrated=False, discovery_range="SUBNET", **parameters) as node:
        node.node.destroy_publisher(node.images)
        with camera_of_another_user(node, {}):
            said = f"or the publisher is a process of another user on this machine (user {USER})"
            node.wait_for(lambda: said in node.message(), "the other user to be named")
            assert node.figures()["frames received"] == "0"
        with camera_of_another_user(node, {"FASTDDS_BUILTIN_TRANSPORTS": "UDPv4"}):
            node.wait_for(lambda: int(node.figures()["frames received"]) > 0, "an image")
            node.wait_for(lambda: str(USER) not in node.message(), "the silence to end")


def main(domain: int, namespace: str) -> None:
    import select

    import rclpy
    from sensor_msgs.msg import Image

    def publish(seconds: float) -> None:
        """Publish for this time, or until the input ends."""
        context = rclpy.Context()
        # The other user cannot write logs to root's folder.
        rclpy.init(args=["--ros-args", "--disable-external-lib-logs"], context=context, domain_id=domain)
        node = rclpy.create_node("camera", namespace=namespace, context=context)
        images = node.create_publisher(Image, "image", 10)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not select.select([sys.stdin], [], [], 0.05)[0]:
            images.publish(Image(encoding="mono8", width=64, height=48, step=64, data=bytes(64 * 48)))
        node.destroy_node()
        rclpy.shutdown(context=context)

    publish(0.0)  # loads all libraries, because the other user may not be allowed to read them
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    publish(600.0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
