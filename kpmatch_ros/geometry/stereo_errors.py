"""Residuals of points in the images of one or two stereo frames, and their derivatives.

Four images see a point of the scene: left and right of the reference frame, left and right of the current one.
Residuals are in pixels of these images as received: keypoints are undistorted, images never are, and each residual is
divided by how many pixels a direction spans where it is seen. A point is x, y and the inverse of its depth in the
reference frame's left camera, so that points at any distance, or seen by the left camera only, are treated alike.

Points come last in every array. Sums over few things then run along many points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry.camera import AHEAD, BEHIND, Camera
from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.stereo_camera import StereoCamera

__all__ = [
    "WEAK",
    "CameraPoses",
    "Views",
    "agrees",
    "directions",
    "flat",
    "inverse_normal",
    "is_distant",
    "jacobians",
    "largest_residual",
    "residuals",
    "rig_poses",
    "settle",
    "squared_residuals",
]

WEAK = 1e-6
"""Squared pixels metres: keeps the inverse depth of a point regular where nothing determines it."""


class CameraPoses(NamedTuple):
    """Poses of k cameras: a point x of the reference frame's left camera is turns[k] x + shifts[k] in camera k."""

    turns: np.ndarray  # (k, 3, 3)
    shifts: np.ndarray  # (k, 3)


def rig_poses(camera: StereoCamera) -> CameraPoses:
    """The two cameras of one frame."""
    return CameraPoses(np.array([np.eye(3), camera.rotation]), np.array([np.zeros(3), camera.translation]))


@dataclass(frozen=True, eq=False)
class Views:
    """What k images see of n points.

    Attributes:
        rays: (k, 2, n) float64 normalised coordinates, zero where not seen.
        weights: (k, 2, 2, n) float64 pixels by normalised coordinates, zero where not seen.
        seen: (k, n) bool, which image sees which point.
    """

    rays: np.ndarray
    weights: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, images: list[tuple[np.ndarray, Camera]]) -> Views:
        """Of the pixels (n, 2) of the same points in k images, NaN where an image does not see a point."""
        found = [camera.normalise_with_jacobian(points) for points, camera in images]
        rays, jacobian = (np.array(parts) for parts in zip(*found))
        seen = np.isfinite(rays).all(axis=2)
        rays[~seen] = 0.0
        weights = np.zeros_like(jacobian)
        weights[seen] = np.linalg.inv(jacobian[seen])
        return cls(rays.transpose(0, 2, 1).copy(), weights.transpose(0, 2, 3, 1).copy(), seen)

    def select(self, points: np.ndarray) -> Views:
        """The points for which the mask (n,) is true."""
        return Views(self.rays[..., points], self.weights[..., points], self.seen[:, points])

    def images(self, chosen: slice) -> Views:
        """Some of the images."""
        return Views(self.rays[chosen], self.weights[chosen], self.seen[chosen])

    def without_wrong_depths(self, frame: slice, camera: StereoCamera, inlier_threshold: float) -> Views:
        """Without the right image's part in points that are off their epipolar lines or certainly behind the cameras.

        A point so far that the sign of its disparity is chance stays. Were those of one sign left out, the far points
        would seem nearer.
        """
        right = frame.stop - 1
        seen = self.seen.copy()
        seen[right] &= seen[right - 1] & agrees(self.images(frame), rig_poses(camera), inlier_threshold)
        kept = np.where(seen, 1.0, 0.0)
        return Views(self.rays * kept[:, None], self.weights * kept[:, None, None], seen)


