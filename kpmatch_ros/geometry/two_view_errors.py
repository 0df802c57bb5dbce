"""Residuals of matches under a motion of two views, and their derivatives.

There are two models of the motion. With a translation, a match must lie on its epipolar line, which is one condition.
Under a pure rotation it must lie on one point, which is two conditions: across the epipolar line and along it.

The compiled library computes the functions that src/two_view.c implements. Change both together.

All residuals are in pixels of the images as received. They have the same meaning in both models: how far, to first
order, the four coordinates of a match must move to agree with the model (Sampson's distance). Independent keypoint
noise of s pixels per coordinate gives each condition's residual a standard deviation of s, for any lens, focal length
and motion. If matches have different noise (:meth:`Matches.scaled`), the unit of each match is proportional to it.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.camera import AHEAD, BEHIND, Camera
from kpmatch_ros.geometry.noise import noise_times, normalised_noise
from kpmatch_ros.geometry.pose import cross_matrix
from kpmatch_ros.geometry.robust import TINY, tukey

__all__ = [
    "Matches",
    "Model",
    "Motion",
    "NOISE_SCALES",
    "agrees",
    "disagreement",
    "displacements",
    "depths",
    "differentiate",
    "dot",
    "epipolar_gradient",
    "epipolar_residuals",
    "essential_matrix",
    "gains",
    "is_in_front",
    "lengths",
    "median_parallax",
    "normalise_matches",
    "project_turned",
    "residual_sizes",
    "rotation_residuals",
    "tangents",
    "whiten",
]


_AXES = np.array([cross_matrix(axis) for axis in np.eye(3)])  # derivatives by the rotation's three angles

NOISE_SCALES = 0.4 / 2.0 ** np.arange(5)
"""Standard deviations of the noise that are tried, in inlier thresholds."""


class Motion(NamedTuple):
    """x_ref = rotation x_cur + translation; the translation has unit length, or is zero for a pure rotation."""

    rotation: np.ndarray
    translation: np.ndarray

    def moved(self, step: np.ndarray) -> Motion:
        """The motion after a step: (3,) angles about the reference frame's axes, or (5,) with two along tangents."""
        rotation = cv2.Rodrigues(step[:3].reshape(3, 1))[0] @ self.rotation
        if len(step) == 3:
            return Motion(rotation, self.translation)
        translation = self.translation + tangents(self.translation) @ step[3:]
        return Motion(rotation, translation / np.linalg.norm(translation))


@dataclass(frozen=True, eq=False)
class Matches:
    """n matches in normalised coordinates, of the reference (0) and the current (1) image.

    Matches are the last dimension of every array, so that sums over few numbers run along many matches.

    Attributes:
        columns: (4, 3, n) float64, the four arrays below, in this order.
        rays0, rays1: (3, n) directions in the optical frame, z = 1.
        noise0, noise1: (3, n) variance of x, covariance of x and y, and variance of y, for keypoint noise of one pixel
            per coordinate. They include the focal length, the lens's local magnification and the scales.
        scales: (n,) keypoint noise of each match, relative to the noise of the median match; None if all are equal.
    """

    columns: np.ndarray
    scales: np.ndarray | None = None

    @property
    def rays0(self) -> np.ndarray:
        return self.columns[0]

    @property
    def rays1(self) -> np.ndarray:
        return self.columns[1]

    @property
    def noise0(self) -> np.ndarray:
        return self.columns[2]

    @property
    def noise1(self) -> np.ndarray:
        return self.columns[3]

    def __len__(self) -> int:
        return self.columns.shape[2]

    def select(self, chosen: np.ndarray) -> Matches:
        """The matches in the mask (n,), or at the indices (m,)."""
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Matches(self.columns.take(indices, axis=2), None if self.scales is None else self.scales[indices])

    def scaled(self, scales: np.ndarray) -> Matches:
        """The matches, which had equal noise, with the noise of both images multiplied by scales (n,)."""
        assert self.scales is None
        columns = self.columns.copy()
        columns[2:] *= scales * scales
        return Matches(columns, scales)

    @property
    def focals(self) -> np.ndarray:
        """(n,) local focal length: pixels of the reference image per unit of normalised coordinates, at each match."""
        xx, _, yy = self.noise0
        focals = np.sqrt(2 / (xx + yy))
        return np.asarray(focals if self.scales is None else focals * self.scales)

    def sample(self, size: int, seed: int = 0) -> Matches:
        """A random sample of matches, the same for the same seed; all matches if there are at most `size`."""
        if len(self) <= size:
            return self
        return self.select(_some(len(self), size, seed))


