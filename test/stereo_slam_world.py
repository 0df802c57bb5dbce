"""Simulates a camera among known points and a matcher's messages about them, for test_stereo_slam.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gtsam
import numpy as np
from sensor_msgs.msg import CameraInfo

from examples.stereo_slam.slam import StereoSlam

FOCAL, CENTRE, BASELINE, NOISE = 400.0, (320.0, 240.0), 0.1, 0.2
NOT_DETECTED = 2**32 - 1
OK, TOO_FEW_MATCHES, FAILED, INTERRUPTED = 0, 2, 4, 5  # RelativePose


def header(frame: int, frame_id: str = "left") -> SimpleNamespace:
    return SimpleNamespace(stamp=SimpleNamespace(sec=frame, nanosec=0), frame_id=frame_id)


def camera_info(side: str) -> CameraInfo:
    offset = -FOCAL * BASELINE if side == "right" else 0.0
    k = [FOCAL, 0, CENTRE[0], 0, FOCAL, CENTRE[1], 0, 0, 1]
    p = [FOCAL, 0, CENTRE[0], offset, 0, FOCAL, CENTRE[1], 0, 0, 0, 1, 0]
    info = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k, info.r, info.p = ([float(number) for number in numbers] for numbers in (k, np.eye(3).ravel(), p))
    info.header.frame_id = side
    return info


def true_pose(frame: int) -> Any:
    """Return the pose of a camera that moves forward and sways, in the first camera's frame."""
    turn = gtsam.Rot3.Ypr(0.0, 0.05 * np.sin(frame / 3), 0.03 * np.sin(frame / 2))
    return gtsam.Pose3(turn, np.array([0.03 * frame, 0.0, 0.1 * frame]))


class World:
    """Points in front of a camera, and the messages of a matcher that tracks all of them.

    Every third track is not at a keypoint, so it has no match in the right image. Every eighth track drifts.
    """

    def __init__(self) -> None:
        self.random = np.random.default_rng(4)
        self.points = np.c_[self.random.uniform(-3, 3, (120, 2)), self.random.uniform(5, 12, 120)]
        self.slip = self.random.normal(0, 2, (120, 2)) * (np.arange(120) % 8 == 0)[:, None]
        self.indices = np.where(np.arange(120) % 3 == 0, NOT_DETECTED, np.arange(120))
        self.aside = 0.0  # pixels between a track and the left point of its keypoint's stereo match
        self.seen: dict[int, np.ndarray] = {}

    def pixels(self, frame: int) -> np.ndarray:
        """Return (120, 3): x and y in the left image, and x in the right image."""
        if frame not in self.seen:
            inside = np.array([true_pose(frame).transformTo(point) for point in self.points])
            left = inside[:, :2] / inside[:, 2:] * FOCAL + CENTRE + frame * self.slip
            left += self.random.normal(0, NOISE, (120, 2))
            right = left[:, 0] - FOCAL * BASELINE / inside[:, 2] + self.random.normal(0, NOISE, 120)
            self.seen[frame] = np.c_[left, right]
        return self.seen[frame]

    def stereo(self, frame: int) -> SimpleNamespace:
        rows = np.flatnonzero(self.indices != NOT_DETECTED)
        pixels = self.pixels(frame)[rows]
        return SimpleNamespace(
            header=header(frame, "right"),
            reference=header(frame),
            reference_num_keypoints=120,
            reference_indices=rows,
            reference_points=(pixels[:, :2] + (self.aside, 0)).ravel(),
            points=pixels[:, [2, 1]].ravel(),
            sigmas=np.full(len(rows), NOISE),
            inliers=np.ones(len(rows)),
        )

    def pair(
        self, reference: int, frame: int, status: int = OK, reset: bool = False, first_id: int = 1
    ) -> dict[str, SimpleNamespace]:
        """Return matches and relative_pose. The pose has a random error with standard deviations 2 mrad and 10 mm."""
        error = self.random.normal(0, 1, 6) * np.repeat([0.002, 0.01], 3)
        motion = true_pose(reference).between(true_pose(frame)).compose(gtsam.Pose3.Expmap(error))
        turn, place = motion.rotation().toQuaternion(), motion.translation()
        pose = SimpleNamespace(
            position=SimpleNamespace(x=place[0], y=place[1], z=place[2]),
            orientation=SimpleNamespace(x=turn.x(), y=turn.y(), z=turn.z(), w=turn.w()),
        )
        covariance = np.diag(np.repeat([0.01**2, 0.002**2], 3)).ravel()
        headers = {"header": header(frame), "reference": header(reference)}
        return {
            "matches": SimpleNamespace(
                **headers,
                reset=reset,
                track_ids=np.arange(120) + first_id,
                points=self.pixels(frame)[:, :2].ravel(),
                reference_points=self.pixels(reference)[:, :2].ravel(),
                indices=self.indices,
                reference_indices=self.indices,
                sigmas=np.full(120, NOISE),
                inliers=np.ones(120),
            ),
            "relative_pose": SimpleNamespace(
                **headers, pose=SimpleNamespace(pose=pose, covariance=covariance), metric=True, status=status
            ),
        }


def new_slam() -> StereoSlam:
    return StereoSlam(camera_info("left"), camera_info("right"), rectified=True)


def feed(slam: StereoSlam, world: World, reference: int, frame: int, **pair: Any) -> None:
    slam.add("stereo_matches", world.stereo(frame))
    for topic, message in world.pair(reference, frame, **pair).items():
        slam.add(topic, message)


def errors(slam: StereoSlam) -> np.ndarray:
    """Return the position errors (N,) of the frames in metres, with both trajectories in the first camera's frame."""
    poses, numbers = slam.poses(), [stamp // 10**9 for stamp in slam.stamps]
    moved = [poses[0].between(pose) for pose in poses]
    true = [true_pose(numbers[0]).between(true_pose(number)) for number in numbers]
    return np.array([np.linalg.norm(a.translation() - b.translation()) for a, b in zip(moved, true)])
