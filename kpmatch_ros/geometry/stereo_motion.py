"""Stereo: calibration of the pair, points in metres, and the pair's motion between two frames.

Four images see a point of the scene: left and right of the reference frame, left and right of the current one. Errors
are in pixels of these images as received: keypoints are undistorted, images never are, and each error is divided by how
many pixels a direction spans where it is seen. A point is x, y and the inverse of its depth in the reference frame's
left camera, so that one at any distance, or seen by the left camera only, is as good as any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from scipy.special import fdtrc

from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import FALSE_ALARM_RATE, _log_false_alarms

__all__ = ["StereoCamera", "check_stereo_matches", "estimate_stereo_motion"]

_SMALLEST_SAMPLE = 8  # matches with a depth: the six degrees of freedom, and something left to tell the noise from
_SEARCH_ITERATIONS = 1000
_SEARCH_GATE = 3.0  # gates: a point of uncertain depth is seen that far from where it should be

_MEDIANS = np.array([1.0, 0.4549, 1.3863, 2.3660, 3.3567, 4.3515])  # of chi-square with 0 (unused) to 5 conditions
_TUKEY = 4.685**2  # squared cutoff in variances, one condition: 95 % of the efficiency of least squares
_TUKEY_STEP = 4.0  # the same for each further condition

_AHEAD = 0.02  # cosine: what is further off a camera's axis, 89 degrees, is behind it
_BEHIND = 1e6  # pixels: the error of what is behind a camera
_FARTHEST = 1e-4  # inverse metres: for a start, nothing is further
_SMALLEST_CURVATURE = 0.1  # of the loss, in units of Gauss and Newton's approximation to it
_WEAK = 1e-6  # squared pixels metres: keeps the inverse depth of a point regular where nothing determines it
_TINY = 1e-30

_ALIGNED = 0.1  # pixels between the rows of two images that are said to be rectified
_FOCAL_TOLERANCE = 1e-3
_ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class StereoCamera:
    """A calibrated pair of cameras. Checked when made: CalibrationError.

    left, right: the cameras, for images of one size.
    rotation: (3, 3) float64. translation: (3,) float64, metres. A point in the left camera's optical frame is, in the
        right camera's, x_right = rotation x_left + translation. For raw images these are the frames of the cameras
        themselves, not of rectified ones.
    """

    left: Camera
    right: Camera
    rotation: np.ndarray
    translation: np.ndarray

    def __post_init__(self) -> None:
        for name, shape in (("rotation", (3, 3)), ("translation", (3,))):
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != shape or not np.isfinite(value).all():
                raise CalibrationError("value", f"the {name} between the cameras must be {shape} finite numbers")
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        _check_rotation(self.rotation, "the rotation between the cameras")
        sizes = [(camera.width, camera.height) for camera in (self.left, self.right)]
        if sizes[0] != sizes[1]:
            (width, height), (other_width, other_height) = sizes
            raise CalibrationError(
                "size",
                f"the left camera_info is for images of {width}x{height} pixels, the right one for {other_width}x"
                f"{other_height}: calibrate both for one size",
            )
        if self.baseline == 0:
            raise CalibrationError("baseline", "the two cameras are at the same place: depth needs a baseline")

    @classmethod
    def from_camera_infos(cls, left: Any, right: Any, *, rectified: bool) -> StereoCamera:
        """The pair of two sensor_msgs/CameraInfo messages, of any kind that Camera.from_camera_info takes.

        rectified: the images are already rectified: P of each, and nothing else. Otherwise K, D and R of each, and the
        baseline from P, -P[3] / P[0] of the right camera. Raises CalibrationError; besides a Camera's its reasons are
        "baseline" (there is none), "swapped" (the right camera is on the left) and "alignment" (the two P are not those
        of one rectified pair).
        """
        cameras = tuple(Camera.from_camera_info(info, rectified=rectified) for info in (left, right))
        baseline = _baseline(_matrix(left, "P", (3, 4), "left"), _matrix(right, "P", (3, 4), "right"))
        turns = [np.eye(3), np.eye(3)]
        if not rectified:
            turns = [_matrix(info, "R", (3, 3), side) for info, side in ((left, "left"), (right, "right"))]
            for turn, side in zip(turns, ("left", "right")):
                _check_rotation(turn, f"R of the {side} camera_info")
        rotation = turns[1].T @ turns[0]
        return cls(cameras[0], cameras[1], rotation, turns[1].T @ (-baseline, 0.0, 0.0))

    @property
    def baseline(self) -> float:
        """Distance of the two cameras, metres."""
        return float(np.linalg.norm(self.translation))

    def check_size(self, left: tuple[int, int], right: tuple[int, int]) -> None:
        """Raise CalibrationError ("size") unless the calibration is for images of these (width, height)."""
        self.left.check_size(*left)
        self.right.check_size(*right)


def _matrix(info: Any, name: str, shape: tuple[int, int], side: str) -> np.ndarray:
    numbers = np.asarray(getattr(info, name.lower(), getattr(info, name, ())), dtype=np.float64).ravel()
    if numbers.size != shape[0] * shape[1] or not np.isfinite(numbers).all():
        count = shape[0] * shape[1]
        raise CalibrationError("value", f"{name} of the {side} camera_info must be {count} finite numbers")
    return numbers.reshape(shape)


def _check_rotation(matrix: np.ndarray, name: str) -> None:
    if np.abs(matrix @ matrix.T - np.eye(3)).max() > _ROTATION_TOLERANCE or np.linalg.det(matrix) < 0:
        raise CalibrationError(
            "value", f"{name} is no rotation: {matrix.tolist()}. Calibrate the two cameras as one stereo pair"
        )


def _baseline(left: np.ndarray, right: np.ndarray) -> float:
    """Metres, from the two P of one rectified pair."""
    together = "Calibrate the two cameras as one stereo pair (camera_calibration with two cameras)"
    for projection, side in ((left, "left"), (right, "right")):
        if projection[0, 0] <= 0 or projection[1, 1] <= 0:
            raise CalibrationError(
                "uncalibrated",
                f"P of the {side} camera_info has focal lengths {projection[0, 0]:g} and {projection[1, 1]:g}, but it "
                f"must hold the baseline. {together}",
            )
    focal = np.abs(left[[0, 1], [0, 1]] / right[[0, 1], [0, 1]] - 1).max()
    row = abs(left[1, 2] - right[1, 2]) + abs(left[1, 3] - right[1, 3])
    if focal > _FOCAL_TOLERANCE or row > _ALIGNED:
        raise CalibrationError(
            "alignment",
            "P of the left and the right camera_info are not those of one rectified pair, which differ in P[2] and "
            f"P[3] only: {left.ravel().tolist()} and {right.ravel().tolist()}. {together}",
        )
    baseline = float(left[0, 3] / left[0, 0] - right[0, 3] / right[0, 0])
    if baseline == 0:
        raise CalibrationError(
            "baseline",
            f"P[3] of the right camera_info says that the baseline is zero; it must be -P[0] times metres. {together}",
        )
    if baseline < 0:
        raise CalibrationError(
            "swapped",
            f"the camera_infos have the right camera {-baseline:g} m to the left of the left one: left and right are "
            "swapped. Swap the topics",
        )
    return baseline


def check_stereo_matches(
    left: np.ndarray,
    right: np.ndarray,
    camera: StereoCamera | None,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
) -> RelativePose:
    """Which matches of a left and a right image agree with the calibration: on their epipolar lines, and in front.

    Args:
        left: (M, 2) pixels in the left image as received. NaN and infinity are outliers.
        right: (M, 2) pixels in the right image, the same matches.
        camera: None gives NO_CALIBRATION.
        max_reprojection_error: of an inlier, pixels.
        min_inliers: from so many matches on they are taken to tell whether the calibration is right.

    Returns:
        The right camera's pose in the left one's frame as calibrated (OK; its covariance is zero, and the parallax is
        the disparity). FAILED where min_inliers matches or more contradict the calibration: no more of them agree with
        it than chance would have it, or more of them are behind the cameras than in front.
    """
    left, right = _points(left), _points(right)
    if camera is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, len(left))
    views = _Views.of([(left, camera.left), (right, camera.right)])
    poses = _rig(camera)
    points = _settle(views, poses)
    on_line = views.seen.all(axis=0) & (_largest_error(views, poses, points) < max_reprojection_error)
    front = on_line & (points[2] > 0)
    behind = on_line & (points[2] < 0) & ~_is_distant(views, poses, points, max_reprojection_error)
    chance = np.full(len(left), _chance(camera.left, max_reprojection_error))
    if len(left) >= min_inliers and (
        behind.sum() > front.sum() or _log_false_alarms(front, chance, 1) > math.log(FALSE_ALARM_RATE)
    ):
        return RelativePose.undefined(PoseStatus.FAILED, len(left), front)
    return RelativePose(
        status=PoseStatus.OK,
        rotation=camera.rotation.T,
        translation=-camera.rotation.T @ camera.translation,
        covariance=np.zeros((6, 6)),
        metric=True,
        num_matches=len(left),
        num_inliers=int(front.sum()),
        median_parallax=_median_parallax(left, right, camera.left, camera.right, camera.rotation.T, front),
        inliers=front,
    )


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

    P3P with RANSAC from points of the reference frame to the current left image (OpenCV), and standing still, are
    where Levenberg-Marquardt starts. It minimises Tukey's loss, scaled to the noise, of the errors in all four images,
    with the points as unknowns, which the Schur complement eliminates. Matches without a right image take part by their
    epipolar lines. The same input gives the same answer.

    OK needs a likelihood ratio test with false-alarm rate FALSE_ALARM_RATE to say that the translation is not zero,
    and anything but FAILED one that wrong matches would not agree as well.

    Args:
        left0: (M, 2) pixels in the reference frame's left image as received. NaN and infinity are outliers.
        right0: (M, 2) pixels of the same points in its right image, NaN where there is no stereo match.
        left1: (M, 2) pixels in the current frame's left image, matched with left0.
        right1: (M, 2) pixels of the same points in its right image, or NaN.
        camera0: calibration of the reference frame; None gives NO_CALIBRATION.
        camera1: calibration of the current frame.
        max_reprojection_error: of an inlier, pixels, in any of the images.
        min_inliers: fewer matches, or inliers, give TOO_FEW_MATCHES; so do fewer than 8 that have a depth.
        keypoint_resolution: pixels between neighbouring positions that the detector can give, as in
            geometry.estimate_relative_pose: the covariance is no smaller than rounding allows.
        independent_points: how many points at most err independently of each other. Where there are more, the
            covariance is that of so many: more points on the same surfaces would not make the pose surer.

    Returns:
        The pose, or why there is none. With NO_TRANSLATION the covariance is that of the estimate whose translation
        could not be told from zero.

    Raises:
        ValueError: the arrays have another shape, or a parameter is out of range.
    """
    pixels = [_points(points) for points in (left0, right0, left1, right1)]
    if len({points.shape for points in pixels}) != 1:
        raise ValueError(f"left0, right0, left1, right1 differ in shape: {[points.shape for points in pixels]}")
    if not 0 < max_reprojection_error < math.inf:
        raise ValueError(f"max_reprojection_error must be a positive number of pixels, not {max_reprojection_error}")
    if not 0 <= keypoint_resolution < math.inf:
        raise ValueError(f"keypoint_resolution must be a number of pixels from 0 up, not {keypoint_resolution}")
    total, gate = len(pixels[0]), float(max_reprojection_error)
    required = max(min_inliers, _SMALLEST_SAMPLE)
    if camera0 is None or camera1 is None:
        return RelativePose.undefined(PoseStatus.NO_CALIBRATION, total)
    views = _Views.of(list(zip(pixels, (camera0.left, camera0.right, camera1.left, camera1.right))))
    for frame, camera in ((slice(0, 2), camera0), (slice(2, 4), camera1)):
        views = views.without_wrong_depths(frame, camera, gate)
    usable = views.seen[0] & views.seen[2]
    views = views.select(usable)
    deep = views.seen[1] | views.seen[3]
    if len(deep) < required or deep.sum() < _SMALLEST_SAMPLE:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total)

    # Without a depth, a point follows any small translation: it says little of it, and too much of whether it is zero.
    everything = _Pair(views, camera0, camera1)
    pair = _Pair(views.select(deep), camera0, camera1)
    fit = pair.fit(_search(pair.views, (camera0, camera1), gate), gate, keypoint_resolution)
    inliers = everything.agrees(fit, gate)
    mask = np.zeros(total, dtype=bool)
    mask[usable] = inliers
    chance = np.full(len(inliers), _chance(camera0.left, gate))
    if _log_false_alarms(inliers, chance, 3) > math.log(FALSE_ALARM_RATE):
        return RelativePose.undefined(PoseStatus.FAILED, total)
    if inliers.sum() < required or (inliers & deep).sum() < _SMALLEST_SAMPLE:
        return RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, total, mask)

    covariance, variance, freedom = pair.covariance(fit, keypoint_resolution)
    alike = max(1.0, float((fit.squares < fit.cutoffs).sum()) / independent_points)
    covariance, variance = alike * covariance, alike * variance
    still = pair.minimise(pair.settle(fit.rotation, np.zeros(3), fit.cutoffs), 20, rotation_only=True)
    status = PoseStatus.OK
    if fdtrc(3, freedom, max(still.cost - fit.cost, 0.0) / variance / 3) > FALSE_ALARM_RATE:
        status, fit = PoseStatus.NO_TRANSLATION, still
        inliers = everything.agrees(fit, gate)
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


