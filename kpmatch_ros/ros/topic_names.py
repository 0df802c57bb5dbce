"""Detects topics of one node that were remapped to the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kpmatch_ros.parameters import ParameterError

__all__ = ["check_topics"]


def check_topics(names: Mapping[str, str], resolve: Callable[[str], str]) -> None:
    """Check that no two topics with different content have the same name after remapping.

    The middleware reports this as an invalid allocator, or not at all.

    Args:
        names: topic names before remapping, each with its content. Topics with the same content may share a name.
        resolve: returns the topic for a name, after remapping.

    Raises:
        ParameterError: if two topics with different content are the same.
    """
    taken: dict[str, tuple[str, str]] = {}
    for name, holds in names.items():
        topic = resolve(name)
        other, same = taken.setdefault(topic, (name, holds))
        if holds != same:
            raise ParameterError(
                f"{other} and {name} are both the topic {topic}: check the remapping (-r {name}:=…, or the launch "
                "arguments), and give each its own topic"
            )
