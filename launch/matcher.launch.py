"""Starts the matcher node: ros2 launch kpmatch_ros matcher.launch.py image:=/camera/image_raw.

`--show-args` lists the arguments. An argument that stands for a parameter of the node is empty by default: the
parameter file decides.
"""

from __future__ import annotations

from pathlib import Path
from posixpath import dirname, join

import yaml
from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.logging import get_logger
from launch_ros.actions import LifecycleNode
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

from kpmatch_ros.parameter_file import applies, sections
from kpmatch_ros.parameters import declaration

NODE_PARAMETERS = (
    "mode",
    "image_transport",
    "rectified",
    "extractor",
    "matcher",
    "device",
    "precision",
    "queue",
    "autostart",
)
# Prefixes of the arguments and of the topics that they name, and what they are for.
CAMERAS = (
    ("", "", "the camera (mode mono)"),
    ("left_", "left/", "the left camera (mode stereo)"),
    ("right_", "right/", "the right camera (mode stereo)"),
)
# True and False too: a launch file that includes this one may hand on str(True).
BOOLEANS = ["true", "false", "True", "False"]


def topic_arguments(argument: str, topic: str, camera: str) -> list[DeclareLaunchArgument]:
    """The launch arguments for one camera's topics."""
    return [
        DeclareLaunchArgument(
            f"{argument}image",
            default_value=f"{topic}image",
            description=f"image topic of {camera}, without the /compressed that image_transport:=compressed adds",
        ),
        DeclareLaunchArgument(
            f"{argument}camera_info",
            default_value="",
            description=f"calibration topic of {camera}. Empty: camera_info beside the image topic.",
        ),
    ]


def parameter_argument(name: str) -> DeclareLaunchArgument:
    """The launch argument for one parameter of the node."""
    declared = declaration(name)
    choices = BOOLEANS if declared.type is bool else list(declared.choices)
    return DeclareLaunchArgument(
        name,
        default_value="",
        description=f"{declared.description}. Empty: as in params_file.",
        choices=["", *choices] if choices else None,
    )


def start_node(context: LaunchContext) -> list[LifecycleNode]:
    """The node's action, with the values that the arguments were given."""
    given = context.launch_configurations

    params_file = Path(given["params_file"]).expanduser()
    if not params_file.is_file():  # launch_ros only warns, and the node would run with other values than asked for
        raise RuntimeError(
            f"params_file: there is no file {params_file.absolute()}; give the path of a YAML file of parameters"
        )
    namespace = make_namespace_absolute(prefix_namespace(given.get("ros_namespace"), given["namespace"]))
    node_name = f"{namespace.rstrip('/')}/matcher"
    found = [section for section, _ in sections(yaml.safe_load(params_file.read_text()))]
    if not any(applies(section, node_name) for section in found):  # ROS says nothing and takes the defaults
        get_logger("matcher.launch.py").warning(
            f"params_file: {params_file} has no section for {node_name}, so nothing in it applies; it has "
            f"{', '.join(found) or 'no section with ros__parameters'}; name the section {node_name} or /**"
        )

    overrides = {
        name: given[name].lower() == "true" if given[name] in BOOLEANS else given[name]
        for name in (*NODE_PARAMETERS, "use_sim_time")
        if given[name]
    }

    remappings = []
    for argument, topic, _ in CAMERAS:
        image = given[f"{argument}image"]
        camera_info = given[f"{argument}camera_info"] or join(dirname(image), "camera_info")
        remappings += [(f"{topic}image", image), (f"{topic}camera_info", camera_info)]

    # The level of the node's own logger: at debug, rcl and the middleware write several lines per message.
    logger = node_name.strip("/").replace("/", ".")

    # A LifecycleNode rather than a Node, so that a launch file that includes this one can wait for its states
    # (OnStateTransition) and change them (ChangeState).
    return [
        LifecycleNode(
            package="kpmatch_ros",
            executable="matcher",
            name="matcher",
            namespace=given["namespace"],
            parameters=[str(params_file), *([overrides] if overrides else [])],
            remappings=remappings,
            ros_arguments=["--log-level", f"{logger}:={given['log_level']}"],
            output="screen",
            emulate_tty=True,
            respawn=given["respawn"].lower() == "true",
            respawn_delay=2.0,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """The arguments and the node."""
    return LaunchDescription(
        [
            *(argument for camera in CAMERAS for argument in topic_arguments(*camera)),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and its topics"),
            DeclareLaunchArgument(
                "params_file",
                default_value=str(Path(get_package_share_directory("kpmatch_ros"), "config", "matcher.yaml")),
                description="YAML file with the node's parameters",
            ),
            *(parameter_argument(name) for name in NODE_PARAMETERS),
            DeclareLaunchArgument(
                "use_sim_time",
                default_value="",
                description="take the time from /clock, as published by a bag player. Empty: as in params_file.",
                choices=["", *BOOLEANS],
            ),
            DeclareLaunchArgument(
                "log_level",
                default_value="info",
                description="lowest level of the messages that the node logs",
                choices=["debug", "info", "warn", "error", "fatal"],
            ),
            DeclareLaunchArgument(
                "respawn",
                default_value="false",
                description="start the node again, after two seconds, when its process has ended",
                choices=BOOLEANS,
            ),
            OpaqueFunction(function=start_node),
        ]
    )