class _Poses(NamedTuple):
    """Of k cameras: a point x of the reference frame's left camera is turns[k] x + shifts[k] in camera k."""

    turns: np.ndarray  # (k, 3, 3)
    shifts: np.ndarray  # (k, 3)


def _rig(camera: StereoCamera) -> _Poses:
    return _Poses(np.array([np.eye(3), camera.rotation]), np.array([np.zeros(3), camera.translation]))


@dataclass(frozen=True, eq=False)
class _Views:
    """What k images see of n points, which come last in every array: sums over few things then run along many points.

    rays: (k, 2, n) normalised coordinates, zero where not seen. weights: (k, 2, 2, n), pixels by normalised
    coordinates, zero where not seen. seen: (k, n) bool.
    """

    rays: np.ndarray
    weights: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, images: list[tuple[np.ndarray, Camera]]) -> _Views:
        found = [camera.normalise_with_jacobian(points) for points, camera in images]
        rays, slopes = (np.array(parts) for parts in zip(*found))
        seen = np.isfinite(rays).all(axis=2)
        rays[~seen] = 0.0
        weights = np.zeros_like(slopes)
        weights[seen] = np.linalg.inv(slopes[seen])
        return cls(rays.transpose(0, 2, 1).copy(), weights.transpose(0, 2, 3, 1).copy(), seen)

    def select(self, points: np.ndarray) -> _Views:
        return _Views(self.rays[..., points], self.weights[..., points], self.seen[:, points])

    def images(self, chosen: slice) -> _Views:
        return _Views(self.rays[chosen], self.weights[chosen], self.seen[chosen])

    def without_wrong_depths(self, frame: slice, camera: StereoCamera, gate: float) -> _Views:
        """Without the right image's part in points that are off their epipolar lines, or behind the cameras for sure.

        A point so far that the sign of its disparity is chance stays: without those on one side, far would be nearer.
        """
        right = frame.stop - 1
        seen = self.seen.copy()
        seen[right] &= seen[right - 1] & _fits(self.images(frame), _rig(camera), gate)
        kept = np.where(seen, 1.0, 0.0)
        return _Views(self.rays * kept[:, None], self.weights * kept[:, None, None], seen)


