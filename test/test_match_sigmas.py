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


def test_exact_matches_weigh_more_and_the_covariance_agrees_with_the_errors() -> None:
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


def test_errors_beyond_the_sigmas_cost_few_inliers_and_little_accuracy() -> None:
    """For example errors of a calibration or a rolling shutter: ten times the stated sigma of the exact points."""
    scenes = [matches(seed, common=0.3) for seed in range(40)]
    weighed = [estimate(*points, sigmas=sigmas) for *points, sigmas in scenes]
    alike = [estimate(*points) for *points, _ in scenes]
    assert np.sqrt((errors(weighed) ** 2).mean()) < 1.1 * np.sqrt((errors(alike) ** 2).mean())
    assert sum(pose.num_inliers for pose in weighed) > 0.99 * sum(pose.num_inliers for pose in alike)


def test_matches_within_the_inlier_threshold_stay_inliers_even_with_small_sigmas() -> None:
    points0, points1, sigmas = matches(0, outliers=0.0)
    points1[:30:3] += (0.0, 0.8)  # points that count as exact
    pose = estimate(points0, points1, sigmas=sigmas)
    assert pose.inliers is not None and pose.inliers[:30:3].all()


def test_residuals_weighted_by_their_sigmas_have_equal_noise() -> None:
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


def test_weights_do_not_change_the_distances_between_matches() -> None:
    """Errors of neighbours within 32 pixels are treated as common."""
    problem = problem_of(*matches(0))
    weighed = weigh(problem, TRUTH)
    assert weighed.matches.scales is not None
    np.testing.assert_allclose(weighed.matches.focals, problem.matches.focals)
    some = np.arange(COUNT) % 3 == 0
    np.testing.assert_allclose(weighed.matches.select(some).focals, problem.matches.focals[some])


def test_sigmas_change_nothing_if_the_noise_is_far_above_the_threshold() -> None:
    points0, points1, _ = Scene(noise=2.5).matches(COUNT, 0)
    sigmas = np.where(np.arange(COUNT) % 3 == 0, EXACT, COARSE)
    with_sigmas, without_sigmas = estimate(points0, points1, sigmas=sigmas), estimate(points0, points1)
    assert with_sigmas.status is without_sigmas.status
    np.testing.assert_array_equal(with_sigmas.covariance, without_sigmas.covariance)


def test_exact_matches_of_a_plane_do_not_make_the_pose_overconfident() -> None:
    towards = {"rotation": (0.0, 0.0, 0.0), "translation": (0.0, 0.0, 0.5)}
    statuses, nees = [], []
    for seed in range(24):
        points0, points1, _ = Scene(plane=True, **towards).matches(COUNT, seed)
        random, sigmas = np.random.default_rng(seed), np.where(np.arange(COUNT) % 3 == 0, 0.1, COARSE)
        points1 = points1 + random.normal(0, 1, (COUNT, 2)) * sigmas[:, None]
        pose = estimate(points0, points1, sigmas=sigmas)
        statuses.append(pose.status)
        error = Scene(plane=True, **towards).error(pose)
        nees.append(error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error)
    assert np.median(nees) < 8 and np.quantile(nees, 0.9) < 25  # of 200 seeds: 5, and 18
    assert PoseStatus.AMBIGUOUS in statuses


def test_matches_on_the_robots_own_body_are_outliers_even_with_the_smallest_sigmas() -> None:
    points0, points1, sigmas = matches(0, outliers=0.0)
    body = np.flatnonzero(points0[:, 1] > 360)
    points1[body] = points0[body] + np.random.default_rng(0).normal(0, EXACT, (len(body), 2))
    sigmas[body] = EXACT
    pose = estimate(points0, points1, sigmas=sigmas)
    assert pose.status is PoseStatus.OK and pose.inliers is not None
    assert len(body) > 30 and pose.inliers[body].mean() < 0.1 and np.delete(pose.inliers, body).mean() > 0.9
    assert np.abs(Scene().error(pose)).max() < 0.01


@pytest.mark.parametrize("sigma", [0.43, 0.5, 5.0])
def test_sigmas_at_or_above_the_allowed_noise_change_nothing(sigma: float) -> None:
    points0, points1, _ = matches(0)
    with_sigmas, without_sigmas = estimate(points0, points1, sigmas=np.full(COUNT, sigma)), estimate(points0, points1)
    for field in ("rotation", "translation", "covariance", "inliers"):
        np.testing.assert_array_equal(getattr(with_sigmas, field), getattr(without_sigmas, field))


def test_sigmas_of_matches_that_are_not_decisive_have_no_effect() -> None:
    points0, points1, sigmas = matches(0)
    decisive = np.arange(COUNT) % 2 == 0
    first, second = (
        estimate(points0, points1, decisive=decisive, sigmas=np.where(decisive, sigmas, others))
        for others in (0.01, 3.0)
    )
    np.testing.assert_array_equal(first.rotation, second.rotation)
    np.testing.assert_array_equal(first.inliers, second.inliers)


def test_duplicates_of_a_match_do_not_weigh_more() -> None:
    points0, points1, sigmas = matches(0)
    order = np.arange(500) % COUNT
    once, twice = (
        estimate(points0, points1, sigmas=sigmas),
        estimate(points0[order], points1[order], sigmas=sigmas[order]),
    )
    np.testing.assert_array_equal(once.rotation, twice.rotation)
    np.testing.assert_array_equal(once.covariance, twice.covariance)


def test_the_sigmas_of_matches_with_nan_are_removed_with_them() -> None:
    points0, points1, sigmas = matches(0)
    lost = np.insert(points0, 7, np.nan, axis=0), np.insert(points1, 7, 5.0, axis=0), np.insert(sigmas, 7, 2.0)
    np.testing.assert_array_equal(
        estimate(*lost[:2], sigmas=lost[2]).rotation, estimate(points0, points1, sigmas=sigmas).rotation
    )


@pytest.mark.parametrize("sigmas", [np.ones(COUNT - 1), np.ones((COUNT, 1)), np.zeros(COUNT), np.full(COUNT, np.nan)])
def test_invalid_sigmas_are_refused(sigmas: np.ndarray) -> None:
    points0, points1, _ = matches(0)
    with pytest.raises(ValueError, match="sigmas must be 300 positive finite numbers; got shape"):
        estimate(points0, points1, sigmas=sigmas)


@pytest.mark.parametrize("refine", [True, False])
def test_the_front_end_passes_a_sigma_for_each_match_to_the_pose_estimation(
    refine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[np.ndarray] = []

    def record_sigmas(*points: Any, sigmas: np.ndarray, **options: Any) -> RelativePose:
        passed.append(sigmas)
        return estimate_relative_pose(*points, sigmas=sigmas, **options)

    monkeypatch.setattr(frame_motion, "estimate_relative_pose", record_sigmas)
    camera, poses = demo_camera(320, 240), camera_path(2)
    eyes = FrontEnd(Parameters(device="cpu", max_keypoints=256, refine=refine))
    for number, view in enumerate(build_scene(0).film(poses, camera, noise=2.0)):
        pair = eyes.register_frame(view.image, number * 10**8, camera)[1]
    assert pair is not None and pair.pose.status is PoseStatus.OK
    assert len(passed[-1]) == pair.pose.num_matches
    few, many = np.percentile(passed[-1], [10, 90])
    assert few < 0.1 and many > 1.5 * few
