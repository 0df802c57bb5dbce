"""Starts the matcher node: ros2 launch kpmatch_ros matcher.launch.py image:=/camera/image_raw.

`--show-args` lists the arguments. Every parameter of the node has an argument, generated from its declaration. It is
empty by default, so the parameter file decides. Unknown arguments are refused.
"""

from __future__ import annotations

import inspect
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
from launch.actions import DeclareLaunchArgument, ExecuteLocal, OpaqueFunction
from launch.events.process import ProcessExited
from launch.logging import get_logger
from launch_ros.actions import LifecycleNode, Node
from launch_ros.utilities import make_namespace_absolute, prefix_namespace

from kpmatch_ros.parameter_file import applies, read_sections, unknown_keys
from kpmatch_ros.parameters import Declaration, ParameterError, declarations, meant

FILE = Path(__file__).name
DEFAULTS = Path(get_package_share_directory("kpmatch_ros"), "config", "matcher.yaml")
# The launch file that includes this one twice, and the arguments that only it has.
TWO_CAMERAS = "two_cameras.launch.py"
TWO_CAMERAS_OWN = ("first", "second")
# For each camera: prefix of the arguments, prefix of the topics, and description.
CAMERAS = (
    ("", "", "the camera (mode mono)"),
    ("left_", "left/", "the left camera (mode stereo)"),
    ("right_", "right/", "the right camera (mode stereo)"),
)
# With True and False, because a launch file that includes this one may pass str(True).
BOOLEANS = ["true", "false", "True", "False"]
# Arguments of launch and launch_ros themselves, and values that launch_ros stores among the arguments.
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
    """Return the launch arguments for one camera's topics."""
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
    """Return the launch argument for one parameter of the node."""
    choices = BOOLEANS if item.type is bool else list(item.choices)
    notes = ", ".join(note for note in ("" if item.choices else item.constraint, item.unit) if note)
    return DeclareLaunchArgument(
        item.name,
        default_value="",
        description=f"{item.description}{f' ({notes})' if notes else ''}. Empty: as in params_file.",
        choices=["", *choices] if choices else None,
    )


def arguments() -> list[DeclareLaunchArgument]:
    """Return all arguments of this file."""
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
            description="restart the node two seconds after its process has ended",
            choices=BOOLEANS,
        ),
        DeclareLaunchArgument(
            "respawn_max_retries",
            default_value="-1",
            description="with respawn: largest number of restarts; -1 for no limit (not in Humble)",
        ),
        DeclareLaunchArgument(
            "required",
            default_value="",
            description=(
                "end the launch with status 1 when the node has ended with an error and is not restarted. Empty: "
                "true on the command line, false if another launch file includes this one."
            ),
            choices=["", *BOOLEANS],
        ),
        DeclareLaunchArgument(
            "rviz", default_value="false", description="also start rviz2 with rviz/matcher.rviz", choices=BOOLEANS
        ),
    ]


def is_true(text: str) -> bool:
    return text.lower() == "true"


def launched() -> str:
    """Return which of this package's two launch files the command line names, by package or by path.

    Returns an empty text if the command line names another launch file that includes them, even with the same name.
    """
    folder = Path(__file__).resolve().parent
    for before, word in pairwise(sys.argv):
        path = Path(word)
        if path.name in (FILE, TWO_CAMERAS) and (before == "kpmatch_ros" or path.resolve().parent == folder):
            return path.name
    return ""


