"""From the matcher's messages to poses: puts a frame's messages together, smooths, and closes loops.

No ROS in here: a message is anything with the fields of its definition, of rclpy or of a bag.
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

# RelativePose: in OK, NO_TRANSLATION and AMBIGUOUS the rotation holds, and the translation as its covariance says.
_HOLDS, _INTERRUPTED = (0, 3, 6), 5
_LOOSE = 10.0  # the message's motion is of the same matches: let it guide, not count twice
_UNKNOWN = np.array([0.5, 0.5, 0.5, 1.0, 1.0, 1.0])  # radians, metres: nothing is known of a motion
_GUESSED = np.array([0.02, 0.02, 0.02, 0.05, 0.05, 0.05])  # of a motion that only the tracks tell
_SAME = 0.01  # pixels between two left points that are one: rounding
_KEPT = 50  # frames whose messages are kept while others of the frame may come
# The world has x forward, y left and z up (REP-103), seen from the first camera, whose own frame is an optical one.
_FIRST_CAMERA = gtsam.Pose3(gtsam.Rot3(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])), np.zeros(3))


def nanoseconds(stamp: Any) -> int:
    """A builtin_interfaces/Time as one number."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


@dataclass(frozen=True, eq=False)
class LoopRequest:
    """Two keyframes that may show the same place: what the service match_features is to match."""

    reference: Keyframe
    current: Keyframe


@dataclass(frozen=True, eq=False)
class _Rectifier:
    """Takes pixels of an image to those of the rectified left one."""

    camera: Camera
    turn: np.ndarray  # (3, 3) from its frame to the rectified pair's
    rectified: Camera

    def points(self, flat: Any) -> np.ndarray:
        """(M, 2) of a message's flat array; NaN where the lens model has no direction."""
        seen = self.camera.normalise(np.asarray(flat, np.float64).reshape(-1, 2))
        rays = np.c_[seen, np.ones(len(seen))] @ self.turn.T
        return self.rectified.project(rays[:, :2] / rays[:, 2:])


