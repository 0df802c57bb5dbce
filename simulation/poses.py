"""Cameras, their poses, their path through the courtyard, and their views."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class View:
    """A rendered image (RGB), with its depth along the optical axis at each pixel's centre; infinite in the sky."""

    image: NDArray[np.uint8]  # (H, W, 3)
    depth: NDArray[np.float32]  # (H, W), metres
    rotation: Vector  # (3, 3), x_world = rotation x_camera + position
    position: Vector  # (3,), metres
    camera: Camera


def demo_camera(width: int = 640, height: int = 480, distorted: bool = True) -> Camera:
    """A camera with a horizontal field of view of 63 degrees.

    As in real cameras, the principal point is slightly off the centre, and there is a slight barrel distortion if
    `distorted` is true.
    """
    matrix = np.array([[0.8125 * width, 0, 0.503 * width], [0, 0.8140 * width, 0.491 * height], [0, 0, 1]])
    return Camera(width, height, matrix, "plumb_bob", np.array([-0.17, 0.045, 0.0008, -0.0005, 0.0]) * distorted)


def look(position: ArrayLike, yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Pose:
    """The pose of a camera at `position` that looks along x, turned by yaw (left), pitch (down) and roll (clockwise).

    The angles are in radians.
    """
    cy, sy, cp, sp, cr, sr = (f(angle) for angle in (yaw, pitch, roll) for f in (math.cos, math.sin))
    turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    nod = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    lean = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    return Pose(turn @ nod @ lean @ optical, np.asarray(position, dtype=np.float64))


def stereo_right(left: Pose, baseline: float) -> Pose:
    """The pose of the right camera of a rectified stereo pair, `baseline` metres to the right of the left one."""
    return Pose(left.rotation, left.position + left.rotation[:, 0] * baseline)


def camera_path(motions: int | Iterable[tuple[str, int]] = 40, step: float = 0.25) -> list[Pose]:
    """The poses of a camera on a smooth closed path through the courtyard. One lap is about 60 frames of walking.

    Args:
        motions: number of frames to walk, or a list of parts such as [("walk", 20), ("rotate", 8), ("still", 5)]. A
            part is a number of frames, each followed by that motion. "walk" moves by `step` metres to the next frame,
            in all directions in turn, and turns by 1 to 3 degrees. "rotate" turns by 2 to 6 degrees without moving.
            "still" does neither.
        step: metres between two frames of walking.

    Raises:
        ValueError: a motion is unknown, or its number of frames is negative.
    """
    parts = [("walk", motions)] if isinstance(motions, int) else list(motions)
    # A closed curve, a horizontal figure eight with some height, is tabulated and followed at constant speed.
    angle = np.linspace(0, 2 * np.pi, 4001)
    curve = np.stack(
        [0.9 + 2.3 * np.sin(angle - 1.2), 0.1 + 1.25 * np.sin(2 * angle + 0.7), 1.55 + 0.22 * np.sin(3 * angle)], axis=1
    )
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    poses, walked, turned = [], 0.0, 2.2
    for motion, frames in parts:
        if motion not in ("walk", "rotate", "still") or frames < 0:
            raise ValueError(f"a motion is ('walk' | 'rotate' | 'still', frames), not {(motion, frames)!r}")
        for _ in range(frames):
            place = np.array([np.interp(walked % length[-1], length, axis) for axis in curve.T])
            yaw = -0.10 + 0.32 * math.sin(turned)
            pitch = 0.04 + 0.12 * math.cos(turned)  # changes fastest when yaw does not change
            poses.append(look(place, yaw, pitch, 0.04 * math.sin(0.83 * turned)))
            walked += step if motion == "walk" else 0.0
            turned += {"walk": 0.14, "rotate": 0.30, "still": 0.0}[motion]
    return poses