@functools.lru_cache(maxsize=16)
def _some(count: int, size: int, seed: int) -> np.ndarray:
    """`size` random indices below `count`."""
    chosen = np.random.default_rng(seed).permutation(count)[:size]
    chosen.setflags(write=False)
    return chosen


def normalise_matches(
    points0: np.ndarray, points1: np.ndarray, camera0: Camera, camera1: Camera
) -> tuple[Matches, np.ndarray]:
    """The matches with a direction in both cameras, and the mask (M,) of these among the given pixels (M, 2)."""
    sides = [camera.normalise_with_jacobian(points) for points, camera in ((points0, camera0), (points1, camera1))]
    usable = np.isfinite(sides[0][0] + sides[1][0]).all(axis=1)
    columns = np.ones((4, 3, int(usable.sum())))
    for rays, noise, (points, derivative) in zip(columns[:2], columns[2:], sides):
        rays[:2] = points[usable].T
        noise[:] = normalised_noise(derivative[usable])
    return Matches(columns), usable


class Model(enum.IntEnum):
    """The conditions of a match under a motion, numbered as in src/two_view.c.

    With a translation, there is one condition, and the motion has five parameters of Motion.moved. A pure rotation has
    two conditions and three parameters.
    """

    EPIPOLAR = 0
    ROTATION = 1


