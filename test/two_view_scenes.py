"""Simulated matches of two views of a random scene with a known motion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_view import estimate_relative_pose

OPENCV = tuple(map(int, cv2.__version__.split(".")[:2]))


def pinhole(focal: float = 500.0, width: int = 640, height: int = 480) -> Camera:
    return Camera(width, height, np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]))


CAMERA = pinhole()
DRONE = Camera(
    752,
    480,
    np.array([[458.654, 0, 367.215], [0, 457.296, 248.375], [0, 0, 1]]),
    "plumb_bob",
    np.array([-0.28340811, 0.07395907, 0.00019359, 1.76e-05, 0.0]),
)
DEPTH_CAMERA = Camera(
    1280,
    720,
    np.array([[610.0, 0, 640], [0, 608.0, 365], [0, 0, 1]]),
    "rational_polynomial",
    np.array([0.48, -2.65, 6e-4, -3e-4, 1.57, 0.36, -2.48, 1.49]),
)
FISHEYE = Camera(
    848,
    800,
    np.array([[285.0, 0, 424], [0, 286.0, 400], [0, 0, 1]]),
    "equidistant",
    np.array([-0.01, 0.02, -0.015, 0.003]),
)


@dataclass(frozen=True)
class Scene:
    """Random points seen by two cameras. The current camera is at `translation`, turned by `rotation`."""

    rotation: tuple[float, float, float] = (0.05, -0.08, 0.03)  # rotation vector
    translation: tuple[float, float, float] = (0.25, -0.05, 0.1)
    depth: tuple[float, float] = (2.0, 10.0)  # uniform in 1 / depth
    far: float = 0.0  # fraction of the points that are 10 km away
    plane: bool = False
    camera0: Camera = CAMERA
    camera1: Camera = CAMERA
    noise: float = 0.0  # pixels
    outliers: float = 0.0  # fraction of the matches at a random position in the current image
    rounded: bool = False  # keypoints are whole pixels

    def matches(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pixels (count, 2) in the reference and the current image, and which matches are correct (count,)."""
        random = np.random.default_rng(seed)
        found: list[np.ndarray] = []
        while sum(map(len, found)) < count:
            pixels = random.uniform((0, 0), (self.camera0.width, self.camera0.height), (4 * count, 2))
            inverse_depth = random.uniform(1 / self.depth[1], 1 / self.depth[0], len(pixels))
            inverse_depth[random.uniform(size=len(pixels)) < self.far] = 1e-4
            rays = np.column_stack([self.camera0.normalise(pixels), np.ones(len(pixels))])
            if self.plane:
                inverse_depth = rays @ (0.12, -0.03, 0.2)
            points = rays / inverse_depth[:, None]
            turn = cv2.Rodrigues(np.array(self.rotation, dtype=np.float64))[0]
            current = project(self.camera1, (points - self.translation) @ turn)
            inside = ((current >= 0) & (current < (self.camera1.width, self.camera1.height))).all(axis=1)
            inside &= inverse_depth > 0
            found.append(np.hstack([pixels, current])[inside])
        pixels = np.concatenate(found)[:count]
        pixels += random.normal(0, 1, pixels.shape) * self.noise
        wrong = random.permutation(count) < round(self.outliers * count)
        pixels[wrong, 2:] = random.uniform((0, 0), (self.camera1.width, self.camera1.height), (wrong.sum(), 2))
        if self.rounded:
            pixels = np.round(pixels)
        return pixels[:, :2], pixels[:, 2:], ~wrong

    def estimate(self, count: int, seed: int, **options: Any) -> RelativePose:
        points0, points1, _ = self.matches(count, seed)
        pose = estimate_relative_pose(points0, points1, self.camera0, self.camera1, **options)
        check(pose, count)
        return pose

    def error(self, pose: RelativePose) -> np.ndarray:
        """Return the error (6,) of the translation's direction and of the rotation about the reference's axes."""
        direction = np.array(self.translation) / (np.linalg.norm(self.translation) or 1)
        turned = cv2.Rodrigues(np.array(self.rotation, dtype=np.float64))[0] @ pose.rotation.T
        turn = Rotation.from_matrix(turned).as_rotvec()  # OpenCV's Rodrigues returns 0 for angles below 0.0006 degrees
        return np.concatenate([direction - pose.translation, turn])


def project(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Project points (N, 3) to pixels (N, 2) with OpenCV, and points behind the camera far outside the image."""
    ahead = points[:, 2] > 0.05
    pixels = np.full((len(points), 2), -1e6)
    if ahead.any():
        # The rational models behave like a lens only near the image.
        rays = points[ahead] / points[ahead, 2:]
        if camera.distortion_model == "equidistant":
            found, _ = cv2.fisheye.projectPoints(
                rays[:, None], np.zeros(3), np.zeros(3), camera.matrix, camera.distortion
            )
        else:
            coefficients = camera.distortion if camera.distortion.size else np.zeros(5)
            found, _ = cv2.projectPoints(rays[:, None], np.zeros(3), np.zeros(3), camera.matrix, coefficients)
        back = camera.normalise(np.asarray(found).reshape(-1, 2))
        sound = np.abs(back - rays[:, :2]).max(axis=1) < 1e-6
        pixels[np.flatnonzero(ahead)[sound]] = np.asarray(found).reshape(-1, 2)[sound]
    return pixels


def check(pose: RelativePose, count: int) -> None:
    """Check the properties of any pose."""
    numbers = (pose.rotation, pose.translation, pose.covariance, pose.median_parallax)
    assert all(np.isfinite(number).all() for number in numbers)
    assert (pose.rotation.shape, pose.translation.shape, pose.covariance.shape) == ((3, 3), (3,), (6, 6))
    np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(pose.rotation) > 0
    np.testing.assert_allclose(pose.covariance, pose.covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(pose.covariance).min() > -1e-9
    assert pose.num_matches == count and pose.median_parallax >= 0 and not pose.metric
    if pose.inliers is None:
        assert pose.num_inliers == 0
    else:
        assert pose.inliers.shape == (count,) and pose.inliers.dtype == bool
        assert pose.num_inliers == pose.inliers.sum()
    if pose.status in (PoseStatus.OK, PoseStatus.AMBIGUOUS):
        assert math.isclose(np.linalg.norm(pose.translation), 1)
    else:
        assert not pose.translation.any()
    if pose.status not in (PoseStatus.OK, PoseStatus.AMBIGUOUS, PoseStatus.NO_TRANSLATION):
        assert (pose.rotation == np.eye(3)).all() and not pose.covariance.any()


def degrees(error: np.ndarray) -> tuple[float, float]:
    """Return the errors of the rotation and of the translation's direction in degrees, from Scene.error."""
    return math.degrees(np.linalg.norm(error[3:])), math.degrees(2 * math.asin(min(1, np.linalg.norm(error[:3]) / 2)))


def worst(scene: Scene, count: int, seeds: range) -> tuple[float, float]:
    errors = []
    for seed in seeds:
        pose = scene.estimate(count, seed)
        assert pose.status is PoseStatus.OK
        errors.append(degrees(scene.error(pose)))
    rotation, direction = np.max(errors, axis=0)
    return float(rotation), float(direction)
