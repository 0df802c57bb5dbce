"""A pose by each match's own standard deviation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from two_view_scenes import CAMERA, Scene

from kpmatch_ros import front_end
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.parameters import Parameters
from simulation import camera_path, demo_camera
from simulation.bags import build_scene

EXACT, COARSE = 0.03, 0.4
COUNT = 300


def matches(seed: int, common: float = 0.0, outliers: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of both images, a third of them exact, and the standard deviations that are told; ``common`` is not."""
    points0, points1, _ = Scene(outliers=outliers).matches(COUNT, seed)
    sigmas = np.where(np.arange(COUNT) % 3 == 0, EXACT, COARSE)
    random = np.random.default_rng(seed)
    return points0, points1 + random.normal(0, 1, (COUNT, 2)) * np.hypot(sigmas, common)[:, None], sigmas


def estimate(points0: np.ndarray, points1: np.ndarray, **options: Any) -> RelativePose:
    return estimate_relative_pose(points0, points1, CAMERA, CAMERA, keypoint_resolution=1 / 32, **options)


def errors(poses: list[RelativePose]) -> np.ndarray:
    assert all(pose.status is PoseStatus.OK for pose in poses)
    return np.array([Scene().error(pose) for pose in poses])


def test_exact_matches_count_for_more_and_the_covariance_says_so() -> None:
    scenes = [matches(seed) for seed in range(40)]
    weighed = [estimate(*points, sigmas=sigmas) for *points, sigmas in scenes]
    alike = [estimate(*points) for *points, _ in scenes]
    better, worse = (np.sqrt((errors(poses) ** 2).mean()) for poses in (weighed, alike))
    assert better < 0.5 * worse
    nees = [
        error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error
        for error, pose in zip(errors(weighed), weighed)
    ]
    assert 3.0 < np.mean(nees) < 7.0  # 5 where the covariance is right


def test_errors_that_standard_deviations_do_not_tell_lose_no_match_and_nothing_of_the_pose() -> None:
    """As those of a calibration or a rolling shutter: ten times what the exact ones are said to have."""
    scenes = [matches(seed, common=0.3) for seed in range(40)]
    weighed = [estimate(*points, sigmas=sigmas) for *points, sigmas in scenes]
    alike = [estimate(*points) for *points, _ in scenes]
    assert np.sqrt((errors(weighed) ** 2).mean()) < 1.1 * np.sqrt((errors(alike) ** 2).mean())
    assert sum(pose.num_inliers for pose in weighed) > 0.99 * sum(pose.num_inliers for pose in alike)


def test_an_inlier_is_within_the_reprojection_error_whatever_is_said_of_it() -> None:
    points0, points1, sigmas = matches(0, outliers=0.0)
    points1[:30:3] += (0.0, 0.8)  # exact ones, by what is said of them
    pose = estimate(points0, points1, sigmas=sigmas)
    assert pose.inliers is not None and pose.inliers[:30:3].all()


@pytest.mark.parametrize("sigma", [0.3, 0.5, 5.0])
def test_standard_deviations_that_are_no_smaller_than_the_noise_allowed_change_nothing(sigma: float) -> None:
    points0, points1, _ = matches(0)
    told, untold = estimate(points0, points1, sigmas=np.full(COUNT, sigma)), estimate(points0, points1)
    for field in ("rotation", "translation", "covariance", "inliers"):
        np.testing.assert_array_equal(getattr(told, field), getattr(untold, field))


def test_those_of_matches_that_do_not_decide_do_not_matter() -> None:
    points0, points1, sigmas = matches(0)
    decisive = np.arange(COUNT) % 2 == 0
    first, second = (
        estimate(points0, points1, decisive=decisive, sigmas=np.where(decisive, sigmas, others))
        for others in (0.01, 3.0)
    )
    np.testing.assert_array_equal(first.rotation, second.rotation)
    np.testing.assert_array_equal(first.inliers, second.inliers)


def test_copies_of_a_match_do_not_weigh_more() -> None:
    points0, points1, sigmas = matches(0)
    order = np.arange(500) % COUNT
    once, twice = (
        estimate(points0, points1, sigmas=sigmas),
        estimate(points0[order], points1[order], sigmas=sigmas[order]),
    )
    np.testing.assert_array_equal(once.rotation, twice.rotation)
    np.testing.assert_array_equal(once.covariance, twice.covariance)


def test_matches_without_a_direction_take_their_standard_deviations_along() -> None:
    points0, points1, sigmas = matches(0)
    lost = np.insert(points0, 7, np.nan, axis=0), np.insert(points1, 7, 5.0, axis=0), np.insert(sigmas, 7, 2.0)
    np.testing.assert_array_equal(
        estimate(*lost[:2], sigmas=lost[2]).rotation, estimate(points0, points1, sigmas=sigmas).rotation
    )


@pytest.mark.parametrize("sigmas", [np.ones(COUNT - 1), np.ones((COUNT, 1)), np.zeros(COUNT), np.full(COUNT, np.nan)])
def test_what_is_no_standard_deviation_is_refused(sigmas: np.ndarray) -> None:
    points0, points1, _ = matches(0)
    with pytest.raises(ValueError, match="sigmas must be 300 positive numbers"):
        estimate(points0, points1, sigmas=sigmas)


@pytest.mark.parametrize("refine", [True, False])
def test_one_cameras_pose_is_by_how_exactly_each_point_was_found(refine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[np.ndarray] = []

    def noticed(*points: Any, sigmas: np.ndarray, **options: Any) -> RelativePose:
        told.append(sigmas)
        return estimate_relative_pose(*points, sigmas=sigmas, **options)

    monkeypatch.setattr(front_end, "estimate_relative_pose", noticed)
    camera, poses = demo_camera(320, 240), camera_path(2)
    eyes = front_end.FrontEnd(Parameters(device="cpu", max_keypoints=256, refine=refine))
    for number, view in enumerate(build_scene(0).film(poses, camera, noise=2.0)):
        pair = eyes.register_frame(view.image, number * 10**8, camera)[1]
    assert pair is not None and pair.pose.status is PoseStatus.OK
    assert len(told[-1]) == pair.pose.num_matches
    few, many = np.percentile(told[-1], [10, 90])
    assert few < 0.1 and many > 1.5 * few
