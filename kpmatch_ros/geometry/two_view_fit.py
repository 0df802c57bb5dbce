"""M-estimates of the motion of two views: the minimum of the loss, and its covariance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY, tukey, tukey_cutoff
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    differentiate,
    epipolar_gradient,
    lengths,
)

__all__ = ["SETTLED", "Noise", "minimise", "motion_covariance", "rotation_covariance"]

_STEP = 1e-6  # radians: by differences of the gradient over it, the Hessian

_LARGEST_VARIANCE = math.pi**2  # of an unknown angle
SETTLED = 5e-7
"""Part of the cost that a further step of the minimisation gains at most."""


class Noise(NamedTuple):
    """The keypoints' noise, as far as it is known.

    Attributes:
        inlier_threshold: largest residual of an inlier, pixels.
        resolution: pixels between neighbouring positions that the detector can give.
        design_effect: factor on the variance of an estimate, for matches that err together.
    """

    inlier_threshold: float
    resolution: float
    design_effect: float = 1.0


def minimise(
    model: Model,
    matches: Matches,
    motion: Motion,
    cutoff: float,
    iterations: int,
    settled: float = SETTLED,
    used: np.ndarray | None = None,
) -> Motion:
    """Levenberg-Marquardt on Tukey's loss of the residuals' lengths; those beyond the cutoff (pixels) count nothing.

    It ends after so many iterations, or where a step promises to gain less than the part `settled` of the cost.

    Args:
        model: of the residuals.
        matches: n of them.
        motion: where to start.
        cutoff: of the loss, pixels.
        iterations: at most.
        settled: a part of the cost.
        used: (n,) bool, the matches that count; all where not given.
    """
    if compiled.available():
        return Motion(*compiled.minimise(model, matches.columns, *motion, cutoff, iterations, settled, used))
    # A change here is one of src/two_view.c, too.
    damping = 1e-4
    residuals, jacobian = differentiate(model, matches, motion)
    count = np.ones(len(matches)) if used is None else used.astype(np.float64)
    weights, cost = tukey(lengths(residuals) * count, cutoff)
    size = len(jacobian)
    for _ in range(iterations):
        weighted = (jacobian * (weights * count)).reshape(size, -1)
        hessian = weighted @ jacobian.reshape(size, -1).T
        gradient = weighted @ residuals.ravel()
        # The second term keeps the system regular where the matches leave a direction free.
        diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + TINY
        for _ in range(6):
            step = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
            if -gradient @ step < 2 * settled * cost:
                return motion
            trial = motion.moved(step)
            trial_residuals, trial_jacobian = differentiate(model, matches, trial)
            trial_weights, trial_cost = tukey(lengths(trial_residuals) * count, cutoff)
            if trial_cost < cost:
                break
            damping *= 10
        else:
            return motion
        motion, residuals, jacobian, weights, cost = trial, trial_residuals, trial_jacobian, trial_weights, trial_cost
        damping = max(damping / 10, 1e-9)
    return motion


def motion_covariance(matches: Matches, motion: Motion, noise: Noise) -> np.ndarray:
    """Covariance (5, 5) of a motion with translation, by the numbers of Motion.moved, from the matches it came from."""
    return _covariance(Model.EPIPOLAR, matches, motion, noise)


def rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """Covariance (3, 3) of a rotation without translation, from the matches it came from."""
    return _covariance(Model.ROTATION, matches, Motion(rotation, np.zeros(3)), noise)


def _hessian(model: Model, matches: Matches, motion: Motion, cutoff: float) -> np.ndarray:
    """Second derivatives (p, p) of half of Tukey's loss, by differences of the gradient."""
    if compiled.available():
        return compiled.hessian(model, matches.columns, *motion, cutoff, _STEP)
    start = _gradient(model, matches, motion, cutoff)
    steps = _STEP * np.eye(len(start))
    hessian = np.array([_gradient(model, matches, motion.moved(step), cutoff) - start for step in steps]) / _STEP
    return np.asarray((hessian + hessian.T) / 2)


def _gradient(model: Model, matches: Matches, motion: Motion, cutoff: float) -> np.ndarray:
    if model is Model.EPIPOLAR:
        return epipolar_gradient(matches, motion, cutoff)
    residuals, jacobian = differentiate(model, matches, motion)
    pulls = residuals * tukey(lengths(residuals), cutoff)[0]
    return np.asarray(jacobian.reshape(len(jacobian), -1) @ pulls.ravel())


def _covariance(model: Model, matches: Matches, motion: Motion, noise: Noise) -> np.ndarray:
    """Covariance (p, p) of an M-estimate with Tukey's loss: H^-1 G H^-1 (Huber, Robust Statistics).

    H is the loss's whole Hessian, G its gradient's covariance. The Gauss-Newton part of H takes noise along the
    epipolar lines for parallax: it is many times too sure of the pose where the parallax is small or the epipole in the
    image.
    """
    residuals, jacobian = differentiate(model, matches, motion)
    cutoff = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution)
    hessian = _hessian(model, matches, motion, cutoff)
    size = len(jacobian)
    sizes = lengths(residuals)
    used = sizes < cutoff
    influences = (residuals * tukey(sizes, cutoff)[0])[:, used]
    variance = float((influences**2).sum()) / max(influences.size - size, 1)
    flat = jacobian[:, :, used].reshape(size, -1)
    information, axes = np.linalg.eigh(flat @ flat.T)
    floor = max(variance, noise.resolution**2 / 12) / _LARGEST_VARIANCE
    axes = axes / np.sqrt(np.maximum(information, max(floor, TINY)))
    # In these axes the Gauss-Newton Hessian is the identity, and the whole one not far from it.
    curvatures, turn = np.linalg.eigh(axes.T @ hessian @ axes)
    curvatures = np.maximum(curvatures, SMALLEST_CURVATURE)
    variance = max(variance, float(curvatures.mean()) ** 2 * noise.resolution**2 / 12)  # the second: of rounding
    axes = axes @ turn / curvatures
    variances, axes = np.linalg.eigh(noise.design_effect * variance * axes @ axes.T)
    return (axes * np.clip(variances, 0, _LARGEST_VARIANCE)) @ axes.T
