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
    "so_far",
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
    """A file of a bag. Reading its messages changes none of its attributes.

    Attributes:
        channels: by id.
        counts: number of messages by channel.
        unfinished: if the recorder did not finish the file, up to where it goes, in words; otherwise empty.
        damage: what was found to be unreadable when the file was opened, and where, in words.
    """

    channels: dict[int, Channel]
    counts: Counter[int]
    unfinished: str
    damage: list[str]

    def messages(self, ids: Collection[int], damage: list[str]) -> Iterator[tuple[int, int, bytes]]:
        """Yield the messages of some channels in the order of recording: channel, nanoseconds, content.

        Args:
            ids: of the channels.
            damage: receives what is found to be unreadable only while the messages are read, in words.
        """


def in_seconds(stamp: int) -> str:
    """A time in nanoseconds as a text in seconds."""
    return f"{stamp // 10**9}.{stamp % 10**9:09d} s"


def so_far(last: int | None) -> str:
    """Up to which message a file was read before some damage; `last` is its time in nanoseconds, None without any."""
    if last is None:
        return "no message was read before that"
    return f"the last message read before that is at {in_seconds(last)}"


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
