"""Relative pose of two calibrated views from matched keypoints.

The estimator fits a motion with a translation and a pure rotation. Statistical tests decide between them.
:mod:`kpmatch_ros.geometry.two_view_errors` defines the residuals of both models.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import chdtri

from kpmatch_ros.geometry.camera import Camera, check_camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import (
    ENOUGH_INLIERS,
    FALSE_ALARM_RATE,
    LOOSE,
    RIVALLING,
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

# Noise above the inlier threshold spreads the residuals evenly. tukey_cutoff, which looks at residuals below two
# thresholds, then estimates a standard deviation of 1.5 thresholds. If the estimate is below _SHARP thresholds, the
# noise is not above the inlier threshold.
_SHARP = 0.3
_COARSER = (3.0, 9.0)  # factors on the inlier threshold, tried where few matches agree
_DEVIATIONS = 0.1 * 2.0 ** np.arange(7)  # standard deviations of the noise for the comparison, in inlier thresholds

_ALLOWED = float(chdtri(5, 1e-3))  # squared Mahalanobis distance, five degrees of freedom

_READOUT_ITERATIONS = 3  # most iterations with a rolling shutter; each uses the motion of the previous one
_SETTLED = 1e-5  # radians: the iterations end when the rays turn by less

# If the rotation explains a larger part of the matches, samples of five matches rarely hold two of the others.
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
    before: Motion | None = None,
) -> RelativePose:
    """Pose of the current camera in the reference camera's optical frame, from matched keypoints.

    Candidates come from RANSAC with the five-point solver (Nister, PAMI 2004), and from RANSAC for the translation
    alone, given the rotation that explains most matches. Levenberg-Marquardt refines the likeliest
    candidate on the Sampson distances of all matches in front of the cameras. It uses Tukey's loss, scaled to the
    noise. The same input gives the same result on any thread.

    Three tests have a false-alarm rate of FALSE_ALARM_RATE each. If wrong matches could agree with the motion as well
    by chance (first test), the status is FAILED, unless a pure rotation explains enough matches. If a rotation alone
    explains the matches (second test), the status is NO_TRANSLATION. If the other motion of a plane explains the
    matches as well (third test), the status is AMBIGUOUS, unless the prior decides. The status is also FAILED if the
    inliers lie on one line in both images, because they do not determine the motion. Duplicate matches count once.

    Matches that stand still in the image while the rest moves are outliers, like those on the robot's own body. If more
    matches stand still than move, the status is AMBIGUOUS, unless the prior decides. The status is also AMBIGUOUS if
    fewer than half of the matches agree and many of the others agree on another motion, as with repetitive structures.
    Beyond these tests, two views cannot distinguish a translation from objects that move before a standing camera, or
    from a calibration error that exceeds the noise.

    Args:
        points0: (M, 2) pixels in the reference image as received. NaN and infinity count as outliers.
        points1: (M, 2) pixels in the current image, the same matches.
        camera0: calibration of the reference image; None gives NO_CALIBRATION.
        camera1: calibration of the current image.
        max_reprojection_error: the inlier threshold, pixels.
        min_inliers: with fewer matches or inliers, the status is TOO_FEW_MATCHES. The lower limit is 8.
        keypoint_resolution: pixels between neighbouring positions that the detector can report: 1 for whole pixels,
            more if the detector works on a smaller image, 0 for any position. Smaller parallax counts as rounding, and
            the covariance is at least that of rounding.
        independent_points: largest number of points with independent errors. With more points, the test and the
            covariance count only this many: more points on the same surfaces do not make the pose more certain.
        prior: motion between the two preceding images, over about the same time; None if unknown. It decides between
            motions that explain the matches equally well.
        sigmas: (M,) standard deviations of the matches, pixels; None if they are equal. Each is that of a coordinate of
            one point, given the other point. A motion with a translation is then fitted again with larger weights for
            precise matches, as far as the residuals support this. Matches with a standard deviation of 0.42 times
            max_reprojection_error or more have equal weights.
        decisive: (M,) bool, the matches that the pose is estimated from, if some are more reliable or more precise.
            The others can be inliers of this pose. If the decisive matches give no pose, all matches are used.
        readout: with a rolling shutter, the time to read the rows of one image, as a part of the time between the two
            images; 0 for a global shutter. The pose is the motion between the middle rows.
        before: with a rolling shutter, the motion between the two preceding images, over the same time; None if
            unknown. It gives the change of the rotation and the translation (see
            :mod:`kpmatch_ros.geometry.rolling_shutter`).

    Returns:
        The pose, or the reason why there is none.

    Raises:
        ValueError: an array has another shape, or a parameter is out of range.
        TypeError: a calibration is not a Camera.
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
            before=before,
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
        motion = before
        for number in range(_READOUT_ITERATIONS):
            if motion is not None:
                problem = problem._replace(matches=read_at_once(matches, times, motion, before))
            solution = _estimate_either(deciding, problem)
            if number == 0 and before is not None and solution.motion is None:
                # The camera may have turned back, so that too few matches fit the motion before.
                solution = _estimate_either(deciding, problem._replace(matches=matches))
            assumed, motion = motion, solution.motion
            if motion is None or (assumed is not None and np.abs(distance(assumed, motion)).max() * readout < _SETTLED):
                break
    inliers, undecided = (spread_out(mask, usable) for mask in (solution.inliers, solution.undecided))
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
        undecided=undecided,
    )


