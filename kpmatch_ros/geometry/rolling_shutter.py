"""Rolling shutter: images whose rows are read one after the other while the camera moves.

Let a camera rotate by the rotation vector w and move by t from one image to the next. In the interval before, it
rotated by v and moved by s, in the same axes. Its path is modelled as the parabola through these three poses. At time
u, in intervals after the middle row of the reference image was read, it has rotated and moved by

    w u + (w - v) u (u - 1) / 2,    t u + (t - s) u (u - 1) / 2

Each ray is rotated to the camera's orientation at the middle row of its image. Both rays of a match are then rotated so
that the translation between their two reading times is parallel to t. After this, one motion between the images holds
for all matches. The length of t remains undetermined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.camera import AHEAD, Camera
from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, epipolar_residuals, normalise_matches

__all__ = ["check_readout", "read_at_once", "reading_times", "residuals_read_at_once"]


def check_readout(readout: float) -> None:
    """Raise ValueError if the readout is not a part of the interval between two images."""
    if not (math.isfinite(readout) and 0 <= readout <= 1):
        raise ValueError(f"readout must be a part of the time between the two images, from 0 to 1, not {readout}")


def reading_times(
    points0: np.ndarray, points1: np.ndarray, camera0: Camera, camera1: Camera, readout: float
) -> list[np.ndarray]:
    """Reading times (n,) of both images' pixels (n, 2), in intervals relative to the middle of the readout."""
    return [
        np.asarray(readout * ((points[:, 1] + 0.5) / camera.height - 0.5))
        for points, camera in ((points0, camera0), (points1, camera1))
    ]


def read_at_once(matches: Matches, times: Sequence[np.ndarray], motion: Motion, before: Motion | None) -> Matches:
    """The matches as if all rows of an image were read at once.

    Args:
        matches: n matches, as received.
        times: (n,) reading times of the rows, from :func:`reading_times`, of the reference image and the current one.
        motion: approximate motion of the camera between the two images.
        before: motion between the two preceding images, over the same time and with a translation of the same length;
            None if unknown. Then the camera is assumed to continue the same rotation and translation in its own frame.
    """
    rotation = Rotation.from_matrix(motion.rotation)
    last = Motion(*motion) if before is None else before
    turn, turn_before = (Rotation.from_matrix(one.rotation).as_rotvec() for one in (motion, last))
    shift, shift_before = motion.translation, last.rotation.T @ last.translation

    def path(now: np.ndarray, past: np.ndarray, times: np.ndarray) -> np.ndarray:
        return np.outer(times, now) + np.outer(times * (times - 1) / 2, now - past)

    turns0 = Rotation.from_rotvec(path(turn, turn_before, times[0]))
    turns1 = rotation.inv() * Rotation.from_rotvec(path(turn, turn_before, 1 + times[1]))
    if shift.any():
        shifts = path(shift, shift_before, 1 + times[1]) - path(shift, shift_before, times[0])
        shifts /= np.maximum(np.linalg.norm(shifts, axis=1, keepdims=True), TINY)
        parallel = Rotation.from_rotvec(np.cross(shifts, shift))  # for these small angles, sine and angle are equal
        turns0, turns1 = parallel * turns0, rotation.inv() * parallel * rotation * turns1
    columns = matches.columns.copy()
    for rays, turns in ((columns[0], turns0), (columns[1], turns1)):
        turned = turns.apply(rays.T).T
        ahead = turned[2] > AHEAD
        rays[:, ahead] = turned[:, ahead] / turned[2, ahead]
    return Matches(columns, matches.scales)


def residuals_read_at_once(
    points0: np.ndarray,
    points1: np.ndarray,
    camera0: Camera,
    camera1: Camera,
    readout: float,
    motion: Motion,
    before: Motion | None,
) -> np.ndarray:
    """Distances (n,) from the epipolar lines of a motion, pixels, of the matches with a ray in both cameras."""
    matches, usable = normalise_matches(points0.astype(np.float64), points1.astype(np.float64), camera0, camera1)
    times = reading_times(points0[usable], points1[usable], camera0, camera1, readout)
    return epipolar_residuals(read_at_once(matches, times, motion, before), motion)
