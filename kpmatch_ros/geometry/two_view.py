"""Relative pose of two calibrated views from matched keypoints.

The motion has a translation, or is a pure rotation: both are fitted, and tests decide. What the residuals of the two
mean is said in :mod:`kpmatch_ros.geometry.two_view_errors`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from scipy.special import fdtrc

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import (
    FALSE_ALARM_RATE,
    SMALLEST_CURVATURE,
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
from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    agrees,
    disagreement,
    dot,
    epipolar_jacobian,
    epipolar_residuals,
    is_in_front,
    lengths,
    median_parallax,
    normalise_matches,
    project_turned,
    rotation_jacobian,
    rotation_residuals,
    tangents,
    whiten,
)

__all__ = ["Noise", "estimate_relative_pose", "fit_rotation", "small_parallax_chance"]

_SEARCHES = 2  # from different seeds: one in twenty ends in a wrong optimum
_SEARCH_ITERATIONS = 2000
_TRANSLATIONS = 200  # tried with the rotation given
_HOPEFUL = 1.2  # candidates that disagree more with the matches than the best does, by this factor, are given up

_LARGEST_LEVERAGE = 0.3  # of one match on the pose: 0 to 1; they add up to the degrees of freedom
_LARGEST_VARIANCE = math.pi**2  # of an unknown angle

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

_SETTLED = 1e-6  # part of the cost
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
) -> RelativePose:
    """Pose of the current camera in the reference camera's optical frame, from matched keypoints.

    Candidates come from RANSAC with the five-point solver (OpenCV; Nister, PAMI 2004), from a homography in case the
    scene is a plane, and from RANSAC for the translation alone, given the rotation that explains most matches. The best
    is refined by Levenberg-Marquardt on the Sampson distances of all matches in front of the cameras, with Tukey's loss
    scaled to the noise. The same input gives the same answer, on any thread.

    Two tests have a false-alarm rate of FALSE_ALARM_RATE. The status is FAILED unless the first one says that wrong
    matches would not agree as well. It is OK only if the second one says that no rotation alone explains the matches.
    Two views cannot tell a translation from objects that move before a standing camera, nor from a calibration that is
    wrong by more than the noise.

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

    def to_mask(inliers: np.ndarray) -> np.ndarray:
        mask = np.zeros(total, dtype=bool)
        mask[usable] = inliers
        return mask

    normalised_threshold = 2 * inlier_threshold / (camera0.focal + camera1.focal)
    candidates = _search_motions(matches, inlier_threshold, normalised_threshold)
    candidates += _search_plane(matches, inlier_threshold, normalised_threshold, candidates)
    starts = [np.eye(3)] + [candidate.rotation for candidate in candidates]
    rotation = fit_rotation(matches, starts, inlier_threshold, keypoint_resolution)
    turning = lengths(rotation_residuals(matches, rotation)) < inlier_threshold
    candidates += _search_translations(matches.select(~turning), rotation, inlier_threshold)

    fit = _fit_motion(matches, candidates, inlier_threshold, keypoint_resolution)
    moving = np.zeros(len(matches), dtype=bool) if fit is None else agrees(matches, fit.motion, inlier_threshold)
    chances = np.full(len(matches), epipolar_chance(camera0, inlier_threshold))
    if log_false_alarms(moving, chances, 5) > math.log(FALSE_ALARM_RATE):
        fit = None

    noise = Noise(inlier_threshold, keypoint_resolution, design_effect(turning, independent_points))
    if fit is not None and _is_translation(matches, fit.motion, rotation, turning, noise):
        if moving.sum() < required:
            return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, to_mask(moving))
        status, motion, inliers = PoseStatus.OK, fit.motion, moving
        covariance = _motion_covariance(fit, noise._replace(design_effect=design_effect(moving, independent_points)))
    else:
        if turning.sum() < required:
            if fit is None:
                return RelativePose.undefined(PoseStatus.FAILED, total)
            return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, to_mask(turning))
        status, motion, inliers = PoseStatus.NO_TRANSLATION, Motion(rotation, np.zeros(3)), turning
        covariance = _rotation_covariance(matches, rotation, noise)

    return RelativePose(
        status=status,
        rotation=motion.rotation,
        translation=motion.translation,
        covariance=covariance,
        metric=False,
        num_matches=total,
        num_inliers=int(inliers.sum()),
        median_parallax=median_parallax(matches.select(inliers), motion.rotation),
        inliers=to_mask(inliers),
    )


