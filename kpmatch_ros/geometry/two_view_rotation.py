"""The rotation that explains most matches of two views, and tests for parallax that it does not explain.

If there is such parallax, the motion has a translation.
"""

from __future__ import annotations

import enum
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
    NOISE_SCALES,
    Matches,
    Model,
    Motion,
    agrees,
    epipolar_residuals,
    lengths,
    residual_sizes,
    rotation_residuals,
)
from kpmatch_ros.geometry.two_view_fit import Noise, minimise

__all__ = [
    "Parallax",
    "TYPICAL",
    "find_parallax",
    "fit_rotation",
    "fit_rotation_roughly",
    "has_certain_parallax",
    "may_have_parallax",
    "small_parallax_p_value",
]

TYPICAL = 3.0
"""Standard deviations beyond which the noise has tails. The test for small parallax leaves them out."""

# Under a pure rotation, a match may still be further than the inlier threshold from its predicted position. It may have
# slipped along an edge: by up to _LONGEST_SLIP thresholds, and up to _SLIPS such matches per match that has not.
_LONGEST_SLIP = 5.0
_SLIPS = 1 / 3
# Or it is wrong, in any direction. Directions along the image's longer side may be up to _UNEQUAL times as frequent as
# in a uniform distribution.
_UNEQUAL = 2.0
# One object may move independently. It covers at most this part of the width that the matches cover.
_OBJECT_WIDTH = 2 / 3
# The scene itself moves if the rotation explains few matches outside this object: fewer than this part of the number
# that the motion explains.
_ROTATING_PART = 1 / 4
_CERTAIN = 1e-12  # a false-alarm rate
# The matches outside the object must support a translation too: with this part of the log false-alarm rate.
_REMAINING = 1 / 3
# Widths of an epipolar line, in inlier thresholds, and the share of the false alarms that each one has.
_WIDTHS = {1.0: 1 / 2, 0.5: 1 / 4, 0.25: 1 / 8, 0.125: 1 / 8}
# Keypoints jitter along their edges, which often have one direction in common. Without rounding, the variance of their
# noise along this direction may be this many times the variance across it (measured: 2.9).
_UNEVEN = 3.0
# The smallest F-test probability over all directions of translation is about that of the smallest of 50 independent
# tests (simulated: 10 to 50, for 20 to 150 degrees of view and 30 to 800 matches).
_INDEPENDENT_DIRECTIONS = 50

# A rotation is fitted with a cutoff of this many inlier thresholds first, and then with smaller ones.
_WIDE = 4.0
_NARROWER = (2.0, 1.0, 0.5)

_NO_CUTOFF = 1e9  # pixels: a cutoff beyond all residuals

_VERY_ROUGHLY = 2e-2  # relative decrease of the cost, for fits that are refined later
_NEARLY = 2e-5  # relative decrease of the cost, small enough for a test


class Parallax(enum.Enum):
    """What a rotation leaves unexplained."""

    NONE = 0
    IN_ONE_PLACE = 1
    """The camera moves, or an object moves independently."""
    EVERYWHERE = 2
    """The camera moves."""


def fit_rotation(matches: Matches, starts: list[np.ndarray], inlier_threshold: float, resolution: float) -> np.ndarray:
    """The rotation (3, 3) that brings most matches within the inlier threshold, starting from the best of `starts`.

    If two objects rotate differently, a rotation in between is close to many matches and correct for none. Therefore
    the fit is repeated with smaller and smaller cutoffs, and the likeliest result is taken.
    """
    motion = Motion(fit_rotation_roughly(matches, starts, inlier_threshold), np.zeros(3))
    fits = [motion]
    for part in _NARROWER:
        fits.append(minimise(Model.ROTATION, matches, fits[-1], part * inlier_threshold, 5, _VERY_ROUGHLY))
    best = max(fits, key=lambda fit: _likelihood(rotation_residuals(matches, fit.rotation), inlier_threshold))
    cutoff = tukey_cutoff(rotation_residuals(matches, best.rotation), inlier_threshold, resolution)
    return minimise(Model.ROTATION, matches, best, cutoff, 10).rotation


def _likelihood(residuals: np.ndarray, inlier_threshold: float) -> float:
    """Log-likelihood ratio of residuals (2, n), with the noise that gives the best value.

    A residual is either noise, or wrong and uniformly distributed within _WIDE inlier thresholds.
    """
    deviations = inlier_threshold * NOISE_SCALES[:, None]
    peak = 0.5 * (_WIDE * inlier_threshold / deviations) ** 2
    squares = (residuals**2).sum(axis=0)
    return float(np.log1p(peak * np.exp(-0.5 * squares / deviations**2)).sum(axis=1).max())


