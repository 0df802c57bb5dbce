"""Tests of stereo: the calibration of a pair, depth, and metric motion with a correct covariance."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import chi2
from stereo_scenes import BASELINE, HEIGHT, LENSES, MATRIX, WIDTH, Scene, check, pair, project

from kpmatch_ros.geometry.camera import CalibrationError
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.stereo_agreement import check_stereo_matches
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.stereo_errors import StereoPoints, stereo_residuals
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion
from kpmatch_ros.geometry.two_view_errors import Motion


def infos(focal: float = 500.0, baseline: float = BASELINE, **changes: Any) -> tuple[Any, Any]:
    """Return the camera_infos of a rectified pair, with ``changes`` in the right one."""
    found = []
    for offset in (0.0, baseline):
        p = [focal, 0, 320, -focal * offset, 0, focal, 240, 0, 0, 0, 1, 0]
        roi = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
        found.append(
            SimpleNamespace(
                width=WIDTH,
                height=HEIGHT,
                distortion_model="plumb_bob",
                d=[0.0] * 5,
                k=[focal, 0, 320, 0, focal, 240, 0, 0, 1],
                r=np.eye(3).ravel(),
                p=p,
                roi=roi,
                binning_x=0,
                binning_y=0,
            )
        )
    vars(found[1]).update(changes)
    return found[0], found[1]


# Calibration


def test_the_baseline_of_a_rectified_pair_is_along_the_x_axis() -> None:
    camera = StereoCamera.from_camera_infos(*infos(), rectified=True)
    assert math.isclose(camera.baseline, BASELINE)
    np.testing.assert_allclose(camera.translation, [-BASELINE, 0, 0])
    np.testing.assert_array_equal(camera.rotation, np.eye(3))


@pytest.mark.parametrize("lens", ["plumb_bob", "rational", "equidistant"])
def test_the_extrinsics_of_raw_images_are_recovered_from_opencvs_rectification(lens: str) -> None:
    camera = pair(lens)
    size, shift = (WIDTH, HEIGHT), camera.translation.reshape(3, 1)
    if lens == "equidistant":
        r0, r1, p0, p1, _ = cv2.fisheye.stereoRectify(
            MATRIX, camera.left.distortion, MATRIX, camera.right.distortion, size, camera.rotation, shift, flags=0
        )
    else:
        r0, r1, p0, p1, *_ = cv2.stereoRectify(
            MATRIX, camera.left.distortion, MATRIX, camera.right.distortion, size, camera.rotation, shift
        )
    left, right = infos()
    for info, r, p in ((left, r0, p0), (right, r1, p1)):
        info.d, info.distortion_model = camera.left.distortion, camera.left.distortion_model
        info.r, info.p = r.ravel(), p.ravel()
    found = StereoCamera.from_camera_infos(left, right, rectified=False)
    np.testing.assert_allclose(found.rotation, camera.rotation, atol=1e-9)
    np.testing.assert_allclose(found.translation, camera.translation, atol=1e-9)
    np.testing.assert_array_equal(found.left.distortion, camera.left.distortion)


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("wrong", ["left", "right"])
def test_the_camera_that_is_uncalibrated_or_has_the_wrong_size_is_named(wrong: str, rectified: bool) -> None:
    given = {"left": infos()[0], "right": infos()[1]}
    camera = StereoCamera.from_camera_infos(*given.values(), rectified=rectified)
    sizes = dict.fromkeys(given, (WIDTH, HEIGHT)) | {wrong: (8, 8)}
    with pytest.raises(CalibrationError, match=f"the {wrong} camera: the image is 8x8"):
        camera.check_size(*sizes.values())
    given[wrong].k, given[wrong].p = [0.0] * 9, [0.0] * 12
    with pytest.raises(CalibrationError, match=f"the {wrong} camera: .*not calibrated") as caught:
        StereoCamera.from_camera_infos(*given.values(), rectified=rectified)
    assert caught.value.reason == "uncalibrated"


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize(
    ("given", "reason", "text"),
    [
        (infos(baseline=0.0), "baseline", "baseline is zero"),
        (infos(baseline=-0.11), "swapped", "Swap the topics"),
        (infos()[::-1], "swapped", "0.12 m to the left"),
        (infos(width=320, height=240), "size", "320x240"),
        (infos(p=[0.0] * 12), "uncalibrated", "calibrat"),
        (infos(p=[1.0] * 9), "value", "12"),
        (infos(p=[500, 0, 320, math.nan, 0, 500, 240, 0, 0, 0, 1, 0]), "value", "finite"),
        (infos(p=[500, 0, 320, -60, 0, 500, 250, 0, 0, 0, 1, 0]), "alignment", "one rectified pair"),
        (infos(p=[500, 0, 320, 0, 0, 500, 240, -60, 0, 0, 1, 0]), "alignment", "one rectified pair"),
    ],
)
def test_an_unusable_calibration_is_refused_with_the_reason(
    given: tuple[Any, Any], reason: str, text: str, rectified: bool
) -> None:
    with pytest.raises(CalibrationError, match=text) as caught:
        StereoCamera.from_camera_infos(*given, rectified=rectified)
    assert caught.value.reason == reason


def test_raw_images_need_a_valid_rectification_rotation() -> None:
    with pytest.raises(CalibrationError, match="R of the right camera_info is not a rotation matrix"):
        StereoCamera.from_camera_infos(*infos(r=[0.0] * 9), rectified=False)


def test_images_of_another_size_are_refused() -> None:
    camera = pair()
    camera.check_size((WIDTH, HEIGHT), (WIDTH, HEIGHT))
    with pytest.raises(CalibrationError, match="320x240"):
        camera.check_size((WIDTH, HEIGHT), (320, 240))


# Stereo matches


@pytest.mark.parametrize("lens", LENSES)
def test_stereo_inliers_are_near_their_epipolar_lines_and_in_front_of_the_cameras(lens: str) -> None:
    camera = pair(lens)
    (left, right, _, _), _ = Scene(lens=lens, unmatched=0.0).pixels(200, 3)
    right[:20, 1] += 4  # off the epipolar line
    right[20:30] = np.nan
    shift = left[30:40] - right[30:40]
    right[30:40] += 2 * shift if lens == "none" else 0  # behind the cameras
    found = check_stereo_matches(left, right, camera)
    wrong = 40 if lens == "none" else 30
    assert found.status is PoseStatus.OK
    assert not found.inliers[:wrong].any() and found.inliers[wrong:].all()
    assert found.num_inliers == 200 - wrong


def test_left_and_right_swapped_contradict_the_calibration() -> None:
    for lens in LENSES:
        (left, right, _, _), _ = Scene(lens=lens, noise=0.5, unmatched=0.0).pixels(200, 3)
        assert check_stereo_matches(right, left, pair(lens)).status is PoseStatus.FAILED


def test_few_matches_do_not_contradict_a_calibration() -> None:
    pixels = np.random.default_rng(0).uniform(0, 400, (2, 10, 2))
    assert check_stereo_matches(*pixels, pair()).status is PoseStatus.OK
    empty = check_stereo_matches(np.zeros((0, 2)), np.zeros((0, 2)), pair())
    assert empty.status is PoseStatus.OK and empty.num_inliers == 0
    assert check_stereo_matches(*pixels, None).status is PoseStatus.NO_CALIBRATION


# Motion


@pytest.mark.parametrize("lens", LENSES)
def test_exact_matches_give_the_exact_motion_through_any_lens(lens: str) -> None:
    scene = Scene(lens=lens)
    pose = scene.estimate(100, 1)
    assert pose.status is PoseStatus.OK and pose.num_inliers == 100
    np.testing.assert_allclose(scene.error(pose), 0, atol=1e-6)


def test_a_move_to_the_right_gives_a_positive_x_translation_in_metres() -> None:
    pose = Scene(rotation=(0, 0, 0), translation=(0.3, 0, 0)).estimate(50)
    np.testing.assert_allclose(pose.translation, [0.3, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    "scene",
    [
        Scene(outliers=0.4),
        Scene(outliers=0.6, unmatched=0.0),
        Scene(depth=(4.0, 4.4)),
        Scene(unmatched=0.7),
        Scene(rotation=(0, 0, 1.5), translation=(0.1, 0.1, -0.1)),
        Scene(translation=(1.0, 0.2, 0.5), rotation=(0, -0.15, 0)),
    ],
    ids=["40 % wrong", "60 % wrong", "plane", "few depths", "rolled", "long motion"],
)
def test_the_motion_is_accurate_despite_noise_and_wrong_matches(scene: Scene) -> None:
    scene = replace(scene, noise=0.5)
    for seed in range(3):
        error = scene.error(scene.estimate(200, seed))
        assert np.linalg.norm(error[:3]) < 0.02 and math.degrees(np.linalg.norm(error[3:])) < 0.2


def test_the_inliers_are_the_correct_matches() -> None:
    scene = Scene(noise=0.3, outliers=0.3)
    _, right = scene.pixels(300, 0)
    inliers = scene.estimate(300, 0).inliers
    assert inliers is not None
    assert (inliers & right).sum() > 0.97 * right.sum() and (inliers & ~right).sum() < 5


def test_the_covariance_agrees_with_the_errors() -> None:
    trials = 100
    low, high = chi2.ppf([0.025, 0.975], 6 * trials) / trials
    assert low < Scene(noise=0.5).consistency(trials).mean() < high


@pytest.mark.parametrize(
    "scene",
    [
        Scene(noise=0.5, outliers=0.3),
        Scene(noise=0.3, lens="plumb_bob", unmatched=0.5),
        Scene(noise=0.5, depth=(5, 50)),
    ],
    ids=["wrong matches", "raw", "far"],
)
def test_the_covariance_agrees_with_the_errors_in_harder_cases(scene: Scene) -> None:
    trials = 30
    low, high = chi2.ppf([0.001, 0.999], 6 * trials) / trials
    assert low < scene.consistency(trials).mean() < high


def test_the_covariance_covers_the_rounding_of_whole_pixel_keypoints() -> None:
    trials = 30
    values = Scene(rounded=True).consistency(trials, max_reprojection_error=1.0, keypoint_resolution=1.0)
    assert 2 < values.mean() < chi2.ppf(0.999, 6 * trials) / trials


# No translation


@pytest.mark.parametrize("rotation", [(0, 0, 0), (0.02, -0.05, 0.01)], ids=["standing", "turning"])
def test_standing_and_turning_cameras_get_no_translation(rotation: tuple[float, float, float]) -> None:
    scene = Scene(noise=0.5, translation=(0, 0, 0), rotation=rotation)
    poses = [scene.estimate(80, seed) for seed in range(40)]
    # The stated rate is one false alarm in a thousand.
    assert not any(pose.status is PoseStatus.OK for pose in poses)
    assert all(math.degrees(np.linalg.norm(scene.error(pose)[3:])) < 0.1 for pose in poses)


def _two_groups(first: int, second: int, scattered: int, seed: int) -> list[np.ndarray]:
    """Return left0, right0, left1, right1 of matches of two motions, and others at random positions."""
    scenes = [(Scene(noise=0.2), first), (OTHER, second), (Scene(outliers=1.0), scattered)]
    groups = [scene.pixels(count, seed + count)[0] for scene, count in scenes if count]
    return [np.concatenate([group[image] for group in groups]) for image in range(4)]


OTHER = Scene(rotation=(-0.05, 0.1, 0.0), translation=(-0.3, 0.1, 0.0), noise=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_two_motions_without_a_majority_are_ambiguous_unless_a_prior_decides(seed: int) -> None:
    pose = estimate_stereo_motion(*_two_groups(130, 100, 70, seed), pair(), pair())
    check(pose, 300)
    assert pose.status is PoseStatus.AMBIGUOUS and pose.inliers is not None and pose.inliers[:130].mean() > 0.9
    other = OTHER.error(pose)
    away = other / np.linalg.norm(other)
    assert away @ pose.covariance @ away > 0.9 * other @ other

    before = estimate_stereo_motion(*_two_groups(300, 0, 0, seed), pair(), pair())
    prior = Motion(before.rotation, before.translation)
    decided = estimate_stereo_motion(*_two_groups(130, 100, 70, seed), pair(), pair(), prior=prior)
    assert decided.status is PoseStatus.OK and np.abs(Scene().error(decided)).max() < 0.01


def test_the_pose_is_not_ok_if_more_matches_stand_still_than_move() -> None:
    mover, still, wrong = _two_groups(100, 0, 0, 0), Scene().pixels(120, 1)[0], _two_groups(0, 0, 40, 0)
    still[2], still[3] = still[0], still[1]
    noise = np.random.default_rng(0)
    pixels = [np.concatenate(parts) + noise.normal(0, 0.3, (260, 2)) for parts in zip(mover, still, wrong)]
    assert estimate_stereo_motion(*pixels, pair(), pair()).status is not PoseStatus.OK


@pytest.mark.parametrize("groups", [(100, 0, 200), (160, 120, 20), (130, 30, 140)])
def test_a_motion_with_a_majority_or_without_a_strong_rival_is_ok(groups: tuple[int, int, int]) -> None:
    for seed in range(4):
        pose = estimate_stereo_motion(*_two_groups(*groups, seed), pair(), pair())
        assert pose.status is PoseStatus.OK
        assert np.abs(Scene().error(pose)).max() < 0.01


def test_matches_on_the_robots_own_body_are_not_taken_for_a_second_motion() -> None:
    scene, body, wrong = _two_groups(120, 0, 0, 0), Scene().pixels(110, 1)[0], _two_groups(0, 0, 40, 0)
    body[2], body[3] = body[0], body[1]
    pixels = [np.concatenate(parts) for parts in zip(scene, body, wrong)]
    pose = estimate_stereo_motion(*pixels, pair(), pair())
    assert pose.status is PoseStatus.OK and pose.inliers is not None and pose.inliers[:120].mean() > 0.9


def test_keypoints_that_do_not_move_at_all_mean_a_standing_camera() -> None:
    (left, right, _, _), _ = Scene(rounded=True, unmatched=0.0).pixels(200, 0)
    pose = estimate_stereo_motion(left, right, left, right, pair(), pair())
    assert pose.status is PoseStatus.NO_TRANSLATION
    np.testing.assert_allclose(pose.rotation, np.eye(3), atol=1e-9)
    assert (pose.covariance.diagonal() > 0).all(), "the certainty that it stands still is limited by the keypoints"


def test_a_translation_of_one_millimetre_is_detected_with_close_and_precise_points() -> None:
    scene = Scene(noise=0.05, rotation=(0, 0, 0), translation=(0.001, 0, 0), depth=(1.0, 3.0))
    pose = scene.estimate(300)
    assert pose.status is PoseStatus.OK
    np.testing.assert_allclose(pose.translation, scene.translation, atol=3e-4)


def test_only_the_rotation_is_known_if_the_scene_is_too_far_for_the_baseline() -> None:
    scene = Scene(noise=0.3, depth=(5000.0, 50000.0), translation=(0.1, 0, 0))
    pose = scene.estimate(200)
    assert pose.status is PoseStatus.NO_TRANSLATION
    assert math.degrees(np.linalg.norm(scene.error(pose)[3:])) < 0.05
    assert np.sqrt(pose.covariance[0, 0]) > 0.1, "the sigma of the translation exceeds its length"


# No pose


@pytest.mark.parametrize("depth", [(60, 300), (200, 1000), (1e3, 5e3), (1e5, 1e6)])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_a_turn_gives_no_translation_if_the_scene_is_too_far_for_a_disparity(
    depth: tuple[float, float], noise: float
) -> None:
    """Then the inverse depths are noise, and some translation times this noise fits anything."""
    scene = Scene(translation=(0, 0, 0), depth=depth, noise=noise, unmatched=0.0)
    found = [scene.estimate(150, seed, max_reprojection_error=1.0).status for seed in range(40)]
    assert found.count(PoseStatus.OK) <= 1
    assert found.count(PoseStatus.NO_TRANSLATION) >= 35


@pytest.mark.parametrize(
    ("length", "depth"), [(0.004, (2, 10)), (0.1, (30, 100)), (0.2, (60, 300)), (2.0, (200, 1000)), (5.0, (200, 1000))]
)
def test_the_covariance_agrees_with_the_errors_of_translations_in_far_scenes(
    length: float, depth: tuple[float, float]
) -> None:
    scene = Scene(translation=(0.25 * length, -0.1 * length, length), depth=depth, noise=0.3, unmatched=0.0)
    errors = scene.consistency(15, 150, max_reprojection_error=1.0)
    assert np.median(errors) < 9  # 5.3 for a chi-square distribution with 6 degrees of freedom
    assert errors.max() < 60


def test_no_pose_is_ok_if_the_depths_are_too_uncertain_for_the_motion() -> None:
    scene = Scene(translation=(5.0, -2.0, 20.0), depth=(200.0, 1000.0), noise=0.3, unmatched=0.0)
    found = [scene.estimate(150, seed, max_reprojection_error=1.0).status for seed in range(30)]
    assert PoseStatus.OK not in found


def test_without_calibration_there_is_no_pose() -> None:
    images, _ = Scene().pixels(50, 0)
    for cameras in ((None, pair()), (pair(), None)):
        assert estimate_stereo_motion(*images, *cameras).status is PoseStatus.NO_CALIBRATION


@pytest.mark.parametrize("count", [0, 1, 4, 14])
def test_too_few_matches_give_the_status_too_few_matches(count: int) -> None:
    images, _ = Scene(unmatched=0.0).pixels(20, 0)
    pose = estimate_stereo_motion(*(points[:count] for points in images), pair(), pair())
    check(pose, count)
    assert pose.status is PoseStatus.TOO_FEW_MATCHES


def test_matches_without_depth_give_the_status_too_few_matches() -> None:
    left0, right0, left1, _ = Scene().pixels(100, 0)[0]
    nowhere = np.full_like(right0, np.nan)
    assert estimate_stereo_motion(left0, nowhere, left1, nowhere, pair(), pair()).status is PoseStatus.TOO_FEW_MATCHES


def test_depth_in_one_of_the_two_frames_is_enough() -> None:
    scene = Scene(unmatched=0.0)
    left0, right0, left1, right1 = scene.pixels(100, 0)[0]
    nowhere = np.full_like(right0, np.nan)
    for rights in ((right0, nowhere), (nowhere, right1)):
        pose = estimate_stereo_motion(left0, rights[0], left1, rights[1], pair(), pair())
        np.testing.assert_allclose(scene.error(pose), 0, atol=1e-6)


def test_random_matches_give_the_status_failed() -> None:
    random = np.random.default_rng(0)
    left0, right0, _, _ = Scene(unmatched=0.0).pixels(200, 0)[0]
    left1, right1, _, _ = Scene(unmatched=0.0).pixels(200, 1)[0]
    order = random.permutation(200)
    pose = estimate_stereo_motion(left0, right0, left1[order], right1[order], pair(), pair())
    check(pose, 200)
    assert pose.status is PoseStatus.FAILED


@pytest.mark.parametrize("seed", range(12))
def test_arbitrary_pixels_never_raise_an_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    kinds = [
        lambda: random.uniform(-1e3, 1e3, (30, 2)),
        lambda: np.tile(random.uniform(0, 400, 2), (30, 1)),
        lambda: np.column_stack([np.arange(30.0) * 10, np.full(30, 100.0)]),
        lambda: random.choice([np.nan, np.inf, -np.inf, 1e300, 0.0, 320.0], (30, 2)),
    ]
    images = [kinds[random.integers(len(kinds))]() for _ in range(4)]
    check(estimate_stereo_motion(*images, pair(), pair()), 30)
    check(estimate_stereo_motion(images[0], images[1], images[0], images[1], pair(), pair()), 30)
    check_stereo_matches(images[0], images[1], pair())


def test_the_same_matches_give_the_same_pose() -> None:
    first, second = (Scene(noise=0.5, outliers=0.3).estimate(200, 4) for _ in range(2))
    np.testing.assert_array_equal(first.translation, second.translation)
    np.testing.assert_array_equal(first.covariance, second.covariance)


def test_invalid_arguments_are_refused() -> None:
    images, _ = Scene().pixels(20, 0)
    with pytest.raises(ValueError, match="differ in shape"):
        estimate_stereo_motion(images[0], images[1][:5], images[2], images[3], pair(), pair())
    with pytest.raises(ValueError, match=r"shape \(M, 2\)"):
        estimate_stereo_motion(*(points.ravel() for points in images), pair(), pair())
    with pytest.raises(ValueError, match="positive number of pixels"):
        estimate_stereo_motion(*images, pair(), pair(), max_reprojection_error=0.0)


def test_fewer_independent_points_increase_the_covariance() -> None:
    scene = Scene(noise=0.3)
    alone, alike = (scene.estimate(400, independent_points=count) for count in (np.inf, 50))
    used = alone.num_inliers
    assert np.array_equal(alone.rotation, alike.rotation)
    ratio = alike.covariance / alone.covariance
    assert np.allclose(ratio, ratio[0, 0]) and 0.5 * used / 50 < ratio[0, 0] - 1 <= used / 50


@pytest.mark.parametrize("lens", ["none", "plumb_bob"])
def test_stereo_residuals_are_the_least_squares_minimum_over_all_four_images(lens: str) -> None:
    scene, camera = Scene(noise=0.5, lens=lens), pair(lens)
    images, _ = scene.pixels(40, 3)
    turn, shift = cv2.Rodrigues(np.array(scene.rotation))[0] @ cv2.Rodrigues(np.full(3, 0.001))[0], scene.translation
    reference, current = (StereoPoints.of(images[i], images[i + 1], camera) for i in (0, 2))
    chosen = np.flatnonzero(reference.has_depth)  # some have no depth in the current frame
    found = stereo_residuals(reference.select(chosen), current.select(chosen), len(chosen), turn, np.array(shift))
    assert len(chosen) > 20 and not current.has_depth[chosen].all()

    def residuals(point: np.ndarray, index: int) -> np.ndarray:
        x, y, inverse_depth = point
        seen = np.array([x, y, 1.0]) / inverse_depth
        views = [seen, turn.T @ (seen - shift)]
        views = [view for left in views for view in (left, camera.rotation @ left + camera.translation)]
        parts = [
            project(lens_camera, view[None])[0] - image[index]
            for lens_camera, view, image in zip([camera.left, camera.right] * 2, views, images)
        ]
        return np.concatenate([part for part in parts if np.isfinite(part).all()])

    for position, index in enumerate(chosen):
        exact = least_squares(residuals, reference.points[:, index], args=(index,), x_scale="jac", xtol=1e-12)
        assert found.squares[position] == pytest.approx(2 * exact.cost, rel=0.02, abs=1e-3)
        deviations = scene.noise * np.sqrt(reference.covariances[range(3), range(3), index])
        assert (np.abs(found.points[:, position] - exact.x) < 0.05 * deviations).all()
