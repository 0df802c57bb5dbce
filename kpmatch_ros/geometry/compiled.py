"""The compiled part of this folder, where the build of the ROS package has put it beside.

It is made from flow.c, geometry.c, points.c, structure.c, two_view.c and two_view_profile.c in src/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kpmatch_ros import compiled_library

if TYPE_CHECKING:
    from kpmatch_ros.geometry.structure import Window

__all__ = [
    "LIBRARY",
    "align",
    "available",
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
_VERSION = 3  # as in src/geometry.c: the arguments and the meaning of its functions
_LONGEST_SIDE = 2**15 - 2
"""Pixels: cv2.remap takes no more.

In src/geometry.c, such places are rounded by far less than the pixel that is kept free at an image's border, and 32
bits count all pixels.
"""
_MOST_LEVELS = 16  # of a pyramid
_USED = 85  # pixels of a patch that are compared
_PATCH = 4 * _USED + 63 + 9  # numbers of a patch


def open_library(path: Path) -> ctypes.CDLL | None:
    """As :func:`kpmatch_ros.compiled_library.open_library`."""
    truth, size, number, address = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    matches = [size, address]
    functions = {
        "kpmatch_align": (None, [size, address, size, size, address, address, ctypes.c_int32, *5 * [address]]),
        "kpmatch_cut": (None, [size, size, size, *4 * [address]]),
        "kpmatch_undistort": (None, [size, *4 * [address]]),
        "kpmatch_epipolar_residuals": (None, [*matches, *2 * [address]]),
        "kpmatch_rotation_residuals": (None, [*matches, *2 * [address]]),
        "kpmatch_depths": (None, [*matches, *2 * [address]]),
        "kpmatch_displacements": (None, [*matches, *3 * [address]]),
        "kpmatch_in_front": (None, [*matches, address, number, truth, address]),
        "kpmatch_residual_sizes": (None, [*matches, address, number, address]),
        "kpmatch_differentiate": (None, [truth, *matches, *3 * [address]]),
        "kpmatch_minimise": (truth, [truth, *matches, address, number, size, number, address]),
        "kpmatch_hessian": (None, [truth, *matches, address, number, number, address]),
        "kpmatch_refine_turns": (truth, [*matches, size, address, number, size, *3 * [address]]),
        "kpmatch_follow": (None, [size, address, address, address, truth, size, *3 * [address]]),
        "kpmatch_nearest": (None, [size, address, size, address, number, address, address]),
        "kpmatch_first_of_each_place": (None, [size, address, number, *3 * [address]]),
        "kpmatch_neighbours": (None, [size, address, address, size, *4 * [address]]),
        "kpmatch_largest_elsewhere": (None, [size, size, *3 * [address], ctypes.c_float, address]),
        "kpmatch_triangulate": (None, [size, size, address, address, size, *3 * [address]]),
        "kpmatch_place": (None, [size, size, *5 * [address]]),
        "kpmatch_motion_equations": (None, [size, size, *3 * [address], number, *4 * [address]]),
    }
    return compiled_library.open_library(path, _VERSION, functions, "NumPy")


_library = open_library(LIBRARY)


def available() -> bool:
    """Whether the library is there."""
    return _library is not None


def align(
    patches: np.ndarray, image: np.ndarray, places: np.ndarray, points: np.ndarray, shapes: np.ndarray, shifts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The members of the Alignment that patches.align returns. Patches are compared at places (2, 85)."""
    assert _library is not None
    count, (height, width) = _patches(image, places, points)
    _check(patches, (count, _PATCH))
    _check(shapes, (count, 2, 2))
    patches, image, places = (_plain(each, np.float32) for each in (patches, image, places))
    points, shapes = (np.array(each, np.float32, order="C") for each in (points, shapes))
    sigmas, likeness, good = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, bool)
    results = points, shapes, sigmas, likeness, good
    _library.kpmatch_align(
        count, _address(patches), height, width, _address(image), _address(places), shifts, *map(_address, results)
    )
    return results


def cut(image: np.ndarray, places: np.ndarray, points: np.ndarray) -> np.ndarray:
    """What patches.cut returns. Places (2, 85) are whole numbers of up to 6 pixels."""
    assert _library is not None
    count, (height, width) = _patches(image, places, points)
    image, places, points = (_plain(each, np.float32) for each in (image, places, points))
    patches = np.empty((count, _PATCH), np.float32)
    _library.kpmatch_cut(count, height, width, *map(_address, (image, places, points, patches)))
    return patches


