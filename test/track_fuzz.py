"""Fuzz tests of the compiled functions for tracks (structure, optical flow, cutting patches).

This imports only the geometry, and not pytest, because it runs with a library built to stop at undefined behaviour.
"""

from __future__ import annotations

import cv2
import numpy as np

from kpmatch_ros.geometry import compiled, flow
from kpmatch_ros.geometry.patches import cut, signed
from kpmatch_ros.geometry.structure import FRAMES, Window, motion_equations, place, triangulate

# No tracks, a few, and numbers that fill the blocks of the C code exactly or nearly.
COUNTS = (0, 1, 2, 7, 63, 64, 65, 200)
NUMBERS = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 1e20, 0.0, 2.0**31, -(2.0**31)]


def scene_of(random: np.random.Generator) -> tuple[Window, np.ndarray, np.ndarray]:
    """Return cameras, points (3, T) as x/z, y/z, 1/z of the last camera but one, and sights (F, 5, T) float32."""
    frames, count = int(random.integers(2, FRAMES + 2)), int(random.choice(COUNTS))
    steps = random.normal(0, random.choice([0.0, 0.1, 1.0]), (frames, 3))
    steps[-2] = 0
    turns = [cv2.Rodrigues(angle)[0] for angle in random.normal(0, 0.05, (frames, 3, 1))]
    turns[-2] = np.eye(3)
    cameras = Window(np.array(turns), steps)
    landmarks = np.concatenate([random.uniform(-0.6, 0.6, (2, count)), random.uniform(0.02, 0.3, (1, count))])
    seen = cameras.rotations @ np.concatenate([landmarks[:2], np.ones((1, count))]) + steps[:, :, None] * landmarks[2]
    rays = seen[:, :2] / seen[:, 2:] + random.normal(0, 1e-3, (frames, 2, count))
    rays[:-2].transpose(0, 2, 1)[random.random((frames - 2, count)) < 0.3] = np.nan
    factors = random.uniform([[0.3], [-0.5], [0.3]], [[1.2], [0.5], [1.2]], (frames, 3, count))
    return cameras, landmarks.astype(np.float32), np.concatenate([rays, factors], axis=1).astype(np.float32)


def views_of(random: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Return pyramids of two images of any size, points (T, 2) in the first, and approximate points in the second."""
    height, width = random.integers(1, random.choice([30, 100, 300]), 2)
    noise = random.integers(0, 256, (height + 8, width + 8)).astype(np.uint8)
    scene = cv2.normalize(
        cv2.GaussianBlur(noise, (0, 0), random.choice([0.8, 1.5, 3.0])), None, 0, 255, cv2.NORM_MINMAX
    )
    down, right = random.integers(0, 8, 2)
    images = [np.ascontiguousarray(scene[y:, x:][:height, :width]) for y, x in ((0, 0), (down, right))]
    points = random.uniform(-30, (width + 30, height + 30), (int(random.integers(0, 40)), 2))
    start = points - (right, down) + random.normal(0, random.choice([0.5, 4.0]), points.shape)
    levels = int(random.integers(1, 4))
    return *(flow.pyramid(each)[:levels] for each in images), points.astype(np.float32), start.astype(np.float32)


def spoil(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a copy with some values that cannot come from an image."""
    spoilt = random.random(values.shape) < random.choice([0.0, 0.02, 0.5])
    return np.where(spoilt, random.choice(NUMBERS, values.shape), values).astype(values.dtype)


def call_with_hostile_tracks(random: np.random.Generator) -> None:
    """Check that invalid tracks do not change the results of the others."""
    cameras, landmarks, seen = scene_of(random)
    hostile = spoil(landmarks, random), spoil(seen, random)
    sound = [(now == before) | (np.isnan(now) & np.isnan(before)) for now, before in zip(hostile, (landmarks, seen))]
    same = sound[0].all(axis=0) & sound[1].all(axis=(0, 1))
    for ours, clean in (
        *zip(triangulate(cameras, hostile[1], -2), triangulate(cameras, seen, -2)),
        (place(cameras, *hostile, 1e-3).landmarks, place(cameras, landmarks, seen, 1e-3).landmarks),
        (place(cameras, *hostile, 1e-3).squares, place(cameras, landmarks, seen, 1e-3).squares),
    ):
        assert np.array_equal(ours[..., same], clean[..., same])
    for turned in (cameras, Window(spoil(cameras.rotations, random), spoil(cameras.translations, random))):
        motion_equations(turned, *hostile, 1e-6)
        place(turned, *hostile, 1e-3)
        triangulate(
            turned, hostile[1], prior=spoil(landmarks[2], random), prior_information=spoil(landmarks[2], random)
        )

    points, start = (spoil(random.uniform(0, 99, (int(random.choice(COUNTS)), 2)), random) for _ in range(2))
    distances, which = compiled.nearest(points, start, 3.0)
    assert ((distances < 3) == (which < len(start))).all() and (which >= 0).all() and (which <= len(start)).all()
    ages = np.arange(len(points), dtype=np.uint64)
    compiled.first_of_each_place(points, 1.0, ages, points[:, 0])
    if len(start) > 7:
        compiled.neighbours(points, points[:, 0] > 50, start, spoil(start, random))
    compiled.largest_elsewhere(spoil(points @ start.T, random), start, points, 8.0)

    one, other, points, start = views_of(random)
    points, start = spoil(points, random), spoil(start, random)
    moved = flow.flow_far(one, other, points, start)
    furthest = np.full(len(points), 5.0)
    there, good = flow.flow_forth_and_back(one, other, points, moved, furthest)
    assert np.isfinite(there[good]).all() and there.shape == points.shape
    assert np.array_equal(flow.flow_far(one, other, points, start), moved, equal_nan=True)
    flow.flow_near(one[0], other[0], points, start, 3.0)
    patches = cut(signed(one[0]), points)
    assert np.isfinite(patches).all() and patches.shape == (len(points), 497)
