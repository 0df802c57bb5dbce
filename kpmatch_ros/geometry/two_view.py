"""Relative pose of two calibrated views from matched keypoints.

The motion has a translation, or is a pure rotation: both are fitted, and tests decide. What the residuals of the two
mean is said in :mod:`kpmatch_ros.geometry.two_view_errors`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import (
    FALSE_ALARM_RATE,
    SMALLEST_SAMPLE,
    TINY,
    TUKEY,
    check_options,
    design_effect,
    epipolar_chance,
    log_false_alarms,
    tukey,
    tukey_cutoff,
)
from kpmatch_ros.geometry.two_modes import decide_by_prior, is_distinct, plane_motions, rival_of, spread
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Motion,
    agrees,
    disagreement,
    dot,
    epipolar_jacobian,
    epipolar_residuals,
    gains,
    is_in_front,
    lengths,
    median_parallax,
    normalise_matches,
    residual_sizes,
    rotation_jacobian,
    rotation_residuals,
    tangents,
)
from kpmatch_ros.geometry.two_view_fit import Noise, covariance_of, minimise
from kpmatch_ros.geometry.two_view_search import search_motions, search_translations

__all__ = ["Noise", "estimate_relative_pose", "fit_rotation", "small_parallax_chance"]

_HOPEFUL = 3  # candidates that are refined, the best ones

_LARGEST_LEVERAGE = 0.3  # of one match on the pose: 0 to 1; they add up to the degrees of freedom

# Under a pure rotation, a match may still be further than the inlier threshold from where the rotation takes it. It may
# have slipped along an edge: up to so many thresholds, and so many matches for each one that has not slipped.
_LONGEST_SLIP = 5.0
_SLIPS = 1 / 3
# Or it is wrong, in any direction, but so many times as often along the image's longer side as equal chances have it.
_UNEQUAL = 2.0
# Keypoints jitter along their edges, which often have one direction in common. The variance of their noise, but for
# rounding, may be so many times that across this direction (measured: 2.9).
_UNEVEN = 3.0
# The test for small parallax leaves out the tails of the noise, beyond so many standard deviations.
_TYPICAL = 3.0
# The smallest F-test probability over all directions of translation is about that of the smallest of 50 independent
# ones (simulated: 10 to 50, for 20 to 150 degrees of view and 30 to 800 matches).
_INDEPENDENT_DIRECTIONS = 50

# A robot's own body stands still in the image while the scene moves. The scene has at least so large a part of the
# matches; its motion explains so large a part of it; and what stands still speaks for this motion by so little of what
# the scene's matches do.
_SMALLEST_SCENE = 0.2
_EXPLAINED = 0.6
_CONTRADICTED = 0.5

_EVERYTHING = 1e9  # pixels: a cutoff beyond all residuals


def estimate_relative_pose(
    points0: np.ndarray,
    points1: np.ndarray,
    camera0: Camera | None,
    camera1: Camera | None,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
    keypoint_resolution: float = 1.0,
    independent_points: float = math.inf,
    prior: Motion | None = None,
) -> RelativePose:
    """Pose of the current camera in the reference camera's optical frame, from matched keypoints.

    Candidates come from RANSAC with the five-point solver (OpenCV; Nister, PAMI 2004), and from RANSAC for the
    translation alone, given the rotation that explains most matches. The likeliest is refined by Levenberg-Marquardt on
    the Sampson distances of all matches in front of the cameras, with Tukey's loss scaled to the noise. The same input
    gives the same answer, on any thread.

    Three tests have a false-alarm rate of FALSE_ALARM_RATE. The status is FAILED unless the first one says that wrong
    matches would not agree as well. It is OK only if the second one says that no rotation alone explains the matches,
    and the third one that the other motion of a plane does not explain them as well. Otherwise the status is AMBIGUOUS,
    unless the motion before tells.

    Matches that stand still in the image while the rest moves otherwise are outliers, as those on a robot's own body
    are. If more stand still than move, the status is AMBIGUOUS, unless the motion before tells. Otherwise two views
    cannot tell a translation from objects that move before a standing camera, nor from a calibration that is wrong by
    more than the noise.

    Args:
        points0: (M, 2) pixels in the reference image as received. NaN and infinity are outliers.
        points1: (M, 2) pixels in the current image, the same matches.
        camera0: calibration of the reference image; None gives NO_CALIBRATION.
        camera1: calibration of the current image.
        max_reprojection_error: the largest of an inlier, pixels.
        min_inliers: fewer matches, or inliers, give TOO_FEW_MATCHES; fewer than 8 always do.
        keypoint_resolution: pixels between neighbouring positions that the detector can give: 1 for whole pixels, more
            where it sees the image made smaller, 0 for any position. Parallax below it is taken for rounding, and the
            covariance is no smaller than rounding allows.
        independent_points: how many points, at most, err independently of each other. With more points, the test and
            the covariance are those of so many: more points on the same surfaces do not make the pose surer.
        prior: the motion between the two images before, over about the same time, where it is known. It decides between
            motions that explain the matches alike.

    Returns:
        The pose, or why there is none.

    Raises:
        ValueError: the arrays have another shape, or a parameter is out of range.
    """
    points0, points1 = np.asarray(points0, dtype=np.float64), np.asarray(points1, dtype=np.float64)
    if points0.shape != points1.shape or points0.ndim != 2 or points0.shape[1] != 2:
        raise ValueError(f"points0 and points1 must both have shape (M, 2), not {points0.shape} and {points1.shape}")
    check_options(max_reprojection_error, keypoint_resolution)
    total, inlier_threshold = len(points0), float(max_reprojection_error)
    required = max(min_inliers, SMALLEST_SAMPLE)
    if camera0 is None or camera1 is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, total)
    if total < required:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)
    matches, usable = normalise_matches(points0, points1, camera0, camera1)
    if len(matches) < required:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)

    normalised_threshold = 2 * inlier_threshold / (camera0.focal + camera1.focal)
    problem = _Problem(
        matches,
        inlier_threshold,
        normalised_threshold,
        keypoint_resolution,
        independent_points,
        epipolar_chance(camera0, inlier_threshold),
        required,
        prior,
    )
    solution = _solve(problem)
    own_body = _find_own_body(problem, solution)
    if own_body is not None:
        solution = _solve_without(problem, own_body)
    inliers = None
    if solution.inliers is not None:
        inliers = np.zeros(total, dtype=bool)
        inliers[usable] = solution.inliers
    if solution.motion is None or solution.inliers is None:
        return RelativePose.undefined(solution.status, total, inliers)
    return RelativePose(
        status=solution.status,
        rotation=solution.motion.rotation,
        translation=solution.motion.translation,
        covariance=solution.covariance,
        metric=False,
        num_matches=total,
        num_inliers=int(solution.inliers.sum()),
        median_parallax=median_parallax(matches.select(solution.inliers), solution.motion.rotation),
        inliers=inliers,
    )


class _Problem(NamedTuple):
    """Usable matches, and what estimate_relative_pose was told of them.

    `chance` is the probability that a wrong match is within the inlier threshold of its epipolar line.
    """

    matches: Matches
    inlier_threshold: float
    normalised_threshold: float
    resolution: float
    independent_points: float
    chance: float
    required: int
    prior: Motion | None


class _Solution(NamedTuple):
    """What became of a problem: its motion, None without a pose, and its inliers (n,), None if not estimated."""

    status: PoseStatus
    motion: Motion | None = None
    covariance: np.ndarray = np.zeros((6, 6))
    inliers: np.ndarray | None = None


def _solve(problem: _Problem) -> _Solution:
    """The motion that most of the matches agree with."""
    matches, inlier_threshold, normalised_threshold, resolution, independent_points, chance, required, prior = problem
    candidates = search_motions(matches, inlier_threshold, normalised_threshold)
    starts = [np.eye(3)] + [candidate.rotation for candidate in candidates]
    rotation = fit_rotation(matches, starts, inlier_threshold, resolution)
    turning = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
    candidates += search_translations(matches.select(~turning), rotation, inlier_threshold)

    fit = _fit_motion(matches, candidates, inlier_threshold, resolution)
    moving = np.zeros(len(matches), dtype=bool) if fit is None else agrees(matches, fit.motion, inlier_threshold)
    if log_false_alarms(moving, np.full(len(matches), chance), 5) > math.log(FALSE_ALARM_RATE):
        fit = None

    noise = Noise(inlier_threshold, resolution, design_effect(turning, independent_points))
    if fit is not None and _is_translation(matches, fit.motion, rotation, turning, noise):
        noise = noise._replace(design_effect=design_effect(moving, independent_points))
        fit, rivals = _decide(matches, fit, normalised_threshold, noise, prior)
        moving = agrees(matches, fit.motion, inlier_threshold)
        if moving.sum() < required:
            return _Solution(PoseStatus.TOO_FEW_MATCHES, inliers=moving)
        ambiguous = any(is_distinct(fit.motion, rival) for rival in rivals)
        covariance = _motion_covariance(fit, noise) + sum(spread(fit.motion, rival) for rival in rivals)
        return _Solution(PoseStatus.AMBIGUOUS if ambiguous else PoseStatus.OK, fit.motion, covariance, moving)
    if turning.sum() < required:
        if fit is None:
            return _Solution(PoseStatus.FAILED)
        return _Solution(PoseStatus.TOO_FEW_MATCHES, inliers=turning)
    covariance = _rotation_covariance(matches, rotation, noise)
    return _Solution(PoseStatus.NO_TRANSLATION, Motion(rotation, np.zeros(3)), covariance, turning)


def _find_own_body(problem: _Problem, solution: _Solution) -> np.ndarray | None:
    """Which matches (n,) stand still in the image while the rest moves otherwise; None where the two agree.

    They are on something that moves with the camera, as a robot's own body does, or the camera stands still before
    something that moves.
    """
    matches, inlier_threshold = problem.matches, problem.inlier_threshold
    still = lengths(rotation_residuals(matches, np.eye(3))) < inlier_threshold
    if still.sum() < problem.required or (~still).sum() < max(problem.required, _SMALLEST_SCENE * len(matches)):
        return None
    scene, body = matches.select(~still), matches.select(still)
    motion = solution.motion
    if motion is not None and not motion.translation.any():
        motion = None
    found = motion
    if motion is None or agrees(scene, motion, inlier_threshold).mean() < _EXPLAINED:
        candidates = search_motions(scene, inlier_threshold, problem.normalised_threshold)
        fit = _fit_motion(scene, candidates, inlier_threshold, problem.resolution)
        if fit is None:
            return None
        found = fit.motion
    assert found is not None
    agree = agrees(scene, found, inlier_threshold)
    if agree.mean() < _EXPLAINED or log_false_alarms(agree, np.full(len(scene), problem.chance), 5) > math.log(
        FALSE_ALARM_RATE
    ):
        return None
    deviation = (
        tukey_cutoff(residual_sizes(scene, found, inlier_threshold), inlier_threshold, problem.resolution) / TUKEY
    )
    worth = [
        gains(residual_sizes(side, found, inlier_threshold), deviation, inlier_threshold) for side in (scene, body)
    ]
    if worth[1].mean() > _CONTRADICTED * worth[0][agree].mean():
        return None
    other = motion if motion is not None else Motion(np.eye(3), np.array([0.0, 0.0, 1.0]))
    effect = design_effect(agree, problem.independent_points)
    if found is not motion and rival_of(scene, found, other, inlier_threshold, deviation, effect).is_alike:
        return None
    return still


def _solve_without(problem: _Problem, own_body: np.ndarray) -> _Solution:
    """The motion of the matches that do not stand still in the image.

    Where more stand still than move, the camera may stand before something large that moves: AMBIGUOUS, unless the
    motion before tells.
    """
    solution = _solve(problem._replace(matches=problem.matches.select(~own_body)))
    if solution.inliers is None:
        return solution
    inliers = np.zeros(len(own_body), dtype=bool)
    inliers[~own_body] = solution.inliers
    solution = solution._replace(inliers=inliers)
    if solution.status is not PoseStatus.OK or solution.motion is None or own_body.sum() <= inliers.sum():
        return solution
    standing = Motion(np.eye(3), np.zeros(3))
    if problem.prior is not None and decide_by_prior([solution.motion, standing], problem.prior) is solution.motion:
        return solution
    covariance = solution.covariance + spread(solution.motion, standing)
    return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)


# The motion with translation.


class _Fit(NamedTuple):
    """A motion and the matches that decided it: those in front of the cameras.

    The few that have a degree of freedom almost to themselves are left out: they fit whether they are right or wrong.
    """

    motion: Motion
    support: Matches


def _fit_motion(matches: Matches, candidates: list[Motion], inlier_threshold: float, resolution: float) -> _Fit | None:
    """The best candidate, refined; None without candidates."""
    if not candidates:
        return None

    def order(motion: Motion) -> float:
        return disagreement(matches, motion, inlier_threshold)

    refined = [
        minimise(epipolar_jacobian, matches, candidate, 3 * inlier_threshold, 5)
        for candidate in sorted(candidates, key=order)[:_HOPEFUL]
    ]
    return _refine(matches, min(refined, key=order), inlier_threshold, resolution, 3)


def _refine(matches: Matches, motion: Motion, inlier_threshold: float, resolution: float, rounds: int) -> _Fit:
    """A motion refined on the matches that are in front of the cameras, with Tukey's loss scaled to their noise."""
    for _ in range(rounds):
        support = matches.select(is_in_front(matches, motion, inlier_threshold))
        residuals, jacobian = epipolar_jacobian(support, motion)
        cutoff = tukey_cutoff(residuals, inlier_threshold, resolution)
        weighted = jacobian[:, 0] * np.sqrt(tukey(lengths(residuals), cutoff)[0])[:, None]
        leverage = dot(weighted @ np.linalg.pinv(weighted.T @ weighted), weighted)
        support = support.select(leverage < _LARGEST_LEVERAGE)
        motion = minimise(epipolar_jacobian, support, motion, cutoff, 10)
    return _Fit(motion, support)


