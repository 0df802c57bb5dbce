"""Tests that the node survives when a network interface goes down and up, in a network namespace with one interface."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ALONE = ["unshare", "--user", "--map-root-user", "--net"]
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP: linux/sockios.h, linux/if.h


def test_the_node_continues_once_the_network_is_back(tmp_path: Path) -> None:
    try:
        subprocess.run([*ALONE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system allows no network namespaces (unshare)")
    environment = {**os.environ, "FASTDDS_BUILTIN_TRANSPORTS": "UDPv4"}  # shared memory would not notice it
    command = [*ALONE, sys.executable, __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["works", "cut", "back", "0"]


def switch(on: bool) -> None:
    """Switch the loopback interface up or down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, GET_FLAGS, request))[1]
        fcntl.ioctl(control, SET_FLAGS, struct.pack("16sH14x", b"lo", flags | UP if on else flags & ~UP))


def main(folder: Path) -> None:
    from sensor_msgs.msg import Image

    from node_harness import NodeUnderTest, running_node

    pixels = np.random.default_rng(0).integers(0, 256, (96, 160), dtype=np.uint8).tobytes()
    seconds = 0

    def send(node: NodeUnderTest) -> bool:
        nonlocal seconds
        seconds += 1
        image = Image(encoding="mono8", width=160, height=96, step=160, data=pixels)
        image.header.stamp.sec = seconds
        node.send(image)
        node.spin(0.2)
        return bool(node.matches)

    switch(True)
    # With LOCALHOST, rmw_fastrtps uses shared memory regardless of the environment variable.
    parameters = {"profile": "fast", "matcher": "nearest", "max_keypoints": 60, "max_gap": 1e6}
    with running_node(folder, calibrated=False, discovery_range="SUBNET", **parameters) as node:
        node.wait_for(lambda: send(node), "a pair", timeout=120)
        print("works")
        switch(False)
        node.spin(5.0)
        node.matches.clear()
        for _ in range(10):
            assert not send(node)
        print("cut")
        switch(True)
        node.wait_for(lambda: send(node), "a pair", timeout=60)
        print("back", node.stop())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
