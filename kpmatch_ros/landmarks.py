"""Landmarks: positions of the points of a stereo pair, in metres. Does not depend on ROS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpmatch_ros.frames import Result
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.stereo_errors import StereoPoints
from kpmatch_ros.tracking.tracks import NOT_DETECTED

__all__ = ["Landmarks", "landmarks_of", "triangulate"]

_FROM_INFINITY = 3.0  # a point has a position if its inverse depth exceeds this many of its standard deviations


@dataclass(frozen=True, eq=False)
class Landmarks:
    """L points of a scene, as parallel arrays.

    Attributes:
        points: (L, 3) float32 positions in the left camera's optical frame, metres.
        track_ids: (L,) uint64 track of each point; 0 if it has none yet.
        sigmas: (L,) float32 standard deviation along the ray from the left camera, metres.
        colours: (L, 3) uint8 red, green, blue, from the left image.
    """

    points: np.ndarray
    track_ids: np.ndarray
    sigmas: np.ndarray
    colours: np.ndarray


def landmarks_of(result: Result) -> Landmarks:
    """Return the landmarks of a stereo frame: the matches that agree with the calibration and have a finite depth.

    Without a usable calibration there are none.
    """
    stereo, right = result.stereo, result.frame.right
    camera = None if right is None else right.camera
    if stereo is None or camera is None or stereo.inliers is None:
        none = np.zeros((0, 3))
        return Landmarks(
            none.astype(np.float32), np.zeros(0, np.uint64), np.zeros(0, np.float32), none.astype(np.uint8)
        )
    points, sigmas = triangulate(stereo.reference_points, stereo.points, stereo.sigmas, camera)
    chosen = np.flatnonzero(stereo.inliers & np.isfinite(sigmas))
    ids = np.zeros(len(result.frame.keypoints), np.uint64)
    if result.pair is not None:
        indices = result.pair.indices[:, 1]
        detected = indices != NOT_DETECTED
        ids[indices[detected]] = result.pair.track_ids[detected]
    image = result.frame.image
    x, y = np.rint(stereo.reference_points[chosen]).astype(int).T
    colours = image[y.clip(0, image.shape[0] - 1), x.clip(0, image.shape[1] - 1)]
    return Landmarks(
        points=points[chosen],
        track_ids=ids[stereo.indices[chosen, 0]],
        sigmas=sigmas[chosen],
        colours=np.repeat(colours[:, None], 3, axis=1) if colours.ndim == 1 else colours,
    )


def triangulate(
    left: np.ndarray, right: np.ndarray, pixel_sigmas: np.ndarray, camera: StereoCamera
) -> tuple[np.ndarray, np.ndarray]:
    """Triangulate matched points.

    Args:
        left: (M, 2) pixels in the left image as received.
        right: (M, 2) pixels of the same points in the right image.
        pixel_sigmas: (M,) standard deviation of a coordinate of ``right`` relative to ``left``, pixels.
        camera: calibration of the stereo pair.

    Returns:
        (M, 3) float32 points in the left camera's optical frame, metres, and (M,) float32 standard deviations along
        their rays, metres. Both are NaN for a point that is behind the cameras or cannot be distinguished from a point
        at infinity.
    """
    found = StereoPoints.of(np.asarray(left, np.float64), np.asarray(right, np.float64), camera)
    x, y, inverse_depth = found.points
    spread = found.inverse_depth_sigmas() * pixel_sigmas
    known = found.deep & (inverse_depth > _FROM_INFINITY * spread)
    inverse_depth = np.where(known, inverse_depth, np.nan)
    rays = np.stack([x, y, np.ones_like(x)], axis=1)
    sigmas = np.linalg.norm(rays, axis=1) * spread / inverse_depth**2
    return (rays / inverse_depth[:, None]).astype(np.float32), sigmas.astype(np.float32)
