"""Runs the package's launch files in tests.

The program `true` runs instead of the node (with launch's `launch-prefix`). The node's command line is then passed to
rclpy, which reads it as in the node.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import launch.logging
import pytest
import rclpy
from ament_index_python.packages import get_package_share_directory
from domain_coordinator import domain_id
from launch import LaunchDescription, LaunchDescriptionEntity, LaunchService
from launch.actions import GroupAction, IncludeLaunchDescription, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch.launch_description_sources import PythonLaunchDescriptionSource

SHARE = Path(get_package_share_directory("kpmatch_ros"))


@pytest.fixture(autouse=True)
def isolated_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A separate ROS domain, and a folder for the logs and parameter files that launch leaves behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("ROS_LOG_DIR", str(tmp_path))
    launch.logging.reset()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    with domain_id() as domain:
        monkeypatch.setenv("ROS_DOMAIN_ID", str(domain))
        yield


def include(file: str = "matcher.launch.py", /, **arguments: str) -> IncludeLaunchDescription:
    source = PythonLaunchDescriptionSource(str(SHARE / "launch" / file))
    return IncludeLaunchDescription(source, launch_arguments=arguments.items())


def run(*entities: LaunchDescriptionEntity) -> int:
    service = LaunchService(noninteractive=True)
    service.include_launch_description(LaunchDescription(list(entities)))
    return int(service.run())


class LaunchedNode:
    """The node's name, parameters and topics that result from a launch file's command line."""

    def __init__(self, *around: LaunchDescriptionEntity, **arguments: str) -> None:
        started: list[list[str]] = []
        note = OnProcessStart(on_start=lambda event, _context: started.append(event.cmd))
        group = GroupAction([*around, include(**arguments, **{"launch-prefix": "true"})])
        assert run(RegisterEventHandler(note), group) == 0
        ((_true, self.executable, *self.command_line),) = started
        context = rclpy.Context()
        rclpy.init(context=context)
        try:
            node = rclpy.create_node(
                "unnamed",
                context=context,
                cli_args=self.command_line,
                automatically_declare_parameters_from_overrides=True,
                start_parameter_services=False,
            )
            self.name = node.get_fully_qualified_name()
            self.parameters = {name: item.value for name, item in node.get_parameters_by_prefix("").items()}
            topics = [
                f"{camera}{topic}" for camera in ("", "left/", "right/") for topic in ("image", "camera_info", "mask")
            ]
            self.topics = {topic: node.resolve_topic_name(topic) for topic in topics}
            node.destroy_node()
        finally:
            context.shutdown()


def launched(*words: str, file: str = "matcher.launch.py") -> tuple[int, str]:
    """Run a launch file as the command line would, and return its exit status and log.

    ``file`` is the name of one of the package's launch files, or an absolute path.
    """
    arguments = dict(word.split(":=") for word in words)
    with pytest.MonkeyPatch.context() as patch:
        package = [] if Path(file).is_absolute() else ["kpmatch_ros"]
        patch.setattr(sys, "argv", ["ros2", "launch", *package, file, *words])
        status = run(include(file, **arguments))
        return status, Path(launch.logging.launch_config.log_dir, "launch.log").read_text()
