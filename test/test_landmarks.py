"""Tests that landmarks are at the true positions within their sigmas, with the ids of their tracks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import Run, by_topic, header_stamp
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.landmarks import triangulate
from kpmatch_ros.messages import nanoseconds
from simulation import camera_path, demo_camera
from simulation.bags import build_scene, write_demo_bag

CAMERA = Camera(640, 480, np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]]))
# Rotated a little, as cameras are before rectification.
RIG = StereoCamera(
    CAMERA, CAMERA, Rotation.from_rotvec([0.01, -0.02, 0.015]).as_matrix(), np.array([-0.2, 0.004, 0.01])
)
LANDMARK = np.dtype([("xyz", "<f4", 3), ("track_id", "<u8"), ("sigma", "<f4"), ("rgb", "<u4")])


def project_into_both_images(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels of points (M, 3) in the left camera's frame, in both images."""
    images = [points, points @ RIG.rotation.T + RIG.translation]
    left, right = ((image @ CAMERA.matrix.T)[:, :2] / image[:, 2:] for image in images)
    return left, right


def scene(count: int, nearest: float, furthest: float) -> np.ndarray:
    random = np.random.default_rng(0)
    depth = 1 / random.uniform(1 / furthest, 1 / nearest, count)
    return np.column_stack([random.uniform(-0.4, 0.4, (count, 2)), np.ones(count)]) * depth[:, None]


def test_noise_free_points_are_triangulated_exactly() -> None:
    points = scene(200, 1, 20)
    found, sigmas = triangulate(*project_into_both_images(points), np.full(200, 0.1), RIG)
    assert found == pytest.approx(points, rel=1e-4)
    assert found.dtype == sigmas.dtype == np.float32
    # For a disparity error of 0.1 pixels in d = f b / z, the error of the depth is 0.1 z^2 / (f b).
    distance = np.linalg.norm(points, axis=1)
    assert sigmas == pytest.approx(distance * points[:, 2] / (500 * 0.2) * 0.1, rel=0.05)


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_sigmas_agree_with_the_errors_along_the_ray(noise: float) -> None:
    points = scene(4000, 1, 8)
    left, right = project_into_both_images(points)
    right = right + noise * np.random.default_rng(1).normal(size=right.shape)
    found, sigmas = triangulate(left, right, np.full(len(points), noise), RIG)
    known = np.isfinite(sigmas)
    assert known.mean() > 0.98
    distance = np.linalg.norm(points, axis=1)
    errors = (np.linalg.norm(found, axis=1) - distance)[known] / sigmas[known]
    assert np.mean(errors**2) == pytest.approx(1, abs=0.1)
    assert np.mean(abs(errors) < 1.645) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("focal", [300.0, 900.0])
def test_sigmas_are_correct_for_any_focal_length_of_the_right_camera(focal: float) -> None:
    other = Camera(640, 480, np.array([[focal, 0, 319.5], [0, focal, 239.5], [0, 0, 1]]))
    rig, points = StereoCamera(CAMERA, other, np.eye(3), np.array([-0.2, 0, 0])), scene(4000, 1, 8)
    left = CAMERA.project(points[:, :2] / points[:, 2:])
    moved = points + rig.translation
    right = other.project(moved[:, :2] / moved[:, 2:]) + 0.2 * np.random.default_rng(1).normal(size=left.shape)
    found, sigmas = triangulate(left, right, np.full(len(points), 0.2), rig)
    known = np.isfinite(sigmas)
    errors = (np.linalg.norm(found, axis=1) - np.linalg.norm(points, axis=1))[known] / sigmas[known]
    assert known.mean() > 0.98 and np.mean(errors**2) == pytest.approx(1, abs=0.1)


def test_points_that_may_be_infinitely_far_have_no_position() -> None:
    points = np.array([[0.1, 0.1, 10.0], [1.0, 1.0, 1e4], [0.1, 0.2, 5.0]])
    left, right = project_into_both_images(points)
    right[2, 0] += 150  # as if it were behind the cameras
    found, sigmas = triangulate(left, right, np.full(3, 0.5), RIG)
    for array in (found, sigmas[:, None]):
        assert np.isfinite(array).all(axis=1).tolist() == [True, False, False]


