"""Poses of a robot's fixed frames, from /tf_static."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.pose import Pose

__all__ = ["StaticTransforms", "frame_name"]


class _Link(NamedTuple):
    """The pose of a frame in its parent."""

    parent: str
    pose: Pose


class StaticTransforms:
    """A tree of frames. One thread may update it while another one looks up a frame."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}

    def update(self, message: Any) -> None:
        """Add the transforms of a tf2_msgs/TFMessage of /tf_static. Invalid transforms are ignored."""
        for item in message.transforms:
            moved, turned = item.transform.translation, item.transform.rotation
            position = np.array([moved.x, moved.y, moved.z])
            quaternion = np.array([turned.x, turned.y, turned.z, turned.w])
            parent, child = frame_name(item.header.frame_id), frame_name(item.child_frame_id)
            length = np.linalg.norm(quaternion)
            if not parent or not child or not np.isfinite(position).all() or not 0.5 < length < 2.0:
                continue
            self._links[child] = _Link(parent, Pose(Rotation.from_quat(quaternion).as_matrix(), position))

    def pose(self, frame: str, other: str) -> Pose | None:
        """The pose of one frame in another, x_other = rotation x_frame + position; None if they are not connected."""
        above, above_other = self._above(frame_name(frame)), self._above(frame_name(other))
        common = next((name for name in above if name in above_other), None)
        if common is None:
            return None
        of_frame, of_other = above[common], above_other[common]
        back = of_other.rotation.T
        return Pose(back @ of_frame.rotation, back @ (of_frame.position - of_other.position))

    def above(self, frame: str) -> list[str]:
        """Names of the ancestors of a frame, nearest first."""
        return list(self._above(frame_name(frame)))[1:]

    def _above(self, frame: str) -> dict[str, Pose]:
        """Pose of the frame in itself and in each ancestor, nearest first. A cycle ends where it closes."""
        found = {frame: Pose(np.eye(3), np.zeros(3))}
        while (link := self._links.get(frame)) is not None and link.parent not in found:
            rotation, position = found[frame]
            found[link.parent] = Pose(link.pose.rotation @ rotation, link.pose.rotation @ position + link.pose.position)
            frame = link.parent
        return found


def frame_name(frame: str) -> str:
    """The frame's name without a leading slash. TF has none, but some drivers write one."""
    return frame.lstrip("/")