class Noise(NamedTuple):
    """The keypoints' noise, as far as it is known.

    Attributes:
        inlier_threshold: largest residual of an inlier, pixels.
        resolution: pixels between neighbouring positions that the detector can give.
        design_effect: factor on the variance of an estimate, for matches that err together.
    """

    inlier_threshold: float
    resolution: float
    design_effect: float = 1.0


def _minimise(model: Model, matches: Matches, motion: Motion, cutoff: float, iterations: int) -> Motion:
    """Levenberg-Marquardt on Tukey's loss of the residuals' lengths; those beyond the cutoff (pixels) count nothing."""
    damping = 1e-4
    residuals, jacobian = model(matches, motion)
    weights, cost = tukey(lengths(residuals), cutoff)
    for _ in range(iterations):
        weighted = jacobian * weights[:, None, None]
        size = jacobian.shape[2]
        hessian = weighted.reshape(-1, size).T @ jacobian.reshape(-1, size)
        gradient = weighted.reshape(-1, size).T @ residuals.ravel()
        # The second term keeps the system regular where the matches leave a direction free.
        diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + TINY
        for _ in range(6):
            step = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
            if -gradient @ step < _SETTLED * cost:  # twice what it promises to gain
                return motion
            trial = motion.moved(step)
            trial_residuals, trial_jacobian = model(matches, trial)
            trial_weights, trial_cost = tukey(lengths(trial_residuals), cutoff)
            if trial_cost < cost:
                break
            damping *= 10
        else:
            return motion
        motion, residuals, jacobian, weights, cost = trial, trial_residuals, trial_jacobian, trial_weights, trial_cost
        damping = max(damping / 10, 1e-9)
    return motion


# The motion with translation.


def _search_motions(matches: Matches, inlier_threshold: float, normalised_threshold: float) -> list[Motion]:
    """Candidates: RANSAC from several seeds. `normalised_threshold` is the inlier threshold in normalised units."""
    candidates = []
    for seed in range(_SEARCHES):
        params = cv2.UsacParams()
        params.randomGeneratorState = seed
        params.isParallel = False  # or the answer changes from call to call
        params.sampler = cv2.SAMPLING_UNIFORM
        params.score = cv2.SCORE_METHOD_MSAC  # OpenCV's MAGSAC was three to five times less accurate
        params.loMethod = cv2.LOCAL_OPTIM_INNER_LO
        params.loIterations = 10
        params.loSampleSize = 14
        params.maxIterations = _SEARCH_ITERATIONS
        params.confidence = 0.999
        params.threshold = normalised_threshold
        rays1, rays0 = matches.rays1[:, :2].copy(), matches.rays0[:, :2].copy()
        nothing = np.zeros(0)
        try:
            essential, _ = cv2.findEssentialMat(rays1, rays0, np.eye(3), np.eye(3), nothing, nothing, params)
        except cv2.error:  # degenerate points
            continue
        if essential is None or essential.shape != (3, 3) or not np.isfinite(essential).all():
            continue
        rotation0, rotation1, translation = cv2.decomposeEssentialMat(essential)
        four = [
            Motion(rotation, sign * translation.ravel()) for rotation in (rotation0, rotation1) for sign in (1.0, -1.0)
        ]
        candidates.append(min(four, key=lambda motion: disagreement(matches, motion, inlier_threshold)))
    return candidates


