"""Points seen in several frames: the static point that explains them best, and its residuals.

Two frames only give the distance of a point from its epipolar line. A point that slides along an outline, or shows two
surfaces, is often close to this line. Over more frames, the positions must be those of one point at one depth: two
measurements per frame for three unknowns.

Sights are the measurements of points in the frames, (F, 5, T). They hold x/z and y/z, NaN if the point was not seen,
and the lower triangle (xx, yx, yy) of the matrix that whitens the errors of these two. After whitening, an error has
the size of one pixel at the centre of the image, divided by the focal length. At the edge of a fisheye image, a pixel
is many times larger in x/z than at the centre. Residuals are whitened with this matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
from scipy.special import chdtri

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.robust import TINY

__all__ = ["FRAMES", "Structure", "Window", "motion_equations", "place", "project", "sights", "triangulate"]

FRAMES = 8
"""Largest number of earlier frames that are used."""

_ITERATIONS = 2
_SMALLEST_DEPTH = 1e-3  # relative to the length of the ray
_DAMPING = 1e-9  # of an inverse depth
_ROUNDING = 1e-6  # smallest determinant over the product of the diagonal, in float32; well-seen points have >= 0.15
_CUTOFF = float(chdtri(1, 1e-2))  # a point's mean square beyond which its weight for the motion decreases
_MOST_POINTS = 250  # largest number of points that the motion is fitted to
_SIGNIFICANT = 10.0  # standard deviations of the points' common depth, above which it is not noise
_LATEST = FRAMES // 2  # latest cameras, which are kept even if the camera stood still


class Window(NamedTuple):
    """Poses of F cameras: x_frame = rotation x_reference + translation. The last camera is the reference.

    Without metres, lengths are in units of the first translation.
    """

    rotations: np.ndarray  # (F, 3, 3)
    translations: np.ndarray  # (F, 3)

    @classmethod
    def start(cls) -> Window:
        """The window with the reference alone."""
        return cls(np.eye(3)[None], np.zeros((1, 3)))

    def join(self, rotation: np.ndarray, translation: np.ndarray) -> Window:
        """The window with one more camera, in the same reference frame."""
        return Window(
            np.concatenate([self.rotations, rotation[None]]), np.concatenate([self.translations, translation[None]])
        )

    def advance(self, spare: int = 0) -> Window:
        """The window in the frame of the last camera. If there are too many cameras, the spare one is removed."""
        turned = self.rotations @ self.rotations[-1].T
        moved = self.translations - turned @ self.translations[-1]
        kept = np.delete(np.arange(len(self)), [spare] if len(self) > FRAMES else [])
        return Window(turned[kept], moved[kept])

    def like(self, seen: np.ndarray) -> Window:
        """The window in the precision of sights. For points, float32 is precise enough and takes half the time."""
        return Window(self.rotations.astype(seen.dtype), self.translations.astype(seen.dtype))

    def __len__(self) -> int:
        return len(self.rotations)


@dataclass(frozen=True, eq=False)
class Structure:
    """T points, and the cameras that saw them.

    Attributes:
        cameras: of F frames; the second last is the reference, the last one is the current frame.
        landmarks: (3, T) x/z, y/z and 1/z in the reference's frame.
        squares: (T,) sums of the squared residuals of all frames.
        freedom: (T,) degrees of freedom of these sums.
        noise: standard deviation of a coordinate of a whitened residual: pixels over the focal length.
        scaled: whether lengths are in the unit of the cameras before the last one.
    """

    cameras: Window
    landmarks: np.ndarray
    squares: np.ndarray
    freedom: np.ndarray
    noise: float
    scaled: bool = True

    @classmethod
    def of(
        cls, window: Window, seen: np.ndarray, motion: tuple[np.ndarray, np.ndarray], noise: float, metric: bool = False
    ) -> Structure:
        """Fit the points, and refine the motion from the reference to the current camera, with all frames.

        Points with large residuals have little weight for the motion. If most points indicate larger noise, as with an
        imprecise calibration, the noise is increased.

        Args:
            window: the first F - 1 cameras, the reference last.
            seen: (F, 5, T) sights; those of the last two frames are known.
            motion: rotation (3, 3) and translation (3,) of the current camera in the reference's frame.
            noise: smallest standard deviation of a coordinate of a whitened residual.
            metric: whether the length of the translation is known, in the unit of the window. Otherwise it is fitted.
        """
        rotation, translation = motion[0].T, -motion[0].T @ motion[1]
        part = seen[:, :, np.random.default_rng(0).permutation(seen.shape[2])[:_MOST_POINTS]]
        before, scaled = _landmarks(window, part[:-1], noise), True
        # Without depths, a translation fitted to noise would produce depths from this noise.
        free = 3 if before is None else 6
        if motion[1].any() and not metric:
            length = None if before is None else _length(before, part[-1], rotation, translation)
            translation, scaled = translation * (length or 1.0), length is not None
        cameras = window.join(rotation, translation)
        landmarks = triangulate(cameras, part, reference=-2)[0]
        for _ in range(_ITERATIONS):
            hessian, gradient, steps, coupling = motion_equations(cameras, landmarks, part, _CUTOFF * noise * noise)
            step = np.zeros(6)
            step[:free] = -np.linalg.lstsq(hessian[:free, :free], gradient[:free], rcond=1e-9)[0]
            landmarks = landmarks + steps - np.einsum("act,c->at", coupling, step)
            rotation = cv2.Rodrigues(step[:3].reshape(3, 1))[0] @ rotation
            translation = translation + step[3:]
            cameras = window.join(rotation, translation)
        found = replace(place(cameras, triangulate(cameras, seen, -2)[0], seen, noise), scaled=scaled)
        long = found.freedom > 1
        if long.any():
            relative = found.squares[long] / _quantiles(0.5)[found.freedom[long]]
            found = replace(found, noise=max(noise, float(np.sqrt(np.median(relative)))))
        return found

    def select(self, chosen: np.ndarray) -> Structure:
        """The points in a mask (T,)."""
        parts = {name: getattr(self, name)[..., chosen] for name in ("landmarks", "squares", "freedom")}
        return replace(self, **parts)

    def spare(self) -> int:
        """Index of the camera to remove if there are too many cameras, otherwise 0.

        It is the oldest camera, or the oldest one at the same place as the next camera, except the latest ones. While
        the camera stands still, depths are known only from the cameras before it stopped.
        """
        turned, moved = self.cameras
        steps = np.linalg.norm(np.diff(np.einsum("fji,fj->fi", turned, moved), axis=0), axis=1)
        nearness = np.abs(self.landmarks[2])
        stands = steps * _median(nearness, np.ones_like(nearness)) < self.noise
        standing = np.flatnonzero(stands[: len(steps) + 1 - _LATEST])
        return int(standing[0]) if len(standing) and len(steps) >= FRAMES else 0

    def contradicts(self, false_alarms: float) -> np.ndarray:
        """(T,) bool which tracks no static point explains. `false_alarms` is the rate for tracks of static points."""
        return np.asarray(self.squares > self.noise**2 * _quantiles(false_alarms)[self.freedom])


def sights(camera: Camera, points: np.ndarray) -> np.ndarray:
    """(N, 5) float32 sights of pixels (N, 2), in the form that this module's docstring defines."""
    rays, by_pixel = camera.normalise_with_jacobian(points)
    (xx, xy), (yx, yy) = by_pixel.transpose(1, 2, 0) * camera.focal
    # The inverse of the covariance's lower Cholesky factor: the length of (xx, xy), and the part of (yx, yy) across it.
    along = np.hypot(xx, xy)
    across = (xx * yy - xy * yx) / along
    slanted = (xx * yx + xy * yy) / along
    return np.column_stack([rays, 1 / along, -slanted / (along * across), 1 / across]).astype(np.float32)


