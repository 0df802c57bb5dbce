"""Tests that the compiled two-view motion gives NumPy's results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compiled_geometry import needed, with_numpy
from two_view_fuzz import call_with_hostile_matches, calls_of, matches_of, motion_of, outcome
from two_view_scenes import DRONE, Scene

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.pose import RelativePose
from kpmatch_ros.geometry.two_view_errors import Model
from kpmatch_ros.geometry.two_view_fit import Noise, motion_covariances, rotation_covariance
from kpmatch_ros.geometry.two_view_profile import profile_directions, refine_turns


def compare(ours: Any, numpys: Any, tolerance: float, what: object = "") -> None:
    """Check that both agree within this fraction of the largest number in each array."""
    if isinstance(numpys, np.ndarray | float):
        ours, numpys = np.asarray(ours), np.asarray(numpys)
        assert ours.shape == numpys.shape and ours.dtype == numpys.dtype, what
        size = np.abs(numpys[np.isfinite(numpys)]).max(initial=0.0)
        np.testing.assert_allclose(ours, numpys, rtol=tolerance, atol=tolerance * size, err_msg=str(what))
    elif isinstance(numpys, list | tuple):
        assert len(ours) == len(numpys), what
        for one, other in zip(ours, numpys):
            compare(one, other, tolerance, what)
    else:
        assert ours == numpys, what


@needed
@pytest.mark.parametrize("numbers", [[], [np.nan], [np.inf, -np.inf]], ids=["sound", "nan", "inf"])
def test_random_matches_give_the_same_results_as_numpy(numbers: list[float]) -> None:
    for seed in range(60):
        for call, arguments in calls_of(np.random.default_rng(seed), numbers):
            ours, numpys = outcome(call, *arguments), with_numpy(outcome, call, *arguments)
            compare(ours, numpys, 1e-6, (seed, call))


@needed
def test_the_likeliest_directions_agree_with_numpy() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        motion = motion_of(random)
        arguments = matches_of(random, motion, 100), [motion.rotation, np.eye(3)], 1.0, 0.3
        compare(profile_directions(*arguments), with_numpy(profile_directions, *arguments), 1e-6, seed)


@needed
def test_covariances_agree_with_numpy() -> None:
    for seed in range(40):
        random = np.random.default_rng(seed)
        motion = motion_of(random)
        matches, noise = matches_of(random, motion, 100), Noise(1.0, 0.5)
        for call, of in ((motion_covariances, motion), (rotation_covariance, motion.rotation)):
            ours, numpys = call(matches, of, noise), with_numpy(call, matches, of, noise)
            compare(ours, numpys, 1e-4, (seed, call))  # second derivatives by finite differences


@needed
def test_with_invalid_matches_arguments_are_unchanged_and_results_repeatable() -> None:
    for seed in range(60):
        call_with_hostile_matches(np.random.default_rng(seed))


@needed
@pytest.mark.parametrize(
    "scene",
    [
        Scene(noise=0.3, outliers=0.3),
        Scene(noise=0.5, outliers=0.6),
        Scene(noise=0.3, plane=True),
        Scene(noise=0.3, far=0.9, outliers=0.2),
        Scene(translation=(0, 0, 0), noise=0.3, outliers=0.2),
        Scene(rounded=True, outliers=0.2),
        Scene(camera0=DRONE, camera1=DRONE, noise=0.3, outliers=0.2),
    ],
)
def test_poses_agree_with_numpy(scene: Scene) -> None:
    for seed in range(2):
        for count in (20, 60, 300):
            ours = scene.estimate(count, seed)
            numpys: RelativePose = with_numpy(scene.estimate, count, seed)
            assert ours.status == numpys.status and np.array_equal(ours.inliers, numpys.inliers)
            # Rounding decides after which iteration a minimisation ends. A rotation by 1e-5 moves points by 0.005 px.
            compare([ours.rotation, ours.translation], [numpys.rotation, numpys.translation], 1e-5)
            compare(ours.covariance, numpys.covariance, 1e-3)
            compare(ours.median_parallax, numpys.median_parallax, 1e-3)


@needed
def test_without_matches_the_rotation_is_not_changed() -> None:
    matches = matches_of(np.random.default_rng(0), motion_of(np.random.default_rng(0)), 0)
    for motion in profile_directions(matches, [np.eye(3)], 1.0, 0.3):
        np.testing.assert_array_equal(motion.rotation, np.eye(3))


@needed
def test_singular_equations_raise_the_same_error_as_numpy() -> None:
    # With such a small threshold the prior information remains zero, and no match constrains the rotation.
    nothing, shift = (
        matches_of(np.random.default_rng(0), motion_of(np.random.default_rng(0)), 0),
        np.array([[0, 0, 1.0]]),
    )
    for call in (lambda f, *x: f(*x), with_numpy):
        with pytest.raises(np.linalg.LinAlgError):
            call(refine_turns, nothing, np.eye(3)[None], shift, (1.0,), 1e-200, 0.0)


@needed
def test_mismatched_arrays_are_refused() -> None:
    matches = matches_of(np.random.default_rng(0), motion_of(np.random.default_rng(0)), 5)
    for columns, rotation in ((matches.columns[:3], np.eye(3)), (matches.columns, np.eye(2))):
        with pytest.raises(ValueError, match="shape"):
            compiled.rotation_residuals(columns, rotation)
    with pytest.raises(ValueError, match="shape"):
        compiled.minimise(Model.EPIPOLAR, matches.columns, np.eye(3), np.ones(3), 1.0, 5, 1e-3, np.ones(4, bool))
