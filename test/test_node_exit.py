"""How the matcher's process ends where it cannot start: a supervisor must not take a silent node for a living one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rclpy")
from ament_index_python.packages import get_package_prefix
from domain_coordinator import domain_id


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("extractor:=/no/such/weights", "/no/such/weights"),
        ("publish_odometry:=true", "publish_odometry needs mode stereo"),
        ("max_keypoints:=0", "max_keypoints"),
    ],
)
def test_a_node_that_cannot_start_by_itself_ends_with_status_1(
    parameter: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = Path(get_package_prefix("kpmatch_ros"), "lib", "kpmatch_ros", "matcher")
    with domain_id() as domain:
        monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
        done = subprocess.run(
            [sys.executable, matcher, "--ros-args", "-p", parameter, "-p", "device:=cpu"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr
