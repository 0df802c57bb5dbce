"""Points seen in several frames: where one point of a scene that stands still would be, and how badly it explains them.

Two frames tell how far a place is from an epipolar line. What slides along an outline, or shows two surfaces, is often
near to it. Over more frames the places must be those of one point at one depth: two numbers a frame for three unknowns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
from scipy.stats import chi2

from kpmatch_ros.geometry.robust import TINY

__all__ = ["FRAMES", "Structure", "Window", "project", "triangulate"]

FRAMES = 8
"""Most frames that are looked back at."""

_ITERATIONS = 3
_SMALLEST_DEPTH = 1e-3  # of a direction's length
_DAMPING = 1e-9  # of an inverse depth
_CUTOFF = float(chi2.isf(1e-2, 1))  # of a point's mean square, beyond which it has less to say of the motion
_ENOUGH = 250  # points that the motion is fitted to, at least where there are as many
_FEWEST = 8  # points that tell the length of a translation


class Window(NamedTuple):
    """Where F cameras were: x_frame = rotation x_reference + translation. The last one is the reference itself.

    Lengths are in units of the first translation where that has no metres.
    """

    rotations: np.ndarray  # (F, 3, 3)
    translations: np.ndarray  # (F, 3)

    @classmethod
    def start(cls) -> Window:
        """The reference alone."""
        return cls(np.eye(3)[None], np.zeros((1, 3)))

    def join(self, rotation: np.ndarray, translation: np.ndarray) -> Window:
        """With one more camera, still seen from the same one."""
        return Window(
            np.concatenate([self.rotations, rotation[None]]), np.concatenate([self.translations, translation[None]])
        )

    def advance(self) -> Window:
        """Seen from the last camera, without those that are too long ago."""
        turned = self.rotations @ self.rotations[-1].T
        moved = self.translations - turned @ self.translations[-1]
        return Window(turned[-FRAMES:], moved[-FRAMES:])

    def __len__(self) -> int:
        return len(self.rotations)


@dataclass(frozen=True, eq=False)
class Structure:
    """T points, and the cameras that saw them.

    Attributes:
        cameras: of F frames; the last but one is the reference, the last one the current frame.
        spots: (3, T) x/z, y/z and 1/z in the reference's frame.
        squares: (T,) sums of the squared residuals of all frames.
        freedom: (T,) degrees of freedom of these sums.
        noise: standard deviation of a ray's coordinate.
    """

    cameras: Window
    spots: np.ndarray
    squares: np.ndarray
    freedom: np.ndarray
    noise: float

    @classmethod
    def of(cls, window: Window, rays: np.ndarray, motion: tuple[np.ndarray, np.ndarray], noise: float) -> Structure:
        """Fit the points, and once more the motion from the reference to the current camera, to all frames.

        Points that do not agree have little to say of the motion. Where most points speak for larger noise, as with a
        calibration that is not exact, the noise is larger.

        Args:
            window: where the cameras were, the reference last: F - 1 of them.
            rays: (F, 2, T) x/z and y/z where the points were seen, NaN where they were not; the last two are known.
            motion: rotation (3, 3) and translation (3,) of the current camera in the reference's frame. The translation
                may have any length.
            noise: least standard deviation of a ray's coordinate.
        """
        rotation, translation = motion[0].T, -motion[0].T @ motion[1]
        past = triangulate(window, rays[:-1])
        translation = translation * _length(past, rays, rotation, translation)
        cameras = window.join(rotation, translation)
        part = rays[:, :, :: 1 + rays.shape[2] // _ENOUGH]
        spots = triangulate(cameras, part, reference=-2)
        freedom = 2 * np.isfinite(part[:, 0]).sum(axis=0) - 3
        for _ in range(_ITERATIONS):
            normal = _Normal.of(cameras, spots, part)
            mean = normal.squares / (noise * noise * freedom)
            step = normal.camera_step(1 / (1 + mean / _CUTOFF) ** 2)
            spots = spots + normal.points_step(step)
            rotation = cv2.Rodrigues(step[:3].reshape(3, 1))[0] @ rotation
            translation = translation + step[3:]
            cameras = window.join(rotation, translation)
        found = cls(cameras, spots, normal.squares, freedom, noise).place(triangulate(cameras, rays, -2), rays)
        long = found.freedom > 1
        if long.any():
            relative = found.squares[long] / chi2.median(found.freedom[long])
            found = replace(found, noise=max(noise, float(np.sqrt(np.median(relative)))))
        return found

    def place(self, spots: np.ndarray, rays: np.ndarray) -> Structure:
        """Other points, which are near spots (3, S), fitted to rays (F, 2, S) of the same cameras."""
        spots = spots + _Normal.of(self.cameras, spots, rays).points_step(np.zeros(6))
        squares = _Normal.of(self.cameras, spots, rays).squares
        return replace(self, spots=spots, squares=squares, freedom=2 * np.isfinite(rays[:, 0]).sum(axis=0) - 3)

    def select(self, chosen: np.ndarray) -> Structure:
        """The points that a mask (T,) names."""
        parts = {name: getattr(self, name)[..., chosen] for name in ("spots", "squares", "freedom")}
        return replace(self, **parts)

    def contradicts(self, false_alarms: float) -> np.ndarray:
        """(T,) bool which tracks no point explains: of those that one does, this is said of so large a part."""
        return np.asarray(self.squares > self.noise**2 * chi2.isf(false_alarms, self.freedom))


def triangulate(
    cameras: Window,
    rays: np.ndarray,
    reference: int = -1,
    prior: np.ndarray | float = 0.0,
    information: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Where points are by least squares of their depth: (3, T) x/z, y/z and 1/z in the reference's frame.

    Args:
        cameras: of F frames.
        rays: (F, 2, T) where the points were seen, NaN where they were not; that of the reference is known.
        reference: which of the frames it is.
        prior: (T,) expected 1/z.
        information: (T,) the noise's variance over that of the expected 1/z.
    """
    x, y = rays[reference]
    turned = cameras.rotations @ np.stack([x, y, np.ones_like(x)])
    along = cameras.translations[:, :2, None] - rays * cameras.translations[:, 2:, None]
    apart = rays * turned[:, 2:] - turned[:, :2]
    top, bottom = np.nansum(along * apart, axis=(0, 1)), np.nansum(along * along, axis=(0, 1))
    return np.stack([x, y, (top + prior * information) / np.maximum(bottom + information, TINY)])


