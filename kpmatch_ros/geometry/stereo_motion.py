"""Motion of a stereo camera between two frames, in metres."""

from __future__ import annotations

import math

import cv2
import numpy as np
from scipy.special import fdtrc

from kpmatch_ros.geometry.camera import BEHIND
from kpmatch_ros.geometry.pose import Pose, PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import (
    ENOUGH_INLIERS,
    FALSE_ALARM_RATE,
    LOOSE,
    SMALLEST_CURVATURE,
    SMALLEST_SAMPLE,
    TINY,
    are_on_one_line,
    check_options,
    check_sigmas,
    design_effect,
    epipolar_chance,
    is_other_motion,
    log_false_alarms,
    without_copies,
)
from kpmatch_ros.geometry.sandwich import leave_one_out, student_factor, whitening_axes
from kpmatch_ros.geometry.stereo_camera import StereoCamera, check_stereo_camera
from kpmatch_ros.geometry.stereo_errors import StereoPoints, as_pixels
from kpmatch_ros.geometry.stereo_fit import SEARCH_THRESHOLD, SETTLED, Fit, FramePair, Start, normal_equations
from kpmatch_ros.geometry.two_modes import decide_by_prior, spread
from kpmatch_ros.geometry.two_view_errors import Matches, Motion, agrees, lengths, median_parallax, rotation_residuals

__all__ = ["estimate_stereo_motion"]

_SEARCH_ITERATIONS = 1000

_CERTAIN = 30.0  # standard deviations from zero beyond which a translation needs no test

_EQUAL_ERRORS_WEIGHT = 6  # matches: weight of the covariance under equal errors

# Errors that the given standard deviations do not include, equal for all points, in medians of these deviations. For
# matches rendered at 160 x 120 pixels, those with a third of the median deviation had twice the stated error.
_UNMODELLED = 0.5

_LARGEST_DEPTH_ERROR = 0.1  # error of a point's depth, relative to the depth
_WEAK = 1e-6  # information, in squared pixels, which keeps the covariance finite

_FARTHEST = 1e-4  # inverse metres: a start uses no points further away
_FURTHEST_START = 1e6  # translation over the largest depth: a longer one would project all points onto one


