"""Stereo matches checked against the calibration, and the motion of a stereo pair between two frames, in metres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from scipy.special import fdtrc

from kpmatch_ros.geometry.camera import AHEAD, Camera
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
    tukey_cost,
)
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.stereo_errors import (
    WEAK,
    CameraPoses,
    Views,
    agrees,
    directions,
    flat,
    inverse_normal,
    is_distant,
    jacobians,
    largest_residual,
    residuals,
    rig_poses,
    settle,
    squared_residuals,
)

__all__ = ["StereoAgreement", "check_stereo_matches", "estimate_stereo_motion"]

_SEARCH_ITERATIONS = 1000
_SEARCH_THRESHOLD = 3.0  # inlier thresholds: a point of uncertain depth is seen that far from where it should be

_MEDIANS = np.array([1.0, 0.4549, 1.3863, 2.3660, 3.3567, 4.3515])  # of chi-square with 0 (unused) to 5 conditions
_TUKEY_STEP = 4.0  # variances: what each condition after the first adds to the squared cutoff, TUKEY**2

_FARTHEST = 1e-4  # inverse metres: for a start, nothing is further


@dataclass(frozen=True, eq=False)
class StereoAgreement:
    """How many matches of a left and a right image agree with the pair's calibration.

    Attributes:
        status: OK; NO_CALIBRATION; or FAILED if the matches contradict the calibration.
        num_matches: M, matches given.
        inliers: (M,) bool, which matches are on their epipolar line and in front of the cameras; None without
            calibration.
    """

    status: PoseStatus
    num_matches: int
    inliers: np.ndarray | None

    @property
    def num_inliers(self) -> int:
        """Matches that agree."""
        return 0 if self.inliers is None else int(self.inliers.sum())


def check_stereo_matches(
    left: np.ndarray,
    right: np.ndarray,
    camera: StereoCamera | None,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
) -> StereoAgreement:
    """Which matches of a left and a right image agree with the calibration: on their epipolar lines, and in front.

    Matches contradict the calibration if no more of them agree than chance has it, or if more are behind the cameras
    than in front.

    Args:
        left: (M, 2) pixels in the left image as received. NaN and infinity are outliers.
        right: (M, 2) pixels in the right image, the same matches.
        camera: the calibration; None gives NO_CALIBRATION.
        max_reprojection_error: the largest of an inlier, pixels.
        min_inliers: fewer matches than this contradict no calibration.

    Raises:
        ValueError: an array has another shape.
    """
    left, right = _as_points(left), _as_points(right)
    if camera is None:
        return StereoAgreement(PoseStatus.NO_CALIBRATION, len(left), None)
    views = Views.of([(left, camera.left), (right, camera.right)])
    poses = rig_poses(camera)
    points = settle(views, poses)
    on_line = views.seen.all(axis=0) & (largest_residual(views, poses, points) < max_reprojection_error)
    front = on_line & (points[2] > 0)
    behind = on_line & (points[2] < 0) & ~is_distant(views, poses, points, max_reprojection_error)
    chances = np.full(len(left), epipolar_chance(camera.left, max_reprojection_error))
    contradicted = len(left) >= min_inliers and (
        behind.sum() > front.sum() or log_false_alarms(front, chances, 1) > math.log(FALSE_ALARM_RATE)
    )
    return StereoAgreement(PoseStatus.FAILED if contradicted else PoseStatus.OK, len(left), front)


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
) -> RelativePose:
    """Pose of the current left camera in the reference left camera's optical frame, in metres.

    Levenberg-Marquardt starts from standing still and from P3P with RANSAC (OpenCV), of points of one frame in the
    other's left image. It minimises Tukey's loss, scaled to the noise, of the residuals in all four images. The points
    are unknowns, which the Schur complement eliminates. Matches without a right image take part by their epipolar
    lines. The same input gives the same answer.

    Two tests have a false-alarm rate of FALSE_ALARM_RATE. The status is FAILED unless the first one says that wrong
    matches would not agree as well. It is OK only if the second one, of the likelihood ratio, says that the translation
    is not zero.

    Args:
        left0: (M, 2) pixels in the reference frame's left image as received. NaN and infinity are outliers.
        right0: (M, 2) pixels of the same points in its right image, NaN where there is no stereo match.
        left1: (M, 2) pixels in the current frame's left image, matched with left0.
        right1: (M, 2) pixels of the same points in its right image, or NaN.
        camera0: calibration of the reference frame; None gives NO_CALIBRATION.
        camera1: calibration of the current frame.
        max_reprojection_error: the largest of an inlier in any of the images, pixels.
        min_inliers: fewer matches, or inliers, give TOO_FEW_MATCHES; so do fewer than 8 that have a depth.
        keypoint_resolution: pixels between neighbouring positions that the detector can give, as for
            two_view.estimate_relative_pose. The covariance is no smaller than rounding allows.
        independent_points: how many points, at most, err independently of each other. With more points, the covariance
            is that of so many: more points on the same surfaces do not make the pose surer.

    Returns:
        The pose, or why there is none. With NO_TRANSLATION the covariance is that of the estimate whose translation
        could not be told from zero.

    Raises:
        ValueError: the arrays have another shape, or a parameter is out of range.
    """
    pixels = [_as_points(points) for points in (left0, right0, left1, right1)]
    if len({points.shape for points in pixels}) != 1:
        raise ValueError(f"left0, right0, left1, right1 differ in shape: {[points.shape for points in pixels]}")
    check_options(max_reprojection_error, keypoint_resolution)
    total, inlier_threshold = len(pixels[0]), float(max_reprojection_error)
    required = max(min_inliers, SMALLEST_SAMPLE)
    if camera0 is None or camera1 is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, total)
    views = Views.of(list(zip(pixels, (camera0.left, camera0.right, camera1.left, camera1.right))))
    for frame, camera in ((slice(0, 2), camera0), (slice(2, 4), camera1)):
        views = views.without_wrong_depths(frame, camera, inlier_threshold)
    usable = views.seen[0] & views.seen[2]
    views = views.select(usable)
    deep = views.seen[1] | views.seen[3]
    if len(deep) < required or deep.sum() < SMALLEST_SAMPLE:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)

    # A point without a depth follows any small translation. It says little of the translation, but biases the test of
    # whether it is zero.
    everything = _FramePair(views, camera0, camera1)
    pair = _FramePair(views.select(deep), camera0, camera1)
    fit = pair.fit(_search(pair.views, (camera0, camera1), inlier_threshold), inlier_threshold, keypoint_resolution)
    inliers = everything.agrees(fit, inlier_threshold)
    mask = np.zeros(total, dtype=bool)
    mask[usable] = inliers
    chances = np.full(len(inliers), epipolar_chance(camera0.left, inlier_threshold))
    if log_false_alarms(inliers, chances, 3) > math.log(FALSE_ALARM_RATE):
        return RelativePose.undefined(PoseStatus.FAILED, total)
    if inliers.sum() < required or (inliers & deep).sum() < SMALLEST_SAMPLE:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, mask)

    covariance, variance, freedom = pair.covariance(fit, keypoint_resolution)
    effect = design_effect(fit.squares < fit.cutoffs, independent_points)
    covariance, variance = effect * covariance, effect * variance
    still = pair.minimise(pair.settle(fit.rotation, np.zeros(3), fit.cutoffs), 20, rotation_only=True)
    status = PoseStatus.OK
    if fdtrc(3, freedom, max(still.cost - fit.cost, 0.0) / variance / 3) > FALSE_ALARM_RATE:
        status, fit = PoseStatus.NO_TRANSLATION, still
        inliers = everything.agrees(fit, inlier_threshold)
        mask[usable] = inliers
        if inliers.sum() < required:
            return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, mask)
    return RelativePose(
        status=status,
        rotation=fit.rotation,
        translation=fit.translation,
        covariance=covariance,
        metric=True,
        num_matches=total,
        num_inliers=int(inliers.sum()),
        median_parallax=_median_parallax(pixels[0], pixels[2], camera0.left, camera1.left, fit.rotation, mask),
        inliers=mask,
    )


_Start = tuple[np.ndarray, np.ndarray]  # a rotation and a translation


@dataclass(frozen=True, eq=False)
class _Fit:
    """A motion, x_ref = rotation x_cur + translation, with points."""

    rotation: np.ndarray
    translation: np.ndarray
    points: np.ndarray  # (3, n)
    squares: np.ndarray  # (n,) sum of the squared residuals of each point
    cutoffs: np.ndarray  # (n,) where Tukey's loss of them ends, squared pixels
    cost: float


@dataclass(frozen=True, eq=False)
class _FramePair:
    """Two stereo frames: left and right of the reference (camera0), left and right of the current one (camera1)."""

    views: Views
    camera0: StereoCamera
    camera1: StereoCamera

    @property
    def conditions(self) -> np.ndarray:
        """Conditions (n,) that the images of a point set beyond its position: 1, 3 or 5."""
        return 2 * self.views.seen.sum(axis=0) - 3

    def poses(self, rotation: np.ndarray, translation: np.ndarray) -> CameraPoses:
        """Of the four cameras under a motion."""
        rig0, rig1 = rig_poses(self.camera0), rig_poses(self.camera1)
        turns = rig1.turns @ rotation.T
        return CameraPoses(
            np.concatenate([rig0.turns, turns]), np.concatenate([rig0.shifts, rig1.shifts - turns @ translation])
        )

    def evaluate(self, rotation: np.ndarray, translation: np.ndarray, points: np.ndarray, cutoffs: np.ndarray) -> _Fit:
        """With these points."""
        squares = squared_residuals(residuals(self.views, self.poses(rotation, translation), points))
        return _Fit(rotation, translation, points, squares, cutoffs, tukey_cost(squares, cutoffs))

    def settle(self, rotation: np.ndarray, translation: np.ndarray, cutoffs: np.ndarray) -> _Fit:
        """With the points where all images together see them."""
        points = settle(self.views, self.poses(rotation, translation))
        return self.evaluate(rotation, translation, points, cutoffs)

    def fit(self, starts: list[_Start], inlier_threshold: float, resolution: float) -> _Fit:
        """The best start, refined with the noise that it leaves."""
        wide = _cutoffs(self.conditions, inlier_threshold * _SEARCH_THRESHOLD / TUKEY)
        fits = [self.minimise(self.settle(*start, wide), 4) for start in starts]
        fit = min(fits, key=lambda fit: fit.cost)
        for _ in range(3):
            cutoffs = _cutoffs(self.conditions, self.noise(fit.squares, inlier_threshold, resolution))
            fit = self.minimise(self.evaluate(fit.rotation, fit.translation, fit.points, cutoffs), 10)
        return fit

    def noise(self, squares: np.ndarray, inlier_threshold: float, resolution: float) -> float:
        """Standard deviation of a keypoint's coordinate, pixels: that of the residuals, or of rounding if larger."""
        near = squares < 4 * inlier_threshold**2 * self.conditions
        noise = (
            math.sqrt(np.median(squares[near] / _MEDIANS[self.conditions[near]])) if near.any() else inlier_threshold
        )
        return max(noise, resolution / math.sqrt(12), 1e-9)

    def minimise(self, fit: _Fit, iterations: int, rotation_only: bool = False) -> _Fit:
        """Levenberg-Marquardt on Tukey's loss by the motion, or its rotation, and all points."""
        free = slice(3, 6) if rotation_only else slice(0, 6)
        damping = 1e-4
        for _ in range(iterations):
            system = self.eliminate(fit, np.maximum(1 - fit.squares / fit.cutoffs, 0) ** 2)
            hessian, gradient = system.hessian[free, free], system.gradient[free]
            diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + TINY
            for _ in range(6):
                step = np.zeros(6)
                step[free] = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
                trial = self.evaluate(
                    cv2.Rodrigues(step[3:].reshape(3, 1))[0] @ fit.rotation,
                    fit.translation + step[:3],
                    fit.points - system.point_steps - np.einsum("ipn,p->in", system.point_jacobian, step),
                    fit.cutoffs,
                )
                if trial.cost < fit.cost:
                    break
                damping *= 10
            else:
                return fit
            settled = fit.cost - trial.cost < 1e-6 * fit.cost
            fit, damping = trial, max(damping / 10, 1e-9)
            if settled:
                break
        return fit

    def eliminate(self, fit: _Fit, weights: np.ndarray) -> _System:
        """The normal equations by the motion: each point is weighted (n,) and eliminated."""
        found, by_point, by_motion = jacobians(
            self.views, self.poses(fit.rotation, fit.translation), fit.translation, fit.points
        )
        inverse = inverse_normal(by_point)
        pull = np.einsum("rin,rn->in", by_point, found)
        mixed = np.einsum("rin,rpn->ipn", by_point, by_motion)
        point_steps = np.einsum("ijn,jn->in", inverse, pull)
        point_jacobian = np.einsum("ijn,jpn->ipn", inverse, mixed)
        weighted, weighted_mixed = (flat(array * weights) for array in (by_motion, mixed))
        return _System(
            hessian=weighted @ flat(by_motion).T - weighted_mixed @ flat(point_jacobian).T,
            gradient=weighted @ found.ravel() - weighted_mixed @ point_steps.ravel(),
            point_steps=point_steps,
            point_jacobian=point_jacobian,
        )

    def agrees(self, fit: _Fit, inlier_threshold: float) -> np.ndarray:
        """Which points (n,) are within the threshold (pixels) in every image and in front, or too far to say."""
        return agrees(self.views, self.poses(fit.rotation, fit.translation), inlier_threshold)

    def covariance(self, fit: _Fit, resolution: float) -> tuple[np.ndarray, float, int]:
        """Covariance of an M-estimate: H^-1 G H^-1 with the whole Hessian H (Huber, Robust Statistics).

        The Gauss-Newton part of H takes the noise of a far point's depth for depth, and so is too sure of the
        translation.

        Returns:
            covariance (6, 6) of translation and rotation; the variance, squared pixels, by which costs are divided for
            a test; degrees of freedom.
        """
        used = fit.squares < fit.cutoffs
        conditions, share = self.conditions[used], fit.squares[used] / fit.cutoffs[used]
        freedom = max(int(conditions.sum()) - 6, 1)
        spread = float(((1 - share) ** 4 * fit.squares[used]).sum()) / freedom
        curvature = float((conditions * (1 - share) ** 2 - 4 * share * (1 - share)).sum()) / max(conditions.sum(), 1)
        curvature = max(curvature, SMALLEST_CURVATURE)
        # Left and right image round the row of a point alike: two residuals are one, with twice the variance.
        rounding = resolution**2 / 6
        variance = max(spread / curvature**2, rounding, TINY)

        whole = self.eliminate(fit, used.astype(np.float64)).hessian
        values, axes = np.linalg.eigh(whole)
        axes = axes / np.sqrt(np.maximum(values, WEAK))
        whole[:3, :3] -= variance * self.hessian_of_depth_noise(fit, used)
        # In these axes the Gauss-Newton Hessian is the identity.
        curvatures, turn = np.linalg.eigh(axes.T @ whole @ axes)
        axes = axes @ turn / np.maximum(curvatures, SMALLEST_CURVATURE)
        return variance * axes @ axes.T, max(spread / curvature, rounding, TINY), freedom

    def hessian_of_depth_noise(self, fit: _Fit, used: np.ndarray) -> np.ndarray:
        """What the noise of the used points' depths adds to the translation's part (3, 3), for a variance of one.

        The jacobian by the translation is a multiple of the inverse depth. A product of two therefore holds the square
        of the depth as estimated, noise included.
        """
        _, by_point, by_motion = jacobians(
            self.views, self.poses(fit.rotation, fit.translation), fit.translation, fit.points
        )
        inverse = inverse_normal(by_point)
        mixed = np.einsum("rin,rpn->ipn", by_point, by_motion[:, :3])
        across = by_motion[:, :3] - np.einsum("rin,ijn,jpn->rpn", by_point, inverse, mixed, optimize=True)
        depth = np.where(np.abs(fit.points[2]) > TINY, fit.points[2], 1.0)
        noise = flat(across * np.sqrt(inverse[2, 2]) / depth * used)
        return np.asarray(noise @ noise.T)


