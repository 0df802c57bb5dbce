"""Tests that the compiled functions for tracks give the results of NumPy and OpenCV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from compiled_geometry import needed, with_numpy
from track_fuzz import call_with_hostile_tracks, scene_of, views_of

from kpmatch_ros.geometry import compiled, flow
from kpmatch_ros.geometry.patches import cut, signed
from kpmatch_ros.geometry.structure import Structure, Window, motion_equations, place, triangulate
from kpmatch_ros.tracking.lost_tracks import largest_elsewhere
from kpmatch_ros.tracking.track_set import apart, attach, first_of_each_place


def assert_close(ours: Any, numpys: Any, tolerance: float) -> None:
    """Check that both agree within this fraction of the largest number of each array."""
    ours, numpys = np.asarray(ours), np.asarray(numpys)
    assert ours.shape == numpys.shape
    largest = np.abs(numpys).max(initial=0)
    # In a flat patch only the rounding of 128 grey levels remains, which differs with fused multiplications.
    np.testing.assert_allclose(ours, numpys, rtol=tolerance, atol=tolerance * largest if largest else 1e-4)


@needed
def test_points_are_triangulated_and_placed_as_by_numpy() -> None:
    for seed in range(200):
        random = np.random.default_rng(seed)
        cameras, landmarks, seen = scene_of(random)
        expected = random.uniform(0, 0.3, landmarks.shape[1]), random.uniform(0, 1, landmarks.shape[1])
        for arguments in ((cameras, seen, -2), (cameras, seen, -2, *expected)):
            for ours, numpys in zip(triangulate(*arguments), with_numpy(triangulate, *arguments)):
                # If the camera stands, only noise determines a depth, so the results agree less closely.
                assert_close(ours, numpys, 1e-3)
        # With a small determinant the rounding of float32 is relatively large: of 1/z times the noise of a ray.
        ours, numpys = (call(place, cameras, landmarks, seen, 1e-3) for call in (lambda f, *a: f(*a), with_numpy))
        assert np.array_equal(ours.freedom, numpys.freedom)
        assert_close(ours.squares, numpys.squares, 1e-3)


@needed
def test_the_motion_equations_agree_with_numpy() -> None:
    for seed in range(200):
        cameras, landmarks, seen = scene_of(np.random.default_rng(seed))
        arguments = cameras, landmarks, seen, 1e-6
        ours, numpys = motion_equations(*arguments), with_numpy(motion_equations, *arguments)
        for one, other in zip(ours, numpys):
            assert_close(one, other, 1e-3)


@needed
def test_a_structure_agrees_with_numpy() -> None:
    for seed in range(50):
        cameras, _, seen = scene_of(np.random.default_rng(seed))
        if seen.shape[2] < 20 or len(seen) < 4 or not cameras.translations.any():
            continue  # two frames do not determine the length of a translation
        window = Window(cameras.rotations[:-1], cameras.translations[:-1])
        motion = cameras.rotations[-1].T, -cameras.rotations[-1].T @ cameras.translations[-1]
        ours, numpys = Structure.of(window, seen, motion, 1e-3), with_numpy(Structure.of, window, seen, motion, 1e-3)
        assert_close(ours.cameras.rotations, numpys.cameras.rotations, 1e-5)
        assert_close(ours.cameras.translations, numpys.cameras.translations, 1e-3)
        assert ours.noise == pytest.approx(numpys.noise, rel=1e-3)
        assert (ours.contradicts(0.05) == numpys.contradicts(0.05)).mean() > 0.98


@needed
def test_optical_flow_agrees_with_opencv() -> None:
    steps: list[np.ndarray] = []
    for seed in range(300):
        one, other, points, start = views_of(np.random.default_rng(seed))
        furthest = np.full(len(points), 5.0)
        for call, arguments in (
            (flow.flow_near, (one[0], other[0], points, start, 3.0)),
            (flow.flow_far, (one, other, points, start)),
            (flow.flow_forth_and_back, (one, other, points, start, furthest)),
        ):
            ours, opencvs = call(*arguments), with_numpy(call, *arguments)
            if call is flow.flow_forth_and_back:
                (ours, there), (opencvs, too) = ours, opencvs
                assert (there != too).sum() <= 1
                ours, opencvs = ours[there & too], opencvs[there & too]
            assert ours.dtype == opencvs.dtype and ours.shape == opencvs.shape
            steps.append(np.abs(ours - opencvs).ravel())
    assert sum(map(len, steps[2::3])) > 1000
    # Sums of integers in another order: the iteration may stop earlier or later, within 0.02 pixels.
    each = np.concatenate(steps)
    assert np.median(each) < 1e-5 and np.percentile(each, 99.5) < 2e-3 and (each > 0.03).mean() < 2e-3


@needed
def test_optical_flow_between_images_of_two_sizes_is_left_to_opencv() -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (60, 80)).astype(np.uint8)
    pyramids = flow.pyramid(image), flow.pyramid(image[:50])
    points = random.uniform(10, 40, (20, 2)).astype(np.float32)
    assert np.array_equal(
        flow.flow_far(*pyramids, points, points), with_numpy(flow.flow_far, *pyramids, points, points)
    )


@needed
def test_patches_are_cut_as_by_numpy() -> None:
    for seed in range(100):
        (image, *_), _, points, _ = views_of(np.random.default_rng(seed))
        ours, numpys = cut(signed(image), points), with_numpy(cut, signed(image), points)
        assert ours.dtype == numpys.dtype and ours.shape == numpys.shape
        ends = np.cumsum([0, 85, 85, 85, 85, 85, 36, 6, 6, 2, 6, 6, 1, 4, 2, 2, 1])
        for begin, end in zip(ends, ends[1:]):  # each kind of number has its own magnitude
            assert_close(ours[:, begin:end], numpys[:, begin:end], 2e-3)


def scattered(random: np.random.Generator, count: int) -> np.ndarray:
    """Return points (N, 2), half of them on a grid."""
    points = random.uniform(0, random.choice([8.0, 200.0]), (count, 2))
    points[::2] = points[::2].round()
    return points.astype(np.float32)


@needed
def test_nearest_neighbours_agree_with_a_tree_search() -> None:
    for seed in range(300):
        random = np.random.default_rng(seed)
        points, others = (scattered(random, count) for count in random.integers(1, 150, 2))
        for distance in (1.0, 4.0):
            ours, trees = apart(points, others, distance), with_numpy(apart, points, others, distance)
            assert np.array_equal(ours, trees)
        detected = np.where(random.random(len(points)) < 0.3, random.integers(0, len(others), len(points)), -1)
        ours, trees = attach(points, detected, others), with_numpy(attach, points, detected, others)
        nearest = [np.linalg.norm(points - others[each], axis=1)[each >= 0] for each in (ours, trees)]
        assert np.array_equal(*nearest) or len(np.unique(others, axis=0)) < len(others)  # if two are at one place
        ids = random.integers(0, 40, len(points)).astype(np.uint64)
        scores = random.integers(0, 4, len(points)).astype(np.float32)
        ours, trees = (call(first_of_each_place, points, ids, scores) for call in (lambda f, *a: f(*a), with_numpy))
        assert np.array_equal(ours, trees)


@needed
def test_the_motion_expected_from_neighbours_agrees_with_numpy() -> None:
    for seed in range(300):
        random = np.random.default_rng(seed)
        points = random.uniform(0, 300, (int(random.integers(1, 200)), 2)).astype(np.float32)
        targets = points + random.normal(3, random.choice([0.0, 0.5, 20.0]), points.shape).astype(np.float32)
        targets[random.random(len(points)) < random.choice([0.0, 0.3, 1.0])] = np.nan
        rows = random.integers(0, len(points), 50)
        neighbours = flow.Neighbours(points, targets)
        for ours, numpys in zip(neighbours.expect(rows), with_numpy(neighbours.expect, rows)):
            assert ours.shape == numpys.shape
            np.testing.assert_allclose(ours, numpys, rtol=1e-5, atol=1e-4)


@needed
def test_the_largest_similarity_elsewhere_agrees_with_numpy() -> None:
    for seed in range(100):
        random = np.random.default_rng(seed)
        count, rows = random.integers(1, 200, 2)
        similar, points = random.uniform(-1, 1, (rows, count)).astype(np.float32), scattered(random, count)
        keypoints = random.integers(0, count, rows)
        numpys = with_numpy(largest_elsewhere, similar.copy(), points, keypoints)
        assert np.array_equal(largest_elsewhere(similar, points, keypoints), numpys)


@needed
def test_invalid_tracks_do_not_affect_the_others() -> None:
    for seed in range(200):
        with np.errstate(all="ignore"):
            call_with_hostile_tracks(np.random.default_rng(seed))


IMAGE, POINTS = np.zeros((9, 9), np.uint8), np.zeros((1, 2), np.float32)


@needed
@pytest.mark.parametrize(
    "call",
    [
        lambda: compiled.follow([], [], POINTS, POINTS, 13),
        lambda: compiled.follow([IMAGE], [IMAGE[1:]], POINTS, POINTS, 13),
        lambda: compiled.follow([IMAGE, IMAGE], [IMAGE], POINTS, POINTS, 13),
        lambda: compiled.follow([IMAGE], [IMAGE], POINTS, POINTS[:0], 13),
        lambda: compiled.follow([IMAGE], [IMAGE], POINTS, POINTS, 15),
        lambda: compiled.nearest(POINTS, POINTS[:, :1], 1.0),
        lambda: compiled.first_of_each_place(POINTS, 1.0, np.zeros(2), np.zeros(1)),
        lambda: compiled.neighbours(POINTS, np.zeros(1, bool), np.zeros((7, 2)), np.zeros((7, 2))),
        lambda: compiled.largest_elsewhere(np.zeros((1, 2)), POINTS, POINTS, 1.0),
        lambda: compiled.place(Window.start(), np.zeros((3, 4)), np.zeros((2, 5, 4))),
        lambda: compiled.place(Window.start(), np.zeros((3, 5)), np.zeros((1, 5, 4))),
        lambda: compiled.triangulate(Window.start(), np.zeros((1, 5, 4)), 1, 0.0, 0.0),
        lambda: compiled.cut(np.zeros((20, 2**16)), np.zeros((2, 85)), POINTS),
    ],
)
def test_mismatched_arrays_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"shape|levels|window|frame|side|few"):
        call()
