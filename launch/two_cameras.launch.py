"""Two matchers, one for each camera: ros2 launch kpmatch_ros two_cameras.launch.py first:=front second:=rear.

Each node has its camera's namespace, and reads image_raw and camera_info there. All other arguments of
matcher.launch.py, such as max_keypoints:=512, hold for both.
"""

from __future__ import annotations

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

MATCHER = str(Path(__file__).with_name("matcher.launch.py"))
CAMERAS = {"first": "front", "second": "rear"}


def matcher(camera: str) -> GroupAction:
    """One camera's node. The group keeps its arguments from the other's."""
    arguments = {"namespace": LaunchConfiguration(camera), "image": "image_raw"}
    source = PythonLaunchDescriptionSource(MATCHER)
    return GroupAction([IncludeLaunchDescription(source, launch_arguments=arguments.items())])


def generate_launch_description() -> LaunchDescription:
    """The arguments and the two nodes."""
    return LaunchDescription(
        [
            *(
                DeclareLaunchArgument(camera, default_value=namespace, description=f"namespace of the {camera} camera")
                for camera, namespace in CAMERAS.items()
            ),
            *map(matcher, CAMERAS),
        ]
    )