_Start = tuple[np.ndarray, np.ndarray]  # a rotation and a translation


@dataclass(frozen=True, eq=False)
class _Fit:
    """A motion, x_ref = rotation x_cur + translation, with points."""

    rotation: np.ndarray
    translation: np.ndarray
    points: np.ndarray  # (3, n)
    squares: np.ndarray  # (n,) sum of the squared errors of each point
    cutoffs: np.ndarray  # (n,) where Tukey's loss of them ends, squared pixels
    cost: float


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two stereo frames: left and right of the reference (camera0), left and right of the current one (camera1)."""

    views: _Views
    camera0: StereoCamera
    camera1: StereoCamera

    @property
    def conditions(self) -> np.ndarray:
        """(n,) what the images of a point say beyond where it is: 1, 3 or 5."""
        return 2 * self.views.seen.sum(axis=0) - 3

    def poses(self, rotation: np.ndarray, translation: np.ndarray) -> _Poses:
        rig0, rig1 = _rig(self.camera0), _rig(self.camera1)
        turns = rig1.turns @ rotation.T
        return _Poses(
            np.concatenate([rig0.turns, turns]), np.concatenate([rig0.shifts, rig1.shifts - turns @ translation])
        )

    def evaluate(self, rotation: np.ndarray, translation: np.ndarray, points: np.ndarray, cutoffs: np.ndarray) -> _Fit:
        squares = _squares(_errors(self.views, self.poses(rotation, translation), points))
        return _Fit(rotation, translation, points, squares, cutoffs, _tukey_cost(squares, cutoffs))

    def settle(self, rotation: np.ndarray, translation: np.ndarray, cutoffs: np.ndarray) -> _Fit:
        """With the points where all images together have them."""
        points = _settle(self.views, self.poses(rotation, translation))
        return self.evaluate(rotation, translation, points, cutoffs)

    def fit(self, starts: list[_Start], gate: float, resolution: float) -> _Fit:
        """The best start, refined with the noise that it leaves."""
        wide = _cutoffs(self.conditions, gate * _SEARCH_GATE / math.sqrt(_TUKEY))
        fits = [self.minimise(self.settle(*start, wide), 4) for start in starts]
        fit = min(fits, key=lambda fit: fit.cost)
        for _ in range(3):
            cutoffs = _cutoffs(self.conditions, self.noise(fit.squares, gate, resolution))
            fit = self.minimise(self.evaluate(fit.rotation, fit.translation, fit.points, cutoffs), 10)
        return fit

    def noise(self, squares: np.ndarray, gate: float, resolution: float) -> float:
        """Standard deviation of a keypoint's coordinate, pixels: what the errors say, or rounding."""
        near = squares < 4 * gate**2 * self.conditions
        noise = math.sqrt(np.median(squares[near] / _MEDIANS[self.conditions[near]])) if near.any() else gate
        return max(noise, resolution / math.sqrt(12), 1e-9)

    def minimise(self, fit: _Fit, iterations: int, rotation_only: bool = False) -> _Fit:
        """Levenberg-Marquardt on Tukey's loss by the motion, or its rotation, and all points."""
        free = slice(3, 6) if rotation_only else slice(0, 6)
        damping = 1e-4
        for _ in range(iterations):
            system = self.eliminate(fit, np.maximum(1 - fit.squares / fit.cutoffs, 0) ** 2)
            hessian, gradient = system.hessian[free, free], system.gradient[free]
            diagonal = hessian.diagonal() + 1e-9 * hessian.trace() + _TINY
            for _ in range(6):
                step = np.zeros(6)
                step[free] = np.linalg.solve(hessian + np.diag(damping * diagonal), -gradient)
                trial = self.evaluate(
                    cv2.Rodrigues(step[3:].reshape(3, 1))[0] @ fit.rotation,
                    fit.translation + step[:3],
                    fit.points - system.point_steps - np.einsum("ipn,p->in", system.point_slopes, step),
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
        """The normal equations by the motion, each point eliminated and weighted (n,)."""
        errors, by_point, by_motion = _slopes(self.views, self.poses(fit.rotation, fit.translation), fit)
        inverse = _inverse(by_point)
        pull = np.einsum("rin,rn->in", by_point, errors)
        mixed = np.einsum("rin,rpn->ipn", by_point, by_motion)
        point_steps = np.einsum("ijn,jn->in", inverse, pull)
        point_slopes = np.einsum("ijn,jpn->ipn", inverse, mixed)
        weighted, weighted_mixed = (_flat(array * weights) for array in (by_motion, mixed))
        return _System(
            hessian=weighted @ _flat(by_motion).T - weighted_mixed @ _flat(point_slopes).T,
            gradient=weighted @ errors.ravel() - weighted_mixed @ point_steps.ravel(),
            point_steps=point_steps,
            point_slopes=point_slopes,
        )

    def agrees(self, fit: _Fit, gate: float) -> np.ndarray:
        """Which points (n,) are within the gate in every image, and in front, or too far to say."""
        return _fits(self.views, self.poses(fit.rotation, fit.translation), gate)

    def covariance(self, fit: _Fit, resolution: float) -> tuple[np.ndarray, float, int]:
        """(6, 6) of translation and rotation, the variance that goes with costs, pixels, and degrees of freedom.

        That of an M-estimate, H^-1 G H^-1 with the whole Hessian H (Huber, Robust Statistics). Gauss and Newton's part
        of it, which G is a multiple of, takes the noise of a far point's depth for depth, and so is too sure of the
        translation.
        """
        used = fit.squares < fit.cutoffs
        conditions, share = self.conditions[used], fit.squares[used] / fit.cutoffs[used]
        freedom = max(int(conditions.sum()) - 6, 1)
        spread = float(((1 - share) ** 4 * fit.squares[used]).sum()) / freedom
        curvature = float((conditions * (1 - share) ** 2 - 4 * share * (1 - share)).sum()) / max(conditions.sum(), 1)
        curvature = max(curvature, _SMALLEST_CURVATURE)
        # Left and right image round the row of a point alike, so that two errors are one: twice the variance.
        rounding = resolution**2 / 6
        variance = max(spread / curvature**2, rounding, _TINY)

        whole = self.eliminate(fit, used.astype(np.float64)).hessian
        values, axes = np.linalg.eigh(whole)
        axes = axes / np.sqrt(np.maximum(values, _WEAK))
        whole[:3, :3] -= variance * self.hessian_of_depth_noise(fit, used)
        # In these axes Gauss and Newton's Hessian is the identity.
        curvatures, turn = np.linalg.eigh(axes.T @ whole @ axes)
        axes = axes @ turn / np.maximum(curvatures, _SMALLEST_CURVATURE)
        return variance * axes @ axes.T, max(spread / curvature, rounding, _TINY), freedom

    def hessian_of_depth_noise(self, fit: _Fit, used: np.ndarray) -> np.ndarray:
        """(3, 3): what the noise of the used points' depths adds to the translation's part, for a variance of one.

        Its slopes are a multiple of the inverse depth, and so their products of its square, not of its variance.
        """
        _, by_point, by_motion = _slopes(self.views, self.poses(fit.rotation, fit.translation), fit)
        inverse = _inverse(by_point)
        mixed = np.einsum("rin,rpn->ipn", by_point, by_motion[:, :3])
        across = by_motion[:, :3] - np.einsum("rin,ijn,jpn->rpn", by_point, inverse, mixed, optimize=True)
        depth = np.where(np.abs(fit.points[2]) > _TINY, fit.points[2], 1.0)
        noise = _flat(across * np.sqrt(inverse[2, 2]) / depth * used)
        return np.asarray(noise @ noise.T)


class _System(NamedTuple):
    """Normal equations by the motion; a step s of it moves the points by -(point_steps + point_slopes s)."""

    hessian: np.ndarray  # (6, 6)
    gradient: np.ndarray  # (6,)
    point_steps: np.ndarray  # (3, n)
    point_slopes: np.ndarray  # (3, 6, n)


def _search(views: _Views, cameras: tuple[StereoCamera, StereoCamera], gate: float) -> list[_Start]:
    """Where to start from: standing still, and what RANSAC finds from the points of the frame that has more."""
    starts: list[_Start] = [(np.eye(3), np.zeros(3))]
    frame = int(views.seen[3].sum() > views.seen[1].sum())
    points = _settle(views.images(slice(2 * frame, 2 * frame + 2)), _rig(cameras[frame]))
    deep = views.seen[2 * frame + 1] & (points[2] > _FARTHEST)
    # Where the disparity is less than its error the depth is anything; one point kilometres away, and what OpenCV makes
    # of all inliers in the end (EPnP) is metres off. Where there is nothing nearer, the rotation can be had from these.
    camera = cameras[frame]
    disparities = camera.left.focal * float(np.linalg.norm(camera.translation)) * points[2]
    if (certain := deep & (disparities > gate)).sum() >= _SMALLEST_SAMPLE:
        deep = certain
    if deep.sum() < 4:
        return starts
    try:
        found, turn, shift, _ = cv2.solvePnPRansac(
            np.ascontiguousarray((_directions(points)[:, deep] / points[2, deep]).T),
            np.ascontiguousarray(views.rays[2 - 2 * frame][:, deep].T),
            np.eye(3),
            np.zeros(4),
            iterationsCount=_SEARCH_ITERATIONS,
            reprojectionError=_SEARCH_GATE * gate / camera.left.focal,
            confidence=0.999,
            flags=cv2.SOLVEPNP_P3P,
        )
    except cv2.error:  # degenerate points
        return starts
    if found and np.isfinite(turn).all() and np.isfinite(shift).all():
        rotation = np.asarray(cv2.Rodrigues(turn)[0], dtype=np.float64)
        translation = np.asarray(shift, dtype=np.float64).ravel()
        # The points were the reference's: that is the motion's inverse. Or the current frame's: that is the motion.
        starts.append((rotation.T, -rotation.T @ translation) if frame == 0 else (rotation, translation))
    return starts


# Errors of points (3, n), and their slopes.


def _project(poses: _Poses, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where k cameras see points, (k, 2, n) normalised, their depth (k, n) over that in the reference's left camera,

    and which are ahead (k, n).
    """
    there = poses.turns @ _directions(points) + poses.shifts[..., None] * points[2]
    ahead = there[:, 2] > _AHEAD * np.sqrt((there**2).sum(axis=1))
    depth = np.where(ahead, there[:, 2], 1.0)
    return there[:, :2] / depth[:, None], depth, ahead


def _directions(points: np.ndarray) -> np.ndarray:
    """(3, n): x, y, 1."""
    return np.stack([points[0], points[1], np.ones_like(points[0])])


def _errors(views: _Views, poses: _Poses, points: np.ndarray) -> np.ndarray:
    """(k, 2, n) pixels, zero where a point is not seen, far off where it is behind."""
    projected, _, ahead = _project(poses, points)
    errors = np.einsum("kijn,kjn->kin", views.weights, views.rays - projected)
    return np.where((ahead | ~views.seen)[:, None], errors, _BEHIND)


def _project_slopes(views: _Views, poses: _Poses, points: np.ndarray) -> np.ndarray:
    """(k, 2, 3, n): how many pixels the image of a point moves by the point in the camera's frame."""
    projected, depth, ahead = _project(poses, points)
    weights = views.weights * (ahead / depth)[:, None, None]
    return np.concatenate([weights, -np.einsum("kijn,kjn->kin", weights, projected)[:, :, None]], axis=2)


def _by_points(slopes: np.ndarray, poses: _Poses) -> np.ndarray:
    """Slopes of the errors by the points, (2 k, 3, n)."""
    moves = np.concatenate([poses.turns[..., :2], poses.shifts[..., None]], axis=-1)
    return -(moves.transpose(0, 2, 1)[:, None] @ slopes).reshape(2 * len(slopes), 3, slopes.shape[-1])


def _slopes(views: _Views, poses: _Poses, fit: _Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors (8, n) and their slopes by the points (8, 3, n) and by the motion (8, 6, n)."""
    count = fit.points.shape[1]
    slopes = _project_slopes(views, poses, fit.points)
    # In a current camera's frame a point is its turn times (direction - inverse depth translation), and a small
    # rotation w of the motion takes turn (w x (...)) away.
    x, y, z = _directions(fit.points) - fit.translation[:, None] * fit.points[2]
    moved = poses.turns[2:].transpose(0, 2, 1)[:, None] @ slopes[2:]
    by_motion = np.zeros((4, 2, 6, count))
    by_motion[2:, :, :3] = moved * fit.points[2]
    by_motion[2:, :, 3] = y * moved[:, :, 2] - z * moved[:, :, 1]
    by_motion[2:, :, 4] = z * moved[:, :, 0] - x * moved[:, :, 2]
    by_motion[2:, :, 5] = x * moved[:, :, 1] - y * moved[:, :, 0]
    errors = _errors(views, poses, fit.points).reshape(8, count)
    return errors, _by_points(slopes, poses), by_motion.reshape(8, 6, count)


def _triangulate(views: _Views, poses: _Poses) -> np.ndarray:
    """Points on the first image's rays at the inverse depth that suits the other images by linear least squares."""
    rays = views.rays[0]
    start, slope = poses.turns @ _directions(rays), poses.shifts[..., None]
    # Of (start + inverse depth slope)_xy - ray (start + inverse depth slope)_z:
    fixed, slope = (
        np.einsum("kijn,kjn->kin", views.weights, part[:, :2] - views.rays * part[:, 2:]) for part in (start, slope)
    )
    inverse_depth = -(fixed * slope).sum(axis=(0, 1)) / ((slope**2).sum(axis=(0, 1)) + _WEAK)
    return np.concatenate([rays, inverse_depth[None]])


def _settle(views: _Views, poses: _Poses, iterations: int = 3) -> np.ndarray:
    """Points (3, n) where their errors are least: Gauss-Newton, a step taken where it helps."""
    points = _triangulate(views, poses)
    errors = _errors(views, poses, points)
    for _ in range(iterations):
        slopes = _by_points(_project_slopes(views, poses, points), poses)
        pull = np.einsum("rin,rn->in", slopes, errors.reshape(len(slopes), points.shape[1]))
        trial = points - np.einsum("ijn,jn->in", _inverse(slopes), pull)
        trial_errors = _errors(views, poses, trial)
        better = _squares(trial_errors) < _squares(errors)
        points, errors = np.where(better, trial, points), np.where(better, trial_errors, errors)
    return points


def _fits(views: _Views, poses: _Poses, gate: float) -> np.ndarray:
    """Which points (n,) have errors below the gate, and are in front, or so far that it cannot be said."""
    points = _settle(views, poses)
    front = (points[2] > 0) | _is_distant(views, poses, points, gate)
    return np.asarray((_largest_error(views, poses, points) < gate) & front)


def _is_distant(views: _Views, poses: _Poses, points: np.ndarray, gate: float) -> np.ndarray:
    """Which points (n,) would be within the gate of here, in every image, if they were infinitely far."""
    slopes = _by_points(_project_slopes(views, poses, points), poses)[:, 2].reshape(len(views.rays), 2, len(points[2]))
    return np.asarray((np.sqrt((slopes**2).sum(axis=1)) * np.abs(points[2]) < gate).all(axis=0))


def _squares(errors: np.ndarray) -> np.ndarray:
    return np.asarray((errors**2).sum(axis=(0, 1)))


def _largest_error(views: _Views, poses: _Poses, points: np.ndarray) -> np.ndarray:
    """(n,) pixels: where two images see a point, how far one is from the other's epipolar line; else in any image."""
    lengths = np.sqrt((_errors(views, poses, points) ** 2).sum(axis=1))
    return np.where(views.seen.sum(axis=0) <= 2, lengths.sum(axis=0), lengths.max(axis=0))


def _inverse(slopes: np.ndarray) -> np.ndarray:
    """Inverse normal matrices (3, 3, n) of the points, of slopes (r, 3, n)."""
    normal = np.einsum("rin,rjn->nij", slopes, slopes) + np.diag([_TINY, _TINY, _WEAK])
    return np.linalg.inv(normal).transpose(1, 2, 0)


def _flat(array: np.ndarray) -> np.ndarray:
    """(r, p, n) to (p, r n)."""
    rows, columns, count = array.shape
    return array.transpose(1, 0, 2).reshape(columns, rows * count)


# Loss, chance, and checks.


def _cutoffs(conditions: np.ndarray, noise: float) -> np.ndarray:
    """Where Tukey's loss ends, squared pixels, for points with so many conditions."""
    return noise**2 * (_TUKEY + _TUKEY_STEP * (conditions - 1))


def _tukey_cost(squares: np.ndarray, cutoffs: np.ndarray) -> float:
    share = np.minimum(squares / cutoffs, 1)
    return float((cutoffs * share * (3 - 3 * share + share**2)).sum()) / 3


def _chance(camera: Camera, gate: float) -> float:
    """Of a wrong match to be within the gate of its epipolar line, no longer than the image's diagonal."""
    area = camera.width * camera.height
    return min(1.0, 2 * math.sqrt(2) * gate * math.hypot(camera.width, camera.height) / area)


def _median_parallax(
    points0: np.ndarray, points1: np.ndarray, camera0: Camera, camera1: Camera, rotation: np.ndarray, used: np.ndarray
) -> float:
    """Median displacement, pixels of the reference image, between the matches and where the rotation takes them."""
    rays0, slopes = camera0.normalise_with_jacobian(points0[used])
    turned = np.column_stack([camera1.normalise(points1[used]), np.ones(used.sum())]) @ rotation.T
    ahead = turned[:, 2] > _AHEAD * np.linalg.norm(turned, axis=1)
    if not ahead.any():
        return 0.0
    shift = rays0[ahead] - turned[ahead, :2] / turned[ahead, 2:]
    return float(np.median(np.linalg.norm(np.linalg.solve(slopes[ahead], shift[..., None])[..., 0], axis=1)))


def _points(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape (M, 2), not {points.shape}")
    return points