def _search_plane(
    matches: Matches, inlier_threshold: float, normalised_threshold: float, candidates: list[Motion]
) -> list[Motion]:
    """The two motions that a plane allows, from a candidate's matches.

    On a plane the search finds either of the two, and only one is right. If the scene is no plane, both are far off and
    do no harm.
    """
    if not candidates:
        return []
    inliers = matches.select(agrees(matches, candidates[0], inlier_threshold))
    if len(inliers) < SMALLEST_SAMPLE:
        return []
    rays1, rays0 = inliers.rays1[:, :2].copy(), inliers.rays0[:, :2].copy()
    homography, _ = cv2.findHomography(rays1, rays0, cv2.RANSAC, 2 * normalised_threshold, maxIters=100)
    if homography is None or not np.isfinite(homography).all():
        return []
    _, rotations, translations, _ = cv2.decomposeHomographyMat(homography, np.eye(3))
    motions = [
        Motion(rotation, translation.ravel() / length)
        for rotation, translation in zip(rotations, translations)
        if (length := float(np.linalg.norm(translation))) > 1e-6
    ]
    return sorted(motions, key=lambda motion: disagreement(inliers, motion, inlier_threshold))[:2]


def _search_translations(matches: Matches, rotation: np.ndarray, inlier_threshold: float) -> list[Motion]:
    """The translation that most of these matches agree with, given the rotation: RANSAC with two matches a sample.

    It finds the few near points of a scene that is mostly far away, where samples of five rarely hold two of them.
    """
    if len(matches) < 2:
        return []
    normals = np.cross(matches.rays0, matches.rays1 @ rotation.T)  # of the epipolar planes, which hold the translation
    pairs = np.random.default_rng(0).integers(len(matches), size=(_TRANSLATIONS, 2))
    directions = np.cross(normals[pairs[:, 0]], normals[pairs[:, 1]]).T
    directions = (directions / np.maximum(np.linalg.norm(directions, axis=0), TINY)).astype(np.float32)
    # Nearness moves a match from where the rotation takes it by a positive multiple of t_xy - t_z (x, y).
    projected, _, factors = project_turned(matches, rotation)
    (x, y), factors = projected.astype(np.float32)[:, :, None], factors.astype(np.float32)[:, :, None]
    away = whiten(directions[0] - x * directions[2], directions[1] - y * directions[2], factors)
    residual = rotation_residuals(matches, rotation).T[:, :, None].astype(np.float32)
    across = np.abs(residual[0] * away[1] - residual[1] * away[0])
    along = residual[0] * away[0] + residual[1] * away[1]
    near = across < inlier_threshold * np.sqrt(away[0] ** 2 + away[1] ** 2)
    votes = np.array([(near & (along > 0)).sum(axis=0), (near & (along < 0)).sum(axis=0)])
    backwards, best = np.unravel_index(votes.argmax(), votes.shape)
    if votes[backwards, best] == 0:
        return []
    translation = directions[:, best].astype(np.float64) * (-1 if backwards else 1)
    return [Motion(rotation, translation / np.linalg.norm(translation))]


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
    costs = [disagreement(matches, candidate, inlier_threshold) for candidate in candidates]
    refined = [
        _minimise(epipolar_jacobian, matches, candidate, 3 * inlier_threshold, 5)
        for candidate, cost in zip(candidates, costs)
        if cost < _HOPEFUL * min(costs) + inlier_threshold**2
    ]
    motion = min(refined, key=lambda motion: disagreement(matches, motion, inlier_threshold))
    for _ in range(3):
        support = matches.select(is_in_front(matches, motion, inlier_threshold))
        residuals, jacobian = epipolar_jacobian(support, motion)
        cutoff = tukey_cutoff(residuals, inlier_threshold, resolution)
        weighted = jacobian[:, 0] * np.sqrt(tukey(lengths(residuals), cutoff)[0])[:, None]
        leverage = dot(weighted @ np.linalg.pinv(weighted.T @ weighted), weighted)
        support = support.select(leverage < _LARGEST_LEVERAGE)
        motion = _minimise(epipolar_jacobian, support, motion, cutoff, 10)
    return _Fit(motion, support)


# The rotation alone.


