"""Bindings of the compiled geometry library, which the build of the ROS package puts next to this file.

Its sources are five_point.c, flow.c, geometry.c, lens.c, points.c, structure.c, two_view.c and two_view_profile.c in
src/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpmatch_ros.imaging.images import MAX_SIDE
from kpmatch_ros.runtime import compiled_library

if TYPE_CHECKING:
    from kpmatch_ros.geometry.structure import Window

__all__ = [
    "LIBRARY",
    "align",
    "available",
    "best_essential",
    "cut",
    "depths",
    "differentiate",
    "displacements",
    "epipolar_residuals",
    "first_of_each_place",
    "follow",
    "hessian",
    "in_front",
    "largest_elsewhere",
    "minimise",
    "motion_equations",
    "nearest",
    "neighbours",
    "open_library",
    "place",
    "refine_turns",
    "residual_sizes",
    "rotation_residuals",
    "triangulate",
    "undistort",
]

LIBRARY = Path(__file__).with_name("libkpmatch_geometry.so")
_VERSION = 7  # of the functions' arguments and meaning, as in src/geometry.c
_MOST_LEVELS = 16  # of a pyramid
_USED = 85  # pixels of a patch that are compared
_PATCH = 5 * _USED + 63 + 9  # numbers in a patch


class _Array:
    """A function argument: an array that C reads or writes, or None."""

    @classmethod
    def from_param(cls, values: np.ndarray | None) -> ctypes.c_void_p | None:
        return None if values is None else ctypes.c_void_p(_address(values))


def open_library(path: Path) -> ctypes.CDLL | None:
    """As :func:`kpmatch_ros.runtime.compiled_library.open_library`."""
    truth, size, number, array = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, _Array
    matches = [size, array]
    functions = {
        "kpmatch_align": (None, [size, array, size, size, array, array, truth, *5 * [array]]),
        "kpmatch_cut": (None, [size, size, size, *4 * [array]]),
        "kpmatch_undistort": (None, [size, array, array, number, array, array]),
        "kpmatch_epipolar_residuals": (None, [*matches, *2 * [array]]),
        "kpmatch_rotation_residuals": (None, [*matches, *2 * [array]]),
        "kpmatch_depths": (None, [*matches, *2 * [array]]),
        "kpmatch_displacements": (None, [*matches, *3 * [array]]),
        "kpmatch_in_front": (None, [*matches, array, number, truth, array]),
        "kpmatch_residual_sizes": (None, [*matches, array, number, array]),
        "kpmatch_differentiate": (None, [truth, *matches, *3 * [array]]),
        "kpmatch_minimise": (truth, [truth, *matches, array, number, size, number, array]),
        "kpmatch_best_essential": (truth, [*matches, size, array, number, *2 * [array]]),
        "kpmatch_hessian": (None, [truth, *matches, array, number, number, array]),
        "kpmatch_refine_turns": (truth, [*matches, size, array, number, size, *3 * [array]]),
        "kpmatch_follow": (None, [size, array, array, array, truth, size, *3 * [array]]),
        "kpmatch_nearest": (None, [size, array, size, array, number, array, array]),
        "kpmatch_first_of_each_place": (None, [size, array, number, *3 * [array]]),
        "kpmatch_neighbours": (None, [size, array, array, size, *4 * [array]]),
        "kpmatch_largest_elsewhere": (None, [size, size, *3 * [array], ctypes.c_float, array]),
        "kpmatch_triangulate": (None, [size, size, array, array, size, *4 * [array]]),
        "kpmatch_place": (None, [size, size, *5 * [array]]),
        "kpmatch_motion_equations": (None, [size, size, *3 * [array], number, *4 * [array]]),
    }
    return compiled_library.open_library(path, _VERSION, functions, "NumPy")


_library: Any = open_library(LIBRARY)


def available() -> bool:
    """Whether the library is loaded."""
    return _library is not None


def align(
    patches: np.ndarray, image: np.ndarray, places: np.ndarray, points: np.ndarray, shapes: np.ndarray, shifts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The members of the Alignment that patches.align returns. `places` (2, 85) are the compared pixels of a patch."""
    image, places, count = _image(image), _given(places, np.float32, 2, _USED), len(points)
    patches = _given(patches, np.float32, count, _PATCH)
    results = (
        _copied(points, np.float32, count, 2),
        _copied(shapes, np.float32, count, 2, 2),
        np.empty(count, np.float32),
        np.empty(count, np.float32),
        np.empty(count, bool),
    )
    _library.kpmatch_align(count, patches, *image.shape, image, places, shifts, *results)
    return results


