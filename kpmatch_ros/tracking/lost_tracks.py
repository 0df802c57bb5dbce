"""Tracks that are lost, and how they are found again: by their descriptors, and where the motion puts their points."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.flow import Neighbours
from kpmatch_ros.geometry.patches import Alignment, align, inside, no_change
from kpmatch_ros.geometry.structure import Structure, Window
from kpmatch_ros.tracking.track_search import ASTRAY, View
from kpmatch_ros.tracking.track_set import NOT_DETECTED, Templates, TrackSet, apart, first_of_each_place, without

__all__ = ["LostTracks", "largest_elsewhere"]

_SIMILAR = 0.8  # cosine of two descriptors of one point
_PART = 64  # numbers of a descriptor
_RATIO = 0.8  # of distances to the nearest and the second nearest descriptor (Lowe, IJCV 2004)
_BESIDE = 8.0  # pixels: keypoints so near to each other have descriptors that are alike
_LOST_SPREAD = 5.0  # lost tracks were lost at different times: their moves may differ by so many times more
_SHIFTS = 2  # steps from a keypoint, or from where the motion puts a track, to near its place
_SMALLEST_DEPTH = 1e-3  # of the depth that a point had when it was lost
_AGREE = 1.5  # pixels: the motion puts tracks where they are, or all as far from there, if they disagree by less
# Part of the image's diagonal that errors of the motion may have added up to. Before a facade with equal windows, right
# tracks were up to 8 pixels of 320 x 240 from where it puts them, those of another window 187 to 412.
_DRIFT = 0.1
_MOST = 250  # tracks, the last ones lost, that are searched for where the motion puts them


class LostTracks:
    """The lost tracks of one camera, the last one lost last."""

    def __init__(self) -> None:
        self._lost: TrackSet | None = None

    @property
    def templates(self) -> np.ndarray:
        """(L,) int64 rows of Templates."""
        return np.zeros(0, np.int64) if self._lost is None else self._lost.templates

    def remember(self, ended: TrackSet, limit: int) -> None:
        """Remember tracks that ended, and of all only so many."""
        if not limit:
            self._lost = None
        elif len(ended):
            lost = ended if self._lost is None else self._lost.join(ended)
            self._lost = lost.select(np.arange(len(lost))[-limit:])

    def move_on(self, reference: TrackSet, scene: Structure | None) -> None:
        """See the points from the last of the scene's cameras, no longer from the one before; None: not known.

        Those of the reference's tracks, of which some will be lost, as well. Where the scene has another unit than the
        one before, lost points are not known any more.
        """
        for tracks, known in ((reference, scene is not None), (self._lost, scene is not None and scene.scaled)):
            if tracks is not None:
                tracks.landmarks[:] = _moved(tracks.landmarks, scene.cameras) if scene and known else np.nan

    def recall(
        self, templates: Templates, view: View, camera: Camera | None, candidates: np.ndarray, room: int
    ) -> TrackSet | None:
        """The tracks that are found again in an image, which are no longer lost; None where there are none.

        Args:
            templates: the tracks' patches and descriptors.
            view: the image.
            camera: its calibration; None where the motion is not known.
            candidates: (C,) keypoints at which there is no track.
            room: most tracks that may be found.
        """
        lost = self._lost
        if lost is None or not len(lost) or room <= 0:
            return None
        which, keypoints = _alike(lost, templates, view, candidates)
        again, points, count = lost.select(which), view.keypoints[keypoints].astype(np.float32), len(which)
        # With the change since the patch was cut, or without.
        patches = np.tile(templates.patches[again.templates], (2, 1))
        shapes = np.concatenate([again.shapes, no_change(count)])
        both = align(patches, view.pixels, np.tile(points, (2, 1)), shapes, _SHIFTS)
        found = both.select(np.where(both.good[:count], 0, count) + np.arange(count))
        expected = _places(lost.landmarks, camera)
        furthest = _DRIFT * float(np.hypot(*view.normalized.shape))
        good = found.good & _agrees(expected[which], again.points, found.points, furthest)
        if camera is not None:  # what is behind the camera is not in the image
            good &= np.isfinite(expected[which, 0]) | ~np.isfinite(again.landmarks[:, 0])
        good[good] = ~view.hides(found.points[good])
        which, keypoints, found = which[good], keypoints[good], found.select(good)
        more, sought = _seek(lost, templates, view, expected, which, found.points)
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
    """Homogeneous points (L, 4) of the reference's frame in that of the last camera."""
    motion = np.c_[cameras.rotations[-1], cameras.translations[-1]]
    return np.concatenate([landmarks @ motion.T, landmarks[:, 3:]], axis=1)


