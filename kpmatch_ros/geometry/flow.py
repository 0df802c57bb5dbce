"""Optical flow: where points of one image are in another (Lucas and Kanade, IJCAI 1981; OpenCV's)."""

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
"""A tree of points (T, 2), built quickly: each is asked but once."""

_WINDOW = 13  # pixels
_WIDE_WINDOW = 21  # pixels: where nothing but the flow itself tells whether it is right
_LEVELS = 2  # of a pyramid, besides the image
_STOP = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 10, 0.03)
_FORTH_AND_BACK = 1.0  # pixels
_NEIGHBOURS = 7
_SMALLEST_SPREAD = 1.0  # pixels
_SURROUNDING = 16  # neighbours that tell a deformation: fewer are less exact, more lie on other surfaces
_ROUNDS = 5  # of reweighting: neighbours on another surface, and wrong matches, lose their weight
_OUTLIER = 3.0  # times the median residual
_RIDGE = 10.0  # square pixels: neighbours err by a pixel, and a deformation is a third or so
_LARGEST_DEFORMATION = 3.0  # of a length


def pyramid(image: np.ndarray) -> list[np.ndarray]:
    """An image, uint8 (H, W), and after it smaller and smaller ones: made once, for all that is followed."""
    levels = [image]
    for _ in range(_LEVELS):
        levels.append(cv2.pyrDown(levels[-1]))
    return levels


def flow_near(
    image0: np.ndarray, image1: np.ndarray, points: np.ndarray, start: np.ndarray, furthest: float
) -> np.ndarray:
    """Follow points (T, 2) of image 0 into image 1, uint8 (H, W) both, near a start (T, 2).

    Returns:
        (T, 2) float32 pixels; the start where nothing is found within so many pixels of it.
    """
    moved, there = _lucas_kanade([image0], [image1], points, start, _WINDOW)
    there &= np.linalg.norm(moved - start, axis=1) < furthest
    return np.where(there[:, None], moved, start).astype(np.float32)


def flow_far(
    pyramid0: Sequence[np.ndarray], pyramid1: Sequence[np.ndarray], points: np.ndarray, start: np.ndarray
) -> np.ndarray:
    """Follow points (T, 2) of image 0 into image 1, by their pyramids, from a start (T, 2); (T, 2) float32 pixels."""
    moved, there = _lucas_kanade(pyramid0, pyramid1, points, start, _WINDOW)
    return np.where(there[:, None], moved, start).astype(np.float32)


def flow_forth_and_back(
    pyramid0: Sequence[np.ndarray],
    pyramid1: Sequence[np.ndarray],
    points: np.ndarray,
    start: np.ndarray,
    furthest: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`flow_far`, with a wider window, and (T,) bool which points lead back to where they began.

    Points that move further (T,) than so many pixels from the start do not.
    """
    moved, there = _lucas_kanade(pyramid0, pyramid1, points, start, _WIDE_WINDOW)
    there &= inside(moved, *pyramid1[0].shape)
    there &= np.linalg.norm(moved - start, axis=1) < furthest
    back, here = _lucas_kanade(pyramid1, pyramid0, moved[there], points[there], _WIDE_WINDOW)
    there[there] = here & (np.linalg.norm(back - points[there], axis=1) < _FORTH_AND_BACK)
    return moved, there


class Neighbours:
    """Where points are if they move as their neighbours do.

    Args:
        points: (T, 2) pixels in image 0.
        targets: (T, 2) pixels in image 1; NaN where that is not known.
    """

    def __init__(self, points: np.ndarray, targets: np.ndarray) -> None:
        self._points, self._known = points, np.isfinite(targets[:, 0])
        self._moves = (targets - points)[self._known]

    @cached_property
    def _tree(self) -> cKDTree:
        return tree(self._points[self._known])

    def expect(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, 2) float32 where some of the points (R,) are in image 1, and (R,) how far neighbours disagree, pixels.

        The same place and infinity where too few neighbours are known.
        """
        if len(self._moves) <= _NEIGHBOURS:
            return self._points[rows], np.full(len(rows), np.inf)
        if compiled.available():
            own, others = self._known[rows], self._points[self._known]
            middle, spread = compiled.neighbours(self._points[rows], own, others, self._moves)
            return (self._points[rows] + middle).astype(np.float32), np.maximum(spread, _SMALLEST_SPREAD)
        _, near = self._tree.query(self._points[rows], k=_NEIGHBOURS + 1)
        near = np.where(self._known[rows, None], near[:, 1:], near[:, :-1])  # the nearest of a known one is itself
        moves, half = self._moves[near], _NEIGHBOURS // 2
        middle = np.partition(moves, half, axis=1)[:, half]
        spread = np.partition(np.linalg.norm(moves - middle[:, None], axis=2), half, axis=1)[:, half]
        return (self._points[rows] + middle).astype(np.float32), np.maximum(spread, _SMALLEST_SPREAD)

    def deformations(self, rows: np.ndarray) -> np.ndarray:
        """(R, 2, 2) float32 affine maps of the surroundings of some of the points (R,), from image 0 into image 1.

        Fitted to how the neighbours move, by iteratively reweighted least squares with Tukey's weights. No change where
        too few neighbours are known, or they contradict each other so that they tell of a mirror or a point.
        """
        shapes = np.tile(np.eye(2, dtype=np.float32), (len(rows), 1, 1))
        if len(self._moves) < _SURROUNDING or len(rows) == 0:
            return shapes
        # Arrays are (..., neighbours, R): many points at once, each of which has little to compute.
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
    """(T, 2) float32 pixels, and (T,) bool which were found."""
    if not len(points):
        return np.array(start, np.float32), np.zeros(0, bool)
    image0, image1 = pyramid0[0], pyramid1[0]
    if compiled.available() and image0.shape == image1.shape:
        levels = 1 + sum(min(each.shape) > window for each in pyramid0[1:])  # as OpenCV has it
        return compiled.follow(pyramid0[:levels], pyramid1[:levels], points, start, window)
    if image0.shape != image1.shape:  # OpenCV wants one size
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