class _System(NamedTuple):
    """Normal equations by the motion; its step s moves the points by -(point_steps + point_jacobian s)."""

    hessian: np.ndarray  # (6, 6)
    gradient: np.ndarray  # (6,)
    point_steps: np.ndarray  # (3, n)
    point_jacobian: np.ndarray  # (3, 6, n)


def _search(views: Views, cameras: tuple[StereoCamera, StereoCamera], inlier_threshold: float) -> list[_Start]:
    """Where to start: standing still, and the motion that RANSAC finds from the points of the frame with more."""
    starts: list[_Start] = [(np.eye(3), np.zeros(3))]
    frame = int(views.seen[3].sum() > views.seen[1].sum())
    points = settle(views.images(slice(2 * frame, 2 * frame + 2)), rig_poses(cameras[frame]))
    deep = views.seen[2 * frame + 1] & (points[2] > _FARTHEST)
    # A disparity below its error leaves the depth open. A single point kilometres away puts what OpenCV makes of all
    # inliers in the end (EPnP) metres off. Without nearer points these still give the rotation.
    camera = cameras[frame]
    disparities = camera.left.focal * float(np.linalg.norm(camera.translation)) * points[2]
    if (certain := deep & (disparities > inlier_threshold)).sum() >= SMALLEST_SAMPLE:
        deep = certain
    if deep.sum() < 4:
        return starts
    try:
        found, turn, shift, _ = cv2.solvePnPRansac(
            np.ascontiguousarray((directions(points)[:, deep] / points[2, deep]).T),
            np.ascontiguousarray(views.rays[2 - 2 * frame][:, deep].T),
            np.eye(3),
            np.zeros(4),
            iterationsCount=_SEARCH_ITERATIONS,
            reprojectionError=_SEARCH_THRESHOLD * inlier_threshold / camera.left.focal,
            confidence=0.999,
            flags=cv2.SOLVEPNP_P3P,
        )
    except cv2.error:  # degenerate points
        return starts
    if found and np.isfinite(turn).all() and np.isfinite(shift).all():
        rotation = np.asarray(cv2.Rodrigues(turn)[0], dtype=np.float64)
        translation = np.asarray(shift, dtype=np.float64).ravel()
        # Points of the reference frame give the inverse of the motion, points of the current frame the motion.
        starts.append((rotation.T, -rotation.T @ translation) if frame == 0 else (rotation, translation))
    return starts


def _cutoffs(conditions: np.ndarray, noise: float) -> np.ndarray:
    """Where Tukey's loss ends, squared pixels, for points with so many conditions."""
    return noise**2 * (TUKEY**2 + _TUKEY_STEP * (conditions - 1))


def _median_parallax(
    points0: np.ndarray, points1: np.ndarray, camera0: Camera, camera1: Camera, rotation: np.ndarray, used: np.ndarray
) -> float:
    """Median displacement, pixels of the reference image, between the matches and where the rotation takes them."""
    rays0, jacobian = camera0.normalise_with_jacobian(points0[used])
    turned = np.column_stack([camera1.normalise(points1[used]), np.ones(used.sum())]) @ rotation.T
    ahead = turned[:, 2] > AHEAD * np.linalg.norm(turned, axis=1)
    if not ahead.any():
        return 0.0
    shift = rays0[ahead] - turned[ahead, :2] / turned[ahead, 2:]
    return float(np.median(np.linalg.norm(np.linalg.solve(jacobian[ahead], shift[..., None])[..., 0], axis=1)))


def _as_points(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape (M, 2), not {points.shape}")
    return points