def cut(image: np.ndarray, places: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The result of patches.cut. `places` (2, 85) are integers of at most 6 pixels."""
    image, places, count = _image(image), _given(places, np.float32, 2, _USED), len(points)
    patches = np.empty((count, _PATCH), np.float32)
    _library.kpmatch_cut(count, *image.shape, image, places, _given(points, np.float32, count, 2), patches)
    return patches


def _image(image: np.ndarray) -> np.ndarray:
    """An image (2 H, 2 W) from patches.signed, checked for C.

    C rounds positions by far less than the one pixel that it keeps free at the border, and uses 32-bit pixel indices.
    """
    height, width = image.shape
    if max(height, width) > 2 * MAX_SIDE or height * width >= 2**31:
        raise ValueError(
            f"the image of {width // 2}x{height // 2} pixels has a side of more than {MAX_SIDE}, or 2^29 pixels or more"
        )
    return _given(image, np.float32, height, width)


def undistort(distorted: np.ndarray, coefficients: np.ndarray, furthest: float) -> tuple[np.ndarray, np.ndarray]:
    """The result of lens.undistort, for the polynomial model with eight coefficients."""
    count = len(distorted)
    distorted, coefficients = _given(distorted, np.float64, count, 2), _given(coefficients, np.float64, 8)
    results = np.empty((count, 2)), np.empty((count, 2, 2))
    _library.kpmatch_undistort(count, distorted, coefficients, furthest, *results)
    return results


# Functions for tracks, from src/flow.c, src/points.c and src/structure.c.


def follow(
    pyramid0: Sequence[np.ndarray],
    pyramid1: Sequence[np.ndarray],
    points: np.ndarray,
    start: np.ndarray,
    window: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Optical flow as OpenCV's: positions (T, 2) of one image's points (T, 2) in another, and mask (T,) of those found.

    Each image is a pyramid: uint8 levels, the largest first, with the same sizes for both images. The window's side is
    13 or 21 pixels.
    """
    sides = np.array([each.shape for each in pyramid0], np.int64)
    if window not in (13, 21):
        raise ValueError(f"window must be 13 or 21 pixels, not {window}")
    if not 1 <= len(sides) <= _MOST_LEVELS or len(sides) != len(pyramid1) or sides.min() < 1:
        raise ValueError(
            f"the pyramids must have the same number of levels, 1 to {_MOST_LEVELS}, and no empty level, not "
            f"{len(pyramid0)} and {len(pyramid1)} levels with the sides {sides.tolist()}"
        )
    levels = [
        [_given(level, np.uint8, *side) for level, side in zip(each, sides.tolist())] for each in (pyramid0, pyramid1)
    ]
    first, second = (np.array([*map(_address, each)], np.uintp) for each in levels)
    count, points = len(points), _given(points, np.float32, len(points), 2)
    moved, found = _copied(start, np.float32, count, 2), np.empty(count, bool)
    _library.kpmatch_follow(len(sides), sides, first, second, window, count, points, moved, found)
    return moved, found


def nearest(points: np.ndarray, others: np.ndarray, furthest: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance from each of the points (N, 2) to the nearest of others (M, 2), and its index; inf and M if too far."""
    distances, which = np.empty(len(points)), np.empty(len(points), np.int64)
    _library.kpmatch_nearest(len(points), _columns(points), len(others), _columns(others), furthest, distances, which)
    return distances, which


def first_of_each_place(points: np.ndarray, distance: float, ages: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mask (T,) of the points that stay, of several within the distance: the lowest age, then the highest score."""
    count, stay = len(points), np.empty(len(points), bool)
    ages, scores = _given(ages, np.uint64, count), _given(scores, np.float32, count)
    _library.kpmatch_first_of_each_place(count, _columns(points), distance, ages, scores, stay)
    return stay


def neighbours(
    points: np.ndarray, own: np.ndarray, others: np.ndarray, moves: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Median motion (R, 2) of the neighbours of points (R, 2) among others (M, 2), and their disagreement (R,).

    Args:
        points: the points.
        own: (R,) bool, which of the points are among the others.
        others: at least 8 points.
        moves: (M, 2) motion of the others.
    """
    count, most = len(points), len(others)
    if most < 8:
        raise ValueError(f"too few points to find 7 neighbours: {most} instead of at least 8")
    results = np.empty((count, 2), np.float32), np.empty(count, np.float32)
    points, own, moves = _columns(points), _given(own, np.bool_, count), _given(moves.T, np.float32, 2, most)
    _library.kpmatch_neighbours(count, points, own, most, _columns(others), moves, *results)
    return results


def largest_elsewhere(numbers: np.ndarray, points: np.ndarray, places: np.ndarray, distance: float) -> np.ndarray:
    """Largest number of each row (R, N), at least -1, of points (N, 2) not within `distance` of its place (R, 2)."""
    rows, count, largest = len(places), len(points), np.empty(len(places), np.float32)
    numbers = _given(numbers, np.float32, rows, count)
    _library.kpmatch_largest_elsewhere(rows, count, numbers, _columns(points), _columns(places), distance, largest)
    return largest


def triangulate(
    cameras: Window,
    sights: np.ndarray,
    reference: int,
    prior: np.ndarray | float,
    prior_information: np.ndarray | float,
) -> tuple[np.ndarray, np.ndarray]:
    """1/z, the last row of the result of structure.triangulate, and its information."""
    frames, count, seen = _seen(cameras, sights)
    if not -frames <= reference < frames:
        raise ValueError(f"reference frame {reference} is out of range for {frames} frames")
    expected = [_given(np.broadcast_to(each, count), np.float32, count) for each in (prior, prior_information)]
    results = np.empty(count, np.float32), np.empty(count, np.float32)
    _library.kpmatch_triangulate(frames, count, *seen, reference % frames, *expected, *results)
    return results


def place(cameras: Window, landmarks: np.ndarray, sights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The landmarks, squares and freedom of the result of structure.place."""
    frames, count, seen = _seen(cameras, sights)
    landmarks = _copied(landmarks, np.float32, 3, count)
    results = landmarks, np.empty(count, np.float32), np.empty(count, np.int64)
    _library.kpmatch_place(frames, count, *seen, *results)
    return results


def motion_equations(
    cameras: Window, landmarks: np.ndarray, sights: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The result of structure.motion_equations."""
    frames, count, seen = _seen(cameras, sights)
    landmarks = _given(landmarks, np.float32, 3, count)
    results = np.empty((6, 6)), np.empty(6), np.empty((3, count), np.float32), np.empty((3, 6, count), np.float32)
    _library.kpmatch_motion_equations(frames, count, *seen, landmarks, cutoff, *results)
    return results


def _seen(cameras: Window, sights: np.ndarray) -> tuple[int, int, tuple[np.ndarray, np.ndarray]]:
    """Numbers of frames and points, and the cameras (F, 12) and sights (F, 5, T) in C's layout."""
    frames, count = len(sights), sights.shape[-1]
    both = np.concatenate([cameras.rotations.reshape(-1, 9), cameras.translations], axis=1)
    return frames, count, (_given(both, np.float32, frames, 12), _given(sights, np.float32, frames, 5, count))


# Functions for the motion of two views, from src/two_view*.c. `columns` (4, 3, n) are those of Matches. A rotation
# (3, 3) and a translation (3,) are those of a Motion. The functions are those with the same names in two_view*.py.

_SHAPES = ((5, 1), (3, 2))  # numbers of parameters and of conditions of each Model


def epipolar_residuals(columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    columns, motion = _matches(columns), _motion(rotation, translation)
    residuals = np.empty(columns.shape[2])
    _library.kpmatch_epipolar_residuals(len(residuals), columns, motion, residuals)
    return residuals


def rotation_residuals(columns: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    columns, rotation = _matches(columns), _given(rotation, np.float64, 3, 3)
    residuals = np.empty((2, columns.shape[2]))
    _library.kpmatch_rotation_residuals(columns.shape[2], columns, rotation, residuals)
    return residuals


def depths(
    columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns, motion = _matches(columns), _motion(rotation, translation)
    found = np.empty((3, columns.shape[2]))
    _library.kpmatch_depths(columns.shape[2], columns, motion, found)
    return found[0], found[1], found[2]


def displacements(columns: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    columns, rotation = _matches(columns), _given(rotation, np.float64, 3, 3)
    results = np.empty(columns.shape[2], bool), np.empty(columns.shape[2])
    _library.kpmatch_displacements(columns.shape[2], columns, rotation, *results)
    return results


def in_front(
    columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray, inlier_threshold: float, *, near: bool
) -> np.ndarray:
    """Mask (n,) of matches in front of both cameras, as is_in_front; with `near`, also near their lines, as agrees."""
    columns, motion = _matches(columns), _motion(rotation, translation)
    front = np.empty(columns.shape[2], bool)
    _library.kpmatch_in_front(len(front), columns, motion, inlier_threshold, near, front)
    return front


def residual_sizes(
    columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray, inlier_threshold: float
) -> np.ndarray:
    columns, motion = _matches(columns), _motion(rotation, translation)
    sizes = np.empty(columns.shape[2])
    _library.kpmatch_residual_sizes(len(sizes), columns, motion, inlier_threshold, sizes)
    return sizes


def differentiate(
    model: int, columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    columns, motion, (numbers, conditions) = _matches(columns), _motion(rotation, translation), _SHAPES[model]
    results = np.empty((conditions, columns.shape[2])), np.empty((numbers, conditions, columns.shape[2]))
    _library.kpmatch_differentiate(model, columns.shape[2], columns, motion, *results)
    return results


def minimise(
    model: int,
    columns: np.ndarray,
    rotation: np.ndarray,
    translation: np.ndarray,
    cutoff: float,
    iterations: int,
    settled: float,
    used: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The refined rotation and translation."""
    columns, motion = _matches(columns), _motion(rotation, translation)
    count = columns.shape[2]
    used = None if used is None else _given(used, np.bool_, count)
    if not _library.kpmatch_minimise(model, count, columns, motion, cutoff, iterations, settled, used):
        raise np.linalg.LinAlgError("Singular matrix")
    return motion[:9].reshape(3, 3), motion[9:]


def best_essential(
    columns: np.ndarray, samples: np.ndarray, inlier_threshold: float, cost: float
) -> tuple[np.ndarray, float] | None:
    """The result of five_point.best_essential.

    Raises:
        IndexError: a sample has a match that does not exist.
    """
    columns, samples = _matches(columns), _given(samples, np.int32, len(samples), 5)
    if len(samples) and (samples.min() < 0 or samples.max() >= columns.shape[2]):
        raise IndexError(f"samples of {columns.shape[2]} matches have indices {samples.min()} to {samples.max()}")
    essential, lowest = np.empty((3, 3)), np.array([cost])
    given = columns.shape[2], columns, len(samples), samples
    if not _library.kpmatch_best_essential(*given, inlier_threshold, essential, lowest):
        return None
    return essential, float(lowest[0])


def hessian(
    model: int, columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray, cutoff: float, step: float
) -> np.ndarray:
    """The result of two_view_fit._hessian, from differences over `step`, radians."""
    columns, motion, numbers = _matches(columns), _motion(rotation, translation), _SHAPES[model][0]
    found = np.empty((numbers, numbers))
    _library.kpmatch_hessian(model, columns.shape[2], columns, motion, cutoff, step, found)
    return found


def refine_turns(
    columns: np.ndarray, turns: np.ndarray, shifts: np.ndarray, cutoffs: Sequence[float], prior_information: float
) -> tuple[np.ndarray, np.ndarray]:
    """The result of two_view_profile.refine_turns, with cutoffs in pixels."""
    columns, steps, motions = _matches(columns), np.array(cutoffs, float), len(turns)
    turns, shifts = _copied(turns, np.float64, motions, 3, 3), _given(shifts, np.float64, motions, 3)
    residuals = np.empty((motions, columns.shape[2]))
    matches = columns.shape[2], columns
    if not _library.kpmatch_refine_turns(
        *matches, len(steps), steps, prior_information, motions, turns, shifts, residuals
    ):
        raise np.linalg.LinAlgError("Singular matrix")
    return turns, residuals


def _matches(columns: np.ndarray) -> np.ndarray:
    return _given(columns, np.float64, 4, 3, columns.shape[-1])


def _motion(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """A copy (12,)."""
    return _given(np.concatenate([rotation, translation], axis=None, dtype=np.float64), np.float64, 12)


def _given(values: np.ndarray, dtype: type[np.generic], *shape: int) -> np.ndarray:
    """The values in C's layout: contiguous, in this machine's byte order, and aligned.

    Raises:
        ValueError: the array has another shape.
    """
    if values.shape != shape:
        raise ValueError(f"array has shape {values.shape}, expected {shape}")
    if type(values) is np.ndarray and values.dtype.type is dtype and values.dtype.isnative and values.flags.carray:
        return values  # the usual case
    return np.require(values, dtype, ["C_CONTIGUOUS", "ALIGNED", "ENSUREARRAY"])


def _copied(values: np.ndarray, dtype: type[np.generic], *shape: int) -> np.ndarray:
    """As :func:`_given`, but a copy that C may write to."""
    return _given(values, dtype, *shape).copy()


def _columns(points: np.ndarray) -> np.ndarray:
    """Points (N, 2) in C's layout: (2, N) float32."""
    return _given(points.T, np.float32, 2, len(points))


def _address(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])
