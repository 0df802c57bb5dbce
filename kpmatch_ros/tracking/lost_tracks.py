"""Lost tracks, and their recovery by descriptors and by the motion of the camera."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.flow import Neighbours
from kpmatch_ros.geometry.patches import Alignment, align, inside, no_change
from kpmatch_ros.geometry.structure import Structure, Window
from kpmatch_ros.tracking.track_search import LARGEST_DISAGREEMENT, View
from kpmatch_ros.tracking.track_set import NOT_DETECTED, Templates, TrackSet, apart, first_of_each_place, without

__all__ = ["LostTracks", "largest_elsewhere"]

_SIMILAR = 0.8  # smallest cosine of two descriptors of one point
_PART = 64  # dimensions of a descriptor that the first comparison uses
_RATIO = 0.8  # ratio of the distances to the nearest and second nearest descriptor (Lowe, IJCV 2004)
_BESIDE = 8.0  # pixels: keypoints closer to each other have similar descriptors
_LOST_SPREAD = 5.0  # factor on the spread of displacements, because tracks were lost at different times
_SHIFTS = 2  # shift-only steps from a keypoint, or from the position predicted by the motion
_SMALLEST_DEPTH = 1e-3  # relative to the depth of the point when it was lost
_AGREE = 1.5  # pixels: largest disagreement of neighbouring tracks on the offset from the predicted positions
# Largest accumulated error of the motion, as a part of the image's diagonal. On a facade with equal windows, correct
# tracks were up to 8 pixels of 320 x 240 from their predicted positions, those of another window 187 to 412.
_DRIFT = 0.1
_MOST = 250  # most recently lost tracks that are searched for at their predicted positions


class LostTracks:
    """The lost tracks of one camera, in the order in which they were lost."""

    def __init__(self) -> None:
        self._lost: TrackSet | None = None

    @property
    def templates(self) -> np.ndarray:
        """(L,) int64 rows of Templates."""
        return np.zeros(0, np.int64) if self._lost is None else self._lost.templates

    def remember(self, ended: TrackSet, limit: int) -> None:
        """Add tracks that ended, and keep only the last `limit` lost tracks."""
        if not limit:
            self._lost = None
        elif len(ended):
            lost = ended if self._lost is None else self._lost.join(ended)
            self._lost = lost.select(np.arange(len(lost))[-limit:])

    def move_on(self, reference: TrackSet, scene: Structure | None) -> None:
        """Transform the points of the reference's tracks and of the lost tracks into the frame of the last camera.

        If `scene` is None (unknown motion), all points become unknown. If the scene has another unit of length than the
        cameras before, the points of lost tracks become unknown.
        """
        for tracks, known in ((reference, scene is not None), (self._lost, scene is not None and scene.scaled)):
            if tracks is not None:
                tracks.landmarks[:] = _moved(tracks.landmarks, scene.cameras) if scene and known else np.nan

    def recall(
        self, templates: Templates, view: View, camera: Camera | None, candidates: np.ndarray, room: int
    ) -> TrackSet | None:
        """The tracks found again in an image, which are then no longer lost; None without lost tracks or without room.

        Args:
            templates: the tracks' patches and descriptors.
            view: the image.
            camera: its calibration; None if the motion is unknown.
            candidates: (C,) keypoints without a track.
            room: largest number of tracks to return.
        """
        lost = self._lost
        if lost is None or not len(lost) or room <= 0:
            return None
        which, keypoints = _match_descriptors(lost, templates, view, candidates)
        again, points, count = lost.select(which), view.keypoints[keypoints].astype(np.float32), len(which)
        # Each patch is tried with the deformation since it was cut, and without.
        patches = np.tile(templates.patches[again.templates], (2, 1))
        shapes = np.concatenate([again.shapes, no_change(count)])
        both = align(patches, view.pixels, np.tile(points, (2, 1)), shapes, _SHIFTS)
        found = both.select(np.where(both.good[:count], 0, count) + np.arange(count))
        expected = _places(lost.landmarks, camera)
        furthest = _DRIFT * float(np.hypot(*view.normalized.shape))
        good = found.good & _agrees(expected[which], again.points, found.points, furthest)
        if camera is not None:  # a point behind the camera is not in the image
            good &= np.isfinite(expected[which, 0]) | ~np.isfinite(again.landmarks[:, 0])
        good[good] = ~view.hides(found.points[good])
        which, keypoints, found = which[good], keypoints[good], found.select(good)
        more, sought = _search_predicted(lost, templates, view, expected, which, found.points)
        which = np.concatenate([which, more])[:room]
        found = found.join(sought).select(np.s_[:room])
        again = lost.select(which)
        self._lost = lost.select(without(len(lost), which))
        return replace(
            again,
            points=found.points,
            shapes=found.shapes,
            sigmas=np.hypot(found.sigmas, again.anchors),
            indices=np.concatenate([keypoints, np.full(len(more), NOT_DETECTED)])[:room].astype(np.int64),
            sights=np.full_like(again.sights, np.nan),
            landmarks=np.full_like(again.landmarks, np.nan),
        )


def _moved(landmarks: np.ndarray, cameras: Window) -> np.ndarray:
    """Homogeneous points (L, 4) of the reference's frame, transformed into the frame of the last camera."""
    motion = np.c_[cameras.rotations[-1], cameras.translations[-1]]
    return np.concatenate([landmarks @ motion.T, landmarks[:, 3:]], axis=1)


