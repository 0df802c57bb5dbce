"""Tests of the synthetic courtyard: exact geometry, reproducible bytes, and pictures that can be matched."""

from __future__ import annotations

import itertools
import pickle

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose, relative_motion
from simulation import Scene, View, camera_path, demo_camera, look, stereo_right
from simulation.bags import build_scene

Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def scene() -> Scene:
    return build_scene(0)


@pytest.fixture(scope="module")
def lens() -> Camera:
    return demo_camera()


@pytest.fixture(scope="module")
def walk(scene: Scene, lens: Camera) -> list[View]:
    """Return the first frames of the default path, without noise."""
    return list(scene.film(camera_path(7), lens))


def project(camera: Camera, points: Array) -> Array:
    """Project points (N, 3) in the camera's frame to pixels (N, 2) with OpenCV."""
    pixels, _ = cv2.projectPoints(points[:, None], np.zeros(3), np.zeros(3), camera.matrix, camera.distortion)
    return pixels.reshape(-1, 2)


def seen_points(view: View) -> tuple[Array, NDArray[np.bool_]]:
    """Return camera coordinates (H, W, 3) of each pixel's point, and a mask of the pixels that are not sky."""
    height, width = view.depth.shape
    y, x = np.mgrid[0:height, 0:width]
    rays = view.camera.normalise(np.stack([x.ravel(), y.ravel()], axis=1))
    finite = np.isfinite(view.depth)
    depth = np.where(finite, view.depth, 1.0)
    return np.dstack([rays.reshape(height, width, 2), np.ones_like(depth)]) * depth[..., None], finite


def in_world(view: View) -> tuple[Array, NDArray[np.bool_]]:
    points, finite = seen_points(view)
    return points @ view.rotation.T + view.position, finite


def angle(rotation: Array) -> float:
    """Return the angle in degrees."""
    return float(np.degrees(np.linalg.norm(cv2.Rodrigues(rotation)[0])))


def grey(view: View) -> NDArray[np.uint8]:
    return cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY)


# geometry


@pytest.mark.parametrize("distorted", [False, True])
def test_every_pixel_of_a_view_straight_down_shows_the_ground(scene: Scene, distorted: bool) -> None:
    view = scene.render(*look((0.3, 0.2, 1.7), 0.4, np.pi / 2, 0.3), demo_camera(320, 240, distorted))
    points, finite = in_world(view)
    assert finite.all()
    assert np.abs(points[..., 2]).max() < 1e-4
    assert np.allclose(
        project(view.camera, seen_points(view)[0].reshape(-1, 3)),
        np.stack(np.meshgrid(range(320), range(240)), axis=-1).reshape(-1, 2),
        atol=1e-3,
    )


@pytest.mark.parametrize("distorted", [False, True])
def test_the_corner_of_the_house_is_where_the_camera_model_puts_it(scene: Scene, distorted: bool) -> None:
    """Pixel (0, 0) is the centre of the top-left pixel. An offset of half a pixel would make this test fail."""
    camera = demo_camera(distorted=distorted)
    pose = look((4.5, -2.0, 1.6), 0.12, -0.25, 0.15)
    view = scene.render(*pose, camera)
    height = np.linspace(2.0, 4.8, 2000)
    edge = np.stack([np.full_like(height, 11.0), np.full_like(height, -3.4), height], axis=1)
    u, v = project(camera, (edge - pose.position) @ pose.rotation).T
    points, finite = in_world(view)
    front = finite & (np.abs(points[..., 0] - 11.0) < 1e-3) & (points[..., 1] > -3.5)  # left of the house's edge
    errors = []
    for row in range(int(np.ceil(v.min())), int(v.max())):
        last = np.flatnonzero(front[row]).max()
        errors.append(last + 0.5 - np.interp(row, v[::-1], u[::-1]))
    assert len(errors) > 100
    assert np.abs(errors).max() < 0.52  # a pixel belongs to the front if its centre does
    assert abs(np.mean(errors)) < 0.05


