"""Patches of a surface that comes nearer: found where they are, with the size that they have."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from kpmatch_ros.geometry.patches import align, cut, no_change, signed
from kpmatch_ros.geometry.refinement import normalize_contrast

SIDE, FINE = 240, 6  # pixels of an image, and points of the surface to a pixel
MIDDLE = (SIDE - 1) / 2


def picture(scale: float, seed: int = 0) -> np.ndarray:
    """A surface with fine texture seen so many times larger, by pixels that average over their area."""
    surface = np.random.default_rng(seed).standard_normal((SIDE, SIDE)).astype(np.float32)
    surface = cv2.GaussianBlur(surface, (0, 0), 1.2) * 4 + cv2.GaussianBlur(surface, (0, 0), 4) * 12
    grid = (np.arange(SIDE * FINE, dtype=np.float32) + 0.5) / FINE - 0.5  # pixels
    columns, rows = np.meshgrid(*2 * ((grid - MIDDLE) / scale + MIDDLE,))
    seen = cv2.remap(surface, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    grey = 128 + 30 * cv2.resize(seen, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    grey += np.random.default_rng(seed + 100).normal(0, 1, grey.shape)
    return signed(normalize_contrast(np.clip(np.round(grey), 0, 255).astype(np.uint8)))


def corners(image: np.ndarray) -> np.ndarray:
    """(N, 2) float32 pixels around which there is something to see."""
    found = cv2.goodFeaturesToTrack((image[50:-50, 50:-50] + 128).astype(np.uint8), 200, 0.05, 4)
    return found[:, 0] + np.float32(50)


@pytest.mark.parametrize(("scale", "largest"), [(0.7, 0.035), (1.4, 0.075)])
def test_a_surface_seen_larger_or_smaller_is_not_taken_for_less_so(scale: float, largest: float) -> None:
    errors, grown = [], []
    for seed in range(3):
        image0, image1 = picture(1.0, seed), picture(scale, seed)
        points = corners(image0)
        expected = ((points - MIDDLE) * scale + MIDDLE).astype(np.float32)
        shapes = no_change(len(points)) * np.float32(scale)
        found = align(cut(image0, points), image1, expected, shapes)
        assert found.good.mean() > 0.9
        errors.append(found.points[found.good] - expected[found.good])
        grown.append(np.sqrt(np.linalg.det(found.shapes[found.good])) / scale - 1)
    # Without allowance for blur and for the window of the contrast: -0.0019 and 0.0051, and 0.051 and 0.091 pixels.
    assert abs(np.median(np.concatenate(grown))) < 0.0015
    assert np.sqrt((np.concatenate(errors) ** 2).mean()) < largest
