"""Quality of service (QoS): the profile of services, what users may override, and how to report a mismatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from rclpy.exceptions import InvalidParameterTypeException
from rclpy.node import Node
from rclpy.qos import (
    HistoryPolicy,
    QoSCompatibility,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_check_compatible,
    qos_profile_services_default,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

from kpmatch_ros.parameters import ParameterError

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # ROS 2 Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks, UnsupportedEventTypeError

__all__ = [
    "SERVICE_QOS",
    "PublisherEventCallbacks",
    "SubscriptionEventCallbacks",
    "mismatch",
    "or_override",
    "overridable",
    "policy_of",
    "undeclare_overrides",
    "with_events",
]

Entity = TypeVar("Entity")

# rclpy's default set lacks durability, which can be incompatible as well.
_OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)

SERVICE_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=100,
    reliability=qos_profile_services_default.reliability,
    durability=qos_profile_services_default.durability,
)
"""QoS of a service that many clients may call at once. The executor takes one request at a time. The middleware drops
requests beyond the depth, and these are never answered. ROS's default depth is 10."""


def mismatch(offered: QoSProfile, requested: QoSProfile) -> str:
    """Return the QoS policy that makes a publisher incompatible with a subscription; empty if they are compatible."""
    if qos_check_compatible(offered, requested)[0] != QoSCompatibility.ERROR:
        return ""
    asks_for_more = requested.reliability == ReliabilityPolicy.RELIABLE != offered.reliability
    # Only these two can mismatch: the node's subscriptions request neither a deadline nor liveliness.
    return "reliability" if asks_for_more else "durability"


def overridable() -> QoSOverridingOptions:
    """Return options that let parameters such as qos_overrides./image.subscription.reliability change the QoS."""
    return QoSOverridingOptions(_OVERRIDABLE)


def undeclare_overrides(node: Node) -> None:
    """Undeclare the parameters that :func:`overridable` created, after the topics are destroyed.

    rclpy declares them with the QoS of the first publisher or subscription. When the topic is created again, rclpy
    would take these values for the user's. The user's own values apply again when the parameters are declared again.
    """
    for rest in node.get_parameters_by_prefix("qos_overrides"):
        name = f"qos_overrides.{rest}"
        node.describe_parameter(name).read_only = False  # rclpy refuses to undeclare a read-only parameter
        node.undeclare_parameter(name)


def with_events(create: Callable[..., Entity], *arguments: Any, event_callbacks: Any, **options: Any) -> Entity:
    """Create a publisher or subscription, without event callbacks if the middleware does not support them.

    In that case rclpy of Humble raises an exception, so the node could not be activated. Later releases ignore
    unsupported events.

    Args:
        create: a method of a node, such as create_subscription.
        arguments, options: passed to ``create``.
        event_callbacks: passed to ``create``.

    Raises:
        ParameterError: if a qos_overrides parameter of the topic has a wrong value.
    """
    try:
        return create(*arguments, event_callbacks=event_callbacks, **options)
    except UnsupportedEventTypeError:
        none = type(event_callbacks)(use_default_callbacks=False)
        return create(*arguments, event_callbacks=none, **options)
    except (InvalidParameterTypeException, RuntimeError, TypeError) as error:
        # For an unknown policy value, the middleware says only that something is invalid, without the parameter.
        node: Any = getattr(create, "__self__", None)
        given = f"qos_overrides.{node.resolve_topic_name(arguments[1])}." if isinstance(node, Node) else "?"
        overridden = any(name.startswith(given) for name in getattr(node, "_parameter_overrides", {}))
        if not overridden and "qos_overrides" not in str(error) and "QoS override" not in str(error):
            raise
        raise ParameterError(
            f"qos_overrides of {arguments[1]}: {error}. reliability is reliable or best_effort, durability volatile or "
            "transient_local, history keep_last or keep_all, depth a whole number"
        ) from error


def policy_of(event: Any) -> str:
    """Return the incompatible policy of a QoS event."""
    return QoSPolicyKind(int(event.last_policy_kind)).name.lower()


def or_override(topic: str, entity: str, policy: str) -> str:
    """Name this node's parameter that resolves a mismatch, as the end of a sentence; empty if there is none."""
    if QoSPolicyKind[policy.upper()] not in _OVERRIDABLE:
        return ""
    return f", or this node's parameter qos_overrides.{topic}.{entity}.{policy}"
