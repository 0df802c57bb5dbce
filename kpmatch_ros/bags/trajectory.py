"""Chains relative poses to a trajectory, and writes it to a text file."""

from __future__ import annotations

from typing import TextIO

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.frames import Frame, Pair
from kpmatch_ros.odometry import OdometryPose, Place

__all__ = ["Trajectory"]


class Trajectory:
    """Chains relative poses, and writes lines of a TUM file: seconds, position x y z, quaternion x y z w.

    Each line is a pose of the camera in the world. The world is the optical frame of the first frame's camera, in
    stereo of its left camera. In stereo, the unit is the metre, and a camera that creeps is followed as by
    :class:`kpmatch_ros.odometry.Odometry`. With one camera, each translation has length one: its direction is right,
    but its scale is arbitrary and differs from pair to pair.

    A frame without a certain pose has no line. If the pose of a single camera is AMBIGUOUS, later frames continue from
    the likelier motion, and a comment before the first of them says so. A frame whose reference has no pose breaks the
    chain. A comment says so, and the chain goes on from the last known pose.

    Args:
        stream: of the file; None if nothing is to be written.

    Attributes:
        breaks: number of breaks in the chain.
        doubts: number of steps that use the likelier of two motions.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.breaks = self.doubts = 0
        self._stream = stream
        self._begun = False  # whether a frame was added
        self._known: dict[int, Place] = {}  # by frame number
        self._doubts: dict[int, str] = {}  # comments, by the numbers of frames that are placed by the likelier motion
        self._last = Place.of(OdometryPose(np.eye(3), np.zeros(3), np.zeros((6, 6)), 0))
        self._write("# timestamp tx ty tz qx qy qz qw: pose of the camera in the first camera's optical frame")

    @property
    def position(self) -> np.ndarray:
        """Position (3,) in the world of the camera at the last frame whose pose is certain."""
        return self._last.pose.position

    @property
    def pose(self) -> tuple[Rotation, np.ndarray]:
        """Rotation and position (3,) of the camera at that frame: x_world = rotation x_camera + position."""
        return Rotation.from_matrix(self._last.pose.rotation), self.position

    def add(self, frame: Frame, pair: Pair | None) -> None:
        """Add the next frame, and its pair with the reference; None if it has no reference."""
        if pair is None:
            if not self._begun:
                self._continue(frame, self._last)
            return
        if not pair.pose.is_placed:
            self._known.pop(frame.number, None)
            return
        start, certain = self._known.get(pair.reference.number), pair.pose.status.is_certain
        if doubt := self._doubts.pop(pair.reference.number, ""):
            self.doubts += 1
            self._write(doubt)
        if start is None and certain:
            self.breaks += 1
            self._write(f"# broken: the pose of the frame at {_seconds(pair.reference.stamp)} is not known")
            start = self._last
        if start is not None and certain:
            self._continue(frame, start.after(pair.pose))
        elif start is not None:
            self._known[frame.number] = start.after(pair.pose)
            self._doubts[frame.number] = (
                f"# ambiguous: the pose of the frame at {_seconds(frame.stamp)} is the likelier of two"
            )
        kept = (pair.reference.number, frame.number)
        self._known = {number: pose for number, pose in self._known.items() if number in kept}
        self._doubts = {number: text for number, text in self._doubts.items() if number in kept}

    def _continue(self, frame: Frame, place: Place) -> None:
        self._begun = True
        self._last = self._known[frame.number] = place
        rotation, position = self.pose
        numbers = " ".join(f"{value:.9f}" for value in (*position, *rotation.as_quat()))
        self._write(f"{_seconds(frame.stamp)} {numbers}")

    def _write(self, line: str) -> None:
        if self._stream is not None:
            self._stream.write(f"{line}\n")


def _seconds(stamp: int) -> str:
    seconds, nanoseconds = divmod(abs(stamp), 10**9)
    return f"{'-' if stamp < 0 else ''}{seconds}.{nanoseconds:09d}"
