"""Relative pose of two calibrated views from matched keypoints.

The motion has a translation, or is a pure rotation: both are fitted, and tests decide. What the residuals of the two
mean is said in :mod:`kpmatch_ros.geometry.two_view_errors`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2

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
from kpmatch_ros.geometry.two_modes import decide_by_prior, distance, is_distinct, plane_motions, rival_of, spread
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
    rotation_residuals,
    tangents,
)
from kpmatch_ros.geometry.two_view_fit import SETTLED, Noise, minimise, motion_covariance, rotation_covariance
from kpmatch_ros.geometry.two_view_profile import profile_directions
from kpmatch_ros.geometry.two_view_rotation import (
    TYPICAL,
    fit_rotation,
    fit_rotation_roughly,
    has_small_parallax,
    large_parallax_chance,
)
from kpmatch_ros.geometry.two_view_search import SAMPLE, search_motions, search_translations

__all__ = ["estimate_relative_pose"]

_HOPEFUL = 3  # candidates that are refined, the best ones

_LARGEST_LEVERAGE = 0.3  # of one match on the pose: 0 to 1; they add up to the degrees of freedom

# A robot's own body stands still in the image while the scene moves. The scene has at least so large a part of the
# matches; its motion explains so large a part of it; and what stands still speaks for this motion by so little of what
# the scene's matches do.
_SMALLEST_SCENE = 0.2
_EXPLAINED = 0.6
_CONTRADICTED = 0.5

# Other motions are searched for with fewer inliers, with a smaller part of the matches, or with a larger standard
# deviation of the translation's direction; among so many of the matches.
_FEW = 60
_MANY_WRONG = 0.5
_UNCERTAIN = math.radians(0.5)
_PROFILED = 100

_ALLOWED = float(chi2.isf(1e-3, 5))

_IN_FRONT = 0.5  # part of the matches: a motion that places more of them behind a camera is no rival

_SINGULAR = 1e-15  # part of the largest eigenvalue

# With so large a part of the matches that a rotation explains, samples of five rarely hold two of the others.
_MOSTLY_FAR = 0.4

_CERTAIN = 1e-12  # a false-alarm rate

_ROUGHLY = 1e-3  # part of the cost: what goes on from there is refined further


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
    body = _find_own_body(problem)
    if body.mask is None:
        solution = _solve(problem, body.candidates)
    else:
        solution = _solve_without(problem, body.mask, body.candidates)
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


def _solve(problem: _Problem, candidates: list[Motion]) -> _Solution:
    """The motion that most of the matches agree with; candidates are searched for where there are none."""
    matches, inlier_threshold, normalised_threshold, resolution, independent_points, chance, required, prior = problem
    candidates = candidates or search_motions(matches, inlier_threshold, normalised_threshold)
    starts = [np.eye(3)] + [candidate.rotation for candidate in candidates]
    rotation = fit_rotation_roughly(matches.sample(SAMPLE), starts, inlier_threshold)
    turning = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
    if turning.mean() > _MOSTLY_FAR:
        candidates = candidates + search_translations(matches.select(~turning), rotation, inlier_threshold)

    fit = _fit_motion(matches, candidates, inlier_threshold, resolution)
    moving = np.zeros(len(matches), dtype=bool) if fit is None else agrees(matches, fit.motion, inlier_threshold)
    if log_false_alarms(moving, np.full(len(matches), chance), 5) > math.log(FALSE_ALARM_RATE):
        fit = None

    # Where even this rotation leaves far too much to explain, no better one needs to be found.
    translates = fit is not None and (
        large_parallax_chance(matches, fit.motion, rotation, turning, inlier_threshold) < math.log(_CERTAIN)
    )
    if not translates:
        rotation = fit_rotation(matches, [rotation], inlier_threshold, resolution)
        turning = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
        translates = fit is not None and (
            large_parallax_chance(matches, fit.motion, rotation, turning, inlier_threshold)
            < math.log(FALSE_ALARM_RATE / 2)
        )
    noise = Noise(inlier_threshold, resolution, design_effect(turning, independent_points))
    if fit is not None and (translates or has_small_parallax(matches, fit.motion, rotation, turning, noise)):
        noise = noise._replace(design_effect=design_effect(moving, independent_points))
        covariance = _motion_covariance(fit, noise)
        decided, rivals = _decide(matches, fit, covariance, rotation, noise, prior)
        if decided is not fit:
            fit, moving = decided, agrees(matches, decided.motion, inlier_threshold)
            covariance = _motion_covariance(fit, noise)
        if moving.sum() < required:
            return _Solution(PoseStatus.TOO_FEW_MATCHES, inliers=moving)
        rivals = [rival for rival in rivals if not _covers(covariance, fit.motion, rival)]
        if any(is_distinct(fit.motion, rival) for rival in rivals):
            covariance = covariance + sum(spread(fit.motion, rival) for rival in rivals)
            return _Solution(PoseStatus.AMBIGUOUS, fit.motion, covariance, moving)
        # A unit vector does not vary along itself.
        across = np.eye(6)
        across[:3, :3] -= np.outer(fit.motion.translation, fit.motion.translation)
        covariance = covariance + sum(across @ spread(fit.motion, rival) @ across for rival in rivals)
        return _Solution(PoseStatus.OK, fit.motion, covariance, moving)
    if turning.sum() < required:
        if fit is None:
            return _Solution(PoseStatus.FAILED)
        return _Solution(PoseStatus.TOO_FEW_MATCHES, inliers=turning)
    covariance = _rotation_covariance(matches, rotation, noise)
    return _Solution(PoseStatus.NO_TRANSLATION, Motion(rotation, np.zeros(3)), covariance, turning)


class _Body(NamedTuple):
    """Which matches (n,) are on the robot's own body, None where none is; and candidates for the others' motion."""

    mask: np.ndarray | None
    candidates: list[Motion]


def _find_own_body(problem: _Problem) -> _Body:
    """Look whether the matches that stand still in the image contradict the motion of the rest.

    If so, they are on something that moves with the camera, as a robot's own body does, or the camera stands still
    before something that moves.
    """
    matches, inlier_threshold = problem.matches, problem.inlier_threshold
    still = lengths(rotation_residuals(matches, np.eye(3))) < inlier_threshold
    if still.sum() < problem.required or (~still).sum() < max(problem.required, _SMALLEST_SCENE * len(matches)):
        return _Body(None, [])
    scene, body = matches.select(~still), matches.select(still)
    own = search_motions(scene, inlier_threshold, problem.normalised_threshold)
    found = _best_candidate(scene, own, inlier_threshold)
    if found is None:
        return _Body(None, [])
    if not _contradicts(problem, scene, body, found):
        return _Body(None, own)
    whole = search_motions(matches, inlier_threshold, problem.normalised_threshold, 1)
    whole += search_translations(scene, np.eye(3), inlier_threshold)
    both = _best_candidate(matches, [found, *whole], inlier_threshold)
    assert both is not None
    if agrees(scene, both, inlier_threshold).mean() >= _EXPLAINED:
        return _Body(still, own) if _contradicts(problem, scene, body, both) else _Body(None, [both, *whole])
    deviation = _deviation(problem, scene, found)
    effect = design_effect(agrees(scene, found, inlier_threshold), problem.independent_points)
    if rival_of(scene, found, both, inlier_threshold, deviation, effect).is_alike:
        return _Body(None, [both, *whole])
    return _Body(still, own)


def _contradicts(problem: _Problem, scene: Matches, body: Matches, motion: Motion) -> bool:
    """Whether a motion explains the scene, and the body speaks against it."""
    inlier_threshold = problem.inlier_threshold
    agree = agrees(scene, motion, inlier_threshold)
    if agree.mean() < _EXPLAINED:
        return False
    if log_false_alarms(agree, np.full(len(scene), problem.chance), 5) > math.log(FALSE_ALARM_RATE):
        return False
    deviation = _deviation(problem, scene, motion)
    worth = [
        gains(residual_sizes(side, motion, inlier_threshold), deviation, inlier_threshold) for side in (scene, body)
    ]
    return bool(worth[1].mean() <= _CONTRADICTED * worth[0][agree].mean())


def _deviation(problem: _Problem, matches: Matches, motion: Motion) -> float:
    """Standard deviation of the keypoints' noise, pixels."""
    sizes = residual_sizes(matches, motion, problem.inlier_threshold)
    return tukey_cutoff(sizes, problem.inlier_threshold, problem.resolution) / TUKEY


