"""Tests of poses for unusual lenses: in the real node, in `kpmatch bag`, and beyond 90 degrees.

The images are those of the demo, with known motion, as seen through another lens. test_camera.py shows that a Camera's
directions agree with OpenCV's lens models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from bag_harness import by_topic
from scipy.spatial.transform import Rotation
from scipy.stats import chi2
from sensor_msgs.msg import CameraInfo, Image, RegionOfInterest

from kpmatch_ros.bags import BagWriter, camera_info_message, image_message
from kpmatch_ros.bags.demo import DemoFrame, demo_frames
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, relative_motion
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from node_harness import running_node

TILTED = (-0.2, 0.1, 6e-4, 3e-4, 0.0, 0.3, 0.1, 0.0, 0.01, -0.01, 0.008, 0.002, 0.03, -0.02)


class Lens(NamedTuple):
    """A camera with `size` pixels. It outputs `region` (x, y, width, height), with `binning` pixels combined."""

    model: str
    coefficients: tuple[float, ...]
    focal: float
    size: tuple[int, int] = (320, 240)
    region: tuple[int, int, int, int] = (0, 0, 0, 0)
    binning: int = 1

    def camera(self) -> Camera:
        """Return the camera of all pixels."""
        width, height = self.size
        matrix = np.array([[self.focal, 0, 0.49 * width], [0, 1.01 * self.focal, 0.51 * height], [0, 0, 1]])
        return Camera(width, height, matrix, self.model, np.array(self.coefficients))

    def show(self, frame: DemoFrame) -> np.ndarray:
        """Return the grey image of the demo's frame through this lens."""
        left, top, width, height = self.region if any(self.region) else (0, 0, *self.size)
        x, y = np.meshgrid(np.arange(left, left + width, self.binning), np.arange(top, top + height, self.binning))
        rays = self.camera().normalise(np.column_stack([x.ravel(), y.ravel()]))
        return resample(frame, np.column_stack([rays, np.ones(len(rays))]), x.shape)

    def info(self, stamp: int) -> CameraInfo:
        """Return its CameraInfo."""
        left, top, width, height = self.region
        message = CameraInfo(width=self.size[0], height=self.size[1], distortion_model=self.model)
        message.d, message.k = list(self.coefficients), self.camera().matrix.ravel().tolist()
        message.binning_x = message.binning_y = 0 if self.binning == 1 else self.binning
        message.roi = RegionOfInterest(x_offset=left, y_offset=top, width=width, height=height)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        return message


# All within the demo's field of view, so the images have no black corners.
LENSES = [
    Lens("equidistant", (-0.1, 0.02, 0.01, 0.0), 350.0),
    Lens("rational_polynomial", (-0.2, 0.1, 6e-4, -3e-4, 0.0, 0.4, 0.2, 0.1), 400.0),
    Lens("rational_polynomial", TILTED[:12], 400.0),
    Lens("rational_polynomial", TILTED, 400.0),
    Lens("plumb_bob", (-0.28, 0.07, 2e-4, 1e-4, 0.0), 635.0, (640, 480), (40, 20, 560, 448), 2),
]


def resample(frame: DemoFrame, rays: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return what the demo's camera sees along rays (N, 3)."""
    matrix = np.reshape(frame.camera_info.k, (3, 3))
    pixels, _ = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), matrix, np.asarray(frame.camera_info.d))
    pixels = np.asarray(pixels).reshape(*shape, 2).astype(np.float32)
    assert ((pixels > 0) & (pixels < (frame.image.shape[1], frame.image.shape[0]))).all()
    grey = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.remap(grey, pixels[..., 0], pixels[..., 1], cv2.INTER_CUBIC))


def nees(message: Any, before: DemoFrame, after: DemoFrame, turn: np.ndarray) -> float:
    """Return the NEES (mean 5) of a RelativePose, for a camera whose world is rotated by `turn` and small errors."""
    motion, pose = relative_motion(before.pose, after.pose), message.pose.pose
    found = Rotation.from_quat([getattr(pose.orientation, axis) for axis in "xyzw"])
    direction = turn @ motion.position / np.linalg.norm(motion.position)
    error = np.empty(6)
    error[:3] = direction - [getattr(pose.position, axis) for axis in "xyz"]
    error[3:] = (Rotation.from_matrix(turn @ motion.rotation @ turn.T) * found.inv()).as_rotvec()
    assert np.degrees(np.linalg.norm(error[3:])) < 0.15 and np.degrees(np.linalg.norm(error[:3])) < 2.0
    covariance = np.reshape(message.pose.covariance, (6, 6))
    return float(error @ np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ error)


