"""Ground truth of image pairs: the true positions of matches, and the cameras' relative pose. NumPy and OpenCV only.

Errors of matches are in pixels of image 1: 0 or more if the true position is known, infinite if the match is certainly
wrong, NaN if nothing is known about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, cross_matrix
from kpmatch_ros.geometry.refinement import decisive_matches
from kpmatch_ros.geometry.two_view import estimate_relative_pose

__all__ = ["ByDepth", "ByDisparity", "ByHomography", "Motion", "Truth", "pose_errors", "project"]

Array = NDArray[np.float64]

AGREES = 0.03  # relative difference of two depths up to which they belong to the same surface
EDGE = 0.10  # relative difference of neighbouring depths above which there is an edge
NEAREST = 0.05  # metres: nearer points are treated as behind the camera
FEWEST_INLIERS = 8


class Truth(Protocol):
    """Gives the errors of a pair's matches."""

    def errors(self, points0: Array, points1: Array) -> Array:
        """Return the errors (M,) of matches (M, 2), (M, 2), pixels."""


@dataclass(frozen=True)
class Motion:
    """Relative pose of the cameras, x1 = rotation x0 + translation; gives matches' errors by their epipolar lines.

    Attributes:
        rotation: (3, 3).
        translation: (3,) of any length.
        cameras: cameras of both images.
        cuts: (3, 3) homographies from the matched images to the cameras' images; None if they are the same.
    """

    rotation: Array
    translation: Array
    cameras: tuple[Camera, Camera]
    cuts: tuple[Array, Array] | None = None

    def errors(self, points0: Array, points1: Array) -> Array:
        """Sampson distance (M,): how far a match's four coordinates must move to fulfil the epipolar constraint."""
        points0, points1 = self.in_camera_pixels(points0, points1)
        rays0, rays1 = (
            np.c_[camera.normalise(points), np.ones(len(points))]
            for camera, points in zip(self.cameras, (points0, points1))
        )
        essential = cross_matrix(self.translation) @ self.rotation
        lines1, lines0 = rays0 @ essential.T, rays1 @ essential
        scales = [1 / camera.focal**2 for camera in self.cameras]
        slopes = scales[0] * (lines0[:, :2] ** 2).sum(axis=1) + scales[1] * (lines1[:, :2] ** 2).sum(axis=1)
        return np.abs((rays1 * lines1).sum(axis=1)) / np.sqrt(np.maximum(slopes, 1e-30))

    def in_camera_pixels(self, points0: Array, points1: Array) -> tuple[Array, Array]:
        """Convert matches to pixels of the cameras' images."""
        if self.cuts is None:
            return points0, points1
        return project(self.cuts[0], points0), project(self.cuts[1], points1)

    def sigmas_in_camera_pixels(self, points1: Array, sigmas: Array) -> Array:
        """Convert standard deviations (M,) of points (M, 2) of image 1 to pixels of its camera's image."""
        if self.cuts is None:
            return sigmas
        place = project(self.cuts[1], points1)
        across, down = (project(self.cuts[1], points1 + step) - place for step in np.eye(2))
        return np.asarray(sigmas * np.sqrt(np.abs(across[:, 0] * down[:, 1] - across[:, 1] * down[:, 0])))

    def error_of(self, rotation: Array, translation: Array) -> float:
        """The larger of the angular errors of rotation and translation direction, degrees."""
        turn = (np.trace(rotation.T @ self.rotation) - 1) / 2
        lengths = np.linalg.norm(translation) * np.linalg.norm(self.translation)
        along = translation @ self.translation / max(lengths, 1e-30)
        return max(math.degrees(math.acos(np.clip(cosine, -1, 1))) for cosine in (turn, along))


def pose_errors(
    motion: Motion,
    points0: Array,
    points1: Array,
    resolution: float,
    orders: int,
    refined: Array | None = None,
    sigmas: Array | None = None,
) -> Array:
    """Return errors (orders,) in degrees of the package's pose estimate, for as many random orders of the matches.

    The result of a sampling estimator depends on the order of its input. An error is infinite if no pose is found.

    Args:
        resolution: distance between neighbouring positions that a keypoint can have, pixels; 0 for any position.
        refined: (M,) bool, matches that alone determine the pose if there are enough of them; None if all do.
        sigmas: (M,) standard deviations of ``points1``, pixels; None if they are equal.
    """
    if sigmas is not None:
        sigmas = motion.sigmas_in_camera_pixels(points1, sigmas)
    points0, points1 = motion.in_camera_pixels(points0, points1)
    decisive = None
    if refined is not None:
        decisive = decisive_matches(points0, points1, refined, min_inliers=FEWEST_INLIERS)
    errors = np.full(orders, np.inf)
    for number in range(orders):
        order = np.random.default_rng(number).permutation(len(points0))
        found = estimate_relative_pose(
            points0[order],
            points1[order],
            *motion.cameras,
            min_inliers=FEWEST_INLIERS,
            keypoint_resolution=resolution,
            sigmas=None if sigmas is None else sigmas[order],
            decisive=None if decisive is None else decisive[order],
        )
        if found.status in (PoseStatus.OK, PoseStatus.AMBIGUOUS):  # AMBIGUOUS gives the more likely of two motions
            errors[number] = motion.error_of(found.rotation.T, -found.rotation.T @ found.translation)
        elif len(points0) < FEWEST_INLIERS:
            break
    return errors