def fit_rotation_roughly(matches: Matches, starts: list[np.ndarray], inlier_threshold: float) -> np.ndarray:
    """As fit_rotation, but with fixed cutoffs instead of the estimated noise."""
    widest = 16 * inlier_threshold
    still = [Motion(rotation, np.zeros(3)) for rotation in starts]
    motion = still[0]
    if len(still) > 1:
        motion = min(still, key=lambda motion: tukey(lengths(rotation_residuals(matches, motion.rotation)), widest)[1])
    for cutoff in (widest, _WIDE * inlier_threshold):
        motion = minimise(Model.ROTATION, matches, motion, cutoff, 5, _VERY_ROUGHLY)
    return motion.rotation


# Does the rotation leave parallax unexplained? Two tests share the false-alarm rate, FALSE_ALARM_RATE: one with the
# matches that the rotation does not explain, and one with those that it explains. Both are made with all matches, and
# again without one object, which may move independently.


def has_certain_parallax(
    matches: Matches, motion: Motion, rotation: np.ndarray, rotation_inliers: np.ndarray, noise: Noise
) -> bool:
    """Whether even a roughly fitted rotation leaves so much parallax that a better rotation is not needed.

    The arguments are those of find_parallax.
    """
    if not _are_along_lines(matches, motion, rotation, rotation_inliers, noise, _CERTAIN):
        return False
    rest = _without_one_object(matches, motion, rotation, noise)
    rotation = fit_rotation_roughly(matches.select(rest), [rotation], noise.inlier_threshold)
    rotation_inliers = lengths(rotation_residuals(matches, rotation)) < noise.inlier_threshold
    return _is_scene(matches, motion, rotation_inliers, rest, noise) or _are_along_lines(
        matches.select(rest), motion, rotation, rotation_inliers[rest], noise, _CERTAIN**_REMAINING
    )


def find_parallax(
    matches: Matches, motion: Motion, rotation: np.ndarray, rotation_inliers: np.ndarray, noise: Noise
) -> Parallax:
    """Where a translation explains matches that a rotation does not.

    Args:
        matches: n matches.
        motion: the best motion with a translation.
        rotation: (3, 3), the rotation that explains most matches.
        rotation_inliers: (n,) bool, the matches that this rotation explains.
        noise: of the keypoints.
    """

    def translates(among: np.ndarray, rate: float) -> bool:
        chosen = matches.select(among), motion, rotation, rotation_inliers[among], noise, rate
        return _are_along_lines(*chosen) or _have_small_parallax(*chosen)

    rate = FALSE_ALARM_RATE / 2
    if not translates(np.ones(len(matches), dtype=bool), rate):
        return Parallax.NONE
    rest = _without_one_object(matches, motion, rotation, noise)
    if _is_scene(matches, motion, rotation_inliers, rest, noise) or translates(rest, rate**_REMAINING):
        return Parallax.EVERYWHERE
    return Parallax.IN_ONE_PLACE


def _is_scene(matches: Matches, motion: Motion, rotation_inliers: np.ndarray, rest: np.ndarray, noise: Noise) -> bool:
    """Whether the scene supports the motion, and not one object: few of the `rest` (n,) only rotate."""
    motion_inliers = agrees(matches, motion, noise.inlier_threshold)
    return bool((rotation_inliers & rest).sum() < _ROTATING_PART * motion_inliers.sum())


def _are_along_lines(
    matches: Matches,
    motion: Motion,
    rotation: np.ndarray,
    rotation_inliers: np.ndarray,
    noise: Noise,
    false_alarm_rate: float,
) -> bool:
    """Whether more of the matches that the rotation does not explain are along their epipolar lines than by chance.

    Only the side of the line with points in front of the cameras counts. Matches that may have slipped do not count.

    The noise determines how close a match is to its line. If a match has moved by three pixels, one pixel from the line
    is weak evidence, and a tenth of a pixel is strong evidence. Therefore the test is made with lines as wide as the
    inlier threshold and with narrower ones (Moisan and Stival, IJCV 2004), each with its share of the false alarms.
    Rounding moves matches in two directions only, so no line is narrower than the resolution.
    """
    others, threshold = matches.select(~rotation_inliers), noise.inlier_threshold
    distance = lengths(rotation_residuals(others, rotation))

    def log_rate(width: float) -> float:
        """Log false-alarm rate with lines of this half-width, pixels."""
        # Probability that a residual of this length, in a random direction, ends near a half-line.
        chances = _UNEQUAL * np.arcsin(np.minimum(width / np.maximum(distance, TINY), 1)) / math.pi
        along = agrees(others, motion, width)
        slipped = np.flatnonzero(along & (distance < _LONGEST_SLIP * threshold))
        counted = np.ones(len(others), dtype=bool)
        counted[slipped[np.argsort(-distance[slipped])][: int(_SLIPS * rotation_inliers.sum())]] = False
        return log_false_alarms(along[counted], np.minimum(chances, 1)[counted], 2)

    return any(
        log_rate(part * threshold) < math.log(share * false_alarm_rate)
        for part, share in _WIDTHS.items()
        if part == 1 or part * threshold > noise.resolution
    )