def _length(spots: np.ndarray, rays: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> float:
    """How many times as long as given the translation is, by the spots (3, T) whose depth is known."""
    deep = np.isfinite(rays[:-2, 0]).any(axis=0)
    x, y, inverse = spots
    turned = rotation @ np.stack([x, y, np.ones_like(x)])
    along = translation[:2, None] - rays[-1] * translation[2]
    wanted = ((rays[-1] * turned[2] - turned[:2]) * along).sum(axis=0)[deep]
    given = ((along * along).sum(axis=0) * inverse)[deep]
    weights = np.abs(given)
    if len(given) < _FEWEST or weights.sum() < TINY:
        return 1.0
    ratios = wanted / np.where(weights > TINY, given, np.inf)
    order = np.argsort(ratios)
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    scale = float(ratios[order[min(middle, len(order) - 1)]])
    return scale if scale > 0 else 1.0


def project(cameras: Window, spots: np.ndarray) -> np.ndarray:
    """(2, T) x/z and y/z of spots in the last camera; NaN behind it."""
    x, y, inverse = spots
    seen = cameras.rotations[-1] @ np.stack([x, y, np.ones_like(x)]) + cameras.translations[-1][:, None] * inverse
    ahead = seen[2] > _SMALLEST_DEPTH
    return np.where(ahead, seen[:2] / np.where(ahead, seen[2], 1), np.nan)


class _Normal(NamedTuple):
    """Normal equations of the points, of the last camera, and of both."""

    squares: np.ndarray  # (T,) squared residuals
    inverse: np.ndarray  # (3, 3, T) of the points' own
    gradient: np.ndarray  # (3, T)
    mixed: np.ndarray  # (3, 6, T)
    camera: np.ndarray  # (6, 6, T)
    slope: np.ndarray  # (6, T)

    @classmethod
    def of(cls, cameras: Window, spots: np.ndarray, rays: np.ndarray) -> _Normal:
        """Of rays (F, 2, T) of spots (3, T)."""
        known = np.isfinite(rays[:, 0])
        x, y, inverse = spots
        turned = cameras.rotations @ np.stack([x, y, np.ones_like(x)])  # (F, 3, T)
        seen = turned + cameras.translations[:, :, None] * inverse
        depth = np.maximum(seen[:, 2], _SMALLEST_DEPTH)
        where = seen[:, :2] / depth[:, None]
        residuals = np.where(known[:, None], where - rays, 0)
        nearness = known / depth  # (F, T)
        changes = np.concatenate([cameras.rotations[:, :, :2], cameras.translations[:, :, None]], axis=2)
        jacobian = (changes[:, :2, :, None] - where[:, :, None] * changes[:, 2:, :, None]) * nearness[:, None, None]
        normal = np.einsum("fiat,fibt->abt", jacobian, jacobian)
        normal[2, 2] += _DAMPING
        # The last camera's: a turn about its axes before the translation, and the translation.
        x, y, z = turned[-1]
        none = np.zeros_like(x)
        moves = np.array(
            [
                [none, z, -y, inverse, none, none],
                [-z, none, x, none, inverse, none],
                [y, -x, none, none, none, inverse],
            ]
        )
        last = (moves[:2] - where[-1][:, None] * moves[2]) * nearness[-1]
        return cls(
            squares=(residuals * residuals).sum(axis=(0, 1)),
            inverse=_inverse(normal),
            gradient=np.einsum("fiat,fit->at", jacobian, residuals),
            mixed=np.einsum("iat,ict->act", jacobian[-1], last),
            camera=np.einsum("iat,ict->act", last, last),
            slope=np.einsum("iat,it->at", last, residuals[-1]),
        )

    def camera_step(self, weights: np.ndarray) -> np.ndarray:
        """(6,) Gauss-Newton step of the last camera, while all points follow; by weights (T,) of the points."""
        carried = np.einsum("abt,bct->act", self.inverse, self.mixed)
        whole = self.camera @ weights - np.einsum("act,adt,t->cd", self.mixed, carried, weights)
        slope = self.slope @ weights - np.einsum("act,at,t->c", carried, self.gradient, weights)
        return np.asarray(-np.linalg.lstsq(whole, slope, rcond=1e-9)[0])

    def points_step(self, camera_step: np.ndarray) -> np.ndarray:
        """(3, T) Gauss-Newton step of the points, if the last camera makes a step (6,)."""
        slope = self.gradient + np.einsum("act,c->at", self.mixed, camera_step)
        return -np.einsum("abt,bt->at", self.inverse, slope)


def _inverse(matrices: np.ndarray) -> np.ndarray:
    """Of symmetric matrices (3, 3, T)."""
    (a, b, c), (_, d, e), (_, _, f) = matrices
    adjoint = np.array(
        [
            [d * f - e * e, c * e - b * f, b * e - c * d],
            [c * e - b * f, a * f - c * c, b * c - a * e],
            [b * e - c * d, b * c - a * e, a * d - b * b],
        ]
    )
    determinant = a * adjoint[0, 0] + b * adjoint[0, 1] + c * adjoint[0, 2]
    return np.asarray(adjoint / np.maximum(determinant, TINY))
