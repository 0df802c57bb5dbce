"""Fixed-lag smoothing of the latest poses of a stereo camera and of the 3D points of its tracks. Works without ROS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import gtsam
import numpy as np
from gtsam.symbol_shorthand import L, X

__all__ = ["Calibration", "FixedLagSmoother", "Observations", "stereo_noise"]

_LEAST_SIGMA = 0.1  # pixels: no calibration is more accurate
_LEAST_DISPARITY = 1.5  # pixels: with less disparity, the initial position of a point is too inaccurate
_FAR = 20.0  # metres: sigma of the prior on a new point, which is not known better before it is seen
_ROBUST = 1.0  # standard deviations, Cauchy cost: a track that slipped loses its influence
_LEAST_KNOWN = 12  # smallest number of known points from which a camera is located
_GATE = 8.0  # largest distance of an observation from the expected position of its point, pixels
_RELINEARISE = 0.001  # metres, radians: variables that move less keep their linearisation, their factors the weights


@dataclass(frozen=True)
class Calibration:
    """A rectified stereo pair: focal lengths and principal point in pixels, baseline in metres."""

    fx: float
    fy: float
    cx: float
    cy: float
    baseline: float

    def gtsam_stereo(self) -> gtsam.Cal3_S2Stereo:
        """The pair as GTSAM's stereo factors need it."""
        return gtsam.Cal3_S2Stereo(self.fx, self.fy, 0.0, self.cx, self.cy, self.baseline)

    def gtsam_mono(self) -> gtsam.Cal3_S2:
        """The left camera as GTSAM's projection factors need it."""
        return gtsam.Cal3_S2(self.fx, self.fy, 0.0, self.cx, self.cy)


@dataclass(frozen=True, eq=False)
class Observations:
    """The positions of M tracks in one frame, in pixels of the rectified images.

    Attributes:
        ids: (M,) ids of the tracks.
        points: (M, 2) in the left image.
        sigmas: (M,) standard deviations of each coordinate of points.
        right_x: (M,) x in the right image; NaN if the point has no match there.
        right_sigmas: (M,) standard deviations of right_x, given the left point.
    """

    ids: np.ndarray
    points: np.ndarray
    sigmas: np.ndarray
    right_x: np.ndarray
    right_sigmas: np.ndarray


def stereo_noise(left_sigma: float, right_sigma: float) -> gtsam.noiseModel.Gaussian:
    """Noise model of (left x, right x, y), pixels.

    The right point is found by matching the surroundings of the left point. Therefore it shares the error of the left
    point, and the disparity has an independent error.
    """
    left, disparity = max(left_sigma, _LEAST_SIGMA) ** 2, max(right_sigma, _LEAST_SIGMA) ** 2
    return gtsam.noiseModel.Gaussian.Covariance(
        np.array([[left, left, 0.0], [left, left + disparity, 0.0], [0.0, 0.0, left]])
    )


