"""Tests of errors that matches share: a pose allows for those of neighbours, and blur causes none that all share."""

from __future__ import annotations

import cv2
import numpy as np
from two_view_scenes import CAMERA, Scene

from kpmatch_ros.geometry.patches import align, cut, no_change, signed
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.two_view import estimate_relative_pose

SCENE = Scene(noise=0.05)


def shared_errors(points: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return errors (n, 2) that all points in the same square of 24 pixels share."""
    squares = random.normal(0, 0.25, (20, 27, 2))
    column, row = (points / 24).astype(int).T
    return np.asarray(squares[row, column])


def test_the_covariance_of_a_pose_covers_errors_shared_by_neighbouring_points() -> None:
    nees = []
    for seed in range(60):
        random = np.random.default_rng(1000 + seed)
        points0, points1, _ = SCENE.matches(800, seed)
        pose = estimate_relative_pose(
            points0, points1 + shared_errors(points0, random), CAMERA, CAMERA, keypoint_resolution=1 / 32
        )
        assert pose.status is PoseStatus.OK
        error = SCENE.error(pose)
        error[:3] -= (error[:3] @ pose.translation) * pose.translation
        nees.append(error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error)
    assert 3.5 < np.mean(nees) < 8.0  # 5 is correct; 11 if the errors are treated as independent


def test_blur_does_not_bias_refined_points_towards_the_start_of_the_search() -> None:
    texture = np.random.default_rng(0).standard_normal((240, 320)).astype(np.float32)
    picture = 128 + 60 * cv2.GaussianBlur(texture, (0, 0), 1.5) * 3
    blurred = cv2.blur(picture, (1, 5))
    images = [signed(np.clip(each, 0, 255).round().astype(np.uint8)) for each in (picture, blurred)]
    grid = np.stack(np.meshgrid(np.arange(30, 290, 9), np.arange(30, 210, 9)), axis=-1).reshape(-1, 2)
    points = grid.astype(np.float32)
    for first, second in (images, images[::-1]):
        found = align(cut(first, points), second, points + np.float32(0.5), no_change(len(points)))
        error = found.points[found.good] - points[found.good]
        assert found.good.mean() > 0.8
        assert np.abs(np.median(error, axis=0)).max() < 0.02
