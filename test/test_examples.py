"""Tests that the example programs run with a node."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("examples/ is not installed with the package", allow_module_level=True)
rclpy = pytest.importorskip("rclpy")
from domain_coordinator import domain_id  # noqa: E402

from kpmatch_ros.msg import RelativePose  # noqa: E402


def test_the_example_marks_ambiguous_poses_in_its_output() -> None:
    with domain_id() as domain:
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "PYTHONUNBUFFERED": "1"}
        printer = subprocess.Popen(
            [sys.executable, EXAMPLES / "print_matches.py"], env=environment, stdout=subprocess.PIPE, text=True
        )
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        try:
            node = rclpy.create_node("peer", context=context)
            publisher = node.create_publisher(RelativePose, "relative_pose", 10)
            end = time.monotonic() + 60
            while not publisher.get_subscription_count() and time.monotonic() < end:
                time.sleep(0.05)
            for status in (RelativePose.FAILED, RelativePose.OK, RelativePose.AMBIGUOUS):
                message = RelativePose(status=status)
                message.pose.pose.position.z = 1.0
                publisher.publish(message)
            assert printer.stdout is not None
            lines = [printer.stdout.readline() for _ in range(3)]
        finally:
            printer.terminate()
            printer.wait(timeout=30)
            rclpy.try_shutdown(context=context)
    moved = "moved (0.000, 0.000, 1.000)"
    assert lines == ["no translation: FAILED\n", f"{moved}\n", f"{moved}, ambiguous\n"]
