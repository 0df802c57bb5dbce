"""Tests that wrong poses do not claim to be certain: planes, a robot's own body, and the choice between two motions."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
from two_view_scenes import Scene, check, degrees, pinhole

from benchmarks.overconfidence import CAMERA, MOTIONS, WEAK, Problem, body, judge, plane, walk, weak
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.features import Features
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.two_modes import decide_by_prior, is_distinct, plane_motions, rival_of, spread
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion, agrees, normalise_matches
from kpmatch_ros.geometry.two_view_fit import Covariances, Noise
from kpmatch_ros.geometry.two_view_motion import Fit, widen
from kpmatch_ros.geometry.two_view_profile import profile_covariance, profile_directions
from kpmatch_ros.parameters import Parameters


def true_motion(problem: Problem) -> Motion:
    return Motion(problem.truth.rotation, problem.truth.position / np.linalg.norm(problem.truth.position))


def with_prior(problem: Problem, prior: Motion) -> RelativePose:
    return estimate_relative_pose(problem.points0, problem.points1, CAMERA, CAMERA, keypoint_resolution=0, prior=prior)


# Planes


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("tilt", [10, 30, 50])
def test_no_pose_of_a_plane_is_wrong_and_certain(tilt: int, motion: str) -> None:
    for seed in range(4):
        problem = plane(tilt, motion, seed)
        assert not judge(problem.estimate(), problem.truth).wrong_and_sure


def test_a_plane_seen_while_moving_towards_it_is_ambiguous_and_its_covariance_covers_the_truth() -> None:
    ambiguous = 0
    for seed in range(8):
        problem = plane(30, "towards", seed)
        pose = problem.estimate()
        check(pose, 300)
        ambiguous += pose.status is PoseStatus.AMBIGUOUS
        turn = cv2.Rodrigues(problem.truth.rotation @ pose.rotation.T)[0].ravel()
        for error, block in (
            (true_motion(problem).translation - pose.translation, pose.covariance[:3, :3]),
            (turn, pose.covariance[3:, 3:]),
        ):
            length = np.linalg.norm(error)
            assert length < 5 * math.sqrt(error @ block @ error) / length
    assert ambiguous >= 7


def test_sideways_motion_along_a_plane_gives_a_certain_and_correct_pose() -> None:
    for seed in range(6):
        problem = plane(30, "sideways", seed)
        outcome = judge(problem.estimate(), problem.truth)
        assert outcome.status is PoseStatus.OK and outcome.direction < 3


def test_the_covariance_for_a_plane_in_a_narrow_image_is_neither_too_small_nor_too_large() -> None:
    # Along the likelihood's ridge the epipolar lines rotate, and noise alone makes wrong motions far more likely.
    strip = pinhole(400.0, 640, 160)
    scene = Scene(plane=True, camera0=strip, camera1=strip, noise=0.3, outliers=0.1)
    nees, lengths = [], []
    for seed in range(24):
        pose = scene.estimate(150, seed, keypoint_resolution=0)
        if pose.status is PoseStatus.OK:
            error = scene.error(pose)
            nees.append(error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error)
            lengths.append(degrees(error)[1] / math.degrees(math.sqrt(np.trace(pose.covariance[:3, :3]))))
    assert len(nees) >= 18 and max(nees) < 25
    assert np.median(lengths) > 0.3  # not much longer than necessary


def test_points_off_the_plane_resolve_the_ambiguity() -> None:
    for seed in range(6):
        problem = plane(30, "towards", seed)
        scene = Scene(depth=(2, 4), rotation=(0.0, 0.0, 0.0), translation=(0, 0, 0)).matches(60, seed)[0]
        # A fifth of the points lie off the plane, by up to half of its distance.
        random = np.random.default_rng(seed)
        rays = np.column_stack([CAMERA.normalise(scene), np.ones(60)])
        seen = (rays * random.uniform(0.5, 1.0, (60, 1)) - problem.truth.position) @ problem.truth.rotation
        image = seen @ CAMERA.matrix.T
        points0 = np.vstack([problem.points0, scene])
        points1 = np.vstack([problem.points1, image[:, :2] / image[:, 2:]])
        pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, keypoint_resolution=0)
        outcome = judge(pose, problem.truth)
        assert outcome.status is PoseStatus.OK and outcome.rotation < 0.5 and outcome.direction < 5


def test_a_prior_near_the_true_motion_resolves_the_ambiguity_and_a_distant_one_does_not() -> None:
    for seed in range(6):
        problem = plane(30, "towards", seed)
        truth = true_motion(problem)
        near = truth.moved(np.array([0.005, -0.005, 0.01, 0.02, 0.02]))
        outcome = judge(with_prior(problem, near), problem.truth)
        assert outcome.status is PoseStatus.OK and outcome.rotation < 1 and outcome.direction < 5
        # A motion that is similar to neither of the two has no influence.
        far = truth.moved(np.array([1.0, 1.0, -1.0, 0.0, 0.0]))
        assert with_prior(problem, far).status is PoseStatus.AMBIGUOUS


def test_the_true_motion_is_rejected_as_a_rival_hardly_more_often_than_stated() -> None:
    # With a bound of 5 %, the rate is measurable: this is Vuong's test, whose statistic is normally distributed.
    scores = []
    for seed in range(60):
        problem = plane(40, "towards", seed)
        matches, _ = normalise_matches(problem.points0, problem.points1, CAMERA, CAMERA)
        truth = true_motion(problem)
        on_plane = matches.select(agrees(matches, truth, 1.0))
        others = [one for one in plane_motions(on_plane, truth, 1.5) if is_distinct(truth, one)]
        other = min(others, key=lambda one: -agrees(matches, one, 1.0).sum())
        scores.append(rival_of(matches, other, truth, 1.0, 0.3, 1.0).score)
    assert np.mean(np.array(scores) > 1.645) < 0.12


def test_a_scene_with_depth_is_never_ambiguous() -> None:
    for seed in range(8):
        assert Scene(noise=0.3, outliers=0.2).estimate(200, seed, keypoint_resolution=0).status is PoseStatus.OK


# A robot's own body


@pytest.mark.parametrize("part", [0.2, 0.33, 0.4, 0.5, 0.6])
def test_the_robots_own_body_in_the_image_does_not_give_a_wrong_pose(part: float) -> None:
    for seed in range(4):
        problem = body(part, seed)
        pose = problem.estimate()
        outcome = judge(pose, problem.truth)
        assert not outcome.wrong_and_sure
        assert outcome.status in (PoseStatus.OK, PoseStatus.AMBIGUOUS)
        assert outcome.status is PoseStatus.OK or part >= 0.5
        assert outcome.rotation < 0.1 and outcome.direction < 1  # the true motion, in both cases


def test_matches_on_the_body_are_outliers() -> None:
    problem = body(0.4, 0)
    inliers = problem.estimate().inliers
    still = np.linalg.norm(problem.points1 - problem.points0, axis=1) < 0.5
    assert inliers is not None and inliers[still].mean() < 0.02 and inliers[~still].mean() > 0.8


def test_a_prior_distinguishes_a_large_body_in_the_image_from_a_standing_camera() -> None:
    for seed in range(4):
        problem = body(0.6, seed)
        assert problem.estimate().status is PoseStatus.AMBIGUOUS
        outcome = judge(with_prior(problem, true_motion(problem)), problem.truth)
        assert outcome.status is PoseStatus.OK and outcome.direction < 1


def test_far_points_that_hardly_move_are_not_taken_for_the_robots_body() -> None:
    for seed in range(4):
        scene = Scene(rotation=(0.0, 0.0, 0.0), far=0.5, noise=0.1)
        pose = scene.estimate(400, seed, keypoint_resolution=0)
        assert pose.status is PoseStatus.OK and pose.num_inliers > 380


# Covariances that include two motions


def test_the_covariance_is_enlarged_by_the_squared_distance_to_the_other_motion() -> None:
    chosen = Motion(np.eye(3), np.array([0.0, 0.0, 1.0]))
    other = Motion(cv2.Rodrigues(np.array([0.1, 0.0, 0.0]))[0], np.array([0.0, 0.6, 0.8]))
    np.testing.assert_allclose(spread(chosen, other).diagonal(), [0, 0.36, 0.04, 0.01, 0, 0], atol=1e-12)


def test_a_prior_does_not_decide_between_two_motions_that_are_both_near_it() -> None:
    one = Motion(np.eye(3), np.array([0.0, 0.0, 1.0]))
    close = one.moved(np.array([0.0, 0.01, 0.0, 0.1, 0.0]))
    distant = one.moved(np.array([0.0, 0.2, 0.0, 0.6, 0.0]))
    assert decide_by_prior([one, close], one) is None
    assert decide_by_prior([distant, one], one) is one


# Scenes that constrain the motion weakly


@pytest.mark.parametrize("kind", WEAK)
def test_poses_of_weakly_constrained_scenes_are_not_overconfident(kind: str) -> None:
    # Without the search for other maxima of the likelihood, 5 % of the small areas were wrong and certain, and 20 % of
    # the pairs with coarse keypoints.
    problems = [weak(kind, seed) for seed in range(12)]
    outcomes = [judge(problem.estimate(), problem.truth) for problem in problems]
    assert not any(outcome.wrong_and_sure for outcome in outcomes)
    sure = [outcome.nees for outcome in outcomes if outcome.status is PoseStatus.OK]
    assert len(sure) >= 3 or kind == "coarse keypoints"  # most of these are AMBIGUOUS
    assert not sure or np.median(sure) < 9  # 4.35 for a chi-square distribution with five degrees of freedom


def test_the_profile_finds_the_motion_from_a_rotation_that_is_five_degrees_off() -> None:
    for seed in range(6):
        scene = Scene(noise=0.5, outliers=0.2)
        points0, points1, _ = scene.matches(100, seed)
        matches, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
        direction = np.array(scene.translation) / np.linalg.norm(scene.translation)
        off = cv2.Rodrigues(np.array(scene.rotation) + np.array([0.05, 0.05, -0.05]))[0]
        found = profile_directions(matches, [off], 1.0, 0.5)
        angles = [math.degrees(math.acos(motion.translation @ direction)) for motion in found]
        assert angles[0] < 20  # the likeliest is one of the directions next to the true one, with the right sign
        assert 2 <= len(found) <= 5
        for motion in found:
            np.testing.assert_allclose(motion.rotation @ motion.rotation.T, np.eye(3), atol=1e-9)
        for one, other in itertools.combinations(found, 2):
            assert abs(one.translation @ other.translation) < math.cos(math.radians(10)) + 1e-9


def test_the_covariance_is_enlarged_on_a_curved_ridge_of_the_likelihood() -> None:
    # The last number is the NEES with the covariance from the curvature at the maximum alone.
    for seed, before in ((27, 97), (78, 34)):
        problem = weak("small area", seed)
        outcome = judge(problem.estimate(), problem.truth)
        assert not outcome.wrong_and_sure
        assert outcome.status is PoseStatus.AMBIGUOUS or outcome.nees < before / 2


def test_with_good_geometry_the_profile_likelihood_hardly_enlarges_the_covariance() -> None:
    for seed in range(4):
        scene = Scene(noise=0.5)
        points0, points1, _ = scene.matches(150, seed)
        pose = scene.estimate(150, seed, keypoint_resolution=0)
        matches, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
        motion = Motion(pose.rotation, pose.translation)
        _, wide = profile_covariance(matches, motion, pose.covariance, 1.0, 0.5, 1.0)
        # In no direction smaller, and hardly larger.
        extra = np.linalg.eigvalsh(wide - pose.covariance)
        assert extra[0] > -1e-6 * extra[-1] - 1e-15
        assert (wide.diagonal() < 1.6 * pose.covariance.diagonal()).all()
        np.testing.assert_allclose(wide[:3, :3] @ motion.translation, 0, atol=1e-9)


def test_the_likelihood_enlarges_the_covariance_only_if_the_geometry_is_weak() -> None:
    scene, noise = Scene(noise=0.5), Noise(1.0, 0.0)
    covariances = Covariances(np.diag([1e-6] * 6), np.diag([2e-6] * 3 + [5e-7] * 3))
    for count, weak_geometry in ((150, False), (40, True)):
        points0, points1, _ = scene.matches(count, 0)
        pose = scene.estimate(count, 0, keypoint_resolution=0)
        matches, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
        wide, near = widen(matches, Fit(Motion(pose.rotation, pose.translation), matches), covariances, noise)
        assert (wide is covariances.shared_errors) != weak_geometry
        assert (near is covariances.shared_errors) != weak_geometry
        if weak_geometry:  # in no direction smaller than the matches' own errors allow
            assert np.linalg.eigvalsh(wide - covariances.shared_errors)[0] > -1e-12
            assert (wide.diagonal() > 3 * covariances.shared_errors.diagonal()).any()


@pytest.mark.parametrize("noise, max_reprojection_error", [(1.5, 1.0), (3.0, 3.0), (3.0, 9.0)])
def test_keypoints_as_coarse_as_the_inlier_threshold_give_poses_with_realistic_covariances(
    noise: float, max_reprojection_error: float
) -> None:
    errors, nees = [], []
    scene = Scene(noise=noise, outliers=0.2)
    for seed in range(8):
        points0, points1, _ = scene.matches(150, seed)
        pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, max_reprojection_error=max_reprojection_error)
        check(pose, 150)
        if pose.status is PoseStatus.OK:
            error = scene.error(pose)
            errors.append(np.linalg.norm(error[3:]))
            nees.append(error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error)
    assert len(nees) >= 6 and np.median(nees) < 9 and np.degrees(np.median(errors)) < 0.8


def test_keypoints_much_coarser_than_the_inlier_threshold_make_at_most_half_the_poses_certain() -> None:
    scene = Scene(noise=3.0, outliers=0.2)
    poses = [estimate_relative_pose(*scene.matches(150, seed)[:2], CAMERA, CAMERA) for seed in range(8)]
    for pose in poses:
        check(pose, 150)
    sure = [scene.error(pose) for pose in poses if pose.status is PoseStatus.OK]
    assert len(sure) <= 4 and all(np.degrees(np.linalg.norm(error[3:])) < 3 for error in sure)


def _two_groups(first: int, second: int, scattered: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matches of two motions, and others at random positions."""
    one, two = Scene(noise=0.2), Scene(rotation=(-0.1, 0.15, 0.0), translation=(-0.2, 0.1, 0.3), noise=0.2)
    scenes = [(one, first), (two, second), (Scene(outliers=1.0), scattered)]
    groups = [scene.matches(count, seed + count) for scene, count in scenes if count]
    points0, points1 = (np.concatenate([group[side] for group in groups]) for side in range(2))
    return points0, points1


