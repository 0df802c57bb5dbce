"""Topics of one node that were remapped onto one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kpmatch_ros.parameters import ParameterError

__all__ = ["check_topics"]


def check_topics(names: Mapping[str, str], resolve: Callable[[str], str]) -> None:
    """Refuse two topics that are one. The middleware says of it that the allocator is invalid, or nothing at all.

    Args:
        names: of the topics, as they are before they are remapped, each with what it holds. Two that hold the same may
            be one topic.
        resolve: gives the topic of a name.

    Raises:
        ParameterError: two are one topic.
    """
    taken: dict[str, tuple[str, str]] = {}
    for name, holds in names.items():
        topic = resolve(name)
        other, same = taken.setdefault(topic, (name, holds))
        if holds != same:
            raise ParameterError(
                f"{other} and {name} are both the topic {topic}: look at the remapping (-r {name}:=…, or the launch "
                "arguments), and give each a topic of its own"
            )