def _patches(image: np.ndarray, places: np.ndarray, points: np.ndarray) -> tuple[int, tuple[int, int]]:
    """How many points there are, and the image's height and width."""
    height, width = image.shape
    if max(height, width) > _LONGEST_SIDE:
        raise ValueError(f"an image of {width}x{height} pixels has a side of more than {_LONGEST_SIDE}")
    _check(places, (2, _USED))
    _check(points, (len(points), 2))
    return len(points), (height, width)


def undistort(distorted: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What lens.undistort returns, of the polynomial model with eight coefficients."""
    assert _library is not None
    _check(distorted, (len(distorted), 2))
    _check(coefficients, (8,))
    distorted, coefficients = (_plain(each, np.float64) for each in (distorted, coefficients))
    results = np.empty((len(distorted), 2)), np.empty((len(distorted), 2, 2))
    _library.kpmatch_undistort(len(distorted), _address(distorted), _address(coefficients), *map(_address, results))
    return results


# What src/flow.c, src/points.c and src/structure.c have of tracks.


def follow(
    pyramid0: Sequence[np.ndarray],
    pyramid1: Sequence[np.ndarray],
    points: np.ndarray,
    start: np.ndarray,
    window: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Where points (T, 2) of one image are in another, (T, 2), and which are found (T,), as OpenCV's optical flow.

    Each image is a pyramid: its levels, uint8, the largest first, of the same sizes both. A window has a side of 13 or
    21 pixels.
    """
    assert _library is not None
    count, sides = len(points), np.array([each.shape for each in pyramid0], np.int64)
    if window not in (13, 21):
        raise ValueError(f"a window of {window} pixels")
    if not 1 <= len(sides) <= _MOST_LEVELS or len(sides) != len(pyramid1) or sides.min() < 1:
        raise ValueError(f"pyramids of {len(pyramid0)} and {len(pyramid1)} levels, {sides.tolist()}")
    for each, shape in zip((*pyramid0, *pyramid1), (*sides, *sides)):
        _check(each, tuple(shape))
    _check(points, (count, 2))
    _check(start, (count, 2))
    levels = [[_plain(each, np.uint8) for each in pyramid] for pyramid in (pyramid0, pyramid1)]
    images: list[np.ndarray] = [sides, *(np.array([*map(_address, pyramid)], np.uintp) for pyramid in levels)]
    points, moved, found = _plain(points, np.float32), np.array(start, np.float32, order="C"), np.empty(count, bool)
    results = [_address(each) for each in (points, moved, found)]
    _library.kpmatch_follow(len(sides), *[_address(each) for each in images], window, count, *results)
    return moved, found


def nearest(points: np.ndarray, others: np.ndarray, furthest: float) -> tuple[np.ndarray, np.ndarray]:
    """How far the nearest of others (M, 2) is from each of the points (N, 2), and which; inf and M if not so near."""
    assert _library is not None
    count, most, (points, others) = len(points), len(others), map(_columns, (points, others))
    distances, which = np.empty(count), np.empty(count, np.int64)
    found = _address(distances), _address(which)
    _library.kpmatch_nearest(count, _address(points), most, _address(others), furthest, *found)
    return distances, which


def first_of_each_place(points: np.ndarray, distance: float, ages: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Which points (T, 2) stay if of two that are so near only one does: of the lower age, then the higher score."""
    assert _library is not None
    count, stay = len(points), np.empty(len(points), bool)
    _check(ages, (count,))
    _check(scores, (count,))
    points, ages, scores = _columns(points), _plain(ages, np.uint64), _plain(scores, np.float32)
    _library.kpmatch_first_of_each_place(
        count, _address(points), distance, _address(ages), _address(scores), _address(stay)
    )
    return stay


def neighbours(
    points: np.ndarray, own: np.ndarray, others: np.ndarray, moves: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How the neighbours of points (R, 2) among others (M, 2) move (R, 2), and by how much they disagree (R,).

    Args:
        points: the points.
        own: (R,) bool which of them are among the others.
        others: at least 8.
        moves: (M, 2) of the others.
    """
    assert _library is not None
    count, most = len(points), len(others)
    _check(own, (count,))
    _check(moves, (most, 2))
    if most < 8:
        raise ValueError(f"{most} points are too few neighbours")
    given: list[np.ndarray] = [_columns(points), _plain(own, np.bool_), _columns(others), _columns(moves)]
    results = np.empty((count, 2), np.float32), np.empty(count, np.float32)
    first, last = ([_address(each) for each in part] for part in (given[:2], (*given[2:], *results)))
    _library.kpmatch_neighbours(count, *first, most, *last)
    return results


def largest_elsewhere(numbers: np.ndarray, points: np.ndarray, places: np.ndarray, distance: float) -> np.ndarray:
    """The largest number of each row (R, N), -1 at least, of points (N, 2) that are not so near to its place (R, 2)."""
    assert _library is not None
    rows, count = len(places), len(points)
    _check(numbers, (rows, count))
    numbers, points, places = _plain(numbers, np.float32), _columns(points), _columns(places)
    largest = np.empty(rows, np.float32)
    addresses = map(_address, (numbers, points, places))
    _library.kpmatch_largest_elsewhere(rows, count, *addresses, distance, _address(largest))
    return largest


def triangulate(
    cameras: Window, rays: np.ndarray, reference: int, prior: np.ndarray | float, information: np.ndarray | float
) -> np.ndarray:
    """The last row of what structure.triangulate returns."""
    assert _library is not None
    frames, count, seen = _rays(cameras, rays)
    if not -frames <= reference < frames:
        raise ValueError(f"frame {reference} of {frames}")
    expected = [_plain(np.broadcast_to(each, count), np.float32) for each in (prior, information)]
    inverse, reference = np.empty(count, np.float32), reference % frames
    _library.kpmatch_triangulate(frames, count, *map(_address, seen), reference, *map(_address, (*expected, inverse)))
    return inverse


def place(cameras: Window, landmarks: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The landmarks, squares and freedom of what structure.place returns."""
    assert _library is not None
    frames, count, seen = _rays(cameras, rays)
    _check(landmarks, (3, count))
    results = np.array(landmarks, np.float32, order="C"), np.empty(count, np.float32), np.empty(count, np.int64)
    _library.kpmatch_place(frames, count, *map(_address, (*seen, *results)))
    return results


def motion_equations(
    cameras: Window, landmarks: np.ndarray, rays: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What structure.motion_equations returns."""
    assert _library is not None
    frames, count, seen = _rays(cameras, rays)
    _check(landmarks, (3, count))
    landmarks = _plain(landmarks, np.float32)
    results = np.empty((6, 6)), np.empty(6), np.empty((3, count), np.float32), np.empty((3, 6, count), np.float32)
    addresses = [_address(each) for each in results]
    _library.kpmatch_motion_equations(frames, count, *map(_address, (*seen, landmarks)), cutoff, *addresses)
    return results


def _rays(cameras: Window, rays: np.ndarray) -> tuple[int, int, tuple[np.ndarray, np.ndarray]]:
    """How many frames, and points, and the cameras (F, 12) and rays (F, 2, T) as C reads them."""
    frames, count = len(rays), rays.shape[-1]
    _check(rays, (frames, 2, count))
    _check(cameras.rotations, (frames, 3, 3))
    _check(cameras.translations, (frames, 3))
    both = np.concatenate([cameras.rotations.reshape(frames, 9), cameras.translations], axis=1)
    return frames, count, (_plain(both, np.float32), _plain(rays, np.float32))


# What src/two_view*.c have of the motion of two views. `columns` (4, 3, n) are those of Matches, a rotation (3, 3) and
# a translation (3,) those of a Motion, and the functions those of these names in two_view*.py.

_SHAPES = ((5, 1), (3, 2))  # numbers and conditions of each Model


def epipolar_residuals(columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    assert _library is not None
    columns, motion = _matches(columns), _motion(rotation, translation)
    residuals = np.empty(columns.shape[2])
    _library.kpmatch_epipolar_residuals(len(residuals), *map(_address, (columns, motion, residuals)))
    return residuals


def rotation_residuals(columns: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    assert _library is not None
    _check(rotation, (3, 3))
    columns, rotation = _matches(columns), _plain(rotation, np.float64)
    residuals = np.empty((2, columns.shape[2]))
    _library.kpmatch_rotation_residuals(columns.shape[2], *map(_address, (columns, rotation, residuals)))
    return residuals


def depths(
    columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert _library is not None
    columns, motion = _matches(columns), _motion(rotation, translation)
    found = np.empty((3, columns.shape[2]))
    _library.kpmatch_depths(columns.shape[2], *map(_address, (columns, motion, found)))
    return found[0], found[1], found[2]


def displacements(columns: np.ndarray, rotation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert _library is not None
    _check(rotation, (3, 3))
    columns, rotation = _matches(columns), _plain(rotation, np.float64)
    results = np.empty(columns.shape[2], bool), np.empty(columns.shape[2])
    _library.kpmatch_displacements(columns.shape[2], *map(_address, (columns, rotation, *results)))
    return results


def in_front(
    columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray, inlier_threshold: float, *, near: bool
) -> np.ndarray:
    """Which matches (n,) are in front of both cameras, as is_in_front; as agrees, if they are to be near as well."""
    assert _library is not None
    columns, motion = _matches(columns), _motion(rotation, translation)
    front = np.empty(columns.shape[2], bool)
    _library.kpmatch_in_front(len(front), _address(columns), _address(motion), inlier_threshold, near, _address(front))
    return front


def residual_sizes(
    columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray, inlier_threshold: float
) -> np.ndarray:
    assert _library is not None
    columns, motion = _matches(columns), _motion(rotation, translation)
    sizes = np.empty(columns.shape[2])
    _library.kpmatch_residual_sizes(len(sizes), _address(columns), _address(motion), inlier_threshold, _address(sizes))
    return sizes


def differentiate(
    model: int, columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    assert _library is not None
    columns, motion, (numbers, conditions) = _matches(columns), _motion(rotation, translation), _SHAPES[model]
    results = np.empty((conditions, columns.shape[2])), np.empty((numbers, conditions, columns.shape[2]))
    _library.kpmatch_differentiate(model, columns.shape[2], *map(_address, (columns, motion, *results)))
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
    """The rotation and the translation."""
    assert _library is not None
    columns, motion = _matches(columns), _motion(rotation, translation)
    if used is not None:
        _check(used, columns.shape[2:])
        used = _plain(used, np.bool_)
    matches = columns.shape[2], _address(columns)
    those = None if used is None else _address(used)
    if not _library.kpmatch_minimise(model, *matches, _address(motion), cutoff, iterations, settled, those):
        raise np.linalg.LinAlgError("Singular matrix")
    return motion[:9].reshape(3, 3), motion[9:]


def hessian(
    model: int, columns: np.ndarray, rotation: np.ndarray, translation: np.ndarray, cutoff: float, step: float
) -> np.ndarray:
    """What two_view_fit has of this name, by differences over such a step, radians."""
    assert _library is not None
    columns, motion, numbers = _matches(columns), _motion(rotation, translation), _SHAPES[model][0]
    found = np.empty((numbers, numbers))
    matches = columns.shape[2], _address(columns)
    _library.kpmatch_hessian(model, *matches, _address(motion), cutoff, step, _address(found))
    return found


def refine_turns(
    columns: np.ndarray, turns: np.ndarray, shifts: np.ndarray, cutoffs: Sequence[float], trust: float
) -> tuple[np.ndarray, np.ndarray]:
    """What two_view_profile has of this name, with cutoffs in pixels."""
    assert _library is not None
    columns = _matches(columns)
    motions, count = len(turns), columns.shape[2]
    _check(turns, (motions, 3, 3))
    _check(shifts, (motions, 3))
    turns, steps, shifts = np.array(turns, np.float64, order="C"), np.array(cutoffs, float), _plain(shifts, np.float64)
    residuals = np.empty((motions, count))
    matches, each = (count, _address(columns)), map(_address, (turns, shifts, residuals))
    if not _library.kpmatch_refine_turns(*matches, len(steps), _address(steps), trust, motions, *each):
        raise np.linalg.LinAlgError("Singular matrix")
    return turns, residuals


def _matches(columns: np.ndarray) -> np.ndarray:
    _check(columns, (4, 3, columns.shape[-1]))
    return _plain(columns, np.float64)


def _motion(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """(12,): a copy."""
    _check(rotation, (3, 3))
    _check(translation, (3,))
    return np.concatenate([rotation, translation], axis=None, dtype=np.float64)


def _check(values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise ValueError(f"an array of shape {values.shape} where {shape} belongs")


def _plain(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """The values as C reads them: one after the other, in this machine's byte order, each at a multiple of its size."""
    if type(values) is np.ndarray and values.dtype.type is dtype and values.dtype.isnative and values.flags.carray:
        return values  # as most are
    return np.require(values, dtype, ["C_CONTIGUOUS", "ALIGNED", "ENSUREARRAY"])


def _columns(points: np.ndarray) -> np.ndarray:
    """Points (N, 2) as C reads them: (2, N) float32."""
    _check(points, (len(points), 2))
    return _plain(points.T, np.float32)


def _address(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])
