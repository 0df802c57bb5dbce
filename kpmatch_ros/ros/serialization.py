"""Serialises the messages of a pair as for DDS. `kpmatch bench` measures the time this takes."""

from __future__ import annotations

from rclpy.serialization import serialize_message

from kpmatch_ros import messages
from kpmatch_ros.frames import Pair

__all__ = ["serialize_pair"]


def serialize_pair(pair: Pair, extractor: str, matcher: str) -> tuple[bytes, bytes]:
    """Return the MatchArray and the RelativePose of a pair, serialised."""
    return (
        serialize_message(messages.match_array(pair, 0, extractor, matcher)),
        serialize_message(messages.relative_pose(pair)),
    )
