"""Matches to a fraction of a pixel.

A detector finds a point of the scene again to about a pixel. For points far from a stereo pair that is a good part of
their disparity. The surroundings of a keypoint are found in the other image to about a tenth of a pixel.
"""

from __future__ import annotations

from dataclasses import fields

import cv2
import numpy as np

from kpmatch_ros.geometry.blur import blurred_alike
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
"""Keypoint resolution of refined matches, pixels: all that OpenCV's interpolation tells apart.

Their noise is larger; the residuals show it.
"""

REFINABLE = 0.5
"""Part of the matches whose surroundings are found: with fewer, and not many, the images differ too much for that."""

_DECISIVE = 30

INDEPENDENT_POINTS = 1400
"""How many points that err independently any number of refined matches are worth, at most.

The errors that are left, from interpolation, light and how patches are deformed, are alike on a surface. The motion
follows a part of them, which the residuals then do not show. This is a design effect (Kish, Survey Sampling, 1965): the
inverse of the correlation of two points' errors. It was measured on 288 pairs of synthetic stereo frames with some 580
matches each, in sequences of 33 frames: the squared errors of the motion were 1.41 times those of independent matches,
to 5 %. docs/relative_pose.md has more figures.
"""

_WINDOW = 30  # pixels to each side of a pixel: large beside a patch, whose contrast then does not change with its scale
_SHIFTS = 3  # steps from a detected keypoint to near its place
_IN_NUMBERS = 0.25  # part of the points: with fewer lost, the images are alike
_DEFORMED = 0.1  # of a length: what is less deformed is found as exactly without
_LONGEST_STEP = 3.0  # pixels, or as many steps of the detector's grid
_SMALLEST_DEVIATION = 2.0  # grey levels: less is noise


def normalize_contrast(image: np.ndarray) -> np.ndarray:
    """The image in grey, uint8 (H, W), with the same brightness and contrast everywhere.

    Exposure differs from frame to frame and from camera to camera. After this it moves no match.

    Args:
        image: uint8 grey (H, W) or RGB (H, W, 3).
    """
    grey = to_grey(image)
    size = (2 * _WINDOW + 1, 2 * _WINDOW + 1)
    mean: np.ndarray = cv2.boxFilter(grey, cv2.CV_32F, size)
    deviation: np.ndarray = cv2.sqrBoxFilter(grey, cv2.CV_32F, size)
    # In place: new arrays of this size take longer than what is computed.
    deviation -= mean * mean
    np.sqrt(np.maximum(deviation, _SMALLEST_DEVIATION**2, out=deviation), out=deviation)
    values = np.subtract(grey, mean, out=mean)
    values *= 48
    values /= deviation
    values += 128
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def longest_step(resolution: float) -> float:
    """How far from a keypoint its refined place may be, pixels: what moves further was not the same corner.

    Args:
        resolution: pixels between neighbouring positions that the detector can give.
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
    """Search again for R patches that were lost in numbers, deformed as their neighbours move.

    An affine change is found from nearby only. Between images that are far apart, by angle or by distance, the moves of
    the matches around a point say where to begin. What was found though it is much deformed is searched for again too:
    so far off, it is not exact.

    Args:
        found: what was found of T patches; what is found now is put there.
        rows: (R,) which patches.
        patches: (R, P) float32, from :func:`kpmatch_ros.geometry.patches.cut`.
        image: from :func:`kpmatch_ros.geometry.patches.signed`.
        near: (T, 2) float32 pixels, where to begin.
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
    """Find the surroundings of points0 in image 1, near points1: optical flow, and then an affine change.

    The view of a slanting surface is deformed from image to image. Without allowance for that, a point is off by the
    deformation times the distance of the window's content from its middle: on the ground, 0.2 pixels, all to one side.

    Args:
        image0: uint8 (H, W), from :func:`normalize_contrast`.
        image1: the same of the other image.
        points0: (M, 2) pixels in image 0; NaN is allowed.
        points1: (M, 2) pixels in image 1, the same matches.
        resolution: pixels between neighbouring positions that the detector can give.

    Returns:
        Where they are in image 1; points1 as they are where nothing is found.
    """
    known = np.flatnonzero(np.isfinite(points0).all(axis=1) & np.isfinite(points1).all(axis=1))
    start, furthest = points1[known].astype(np.float32), longest_step(resolution)
    near = flow_near(image0, image1, points0[known], start, furthest)
    alike = blurred_alike(image0, image1, points0[known], start)
    pixels0, pixels = (signed(image0), signed(image1)) if alike is None else alike.images
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
    """(M,) bool which matches shall decide a pose of two views alone: the refined ones where many move; None for all.

    Surroundings that are found speak for a match: of 120 pairs of rooms that were taken from far apart, 80 % of the
    refined matches are right, and 48 % of the others. What stands still in the image, as a robot's own body, is found
    wherever the rest is seen from.

    Args:
        points0: (M, 2) pixels in image 0.
        points1: (M, 2) pixels in image 1; NaN stands still.
        refined: (M,) bool which matches are refined.
        max_reprojection_error: what moves by no more stands still, pixels.
        min_inliers: those that a pose needs.
    """
    moves = np.linalg.norm(points1 - points0, axis=1) > max_reprojection_error
    many = (refined & moves).sum() >= max(_DECISIVE, 2 * min_inliers)
    return refined if many and not refined.all() else None


def refine(
    image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray, resolution: float = 1.0
) -> np.ndarray:
    """The points of :func:`align_matches`: (M, 2) float32 pixels in image 1; NaN for a match that is not found."""
    found = align_matches(image0, image1, points0, points1, resolution)
    return np.where(found.good[:, None], found.points, np.float32(np.nan))
