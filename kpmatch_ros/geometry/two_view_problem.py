"""What a relative pose of two views is estimated from, and what becomes of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.robust import TUKEY, tukey_cutoff
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, gains, residual_sizes

__all__ = ["Problem", "Solution", "spread_out", "weigh"]

# Errors that standard deviations do not tell, alike for all matches, inlier thresholds: a calibration's, a rolling
# shutter's.
_UNTOLD = np.array([0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0])

# Of the inlier threshold: so large a standard deviation leaves a match the whole threshold, 3.3 deviations.
_INEXACT = 0.3


class Problem(NamedTuple):
    """Usable matches, and what estimate_relative_pose was told of them.

    Attributes:
        matches: n of them.
        inlier_threshold: the largest residual of an inlier, pixels.
        normalised_threshold: the same in normalised coordinates.
        resolution: pixels between neighbouring positions that a keypoint can have.
        independent_points: how many points, at most, err independently of each other.
        chance: the probability that a wrong match is within the inlier threshold of its epipolar line.
        required: so many inliers a pose needs.
        prior: the motion before, where it is known.
        sigmas: (n,) standard deviations of one point beside the other one, pixels, where they are known to differ.
    """

    matches: Matches
    inlier_threshold: float
    normalised_threshold: float
    resolution: float
    independent_points: float
    chance: float
    required: int
    prior: Motion | None
    sigmas: np.ndarray | None

    def select(self, chosen: np.ndarray) -> Problem:
        """The problem with the matches for which the mask (n,) is true."""
        return self._replace(
            matches=self.matches.select(chosen), sigmas=None if self.sigmas is None else self.sigmas[chosen]
        )

    def with_threshold(self, factor: float) -> Problem:
        """The problem with so many times the inlier threshold."""
        return self._replace(
            inlier_threshold=factor * self.inlier_threshold,
            normalised_threshold=factor * self.normalised_threshold,
            chance=min(1.0, factor * self.chance),
        )

    def deviation(self, motion: Motion) -> float:
        """Standard deviation of the keypoints' noise beside a motion, pixels."""
        sizes = residual_sizes(self.matches, motion, self.inlier_threshold)
        return tukey_cutoff(sizes, self.inlier_threshold, self.resolution) / TUKEY


class Solution(NamedTuple):
    """What became of a problem: its motion, None without a pose, and its inliers (n,), None if not estimated.

    Besides, those (n,) that agree with a translation that is not believed, if there is one, and this motion.
    """

    status: PoseStatus
    motion: Motion | None = None
    covariance: np.ndarray = np.zeros((6, 6))
    inliers: np.ndarray | None = None
    doubted: np.ndarray | None = None
    unbelieved: Motion | None = None


def spread_out(mask: np.ndarray | None, chosen: np.ndarray) -> np.ndarray | None:
    """A mask of those that another one (N,) chooses, for all (N,) of them."""
    if mask is None:
        return None
    every = np.zeros(len(chosen), dtype=bool)
    every[chosen] = mask
    return every


def weigh(problem: Problem, motion: Motion) -> Problem:
    """The problem with each match as exact as its standard deviation, and the residuals beside a motion, say.

    What standard deviations do not tell is alike for all matches, and as large as makes the residuals likeliest. A
    match that is more exact than the inlier threshold allows for is an inlier within 3.3 of its standard deviations
    then. The others stay as they are, all alike. Where no match is so exact, the problem is the same.
    """
    if problem.sigmas is None:
        return problem
    threshold = problem.inlier_threshold
    sizes = residual_sizes(problem.matches, motion, threshold)
    # Of a match one point errs, and residuals are those of noise in both. Rounding is in them, too.
    told = np.hypot(problem.sigmas / math.sqrt(2), problem.resolution / math.sqrt(12))
    deviations = np.hypot(told, threshold * _UNTOLD[:, None])
    likeliest = deviations[gains(sizes, deviations, threshold).sum(axis=1).argmax()]
    scales = np.minimum(likeliest / (_INEXACT * threshold), 1.0)
    if scales.min() == 1.0:
        return problem
    # In units of the middle match's noise, pixels go on to be pixels.
    middle = float(np.median(scales))
    return problem.with_threshold(middle)._replace(matches=problem.matches.scaled(scales / middle))