def _estimate_either(decisive: np.ndarray | None, problem: Problem) -> Solution:
    """The motion from the matches in the mask `decisive` (n,), or from all matches if these give no pose."""
    solution = None if decisive is None else _estimate_by(decisive, problem)
    if solution is None or not solution.status.has_pose:
        solution = _check_rest(problem, _estimate(problem))
    return solution


def _estimate_by(decisive: np.ndarray, problem: Problem) -> Solution:
    """The motion from the matches in the mask `decisive` (n,), and the inliers among all matches.

    If fewer than half of all matches are inliers, the decisive matches are also tested for another motion.
    """
    threshold, deciding = problem.inlier_threshold, problem.select(decisive)
    solution = _estimate(deciding)
    motion, rejected = solution.motion, solution.rejected
    if motion is None or not solution.status.has_pose:
        return solution
    others = problem.matches.select(~decisive)
    inliers, undecided = (spread_out(mask, decisive) for mask in (solution.inliers, solution.undecided))
    assert inliers is not None
    if motion.translation.any():
        inliers[~decisive] = agrees(others, motion, threshold)
    else:
        inliers[~decisive] = lengths(rotation_residuals(others, motion.rotation)) < threshold
    if undecided is not None and rejected is not None:
        undecided[~decisive] = agrees(others, rejected, threshold) & ~inliers[~decisive]
    if inliers.mean() < ENOUGH_INLIERS:
        solution = _check_rest(deciding, solution)
    return solution._replace(inliers=inliers, undecided=undecided)


def _estimate(problem: Problem) -> Solution:
    """The motion of all matches except those on the robot's own body; no pose if they do not determine it."""
    if len(problem.matches) < problem.required:
        return Solution(PoseStatus.TOO_FEW_MATCHES)
    body = find_own_body(problem)
    if body.mask is None:
        solution = _check_noise(problem, _solve(problem, body.candidates))
    else:
        solution = _solve_without(problem, body.mask, body.candidates)
    if solution.status in (PoseStatus.OK, PoseStatus.AMBIGUOUS) and _is_degenerate(problem, solution):
        return Solution(PoseStatus.FAILED)
    return solution


def _solve(problem: Problem, candidates: list[Motion]) -> Solution:
    """The motion that most matches agree with. If there are no candidates, RANSAC searches for them."""
    matches, inlier_threshold, resolution = problem.matches, problem.inlier_threshold, problem.resolution
    candidates = candidates or search_motions(matches, inlier_threshold, problem.normalised_threshold)
    starts = [np.eye(3)] + [candidate.rotation for candidate in candidates]
    rotation = fit_rotation_roughly(matches.sample(SAMPLE), starts, inlier_threshold)
    rotation_inliers = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
    if rotation_inliers.mean() > _MOSTLY_FAR:
        candidates = candidates + search_translations(matches.select(~rotation_inliers), rotation, inlier_threshold)

    fit = fit_motion(matches, candidates, inlier_threshold, resolution)
    none = np.zeros(len(matches), dtype=bool)
    motion_inliers = none if fit is None else agrees(matches, fit.motion, inlier_threshold)
    if log_false_alarms(motion_inliers, np.full(len(matches), problem.chance), 5) > math.log(FALSE_ALARM_RATE):
        fit = None

    # If even this rough rotation leaves far too much unexplained, a better rotation is not needed.
    noise = Noise(inlier_threshold, resolution)
    parallax = Parallax.NONE
    if fit is not None and has_certain_parallax(matches, fit.motion, rotation, rotation_inliers, noise):
        parallax = Parallax.EVERYWHERE
    else:
        rotation = fit_rotation(matches, [rotation], inlier_threshold, resolution)
        rotation_inliers = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
        noise = noise._replace(design_effect=design_effect(rotation_inliers, problem.independent_points))
        if fit is not None:
            parallax = find_parallax(matches, fit.motion, rotation, rotation_inliers, noise)
    if fit is not None and parallax is Parallax.EVERYWHERE:
        return _decide(problem, fit, rotation)
    if rotation_inliers.sum() < problem.required:
        if fit is None:
            return Solution(PoseStatus.FAILED)
        return Solution(PoseStatus.TOO_FEW_MATCHES, inliers=rotation_inliers)
    motion = Motion(rotation, np.zeros(3))
    covariance, undecided, rejected = _rotation_covariance(matches, rotation, noise), None, None
    if fit is not None and (
        parallax is Parallax.IN_ONE_PLACE or may_have_parallax(matches, fit.motion, rotation, motion_inliers, noise)
    ):  # if the translation is the camera's, the rotation is the fit's
        covariance[3:, 3:] += spread(motion, fit.motion)[3:, 3:]
        undecided, rejected = motion_inliers & ~rotation_inliers, fit.motion
    return Solution(PoseStatus.NO_TRANSLATION, motion, covariance, rotation_inliers, undecided, rejected)


