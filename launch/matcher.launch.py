"""Starts the matcher node: ros2 launch kpmatch_ros matcher.launch.py image:=/camera/image_raw.

`--show-args` lists the arguments. Every parameter of the node is one, made from its declaration, and empty by default:
the parameter file decides. A name that is none is refused.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from posixpath import dirname, join
from typing import Any

from ament_index_python.packages import PackageNotFoundError, get_package_prefix, get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.events.process import ProcessExited
from launch.logging import get_logger
from launch_ros.actions import LifecycleNode, Node
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

from kpmatch_ros.parameter_file import applies, read_sections, unknown_keys
from kpmatch_ros.parameters import Declaration, ParameterError, declarations, meant

FILE = Path(__file__).name
DEFAULTS = Path(get_package_share_directory("kpmatch_ros"), "config", "matcher.yaml")
# The launch file that starts this one twice, and its own arguments.
TWO_CAMERAS = "two_cameras.launch.py"
TWO_CAMERAS_OWN = ("first", "second")
# Prefixes of the arguments and of the topics that they name, and what they are for.
CAMERAS = (
    ("", "", "the camera (mode mono)"),
    ("left_", "left/", "the left camera (mode stereo)"),
    ("right_", "right/", "the right camera (mode stereo)"),
)
# True and False too: a launch file that includes this one may hand on str(True).
BOOLEANS = ["true", "false", "True", "False"]
# Arguments that launch and launch_ros read themselves, and what launch_ros keeps among them.
LAUNCHS_OWN = {
    "emulate_tty",
    "global_params",
    "launch-prefix",
    "launch-prefix-filter",
    "ros_namespace",
    "ros_remaps",
    "sigkill_timeout",
    "sigterm_timeout",
}


def topic_arguments(argument: str, topic: str, camera: str) -> list[DeclareLaunchArgument]:
    """The launch arguments for one camera's topics."""
    return [
        DeclareLaunchArgument(
            f"{argument}image",
            default_value=f"{topic}image",
            description=f"image topic of {camera}. One that ends in /compressed sets image_transport.",
        ),
        DeclareLaunchArgument(
            f"{argument}camera_info",
            default_value="",
            description=f"calibration topic of {camera}. Empty: camera_info beside the image topic.",
        ),
        DeclareLaunchArgument(
            f"{argument}mask_topic",
            default_value="",
            description=f"topic with the masks of {camera}'s images. Empty: mask beside the image topic.",
        ),
    ]


def parameter_argument(item: Declaration) -> DeclareLaunchArgument:
    """The launch argument for one parameter of the node."""
    choices = BOOLEANS if item.type is bool else list(item.choices)
    notes = ", ".join(note for note in ("" if item.choices else item.constraint, item.unit) if note)
    return DeclareLaunchArgument(
        item.name,
        default_value="",
        description=f"{item.description}{f' ({notes})' if notes else ''}. Empty: as in params_file.",
        choices=["", *choices] if choices else None,
    )


def arguments() -> list[DeclareLaunchArgument]:
    """All arguments of this file."""
    return [
        *(argument for camera in CAMERAS for argument in topic_arguments(*camera)),
        DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and its topics"),
        DeclareLaunchArgument(
            "params_file",
            default_value=str(DEFAULTS),
            description="YAML file with the node's parameters",
        ),
        *map(parameter_argument, declarations()),
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
        DeclareLaunchArgument(
            "respawn_max_retries",
            default_value="-1",
            description="with respawn: how often at most, -1 without limit (not in Humble)",
        ),
        DeclareLaunchArgument(
            "required",
            default_value="",
            description="end the launch with status 1 when the node has ended with an error and is not started again. "
            "Empty: true on the command line, false where another launch file includes this one.",
            choices=["", *BOOLEANS],
        ),
        DeclareLaunchArgument(
            "rviz", default_value="false", description="also start rviz2 with rviz/matcher.rviz", choices=BOOLEANS
        ),
    ]


def is_true(text: str) -> bool:
    return text.lower() == "true"


def launched() -> str:
    """The launch file of these two that the command line names, by package or by path.

    Empty where that is another one, which includes them, be it of the same name.
    """
    folder = Path(__file__).resolve().parent
    for before, word in pairwise(sys.argv):
        path = Path(word)
        if path.name in (FILE, TWO_CAMERAS) and (before == "kpmatch_ros" or path.resolve().parent == folder):
            return path.name
    return ""


def refuse_unknown_arguments(given: Mapping[str, str]) -> None:
    """Name an argument that no argument is: launch takes any, in silence.

    Where a launch file of others includes this one, its own arguments are among those given. Then only one that looks
    like one of this file's is named, and the launch goes on.
    """
    file = launched()
    known = [*(argument.name for argument in arguments()), *(() if file == FILE else TWO_CAMERAS_OWN)]
    for name in given.keys() - set(known) - LAUNCHS_OWN:
        suggestion = meant(name, known)
        text = f"{file or FILE} has no argument {name}{suggestion or '.'} --show-args lists the arguments"
        if file:
            raise RuntimeError(text)
        if suggestion:
            get_logger(FILE).warning(text)


