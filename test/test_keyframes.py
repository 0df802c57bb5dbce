"""Tests of the choice of a new keyframe, and of the effect that track checks have on a pose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from kpmatch_ros import frame_motion
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.features import Features
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.parameters import Parameters

SIZE = (640, 480)
CAMERA = Camera(*SIZE, np.array([[500.0, 0, 320], [0, 500.0, 240], [0, 0, 1]]))


class MatcherOfGivenPoints:
    """Replaces the networks: returns points for the images in their order, and matches them by index."""

    keypoint_resolution = 1.0

    def __init__(self, *points: np.ndarray) -> None:
        self._points = iter(points)

    def configure(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def extract_batch(self, images: Any, masks: Any) -> list[Features]:
        """Return the points of the next image."""
        points = next(self._points).astype(np.float32)
        return [Features(points, np.ones(len(points)), np.full((len(points), 4), 0.5), SIZE)]

    def match(self, reference: Features, current: Features) -> Any:
        """Match all points."""
        count = min(len(reference.keypoints), len(current.keypoints))
        indices = np.repeat(np.arange(count)[:, None], 2, axis=1)
        return SimpleNamespace(indices=indices, scores=np.ones(count, np.float32), layers=0)


@pytest.mark.parametrize(("min_inliers", "status"), [(15, PoseStatus.OK), (150, PoseStatus.TOO_FEW_MATCHES)])
@pytest.mark.parametrize(("most", "renewed"), [(40.0, True), (100.0, False)])
def test_a_keyframe_is_replaced_after_a_large_motion_with_or_without_a_pose(
    min_inliers: int, status: PoseStatus, most: float, renewed: bool
) -> None:
    random = np.random.default_rng(0)
    scene = random.uniform((-2, -1.5, 4), (2, 1.5, 9), (200, 3))
    before, after = ((points[:, :2] / points[:, 2:]) * 500 + (320, 240) for points in (scene, scene - (0.9, 0, 0.1)))
    after[120:] = random.uniform((5, 5), (630, 470), (80, 2))  # wrong matches
    parameters = Parameters(
        reference="keyframe",
        keyframe_max_parallax=most,
        keyframe_min_matches=10,
        min_inliers=min_inliers,
        refine=False,
    )
    front_end = FrontEnd(parameters, cast(FeatureMatcher, MatcherOfGivenPoints(before, after, after)))
    nothing = np.zeros(SIZE[::-1], np.uint8)
    front_end.register_frame(nothing, 0, CAMERA)
    if status is not PoseStatus.OK:  # the first such frame is skipped
        front_end.register_frame(nothing, 5 * 10**7, CAMERA)
    frame, pair = front_end.register_frame(nothing, 10**8, CAMERA)
    assert pair is not None and pair.pose.status is status
    assert (front_end.reference is frame) == renewed


def test_too_few_inliers_after_the_track_check_leave_no_pose() -> None:
    random = np.random.default_rng(1)
    step = np.array([0.9, 0, 0.1])
    scene = random.uniform((-1.5, -1.5, 4), (2, 1.5, 9), (30, 3))
    slide = random.uniform((-0.3, -1, 4), (1, 1, 4.5), (12, 3))  # near in the first two frames, far in the last two
    further = 2 * (slide - step)
    frames = [
        np.concatenate([scene - number * step, points])
        for number, points in enumerate((slide, further / 2, further - step))
    ]
    pixels = [points[:, :2] / points[:, 2:] * 500 + (320, 240) for points in frames]
    parameters = Parameters(min_inliers=35)
    front_end = FrontEnd(parameters, cast(FeatureMatcher, MatcherOfGivenPoints(*pixels)))
    pairs = [front_end.register_frame(np.zeros(SIZE[::-1], np.uint8), number, CAMERA)[1] for number in range(3)]
    assert pairs[1] is not None and pairs[1].num_inliers == 42 and pairs[1].pose.status is PoseStatus.OK
    assert pairs[2] is not None and pairs[2].num_inliers == 30 and pairs[2].pose.status is PoseStatus.TOO_FEW_MATCHES
    assert not pairs[2].pose.translation.any() and not pairs[2].pose.covariance.any()


SCENE = np.random.default_rng(2).uniform((-2, -1.5, 4), (2, 1.5, 9), (60, 3))
PIXELS = SCENE[:, :2] / SCENE[:, 2:] * 500 + (320, 240)
NOTHING = np.zeros(SIZE[::-1], np.uint8)


def front_end_with(points: list[np.ndarray], **changes: Any) -> FrontEnd:
    """Return a front end with a keyframe, whose images have these points."""
    values = {"reference": "keyframe", "keyframe_min_matches": 10, "refine": False, **changes}
    return FrontEnd(Parameters(**values), cast(FeatureMatcher, MatcherOfGivenPoints(*points)))


def test_a_keyframe_without_calibration_is_replaced_by_a_calibrated_frame() -> None:
    front_end = front_end_with(4 * [PIXELS])
    cameras = (None, None, CAMERA, CAMERA)
    pairs = [front_end.register_frame(NOTHING, i * 10**8, camera)[1] for i, camera in enumerate(cameras)]
    statuses = [pair.pose.status for pair in pairs if pair is not None]
    assert statuses == [PoseStatus.NO_CALIBRATION, PoseStatus.NO_CALIBRATION, PoseStatus.NO_TRANSLATION]


def statuses_and_references(seconds: list[float], points: list[np.ndarray], **changes: Any) -> list[tuple[str, int]]:
    """Return for each frame with these points its status and the number of its reference."""
    front_end = front_end_with(points, **{"reference": "previous", **changes})
    pairs = [front_end.register_frame(NOTHING, round(second * 1e9), CAMERA)[1] for second in seconds]
    return [(pair.pose.status.name, pair.reference.number) for pair in pairs if pair is not None]


OTHER = np.random.default_rng(3).uniform((5, 5), (630, 470), (60, 2))  # points of another place, or false detections


def test_one_frame_without_a_pose_does_not_become_the_reference() -> None:
    found = statuses_and_references([0, 0.1, 0.2, 0.3], [PIXELS, OTHER, PIXELS, PIXELS])
    assert found == [("FAILED", 1), ("NO_TRANSLATION", 1), ("NO_TRANSLATION", 3)]


def test_the_first_frame_is_replaced_at_once_if_it_shows_nothing() -> None:
    found = statuses_and_references([0, 0.1, 0.2], [PIXELS[:3], PIXELS, PIXELS])
    assert found == [("TOO_FEW_MATCHES", 1), ("NO_TRANSLATION", 2)]


def test_the_second_consecutive_frame_without_a_pose_becomes_the_reference() -> None:
    found = statuses_and_references([0, 0.1, 0.2, 0.3, 0.4], [PIXELS, OTHER, OTHER, OTHER, PIXELS])
    assert found == [("FAILED", 1), ("FAILED", 1), ("NO_TRANSLATION", 3), ("FAILED", 4)]


def test_the_motion_prior_survives_a_skipped_frame_but_is_not_used_with_a_keyframe() -> None:
    priors: list[bool] = []

    def walk(points: list[np.ndarray], **changes: Any) -> list[bool]:
        priors.clear()
        front_end = front_end_with(points, **{"reference": "previous", **changes})
        for number in range(len(points)):  # at 30 Hz, twice the interval is not exactly twice the nanoseconds
            front_end.register_frame(NOTHING, round(number * 1e9 / 30), CAMERA)
        return list(priors)

    def noticed(*points: Any, prior: Any = None, **options: Any) -> Any:
        priors.append(prior is not None)
        return estimate_relative_pose(*points, prior=prior, **options)

    moving = [SCENE - (0.2 * number, 0.01 * number, 0) for number in range(5)]
    seen = [points[:, :2] / points[:, 2:] * 500 + (320, 240) for points in moving]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_motion, "estimate_relative_pose", noticed)
        assert walk(seen[:4]) == [False, True, True]
        assert walk([*seen[:2], OTHER, seen[3], seen[4]]) == [False, True, True, True]
        assert walk(seen, reference="keyframe", keyframe_max_parallax=1000.0) == [False] * 4


def test_dark_frames_replace_a_keyframe_older_than_max_gap() -> None:
    front_end = front_end_with(3 * [PIXELS] + 4 * [PIXELS[:0]], max_gap=5.0)
    stays = []
    for second in (0, 3, 6, 6.5, 9, 10.9, 11.1):  # dark from 6.5 s on, when the keyframe is older than max_gap
        front_end.register_frame(NOTHING, round(second * 1e9), CAMERA)
        assert front_end.reference is not None
        stays.append(front_end.reference.stamp == 0)
    assert stays == [True] * 6 + [False]


def test_a_change_of_refine_starts_new_tracks_even_with_the_same_keyframe() -> None:
    front_end = front_end_with(4 * [PIXELS])
    ids = []
    for i, refine in enumerate([False, False, True, False]):
        front_end.configure(front_end.parameters.replace({"refine": refine}))
        pair = front_end.register_frame(NOTHING, i * 10**8, CAMERA)[1]
        if pair is not None and not refine:
            assert pair.reset
            ids.append(set(pair.track_ids.tolist()))
    assert len(ids) == 2 and not ids[0] & ids[1]
