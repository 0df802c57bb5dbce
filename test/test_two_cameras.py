"""Tests of `ros2 launch kpmatch_ros two_cameras.launch.py` and its arguments."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("launch_ros", reason="launch comes with a ROS installation, not from PyPI")

from launch import LaunchDescriptionEntity
from launch.actions import GroupAction, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch_harness import include, isolated_launch, launched, run  # noqa: F401  (a fixture)
from launch_ros.actions import PushRosNamespace


def test_two_cameras_have_a_node_each_and_share_the_other_arguments() -> None:
    commands = two_cameras(second="back", max_keypoints="512")
    for command in commands:
        files = [Path(after) for word, after in pairwise(command) if word == "--params-file"]
        assert any('"max_keypoints": 512' in file.read_text() for file in files)
        assert "image:=image_raw" in command and "camera_info:=camera_info" in command
    assert namespaces(commands) == ["/back", "/front"]


def two_cameras(*around: LaunchDescriptionEntity, **arguments: str) -> list[list[str]]:
    """Return the command lines of the nodes of two_cameras.launch.py."""
    commands: list[list[str]] = []
    note = OnProcessStart(on_start=lambda event, _context: commands.append(event.cmd))
    two = include("two_cameras.launch.py", **arguments, **{"launch-prefix": "true"})
    assert run(RegisterEventHandler(note), GroupAction([*around, two])) == 0
    return commands


def namespaces(commands: list[list[str]]) -> list[str]:
    words = sorted(word for command in commands for word in command)
    return [word.removeprefix("__ns:=") for word in words if word.startswith("__ns:=")]


def test_two_cameras_use_the_given_image_topic_and_namespace() -> None:
    commands = two_cameras(namespace="robot1", image="color/image_rect")
    assert namespaces(commands) == ["/robot1/front", "/robot1/rear"]
    assert all("image:=color/image_rect" in command for command in commands)
    assert all("camera_info:=color/camera_info" in command for command in commands)
    below = two_cameras(PushRosNamespace("fleet"), namespace="robot1", second="/rear")
    assert namespaces(below) == ["/fleet/robot1/front", "/rear"]


@pytest.mark.parametrize(
    ("file", "word", "said"),
    [
        ("two_cameras.launch.py", "max_keypoint:=512", "no argument max_keypoint, did you mean max_keypoints?"),
        ("two_cameras.launch.py", "secnd:=back", "no argument secnd, did you mean second?"),
        ("matcher.launch.py", "second:=back", "no argument second."),
    ],
)
def test_a_launch_file_refuses_unknown_arguments(file: str, word: str, said: str) -> None:
    status, log = launched(word, file=file)
    assert status == 1 and f"{file} has {said}" in log and "process started" not in log


def test_two_cameras_on_the_command_line_are_started() -> None:
    words = ("first:=left", "namespace:=robot1", "max_keypoints:=512", "launch-prefix:=true")
    status, log = launched(*words, file="two_cameras.launch.py")
    assert status == 0 and log.count("process started") == 2
