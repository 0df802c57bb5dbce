"""Computes poses from the matcher's messages: collects the messages of each frame, smooths, and closes loops.

This module does not need ROS: a message is any object with the fields of its definition, from rclpy or from a bag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gtsam
import numpy as np

from kpmatch_ros import Camera, StereoCamera

from .pose_graph import Keyframe, Keyframes, PoseGraph, align
from .smoother import Calibration, FixedLagSmoother, Observations

__all__ = ["LoopRequest", "StereoSlam", "nanoseconds"]

# RelativePose: with OK, NO_TRANSLATION and AMBIGUOUS the rotation is valid, and the translation within its covariance.
_HOLDS, _INTERRUPTED = (0, 3, 6), 5
_LOOSE = 10.0  # factor for the sigmas of a RelativePose: it comes from the same matches, which must not count twice
_UNKNOWN = np.array([0.5, 0.5, 0.5, 1.0, 1.0, 1.0])  # sigmas of an unknown motion: radians, metres
_GUESSED = np.array([0.02, 0.02, 0.02, 0.05, 0.05, 0.05])  # sigmas of a motion that is known only from the tracks
_SAME = 0.01  # largest distance of two left points that are the same point, pixels: allows for rounding
_KEPT = 50  # largest number of messages on each topic that wait for the other messages of their frame
# The world has x forward, y left and z up (REP-103), as seen from the first camera. The camera has an optical frame.
_FIRST_CAMERA = gtsam.Pose3(gtsam.Rot3(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])), np.zeros(3))


def nanoseconds(stamp: Any) -> int:
    """A builtin_interfaces/Time as one number of nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


@dataclass(frozen=True, eq=False)
class LoopRequest:
    """Two keyframes that may show the same place. The service match_features has to match them."""

    reference: Keyframe
    current: Keyframe


@dataclass(frozen=True, eq=False)
class _Rectifier:
    """Converts pixels of one of the images to pixels of the rectified image."""

    camera: Camera
    turn: np.ndarray  # (3, 3) rotation from the camera's frame to that of the rectified pair
    rectified: Camera

    def points(self, flat: Any) -> np.ndarray:
        """Rectified points (M, 2) from a message's flat array; NaN where the lens model cannot be inverted."""
        seen = self.camera.normalise(np.asarray(flat, np.float64).reshape(-1, 2))
        rays = np.c_[seen, np.ones(len(seen))] @ self.turn.T
        return self.rectified.project(rays[:, :2] / rays[:, 2:])


