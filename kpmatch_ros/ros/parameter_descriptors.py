"""The parameters as ROS declares and describes them."""

from __future__ import annotations

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.lifecycle import LifecycleNode

from kpmatch_ros.parameters import Declaration, Parameters, declarations, profile_values

__all__ = ["declare_parameters", "parameter_descriptor"]


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
    constraints = [item.constraint] if item.choices else []
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
    if item.type is int and low is not None and high is not None:
        descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
    elif item.type is float and low is not None:
        upper = 1e9 if high is None else high
        descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=upper, step=0.0)]
    return descriptor