# From images


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bag") / "in"
    write_demo_bag(path, num_frames=3, baseline=0.12, size=(320, 240), encoding="mono8")
    return path


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bag` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bag")


def points_of(message: Any) -> np.ndarray:
    assert [(field.name, field.offset, field.datatype, field.count) for field in message.fields] == [
        ("x", 0, 7, 1), ("y", 4, 7, 1), ("z", 8, 7, 1), ("track_id", 12, 6, 2), ("sigma", 20, 7, 1), ("rgb", 24, 7, 1)
    ]  # fmt: skip
    assert (message.height, message.point_step, message.row_step) == (1, 28, 28 * message.width)
    assert message.is_dense and not message.is_bigendian and len(message.data) == message.row_step
    return np.frombuffer(bytes(message.data), LANDMARK)


def distances_by_index(matches: Any, stereo: Any) -> np.ndarray:
    """Return the distances (M,) between a frame's tracks and the stereo matches' left points, pixels, by index."""
    detected = np.isin(matches.indices, stereo.reference_indices)
    rows = {index: row for row, index in enumerate(np.array(stereo.reference_indices).tolist())}
    rows_of = [rows[index] for index in np.array(matches.indices)[detected].tolist()]
    points, left = (np.reshape(values, (-1, 2)) for values in (matches.points, stereo.reference_points))
    return np.linalg.norm(points[detected] - left[rows_of], axis=1)


def test_the_landmarks_of_a_bag_lie_on_the_surfaces_of_the_scene(run: Run, bag: Path, tmp_path: Path) -> None:
    status, _, err = run(
        bag,
        tmp_path / "out",
        "--mode",
        "stereo",
        "--rectified",
        "--landmarks",
        "--device",
        "cpu",
        "--precision",
        "float32",
    )
    assert (status, err) == (0, "")
    written = by_topic(tmp_path / "out")
    clouds, stereo, matches = (written[f"/{name}"] for name in ("landmarks", "stereo_matches", "matches"))
    assert [header_stamp(cloud.message) for cloud in clouds] == [header_stamp(one.message) for one in stereo]
    for left, right in zip(matches, stereo[1:]):
        joined = distances_by_index(left.message, right.message)
        assert len(joined) > 50 and not joined.any(), "one index is one point"
    camera = demo_camera(320, 240, distorted=False)
    views = build_scene(0).film(camera_path(3), camera)
    for number, (cloud, view) in enumerate(zip(clouds, views)):
        points = points_of(cloud.message)
        assert 100 < len(points) <= int(stereo[number].message.inliers.sum())
        pixels = points["xyz"] @ camera.matrix.T
        x, y = np.rint(pixels[:, :2] / pixels[:, 2:]).astype(int).T
        depth = view.depth[y.clip(0, 239), x.clip(0, 319)]
        errors = abs(points["xyz"][:, 2] - depth) / points["sigma"]
        assert np.median(errors) < 1.5 and (points["sigma"] > 0).all()
        grey = view.image.mean(axis=2)[y.clip(0, 239), x.clip(0, 319)]
        assert np.corrcoef(points["rgb"] & 255, grey)[0, 1] > 0.9
        ids = points["track_id"][points["track_id"] > 0]
        assert len(ids) == len(set(ids.tolist()))
        if number:
            assert len(ids) > 0.5 * len(points)
            assert set(ids.tolist()) <= set(matches[number - 1].message.track_ids.tolist())
            assert nanoseconds(matches[number - 1].message.header.stamp) == header_stamp(cloud.message)
        else:
            assert len(ids) == 0


def test_landmarks_are_refused_for_a_single_camera(run: Run, bag: Path, tmp_path: Path) -> None:
    status, _, err = run(bag, tmp_path / "out", "--image", "/left/image_rect", "--landmarks")
    assert status == 2 and "--landmarks: a single camera has no metric scale" in err


def test_without_a_calibration_the_cloud_is_empty(run: Run, bag: Path, tmp_path: Path) -> None:
    words = (
        "--mode",
        "stereo",
        "--landmarks",
        "--left-info",
        "/right/camera_info",
        "--right-info",
        "/left/camera_info",
    )
    status, _, _ = run(bag, tmp_path / "out", *words, "--rectified", "--device", "cpu", "--matcher", "nearest")
    clouds = by_topic(tmp_path / "out")["/landmarks"]
    assert status == 0 and [len(points_of(cloud.message)) for cloud in clouds] == [0, 0, 0]