class StereoSlam:
    """Computes the camera's poses from the matcher's messages. The topics may arrive in any order.

    Attributes:
        stamps: of each frame, nanoseconds.
        breaks: how many times all tracks began again, so that only a guess joins the frames before and after.
        requests: pairs of keyframes that are to be matched; the caller removes those that it handles.
        graph: the loops, and the poses that they correct.
        calibration: of the rectified pair, in pixels of the received images.
    """

    def __init__(
        self, left_info: Any, right_info: Any, *, rectified: bool, lag: int = 20, keyframes: Keyframes | None = None
    ) -> None:
        """Start without frames.

        Args:
            left_info, right_info: sensor_msgs/CameraInfo of the pair.
            rectified: whether the images are rectified.
            lag: of the smoother, frames.
            keyframes: with the limits for keyframes and loops; the default ones if None.

        Raises:
            ValueError: the calibration cannot be used.
        """
        pair = StereoCamera.from_camera_infos(left_info, right_info, rectified=rectified)
        if "equidistant" in (pair.left.distortion_model, pair.right.distortion_model):
            raise ValueError("a fisheye lens (equidistant) is not supported: rectify the images first")
        camera = Camera.from_camera_info(left_info, rectified=True)  # P, with region of interest and binning
        turns = [np.eye(3) if rectified else np.reshape(info.r, (3, 3)) for info in (left_info, right_info)]
        self._left, self._right = (_Rectifier(*each, camera) for each in zip((pair.left, pair.right), turns))
        (fx, _, cx), (_, fy, cy) = camera.matrix[:2].tolist()
        self.calibration = Calibration(fx, fy, cx, cy, pair.baseline)
        self._to_rectified = gtsam.Pose3(gtsam.Rot3(turns[0]), np.zeros(3))
        self.stamps: list[int] = []
        self.breaks = 0
        self.requests: list[LoopRequest] = []
        self.graph = PoseGraph()
        self.smoother = FixedLagSmoother(self.calibration, lag)
        self._keyframes = Keyframes() if keyframes is None else keyframes
        self._numbers: dict[int, int] = {}
        self._waiting: dict[str, dict[int, Any]] = {
            kind: {} for kind in ("stereo_matches", "matches", "relative_pose", "features")
        }
        self._frame_id: str | None = None  # of the left camera's images
        self._awaited: int | None = None  # stamp of a frame that becomes a keyframe when its features arrive

    def poses(self) -> list[gtsam.Pose3]:
        """The pose of each frame's left camera, corrected by the loops: x_world = pose x_camera."""
        return [pose.compose(self._to_rectified) for pose in self.graph.poses(self.smoother.poses)]

    def smoothed(self) -> list[gtsam.Pose3]:
        """The same without the correction by the loops."""
        return [pose.compose(self._to_rectified) for pose in self.smoother.poses]

    def add(self, topic: str, message: Any) -> int:
        """Add a message of stereo_matches, matches, relative_pose or features. Returns the number of new frames."""
        if topic == "relative_pose" and message.status == _INTERRUPTED:
            return 0  # it belongs to no pair of frames
        # The stamp of the left image identifies the frame.
        header = message.reference if topic == "stereo_matches" else message.header
        waiting, stamp = self._waiting[topic], nanoseconds(header.stamp)
        newest = next(reversed(waiting), stamp)  # the messages of one topic come in order
        if topic != "features":
            self._frame_id = header.frame_id
        elif self._frame_id not in (None, header.frame_id) or (stamp in waiting and stamp == newest):
            return 0  # features of the right camera: if both have the same frame_id, those of the left one come first
        if stamp < newest:
            waiting.clear()  # stamps went back, as with a looped bag or a clock that is set: drop the older messages
        waiting[stamp] = message
        while len(waiting) > _KEPT:
            del waiting[next(iter(waiting))]
        if topic == "features":
            self._keep_keyframe()
            return 0
        frames = len(self.stamps)
        matches, poses, stereo = (self._waiting[kind].keys() for kind in ("matches", "relative_pose", "stereo_matches"))
        for stamp in sorted(matches & poses & stereo):
            self._add_frame(stamp)
        return len(self.stamps) - frames

    def _add_frame(self, stamp: int) -> None:
        matches, relative = (self._waiting[topic].pop(stamp) for topic in ("matches", "relative_pose"))
        if self.stamps and stamp <= self.stamps[-1]:
            if stamp == self.stamps[-1] and not matches.reset:
                return  # a repeated stamp: the two frames cannot be distinguished
            self._forget_stamps(stamp)
        reference_stamp = nanoseconds(matches.reference.stamp)
        if not self.stamps:
            self._begin(reference_stamp)
        reference = self._numbers.get(reference_stamp)
        if reference is None and matches.reset:
            reference = self._begin_again(reference_stamp)
        lost = reference is None  # the reference frame's messages did not arrive, but the tracks continue
        reference = len(self.stamps) - 1 if reference is None else reference
        before, now = self._observations(matches, reference_stamp, stamp)
        if lost:
            before.right_x[:] = np.nan  # the reference is not in the smoother: new points begin in this frame
        motion, sigmas = self._motion(relative)
        if motion is None or lost:
            motion, sigmas = self.smoother.locate(now, reference), _GUESSED
        if motion is None:
            motion, sigmas = gtsam.Pose3(), _UNKNOWN
        self.smoother.add_frame(motion, np.minimum(_LOOSE * sigmas, _UNKNOWN), reference, before, now)
        self.graph.add_frame(reference, sigmas)
        self._register(stamp)
        if self._keyframes.is_due(self.smoother.poses):
            self._awaited = stamp
        self._keep_keyframe()

    def _begin(self, stamp: int) -> None:
        self.smoother.start(_FIRST_CAMERA.compose(self._to_rectified.inverse()))
        self.graph.add_frame(0, _UNKNOWN)
        self._register(stamp)

    def _begin_again(self, stamp: int) -> int:
        """Add the reference of new tracks as a frame, and return its number.

        Nothing joins it to the frames before. As a guess, the camera has not moved.
        """
        nothing = Observations(*(np.zeros(shape) for shape in (0, (0, 2), 0, 0, 0)))
        self.smoother.add_frame(gtsam.Pose3(), _UNKNOWN, len(self.stamps) - 1, nothing, nothing)
        self.graph.add_frame(len(self.stamps) - 1, _UNKNOWN)
        self.breaks += 1
        return self._register(stamp)

    def _register(self, stamp: int) -> int:
        self._numbers[stamp] = len(self.stamps)
        self.stamps.append(stamp)
        return len(self.stamps) - 1

    def _forget_stamps(self, stamp: int) -> None:
        """Forget the stamps of earlier frames, because stamps went back to this one, as when a bag is looped.

        The earlier stamps may come again for other frames.
        """
        self._numbers.clear()
        self._awaited = None
        features = self._waiting["features"]
        if next(reversed(features), stamp) > stamp:
            features.clear()

    def _motion(self, message: Any) -> tuple[gtsam.Pose3 | None, np.ndarray]:
        """The motion of a RelativePose in the rectified camera's frame, and its sigmas (6,), rotation then position.

        The motion is None if the message has no valid pose in metres.
        """
        if message.status not in _HOLDS or not message.metric:
            return None, _UNKNOWN
        p, q = message.pose.pose.position, message.pose.pose.orientation
        motion = gtsam.Pose3(gtsam.Rot3.Quaternion(q.w, q.x, q.y, q.z), np.array([p.x, p.y, p.z]))
        # ROS orders the covariance as position, rotation, about the reference's axes. GTSAM orders it as rotation,
        # position, in the current frame.
        turn = motion.rotation().matrix()
        covariance = np.array(message.pose.covariance, float).reshape(6, 6)
        spread = [np.diag(turn.T @ covariance[part, part] @ turn) for part in (slice(3, 6), slice(0, 3))]
        sigmas = np.sqrt(np.maximum(np.concatenate(spread), 1e-12))
        return self._to_rectified.compose(motion).compose(self._to_rectified.inverse()), sigmas

    def _observations(self, matches: Any, reference_stamp: int, stamp: int) -> tuple[Observations, Observations]:
        """The observations of the tracks that are inliers: in the reference, and in the frame."""
        # If no geometry was estimated, or no match is an inlier, all matches known to a few pixels are used, and the
        # robust cost has to reject the outliers. Matches of a blurred image are not known so well.
        agree = np.array(matches.inliers if any(matches.inliers) else np.array(matches.sigmas) < 5, bool)
        reference_points, points = (self._left.points(flat) for flat in (matches.reference_points, matches.points))
        agree &= np.isfinite(reference_points + points).all(axis=1)
        ids, sigmas = np.array(matches.track_ids, np.int64)[agree], np.array(matches.sigmas, float)[agree]
        sides = []
        for when, left, indices in (
            (reference_stamp, reference_points[agree], matches.reference_indices),
            (stamp, points[agree], matches.indices),
        ):
            keypoints = np.array(indices, np.int64)[agree]
            matched, right_x, right_sigmas = self._stereo_of(when, keypoints)
            # A new track may begin at the keypoint of another track. The stereo match then belongs to that other track.
            right_x[np.abs(matched - left).max(axis=1) > _SAME] = np.nan
            sides.append(Observations(ids, left, sigmas, right_x, right_sigmas))
        return sides[0], sides[1]

    def _stereo_of(self, stamp: int, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stereo matches of a frame's left keypoints (M,): left points (M, 2), x in the right image, sigmas of x.

        All values are NaN without a match. The index NOT_DETECTED, of a track that was found without a keypoint, has no
        match. The left point is the position of the keypoint's track, which is about a pixel beside the keypoint.
        """
        stereo, count = self._waiting["stereo_matches"].get(stamp), len(keypoints)
        left, right_x, sigmas = np.full((count, 2), np.nan), np.full(count, np.nan), np.full(count, np.nan)
        if stereo is None:
            return left, right_x, sigmas
        agree = np.array(stereo.inliers, bool)
        if not agree.any():
            return left, right_x, sigmas
        indices = np.array(stereo.reference_indices, np.int64)[agree]
        row_of = np.full(stereo.reference_num_keypoints, -1)
        row_of[indices] = np.arange(len(indices))
        rows = np.where(keypoints < len(row_of), row_of[np.minimum(keypoints, len(row_of) - 1)], -1)
        found = rows >= 0
        left[found] = self._left.points(stereo.reference_points)[agree][rows[found]]
        right_x[found] = self._right.points(stereo.points)[agree][rows[found], 0]
        sigmas[found] = np.array(stereo.sigmas, float)[agree][rows[found]]
        return left, right_x, sigmas

    # Loops

    def _keep_keyframe(self) -> None:
        """Keep the awaited keyframe once its features are there, and request loops."""
        stamp = self._awaited
        if stamp is None or stamp not in self._waiting["features"]:
            return
        self._awaited = None
        features = self._waiting["features"][stamp]
        points = self._left.points(features.points)
        matched, right_x, sigmas = self._stereo_of(stamp, np.arange(len(points)))
        right_x += points[:, 0] - matched[:, 0]  # keep the disparity: keypoint and match have the same depth
        keyframe = Keyframe(self._numbers[stamp], features, points, right_x, sigmas)
        poses = self.graph.poses(self.smoother.poses)
        self.requests += [LoopRequest(other, keyframe) for other in self._keyframes.candidates(keyframe, poses)]
        self._keyframes.kept.append(keyframe)

    def add_answer(self, request: LoopRequest, matches: Any) -> bool:
        """Add the service's MatchArray for a request. Returns whether it closes a loop."""
        pairs = np.c_[np.array(matches.reference_indices, np.int64), np.array(matches.indices, np.int64)]
        loop = align(request.reference, request.current, pairs, np.array(matches.scores, float), self.calibration)
        if loop is None:
            return False
        self.graph.close(loop, self.smoother.poses)
        return True