def read_params_file(path: Path, node_name: str) -> list[tuple[str, Any]]:
    """The sections of a parameter file that apply to the node, in the order in which ROS applies them.

    What ROS would ignore in silence is named: no section for the node, and keys that are no parameters. A key in a
    section of the node's own stops the launch. A section with a pattern, such as /**, may hold the parameters of other
    nodes: there, a key that looks like a parameter of this node is warned of.

    Raises:
        RuntimeError: for a file that is not there or is no YAML, and for a key that is no parameter.
    """
    if not path.is_file():  # launch_ros only warns, and the node would run with other values than asked for
        raise RuntimeError(
            f"params_file: there is no file {path.absolute()}; give the path of a YAML file of parameters"
        )
    try:
        found = read_sections(path)
    except ParameterError as error:
        raise RuntimeError(f"params_file: {error}") from error
    own = [(section, values) for section, values in found if applies(section, node_name)]
    if not own:  # ROS says nothing and takes the defaults
        get_logger(FILE).warning(
            f"params_file: {path} has no section for {node_name}, so nothing in it applies; it has "
            f"{', '.join(section for section, _ in found) or 'no section with ros__parameters'}; name the section "
            f"{node_name} or /**"
        )
    names = [item.name for item in declarations()]
    for section, values in own:
        for key in unknown_keys(values):
            suggestion = meant(key, names)
            text = f"params_file: {path}: {section} has {key}, which is no parameter of the matcher{suggestion}"
            if "*" not in section:
                raise RuntimeError(text)
            if suggestion:
                get_logger(FILE).warning(f"{text} It has no effect on {node_name}.")
    return own