def refuse_unknown_arguments(given: Mapping[str, str]) -> None:
    """Refuse unknown arguments. launch itself silently accepts any.

    If another package's launch file includes this one, its own arguments are also in ``given``. Then there is only a
    warning, for a name that is similar to an argument of this file, and the launch continues.

    Raises:
        RuntimeError: for an unknown argument, if the command line names one of this package's launch files.
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
    """Return the sections of a parameter file that apply to the node, in the order in which ROS applies them.

    This reports what ROS would silently ignore: a file without a section for the node, and unknown parameters. An
    unknown parameter in the node's own section stops the launch. A section with a pattern, such as /**, may contain
    other nodes' parameters. There, an unknown parameter only causes a warning, if it is similar to one of this node's.

    Raises:
        RuntimeError: if the file does not exist or is not YAML, or for an unknown parameter in the node's own section.
    """
    if not path.is_file():  # launch_ros would only warn, and the node would run without the requested values
        raise RuntimeError(
            f"params_file: there is no file {path.absolute()}; give the path of a YAML file of parameters"
        )
    try:
        found = read_sections(path)
    except ParameterError as error:
        raise RuntimeError(f"params_file: {error}") from error
    own = [(section, values) for section, values in found if applies(section, node_name)]
    if not own:  # ROS would silently use the defaults
        get_logger(FILE).warning(
            f"params_file: {path} has no section for {node_name}, so nothing in it applies; it has "
            f"{', '.join(section for section, _ in found) or 'no section with ros__parameters'}; name the section "
            f"{node_name} or /**"
        )
    names = [item.name for item in declarations()]
    for section, values in own:
        for key in unknown_keys(values):
            suggestion = meant(key, names)
            text = f"params_file: {path}: {section} has {key}, which is not a parameter of the matcher{suggestion}"
            if "*" not in section:
                raise RuntimeError(text)
            if suggestion:
                get_logger(FILE).warning(f"{text} It has no effect on {node_name}.")
    return own


def merged(sections: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Merge sections of parameter files. The last section that has a parameter wins, as in ROS."""
    found: dict[str, Any] = {}
    for _, values in sections:
        found |= values if isinstance(values, dict) else {}
    return found


def parameters_around(context: LaunchContext, node_name: str) -> dict[str, Any]:
    """Return the node's parameters that SetParameter and SetParametersFromFile of an including launch file set.

    Parameters that an argument sets are left out. launch_ros stores these parameters under global_params, each as a
    pair or a file. It passes them to a node before the node's own files.

    Raises:
        RuntimeError: if a file is not YAML, or a value is not allowed.
        OSError: if a file cannot be read.
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
    """Write a parameter file with the values in each of the sections, and return its path.

    ROS merges parameter files by section. A section of an earlier file keeps its position, and later sections win. So
    to override a file, the values must be in each of its sections that apply to the node.
    """
    # For ROS, matcher and /matcher are different sections, and both apply to the node.
    spellings = [spelling for section in sections for spelling in (section, section.lstrip("/"))]
    # JSON is YAML with quotes around all strings. launch_ros writes 1e5 and y without quotes, and ROS reads these texts
    # as a number and as true.
    text = json.dumps({section: {"ros__parameters": values} for section in spellings}, ensure_ascii=False)
    with tempfile.NamedTemporaryFile("wb", prefix="launch_params_", suffix=".yaml", delete=False) as file:
        file.write(text.encode(errors="surrogateescape"))
    return file.name


def value_of(name: str, kind: type, text: str) -> Any:
    """Convert an argument's text to bool, int or float, or to text.

    Raises:
        RuntimeError: if the text is not a number.
    """
    try:
        return is_true(text) if kind is bool else kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise RuntimeError(f"argument {name} is {text!r}; it must be {expected}") from None


def effective_parameters(around: Mapping[str, Any], params_file: Path, in_file: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parameters from :func:`parameters_around` that apply, by name.

    If the user gave no params_file, all of them apply: they override the packaged defaults. Otherwise the file
    overrides them, as in launch_ros. launch_ros does so silently; this function warns about each difference.
    """
    if params_file == DEFAULTS:
        return dict(around)
    if overridden := [name for name, value in around.items() if in_file.get(name, value) != value]:
        get_logger(FILE).warning(
            f"params_file: {params_file} sets {', '.join(overridden)}, and so does SetParameter in an including launch "
            "file: the file takes precedence. Remove them from the file, or pass them as launch arguments"
        )
    return {name: value for name, value in around.items() if name not in in_file}


