"""Points as seen by one stereo frame, and the residuals of a motion between the points of two frames.

The left and the right image of a frame give each point three coordinates: normalised x and y in the left image, and the
inverse depth. They also give the covariance of these, and one residual that does not depend on the motion: the distance
of the match from its epipolar line. Under a motion, the points of one frame, the source, are projected into the other
one, the target. The difference is compared with the covariance of both. This equals least squares in all four images
with the points eliminated, if the error of a point is small relative to its distance from the cameras.

Residuals are in pixels of the images as received. Points are the last dimension of every array, so that sums over few
numbers run along many points.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry.camera import AHEAD, BEHIND, Camera
from kpmatch_ros.geometry.noise import noise_times, normalised_noise
from kpmatch_ros.geometry.pose import cross_matrix
from kpmatch_ros.geometry.robust import TINY
from kpmatch_ros.geometry.stereo_camera import StereoCamera

__all__ = ["StereoPoints", "StereoResiduals", "as_pixels", "stereo_residuals"]

_AT_THE_CENTRE = 1e-6
"""Depth in one camera relative to another: a point with a smaller one is at the camera's centre, without direction."""

_ROUNDING = 1e-14  # relative to the largest eigenvalue: smaller ones are rounding

_WEAK = 1e-6  # squared pixels metres: keeps an undetermined inverse depth regular


