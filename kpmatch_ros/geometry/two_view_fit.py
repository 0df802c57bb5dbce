"""M-estimates of the motion of two views: the minimum of the loss, and its covariance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry.robust import SMALLEST_CURVATURE, TINY, tukey, tukey_cutoff
from kpmatch_ros.geometry.two_view_errors import Matches, Model, Motion, lengths

__all__ = ["Noise", "covariance_of", "minimise"]

_LARGEST_VARIANCE = math.pi**2  # of an unknown angle
_SETTLED = 1e-6  # part of the cost


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


def minimise(model: Model, matches: Matches, motion: Motion, cutoff: float, iterations: int) -> Motion:
    """Levenberg-Marquardt on Tukey's loss of the residuals' lengths; those beyond the cutoff (pixels) count nothing."""
    damping = 1e-4
    residuals, jacobian = model(matches, motion)
    weights, cost = tukey(lengths(residuals), cutoff)
    for _ in range(iterations):
        weighted = jacobian * weights[:, None, None]
        size = jacobian.shape[2]
        hessian = weighted.reshape(-1, size).T @ jacobian.reshape(-1, size)
        gradient = weighted.reshape(-1, size).T @ residuals.ravel()
        # The second term keeps the system regular where the matches leave a direction free.
        diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + TINY
        for _ in range(6):
            step = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
            if -gradient @ step < _SETTLED * cost:  # twice what it promises to gain
                return motion
            trial = motion.moved(step)
            trial_residuals, trial_jacobian = model(matches, trial)
            trial_weights, trial_cost = tukey(lengths(trial_residuals), cutoff)
            if trial_cost < cost:
                break
            damping *= 10
        else:
            return motion
        motion, residuals, jacobian, weights, cost = trial, trial_residuals, trial_jacobian, trial_weights, trial_cost
        damping = max(damping / 10, 1e-9)
    return motion


def covariance_of(model: Model, matches: Matches, motion: Motion, noise: Noise) -> np.ndarray:
    """Covariance (p, p) of an M-estimate with Tukey's loss: H^-1 G H^-1 (Huber, Robust Statistics).

    H is the loss's whole Hessian, G its gradient's covariance. The Gauss-Newton part of H takes noise along the
    epipolar lines for parallax: it is many times too sure of the pose where the parallax is small or the epipole in the
    image.
    """
    residuals, jacobian = model(matches, motion)
    size = jacobian.shape[2]
    cutoff = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution)

    def gradient(motion: Motion) -> np.ndarray:
        residuals, jacobian = model(matches, motion)
        return np.einsum("nd,ndp->p", residuals * tukey(lengths(residuals), cutoff)[0][:, None], jacobian)

    offsets = 1e-5 * np.eye(size)
    hessian = np.array([gradient(motion.moved(step)) - gradient(motion.moved(-step)) for step in offsets]) / 2e-5
    hessian = (hessian + hessian.T) / 2

    sizes = lengths(residuals)
    used = sizes < cutoff
    influences = (residuals * tukey(sizes, cutoff)[0][:, None])[used]
    variance = float((influences**2).sum()) / max(influences.size - size, 1)
    flat = jacobian[used].reshape(-1, size)
    information, axes = np.linalg.eigh(flat.T @ flat)
    floor = max(variance, noise.resolution**2 / 12) / _LARGEST_VARIANCE
    axes = axes / np.sqrt(np.maximum(information, max(floor, TINY)))
    # In these axes the Gauss-Newton Hessian is the identity, and the whole one not far from it.
    curvatures, turn = np.linalg.eigh(axes.T @ hessian @ axes)
    curvatures = np.maximum(curvatures, SMALLEST_CURVATURE)
    variance = max(variance, float(curvatures.mean()) ** 2 * noise.resolution**2 / 12)  # the second: of rounding
    axes = axes @ turn / curvatures
    variances, axes = np.linalg.eigh(noise.design_effect * variance * axes @ axes.T)
    return (axes * np.clip(variances, 0, _LARGEST_VARIANCE)) @ axes.T
