"""Quality of service: of services, what users may override, and how a mismatch is told."""

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

# rclpy's default lacks durability, which two sides can disagree on too.
_OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)

SERVICE_QOS = QoSProfile(
    history=HistoryPolicy.KEEP_LAST,
    depth=100,
    reliability=qos_profile_services_default.reliability,
    durability=qos_profile_services_default.durability,
)
"""Of a service that many clients may ask at once. An executor takes one request at a time, and the middleware drops
those for which it has no room: they are never answered. ROS has room for ten."""


def mismatch(offered: QoSProfile, requested: QoSProfile) -> str:
    """The policy by which the middleware keeps a publisher's messages from a subscription; empty where it does not."""
    if qos_check_compatible(offered, requested)[0] != QoSCompatibility.ERROR:
        return ""
    asks_for_more = requested.reliability == ReliabilityPolicy.RELIABLE != offered.reliability
    # The node's subscriptions ask for nothing else: neither a deadline nor liveliness.
    return "reliability" if asks_for_more else "durability"


def overridable() -> QoSOverridingOptions:
    """Lets parameters such as qos_overrides./image.subscription.reliability change the quality of service."""
    return QoSOverridingOptions(_OVERRIDABLE)


def undeclare_overrides(node: Node) -> None:
    """Undeclare the parameters that :func:`overridable` made, once the topics are withdrawn.

    rclpy declares them with the quality of service that it is asked for first, and takes their values for the user's
    when a topic is offered again. What the user gave is there again when they are declared anew.
    """
    for rest in node.get_parameters_by_prefix("qos_overrides"):
        name = f"qos_overrides.{rest}"
        node.describe_parameter(name).read_only = False  # rclpy undeclares no other ones
        node.undeclare_parameter(name)


def with_events(create: Callable[..., Entity], *arguments: Any, event_callbacks: Any, **options: Any) -> Entity:
    """A publisher or subscription, without event callbacks where the middleware has no such events.

    rclpy of Humble raises there, and the node could not be activated. Later ones leave the events out themselves.

    Args:
        create: of a node, such as create_subscription.
        arguments, options: for it.
        event_callbacks: for it.
    """
    try:
        return create(*arguments, event_callbacks=event_callbacks, **options)
    except UnsupportedEventTypeError:
        none = type(event_callbacks)(use_default_callbacks=False)
        return create(*arguments, event_callbacks=none, **options)
    except (InvalidParameterTypeException, RuntimeError, TypeError) as error:
        # Of a value that none of them knows, the middleware says only that something is invalid.
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
    """The policy on which two sides disagree."""
    return QoSPolicyKind(int(event.last_policy_kind)).name.lower()


def or_override(topic: str, entity: str, policy: str) -> str:
    """The parameter of this node that mends a mismatch, as the end of a sentence; empty where none does."""
    if QoSPolicyKind[policy.upper()] not in _OVERRIDABLE:
        return ""
    return f", or this node's parameter qos_overrides.{topic}.{entity}.{policy}"
