"""The rotation that explains most matches of two views, and whether it leaves something to explain.

If it does, the motion has a translation.
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
# One thing may move by itself. It takes such a part of the width that the matches take, at most.
_THING = 2 / 3
# Unless the rotation explains fewer matches of the rest than such a part of those that the motion explains: what moves
# is the scene then.
_LITTLE = 1 / 4
_CERTAIN = 1e-12  # a false-alarm rate
# What remains without it must speak for a translation, too: so much of the logarithm of the false-alarm rate.
_REMAINING = 1 / 3
# How near to an epipolar line a match counts as along it, inlier thresholds: the share of the false alarms.
_WIDTHS = {1.0: 1 / 2, 0.5: 1 / 4, 0.25: 1 / 8, 0.125: 1 / 8}
# Keypoints jitter along their edges, which often have one direction in common. The variance of their noise, but for
# rounding, may be so many times that across this direction (measured: 2.9).
_UNEVEN = 3.0
# The smallest F-test probability over all directions of translation is about that of the smallest of 50 independent
# ones (simulated: 10 to 50, for 20 to 150 degrees of view and 30 to 800 matches).
_INDEPENDENT_DIRECTIONS = 50

# A rotation is fitted to residuals up to so many inlier thresholds, and then up to fewer.
_WIDE = 4.0
_NARROWER = (2.0, 1.0, 0.5)

_EVERYTHING = 1e9  # pixels: a cutoff beyond all residuals

_VERY_ROUGHLY = 1e-2  # part of the cost: what goes on from there is refined further
_NEARLY = 1e-5  # part of the cost: more does not change a test


class Parallax(enum.Enum):
    """What a rotation leaves to explain."""

    NONE = 0
    IN_ONE_PLACE = 1
    """Something moves: the camera, or before it a thing that moves by itself."""
    EVERYWHERE = 2
    """The camera moves."""


def fit_rotation(matches: Matches, starts: list[np.ndarray], inlier_threshold: float, resolution: float) -> np.ndarray:
    """The rotation (3, 3) that brings most matches within the inlier threshold, from the best of the starts.

    Two things that turn differently have a rotation in between, which is near to many matches and right for none. So it
    is fitted more and more narrowly, and the likeliest fit is taken.
    """
    motion = Motion(fit_rotation_roughly(matches, starts, inlier_threshold), np.zeros(3))
    fits = [motion]
    for part in _NARROWER:
        fits.append(minimise(Model.ROTATION, matches, fits[-1], part * inlier_threshold, 5, _VERY_ROUGHLY))
    best = max(fits, key=lambda fit: _likelihood(rotation_residuals(matches, fit.rotation), inlier_threshold))
    cutoff = tukey_cutoff(rotation_residuals(matches, best.rotation), inlier_threshold, resolution)
    return minimise(Model.ROTATION, matches, best, cutoff, 10).rotation


def _likelihood(residuals: np.ndarray, inlier_threshold: float) -> float:
    """Logarithm of the likelihood ratio of residuals (2, n), with the noise that suits them best.

    A residual is that of noise, or it is wrong and anywhere within _WIDE inlier thresholds.
    """
    deviations = inlier_threshold * NOISE_SCALES[:, None]
    peak = 0.5 * (_WIDE * inlier_threshold / deviations) ** 2
    squares = (residuals**2).sum(axis=0)
    return float(np.log1p(peak * np.exp(-0.5 * squares / deviations**2)).sum(axis=1).max())


def fit_rotation_roughly(matches: Matches, starts: list[np.ndarray], inlier_threshold: float) -> np.ndarray:
    """As fit_rotation, without the noise's scale."""
    widest = 16 * inlier_threshold
    still = [Motion(rotation, np.zeros(3)) for rotation in starts]
    motion = still[0]
    if len(still) > 1:
        motion = min(still, key=lambda motion: tukey(lengths(rotation_residuals(matches, motion.rotation)), widest)[1])
    for cutoff in (widest, _WIDE * inlier_threshold):
        motion = minimise(Model.ROTATION, matches, motion, cutoff, 5, _VERY_ROUGHLY)
    return motion.rotation


# Does the rotation alone leave something to explain? Two tests share the false-alarm rate, FALSE_ALARM_RATE: one of the
# matches that the rotation does not explain, and one of those that it does. They are made of all matches, and of those
# that are left without one thing, which may move by itself.


def has_certain_parallax(
    matches: Matches, motion: Motion, rotation: np.ndarray, turning: np.ndarray, noise: Noise
) -> bool:
    """Whether even a rotation that was fitted roughly leaves so much to explain that no better one needs to be found.

    Arguments as of find_parallax.
    """
    if not _are_along_lines(matches, motion, rotation, turning, noise, _CERTAIN):
        return False
    rest = _without_one_thing(matches, motion, rotation, noise)
    rotation = fit_rotation_roughly(matches.select(rest), [rotation], noise.inlier_threshold)
    turning = lengths(rotation_residuals(matches, rotation)) < noise.inlier_threshold
    return _is_scene(matches, motion, turning, rest, noise) or _are_along_lines(
        matches.select(rest), motion, rotation, turning[rest], noise, _CERTAIN**_REMAINING
    )


