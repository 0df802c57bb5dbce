"""Relative pose of two calibrated views from matched keypoints.

The motion has a translation, or is a pure rotation: both are fitted, and tests decide. What the residuals of the two
mean is said in :mod:`kpmatch_ros.geometry.two_view_errors`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import chdtri

from kpmatch_ros.geometry.camera import Camera, check_camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import (
    FALSE_ALARM_RATE,
    LOOSELY,
    MANY_WRONG,
    SMALLEST_SAMPLE,
    check_options,
    check_sigmas,
    design_effect,
    dimensions,
    epipolar_chance,
    is_other_motion,
    log_false_alarms,
    without_copies,
)
from kpmatch_ros.geometry.rolling_shutter import check_readout, read_at_once, reading_times
from kpmatch_ros.geometry.two_modes import decide_by_prior, distance, is_distinct, spread
from kpmatch_ros.geometry.two_view_body import find_own_body
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Motion,
    agrees,
    gains,
    lengths,
    median_parallax,
    normalise_matches,
    residual_sizes,
    rotation_residuals,
    tangents,
)
from kpmatch_ros.geometry.two_view_fit import Covariances, Noise, motion_covariances, rotation_covariance
from kpmatch_ros.geometry.two_view_hidden import hidden_translation_covariance
from kpmatch_ros.geometry.two_view_motion import Fit, best_candidate, decide, fit_motion, widen
from kpmatch_ros.geometry.two_view_problem import Problem, Solution, spread_out, weigh
from kpmatch_ros.geometry.two_view_rotation import (
    Parallax,
    find_parallax,
    fit_rotation,
    fit_rotation_roughly,
    has_certain_parallax,
    may_have_parallax,
)
from kpmatch_ros.geometry.two_view_search import SAMPLE, search_motions, search_translations

__all__ = ["estimate_relative_pose"]

# Noise above the threshold spreads the residuals evenly up to it, as a standard deviation of 1.5 thresholds would. With
# less than so many thresholds the noise is not above it.
_SHARP = 0.3
_COARSER = (3.0, 9.0)  # inlier thresholds that are tried where few matches agree
_DEVIATIONS = 0.1 * 2.0 ** np.arange(7)  # standard deviations of the noise by which they are compared

_ALLOWED = float(chdtri(5, 1e-3))

_READINGS = 3  # with a rolling shutter, at most: each with the motion of the one before
_SETTLED = 1e-5  # radians by which rays turn

# With so large a part of the matches that a rotation explains, samples of five rarely hold two of the others.
_MOSTLY_FAR = 0.4


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
    sigmas: np.ndarray | None = None,
    decisive: np.ndarray | None = None,
    readout: float = 0.0,
) -> RelativePose:
    """Pose of the current camera in the reference camera's optical frame, from matched keypoints.

    Candidates come from RANSAC with the five-point solver (OpenCV; Nister, PAMI 2004), and from RANSAC for the
    translation alone, given the rotation that explains most matches. The likeliest is refined by Levenberg-Marquardt on
    the Sampson distances of all matches in front of the cameras, with Tukey's loss scaled to the noise. The same input
    gives the same answer, on any thread.

    Three tests have a false-alarm rate of FALSE_ALARM_RATE. The status is FAILED unless the first one says that wrong
    matches would not agree as well. It is OK only if the second one says that no rotation alone explains the matches,
    and the third one that the other motion of a plane does not explain them as well. Otherwise the status is AMBIGUOUS,
    unless the motion before tells. It is FAILED, not OK, if the inliers are on one line in both images: they leave the
    motion free. Equal matches count as one.

    Matches that stand still in the image while the rest moves otherwise are outliers, as those on a robot's own body
    are. If more stand still than move, the status is AMBIGUOUS, unless the motion before tells. So it is if fewer than
    half of the matches agree, and of the others many on another motion, as where places look alike. Otherwise two views
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
        sigmas: (M,) standard deviations of the matches, pixels, where they are known to differ: of a coordinate of
            the one point beside where the other one is. A motion with a translation is then fitted again with exact
            matches counting for more, as far as the residuals bear that out. From 0.42 times max_reprojection_error
            on all count alike.
        decisive: (M,) bool which matches the pose is estimated from, where some are surer or more exact than others.
            The others may be inliers of it. Where these give no pose, all decide.
        readout: with a rolling shutter, the part of the time between the two images in which an image's rows are read;
            0 where all are read at once. The pose is the motion between the middle rows; the motion before tells how
            turns and moves change (rolling_shutter).

    Returns:
        The pose, or why there is none.

    Raises:
        ValueError: the arrays have another shape, or a parameter is out of range.
        TypeError: a calibration is no Camera.
    """
    points0, points1 = np.asarray(points0, dtype=np.float64), np.asarray(points1, dtype=np.float64)
    if points0.shape != points1.shape or points0.ndim != 2 or points0.shape[1] != 2:
        raise ValueError(f"points0 and points1 must both have shape (M, 2), not {points0.shape} and {points1.shape}")
    if decisive is not None:
        decisive = np.asarray(decisive)
        if decisive.dtype != bool or decisive.shape != (len(points0),):
            raise ValueError(f"decisive must be (M,) bool, M = {len(points0)}, not {decisive.dtype} {decisive.shape}")
    if sigmas is not None:
        sigmas = check_sigmas(sigmas, len(points0))
    check_options(max_reprojection_error, keypoint_resolution)
    check_readout(readout)
    total, inlier_threshold = len(points0), float(max_reprojection_error)
    required = max(min_inliers, SMALLEST_SAMPLE)
    camera0, camera1 = check_camera(camera0), check_camera(camera1)
    if camera0 is None or camera1 is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, total)
    if total < required:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)

    if (copies := without_copies(points0, points1)) is not None:
        pose = estimate_relative_pose(
            points0[copies[0]],
            points1[copies[0]],
            camera0,
            camera1,
            max_reprojection_error=max_reprojection_error,
            min_inliers=min_inliers,
            keypoint_resolution=keypoint_resolution,
            independent_points=independent_points,
            prior=prior,
            sigmas=None if sigmas is None else sigmas[copies[0]],
            decisive=None if decisive is None else decisive[copies[0]],
            readout=readout,
        )
        return pose.for_copies(copies[1])
    matches, usable = normalise_matches(points0, points1, camera0, camera1)
    normalised_threshold = 2 * inlier_threshold / (camera0.focal + camera1.focal)
    problem = Problem(
        matches,
        inlier_threshold,
        normalised_threshold,
        keypoint_resolution,
        independent_points,
        epipolar_chance(camera0, inlier_threshold),
        required,
        prior,
        None if sigmas is None else sigmas[usable],
    )
    deciding = None if decisive is None else decisive[usable]
    if not readout:
        solution = _estimate_either(deciding, problem)
    else:
        times = reading_times(points0[usable], points1[usable], camera0, camera1, readout)
        last = prior
        for _ in range(_READINGS):
            if last is not None:
                problem = problem._replace(matches=read_at_once(matches, times, last, prior))
            solution = _estimate_either(deciding, problem)
            before, last = last, solution.motion
            if last is None or (before is not None and np.abs(distance(before, last)).max() * readout < _SETTLED):
                break
    inliers, doubted = (spread_out(mask, usable) for mask in (solution.inliers, solution.doubted))
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
        median_parallax=median_parallax(problem.matches.select(solution.inliers), solution.motion.rotation),
        inliers=inliers,
        doubted=doubted,
    )


def _estimate_either(decisive: np.ndarray | None, problem: Problem) -> Solution:
    """The motion that some (n,) of the matches decide, or all of them where these give no pose."""
    solution = None if decisive is None else _estimate_by(decisive, problem)
    if solution is None or not solution.status.has_pose:
        solution = _check_rest(problem, _estimate(problem))
    return solution


def _estimate_by(decisive: np.ndarray, problem: Problem) -> Solution:
    """The motion that some (n,) of the matches decide, with the inliers among all.

    Where fewer than half of all are, it is these, too, that tell whether others agree on another motion.
    """
    threshold, deciding = problem.inlier_threshold, problem.select(decisive)
    solution = _estimate(deciding)
    motion, unbelieved = solution.motion, solution.unbelieved
    if motion is None or not solution.status.has_pose:
        return solution
    others = problem.matches.select(~decisive)
    inliers, doubted = (spread_out(mask, decisive) for mask in (solution.inliers, solution.doubted))
    assert inliers is not None
    if motion.translation.any():
        inliers[~decisive] = agrees(others, motion, threshold)
    else:
        inliers[~decisive] = lengths(rotation_residuals(others, motion.rotation)) < threshold
    if doubted is not None and unbelieved is not None:
        doubted[~decisive] = agrees(others, unbelieved, threshold) & ~inliers[~decisive]
    if inliers.mean() < MANY_WRONG:
        solution = _check_rest(deciding, solution)
    return solution._replace(inliers=inliers, doubted=doubted)


def _estimate(problem: Problem) -> Solution:
    """The motion of all matches, but for those of the robot's own body; none where they leave it free."""
    if len(problem.matches) < problem.required:
        return Solution(PoseStatus.TOO_FEW_MATCHES)
    body = find_own_body(problem)
    if body.mask is None:
        solution = _check_noise(problem, _solve(problem, body.candidates))
    else:
        solution = _solve_without(problem, body.mask, body.candidates)
    if solution.status is PoseStatus.OK and _is_free(problem, solution):
        return Solution(PoseStatus.FAILED)
    return solution


