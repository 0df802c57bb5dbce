"""Tests of the two-view relative pose: correct within the noise, with a realistic covariance, and never an error."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.stats import chi2
from two_view_scenes import (
    CAMERA,
    DEPTH_CAMERA,
    DRONE,
    FISHEYE,
    Scene,
    check,
    degrees,
    pinhole,
    project,
    worst,
)

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion, normalise_matches
from kpmatch_ros.geometry.two_view_fit import Noise
from kpmatch_ros.geometry.two_view_rotation import fit_rotation, small_parallax_p_value

# The convention


def test_a_camera_that_moved_right_has_a_positive_x_translation() -> None:
    pose = Scene(rotation=(0, 0, 0), translation=(0.3, 0, 0)).estimate(100, 0)
    np.testing.assert_allclose(pose.translation, [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(pose.rotation, np.eye(3), atol=1e-6)


def test_a_camera_that_turned_right_has_its_optical_axis_to_the_right() -> None:
    pose = Scene(rotation=(0, 0.2, 0)).estimate(100, 0)
    np.testing.assert_allclose(pose.rotation @ [0, 0, 1], [math.sin(0.2), 0, math.cos(0.2)], atol=1e-6)


def test_the_parallax_is_the_displacement_without_the_rotation() -> None:
    scene = Scene(rotation=(0, 0, 0.3), translation=(0.2, 0, 0), depth=(3.999, 4.001))
    assert math.isclose(scene.estimate(200, 0).median_parallax, 500 * 0.2 / 4, rel_tol=0.02)


def test_the_rotation_covariance_includes_the_effect_of_undecided_parallax() -> None:
    """Some pixels of parallax may come from matches that slipped along edges, so the status is NO_TRANSLATION."""
    errors, doubted = [], 0
    for seed in range(20):
        scene = Scene(translation=(0.02, 0, 0), noise=0.3, outliers=0.1)
        pose = scene.estimate(150, seed, keypoint_resolution=0.0)
        if pose.undecided is not None:
            # Of the matches that only a translation explains, no more are wrong than by chance.
            assert pose.status is PoseStatus.NO_TRANSLATION
            assert not (pose.undecided & pose.inliers).any() and (pose.inliers | pose.undecided).sum() > 0.85 * 150
            doubted += pose.undecided.sum()
        error = scene.error(pose)[3:]
        errors.append(error @ np.linalg.solve(pose.covariance[3:, 3:], error))
    assert doubted > 0
    assert np.mean(errors) < 8  # 3 for a chi-square distribution, 70 with the covariance of the rotation's fit alone


@pytest.mark.parametrize("degrees_apart", [60, 120, 180])
def test_views_from_opposite_sides_have_a_large_parallax(degrees_apart: float) -> None:
    turn = cv2.Rodrigues(np.array([0, np.radians(degrees_apart), 0]))[0]
    random, middle = np.random.default_rng(0), np.array([0, 0, 4.0])
    points = random.uniform(-1, 1, (300, 3)) + middle
    place = middle - turn @ middle + turn @ (0.1, 0.05, 0)
    seen = [project(CAMERA, view) + random.normal(0, 0.3, (300, 2)) for view in (points, (points - place) @ turn)]
    pose = estimate_relative_pose(*seen, CAMERA, CAMERA, keypoint_resolution=0.0)
    assert pose.status is PoseStatus.OK
    assert pose.median_parallax > CAMERA.focal * np.radians(degrees_apart) / 2


# Accuracy


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("camera", [CAMERA, DRONE, DEPTH_CAMERA, FISHEYE], ids=["pinhole", "drone", "depth", "fisheye"])
def test_exact_matches_give_the_exact_pose_through_any_lens(camera: Camera, backwards: bool) -> None:
    sign = -1 if backwards else 1
    scene = Scene(camera0=camera, camera1=camera, translation=(0.1, 0.05, 0.3 * sign))
    pose = scene.estimate(150, 1)
    assert pose.status is PoseStatus.OK and pose.num_inliers == 150
    np.testing.assert_allclose(scene.error(pose), 0, atol=1e-6)


@pytest.mark.parametrize("cameras", [(DRONE, FISHEYE), (FISHEYE, CAMERA), (pinhole(2000, 2560, 1920), CAMERA)])
def test_the_two_images_may_come_from_different_cameras(cameras: tuple[Camera, Camera]) -> None:
    scene = Scene(camera0=cameras[0], camera1=cameras[1])
    np.testing.assert_allclose(scene.error(scene.estimate(150, 1)), 0, atol=1e-6)
    noisy = replace(scene, noise=0.5, outliers=0.3)
    rotation, direction = worst(noisy, 300, range(3))
    assert rotation < 0.5 and direction < 3


@pytest.mark.parametrize(
    "change",
    [
        dict(outliers=0.3),
        dict(outliers=0.5),
        dict(outliers=0.3, translation=(0.02, 0.01, 0.3)),  # forward
        dict(outliers=0.3, translation=(0.0, 0.01, -0.3)),  # backward
        dict(outliers=0.3, rotation=(0.2, 0.5, 0.1), translation=(-1.0, 0.1, 0.3)),  # around an object
        dict(outliers=0.3, noise=0, rounded=True),
        dict(outliers=0.3, camera0=FISHEYE, camera1=FISHEYE),
    ],
    ids=["30 %", "50 %", "forward", "backward", "wide baseline", "whole pixels", "fisheye"],
)
def test_the_pose_error_is_bounded_with_noise_and_outliers(change: dict[str, Any]) -> None:
    rotation, direction = worst(replace(Scene(noise=0.5), **change), 300, range(6))
    assert rotation < 0.35 and direction < 2.5


def test_the_pose_is_found_with_80_percent_outliers() -> None:
    rotation, direction = worst(Scene(noise=0.5, outliers=0.8), 250, range(3))
    assert rotation < 1 and direction < 5


def test_the_pose_is_found_in_a_planar_scene() -> None:
    scene = Scene(plane=True, translation=(0.6, 0.1, 0.2), noise=0.5, outliers=0.3)
    rotation, direction = worst(scene, 300, range(6))
    assert rotation < 1 and direction < 5


def test_the_inliers_are_the_correct_matches() -> None:
    scene = Scene(noise=0.3, outliers=0.4)
    _, _, right = scene.matches(300, 0)
    inliers = scene.estimate(300, 0).inliers
    assert inliers is not None
    assert (inliers & right).sum() > 0.98 * right.sum()
    assert (inliers & ~right).sum() < 0.05 * (~right).sum()


def test_the_inlier_threshold_is_in_image_pixels_even_at_the_edge_of_a_fisheye() -> None:
    # At 70 degrees off the axis, a pixel covers eight times as many normalised coordinates as at the centre.
    scene = Scene(camera0=FISHEYE, camera1=FISHEYE, noise=0.3)
    points0, _, _ = scene.matches(400, 0)
    edge = np.linalg.norm(FISHEYE.normalise(points0), axis=1) > math.tan(math.radians(55))
    inliers = scene.estimate(400, 0).inliers
    assert edge.sum() > 40 and inliers is not None and inliers[edge].mean() > 0.97


def test_matches_behind_the_cameras_are_outliers() -> None:
    scene = Scene(rotation=(0, 0, 0), translation=(0.3, 0, 0))
    points0, points1, _ = scene.matches(100, 0)
    points1[:20, 0] = points0[:20, 0] + 20  # on their epipolar lines, but beyond infinity
    inliers = estimate_relative_pose(points0, points1, CAMERA, CAMERA).inliers
    assert inliers is not None and not inliers[:20].any() and inliers[20:].all()


# Translation or no translation


TURN = Scene(rotation=(0.03, -0.06, 0.02), translation=(0, 0, 0))


@pytest.mark.parametrize(
    "scene,resolution",
    [
        (replace(TURN, noise=0.3), 0.0),
        (replace(TURN, noise=0.4, outliers=0.3), 1.0),
        (replace(TURN, rounded=True, outliers=0.6), 1.0),
        (replace(TURN, rounded=True, rotation=(0.0, 0.0006, 0.0)), 1.0),  # 1/3 pixel in one direction
        (replace(TURN, noise=0.3, rounded=True, rotation=(0, 0, 0), outliers=0.1), 1.0),  # a standing camera
        (replace(TURN, noise=0.3, camera0=pinhole(600, 1280, 720), camera1=pinhole(600, 1280, 720), outliers=0.5), 1.0),
    ],
    ids=["noise", "wrong matches", "whole pixels", "less than a pixel", "standing still", "wide image"],
)
def test_rotating_and_static_cameras_get_a_translation_only_at_the_stated_rate(scene: Scene, resolution: float) -> None:
    trials, alarms, errors = 60, 0, []
    for seed in range(trials):
        pose = scene.estimate(120, seed, keypoint_resolution=resolution)
        assert pose.status in (PoseStatus.OK, PoseStatus.NO_TRANSLATION)
        alarms += pose.status is PoseStatus.OK
        errors.append(degrees(scene.error(pose))[0])
    assert alarms <= 1  # at the stated rate of 1e-3, less than one is expected in the 360 trials of all cases
    assert np.median(errors) < 0.05 and max(errors) < 0.15


def test_the_small_parallax_test_alone_keeps_its_false_alarm_rate() -> None:
    # With an alpha a hundred times larger the rate is measurable: the 5 % test must fire in at most 5 % of trials.
    fired, trials = 0, 150
    for seed in range(trials):
        points0, points1, _ = replace(TURN, noise=0.3).matches(60, seed)
        matches, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
        rotation = fit_rotation(matches, [np.eye(3)], 1.0, 0.0)
        start = Motion(rotation, np.array([1.0, 0.0, 0.0]))
        fired += small_parallax_p_value(matches, start, rotation, Noise(1.0, 0.0)) < 0.05
    assert fired <= 0.05 * trials


def test_keypoints_that_do_not_move_mean_a_static_camera() -> None:
    points = np.random.default_rng(0).integers(0, 480, (200, 2))
    pose = estimate_relative_pose(points, points, DRONE, DRONE)
    check(pose, 200)
    assert pose.status is PoseStatus.NO_TRANSLATION and pose.num_inliers == 200 and pose.median_parallax == 0
    np.testing.assert_allclose(pose.rotation, np.eye(3), atol=1e-9)
    assert 0 < pose.covariance[3, 3] < math.radians(0.1) ** 2  # rounding hides a small rotation


def test_keypoints_that_jitter_along_edges_give_no_translation() -> None:
    # As measured with the default weights in a scene of mostly horizontal edges: 0.75 pixels along, 0.5 pixels across.
    for seed in range(20):
        points0, points1, _ = replace(TURN, outliers=0.1).matches(300, seed)
        points1 += np.random.default_rng(seed).normal(0, 1, points1.shape) * (0.75, 0.5)
        for threshold in (1.0, 2.0):
            pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, max_reprojection_error=threshold)
            assert pose.status is PoseStatus.NO_TRANSLATION


def test_a_small_parallax_is_distinguished_from_noise_with_enough_matches() -> None:
    # A few centimetres between frames: 2 to 6 pixels, most of which a rotation can explain.
    scene = Scene(rotation=(0.01, -0.01, 0.02), translation=(0.04, 0.01, 0.01), noise=0.5, outliers=0.3)
    found = [scene.estimate(600, seed) for seed in range(10)]
    assert all(pose.status is PoseStatus.OK for pose in found)
    assert np.median([degrees(scene.error(pose))[1] for pose in found]) < 5


def test_keypoints_that_slip_along_edges_give_no_translation() -> None:
    # In a room with many horizontal edges, 10 % of a standing camera's keypoints move by a few pixels along an edge.
    random = np.random.default_rng(1)
    for _ in range(20):
        points0 = random.integers(0, 480, (600, 2)).astype(np.float64)
        points1 = points0.copy()
        slipped = random.permutation(600) < 60
        points1[slipped, 0] += random.choice((-1, 1), 60) * random.integers(2, 5, 60)
        moved = ~slipped & (random.uniform(size=600) < 0.2)
        points1[moved] += random.integers(-1, 2, (moved.sum(), 2))
        pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA)
        assert pose.status is PoseStatus.NO_TRANSLATION
        assert math.degrees(np.linalg.norm(cv2.Rodrigues(pose.rotation)[0])) < 0.02


@pytest.mark.parametrize(
    "scene",
    [
        Scene(translation=(0.02, 0, 0), rounded=True, outliers=0.2),  # 2.5 pixels of displacement in total
        Scene(translation=(0, 0, 0.06), rounded=True, outliers=0.2),
        Scene(translation=(0.05, 0, 0), noise=0.5, outliers=0.3),
    ],
    ids=["sideways", "forward", "noisy"],
)
def test_a_small_translation_is_found(scene: Scene) -> None:
    poses = [scene.estimate(300, seed) for seed in range(10)]
    assert sum(pose.status is PoseStatus.OK for pose in poses) >= 9
    directions = [degrees(scene.error(pose))[1] for pose in poses if pose.status is PoseStatus.OK]
    assert np.median(directions) < 8


def test_a_few_near_points_in_front_of_a_far_background_give_the_translation() -> None:
    scene = Scene(far=0.92, depth=(2, 5), noise=0.3, outliers=0.1)
    poses = [scene.estimate(500, seed) for seed in range(10)]
    assert sum(pose.status is PoseStatus.OK for pose in poses) >= 9
    assert np.median([degrees(scene.error(pose))[1] for pose in poses if pose.status is PoseStatus.OK]) < 3


def test_without_a_translation_its_covariance_allows_any_direction() -> None:
    pose = replace(TURN, noise=0.3).estimate(200, 0)
    np.testing.assert_array_equal(pose.covariance[:3, :3], np.eye(3) / 3)
    assert not pose.covariance[:3, 3:].any()


# Uncertainty


def normalised_errors(scene: Scene, count: int, trials: int) -> np.ndarray:
    """Return squared errors in units of the covariance. They are chi-square distributed if it is correct."""
    values = []
    for seed in range(trials):
        pose = scene.estimate(count, seed)
        error = scene.error(pose)
        if pose.status is PoseStatus.OK:  # rank five, because a unit vector cannot vary along itself
            values.append(error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error)
        else:
            values.append(error[3:] @ np.linalg.solve(pose.covariance[3:, 3:], error[3:]))
    return np.array(values)


def test_the_covariance_agrees_with_the_errors() -> None:
    trials = 60
    values = normalised_errors(Scene(noise=0.5), 150, trials)
    low, high = chi2.ppf([0.025, 0.975], 5 * trials) / trials
    assert low < values.mean() < high


def test_the_covariance_of_a_pure_rotation_agrees_with_the_errors() -> None:
    trials = 60
    values = normalised_errors(replace(TURN, noise=0.4), 150, trials)
    low, high = chi2.ppf([0.025, 0.975], 3 * trials) / trials
    assert low < values.mean() < high


@pytest.mark.parametrize(
    "change",
    [
        dict(outliers=0.3),
        dict(rounded=True),
        dict(translation=(0.01, 0.0, 0.15)),  # the epipole is in the image
        dict(translation=(0.04, 0, 0)),
    ],
    ids=["wrong matches", "rounded", "forward", "small parallax"],
)
def test_the_covariance_is_approximately_correct_in_harder_cases(change: dict[str, Any]) -> None:
    values = normalised_errors(replace(Scene(noise=0.5), **change), 200, 40)
    assert 2.5 < np.median(values) < 7.5  # 4.35 for a chi-square distribution
    assert np.mean(values > chi2.ppf(0.999, 5)) < 0.15


def test_the_covariance_of_a_unit_translation_is_zero_along_it() -> None:
    pose = Scene(noise=0.5).estimate(150, 0)
    assert abs(pose.translation @ pose.covariance[:3, :3] @ pose.translation) < 1e-12
    assert np.linalg.matrix_rank(pose.covariance, tol=1e-12) == 5


def test_the_covariance_includes_the_rounding_of_keypoints() -> None:
    exact = Scene()
    coarse, fine = (exact.estimate(200, 0, keypoint_resolution=resolution) for resolution in (2.0, 1.0))
    np.testing.assert_allclose(coarse.covariance, 4 * fine.covariance, rtol=0.2, atol=1e-9)
    assert fine.covariance[3, 3] > 0


# Reproducibility


def test_the_same_matches_give_the_same_pose_from_any_thread() -> None:
    points0, points1, _ = Scene(noise=0.5, outliers=0.6).matches(200, 0)

    def estimate(_: int) -> RelativePose:
        return estimate_relative_pose(points0, points1, CAMERA, CAMERA)

    first = estimate(0)
    cv2.setRNGSeed(7)
    with ThreadPoolExecutor(4) as pool:
        for pose in pool.map(estimate, range(12)):
            np.testing.assert_array_equal(pose.rotation, first.rotation)
            np.testing.assert_array_equal(pose.translation, first.translation)
            np.testing.assert_array_equal(pose.covariance, first.covariance)
            np.testing.assert_array_equal(pose.inliers, first.inliers)


def test_float32_pixels_give_the_same_accuracy() -> None:
    scene = Scene(noise=0.5)
    points0, points1, _ = scene.matches(200, 0)
    pose = estimate_relative_pose(points0.astype(np.float32), points1.astype(np.float32), CAMERA, CAMERA)
    np.testing.assert_allclose(scene.error(pose), scene.error(scene.estimate(200, 0)), atol=1e-4)


# No pose


def test_without_calibration_there_is_no_pose() -> None:
    points = np.zeros((50, 2))
    for cameras in ((None, CAMERA), (CAMERA, None), (None, None)):
        pose = estimate_relative_pose(points, points, *cameras)
        check(pose, 50)
        assert pose.status is PoseStatus.NO_CALIBRATION and pose.inliers is None


@pytest.mark.parametrize("count,options", [(0, {}), (14, {}), (29, dict(min_inliers=30)), (7, dict(min_inliers=0))])
def test_too_few_matches_give_the_status_too_few_matches(count: int, options: dict[str, Any]) -> None:
    points0, points1, _ = Scene().matches(40, 0)
    pose = estimate_relative_pose(points0[:count], points1[:count], CAMERA, CAMERA, **options)
    check(pose, count)
    assert pose.status is PoseStatus.TOO_FEW_MATCHES and pose.inliers is None


def test_too_few_inliers_give_the_status_too_few_matches_with_the_inliers() -> None:
    scene = Scene(outliers=0.7)
    _, _, right = scene.matches(100, 0)
    pose = scene.estimate(100, 0, min_inliers=50)
    assert pose.status is PoseStatus.TOO_FEW_MATCHES and pose.inliers is not None
    assert 30 <= pose.num_inliers < 50 and pose.inliers[right].all()


@pytest.mark.parametrize("count", [15, 50, 200, 600])
def test_random_matches_give_the_status_failed(count: int) -> None:
    for seed in range(4):
        pose = Scene(outliers=1.0).estimate(count, seed)
        assert pose.status is PoseStatus.FAILED and pose.inliers is not None
        assert len(pose.inliers) == count and not pose.inliers.any() and pose.num_inliers == 0


def test_matches_with_nan_or_infinity_are_outliers() -> None:
    scene = Scene()
    points0, points1, _ = scene.matches(100, 0)
    points0[3], points1[5, 1], points1[8, 0] = math.nan, math.inf, -math.inf
    pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA)
    check(pose, 100)
    np.testing.assert_allclose(scene.error(pose), 0, atol=1e-6)
    assert pose.inliers is not None and pose.num_inliers == 97 and not pose.inliers[[3, 5, 8]].any()


def test_matches_without_a_direction_do_not_count() -> None:
    points = np.full((100, 2), 5.0)  # 110 degrees off the axis of this fisheye
    pose = estimate_relative_pose(points, points, FISHEYE, FISHEYE)
    check(pose, 100)
    assert pose.status is PoseStatus.TOO_FEW_MATCHES


coordinate = st.one_of(st.floats(), st.floats(-100, 1000), st.integers(0, 640).map(float))
pixel = st.tuples(coordinate, coordinate)


@given(
    st.lists(st.tuples(pixel, pixel), max_size=40),
    st.sampled_from([CAMERA, DRONE, FISHEYE]),
    st.floats(0.01, 100),
    st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_any_matches_give_a_valid_result_and_no_exception(
    pairs: list[Any], camera: Camera, threshold: float, resolution: float
) -> None:
    points = np.array(pairs).reshape(-1, 2, 2)
    pose = estimate_relative_pose(
        points[:, 0],
        points[:, 1],
        camera,
        camera,
        max_reprojection_error=threshold,
        min_inliers=8,
        keypoint_resolution=resolution,
    )
    check(pose, len(pairs))


def line(slope: ArrayLike, offset: ArrayLike) -> np.ndarray:
    return np.arange(60)[:, None] * np.asarray(slope, dtype=np.float64) + np.asarray(offset, dtype=np.float64)


@pytest.mark.parametrize("resolution", [0.0, 1.0])
@pytest.mark.parametrize("camera", [CAMERA, DRONE])
@pytest.mark.parametrize(
    "points0,points1",
    [
        (line((0, 0), (100, 200)), line((0, 0), (100, 200))),
        (line((0, 0), (100, 200)), line((0, 0), (300, 250))),
        (line((5, 3), (10, 20)), line((5, 3), (10, 20))),
        (line((5, 3), (10, 20)), line((4, 2), (30, 50))),
        (line((5, 0), (10, 240)), line((5, 0), (20, 240))),
        (line((5, 0), (10, 240)), line((0, 0), (320, 240))),
        (np.repeat(line((50, 31), (10, 20))[:6], 10, axis=0), np.repeat(line((47, 33), (20, 10))[:6], 10, axis=0)),
        (np.full((60, 2), 320.0), np.full((60, 2), 240.0)),
    ],
    ids=["one point", "one match", "line", "two lines", "epipolar line", "all to one", "six, repeated", "diagonal"],
)
def test_degenerate_matches_give_a_valid_result_and_no_exception(
    points0: np.ndarray, points1: np.ndarray, camera: Camera, resolution: float
) -> None:
    check(estimate_relative_pose(points0, points1, camera, camera, keypoint_resolution=resolution), 60)


@pytest.mark.parametrize(
    "arrays,options",
    [
        ((np.zeros((20, 3)), np.zeros((20, 3))), {}),
        ((np.zeros((20, 2)), np.zeros((21, 2))), {}),
        ((np.zeros(40), np.zeros(40)), {}),
        ((np.zeros((20, 2)), np.zeros((20, 2))), dict(max_reprojection_error=0)),
        ((np.zeros((20, 2)), np.zeros((20, 2))), dict(max_reprojection_error=math.nan)),
        ((np.zeros((20, 2)), np.zeros((20, 2))), dict(keypoint_resolution=-1)),
    ],
)
def test_invalid_arguments_are_refused(arrays: tuple[np.ndarray, np.ndarray], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must"):
        estimate_relative_pose(*arrays, CAMERA, CAMERA, **options)