def _solve_without(problem: _Problem, own_body: np.ndarray, candidates: list[Motion]) -> _Solution:
    """The motion of the matches that do not stand still in the image.

    Where more stand still than move, the camera may stand before something large that moves: AMBIGUOUS, unless the
    motion before tells.
    """
    solution = _solve(problem._replace(matches=problem.matches.select(~own_body)), candidates)
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


def _best_candidate(matches: Matches, candidates: list[Motion], inlier_threshold: float) -> Motion | None:
    """The best of the candidates, each refined on a sample of the matches; None without candidates."""
    different: list[Motion] = []
    for candidate in candidates:
        if all(is_distinct(candidate, other) for other in different):
            different.append(candidate)
    if not different:
        return None
    sample = matches.sample(SAMPLE)

    def order(motion: Motion) -> float:
        return disagreement(sample, motion, inlier_threshold)

    if len(different) > _HOPEFUL:
        different = sorted(different, key=order)[:_HOPEFUL]
    refined = [minimise(epipolar_jacobian, sample, one, 3 * inlier_threshold, 5, _ROUGHLY) for one in different]
    return min(refined, key=order) if len(refined) > 1 else refined[0]


def _fit_motion(matches: Matches, candidates: list[Motion], inlier_threshold: float, resolution: float) -> _Fit | None:
    """The best candidate, refined; None without candidates."""
    motion = _best_candidate(matches, candidates, inlier_threshold)
    return None if motion is None else _refine(matches, motion, inlier_threshold, resolution, 2)