def _solve(problem: Problem, candidates: list[Motion]) -> Solution:
    """The motion that most of the matches agree with; candidates are searched for where there are none."""
    matches, inlier_threshold, resolution = problem.matches, problem.inlier_threshold, problem.resolution
    candidates = candidates or search_motions(matches, inlier_threshold, problem.normalised_threshold)
    starts = [np.eye(3)] + [candidate.rotation for candidate in candidates]
    rotation = fit_rotation_roughly(matches.sample(SAMPLE), starts, inlier_threshold)
    turning = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
    if turning.mean() > _MOSTLY_FAR:
        candidates = candidates + search_translations(matches.select(~turning), rotation, inlier_threshold)

    fit = fit_motion(matches, candidates, inlier_threshold, resolution)
    moving = np.zeros(len(matches), dtype=bool) if fit is None else agrees(matches, fit.motion, inlier_threshold)
    if log_false_alarms(moving, np.full(len(matches), problem.chance), 5) > math.log(FALSE_ALARM_RATE):
        fit = None

    # Where even this rotation leaves far too much to explain, no better one needs to be found.
    noise = Noise(inlier_threshold, resolution)
    parallax = Parallax.NONE
    if fit is not None and has_certain_parallax(matches, fit.motion, rotation, turning, noise):
        parallax = Parallax.EVERYWHERE
    else:
        rotation = fit_rotation(matches, [rotation], inlier_threshold, resolution)
        turning = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
        noise = noise._replace(design_effect=design_effect(turning, problem.independent_points))
        if fit is not None:
            parallax = find_parallax(matches, fit.motion, rotation, turning, noise)
    if fit is not None and parallax is Parallax.EVERYWHERE:
        return _decide(problem, fit, rotation)
    if turning.sum() < problem.required:
        if fit is None:
            return Solution(PoseStatus.FAILED)
        return Solution(PoseStatus.TOO_FEW_MATCHES, inliers=turning)
    motion = Motion(rotation, np.zeros(3))
    covariance, doubted, unbelieved = _rotation_covariance(matches, rotation, noise), None, None
    if fit is not None and (
        parallax is Parallax.IN_ONE_PLACE or may_have_parallax(matches, fit.motion, rotation, moving, noise)
    ):  # if it is the camera's, the rotation is the fit's
        covariance[3:, 3:] += spread(motion, fit.motion)[3:, 3:]
        doubted, unbelieved = moving & ~turning, fit.motion
    return Solution(PoseStatus.NO_TRANSLATION, motion, covariance, turning, doubted, unbelieved)


