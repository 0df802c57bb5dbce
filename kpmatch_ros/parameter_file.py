"""Reads ROS 2 parameter files, such as config/matcher.yaml. Does not depend on ROS."""

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
# Names of the node's topics. Users may give them as parameters, because other packages take topics as parameters.
_TOPIC = re.compile(r"(left_|right_|left/|right/)?(image|camera_info|mask)(_topic|_raw)?")

# How rcl_yaml_param_parser reads values without quotes.
_TRUE = re.compile("y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON")
_FALSE = re.compile("n|N|no|No|NO|false|False|FALSE|off|Off|OFF")
_INTEGER = re.compile("[-+]?(0x[0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|\.?inf|\.?nan)", re.ASCII | re.IGNORECASE)


def read_sections(path: Path) -> list[tuple[str, Any]]:
    """Return the sections of a parameter file: each section's node name, and the content of its ros__parameters.

    The node name may be a pattern, and the file may nest it by namespace. A section may occur twice. Values have the
    types that ROS reads (rcl_yaml_param_parser), which differ from YAML's in some cases.

    Raises:
        ParameterError: if the file is not a YAML file.
        OSError: if the file cannot be read.
    """
    try:
        return list(_sections(yaml.compose(path.read_text(), _Loader)))
    except RecursionError as error:
        raise ParameterError(f"{path}: is nested too deeply for a parameter file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path}: is not a YAML file: {error}") from error


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, as ROS nodes do: an alias could expand to any amount of memory."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"ROS accepts no YAML alias,{str(self.peek_event().start_mark).rstrip()}")
        return super().compose_node(parent, index)


def _sections(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        if key.value == "ros__parameters":
            yield path, _value(value)
        else:
            name = str(key.value).strip("/")  # empty for the root namespace
            yield from _sections(value, f"{path}/{name}" if name else path)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _value(value) for key, value in node.value}  # the last value of a name wins, as in ROS
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
    """Whether a section applies to a node.

    In a section's name, * matches one part of the node's name, and ** any number of parts.
    """
    pattern = re.escape(section).replace(r"/\*\*", r"(/\w+)*").replace(r"/\*", r"/\w+")
    return re.fullmatch(pattern, node_name) is not None


def unknown_keys(values: Any) -> list[str]:
    """Return the keys below a ros__parameters that are parameters neither of the matcher nor of all nodes."""
    known = {item.name for item in declarations()}
    keys = [str(key) for key in values] if isinstance(values, dict) else []
    return [key for key in keys if key not in known and not _FOREIGN.fullmatch(key)]


def without_effect(names: Iterable[str]) -> list[str]:
    """Return a text for each name that is not a parameter of the matcher or of all nodes, with the most similar one."""
    unknown = unknown_keys(dict.fromkeys(names))
    return [f"the parameter {name!r} does not exist and has no effect{_instead(name)}" for name in unknown]


def _instead(name: str) -> str:
    """Suggest what was meant by an unknown name, as the end of a sentence; empty without a suggestion."""
    topic = _TOPIC.fullmatch(name)
    if topic is None:
        return meant(name, [item.name for item in declarations()])
    relative = f"{(topic[1] or '').replace('_', '/')}{topic[2]}"
    return f", did you mean the topic? A topic is remapped: -r {relative}:=/camera/…"


def unused_files(arguments: Sequence[str], node_name: str) -> list[str]:
    """Return a warning for each parameter file in the arguments that has no section for a node. ROS gives none.

    Args:
        arguments: the arguments of the process.
        node_name: name of the node with its namespace.
    """
    said = []
    for word, path in zip(arguments, arguments[1:]):
        if word != "--params-file":
            continue
        try:
            found = [section for section, _ in read_sections(Path(path))]
        except (OSError, ParameterError):
            continue  # ROS itself reports an unreadable file
        if not any(applies(section, node_name) for section in found):
            said.append(
                f"{path} has no section for {node_name}, so nothing in it has an effect; it has "
                f"{', '.join(found) or 'none'}. Name the section {node_name} or /**"
            )
    return said


def read_parameter_file(
    path: Path, warn: Callable[[str], object] = str, options: Mapping[str, Any] = MappingProxyType({})
) -> Parameters:
    """Return the parameters that a file sets for the node /matcher, with the defaults for all others.

    Args:
        path: path of the file.
        warn: called with a text for each unknown name. In a section for all nodes it may be another node's parameter.
        options: values by parameter name that take precedence over the file.

    Raises:
        ParameterError: if the file is not a parameter file, has no section for the node, or contains a value that is
            not allowed.
        OSError: if the file cannot be read.
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
        try:
            Parameters.given(changes)
        except ParameterError:
            raise ParameterError(f"{path}: {error}") from error
        raise  # the file is correct by itself
