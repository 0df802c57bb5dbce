"""Tests that lost tracks are found again where the motion predicts them, if the tracks found by descriptors agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.patches import cut, no_change
from kpmatch_ros.geometry.refinement import normalize_contrast
from kpmatch_ros.geometry.structure import FRAMES, Structure, Window
from kpmatch_ros.tracking.lost_tracks import LostTracks
from kpmatch_ros.tracking.track_set import Templates, TrackSet
from kpmatch_ros.tracking.tracks import NOT_DETECTED, View

SIZE, FOCAL, COUNT, DETECTED = 240, 200.0, 80, 30
CAMERA = Camera(SIZE, SIZE, np.array([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]]), "", np.zeros(0))
AWAY = np.array([[0.0, 0, 0], [3, 1, -2], [0, 0, 0]])  # of three cameras without rotation; the last one is set later


@pytest.fixture(scope="module")
def image(texture: Callable[[int, int, int], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return normalize_contrast(texture(SIZE, SIZE, 3))


def lost_tracks(image: NDArray[np.uint8], off: NDArray[np.float64]) -> tuple[TrackSet, Templates, View]:
    """Return tracks that the motion predicts with errors (COUNT, 2), and a view with the first ones as keypoints."""
    side = np.arange(20, SIZE - 19, 20, dtype=np.float32)
    points = np.random.default_rng(0).permutation(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2))[:COUNT]
    descriptors = np.random.default_rng(1).normal(size=(COUNT, 128)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    view, templates = View(image, points[:DETECTED], descriptors[:DETECTED], 1.0), Templates()
    landmarks = np.concatenate([CAMERA.normalise(points + off), np.ones((COUNT, 1)), np.full((COUNT, 1), 0.2)], axis=1)
    tracks = TrackSet(
        ids=np.arange(1, COUNT + 1, dtype=np.uint64),
        points=points,
        sigmas=np.full(COUNT, 0.1, np.float32),
        indices=np.full(COUNT, NOT_DETECTED),
        shapes=no_change(COUNT),
        anchors=np.zeros(COUNT, np.float32),
        templates=templates.add(cut(view.pixels, points), descriptors),
        sights=np.full((COUNT, FRAMES, 5), np.nan, np.float32),
        landmarks=landmarks.astype(np.float32),
    )
    return tracks, templates, view


def scene(cameras: Window, scaled: bool = True) -> Structure:
    nothing = np.zeros((3, 0))
    return Structure(cameras, nothing, nothing[0], nothing[0].astype(int), 1.0, scaled)


def recall(tracks: TrackSet, templates: Templates, view: View, camera: Camera | None, room: int = 1000) -> TrackSet:
    """Return the tracks that are found after a move to the right by 0.5 and back."""
    lost = LostTracks()
    lost.remember(tracks, COUNT)
    for step in (0.5, -0.5):
        moves = AWAY + np.array([(0,), (0,), (step,)]) * (1, 0, 0)
        lost.move_on(tracks.select(np.zeros(0, int)), scene(Window(np.stack([np.eye(3)] * 3), moves)))
    found = lost.recall(templates, view, camera, np.arange(DETECTED), room)
    assert found is not None
    assert len(lost.templates) == COUNT - len(found)
    return found


@pytest.mark.parametrize("off", [0.0, 6.0])
def test_lost_tracks_are_found_at_predicted_positions_without_a_keypoint(image: NDArray[np.uint8], off: float) -> None:
    tracks, templates, view = lost_tracks(image, np.tile([off, -off / 2], (COUNT, 1)))
    found = recall(tracks, templates, view, CAMERA)
    assert len(found) > 0.95 * COUNT
    assert (found.indices != NOT_DETECTED).sum() == DETECTED
    assert np.abs(found.points - tracks.points[found.ids.astype(int) - 1]).max() < 0.05
    assert len(recall(tracks, templates, view, CAMERA, room=DETECTED + 5)) == DETECTED + 5


@pytest.mark.parametrize("off", [0.15, 0.4])
def test_similar_points_far_from_the_prediction_are_not_lost_tracks(image: NDArray[np.uint8], off: float) -> None:
    """Like the windows of a facade, all of which are consistent with a shift by one window."""
    far = off * np.hypot(SIZE, SIZE)
    tracks, templates, view = lost_tracks(image, np.tile([far, 0.0], (COUNT, 1)))
    assert len(recall(tracks, templates, view, CAMERA)) == 0


def test_landmarks_behind_the_camera_are_not_found_in_the_image(image: NDArray[np.uint8]) -> None:
    tracks, templates, view = lost_tracks(image, np.zeros((COUNT, 2)))
    tracks.landmarks[:, :3] *= -1
    assert len(recall(tracks, templates, view, CAMERA)) == 0


def test_without_a_motion_too_few_tracks_are_not_found_again(image: NDArray[np.uint8]) -> None:
    tracks, templates, view = lost_tracks(image, np.zeros((COUNT, 2)))
    few = tracks.select(np.arange(5))
    lost = LostTracks()
    lost.remember(few, COUNT)
    again = lost.recall(templates, view, None, np.arange(DETECTED), COUNT)
    assert again is not None and len(again) == 0


def test_predictions_contradicted_by_found_tracks_are_not_used(image: NDArray[np.uint8]) -> None:
    tracks, templates, view = lost_tracks(image, np.random.default_rng(2).uniform(-20, 20, (COUNT, 2)))
    found = recall(tracks, templates, view, CAMERA)
    assert len(found) > 0.5 * DETECTED and (found.indices != NOT_DETECTED).all()


def test_without_a_motion_lost_tracks_are_found_only_at_keypoints(image: NDArray[np.uint8]) -> None:
    tracks, templates, view = lost_tracks(image, np.zeros((COUNT, 2)))
    found = recall(tracks, templates, view, None)
    assert len(found) == DETECTED and (found.indices != NOT_DETECTED).all()
    lost = LostTracks()
    lost.remember(tracks, COUNT)
    lost.move_on(tracks.select(np.zeros(0, int)), None)
    again = lost.recall(templates, view, CAMERA, np.arange(DETECTED), COUNT)
    assert again is not None and len(again) == DETECTED


def test_a_motion_of_another_scale_is_not_used_to_predict_lost_tracks(image: NDArray[np.uint8]) -> None:
    tracks, templates, view = lost_tracks(image, np.zeros((COUNT, 2)))
    lost = LostTracks()
    lost.remember(tracks, COUNT)
    cameras = Window(np.stack([np.eye(3)] * 2), np.array([[0.0, 0, 0], [100, 0, 0]]))
    lost.move_on(tracks.select(np.zeros(0, int)), scene(cameras, scaled=False))
    again = lost.recall(templates, view, CAMERA, np.arange(DETECTED), COUNT)
    assert again is not None and len(again) == DETECTED