class StereoSlam:
    """Takes the matcher's messages in any order and gives the camera's poses.

    Attributes:
        stamps: nanoseconds of each frame.
        breaks: how many times tracks began again, so that only a guess joins the frames before and after.
        requests: pairs of keyframes that wait to be matched; whoever answers takes them from here.
        graph: the loops, and the poses that they correct.
        calibration: of the rectified pair, in pixels of the size of the images received.
    """

    def __init__(
        self, left_info: Any, right_info: Any, *, rectified: bool, lag: int = 20, keyframes: Keyframes | None = None
    ) -> None:
        """The pair's sensor_msgs/CameraInfo, whether its images are rectified, and the smoother's lag in frames.

        `keyframes` has the distances that make a keyframe and a loop. Raises ValueError where the calibration is of no
        use.
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
        self._frame_id: str | None = None  # of the left camera, as its images have it
        self._awaited: int | None = None  # stamp of a frame that becomes a keyframe when its features are there

    def poses(self) -> list[gtsam.Pose3]:
        """The pose of each frame's left camera: x_world = pose x_camera, with what the loops correct."""
        return [pose.compose(self._to_rectified) for pose in self.graph.poses(self.smoother.poses)]

    def smoothed(self) -> list[gtsam.Pose3]:
        """The same without the loops."""
        return [pose.compose(self._to_rectified) for pose in self.smoother.poses]

    def add(self, topic: str, message: Any) -> int:
        """Take in a message of stereo_matches, matches, relative_pose or features; how many frames it completes."""
        if topic == "relative_pose" and message.status == _INTERRUPTED:
            return 0  # of no pair
        # The left image's stamp tells which frame it is.
        header = message.reference if topic == "stereo_matches" else message.header
        waiting, stamp = self._waiting[topic], nanoseconds(header.stamp)
        newest = next(reversed(waiting), stamp)  # the messages of one topic come in order
        if topic != "features":
            self._frame_id = header.frame_id
        elif self._frame_id not in (None, header.frame_id) or (stamp in waiting and stamp == newest):
            return 0  # the right camera's: the left one's come first where both have one frame_id
        if stamp < newest:
            waiting.clear()  # stamps go back where a bag is looped or a clock is set: these are of before
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
                return  # a stamp that is repeated: nothing tells the frames apart
            self._forget_stamps(stamp)
        reference_stamp = nanoseconds(matches.reference.stamp)
        if not self.stamps:
            self._begin(reference_stamp)
        reference = self._numbers.get(reference_stamp)
        if reference is None and matches.reset:
            reference = self._begin_again(reference_stamp)
        lost = reference is None  # that frame's messages did not come, but the tracks go on
        reference = len(self.stamps) - 1 if reference is None else reference
        before, now = self._observations(matches, reference_stamp, stamp)
        if lost:
            before.right_x[:] = np.nan  # that frame is not in the smoother: its points begin in this one
        motion, sigmas = self._motion(relative)
        if motion is None or lost:
            motion, sigmas = self.smoother.locate(now, reference), _GUESSED
        if motion is None:
            motion, sigmas = gtsam.Pose3(), _UNKNOWN
        self.smoother.add_frame(motion, np.minimum(_LOOSE * sigmas, _UNKNOWN), reference, before, now)
        self.graph.add_frame(reference, sigmas)
        self._register(stamp)
        if self._keyframes.wants(self.smoother.poses):
            self._awaited = stamp
        self._keep_keyframe()

    def _begin(self, stamp: int) -> None:
        self.smoother.start(_FIRST_CAMERA.compose(self._to_rectified.inverse()))
        self.graph.add_frame(0, _UNKNOWN)
        self._register(stamp)

    def _begin_again(self, stamp: int) -> int:
        """Nothing joins the frames to come with those before: as a guess, the camera is where it was."""
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
        """Stamps went back to this one, as where a bag is looped: those of before may come again, for other frames."""
        self._numbers.clear()
        self._awaited = None
        features = self._waiting["features"]
        if next(reversed(features), stamp) > stamp:
            features.clear()

    def _motion(self, message: Any) -> tuple[gtsam.Pose3 | None, np.ndarray]:
        """The motion of a RelativePose in the rectified camera's frame, and its sigmas (6,), rotation then position."""
        if message.status not in _HOLDS or not message.metric:
            return None, _UNKNOWN
        p, q = message.pose.pose.position, message.pose.pose.orientation
        motion = gtsam.Pose3(gtsam.Rot3.Quaternion(q.w, q.x, q.y, q.z), np.array([p.x, p.y, p.z]))
        # ROS has position and rotation about the reference's axes; GTSAM rotation and position in the current frame.
        turn = motion.rotation().matrix()
        covariance = np.array(message.pose.covariance, float).reshape(6, 6)
        spread = [np.diag(turn.T @ covariance[part, part] @ turn) for part in (slice(3, 6), slice(0, 3))]
        sigmas = np.sqrt(np.maximum(np.concatenate(spread), 1e-12))
        return self._to_rectified.compose(motion).compose(self._to_rectified.inverse()), sigmas

    def _observations(self, matches: Any, reference_stamp: int, stamp: int) -> tuple[Observations, Observations]:
        """The inliers among the tracks: where they are in the reference, and in the frame."""
        # Where no geometry was estimated, or none agrees with any match, the robust cost has to cope with all that are
        # known to some pixels: those of a smeared image are not.
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
            # A new track may begin at the keypoint of another one: the stereo match is that one's.
            right_x[np.abs(matched - left).max(axis=1) > _SAME] = np.nan
            sides.append(Observations(ids, left, sigmas, right_x, right_sigmas))
        return sides[0], sides[1]

    def _stereo_of(self, stamp: int, keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stereo matches of a frame's left keypoints (M,): left points, x in the right image, and its sigmas.

        All are NaN without a match. NOT_DETECTED, for a track that was carried, is no keypoint, and so has none either.
        The left point is where the keypoint's track is, a pixel or so beside the keypoint.
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
        """Keep the awaited keyframe once its features are there, and ask for loops."""
        stamp = self._awaited
        if stamp is None or stamp not in self._waiting["features"]:
            return
        self._awaited = None
        features = self._waiting["features"][stamp]
        points = self._left.points(features.points)
        matched, right_x, sigmas = self._stereo_of(stamp, np.arange(len(points)))
        right_x += points[:, 0] - matched[:, 0]  # the keypoint is as deep as its surroundings, where the match is
        keyframe = Keyframe(self._numbers[stamp], features, points, right_x, sigmas)
        poses = self.graph.poses(self.smoother.poses)
        self.requests += [LoopRequest(other, keyframe) for other in self._keyframes.candidates(keyframe, poses)]
        self._keyframes.kept.append(keyframe)

    def add_answer(self, request: LoopRequest, matches: Any) -> bool:
        """Take in the service's MatchArray for a request; whether it closes a loop."""
        pairs = np.c_[np.array(matches.reference_indices, np.int64), np.array(matches.indices, np.int64)]
        loop = align(request.reference, request.current, pairs, np.array(matches.scores, float), self.calibration)
        if loop is None:
            return False
        self.graph.close(loop, self.smoother.poses)
        return True
