"""Tests of a rolling shutter: with the readout time, poses are like those of images read at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from two_view_scenes import CAMERA, DRONE, check

from kpmatch_ros import frame_motion
from kpmatch_ros.bags.demo import demo_frames
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.frame_motion import FrameMotion
from kpmatch_ros.frames import Frame, Pair
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion
from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.tracking.tracks import Links

READOUT = 0.3


@dataclass(frozen=True)
class Ride:
    """A camera that moves on a parabola. The unit of time is the interval between images."""

    turn: tuple[float, float, float] = (0.01, 0.03, -0.01)
    way: tuple[float, float, float] = (0.06, 0.0, 0.03)
    turn_changes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    way_changes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    camera: Camera = field(default=CAMERA)

    def pose(self, time: np.ndarray) -> tuple[Rotation, np.ndarray]:
        """Return the pose in the camera's frame at time 0."""
        bent = time * (time - 1) / 2
        turn = np.outer(time, self.turn) + np.outer(bent, self.turn_changes)
        return Rotation.from_rotvec(turn), np.outer(time, self.way) + np.outer(bent, self.way_changes)

    @property
    def before(self) -> Ride:
        """The same camera's motion in the interval before, as if it had been constant."""
        turn, way = (
            tuple(np.subtract(now, change))
            for now, change in ((self.turn, self.turn_changes), (self.way, self.way_changes))
        )
        return Ride(turn, way, camera=self.camera)

    def motion(self, start: float) -> Motion:
        """Return the motion from a time to one interval later."""
        (first, last), (begin, end) = self.pose(np.array([start, start + 1.0]))
        way = first.inv().apply(end - begin)
        return Motion((first.inv() * last).as_matrix(), way / max(np.linalg.norm(way), 1e-12))

    def sees(self, points: np.ndarray, start: float, readout: float) -> np.ndarray:
        """Return the pixels (n, 2) of points (n, 3) at the time when their row is read."""
        rows = np.full(len(points), self.camera.height / 2)
        for _ in range(20):
            rotations, positions = self.pose(start + readout * ((rows + 0.5) / self.camera.height - 0.5))
            seen = rotations.inv().apply(points - positions)
            pixels = self.camera.project(seen[:, :2] / seen[:, 2:])
            rows = np.clip(pixels[:, 1], -100, self.camera.height + 100)
        return pixels

    def matches(self, readout: float, seed: int, noise: float = 0.05, count: int = 300) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        size = self.camera.width, self.camera.height
        rays = self.camera.normalise(random.uniform((0, 0), size, (3 * count, 2)))
        points = np.column_stack([rays, np.ones(len(rays))]) / random.uniform(0.1, 0.5, (len(rays), 1))
        pixels = [self.sees(points, time, readout) for time in (0.0, 1.0)]
        inside = np.logical_and.reduce([((view > 0) & (view < size)).all(axis=1) for view in pixels])
        return [view[inside][:count] + random.normal(0, noise, (count, 2)) for view in pixels]


def errors(pose: RelativePose, truth: Motion) -> tuple[float, float, float]:
    """Return the errors of rotation and direction, degrees, and e' C^-1 e."""
    turn = Rotation.from_matrix(pose.rotation @ truth.rotation.T).as_rotvec()
    error = np.concatenate([pose.translation - truth.translation, turn])
    nees = error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error
    return np.degrees(np.linalg.norm(turn)), np.degrees(np.linalg.norm(error[:3])), float(nees)


def estimate(ride: Ride, seed: int, **options: Any) -> RelativePose:
    pose = estimate_relative_pose(
        *ride.matches(READOUT, seed), ride.camera, ride.camera, keypoint_resolution=1 / 32, **options
    )
    check(pose, 300)
    assert pose.status is PoseStatus.OK
    return pose


STRAIGHT = Ride()
BENT = Ride(turn_changes=(0.003, -0.004, 0.002), way_changes=(-0.01, 0.004, 0.012))


@pytest.mark.parametrize("ride", [BENT, Ride(camera=DRONE, turn=(0.0, -0.04, 0.02), turn_changes=(0.0, 0.004, 0.0))])
def test_the_readout_time_and_the_motion_before_correct_poses_for_a_rolling_shutter(ride: Ride) -> None:
    corrected, uncorrected = (
        np.array(
            [errors(estimate(ride, seed, before=ride.motion(-1), readout=readout), ride.motion(0)) for seed in range(8)]
        )
        for readout in (READOUT, 0.0)
    )
    assert np.median(corrected[:, 2]) < 9 < 15 < np.median(uncorrected[:, 2])
    assert np.median(corrected[:, 0]) < 0.4 * np.median(uncorrected[:, 0])
    assert np.median(corrected[:, 1]) < np.median(uncorrected[:, 1])


def test_without_a_motion_before_the_motion_is_assumed_to_be_constant() -> None:
    # The motion is constant in the camera's frame, as for a robot in a curve. On the parabola it changes slightly.
    ride = Ride(way_changes=tuple(np.cross(STRAIGHT.turn, STRAIGHT.way)))
    found = np.array([errors(estimate(ride, seed, readout=READOUT), ride.motion(0)) for seed in range(8)])
    assert np.median(found[:, 2]) < 9


