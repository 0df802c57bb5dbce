"""What the files of a bag have in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

__all__ = ["Channel", "Definition", "StorageFile", "type_name"]


class Definition(NamedTuple):
    """A message definition as a bag holds it."""

    form: str  # "msg", "idl", or "" where there is none
    content: bytes


class Channel(NamedTuple):
    """Messages of one type on one topic in one file."""

    topic: str
    type: str  # as the file spells it
    encoding: str  # of the messages: "cdr" in ROS 2
    definition: Definition


class StorageFile(Protocol):
    """An open file of a bag; `counts` are messages by channel."""

    channels: dict[int, Channel]
    counts: Counter[int]

    def messages(self, ids: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """The messages of some channels in the order of recording: channel, nanoseconds, content."""

    def close(self) -> None:
        """Close the file."""


def type_name(spelling: str) -> str:
    """A type as ROS 2 spells it, such as sensor_msgs/msg/Image.

    Other recorders write sensor_msgs/Image, as in ROS 1, or sensor_msgs::msg::dds_::Image_, as in DDS.
    """
    dds = re.fullmatch(r"(\w+)::(msg|srv|action)::dds_::(\w+)_", spelling)
    if dds:
        return "/".join(dds.groups())
    short = re.fullmatch(r"(\w+)/(\w+)", spelling)
    return f"{short[1]}/msg/{short[2]}" if short else spelling