class _Decision(NamedTuple):
    """Of the motions that explain the matches alike, the one to report, and the others."""

    fit: _Fit
    rivals: list[Motion]


def _decide(matches: Matches, fit: _Fit, normalised_threshold: float, noise: Noise, prior: Motion | None) -> _Decision:
    """Look for the motions that explain the matches as well as the one found, as the other one of a plane does."""
    deviation = (
        tukey_cutoff(epipolar_residuals(fit.support, fit.motion), noise.inlier_threshold, noise.resolution) / TUKEY
    )
    near = matches.select(agrees(matches, fit.motion, min(noise.inlier_threshold, _TYPICAL * deviation)))
    scale = normalised_threshold / noise.inlier_threshold
    found = plane_motions(near, _TYPICAL * deviation * scale)
    fits = [fit] + [_refine(matches, motion, noise.inlier_threshold, noise.resolution, 2) for motion in found]

    def evidence(fit: _Fit) -> float:
        return float(
            gains(residual_sizes(matches, fit.motion, noise.inlier_threshold), deviation, noise.inlier_threshold).sum()
        )

    best = max(fits, key=evidence)
    alike = [
        other
        for other in fits
        if other is not best
        and rival_of(
            matches, best.motion, other.motion, noise.inlier_threshold, deviation, noise.design_effect
        ).is_alike
    ]
    distinct = [other for other in alike if is_distinct(best.motion, other.motion)]
    if distinct and prior is not None:
        likely = decide_by_prior([one.motion for one in (best, *distinct)], prior)
        if likely is not None:
            best = next(one for one in (best, *distinct) if one.motion is likely)
            return _Decision(best, [one.motion for one in alike if not is_distinct(best.motion, one.motion)])
    return _Decision(best, [one.motion for one in alike])


