"""Motions that explain the same matches equally well, and tests that distinguish them.

The points of one plane have two motions (Malis and Vargas, INRIA RR-6303, 2007). Both fit the epipolar constraint of
every point. Points off the plane, points that one of the motions places behind a camera, and the prior (the motion of
the preceding pair) can show which one is correct.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import cv2
import numpy as np
from scipy.spatial.transform import Rotation
from scipy.special import chdtri, ndtri

from kpmatch_ros.geometry.camera import AHEAD
from kpmatch_ros.geometry.robust import FALSE_ALARM_RATE, SMALLEST_SAMPLE, TINY
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, dot, gains, residual_sizes

__all__ = ["Rival", "decide_by_prior", "distance", "is_distinct", "plane_motions", "rival_of", "spread"]

_SMALLEST_PLANE = 0.5  # part of the matches: with fewer on the plane, those off it refute the other motion

_PLANES = 100  # number of samples

_ORTHONORMAL, _NEARLY_ORTHONORMAL = 1e-10, 1e-2  # largest differences of R R' from the identity

_BAND = 10.0  # inlier thresholds: range of the residuals, under one motion, of matches that another motion explains

_UNEXPLAINED, _REFUTING = 0.1, 1.0  # log-likelihood ratios

_DISTINCT_ROTATION = math.radians(0.5)
_DISTINCT_DIRECTION = math.radians(5.0)

# Typical change of a robot's motion from one pair of frames to the next. The tails are those of Student's distribution
# with three degrees of freedom, because a motion sometimes changes abruptly.
_ROTATION_CHANGE = math.radians(1.0)
_RELATIVE_CHANGE = 0.1  # additional change, relative to the rotation
_DIRECTION_CHANGE = math.radians(10.0)
_FREEDOM = 3


class Rival(NamedTuple):
    """Another motion, compared with the chosen one.

    Attributes:
        motion: the other motion.
        score: difference of the two log-likelihoods, in standard deviations (Vuong, Econometrica, 1989); positive if
            the chosen motion is likelier.
        difference: of the log-likelihoods, for independent matches.
    """

    motion: Motion
    score: float
    difference: float

    @property
    def is_consistent(self) -> bool:
        """Whether the matches are consistent with it too: they do not refute it.

        A correct rival is refuted with a probability of at most FALSE_ALARM_RATE.
        """
        return self.score < float(-ndtri(FALSE_ALARM_RATE))

    @property
    def is_within_noise(self) -> bool:
        """Whether a correct motion could be this much less likely than the likeliest one.

        For a correct motion, twice the difference has a chi-square distribution (Wilks). For two motions that are not
        those of a plane, this test is the stricter one, because it relies on the noise's distribution.
        """
        return self.difference < float(chdtri(5, FALSE_ALARM_RATE)) / 2


def plane_motions(matches: Matches, motion: Motion, largest_distance: float) -> list[Motion]:
    """The motions, two up to sign, of a plane through at least half of the matches; empty if there is no such plane.

    Under a motion, the inverse depths of a plane's points are linear in their coordinates. RANSAC finds the plane with
    samples of three matches.

    Args:
        matches: those that agree with the motion.
        motion: one that explains them.
        largest_distance: largest distance of a point's image from its position if it were on the plane, pixels.
    """
    if len(matches) < SMALLEST_SAMPLE:
        return []
    # With inverse depth q, the current camera sees the reference's ray x0 at R' (x0 - q t), which should equal x1.
    back = motion.rotation.T
    turned, shift = back @ matches.rays0, back @ motion.translation
    residual = turned[:2] - matches.rays1[:2] * turned[2]
    slope = shift[:2, None] - matches.rays1[:2] * shift[2]
    weight = dot(slope, slope)
    inverse_depth = dot(slope, residual) / np.maximum(weight, TINY)
    # Apparent motion of the point, pixels, per change of the inverse depth.
    depth = np.maximum(turned[2] - inverse_depth * shift[2], AHEAD)
    scale = np.sqrt(2 * weight / (matches.noise1[0] + matches.noise1[2])) / depth
    rays, seen = matches.rays0 * scale, inverse_depth * scale
    samples = _triples(len(matches))
    systems = matches.rays0.T[samples]
    systems[:, range(3), range(3)] += 1e-9  # keeps the system regular if a match is drawn twice
    regular = np.linalg.det(systems) != 0  # three points on a line may still be singular to the last bit
    if not regular.any():
        return []
    planes = np.linalg.solve(systems[regular], inverse_depth[samples[regular]][..., None])[..., 0]
    near = np.abs(planes @ rays - seen) < largest_distance
    on_plane = near[near.sum(axis=1).argmax()]
    if on_plane.mean() < _SMALLEST_PLANE:
        return []
    plane = np.linalg.lstsq(rays[:, on_plane].T, seen[on_plane], rcond=None)[0]
    inverse = back @ (np.eye(3) - np.outer(motion.translation, plane))
    if np.linalg.det(inverse) == 0:  # the camera's centre is on the plane
        return []
    homography = np.linalg.inv(inverse)
    if not np.isfinite(homography).all():
        return []
    _, rotations, translations, _ = cv2.decomposeHomographyMat(homography, np.eye(3))
    return [
        Motion(rotation, translation.ravel() / length)
        for rotation, translation in zip(map(_as_rotation, rotations), translations)
        if rotation is not None and (length := float(np.linalg.norm(translation))) > 1e-6
    ]


@functools.lru_cache(maxsize=16)
def _triples(count: int) -> np.ndarray:
    """Random samples of three of `count` matches, (_PLANES, 3)."""
    samples = np.random.default_rng(0).integers(count, size=(_PLANES, 3))
    samples.setflags(write=False)
    return samples


def _as_rotation(matrix: np.ndarray) -> np.ndarray | None:
    """The rotation closest to a result of OpenCV; None if it is not close to a rotation.

    If the camera moves very little or is close to the plane, OpenCV's result may have lost its precision.
    """
    error = np.abs(matrix @ matrix.T - np.eye(3)).max()
    if error < _ORTHONORMAL and np.linalg.det(matrix) > 0:
        return matrix
    if not error < _NEARLY_ORTHONORMAL:  # also true for NaN
        return None
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ right) if np.linalg.det(matrix) > 0 else None


def rival_of(
    matches: Matches, chosen: Motion, other: Motion, inlier_threshold: float, deviation: float, design_effect: float
) -> Rival:
    """Compare two refined motions by the likelihood of each match.

    Both motions explain the points of a plane, but with different parts of their noise. Therefore the sum of the
    log-likelihood differences varies with the square root of the number of matches. Vuong's test estimates this
    variance from the matches.

    Args:
        matches: all matches, including wrong ones.
        chosen: the likelier motion.
        other: its rival.
        inlier_threshold: largest residual of an inlier, pixels.
        deviation: standard deviation of the keypoints' noise, pixels.
        design_effect: factor on the variance of an estimate, for errors that matches share.
    """
    own, others = (
        gains(residual_sizes(matches, motion, inlier_threshold), deviation, _BAND * inlier_threshold)
        for motion in (chosen, other)
    )
    difference = own - others
    # If the rival is correct, the matches that it leaves unexplained are wrong. They agree with the chosen motion by
    # chance, and do not measure the variation of the others. One such match is allowed for.
    refuting = (difference > _REFUTING) & (others < _UNEXPLAINED)
    usual = difference[~refuting]
    variance = float(((usual - usual.mean()) ** 2).sum()) if len(usual) else 0.0
    variance = design_effect * (variance + float(own.max()) ** 2)
    total = float(difference.sum())
    return Rival(other, total / math.sqrt(variance + 1e-12), total / design_effect)


def is_distinct(chosen: Motion, other: Motion, times: float = 1.0) -> bool:
    """Whether two motions differ by more than `times` 0.5 degrees of rotation or `times` 5 degrees of direction."""
    return (
        _angle(chosen.rotation.T @ other.rotation) > times * _DISTINCT_ROTATION
        or _between(chosen.translation, other.translation) > times * _DISTINCT_DIRECTION
    )


def distance(chosen: Motion, other: Motion) -> np.ndarray:
    """Difference (6,) of two motions: of the translations, and of the rotations about the reference frame's axes."""
    turn = Rotation.from_matrix(other.rotation @ chosen.rotation.T).as_rotvec()  # cv2 has 0 below 1e-5 radians
    return np.concatenate([other.translation - chosen.translation, turn])