def _decide(problem: Problem, fit: Fit, rotation: np.ndarray) -> Solution:
    """The motion with a translation, by what is known of each match, and whether others explain the matches as well.

    Args:
        problem: the matches.
        fit: the motion of them all, taken alike.
        rotation: (3, 3) the one that explains most matches without a translation.
    """
    weighed = weigh(problem, fit.motion)
    matches, inlier_threshold = weighed.matches, weighed.inlier_threshold
    if weighed is not problem:
        again = fit_motion(matches, [fit.motion], inlier_threshold, problem.resolution)
        assert again is not None
        fit = again
    moving = agrees(matches, fit.motion, inlier_threshold)
    noise = Noise(inlier_threshold, problem.resolution, design_effect(moving, problem.independent_points))
    covariances = _motion_covariances(fit, noise)
    decided, rivals = decide(matches, fit, covariances.alike, rotation, noise, problem.prior)
    if decided is not fit:
        fit, covariances = decided, _motion_covariances(decided, noise)
    inliers = agrees(problem.matches, fit.motion, problem.inlier_threshold)
    if inliers.sum() < problem.required:
        return Solution(PoseStatus.TOO_FEW_MATCHES, inliers=inliers)
    covariance, near = widen(matches, fit, covariances, noise)
    # On a long ridge, the covariance is long enough to cover motions that have nothing to do with it.
    rivals = [rival for rival in rivals if not _covers(near, fit.motion, rival)]
    if any(is_distinct(fit.motion, rival) for rival in rivals):
        covariance = covariance + sum(spread(fit.motion, rival) for rival in rivals)
        return Solution(PoseStatus.AMBIGUOUS, fit.motion, covariance, inliers)
    # A unit vector does not vary along itself.
    across = np.eye(6)
    across[:3, :3] -= np.outer(fit.motion.translation, fit.motion.translation)
    covariance = covariance + sum(across @ spread(fit.motion, rival) @ across for rival in rivals)
    return Solution(PoseStatus.OK, fit.motion, covariance, inliers)


