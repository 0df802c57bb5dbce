"""Robust estimation that the motion of two views and that of two stereo frames share."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln

from kpmatch_ros.geometry.camera import Camera

__all__ = [
    "FALSE_ALARM_RATE",
    "LOOSELY",
    "MANY_WRONG",
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
"""How often, at most, noise and wrong matches alone are taken for a translation, or for a geometry at all."""

SMALLEST_SAMPLE = 8
"""Fewest matches of an estimate: its five or six degrees of freedom, and some left over to tell the noise."""

MANY_WRONG = 0.5
"""Other motions are searched for where an even smaller part of the matches agrees."""

LOOSELY = 2.0
"""Inlier thresholds within which matches that do not agree with a motion may agree on another one."""

TUKEY = 4.685
"""Where Tukey's loss ends, standard deviations: 95 % of the efficiency of least squares under Gaussian noise."""

SMALLEST_CURVATURE = 0.1
"""Lower bound of the loss's curvature, in units of its Gauss-Newton approximation."""

TINY = 1e-30
"""Stands for zero in a denominator."""

_ODD = np.uint64(0x9E3779B97F4A7C15)  # its powers tell rows of numbers from each other

_ACROSS = 3.0  # variances of the noise: by so much, at most, does noise alone spread points across their line

_RIVALLING = 0.5  # matches that agree on another motion, for each inlier
_SAME = 0.5  # part of the inliers: a motion that explains more of them is no other one

_POWERS = np.linspace(0.1, 4, 40)  # of Chernoff's bound

_HALF = 1.01  # medians: more than half are below

_DEVIATIONS_PER_MEDIAN = 1.4826  # standard deviation over median absolute deviation, Gaussian noise


def check_options(max_reprojection_error: float, keypoint_resolution: float) -> None:
    """Check what both estimators take, pixels.

    Raises:
        ValueError: one of them is out of range.
    """
    if not 0 < max_reprojection_error < math.inf:
        raise ValueError(f"max_reprojection_error must be a positive number of pixels, not {max_reprojection_error}")
    if not 0 <= keypoint_resolution < math.inf:
        raise ValueError(f"keypoint_resolution must be a number of pixels from 0 up, not {keypoint_resolution}")


def check_sigmas(sigmas: np.ndarray, count: int) -> np.ndarray:
    """Standard deviations (count,) as float64.

    Raises:
        ValueError: they are not so many, or not positive numbers.
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    if sigmas.shape != (count,) or not ((sigmas > 0) & np.isfinite(sigmas)).all():
        raise ValueError(f"sigmas must be {count} positive numbers, not {sigmas.shape} from {sigmas.min(initial=0)} up")
    return sigmas


def without_copies(*pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Which matches remain if equal ones count as one; None where no two are equal.

    A copy says nothing new. Taken for evidence, copies of five matches make any motion through these certain.

    Args:
        pixels: (M, 2) float64, the matched pixels in each image.

    Returns:
        indices (m,) of the matches that remain, in their order, and which of these (M,) each match is equal to.
    """
    rows = np.ascontiguousarray(np.concatenate(pixels, axis=1))
    # Equal rows have equal sums: where no two sums are equal, no two rows are.
    sums = np.sort(rows.view(np.uint64) @ _ODD ** np.arange(rows.shape[1], dtype=np.uint64))
    if (sums[1:] != sums[:-1]).all():
        return None
    _, first, which = np.unique(rows.view(f"V{rows.strides[0]}").ravel(), return_index=True, return_inverse=True)
    if len(first) == len(rows):
        return None
    order = np.argsort(first)
    return first[order], np.argsort(order)[which]


def are_on_one_line(points: np.ndarray, covariance: np.ndarray, variance: float) -> bool:
    """Whether points are no further from one line than noise spreads them; arguments as of :func:`dimensions`."""
    return dimensions(points, covariance, variance) < 2


def dimensions(points: np.ndarray, covariance: np.ndarray, variance: float) -> int:
    """In how many directions points (k, n) lie further apart than noise spreads them: in none where they are one point.

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
    """Weights (n,) and total cost of Tukey's biweight of the residuals' lengths (n,), pixels."""
    shares = np.minimum((lengths / cutoff) ** 2, 1)
    return (1 - shares) ** 2, float((shares * (3 - 3 * shares + shares**2)).sum()) * cutoff**2 / 3


def tukey_cost(squares: np.ndarray, cutoffs: np.ndarray) -> float:
    """Total cost of the same loss of squared residuals (n,), each with a cutoff of its own (n,), squared pixels."""
    shares = np.minimum(squares / cutoffs, 1)
    return float((cutoffs * shares * (3 - 3 * shares + shares**2)).sum()) / 3


def tukey_cutoff(residuals: np.ndarray, inlier_threshold: float, resolution: float) -> float:
    """Where Tukey's loss ends, pixels: TUKEY standard deviations of the residuals' noise, or of rounding if larger.

    The standard deviation is that of the residuals below twice the inlier threshold, by their median. Where one of two
    conditions (2, n) leaves nothing, as on a row that both images share, this median may be zero. Half of the matches
    are within the cutoff nevertheless.
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
    """np.median of numbers (n,), none of which is NaN, in a fifth of its time."""
    low, high = (len(numbers) - 1) // 2, len(numbers) // 2
    parted = np.partition(numbers, (low, high))
    return float(parted[low] + parted[high]) / 2


def log_false_alarms(hits: np.ndarray, chances: np.ndarray, sample: int) -> float:
    """Logarithm of a bound on how many models are expected to be hit as much by chance alone.

    A contrario RANSAC (Moisan and Stival, IJCV 2004), where unlikely hits count for more. The bound is Chernoff's.

    Args:
        hits: (n,) bool, the matches that agree with the model.
        chances: (n,) how probable it is that a wrong match agrees.
        sample: how many of the matches determine a model, and so agree with it anyway. There are n over `sample`
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

    # The bound is convex in the power.
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
    """Whether matches that do not agree with a motion agree on another one, and many do.

    Matches that are wrong each by itself agree on nothing. Where places look alike, as with equal windows in a row,
    wrong ones come in groups, each with a motion of its own.

    Args:
        agreeing: (n,) bool, which of them are near the other motion, within LOOSELY thresholds.
        shared: (m,) bool, which of the first motion's inliers are so, too. Most are where it is the same motion again,
            because the noise is above the threshold.
        chance: how probable it is that a wrong match is as near.
        sample: how many matches determine a motion.
    """
    if agreeing.sum() < _RIVALLING * len(shared) or shared.mean() > _SAME:
        return False
    return log_false_alarms(agreeing, np.full(len(agreeing), chance), sample) < math.log(FALSE_ALARM_RATE)


def epipolar_chance(camera: Camera, inlier_threshold: float) -> float:
    """Probability, at most, that a wrong match is within the threshold (pixels) of its epipolar line.

    The line is no longer than the image's diagonal, and the residual is that of two images.
    """
    area = camera.width * camera.height
    return min(1.0, 2 * math.sqrt(2) * inlier_threshold * math.hypot(camera.width, camera.height) / area)


def design_effect(used: np.ndarray, independent_points: float) -> float:
    """Factor on a variance for matches that err together (Kish, Survey Sampling, 1965).

    Args:
        used: (n,) bool, the matches that the estimate is made from.
        independent_points: how many points that err independently any number of these are worth, at most: the inverse
            of the correlation of their errors.
    """
    return 1.0 + float(used.sum()) / independent_points
