"""Loop closure: keyframes, relative poses of two keyframes, and the pose graph that they correct. Works without ROS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import gtsam
import numpy as np
from gtsam.symbol_shorthand import L, X

from .smoother import Calibration, stereo_noise

__all__ = ["Keyframe", "Keyframes", "Loop", "PoseGraph", "align"]

_KEYPOINT_SIGMA = 0.7  # pixels: error of keypoints as detected, without refinement
_LEAST_INLIERS = 30
_LEAST_DISPARITY = 2.0  # pixels
_INLIER_DISTANCE = 2.0  # pixels
_LEAST_SHARE = 0.75  # least fraction of inliers: on a distant wall, two motions may each explain a smaller fraction
_INDEPENDENT = 100  # largest number of points with independent errors: neighbouring points have similar errors
_ROBUST = 1.345  # standard deviations, Huber cost


@dataclass(frozen=True, eq=False)
class Keyframe:
    """A frame that is kept for loop closure.

    Attributes:
        number: of the frame.
        features: with which its points are matched again; this module does not use their content.
        points: (N, 2) keypoints in the rectified left image, pixels; NaN if unknown.
        right_x: (N,) x of the keypoints in the rectified right image, pixels; NaN if unknown.
        right_sigmas: (N,) standard deviations of right_x, pixels.
    """

    number: int
    features: Any
    points: np.ndarray
    right_x: np.ndarray
    right_sigmas: np.ndarray


@dataclass(frozen=True, eq=False)
class Loop:
    """A measured motion between two keyframes that are far apart in time: x_reference = pose x_current."""

    reference: int
    current: int
    pose: gtsam.Pose3
    covariance: np.ndarray  # (6, 6) rotation, then position, in the current camera's frame (GTSAM's order)
    num_inliers: int


class Keyframes:
    """The keyframes so far. It decides which frames become keyframes, and which of them may show the same place."""

    def __init__(self, step: float = 0.4, turn: float = 0.2, radius: float = 1.5, least_path: float = 6.0) -> None:
        """Set the limits for new keyframes, and for loop candidates.

        Args:
            step: distance from the last keyframe beyond which a frame becomes a keyframe, metres.
            turn: rotation from the last keyframe beyond which a frame becomes a keyframe, radians.
            radius: largest distance between two keyframes that may show the same place, metres.
            least_path: shortest path between two keyframes that may show the same place, metres.
        """
        self.kept: list[Keyframe] = []
        self._step, self._turn, self._radius, self._least_path = step, turn, radius, least_path

    def is_due(self, poses: Sequence[gtsam.Pose3]) -> bool:
        """Whether the last pose is far enough from the last keyframe to become a keyframe."""
        if not self.kept:
            return True
        moved = poses[self.kept[-1].number].between(poses[-1])
        return float(np.linalg.norm(moved.translation())) > self._step or _angle(moved.rotation()) > self._turn

    def candidates(self, keyframe: Keyframe, poses: Sequence[gtsam.Pose3], most: int = 2) -> list[Keyframe]:
        """Older keyframes that may show the same place as this keyframe, the most likely first."""
        positions = np.array([pose.translation() for pose in poses])
        walked = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(positions, axis=0), axis=1))])
        found = []
        for other in self.kept:
            if walked[keyframe.number] - walked[other.number] < self._least_path:
                continue
            apart = poses[other.number].between(poses[keyframe.number])
            distance, angle = float(np.linalg.norm(apart.translation())), _angle(apart.rotation())
            if distance < self._radius and angle < 0.6:
                found.append((distance + 2.0 * angle, other))
        return [other for _, other in sorted(found, key=lambda each: each[0])[:most]]


def _angle(rotation: gtsam.Rot3) -> float:
    """The angle of a rotation, radians."""
    return float(np.linalg.norm(gtsam.Rot3.Logmap(rotation)))


def align(
    reference: Keyframe, current: Keyframe, indices: np.ndarray, scores: np.ndarray, calibration: Calibration
) -> Loop | None:
    """Estimate the relative pose of two keyframes, in metres; None if there are too few inliers.

    The reference's stereo matches give 3D points, and PnP with RANSAC gives an initial pose. A bundle adjustment of
    both frames' left and right observations then refines the pose and the points, and gives the covariance.

    Args:
        reference: the older keyframe.
        current: the newer keyframe.
        indices: (M, 2) indices of the matched keypoints in the two keyframes, each at most once, as in a MatchArray.
        scores: (M,) of the matches; they only set the order in which RANSAC draws from the matches.
        calibration: of the stereo pair.
    """
    indices = indices[np.argsort(-scores)]
    disparity = (reference.points[:, 0] - reference.right_x)[indices[:, 0]]
    usable = (disparity > _LEAST_DISPARITY) & np.isfinite(current.points[indices[:, 1], 0])  # NaN is not greater
    indices, disparity = indices[usable], disparity[usable]
    if len(indices) < _LEAST_INLIERS:
        return None
    matrix = np.array([[calibration.fx, 0, calibration.cx], [0, calibration.fy, calibration.cy], [0, 0, 1.0]])
    points0, points1 = reference.points[indices[:, 0]], current.points[indices[:, 1]]
    depth = calibration.fx * calibration.baseline / disparity
    rays = (np.c_[points0, np.ones(len(points0))] @ np.linalg.inv(matrix).T) * depth[:, None]
    cv2.setRNGSeed(0)  # so that equal keyframes give equal loops
    found, turn, shift, inliers = cv2.solvePnPRansac(
        rays, points1, matrix, None, iterationsCount=300, reprojectionError=_INLIER_DISTANCE, confidence=0.999
    )
    if not found or inliers is None or len(inliers) < max(_LEAST_INLIERS, _LEAST_SHARE * len(indices)):
        return None
    first = gtsam.Pose3(gtsam.Rot3(cv2.Rodrigues(turn)[0]), shift.ravel()).inverse()  # PnP gives x_current = ...
    return _refine(reference, current, indices[inliers.ravel()], rays[inliers.ravel()], first, calibration)


def _refine(
    reference: Keyframe,
    current: Keyframe,
    indices: np.ndarray,
    points: np.ndarray,
    first: gtsam.Pose3,
    calibration: Calibration,
) -> Loop | None:
    """Bundle adjustment of two keyframes; None if the pose is not determined.

    `points` (M, 3) and the initial pose `first` of the current camera are in the reference's camera frame.
    """
    stereo, mono = calibration.gtsam_stereo(), calibration.gtsam_mono()
    huber = gtsam.noiseModel.mEstimator.Huber.Create(_ROBUST)
    mono_noise = gtsam.noiseModel.Robust.Create(huber, gtsam.noiseModel.Isotropic.Sigma(2, _KEYPOINT_SIGMA))
    graph, values = gtsam.NonlinearFactorGraph(), gtsam.Values()
    values.insert(X(0), gtsam.Pose3())
    values.insert(X(1), first)
    graph.add(gtsam.PriorFactorPose3(X(0), gtsam.Pose3(), gtsam.noiseModel.Isotropic.Sigma(6, 1e-6)))
    for row, (pair, point) in enumerate(zip(indices, points)):
        values.insert(L(row), point)
        for side, (frame, index) in enumerate(zip((reference, current), pair)):
            u, v = frame.points[index]
            if np.isfinite(frame.right_x[index]):
                noise = stereo_noise(_KEYPOINT_SIGMA, frame.right_sigmas[index])
                robust = gtsam.noiseModel.Robust.Create(huber, noise)
                measured = gtsam.StereoPoint2(u, frame.right_x[index], v)
                graph.add(gtsam.GenericStereoFactor3D(measured, robust, X(side), L(row), stereo, False, False))
            else:
                pixel = np.array([u, v])
                graph.add(gtsam.GenericProjectionFactorCal3_S2(pixel, mono_noise, X(side), L(row), mono, False, False))
    try:
        values = gtsam.LevenbergMarquardtOptimizer(graph, values).optimize()
        covariance = gtsam.Marginals(graph, values).marginalCovariance(X(1))
    except RuntimeError:  # the equations do not determine the pose
        return None
    covariance = np.asarray(covariance) * max(1.0, len(indices) / _INDEPENDENT)
    return Loop(reference.number, current.number, values.atPose3(X(1)), covariance, len(indices))


class PoseGraph:
    """Graph of the poses of all frames, with the smoothed motion from each frame's reference and the loops as factors.

    Attributes:
        loops: the loops added so far.
    """

    def __init__(self) -> None:
        self.loops: list[Loop] = []
        self._steps: list[tuple[int, np.ndarray]] = []
        self._poses: list[gtsam.Pose3] = []
        self._smoothed: list[gtsam.Pose3] = []

    def add_frame(self, reference: int, sigmas: np.ndarray) -> None:
        """Add a frame, with the sigmas (6,), rotation then position, of the motion from its reference to it.

        After a dark frame, the reference of the next frame is the frame before the dark one. So no other pose depends
        on the guessed motion of the dark frame.
        """
        self._steps.append((reference, sigmas))

    def poses(self, smoothed: Sequence[gtsam.Pose3]) -> list[gtsam.Pose3]:
        """The poses of all frames, corrected up to the last loop; later frames follow with their smoothed motion."""
        poses = list(self._poses)
        for number in range(len(poses), len(smoothed)):
            before = smoothed[number - 1].between(smoothed[number]) if number else None
            poses.append(smoothed[number] if before is None else poses[-1].compose(before))
        return poses

    def close(self, loop: Loop, smoothed: Sequence[gtsam.Pose3]) -> None:
        """Add a loop, and correct the poses of all frames."""
        self.loops.append(loop)
        values, graph = gtsam.Values(), gtsam.NonlinearFactorGraph()
        for number, pose in enumerate(self.poses(smoothed)):
            values.insert(X(number), pose)
        graph.add(gtsam.PriorFactorPose3(X(0), smoothed[0], gtsam.noiseModel.Isotropic.Sigma(6, 1e-6)))
        for number, (reference, sigmas) in enumerate(self._steps[1 : len(smoothed)], 1):
            motion = smoothed[reference].between(smoothed[number])
            noise = gtsam.noiseModel.Diagonal.Sigmas(sigmas)
            graph.add(gtsam.BetweenFactorPose3(X(reference), X(number), motion, noise))
        cauchy = gtsam.noiseModel.mEstimator.Cauchy.Create(3.0)  # so that a wrong loop loses against the others
        for each in self.loops:
            robust = gtsam.noiseModel.Robust.Create(cauchy, gtsam.noiseModel.Gaussian.Covariance(each.covariance))
            graph.add(gtsam.BetweenFactorPose3(X(each.reference), X(each.current), each.pose, robust))
        values = gtsam.LevenbergMarquardtOptimizer(graph, values).optimize()
        self._poses = [values.atPose3(X(number)) for number in range(len(smoothed))]