def _check_noise(problem: Problem, solution: Solution) -> Solution:
    """The solution, or one with a larger inlier threshold if the matches as a whole speak for that.

    Where the noise is above the threshold, a few matches that agree by chance may decide. The noise is then that of the
    larger threshold; inliers are counted within the threshold given. If too few are within it, the pose is that of the
    few, and AMBIGUOUS. So it is if the motion by the smaller noise is another one, and certain by itself.
    """
    agreed = (PoseStatus.OK, PoseStatus.AMBIGUOUS)
    if solution.motion is None or solution.inliers is None or solution.status not in agreed:
        return solution
    matches, threshold = problem.matches, problem.inlier_threshold
    if solution.inliers.mean() > MANY_WRONG or problem.deviation(solution.motion) < _SHARP * threshold:
        return solution
    anywhere = threshold / problem.chance  # where a wrong match is, around its epipolar line
    deviations = threshold * _DEVIATIONS[:, None]

    def evidence(motion: Motion) -> float:
        return float(gains(residual_sizes(matches, motion, threshold), deviations, anywhere).sum(axis=1).max())

    best, value, doubts = solution, evidence(solution.motion), list[Motion]()
    for factor in _COARSER:
        # Noise as large as this is not what standard deviations below the threshold tell.
        coarser = problem.with_threshold(factor)._replace(sigmas=None)
        candidates = search_motions(matches, coarser.inlier_threshold, coarser.normalised_threshold, 1)
        candidate = best_candidate(matches, candidates, coarser.inlier_threshold)
        if candidate is None or evidence(candidate) <= value:
            continue
        coarse = _solve(coarser, [candidate, solution.motion])
        if coarse.status not in agreed:
            doubts.append(candidate)
        elif coarse.motion is not None and evidence(coarse.motion) > value:
            best, value = coarse, evidence(coarse.motion)
    if best is solution or best.motion is None:
        if not doubts:
            return solution
        # With the larger noise, the matches as a whole tell of another motion, but not for certain.
        covariance = solution.covariance + sum(spread(solution.motion, doubt) for doubt in doubts)
        return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)
    motion = best.motion
    inliers = agrees(matches, motion, threshold)
    if inliers.sum() < problem.required:
        # The matches as a whole speak for a motion that too few of them are near enough to.
        covariance = solution.covariance + best.covariance + spread(solution.motion, motion)
        return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)
    best = best._replace(inliers=inliers)
    if not solution.status is best.status is PoseStatus.OK or not is_distinct(motion, solution.motion):
        return best
    if _covers(best.covariance, motion, solution.motion):
        return best
    # Either motion is certain if the noise is what it takes it for.
    return best._replace(status=PoseStatus.AMBIGUOUS, covariance=best.covariance + spread(motion, solution.motion))