@pytest.mark.parametrize("seed", range(4))
def test_two_groups_of_matches_with_different_motions_are_ambiguous_if_neither_is_a_majority(seed: int) -> None:
    points0, points1 = _two_groups(130, 100, 70, seed)
    pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA)
    check(pose, 300)
    assert pose.status is PoseStatus.AMBIGUOUS and pose.inliers is not None and pose.inliers[:130].mean() > 0.9
    other = Scene(rotation=(-0.1, 0.15, 0.0), translation=(-0.2, 0.1, 0.3)).error(pose)
    away = other / np.linalg.norm(other)
    assert away @ pose.covariance @ away > 0.9 * other @ other

    before = estimate_relative_pose(*_two_groups(300, 0, 0, seed), CAMERA, CAMERA)
    prior = Motion(before.rotation, before.translation)
    assert estimate_relative_pose(points0, points1, CAMERA, CAMERA, prior=prior).status is PoseStatus.OK


def test_a_motion_that_most_matches_support_is_certain_even_if_the_decisive_ones_are_ambiguous() -> None:
    points0, points1 = _two_groups(240, 40, 20, 0)
    decisive = np.isin(np.arange(300), [*range(45), *range(240, 300)])
    few = estimate_relative_pose(points0[decisive], points1[decisive], CAMERA, CAMERA)
    pose = estimate_relative_pose(points0, points1, CAMERA, CAMERA, decisive=decisive)
    assert few.status is PoseStatus.AMBIGUOUS and pose.status is PoseStatus.OK


