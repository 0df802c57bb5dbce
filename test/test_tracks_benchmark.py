"""Tests of benchmarks/tracks.py: its true positions and its counts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from two_view_scenes import OPENCV

from benchmarks.tracks import epipolar, offsets, project
from kpmatch_ros import FeatureMatcher
from kpmatch_ros.bags import Bag, read_messages
from kpmatch_ros.bags.cameras import choose_cameras
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.parameters import Parameters
from simulation import View
from simulation.bags import write_demo_bag

CAMERA = Camera(320, 240, np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]]))
STEP = np.array([0.4, 0.0, 0.3])  # metres


def view_from(depth: np.ndarray, position: np.ndarray) -> View:
    image = np.zeros((CAMERA.height, CAMERA.width, 3), np.uint8)
    return View(image, depth.astype(np.float32), np.eye(3), position, CAMERA)


def rays() -> np.ndarray:
    x, y = np.meshgrid(np.arange(CAMERA.width), np.arange(CAMERA.height))
    return np.dstack([(x - 159.5) / 300, (y - 119.5) / 300, np.ones_like(x)])


def random_points(count: int = 50) -> np.ndarray:
    return np.random.default_rng(0).uniform((60, 20), (260, 220), (count, 2))


def positions_after_step(points: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the positions of points (N, 2) at depths (N,) after STEP."""
    world = np.c_[(points - (159.5, 119.5)) / 300, np.ones(len(points))] * depth[:, None] - STEP
    return np.asarray(world[:, :2] / world[:, 2:] * 300 + (159.5, 119.5))


def test_a_point_of_a_slanted_plane_has_one_true_position() -> None:
    normal = np.array([0.05, 0.3, 0.2])  # 1 / depth = normal . ray: a floor whose lower part is near
    view, after = (view_from(1 / (rays() @ normal), position) for position in (np.zeros(3), STEP))
    points = random_points()
    own = 1 / (np.c_[(points - (159.5, 119.5)) / 300, np.ones(len(points))] @ normal)
    places, _ = project(points, view, after, CAMERA)
    exact = 1e-3 if OPENCV >= (5,) else 5e-3  # OpenCV 4 rounds the places of cv2.remap to 1/32 pixel
    assert np.abs(places - positions_after_step(points, own)).max() < exact
    beside = positions_after_step(points, own) + (0.03, -0.04)
    np.testing.assert_allclose(np.linalg.norm(offsets(beside, places), axis=1), 0.05, atol=exact)


def test_a_point_beside_a_depth_edge_may_lie_on_either_surface() -> None:
    depth = np.where(rays()[..., 0] < 0, 2.0, 5.0)
    points = np.array([[158.5, 100.0], [160.5, 60.0]])  # one pixel to either side
    places, _ = project(points, view_from(depth, np.zeros(3)), view_from(depth, STEP), CAMERA)
    for surface in (2.0, 5.0):
        true = positions_after_step(points, np.full(2, surface))
        assert np.abs(offsets(true, places)).max() < 1e-3
    assert np.abs(offsets(positions_after_step(points, np.full(2, 3.0)), places)).max() > 1


def test_only_tracks_that_are_keypoints_of_the_previous_frame_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = tmp_path / "walk"
    write_demo_bag(bag, num_frames=4, size=(320, 240))
    matcher = FeatureMatcher(Parameters(device="cpu", precision="float32", max_keypoints=200))
    epipolar(bag, matcher)
    lines = [re.findall(r"(\d+)%", line) for line in capsys.readouterr().out.splitlines()]
    said = [int(shares[1]) for shares in lines if len(shares) == 2 and shares]
    with Bag(bag) as opened:
        topics = choose_cameras(opened, "mono", {})[0]
    front_end = FrontEnd(matcher.parameters, matcher)
    camera = Camera.from_camera_info(next(read_messages(bag, [topics.camera_info])).message, rectified=False)
    shares, carried = [], 0
    for i, record in enumerate(read_messages(bag, [topics.image])):
        _, pair = front_end.register_frame(np.ascontiguousarray(to_array(record.message)), i * 10**9, camera)
        if pair is not None:
            own = pair.indices[:, 0] >= 0
            shares.append(round(100 * own.sum() / len(pair.reference.keypoints)))
            carried += int((~own).sum())
    assert carried > 20
    assert said == shares