def _decide(problem: Problem, fit: Fit, rotation: np.ndarray) -> Solution:
    """Refine the motion with each match's own standard deviation, and test whether other motions explain the matches.

    Args:
        problem: the matches.
        fit: the motion fitted to all matches with equal weights.
        rotation: (3, 3) the pure rotation that explains most matches.
    """
    weighed = weigh(problem, fit.motion)
    matches, inlier_threshold = weighed.matches, weighed.inlier_threshold
    if weighed is not problem:
        again = fit_motion(matches, [fit.motion], inlier_threshold, problem.resolution)
        assert again is not None
        fit = again
    motion_inliers = agrees(matches, fit.motion, inlier_threshold)
    noise = Noise(inlier_threshold, problem.resolution, design_effect(motion_inliers, problem.independent_points))
    covariances = _motion_covariances(fit, noise)
    decided, rivals = decide(matches, fit, covariances.equal_errors, rotation, noise, problem.prior)
    if decided is not fit:
        fit, covariances = decided, _motion_covariances(decided, noise)
    inliers = agrees(problem.matches, fit.motion, problem.inlier_threshold)
    if inliers.sum() < problem.required:
        return Solution(PoseStatus.TOO_FEW_MATCHES, inliers=inliers)
    covariance, near = widen(matches, fit, covariances, noise)
    # Along a long ridge of the likelihood, the covariance is long enough to cover unrelated motions.
    rivals = [rival for rival in rivals if not _covers(near, fit.motion, rival)]
    if any(is_distinct(fit.motion, rival) for rival in rivals):
        covariance = covariance + sum(spread(fit.motion, rival) for rival in rivals)
        return Solution(PoseStatus.AMBIGUOUS, fit.motion, covariance, inliers)
    # A unit vector has no variance along its own direction.
    across = np.eye(6)
    across[:3, :3] -= np.outer(fit.motion.translation, fit.motion.translation)
    covariance = covariance + sum(across @ spread(fit.motion, rival) @ across for rival in rivals)
    return Solution(PoseStatus.OK, fit.motion, covariance, inliers)


def _check_noise(problem: Problem, solution: Solution) -> Solution:
    """The solution, or one with a larger inlier threshold if the matches as a whole support it.

    If the noise exceeds the threshold, a few matches that agree by chance can decide. The covariance is then that of
    the noise at the larger threshold, but inliers are counted within the given threshold. If too few matches are within
    the given threshold, the pose stays that of the smaller noise and is AMBIGUOUS. The pose is also AMBIGUOUS if the
    smaller noise gives a distinct motion that is certain on its own.
    """
    agreed = (PoseStatus.OK, PoseStatus.AMBIGUOUS)
    if solution.motion is None or solution.inliers is None or solution.status not in agreed:
        return solution
    matches, threshold = problem.matches, problem.inlier_threshold
    if solution.inliers.mean() > ENOUGH_INLIERS or problem.deviation(solution.motion) < _SHARP * threshold:
        return solution
    anywhere = threshold / problem.chance  # range of a wrong match's distance from its epipolar line, pixels
    deviations = threshold * _DEVIATIONS[:, None]

    def evidence(motion: Motion) -> float:
        return float(gains(residual_sizes(matches, motion, threshold), deviations, anywhere).sum(axis=1).max())

    best, value, uncertain = solution, evidence(solution.motion), list[Motion]()
    for factor in _COARSER:
        # The given standard deviations are below the threshold and do not describe noise this large.
        coarser = problem.with_threshold(factor)._replace(sigmas=None)
        candidates = search_motions(matches, coarser.inlier_threshold, coarser.normalised_threshold, 1)
        candidate = best_candidate(matches, candidates, coarser.inlier_threshold)
        if candidate is None or evidence(candidate) <= value:
            continue
        coarse = _solve(coarser, [candidate, solution.motion])
        if coarse.status not in agreed:
            uncertain.append(candidate)
        elif coarse.motion is not None and evidence(coarse.motion) > value:
            best, value = coarse, evidence(coarse.motion)
    if best is solution or best.motion is None:
        if not uncertain:
            return solution
        # With the larger noise, the matches as a whole support another motion, but not with certainty.
        covariance = solution.covariance + sum(spread(solution.motion, other) for other in uncertain)
        return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)
    motion = best.motion
    inliers = agrees(matches, motion, threshold)
    if inliers.sum() < problem.required:
        # The matches as a whole support a motion that has too few inliers.
        covariance = solution.covariance + best.covariance + spread(solution.motion, motion)
        return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)
    best = best._replace(inliers=inliers)
    if not solution.status is best.status is PoseStatus.OK or not is_distinct(motion, solution.motion):
        return best
    if _covers(best.covariance, motion, solution.motion):
        return best
    # Each motion is certain under its own noise level.
    return best._replace(status=PoseStatus.AMBIGUOUS, covariance=best.covariance + spread(motion, solution.motion))


