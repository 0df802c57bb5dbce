"""A hard sequence for a back-end: rounds through the synthetic courtyard at dusk, by a fast camera with few frames.

It has six rounds with 43 cm from frame to frame (three times as far as in the easy sequence), 40 % of the contrast,
noise of 4 grey levels, and an exposure time of a sixth of the frame interval. The motion blur is the mean of four
images along the path. No setting of the package or of the example is chosen on seed 7.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags import GROUND_TRUTH, BagWriter, camera_info_message, image_message, pose_message
from kpmatch_ros.geometry.pose import Pose
from simulation.bags import FIRST_STAMP, build_scene
from simulation.poses import camera_path, demo_camera, stereo_right

__all__ = ["DUSK_SEED", "write_dusk_bag"]

DUSK_SEED = 7
_STEP = 3 * 14.945 / 105  # metres; a round is 14.945
_SIZE, _BASELINE, _PERIOD = (480, 360), 0.12, 100_000_000  # nanoseconds
_EXPOSURE, _PARTS = 1 / 6, 4  # exposure time in frame intervals, number of images averaged for it
_CONTRAST, _BLACK, _NOISE = 0.4, 16.0, 4.0  # grey levels


def write_dusk_bag(path: str | Path, num_frames: int = 211, seed: int = DUSK_SEED) -> None:
    """Write a rectified stereo bag like :func:`simulation.bags.write_demo_bag`, with the poses at mid-exposure."""
    camera = demo_camera(*_SIZE, distorted=False)
    poses = camera_path(num_frames, _STEP)
    with BagWriter(path, "mcap", False) as bag:
        film = build_scene(seed).film(_exposed(poses), camera)
        random = np.random.default_rng(seed)
        for number, pose in enumerate(poses):
            stamp = FIRST_STAMP + number * _PERIOD
            bag.write(GROUND_TRUTH, pose_message(pose, stamp, "world"), stamp)
            for side, offset in (("left", 0.0), ("right", _BASELINE)):
                light = np.mean([view.image for view in itertools.islice(film, _PARTS)], axis=0)
                image = _sensed(light, random)
                frame_id = f"{side}_optical_frame"
                bag.write(f"/{side}/image_rect", image_message(image, stamp, frame_id, "mono8", ""), stamp)
                info = camera_info_message(camera, stamp, frame_id, offset)
                bag.write(f"/{side}/camera_info", info, stamp)


def _exposed(poses: list[Pose]) -> Iterator[Pose]:
    """For each image, yield the left camera's poses during the exposure, then the right camera's."""
    for number, pose in enumerate(poses):
        start, end = (poses[number], poses[number + 1]) if number + 1 < len(poses) else poses[number - 1 :]
        turn = Rotation.from_matrix(start.rotation.T @ end.rotation).as_rotvec()
        for eye in (0.0, _BASELINE):
            for part in range(_PARTS):
                time = _EXPOSURE * ((part + 0.5) / _PARTS - 0.5)  # in frame intervals, relative to mid-exposure
                rotation = pose.rotation @ Rotation.from_rotvec(time * turn).as_matrix()
                left = Pose(rotation, pose.position + time * (end.position - start.position))
                yield stereo_right(left, eye)


def _sensed(light: NDArray[np.float64], random: np.random.Generator) -> NDArray[np.uint8]:
    """Simulate the sensor: light, RGB (H, W, 3), to a grey image (H, W)."""
    grey = _BLACK + _CONTRAST * (light @ np.array([0.299, 0.587, 0.114]))
    return np.round(np.clip(grey + random.normal(0, _NOISE, grey.shape), 0, 255)).astype(np.uint8)
