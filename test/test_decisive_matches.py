"""Tests that many refined matches decide a pose, and that the other matches are judged by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from two_view_scenes import CAMERA, Scene, check

from kpmatch_ros import Camera, FeatureMatcher, FrontEnd
from kpmatch_ros.bags.demo import demo_frames
from kpmatch_ros.geometry.pose import PoseStatus, relative_motion
from kpmatch_ros.geometry.refinement import decisive_matches
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.tracking.tracks import NOT_DETECTED, Links

OTHER = {"rotation": (-0.1, 0.05, 0.0), "translation": (-0.1, 0.3, 0.2)}


@pytest.mark.parametrize("translation", [(0.25, -0.05, 0.1), (0.0, 0.0, 0.0)], ids=["moves", "turns"])
@pytest.mark.usefixtures("geometry")
def test_decisive_matches_prevail_over_more_matches_with_another_motion(
    translation: tuple[float, float, float],
) -> None:
    scene = Scene(translation=translation, noise=0.2)
    right, more = (np.hstack(scene.matches(count, seed)[:2]) for count, seed in ((60, 0), (50, 1)))
    wrong = np.hstack(Scene(**OTHER, noise=0.2).matches(150, 2)[:2])
    order = np.random.default_rng(0).permutation(260)
    matches, which = np.concatenate([right, wrong, more])[order], np.repeat([0, 1, 2], [60, 150, 50])[order]

    def estimate(decisive: np.ndarray | None) -> tuple[float, np.ndarray]:
        pose = estimate_relative_pose(matches[:, :2], matches[:, 2:], CAMERA, CAMERA, decisive=decisive)
        check(pose, 260)
        assert pose.inliers is not None
        if decisive is not None:
            moves = any(translation)
            assert pose.status is (PoseStatus.OK if moves else PoseStatus.NO_TRANSLATION)
            assert np.abs(scene.error(pose)[:3]).max() < (0.05 if moves else 1e-9)
            camera = np.array(translation) / (np.linalg.norm(translation) or 1)
            assert moves == bool(pose.translation @ camera > 0.99)
        return float(np.abs(scene.error(pose)[3:]).max()), pose.inliers

    error, inliers = estimate(which == 0)
    assert error < 2e-3
    assert inliers[which == 0].mean() > 0.9 and inliers[which == 2].mean() > 0.9 and inliers[which == 1].mean() < 0.1
    error, inliers = estimate(None)
    assert error > 0.05 and inliers[which == 1].mean() > 0.9


def test_matches_without_a_direction_are_not_inliers_of_the_decisive_ones() -> None:
    points0, points1, _ = Scene(noise=0.2).matches(80, 0)
    points1[::4] = np.nan
    pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, decisive=np.arange(80) % 2 == 1)
    assert pose.inliers is not None and pose.num_matches == 80
    assert not pose.inliers[::4].any() and pose.inliers[2::4].all() and pose.inliers[1::2].all()


@pytest.mark.parametrize("decisive", [10, 30], ids=["too few", "most of them wrong"])
def test_all_matches_decide_if_the_decisive_ones_give_no_pose(decisive: int) -> None:
    points0, points1, _ = Scene(noise=0.2).matches(200, 0)
    points1[8:30] = np.random.default_rng(1).uniform((0, 0), (640, 480), (22, 2))
    pose, every = (
        estimate_relative_pose(points0, points1, CAMERA, CAMERA, decisive=some)
        for some in (np.arange(200) < decisive, None)
    )
    assert pose.status is PoseStatus.OK and pose.inliers is not None and pose.inliers[30:].mean() > 0.9
    np.testing.assert_array_equal(pose.rotation, every.rotation)


def test_the_parallax_is_that_of_all_inliers() -> None:
    far, near = (np.hstack(Scene(depth=depth).matches(n, 0)[:2]) for depth, n in (((4.0, 10.0), 60), ((1.0, 1.5), 90)))
    matches = np.concatenate([far, near])
    pose = estimate_relative_pose(matches[:, :2], matches[:, 2:], CAMERA, CAMERA, decisive=np.arange(150) < 60)
    alone = estimate_relative_pose(far[:, :2], far[:, 2:], CAMERA, CAMERA)
    assert pose.num_inliers > 140 and pose.median_parallax > 2 * alone.median_parallax


def test_matches_of_a_rejected_translation_are_undecided_even_if_decisive() -> None:
    """The camera turns, and something in one part of the picture moves, as in test_moving_things."""
    scene = Scene(translation=(0.0, 0.0, 0.0), noise=0.1)
    points0, points1, _ = scene.matches(400, 0)
    inside = (np.abs(points0 - (320, 240)) < (60, 60)).all(axis=1)
    points1[inside] += (12.0, 3.0)
    assert inside.sum() > 10
    decisive = np.arange(400) % 2 == 0
    pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, decisive=decisive)
    every = estimate_relative_pose(points0, points1, CAMERA, CAMERA)
    assert pose.status is every.status is PoseStatus.NO_TRANSLATION
    assert pose.undecided is not None and every.undecided is not None and every.undecided[inside].mean() > 0.9
    assert pose.undecided[inside & decisive].mean() > 0.9 and pose.undecided[inside & ~decisive].mean() > 0.9
    assert not (pose.undecided & pose.inliers).any()


def test_copies_of_decisive_matches_change_nothing() -> None:
    points0, points1, _ = Scene(noise=0.3, outliers=0.2).matches(120, 0)
    decisive = np.arange(120) % 2 == 0
    once = estimate_relative_pose(points0, points1, CAMERA, CAMERA, decisive=decisive)
    order = np.arange(200) % 120
    twice = estimate_relative_pose(points0[order], points1[order], CAMERA, CAMERA, decisive=decisive[order])
    np.testing.assert_array_equal(once.rotation, twice.rotation)
    assert twice.num_matches == 200 and once.inliers is not None and twice.inliers is not None
    np.testing.assert_array_equal(once.inliers[order], twice.inliers)


@pytest.mark.parametrize("decisive", [np.ones(80, int), np.ones(40, bool), np.ones((80, 1), bool), [1] * 80])
def test_a_mask_of_another_type_or_shape_is_refused(decisive: Any) -> None:
    points0, points1, _ = Scene().matches(80, 0)
    with pytest.raises(ValueError, match=r"decisive must be \(M,\) bool, M = 80"):
        estimate_relative_pose(points0, points1, CAMERA, CAMERA, decisive=decisive)


def test_too_few_refined_matches_are_not_decisive() -> None:
    def decide(refined: int, min_inliers: int) -> bool:
        points0, points1, _ = Scene().matches(200, 0)
        decisive = decisive_matches(points0, points1, np.arange(200) < refined, min_inliers=min_inliers)
        return decisive is not None and int(decisive.sum()) == refined

    assert decide(30, 15) and not decide(29, 15)
    assert decide(100, 50) and not decide(99, 50)


@pytest.mark.parametrize("refine", [False, True])
def test_the_front_end_uses_the_motion_of_the_refined_matches(refine: bool) -> None:
    """Two thirds of the matches are wrong and agree on another motion, but their surroundings differ."""
    frames = list(demo_frames(2))
    camera = Camera.from_camera_info(frames[0].camera_info, rectified=False)
    matcher = FeatureMatcher(matcher="nearest", device="cpu", precision="float32", max_keypoints=300, refine=refine)
    front_end = FrontEnd(matcher.parameters, matcher)
    for frame in frames:
        pair = front_end.register([frame.image], [frame.stamp], camera).pair
    assert pair is not None and pair.inliers is not None
    right = np.flatnonzero(pair.inliers)[:60]
    points0, points1, _ = Scene(**OTHER, camera0=camera, camera1=camera, noise=0.2).matches(120, 0)
    links = Links(
        indices=np.concatenate([pair.indices[right], np.full((120, 2), NOT_DETECTED)]),
        reference_points=np.concatenate([pair.reference_points[right], points0]).astype(np.float32),
        points=np.concatenate([pair.points[right], points1]).astype(np.float32),
        sigmas=np.full(180, 0.3, np.float32),
        pair_sigmas=np.full(180, 0.3, np.float32),
        scores=np.ones(180, np.float32),
        track_ids=np.arange(1, 181, dtype=np.uint64),
        refined=np.arange(180) < (60 if refine else 0),
    )
    truth = relative_motion(frames[0].pose, frames[1].pose)
    pose = front_end.estimate_pose(pair.reference, pair.current, links)
    assert pose.status is PoseStatus.OK and pose.inliers is not None
    assert np.abs(pose.rotation - truth.rotation).max() < 2e-3
    assert pose.inliers[:60].mean() > 0.8 and pose.inliers[60:].mean() < 0.1

    # A robot's own body is found in every image, and its matches do not move.
    body = np.flatnonzero(pair.inliers)[:60]
    still = pair.reference_points[body]
    with_body = replace(
        links,
        reference_points=np.concatenate([still, points0]).astype(np.float32),
        points=np.concatenate([still, points1]).astype(np.float32),
    )
    if refine:
        pose = front_end.estimate_pose(pair.reference, pair.current, with_body)
        assert pose.status is PoseStatus.OK and pose.inliers is not None
        assert pose.inliers[60:].mean() > 0.9 and not pose.inliers[:60].any()

    few = replace(links, refined=links.refined & (np.arange(180) < 20))
    if refine:  # 20 refined matches are too few to decide, so all matches do
        pose = front_end.estimate_pose(pair.reference, pair.current, few)
        assert np.abs(pose.rotation - truth.rotation).max() > 2e-2