@dataclass(frozen=True)
class ByHomography:
    """Ground truth for images of a plane: ``homography`` (3, 3) maps pixels of image 0 to image 1."""

    homography: Array

    def errors(self, points0: Array, points1: Array) -> Array:
        """Distance (M,) of image 1's points from their true positions."""
        distances = np.linalg.norm(project(self.homography, points0) - points1, axis=1)
        return np.where(np.isnan(distances), np.inf, distances)


@dataclass(frozen=True)
class ByDisparity:
    """Ground truth for rectified images: ``disparity`` (H, W) in pixels, 0 where it is unknown."""

    disparity: Array

    def errors(self, points0: Array, points1: Array) -> Array:
        """Distance (M,) of image 1's points from their true positions; NaN where no disparity is known."""
        height, width = self.disparity.shape
        x, y = np.round(points0).astype(int).reshape(-1, 2).T
        shift = self.disparity[y.clip(0, height - 1), x.clip(0, width - 1)]
        places = points0 - np.c_[shift, np.zeros_like(shift)]
        return np.where(shift > 0, np.linalg.norm(places - points1, axis=1), np.nan)


@dataclass(frozen=True)
class ByDepth:
    """Ground truth for two views of a scene with known depth.

    Attributes:
        depths: (h, w) depth maps of both views, along the optical axis, 0 where there is nothing.
        matrices: (3, 3) camera matrices of both views.
        motion: (4, 4), from camera 0 to camera 1.
        step: image pixels per sample of the depth.
    """

    depths: tuple[Array, Array]
    matrices: tuple[Array, Array]
    motion: Array
    step: float = 1.0

    def errors(self, points0: Array, points1: Array) -> Array:
        """Distance (M,) of image 1's points from their true positions.

        Beside an edge a point may be on either of two surfaces. The one within one sample that fits best is used.
        A surface is used only if image 1 shows it: one of the depths within a sample of the point must agree.
        """
        at0, at1 = points0 / self.step, points1 / self.step
        near0, near1 = _neighbours(self.depths[0], at0), _neighbours(self.depths[1], at1)
        middle = _interpolated(self.depths[0], at0)
        depths = np.concatenate([middle[None], near0])  # (10, M)
        rays = np.c_[points0, np.ones(len(points0))] @ np.linalg.inv(self.matrices[0]).T
        there = depths[..., None] * (rays @ self.motion[:3, :3].T) + self.motion[:3, 3]
        z = there[..., 2]
        seen = there @ self.matrices[1].T
        places = seen[..., :2] / np.maximum(z, NEAREST)[..., None]
        with np.errstate(divide="ignore"):
            agrees = (np.abs(z[:, None] / near1 - 1) < AGREES).any(axis=1)
        distances = np.linalg.norm(places - points1, axis=-1)
        distances = np.where((depths > 0) & (z > NEAREST) & agrees, distances, np.inf)
        smooth = (near0.min(axis=0) > 0) & (near0.max(axis=0) < (1 + EDGE) * near0.min(axis=0))
        errors = np.where(smooth, distances[0], distances.min(axis=0))
        return np.where((near0 > 0).any(axis=0), errors, np.nan)


def project(homography: Array, points: Array) -> Array:
    """Map points (N, 2) by a homography (3, 3); NaN for points behind the camera."""
    mapped = np.c_[points, np.ones(len(points))] @ homography.T
    return np.where(mapped[:, 2:] > 1e-6, mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-6), np.nan)


def _neighbours(depth: Array, points: Array) -> Array:
    """Return the nine depth samples (9, M) around each point (M, 2)."""
    height, width = depth.shape
    x, y = np.round(points).astype(int).reshape(-1, 2).T
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return np.stack([depth[(y + j).clip(0, height - 1), (x + i).clip(0, width - 1)] for i, j in shifts])


def _interpolated(depth: Array, points: Array) -> Array:
    """Interpolate depth (M,) at points (M, 2), 0 at edges. Inverse depth is linear in the image of a plane."""
    height, width = depth.shape
    low = np.floor(points).astype(int).reshape(-1, 2).clip(0, (width - 2, height - 2))
    part = points - low
    x, y = low.T
    corners = np.stack([depth[y + j, x + i] for i in (0, 1) for j in (0, 1)])
    weights = [
        (part[:, 0] if i else 1 - part[:, 0]) * (part[:, 1] if j else 1 - part[:, 1]) for i in (0, 1) for j in (0, 1)
    ]
    smooth = (corners.min(axis=0) > 0) & (corners.max(axis=0) < (1 + EDGE) * corners.min(axis=0))
    inverse = (np.stack(weights) / np.maximum(corners, 1e-6)).sum(axis=0)
    return np.where(smooth & (inverse > 0), 1 / np.maximum(inverse, 1e-9), 0.0)
