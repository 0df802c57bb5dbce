"""Input and result of the relative pose estimation from two views."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.robust import TUKEY, tukey_cutoff
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, gains, residual_sizes

__all__ = ["Problem", "Solution", "spread_out", "weigh"]

# Standard deviations, in inlier thresholds, of errors that are equal for all matches and that the given standard
# deviations do not include: those of the calibration or of a rolling shutter.
_UNMODELLED = np.array([0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0])

# In inlier thresholds: a match with this standard deviation keeps the whole threshold, which is 3.3 deviations.
_INEXACT = 0.3


class Problem(NamedTuple):
    """Usable matches, and the arguments of estimate_relative_pose.

    Attributes:
        matches: n matches.
        inlier_threshold: the largest residual of an inlier, pixels.
        normalised_threshold: the same in normalised coordinates.
        resolution: pixels between neighbouring positions that a keypoint can have.
        independent_points: largest number of points with independent errors.
        chance: probability that a wrong match is within the inlier threshold of its epipolar line.
        required: number of inliers that a pose needs.
        prior: motion between the two preceding images; None if unknown.
        sigmas: (n,) standard deviations of one point, given the other one, pixels; None if they are equal.
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
        """The problem with the matches in the mask (n,)."""
        return self._replace(
            matches=self.matches.select(chosen), sigmas=None if self.sigmas is None else self.sigmas[chosen]
        )

    def with_threshold(self, factor: float) -> Problem:
        """The problem with the inlier threshold multiplied by a factor."""
        return self._replace(
            inlier_threshold=factor * self.inlier_threshold,
            normalised_threshold=factor * self.normalised_threshold,
            chance=min(1.0, factor * self.chance),
        )

    def deviation(self, motion: Motion) -> float:
        """Standard deviation of the keypoints' noise under a motion, pixels."""
        sizes = residual_sizes(self.matches, motion, self.inlier_threshold)
        return tukey_cutoff(sizes, self.inlier_threshold, self.resolution) / TUKEY


class Solution(NamedTuple):
    """Result of a problem: status, motion (None without a pose), covariance, and inliers (n,) (None if not estimated).

    If a translation was rejected, `rejected` is that motion, and `undecided` (n,) are the matches that agree with it
    but are not inliers.
    """

    status: PoseStatus
    motion: Motion | None = None
    covariance: np.ndarray = np.zeros((6, 6))
    inliers: np.ndarray | None = None
    undecided: np.ndarray | None = None
    rejected: Motion | None = None


def spread_out(mask: np.ndarray | None, chosen: np.ndarray) -> np.ndarray | None:
    """A mask of the elements that `chosen` (N,) selects, extended to all N elements with False."""
    if mask is None:
        return None
    every = np.zeros(len(chosen), dtype=bool)
    every[chosen] = mask
    return every


def weigh(problem: Problem, motion: Motion) -> Problem:
    """The problem with each match weighted by its standard deviation and by the residuals under a motion.

    Errors that the standard deviations do not include are equal for all matches. Their size is the one that makes the
    residuals likeliest. A match that is more precise than the inlier threshold then has a threshold of 3.3 of its
    standard deviations. The other matches keep equal weights. If no match is that precise, the problem is unchanged.
    """
    if problem.sigmas is None:
        return problem
    threshold = problem.inlier_threshold
    sizes = residual_sizes(problem.matches, motion, threshold)
    # Only one point of a match has this error, but residuals assume noise in both. They also include rounding.
    given = np.hypot(problem.sigmas / math.sqrt(2), problem.resolution / math.sqrt(12))
    deviations = np.hypot(given, threshold * _UNMODELLED[:, None])
    likeliest = deviations[gains(sizes, deviations, threshold).sum(axis=1).argmax()]
    scales = np.minimum(likeliest / (_INEXACT * threshold), 1.0)
    if scales.min() == 1.0:
        return problem
    # In units of the median match's noise, so that these units remain close to pixels.
    middle = float(np.median(scales))
    return problem.with_threshold(middle)._replace(matches=problem.matches.scaled(scales / middle))
