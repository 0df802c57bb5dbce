"""The motion with translation that most matches of two views agree with, and its rivals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.robust import ENOUGH_INLIERS, TINY, TUKEY, tukey, tukey_cutoff
from kpmatch_ros.geometry.two_modes import decide_by_prior, is_distinct, plane_motions, rival_of
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    agrees,
    differentiate,
    disagreement,
    dot,
    epipolar_residuals,
    gains,
    is_in_front,
    lengths,
    residual_sizes,
)
from kpmatch_ros.geometry.two_view_fit import SETTLED, Covariances, Noise, minimise
from kpmatch_ros.geometry.two_view_profile import profile_covariance, profile_directions
from kpmatch_ros.geometry.two_view_rotation import TYPICAL
from kpmatch_ros.geometry.two_view_search import SAMPLE

__all__ = ["Decision", "Fit", "best_candidate", "decide", "fit_motion", "widen"]

_REFINED = 3  # best candidates, which are refined

# Leverage of one match on the pose, from 0 to 1. The leverages add up to the degrees of freedom. Therefore each of few
# matches has a large one.
_LARGEST_LEVERAGE = 0.3
_TIMES_THE_MEAN = 2.0

# The geometry is weak with fewer inliers, or with a larger standard deviation of the translation's direction. The
# likelihood is then profiled with a sample of _PROFILED matches.
_FEW = 60
_UNCERTAIN = math.radians(0.5)
_PROFILED = 100
_OTHER = 2.0  # times the distance of distinct motions; closer motions are the same maximum

_IN_FRONT = 0.5  # part of the matches: a motion that places fewer of them in front of the cameras is not a rival

_SINGULAR = 1e-15  # relative to the largest eigenvalue

_NARROW = 0.25  # distance of a ray from the mean of all, in normalised coordinates

_ROUGHLY = 2e-3  # relative decrease of the cost, for fits that are refined later


class Fit(NamedTuple):
    """A motion and the matches that determine it, all in front of the cameras.

    Matches that determine a degree of freedom almost alone are left out, because they fit whether correct or wrong.
    """

    motion: Motion
    support: Matches


def best_candidate(matches: Matches, candidates: list[Motion], inlier_threshold: float) -> Motion | None:
    """The best of the candidates, after refinement on a sample of the matches; None without candidates."""
    different: list[Motion] = []
    for candidate in candidates:
        if all(is_distinct(candidate, other) for other in different):
            different.append(candidate)
    if not different:
        return None
    sample = matches.sample(SAMPLE)

    def order(motion: Motion) -> float:
        return disagreement(sample, motion, inlier_threshold)

    if len(different) > _REFINED:
        different = sorted(different, key=order)[:_REFINED]
    refined = [minimise(Model.EPIPOLAR, sample, one, 3 * inlier_threshold, 5, _ROUGHLY) for one in different]
    return min(refined, key=order) if len(refined) > 1 else refined[0]


def fit_motion(matches: Matches, candidates: list[Motion], inlier_threshold: float, resolution: float) -> Fit | None:
    """The best candidate, refined on all matches; None without candidates."""
    motion = best_candidate(matches, candidates, inlier_threshold)
    return None if motion is None else _refine(matches, motion, inlier_threshold, resolution, 2)


def _refine(
    matches: Matches,
    motion: Motion,
    inlier_threshold: float,
    resolution: float,
    rounds: int,
    settled: float = SETTLED,
) -> Fit:
    """A motion refined on the matches in front of the cameras, with Tukey's loss scaled to their noise."""
    for remaining in reversed(range(rounds)):
        residuals, jacobian = differentiate(Model.EPIPOLAR, matches, motion)
        support = is_in_front(matches, motion, inlier_threshold)
        cutoff = tukey_cutoff(residuals[0, support], inlier_threshold, resolution)
        weights = tukey(lengths(residuals), cutoff)[0] * support
        weighted = jacobian[:, 0] * np.sqrt(weights)
        information, axes = np.linalg.eigh(weighted @ weighted.T)
        axes = axes / np.sqrt(np.maximum(information, _SINGULAR * information[-1] + TINY))
        whitened = axes.T @ jacobian[:, 0]
        # The leverage is that of a match with full weight. A wrong match that was left out in the previous round is now
        # beyond the cutoff. With its real weight it would come back and pull the fit again.
        squares = dot(whitened, whitened)
        leverage = squares / (1 + (1 - weights) * squares)
        support &= leverage < max(_LARGEST_LEVERAGE, _TIMES_THE_MEAN * len(jacobian) / max(weights.sum(), 1.0))
        enough = _ROUGHLY if remaining else settled
        motion = minimise(Model.EPIPOLAR, matches, motion, cutoff, 10, enough, support)
    return Fit(motion, matches.select(support))


class Decision(NamedTuple):
    """The motion to report, and the others that explain the matches equally well."""

    fit: Fit
    rivals: list[Motion]


