"""Where the frames of a robot are that do not move: what /tf_static says."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.pose import Pose

__all__ = ["StaticTransforms", "frame_name"]


class _Link(NamedTuple):
    """A frame's place below its parent."""

    parent: str
    pose: Pose


class StaticTransforms:
    """A tree of frames. One thread may update it while another looks a frame up."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}

    def update(self, message: Any) -> None:
        """Take over a tf2_msgs/TFMessage of /tf_static. What is not a transform is passed over."""
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
        """The pose of one frame in another, x_other = rotation x_frame + position; None where nothing joins them."""
        above, above_other = self._above(frame_name(frame)), self._above(frame_name(other))
        common = next((name for name in above if name in above_other), None)
        if common is None:
            return None
        of_frame, of_other = above[common], above_other[common]
        back = of_other.rotation.T
        return Pose(back @ of_frame.rotation, back @ (of_frame.position - of_other.position))

    def above(self, frame: str) -> list[str]:
        """The names of the frames above a frame, nearest first."""
        return list(self._above(frame_name(frame)))[1:]

    def _above(self, frame: str) -> dict[str, Pose]:
        """The frame's pose in itself and in each frame above it, nearest first; a circle ends where it closes."""
        found = {frame: Pose(np.eye(3), np.zeros(3))}
        while (link := self._links.get(frame)) is not None and link.parent not in found:
            rotation, position = found[frame]
            found[link.parent] = Pose(link.pose.rotation @ rotation, link.pose.rotation @ position + link.pose.position)
            frame = link.parent
        return found


def frame_name(frame: str) -> str:
    """The one name of a frame. Frames of TF have no leading slash; some drivers write one."""
    return frame.lstrip("/")
