"""Fuzz tests of the compiled geometry, with random and invalid arguments.

As a program with the arguments CASES and LIBRARY, it runs this number of cases, with those of two_view_fuzz.py and
track_fuzz.py, on a library built with sanitizers. It imports only the geometry, and not pytest, because that library
stops at undefined behaviour.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import cv2
import numpy as np
from track_fuzz import call_with_hostile_tracks
from two_view_fuzz import call_with_hostile_matches

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.lens import distort, undistort
from kpmatch_ros.geometry.patches import Alignment, align, cut, inside, no_change, signed

PIXELS = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 2.0**24, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 32767.0, -1.0]
NUMBERS = [np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 1e160, -1e160, -1e6, 0.0, 50.0, -49.9]


def next_to_protected_memory(values: np.ndarray, before: bool) -> np.ndarray:
    """Return a copy of the values adjacent to a protected memory page: after it with ``before``, otherwise before it.

    A process that reads the protected page ends.
    """
    page = mmap.PAGESIZE
    size = -(-max(values.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for each in (start, start + page + size):
        assert libc.mprotect(ctypes.c_void_p(each), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    offset = page if before else page + size - values.nbytes
    copy = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    copy[...] = values
    return copy


def with_random_layout(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the same values with another memory layout, byte order, precision or alignment, or read-only."""
    kind = random.integers(7)
    if kind == 0:
        return np.asfortranarray(values)
    if kind == 1:
        return values[::-1].copy()[::-1]
    if kind == 2:
        return np.repeat(values, 2, axis=0)[::2]
    if kind == 3:
        return values.astype(values.dtype.newbyteorder())
    if kind == 4:
        return values.astype(np.float64)
    if kind == 5:
        odd = np.frombuffer(bytearray(values.nbytes + 1), values.dtype, values.size, 1).reshape(values.shape)
        odd[...] = values
        return odd
    values = values.copy()
    values.flags.writeable = False
    return values


def patches_to_find(random: np.random.Generator, least: int) -> tuple[np.ndarray, ...]:
    """Return arguments for align: patches, an image with sides of at least ``least`` pixels, start points, shapes."""
    height, width = random.integers(least, random.choice([16, 60, 160]), 2)
    noise = random.integers(0, 256, (height, width)).astype(np.uint8)
    image = signed(cv2.GaussianBlur(noise, (0, 0), random.choice([0.8, 1.5, 3.0]))) if noise.size else signed(noise)
    count = int(random.integers(0, 30))
    points = random.uniform(-8, (width + 8, height + 8), (count, 2)).astype(np.float32)
    patches = cut(image, points) if noise.size else np.zeros((count, 497), np.float32)
    start = points + random.normal(0, random.choice([0.1, 0.5, 3.0]), points.shape)
    shapes = no_change(count) + random.normal(0, random.choice([0.0, 0.1, 2.0]), (count, 2, 2))
    return patches, image, start.astype(np.float32), shapes.astype(np.float32)


def spoil(values: np.ndarray, rows: np.ndarray, random: np.random.Generator) -> None:
    """Put values that cannot come from an image into some of the rows."""
    chosen = values[rows]
    spoilt = random.random(chosen.shape) < random.choice([0.05, 0.5])
    values[rows] = np.where(spoilt, random.choice(PIXELS, chosen.shape), chosen)


def check_alignment(found: Alignment, image: np.ndarray) -> None:
    """Check that good results are usable, and that the flags contain only the bytes of true and false."""
    good = found.good
    assert good.dtype == bool and np.isin(good.view(np.uint8), (0, 1)).all()
    assert inside(found.points[good], image.shape[0] / 2, image.shape[1] / 2).all()
    assert all(np.isfinite(values[good]).all() for values in vars(found).values())


def align_spoilt_patches(random: np.random.Generator) -> None:
    """Check that invalid patches do not change the results of the others, and that the arguments do not change."""
    patches, image, start, shapes = patches_to_find(random, 0)
    shifts = int(random.integers(0, 4))
    image = next_to_protected_memory(image, before=random.random() < 0.5)
    expected = align(patches, image, start, shapes, shifts)
    rows = random.random(len(start)) < 0.5
    for each in (patches, start, shapes):
        if random.random() < 0.5:
            spoil(each, rows, random)
    given = [with_random_layout(each, random) for each in (patches, start, shapes)]
    found = align(given[0], image, given[1], given[2], shifts)
    check_alignment(found, image)
    assert all(np.array_equal(*both, equal_nan=True) for both in zip(given, (patches, start, shapes)))
    for ours, clean in zip(vars(found).values(), vars(expected).values()):
        assert np.array_equal(ours[~rows], clean[~rows], equal_nan=True)


def undistort_hostile_points(random: np.random.Generator) -> None:
    """Check undistortion with arbitrary coefficients: it returns directions that project to the points, or NaN."""
    coefficients = random.normal(0, 0.3, int(random.choice([4, 5, 8]))) * 10.0 ** random.integers(-3, 9)
    points = random.normal(0, random.choice([1e-5, 0.5, 5.0]), (int(random.integers(0, 60)), 2))
    if random.random() < 0.5:
        coefficients = np.where(random.random(coefficients.shape) < 0.3, random.choice(NUMBERS), coefficients)
        points = np.where(random.random(points.shape) < 0.2, random.choice(NUMBERS, points.shape), points)
    given = with_random_layout(points, random)
    directions, inverses = undistort(given, "rational_polynomial", coefficients)
    assert np.array_equal(given, points, equal_nan=True)
    solved = np.isfinite(directions).all(axis=1)
    assert np.isnan(directions[~solved]).all() and np.isnan(inverses[~solved]).all()
    assert (np.abs(directions[solved]) < 50).all() and (np.trace(inverses[solved], axis1=1, axis2=2) > 0).all()
    shown = distort(directions[solved], "rational_polynomial", coefficients)
    # Newton's method stops at 1e-10. The rest is the rounding of NumPy and C where the lens has a large magnification.
    steep = 1 / np.abs(inverses[solved]).max(axis=(1, 2), initial=1e-300)[:, None]
    assert (np.abs(shown - points[solved]) < 2e-10 + 1e-12 * steep).all()


if __name__ == "__main__":
    assert compiled.available() and Path(sys.argv[2]) == compiled.LIBRARY, compiled.LIBRARY
    with np.errstate(all="ignore"):
        for case in range(int(sys.argv[1])):
            align_spoilt_patches(np.random.default_rng(case))
            undistort_hostile_points(np.random.default_rng(case))
            call_with_hostile_matches(np.random.default_rng(case))
            call_with_hostile_tracks(np.random.default_rng(case))
