"""Residuals of matches under a motion of two views, and their derivatives.

There are two models of the motion. With a translation, a match must lie on its epipolar line: one condition. Under a
pure rotation it must lie on one point: two conditions, the one across the epipolar line and the one along it.

All residuals are in pixels of the images as received, and mean the same for both models: how far, to first order, the
four coordinates of a match must move to agree with the model (Sampson's distance). Independent keypoint noise of s
pixels per coordinate gives each condition's residual a standard deviation of s, whatever the lenses, the focal lengths
and the motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from kpmatch_ros.geometry.camera import AHEAD, BEHIND, Camera
from kpmatch_ros.geometry.pose import cross_matrix
from kpmatch_ros.geometry.robust import TINY

__all__ = [
    "Matches",
    "Model",
    "Motion",
    "agrees",
    "disagreement",
    "dot",
    "epipolar_jacobian",
    "epipolar_residuals",
    "gains",
    "is_in_front",
    "lengths",
    "median_parallax",
    "normalise_matches",
    "project_turned",
    "residual_sizes",
    "rotation_jacobian",
    "rotation_residuals",
    "tangents",
    "whiten",
]


_NOISE_SCALES = 0.4 / 2.0 ** np.arange(5)  # standard deviations of the noise that are tried, inlier thresholds


class Motion(NamedTuple):
    """x_ref = rotation x_cur + translation; the translation has length one, or zero for a pure rotation."""

    rotation: np.ndarray
    translation: np.ndarray

    def moved(self, step: np.ndarray) -> Motion:
        """After a step (3,) of angles about the reference frame's axes, or (5,) with two along the tangents."""
        rotation = cv2.Rodrigues(step[:3].reshape(3, 1))[0] @ self.rotation
        if len(step) == 3:
            return Motion(rotation, self.translation)
        translation = self.translation + tangents(self.translation) @ step[3:]
        return Motion(rotation, translation / np.linalg.norm(translation))


@dataclass(frozen=True, eq=False)
class Matches:
    """n matches in normalised coordinates, of the reference (0) and the current (1) image.

    Attributes:
        rays0, rays1: (n, 3) float64 directions in the optical frame, z = 1.
        noise0, noise1: (n, 2, 2) float64 covariance of x, y for keypoint noise of one pixel per coordinate. It holds
            the focal length and the lens's local magnification.
    """

    rays0: np.ndarray
    rays1: np.ndarray
    noise0: np.ndarray
    noise1: np.ndarray

    def __len__(self) -> int:
        return len(self.rays0)

    def select(self, mask: np.ndarray) -> Matches:
        """The matches for which the mask (n,) is true."""
        return Matches(self.rays0[mask], self.rays1[mask], self.noise0[mask], self.noise1[mask])


def normalise_matches(
    points0: np.ndarray, points1: np.ndarray, camera0: Camera, camera1: Camera
) -> tuple[Matches, np.ndarray]:
    """The matches that both cameras have a direction for, and which of the pixels (M, 2) they are, (M,) bool."""
    sides = [camera.normalise_with_jacobian(points) for points, camera in ((points0, camera0), (points1, camera1))]
    usable = np.isfinite(sides[0][0]).all(axis=1) & np.isfinite(sides[1][0]).all(axis=1)
    rays0, rays1 = (np.column_stack([points[usable], np.ones(usable.sum())]) for points, _ in sides)
    noise0, noise1 = (np.einsum("nij,nkj->nik", derivative[usable], derivative[usable]) for _, derivative in sides)
    return Matches(rays0, rays1, noise0, noise1), usable


Model = Callable[[Matches, Motion], tuple[np.ndarray, np.ndarray]]
"""Residuals (n, d) of matches under a motion, and their jacobian (n, d, p) by the p numbers of Motion.moved."""


def epipolar_residuals(matches: Matches, motion: Motion) -> np.ndarray:
    """Signed Sampson distance (n,) of each match from its epipolar line, pixels."""
    essential = cross_matrix(motion.translation) @ motion.rotation
    lines0, lines1 = matches.rays1 @ essential.T, matches.rays0 @ essential
    variance = _quadratic(matches.noise0, lines0[:, :2]) + _quadratic(matches.noise1, lines1[:, :2])
    return dot(matches.rays0, lines0) / np.sqrt(np.maximum(variance, TINY))


