"""What the files of a bag have in common."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "LARGEST",
    "Channel",
    "Definition",
    "StorageFile",
    "from_lz4",
    "from_zstd",
    "in_seconds",
    "reason_of",
    "type_name",
    "zstd",
]

LARGEST = 1 << 30
"""Bytes that a message or a chunk has at most once decompressed. A few kilobytes can become any number of them."""


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
    """A file of a bag.

    Attributes:
        channels: by id.
        counts: messages by channel.
        unfinished: in words, up to where there is a recording that its recorder did not finish; empty where it did.
        damage: in words, what cannot be read, and where. Reading may add to it.
    """

    channels: dict[int, Channel]
    counts: Counter[int]
    unfinished: str
    damage: list[str]

    def messages(self, ids: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """The messages of some channels in the order of recording: channel, nanoseconds, content."""


def in_seconds(stamp: int) -> str:
    """A time in nanoseconds, in words."""
    return f"{stamp // 10**9}.{stamp % 10**9:09d} s"


def reason_of(error: Exception) -> str:
    """What an error of any parser says, on one line."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{reason} is missing" if isinstance(error, KeyError) else reason


def type_name(spelling: str) -> str:
    """A type as ROS 2 spells it, such as sensor_msgs/msg/Image.

    Other recorders write sensor_msgs/Image, as in ROS 1, or sensor_msgs::msg::dds_::Image_, as in DDS.
    """
    dds = re.fullmatch(r"(\w+)::(msg|srv|action)::dds_::(\w+)_", spelling)
    if dds:
        return "/".join(dds.groups())
    short = re.fullmatch(r"(\w+)/(\w+)", spelling)
    return f"{short[1]}/msg/{short[2]}" if short else spelling


def from_zstd(content: bytes) -> bytes:
    """What was compressed. Raises ValueError where it is too large or cut short, and zstd's own errors."""
    return _decompressed(content, zstd.ZstdDecompressor)


def from_lz4(content: bytes) -> bytes:
    """What was compressed. Raises ValueError where it is too large or cut short, and lz4's own errors."""
    from lz4.frame import LZ4FrameDecompressor

    return _decompressed(content, LZ4FrameDecompressor)


def _decompressed(content: bytes, make: Callable[[], Any]) -> bytes:
    found = b""
    while content:  # frame by frame
        decompressor = make()
        found += decompressor.decompress(content, LARGEST + 1 - len(found))
        if len(found) > LARGEST:
            raise ValueError(f"it is compressed, and has more than {LARGEST} bytes")
        if not decompressor.eof:
            raise ValueError("it is compressed, and truncated")
        content = decompressor.unused_data or b""
    return found