@pytest.mark.parametrize(("first", "second"), [(0, 1), (4, 5), (0, 4)])
def test_two_views_agree_in_position_depth_and_colour_of_shared_points(
    walk: list[View], first: int, second: int
) -> None:
    one, other = walk[first], walk[second]
    rotation, translation = relative_motion(one, other)
    points, finite = seen_points(one)
    moved = (points.reshape(-1, 3) - translation) @ rotation
    ahead = finite.ravel() & (moved[:, 2] > 0.1)
    pixels = project(other.camera, np.where(ahead[:, None], moved, [0, 0, -1.0])).astype(np.float32)
    x, y = (np.where(ahead, column, -10).astype(np.float32).reshape(finite.shape) for column in pixels.T)
    inverse_depth = cv2.remap(1 / other.depth, x, y, cv2.INTER_LINEAR, borderValue=-1)
    shown = finite & (inverse_depth > 0) & (x > 0) & (y > 0) & (x < 639) & (y < 479)
    excess = (moved[:, 2].reshape(finite.shape) * inverse_depth - 1)[shown]
    assert shown.mean() > 0.5
    assert np.median(np.abs(excess)) < 1e-4  # cv2.remap of OpenCV 4 rounds to 1/32 of a pixel
    assert (np.abs(excess) < 1e-3).mean() > 0.9
    assert (excess < -1e-2).mean() < 0.03  # nearer than the surface there: only where an edge is interpolated
    # The images fit together without a remaining shift.
    same = np.zeros(finite.shape, np.uint8)
    same[shown] = np.abs(excess) < 1e-3
    same = cv2.erode(same, np.ones((5, 5))) > 0
    image = grey(one).astype(np.float32)
    difference = cv2.remap(grey(other).astype(np.float32), x, y, cv2.INTER_CUBIC) - image
    gradients = [cv2.Sobel(image, cv2.CV_32F, *order, ksize=3, scale=1 / 8)[same] for order in ((1, 0), (0, 1))]
    shift = np.linalg.lstsq(np.stack(gradients, axis=1), difference[same], rcond=None)[0]
    assert np.abs(shift).max() < 0.02  # pixels
    assert np.median(np.abs(difference[same])) < 3.0


def test_the_disparity_of_a_rectified_stereo_pair_follows_from_the_depth(scene: Scene) -> None:
    camera, baseline = demo_camera(320, 240, distorted=False), 0.12
    left_pose = camera_path(1)[0]
    left, right = (scene.render(*pose, camera) for pose in (left_pose, stereo_right(left_pose, baseline)))
    rotation, translation = relative_motion(left, right)
    assert np.allclose(rotation, np.eye(3)) and np.allclose(translation, [baseline, 0, 0])
    y, x = np.nonzero(np.isfinite(left.depth))
    found = x - camera.matrix[0, 0] * baseline / left.depth[y, x]
    inside = found > 0
    below = right.depth[y[inside], np.floor(found[inside]).astype(int)]
    above = right.depth[y[inside], np.ceil(found[inside]).astype(int)]
    between = (np.minimum(below, above) * 0.999 <= left.depth[y, x][inside]) & (
        left.depth[y, x][inside] <= np.maximum(below, above) * 1.001
    )
    assert inside.mean() > 0.9 and between.mean() > 0.95


def test_the_sky_is_infinitely_far_and_turns_with_the_camera_only(scene: Scene) -> None:
    camera = demo_camera(160, 120)
    here, there = (scene.render(*look(place, 0.2, -1.2), camera) for place in ((0, 0, 1.5), (1, -1, 2.0)))
    assert np.isinf(here.depth).all()
    assert np.array_equal(here.image, there.image)


def test_a_lens_that_folds_the_image_over_itself_is_refused(scene: Scene) -> None:
    matrix = demo_camera(160, 120).matrix
    with pytest.raises(ValueError, match=r"no lens has this distortion: .*-3\.0"):
        scene.render(*camera_path(1)[0], Camera(160, 120, matrix, "plumb_bob", np.array([-3.0, 0, 0, 0, 0])))


# pictures


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_image(scene: Scene) -> None:
    camera, pose = demo_camera(160, 120), camera_path(1)[0]
    first = scene.render(*pose, camera, noise=2.0, noise_seed=7)
    again = Scene(seed=0).render(*pose, camera, noise=2.0, noise_seed=7)
    other = Scene(seed=1).render(*pose, camera, noise=2.0, noise_seed=7)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.depth, again.depth)
    assert np.abs(first.image.astype(int) - other.image).mean() > 5
    assert (first.depth == other.depth).mean() > 0.8  # the geometry is the same, except for leaves and hills


def test_a_scene_that_another_process_built_gives_the_same_bytes(scene: Scene) -> None:
    camera, pose = demo_camera(160, 120), camera_path(1)[0]
    received = pickle.loads(pickle.dumps(scene)).render(*pose, camera)
    assert np.array_equal(received.image, scene.render(*pose, camera).image)


def test_film_renders_the_poses_in_order_with_different_noise_in_each_view(scene: Scene) -> None:
    camera, poses = demo_camera(160, 120), camera_path(5)
    film = list(scene.film(poses, camera, noise=3.0, noise_seed=11))
    assert len(film) == 5
    for number, (pose, view) in enumerate(zip(poses, film)):
        assert np.array_equal(view.position, pose.position)
        assert np.array_equal(view.image, scene.render(*pose, camera, noise=3.0, noise_seed=11 + number).image)
    still = list(scene.film([poses[0]] * 2, camera, noise=3.0))
    assert not np.array_equal(still[0].image, still[1].image)