def fit_rotation(matches: Matches, starts: list[np.ndarray], inlier_threshold: float, resolution: float) -> np.ndarray:
    """The rotation (3, 3) that brings most matches within the inlier threshold, from the best of the starts."""
    wide = 16 * inlier_threshold
    still = [Motion(rotation, np.zeros(3)) for rotation in starts]
    motion = min(still, key=lambda motion: tukey(lengths(rotation_residuals(matches, motion.rotation)), wide)[1])
    for cutoff in (wide, 4 * inlier_threshold):
        motion = _minimise(rotation_jacobian, matches, motion, cutoff, 5)
    cutoff = tukey_cutoff(rotation_residuals(matches, motion.rotation), inlier_threshold, resolution)
    return _minimise(rotation_jacobian, matches, motion, cutoff, 10).rotation


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
    turned = _minimise(rotation_jacobian, matches, Motion(rotation, np.zeros(3)), _EVERYTHING, 5).rotation
    total = float((rotation_residuals(matches, turned) ** 2).sum())
    # To first order, the translation is the direction nearest to all the planes of the two rays.
    normals = np.cross(matches.rays1 @ turned.T, matches.rays0)
    starts = (motion, Motion(turned, np.linalg.eigh(normals.T @ normals)[1][:, 0]))
    fits = [_minimise(epipolar_jacobian, matches, start, _EVERYTHING, 10) for start in starts]
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
    return expand @ _covariance(epipolar_jacobian, fit.support, fit.motion, noise) @ expand.T


def _rotation_covariance(matches: Matches, rotation: np.ndarray, noise: Noise) -> np.ndarray:
    """(6, 6) covariance of a unit vector of unknown direction and the rotation."""
    turn = Motion(rotation, np.zeros(3))
    covariance = np.zeros((6, 6))
    covariance[:3, :3] = np.eye(3) / 3
    covariance[3:, 3:] = _covariance(rotation_jacobian, matches, turn, noise)
    return covariance


def _covariance(model: Model, matches: Matches, motion: Motion, noise: Noise) -> np.ndarray:
    """Covariance (p, p) of an M-estimate with Tukey's loss: H^-1 G H^-1 (Huber, Robust Statistics).

    H is the loss's whole Hessian, G its gradient's covariance. The Gauss-Newton part of H takes noise along the
    epipolar lines for parallax: it is many times too sure of the pose where the parallax is small or the epipole in the
    image.
    """
    residuals, jacobian = model(matches, motion)
    size = jacobian.shape[2]
    cutoff = tukey_cutoff(residuals, noise.inlier_threshold, noise.resolution)

    def gradient(motion: Motion) -> np.ndarray:
        residuals, jacobian = model(matches, motion)
        return np.einsum("nd,ndp->p", residuals * tukey(lengths(residuals), cutoff)[0][:, None], jacobian)

    offsets = 1e-5 * np.eye(size)
    hessian = np.array([gradient(motion.moved(step)) - gradient(motion.moved(-step)) for step in offsets]) / 2e-5
    hessian = (hessian + hessian.T) / 2

    sizes = lengths(residuals)
    used = sizes < cutoff
    influences = (residuals * tukey(sizes, cutoff)[0][:, None])[used]
    variance = float((influences**2).sum()) / max(influences.size - size, 1)
    flat = jacobian[used].reshape(-1, size)
    information, axes = np.linalg.eigh(flat.T @ flat)
    floor = max(variance, noise.resolution**2 / 12) / _LARGEST_VARIANCE
    axes = axes / np.sqrt(np.maximum(information, max(floor, TINY)))
    # In these axes the Gauss-Newton Hessian is the identity, and the whole one not far from it.
    curvatures, turn = np.linalg.eigh(axes.T @ hessian @ axes)
    curvatures = np.maximum(curvatures, SMALLEST_CURVATURE)
    variance = max(variance, float(curvatures.mean()) ** 2 * noise.resolution**2 / 12)  # the second: of rounding
    axes = axes @ turn / curvatures
    variances, axes = np.linalg.eigh(noise.design_effect * variance * axes @ axes.T)
    return (axes * np.clip(variances, 0, _LARGEST_VARIANCE)) @ axes.T
