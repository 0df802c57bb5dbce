"""Fit of the motion of a stereo camera to points of two frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import cv2
import numpy as np

from kpmatch_ros.geometry.camera import BEHIND
from kpmatch_ros.geometry.robust import TINY, TUKEY, tukey_cost
from kpmatch_ros.geometry.stereo_errors import StereoPoints, StereoResiduals, stereo_residuals

__all__ = ["SEARCH_THRESHOLD", "SETTLED", "Fit", "FramePair", "Start", "normal_equations"]

SEARCH_THRESHOLD = 3.0
"""Threshold of the search, in inlier thresholds: a point of uncertain depth may be projected this far off."""

_ROUGHLY, SETTLED = 1e-3, 1e-6  # expected relative decrease of the cost below which the minimisation ends

_MEDIANS = np.array([1.0, 0.4549, 1.3863, 2.3660, 3.3567, 4.3515])  # of chi-square, for 0 (unused) to 5 conditions
_TUKEY_STEP = 4.0  # variances: each condition after the first adds this to the squared cutoff, TUKEY**2

_SAMPLE = 200  # largest number of points that the search uses

_FAR = 0.5  # part of the points with a disparity below the threshold: if more are, one more start is tried
_EXPLAINED = 0.5  # part of the points: if a start explains more, no other start is tried

Start = tuple[np.ndarray, np.ndarray]
"""Rotation and translation."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A motion, x_ref = rotation x_cur + translation, and its residuals."""

    rotation: np.ndarray
    translation: np.ndarray
    residuals: StereoResiduals
    cutoffs: np.ndarray  # (n,) cutoffs of Tukey's loss, squared pixels
    cost: float