def spread(chosen: Motion, other: Motion) -> np.ndarray:
    """The matrix (6, 6) that makes a covariance of translation and rotation cover another motion when added."""
    away = distance(chosen, other)
    return np.outer(away, away)


def decide_by_prior(motions: list[Motion], prior: Motion) -> Motion | None:
    """The one of several motions, equally likely by the matches, that is closest to the prior; None if undecided.

    It must be more probable than each other one by a factor of 1 / FALSE_ALARM_RATE.
    """
    values = [_log_prior(motion, prior) for motion in motions]
    order = np.argsort(values)[::-1]
    if len(order) > 1 and values[order[0]] - values[order[1]] < -math.log(FALSE_ALARM_RATE):
        return None
    return motions[order[0]]


def _log_prior(motion: Motion, prior: Motion) -> float:
    """Log probability density of a motion, given the prior, up to a constant."""
    change = _ROTATION_CHANGE + _RELATIVE_CHANGE * _angle(prior.rotation)
    turned = _angle(prior.rotation.T @ motion.rotation) / change
    shifted = _between(prior.translation, motion.translation) / _DIRECTION_CHANGE
    return -sum((_FREEDOM + size) / 2 * math.log1p(value**2 / _FREEDOM) for value, size in ((turned, 3), (shifted, 2)))


def _angle(rotation: np.ndarray) -> float:
    return float(np.linalg.norm(cv2.Rodrigues(rotation)[0]))


def _between(one: np.ndarray, other: np.ndarray) -> float:
    """Angle between two directions; a right angle if one of them is zero."""
    if not one.any() or not other.any():
        return math.pi / 2
    (a, b, c), (x, y, z) = one.tolist(), other.tolist()
    across = math.sqrt((b * z - c * y) ** 2 + (c * x - a * z) ** 2 + (a * y - b * x) ** 2)
    return math.atan2(across, a * x + b * y + c * z)
