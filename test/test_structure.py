"""Tests that one point of a static scene explains a track over several frames, or that the track has moved."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from two_view_scenes import CAMERA, DRONE, FISHEYE

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.structure import FRAMES, Structure, Window, sights

Array = NDArray[np.float64]

FOCAL = 500.0
NOISE = 0.3 / FOCAL


def turn(angle: float) -> Array:
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


def walk(frames: int, count: int, seed: int = 0) -> tuple[list[tuple[Array, Array]], Array]:
    """Return poses of cameras (x_world = R x + p), and rays of points: (F, 2, T) x/z and y/z with noise."""
    rng = np.random.default_rng(seed)
    points = np.stack([rng.uniform(-4, 4, count), rng.uniform(-3, 3, count), rng.uniform(4, 20, count)])
    poses = [(turn(0.01 * i), np.array([0.15 * i, 0.02 * i, 0.05 * i])) for i in range(frames)]
    seen = np.stack([rotation.T @ (points - position[:, None]) for rotation, position in poses])
    return poses, seen[:, :2] / seen[:, 2:] + rng.normal(0, NOISE, (frames, 2, count))


def even(rays: Array) -> Array:
    """Return the sights (F, 5, T) of a camera whose pixels all have the same angular size."""
    frames, _, count = rays.shape
    factors = np.broadcast_to(np.array([1.0, 0.0, 1.0], rays.dtype)[:, None], (frames, 3, count))
    return np.concatenate([rays, factors], axis=1)


def follow(poses: list[tuple[Array, Array]], rays: Array, unit: bool = True) -> Structure:
    """Return the structure from all frames, added one by one. Two views do not determine the length of a motion."""
    window, scene = Window.start(), None
    for i in range(1, len(poses)):
        (rotation0, position0), (rotation1, position1) = poses[i - 1 : i + 1]
        translation = rotation0.T @ (position1 - position0)
        motion = rotation0.T @ rotation1, translation / np.linalg.norm(translation) if unit else translation
        known = np.isfinite(rays[i - 1 : i + 1]).all(axis=(0, 1))
        scene = Structure.of(window, even(rays[max(0, i - len(window)) : i + 1])[:, :, known], motion, NOISE)
        window = scene.cameras.advance()
    assert scene is not None
    return scene


@pytest.mark.parametrize("frames", [3, 6, FRAMES + 4])
def test_static_points_are_contradicted_only_at_the_given_rate(frames: int) -> None:
    scenes = [follow(*walk(frames, 1000, seed)) for seed in range(6)]  # all points of a scene share its motion's errors
    assert all((scene.freedom == 2 * min(frames, FRAMES + 1) - 3).all() for scene in scenes)
    for rate in (0.05, 1e-2):
        assert 0.5 * rate < np.mean([scene.contradicts(rate).mean() for scene in scenes]) < 1.5 * rate


def test_points_that_slide_along_epipolar_lines_are_detected_over_several_frames() -> None:
    poses, rays = walk(6, 500)
    translation = poses[-1][1]
    along = rays - (translation[:2] / translation[2])[:, None]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    sliding = rays.copy()
    sliding[:, :, :50] += along[:, :, :50] * (3 / FOCAL) * (np.arange(6) % 2)[:, None, None]
    found = follow(poses, sliding).contradicts(1e-3)
    assert found[:50].mean() > 0.95 and found[50:].mean() < 0.01
    two_frames = follow(poses[-2:], sliding[-2:]).contradicts(1e-3)
    assert two_frames[:50].mean() < 0.2


def test_translation_lengths_are_chained_also_with_points_that_appeared_later() -> None:
    poses, rays = walk(6, 400)
    lengths = [0.5, 1.0, 2.0, 0.7, 1.3]
    start, positions = poses[0][1], [poses[0][1]]
    for (_, before), (_, now), length in zip(poses, poses[1:], lengths):
        positions.append(positions[-1] + length * (now - before))
    world = np.stack([rays[0, 0], rays[0, 1], np.ones(400)]) * np.random.default_rng(1).uniform(4, 20, 400)
    poses = [(rotation, position) for (rotation, _), position in zip(poses, positions)]
    seen = np.stack([rotation.T @ (world - position[:, None]) for rotation, position in poses])
    rays = seen[:, :2] / seen[:, 2:]
    rays[:3, :, ::2] = np.nan
    scene = follow(poses, rays)
    moved = [
        np.linalg.norm(a[1] - b[1])
        for a, b in zip(
            [(r.T, -r.T @ t) for r, t in zip(scene.cameras.rotations, scene.cameras.translations)],
            [(r.T, -r.T @ t) for r, t in zip(scene.cameras.rotations[1:], scene.cameras.translations[1:])],
        )
    ]
    wanted = np.array(lengths) * np.linalg.norm(poses[1][1] - start) / lengths[0]
    assert np.array(moved) / moved[0] == pytest.approx(wanted / wanted[0], rel=1e-4)
    assert scene.freedom[0] == 3 and scene.freedom[1] == 9


def test_the_noise_is_estimated_so_that_noisy_points_are_not_contradicted() -> None:
    poses, rays = walk(6, 1000)
    noisy = rays + np.random.default_rng(2).normal(0, 4 * NOISE, rays.shape)
    scene = follow(poses, noisy)
    assert scene.noise == pytest.approx(np.sqrt(17) * NOISE, rel=0.1)
    assert scene.contradicts(1e-3).mean() < 5e-3


def test_a_standing_camera_contradicts_nothing() -> None:
    rng = np.random.default_rng(3)
    rays = rng.uniform(-0.5, 0.5, (1, 2, 500)) + rng.normal(0, NOISE, (5, 2, 500))
    window = Window.start()
    for i in range(1, 5):
        scene = Structure.of(window, even(rays[: i + 1]), (np.eye(3), np.zeros(3)), NOISE)
        window = scene.cameras.advance()
    assert np.isfinite(scene.landmarks).all() and scene.contradicts(1e-3).mean() < 5e-3


def with_a_rest(rest: int, late: float) -> tuple[Array, Array]:
    """Return ten positions of cameras, ``rest`` more at the last one, and five on the way back, and sights of points.

    The fraction ``late`` of the points comes into view at a random time.
    """
    rng, count = np.random.default_rng(rest), 400
    ways = np.array([0.15 * i for i in (*range(10), *[9] * rest, *range(8, 3, -1))])
    positions = ways[:, None] * (1.0, 0.1, 0.0)
    points = np.stack([rng.uniform(-4, 6, count), rng.uniform(-3, 3, count), rng.uniform(4, 20, count)])
    local = points - positions[:, :, None]
    rays = local[:, :2] / local[:, 2:] + rng.normal(0, NOISE, (len(ways), 2, count))
    born = rng.integers(0, len(ways), count) * (rng.random(count) < late)
    rays = np.where((np.arange(len(ways))[:, None] < born)[:, None], np.nan, rays)
    return positions, even(rays)


@pytest.mark.parametrize("late", [0.0, 0.6])
@pytest.mark.parametrize("rest", [0, 3, 12, 60])
@pytest.mark.parametrize("metric", [False, True])
def test_the_unit_of_length_survives_a_rest_of_the_camera(metric: bool, rest: int, late: float) -> None:
    """The frames before the rest determine depths. What is seen during the rest is noise."""
    positions, seen = with_a_rest(rest, late)
    window, columns, scaled, steps = Window.start(), np.array([0]), [], []
    for i, step in enumerate(np.diff(positions, axis=0), start=1):
        columns = np.append(columns, i)
        known = np.isfinite(seen[i - 1 : i + 1, 0]).all(axis=0)
        length = np.linalg.norm(step)
        given = step if metric or not length else step / length
        scene = Structure.of(window, seen[columns][:, :, known], (np.eye(3), given), NOISE, metric)
        scaled.append(scene.scaled)
        if length:
            steps.append(np.linalg.norm(scene.cameras.translations[-1]) / length)
        gone = scene.spare()
        window = scene.cameras.advance(gone)
        columns = np.delete(columns, [gone] if len(columns) > FRAMES else [])
    assert len(window) == FRAMES
    assert all(scaled[1:]) and scaled[0] == metric  # two views do not determine the length of a motion
    assert np.array(steps) == pytest.approx(np.full(len(steps), steps[0]), rel=0.05)


@pytest.mark.parametrize("turns", [3, 12, 40])
@pytest.mark.parametrize("metric", [False, True])
def test_the_unit_of_length_is_lost_after_turning_to_other_points_unless_it_is_metric(metric: bool, turns: int) -> None:
    rng, count = np.random.default_rng(turns), 600
    points = np.stack([rng.uniform(-6, 6, count), rng.uniform(-3, 3, count), rng.uniform(4, 20, count)])
    ways = np.array([*range(8), *[7] * turns, 8]) * 0.3
    local = np.array([turn(0.02 * i).T @ (points - [[way], [0], [0]]) for i, way in enumerate(ways)])
    rays = local[:, :2] / local[:, 2:] + rng.normal(0, NOISE, (len(ways), 2, count))
    first = np.arange(count) < count // 2
    rays[9:, :, first] = rays[:8, :, ~first] = np.nan  # in frame 8, at the turning point, all are visible
    window, columns = Window.start(), np.array([0])
    for i, step in enumerate(np.diff(ways), start=1):
        columns = np.append(columns, i)
        known = np.isfinite(rays[i - 1 : i + 1, 0]).all(axis=0)
        given = turn(0.02 * (i - 1)).T @ (1.0 if step else 0.0, 0.0, 0.0) * (step if metric else 1.0)
        scene = Structure.of(window, even(rays[columns])[:, :, known], (turn(0.02), given), NOISE, metric)
        gone = scene.spare()
        window = scene.cameras.advance(gone)
        columns = np.delete(columns, [gone] if len(columns) > FRAMES else [])
    assert scene.scaled == metric
    assert np.linalg.norm(scene.cameras.translations[-1]) == pytest.approx(0.3 if metric else 1.0, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_tracks_with_random_earlier_positions_are_contradicted_and_do_not_change_the_motion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    poses, rays = walk(6, 200, seed)
    rays = rays.astype(np.float32)
    window = follow(poses[:-1], rays[:-1]).cameras.advance()
    (rotation0, position0), (rotation1, position1) = poses[-2:]
    translation = rotation0.T @ (position1 - position0)
    motion = rotation0.T @ rotation1, translation / np.linalg.norm(translation)
    without = Structure.of(window, even(rays)[:, :, 20:], motion, NOISE)
    rays[:-2, :, :20] = rng.uniform(-3, 3, (4, 2, 20))  # by least squares, some are behind a camera
    scene = Structure.of(window, even(rays), motion, NOISE)
    assert np.isfinite(scene.landmarks).all() and np.isfinite(scene.squares).all()
    contradicted = scene.contradicts(1e-3)
    assert contradicted[:20].all() and contradicted[20:].mean() < 0.03
    for ours, theirs in zip(scene.cameras, without.cameras):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # for values up to 4 m


@pytest.mark.parametrize("error", [0.05, 0.3])
@pytest.mark.parametrize("lens", [CAMERA, FISHEYE, DRONE], ids=["pinhole", "fisheye", "drone"])
def test_static_points_are_kept_everywhere_in_the_image(lens: Camera, error: float) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.uniform((0, 0), (lens.width, lens.height), (4000, 2))
    rays = np.column_stack([lens.normalise(pixels), np.ones(len(pixels))])
    rays = rays[np.isfinite(rays).all(axis=1)]
    points = rays / np.linalg.norm(rays, axis=1, keepdims=True) / rng.uniform(0.1, 0.5, (len(rays), 1))
    poses = [(turn(0.006 * i), np.array([0.05, 0.01, 0.08]) * i) for i in range(-FRAMES + 1, 2)]
    seen = []
    for rotation, position in poses:
        local = (points - position) @ rotation
        ahead = np.where(local[:, 2:] > 1e-3, local, np.nan)
        shown = lens.project(ahead[:, :2] / ahead[:, 2:])
        seen.append(sights(lens, shown + rng.normal(0, error, shown.shape)).T)
    tracks = np.array(seen)
    tracks = tracks[:, :, np.isfinite(tracks[-2:, 0]).all(axis=0)]
    before = Window(
        np.array([rotation.T for rotation, _ in poses[:-1]]),
        np.array([-rotation.T @ position for rotation, position in poses[:-1]]),
    )
    scene = Structure.of(before, tracks, poses[-1], error / lens.focal)
    assert scene.noise < 1.1 * error / lens.focal
    angles = np.degrees(np.arctan(np.hypot(*tracks[-1, :2])))
    for ring in (angles < 45, angles >= 45):
        assert not ring.any() or scene.contradicts(1e-2)[ring].mean() < 0.02


def test_a_scene_without_points_drops_its_oldest_camera() -> None:
    places = np.array([[0.1 * i, 0, 0] for i in range(FRAMES, -1, -1)])
    cameras = Window(np.stack([np.eye(3)] * (FRAMES + 1)), places)
    scene = Structure.of(
        Window(cameras.rotations[:-1], places[:-1]), np.zeros((FRAMES + 1, 5, 0)), (np.eye(3), places[0]), NOISE
    )
    assert scene.spare() == 0 and len(scene.cameras.advance(scene.spare())) == FRAMES
