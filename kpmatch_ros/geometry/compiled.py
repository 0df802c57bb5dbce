"""The compiled part of this folder, where the build of the ROS package has put it beside.

It is made from src/geometry.c and src/two_view.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kpmatch_ros import compiled_library

__all__ = ["LIBRARY", "align", "available", "open_library", "refine_turns", "undistort"]

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
    functions = {
        "kpmatch_align": (None, [size, address, size, size, address, address, ctypes.c_int32, *5 * [address]]),
        "kpmatch_undistort": (None, [size, *4 * [address]]),
        "kpmatch_refine_turns": (truth, [size, address, size, address, number, size, *3 * [address]]),
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


# What src/two_view.c has of the motion of two views. `columns` are those of Matches (4, 3, n).


def refine_turns(
    columns: np.ndarray, turns: np.ndarray, shifts: np.ndarray, cutoffs: Sequence[float], trust: float
) -> tuple[np.ndarray, np.ndarray]:
    """What two_view_profile refines, with cutoffs in pixels: rotations (k, 3, 3), and distances (k, n)."""
    assert _library is not None
    motions, count = len(turns), columns.shape[2]
    _check(columns, (4, 3, count))
    _check(turns, (motions, 3, 3))
    _check(shifts, (motions, 3))
    columns, shifts = _plain(columns, np.float64), _plain(shifts, np.float64)
    turns, steps = np.array(turns, np.float64, order="C"), np.array(cutoffs, np.float64)
    residuals = np.empty((motions, count))
    matches, each = (count, _address(columns)), (_address(turns), _address(shifts), _address(residuals))
    if not _library.kpmatch_refine_turns(*matches, len(steps), _address(steps), trust, motions, *each):
        raise np.linalg.LinAlgError("Singular matrix")
    return turns, residuals


def _check(values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise ValueError(f"an array of shape {values.shape} where {shape} belongs")


def _plain(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """The values as C reads them: one after the other, in this machine's byte order, each at a multiple of its size."""
    return np.require(values, dtype, ["C_CONTIGUOUS", "ALIGNED", "ENSUREARRAY"])


def _address(values: np.ndarray) -> int:
    return int(values.__array_interface__["data"][0])
