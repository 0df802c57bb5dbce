"""Tests with degenerate and invalid matches: there is a pose or a reason why there is none, but never an error."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import stereo_scenes
import two_view_scenes
from stereo_scenes import pair

from kpmatch_ros.geometry.camera import BEHIND, Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import tukey_cutoff
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.stereo_errors import StereoPoints, stereo_residuals
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion
from kpmatch_ros.geometry.two_modes import plane_motions
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion, lengths, normalise_matches
from kpmatch_ros.geometry.two_view_profile import profile_directions

CAMERA = two_view_scenes.CAMERA
TURN = cv2.Rodrigues(np.array([0.03, -0.1, 0.02]))[0]
STEP = np.array([0.1, -0.05, 0.12])


def project_into_both_frames(points: np.ndarray, camera: StereoCamera) -> list[np.ndarray]:
    """Return left0, right0, left1, right1 of points (n, 3), including points behind a camera."""
    current = (points - STEP) @ TURN
    found = []
    for left in (points, current):
        for lens, view in ((camera.left, left), (camera.right, left @ camera.rotation.T + camera.translation)):
            rays = view[:, :2] / np.where(np.abs(view[:, 2:]) < 1e-9, 1e-9, view[:, 2:])
            found.append(lens.project(np.clip(rays, -1e6, 1e6)))
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_points_on_one_line_give_no_translation(noise: float) -> None:
    for seed in range(8):
        random = np.random.default_rng(seed)
        along = np.array([*random.normal(size=2), random.uniform(-0.5, 0.5)])
        points = random.uniform(-1, 1, (60, 1)) * along / np.linalg.norm(along) + (0, 0, 4)
        images = [pixels + random.normal(0, noise, pixels.shape) for pixels in project_into_both_frames(points, pair())]
        pose = estimate_relative_pose(images[0], images[2], CAMERA, CAMERA, keypoint_resolution=1 / 32)
        two_view_scenes.check(pose, 60)
        assert pose.status is not PoseStatus.OK
        pose = estimate_stereo_motion(*images, pair(), pair(), keypoint_resolution=1 / 32)
        stereo_scenes.check(pose, 60)
        assert pose.status is not PoseStatus.OK


def test_points_on_one_image_line_with_different_depths_give_a_stereo_motion() -> None:
    random = np.random.default_rng(0)
    points = np.column_stack([random.uniform(-1, 1, 60), np.zeros(60), np.ones(60)]) * random.uniform(2, 6, (60, 1))
    images = [pixels + random.normal(0, 0.2, pixels.shape) for pixels in project_into_both_frames(points, pair())]
    pose = estimate_stereo_motion(*images, pair(), pair(), keypoint_resolution=0.0)
    assert pose.status is PoseStatus.OK and np.linalg.norm(pose.translation - STEP) < 0.05


def test_copies_of_a_match_count_as_one_match() -> None:
    # Five points allow ten motions, or their noise decides. Twelve copies of the same five are not more certain.
    five = np.random.default_rng(0).uniform((-1, -1, 3), (1, 1, 6), (5, 3))
    images = [np.tile(pixels, (12, 1)) for pixels in project_into_both_frames(five, pair())]
    poses = [
        estimate_relative_pose(images[0], images[2], CAMERA, CAMERA),
        estimate_stereo_motion(*images, pair(), pair()),
    ]
    for pose in poses:
        assert pose.status is PoseStatus.TOO_FEW_MATCHES and pose.num_matches == 60


def test_copies_of_matches_do_not_change_the_pose() -> None:
    random = np.random.default_rng(1)
    order = random.permutation(np.arange(200) % 120)
    first = np.sort(np.unique(order, return_index=True)[1])  # the order of the matches must not matter

    def same(one: RelativePose, other: RelativePose) -> None:
        assert one.status is other.status is PoseStatus.OK
        np.testing.assert_array_equal(one.translation, other.translation)
        np.testing.assert_array_equal(one.covariance, other.covariance)
        assert one.inliers is not None and other.inliers is not None
        np.testing.assert_array_equal(one.inliers[first], other.inliers)
        assert one.num_matches == 200 and one.num_inliers == one.inliers.sum() > other.num_inliers > 80

    points0, points1, _ = two_view_scenes.Scene(noise=0.3, outliers=0.2).matches(120, 0)
    points0, points1 = points0[order], points1[order]
    same(
        estimate_relative_pose(points0, points1, CAMERA, CAMERA),
        estimate_relative_pose(points0[first], points1[first], CAMERA, CAMERA),
    )
    images = [pixels[order] for pixels in stereo_scenes.Scene(noise=0.3, outliers=0.2).pixels(120, 0)[0]]
    same(
        estimate_stereo_motion(*images, pair(), pair(), sigmas=np.ones(200)),
        estimate_stereo_motion(*(pixels[first] for pixels in images), pair(), pair(), sigmas=np.ones(len(first))),
    )


def test_points_that_coincide_in_the_current_frame_give_no_stereo_motion() -> None:
    # From far enough away, all points appear as one. P3P finds a position 1e13 metres away.
    for seed in range(10):
        left0, right0, left1, _ = stereo_scenes.Scene(unmatched=0.0).pixels(60, seed)[0]
        one = left1[:1] + np.random.default_rng(seed).normal(0, 1e-3, (60, 2))
        pose = estimate_stereo_motion(left0, right0, one, np.full((60, 2), np.nan), pair(), pair())
        stereo_scenes.check(pose, 60)
        assert not pose.status.has_pose


def test_a_point_at_a_cameras_centre_does_not_count_as_in_front_of_it() -> None:
    # The right camera is in front of the left camera: the left camera's principal ray passes through the right camera.
    camera = StereoCamera(CAMERA, CAMERA, np.eye(3), np.array([0.0, 0.0, -0.1]))
    right = np.random.default_rng(0).uniform((0, 0), (640, 480), (60, 2))
    points = StereoPoints.of(np.tile([[320.0, 240.0]], (60, 1)), right, camera)
    assert not points.has_depth.any() and np.abs(points.covariances).max() < 1
    # The current camera is at one of the points, except for rounding.
    left0, right0, left1, right1 = stereo_scenes.Scene(unmatched=0.0).pixels(60, 0)[0]
    source, target = StereoPoints.of(left0, right0, pair()), StereoPoints.of(left1, right1, pair())
    for i in range(60):
        there = np.array([*source.points[:2, i], 1.0]) / source.points[2, i]
        left = stereo_residuals(source, target, 60, np.eye(3), there)
        assert left.squares[i] >= BEHIND**2 and np.abs(left.jacobian).max() < 1e30


def test_a_plane_from_coincident_points_gives_finite_motions() -> None:
    # x + y = -1: the term that regularises the equations of a plane cancels.
    pixels = CAMERA.project(np.tile([[-0.5, -0.5]], (20, 1)))
    matches, _ = normalise_matches(pixels, pixels + 1.0, CAMERA, CAMERA)
    for motion in plane_motions(matches, Motion(np.eye(3), np.array([1.0, 0.0, 0.0])), 1.0):
        assert np.isfinite(motion.translation).all()


def test_motions_of_a_plane_nearly_through_a_camera_have_valid_rotations() -> None:
    # OpenCV's function loses precision in this case.
    random, found = np.random.default_rng(0), 0
    for _ in range(50):
        direction = random.normal(size=3)
        direction /= np.linalg.norm(direction)
        plane = random.normal(size=3)
        plane += (1 - 10.0 ** random.uniform(-7, -2) - plane @ direction) * direction
        rays = np.column_stack([random.uniform(-0.5, 0.5, (40, 2)), np.ones(40)])
        current = rays - np.outer(rays @ plane, direction)
        images = [CAMERA.project(points[:, :2] / points[:, 2:]) for points in (rays, current)]
        matches, _ = normalise_matches(*images, CAMERA, CAMERA)
        for motion in plane_motions(matches, Motion(np.eye(3), direction), 1.0):
            np.testing.assert_allclose(motion.rotation @ motion.rotation.T, np.eye(3), atol=1e-9)
            assert np.linalg.det(motion.rotation) > 0
            found += 1
    assert found > 20


def test_one_point_with_an_extreme_focal_length_gives_finite_directions() -> None:
    camera = Camera(4096, 3000, np.array([[3.6864e6, 0, 2048], [0, 3.6864e6, 1500], [0, 0, 1]]))
    point = np.tile([[2048.0, 1500.0]], (60, 1))
    moved = point + np.random.default_rng(0).normal(0, 0.01, (60, 2))
    matches, _ = normalise_matches(point, moved, camera, camera)
    found = profile_directions(matches, [np.eye(3)], 0.1, 1e-9)
    assert found and all(np.isfinite(motion.rotation).all() for motion in found)


def test_the_cutoff_keeps_half_of_the_matches_if_one_residual_component_is_zero() -> None:
    residuals = np.array([np.random.default_rng(0).normal(0, 0.5, 100), np.zeros(100)])
    assert (lengths(residuals) < tukey_cutoff(residuals, 2.0, 0.0)).mean() > 0.5
    points = np.random.default_rng(0).uniform((0, 0), (640, 480), (100, 2))
    points[:, 1] = 240.0
    moved = points + np.column_stack([residuals[0], np.zeros(100)])
    pose = estimate_relative_pose(points, moved, CAMERA, CAMERA, keypoint_resolution=0.0)
    two_view_scenes.check(pose, 100)
    assert pose.status is PoseStatus.FAILED  # all matches are on one line


# Combinations of all of these


def hostile_scene(random: np.random.Generator) -> tuple[StereoCamera, list[np.ndarray]]:
    """Return a stereo pair with two lenses and any geometry, with points anywhere and invalid pixels."""
    lenses = list(stereo_scenes.LENSES.values())
    focal = 640 * random.choice([0.8, 0.8, 900.0])
    matrix = np.array([[focal, 0, 320], [0, focal, 240], [0, 0, 1]])
    cameras = [Camera(640, 480, matrix, *map(np.array, lenses[random.integers(len(lenses))])) for _ in range(2)]
    baseline = random.choice([0.001, 0.12, 10.0]) * np.eye(3)[random.choice([0, 0, 2])]
    camera = StereoCamera(cameras[0], cameras[1], np.eye(3), -baseline)
    rays = np.column_stack([random.uniform(-0.4, 0.4, (60, 2)), np.ones(60)])
    kind = random.integers(5)
    inverse_depths = [rays @ (0.12, -0.03, 0.2), np.full(60, 1e-9), random.choice([-0.3, 0.3], 60)]
    images = project_into_both_frames(
        rays / (inverse_depths[kind] if kind < 3 else random.uniform(0.1, 0.5, 60))[:, None], camera
    )
    for image in images:
        image += random.normal(0, random.choice([0.0, 0.3]), image.shape)
    for _ in range(random.integers(3)):
        some, one = random.random(60) < random.choice([0.5, 0.9, 1.0]), images[random.integers(4)]
        spoilt = random.integers(7)
        if spoilt == 0:
            one[some] = one[0]
        elif spoilt == 1:
            one[some] = np.nan
        elif spoilt == 2:
            one[some] += random.choice([-1, 1], 2) * 5000.0
        elif spoilt == 3:
            one[some, 1] = 0.5 * one[some, 0]
        elif spoilt == 4:
            images[2][some], images[3][some] = images[0][some], images[1][some]
        elif spoilt == 5:
            images[1] = images[0] - (random.choice([0.0, -5.0, 400.0]), 0)
        else:
            images[2][some] = images[0][some] + (30, -10)
    return camera, [image.astype(random.choice([np.float32, np.float64])) for image in images]


def test_any_scene_gives_a_pose_or_a_status_without_one() -> None:
    statuses = set()
    for seed in range(40):
        random = np.random.default_rng(seed)
        camera, images = hostile_scene(random)
        options = {
            "max_reprojection_error": float(random.choice([0.1, 1.0, 20.0])),
            "min_inliers": int(random.choice([6, 8, 60])),
            "keypoint_resolution": float(random.choice([0.0, 1.0])),
            "independent_points": float(random.choice([30.0, math.inf])),
        }
        before: list[tuple[PoseStatus, bytes]] = []
        for _ in range(2 if seed < 8 else 1):
            poses = [
                estimate_relative_pose(images[0], images[2], camera.left, camera.left, **options),
                estimate_stereo_motion(*images, camera, camera, **options),
            ]
            two_view_scenes.check(poses[0], 60)
            stereo_scenes.check(poses[1], 60)
            assert np.abs(poses[1].translation).max() < 1e8
            now = [(pose.status, pose.covariance.tobytes()) for pose in poses]
            assert before in ([], now), "the same matches give the same pose"
            before = now
            statuses |= {pose.status for pose in poses}
    assert statuses >= {PoseStatus.OK, PoseStatus.NO_TRANSLATION, PoseStatus.FAILED}


@pytest.mark.parametrize("image", [0, 1])
def test_points_that_coincide_in_one_image_give_no_motion(image: int) -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        points = [random.uniform((0, 0), (639, 479), (80, 2)), np.full((80, 2), 100.0)]
        before, after = points if image else points[::-1]
        pose = estimate_relative_pose(before, after, CAMERA, CAMERA)
        assert pose.status is PoseStatus.FAILED


def test_through_a_telephoto_lens_no_pose_on_the_wrong_side_of_the_line_of_sight_is_sure() -> None:
    # The motion with mirrored depths explains the matches of such a view nearly as well as the true one.
    camera = Camera(640, 480, np.array([[32_000.0, 0, 320], [0, 32_000.0, 240], [0, 0, 1]]))
    statuses = []
    for seed in range(30):
        random = np.random.default_rng(seed)
        rays = camera.normalise(random.uniform((0, 0), (640, 480), (300, 2)))
        points = np.column_stack([rays, np.ones(300)]) / random.uniform(1 / 600, 1 / 150, (300, 1))
        turn = cv2.Rodrigues(random.normal(0, 1e-3, 3))[0]
        step = random.normal(size=3) * 0.5
        current = (points - step) @ turn
        seen = [
            camera.project(each[:, :2] / each[:, 2:]) + random.normal(0, 0.3, (300, 2)) for each in (points, current)
        ]
        pose = estimate_relative_pose(*seen, camera, camera, keypoint_resolution=0.0)
        statuses.append(pose.status)
        assert pose.status is not PoseStatus.OK or pose.translation @ step > 0, seed
    assert statuses.count(PoseStatus.AMBIGUOUS) > 15