def _check_rest(problem: Problem, solution: Solution) -> Solution:
    """The solution, or AMBIGUOUS if fewer than half of the matches agree with it and many others on another motion.

    The matches cannot show which of the two motions is correct. The prior may.
    """
    if solution.status is not PoseStatus.OK or solution.motion is None or solution.inliers is None:
        return solution
    if solution.inliers.mean() >= ENOUGH_INLIERS:  # the usual case
        return solution
    still = lengths(rotation_residuals(problem.matches, np.eye(3))) < problem.inlier_threshold
    scene = solution.inliers | ~still  # without the robot's own body
    if solution.inliers[scene].mean() >= ENOUGH_INLIERS:
        return solution
    rest = problem.select(scene & ~solution.inliers).with_threshold(LOOSE)
    fewest = RIVALLING * int(solution.inliers.sum())
    candidates = search_motions(rest.matches, rest.inlier_threshold, rest.normalised_threshold, 1, fewest)
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


def _is_degenerate(problem: Problem, solution: Solution) -> bool:
    """Whether the inliers leave the motion undetermined: on one line in both images, or one point in either image."""
    assert solution.motion is not None and solution.inliers is not None
    agreeing = problem.select(solution.inliers)
    matches, variance = agreeing.matches, agreeing.deviation(solution.motion) ** 2
    parts = np.array([[0, 1], [1, 2]])  # NumPy 1.22 would read a list of lists as two indices
    directions = [
        dimensions(rays[:2], noise.mean(axis=1)[parts], variance)
        for rays, noise in ((matches.rays0, matches.noise0), (matches.rays1, matches.noise1))
    ]
    return max(directions) < 2 or min(directions) < 1


def _solve_without(problem: Problem, own_body: np.ndarray, candidates: list[Motion]) -> Solution:
    """The motion of the matches that do not stand still in the image.

    If more matches stand still than move, the camera may stand before a large moving object. The status is then
    AMBIGUOUS, unless the prior decides.
    """
    solution = _solve(problem.select(~own_body), candidates)
    if solution.inliers is None:
        return solution
    num_inliers = solution.inliers.sum()
    inliers, undecided = (spread_out(mask, ~own_body) for mask in (solution.inliers, solution.undecided))
    solution = solution._replace(inliers=inliers, undecided=undecided)
    if solution.status is not PoseStatus.OK or solution.motion is None or own_body.sum() <= num_inliers:
        return solution
    standing = Motion(np.eye(3), np.zeros(3))
    if problem.prior is not None and decide_by_prior([solution.motion, standing], problem.prior) is solution.motion:
        return solution
    covariance = solution.covariance + spread(solution.motion, standing)
    return solution._replace(status=PoseStatus.AMBIGUOUS, covariance=covariance)


# Uncertainty.


def _motion_covariances(fit: Fit, noise: Noise) -> Covariances:
    """(6, 6) covariances of the translation's direction and of the rotation."""
    expand = np.zeros((6, 5))
    expand[3:, :3] = np.eye(3)
    expand[:3, 3:] = tangents(fit.motion.translation)
    return Covariances(*(expand @ each @ expand.T for each in motion_covariances(fit.support, fit.motion, noise)))


def _covers(covariance: np.ndarray, motion: Motion, other: Motion) -> bool:
    """Whether a covariance (6, 6) covers another motion, at the 99.9 % quantile."""
    away = distance(motion, other)
    away[:3] -= (away[:3] @ motion.translation) * motion.translation
    near = float(motion.translation @ other.translation) > 0
    return near and away @ np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ away < _ALLOWED


def _rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """(6, 6) covariance of the rotation, and of a unit vector of unknown direction."""
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = np.eye(3) / 3
    covariance[3:, 3:] = rotation_covariance(matches, rotation, noise)
    covariance[3:, 3:] += hidden_translation_covariance(matches, rotation, noise)
    return covariance