def test_noise_has_the_requested_strength(scene: Scene) -> None:
    camera, pose = demo_camera(320, 240), camera_path(1)[0]
    clean, noisy = scene.render(*pose, camera), scene.render(*pose, camera, noise=4.0)
    unclipped = (clean.image > 20) & (clean.image < 235)
    assert np.std((noisy.image.astype(float) - clean.image)[unclipped]) == pytest.approx(4.0, rel=0.02)


def test_there_is_texture_everywhere_but_in_the_sky(walk: list[View]) -> None:
    for view in walk[::3]:
        corners = cv2.goodFeaturesToTrack(grey(view), 3000, 0.01, 4).reshape(-1, 2).astype(int)
        assert len(corners) > 1000
        for top in range(0, 480, 80):
            for left in range(0, 640, 80):
                block = np.isfinite(view.depth[top : top + 80, left : left + 80])
                inside = (corners // 80 == (left // 80, top // 80)).all(axis=1)
                assert inside.sum() >= 3 or block.mean() < 0.5, (left, top)


def test_sift_and_ransac_recover_the_motion_of_consecutive_frames(walk: list[View], lens: Camera) -> None:
    sift, matcher = cv2.SIFT_create(1500), cv2.BFMatcher()
    features = [sift.detectAndCompute(grey(view), None) for view in walk]
    rotations, directions = [], []
    for one, other, (points0, words0), (points1, words1) in zip(walk, walk[1:], features, features[1:]):
        pairs = [m for m, second in matcher.knnMatch(words0, words1, k=2) if m.distance < 0.8 * second.distance]
        rays0 = lens.normalise(np.array([points0[m.queryIdx].pt for m in pairs]))
        rays1 = lens.normalise(np.array([points1[m.trainIdx].pt for m in pairs]))
        cv2.setRNGSeed(0)
        essential, inliers = cv2.findEssentialMat(rays1, rays0, np.eye(3), cv2.RANSAC, 0.9999, 0.7 / lens.focal)
        assert inliers.mean() > 0.7
        _, rotation, translation, _, _ = cv2.recoverPose(
            essential[:3], rays1, rays0, np.eye(3), distanceThresh=1e9, mask=inliers.copy()
        )
        true_rotation, true_translation = relative_motion(one, other)
        rotations.append(angle(rotation.T @ true_rotation))
        cosine = translation.ravel() @ true_translation / np.linalg.norm(true_translation)
        directions.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    assert max(rotations) < 0.5 and np.median(rotations) < 0.2  # degrees
    assert max(directions) < 10 and np.median(directions) < 3


# paths


def test_walking_moves_a_step_in_all_directions_and_turns_a_little() -> None:
    motions = [relative_motion(one, other) for one, other in itertools.pairwise(camera_path(120))]
    steps = np.array([translation for _, translation in motions])
    assert np.all((np.linalg.norm(steps, axis=1) > 0.24) & (np.linalg.norm(steps, axis=1) <= 0.25 + 1e-6))
    turns = np.array([angle(rotation) for rotation, _ in motions])
    assert turns.min() > 0.9 and turns.max() < 3.1
    towards = steps / np.linalg.norm(steps, axis=1)[:, None]
    assert towards[:, 0].min() < -0.9 and towards[:, 0].max() > 0.6  # to the left and to the right
    assert towards[:, 2].min() < -0.7 and towards[:, 2].max() > 0.7  # backwards and forwards


def test_rotating_and_standing_paths_have_no_translation() -> None:
    path = camera_path([("walk", 3), ("rotate", 26), ("still", 4), ("walk", 2)])
    assert len(path) == 35
    motions = [relative_motion(one, other) for one, other in itertools.pairwise(path)]
    for number, (rotation, translation) in enumerate(motions):
        walks, stands = number < 3 or number >= 33, 29 <= number < 33
        assert (np.linalg.norm(translation) > 0.2) == walks
        assert (angle(rotation) < 1e-6) == stands
        if 3 <= number < 29:
            assert 2 < angle(rotation) < 6


@pytest.mark.parametrize("motions", [[("fly", 3)], [("walk", -1)]])
def test_an_unknown_motion_is_refused(motions: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="walk"):
        camera_path(motions)


def test_yaw_turns_left_pitch_down_and_roll_clockwise() -> None:
    ahead, right = np.array([0, 0, 1.0]), np.array([1.0, 0, 0])
    assert np.allclose(look((0, 0, 0), 0).rotation @ ahead, [1, 0, 0])
    assert np.allclose(look((0, 0, 0), np.pi / 2).rotation @ ahead, [0, 1, 0])
    assert np.allclose(look((0, 0, 0), 0, np.pi / 2).rotation @ ahead, [0, 0, -1])
    assert np.allclose(look((0, 0, 0), 0, 0, np.pi / 2).rotation @ right, [0, 0, -1])
    assert relative_motion(look((1, 2, 3), 0.3), Pose(look((1, 2, 3), 0.3).rotation, np.array([1, 2, 4.0])))[1] == (
        pytest.approx([0, -1, 0])
    )
