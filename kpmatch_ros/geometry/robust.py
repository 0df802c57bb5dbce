"""Robust estimation, shared by the motion of two views and the motion of two stereo frames."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln

from kpmatch_ros.geometry.camera import Camera

__all__ = [
    "FALSE_ALARM_RATE",
    "LOOSE",
    "ENOUGH_INLIERS",
    "RIVALLING",
    "SMALLEST_CURVATURE",
    "SMALLEST_SAMPLE",
    "TINY",
    "TUKEY",
    "are_on_one_line",
    "check_options",
    "check_sigmas",
    "dimensions",
    "design_effect",
    "epipolar_chance",
    "is_other_motion",
    "log_false_alarms",
    "tukey",
    "tukey_cost",
    "tukey_cutoff",
    "without_copies",
]

FALSE_ALARM_RATE = 1e-3
"""Largest rate at which noise and wrong matches alone are taken for a translation, or for any motion."""

SMALLEST_SAMPLE = 8
"""Smallest number of matches for an estimate: five or six degrees of freedom, and some more to estimate the noise."""

ENOUGH_INLIERS = 0.5
"""Part of the matches: if fewer agree, other motions are searched for."""

RIVALLING = 0.5
"""Matches that must agree on another motion, per inlier."""

LOOSE = 2.0
"""Threshold, in inlier thresholds, for matches that may agree on another motion."""

TUKEY = 4.685
"""Cutoff of Tukey's loss, in standard deviations: 95 % of the efficiency of least squares under Gaussian noise."""

SMALLEST_CURVATURE = 0.1
"""Lower bound of the loss's curvature, relative to its Gauss-Newton approximation."""

TINY = 1e-30
"""Replaces zero in a denominator."""

_ODD = np.uint64(0x9E3779B97F4A7C15)  # its powers make the sums of different rows differ

_ACROSS = 3.0  # variances of the noise: noise alone spreads points across their line by at most this

_SAME = 0.5  # part of the inliers: a motion that explains more of them is the same motion

_POWERS = np.linspace(0.1, 4, 40)  # of Chernoff's bound

_HALF = 1.01  # times the median, so that more than half are below

_DEVIATIONS_PER_MEDIAN = 1.4826  # standard deviation over median absolute deviation, for Gaussian noise


def check_options(max_reprojection_error: float, keypoint_resolution: float) -> None:
    """Check the options that both estimators take, pixels.

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 < max_reprojection_error < math.inf:
        raise ValueError(f"max_reprojection_error must be a positive number of pixels, not {max_reprojection_error}")
    if not 0 <= keypoint_resolution < math.inf:
        raise ValueError(f"keypoint_resolution must be a finite number of pixels, 0 or more, not {keypoint_resolution}")


def check_sigmas(sigmas: np.ndarray, count: int) -> np.ndarray:
    """Standard deviations (count,) as float64.

    Raises:
        ValueError: their number is wrong, or one is not a positive number.
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    if sigmas.shape != (count,) or not ((sigmas > 0) & np.isfinite(sigmas)).all():
        values = f", values from {sigmas.min():g} to {sigmas.max():g}" if sigmas.size else ""
        raise ValueError(f"sigmas must be {count} positive finite numbers; got shape {sigmas.shape}{values}")
    return sigmas