def decide(
    matches: Matches, fit: Fit, covariance: np.ndarray, rotation: np.ndarray, noise: Noise, prior: Motion | None
) -> Decision:
    """Find other motions that explain the matches as well as the fit, and decide between them.

    A plane has a second motion. If the geometry is weak, other motions may be anywhere.

    Args:
        matches: all matches.
        fit: the motion found.
        covariance: (6, 6) of the fit, under equal errors of the matches.
        rotation: (3, 3) the pure rotation that explains most matches.
        noise: of the keypoints.
        prior: motion between the two preceding images; None if unknown.
    """
    threshold = noise.inlier_threshold
    deviation = tukey_cutoff(epipolar_residuals(fit.support, fit.motion), threshold, noise.resolution) / TUKEY
    inliers = agrees(matches, fit.motion, min(threshold, TYPICAL * deviation))
    sample = matches.select(inliers).sample(SAMPLE)
    others = plane_motions(sample, fit.motion, math.sqrt(2) * TYPICAL * deviation)
    others = [motion for motion in others if is_in_front(sample, motion, threshold).mean() > _IN_FRONT]
    fits = [fit]
    for motion in others:
        if all(is_distinct(one.motion, motion) for one in fits):
            fits.append(_refine(matches, motion, threshold, noise.resolution, 1, _ROUGHLY))
    planes = len(fits)
    if _is_weak(inliers, covariance / noise.design_effect):
        some = matches.sample(_PROFILED)
        for motion in profile_directions(some, [rotation], threshold, deviation):
            nearby = minimise(Model.EPIPOLAR, some, motion, 3 * threshold, 5, _ROUGHLY)
            if all(is_distinct(one.motion, nearby) for one in fits):
                found = _refine(matches, nearby, threshold, noise.resolution, 1, _ROUGHLY)
                if all(is_distinct(one.motion, found.motion, _OTHER) for one in fits):
                    fits.append(found)

    def evidence(fit: Fit) -> float:
        return float(gains(residual_sizes(matches, fit.motion, threshold), deviation, threshold).sum())

    first = int(np.argmax([evidence(one) for one in fits]))
    if _is_narrow(sample):
        found = _refine(matches, _mirrored(sample, fits[first].motion), threshold, noise.resolution, 2)
        if is_in_front(sample, found.motion, threshold).mean() > _IN_FRONT:
            fits.append(found)
            first = int(np.argmax([evidence(one) for one in fits]))
    best, rivals = fits[first], []
    for index, other in enumerate(fits):
        if index != first:
            compared = rival_of(matches, best.motion, other.motion, threshold, deviation, noise.design_effect)
            if compared.is_consistent and (max(index, first) < planes or compared.is_within_noise):
                rivals.append(other)
    if best is not fit:
        best = _refine(matches, best.motion, threshold, noise.resolution, 2)
    distinct = [other for other in rivals if is_distinct(best.motion, other.motion)]
    if distinct and prior is not None:
        likely = decide_by_prior([one.motion for one in (best, *distinct)], prior)
        if likely is not None:
            best = next(one for one in (best, *distinct) if one.motion is likely)
            rivals = [one for one in rivals if not is_distinct(best.motion, one.motion)]
    return Decision(best, [one.motion for one in rivals])


def widen(matches: Matches, fit: Fit, covariances: Covariances, noise: Noise) -> tuple[np.ndarray, np.ndarray]:
    """The covariance (6, 6) of a fit. If the geometry is weak, it is that of the likelihood around the fit.

    The residuals of few matches are a poor measure of each match's error. `covariances.equal_errors`, which all matches
    determine together, is then a lower bound.

    Returns:
        the covariance, and the covariance of the likelihood near the fit only, which shows which other motions belong
        to the same maximum.
    """
    threshold = noise.inlier_threshold
    deviation = tukey_cutoff(epipolar_residuals(fit.support, fit.motion), threshold, noise.resolution) / TUKEY
    inliers = agrees(matches, fit.motion, min(threshold, TYPICAL * deviation))
    if not _is_weak(inliers, covariances.equal_errors / noise.design_effect):
        return covariances.shared_errors, covariances.shared_errors
    some = matches.sample(SAMPLE)
    evidence = len(matches) / len(some) / noise.design_effect
    near, wide = profile_covariance(some, fit.motion, covariances.equal_errors, threshold, deviation, evidence)
    return _at_least(wide, covariances.shared_errors), _at_least(near, covariances.shared_errors)


def _at_least(covariance: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A covariance, enlarged in the directions where another one is larger."""
    more, axes = np.linalg.eigh(other - covariance)
    return np.asarray(covariance + (axes * np.maximum(more, 0.0)) @ axes.T)


def _is_narrow(matches: Matches) -> bool:
    """Whether the matches cover so small an angle that their depths may be mirrored, see :func:`_mirrored`."""
    if len(matches) == 0:
        return False
    spread = matches.rays0 - matches.rays0.mean(axis=1, keepdims=True)
    return bool(lengths(spread).max() < _NARROW)


def _mirrored(matches: Matches, motion: Motion) -> Motion:
    """The motion that explains the matches of a narrow view with mirrored depths: near points far away, far ones near.

    Perspective changes such a view little. The camera moves to the other side of the line of sight, and turns to the
    other side of the mean rotation of the rays.
    """
    sight, turned = matches.rays0.mean(axis=1), motion.rotation @ matches.rays1.mean(axis=1)
    sight, turned = sight / np.linalg.norm(sight), turned / np.linalg.norm(turned)
    twice = Rotation.from_rotvec(2 * np.cross(turned, sight)).as_matrix()  # for these small angles
    shift = 2 * (motion.translation @ sight) * sight - motion.translation
    return Motion(twice @ motion.rotation, shift)


def _is_weak(inliers: np.ndarray, covariance: np.ndarray) -> bool:
    """Whether the geometry is so weak that other motions may explain the matches (n,) as well."""
    uncertain = float(np.linalg.eigvalsh(covariance[:3, :3])[-1]) > _UNCERTAIN**2
    return bool(inliers.sum() < _FEW or inliers.mean() < ENOUGH_INLIERS or uncertain)