def epipolar_jacobian(matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Sampson distances (n, 1) and their jacobian (n, 1, 5), a Model."""
    rotation, translation = motion
    cross = cross_matrix(translation)
    # The essential matrix, then its derivatives: everything below is linear in it.
    essentials = np.array(
        [cross @ rotation]
        + [cross @ cross_matrix(axis) @ rotation for axis in np.eye(3)]
        + [cross_matrix(tangent) @ rotation for tangent in tangents(translation).T]
    )
    n, k = len(matches), len(essentials)
    # Numbers of one kind lie side by side, (k, n): a third of the time that products of small matrices take.
    x0, y0, _ = matches.rays0.T
    lines0 = (essentials.reshape(3 * k, 3) @ matches.rays1.T).reshape(k, 3, n)
    lines1 = (essentials.transpose(0, 2, 1)[:, :2].reshape(2 * k, 3) @ matches.rays0.T).reshape(k, 2, n)
    values = lines0[:, 0] * x0 + lines0[:, 1] * y0 + lines0[:, 2]
    variances = np.zeros((k, n))
    for lines, noise in ((lines0, matches.noise0), (lines1, matches.noise1)):
        (xx, xy), (_, yy) = noise.transpose(1, 2, 0)
        x, y = lines[0, :2]
        variances += lines[:, 0] * (xx * x + xy * y) + lines[:, 1] * (xy * x + yy * y)
    variance = np.maximum(variances[0], TINY)
    deviation = np.sqrt(variance)
    residuals = values[0] / deviation
    jacobian = values[1:] / deviation - residuals / variance * variances[1:]
    return residuals[:, None], jacobian.T[:, None, :]


def rotation_residuals(matches: Matches, rotation: np.ndarray) -> np.ndarray:
    """Residuals (n, 2) under a pure rotation, pixels, each in axes of its own; BEHIND where a match is behind."""
    projected, ahead, factors = project_turned(matches, rotation)
    shift = matches.rays0.T[:2] - projected
    return np.where(ahead, whiten(shift[0], shift[1], factors), BEHIND).T


def rotation_jacobian(matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Residuals (n, 2) under the motion's rotation alone and their jacobian (n, 2, 3), a Model."""
    projected, ahead, factors = project_turned(matches, motion.rotation)
    shift, (x, y) = matches.rays0.T[:2] - projected, projected
    xy = x * y
    residuals = np.where(ahead, whiten(shift[0], shift[1], factors), BEHIND)
    jacobian = np.empty((3, 2, len(matches)))
    for derivative, dx, dy in zip(jacobian, (xy, -1 - x * x, y), (1 + y * y, -xy, -x)):
        derivative[:] = np.where(ahead, whiten(dx, dy, factors), 0.0)
    return residuals.T, jacobian.T


def project_turned(matches: Matches, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the current image's rays appear in the reference image once turned.

    Returns:
        normalised coordinates (2, n); which rays are ahead of the reference camera (n,); and the Cholesky factor
        l00, l10, l11 (3, n) of the covariance of the distance from the match, for keypoint noise of one pixel in both
        images.
    """
    turned = rotation @ matches.rays1.T
    ahead = turned[2] > AHEAD * lengths(matches.rays1)
    depth = np.where(ahead, turned[2], 1.0)
    x, y = projected = turned[:2] / depth
    # The derivative of x, y by the current image's coordinates carries that image's noise over.
    (xx, xy), (yx, yy) = (rotation[:2, :2, None] - projected[:, None] * rotation[2, :2, None]) / depth
    (a, b), (_, c) = matches.noise1.T
    own = matches.noise0.T
    noise00 = own[0, 0] + xx * (xx * a + 2 * xy * b) + xy * xy * c
    noise10 = own[0, 1] + xx * (yx * a + yy * b) + xy * (yx * b + yy * c)
    noise11 = own[1, 1] + yx * (yx * a + 2 * yy * b) + yy * yy * c
    factor00 = np.sqrt(noise00)
    factor10 = noise10 / factor00
    factor11 = np.sqrt(np.maximum(noise11 - factor10 * factor10, TINY))
    return projected, ahead, np.array([factor00, factor10, factor11])


def whiten(x: np.ndarray, y: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The vectors x, y (n,) times the inverse of their Cholesky factors (3, n): (2, n)."""
    first = x / factors[0]
    return np.array([first, (y - factors[1] * first) / factors[2]])


def agrees(matches: Matches, motion: Motion, inlier_threshold: float) -> np.ndarray:
    """Which matches (n,) are within the threshold (pixels) of their epipolar line and in front of both cameras."""
    near = np.abs(epipolar_residuals(matches, motion)) < inlier_threshold
    return near & is_in_front(matches, motion, inlier_threshold)


def residual_sizes(matches: Matches, motion: Motion, inlier_threshold: float) -> np.ndarray:
    """Lengths (n,) of the residuals, pixels.

    Those of a match behind a camera are those of a far point, unless it may be one: its depth has no certain sign then.
    """
    sizes = np.abs(epipolar_residuals(matches, motion))
    behind = np.flatnonzero(~_is_ahead(matches, motion))
    distances = lengths(rotation_residuals(matches.select(behind), motion.rotation))
    sizes[behind] = np.where(distances < inlier_threshold, sizes[behind], distances)
    return sizes


def gains(sizes: np.ndarray, deviation: float | np.ndarray, inlier_threshold: float) -> np.ndarray:
    """What matches are worth to a motion: log-likelihood ratios (n,), 0 for those that are far off.

    A residual is that of noise, or it is wrong and anywhere within the inlier threshold.

    Args:
        sizes: lengths (n,) of the residuals, pixels.
        deviation: standard deviation of the noise, pixels; an array (k, 1) gives (k, n).
        inlier_threshold: largest residual of an inlier, pixels.
    """
    peak = 2 * inlier_threshold / (math.sqrt(2 * math.pi) * deviation)
    return np.asarray(np.log1p(peak * np.exp(-0.5 * (sizes / deviation) ** 2)))


def disagreement(matches: Matches, motion: Motion, inlier_threshold: float) -> float:
    """How little the matches speak for a motion: minus their log-likelihood ratio, with the noise that suits it best.

    The count of the matches within the threshold does not decide by itself: many that nearly agree are worth less than
    somewhat fewer that agree to the noise.
    """
    deviations = inlier_threshold * _NOISE_SCALES[:, None]
    return -float(
        gains(residual_sizes(matches, motion, inlier_threshold), deviations, inlier_threshold).sum(axis=1).max()
    )


def is_in_front(matches: Matches, motion: Motion, inlier_threshold: float) -> np.ndarray:
    """Which matches (n,) triangulate in front of both cameras, or are so far that their depth has no certain sign."""
    front = _is_ahead(matches, motion)
    front[~front] = lengths(rotation_residuals(matches.select(~front), motion.rotation)) < inlier_threshold
    return front


def _is_ahead(matches: Matches, motion: Motion) -> np.ndarray:
    """Which matches (n,) triangulate in front of both cameras."""
    rays0, rays1 = matches.rays0, matches.rays1 @ motion.rotation.T
    # Depths of the point where the rays come closest, d0 rays0 = d1 rays1 + t, but for a positive factor.
    along0, along1, between = rays0 @ motion.translation, rays1 @ motion.translation, dot(rays0, rays1)
    depth0 = along0 * dot(rays1, rays1) - along1 * between
    depth1 = along0 * between - along1 * dot(rays0, rays0)
    return (depth0 > 0) & (depth1 > 0)


def median_parallax(inliers: Matches, rotation: np.ndarray) -> float:
    """Median displacement, pixels of the reference image, between the matches and where the rotation takes them."""
    projected, ahead, _ = project_turned(inliers, rotation)
    if not ahead.any():
        return 0.0
    shift = (inliers.rays0.T[:2] - projected).T[ahead]
    return float(np.median(np.sqrt(_quadratic(np.linalg.inv(inliers.noise0[ahead]), shift))))


def tangents(direction: np.ndarray) -> np.ndarray:
    """Two orthonormal columns (3, 2), orthogonal to a unit vector (3,): those of a Householder reflection."""
    x, y, z = direction
    sign = math.copysign(1.0, z)
    a = -1.0 / (sign + z)
    return np.array([[1 + sign * a * x * x, a * x * y], [sign * a * x * y, sign + a * y * y], [-sign * x, -y]])


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products (n,) of rows (n, k)."""
    return np.einsum("ni,ni->n", a, b)


def lengths(vectors: np.ndarray) -> np.ndarray:
    """Lengths (n,) of rows (n, k)."""
    return np.sqrt(dot(vectors, vectors))


def _quadratic(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.einsum("ni,nij,nj->n", vectors, matrices, vectors)