def _have_small_parallax(
    matches: Matches,
    motion: Motion,
    rotation: np.ndarray,
    rotation_inliers: np.ndarray,
    noise: Noise,
    false_alarm_rate: float,
) -> bool:
    """Whether the F-test with the matches that the rotation explains, without the noise's tails, finds parallax."""
    residuals = rotation_residuals(matches, rotation)
    deviation = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution) / TUKEY
    typical = rotation_inliers & (lengths(residuals) < TYPICAL * deviation)
    return small_parallax_p_value(matches.select(typical), motion, rotation, noise) < false_alarm_rate


def may_have_parallax(
    matches: Matches, motion: Motion, rotation: np.ndarray, motion_inliers: np.ndarray, noise: Noise
) -> bool:
    """Whether a motion explains more than noise does, under the assumption that no match has slipped along its edge.

    Slipped matches look like parallax of a few pixels. If the parallax is real but a pure rotation is reported, the
    parallax may have changed the rotation by many times the error of the matches.

    Args:
        matches: n matches.
        motion: the best motion with a translation.
        rotation: (3, 3), the rotation that explains most matches.
        motion_inliers: (n,) bool, the matches that the motion explains.
        noise: of the keypoints.
    """
    near = motion_inliers & (lengths(rotation_residuals(matches, rotation)) < _LONGEST_SLIP * noise.inlier_threshold)
    return small_parallax_p_value(matches.select(near), motion, rotation, noise) < FALSE_ALARM_RATE


def _without_one_object(matches: Matches, motion: Motion, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """Mask (n,) of the matches outside the part of the image's width that supports a translation most.

    If the camera stands still or only rotates, an object that moves independently looks like a close object in front of
    a moving camera. A real scene has close objects, or ground, on all sides.
    """
    threshold = noise.inlier_threshold
    turned = np.minimum(lengths(rotation_residuals(matches, rotation)), threshold)
    moved = np.minimum(residual_sizes(matches, motion, threshold), threshold)
    # On the unit sphere, which limits the extent of the sides of a wide-angle image.
    places = matches.rays0[0] / np.sqrt((matches.rays0**2).sum(axis=0))
    order = np.argsort(places)
    ordered = places[order]
    sums = np.append(0.0, np.cumsum((turned**2 - moved**2)[order]))
    ends = np.searchsorted(ordered, ordered + _OBJECT_WIDTH * (ordered[-1] - ordered[0]), side="right")
    first = int((sums[ends] - sums[:-1]).argmax())
    rest = np.ones(len(matches), dtype=bool)
    rest[order[first : ends[first]]] = False
    return rest


def small_parallax_p_value(matches: Matches, motion: Motion, rotation: np.ndarray, noise: Noise) -> float:
    """Probability of such residuals along the epipolar lines under noise with the variance of those across the lines.

    This is the F-test of nested models: least squares with a rotation (two conditions per match, three parameters) and
    with a translation (one condition, five parameters). Rounding to the resolution can move every match by half of it
    in one direction, which makes the residuals across the lines too small. Therefore the variance is at least that of
    rounding. The rest of the noise may be _UNEVEN.
    """
    count = len(matches)
    if count < SMALLEST_SAMPLE:
        return 1.0
    turned = minimise(Model.ROTATION, matches, Motion(rotation, np.zeros(3)), _NO_CUTOFF, 5).rotation
    total = float((rotation_residuals(matches, turned) ** 2).sum())
    # To first order, the translation is the direction closest to the planes of all pairs of rays.
    normals = np.cross(turned @ matches.rays1, matches.rays0, axis=0)
    starts = (motion, Motion(turned, np.linalg.eigh(normals @ normals.T)[1][:, 0]))
    fits = [minimise(Model.EPIPOLAR, matches, start, _NO_CUTOFF, 10, _NEARLY) for start in starts]
    across = min(float((epipolar_residuals(matches, fit) ** 2).sum()) for fit in fits)
    variance = across / (count - 5)
    jitter = max(variance - noise.resolution**2 / 12, 0.0)
    allowed = noise.design_effect * (max(variance, noise.resolution**2 / 8, TINY) + (_UNEVEN - 1) * jitter)
    ratio = max(total - across, 0.0) / (count + 2) / allowed
    return _INDEPENDENT_DIRECTIONS * float(fdtrc(count + 2, count - 5, ratio))