def find_parallax(
    matches: Matches, motion: Motion, rotation: np.ndarray, turning: np.ndarray, noise: Noise
) -> Parallax:
    """Where a rotation leaves something to explain that a translation explains.

    Args:
        matches: n of them.
        motion: the best one with a translation.
        rotation: (3, 3), the one that explains most matches.
        turning: (n,) bool, the matches that it explains.
        noise: of the keypoints.
    """

    def translates(among: np.ndarray, rate: float) -> bool:
        chosen = matches.select(among), motion, rotation, turning[among], noise, rate
        return _are_along_lines(*chosen) or _have_small_parallax(*chosen)

    rate = FALSE_ALARM_RATE / 2
    if not translates(np.ones(len(matches), dtype=bool), rate):
        return Parallax.NONE
    rest = _without_one_thing(matches, motion, rotation, noise)
    if _is_scene(matches, motion, turning, rest, noise) or translates(rest, rate**_REMAINING):
        return Parallax.EVERYWHERE
    return Parallax.IN_ONE_PLACE


def _is_scene(matches: Matches, motion: Motion, turning: np.ndarray, rest: np.ndarray, noise: Noise) -> bool:
    """Whether what speaks for the motion is the scene, and not one thing, as hardly any of the rest (n,) turns."""
    return bool((turning & rest).sum() < _LITTLE * agrees(matches, motion, noise.inlier_threshold).sum())


def _are_along_lines(
    matches: Matches,
    motion: Motion,
    rotation: np.ndarray,
    turning: np.ndarray,
    noise: Noise,
    false_alarm_rate: float,
) -> bool:
    """Whether more of the matches that the rotation does not explain are along their epipolar lines than chance has it.

    They count on the side of points in front. Matches that may have slipped are not counted.

    How near to its line a match is depends on the noise. That one which has moved by three pixels is within one pixel
    of a line says little; that it is within a tenth of a pixel says much. The lines are therefore as wide as the inlier
    threshold, and narrower, each a test of its own (Moisan and Stival, IJCV 2004), with its share of the false alarms.
    Rounding moves matches in two directions only: no lines are narrower than its steps.
    """
    others, threshold = matches.select(~turning), noise.inlier_threshold
    distance = lengths(rotation_residuals(others, rotation))

    def chance(width: float) -> float:
        """Logarithm of the false-alarm rate with lines of this width, pixels to either side."""
        # How probable it is that a residual of this length, in a random direction, ends near a half-line.
        chances = _UNEQUAL * np.arcsin(np.minimum(width / np.maximum(distance, TINY), 1)) / math.pi
        along = agrees(others, motion, width)
        slipped = np.flatnonzero(along & (distance < _LONGEST_SLIP * threshold))
        counted = np.ones(len(others), dtype=bool)
        counted[slipped[np.argsort(-distance[slipped])][: int(_SLIPS * turning.sum())]] = False
        return log_false_alarms(along[counted], np.minimum(chances, 1)[counted], 2)

    return any(
        chance(part * threshold) < math.log(share * false_alarm_rate)
        for part, share in _WIDTHS.items()
        if part == 1 or part * threshold > noise.resolution
    )


def _have_small_parallax(
    matches: Matches,
    motion: Motion,
    rotation: np.ndarray,
    turning: np.ndarray,
    noise: Noise,
    false_alarm_rate: float,
) -> bool:
    """The F-test of the matches that the rotation does explain, without the tails of the noise."""
    residuals = rotation_residuals(matches, rotation)
    deviation = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution) / TUKEY
    typical = turning & (lengths(residuals) < TYPICAL * deviation)
    return small_parallax_chance(matches.select(typical), motion, rotation, noise) < false_alarm_rate


def may_have_parallax(matches: Matches, motion: Motion, rotation: np.ndarray, moving: np.ndarray, noise: Noise) -> bool:
    """Whether a motion explains more than noise does, if no match has slipped along its edge.

    What slips looks like parallax of a few pixels. Where a rotation alone is believed for that, the parallax may have
    turned it: by many times the error of the matches.

    Args:
        moving: (n,) bool, the matches that the motion explains; others as of find_parallax.
    """
    near = moving & (lengths(rotation_residuals(matches, rotation)) < _LONGEST_SLIP * noise.inlier_threshold)
    return small_parallax_chance(matches.select(near), motion, rotation, noise) < FALSE_ALARM_RATE


def _without_one_thing(matches: Matches, motion: Motion, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """The matches (n,) beside the part of the image's width that speaks most for a motion with a translation.

    Before a camera that stands or turns, a thing that moves by itself is seen to move as a near thing is before a
    camera that moves. A scene has near things, or ground, on all sides.
    """
    threshold = noise.inlier_threshold
    turned = np.minimum(lengths(rotation_residuals(matches, rotation)), threshold)
    moved = np.minimum(residual_sizes(matches, motion, threshold), threshold)
    # On the unit sphere, where the sides of wide lenses are not far away.
    places = matches.rays0[0] / np.sqrt((matches.rays0**2).sum(axis=0))
    order = np.argsort(places)
    ordered = places[order]
    sums = np.append(0.0, np.cumsum((turned**2 - moved**2)[order]))
    ends = np.searchsorted(ordered, ordered + _THING * (ordered[-1] - ordered[0]), side="right")
    first = int((sums[ends] - sums[:-1]).argmax())
    rest = np.ones(len(matches), dtype=bool)
    rest[order[first : ends[first]]] = False
    return rest


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
