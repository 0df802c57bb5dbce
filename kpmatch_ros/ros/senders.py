"""Who sends on a topic, by what ROS's graph says of its publishers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

__all__ = ["Senders", "full_name", "listed"]

# Seconds for which the graph may still hold the publishers of a process that was killed: Fast DDS's lease is 20 s.
_LEASE = 25.0
_UNKNOWN = "_NODE_NAME_UNKNOWN_"  # what rmw calls a node whose publisher it knows already, but not its name


def full_name(offer: Any) -> str:
    """The full name of the node that a publisher belongs to; empty where the graph does not know it, or not yet.

    Args:
        offer: the publisher, as rclpy's TopicEndpointInfo.
    """
    return "" if offer.node_name == _UNKNOWN else f"{offer.node_namespace.rstrip('/')}/{offer.node_name}"


def listed(names: Sequence[str]) -> str:
    """The names of senders for the user, each of them once."""
    return ", ".join(sorted({name or "one whose name is not known" for name in names}))


class Senders:
    """Tells the senders on a topic from publishers that are left in the graph.

    A driver that was killed and started again has two publishers of one name until DDS's lease of the first ends. So
    nodes of different names are told apart at once, and several publishers of one name, or of none, only once they
    have stood for longer than a lease.
    """

    def __init__(self) -> None:
        self._since: dict[str, dict[tuple[Any, ...], float]] = {}  # by topic, then by publisher; monotonic seconds

    def on(self, topic: str, offers: Sequence[Any]) -> list[str]:
        """The full names of the nodes that send on a topic, one for each sender; empty where a name is not known.

        To be called now and then: publishers are known from the first call that is given them.

        Args:
            topic: its name.
            offers: all that publish on it, as rclpy's TopicEndpointInfo.
        """
        now, before = time.monotonic(), self._since.get(topic, {})
        keys = [(full_name(offer), *offer.endpoint_gid) for offer in offers]
        since = self._since[topic] = {key: before.get(key, now) for key in keys}
        standing: dict[str, int] = defaultdict(int)
        for (name, *_), begun in since.items():
            standing[name] += now - begun > _LEASE
        return sorted(name for name, count in standing.items() for _ in range(max(count, 1 if name else 0)))