def test_the_nodes_poses_are_correct_for_all_lens_models_binning_and_regions(tmp_path: Path) -> None:
    frames, count = list(demo_frames(len(LENSES))), len(LENSES) - 1  # the two images of a pair have different lenses
    with running_node(tmp_path, max_keypoints=384) as node:
        node.wait_until_connected()
        infos = [lens.info(frame.stamp) for frame, lens in zip(frames, LENSES)]
        node.calibrate(*((node.infos, info) for info in infos))  # one calibration per image, with the image's stamp
        for frame, lens, info in zip(frames, LENSES, infos):
            pixels = lens.show(frame)
            image = Image(height=pixels.shape[0], width=pixels.shape[1], encoding="mono8", step=pixels.shape[1])
            image.header, image.data = info.header, pixels.tobytes()
            node.send(image)
        node.wait_for(lambda: len(node.poses) == count, "every pair")
        assert [pose.status for pose in node.poses] == [PoseStatus.OK] * count
        found = [nees(*each, np.eye(3)) for each in zip(node.poses, frames, frames[1:])]
        assert min(pose.num_inliers / pose.num_matches for pose in node.poses) > 0.9
        assert sum(found) < chi2.ppf(0.999, 5 * len(found)), found


def test_rectified_images_have_poses_in_the_rectified_frame(tmp_path: Path, kpmatch: Any) -> None:
    frames, turn = list(demo_frames(3)), cv2.Rodrigues(np.array([0.02, -0.03, 0.02]))[0]
    projection = np.array([[340.0, 0, 156, 0], [0, 340, 123, 0], [0, 0, 1, 0]])
    x, y = np.meshgrid(np.arange(320), np.arange(240))
    rays = np.column_stack([x.ravel(), y.ravel(), np.ones(x.size)]) @ np.linalg.inv(projection[:, :3]).T @ turn
    with BagWriter(tmp_path / "in", "mcap") as writer:
        for frame in frames:
            info = camera_info_message(LENSES[0].camera(), frame.stamp, "camera")
            info.r, info.p = turn.ravel(), projection.ravel()
            image = image_message(resample(frame, rays, x.shape), frame.stamp, "camera", "mono8")
            writer.write("/camera/image_rect", image, frame.stamp)
            writer.write("/camera/camera_info", info, frame.stamp)
    options = ("--rectified", "--device", "cpu", "--precision", "float32", "--max-keypoints", "384")
    status, _, err = kpmatch("bag", tmp_path / "in", tmp_path / "out", *options)
    assert status == 0 and "camera_info" not in err
    poses = [record.message for record in by_topic(tmp_path / "out")["/relative_pose"]]
    assert [pose.status for pose in poses] == [PoseStatus.OK] * 2
    found = [nees(*each, turn) for each in zip(poses, frames, frames[1:])]
    assert sum(found) < chi2.ppf(0.999, 5 * len(found)), found


@pytest.mark.parametrize("seed", range(3))
def test_points_beyond_90_degrees_of_a_fisheye_are_not_inliers_of_the_pose(seed: int) -> None:
    random, coefficients = np.random.default_rng(seed), np.array([-0.01, 0.005, -0.002, 0.0001])
    camera = Camera(640, 480, np.array([[150.0, 0, 320], [0, 150.0, 240], [0, 0, 1]]), "equidistant", coefficients)

    def show(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels (N, 2) of points all around the camera, and their angles to the axis."""
        angle = np.arctan2(np.hypot(points[:, 0], points[:, 1]), points[:, 2])
        radius = 150 * angle * (1 + (angle[:, None] ** [2, 4, 6, 8]) @ coefficients)
        return (320, 240) + radius[:, None] * points[:, :2] / np.hypot(points[:, :1], points[:, 1:2]), angle

    directions = random.normal(size=(2000, 3))
    points = directions / np.linalg.norm(directions, axis=1, keepdims=True) * random.uniform(2, 10, (2000, 1))
    turn, shift = cv2.Rodrigues(np.array([0.05, -0.08, 0.03]))[0], np.array([0.25, -0.05, 0.1])
    (pixels0, angles0), (pixels1, angles1) = show(points), show((points - shift) @ turn)
    seen = np.maximum(angles0, angles1) < np.radians(115)
    pose = estimate_relative_pose(
        *(pixels[seen] + random.normal(0, 0.2, (seen.sum(), 2)) for pixels in (pixels0, pixels1)), camera, camera
    )
    beyond = np.maximum(angles0, angles1)[seen] > np.radians(89.5)  # further from 89 degrees than the noise
    assert beyond.sum() > 200 and pose.inliers is not None
    assert pose.status is PoseStatus.OK
    assert not pose.inliers[beyond].any() and pose.inliers[~beyond].mean() > 0.95
    error = np.empty(6)
    error[:3] = shift / np.linalg.norm(shift) - pose.translation
    error[3:] = Rotation.from_matrix(turn @ pose.rotation.T).as_rotvec()
    assert error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error < chi2.ppf(0.999, 5)