@pytest.mark.parametrize("groups", [(100, 0, 200), (160, 120, 20), (130, 30, 140)])
def test_a_motion_is_certain_if_most_matches_support_it_or_the_others_support_no_common_motion(
    groups: tuple[int, int, int],
) -> None:
    for seed in range(4):
        pose = estimate_relative_pose(*_two_groups(*groups, seed), CAMERA, CAMERA)
        assert pose.status is PoseStatus.OK
        assert np.degrees(np.abs(Scene().error(pose)[3:]).max()) < 0.2


def test_a_rival_motion_within_the_noise_is_distinguished_from_one_beyond_it() -> None:
    scene = Scene(noise=0.3)
    points0, points1, _ = scene.matches(200, 0)
    matches, _ = normalise_matches(points0, points1, CAMERA, CAMERA)
    pose = scene.estimate(200, 0, keypoint_resolution=0)
    chosen = Motion(pose.rotation, pose.translation)
    close, distant = (chosen.moved(np.full(5, step)) for step in (1e-5, 0.01))
    rivals = [rival_of(matches, chosen, other, 1.0, 0.3, 1.0) for other in (close, distant)]
    assert rivals[0].is_within_noise and not rivals[1].is_within_noise
    # Ten matches with a common error are worth only one match.
    assert rival_of(matches, chosen, distant, 1.0, 0.3, 10.0).difference == pytest.approx(rivals[1].difference / 10)


