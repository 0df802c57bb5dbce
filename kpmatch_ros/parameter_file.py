"""ROS 2 parameter files, such as config/matcher.yaml, without ROS."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from kpmatch_ros.parameters import ParameterError, Parameters, declarations, meant

__all__ = ["applies", "read_parameter_file", "read_sections", "unknown_keys", "unused_files", "without_effect"]

# Parameters that every node has. `qos_overrides` may also be nested.
_FOREIGN = re.compile(r"use_sim_time|start_type_description_service|qos_overrides(\..*)?")
# Names of the node's topics, where parameters are given: other packages take topics as parameters.
_TOPIC = re.compile(r"(left_|right_|left/|right/)?(image|camera_info|mask)(_topic|_raw)?")

# How rcl_yaml_param_parser reads what stands without quotes.
_TRUE = re.compile("y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON")
_FALSE = re.compile("n|N|no|No|NO|false|False|FALSE|off|Off|OFF")
_INTEGER = re.compile("[-+]?(0x[0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|\.?inf|\.?nan)", re.ASCII | re.IGNORECASE)


def read_sections(path: Path) -> list[tuple[str, Any]]:
    """The sections of a parameter file: the name of the node that each is for, and what its ros__parameters holds.

    The name may be a pattern, and may be nested by namespace. A section may stand twice, and values are those that ROS
    makes of their spelling (rcl_yaml_param_parser), which are not YAML's everywhere.

    Raises:
        ParameterError: when the file is no YAML.
        OSError: when it cannot be read.
    """
    try:
        return list(_sections(yaml.compose(path.read_text(), _Loader)))
    except RecursionError as error:
        raise ParameterError(f"{path}: is nested too deeply for a parameter file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path}: is no YAML file: {error}") from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        """As a node does, take no alias, which could stand for any amount of memory."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"ROS takes no alias,{str(self.peek_event().start_mark).rstrip()}")
        return super().compose_node(parent, index)


def _sections(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == "ros__parameters":
            yield path, _value(value)
        else:
            name = str(key.value).strip("/")  # of the root, nothing is left
            yield from _sections(value, f"{path}/{name}" if name else path)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _value(value) for key, value in node.value}  # as with ROS, the last of a name counts
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    text = str(node.value)
    if node.style is not None:  # in quotes
        return text
    if not text:
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    if _INTEGER.fullmatch(text):
        octal = re.fullmatch("[-+]?0[0-7]+", text)
        number = int(text, 8 if octal else 0)
        return number if -(1 << 63) <= number < 1 << 63 else float(number)
    return float(text.lower().replace(".i", "i").replace(".n", "n")) if _NUMBER.fullmatch(text) else text


def applies(section: str, node_name: str) -> bool:
    """Whether a node takes its parameters from a section.

    In a section's name * stands for one part of the node's name, and ** for any number of parts.
    """
    pattern = re.escape(section).replace(r"/\*\*", r"(/\w+)*").replace(r"/\*", r"/\w+")
    return re.fullmatch(pattern, node_name) is not None


def unknown_keys(values: Any) -> list[str]:
    """The keys below one ros__parameters that are parameters neither of the matcher nor of every node."""
    known = {item.name for item in declarations()}
    keys = [str(key) for key in values] if isinstance(values, dict) else []
    return [key for key in keys if key not in known and not _FOREIGN.fullmatch(key)]


def without_effect(names: Iterable[str]) -> list[str]:
    """What to say of each name that is no parameter of the matcher nor of every node, with the nearest that is."""
    unknown = unknown_keys(dict.fromkeys(names))
    return [f"the parameter {name!r} does not exist and has no effect{_instead(name)}" for name in unknown]


def _instead(name: str) -> str:
    """What was meant by a name, as the end of a sentence; empty where nobody knows."""
    topic = _TOPIC.fullmatch(name)
    if topic is None:
        return meant(name, [item.name for item in declarations()])
    relative = f"{(topic[1] or '').replace('_', '/')}{topic[2]}"
    return f", did you mean the topic? A topic is remapped: -r {relative}:=/camera/…"


def unused_files(arguments: Sequence[str], node_name: str) -> list[str]:
    """What to say of each parameter file among ROS's arguments that has no section for a node: ROS says nothing.

    Args:
        arguments: of the process.
        node_name: of the node, with its namespace.
    """
    said = []
    for word, path in zip(arguments, arguments[1:]):
        if word != "--params-file":
            continue
        try:
            found = [section for section, _ in read_sections(Path(path))]
        except (OSError, ParameterError):
            continue  # ROS judges it
        if not any(applies(section, node_name) for section in found):
            said.append(
                f"{path} has no section for {node_name}, so nothing in it has an effect; it has "
                f"{', '.join(found) or 'none'}. Name the section {node_name} or /**"
            )
    return said


def read_parameter_file(
    path: Path, warn: Callable[[str], object] = str, options: Mapping[str, Any] = MappingProxyType({})
) -> Parameters:
    """The parameters that a file gives the node /matcher, with the defaults for those that it leaves out.

    Args:
        path: of the file.
        warn: hears of each name in the file that is no parameter. It may be another node's, in a section for all.
        options: values that stand above those in the file, by the parameters' names.

    Raises:
        ParameterError: when the file is no parameter file or has no section for the node, or when a parameter in it
            has a value that is not allowed.
        OSError: when the file cannot be read.
    """
    found = read_sections(path)
    own = [values for section, values in found if applies(section, "/matcher")]
    if not own:
        raise ParameterError(
            f"{path}: has no section for /matcher; it has {', '.join(name for name, _ in found) or 'none'}; name the "
            "section /matcher or /**, with ros__parameters below it"
        )
    changes: dict[str, Any] = {}
    for values in own:
        if not isinstance(values, dict):
            raise ParameterError(f"{path}: below ros__parameters there must be parameters, not {values!r}")
        for text in without_effect(str(name) for name in values):
            warn(f"{path}: {text}")
        unknown = set(unknown_keys(values))
        for name, value in values.items():
            if _FOREIGN.fullmatch(str(name)) or str(name) in unknown:
                continue
            changes[str(name)] = value
    try:
        return Parameters.given({**changes, **options})
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}") from error
