"""The compiled part of this folder, where the build of the ROS package has put it beside.

It is made from src/geometry.c, src/two_view.c and src/two_view_profile.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kpmatch_ros import compiled_library

__all__ = [
    "LIBRARY",
    "align",
    "available",
    "depths",
    "differentiate",
    "displacements",
    "epipolar_residuals",
    "hessian",
    "in_front",
    "minimise",
    "open_library",
    "refine_turns",
    "residual_sizes",
    "rotation_residuals",
    "undistort",
]

LIBRARY = Path(__file__).with_name("libkpmatch_geometry.so")
_VERSION = 3  # as in src/geometry.c: the arguments and the meaning of its functions
_LONGEST_SIDE = 2**15 - 2
"""Pixels: cv2.remap takes no more.

In src/geometry.c, such places are rounded by far less than the pixel that is kept free at an image's border, and 32
bits count all pixels.
"""
_USED = 85  # pixels of a patch that are compared
_PATCH = 4 * _USED + 63 + 9  # numbers of a patch


def open_library(path: Path) -> ctypes.CDLL | None:
    """As :func:`kpmatch_ros.compiled_library.open_library`."""
    truth, size, number, address = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
    matches = [size, address]
    functions = {
        "kpmatch_align": (None, [size, address, size, size, address, address, ctypes.c_int32, *5 * [address]]),
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
    count, (height, width) = len(points), image.shape
    if max(height, width) > _LONGEST_SIDE:
        raise ValueError(f"an image of {width}x{height} pixels has a side of more than {_LONGEST_SIDE}")
    _check(patches, (count, _PATCH))
    _check(places, (2, _USED))
    _check(points, (count, 2))
    _check(shapes, (count, 2, 2))
    patches, image, places = (_plain(each, np.float32) for each in (patches, image, places))
    points, shapes = (np.array(each, np.float32, order="C") for each in (points, shapes))
    sigmas, likeness, good = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, bool)
    results = points, shapes, sigmas, likeness, good
    _library.kpmatch_align(
        count, _address(patches), height, width, _address(image), _address(places), shifts, *map(_address, results)
    )
    return results


def undistort(distorted: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What lens.undistort returns, of the polynomial model with eight coefficients."""
    assert _library is not None
    _check(distorted, (len(distorted), 2))
    _check(coefficients, (8,))
    distorted, coefficients = (_plain(each, np.float64) for each in (distorted, coefficients))
    results = np.empty((len(distorted), 2)), np.empty((len(distorted), 2, 2))
    _library.kpmatch_undistort(len(distorted), _address(distorted), _address(coefficients), *map(_address, results))
    return results


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


def _address(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])
