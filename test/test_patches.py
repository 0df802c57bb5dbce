"""Tests that patches of an approaching surface are found at the true position and size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kpmatch_ros.geometry.patches import align, cut, no_change, signed
from kpmatch_ros.geometry.refinement import normalize_contrast

SIDE, FINE = 240, 6  # pixels of an image, and samples of the surface per pixel
MIDDLE = (SIDE - 1) / 2


def picture(scale: float, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Return uint8 pixels of a surface with fine texture at this scale, each averaged over the pixel's area.

    ``shift`` moves it along x, pixels.
    """
    surface = np.random.default_rng(seed).standard_normal((SIDE, SIDE)).astype(np.float32)
    surface = cv2.GaussianBlur(surface, (0, 0), 1.2) * 4 + cv2.GaussianBlur(surface, (0, 0), 4) * 12
    grid = (np.arange(SIDE * FINE, dtype=np.float32) + 0.5) / FINE - 0.5  # pixels
    columns, rows = np.meshgrid(*((grid - moved - MIDDLE) / scale + MIDDLE for moved in (np.float32(shift), 0)))
    seen = cv2.remap(surface, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    grey = 128 + 30 * cv2.resize(seen, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    grey += np.random.default_rng([seed + 100, round(1e3 * shift)]).normal(0, 1, grey.shape)
    return normalize_contrast(np.clip(np.round(grey), 0, 255).astype(np.uint8))


def corners(image: np.ndarray) -> np.ndarray:
    """Return pixels (N, 2) float32 with texture around them."""
    found = cv2.goodFeaturesToTrack(image[50:-50, 50:-50], 200, 0.05, 4)
    return found[:, 0] + np.float32(50)


@pytest.mark.parametrize(("scale", "largest"), [(0.7, 0.035), (1.4, 0.075)])
def test_the_scale_of_an_enlarged_or_reduced_surface_is_found_without_bias(scale: float, largest: float) -> None:
    errors, grown = [], []
    for seed in range(3):
        image0, image1 = picture(1.0, seed), picture(scale, seed)
        points = corners(image0)
        expected = ((points - MIDDLE) * scale + MIDDLE).astype(np.float32)
        shapes = no_change(len(points)) * np.float32(scale)
        found = align(cut(signed(image0), points), signed(image1), expected, shapes)
        assert found.good.mean() > 0.9
        errors.append(found.points[found.good] - expected[found.good])
        grown.append(np.sqrt(np.linalg.det(found.shapes[found.good])) / scale - 1)
    # Without corrections for blur and for the contrast's window: -0.0019 and 0.0051, and 0.051 and 0.091 pixels.
    assert abs(np.median(np.concatenate(grown))) < 0.0015
    assert np.sqrt((np.concatenate(errors) ** 2).mean()) < largest


@pytest.mark.parametrize("shift", [0.125, 0.25, 0.4])
def test_a_motion_of_less_than_a_pixel_is_found_without_bias(shift: float) -> None:
    # Linear interpolation of the image's own pixels would give 10, 6 and 2 % more here.
    moved = []
    for seed in range(3):
        image0, image1 = picture(1.0, seed), picture(1.0, seed, shift)
        points = corners(image0)  # all at whole pixels
        found = align(cut(signed(image0), points), signed(image1), points, no_change(len(points)))
        moved.append((found.points - points)[found.good])
    assert np.median(np.concatenate(moved), axis=0) == pytest.approx([shift, 0], abs=0.005)


def test_a_deformation_that_an_edge_does_not_determine_stays_unchanged() -> None:
    # Steps that fit the noise accumulate unless their sum is limited: to 0.1 after ten steps.
    stripes = 128 + 40 * np.sin(np.arange(400) / 5) * np.ones((400, 1))
    image0, image1 = (
        signed(
            np.clip(np.round(stripes + np.random.default_rng(seed).normal(0, 3, stripes.shape)), 0, 255).astype(
                np.uint8
            )
        )
        for seed in (1, 2)
    )
    grid = np.arange(20, 380, 20, dtype=np.float32)
    points = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    found = align(cut(image0, points), image1, points + np.float32([0.3, 0]), no_change(len(points)))
    assert found.good.mean() > 0.7  # positions along the edge are undetermined, so some points move too far
    along_the_edge = found.shapes[:, 1] - (0, 1)
    assert along_the_edge.std() < 0.02


@pytest.mark.parametrize("depth", [1, 4, 5])
def test_a_patch_at_the_image_border_is_found_without_bias(depth: int) -> None:
    # With grey beyond the image, it would move 0.3 to 0.6 pixels less, and 8 to 65 % would not be found.
    whole, margin = picture(1.0), 20
    part = whole[margin:-margin, margin:-margin]
    last = part.shape[0] - 1
    along = np.arange(depth, last - depth, 5, dtype=np.float32)
    near, far = np.full_like(along, depth), np.full_like(along, last - depth)
    sides = [((near, along), (1, 0)), ((far, along), (-1, 0)), ((along, near), (0, 1)), ((along, far), (0, -1))]
    points = np.concatenate([np.stack(side, axis=1) for side, _ in sides])
    inwards = np.repeat([inward for _, inward in sides], len(along), axis=0)
    noise = np.random.default_rng(0).normal(0, 2, part.shape).astype(np.float32)
    patches = cut(signed(part - np.float32(128) + noise), points)
    found = align(patches, signed(whole), points + np.float32([20.4, 19.7]), no_change(len(points)), 1)
    assert found.good.mean() > 0.98
    errors = (found.points - points - margin)[found.good]
    assert abs(np.median((errors * inwards[found.good]).sum(axis=1))) < 0.02
    assert np.minimum((errors / found.sigmas[found.good, None]) ** 2, 25).mean() < 1.2


def test_many_patches_give_the_same_results_as_small_groups() -> None:
    image = signed(picture(1.0))
    points = np.random.default_rng(0).uniform(20, SIDE - 20, (1500, 2)).astype(np.float32)
    patches = cut(image, points)
    few = np.concatenate([cut(image, points[i : i + 50]) for i in range(0, len(points), 50)])
    np.testing.assert_allclose(patches, few, rtol=1e-3, atol=0.1)
    found = align(patches, image, points + 0.5, no_change(len(points)), 1)
    parts = [align(few[i : i + 50], image, points[i : i + 50] + 0.5, no_change(50), 1) for i in range(0, 1500, 50)]
    assert (found.good == np.concatenate([part.good for part in parts])).mean() > 0.99
    good = found.good & np.concatenate([part.good for part in parts])
    np.testing.assert_allclose(found.points[good], np.concatenate([part.points for part in parts])[good], atol=0.01)
    assert len(cut(image, points[:0])) == len(align(patches[:0], image, points[:0], no_change(0)).points) == 0


_OTHER_THREADS = """
import os, time, cv2, numpy as np
from pathlib import Path
from kpmatch_ros.geometry.patches import align, cut, no_change
cv2.setNumThreads(1)
image = np.random.default_rng(0).normal(size=(960, 1280)).astype(np.float32)
points = np.random.default_rng(0).uniform(20, 460, (1024, 2)).astype(np.float32)
def turns():
    others = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != os.getpid()]
    return len(others), sum(int((task / "schedstat").read_text().split()[2]) for task in others)
patches = cut(image, points)
time.sleep(1)  # threads that nobody needs are asleep by then
before = turns()
for _ in range(10):
    align(cut(image, points), image, points, no_change(len(points)), 1)
print(before[0], turns()[1] - before[1])
"""

pytestmark = pytest.mark.usefixtures("geometry")


@pytest.mark.skipif(np.__version__ < "1.24", reason="OpenBLAS 0.3.20, of the NumPy of that time, uses threads")
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not count threads' turns")
def test_patches_are_computed_by_one_thread_even_if_blas_may_use_more() -> None:
    # OpenBLAS threads wait by spinning: on a busy machine they take many times the computing time.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["OPENBLAS_NUM_THREADS"] = "4"
    ran = subprocess.run([sys.executable, "-c", _OTHER_THREADS], env=environment, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    others, turns = map(int, ran.stdout.split())
    assert others and turns == 0
