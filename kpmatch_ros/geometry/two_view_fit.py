"""M-estimates of the motion of two views: the minimum of the loss, and its covariance."""

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

_STEP = 1e-6  # radians: by differences of the gradient over it, the Hessian

_LARGEST_VARIANCE = math.pi**2  # of an unknown angle

_SQUARE = 32  # pixels: nearer matches err together, as a patch has a side of 13
_ALIKE = 20  # squares, of which the covariance is that of matches that err alike, and each by itself

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


class Covariances(NamedTuple):
    """Covariances (p, p) of one estimate.

    Attributes:
        alike: if matches err alike, and each by itself.
        shared: if each errs as its residual says, and neighbours together.
    """

    alike: np.ndarray
    shared: np.ndarray


def motion_covariances(matches: Matches, motion: Motion, noise: Noise) -> Covariances:
    """Covariances (5, 5) of a motion with translation, by the numbers of Motion.moved, from its matches."""
    return _covariances(Model.EPIPOLAR, matches, motion, noise)


def rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """Covariance (3, 3) of a rotation without translation, from the matches it came from."""
    return _covariances(Model.ROTATION, matches, Motion(rotation, np.zeros(3)), noise).shared


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


def _covariances(model: Model, matches: Matches, motion: Motion, noise: Noise) -> Covariances:
    """Covariances (p, p) of an M-estimate with Tukey's loss, as kpmatch_ros.geometry.sandwich says.

    Matches near each other see the same light, blur and slant, and err together. The gradient's covariance is therefore
    made of what the residuals of a square of the image pull together.
    """
    residuals, jacobian = differentiate(model, matches, motion)
    cutoff = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution)
    size = len(jacobian)
    sizes = lengths(residuals)
    used = sizes < cutoff
    weights, jacobian = tukey(sizes, cutoff)[0][used], jacobian[:, :, used]
    influences = residuals[:, used] * weights
    seen = float((influences**2).sum()) / max(influences.size - size, 1)  # the noise's variance
    rounding = noise.resolution**2 / 12
    flat = jacobian.reshape(size, -1)
    floor = max(max(seen, rounding) / _LARGEST_VARIANCE, TINY)
    axes, curvatures = whitening_axes(flat @ flat.T, _hessian(model, matches, motion, cutoff), floor)
    curvature = float(curvatures.mean())
    variance = max(seen, curvature**2 * rounding)
    alike = variance * np.eye(size)
    arms = np.einsum("ij,idn->jdn", axes, jacobian)
    leverage = weights * (arms**2).sum(axis=(0, 1)) / (len(residuals) * curvature)
    pulls = jackknifed(np.einsum("jdn,dn->jn", arms, influences), leverage)
    shared, squares = _scatter(pulls, matches.select(used))
    shared += max(variance - seen, 0.0) * np.eye(size)  # of rounding, each match errs by itself
    shared = (squares * shared + _ALIKE * alike) / (squares + _ALIKE)  # a few tell little
    axes = noise.design_effect**0.5 * axes / curvatures
    return Covariances(*(_bounded(axes @ scatter @ axes.T) for scatter in (alike, shared)))


def _bounded(covariance: np.ndarray) -> np.ndarray:
    """A covariance (p, p) of which no angle is less certain than one that is not known."""
    variances, axes = np.linalg.eigh(covariance)
    return np.asarray((axes * np.clip(variances, 0, _LARGEST_VARIANCE)) @ axes.T)


def _scatter(pulls: np.ndarray, matches: Matches) -> tuple[np.ndarray, float]:
    """Covariance (p, p) of the sum of pulls (p, n), of which those near each other in the reference image are alike.

    It is the sum over squares of the image of the products of their pulls (Liang and Zeger, Biometrika 1986). The mean
    of four grids of squares, each moved by half a square, makes the share of two pulls fall with their distance
    (Conley, Journal of Econometrics 1999).

    Returns:
        covariance; how many squares have a match.
    """
    if not len(matches):
        return np.zeros((len(pulls), len(pulls))), 0.0
    directions = matches.rays0 / lengths(matches.rays0)
    focal = np.median(lengths(matches.rays0) * matches.focals)
    places = directions[:2] * (focal / _SQUARE)
    scatter, squares = np.zeros((len(pulls), len(pulls))), 0
    for shift in np.array([(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)]):
        column, row = np.floor(places + shift[:, None]).astype(np.int64)
        _, square = np.unique(column << 32 ^ row & 0xFFFFFFFF, return_inverse=True)
        sums = np.array([np.bincount(square, each) for each in pulls])
        scatter += student_factor(sums) * sums @ sums.T / 4
        squares += sums.shape[1]
    return scatter, squares / 4