def differentiate(model: Model, matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Residuals (d, n) of matches under a motion, and their jacobian (p, d, n) by the p parameters of Motion.moved."""
    if compiled.available():
        return compiled.differentiate(model, matches.columns, *motion)
    return _epipolar_jacobian(matches, motion) if model is Model.EPIPOLAR else _rotation_jacobian(matches, motion)


def essential_matrix(motion: Motion) -> np.ndarray:
    """The matrix E (3, 3) with x0' E x1 = 0 for the rays x0 (reference) and x1 (current) of a correct match."""
    return cross_matrix(motion.translation) @ motion.rotation


def epipolar_residuals(matches: Matches, motion: Motion) -> np.ndarray:
    """Signed Sampson distance (n,) of each match from its epipolar line, pixels."""
    if compiled.available():
        return compiled.epipolar_residuals(matches.columns, *motion)
    essential = essential_matrix(motion)
    lines0, lines1 = essential @ matches.rays1, essential[:, :2].T @ matches.rays0
    variance = _variances(matches.noise0, lines0) + _variances(matches.noise1, lines1)
    return np.asarray(dot(matches.rays0, lines0) / np.sqrt(np.maximum(variance, TINY)))


def _by_essential(matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sampson distances (n,), and their derivatives by the essential matrix.

    The derivatives are the outer products first x rays1 - rays0 x second, with first (3, n) and second (2, n).
    """
    essential = essential_matrix(motion)
    rays0, rays1 = matches.rays0, matches.rays1
    lines0, lines1 = essential @ rays1, essential[:, :2].T @ rays0
    moved0, moved1 = noise_times(matches.noise0, lines0), noise_times(matches.noise1, lines1)
    variance = np.maximum(dot(lines0[:2], moved0) + dot(lines1, moved1), TINY)
    precision = 1 / np.sqrt(variance)
    residuals = dot(rays0, lines0) * precision
    weight = residuals / variance
    first, second = rays0 * precision, moved1 * weight
    first[:2] -= moved0 * weight
    return residuals, first, second


def _essential_changes(motion: Motion) -> np.ndarray:
    """Derivatives (5, 9) of the essential matrix by the parameters of Motion.moved."""
    sideways = (tangents(motion.translation).T @ _AXES.reshape(3, 9)).reshape(2, 3, 3)
    changes = np.concatenate([cross_matrix(motion.translation) @ _AXES, sideways]) @ motion.rotation
    return np.asarray(changes.reshape(5, 9))


def _epipolar_jacobian(matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Sampson distances (1, n) and their jacobian (5, 1, n)."""
    residuals, first, second = _by_essential(matches, motion)
    by_essential = first[:, None] * matches.rays1
    by_essential[:, :2] -= matches.rays0[:, None] * second
    jacobian = _essential_changes(motion) @ by_essential.reshape(9, -1)
    return residuals[None], jacobian[:, None]


def epipolar_gradient(matches: Matches, motion: Motion, cutoff: float) -> np.ndarray:
    """Gradient (5,) of half of Tukey's loss of the Sampson distances, computed without the jacobian."""
    residuals, first, second = _by_essential(matches, motion)
    weighted = residuals * tukey(np.abs(residuals), cutoff)[0]
    gradient = (first * weighted) @ matches.rays1.T
    gradient[:, :2] -= matches.rays0 @ (second * weighted).T
    return np.asarray(_essential_changes(motion) @ gradient.ravel())


def rotation_residuals(matches: Matches, rotation: np.ndarray) -> np.ndarray:
    """Residuals (2, n) under a pure rotation, whitened, pixels; BEHIND if the match is behind the camera."""
    if compiled.available():
        return compiled.rotation_residuals(matches.columns, rotation)
    projected, ahead, factors = project_turned(matches, rotation)
    x, y = matches.rays0[:2] - projected
    residuals = whiten(x, y, factors)
    residuals[:, ~ahead] = BEHIND
    return residuals


def _rotation_jacobian(matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Residuals (2, n) under the motion's rotation alone and their jacobian (3, 2, n)."""
    projected, ahead, factors = project_turned(matches, motion.rotation)
    x, y = projected
    xy = x * y
    derivatives = np.empty((4, 2, len(matches)))
    derivatives[0] = matches.rays0[:2] - projected
    derivatives[1:] = [[xy, 1 + y * y], [-1 - x * x, -xy], [y, -x]]
    derivatives = whiten(derivatives[:, 0], derivatives[:, 1], factors).transpose(1, 0, 2)
    if not ahead.all():
        derivatives[1:, :, ~ahead], derivatives[0, :, ~ahead] = 0.0, BEHIND
    return derivatives[0], np.ascontiguousarray(derivatives[1:])


def project_turned(matches: Matches, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Projection of the current image's rays, after the rotation, into the reference image.

    Returns:
        normalised coordinates (2, n); mask (n,) of the rays ahead of the reference camera; and the Cholesky factor
        l00, l10, l11 (3, n) of the covariance of the offset from the match, for keypoint noise of one pixel in both
        images.
    """
    turned = rotation @ matches.rays1
    ahead = turned[2] > AHEAD * lengths(matches.rays1)
    depth = turned[2] if ahead.all() else np.where(ahead, turned[2], 1.0)
    projected = turned[:2] / depth
    # The derivative of x, y by the current image's coordinates propagates that image's noise.
    (xx, xy), (yx, yy) = (rotation[:2, :2, None] - projected[:, None] * rotation[2, :2, None]) / depth
    a, b, c = matches.noise1
    own0, own1, own2 = matches.noise0
    ax, ay = xx * a + xy * b, xx * b + xy * c
    noise00 = own0 + ax * xx + ay * xy
    noise10 = own1 + ax * yx + ay * yy
    noise11 = own2 + (yx * a + yy * b) * yx + (yx * b + yy * c) * yy
    factors = np.empty((3, len(matches)))
    factors[0] = np.sqrt(noise00)
    factors[1] = noise10 / factors[0]
    factors[2] = np.sqrt(np.maximum(noise11 - factors[1] * factors[1], TINY))
    return projected, ahead, factors


def whiten(x: np.ndarray, y: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The vectors x, y (..., n) multiplied by the inverse of their Cholesky factors (3, n): (2, ..., n)."""
    first = x / factors[0]
    return np.array([first, (y - factors[1] * first) / factors[2]])


def agrees(matches: Matches, motion: Motion, inlier_threshold: float) -> np.ndarray:
    """Mask (n,) of matches within the threshold (pixels) of their epipolar line and in front of both cameras."""
    if compiled.available():
        return compiled.in_front(matches.columns, *motion, inlier_threshold, near=True)
    near = np.abs(epipolar_residuals(matches, motion)) < inlier_threshold
    return _in_front(matches, motion, inlier_threshold, near)


def residual_sizes(matches: Matches, motion: Motion, inlier_threshold: float) -> np.ndarray:
    """Absolute residuals (n,), pixels.

    A match behind a camera has the residual of a point at infinity. The exception is a match that may be at infinity,
    whose depth has no certain sign.
    """
    if compiled.available():
        return compiled.residual_sizes(matches.columns, *motion, inlier_threshold)
    sizes = np.abs(epipolar_residuals(matches, motion))
    behind = np.flatnonzero(~_is_ahead(matches, motion))
    if not len(behind):
        return sizes
    distances = lengths(rotation_residuals(matches.select(behind), motion.rotation))
    sizes[behind] = np.where(distances < inlier_threshold, sizes[behind], distances)
    return sizes


def gains(sizes: np.ndarray, deviation: float | np.ndarray, inlier_threshold: float) -> np.ndarray:
    """Log-likelihood ratios (n,) of matches under a motion, 0 for matches with large residuals.

    A residual is either noise, or wrong and uniformly distributed within the inlier threshold.

    Args:
        sizes: absolute residuals (n,), pixels.
        deviation: standard deviation of the noise, pixels; an array (k, 1) or (k, n) gives (k, n).
        inlier_threshold: largest residual of an inlier, pixels.
    """
    peak = 2 * inlier_threshold / (math.sqrt(2 * math.pi) * deviation)
    return np.asarray(np.log1p(peak * np.exp(-0.5 * (sizes / deviation) ** 2)))


def disagreement(matches: Matches, motion: Motion, inlier_threshold: float) -> float:
    """Negative log-likelihood ratio of the matches under a motion, with the noise that gives the best value.

    The number of matches within the threshold does not decide alone: many matches that nearly agree count less than
    somewhat fewer that agree within the noise.
    """
    deviations = inlier_threshold * NOISE_SCALES[:, None]
    return -float(
        gains(residual_sizes(matches, motion, inlier_threshold), deviations, inlier_threshold).sum(axis=1).max()
    )


def is_in_front(matches: Matches, motion: Motion, inlier_threshold: float) -> np.ndarray:
    """Mask (n,) of matches that triangulate in front of both cameras, or whose depth has no certain sign."""
    if compiled.available():
        return compiled.in_front(matches.columns, *motion, inlier_threshold, near=False)
    return _in_front(matches, motion, inlier_threshold, np.ones(len(matches), dtype=bool))


def _in_front(matches: Matches, motion: Motion, inlier_threshold: float, among: np.ndarray) -> np.ndarray:
    """As is_in_front, for the matches in the mask `among` (n,); False for the others."""
    front = among & _is_ahead(matches, motion)
    behind = np.flatnonzero(among & ~front)
    if len(behind):
        front[behind] = lengths(rotation_residuals(matches.select(behind), motion.rotation)) < inlier_threshold
    return front


def depths(matches: Matches, motion: Motion) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depths of the closest points of the rays of the matches.

    Returns:
        depths (n,) in the reference and in the current camera, up to a positive factor; squared sine (n,) of the angle
        between the rays.
    """
    if compiled.available():
        return compiled.depths(matches.columns, *motion)
    rays0, rays1 = matches.rays0, motion.rotation @ matches.rays1
    # The point is d0 rays0 = d1 rays1 + t.
    along0, along1, between = motion.translation @ rays0, motion.translation @ rays1, dot(rays0, rays1)
    square0, square1 = dot(rays0, rays0), dot(rays1, rays1)
    squared_sine = 1 - between * between / (square0 * square1)
    return along0 * square1 - along1 * between, along0 * between - along1 * square0, squared_sine


def _is_ahead(matches: Matches, motion: Motion) -> np.ndarray:
    """Mask (n,) of matches that triangulate in front of both cameras."""
    depth0, depth1, _ = depths(matches, motion)
    return np.asarray(np.minimum(depth0, depth1) > 0)


def median_parallax(inliers: Matches, rotation: np.ndarray) -> float:
    """Median displacement of the inliers after the rotation is removed, pixels of the reference image.

    If the rotation moves a ray behind the camera, it has no pixel. The displacement is then the angle times the focal
    length.
    """
    ahead, distances = displacements(inliers, rotation)
    if not len(ahead):
        return 0.0
    if not ahead.all():
        behind = inliers.select(np.flatnonzero(~ahead))
        rays0, turned = behind.rays0, rotation @ behind.rays1
        angles = np.arctan2(lengths(np.cross(rays0, turned, axis=0)), dot(rays0, turned))
        xx, _, yy = behind.noise0
        distances[~ahead] = angles / np.sqrt((xx + yy) / 2)
    return float(np.median(distances))


def displacements(matches: Matches, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask (n,) of matches ahead of the camera after the rotation, and their displacements (n,) from there, pixels."""
    if compiled.available():
        return compiled.displacements(matches.columns, rotation)
    projected, ahead, _ = project_turned(matches, rotation)
    x, y = matches.rays0[:2] - projected
    xx, xy, yy = matches.noise0
    return ahead, np.sqrt((yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy))


def tangents(direction: np.ndarray) -> np.ndarray:
    """Two orthonormal columns (3, 2), orthogonal to a unit vector (3,), from a Householder reflection."""
    x, y, z = direction
    sign = math.copysign(1.0, z)
    a = -1.0 / (sign + z)
    return np.array([[1 + sign * a * x * x, a * x * y], [sign * a * x * y, sign + a * y * y], [-sign * x, -y]])


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products (n,) of columns (k, n)."""
    return np.asarray(np.einsum("in,in->n", a, b))


def lengths(vectors: np.ndarray) -> np.ndarray:
    """Lengths (n,) of columns (k, n)."""
    return np.abs(vectors[0]) if len(vectors) == 1 else np.sqrt(dot(vectors, vectors))


def _variances(noise: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Variances (n,) of the products with the first two of the coordinates (k, n), for noise (3, n) as in Matches."""
    return dot(vectors[:2], noise_times(noise, vectors))