def _match_descriptors(
    lost: TrackSet, templates: Templates, view: View, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lost tracks (R,) and keypoints (R,), from candidates (C,), whose descriptors match."""
    if len(candidates) < 2:
        return np.zeros(0, np.int64), candidates[:0]
    # A part of the descriptor is enough to find the most similar lost track. The full one gives the similarity.
    of_view = view.descriptors[candidates].astype(np.float32, copy=False)
    best = (of_view[:, :_PART] @ templates.descriptors[:, :_PART][lost.templates].T).argmax(axis=1)
    descriptors = templates.descriptors[lost.templates[best]]
    top = np.einsum("cd,cd->c", of_view, descriptors)
    chosen = np.argsort(-top, kind="stable")[: np.count_nonzero(top > _SIMILAR)]
    chosen = np.sort(chosen[np.unique(best[chosen], return_index=True)[1]])
    chosen = chosen[_distinct(view, candidates[chosen], descriptors[chosen])]
    return best[chosen], candidates[chosen]


def _distinct(view: View, keypoints: np.ndarray, descriptors: np.ndarray) -> np.ndarray:
    """Mask (R,) of keypoints (R,) that are clearly closer to their descriptors (R, D) than other keypoints are."""
    similar = descriptors @ view.descriptors.astype(np.float32, copy=False).T
    own = similar[np.arange(len(keypoints)), keypoints]
    # The squared distance of unit vectors is 2 - 2 cosine.
    return np.asarray(1 - own < _RATIO**2 * (1 - largest_elsewhere(similar, view.keypoints, keypoints)))


def largest_elsewhere(similar: np.ndarray, points: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Largest value of each row (R, N), at least -1, over the points (N, 2) that are not close to the row's own (R,).

    The array `similar` may be overwritten.
    """
    if compiled.available():
        return compiled.largest_elsewhere(similar, points, points[own], _BESIDE)
    # Each coordinate on its own: a norm over pairs of numbers takes several times as long as all the rest.
    across, down = (np.square(np.subtract.outer(each[own], each)) for each in points.T)
    np.copyto(similar, -1.0, where=across + down < _BESIDE**2)
    return np.asarray(similar.max(axis=1, initial=-1.0))


def _places(landmarks: np.ndarray, camera: Camera | None) -> np.ndarray:
    """(L, 2) float32 pixels where the camera sees homogeneous points (L, 4) of its frame; NaN if it does not."""
    if camera is None:
        return np.full((len(landmarks), 2), np.nan, np.float32)
    depth = np.where(landmarks[:, 2:3] > _SMALLEST_DEPTH, landmarks[:, 2:3], np.nan)
    return camera.project(landmarks[:, :2] / depth).astype(np.float32)


def _agrees(expected: np.ndarray, before: np.ndarray, found: np.ndarray, furthest: float) -> np.ndarray:
    """Mask (R,) of points found by their descriptors that agree with the displacements of their neighbours.

    Similar points at wrong places do not agree. The displacement is measured from `expected` (R, 2), where the motion
    puts the point, or from `before` (R, 2), where it was lost, if `expected` is NaN. In repetitive scenes, all points
    may match others with the same displacement. Therefore no point may be further than `furthest`, pixels, from where
    the motion puts it. If the motion is unknown, as without a calibration, points with too few neighbours do not agree.
    """
    agrees, predicted = np.zeros(len(found), bool), np.isfinite(expected[:, 0])
    for rows, start, most in ((predicted, expected, 1.0), (~predicted, before, _LOST_SPREAD)):
        places, spread = Neighbours(start[rows], found[rows]).expect(np.arange(np.count_nonzero(rows)))
        possible = (
            np.linalg.norm(found[rows] - start[rows], axis=1) < furthest if start is expected else spread < np.inf
        )
        agrees[rows] = possible & (np.linalg.norm(found[rows] - places, axis=1) < LARGEST_DISAGREEMENT * most * spread)
    return agrees


def _search_predicted(
    lost: TrackSet, templates: Templates, view: View, expected: np.ndarray, which: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, Alignment]:
    """Search for more lost tracks at their predicted positions, with or without a keypoint there.

    The prediction accumulates the errors of all frames since a track was lost. Therefore the tracks found by their
    descriptors nearby must agree on the offset from the prediction.

    Args:
        lost: L tracks.
        templates: their patches.
        view: the image to search.
        expected: (L, 2) pixels, positions predicted by the motion; NaN if unknown.
        which: (R,) the tracks found already.
        found: (R, 2) their positions.

    Returns:
        Indices of the other tracks found, and their alignment.
    """
    rows = np.flatnonzero(without(len(lost), which) & inside(expected, *view.normalized.shape))[-_MOST:]
    known = np.isfinite(expected[which, 0])
    start = np.concatenate([expected[rows], expected[which[known]]])
    targets = np.concatenate([np.full((len(rows), 2), np.nan), found[known]])
    places, spread = Neighbours(start, targets).expect(np.arange(len(rows)))
    sure = spread < _AGREE
    rows, places = rows[sure], places[sure]
    sought = align(templates.patches[lost.templates[rows]], view.pixels, places, lost.shapes[rows], _SHIFTS)
    good = sought.good.copy()
    good[good] = ~view.hides(sought.points[good])
    good[good] = apart(sought.points[good], found, 1.0)
    good[good] = first_of_each_place(sought.points[good], lost.ids[rows[good]], sought.correlation[good])
    return rows[good], sought.select(good)
