"""Tests that tracks are followed with subpixel accuracy, end if their first patch does not fit, and are found again."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kpmatch_ros.frames import Frame, RightImage
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.refinement import normalize_contrast
from kpmatch_ros.tracking.tracks import NOT_DETECTED, Links, Tracks, View, keypoint_sigma, refine_pair

Texture = Callable[[int, int, int], NDArray[np.uint8]]

SIZE = 160
NO_MATCHES = (np.zeros((0, 2), np.int64), np.zeros(0, np.float32))


@pytest.fixture(scope="module")
def picture(texture: Texture) -> NDArray[np.uint8]:
    return texture(SIZE + 100, SIZE + 100, 3)


def grid(spacing: int = 20) -> NDArray[np.float32]:
    side = np.arange(20, SIZE - 19, spacing, dtype=np.float32)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)


def view(picture: NDArray[np.uint8], shift: int, keypoints: NDArray[np.float32] | None = None) -> View:
    """Return the picture from a place: its points are `shift` pixels further left than in the view from 0."""
    points = np.zeros((0, 2), np.float32) if keypoints is None else keypoints
    image = np.ascontiguousarray(picture[50 : 50 + SIZE, 50 + shift : 50 + shift + SIZE])
    return View(normalize_contrast(image), points, np.eye(len(points), 128, dtype=np.float32), 1.0)


def identity(count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.repeat(np.arange(count)[:, None], 2, axis=1), np.full(count, 0.9, np.float32)


def error(links: Links, shift: float) -> NDArray[np.float64]:
    return np.linalg.norm(links.points - links.reference_points + (shift, 0), axis=1)


def test_matched_keypoints_are_refined(picture: NDArray[np.uint8]) -> None:
    rng, points = np.random.default_rng(0), grid()
    jittered = (points - (7, 0) + rng.uniform(-1, 1, points.shape)).astype(np.float32)
    tracks = Tracks(100, 0)
    links = tracks.follow(view(picture, 0, points), view(picture, 7, jittered), *identity(len(points)))
    assert links.track_ids.tolist() == list(range(1, len(points) + 1))
    assert np.array_equal(links.indices, identity(len(points))[0]) and (links.scores == np.float32(0.9)).all()
    assert error(links, 7).max() < 0.05
    assert (links.sigmas > 0).all() and links.sigmas.max() < 0.1


def test_pair_sigmas_combine_the_errors_in_both_images(picture: NDArray[np.uint8]) -> None:
    points, tracks = grid(), Tracks(100, 0)
    first, second, third = view(picture, 0, points), view(picture, 3), view(picture, 6)
    new = tracks.follow(first, second, *NO_MATCHES)
    np.testing.assert_allclose(new.pair_sigmas, new.sigmas, rtol=1e-5)  # the patch is from the first image
    tracks.advance(second, None)
    old = tracks.follow(second, third, *NO_MATCHES)
    both = np.hypot(new.sigmas[np.isin(new.track_ids, old.track_ids)], old.sigmas)
    assert (old.pair_sigmas < 1.001 * both).all()  # less if the previous image contributes more than the first patch
    assert np.isclose(old.pair_sigmas, both, rtol=1e-3).mean() > 0.9


def test_points_without_a_match_are_tracked_from_their_last_position(picture: NDArray[np.uint8]) -> None:
    points, tracks = grid(), Tracks(100, 0)
    before = tracks.follow(first := view(picture, 0, points), second := view(picture, 3), *NO_MATCHES)
    assert len(before.points) == len(points) and (before.indices[:, 1] == NOT_DETECTED).all()
    assert error(before, 3).max() < 0.05 and before.scores.min() > 0.9
    tracks.advance(second, None)
    after = tracks.follow(second, view(picture, 6), *NO_MATCHES)
    kept = np.isin(before.track_ids, after.track_ids)
    assert kept.sum() >= 0.9 * len(points) and first is not second
    assert np.array_equal(after.reference_points, before.points[kept])
    assert np.array_equal(after.track_ids, before.track_ids[kept])


def test_a_lowered_limit_of_tracks_applies_from_the_next_frame(
    picture: NDArray[np.uint8],
) -> None:
    tracks, views = Tracks(100, 0), [view(picture, 3 * number, grid() - (3 * number, 0)) for number in range(3)]
    before = tracks.follow(views[0], views[1], *NO_MATCHES)
    tracks.advance(views[1], None)
    tracks.limit = 10
    after = tracks.follow(views[1], views[2], *NO_MATCHES)
    assert len(before.points) > 10 == len(after.points)
    assert np.isin(after.track_ids, before.track_ids).all()  # instead of new ones


def test_a_track_ends_if_its_surroundings_no_longer_look_the_same(picture: NDArray[np.uint8], texture: Texture) -> None:
    points, found, right = grid(), 0, 0
    for seed in range(11, 21):
        image = view(picture, 0).normalized.copy()
        image[:, SIZE // 2 :] = normalize_contrast(texture(SIZE, SIZE // 2, seed))
        now = View(image, points[:0], np.zeros((0, 128)), 1.0)
        links = Tracks(100, 0).follow(view(picture, 0, points), now, *NO_MATCHES)
        left = points[:, 0] < SIZE // 2 - 10
        assert {tuple(point) for point in links.reference_points} >= {tuple(point) for point in points[left]}
        found += (links.reference_points[:, 0] > SIZE // 2 + 8).sum()
        right += (points[:, 0] > SIZE // 2 + 8).sum()
    assert found < 0.08 * right  # places that look similar by chance


def test_a_lost_track_is_found_again_under_its_old_id(picture: NDArray[np.uint8]) -> None:
    points, black = grid(), View(np.full((SIZE, SIZE), 128, np.uint8), grid()[:0], np.zeros((0, 128)), 1.0)
    for memory in (0, 20, 100):
        tracks = Tracks(100, memory)
        start = view(picture, 0, points)
        same = tracks.follow(start, start, *identity(len(points)))
        tracks.advance(start, None)
        assert not len(tracks.follow(start, black, *NO_MATCHES).points)
        tracks.advance(black, None)
        assert not len(tracks.follow(black, start, *NO_MATCHES).points)
        tracks.advance(start, None)
        links = tracks.follow(start, start, *identity(len(points)))
        old = links.track_ids <= same.track_ids.max()
        assert old.sum() == min(memory, len(points))
        where = dict(zip(same.track_ids.tolist(), same.points.tolist()))
        found = [where[track] for track in links.track_ids[old].tolist()]
        assert np.abs(links.points[old] - np.reshape(found, (-1, 2))).max(initial=0) < 0.05


def test_a_lost_track_is_found_again_at_a_keypoint_beside_it(picture: NDArray[np.uint8]) -> None:
    points, black = grid(10), View(np.full((SIZE, SIZE), 128, np.uint8), grid()[:0], np.zeros((0, 128)), 1.0)
    start, tracks = view(picture, 0, np.random.default_rng(0).permutation(points)[:60]), Tracks(100, 100)
    same = tracks.follow(start, start, *identity(60))
    tracks.advance(start, None)
    tracks.follow(start, black, *NO_MATCHES)
    tracks.advance(black, None)
    angle = np.random.default_rng(1).uniform(0, 2 * np.pi, 60)
    beside = (start.keypoints + 1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)
    again = replace(start, keypoints=beside)
    tracks.follow(black, again, *NO_MATCHES)
    tracks.advance(again, None)
    links = tracks.follow(again, start, *NO_MATCHES)
    old = np.isin(links.track_ids, same.track_ids)
    where = dict(zip(same.track_ids.tolist(), same.points.tolist()))
    assert old.sum() >= 57
    assert np.abs(links.points[old] - [where[track] for track in links.track_ids[old].tolist()]).max() < 0.1


def test_a_track_that_contradicts_the_motion_is_not_found_again_in_the_same_image(picture: NDArray[np.uint8]) -> None:
    points, tracks, start = grid(), Tracks(100, 100), view(picture, 0, grid())
    first = tracks.follow(start, start, *identity(len(points)))
    inliers = np.arange(len(points)) % 3 > 0
    tracks.advance(start, inliers)
    second = tracks.follow(start, start, *identity(len(points)))
    assert set(second.track_ids) & set(first.track_ids) == set(first.track_ids[inliers])


def test_a_track_that_contradicts_the_motion_is_found_again_in_a_later_image(picture: NDArray[np.uint8]) -> None:
    points, tracks, start = grid(), Tracks(100, 100), view(picture, 0, grid())
    inliers = np.arange(len(points)) % 3 > 0
    part = replace(start, keypoints=points[inliers], descriptors=start.descriptors[inliers])
    first = tracks.follow(start, part, *NO_MATCHES)
    tracks.advance(part, inliers)
    assert len(tracks.follow(part, start, *NO_MATCHES).points) == inliers.sum()
    tracks.advance(start, None)
    assert set(tracks.follow(start, start, *NO_MATCHES).track_ids) == set(first.track_ids)


def test_a_track_is_found_again_by_its_latest_descriptor(picture: NDArray[np.uint8]) -> None:
    points, tracks, start = grid(), Tracks(100, 100), view(picture, 0, grid())
    black = View(np.full((SIZE, SIZE), 128, np.uint8), points[:0], np.zeros((0, 128)), 1.0)
    later = replace(start, descriptors=start.descriptors[::-1])
    first = tracks.follow(start, later, *identity(len(points)))
    for before, now in itertools.pairwise([later, black, later]):
        tracks.advance(before, None)
        tracks.follow(before, now, *NO_MATCHES)
    tracks.advance(later, None)
    assert set(tracks.follow(later, later, *identity(len(points))).track_ids) >= set(first.track_ids)


def test_tracks_that_are_found_again_do_not_exceed_the_limit(picture: NDArray[np.uint8]) -> None:
    points, tracks = grid(), Tracks(30, 100)
    parts = [view(picture, 0, half) for half in (points[:25], points[25:])]
    parts[1] = replace(parts[1], descriptors=np.eye(len(points), 128, dtype=np.float32)[25:])
    both = view(picture, 0, points)
    tracks.follow(parts[0], parts[1], *NO_MATCHES)
    tracks.advance(parts[1], np.arange(25) < 20)  # five are lost, and ten begin
    assert len(tracks.follow(parts[1], both, *NO_MATCHES).points) == 30
    tracks.advance(both, None)
    assert len(tracks.follow(both, both, *NO_MATCHES).points) == 30


def test_the_memory_of_ended_tracks_is_freed(picture: NDArray[np.uint8]) -> None:
    points, tracks, start = grid(), Tracks(100, 20), view(picture, 0, grid())
    half = np.arange(len(points)) % 2 > 0
    taken = []
    tracemalloc.start()
    for number in range(80):
        links = tracks.follow(start, start, *identity(len(points)))
        tracks.advance(start, half if len(links.points) == len(half) else None)
        if number % 40 == 39:
            taken.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert taken[1] - taken[0] < 500_000  # bytes; forty times 25 new tracks of 1.2 kB each would be over twice as much


@pytest.mark.parametrize("alike", [0.9, 0.2])
def test_unrefined_keypoints_are_used_only_if_most_of_the_image_has_changed(
    picture: NDArray[np.uint8], texture: Texture, alike: float
) -> None:
    points = grid()
    changed = np.flatnonzero(points[:, 0] > alike * SIZE)  # the image has changed there
    first, now = view(picture, 0, points), view(picture, 0, points)
    image = now.normalized.copy()
    image[:, round(alike * SIZE) - 8 :] = normalize_contrast(texture(SIZE, SIZE, 11))[:, round(alike * SIZE) - 8 :]
    links = Tracks(100, 0).follow(first, replace(now, normalized=image), *identity(len(points)))
    there = np.isin(links.indices[:, 0], changed)
    if alike > 0.5:
        assert not there.any() and links.refined.all()
        return
    bare = there & ~links.refined
    assert bare.sum() > 0.5 * len(changed) and np.array_equal(links.points[bare], points[links.indices[bare, 1]])
    assert links.sigmas[bare] == pytest.approx(keypoint_sigma(1.0)) == links.pair_sigmas[bare]


@pytest.mark.parametrize("across", [False, True])
def test_the_number_of_tracks_is_limited_and_new_ones_start_in_empty_areas(
    picture: NDArray[np.uint8], across: bool
) -> None:
    points, tracks = grid(10), Tracks(40, 0)
    full = points[points[:, 0 if across else 1] < 70]
    first, second = view(picture, 0, full[np.linspace(0, len(full) - 1, 30).astype(int)]), view(picture, 0, points)
    assert len(tracks.follow(first, second, *NO_MATCHES).points) == 30
    tracks.advance(second, None)
    links = tracks.follow(second, second, *identity(len(points)))
    assert len(links.points) == 40
    new = links.track_ids > 30
    cells = {(int(x) // 40, int(y) // 40) for x, y in links.points[new]}
    assert new.sum() == 10 and len(cells) == 8  # all free cells
    assert (links.points[new][:, 0 if across else 1] > 70).all()


def test_tracks_survive_a_slow_change_of_the_scene_with_patches_of_the_previous_frame(
    picture: NDArray[np.uint8], texture: Texture
) -> None:
    points, tracks, other = grid(), Tracks(100, 0), texture(SIZE + 100, SIZE + 100, 11)
    views = [view((picture * (1 - part) + other * part).astype(np.uint8), 2 * k, points if k == 0 else None)
             for k, part in enumerate(np.linspace(0, 1, 9))]  # fmt: skip
    spreads, steps = [], []
    for before, now in itertools.pairwise(views):
        links = tracks.follow(before, now, *NO_MATCHES)
        tracks.advance(now, None)
        spreads.append(np.median(links.sigmas))
        steps.append(np.median(links.pair_sigmas))
    assert len(links.points) >= 0.95 * len(points) and links.refined.all() and links.track_ids.max() == len(points)
    # The errors of the steps accumulate. A new patch adds 0.3 pixels; flow, the only alternative, would add 0.7.
    assert spreads[0] < 0.1 < spreads[3] < 0.6 and spreads[-1] < 1.0
    assert max(steps) < 0.5 * spreads[-1] and links.pair_sigmas.min() > 0


def test_the_same_images_give_the_same_tracks(picture: NDArray[np.uint8]) -> None:
    found = []
    for _ in range(2):
        tracks, points = Tracks(100, 100), grid()
        frames = [view(picture, 4 * i, points) for i in range(4)]
        for one, other in zip(frames, frames[1:]):
            links = tracks.follow(one, other, *identity(len(points)))
            tracks.advance(other, None)
        found.append(links)
    for name in ("indices", "points", "reference_points", "sigmas", "scores", "track_ids"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_calibrated_camera_without_translation_finds_lost_tracks_without_keypoints(
    picture: NDArray[np.uint8], calibrated: bool
) -> None:
    # In this case all depths are equal, and none differs from infinity.
    tracks, start = Tracks(200, 200), view(picture, 0, np.random.default_rng(0).permutation(grid(10))[:60])
    lower, camera = start.keypoints[:, 1] >= 60, CAMERA if calibrated else None
    detected = np.flatnonzero(~lower | (np.arange(60) % 2 == 0))
    part = replace(start, keypoints=start.keypoints[detected], descriptors=start.descriptors[detected])
    hidden = replace(start, keypoints=start.keypoints[~lower], descriptors=start.descriptors[~lower])
    hidden = replace(hidden, mask=np.arange(SIZE)[:, None].repeat(SIZE, axis=1) < 60)
    found = []
    for before, now in itertools.pairwise([start, start, start, hidden, part, start]):
        same = [np.flatnonzero((before.keypoints == point).all(axis=1)) for point in now.keypoints]
        matches = np.array([(one[0], k) for k, one in enumerate(same) if len(one)])
        links = tracks.follow(before, now, matches, np.full(len(matches), 0.9, np.float32))
        still = replace(sideways(len(links.points), PoseStatus.NO_TRANSLATION), translation=np.zeros(3))
        links, pose = tracks.settle(now, (camera, camera), links, still)
        tracks.advance(now, pose.inliers)
        found.append(set(links.track_ids.tolist()))
    assert len(found[0]) == 60 and len(found[2]) == np.count_nonzero(~lower)
    assert len(found[4] & found[0]) == (60 if calibrated else len(detected))


def test_left_and_right_are_refined(picture: NDArray[np.uint8]) -> None:
    points = grid()
    jittered = (points - (5, 0) + np.random.default_rng(1).uniform(-1, 1, points.shape)).astype(np.float32)
    refined, sigmas = refine_pair(view(picture, 0, points), view(picture, 5, jittered), points, jittered)
    assert np.linalg.norm(refined - points + (5, 0), axis=1).max() < 0.05 and sigmas.max() < 0.1


def test_the_sigma_of_an_unrefined_stereo_match_combines_both_keypoint_errors(
    picture: NDArray[np.uint8], texture: Texture
) -> None:
    points, other = grid(), normalize_contrast(texture(SIZE, SIZE, 11))
    right = View(other, points, np.eye(len(points), 128, dtype=np.float32), 2.0)
    _, sigmas = refine_pair(view(picture, 0, points), right, points, points)
    assert np.median(sigmas) == pytest.approx(np.sqrt(2) * keypoint_sigma(2.0))


def test_a_left_image_is_normalised_once(picture: NDArray[np.uint8]) -> None:
    nothing: Any = None
    left = Frame(1, 1, picture, "left", None, nothing, grid(), np.zeros(49, np.uint64), 0.0)
    normalized = left.normalized
    both = left.with_right(RightImage(None, grid(), grid(), normalized))
    assert both.normalized is normalized and both.right is not None and left.right is None


def test_images_of_any_size_and_keypoints_anywhere_give_points_in_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        tracks, before = Tracks(60, 50), None
        for _ in range(4):
            height, width = rng.integers(1, 80, 2)
            image = rng.integers(0, 256, (height, width)) * (rng.random() < 0.8)
            count = int(rng.integers(0, 80))
            keypoints = np.stack([rng.uniform(0, side - 1, count) for side in (width, height)], axis=1)
            descriptors = rng.normal(size=(count, 16)).astype(np.float32)
            descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
            now = View(normalize_contrast(image.astype(np.uint8)), keypoints.astype(np.float32), descriptors, 1.0)
            if before is not None:
                matched = int(rng.integers(0, min(count, len(before.keypoints)) + 1))
                sides = (len(before.keypoints), count)
                matches = np.stack([rng.permutation(side)[:matched] for side in sides], axis=1)
                links = tracks.follow(before, now, matches, rng.random(matched).astype(np.float32))
                assert (links.points >= 0).all() and (links.points <= (width - 1, height - 1)).all()
                assert (links.sigmas > 0).all() and np.isfinite(links.sigmas).all()
                assert (links.scores >= 0).all() and (links.scores <= 1).all()
                tracks.advance(now, rng.random(len(links.points)) < 0.8 if rng.random() < 0.7 else None)
            before = now


def test_a_track_ends_under_a_mask(picture: NDArray[np.uint8]) -> None:
    points, tracks = grid(), Tracks(100, 0)
    mask = np.ones((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 0
    plain = view(picture, 3)
    hidden = View(plain.normalized, plain.keypoints, plain.descriptors, 1.0, mask)
    links = tracks.follow(view(picture, 0, points), hidden, *NO_MATCHES)
    assert len(links.points) == (points[:, 0] > SIZE // 2 + 3).sum() and (links.points[:, 0] > SIZE // 2 - 0.5).all()


CAMERA = Camera(SIZE, SIZE, np.array([[200.0, 0, SIZE / 2], [0, 200.0, SIZE / 2], [0, 0, 1]]), "", np.zeros(0))


def sideways(count: int, status: PoseStatus = PoseStatus.OK) -> RelativePose:
    """Return a motion to the right with which all links agree."""
    inliers = np.ones(count, bool)
    return RelativePose(status, np.eye(3), np.array([1.0, 0, 0]), np.zeros((6, 6)), False, count, count, 0.0, inliers)


def with_patch(picture: NDArray[np.uint8], texture: Texture, shift: int, patch_shift: int) -> View:
    """Return the picture from a place, with a patch in front of it that is further left by `patch_shift`."""
    image = np.ascontiguousarray(picture[50 : 50 + SIZE, 50 + shift : 50 + shift + SIZE])
    image[60:101, 100 - patch_shift : 141 - patch_shift] = texture(41, 41, 5)
    return View(normalize_contrast(image), np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32), 1.0)


def walk_with_patch(
    picture: NDArray[np.uint8], texture: Texture, shifts: list[int], cameras: tuple[Camera | None, Camera | None]
) -> tuple[list[Links], Tracks, NDArray[np.uint64]]:
    """Return the links of each frame, and the tracks on the patch, which has ``shifts``. The picture moves 2 per frame.

    Points that are not on the patch have no matches. The patch's keypoints are matched in all frames but the last.
    """
    points, tracks = np.concatenate([grid(), np.float32([[115, 75], [125, 85], [115, 85], [125, 75]])]), Tracks(100, 0)
    on_piece = np.arange(len(points) - 4, len(points))
    views = [with_patch(picture, texture, 2 * i, shift) for i, shift in enumerate(shifts)]
    keypoints = [
        np.where(np.isin(np.arange(len(points)), on_piece)[:, None], points - (shift, 0), points - (2 * i, 0))
        for i, shift in enumerate(shifts)
    ]
    views = [
        replace(one, keypoints=places.astype(np.float32), descriptors=np.eye(len(points), 128))
        for one, places in zip(views, keypoints)
    ]
    found, piece = [], np.zeros(0, np.uint64)
    for i in range(1, len(shifts)):
        last = i == len(shifts) - 1
        matches = np.repeat(on_piece[:, None], 2, axis=1)[: 0 if last else None]
        now = (
            replace(views[i], keypoints=views[i].keypoints[:0], descriptors=views[i].descriptors[:0])
            if last
            else views[i]
        )
        links = tracks.follow(views[i - 1], now, matches, np.full(len(matches), 0.9, np.float32))
        links, pose = tracks.settle(now, cameras, links, sideways(len(links.points)))
        assert pose.num_matches == len(links.points) == len(pose.inliers)
        if i == 1:
            piece = links.track_ids[np.isin(links.indices[:, 0], on_piece)]
        tracks.advance(now, pose.inliers)
        found.append(links)
    return found, tracks, piece


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_track_that_no_static_point_explains_ends(
    picture: NDArray[np.uint8], texture: Texture, calibrated: bool
) -> None:
    cameras = (CAMERA, CAMERA) if calibrated else (None, None)
    found, _, piece = walk_with_patch(picture, texture, [0, 6, 12, 18, 24], cameras)
    assert len(piece) == 4 and all(np.isin(piece, links.track_ids).all() for links in found)
    found, _, piece = walk_with_patch(picture, texture, [0, 6, 12, 6, 8], cameras)
    assert all(np.isin(piece, links.track_ids).all() for links in found[:2])
    assert np.isin(piece, found[2].track_ids).any() != calibrated
    others = np.setdiff1d(found[0].track_ids, piece)
    assert np.isin(others, found[2].track_ids).mean() > 0.8


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_track_with_misleading_neighbours_is_found_by_its_depth(
    picture: NDArray[np.uint8], texture: Texture, calibrated: bool
) -> None:
    cameras = (CAMERA, CAMERA) if calibrated else (None, None)
    found, _, piece = walk_with_patch(picture, texture, [0, 20, 40, 60], cameras)
    last = np.isin(found[2].track_ids, piece)
    right = last & (error(found[2], 20) < 0.2)
    assert right.sum() == last.sum() == 4 if calibrated else right.sum() < 2
    assert found[2].refined[right].all() and (found[2].sigmas[right] < 0.2).all()


def test_a_recovered_track_replaces_a_contradicted_track_at_the_same_place(picture: NDArray[np.uint8]) -> None:
    scene, (there, elsewhere) = picture.copy(), np.float32([[75, 75], [115, 95]])  # two places that look alike
    for x, y in np.int64([there, elsewhere]):
        scene[y + 40 : y + 61, x + 40 : x + 61] = picture[:21, :21]
    tracks = Tracks(100, 0)
    first = view(scene, 0, np.concatenate([grid(), there[None]]))
    second = view(scene, 2, np.stack([there, elsewhere]) - np.float32([2, 0]))
    scene[130:161, 150:181] = picture[100:131, 100:131]
    third = view(scene, 4, np.stack([there - np.float32([4, 0]), np.float32([30, 90])]))
    links = tracks.follow(first, second, *NO_MATCHES)
    links, _ = tracks.settle(second, (CAMERA, CAMERA), links, sideways(len(links.points)))
    tracks.advance(second, None)
    # The matcher confuses the first one, which is now hidden, with the other, and the other with something else.
    links = tracks.follow(second, third, np.array([[0, 1], [1, 0]]), np.full(2, 0.9, np.float32))
    agree = np.linalg.norm(links.points - links.reference_points + (2, 0), axis=1) < 1
    assert np.count_nonzero(~agree) == 2
    links, pose = tracks.settle(third, (CAMERA, CAMERA), links, sideways(len(links.points)).for_matches(agree))
    here = np.linalg.norm(links.points - third.keypoints[0], axis=1) < 1
    assert np.allclose(links.reference_points[here], second.keypoints[:1], atol=0.1) and links.indices[here, 1] == [0]
    assert pose.inliers is not None and pose.inliers[here].all()


def test_tracks_that_agree_with_a_rejected_translation_continue(picture: NDArray[np.uint8], texture: Texture) -> None:
    """The pose says that the camera stands. Of four points that move in front of it, two agree with a translation."""
    piece = np.float32([[115, 75], [125, 85], [115, 85], [125, 75]])
    beside = grid()[(grid()[:, 0] < 80) | (grid()[:, 1] < 50) | (grid()[:, 1] > 110)]
    points, tracks, ids = np.concatenate([piece, beside]), Tracks(100, 0), list[NDArray[np.uint64]]()
    moves = np.arange(len(points)) < 4
    views = [
        replace(
            with_patch(picture, texture, 0, shift), keypoints=points - np.outer(moves, (shift, 0)).astype(np.float32)
        )
        for shift in (0, 3, 6, 9)
    ]
    views = [replace(one, descriptors=np.eye(len(points), 128, dtype=np.float32)) for one in views]
    for reference, current in zip(views, views[1:]):
        links = tracks.follow(reference, current, *identity(len(points)))
        ids.append(links.track_ids)
        moving = np.linalg.norm(links.points - links.reference_points, axis=1) > 1
        undecided = moving & np.isin(links.track_ids, ids[0][:2])
        pose = replace(sideways(len(moving), PoseStatus.NO_TRANSLATION).for_matches(~moving), translation=np.zeros(3))
        links, pose = tracks.settle(current, (CAMERA, CAMERA), links, replace(pose, undecided=undecided))
        tracks.advance(current, pose.inliers)
    assert len(ids[0]) == len(points)
    assert np.isin(ids[0], ids[1]).tolist() == [True, True, False, False] + [True] * len(beside)
    assert np.isin(ids[0][:4], ids[2]).tolist() == [True, True, False, False]
