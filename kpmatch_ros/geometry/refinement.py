"""Sub-pixel refinement of matches.

A detector locates a point of the scene to about one pixel. For points far from a stereo pair, this is a large part of
their disparity. Alignment of the surroundings of a keypoint locates it in the other image to about a tenth of a pixel.
"""

from __future__ import annotations

from dataclasses import fields

import cv2
import numpy as np

from kpmatch_ros.geometry.blur import equalise_blur
from kpmatch_ros.geometry.flow import Neighbours, flow_near
from kpmatch_ros.geometry.patches import Alignment, align, cut, no_change, signed
from kpmatch_ros.imaging.colour import to_grey

__all__ = [
    "INDEPENDENT_POINTS",
    "REFINABLE",
    "REFINED_RESOLUTION",
    "align_deformed",
    "align_matches",
    "decisive_matches",
    "longest_step",
    "normalize_contrast",
    "refine",
]

REFINED_RESOLUTION = 1 / 32
"""Keypoint resolution of refined matches, pixels: the smallest step of OpenCV's interpolation.

The noise of refined matches is larger, and the residuals show it.
"""

REFINABLE = 0.5
"""Part of the matches that are refined: with a smaller part and few matches, the images differ too much for patches."""

_DECISIVE = 30  # refined matches that decide a pose alone

INDEPENDENT_POINTS = 1400
"""Largest number of independent points that any number of refined matches is worth.

The remaining errors, from interpolation, light and the deformation of patches, are similar on a surface. The motion
follows a part of them, and the residuals do not show this part. The number is a design effect (Kish, Survey Sampling,
1965): the inverse of the correlation of two points' errors. It was measured on 288 pairs of synthetic stereo frames
with about 580 matches each, in sequences of 33 frames: the squared errors of the motion were 1.41 times those of
independent matches, with an uncertainty of 5 %. docs/relative_pose.md has more figures.
"""

_WINDOW = 30  # pixels to each side: large compared to a patch, so that the patch's contrast is independent of its scale
_SHIFTS = 3  # shift-only steps from a detected keypoint
_IN_NUMBERS = 0.25  # part of the points: if fewer are lost, the images are similar
_DEFORMED = 0.1  # relative change of length: smaller deformations do not need this start
_LONGEST_STEP = 3.0  # pixels, or steps of the detector's grid if these are larger
_SMALLEST_DEVIATION = 2.0  # grey levels: smaller ones are noise


def normalize_contrast(image: np.ndarray) -> np.ndarray:
    """The image in grey, uint8 (H, W), with the same local brightness and contrast everywhere.

    Exposure differs between frames and between cameras. After this normalisation, it does not shift matches.

    Args:
        image: uint8 grey (H, W) or RGB (H, W, 3).
    """
    grey = to_grey(image)
    size = (2 * _WINDOW + 1, 2 * _WINDOW + 1)
    mean: np.ndarray = cv2.boxFilter(grey, cv2.CV_32F, size)
    deviation: np.ndarray = cv2.sqrBoxFilter(grey, cv2.CV_32F, size)
    # In place, because allocating arrays of this size takes longer than the computation.
    deviation -= mean * mean
    np.sqrt(np.maximum(deviation, _SMALLEST_DEVIATION**2, out=deviation), out=deviation)
    values = np.subtract(grey, mean, out=mean)
    values *= 48
    values /= deviation
    values += 128
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def longest_step(resolution: float) -> float:
    """Largest distance of a refined point from its keypoint, pixels. A point that moves further is another corner.

    Args:
        resolution: pixels between neighbouring positions that the detector can report.
    """
    return _LONGEST_STEP * max(resolution, 1.0)