@dataclass(frozen=True, eq=False)
class StereoPoints:
    """n points seen by one stereo frame.

    Attributes:
        rays: (2, n) normalised coordinates in the left image.
        noise: (3, n) variance of x, covariance of x and y, variance of y there, for keypoint noise of one pixel.
        seen: (n,) bool, whether the left image has a direction; otherwise the other values have no meaning.
        has_depth: (n,) bool, whether the right image has one too, and the point is ahead of it or beyond infinity.
        points: (3, n) x, y and inverse depth, the likeliest values; inverse depth 0 if the depth is unknown.
        covariances: (3, 3, n) of these, for keypoint noise of one pixel; zero for an unknown depth.
        squares: (n,) squared distance of the match from its epipolar line, pixels; zero without a match.
        offset: (2, n) normalised coordinates in the right image, minus the point's projection there.
        jacobian: (3, 2, n) of this projection by x, y and the inverse depth.
        information: (3, n) the inverse of the right image's noise. All three are zero if the depth is unknown.
    """

    rays: np.ndarray
    noise: np.ndarray
    seen: np.ndarray
    has_depth: np.ndarray
    points: np.ndarray
    covariances: np.ndarray
    squares: np.ndarray
    offset: np.ndarray
    jacobian: np.ndarray
    information: np.ndarray

    def select(self, chosen: np.ndarray) -> StereoPoints:
        """The points at the indices (m,)."""
        return StereoPoints(*(getattr(self, field.name).take(chosen, axis=-1) for field in fields(self)))

    def joined(self, other: StereoPoints) -> StereoPoints:
        """These points, followed by others."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return StereoPoints(*(np.concatenate(pair, axis=-1) for pair in pairs))

    def without_depth(self, chosen: np.ndarray) -> StereoPoints:
        """The same points, with the depth of those in the mask (n,) set to unknown."""
        if not chosen.any():
            return self
        kept, points, covariances = ~chosen, self.points.copy(), self.covariances * ~chosen
        points[:2, chosen], points[2, chosen] = self.rays[:, chosen], 0.0
        covariances[:2, :2, chosen] = _symmetric(self.noise)[..., chosen]
        return StereoPoints(
            self.rays, self.noise, self.seen, self.has_depth & kept, points, covariances,
            *(array * kept for array in (self.squares, self.offset, self.jacobian, self.information)),
        )  # fmt: skip

    def distances(self, points: np.ndarray) -> np.ndarray:
        """Distances (2, n), pixels, of the left and right pixels from the projections of nearby points (3, n)."""
        moved = points - self.points
        right = self.offset - self.jacobian[0] * moved[0] - self.jacobian[1] * moved[1] - self.jacobian[2] * moved[2]
        left = self.rays - points[:2]
        squares = [_quadratic(_inverse(self.noise), left), _quadratic(self.information, right)]
        return np.asarray(np.sqrt(np.maximum(squares, 0.0)))

    def is_distant(self, inlier_threshold: float) -> np.ndarray:
        """Mask (n,) of points that would move by less than the threshold (pixels) if they were at infinity."""
        shift = self.jacobian[2] * self.points[2]
        return np.asarray(_quadratic(self.information, shift) < inlier_threshold**2)

    def inverse_depth_sigmas(self) -> np.ndarray:
        """Standard deviations (n,) of the inverse depth, for an error of one pixel of the right point only."""
        return np.asarray(1 / np.sqrt(np.maximum(_quadratic(self.information, self.jacobian[2]), TINY)))

    @classmethod
    def of(
        cls, left: np.ndarray, right: np.ndarray, camera: StereoCamera, shared: np.ndarray | None = None
    ) -> StereoPoints:
        """Points from their pixels in both images.

        Args:
            left: (n, 2) pixels in the left image.
            right: (n, 2) pixels in the right image; NaN without a match.
            camera: the calibration.
            shared: (n,) standard deviations of the left pixels, if the right ones were found from them. The right
                pixels then share the error of the left ones, and have an error of one pixel of their own. If None, both
                have independent errors of one pixel.
        """
        rays0, noise0, seen = _normalise(camera.left, left)
        rays1, noise1, matched = _normalise(camera.right, right)
        has_depth, turn, shift = seen & matched, camera.rotation, camera.translation
        # To first order, the rays are moved by as little as possible so that they meet (Sampson's approximation).
        essential = cross_matrix(shift) @ turn
        lines0, lines1 = essential.T @ rays1, essential @ rays0
        moved0, moved1 = noise_times(noise0, lines0), noise_times(noise1, lines1)
        variances = np.array([(lines0[:2] * moved0).sum(axis=0), (lines1[:2] * moved1).sum(axis=0)])
        if shared is not None:  # only the right pixel is off the line
            moved0, variances[0] = np.zeros_like(moved0), 0.0
        variance = np.maximum(variances.sum(axis=0), TINY)
        away = np.where(has_depth, (rays1 * lines1).sum(axis=0) / variance, 0.0)
        original, offset = rays0[:2].copy(), away * moved1
        rays0[:2] -= away * moved0
        rays1[:2] -= offset
        start = turn @ rays0
        fixed, slope = (part[:2] - rays1[:2] * part[2] for part in (start, shift[:, None]))
        inverse_depth = -(slope * fixed).sum(axis=0) / np.maximum((slope * slope).sum(axis=0), TINY)
        depth = start[2] + shift[2] * inverse_depth  # in the right camera, relative to the left one
        has_depth &= depth > np.maximum(AHEAD * np.sqrt((rays1 * rays1).sum(axis=0)) * np.abs(depth), _AT_THE_CENTRE)
        depth = np.where(has_depth, depth, 1.0)
        # Derivatives of the right image by x, y and the inverse depth.
        jacobian = np.array([turn[:2, i, None] - rays1[:2] * turn[2, i] for i in (0, 1)] + [slope]) / depth
        inverse_noise = _inverse(noise1)
        weighted = np.array([noise_times(inverse_noise, column) for column in jacobian])
        information = np.einsum("idn,jdn->ijn", jacobian, weighted)
        if shared is None:
            information[:2, :2] += _symmetric(_inverse(noise0))
        else:  # an error that both share moves the point, but not its depth
            information[:2] = information[2, :2] = 0.0
            information[:2, :2] = _symmetric(_inverse(noise0)) / (shared * shared)
        information[2, 2] += _WEAK
        found = cls(
            rays=original,
            noise=noise0,
            seen=seen,
            has_depth=has_depth,
            points=np.concatenate([rays0[:2], inverse_depth[None]]),
            covariances=_inverse_symmetric(information),
            squares=away * away * variance,
            offset=offset,
            jacobian=jacobian,
            information=inverse_noise,
        )
        return found.without_depth(~has_depth)


class StereoResiduals(NamedTuple):
    """Residuals of n points under a motion, whitened: their variance is one for keypoint noise of one pixel.

    Attributes:
        whitened: (3, n) the residuals; the last one is zero if the target does not know the depth.
        jacobian: (6, 3, n) by the translation, metres, and by angles about the reference frame's axes.
        squares: (n,) squared residuals of all images together, pixels.
        points: (3, n) in the source, the likeliest values.
        targets: (3, n) the same in the target.
        slopes: (3, 3, n) the jacobian by the translation, over the inverse depth.
        depth_variances: (n,) of the inverse depth in the source, for keypoint noise of one pixel.
    """

    whitened: np.ndarray
    jacobian: np.ndarray
    squares: np.ndarray
    points: np.ndarray
    targets: np.ndarray
    slopes: np.ndarray
    depth_variances: np.ndarray

    def determine(self, used: np.ndarray, variance: float, rotation_only: bool = False) -> bool:
        """Whether the points determine the motion: in its weakest direction to a radian, or to the points' distance.

        Points that coincide or lie on one line leave a rotation undetermined. If the translation is much longer than
        the distances of the points, all points look like one.

        Args:
            used: (n,) bool, the points that the motion is estimated from.
            variance: of the keypoints' noise, squared pixels.
            rotation_only: whether the translation is known.
        """
        jacobian = self.jacobian[..., used].reshape(6, -1)
        jacobian[:3] /= max(np.sqrt(np.mean(self.points[2, used] ** 2)), TINY) if used.any() else 1.0
        part = jacobian[3 * rotation_only :]
        information = np.linalg.eigvalsh(part @ part.T)
        return bool(information[0] > max(variance, _ROUNDING * information[-1]))


def stereo_residuals(
    source: StereoPoints, target: StereoPoints, forward: int, rotation: np.ndarray, translation: np.ndarray
) -> StereoResiduals:
    """Residuals between two frames under a motion, x_ref = rotation x_cur + translation.

    Args:
        source: points of one frame, all with a depth.
        target: the same points in the other frame.
        forward: number of points, the first ones, whose source is the reference frame. For the others, it is the
            current frame.
        rotation: (3, 3).
        translation: (3,), metres.
    """
    count, back = len(source.has_depth), rotation.T
    # In the target, a point is turn (x, y, 1) + shift q, with inverse depth q. The matrix takes (x, y, q, 1).
    matrix = np.empty((3, 4, count))
    for part, turn, shift in (
        (slice(0, forward), back, -back @ translation),
        (slice(forward, None), rotation, translation),
    ):
        matrix[:, :2, part], matrix[:, 2, part], matrix[:, 3, part] = turn[:, :2, None], shift[:, None], turn[:, 2:]
    first, ahead, depth = _project(matrix, source.points)
    known = target.has_depth
    distance = target.points - first
    distance[2] *= known
    # Derivatives by the source's x, y and inverse depth.
    projection = -first[:, None] * matrix[2, :3]
    projection[:2] += matrix[:2, :3]
    projection[2, 2] += 1.0
    projection /= depth
    cross_covariance = np.einsum("ijn,kjn->ikn", source.covariances, projection)
    covariance = np.einsum("ijn,jkn->ikn", projection, cross_covariance) + target.covariances
    covariance[2, 2] = np.where(known, covariance[2, 2], 1.0)
    covariance[2, :2] *= known
    factors = _cholesky(covariance)
    residuals = _whiten(factors, distance)
    weighted = np.where(ahead, _whiten_back(factors, residuals), 0.0)
    cross_covariance[:, 2] *= known
    points = source.points + np.einsum("ikn,kn->in", cross_covariance, weighted)
    squares = (residuals * residuals).sum(axis=0) + source.squares + target.squares
    squares = np.where(ahead, squares, BEHIND**2)

    # The jacobian at the likeliest points. A step moves a point in the target by turn (w x z + q dt).
    targets, _, depth = _project(matrix, points)
    positions = points.copy()  # z
    positions[2] = 1.0
    positions[:, :forward] -= translation[:, None] * points[2, :forward]
    positions[:, forward:] = rotation @ positions[:, forward:]
    slopes = np.empty((3, 3, count))
    for part, turn in ((slice(0, forward), back), (slice(forward, None), -np.eye(3))):
        slopes[:2, :, part] = turn[:2, :, None]
        slopes[2, :, part] = 0.0
        slopes[:, :, part] -= targets[:, None, part] * turn[2, :, None]
    slopes /= depth
    slopes[2] *= known
    slopes = _whiten(factors, slopes)
    across = np.empty((3, 3, count))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        across[:, i] = positions[j] * slopes[:, k] - positions[k] * slopes[:, j]
    jacobian = np.concatenate([slopes * points[2], across], axis=1).transpose(1, 0, 2)
    reduction = _whiten(factors, cross_covariance[2])
    variances = np.maximum(source.covariances[2, 2] - (reduction * reduction).sum(axis=0), 0.0)
    return StereoResiduals(residuals, jacobian, squares, points, targets, slopes, variances)


def as_pixels(points: np.ndarray) -> np.ndarray:
    """Pixels (M, 2) as float64.

    Raises:
        ValueError: the array has another shape.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape (M, 2), not {points.shape}")
    return points