# The rotation alone.


def fit_rotation(matches: Matches, starts: list[np.ndarray], inlier_threshold: float, resolution: float) -> np.ndarray:
    """The rotation (3, 3) that brings most matches within the inlier threshold, from the best of the starts."""
    wide = 16 * inlier_threshold
    still = [Motion(rotation, np.zeros(3)) for rotation in starts]
    motion = min(still, key=lambda motion: tukey(lengths(rotation_residuals(matches, motion.rotation)), wide)[1])
    for cutoff in (wide, 4 * inlier_threshold):
        motion = minimise(rotation_jacobian, matches, motion, cutoff, 5)
    cutoff = tukey_cutoff(rotation_residuals(matches, motion.rotation), inlier_threshold, resolution)
    return minimise(rotation_jacobian, matches, motion, cutoff, 10).rotation


# Which of the two, and how sure.


def _is_translation(matches: Matches, motion: Motion, rotation: np.ndarray, turning: np.ndarray, noise: Noise) -> bool:
    """Whether the rotation alone leaves something to explain, with a false-alarm rate of FALSE_ALARM_RATE.

    Two tests share the rate. The one for large parallax asks whether too many of the matches that the rotation does not
    explain lie along their epipolar lines, on the side of points in front. Matches that may have slipped are not
    counted. The one for small parallax is the F-test of the matches that the rotation does explain, without the tails
    of the noise.
    """
    rate, inlier_threshold = FALSE_ALARM_RATE / 2, noise.inlier_threshold
    others = matches.select(~turning)
    distance = lengths(rotation_residuals(others, rotation))
    # How probable it is that a residual of this length, in a random direction, ends near a half-line.
    chances = _UNEQUAL * np.arcsin(np.minimum(inlier_threshold / np.maximum(distance, TINY), 1)) / math.pi
    along = agrees(others, motion, inlier_threshold)
    slipped = np.flatnonzero(along & (distance < _LONGEST_SLIP * inlier_threshold))
    counted = np.ones(len(others), dtype=bool)
    counted[slipped[np.argsort(-distance[slipped])][: int(_SLIPS * turning.sum())]] = False
    if log_false_alarms(along[counted], np.minimum(chances, 1)[counted], 2) < math.log(rate):
        return True
    residuals = rotation_residuals(matches, rotation)
    deviation = tukey_cutoff(residuals, inlier_threshold, noise.resolution) / TUKEY
    typical = turning & (lengths(residuals) < _TYPICAL * deviation)
    return small_parallax_chance(matches.select(typical), motion, rotation, noise) < rate


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
    turned = minimise(rotation_jacobian, matches, Motion(rotation, np.zeros(3)), _EVERYTHING, 5).rotation
    total = float((rotation_residuals(matches, turned) ** 2).sum())
    # To first order, the translation is the direction nearest to all the planes of the two rays.
    normals = np.cross(matches.rays1 @ turned.T, matches.rays0)
    starts = (motion, Motion(turned, np.linalg.eigh(normals.T @ normals)[1][:, 0]))
    fits = [minimise(epipolar_jacobian, matches, start, _EVERYTHING, 10) for start in starts]
    across = min(float((epipolar_residuals(matches, fit) ** 2).sum()) for fit in fits)
    variance = across / (count - 5)
    jitter = max(variance - noise.resolution**2 / 12, 0.0)
    allowed = noise.design_effect * (max(variance, noise.resolution**2 / 8, TINY) + (_UNEVEN - 1) * jitter)
    ratio = max(total - across, 0.0) / (count + 2) / allowed
    return _INDEPENDENT_DIRECTIONS * float(fdtrc(count + 2, count - 5, ratio))


def _motion_covariance(fit: _Fit, noise: Noise) -> np.ndarray:
    """(6, 6) covariance of the translation's direction and the rotation."""
    expand = np.zeros((6, 5))
    expand[3:, :3] = np.eye(3)
    expand[:3, 3:] = tangents(fit.motion.translation)
    return expand @ covariance_of(epipolar_jacobian, fit.support, fit.motion, noise) @ expand.T


def _rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """(6, 6) covariance of a unit vector of unknown direction and the rotation."""
    turn = Motion(rotation, np.zeros(3))
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = np.eye(3) / 3
    covariance[3:, 3:] = covariance_of(rotation_jacobian, matches, turn, noise)
    return covariance