def estimate_stereo_motion(
    left0: np.ndarray,
    right0: np.ndarray,
    left1: np.ndarray,
    right1: np.ndarray,
    camera0: StereoCamera | None,
    camera1: StereoCamera | None,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
    keypoint_resolution: float = 1.0,
    independent_points: float = math.inf,
    prior: Motion | None = None,
    sigmas: np.ndarray | None = None,
) -> RelativePose:
    """Pose of the current left camera in the reference left camera's optical frame, in metres.

    Levenberg-Marquardt starts with no motion, and with P3P and RANSAC (OpenCV) from points of one frame in the other
    frame's left image. It minimises Tukey's loss of the residuals in all four images, scaled to the noise, with the
    points eliminated (see :mod:`kpmatch_ros.geometry.stereo_errors`). Matches that have no depth in either frame do not
    influence the pose; they are inliers if they agree with it. The same input gives the same result.

    The tests have a false-alarm rate of FALSE_ALARM_RATE. The status is FAILED if wrong matches could agree as well by
    chance, if the matches do not determine every direction of the motion, or if the motion makes points so close that
    the errors of their depths are not small. It is OK only if two tests confirm that the translation is not zero: the
    likelihood ratio test, and the score test, which is valid for points too far to have a depth. It is AMBIGUOUS if
    fewer than half of the matches agree and many of the others agree on another motion, as with repetitive structures,
    unless the prior decides. Duplicate matches count once.

    Args:
        left0: (M, 2) pixels in the reference frame's left image as received. NaN and infinity count as outliers.
        right0: (M, 2) pixels of the same points in its right image, NaN without a stereo match.
        left1: (M, 2) pixels in the current frame's left image, matched with left0.
        right1: (M, 2) pixels of the same points in its right image, or NaN.
        camera0: calibration of the reference frame; None gives NO_CALIBRATION.
        camera1: calibration of the current frame.
        max_reprojection_error: the inlier threshold in each of the images, pixels.
        min_inliers: with fewer matches or inliers, or fewer than 8 with a depth, the status is TOO_FEW_MATCHES.
        keypoint_resolution: pixels between neighbouring positions that the detector can report, as for
            two_view.estimate_relative_pose. The covariance is at least that of rounding.
        independent_points: largest number of points with independent errors. With more points, the covariance counts
            only this many: more points on the same surfaces do not make the pose more certain.
        prior: motion between the two preceding frames, over about the same time; None if unknown. It decides between
            two motions that each have many matches.
        sigmas: (M,) standard deviations of the left points, in any unit, if the right points were found from the left
            ones and share their errors. None if all points have equal and independent errors.

    Returns:
        The pose, or the reason why there is none. With NO_TRANSLATION, the covariance is that of the estimate whose
        translation could not be distinguished from zero.

    Raises:
        ValueError: an array has another shape, or a parameter is out of range.
        TypeError: a calibration is not a StereoCamera.
    """
    pixels = [as_pixels(points) for points in (left0, right0, left1, right1)]
    if len({points.shape for points in pixels}) != 1:
        raise ValueError(f"left0, right0, left1, right1 differ in shape: {[points.shape for points in pixels]}")
    check_options(max_reprojection_error, keypoint_resolution)
    total, inlier_threshold = len(pixels[0]), float(max_reprojection_error)
    required = max(min_inliers, SMALLEST_SAMPLE)
    camera0, camera1 = check_stereo_camera(camera0), check_stereo_camera(camera1)
    if camera0 is None or camera1 is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, total)
    shared = None if sigmas is None else _relative(sigmas, total)
    if (copies := without_copies(*pixels)) is not None:
        left0, right0, left1, right1 = (points[copies[0]] for points in pixels)
        pose = estimate_stereo_motion(
            left0,
            right0,
            left1,
            right1,
            camera0,
            camera1,
            max_reprojection_error=max_reprojection_error,
            min_inliers=min_inliers,
            keypoint_resolution=keypoint_resolution,
            independent_points=independent_points,
            prior=prior,
            sigmas=None if sigmas is None else np.asarray(sigmas)[copies[0]],
        )
        return pose.for_copies(copies[1])
    frames = [
        _triangulate(pixels[0], pixels[1], camera0, inlier_threshold, shared),
        _triangulate(pixels[2], pixels[3], camera1, inlier_threshold, shared),
    ]
    usable = frames[0].seen & frames[1].seen
    frames = [frame.select(np.flatnonzero(usable)) for frame in frames]
    has_depth = frames[0].has_depth | frames[1].has_depth
    if len(has_depth) < required or has_depth.sum() < SMALLEST_SAMPLE:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)

    # A point without a depth fits any small translation. It has little information on the translation, but biases the
    # test of whether it is zero.
    pair = FramePair.of(frames[0], frames[1])
    fit = pair.fit(_search(pair, (camera0, camera1), inlier_threshold), inlier_threshold, keypoint_resolution)
    mask = np.zeros(total, dtype=bool)
    mask[usable] = inliers = _agrees(frames, pair, fit, inlier_threshold)
    chances = np.full(len(inliers), epipolar_chance(camera0.left, inlier_threshold))
    if log_false_alarms(inliers, chances, 3) > math.log(FALSE_ALARM_RATE):
        return RelativePose.undefined(PoseStatus.FAILED, total)
    if inliers.sum() < required or (inliers & has_depth).sum() < SMALLEST_SAMPLE:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, mask)

    covariance, variance, freedom = _covariance(pair, fit, keypoint_resolution)
    effect = design_effect(fit.residuals.squares < fit.cutoffs, independent_points)
    covariance, variance = effect * covariance, effect * variance
    status, estimate = PoseStatus.OK, None
    moves = _moves_by_depth(pair, fit, variance, effect)
    # The number of standard deviations from zero approximates the test, and needs no second minimisation.
    if not moves or fit.translation @ np.linalg.solve(covariance[:3, :3], fit.translation) < _CERTAIN**2:
        still = pair.minimise(pair.evaluate(fit.rotation, np.zeros(3), fit.cutoffs), 20, SETTLED, rotation_only=True)
        if not moves or fdtrc(3, freedom, max(still.cost - fit.cost, 0.0) / variance / 3) > FALSE_ALARM_RATE:
            estimate = Pose(fit.rotation, fit.translation)
            status, fit = PoseStatus.NO_TRANSLATION, still
            mask[usable] = inliers = _agrees(frames, pair, fit, inlier_threshold)
            if inliers.sum() < required:
                return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, mask)
    if _is_degenerate(pair, fit, variance, status is PoseStatus.NO_TRANSLATION) or _is_nonlinear(pair, fit, variance):
        return RelativePose.undefined(PoseStatus.FAILED, total, mask)
    if status is PoseStatus.OK:
        other = _other_motion(frames, pair, inliers, (camera0, camera1), inlier_threshold, keypoint_resolution)
        motion = Motion(fit.rotation, fit.translation)
        decided = None if other is None or prior is None else decide_by_prior([motion, other], prior)
        if other is not None and decided is not motion:
            status, covariance = PoseStatus.AMBIGUOUS, covariance + spread(motion, other)
    return RelativePose(
        status=status,
        rotation=fit.rotation,
        translation=fit.translation,
        covariance=covariance,
        metric=True,
        num_matches=total,
        num_inliers=int(inliers.sum()),
        median_parallax=median_parallax(_matches(frames, np.flatnonzero(inliers)), fit.rotation),
        inliers=mask,
        estimate=estimate,
    )


