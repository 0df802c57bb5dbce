"""Matches that leave the motion free, and hostile ones: a pose, or the reason why there is none, and never an error."""

from __future__ import annotations

import numpy as np
import two_view_scenes

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.two_modes import plane_motions
from kpmatch_ros.geometry.two_view_errors import Motion, normalise_matches
from kpmatch_ros.geometry.two_view_profile import profile_directions

CAMERA = two_view_scenes.CAMERA


def test_a_plane_through_points_of_one_line_has_no_second_motion() -> None:
    # x + y = -1: what keeps the equations of a plane regular cancels.
    pixels = CAMERA.project(np.tile([[-0.5, -0.5]], (20, 1)))
    matches, _ = normalise_matches(pixels, pixels + 1.0, CAMERA, CAMERA)
    for motion in plane_motions(matches, Motion(np.eye(3), np.array([1.0, 0.0, 0.0])), 1.0):
        assert np.isfinite(motion.translation).all()


def test_the_motions_of_a_plane_that_goes_nearly_through_a_camera_are_rotations() -> None:
    # There OpenCV's lose their digits.
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


def test_one_point_through_a_lens_that_enlarges_a_thousand_times_leaves_the_profile_regular() -> None:
    camera = Camera(4096, 3000, np.array([[3.6864e6, 0, 2048], [0, 3.6864e6, 1500], [0, 0, 1]]))
    point = np.tile([[2048.0, 1500.0]], (60, 1))
    moved = point + np.random.default_rng(0).normal(0, 0.01, (60, 2))
    matches, _ = normalise_matches(point, moved, camera, camera)
    found = profile_directions(matches, [np.eye(3)], 0.1, 1e-9)
    assert found and all(np.isfinite(motion.rotation).all() for motion in found)