# The front end


class FakeNetworks:
    """Replaces the networks: returns given keypoints and matches."""

    keypoint_resolution = 1.0

    def __init__(self, frames: list[np.ndarray], matched: list[range]) -> None:
        self.frames, self.matched = iter(frames), iter(matched)

    def configure(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def extract_batch(self, images: Any, *_: Any) -> list[Features]:
        points = torch.from_numpy(next(self.frames).astype(np.float32))
        scores, descriptors = torch.ones(len(points)), torch.zeros((len(points), 2))
        return [Features(points, scores, descriptors, (CAMERA.width, CAMERA.height))]

    def match(self, reference: Features, current: Features) -> SimpleNamespace:
        indices = torch.tensor(next(self.matched))[:, None].repeat(1, 2)
        return SimpleNamespace(indices=indices, scores=torch.ones(len(indices)), layers=1)


@pytest.mark.parametrize("motion_prior", [True, False])
def test_the_front_end_uses_the_previous_motion_as_a_prior_unless_motion_prior_is_false(motion_prior: bool) -> None:
    # Two pairs with the same motion: of a scene with depth, which is certain, and of a plane, which alone is not.
    wall = plane(30, "towards", 1)
    shift, turn = 5 * wall.truth.position, cv2.Rodrigues(wall.truth.rotation)[0].ravel()
    scene = Scene(rotation=tuple(turn), translation=tuple(shift), camera0=CAMERA, camera1=CAMERA, noise=0.2)
    before, between, _ = scene.matches(200, 0)
    frames = [
        np.vstack([before, np.zeros_like(wall.points0)]),
        np.vstack([between, wall.points0]),
        np.vstack([np.zeros_like(between), wall.points1]),
    ]
    grey = np.full((CAMERA.height, CAMERA.width), 128, np.uint8)  # without anything to refine
    networks = FakeNetworks(frames, [range(200), range(200, 500)])
    front_end = FrontEnd(Parameters(device="cpu", motion_prior=motion_prior), cast(FeatureMatcher, networks))
    pairs = [front_end.register([grey], [10**8 * number], CAMERA).pair for number in range(3)]
    assert pairs[1] is not None and pairs[1].pose.status is PoseStatus.OK
    assert pairs[2] is not None
    if not motion_prior:
        assert pairs[2].pose.status is PoseStatus.AMBIGUOUS
        return
    outcome = judge(pairs[2].pose, wall.truth)
    assert outcome.status is PoseStatus.OK and outcome.rotation < 1 and outcome.direction < 5


# Few matches


def test_a_wrong_match_among_few_does_not_pull_the_pose_far_outside_its_covariance() -> None:
    camera = pinhole(130.0, 160, 120)
    scene, sure = Scene(camera0=camera, camera1=camera, noise=0.1, outliers=0.2), 0
    truth = Motion(cv2.Rodrigues(np.array(scene.rotation))[0], np.array(scene.translation))
    direction = truth.translation / np.linalg.norm(truth.translation)
    for seed in range(200):
        points0, points1, _ = scene.matches(30, seed)
        pose = estimate_relative_pose(points0, points1, camera, camera, keypoint_resolution=1 / 32, min_inliers=8)
        if pose.status is PoseStatus.OK:
            turn = cv2.Rodrigues(truth.rotation @ pose.rotation.T)[0].ravel()
            error = np.concatenate([direction - pose.translation, turn])
            assert error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error < 100  # 5 is correct
            sure += 1
    assert sure > 100


@pytest.mark.parametrize("seed", [45, 57, 85])
def test_a_pose_of_few_matches_is_ambiguous_if_all_of_them_suggest_another_motion(seed: int) -> None:
    # Without the likeliest directions, the poses would be OK and 109 to 137 degrees off.
    assert weak("small area", seed).estimate().status is PoseStatus.AMBIGUOUS


@pytest.mark.parametrize("seed", [68, 84, 172])
def test_two_motions_that_each_fit_with_a_different_noise_are_ambiguous(seed: int) -> None:
    """Few matches agree closely with one motion, and more, less closely, with the other.

    Without this status, the poses would be OK and their directions 20, 18 and 74 degrees off.
    """
    problem = weak("coarse keypoints", seed)
    pose = problem.estimate()
    assert pose.status is PoseStatus.AMBIGUOUS
    turn = cv2.Rodrigues(problem.truth.rotation @ pose.rotation.T)[0].ravel()
    direction = problem.truth.position / np.linalg.norm(problem.truth.position)
    error = np.concatenate([direction - pose.translation, turn])
    assert error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error < 20


# The benchmark


def test_no_two_images_of_a_stereo_walk_share_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    class FakeScene:
        def __init__(self, seed: int) -> None: ...

        def film(self, poses: list, camera: Any, *, noise: float, noise_seed: int) -> list:
            seeds.extend(noise_seed + number for number in range(len(poses)))  # as Scene.film does
            return []

    monkeypatch.setattr("simulation.Scene", FakeScene)
    assert list(walk(4, 1, stereo=True)) == []
    assert len(set(seeds)) == len(seeds) == 8
