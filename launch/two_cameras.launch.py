"""Starts one matcher for each of two cameras: ros2 launch kpmatch_ros two_cameras.launch.py first:=front second:=rear.

Each node runs in its camera's namespace, and subscribes to image_raw and camera_info there. All other arguments of
matcher.launch.py, such as max_keypoints:=512, apply to both nodes. That file refuses unknown arguments.
"""

from __future__ import annotations

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import PushRosNamespace

MATCHER = str(Path(__file__).with_name("matcher.launch.py"))
# By name: default and description. matcher.launch.py lists first and second in TWO_CAMERAS_OWN.
ARGUMENTS = {
    "first": ("front", "namespace of the first camera"),
    "second": ("rear", "namespace of the second camera"),
    "namespace": ("", "namespace above those of the cameras"),
    "image": ("image_raw", "image topic, in each camera's namespace"),
}


def matcher(camera: str) -> GroupAction:
    """Return the actions that start one camera's node. The group limits the namespace to this node."""
    source = PythonLaunchDescriptionSource(MATCHER)
    arguments = {"namespace": LaunchConfiguration(camera)}
    return GroupAction(
        [
            PushRosNamespace(LaunchConfiguration("namespace")),
            IncludeLaunchDescription(source, launch_arguments=arguments.items()),
        ]
    )


def generate_launch_description() -> LaunchDescription:
    """Return the arguments and the two nodes."""
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(name, default_value=default, description=description)
                for name, (default, description) in ARGUMENTS.items()
            ),
            matcher("first"),
            matcher("second"),
        ]
    )
