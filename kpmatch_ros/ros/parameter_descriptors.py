"""Declares the parameters in ROS, and makes their descriptors."""

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
    """Declare all parameters, and return the values that the node was started with.

    Raises:
        ParameterError: if a value, or a combination of values, is not allowed.
    """
    items = {item.name: item for item in declarations()}
    profile = items["profile"]
    chosen = profile_values(node.declare_parameter("profile", profile.default, parameter_descriptor(profile)).value)
    for name, item in items.items():
        if name != "profile":
            node.declare_parameter(name, chosen.get(name, item.default), parameter_descriptor(item))
    return Parameters(**{item.name: node.get_parameter(item.name).value for item in declarations()})


def parameter_descriptor(item: Declaration) -> ParameterDescriptor:
    """Return the descriptor of a parameter, as `ros2 param describe` shows it."""
    constraints = [item.constraint] if item.choices or item.special is not None else []
    if not item.dynamic:
        constraints += [f"takes effect when the node {'starts' if item.name == 'profile' else 'is configured'}"]
    descriptor = ParameterDescriptor(
        description=f"{item.description}{f' [{item.unit}]' if item.unit else ''}",
        additional_constraints="; ".join(constraints),
        # ROS reads a whole number in a file as an integer and `off` as false. Declaration.check converts these to a
        # float and to a choice, and rejects other types.
        dynamic_typing=item.type is float or "off" in item.choices,
    )
    low, high = item.minimum, item.maximum
    if low is not None and high is not None:
        low = low if item.special is None else min(low, item.special)  # Declaration.check refuses values in between
        if item.type is int:
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
        else:
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
    return descriptor


def parameter_type(name: str, otherwise: int) -> int:
    """Return a parameter's declared rcl_interfaces/ParameterType, or ``otherwise`` if it is not one of this node's."""
    return next((_TYPES[item.type] for item in declarations() if item.name == name), otherwise)