def _refine(
    matches: Matches,
    motion: Motion,
    inlier_threshold: float,
    resolution: float,
    rounds: int,
    settled: float = SETTLED,
) -> _Fit:
    """A motion refined on the matches that are in front of the cameras, with Tukey's loss scaled to their noise."""
    for left in reversed(range(rounds)):
        start = residuals, jacobian = epipolar_jacobian(matches, motion)
        support = is_in_front(matches, motion, inlier_threshold)
        cutoff = tukey_cutoff(residuals[0, support], inlier_threshold, resolution)
        weighted = jacobian[:, 0] * np.sqrt(tukey(lengths(residuals), cutoff)[0] * support)
        information, axes = np.linalg.eigh(weighted @ weighted.T)
        axes = axes / np.sqrt(np.maximum(information, _SINGULAR * information[-1] + TINY))
        whitened = axes.T @ weighted
        support &= dot(whitened, whitened) < _LARGEST_LEVERAGE
        enough = _ROUGHLY if left else settled
        motion = minimise(epipolar_jacobian, matches, motion, cutoff, 10, enough, start, support)
    return _Fit(motion, matches.select(support))


class _Decision(NamedTuple):
    """Of the motions that explain the matches alike, the one to report, and the others."""

    fit: _Fit
    rivals: list[Motion]


def _decide(
    matches: Matches, fit: _Fit, covariance: np.ndarray, rotation: np.ndarray, noise: Noise, prior: Motion | None
) -> _Decision:
    """Look for the motions that explain the matches as well as the one found.

    A plane has another one. Where the geometry constrains the motion little, there may be some anywhere.
    """
    threshold = noise.inlier_threshold
    deviation = tukey_cutoff(epipolar_residuals(fit.support, fit.motion), threshold, noise.resolution) / TUKEY
    inliers = agrees(matches, fit.motion, min(threshold, TYPICAL * deviation))
    sample = matches.select(inliers).sample(SAMPLE)
    others = plane_motions(sample, fit.motion, math.sqrt(2) * TYPICAL * deviation)
    others = [motion for motion in others if is_in_front(sample, motion, threshold).mean() > _IN_FRONT]
    if _is_weak(inliers, covariance / noise.design_effect):
        some = matches.sample(_PROFILED)
        for motion in profile_directions(some, [rotation], threshold, deviation):
            others.append(minimise(epipolar_jacobian, some, motion, 3 * threshold, 5, _ROUGHLY))
    fits = [fit]
    for motion in others:
        if all(is_distinct(one.motion, motion) for one in fits):
            fits.append(_refine(matches, motion, threshold, noise.resolution, 1, _ROUGHLY))

    def evidence(fit: _Fit) -> float:
        return float(gains(residual_sizes(matches, fit.motion, threshold), deviation, threshold).sum())

    best = max(fits, key=evidence)
    if best is not fit:
        fits = [other for other in fits if other is not best]
        best = _refine(matches, best.motion, threshold, noise.resolution, 2)
    alike = [
        other
        for other in fits
        if other is not best
        and rival_of(matches, best.motion, other.motion, threshold, deviation, noise.design_effect).is_alike
    ]
    distinct = [other for other in alike if is_distinct(best.motion, other.motion)]
    if distinct and prior is not None:
        likely = decide_by_prior([one.motion for one in (best, *distinct)], prior)
        if likely is not None:
            best = next(one for one in (best, *distinct) if one.motion is likely)
            return _Decision(best, [one.motion for one in alike if not is_distinct(best.motion, one.motion)])
    return _Decision(best, [one.motion for one in alike])


# How sure.


def _is_weak(inliers: np.ndarray, covariance: np.ndarray) -> bool:
    """Whether the geometry constrains a motion so little that others may explain the matches (n,) as well."""
    uncertain = float(np.linalg.eigvalsh(covariance[:3, :3])[-1]) > _UNCERTAIN**2
    return bool(inliers.sum() < _FEW or inliers.mean() < _MANY_WRONG or uncertain)


def _motion_covariance(fit: _Fit, noise: Noise) -> np.ndarray:
    """(6, 6) covariance of the translation's direction and the rotation."""
    expand = np.zeros((6, 5))
    expand[3:, :3] = np.eye(3)
    expand[:3, 3:] = tangents(fit.motion.translation)
    return expand @ motion_covariance(fit.support, fit.motion, noise) @ expand.T


def _covers(covariance: np.ndarray, motion: Motion, other: Motion) -> bool:
    """Whether another motion is among those that a covariance (6, 6) allows for, but for one in a thousand."""
    away = distance(motion, other)
    away[:3] -= (away[:3] @ motion.translation) * motion.translation
    near = float(motion.translation @ other.translation) > 0
    return near and away @ np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ away < _ALLOWED


def _rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """(6, 6) covariance of a unit vector of unknown direction and the rotation."""
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = np.eye(3) / 3
    covariance[3:, 3:] = rotation_covariance(matches, rotation, noise)
    return covariance
