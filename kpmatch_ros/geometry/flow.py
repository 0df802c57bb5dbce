"""Optical flow: positions of one image's points in another (Lucas and Kanade, IJCAI 1981; OpenCV's implementation)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

import cv2
import numpy as np
from scipy.spatial import cKDTree

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.patches import inside, inverse

__all__ = ["Neighbours", "flow_far", "flow_forth_and_back", "flow_near", "pyramid", "tree"]

tree = partial(cKDTree, balanced_tree=False, compact_nodes=False)
"""A k-d tree of points (T, 2) that is quick to build, because each tree is queried only once."""

_WINDOW = 13  # pixels
_WIDE_WINDOW = 21  # pixels, if only the flow itself can show whether it is correct
_LEVELS = 2  # levels of a pyramid in addition to the image
_STOP = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 10, 0.03)
_FORTH_AND_BACK = 1.0  # pixels, largest error after tracking forward and backward
_NEIGHBOURS = 7
_SMALLEST_SPREAD = 1.0  # pixels
_SURROUNDING = 16  # neighbours for a deformation: fewer are less precise, more lie on other surfaces
_ROUNDS = 5  # of reweighting, which removes neighbours on other surfaces and wrong matches
_OUTLIER = 3.0  # times the median residual
_RIDGE = 10.0  # square pixels: neighbours have an error of one pixel, and a deformation is about a third
_LARGEST_DEFORMATION = 3.0  # largest factor on a length; areas shrink by its square at most


def pyramid(image: np.ndarray) -> list[np.ndarray]:
    """An image, uint8 (H, W), followed by its smaller levels. It is built once for all points."""
    levels = [image]
    for _ in range(_LEVELS):
        levels.append(cv2.pyrDown(levels[-1]))
    return levels


def flow_near(
    image0: np.ndarray, image1: np.ndarray, points: np.ndarray, start: np.ndarray, furthest: float
) -> np.ndarray:
    """Follow points (T, 2) of image 0 into image 1, uint8 (H, W) both, from a start (T, 2).

    Returns:
        (T, 2) float32 pixels; the start if nothing is found within `furthest` pixels of it.
    """
    moved, there = _lucas_kanade([image0], [image1], points, start, _WINDOW)
    there &= np.linalg.norm(moved - start, axis=1) < furthest
    return np.where(there[:, None], moved, start).astype(np.float32)


def flow_far(
    pyramid0: Sequence[np.ndarray], pyramid1: Sequence[np.ndarray], points: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Follow points (T, 2) of image 0 into image 1, with pyramids, from a start (T, 2); (T, 2) float32 pixels."""
    moved, there = _lucas_kanade(pyramid0, pyramid1, points, start, _WINDOW)
    return np.where(there[:, None], moved, start).astype(np.float32)


