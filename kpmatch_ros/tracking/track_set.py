"""The state of tracks in one image, their appearance, and their keypoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.flow import tree
from kpmatch_ros.geometry.parallel_arrays import ParallelArrays

__all__ = [
    "NOT_DETECTED",
    "TrackSet",
    "Templates",
    "attach",
    "first_of_each_place",
    "matched_keypoints",
    "without",
]

NOT_DETECTED = -1
"""Index of a point that is not a keypoint of its image."""

_ONE_PLACE = 1.0  # pixels; closer points are at the same place
_ATTACHED = 2.0  # pixels: a keypoint closer to a track belongs to it


@dataclass(frozen=True, eq=False)
class TrackSet(ParallelArrays):
    """The state of T tracks in one image."""

    ids: np.ndarray  # (T,) uint64; 0 until the point is found again for the first time
    points: np.ndarray  # (T, 2) float32 pixels
    sigmas: np.ndarray  # (T,) float32 pixels
    indices: np.ndarray  # (T,) int64 keypoints of the image, or NOT_DETECTED
    shapes: np.ndarray  # (T, 2, 2) float32: maps an offset in the patch to the offset in the image
    anchors: np.ndarray  # (T,) float32 standard deviation of the position where the patch was cut, pixels
    templates: np.ndarray  # (T,) int64 rows of Templates
    sights: np.ndarray  # (T, FRAMES, 5) float32, see structure.py, of the last frames, this one last; NaN if unknown
    landmarks: np.ndarray  # (T, 4) float32, lost tracks only: homogeneous point in this camera's frame; NaN if unknown

    def __len__(self) -> int:
        return len(self.ids)


class Templates:
    """Appearance of tracks: a patch and a descriptor each.

    This is most of a track's data. It stays in its row while other tracks come and go, because only few tracks change.

    Attributes:
        patches: (R, P) float32.
        descriptors: (R, D) float32.
    """

    def __init__(self) -> None:
        self.patches = self.descriptors = np.zeros((0, 0), np.float32)
        self._free: np.ndarray = np.zeros(0, np.int64)

    def add(self, patches: np.ndarray, descriptors: np.ndarray) -> np.ndarray:
        """(T,) int64 rows that now have these patches (T, P) and descriptors (T, D)."""
        count, rows = len(patches), len(self.patches)
        if count > len(self._free) or not rows:
            more = rows + count
            self.patches, self.descriptors = (
                np.concatenate([have.reshape(rows, new.shape[1]), np.empty((more, new.shape[1]), np.float32)])
                for have, new in ((self.patches, patches), (self.descriptors, descriptors))
            )
            self._free = np.concatenate([self._free, np.arange(rows, rows + more)])
        taken, self._free = self._free[:count], self._free[count:]
        self.patches[taken], self.descriptors[taken] = patches, descriptors
        return taken

    def keep(self, rows: np.ndarray) -> None:
        """Free all other rows."""
        self._free = np.flatnonzero(without(len(self.patches), rows))


def matched_keypoints(
    tracks: TrackSet, keypoints: int, matches: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The keypoint (T,) matched to each track, or NOT_DETECTED, and the score (T,) of the match, or 0.

    Args:
        tracks: the tracks in the reference image.
        keypoints: number of keypoints of the reference image.
        matches: (K, 2) keypoints of the reference and the current image.
        scores: (K,).
    """
    track = np.full(keypoints, -1)
    known = np.flatnonzero(tracks.indices >= 0)
    track[tracks.indices[known]] = known
    rows = track[matches[:, 0]]
    detected, score = np.full(len(tracks), NOT_DETECTED), np.zeros(len(tracks), np.float32)
    detected[rows[rows >= 0]], score[rows[rows >= 0]] = matches[rows >= 0, 1], scores[rows >= 0]
    return detected, score


def without(count: int, indices: np.ndarray) -> np.ndarray:
    """(N,) bool which of `count` keypoints are not among the indices (T,). The indices may contain NOT_DETECTED."""
    free = np.ones(count, bool)
    free[indices[indices != NOT_DETECTED]] = False
    return free


def apart(points: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
    """(N,) bool which points (N, 2) have none of the others (M, 2) within the distance."""
    if not len(others) or not len(points):
        return np.ones(len(points), bool)
    return np.asarray(_nearest(points, others, distance)[0] > distance)


def _nearest(points: np.ndarray, others: np.ndarray, furthest: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance (N,) from points (N, 2) to the nearest of others (M, 2), and its index; inf if beyond `furthest`."""
    if compiled.available():
        return compiled.nearest(points, others, furthest)
    return tree(others).query(points, distance_upper_bound=furthest)


def first_of_each_place(points: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mask (T,) of the points that stay if, of several points at one place, only the oldest stays."""
    stay = np.ones(len(points), bool)
    if len(points) < 2:
        return stay
    age = np.where(ids == 0, np.iinfo(np.uint64).max, ids)
    if compiled.available():
        return compiled.first_of_each_place(points, _ONE_PLACE, age, scores)
    for one, other in tree(points).query_pairs(_ONE_PLACE):
        older = (age[one], -scores[one], one) <= (age[other], -scores[other], other)
        stay[other if older else one] = False
    return stay


def attach(points: np.ndarray, detected: np.ndarray, keypoints: np.ndarray) -> np.ndarray:
    """The keypoints (T,) of points: the given ones, or else the nearest keypoint if it is close and still free."""
    found = detected.copy()
    free, unattached = np.flatnonzero(without(len(keypoints), detected)), np.flatnonzero(detected < 0)
    if not len(free) or not len(unattached):
        return found
    distance, nearest = _nearest(points[unattached], keypoints[free], _ATTACHED)
    by_distance = np.argsort(distance, kind="stable")
    by_distance = by_distance[distance[by_distance] < _ATTACHED]
    _, first = np.unique(nearest[by_distance], return_index=True)
    nearer = by_distance[first]
    found[unattached[nearer]] = free[nearest[nearer]]
    return found