def _project(poses: CameraPoses, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where k cameras see points (3, n).

    Returns:
        normalised coordinates (k, 2, n); the depth (k, n) over that in the reference's left camera; which points are
        ahead (k, n).
    """
    there = poses.turns @ directions(points) + poses.shifts[..., None] * points[2]
    ahead = there[:, 2] > AHEAD * np.sqrt((there**2).sum(axis=1))
    depth = np.where(ahead, there[:, 2], 1.0)
    return there[:, :2] / depth[:, None], depth, ahead


def directions(points: np.ndarray) -> np.ndarray:
    """Directions (3, n) of points (3, n): x, y, 1."""
    return np.stack([points[0], points[1], np.ones_like(points[0])])


def residuals(views: Views, poses: CameraPoses, points: np.ndarray) -> np.ndarray:
    """Residuals (k, 2, n) of points (3, n), pixels; zero where a point is not seen, BEHIND where it is behind."""
    projected, _, ahead = _project(poses, points)
    found = np.einsum("kijn,kjn->kin", views.weights, views.rays - projected)
    return np.where((ahead | ~views.seen)[:, None], found, BEHIND)


def _project_jacobian(views: Views, poses: CameraPoses, points: np.ndarray) -> np.ndarray:
    """Jacobian (k, 2, 3, n) of the image of a point, pixels, by the point in the camera's frame."""
    projected, depth, ahead = _project(poses, points)
    weights = views.weights * (ahead / depth)[:, None, None]
    return np.concatenate([weights, -np.einsum("kijn,kjn->kin", weights, projected)[:, :, None]], axis=2)


def _by_points(jacobian: np.ndarray, poses: CameraPoses) -> np.ndarray:
    """Jacobian (2 k, 3, n) of the residuals by the points."""
    moves = np.concatenate([poses.turns[..., :2], poses.shifts[..., None]], axis=-1)
    return -(moves.transpose(0, 2, 1)[:, None] @ jacobian).reshape(2 * len(jacobian), 3, jacobian.shape[-1])


def jacobians(
    views: Views, poses: CameraPoses, translation: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals (8, n) of four images, and their jacobians by the points (8, 3, n) and by the motion (8, 6, n).

    Args:
        views: of the reference's left and right, the current left and right.
        poses: of the same cameras.
        translation: (3,) of the motion.
        points: (3, n).
    """
    count = points.shape[1]
    jacobian = _project_jacobian(views, poses, points)
    # In a current camera's frame a point is its turn times (direction - inverse depth translation), and a small
    # rotation w of the motion takes turn (w x (...)) away.
    x, y, z = directions(points) - translation[:, None] * points[2]
    moved = poses.turns[2:].transpose(0, 2, 1)[:, None] @ jacobian[2:]
    by_motion = np.zeros((4, 2, 6, count))
    by_motion[2:, :, :3] = moved * points[2]
    by_motion[2:, :, 3] = y * moved[:, :, 2] - z * moved[:, :, 1]
    by_motion[2:, :, 4] = z * moved[:, :, 0] - x * moved[:, :, 2]
    by_motion[2:, :, 5] = x * moved[:, :, 1] - y * moved[:, :, 0]
    found = residuals(views, poses, points).reshape(8, count)
    return found, _by_points(jacobian, poses), by_motion.reshape(8, 6, count)


def _triangulate(views: Views, poses: CameraPoses) -> np.ndarray:
    """Points on the first image's rays at the inverse depth that suits the other images by linear least squares."""
    rays = views.rays[0]
    start, change = poses.turns @ directions(rays), poses.shifts[..., None]
    # (start + inverse depth change)_xy - ray (start + inverse depth change)_z is zero: linear in the inverse depth.
    fixed, linear = (
        np.einsum("kijn,kjn->kin", views.weights, part[:, :2] - views.rays * part[:, 2:]) for part in (start, change)
    )
    inverse_depth = -(fixed * linear).sum(axis=(0, 1)) / ((linear**2).sum(axis=(0, 1)) + WEAK)
    return np.concatenate([rays, inverse_depth[None]])


def settle(views: Views, poses: CameraPoses, iterations: int = 3) -> np.ndarray:
    """Points (3, n) where their residuals are least: Gauss-Newton, a step taken where it helps."""
    points = _triangulate(views, poses)
    found = residuals(views, poses, points)
    for _ in range(iterations):
        jacobian = _by_points(_project_jacobian(views, poses, points), poses)
        pull = np.einsum("rin,rn->in", jacobian, found.reshape(len(jacobian), points.shape[1]))
        trial = points - np.einsum("ijn,jn->in", inverse_normal(jacobian), pull)
        trial_residuals = residuals(views, poses, trial)
        better = squared_residuals(trial_residuals) < squared_residuals(found)
        points, found = np.where(better, trial, points), np.where(better, trial_residuals, found)
    return points


def agrees(views: Views, poses: CameraPoses, inlier_threshold: float) -> np.ndarray:
    """Which points (n,) have residuals below the threshold (pixels) and are in front, or too far to say."""
    points = settle(views, poses)
    front = (points[2] > 0) | is_distant(views, poses, points, inlier_threshold)
    return np.asarray((largest_residual(views, poses, points) < inlier_threshold) & front)


def is_distant(views: Views, poses: CameraPoses, points: np.ndarray, inlier_threshold: float) -> np.ndarray:
    """Which points (n,) would move by less than the threshold (pixels), in every image, if they were infinitely far."""
    jacobian = _by_points(_project_jacobian(views, poses, points), poses)[:, 2].reshape(
        len(views.rays), 2, len(points[2])
    )
    return np.asarray((np.sqrt((jacobian**2).sum(axis=1)) * np.abs(points[2]) < inlier_threshold).all(axis=0))


def squared_residuals(found: np.ndarray) -> np.ndarray:
    """Sums (n,) of the squares of residuals (k, 2, n)."""
    return np.asarray((found**2).sum(axis=(0, 1)))


def largest_residual(views: Views, poses: CameraPoses, points: np.ndarray) -> np.ndarray:
    """Largest residual (n,) of the images that see a point, pixels.

    Where two see it, the distance of one image's pixel from the other's epipolar line.
    """
    lengths = np.sqrt((residuals(views, poses, points) ** 2).sum(axis=1))
    return np.where(views.seen.sum(axis=0) <= 2, lengths.sum(axis=0), lengths.max(axis=0))


def inverse_normal(jacobian: np.ndarray) -> np.ndarray:
    """Inverse normal matrices (3, 3, n) of the points, from the jacobian (r, 3, n)."""
    normal = np.einsum("rin,rjn->nij", jacobian, jacobian) + np.diag([TINY, TINY, WEAK])
    return np.linalg.inv(normal).transpose(1, 2, 0)


def flat(array: np.ndarray) -> np.ndarray:
    """An array (r, p, n) as (p, r n)."""
    rows, columns, count = array.shape
    return array.transpose(1, 0, 2).reshape(columns, rows * count)
