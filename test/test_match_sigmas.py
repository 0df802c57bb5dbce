"""Tests of poses with a standard deviation for each match."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from two_view_scenes import CAMERA, Scene

from kpmatch_ros import frame_motion
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion, epipolar_residuals, normalise_matches
from kpmatch_ros.geometry.two_view_problem import Problem, weigh
from kpmatch_ros.parameters import Parameters
from simulation import camera_path, demo_camera
from simulation.bags import build_scene

EXACT, COARSE = 0.05, 0.4
COUNT = 300
TRUTH = Motion(
    cv2.Rodrigues(np.array(Scene().rotation))[0], np.array(Scene().translation) / np.linalg.norm(Scene().translation)
)


def matches(seed: int, common: float = 0.0, outliers: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points of both images, a third of them exact, and sigmas that do not include the ``common`` error."""
    points0, points1, _ = Scene(outliers=outliers).matches(COUNT, seed)
    sigmas = np.where(np.arange(COUNT) % 3 == 0, EXACT, COARSE)
    random = np.random.default_rng(seed)
    return points0, points1 + random.normal(0, 1, (COUNT, 2)) * np.hypot(sigmas, common)[:, None], sigmas


def estimate(points0: np.ndarray, points1: np.ndarray, **options: Any) -> RelativePose:
    return estimate_relative_pose(points0, points1, CAMERA, CAMERA, keypoint_resolution=1 / 32, **options)


def problem_of(points0: np.ndarray, points1: np.ndarray, sigmas: np.ndarray) -> Problem:
    found, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
    return Problem(found, 1.0, 1.0 / CAMERA.focal, 1 / 32, np.inf, 0.01, 15, None, sigmas)


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
    assert 3.5 < np.mean(nees) < 6.5  # 5 if the covariance is correct


def test_errors_that_standard_deviations_do_not_tell_lose_no_match_and_nothing_of_the_pose() -> None:
    """For example errors of a calibration or a rolling shutter: ten times the stated sigma of the exact points."""
    scenes = [matches(seed, common=0.3) for seed in range(40)]
    weighed = [estimate(*points, sigmas=sigmas) for *points, sigmas in scenes]
    alike = [estimate(*points) for *points, _ in scenes]
    assert np.sqrt((errors(weighed) ** 2).mean()) < 1.1 * np.sqrt((errors(alike) ** 2).mean())
    assert sum(pose.num_inliers for pose in weighed) > 0.99 * sum(pose.num_inliers for pose in alike)


def test_an_inlier_is_within_the_reprojection_error_whatever_is_said_of_it() -> None:
    points0, points1, sigmas = matches(0, outliers=0.0)
    points1[:30:3] += (0.0, 0.8)  # points that count as exact
    pose = estimate(points0, points1, sigmas=sigmas)
    assert pose.inliers is not None and pose.inliers[:30:3].all()


def test_what_is_made_of_standard_deviations_is_the_noise_of_the_residuals() -> None:
    """Only one point of each match has an error, but Sampson's distance assumes noise in both."""
    points0, points1, sigmas = matches(0, outliers=0.0)
    problem = problem_of(points0, points1, sigmas)
    weighed = weigh(problem, TRUTH)
    residuals = np.abs(epipolar_residuals(weighed.matches, TRUTH))
    exact, coarse = (np.median(residuals[sigmas == sigma]) for sigma in (EXACT, COARSE))
    assert exact == pytest.approx(coarse, rel=0.3)  # in scaled pixels
    assert (residuals < weighed.inlier_threshold).mean() > 0.99
    assert weighed.inlier_threshold == pytest.approx(
        COARSE / np.sqrt(2) / 0.3, rel=0.02
    )  # in the pixels of the middle match


def test_matches_are_as_far_apart_as_before_whatever_they_weigh() -> None:
    """Errors of neighbours within 32 pixels are treated as common."""
    problem = problem_of(*matches(0))
    weighed = weigh(problem, TRUTH)
    assert weighed.matches.scales is not None
    np.testing.assert_allclose(weighed.matches.focals, problem.matches.focals)
    some = np.arange(COUNT) % 3 == 0
    np.testing.assert_allclose(weighed.matches.select(some).focals, problem.matches.focals[some])


def test_noise_far_above_the_threshold_is_found_whatever_is_said_of_it() -> None:
    points0, points1, _ = Scene(noise=2.5).matches(COUNT, 0)
    sigmas = np.where(np.arange(COUNT) % 3 == 0, EXACT, COARSE)
    told, untold = estimate(points0, points1, sigmas=sigmas), estimate(points0, points1)
    assert told.status is untold.status
    np.testing.assert_array_equal(told.covariance, untold.covariance)


def test_the_two_motions_of_a_plane_stay_ambiguous_however_exact_matches_are() -> None:
    towards = {"rotation": (0.0, 0.0, 0.0), "translation": (0.0, 0.0, 0.5)}
    statuses = []
    for seed in range(8):
        points0, points1, _ = Scene(plane=True, **towards).matches(COUNT, seed)
        random, sigmas = np.random.default_rng(seed), np.where(np.arange(COUNT) % 3 == 0, 0.1, COARSE)
        points1 = points1 + random.normal(0, 1, (COUNT, 2)) * sigmas[:, None]
        pose = estimate(points0, points1, sigmas=sigmas)
        statuses.append(pose.status)
        error = Scene(plane=True, **towards).error(pose)
        assert error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error < 25
    assert PoseStatus.AMBIGUOUS in statuses


def test_a_robots_own_body_is_left_out_though_it_is_the_most_exact() -> None:
    points0, points1, sigmas = matches(0, outliers=0.0)
    body = np.flatnonzero(points0[:, 1] > 360)
    points1[body] = points0[body] + np.random.default_rng(0).normal(0, EXACT, (len(body), 2))
    sigmas[body] = EXACT
    pose = estimate(points0, points1, sigmas=sigmas)
    assert pose.status is PoseStatus.OK and pose.inliers is not None
    assert len(body) > 30 and pose.inliers[body].mean() < 0.1 and np.delete(pose.inliers, body).mean() > 0.9
    assert np.abs(Scene().error(pose)).max() < 0.01


@pytest.mark.parametrize("sigma", [0.43, 0.5, 5.0])
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
    with pytest.raises(ValueError, match="sigmas must be 300 positive finite numbers; got shape"):
        estimate(points0, points1, sigmas=sigmas)


@pytest.mark.parametrize("refine", [True, False])
def test_one_cameras_pose_is_by_how_exactly_each_point_was_found(refine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[np.ndarray] = []

    def noticed(*points: Any, sigmas: np.ndarray, **options: Any) -> RelativePose:
        told.append(sigmas)
        return estimate_relative_pose(*points, sigmas=sigmas, **options)

    monkeypatch.setattr(frame_motion, "estimate_relative_pose", noticed)
    camera, poses = demo_camera(320, 240), camera_path(2)
    eyes = FrontEnd(Parameters(device="cpu", max_keypoints=256, refine=refine))
    for number, view in enumerate(build_scene(0).film(poses, camera, noise=2.0)):
        pair = eyes.register_frame(view.image, number * 10**8, camera)[1]
    assert pair is not None and pair.pose.status is PoseStatus.OK
    assert len(told[-1]) == pair.pose.num_matches
    few, many = np.percentile(told[-1], [10, 90])
    assert few < 0.1 and many > 1.5 * few