def _triangulate(
    left: np.ndarray, right: np.ndarray, camera: StereoCamera, inlier_threshold: float, shared: np.ndarray | None
) -> StereoPoints:
    """Stereo points of a frame, without the depth of points off their epipolar lines or certainly behind the cameras.

    A point so far that its disparity may have either sign keeps its depth. If the points with one sign were left out,
    the far points would seem closer.
    """
    points = StereoPoints.of(left, right, camera, shared)
    front = (points.points[2] > 0) | points.is_distant(inlier_threshold)
    return points.without_depth(
        points.has_depth & ~(front & (points.distances(points.points).sum(axis=0) < inlier_threshold))
    )


def _other_motion(
    frames: list[StereoPoints],
    pair: FramePair,
    inliers: np.ndarray,
    cameras: tuple[StereoCamera, StereoCamera],
    inlier_threshold: float,
    resolution: float,
) -> Motion | None:
    """The motion that many of the other matches agree on, if fewer than half are inliers; otherwise None."""
    if inliers.mean() >= ENOUGH_INLIERS:  # the usual case
        return None
    still = lengths(rotation_residuals(_matches(frames, np.arange(len(inliers))), np.eye(3))) < inlier_threshold
    scene = (
        inliers | ~still if still.sum() <= inliers.sum() else np.ones(len(inliers), bool)
    )  # without the robot's own body
    if inliers[scene].mean() >= ENOUGH_INLIERS:
        return None
    rest = [frame.select(np.flatnonzero(scene & ~inliers)) for frame in frames]
    if (rest[0].has_depth | rest[1].has_depth).sum() < SMALLEST_SAMPLE:
        return None
    threshold = LOOSE * inlier_threshold
    other = FramePair.of(rest[0], rest[1])
    fit = other.fit(_search(other, cameras, threshold), threshold, resolution)
    agreeing = _agrees(rest, other, fit, threshold)
    everywhere = pair.evaluate(fit.rotation, fit.translation, np.ones(len(pair.order)))
    shared = _agrees(frames, pair, everywhere, threshold)[inliers]
    if not is_other_motion(agreeing, shared, epipolar_chance(cameras[0].left, threshold), 3):
        return None
    return Motion(fit.rotation, fit.translation)


def _is_degenerate(pair: FramePair, fit: Fit, variance: float, rotation_only: bool) -> bool:
    """Whether the points leave the motion, or its rotation, undetermined, given the variance of the noise."""
    used = fit.residuals.squares < fit.cutoffs
    if not fit.residuals.determine(used, variance, rotation_only):
        return True
    # Noise moves points off their line, which looks as if the rotation about this line were visible.
    forward = np.arange(len(used)) < pair.forward
    return not rotation_only and all(
        are_on_one_line(pair.source.points[:, part], pair.source.covariances[..., part].mean(axis=-1), variance)
        for part in (used & forward, used & ~forward)
        if part.sum() > 2
    )


