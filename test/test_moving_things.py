"""Tests that the motion of an object in the image is not taken for the camera's motion."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from two_view_scenes import FISHEYE, Scene, pinhole

from benchmarks.overconfidence import CAMERA, mover
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.parameters import Parameters
from simulation import Scene as Scene3D
from simulation import camera_path, demo_camera

STANDING = Scene(rotation=(0.0, 0.0, 0.0), translation=(0.0, 0.0, 0.0), noise=0.3, outliers=0.1)


def estimate(points0: np.ndarray, points1: np.ndarray) -> RelativePose:
    return estimate_relative_pose(points0, points1, CAMERA, CAMERA, keypoint_resolution=1 / 32)


def turn_squared(pose: RelativePose, truth: np.ndarray) -> float:
    """Return the squared error of the rotation in units of its covariance, with mean 3."""
    error = cv2.Rodrigues(truth @ pose.rotation.T)[0].ravel()
    return float(error @ np.linalg.solve(pose.covariance[3:, 3:], error))


@pytest.mark.parametrize("stands", [True, False], ids=["standing", "turning"])
@pytest.mark.parametrize("part", [0.05, 0.1, 0.2])
def test_one_moving_object_is_not_taken_for_translation_of_a_standing_or_turning_camera(
    part: float, stands: bool
) -> None:
    problems = [mover(part, stands, seed) for seed in range(2000, 2030)]
    poses = [problem.estimate() for problem in problems]
    assert not any(pose.status is PoseStatus.OK for pose in poses)
    turned = [
        (pose, problem.truth.rotation)
        for pose, problem in zip(poses, problems)
        if pose.status is PoseStatus.NO_TRANSLATION
    ]
    assert len(turned) >= 28
    assert np.mean([turn_squared(pose, truth) for pose, truth in turned]) < 6


def test_a_person_as_tall_as_the_image_counts_as_one_moving_object() -> None:
    for seed in range(10):
        points0, points1, _ = STANDING.matches(500, seed)
        points1[np.abs(points0[:, 0] - 400) < 90] += (9, 2)
        assert estimate(points0, points1).status is PoseStatus.NO_TRANSLATION


def test_an_object_near_the_edge_of_a_fisheye_image_counts_as_one_moving_object() -> None:
    scene = Scene(translation=(0.0, 0.0, 0.0), noise=0.3, camera0=FISHEYE, camera1=FISHEYE)
    for seed in range(10):
        points0, points1, _ = scene.matches(500, seed)
        points1[np.linalg.norm(points0 - (60, 400), axis=1) < 220] += (5, 9)
        pose = estimate_relative_pose(points0, points1, FISHEYE, FISHEYE, keypoint_resolution=1 / 32)
        assert pose.status is PoseStatus.NO_TRANSLATION


def test_a_moving_object_does_not_pull_the_rotation_away_from_that_of_the_scene() -> None:
    scene = Scene(translation=(0.0, 0.0, 0.0), noise=0.1)
    truth = cv2.Rodrigues(np.array(scene.rotation))[0]
    errors = []
    for seed in range(20):
        points0, points1, _ = scene.matches(500, seed)
        random = np.random.default_rng(seed)
        middle, angle = random.uniform((130, 100), (510, 380)), random.uniform(0, 2 * math.pi)
        thing = np.argsort(np.linalg.norm(points0 - middle, axis=1))[:100]
        points1[thing] += 1.5 * np.array([math.cos(angle), math.sin(angle)])  # a rotation in between fits all nearly
        pose = estimate(points0, points1)
        assert pose.status is PoseStatus.NO_TRANSLATION
        errors.append(math.degrees(np.linalg.norm(cv2.Rodrigues(truth @ pose.rotation.T)[0])))
    assert max(errors) < 0.008  # 0.07 pixels; the rotation in between is up to 0.02 degrees off


def test_few_matches_with_a_moving_object_give_a_translation_in_at_most_a_third_of_cases() -> None:
    camera = pinhole(130.0, 160, 120)
    scene = Scene(translation=(0.0, 0.0, 0.0), noise=0.1, camera0=camera, camera1=camera)
    moved = 0
    for seed in range(30):
        points0, points1, _ = scene.matches(60, seed)
        random = np.random.default_rng(seed)
        middle, angle = random.uniform((32, 24), (128, 96)), random.uniform(0, 2 * math.pi)
        thing = np.argsort(np.linalg.norm(points0 - middle, axis=1))[:24]
        points1[thing] += 4 * np.array([math.cos(angle), math.sin(angle)])
        pose = estimate_relative_pose(points0, points1, camera, camera, keypoint_resolution=1 / 32)
        moved += pose.status is PoseStatus.OK
    assert moved <= 10  # 20 if the rotation is one between the two


def test_a_moving_camera_gets_a_pose_even_if_an_object_moves_too() -> None:
    scene = Scene(noise=0.3, outliers=0.1)
    for seed in range(10):
        points0, points1, _ = scene.matches(500, seed)
        thing = np.argsort(np.linalg.norm(points0 - (200, 300), axis=1))[:100]
        points1[thing] += (12, -3)
        pose = estimate(points0, points1)
        assert pose.status is PoseStatus.OK and math.degrees(np.linalg.norm(scene.error(pose)[:3])) < 2


def test_one_near_object_before_a_far_background_may_be_taken_for_a_moving_one() -> None:
    near = Scene(depth=(2.0, 4.0), noise=0.3)
    far = Scene(depth=(60.0, 60.1), noise=0.3)  # moves by two pixels everywhere, like a rotation by 0.25 degrees
    truth = cv2.Rodrigues(np.array(far.rotation))[0]
    statuses = []
    for seed in range(10):
        points0, points1, _ = far.matches(200, seed)
        near0, near1, _ = near.matches(1000, seed)
        thing = np.linalg.norm(near0 - (350, 250), axis=1) < 70
        pose = estimate(np.vstack([points0, near0[thing]]), np.vstack([points1, near1[thing]]))
        statuses.append(pose.status)
        assert turn_squared(pose, truth) < 20
    assert statuses.count(PoseStatus.NO_TRANSLATION) >= 5
    assert set(statuses) <= {PoseStatus.OK, PoseStatus.NO_TRANSLATION}  # the covariance covers both


def test_the_object_with_most_of_the_matches_counts_as_the_scene() -> None:
    scene, near = Scene(noise=0.3, outliers=1.0), Scene(depth=(2.0, 4.0), noise=0.3)
    for seed in range(10):
        near0, near1, _ = near.matches(1000, seed)
        thing = np.linalg.norm(near0 - (320, 240), axis=1) < 110
        wrong0, wrong1, _ = scene.matches(30, seed)
        pose = estimate(np.vstack([near0[thing], wrong0]), np.vstack([near1[thing], wrong1]))
        assert pose.status is PoseStatus.OK


def test_a_poster_carried_past_a_standing_camera_gives_no_translation() -> None:
    eye, pose = demo_camera(distorted=False), camera_path(21)[20]
    poster = next(iter(Scene3D(53).film([camera_path(51)[50]], eye, noise=0.0))).image[100:400, 150:350]
    front_end = FrontEnd(Parameters(device="cpu", rectified=True, max_keypoints=512))
    statuses = []
    for number, view in enumerate(Scene3D(3).film([pose] * 4, eye, noise=2.0)):
        image = view.image.copy()
        image[100:400, 120 + 8 * number :][:, :200] = poster
        pair = front_end.register([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)], [(number + 1) * 10**8], eye).pair
        statuses += [pair.pose.status] if pair is not None else []
    assert statuses == [PoseStatus.NO_TRANSLATION] * 3


@pytest.mark.parametrize("count, wrong, least", [(20, 0.0, 60), (30, 0.2, 70)])
def test_few_matches_in_small_images_often_give_a_translation_with_a_correct_covariance(
    count: int, wrong: float, least: int
) -> None:
    camera = pinhole(130.0, 160, 120)
    scene = Scene(camera0=camera, camera1=camera, noise=0.1, outliers=wrong)  # they move by three pixels
    poses = [scene.estimate(count, seed, keypoint_resolution=1 / 32) for seed in range(2000, 2100)]
    sure = [pose for pose in poses if pose.status is PoseStatus.OK]
    assert len(sure) > least
    errors = [scene.error(pose) for pose in sure]
    squares = [
        error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error for pose, error in zip(sure, errors)
    ]
    assert np.mean(squares) < 6.5  # 5 is correct


def test_few_matches_that_are_wrong_by_a_few_pixels_give_no_translation() -> None:
    camera = pinhole(130.0, 160, 120)
    scene = Scene(translation=(0.0, 0.0, 0.0), camera0=camera, camera1=camera, noise=0.1)
    for seed in range(60):
        points0, points1, _ = scene.matches(20, seed)
        random = np.random.default_rng(seed)
        angle = random.uniform(0, 2 * math.pi, 8)
        points1[:8] += random.uniform(1, 6, (8, 1)) * np.column_stack([np.cos(angle), np.sin(angle)])
        pose = estimate_relative_pose(points0, points1, camera, camera, keypoint_resolution=1 / 32, min_inliers=8)
        assert pose.status is PoseStatus.NO_TRANSLATION