def _check_rest(problem: Problem, solution: Solution) -> Solution:
    """The solution, or AMBIGUOUS if fewer than half of the matches agree with it, and many others on another motion.

    Which of the two is right they do not tell; the motion before may.
    """
    if solution.status is not PoseStatus.OK or solution.motion is None or solution.inliers is None:
        return solution
    if solution.inliers.mean() >= MANY_WRONG:  # as nearly always
        return solution
    still = lengths(rotation_residuals(problem.matches, np.eye(3))) < problem.inlier_threshold
    scene = solution.inliers | ~still  # but for the robot's own body
    if solution.inliers[scene].mean() >= MANY_WRONG:
        return solution
    rest = problem.select(scene & ~solution.inliers).with_threshold(LOOSELY)
    candidates = search_motions(rest.matches, rest.inlier_threshold, rest.normalised_threshold, 1)
    other = best_candidate(rest.matches, candidates, rest.inlier_threshold)
    if other is None:
        return solution
    agreeing = agrees(rest.matches, other, rest.inlier_threshold)
    shared = agrees(problem.matches.select(solution.inliers), other, rest.inlier_threshold)
    if not is_other_motion(agreeing, shared, rest.chance, 5):
        return solution
    if problem.prior is not None and decide_by_prior([solution.motion, other], problem.prior) is solution.motion:
        return solution
    covariance = solution.covariance + spread(solution.motion, other)
    return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)


def _is_free(problem: Problem, solution: Solution) -> bool:
    """Whether the inliers leave the motion free: on one line in both images, or seen as one point in either."""
    assert solution.motion is not None and solution.inliers is not None
    agreeing = problem.select(solution.inliers)
    matches, variance = agreeing.matches, agreeing.deviation(solution.motion) ** 2
    parts = np.array([[0, 1], [1, 2]])  # a list of lists is two indices to NumPy 1.22
    directions = [
        dimensions(rays[:2], noise.mean(axis=1)[parts], variance)
        for rays, noise in ((matches.rays0, matches.noise0), (matches.rays1, matches.noise1))
    ]
    return max(directions) < 2 or min(directions) < 1


def _solve_without(problem: Problem, own_body: np.ndarray, candidates: list[Motion]) -> Solution:
    """The motion of the matches that do not stand still in the image.

    Where more stand still than move, the camera may stand before something large that moves: AMBIGUOUS, unless the
    motion before tells.
    """
    solution = _solve(problem.select(~own_body), candidates)
    if solution.inliers is None:
        return solution
    num_inliers = solution.inliers.sum()
    inliers, doubted = (spread_out(mask, ~own_body) for mask in (solution.inliers, solution.doubted))
    solution = solution._replace(inliers=inliers, doubted=doubted)
    if solution.status is not PoseStatus.OK or solution.motion is None or own_body.sum() <= num_inliers:
        return solution
    standing = Motion(np.eye(3), np.zeros(3))
    if problem.prior is not None and decide_by_prior([solution.motion, standing], problem.prior) is solution.motion:
        return solution
    covariance = solution.covariance + spread(solution.motion, standing)
    return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)


# How sure.


def _motion_covariances(fit: Fit, noise: Noise) -> Covariances:
    """(6, 6) covariances of the translation's direction and the rotation."""
    expand = np.zeros((6, 5))
    expand[3:, :3] = np.eye(3)
    expand[:3, 3:] = tangents(fit.motion.translation)
    return Covariances(*(expand @ each @ expand.T for each in motion_covariances(fit.support, fit.motion, noise)))


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
    covariance[3:, 3:] += hidden_translation_covariance(matches, rotation, noise)
    return covariance
