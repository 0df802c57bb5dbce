"""Finds the nodes that publish on a topic, from the ROS graph."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

__all__ = ["Senders", "full_name", "listed"]

# Seconds for which the graph may still contain the publishers of a killed process: Fast DDS's lease is 20 s.
_LEASE = 25.0
_UNKNOWN = "_NODE_NAME_UNKNOWN_"  # rmw's placeholder while it has discovered a publisher but not its node's name


def full_name(offer: Any) -> str:
    """Return the full name of a publisher's node; empty if the graph does not know it (yet).

    Args:
        offer: the publisher, as rclpy's TopicEndpointInfo.
    """
    return "" if offer.node_name == _UNKNOWN else f"{offer.node_namespace.rstrip('/')}/{offer.node_name}"


def listed(names: Sequence[str]) -> str:
    """Return the names of senders as text for the user, without duplicates."""
    return ", ".join(sorted({name or "a node of unknown name" for name in names}))


class Senders:
    """Distinguishes the senders on a topic from stale publishers in the graph.

    A driver that was killed and restarted has two publishers with the same name until the first one's DDS lease ends.
    So nodes with different names count as different senders at once. Several publishers with the same name, or without
    one, count only after they have existed for longer than a lease.
    """

    def __init__(self) -> None:
        # By topic, then by publisher: when it was first seen, monotonic seconds.
        self._since: dict[str, dict[tuple[Any, ...], float]] = {}

    def on(self, topic: str, offers: Sequence[Any]) -> list[str]:
        """Return the full names of the nodes that send on a topic, one per sender; an empty name if it is not known.

        To be called periodically: a publisher's age counts from the first call that lists it.

        Args:
            topic: name of the topic.
            offers: all publishers on it, as rclpy's TopicEndpointInfo.
        """
        now, before = time.monotonic(), self._since.get(topic, {})
        keys = [(full_name(offer), *offer.endpoint_gid) for offer in offers]
        since = self._since[topic] = {key: before.get(key, now) for key in keys}
        standing: dict[str, int] = defaultdict(int)
        for (name, *_), begun in since.items():
            standing[name] += now - begun > _LEASE
        return sorted(name for name, count in standing.items() for _ in range(max(count, 1 if name else 0)))