def _alike(lost: TrackSet, templates: Templates, view: View, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which lost tracks (R,) have descriptors like those of which of the keypoints (C,); (R,) each."""
    if len(candidates) < 2:
        return np.zeros(0, np.int64), candidates[:0]
    # A part of the descriptors is enough to tell which lost track is the most similar; all of it tells how similar.
    of_view = view.descriptors[candidates].astype(np.float32, copy=False)
    best = (of_view[:, :_PART] @ templates.descriptors[:, :_PART][lost.templates].T).argmax(axis=1)
    descriptors = templates.descriptors[lost.templates[best]]
    top = np.einsum("cd,cd->c", of_view, descriptors)
    chosen = np.argsort(-top, kind="stable")[: np.count_nonzero(top > _SIMILAR)]
    chosen = np.sort(chosen[np.unique(best[chosen], return_index=True)[1]])
    chosen = chosen[_distinct(view, candidates[chosen], descriptors[chosen])]
    return best[chosen], candidates[chosen]


def _distinct(view: View, keypoints: np.ndarray, descriptors: np.ndarray) -> np.ndarray:
    """Which keypoints (R,) are clearly more like descriptors (R, D) than other keypoints of the image are (R,)."""
    similar = descriptors @ view.descriptors.astype(np.float32, copy=False).T
    own = similar[np.arange(len(keypoints)), keypoints]
    # Of unit vectors, the squared distance is 2 - 2 cosine.
    return np.asarray(1 - own < _RATIO**2 * (1 - largest_elsewhere(similar, view.keypoints, keypoints)))


def largest_elsewhere(similar: np.ndarray, points: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The largest number of each row (R, N), -1 at least, of points (N, 2) that are not beside the row's own (R,).

    The numbers may be overwritten.
    """
    if compiled.available():
        return compiled.largest_elsewhere(similar, points, points[own], _BESIDE)
    # Each coordinate by itself: a norm over pairs of two numbers takes several times as long as all the rest.
    across, down = (np.square(np.subtract.outer(each[own], each)) for each in points.T)
    np.copyto(similar, -1.0, where=across + down < _BESIDE**2)
    return np.asarray(similar.max(axis=1, initial=-1.0))


def _places(landmarks: np.ndarray, camera: Camera | None) -> np.ndarray:
    """(L, 2) float32 pixels where a camera sees homogeneous points (L, 4) of its frame; NaN where it sees none."""
    if camera is None:
        return np.full((len(landmarks), 2), np.nan, np.float32)
    depth = np.where(landmarks[:, 2:3] > _SMALLEST_DEPTH, landmarks[:, 2:3], np.nan)
    return camera.project(landmarks[:, :2] / depth).astype(np.float32)


def _agrees(expected: np.ndarray, before: np.ndarray, found: np.ndarray, furthest: float) -> np.ndarray:
    """Which points (R, 2), found by their descriptors, are where their neighbours say (R,).

    Another point that resembles it is elsewhere. What is compared is how far points are from where the motion puts them
    (R, 2), or where that is NaN, from where they were lost (R, 2). Where a scene repeats itself, all may resemble
    others that are as far away: none is further than `furthest`, pixels, from where the motion puts it. Where the
    motion does not tell, as without a calibration, and there are too few neighbours, nothing does.
    """
    agrees, told = np.zeros(len(found), bool), np.isfinite(expected[:, 0])
    for rows, start, most in ((told, expected, 1.0), (~told, before, _LOST_SPREAD)):
        places, spread = Neighbours(start[rows], found[rows]).expect(np.arange(np.count_nonzero(rows)))
        tells = np.linalg.norm(found[rows] - start[rows], axis=1) < furthest if start is expected else spread < np.inf
        agrees[rows] = tells & (np.linalg.norm(found[rows] - places, axis=1) < ASTRAY * most * spread)
    return agrees


def _seek(
    lost: TrackSet, templates: Templates, view: View, expected: np.ndarray, which: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, Alignment]:
    """Search for more tracks where the motion puts them, whether or not there is a keypoint.

    The motion adds up the errors of all frames since a track was lost. Therefore the tracks that were found by their
    descriptors must agree around a place on how far off it is.

    Args:
        lost: L tracks.
        templates: their patches.
        view: the image to search.
        expected: (L, 2) pixels where the motion puts them, NaN where it is not known.
        which: (R,) those that are found already.
        found: (R, 2) where.

    Returns:
        Which others are found, and where.
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
    good[good] = first_of_each_place(sought.points[good], lost.ids[rows[good]], sought.likeness[good])
    return rows[good], sought.select(good)
