"""Matches to a fraction of a pixel.

A detector finds a point of the scene again to about a pixel. For points far from a stereo pair that is a good part of
their disparity. The surroundings of a keypoint are found in the other image to about a tenth of a pixel.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["INDEPENDENT_POINTS", "REFINED_RESOLUTION", "normalize_contrast", "refine"]

_FRACTION = 1 / 32  # of a pixel: all that OpenCV's interpolation tells apart

REFINED_RESOLUTION = _FRACTION
"""Keypoint resolution of refined matches, pixels. Their noise is larger; the residuals show it."""

INDEPENDENT_POINTS = 63
"""How many refined matches, at most, err independently of each other.

The errors that are left, from interpolation, light and curved surfaces, are alike for neighbours. The motion follows a
part of them, which the residuals then do not show. This is a design effect (Kish, Survey Sampling, 1965). It was
measured on 60 pairs of synthetic stereo frames with some 650 matches each: the squared errors of the motion were 10
times those of independent matches. docs/relative_pose.md has more figures.
"""

_WINDOW = 13  # pixels
_LONGEST_STEP = 3.0  # pixels, or as many steps of the detector's grid: what moves further was not the same corner
_DEFORMATIONS = 2  # steps
_DEFORMATION = 0.1  # what stretches and shears are expected to be
_STOP = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 20, 0.01)
_SMALLEST_DEVIATION = 2.0  # grey levels: less is noise


def normalize_contrast(image: np.ndarray) -> np.ndarray:
    """The image in grey, uint8 (H, W), with the same brightness and contrast everywhere.

    Exposure differs from frame to frame and from camera to camera. After this it moves no match.

    Args:
        image: uint8 grey (H, W) or RGB (H, W, 3).
    """
    grey = image if image.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    values = grey.astype(np.float32)
    size = (2 * _WINDOW + 1, 2 * _WINDOW + 1)
    mean = cv2.boxFilter(values, -1, size)
    variance = np.maximum(cv2.boxFilter(values * values, -1, size) - mean * mean, _SMALLEST_DEVIATION**2)
    return np.asarray(np.clip(128 + 48 * (values - mean) / np.sqrt(variance), 0, 255).astype(np.uint8))


def refine(
    image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray, resolution: float = 1.0
) -> np.ndarray:
    """Find the surroundings of points0 in image 1, near points1 (Lucas and Kanade, IJCAI 1981; OpenCV).

    Args:
        image0: uint8 (H, W), from :func:`normalize_contrast`.
        image1: the same of the other image.
        points0: (M, 2) pixels in image 0; NaN is allowed.
        points1: (M, 2) pixels in image 1, the same matches.
        resolution: pixels between neighbouring positions that the detector can give.

    Returns:
        (M, 2) float32 pixels in image 1; NaN for a match that is not found, or too far from points1.
    """
    found = np.full(points1.shape, np.nan, np.float32)
    known = np.isfinite(points0).all(axis=1) & np.isfinite(points1).all(axis=1)
    if not known.any():
        return found
    template = np.ascontiguousarray(points0[known], np.float32)
    start = np.ascontiguousarray(points1[known], np.float32)
    moved, status, _ = cv2.calcOpticalFlowPyrLK(
        image0,
        image1,
        template[:, None],
        start[:, None].copy(),
        winSize=(_WINDOW, _WINDOW),
        maxLevel=0,
        criteria=_STOP,
        flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
    )
    moved = moved.reshape(-1, 2)
    good = (status.ravel() > 0) & (np.linalg.norm(moved - start, axis=1) < _LONGEST_STEP * max(resolution, 1.0))
    if good.any():
        moved[good] = _deform(image0, image1, template[good], moved[good])
    good &= np.linalg.norm(moved - start, axis=1) < _LONGEST_STEP * max(resolution, 1.0)
    found[known] = np.where(good[:, None], moved, np.nan)
    return found


def _deform(image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray) -> np.ndarray:
    """Refine points1 (M, 2) float32, allowing for stretched, sheared and turned surroundings.

    The view of a slanting surface is deformed from image to image. Without allowance for that, a point is off by the
    deformation times the distance of the window's content from its middle: on the ground, 0.2 pixels, all to one side.
    Gauss-Newton on an affine map (Shi and Tomasi, CVPR 1994), inverse compositional (Baker and Matthews, IJCV 2004).
    """
    count, side = len(points0), np.arange(_WINDOW + 2, dtype=np.float32) - (_WINDOW + 1) / 2
    patches = _sample(image0, points0, *np.meshgrid(side, side)).reshape(count, len(side), len(side))
    template = patches[:, 1:-1, 1:-1].reshape(count, -1)
    across = (patches[:, 1:-1, 2:] - patches[:, 1:-1, :-2]).reshape(count, -1) / 2
    down = (patches[:, 2:, 1:-1] - patches[:, :-2, 1:-1]).reshape(count, -1) / 2
    x, y = np.meshgrid(side[1:-1], side[1:-1])
    jacobian = np.stack(
        [across, down, across * x.ravel(), across * y.ravel(), down * x.ravel(), down * y.ravel()], axis=1
    )
    normal = jacobian @ jacobian.transpose(0, 2, 1)
    points, shape = points1.astype(np.float32), np.tile(np.eye(2, dtype=np.float32), (count, 1, 1))
    for _ in range(_DEFORMATIONS):
        points = np.round(points / np.float32(_FRACTION)) * np.float32(_FRACTION)
        (xx, xy), (yx, yy) = shape.transpose(1, 2, 0)[..., None, None]
        residuals = _sample(image1, points, xx * x + xy * y, yx * x + yy * y).reshape(count, -1) - template
        trust = np.maximum((residuals**2).mean(axis=1), 1.0) / _DEFORMATION**2  # in no deformation, by the noise
        system, pull = normal.astype(np.float64), (jacobian @ residuals[..., None])[..., 0].astype(np.float64)
        system[:, range(6), range(6)] += np.where(np.arange(6) < 2, 1e-3, trust[:, None])
        pull[:, 2:] += trust[:, None] * (shape - np.eye(2, dtype=np.float32)).reshape(count, 4)
        step = np.linalg.solve(system, pull[..., None])[..., 0].astype(np.float32)
        points = points - np.einsum("nij,nj->ni", shape, step[:, :2])
        shape = shape - shape @ step[:, 2:].reshape(count, 2, 2)
    return points


def _sample(image: np.ndarray, points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(M, P) float32 the image at x and y, of size P or (M, ...), from each of the points (M, 2)."""
    columns, rows = ((grid + points[:, axis, None, None]).reshape(len(points), -1) for axis, grid in enumerate((x, y)))
    return np.asarray(cv2.remap(image.astype(np.float32), columns, rows, cv2.INTER_LINEAR))
