"""The rotation that explains most matches of two views, and whether it leaves something to explain.

If it does, the motion has a translation.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import fdtrc

from kpmatch_ros.geometry.robust import (
    FALSE_ALARM_RATE,
    SMALLEST_SAMPLE,
    TINY,
    TUKEY,
    log_false_alarms,
    tukey,
    tukey_cutoff,
)
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    agrees,
    epipolar_residuals,
    lengths,
    rotation_residuals,
)
from kpmatch_ros.geometry.two_view_fit import Noise, minimise

__all__ = [
    "TYPICAL",
    "fit_rotation",
    "fit_rotation_roughly",
    "has_small_parallax",
    "large_parallax_chance",
    "small_parallax_chance",
]

TYPICAL = 3.0
"""Beyond so many standard deviations are the tails of the noise. The test for small parallax leaves them out."""

# Under a pure rotation, a match may still be further than the inlier threshold from where the rotation takes it. It may
# have slipped along an edge: up to so many thresholds, and so many matches for each one that has not slipped.
_LONGEST_SLIP = 5.0
_SLIPS = 1 / 3
# Or it is wrong, in any direction, but so many times as often along the image's longer side as equal chances have it.
_UNEQUAL = 2.0
# Keypoints jitter along their edges, which often have one direction in common. The variance of their noise, but for
# rounding, may be so many times that across this direction (measured: 2.9).
_UNEVEN = 3.0
# The smallest F-test probability over all directions of translation is about that of the smallest of 50 independent
# ones (simulated: 10 to 50, for 20 to 150 degrees of view and 30 to 800 matches).
_INDEPENDENT_DIRECTIONS = 50

_EVERYTHING = 1e9  # pixels: a cutoff beyond all residuals

_VERY_ROUGHLY = 1e-2  # part of the cost: what goes on from there is refined further
_NEARLY = 1e-5  # part of the cost: more does not change a test


def fit_rotation(matches: Matches, starts: list[np.ndarray], inlier_threshold: float, resolution: float) -> np.ndarray:
    """The rotation (3, 3) that brings most matches within the inlier threshold, from the best of the starts."""
    rotation = fit_rotation_roughly(matches, starts, inlier_threshold)
    cutoff = tukey_cutoff(rotation_residuals(matches, rotation), inlier_threshold, resolution)
    return minimise(Model.ROTATION, matches, Motion(rotation, np.zeros(3)), cutoff, 10).rotation


def fit_rotation_roughly(matches: Matches, starts: list[np.ndarray], inlier_threshold: float) -> np.ndarray:
    """As fit_rotation, without the noise's scale."""
    wide = 16 * inlier_threshold
    still = [Motion(rotation, np.zeros(3)) for rotation in starts]
    motion = still[0]
    if len(still) > 1:
        motion = min(still, key=lambda motion: tukey(lengths(rotation_residuals(matches, motion.rotation)), wide)[1])
    for cutoff in (wide, 4 * inlier_threshold):
        motion = minimise(Model.ROTATION, matches, motion, cutoff, 5, _VERY_ROUGHLY)
    return motion.rotation


# Does the rotation alone leave something to explain? Two tests share the false-alarm rate, FALSE_ALARM_RATE.


def large_parallax_chance(
    matches: Matches, motion: Motion, rotation: np.ndarray, turning: np.ndarray, inlier_threshold: float
) -> float:
    """Logarithm of the false-alarm rate of so many matches along their epipolar lines.

    These are matches that the rotation does not explain, on the side of points in front. Matches that may have slipped
    are not counted.
    """
    others = matches.select(~turning)
    distance = lengths(rotation_residuals(others, rotation))
    # How probable it is that a residual of this length, in a random direction, ends near a half-line.
    chances = _UNEQUAL * np.arcsin(np.minimum(inlier_threshold / np.maximum(distance, TINY), 1)) / math.pi
    along = agrees(others, motion, inlier_threshold)
    slipped = np.flatnonzero(along & (distance < _LONGEST_SLIP * inlier_threshold))
    counted = np.ones(len(others), dtype=bool)
    counted[slipped[np.argsort(-distance[slipped])][: int(_SLIPS * turning.sum())]] = False
    return log_false_alarms(along[counted], np.minimum(chances, 1)[counted], 2)


def has_small_parallax(
    matches: Matches, motion: Motion, rotation: np.ndarray, turning: np.ndarray, noise: Noise
) -> bool:
    """The F-test of the matches that the rotation does explain, without the tails of the noise."""
    residuals = rotation_residuals(matches, rotation)
    deviation = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution) / TUKEY
    typical = turning & (lengths(residuals) < TYPICAL * deviation)
    return small_parallax_chance(matches.select(typical), motion, rotation, noise) < FALSE_ALARM_RATE / 2


def small_parallax_chance(matches: Matches, motion: Motion, rotation: np.ndarray, noise: Noise) -> float:
    """Probability of such residuals along the epipolar lines if they are noise, as the residuals across the lines are.

    The F-test of nested models: least squares with a rotation (two conditions a match, three parameters) and with a
    translation (one condition, five parameters). Rounding to the resolution can move every match by half of it in one
    direction, which leaves the residuals across too small: a variance below that of rounding is not believed. The rest
    of the noise may be _UNEVEN.
    """
    count = len(matches)
    if count < SMALLEST_SAMPLE:
        return 1.0
    turned = minimise(Model.ROTATION, matches, Motion(rotation, np.zeros(3)), _EVERYTHING, 5).rotation
    total = float((rotation_residuals(matches, turned) ** 2).sum())
    # To first order, the translation is the direction nearest to all the planes of the two rays.
    normals = np.cross(turned @ matches.rays1, matches.rays0, axis=0)
    starts = (motion, Motion(turned, np.linalg.eigh(normals @ normals.T)[1][:, 0]))
    fits = [minimise(Model.EPIPOLAR, matches, start, _EVERYTHING, 10, _NEARLY) for start in starts]
    across = min(float((epipolar_residuals(matches, fit) ** 2).sum()) for fit in fits)
    variance = across / (count - 5)
    jitter = max(variance - noise.resolution**2 / 12, 0.0)
    allowed = noise.design_effect * (max(variance, noise.resolution**2 / 8, TINY) + (_UNEVEN - 1) * jitter)
    ratio = max(total - across, 0.0) / (count + 2) / allowed
    return _INDEPENDENT_DIRECTIONS * float(fdtrc(count + 2, count - 5, ratio))