def flow_forth_and_back(
    pyramid0: Sequence[np.ndarray],
    pyramid1: Sequence[np.ndarray],
    points: np.ndarray,
    start: np.ndarray,
    furthest: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`flow_far` with a wider window; also (T,) bool which points return to their origin in the reverse flow.

    Points further than `furthest` (T,) pixels from the start count as not found.
    """
    moved, there = _lucas_kanade(pyramid0, pyramid1, points, start, _WIDE_WINDOW)
    there &= inside(moved, *pyramid1[0].shape)
    there &= np.linalg.norm(moved - start, axis=1) < furthest
    back, here = _lucas_kanade(pyramid1, pyramid0, moved[there], points[there], _WIDE_WINDOW)
    there[there] = here & (np.linalg.norm(back - points[there], axis=1) < _FORTH_AND_BACK)
    return moved, there


class Neighbours:
    """Prediction of the positions of points from the motion of their neighbours.

    Args:
        points: (T, 2) pixels in image 0.
        targets: (T, 2) pixels in image 1; NaN if unknown.
    """

    def __init__(self, points: np.ndarray, targets: np.ndarray) -> None:
        self._points, self._known = points, np.isfinite(targets[:, 0])
        self._moves = (targets - points)[self._known]

    @cached_property
    def _tree(self) -> cKDTree:
        return tree(self._points[self._known])

    def expect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, 2) float32 predicted positions of points (R,) in image 1, and (R,) the neighbours' disagreement, pixels.

        With too few known neighbours, the position is the one in image 0 and the disagreement is infinite.
        """
        if len(self._moves) <= _NEIGHBOURS:
            return self._points[rows], np.full(len(rows), np.inf)
        if compiled.available():
            own, others = self._known[rows], self._points[self._known]
            middle, spread = compiled.neighbours(self._points[rows], own, others, self._moves)
            return (self._points[rows] + middle).astype(np.float32), np.maximum(spread, _SMALLEST_SPREAD)
        _, near = self._tree.query(self._points[rows], k=_NEIGHBOURS + 1)
        near = np.where(self._known[rows, None], near[:, 1:], near[:, :-1])  # a known point is its own nearest one
        moves, half = self._moves[near], _NEIGHBOURS // 2
        middle = np.partition(moves, half, axis=1)[:, half]
        spread = np.partition(np.linalg.norm(moves - middle[:, None], axis=2), half, axis=1)[:, half]
        return (self._points[rows] + middle).astype(np.float32), np.maximum(spread, _SMALLEST_SPREAD)

    def deformations(self, rows: np.ndarray) -> np.ndarray:
        """(R, 2, 2) float32 affine maps of the surroundings of points (R,), from image 0 into image 1.

        The maps are fitted to the motion of the neighbours, by iteratively reweighted least squares with Tukey's
        weights. The map is the identity if there are too few known neighbours, or if the fit is a reflection, close to
        singular, or too large.
        """
        shapes = np.tile(np.eye(2, dtype=np.float32), (len(rows), 1, 1))
        if len(self._moves) < _SURROUNDING or len(rows) == 0:
            return shapes
        # Arrays have the shape (..., neighbours, R), because there are many points with little to compute for each.
        _, near = self._tree.query(self._points[rows], k=_SURROUNDING)
        offsets = (self._points[self._known][near.T] - self._points[rows]).astype(np.float64).transpose(2, 0, 1)
        terms = np.stack([np.ones_like(offsets[0]), *offsets])
        moves = self._moves[near.T].astype(np.float64).transpose(2, 0, 1)
        both, weights = np.concatenate([terms, moves]), np.ones(near.T.shape)
        for _ in range(_ROUNDS):
            sums = np.einsum("ikr,jkr->ijr", terms * weights, both)
            for k, ridge in enumerate((0.01, _RIDGE, _RIDGE)):
                sums[k, k] += ridge
            solution = np.einsum("ijr,jcr->icr", inverse(sums[:, :3]), sums[:, 3:])
            across, down = (
                moves - solution[0, :, None] - offsets[0] * solution[1, :, None] - offsets[1] * solution[2, :, None]
            )
            squares = across * across + down * down
            median = np.sqrt(np.sort(squares, axis=0)[_SURROUNDING // 2 - 1 :][:2]).mean(axis=0)  # of the residuals
            scale = _OUTLIER * np.maximum(median, _SMALLEST_SPREAD)
            weights = np.square((1 - squares / (scale * scale)).clip(0, 1))
        shapes += solution[1:].transpose(2, 1, 0).astype(np.float32)
        longest = np.linalg.norm(shapes, axis=(1, 2))
        area = np.linalg.det(shapes)
        shapes[(longest > _LARGEST_DEFORMATION) | (area < 1 / _LARGEST_DEFORMATION**2)] = np.eye(2)
        return shapes


def _lucas_kanade(
    pyramid0: Sequence[np.ndarray],
    pyramid1: Sequence[np.ndarray],
    points: np.ndarray,
    start: np.ndarray,
    window: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(T, 2) float32 pixels, and (T,) bool which points were found."""
    if not len(points):
        return np.array(start, np.float32), np.zeros(0, bool)
    image0, image1 = pyramid0[0], pyramid1[0]
    if compiled.available() and image0.shape == image1.shape:
        levels = 1 + sum(min(each.shape) > window for each in pyramid0[1:])  # as in OpenCV
        return compiled.follow(pyramid0[:levels], pyramid1[:levels], points, start, window)
    if image0.shape != image1.shape:  # OpenCV needs equal sizes
        height, width = np.maximum(image0.shape, image1.shape)
        image0, image1 = (
            cv2.copyMakeBorder(each, 0, height - each.shape[0], 0, width - each.shape[1], cv2.BORDER_REPLICATE)
            for each in (image0, image1)
        )
    moved, status, _ = cv2.calcOpticalFlowPyrLK(
        image0,
        image1,
        np.ascontiguousarray(points, np.float32).reshape(-1, 1, 2),
        np.array(start, np.float32, order="C").reshape(-1, 1, 2),
        winSize=(window, window),
        maxLevel=len(pyramid0) - 1,
        criteria=_STOP,
        flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
    )
    return moved[:, 0], status.ravel() > 0