def parameter_value(item: Declaration, text: str) -> Any:
    """Convert an argument's text to the parameter's type, and check it.

    Raises:
        RuntimeError: if the text has another type, or the value is not allowed.
    """
    try:
        return item.check(value_of(item.name, item.type, text))
    except ParameterError as error:
        raise RuntimeError(f"argument {error}") from None


def image_topics(given: Mapping[str, str], mode: str, transport: str) -> tuple[dict[str, str], str]:
    """Return each camera's image topic by argument prefix, and the image_transport that follows from the topics.

    The suffix /compressed is removed from the topics of the cameras that the mode uses.

    Args:
        given: the launch arguments.
        mode: mono or stereo.
        transport: the requested image_transport; empty if none was requested.

    Raises:
        RuntimeError: if only one of two topics is compressed, or the topics contradict image_transport.
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
        raise RuntimeError(f"{named}: give both cameras' topics with /compressed, or neither")
    return topics | {argument: topic.removesuffix("/compressed") for argument, topic in used.items()}, "compressed"


def start(context: LaunchContext) -> list[Node]:
    """Return the action that starts the node with the given arguments, and the action for rviz2 if requested."""
    given = context.launch_configurations
    refuse_unknown_arguments(given)

    params_file = Path(given["params_file"]).expanduser()
    namespace = make_namespace_absolute(prefix_namespace(given.get("ros_namespace"), given["namespace"]))
    node_name = f"{namespace.rstrip('/')}/matcher"
    own = read_params_file(params_file, node_name)

    # The precedence is that of ROS: the argument, then the last section that has the parameter, then the default.
    in_file = merged(own)
    overrides = effective_parameters(parameters_around(context, node_name), params_file, in_file)
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
    # Humble's launch does not have this argument, so it is passed only if requested.
    limit = {"respawn_max_retries": retries} if respawn and retries >= 0 else {}
    if limit and "respawn_max_retries" not in inspect.signature(ExecuteLocal.__init__).parameters:
        raise RuntimeError(
            f"argument respawn_max_retries is {retries}, but the launch of this ROS distribution restarts a node "
            "without a limit; leave it out, or set respawn:=false"
        )
    required = is_true(given["required"]) if given["required"] else bool(launched())
    ends = 0

    def ended(event: ProcessExited, context: LaunchContext) -> None:
        nonlocal ends
        ends += 1
        again = respawn and (retries < 0 or ends <= retries)
        if required and event.returncode and not again and not context.is_shutdown:
            raise RuntimeError(f"{node_name} ended with status {event.returncode}")

    # Sets the level of the node's own logger only: at debug, rcl and the middleware log several lines per message.
    logger = node_name.strip("/").replace("/", ".")

    # A LifecycleNode action, so that a launch file that includes this one can wait for the node's states
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
        emulate_tty=sys.stdout.isatty(),  # coloured output on a terminal, but not in a container's log
        respawn=respawn,
        respawn_delay=2.0,
        on_exit=ended,
        **limit,
    )
    return [matcher, *([rviz(given["namespace"])] if is_true(given["rviz"]) else [])]


def rviz(namespace: str) -> Node:
    """Return the action for rviz2 with the package's configuration, whose topics are relative to the namespace.

    Raises:
        RuntimeError: if rviz2 is not installed.
    """
    try:
        get_package_prefix("rviz2")
    except PackageNotFoundError:
        raise RuntimeError("rviz:=true: rviz2 is not installed (apt install ros-$ROS_DISTRO-rviz2)") from None
    configuration = Path(get_package_share_directory("kpmatch_ros"), "rviz", "matcher.rviz")
    return Node(package="rviz2", executable="rviz2", namespace=namespace, arguments=["-d", str(configuration)])


def generate_launch_description() -> LaunchDescription:
    """Return the arguments and the nodes."""
    return LaunchDescription([*arguments(), OpaqueFunction(function=start)])