def _moves_by_depth(pair: FramePair, fit: Fit, variance: float, effect: float) -> bool:
    """Test whether the displacements of a fit's inliers, after the rotation, depend on their depths.

    The likelihood ratio treats the inverse depths as free parameters. If they are only noise, a large translation fits
    them to the noise of the displacements, and the ratio claims a translation that is not there. The depths of the
    points under a pure rotation do not depend on the residuals. With these depths fixed, the ratio has an F
    distribution for any noise of the depths (Rao's score test).

    Args:
        pair: the points.
        fit: of the whole motion.
        variance: lower bound of the variance of the keypoints' noise, squared pixels.
        effect: number of matches per independent match.
    """
    still = pair.evaluate(fit.rotation, np.zeros(3), fit.cutoffs).residuals
    used = (fit.residuals.squares < fit.cutoffs) & (still.squares < BEHIND)
    jacobian, residuals = still.jacobian[..., used].reshape(6, -1), still.whitened[:, used].ravel()
    unexplained = [_unexplained(part, residuals) for part in (jacobian[3:], jacobian)]
    freedom = max(int((pair.conditions[used] + 1).sum() // 2) - 6, 1)
    variance = max(variance, effect * unexplained[1] / freedom)
    return bool(fdtrc(3, freedom, max(unexplained[0] - unexplained[1], 0.0) / variance / 3) < FALSE_ALARM_RATE)


def _is_nonlinear(pair: FramePair, fit: Fit, variance: float) -> bool:
    """Whether the motion brings most points so much closer that their residuals are not linear in the depth errors.

    The residuals are those of least squares if the errors of the depths are small in both frames, relative to the
    depths.
    """
    forward = np.arange(len(pair.order)) < pair.forward
    ahead = np.where(forward, -fit.translation @ fit.rotation[:, 2], fit.translation[2])
    nearness = np.maximum(1 + ahead * fit.residuals.points[2], TINY)
    errors = np.abs(ahead) * np.sqrt(variance * pair.source.covariances[2, 2]) / nearness
    return bool(np.median(errors[fit.residuals.squares < fit.cutoffs]) > _LARGEST_DEPTH_ERROR)


def _covariance(pair: FramePair, fit: Fit, resolution: float) -> tuple[np.ndarray, float, int]:
    """Covariance of an M-estimate with Tukey's loss, see :mod:`kpmatch_ros.geometry.sandwich`.

    Each match contributes its own gradient, and the loss's own curvature in the Hessian.

    Returns:
        covariance (6, 6) of translation and rotation; the variance, squared pixels, that costs are divided by in a
        test; degrees of freedom.
    """
    squares = fit.residuals.squares
    used = squares < fit.cutoffs
    # Conditions of the motion only. The distances from the epipolar lines within a frame carry no information on it.
    conditions, share = (pair.conditions[used] + 1) // 2, squares[used] / fit.cutoffs[used]
    jacobian, residuals = fit.residuals.jacobian[..., used], fit.residuals.whitened[:, used]
    moved = (residuals**2).sum(axis=0)
    freedom = max(int(conditions.sum()) - 6, 1)
    observed = float(((1 - share) ** 4 * moved).sum()) / freedom
    loss_curvatures = (1 - share) ** 2 - 4 * moved / (fit.cutoffs[used] * conditions) * (1 - share)
    curvature = max(float((conditions * loss_curvatures).sum()) / max(conditions.sum(), 1), SMALLEST_CURVATURE)
    # The left and right image round a point's row in the same way, so two residuals are one with twice the variance.
    rounding = resolution**2 / 6
    variance = max(observed / curvature**2, TINY)

    weights, weight_slopes = (1 - share) ** 2, -4 * (1 - share) / fit.cutoffs[used]  # of the loss, and of its weight
    gradients = (jacobian * residuals).sum(axis=1)
    hessian = (jacobian * weights).reshape(6, -1) @ jacobian.reshape(6, -1).T
    hessian += (gradients * weight_slopes) @ gradients.T
    # The jacobian by the translation is a multiple of the inverse depth. Therefore a product of two contains the square
    # of the estimated inverse depth, including its noise. Without this correction, the noise of a far point's depth
    # would count as depth.
    noise = fit.residuals.slopes[..., used].transpose(1, 0, 2)
    noise_curvatures = max(variance, rounding) * loss_curvatures * fit.residuals.depth_variances[used]
    hessian[:3, :3] -= (noise * noise_curvatures).reshape(3, -1) @ noise.reshape(3, -1).T
    axes, curvatures = whitening_axes(normal_equations(fit.residuals, used.astype(np.float64))[0], hessian, _WEAK)
    axes = axes / np.sqrt(curvatures)  # in these axes, the whole Hessian is the identity
    whitened = np.einsum("ij,ikn->jkn", axes, jacobian)
    gradients = leave_one_out(axes.T @ gradients, whitened, weights, weight_slopes)
    scatter = max(rounding / variance, 1.0) * student_factor(gradients) * gradients @ gradients.T
    # Equal errors count with the weight of a few matches, because vanishing or few gradients do not determine all
    # directions.
    equal_variance, count = max(observed / curvature, curvature * rounding, TINY), len(share)
    scatter = (count * scatter + _EQUAL_ERRORS_WEIGHT * equal_variance * np.eye(6)) / (count + _EQUAL_ERRORS_WEIGHT)
    covariance = axes @ scatter @ axes.T
    return (covariance + covariance.T) / 2, equal_variance, freedom


def _unexplained(jacobian: np.ndarray, residuals: np.ndarray) -> float:
    """Sum of squares of residuals (m,) that no combination of a jacobian's rows (p, m) explains."""
    gradient = jacobian @ residuals
    return float(residuals @ residuals - gradient @ np.linalg.lstsq(jacobian @ jacobian.T, gradient, rcond=None)[0])


def _agrees(frames: list[StereoPoints], pair: FramePair, fit: Fit, inlier_threshold: float) -> np.ndarray:
    """Mask (n,) of points within the threshold (pixels) in every image, in front or with an uncertain depth."""
    found = np.zeros(len(frames[0].has_depth), dtype=bool)
    found[pair.order] = pair.agrees(fit, inlier_threshold)
    without_depth = np.flatnonzero(~(frames[0].has_depth | frames[1].has_depth))
    if len(without_depth):
        matches = _matches(frames, without_depth)
        length = float(np.linalg.norm(fit.translation))
        if length > TINY:
            motion = Motion(fit.rotation, fit.translation / length)
            found[without_depth] = agrees(matches, motion, inlier_threshold / math.sqrt(2))
        else:
            distances = lengths(rotation_residuals(matches, fit.rotation))
            found[without_depth] = distances < inlier_threshold / math.sqrt(2)
    return found


def _matches(frames: list[StereoPoints], chosen: np.ndarray) -> Matches:
    """The points at these indices, as matches of the left images of two frames."""
    rays = [np.concatenate([frame.rays, np.ones((1, len(frame.has_depth)))]) for frame in frames]
    return Matches(np.array([*rays, *(frame.noise for frame in frames)])).select(chosen)


def _search(pair: FramePair, cameras: tuple[StereoCamera, StereoCamera], inlier_threshold: float) -> list[Start]:
    """Starts: the motion that RANSAC finds from the points of the frame with more of them, and no motion."""
    starts: list[Start] = [(np.eye(3), np.zeros(3))]
    sample = pair.sample
    backward = sample.forward < len(sample.order) / 2
    part = slice(sample.forward, None) if backward else slice(0, sample.forward)
    points, rays, camera = sample.source.points[:, part], sample.target.rays[:, part], cameras[int(backward)]
    near = points[2] > _FARTHEST
    # A disparity below its error leaves the depth undetermined. A single point kilometres away shifts OpenCV's final
    # estimate from all inliers (EPnP) by metres. If there are no closer points, these still give the rotation.
    disparities = camera.left.focal * camera.baseline * points[2]
    if (certain := near & (disparities > inlier_threshold)).sum() >= SMALLEST_SAMPLE:
        near = certain
    if near.sum() < 4:
        return starts
    points, rays = points[:, near], rays[:, near]
    try:
        found, turn, shift, _ = cv2.solvePnPRansac(
            np.ascontiguousarray((np.concatenate([points[:2], np.ones((1, points.shape[1]))]) / points[2]).T),
            np.ascontiguousarray(rays.T),
            np.eye(3),
            np.zeros(4),
            iterationsCount=_SEARCH_ITERATIONS,
            reprojectionError=SEARCH_THRESHOLD * inlier_threshold / camera.left.focal,
            confidence=0.999,
            flags=cv2.SOLVEPNP_P3P,
        )
    except cv2.error:  # degenerate points
        return starts
    if found and np.isfinite(turn).all() and np.linalg.norm(shift) * points[2].min() < _FURTHEST_START:
        rotation = np.asarray(cv2.Rodrigues(turn)[0], dtype=np.float64)
        translation = np.asarray(shift, dtype=np.float64).ravel()
        # Points of the reference frame give the inverse of the motion, points of the current frame the motion.
        starts.insert(0, (rotation, translation) if backward else (rotation.T, -rotation.T @ translation))
    return starts


def _relative(sigmas: np.ndarray, count: int) -> np.ndarray:
    """Standard deviations (count,) relative to their median, with _UNMODELLED added in quadrature."""
    sigmas = check_sigmas(sigmas, count)
    return np.sqrt(((sigmas / np.median(sigmas)) ** 2 + _UNMODELLED**2) / (1 + _UNMODELLED**2)) if count else sigmas