class FixedLagSmoother:
    """Estimates the poses and points of the latest frames together (GTSAM's IncrementalFixedLagSmoother).

    Frames older than the lag are marginalised out. Their poses stay as last estimated.

    Attributes:
        poses: the pose of every frame so far, x_world = pose x_camera; those within the lag still change.
    """

    def __init__(self, calibration: Calibration, lag: int = 20, most: int = 300) -> None:
        """Start without frames. `lag` is in frames; `most` is the approximate largest number of points per frame."""
        self.poses: list[gtsam.Pose3] = []
        self._calibration = calibration
        self._stereo, self._mono = calibration.gtsam_stereo(), calibration.gtsam_mono()
        self._lag, self._most = lag, most
        parameters = gtsam.ISAM2Params()
        parameters.relinearizeSkip = 1
        parameters.setRelinearizeThreshold(_RELINEARISE)
        parameters.findUnusedFactorSlots = True
        self._smoother = gtsam.IncrementalFixedLagSmoother(float(lag), parameters)
        self._estimate = gtsam.Values()
        # The next update adds these: factors, variables, and for each variable the last frame that saw it.
        self._graph, self._new = gtsam.NonlinearFactorGraph(), gtsam.Values()
        self._seen: dict[Any, float] = {}
        self._landmarks: dict[int, tuple[int, int]] = {}  # by track: number of its point, last frame that sees it
        self._num_landmarks = 0

    def start(self, pose: gtsam.Pose3) -> None:
        """Add the first frame with a given pose."""
        self._graph.add(gtsam.PriorFactorPose3(X(0), pose, gtsam.noiseModel.Isotropic.Sigma(6, 1e-4)))
        self._add_pose(0, pose)
        self._update()

    def add_frame(
        self, motion: gtsam.Pose3, sigmas: np.ndarray, reference: int, before: Observations, now: Observations
    ) -> gtsam.Pose3:
        """Add a frame, and return its pose.

        Args:
            motion: initial guess of its pose in the reference's camera frame.
            sigmas: (6,) standard deviations of the guess: rotation (radians), then position (metres). The tracks
                determine the pose; the guess keeps it in place if there are no tracks.
            reference: number of the frame from which its tracks come; the first frame is 0.
            before: the tracks in the reference, used for tracks that begin there.
            now: the same tracks in this frame, row by row.
        """
        frame = len(self.poses)
        self._add_pose(frame, self.poses[reference].compose(motion))
        pose = self.poses[frame]
        reference_known = self._estimate.exists(X(reference))
        if reference_known:
            noise = gtsam.noiseModel.Diagonal.Sigmas(sigmas)
            self._graph.add(gtsam.BetweenFactorPose3(X(reference), X(frame), motion, noise))
        else:
            self._graph.add(gtsam.PriorFactorPose3(X(frame), pose, gtsam.noiseModel.Diagonal.Sigmas(sigmas)))
        known = [self._known(track) for track in now.ids.tolist()]
        fresh = [row for row, point in enumerate(known) if point is None]
        room = max(0, self._most - (len(known) - len(fresh)))
        for row in fresh[:: max(1, len(fresh) // room)] if room else []:  # some of them, from all over the image
            known[row] = self._begin(int(now.ids[row]), reference if reference_known else None, before, frame, now, row)
        for row, (track, point) in enumerate(zip(now.ids.tolist(), known)):
            if point is not None:
                self._observe(track, frame, pose, point, now, row)
        self._update()
        return self.poses[frame]

    def locate(self, now: Observations, reference: int) -> gtsam.Pose3 | None:
        """The pose of a new frame in the camera frame of `reference`, from the known points that its tracks see.

        It is None if there are too few points.
        """
        known = {row: self._known(track) for row, track in enumerate(now.ids.tolist())}
        seen = {row: point for row, point in known.items() if point is not None}
        rows = list(seen)
        if len(rows) < _LEAST_KNOWN:
            return None
        c = self._calibration
        matrix = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1.0]])
        points = np.array([self.poses[-1].transformTo(point) for point in seen.values()])
        found, turn, shift, _ = cv2.solvePnPRansac(points, now.points[rows], matrix, None, reprojectionError=_GATE / 2)
        if not found:
            return None
        pose = gtsam.Pose3(gtsam.Rot3(cv2.Rodrigues(turn)[0]), shift.ravel()).inverse()
        return self.poses[reference].between(self.poses[-1].compose(pose))

    def _add_pose(self, frame: int, pose: gtsam.Pose3) -> None:
        self.poses.append(pose)
        self._new.insert(X(frame), pose)
        self._seen[X(frame)] = float(frame)

    def _known(self, track: int) -> np.ndarray | None:
        """The point (3,) of a track in the world, metres; None if the smoother does not hold it."""
        number, last = self._landmarks.get(track, (0, -1))
        key = L(number)
        if last < 0 or not self._estimate.exists(key):
            return None
        return np.asarray(self._estimate.atPoint3(key))

    def _begin(
        self, track: int, reference: int | None, before: Observations, frame: int, now: Observations, row: int
    ) -> np.ndarray | None:
        """Add a point for a track, from a stereo observation in the reference or in this frame.

        Returns the point (3,) in the world, metres; None without a stereo observation of sufficient disparity.
        """
        for number, seen in ((reference, before), (frame, now)):
            if number is None or not seen.points[row, 0] - seen.right_x[row] > _LEAST_DISPARITY:
                continue
            pose = self.poses[number]
            measured = gtsam.StereoPoint2(seen.points[row, 0], seen.right_x[row], seen.points[row, 1])
            point = np.asarray(gtsam.StereoCamera(pose, self._stereo).backproject(measured))
            self._num_landmarks += 1
            self._landmarks[track] = self._num_landmarks, frame
            key = L(self._num_landmarks)
            self._new.insert(key, point)
            self._graph.add(gtsam.PriorFactorPoint3(key, point, gtsam.noiseModel.Isotropic.Sigma(3, _FAR)))
            if number != frame:
                self._observe(track, number, pose, point, seen, row)
            return point
        return None

    def _observe(
        self, track: int, frame: int, pose: gtsam.Pose3, point: np.ndarray, seen: Observations, row: int
    ) -> None:
        """Add a factor for a frame's observation of a point, unless it is far from the point's expected position."""
        x, y, z = pose.transformTo(point)
        c, (u, v) = self._calibration, seen.points[row]
        if z <= 0 or np.hypot(c.fx * x / z + c.cx - u, c.fy * y / z + c.cy - v) > _GATE:
            return
        number, last = self._landmarks[track]
        self._landmarks[track] = number, max(last, frame)
        self._seen[L(number)] = float(max(last, frame))
        robust = gtsam.noiseModel.mEstimator.Cauchy.Create(_ROBUST)
        if np.isfinite(seen.right_x[row]):
            noise = gtsam.noiseModel.Robust.Create(robust, stereo_noise(seen.sigmas[row], seen.right_sigmas[row]))
            measured = gtsam.StereoPoint2(u, seen.right_x[row], v)
            self._graph.add(
                gtsam.GenericStereoFactor3D(measured, noise, X(frame), L(number), self._stereo, False, False)
            )
        else:
            plain = gtsam.noiseModel.Isotropic.Sigma(2, max(seen.sigmas[row], _LEAST_SIGMA))
            noise = gtsam.noiseModel.Robust.Create(robust, plain)
            self._graph.add(
                gtsam.GenericProjectionFactorCal3_S2(
                    np.array([u, v]), noise, X(frame), L(number), self._mono, False, False
                )
            )

    def _update(self) -> None:
        self._smoother.update(self._graph, self._new, self._seen)
        self._graph, self._new, self._seen = gtsam.NonlinearFactorGraph(), gtsam.Values(), {}
        self._estimate = self._smoother.calculateEstimate()
        for frame in range(max(0, len(self.poses) - self._lag - 1), len(self.poses)):
            if self._estimate.exists(X(frame)):
                self.poses[frame] = self._estimate.atPose3(X(frame))
        horizon = len(self.poses) - self._lag - 1
        self._landmarks = {track: known for track, known in self._landmarks.items() if known[1] >= horizon}