def align_deformed(
    found: Alignment,
    rows: np.ndarray,
    patches: np.ndarray,
    image: np.ndarray,
    near: np.ndarray,
    shapes: np.ndarray,
    around: Neighbours,
) -> None:
    """Align lost patches again, starting with the deformation of their neighbours, if many of R patches were lost.

    The alignment converges only from a similar shape. Between images with distant viewpoints, the motion of the
    matches around a point gives a start. Strongly deformed patches that were found are aligned again too, because they
    are imprecise.

    Args:
        found: alignment of T patches. New results are written into it.
        rows: (R,) indices of the patches.
        patches: (R, P) float32, from :func:`kpmatch_ros.geometry.patches.cut`.
        image: from :func:`kpmatch_ros.geometry.patches.signed`.
        near: (T, 2) float32 pixels, where the search begins.
        shapes: (T, 2, 2) float32, of the patches in the image that the neighbours come from.
        around: these T points and their neighbours.
    """
    lost = ~found.good[rows]
    if np.count_nonzero(lost) <= _IN_NUMBERS * len(rows):
        return
    deformations = around.deformations(rows)
    again = lost | (np.linalg.norm(deformations - no_change(1), axis=(1, 2)) > _DEFORMED)
    rows, shapes = rows[again], deformations[again] @ shapes[rows[again]]
    aligned = align(patches[again], image, near[rows], shapes, _SHIFTS)
    found.put(rows[aligned.good], aligned.select(aligned.good))


def align_matches(
    image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray, resolution: float = 1.0
) -> Alignment:
    """Align the surroundings of points0 with image 1 near points1, with optical flow and then an affine change.

    The image of a slanted surface deforms between two views. Without a model of this, a point has an error of the
    deformation times the offset of the window's content from its centre: on the ground 0.2 pixels, all to one side.

    Args:
        image0: uint8 (H, W), from :func:`normalize_contrast`.
        image1: the same of the other image.
        points0: (M, 2) pixels in image 0; NaN is allowed.
        points1: (M, 2) pixels in image 1, the same matches.
        resolution: pixels between neighbouring positions that the detector can report.

    Returns:
        The alignment in image 1. Where nothing is found, the points are points1.
    """
    known = np.flatnonzero(np.isfinite(points0).all(axis=1) & np.isfinite(points1).all(axis=1))
    start, furthest = points1[known].astype(np.float32), longest_step(resolution)
    near = flow_near(image0, image1, points0[known], start, furthest)
    equalised = equalise_blur(image0, image1, points0[known], start)
    pixels0, pixels = (signed(image0), signed(image1)) if equalised is None else equalised.images
    patches = cut(pixels0, points0[known].astype(np.float32))
    found = align(patches, pixels, near, no_change(len(known)))
    around = Neighbours(points0[known], points1[known])
    align_deformed(found, np.arange(len(known)), patches, pixels, start, no_change(len(known)), around)
    good = found.good & (np.linalg.norm(found.points - start, axis=1) < furthest)
    count = len(points1)
    none = np.zeros(count, np.float32)
    whole = Alignment(np.array(points1, np.float32), no_change(count), none, none.copy(), np.zeros(count, bool))
    for item in fields(Alignment):
        getattr(whole, item.name)[known[good]] = getattr(found, item.name)[good]
    return whole


def decisive_matches(
    points0: np.ndarray,
    points1: np.ndarray,
    refined: np.ndarray,
    *,
    max_reprojection_error: float = 1.0,
    min_inliers: int = 15,
) -> np.ndarray | None:
    """(M,) bool which matches decide a two-view pose: the refined ones if many of them move; None for all matches.

    A match whose surroundings were found is more reliable: in 120 pairs of indoor images with distant viewpoints, 80 %
    of the refined matches are correct, and 48 % of the others. Points that stand still in the image, like those on the
    robot's own body, are refined regardless of the viewpoint of the rest.

    Args:
        points0: (M, 2) pixels in image 0.
        points1: (M, 2) pixels in image 1; NaN counts as standing still.
        refined: (M,) bool which matches are refined.
        max_reprojection_error: largest motion of a point that stands still, pixels.
        min_inliers: number of inliers that a pose needs.
    """
    moves = np.linalg.norm(points1 - points0, axis=1) > max_reprojection_error
    many = (refined & moves).sum() >= max(_DECISIVE, 2 * min_inliers)
    return refined if many and not refined.all() else None


def refine(
    image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray, resolution: float = 1.0
) -> np.ndarray:
    """The points of :func:`align_matches`: (M, 2) float32 pixels in image 1; NaN for a match that was not found."""
    found = align_matches(image0, image1, points0, points1, resolution)
    return np.where(found.good[:, None], found.points, np.float32(np.nan))
