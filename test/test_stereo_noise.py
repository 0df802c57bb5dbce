"""Tests of stereo points whose right pixels were found from the left ones, so they share errors of different size."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2
from stereo_scenes import Scene, pair

from kpmatch_ros.geometry.sandwich import leave_one_out
from kpmatch_ros.geometry.stereo_errors import StereoPoints
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion


def errors(scene: Scene, trials: int, **options: object) -> np.ndarray:
    """Return the errors (trials, 2) of the translation, metres, and of the rotation, radians."""
    found = [scene.error(scene.estimate(200, seed, **options)) for seed in range(trials)]
    return np.array([(np.linalg.norm(error[:3]), np.linalg.norm(error[3:])) for error in found])


@pytest.mark.parametrize("own", [0.1, 0.3], ids=["small independent errors", "large independent errors"])
def test_the_covariance_agrees_with_errors_shared_by_left_and_right(own: float) -> None:
    scene, trials, count = Scene(shared=0.2, own=own), 30, 200
    low, high = chi2.ppf([0.001, 0.999], 6 * trials) / trials
    values = scene.consistency(trials, count, sigmas=Scene.shares(count))
    assert low < values.mean() < high
    # If they are treated as independent and equal, the pose is worse, and its covariance reflects that.
    assert low < scene.consistency(trials, count).mean() < high


def test_the_covariance_covers_the_errors_if_one_of_few_points_determines_a_direction() -> None:
    scene, count = Scene(shared=0.2, own=0.1), 20
    poses = [scene.estimate(count, seed, sigmas=Scene.shares(count), min_inliers=8) for seed in range(150)]
    errors = np.array([scene.error(pose) for pose in poses])
    values = [error @ np.linalg.solve(pose.covariance, error) for error, pose in zip(errors, poses)]
    assert 4.5 < np.mean(values) < 7.0  # 6 is correct


def test_leave_one_out_agrees_with_the_exact_solution_for_every_match() -> None:
    random = np.random.default_rng(3)
    jacobian = random.normal(0, 0.05, (6, 3, 40))
    jacobian[:, 0, 7] = 0.9 * np.eye(6)[2]  # determines one direction almost alone
    gradients, weights, weight_slopes = (
        random.normal(0, 0.1, (6, 40)),
        random.uniform(0.3, 1, 40),
        -random.uniform(0, 0.2, 40),
    )
    found = leave_one_out(gradients, jacobian, weights, weight_slopes)
    for i in range(40):
        own = weights[i] * jacobian[..., i] @ jacobian[..., i].T + weight_slopes[i] * np.outer(
            gradients[:, i], gradients[:, i]
        )
        exact = np.linalg.solve(np.eye(6) - own, weights[i] * gradients[:, i])
        np.testing.assert_allclose(found[:, i], exact, rtol=1e-9 if i == 7 else 0.02, atol=1e-4)


def test_weighting_by_standard_deviations_reduces_the_errors() -> None:
    scene, trials = Scene(shared=0.2, own=0.1), 15
    alike = errors(scene, trials, sigmas=np.ones(200))
    weighted = errors(scene, trials, sigmas=Scene.shares(200))
    assert (np.sqrt((weighted**2).mean(axis=0)) < 0.9 * np.sqrt((alike**2).mean(axis=0))).all()


def test_only_the_ratio_of_standard_deviations_counts() -> None:
    scene = Scene(shared=0.2, own=0.1)
    one, other = (scene.estimate(200, sigmas=factor * Scene.shares(200)) for factor in (0.01, 100.0))
    np.testing.assert_allclose(one.translation, other.translation, atol=1e-12)
    np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-9)


def test_a_shared_error_moves_a_point_but_does_not_change_its_depth() -> None:
    camera = pair()
    (left, right, _, _), _ = Scene(unmatched=0.0).pixels(50, 0)
    exact = StereoPoints.of(left, right, camera, np.ones(50))
    moved = StereoPoints.of(left + (0.7, -0.4), right + (0.7, -0.4), camera, np.ones(50))
    np.testing.assert_allclose(moved.points[2], exact.points[2], rtol=1e-6)
    np.testing.assert_allclose(moved.squares, 0, atol=1e-12)
    assert np.abs(exact.covariances[2, :2]).max() < 1e-12
    # An error of the right pixel across the epipolar line is independent: the left pixel determines the point.
    apart = StereoPoints.of(left, right + (0.0, 0.5), camera, np.ones(50))
    np.testing.assert_allclose(apart.points[:2], exact.points[:2], atol=1e-12)
    np.testing.assert_allclose(np.sqrt(apart.squares), 0.5, rtol=1e-6)


@pytest.mark.parametrize("sigmas", [np.ones(19), np.zeros(20), np.full(20, np.nan), np.ones((20, 2))])
def test_invalid_standard_deviations_are_refused(sigmas: np.ndarray) -> None:
    images, _ = Scene().pixels(20, 0)
    with pytest.raises(ValueError, match="sigmas must be 20 positive finite numbers; got shape"):
        estimate_stereo_motion(*images, pair(), pair(), sigmas=sigmas)
