"""M-estimates of the motion of two views, with their covariances."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.robust import TINY, tukey, tukey_cutoff
from kpmatch_ros.geometry.sandwich import jackknifed, student_factor, whitening_axes
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    differentiate,
    epipolar_gradient,
    lengths,
)

__all__ = ["SETTLED", "Covariances", "Noise", "minimise", "motion_covariances", "rotation_covariance"]

_STEP = 5e-4  # pixels, step of the gradient's differences for the Hessian; it must be below the noise

_LARGEST_VARIANCE = math.pi**2  # of an unknown angle

_SQUARE = 32  # pixels: closer matches share errors, because a patch has a side of 13 pixels
_EQUAL_ERRORS_WEIGHT = 20  # squares: weight of the covariance under equal and independent errors

SETTLED = 1e-6
"""Expected relative decrease of the cost below which the minimisation ends."""


class Noise(NamedTuple):
    """The noise of the keypoints.

    Attributes:
        inlier_threshold: largest residual of an inlier, pixels.
        resolution: pixels between neighbouring positions that the detector can report.
        design_effect: factor on the variance of an estimate, for errors that matches share.
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
    """Levenberg-Marquardt on Tukey's loss of the residuals' lengths; residuals beyond the cutoff have no weight.

    It ends after `iterations`, or if a step is expected to decrease the cost by less than the part `settled`.

    Args:
        model: of the residuals.
        matches: n matches.
        motion: the start.
        cutoff: of the loss, pixels.
        iterations: largest number of iterations.
        settled: a part of the cost.
        used: (n,) bool, the matches that count; None for all.
    """
    if compiled.available():
        return Motion(*compiled.minimise(model, matches.columns, *motion, cutoff, iterations, settled, used))
    # Keep this equal to src/two_view.c.
    damping = 1e-4
    residuals, jacobian = differentiate(model, matches, motion)
    count = np.ones(len(matches)) if used is None else used.astype(np.float64)
    weights, cost = tukey(lengths(residuals) * count, cutoff)
    size = len(jacobian)
    for _ in range(iterations):
        weighted = (jacobian * (weights * count)).reshape(size, -1)
        hessian = weighted @ jacobian.reshape(size, -1).T
        gradient = weighted @ residuals.ravel()
        # The trace keeps the system regular if the matches do not determine a direction.
        diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + TINY
        for _ in range(6):
            step = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
            if -gradient @ step < settled * cost:
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


class Covariances(NamedTuple):
    """Covariances (p, p) of one estimate.

    Attributes:
        equal_errors: under equal and independent errors of the matches.
        shared_errors: with each match's error from its residual, and errors that neighbours share.
    """

    equal_errors: np.ndarray
    shared_errors: np.ndarray


def motion_covariances(matches: Matches, motion: Motion, noise: Noise) -> Covariances:
    """Covariances (5, 5) of a motion with translation, by the parameters of Motion.moved, from its matches."""
    return _covariances(Model.EPIPOLAR, matches, motion, noise)


def rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """Covariance (3, 3) of a rotation without translation, from its matches."""
    return _covariances(Model.ROTATION, matches, Motion(rotation, np.zeros(3)), noise).shared_errors


def _hessian(model: Model, matches: Matches, motion: Motion, cutoff: float) -> np.ndarray:
    """Second derivatives (p, p) of half of Tukey's loss, from differences of the gradient."""
    length = _STEP / float(np.median(matches.focals)) if len(matches) else _STEP  # radians
    if compiled.available():
        return compiled.hessian(model, matches.columns, *motion, cutoff, length)
    start = _gradient(model, matches, motion, cutoff)
    steps = length * np.eye(len(start))
    hessian = np.array([_gradient(model, matches, motion.moved(step), cutoff) - start for step in steps]) / length
    return np.asarray((hessian + hessian.T) / 2)


