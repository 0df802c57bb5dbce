"""The parameters as ROS declares and describes them."""

from __future__ import annotations

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, ParameterType
from rclpy.lifecycle import LifecycleNode

from kpmatch_ros.parameters import Declaration, Parameters, declarations, profile_values

__all__ = ["declare_parameters", "parameter_descriptor", "parameter_type"]

_TYPES = {
    bool: ParameterType.PARAMETER_BOOL,
    int: ParameterType.PARAMETER_INTEGER,
    float: ParameterType.PARAMETER_DOUBLE,
    str: ParameterType.PARAMETER_STRING,
}


def declare_parameters(node: LifecycleNode) -> Parameters:
    """Declare every parameter and return the values that the node was started with.

    Raises:
        ParameterError: when a value, or a combination of values, is not allowed.
    """
    items = {item.name: item for item in declarations()}
    profile = items["profile"]
    chosen = profile_values(node.declare_parameter("profile", profile.default, parameter_descriptor(profile)).value)
    for name, item in items.items():
        if name != "profile":
            node.declare_parameter(name, chosen.get(name, item.default), parameter_descriptor(item))
    return Parameters(**{item.name: node.get_parameter(item.name).value for item in declarations()})


def parameter_descriptor(item: Declaration) -> ParameterDescriptor:
    """What `ros2 param describe` shows of a parameter."""
    constraints = [item.constraint] if item.choices or item.special is not None else []
    if not item.dynamic:
        constraints += [f"takes effect when the node {'starts' if item.name == 'profile' else 'is configured'}"]
    descriptor = ParameterDescriptor(
        description=f"{item.description}{f' [{item.unit}]' if item.unit else ''}",
        additional_constraints="; ".join(constraints),
        # To ROS a whole number in a file is an integer, and off is false. Declaration.check takes them for a float and
        # for a choice, and checks the rest.
        dynamic_typing=item.type is float or "off" in item.choices,
    )
    low, high = item.minimum, item.maximum
    if low is not None and high is not None:
        low = low if item.special is None else min(low, item.special)  # what lies between, Declaration.check refuses
        if item.type is int:
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
        else:
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    return descriptor


def parameter_type(name: str, otherwise: int) -> int:
    """The type, of rcl_interfaces/ParameterType, that a parameter was declared with; another node's is as given."""
    return next((_TYPES[item.type] for item in declarations() if item.name == name), otherwise)
