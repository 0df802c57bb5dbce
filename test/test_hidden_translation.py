"""Tests that the covariance includes the rotation error caused by a translation that is too small to be detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from scipy.stats import chi2
from two_view_scenes import CAMERA, Scene, check, project

from benchmarks.hidden_translation import difference, estimate, nees, read_side
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import normalise_matches
from kpmatch_ros.geometry.two_view_fit import Noise
from kpmatch_ros.geometry.two_view_hidden import hidden_translation_covariance

Array = NDArray[np.float64]
NOISE = 0.04  # pixels: noise of refined points


def matches_of_surfaces(seed: int, length: float) -> tuple[Array, Array, Array]:
    """Return matches (600, 2) of 24 surfaces and the rotation (3, 3). Inverse depths are uniform from infinity to 2 m.

    The camera moves by ``length`` metres in any direction, and turns by some hundredths of a degree.
    """
    random = np.random.default_rng(seed)
    points0 = random.uniform((0, 0), (CAMERA.width, CAMERA.height), (600, 2))
    column, row = (points0 // (CAMERA.width / 6, CAMERA.height / 4)).astype(int).T
    inverse_depth = random.uniform(0.001, 0.5, (6, 4))[column, row]
    step = random.normal(size=3)
    turn = Rotation.from_rotvec(random.normal(0, 5e-4, 3)).as_matrix()
    points = np.column_stack([CAMERA.normalise(points0), np.ones(600)]) / inverse_depth[:, None]
    points1 = project(CAMERA, (points - length * step / np.linalg.norm(step)) @ turn)
    return points0 + random.normal(0, NOISE, points0.shape), points1 + random.normal(0, NOISE, points1.shape), turn


def squared_errors(length: float, trials: int) -> Array:
    """Return squared rotation errors of poses without translation, in units of the covariance; mean 3 if correct."""
    values = []
    for seed in range(trials):
        points0, points1, truth = matches_of_surfaces(seed, length)
        pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, keypoint_resolution=0.0)
        check(pose, 600)
        if pose.status is PoseStatus.NO_TRANSLATION:
            error = Rotation.from_matrix(truth @ pose.rotation.T).as_rotvec()
            values.append(nees(error, pose.covariance[3:, 3:]))
    assert len(values) > trials / 2
    return np.array(values)


def test_the_covariance_includes_the_effect_of_an_undetected_translation() -> None:
    # Up to 0.1 and 0.2 pixels of parallax. With the noise alone, the squared errors would be 219 and 588.
    for length in (0.0004, 0.0008):
        values = squared_errors(length, 30)
        assert np.mean(values) < chi2.ppf(0.999, 3 * len(values)) / len(values)


def test_the_effect_of_a_translation_near_the_noise_is_partly_included() -> None:
    # Up to 0.05 pixels of parallax: 63 with the noise alone. It stays so if the residuals happen to show nothing.
    values = squared_errors(0.0002, 30)
    assert np.median(values) < 6 and np.mean(values) < 30


def test_the_covariance_of_a_pure_rotation_agrees_with_its_errors() -> None:
    trials = 60
    low, high = chi2.ppf([0.005, 0.995], 3 * trials) / trials
    assert low < np.mean(squared_errors(0.0, trials)) < high


def test_noise_is_rarely_mistaken_for_a_translation() -> None:
    # Akaike's criterion takes a superfluous parameter in 16 % of trials, half of these with a variance above zero.
    found, trials = 0, 100
    for seed in range(trials):
        points0, points1, _ = Scene(rotation=(0, 0, 0), translation=(0, 0, 0), noise=NOISE).matches(200, seed)
        matches, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
        rotation = estimate_relative_pose(points0, points1, CAMERA, CAMERA, keypoint_resolution=0.0).rotation
        found += hidden_translation_covariance(matches, rotation, Noise(1.0, 0.0)).any()
    assert found <= 16


def test_degenerate_or_noise_free_matches_have_a_finite_covariance() -> None:
    for points in (np.full((20, 2), 100.0), np.column_stack([np.linspace(10, 600, 20), np.full(20, 240.0)])):
        matches, _ = normalise_matches(points, points, CAMERA, CAMERA)
        for resolution in (0.0, 1.0):
            covariance = hidden_translation_covariance(matches, np.eye(3), Noise(1.0, resolution))
            assert np.isfinite(covariance).all() and np.linalg.eigvalsh(covariance).min() > -1e-12


def test_rotations_of_both_cameras_of_a_static_drone_agree_within_their_covariances(
    recorded_data: Path,
) -> None:
    sides = [read_side(recorded_data / "euroc_v101_still_stereo", side) for side in ("/cam0", "/cam1")]
    both = [estimate(images[:7], camera) for images, camera, _ in sides]
    for poses in both:
        assert [pose.status for pose in poses] == [PoseStatus.NO_TRANSLATION] * 6
    values = [difference(poses, [rectify for _, _, rectify in sides]) for poses in zip(*both)]
    assert np.mean(values) < chi2.ppf(0.999, 3 * 6) / 6  # 7.1; with the noise alone 16, for 11 pairs


def test_the_covariance_of_a_rotation_fits_the_errors_with_a_telephoto_lens() -> None:
    camera = Camera(3840, 2160, np.array([[192_000.0, 0, 1920], [0, 192_000.0, 1080], [0, 0, 1]]))
    values = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        points0 = random.uniform((0, 0), (camera.width, camera.height), (300, 2))
        turn = Rotation.from_rotvec(random.normal(0, 4e-4, 3)).as_matrix()
        rays = np.column_stack([camera.normalise(points0), np.ones(300)])
        points1 = project(camera, rays @ turn)
        noisy = (points + random.normal(0, 0.05, points.shape) for points in (points0, points1))
        pose = estimate_relative_pose(*noisy, camera, camera, keypoint_resolution=0.0)
        assert pose.status is PoseStatus.NO_TRANSLATION
        values.append(nees(Rotation.from_matrix(turn @ pose.rotation.T).as_rotvec(), pose.covariance[3:, 3:]))
    low, high = chi2.ppf([0.001, 0.999], 3 * len(values)) / len(values)
    assert low < np.mean(values) < high