@dataclass(frozen=True, eq=False)
class FramePair:
    """The points with a depth in at least one of two frames.

    Attributes:
        source: the points in the reference frame if they have a depth there, `forward` of them; followed by the points
            in the current frame that have a depth there only.
        target: the same points in the other frame.
        forward: number of points whose source is the reference frame.
        order: (n,) indices of these points among the points of both frames.
        conditions: (n,) number of measurements of a point in excess of its three coordinates: 3 or 5.
    """

    source: StereoPoints
    target: StereoPoints
    forward: int
    order: np.ndarray
    conditions: np.ndarray

    @classmethod
    def of(cls, reference: StereoPoints, current: StereoPoints) -> FramePair:
        """The pair from the same points in two frames."""
        forward = np.flatnonzero(reference.has_depth)
        backward = np.flatnonzero(current.has_depth & ~reference.has_depth)
        source = reference.select(forward).joined(current.select(backward))
        target = current.select(forward).joined(reference.select(backward))
        return cls(source, target, len(forward), np.concatenate([forward, backward]), 3 + 2 * target.has_depth)

    @cached_property
    def sample(self) -> FramePair:
        """_SAMPLE random points, always the same ones."""
        if len(self.order) <= _SAMPLE:
            return self
        chosen = np.sort(np.random.default_rng(0).permutation(len(self.order))[:_SAMPLE])
        forward = int((chosen < self.forward).sum())
        source, target = self.source.select(chosen), self.target.select(chosen)
        return FramePair(source, target, forward, self.order[chosen], self.conditions[chosen])

    def evaluate(self, rotation: np.ndarray, translation: np.ndarray, cutoffs: np.ndarray) -> Fit:
        """The residuals of a motion."""
        residuals = stereo_residuals(self.source, self.target, self.forward, rotation, translation)
        return Fit(rotation, translation, residuals, cutoffs, tukey_cost(residuals.squares, cutoffs))

    def fit(self, starts: list[Start], inlier_threshold: float, resolution: float) -> Fit:
        """The best start, refined with the noise estimated from its residuals."""
        sample = self.sample
        wide = _cutoffs(sample.conditions, inlier_threshold * SEARCH_THRESHOLD / TUKEY)
        fits: list[Fit] = []
        for start in starts:
            fits.append(sample.minimise(sample.evaluate(*start, wide), 4, _ROUGHLY))
            if (fits[-1].residuals.squares < wide).mean() > _EXPLAINED:
                break
        if sample.source.is_distant(inlier_threshold).mean() > _FAR:
            # RANSAC returns a translation of any length. From a long one, the steps towards the correct one are short.
            turned = sample.evaluate(min(fits, key=lambda fit: fit.cost).rotation, np.zeros(3), wide)
            turned = sample.minimise(turned, 4, _ROUGHLY, rotation_only=True)
            fits.append(sample.minimise(turned, 8, _ROUGHLY))
        fit = min(fits, key=lambda fit: fit.cost)
        before = sample
        for pair, settled in ((sample, _ROUGHLY), (self, _ROUGHLY), (self, SETTLED)):
            if pair is not before:
                fit = pair.evaluate(fit.rotation, fit.translation, np.ones(len(pair.order)))
            before = pair
            cutoffs = _cutoffs(pair.conditions, pair.noise(fit.residuals.squares, inlier_threshold, resolution))
            fit = pair.minimise(
                replace(fit, cutoffs=cutoffs, cost=tukey_cost(fit.residuals.squares, cutoffs)), 10, settled
            )
        return fit

    def noise(self, squares: np.ndarray, inlier_threshold: float, resolution: float) -> float:
        """Standard deviation of a keypoint's coordinate, pixels, from the residuals, or from rounding if larger."""
        near = squares < 4 * inlier_threshold**2 * self.conditions
        noise = (
            math.sqrt(np.median(squares[near] / _MEDIANS[self.conditions[near]])) if near.any() else inlier_threshold
        )
        return max(noise, resolution / math.sqrt(12), 1e-9)

    def minimise(self, fit: Fit, iterations: int, settled: float, rotation_only: bool = False) -> Fit:
        """Levenberg-Marquardt on Tukey's loss, by the motion or by its rotation only."""
        free = slice(3, 6) if rotation_only else slice(0, 6)
        damping = 1e-4
        for _ in range(iterations):
            weights = np.maximum(1 - fit.residuals.squares / fit.cutoffs, 0) ** 2
            hessian, gradient = normal_equations(fit.residuals, weights)
            hessian, gradient = hessian[free, free], gradient[free]
            diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + TINY
            for _ in range(6):
                step = np.zeros(6)
                step[free] = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
                if -gradient @ step[free] < settled * fit.cost:
                    return fit
                trial = self.evaluate(
                    cv2.Rodrigues(step[3:].reshape(3, 1))[0] @ fit.rotation, fit.translation + step[:3], fit.cutoffs
                )
                if trial.cost < fit.cost:
                    break
                damping *= 10
            else:
                return fit
            fit, damping = trial, max(damping / 10, 1e-9)
        return fit

    def agrees(self, fit: Fit, inlier_threshold: float) -> np.ndarray:
        """Mask (n,) of points within the threshold (pixels) in every image, in front or with an uncertain depth."""
        found = fit.residuals
        distances = [self.source.distances(found.points), self.target.distances(found.targets)]
        near = np.asarray((found.squares < BEHIND) & (np.max(distances, axis=(0, 1)) < inlier_threshold))
        doubtful = np.flatnonzero(near & (found.points[2] <= 0))
        if len(doubtful):
            # Seen from both frames, does the point move by less than the threshold if it is at infinity?
            far = found.points[:, doubtful]
            far[2] = 1.0
            turned = np.where(doubtful < self.forward, fit.rotation.T @ far, fit.rotation @ far)
            target = self.target.select(doubtful)
            moved = turned[:2] / np.maximum(turned[2], TINY) + target.rays - found.targets[:2, doubtful]
            near[doubtful] = self.source.select(doubtful).is_distant(inlier_threshold) & (
                target.distances(np.concatenate([moved, target.points[2:]]))[0] < inlier_threshold
            )
        return near


def normal_equations(residuals: StereoResiduals, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Gauss-Newton Hessian (6, 6) and the gradient (6,)."""
    weighted = (residuals.jacobian * weights).reshape(6, -1)
    return weighted @ residuals.jacobian.reshape(6, -1).T, weighted @ residuals.whitened.ravel()


def _cutoffs(conditions: np.ndarray, noise: float) -> np.ndarray:
    """Cutoffs of Tukey's loss, squared pixels, for points with these numbers of conditions."""
    return noise**2 * (TUKEY**2 + _TUKEY_STEP * (conditions - 1))