def without_copies(*pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The matches that remain if duplicates count once; None if there are no duplicates.

    A duplicate carries no new information. If it counted, duplicates of five matches would make any motion certain.

    Args:
        pixels: (M, 2) float64, the matched pixels in each image.

    Returns:
        indices (m,) of the remaining matches, in their order, and for each match (M,) the one of these it is equal to.
    """
    rows = np.ascontiguousarray(np.concatenate(pixels, axis=1))
    # Equal rows have equal sums. If all sums differ, all rows differ.
    sums = np.sort(rows.view(np.uint64) @ _ODD ** np.arange(rows.shape[1], dtype=np.uint64))
    if (sums[1:] != sums[:-1]).all():
        return None
    _, first, which = np.unique(rows.view(f"V{rows.strides[0]}").ravel(), return_index=True, return_inverse=True)
    if len(first) == len(rows):
        return None
    order = np.argsort(first)
    return first[order], np.argsort(order)[which]


def are_on_one_line(points: np.ndarray, covariance: np.ndarray, variance: float) -> bool:
    """Whether points lie on one line within the noise. The arguments are those of :func:`dimensions`."""
    return dimensions(points, covariance, variance) < 2


def dimensions(points: np.ndarray, covariance: np.ndarray, variance: float) -> int:
    """Number of directions in which points (k, n) are spread by more than the noise: 0 for a single point.

    Args:
        points: coordinates.
        covariance: (k, k) of a point, for keypoint noise of one pixel.
        variance: of the keypoints' noise, squared pixels.
    """
    away = points - points.mean(axis=1, keepdims=True)
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), away)
    spreads = np.linalg.eigvalsh(whitened @ whitened.T) / (points.shape[1] - 1)
    return int((spreads >= _ACROSS * variance).sum())


def tukey(lengths: np.ndarray, cutoff: float) -> tuple[np.ndarray, float]:
    """Weights (n,) and total cost of Tukey's biweight loss, for the residuals' lengths (n,), pixels."""
    shares = np.minimum((lengths / cutoff) ** 2, 1)
    return (1 - shares) ** 2, float((shares * (3 - 3 * shares + shares**2)).sum()) * cutoff**2 / 3


def tukey_cost(squares: np.ndarray, cutoffs: np.ndarray) -> float:
    """Total cost of the same loss, for squared residuals (n,), each with its own cutoff (n,), squared pixels."""
    shares = np.minimum(squares / cutoffs, 1)
    return float((cutoffs * shares * (3 - 3 * shares + shares**2)).sum()) / 3


def tukey_cutoff(residuals: np.ndarray, inlier_threshold: float, resolution: float) -> float:
    """Cutoff of Tukey's loss, pixels: TUKEY standard deviations of the residuals' noise, or of rounding if larger.

    The standard deviation comes from the median of the residuals below twice the inlier threshold. If the residuals of
    one of two conditions (2, n) vanish, as on a row that both images share, this median may be zero. Even then, half of
    the matches are within the cutoff.
    """
    sizes = np.abs(residuals)
    near = sizes[sizes < 2 * inlier_threshold]
    noise = _DEVIATIONS_PER_MEDIAN * _median(near) if len(near) else inlier_threshold
    cutoff = TUKEY * max(noise, resolution / math.sqrt(12), 1e-9)
    if sizes.ndim == 1 or len(sizes) == 1:
        return cutoff
    lengths = np.sqrt((sizes * sizes).sum(axis=0))
    near = lengths[lengths < 2 * inlier_threshold]
    return max(cutoff, _HALF * _median(near)) if len(near) else cutoff


def _median(numbers: np.ndarray) -> float:
    """np.median of numbers (n,) without NaN, in a fifth of its time."""
    low, high = (len(numbers) - 1) // 2, len(numbers) // 2
    parted = np.partition(numbers, (low, high))
    return float(parted[low] + parted[high]) / 2


def log_false_alarms(hits: np.ndarray, chances: np.ndarray, sample: int) -> float:
    """Logarithm of a bound on the expected number of models with as many hits by chance alone.

    This is a contrario RANSAC (Moisan and Stival, IJCV 2004) with larger weights for unlikely hits. The bound is
    Chernoff's.

    Args:
        hits: (n,) bool, the matches that agree with the model.
        chances: (n,) probability that a wrong match agrees.
        sample: number of matches that determine a model, and therefore always agree with it. There are n over `sample`
            models.
    """
    count = len(hits)
    if hits.sum() <= sample:
        return math.inf
    weights = np.minimum(-np.log(np.maximum(chances, TINY)), 1.0)
    score = np.sort(weights[hits])[:-sample].sum()
    repeated = 1
    if chances.min() == chances.max():
        chances, weights, repeated = chances[:1], weights[:1], count

    # The bound is convex in the power, so a binary search finds its minimum.
    low, high = 0, len(_POWERS) - 1
    while low < high:
        middle = (low + high) // 2
        growth = chances * np.exp(_POWERS[middle] * weights)
        if repeated * float((growth * weights / (1 - chances + growth)).sum()) > score:
            high = middle
        else:
            low = middle + 1
    models = gammaln(count + 1) - gammaln(sample + 1) - gammaln(count - sample + 1)
    bounds = [
        repeated * float(np.log1p(chances * np.expm1(power * weights)).sum()) - power * score
        for power in _POWERS[max(low - 1, 0) : low + 1]
    ]
    return float(models) + min(bounds)


def is_other_motion(agreeing: np.ndarray, shared: np.ndarray, chance: float, sample: int) -> bool:
    """Whether many of the matches that do not agree with a motion agree on another one.

    Independent wrong matches agree on nothing. In repetitive scenes, as with equal windows in a row, wrong matches come
    in groups, each with its own motion.

    Args:
        agreeing: (n,) bool, which of these matches are within LOOSE thresholds of the other motion.
        shared: (m,) bool, which of the first motion's inliers are within them too. If most are, it is the same motion,
            found again because the noise exceeds the threshold.
        chance: probability that a wrong match is within them.
        sample: number of matches that determine a motion.
    """
    if agreeing.sum() < RIVALLING * len(shared) or shared.mean() > _SAME:
        return False
    return log_false_alarms(agreeing, np.full(len(agreeing), chance), sample) < math.log(FALSE_ALARM_RATE)


def epipolar_chance(camera: Camera, inlier_threshold: float) -> float:
    """Upper bound of the probability that a wrong match is within the threshold (pixels) of its epipolar line.

    The line is at most as long as the image's diagonal, and the residual combines two images.
    """
    area = camera.width * camera.height
    return min(1.0, 2 * math.sqrt(2) * inlier_threshold * math.hypot(camera.width, camera.height) / area)


def design_effect(used: np.ndarray, independent_points: float) -> float:
    """Factor on a variance for errors that matches share (Kish, Survey Sampling, 1965).

    Args:
        used: (n,) bool, the matches that the estimate is made from.
        independent_points: largest number of independent points that any number of matches is worth: the inverse of the
            correlation of their errors.
    """
    return 1.0 + float(used.sum()) / independent_points