def test_the_rotation_of_a_camera_that_only_turns_is_corrected_too() -> None:
    ride = Ride(way=(0.0, 0.0, 0.0), turn=(0.0, 0.05, 0.0))
    for seed in range(4):
        pose = estimate_relative_pose(*ride.matches(READOUT, seed), CAMERA, CAMERA, readout=READOUT)
        turn = Rotation.from_matrix(pose.rotation @ ride.motion(0).rotation.T).magnitude()
        assert pose.status is PoseStatus.NO_TRANSLATION and np.degrees(turn) < 0.005


def test_a_readout_of_zero_means_a_global_shutter() -> None:
    points = STRAIGHT.matches(0.0, 0)
    poses = [estimate_relative_pose(*points, CAMERA, CAMERA, **options) for options in ({}, {"readout": 0.0})]
    assert np.array_equal(poses[0].rotation, poses[1].rotation)


@pytest.mark.parametrize("readout", [-0.1, 1.1, np.nan, np.inf])
def test_a_readout_outside_0_to_1_of_the_frame_interval_is_refused(readout: float) -> None:
    points = STRAIGHT.matches(0.0, 0)
    with pytest.raises(ValueError, match="readout must be a part of the time"):
        estimate_relative_pose(*points, CAMERA, CAMERA, readout=readout)


@pytest.mark.parametrize("seed", range(20))
def test_random_points_give_a_valid_pose_or_none_and_never_an_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.uniform(-200, 900, (2, 60, 2))
    points[random.random((2, 60)) < 0.1] = np.nan
    points[1, :30] = points[0, :30] + random.normal(0, 0.1, (30, 2))
    last = Motion(Rotation.random(random_state=seed).as_matrix(), np.array([0.0, 0.0, float(seed % 2)]))
    for before in (None, last):
        check(estimate_relative_pose(*points, CAMERA, CAMERA, readout=1.0, before=before), 60)


def followed(ride: Ride, seed: int, **changes: Any) -> RelativePose:
    """Return the pose of a pair, given the frames and the camera motion of the pair before it, which was constant."""
    random = np.random.default_rng(seed)
    frames = [cast(Frame, SimpleNamespace(camera=CAMERA, right=None, stamp=number * 10**8)) for number in range(3)]
    motion, parameters = FrameMotion(), Parameters(readout_time=0.1 * READOUT, **changes)
    for number, each in enumerate((ride.before, ride)):
        points0, points1 = each.matches(READOUT, seed)
        count = len(points0)
        links = Links(
            indices=np.tile(np.arange(count)[:, None], 2),
            reference_points=points0,
            points=points1,
            sigmas=np.full(count, 0.05),
            pair_sigmas=np.full(count, 0.07),
            scores=random.random(count),
            track_ids=np.arange(count, dtype=np.uint64),
            refined=np.ones(count, bool),
        )
        pose = motion.estimate(frames[number], frames[number + 1], links, parameters, 1.0)
        pair = SimpleNamespace(pose=pose, reference=frames[number], current=frames[number + 1])
        motion.remember(cast(Pair, pair))
    return pose


def test_a_camera_that_turns_back_on_the_spot_gets_no_translation_and_the_correct_rotation() -> None:
    ride = Ride(way=(0.0, 0.0, 0.0), turn=(0.0, -0.02, 0.0), turn_changes=(0.0, -0.04, 0.0))
    for seed in range(6):
        pose = followed(ride, seed)
        assert pose.status is PoseStatus.NO_TRANSLATION
        turn = Rotation.from_matrix(pose.rotation @ ride.motion(0).rotation.T).as_rotvec()
        assert np.degrees(np.linalg.norm(turn)) < 0.01
        assert turn @ np.linalg.solve(pose.covariance[3:, 3:], turn) < 12  # the 99 % point is 11.3


def test_motion_prior_has_no_effect_on_the_model_of_the_shutter() -> None:
    for seed in range(4):
        poses = [followed(BENT, seed, motion_prior=prior) for prior in (True, False)]
        assert poses[0].status is poses[1].status is PoseStatus.OK
        assert np.array_equal(poses[0].rotation, poses[1].rotation)
        assert errors(poses[0], BENT.motion(0))[0] < 0.02


@pytest.mark.parametrize(
    ("readout_time", "intervals", "fractions"),
    [(0.03, [0.1, 0.1], [0.3, 0.3]), (0.03, [0.1, 0.02], [0.3, 0.0]), (0.0, [0.1, 0.1], [0.0, 0.0])],
)
def test_the_front_end_passes_the_readout_as_a_fraction_of_the_frame_interval(
    readout_time: float, intervals: list[float], fractions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def remember(*matches: Any, readout: float, **options: Any) -> RelativePose:
        given.append(readout)
        return estimate_relative_pose(*matches, readout=readout, **options)

    monkeypatch.setattr(frame_motion, "estimate_relative_pose", remember)
    parameters = Parameters(matcher="nearest", device="cpu", max_keypoints=100, readout_time=readout_time)
    front_end = FrontEnd(parameters, FeatureMatcher(parameters))
    stamp = 10**9
    for frame, interval in zip(demo_frames(3), [0.0, *intervals]):
        stamp += round(1e9 * interval)
        front_end.register([frame.image], [stamp], Camera.from_camera_info(frame.camera_info, rectified=False))
    assert np.allclose(given, fractions)


def test_a_readout_time_that_is_too_long_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"readout_time is 0\.3"):
        Parameters(readout_time=0.3)
