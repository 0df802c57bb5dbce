"""Simulated stereo matches of scenes with a known motion, and checks that hold for any stereo pose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion

__all__ = ["BASELINE", "HEIGHT", "LENSES", "MATRIX", "WIDTH", "Scene", "check", "pair", "project"]

WIDTH, HEIGHT = 640, 480
BASELINE = 0.12
MATRIX = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
LENSES = {
    "none": ("", ()),
    "plumb_bob": ("plumb_bob", (-0.28, 0.074, 2e-4, 2e-5, 0.0)),
    "rational": ("rational_polynomial", (0.48, -0.65, 6e-4, -3e-4, 0.2, 0.36, -0.48, 0.3)),
    "equidistant": ("equidistant", (-0.01, 0.02, -0.015, 0.003)),
}


def pair(lens: str = "none") -> StereoCamera:
    """Return a stereo pair whose cameras are not quite parallel, so that only the correct calibration fits."""
    camera = Camera(WIDTH, HEIGHT, MATRIX, LENSES[lens][0], np.array(LENSES[lens][1]))
    rotation = np.eye(3) if lens == "none" else cv2.Rodrigues(np.array([0.01, -0.02, 0.015]))[0]
    return StereoCamera(
        camera,
        camera,
        rotation,
        np.array([-BASELINE, 0.002, -0.001]) if lens != "none" else np.array([-BASELINE, 0, 0]),
    )


def project(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Project points (N, 3) to pixels (N, 2) with OpenCV's forward model."""
    coefficients = camera.distortion if camera.distortion.size else np.zeros(4)
    if camera.distortion_model == "equidistant":
        found = cv2.fisheye.projectPoints(points[:, None], np.zeros(3), np.zeros(3), camera.matrix, coefficients)
    else:
        found = cv2.projectPoints(points, np.zeros(3), np.zeros(3), camera.matrix, coefficients)
    return found[0].reshape(-1, 2)


@dataclass(frozen=True)
class Scene:
    """Random points in front of a stereo pair that moves by `translation`, metres, and turns by `rotation`."""

    rotation: tuple[float, float, float] = (0.02, -0.04, 0.01)
    translation: tuple[float, float, float] = (0.05, -0.02, 0.2)
    depth: tuple[float, float] = (2.0, 10.0)  # uniform in 1 / depth
    noise: float = 0.0  # pixels
    shared: float = 0.0  # pixels, times the point's share: common error of the left and the right pixel
    own: float = 0.0  # pixels: error of the right pixel alone
    unmatched: float = 0.2  # fraction of the points without a match in the right image, per frame
    outliers: float = 0.0  # fraction of the matches over time that are at a random position
    rounded: bool = False  # keypoints are whole pixels
    lens: str = "none"

    def pixels(self, count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return [left0, right0, left1, right1], each (count, 2), and which matches are correct (count,)."""
        random, camera = np.random.default_rng(seed), pair(self.lens)
        turn = cv2.Rodrigues(np.array(self.rotation, dtype=np.float64))[0]
        found: list[np.ndarray] = []
        while sum(map(len, found)) < count:
            pixels = random.uniform((0, 0), (WIDTH, HEIGHT), (2 * count, 2))
            rays = np.column_stack([camera.left.normalise(pixels), np.ones(len(pixels))])
            rays = rays[np.isfinite(rays).all(axis=1)]
            points = rays / random.uniform(1 / self.depth[1], 1 / self.depth[0], len(rays))[:, None]
            seen = [points, (points - self.translation) @ turn]
            seen = [view for left in seen for view in (left, left @ camera.rotation.T + camera.translation)]
            images = np.array([project(lens, view) for lens, view in zip([camera.left, camera.right] * 2, seen)])
            inside = ((images >= 0) & (images < (WIDTH, HEIGHT))).all(axis=(0, 2))
            inside &= np.array([view[:, 2] > 0.1 for view in seen]).all(axis=0)
            found.append(images[:, inside])
        images = np.concatenate(found, axis=1)[:, :count]
        images += random.normal(0, 1, images.shape) * self.noise
        if self.shared:
            errors = self.shared * self.shares(count)[:, None] * random.normal(0, 1, (2, count, 2))
            images += errors.repeat(2, axis=0)
            images[1::2] += random.normal(0, self.own, (2, count, 2))
        wrong = random.permutation(count) < round(self.outliers * count)
        images[2:, wrong] = random.uniform((0, 0), (WIDTH, HEIGHT), (2, wrong.sum(), 2))
        if self.rounded:
            images = np.round(images)
        for right in (1, 3):
            images[right, random.uniform(size=count) < self.unmatched] = np.nan
        return list(images), ~wrong

    @staticmethod
    def shares(count: int) -> np.ndarray:
        """Return (count,) factors of the points' shared errors, from 1/4 to 4."""
        return np.asarray(2.0 ** np.linspace(-2, 2, count))

    def estimate(self, count: int = 200, seed: int = 0, **options: Any) -> RelativePose:
        options = {"max_reprojection_error": 2.0, "keypoint_resolution": 0.0, **options}
        images, _ = self.pixels(count, seed)
        camera = pair(self.lens)
        pose = estimate_stereo_motion(*images, camera, camera, **options)
        check(pose, count)
        return pose

    def error(self, pose: RelativePose) -> np.ndarray:
        """Return the error of a pose, (6,) metres and radians, in the order of the covariance."""
        turn = cv2.Rodrigues(np.array(self.rotation, dtype=np.float64))[0] @ pose.rotation.T
        return np.concatenate([self.translation - pose.translation, cv2.Rodrigues(turn)[0].ravel()])

    def consistency(self, trials: int, count: int = 100, **options: Any) -> np.ndarray:
        """Return squared Mahalanobis errors (trials,). With a correct covariance they are chi-square with 6 degrees."""
        found = []
        for seed in range(trials):
            pose = self.estimate(count, seed, **options)
            assert pose.status is PoseStatus.OK
            error = self.error(pose)
            found.append(error @ np.linalg.solve(pose.covariance, error))
        return np.array(found)


def check(pose: RelativePose, count: int) -> None:
    """Check the properties of any pose."""
    assert all(np.isfinite(number).all() for number in (pose.rotation, pose.translation, pose.covariance))
    np.testing.assert_allclose(pose.rotation @ pose.rotation.T, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(pose.covariance, pose.covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(pose.covariance).min() > -1e-9
    assert pose.num_matches == count and pose.median_parallax >= 0
    if pose.inliers is not None:
        assert pose.inliers.shape == (count,) and pose.num_inliers == pose.inliers.sum()
    assert pose.metric == pose.status.has_pose
    if pose.status not in (PoseStatus.OK, PoseStatus.AMBIGUOUS):
        assert not pose.translation.any()
