"""Fuzz tests of the compiled functions of two_view*.py.

This imports only the geometry, and not pytest, because it runs with a library built to stop at undefined behaviour.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from kpmatch_ros.geometry.two_view_errors import (
    Matches,
    Model,
    Motion,
    agrees,
    depths,
    differentiate,
    displacements,
    epipolar_residuals,
    is_in_front,
    residual_sizes,
    rotation_residuals,
)
from kpmatch_ros.geometry.two_view_fit import Noise, minimise, motion_covariances, rotation_covariance
from kpmatch_ros.geometry.two_view_profile import profile_directions, refine_turns

# No matches, a few, and numbers that fill the blocks of the C code exactly or nearly.
COUNTS = (0, 1, 2, 3, 7, 20, 100, 127, 128, 129, 255, 256, 257, 400)
NUMBERS = [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e160, -1e-160, 1e6, 0.0]


def rotation_of(random: np.random.Generator, size: float) -> np.ndarray:
    return np.asarray(cv2.Rodrigues(random.normal(0, size, (3, 1)))[0])


def motion_of(random: np.random.Generator) -> Motion:
    """Return a motion with any translation, often along an axis, and a rotation that may be zero or large."""
    translation = random.normal(0, 1, 3) if random.random() < 0.8 else np.eye(3)[random.integers(3)]
    turn = rotation_of(random, random.choice([0.0, 0.03, 1.0]))
    return Motion(turn, translation * random.choice([-1, 1]) / np.linalg.norm(translation))


def matches_of(random: np.random.Generator, motion: Motion, count: int) -> Matches:
    """Return matches: some correct, with or without noise, some at random positions, and some behind a camera."""
    focal = random.choice([2.0, 400.0])
    columns = np.ones((4, 3, count))
    columns[0, :2] = random.normal(0, random.choice([0.1, 0.5, 3.0]), (2, count))
    depth = random.uniform(1, random.choice([3.0, 1e4]), count)
    seen = motion.rotation.T @ (columns[0] * depth - motion.translation[:, None])
    columns[1, :2] = seen[:2] / seen[2]
    columns[1, :2] += random.normal(0, random.choice([0.0, 0.5, 3.0]) / focal, (2, count))
    wrong = random.random(count) < random.choice([0.0, 0.3])
    columns[1, :2, wrong] = random.normal(0, 0.5, (wrong.sum(), 2))
    lens = random.normal(0, 0.1, (2, 2, 2, count)) + np.eye(2)[:, :, None]
    for noise, ((xx, xy), (yx, yy)) in zip(columns[2:], lens / focal):
        noise[:] = xx * xx + xy * xy, xx * yx + xy * yy, yx * yx + yy * yy
    return Matches(columns)


def spoil(columns: np.ndarray, random: np.random.Generator, numbers: list[float]) -> None:
    """Put values that cannot come from an image into some of the columns."""
    spoilt = random.random(columns.shape) < random.choice([0.3, 1.0]) / max(columns.size, 1)
    columns[spoilt] = random.choice(numbers, int(spoilt.sum()))


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, or its error for singular equations."""
    with np.errstate(all="ignore"):
        try:
            return call(*arguments)
        except np.linalg.LinAlgError as error:
            return repr(error)


def calls_of(random: np.random.Generator, numbers: list[float]) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return functions of two_view*.py that call C, with arguments, some of which contain these numbers."""
    motion = motion_of(random)
    matches = matches_of(random, motion, int(random.choice(COUNTS)))
    if numbers and random.random() < 0.7:
        spoil(matches.columns, random, numbers)
    near = motion.moved(random.normal(0, random.choice([1e-6, 0.01, 0.5]), 5))
    threshold = float(random.choice([0.5, 1.0, 6.0]))
    shifts = random.normal(0, 1, (3, 3))
    shifts /= np.linalg.norm(shifts, axis=1, keepdims=True)
    turns = np.array([motion.rotation, near.rotation, rotation_of(random, 1.0)])
    used = random.random(len(matches)) < 0.8 if random.random() < 0.5 else None
    return [
        (refine_turns, (matches, turns, shifts, (4.0,), threshold, 0.3)),
        (epipolar_residuals, (matches, near)),
        (rotation_residuals, (matches, near.rotation)),
        (depths, (matches, near)),
        (displacements, (matches, near.rotation)),
        (agrees, (matches, near, threshold)),
        (is_in_front, (matches, near, threshold)),
        (residual_sizes, (matches, near, threshold)),
        *((differentiate, (model, matches, near)) for model in Model),
        *((minimise, (model, matches, near, 16 * threshold, 1, 1e-3, used)) for model in Model),
    ]


def call_with_hostile_matches(random: np.random.Generator) -> None:
    """Check that arguments do not change, and that results do not depend on their place in memory."""
    calls = calls_of(random, NUMBERS)
    matches, turns = calls[0][1][:2]
    noise = Noise(1.0, 0.0)
    calls += [
        (profile_directions, (matches, list(turns), 1.0, 1e-9)),
        (motion_covariances, (matches, motion_of(random), noise)),
        (rotation_covariance, (matches, turns[0], noise)),
        *((minimise, (model, matches, motion_of(random), 1e9, 10)) for model in Model),
    ]
    given = matches.columns.copy()
    moved = np.empty(given.size + 1)[1:].reshape(given.shape)
    moved[...] = given
    for call, arguments in calls:
        first = pickle.dumps(outcome(call, *arguments))
        elsewhere = [Matches(moved) if each is matches else each for each in arguments]
        assert pickle.dumps(outcome(call, *elsewhere)) == first, call
        assert np.array_equal(matches.columns, given, equal_nan=True)
