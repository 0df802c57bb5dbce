"""Types and functions that the storage formats of bags (MCAP and sqlite3) share."""

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
"""Largest size of a decompressed message or chunk, bytes. Without it, a few kilobytes could expand without limit."""


class Definition(NamedTuple):
    """A message definition as a bag holds it."""

    form: str  # "msg", "idl", or "" if there is none
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
        counts: number of messages by channel.
        unfinished: if the recorder did not finish the file, up to where it goes, in words; otherwise empty.
        damage: what cannot be read, and where, in words. Reading may add to it.
    """

    channels: dict[int, Channel]
    counts: Counter[int]
    unfinished: str
    damage: list[str]

    def messages(self, ids: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """Yield the messages of some channels in the order of recording: channel, nanoseconds, content."""


def in_seconds(stamp: int) -> str:
    """A time in nanoseconds as a text in seconds."""
    return f"{stamp // 10**9}.{stamp % 10**9:09d} s"


def reason_of(error: Exception) -> str:
    """The message of any parser's error, on one line."""
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{reason} is missing" if isinstance(error, KeyError) else reason


def type_name(spelling: str) -> str:
    """A type's name as ROS 2 spells it, such as sensor_msgs/msg/Image.

    Other recorders write sensor_msgs/Image, as in ROS 1, or sensor_msgs::msg::dds_::Image_, as in DDS.
    """
    dds = re.fullmatch(r"(\w+)::(msg|srv|action)::dds_::(\w+)_", spelling)
    if dds:
        return "/".join(dds.groups())
    short = re.fullmatch(r"(\w+)/(\w+)", spelling)
    return f"{short[1]}/msg/{short[2]}" if short else spelling


def from_zstd(content: bytes) -> bytes:
    """Decompress zstd frames. Raises ValueError if the result is too large or the input cut short; or zstd's errors."""
    return _decompressed(content, zstd.ZstdDecompressor)


def from_lz4(content: bytes) -> bytes:
    """Decompress lz4 frames. Raises ValueError if the result is too large or the input cut short; or lz4's errors."""
    from lz4.frame import LZ4FrameDecompressor

    return _decompressed(content, LZ4FrameDecompressor)


def _decompressed(content: bytes, make: Callable[[], Any]) -> bytes:
    found = b""
    while content:  # one compressed frame after the other
        decompressor = make()
        found += decompressor.decompress(content, LARGEST + 1 - len(found))
        if len(found) > LARGEST:
            raise ValueError(f"it is compressed, and has more than {LARGEST} bytes")
        if not decompressor.eof:
            raise ValueError("it is compressed, and truncated")
        content = decompressor.unused_data or b""
    return found