def place(cameras: Window, landmarks: np.ndarray, seen: np.ndarray, noise: float) -> Structure:
    """Points near landmarks (3, S), fitted to sights (F, 5, S) of these cameras, for the given noise."""
    if compiled.available() and seen.dtype == np.float32:
        return Structure(cameras, *compiled.place(cameras, landmarks, seen), noise)
    normal = _Normal.of(cameras, landmarks, seen)
    step = normal.points_step(normal.gradient)
    # Near the points, the residuals are almost linear. Far from them, rounding may make the sum negative.
    squares = normal.squares + np.einsum("at,at->t", normal.gradient, step)
    squares = np.where(squares < 0, normal.squares, squares)
    return Structure(cameras, landmarks + step, squares, _freedom(seen), noise)


def triangulate(
    cameras: Window,
    seen: np.ndarray,
    reference: int = -1,
    prior: np.ndarray | float = 0.0,
    prior_information: np.ndarray | float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Depths of points by linear least squares.

    Args:
        cameras: of F frames.
        seen: (F, 5, T) sights; those of the reference frame are known.
        reference: index of the reference frame.
        prior: (T,) expected 1/z.
        prior_information: (T,) variance of the noise over the variance of the expected 1/z.

    Returns:
        (3, T) x/z, y/z and 1/z in the reference's frame, and (T,) variance of the noise over the variance of this 1/z.
    """
    x, y = seen[reference, :2]
    if compiled.available() and seen.dtype == np.float32:
        inverse, information = compiled.triangulate(cameras, seen, reference, prior, prior_information)
        return np.stack([x, y, inverse]), information
    observed, rays, factors = _observed(seen)
    cameras = cameras.like(seen)
    turned = cameras.rotations @ np.stack([x, y, np.ones_like(x)])
    shifts = cameras.translations[:, :2, None] - rays * cameras.translations[:, 2:, None]
    along = _whitened(factors, shifts * observed)
    apart = _whitened(factors, rays * turned[:, 2:] - turned[:, :2])
    information = np.einsum("fit,fit->t", along, along) + prior_information
    weighted = np.einsum("fit,fit->t", along, apart) + prior * prior_information
    return np.stack([x, y, weighted / np.maximum(information, TINY)]), information


def motion_equations(
    cameras: Window, landmarks: np.ndarray, seen: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Normal equations of the last camera's motion, with the points eliminated.

    The motion is a rotation about the camera's axes, applied before the translation, and the translation.

    Args:
        cameras: of F frames.
        landmarks: (3, T) the points.
        seen: (F, 5, T) sights of them.
        cutoff: a point's mean square beyond which its weight decreases.

    Returns:
        The matrix (6, 6) and the right side (6,) of the equations; the steps (3, T) of the points without the motion;
        their derivatives (3, 6, T) by the motion. The joint step of the points is the step minus the derivatives times
        the motion's step.
    """
    if compiled.available() and seen.dtype == np.float32:
        return compiled.motion_equations(cameras, landmarks, seen, cutoff)
    normal = _Normal.of(cameras, landmarks, seen)
    return normal.of_motion(1 / (1 + normal.squares / (cutoff * _freedom(seen))) ** 2)


def _observed(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask (F, 1, T) of the observed sights (F, 5, T), and the rays and whitening factors, 0 where unknown."""
    observed = np.isfinite(seen[:, :1])
    parts = np.where(observed, seen, 0.0)
    return observed, parts[:, :2], parts[:, 2:]


def _whitened(factors: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Residuals (..., 2, T) of x/z and y/z, whitened by factors (..., 3, T)."""
    x, y = residuals[..., 0, :], residuals[..., 1, :]
    return np.stack([factors[..., 0, :] * x, factors[..., 1, :] * x + factors[..., 2, :] * y], axis=-2)


def _freedom(seen: np.ndarray) -> np.ndarray:
    """(T,) degrees of freedom of the residuals of sights (F, 5, T), for one point each."""
    return np.asarray(2 * np.isfinite(seen[:, 0]).sum(axis=0) - 3)


@cache
def _quantiles(above: float) -> np.ndarray:
    """Quantiles of chi-square with the probability `above` of larger values, for each number of degrees of freedom."""
    return np.asarray(chdtri(np.arange(2 * (FRAMES + 1)), above))


def _landmarks(window: Window, seen: np.ndarray, noise: float) -> np.ndarray | None:
    """Landmarks (3, T) of sights (F, 5, T), with the median depth as prior; None if no depth is known.

    If the camera only turned or stood still, its positions differ by noise alone.
    """
    (_, _, inverse), information = triangulate(window, seen)
    middle = _median(inverse, information)
    if not middle * np.sqrt(information.sum()) > _SIGNIFICANT * noise:
        return None
    return triangulate(window, seen, prior=middle, prior_information=(noise / middle) ** 2)[0]


def _length(landmarks: np.ndarray, seen: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> float | None:
    """Factor on the translation to a camera with sights (5, T), from the landmarks' depths; None if not positive."""
    x, y, inverse = landmarks
    turned, rays, factors = rotation @ np.stack([x, y, np.ones_like(x)]), seen[:2], seen[2:]
    along = _whitened(factors, translation[:2, None] - rays * translation[2])
    numerators = (_whitened(factors, rays * turned[2] - turned[:2]) * along).sum(axis=0)
    denominators = (along * along).sum(axis=0) * inverse
    weights = np.abs(denominators)
    scale = _median(numerators / np.where(weights > TINY, denominators, np.inf), weights)
    return scale if scale > 0 else None


def _median(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted median of values (N,) with weights (N,); 0 without values."""
    order = np.argsort(values)
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    return float(values[order[min(middle, len(order) - 1)]]) if len(order) else 0.0


def project(cameras: Window, landmarks: np.ndarray) -> np.ndarray:
    """(2, T) x/z and y/z of landmarks in the last camera; NaN for points behind it."""
    x, y, inverse = landmarks
    seen = cameras.rotations[-1] @ np.stack([x, y, np.ones_like(x)]) + cameras.translations[-1][:, None] * inverse
    ahead = seen[2] > _SMALLEST_DEPTH
    return np.where(ahead, seen[:2] / np.where(ahead, seen[2], 1), np.nan)


class _Normal(NamedTuple):
    """Normal equations of the points, and the terms for those of the last camera."""

    squares: np.ndarray  # (T,) squared residuals
    inverse: np.ndarray  # (3, 3, T) inverses of the points' own matrices
    gradient: np.ndarray  # (3, T)
    residuals: np.ndarray  # (2, T) in the last camera, whitened
    jacobian: np.ndarray  # (2, 3, T) of these by the points
    factors: np.ndarray  # (3, T) whitening factors of the last camera
    turned: np.ndarray  # (3, T) the points' rays in the last camera's axes
    where: np.ndarray  # (2, T) positions in the last camera
    nearness: np.ndarray  # (T,) depth in the reference over depth in the last camera; 0 if not seen
    inverse_depth: np.ndarray  # (T,)

    @classmethod
    def of(cls, cameras: Window, landmarks: np.ndarray, seen: np.ndarray) -> _Normal:
        """The equations of sights (F, 5, T) of landmarks (3, T)."""
        observed, given, factors = _observed(seen)
        cameras, (x, y, inverse) = cameras.like(seen), landmarks
        turned = cameras.rotations @ np.stack([x, y, np.ones_like(x)])  # (F, 3, T)
        moved = turned + cameras.translations[:, :, None] * inverse
        depth = np.maximum(moved[:, 2:], _SMALLEST_DEPTH)
        where = moved[:, :2] / depth
        residuals = _whitened(factors, (where - given) * observed)
        nearness = observed / depth  # (F, 1, T)
        directions = [*cameras.rotations[:, :, :2].transpose(2, 0, 1), cameras.translations]
        jacobian = [
            _whitened(factors, (each[:, :2, None] - where * each[:, 2:, None]) * nearness) for each in directions
        ]
        normal = [[np.einsum("fit,fit->t", one, other) for other in jacobian[i:]] for i, one in enumerate(jacobian)]
        normal[2][0] += _DAMPING
        return cls(
            squares=np.einsum("fit,fit->t", residuals, residuals),
            inverse=_inverse(*normal[0], *normal[1], *normal[2]),
            gradient=np.stack([np.einsum("fit,fit->t", each, residuals) for each in jacobian]),
            residuals=residuals[-1],
            jacobian=np.stack([each[-1] for each in jacobian], axis=1),
            factors=factors[-1],
            turned=turned[-1],
            where=where[-1],
            nearness=nearness[-1, 0],
            inverse_depth=inverse,
        )

    def of_motion(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The result of :func:`motion_equations`, with weights (T,) of the points."""
        # A point fitted behind a camera has no inverse matrix, and no weight for the motion.
        weights = weights * (self.inverse[0, 0] > 0)
        x, y, z = self.turned
        none, inverse = np.zeros_like(x), self.inverse_depth
        moves = np.array(
            [
                [none, z, -y, inverse, none, none],
                [-z, none, x, none, inverse, none],
                [y, -x, none, none, none, inverse],
            ]
        )
        motion_jacobian = (moves[:2] - self.where[:, None] * moves[2]) * self.nearness  # (2, 6, T)
        motion_jacobian = _whitened(self.factors, motion_jacobian.transpose(1, 0, 2)).transpose(1, 0, 2)
        mixed = np.einsum("iat,ict->act", self.jacobian, motion_jacobian)
        coupling = np.einsum("abt,bct->act", self.inverse, mixed)
        weighted_coupling, weighted = coupling * weights, motion_jacobian * weights
        # The Schur complement of the points.
        hessian = np.einsum("ict,idt->cd", motion_jacobian, weighted)
        hessian -= np.einsum("act,adt->cd", mixed, weighted_coupling)
        gradient = np.einsum("ict,it->c", weighted, self.residuals)
        gradient -= np.einsum("act,at->c", weighted_coupling, self.gradient)
        return hessian, gradient, self.points_step(self.gradient), coupling

    def points_step(self, gradient: np.ndarray) -> np.ndarray:
        """(3, T) Gauss-Newton step of the points, from the gradient (3, T) of half the squares."""
        return -np.einsum("abt,bt->at", self.inverse, gradient)


def _inverse(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, e: np.ndarray, f: np.ndarray) -> np.ndarray:
    """(3, 3, T) inverses of symmetric positive matrices with upper triangles (a, b, c), (d, e) and (f), each (T,).

    The inverse is zero if rounding dominates the determinant.
    """
    adjoint = np.array(
        [
            [d * f - e * e, c * e - b * f, b * e - c * d],
            [c * e - b * f, a * f - c * c, b * c - a * e],
            [b * e - c * d, b * c - a * e, a * d - b * b],
        ]
    )
    determinant = a * adjoint[0, 0] + b * adjoint[0, 1] + c * adjoint[0, 2]
    regular = determinant > _ROUNDING * a * d * f
    return np.where(regular, adjoint / np.where(regular, determinant, 1), 0)