def _project(matrix: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Projection of points (3, n) into the target; mask (n,) of those ahead; depths (n,) relative to the source."""
    there = matrix[:, 0] * points[0] + matrix[:, 1] * points[1] + matrix[:, 2] * points[2] + matrix[:, 3]
    ahead = there[2] > np.maximum(AHEAD * np.sqrt((there * there).sum(axis=0)), _AT_THE_CENTRE)
    depth = np.where(ahead, there[2], 1.0)
    there[2] = points[2]
    return there / depth, ahead, depth


def _normalise(camera: Camera, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rays (3, n) with z = 1, their noise (3, n), and mask of pixels (n, 2) with a ray; the others get the axis."""
    points, derivative = camera.normalise_with_jacobian(pixels)
    seen = np.isfinite(points).all(axis=1)
    rays = np.ones((3, len(pixels)))
    rays[:2] = points.T
    noise = normalised_noise(derivative)
    if not seen.all():
        rays[:2, ~seen] = 0.0
        noise[:, ~seen] = [[1.0], [0.0], [1.0]]
    return rays, noise, seen


def _symmetric(noise: np.ndarray) -> np.ndarray:
    """Noise (3, n) as matrices (2, 2, n)."""
    return np.array([[noise[0], noise[1]], [noise[1], noise[2]]])


def _quadratic(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """v' M v (n,) for symmetric matrices (3, n) and vectors (2, n)."""
    x, y = vectors
    return np.asarray(matrices[0] * x * x + 2 * matrices[1] * x * y + matrices[2] * y * y)


def _inverse(noise: np.ndarray) -> np.ndarray:
    """Inverses of symmetric matrices (3, n): xx, xy, yy."""
    xx, xy, yy = noise
    return np.array([yy, -xy, xx]) / np.maximum(xx * yy - xy * xy, TINY)


def _inverse_symmetric(matrices: np.ndarray) -> np.ndarray:
    """Inverses of positive definite matrices (3, 3, n)."""
    (a, b, c), (_, d, e), (_, _, f) = matrices
    ad, ae, af = d * f - e * e, c * e - b * f, b * e - c * d
    dd, de, df = a * f - c * c, b * c - a * e, a * d - b * b
    return np.array([[ad, ae, af], [ae, dd, de], [af, de, df]]) / np.maximum(a * ad + b * ae + c * af, TINY)


def _cholesky(matrices: np.ndarray) -> tuple[np.ndarray, ...]:
    """Cholesky factors of positive definite matrices (3, 3, n): inverses of the diagonal, then l10, l20, l21."""
    one = 1 / np.sqrt(np.maximum(matrices[0, 0], TINY))
    l10, l20 = matrices[1, 0] * one, matrices[2, 0] * one
    two = 1 / np.sqrt(np.maximum(matrices[1, 1] - l10 * l10, TINY))
    l21 = (matrices[2, 1] - l20 * l10) * two
    three = 1 / np.sqrt(np.maximum(matrices[2, 2] - l20 * l20 - l21 * l21, TINY))
    return one, two, three, l10, l20, l21


def _whiten(factors: tuple[np.ndarray, ...], vectors: np.ndarray) -> np.ndarray:
    """The inverse of the lower factors times vectors (3, ..., n)."""
    one, two, three, l10, l20, l21 = factors
    first = vectors[0] * one
    second = (vectors[1] - l10 * first) * two
    return np.array([first, second, (vectors[2] - l20 * first - l21 * second) * three])


def _whiten_back(factors: tuple[np.ndarray, ...], vectors: np.ndarray) -> np.ndarray:
    """The inverse of the transposed lower factors times vectors (3, n)."""
    one, two, three, l10, l20, l21 = factors
    third = vectors[2] * three
    second = (vectors[1] - l21 * third) * two
    return np.array([(vectors[0] - l10 * second - l20 * third) * one, second, third])