def merged(sections: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """What sections of parameter files come to: the last one that has a parameter counts, as in ROS."""
    found: dict[str, Any] = {}
    for _, values in sections:
        found |= values if isinstance(values, dict) else {}
    return found


def parameters_around(context: LaunchContext, node_name: str) -> dict[str, Any]:
    """The node's parameters that SetParameter and SetParametersFromFile set around this file, and no argument does.

    launch_ros keeps them under global_params, a pair or a file each, and hands them to a node before its own files.

    Raises:
        RuntimeError: for a file that is no YAML, and for a value that is not allowed.
        OSError: for a file that cannot be read.
    """
    given = context.launch_configurations
    found: dict[str, Any] = {}
    try:
        for item in given.get("global_params", []):
            sections = [("/**", dict([item]))] if isinstance(item, tuple) else read_sections(Path(item))
            found |= merged((section, values) for section, values in sections if applies(section, node_name))
        checks = {"use_sim_time": bool} | {item.name: item.check for item in declarations()}
        return {name: check(found[name]) for name, check in checks.items() if name in found and not given[name]}
    except ParameterError as error:
        raise RuntimeError(f"SetParameter: {error}") from error


def write_params_file(values: Mapping[str, Any], sections: Iterable[str]) -> str:
    """Write a parameter file that holds the values in each of the sections, and return its path.

    ROS merges parameter files by section: a section that an earlier file has keeps its place, and later ones win. So
    what is to win over a file stands in each section of it that applies.
    """
    # ROS takes matcher and /matcher for two sections of one node.
    spellings = [spelling for section in sections for spelling in (section, section.lstrip("/"))]
    # JSON is YAML with all strings in quotes. launch_ros writes 1e5 and y without, which are a number and true to ROS.
    text = json.dumps({section: {"ros__parameters": values} for section in spellings}, ensure_ascii=False)
    with tempfile.NamedTemporaryFile("wb", prefix="launch_params_", suffix=".yaml", delete=False) as file:
        file.write(text.encode(errors="surrogateescape"))
    return file.name


def value_of(name: str, kind: type, text: str) -> Any:
    """What an argument's text says, as a type.

    Raises:
        RuntimeError: where it is no number.
    """
    try:
        return is_true(text) if kind is bool else kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise RuntimeError(f"argument {name} is {text!r}; it must be {expected}") from None


def counting(around: Mapping[str, Any], params_file: Path, in_file: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parameters set around this file that count, by name.

    All of them count over the packaged defaults, which nobody asked for. In launch_ros a node's own file counts over
    them, and says nothing: that is warned of.
    """
    if params_file == DEFAULTS:
        return dict(around)
    if lost := [name for name, value in around.items() if in_file.get(name, value) != value]:
        get_logger(FILE).warning(
            f"params_file: {params_file} sets {', '.join(lost)}, which SetParameter sets around it: the file counts. "
            "Take it out of the file, or give it as an argument"
        )
    return {name: value for name, value in around.items() if name not in in_file}


def parameter_value(item: Declaration, text: str) -> Any:
    """What an argument's text says, as the parameter's type.

    Raises:
        RuntimeError: where it is none, or is not allowed.
    """
    try:
        return item.check(value_of(item.name, item.type, text))
    except ParameterError as error:
        raise RuntimeError(f"argument {error}") from None


def image_topics(given: Mapping[str, str], mode: str, transport: str) -> tuple[dict[str, str], str]:
    """The image topic of each camera, by argument, and the transport that those of the mode name.

    Theirs come without /compressed.

    Args:
        given: the launch arguments.
        mode: mono or stereo.
        transport: what was asked for; empty where nothing was.

    Raises:
        RuntimeError: where one topic is compressed and another is not, or image_transport says otherwise.
    """
    topics = {argument: given[f"{argument}image"] for argument, _, _ in CAMERAS}
    used = {argument: topic for argument, topic in topics.items() if bool(argument) == (mode == "stereo")}
    compressed = [topic for topic in used.values() if topic.endswith("/compressed")]
    if not compressed:
        return topics, transport
    named = " and ".join(compressed)
    if transport == "raw":
        raise RuntimeError(f"{named}: is a topic of compressed images; image_transport:=raw cannot read it")
    if len(compressed) < len(used):
        raise RuntimeError(f"{named}: give both cameras' topics with /compressed, or none")
    return topics | {argument: topic.removesuffix("/compressed") for argument, topic in used.items()}, "compressed"


def start(context: LaunchContext) -> list[Node]:
    """The node's action, with the values that the arguments were given, and rviz2's."""
    given = context.launch_configurations
    refuse_unknown_arguments(given)

    params_file = Path(given["params_file"]).expanduser()
    namespace = make_namespace_absolute(prefix_namespace(given.get("ros_namespace"), given["namespace"]))
    node_name = f"{namespace.rstrip('/')}/matcher"
    own = read_params_file(params_file, node_name)

    # As ROS does: an argument, or else the last section that has the parameter, or else the default.
    in_file = merged(own)
    overrides = counting(parameters_around(context, node_name), params_file, in_file)
    defaults = {item.name: item.default for item in declarations()}
    mode = given["mode"] or (defaults | in_file | overrides)["mode"]
    images, transport = image_topics(given, mode, given["image_transport"] or overrides.get("image_transport", ""))
    texts = {item.name: given[item.name] for item in declarations()} | {"image_transport": transport}
    overrides |= {item.name: parameter_value(item, texts[item.name]) for item in declarations() if texts[item.name]}
    if given["use_sim_time"]:
        overrides["use_sim_time"] = is_true(given["use_sim_time"])
    files = [str(params_file)]
    if overrides:
        files.append(write_params_file(overrides, ["/**", node_name, *(section for section, _ in own)]))

    remappings = []
    for argument, topic, _ in CAMERAS:
        beside = dirname(images[argument])
        camera_info = given[f"{argument}camera_info"] or join(beside, "camera_info")
        mask = given[f"{argument}mask_topic"] or join(beside, "mask")
        remappings += [(f"{topic}image", images[argument]), (f"{topic}camera_info", camera_info)]
        remappings.append((f"{topic}mask", mask))

    respawn = is_true(given["respawn"])
    retries = value_of("respawn_max_retries", int, given["respawn_max_retries"])
    # Not an argument of Humble's launch: given only where it is asked for.
    limit = {"respawn_max_retries": retries} if respawn and retries >= 0 else {}
    required = is_true(given["required"]) if given["required"] else bool(launched())
    ends = 0

    def ended(event: ProcessExited, context: LaunchContext) -> None:
        nonlocal ends
        ends += 1
        again = respawn and (retries < 0 or ends <= retries)
        if required and event.returncode and not again and not context.is_shutdown:
            raise RuntimeError(f"{node_name} ended with status {event.returncode}")

    # The level of the node's own logger: at debug, rcl and the middleware write several lines per message.
    logger = node_name.strip("/").replace("/", ".")

    # A LifecycleNode rather than a Node, so that a launch file that includes this one can wait for its states
    # (OnStateTransition) and change them (ChangeState).
    matcher = LifecycleNode(
        package="kpmatch_ros",
        executable="matcher",
        name="matcher",
        namespace=given["namespace"],
        parameters=files,
        remappings=remappings,
        ros_arguments=["--log-level", f"{logger}:={given['log_level']}"],
        output="screen",
        emulate_tty=sys.stdout.isatty(),  # colours, but not into a container's log
        respawn=respawn,
        respawn_delay=2.0,
        on_exit=ended,
        **limit,
    )
    return [matcher, *([rviz(given["namespace"])] if is_true(given["rviz"]) else [])]


def rviz(namespace: str) -> Node:
    """rviz2 with the package's configuration, whose topics are relative to the namespace.

    Raises:
        RuntimeError: where it is not installed.
    """
    try:
        get_package_prefix("rviz2")
    except PackageNotFoundError:
        raise RuntimeError("rviz:=true: rviz2 is not installed (apt install ros-$ROS_DISTRO-rviz2)") from None
    configuration = Path(get_package_share_directory("kpmatch_ros"), "rviz", "matcher.rviz")
    return Node(package="rviz2", executable="rviz2", namespace=namespace, arguments=["-d", str(configuration)])


def generate_launch_description() -> LaunchDescription:
    """The arguments and the nodes."""
    return LaunchDescription([*arguments(), OpaqueFunction(function=start)])