def _gradient(model: Model, matches: Matches, motion: Motion, cutoff: float) -> np.ndarray:
    if model is Model.EPIPOLAR:
        return epipolar_gradient(matches, motion, cutoff)
    residuals, jacobian = differentiate(model, matches, motion)
    weighted = residuals * tukey(lengths(residuals), cutoff)[0]
    return np.asarray(jacobian.reshape(len(jacobian), -1) @ weighted.ravel())


def _covariances(model: Model, matches: Matches, motion: Motion, noise: Noise) -> Covariances:
    """Covariances (p, p) of an M-estimate with Tukey's loss, see :mod:`kpmatch_ros.geometry.sandwich`.

    Matches close to each other have the same light, blur and slant, and share errors. Therefore the covariance of the
    gradient is computed from the sum of the gradients in each square of the image.
    """
    residuals, jacobian = differentiate(model, matches, motion)
    cutoff = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution)
    size = len(jacobian)
    sizes = lengths(residuals)
    used = sizes < cutoff
    weights, jacobian = tukey(sizes, cutoff)[0][used], jacobian[:, :, used]
    influences = residuals[:, used] * weights
    observed = float((influences**2).sum()) / max(influences.size - size, 1)  # variance of the noise
    rounding = noise.resolution**2 / 12
    flat = jacobian.reshape(size, -1)
    floor = max(max(observed, rounding) / _LARGEST_VARIANCE, TINY)
    axes, curvatures = whitening_axes(flat @ flat.T, _hessian(model, matches, motion, cutoff), floor)
    curvature = float(curvatures.mean())
    variance = max(observed, curvature**2 * rounding)
    equal_errors = variance * np.eye(size)
    whitened = np.einsum("ij,idn->jdn", axes, jacobian)
    leverage = weights * (whitened**2).sum(axis=(0, 1)) / (len(residuals) * curvature)
    gradients = jackknifed(np.einsum("jdn,dn->jn", whitened, influences), leverage)
    shared_errors, squares = _scatter(gradients, matches.select(used))
    shared_errors += max(variance - observed, 0.0) * np.eye(size)  # rounding errors are independent
    # Few squares give an uncertain covariance.
    shared_errors = (squares * shared_errors + _EQUAL_ERRORS_WEIGHT * equal_errors) / (squares + _EQUAL_ERRORS_WEIGHT)
    axes = noise.design_effect**0.5 * axes / curvatures
    return Covariances(*(_bounded(axes @ scatter @ axes.T) for scatter in (equal_errors, shared_errors)))


def _bounded(covariance: np.ndarray) -> np.ndarray:
    """A covariance (p, p), limited to the variance of an unknown angle in every direction."""
    variances, axes = np.linalg.eigh(covariance)
    return np.asarray((axes * np.clip(variances, 0, _LARGEST_VARIANCE)) @ axes.T)


def _scatter(gradients: np.ndarray, matches: Matches) -> tuple[np.ndarray, float]:
    """Covariance (p, p) of the sum of gradients (p, n), which are similar for neighbours in the reference image.

    It is the sum over squares of the image of the products of their summed gradients (Liang and Zeger, Biometrika
    1986). The mean over four grids of squares, each shifted by half a square, makes the weight of a pair of gradients
    decrease with their distance (Conley, Journal of Econometrics 1999).

    Returns:
        covariance; number of squares with a match.
    """
    if not len(matches):
        return np.zeros((len(gradients), len(gradients))), 0.0
    directions = matches.rays0 / lengths(matches.rays0)
    focal = np.median(lengths(matches.rays0) * matches.focals)
    places = directions[:2] * (focal / _SQUARE)
    scatter, squares = np.zeros((len(gradients), len(gradients))), 0
    for shift in np.array([(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)]):
        column, row = np.floor(places + shift[:, None]).astype(np.int64)
        _, square = np.unique(column << 32 ^ row & 0xFFFFFFFF, return_inverse=True)
        sums = np.array([np.bincount(square, each) for each in gradients])
        scatter += student_factor(sums) * sums @ sums.T / 4
        squares += sums.shape[1]
    return scatter, squares / 4
