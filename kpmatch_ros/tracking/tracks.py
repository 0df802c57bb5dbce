"""Tracks: the points of a scene, followed from frame to frame. This module does not use ROS.

The matcher finds most points of a frame in the next one. Optical flow, started from the motion of neighbouring points,
finds most of the others. Each position is then aligned with the first patch of its track under an affine change (Shi
and Tomasi, CVPR 1994), so that errors do not accumulate from frame to frame.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.flow import tree
from kpmatch_ros.geometry.patches import Alignment, align, cut, inside, no_change
from kpmatch_ros.geometry.pose import RelativePose
from kpmatch_ros.geometry.refinement import align_matches, longest_step
from kpmatch_ros.geometry.structure import FRAMES, Structure, Window, place, project, sights, triangulate
from kpmatch_ros.tracking.lost_tracks import LostTracks
from kpmatch_ros.tracking.track_search import View, find_places, keypoint_sigma
from kpmatch_ros.tracking.track_set import (
    NOT_DETECTED,
    Templates,
    TrackSet,
    apart,
    attach,
    first_of_each_place,
    matched_keypoints,
    without,
)

__all__ = ["LARGEST_SIGMA", "NOT_DETECTED", "Links", "Tracks", "View", "keypoint_sigma", "pair_sigma", "refine_pair"]

_SPACE = 4.0  # pixels, smallest distance of a new track from other tracks
_CELL = 40  # pixels: tracks are spread over cells of this size

# Noise of a track's positions around those of a fixed point. The standard deviation is _NOISE pixels, or _NOISE_SIGMAS
# times the median sigma of the tracks if that is larger, as in blurred images.
_NOISE = 0.35
_NOISE_SIGMAS = 1.2
_FALSE_END = 1e-3  # largest rate at which a static point is taken for a moving one
_FALSE_FIND = 0.05  # the same rate for a position found by a search with the motion
_DEPTH_NEIGHBOURS = 5  # points whose depths predict the depth of a point
_LEAST_SPREAD = 0.3  # smallest assumed spread of the depths, relative to the depth
_SUFFICIENT_PRECISION = 1e-3  # in units of the noise: an inverse depth known to this precision does not move a point

LARGEST_SIGMA = 5.0
"""Pixels: standard deviation of a point of unknown position. No track has a larger one."""


@dataclass(frozen=True, eq=False)
class Links:
    """The points of a reference image that were found in the current one: M parallel arrays.

    Attributes:
        indices: (M, 2) int64 keypoints of the reference and the current image, or NOT_DETECTED.
        reference_points: (M, 2) float32 pixels.
        points: (M, 2) float32 pixels.
        sigmas: (M,) float32 standard deviation of a coordinate of points, pixels: the error of the whole track.
        pair_sigmas: (M,) float32 the same, given reference_points: without the error that the reference point shares.
        scores: (M,) float32 in [0, 1]: the matcher's score, or the correlation with the first patch if there is none.
        track_ids: (M,) uint64.
        refined: (M,) bool: the point was aligned by its surroundings; the others are keypoints as detected.
        smeared: index of the image, 0 or 1, whose blur is so wide that points are found anywhere along it; None if
            neither image shows such a blur.
    """

    indices: np.ndarray
    reference_points: np.ndarray
    points: np.ndarray
    sigmas: np.ndarray
    pair_sigmas: np.ndarray
    scores: np.ndarray
    track_ids: np.ndarray
    refined: np.ndarray
    smeared: int | None = None


class Tracks:
    """The tracks of one camera.

    Tracks of the reference image are followed into the current one. Lost tracks are remembered by their descriptors.

    Args:
        limit: largest number of tracks in an image.
        memory: largest number of lost tracks to remember; 0 for none.
    """

    def __init__(self, limit: int, memory: int) -> None:
        self.limit = limit
        self.memory = memory
        self._next_id = 1
        self.reset()

    def reset(self) -> None:
        """Forget all tracks. Their ids are not used again."""
        self._templates = Templates()
        self._reference: TrackSet | None = None
        self._current: TrackSet | None = None
        self._lost = LostTracks()
        self._descriptors: np.ndarray = np.zeros((0, 0), np.float32)  # of the reference's keypoints
        self._rows: np.ndarray = np.zeros(0, int)  # the reference's tracks that were found in the current image
        self._not_static: np.ndarray = np.zeros(0, int)  # the reference's tracks that are not on a static point
        self._undecided: np.ndarray = np.zeros(0, bool)  # the rows that agree with a translation that may be correct
        self._window = Window.start()
        self._scene: tuple[Structure, Camera] | None = None  # includes the current image, if the motion is known

    def new_ids(self, count: int) -> np.ndarray:
        """(count,) uint64 ids that no track has had before."""
        self._next_id += count
        return np.arange(self._next_id - count, self._next_id, dtype=np.uint64)

    def follow(self, reference: View, current: View, matches: np.ndarray, scores: np.ndarray) -> Links:
        """Find the reference's tracks in the current image.

        Args:
            reference: the image of the last :meth:`advance`. In the first one, tracks begin.
            current: the image to search.
            matches: (K, 2) matched keypoints of the reference and the current image.
            scores: (K,) the matcher's scores, in [0, 1].
        """
        if self._reference is None:
            self._reference = self._new(reference, np.arange(len(reference.keypoints))[: self.limit])
        self._reference = self._reference.select(np.s_[: self.limit])  # the limit may have been lowered
        tracks, templates, self._descriptors = self._reference, self._templates, reference.descriptors
        templates.keep(np.concatenate([tracks.templates, self._lost.templates]))
        detected, score = matched_keypoints(tracks, len(reference.keypoints), matches, scores)
        matched = detected >= 0
        keypoints = np.full((len(tracks), 2), np.nan, np.float32)
        keypoints[matched] = current.keypoints[detected[matched]]
        places = find_places(tracks, templates, keypoints, reference, current)
        found = places.found
        alive = found.good.copy()
        alive[alive] = ~current.hides(found.points[alive])

        # A keypoint away from the place where its track was found belongs to another point.
        apart = np.linalg.norm(keypoints - found.points, axis=1)
        detected[~(apart < longest_step(current.resolution))] = NOT_DETECTED
        score = np.where(detected >= 0, score, found.correlation).astype(np.float32)
        alive[alive] = first_of_each_place(found.points[alive], tracks.ids[alive], score[alive])
        detected[alive] = attach(found.points[alive], detected[alive], current.keypoints)

        new = alive & (tracks.ids == 0)
        tracks.ids[new] = self.new_ids(int(new.sum()))
        following = replace(
            tracks.select(alive),
            points=found.points[alive],
            sigmas=np.minimum(np.hypot(found.sigmas, places.anchors), LARGEST_SIGMA)[alive],
            indices=detected[alive],
            shapes=found.shapes[alive],
            anchors=places.anchors[alive],
        )
        renewed = alive[places.renewed]
        changed = places.renewed[renewed]
        descriptors = templates.descriptors[tracks.templates[changed]]
        following.templates[np.cumsum(alive)[changed] - 1] = templates.add(places.patches[renewed], descriptors)
        self._current = following
        self._rows, self._not_static, self._scene = np.flatnonzero(alive), np.zeros(0, int), None
        self._undecided = np.zeros(len(self._rows), bool)
        return Links(
            indices=np.stack([tracks.indices[alive], following.indices], axis=1).astype(np.int64),
            reference_points=tracks.points[alive],
            points=following.points.copy(),
            sigmas=following.sigmas.copy(),
            pair_sigmas=places.pair_sigmas[alive],
            scores=score[alive],
            track_ids=following.ids.copy(),
            refined=~places.as_detected[alive],
            smeared=places.smeared,
        )

    def settle(
        self, current: View, cameras: tuple[Camera | None, Camera | None], links: Links, pose: RelativePose
    ) -> tuple[Links, RelativePose]:
        """End the tracks that no static point explains, and search for lost tracks where the motion predicts them.

        Links that contradict the motion of the two images may be on a moving object. They stay, unless they agreed with
        the motion of earlier images.

        Args:
            current: the image of the last :meth:`follow`.
            cameras: calibrations of the reference and the current image.
            links: the result of :meth:`follow`.
            pose: the motion estimated from these links.

        Returns:
            The remaining links together with those found by the search, and the same pose for them. If the pose is not
            certain, for example without calibration, both are returned unchanged.
        """
        assert self._current is not None and self._reference is not None
        tracks, rows, (camera0, camera1) = self._reference, self._rows, cameras
        if camera0 is None or camera1 is None or pose.inliers is None or not pose.status.is_certain:
            return links, pose
        tracks.sights[:, -1] = sights(camera0, tracks.points)
        seen = np.full((len(self._window) + 1, 5, len(tracks)), np.nan, np.float32)  # of all tracks of the reference
        seen[:-1] = tracks.sights[:, -len(self._window) :].transpose(1, 2, 0)
        seen[-1][:, rows] = sights(camera1, links.points).T
        known_in = np.isfinite(seen[:, 0])
        agree = rows[pose.inliers & known_in[-2:, rows].all(axis=0)]
        undecided = np.zeros(len(rows), bool) if pose.undecided is None else pose.undecided
        noise = max(_NOISE, _NOISE_SIGMAS * float(np.median(links.sigmas))) / camera1.focal
        motion = pose.rotation, pose.translation
        scene = Structure.of(self._window, seen[:, :, agree], motion, noise, pose.metric)
        wrong = scene.contradicts(_FALSE_END)
        known, self._not_static = agree[~wrong], agree[wrong]
        lost = known_in[-2] & (tracks.ids > 0)
        lost[known], lost[rows[undecided]] = False, False
        again, found = self._search(current, camera1, seen, np.flatnonzero(lost), known, scene.select(~wrong))

        stays = known_in[:-1].sum(axis=0) == 1
        stays[agree], stays[known], stays[again], stays[rows[undecided]] = False, True, False, True
        stay = stays[rows]
        stay &= np.isin(rows, known) | apart(links.points, found.points, 1.0)  # the points found agree with the motion
        order = np.argsort(np.concatenate([rows[stay], again]), kind="stable")
        more = replace(
            tracks.select(again),
            points=found.points,
            sigmas=np.minimum(np.hypot(found.sigmas, tracks.anchors[again]), LARGEST_SIGMA),
            shapes=found.shapes,
            indices=np.full(len(again), NOT_DETECTED),
            landmarks=np.full((len(again), 4), np.nan, np.float32),
        )
        following = self._current.select(stay).join(more)
        following.indices[:] = attach(following.points, following.indices, current.keypoints)
        following = following.select(order)
        self._rows = np.concatenate([rows[stay], again])[order]
        following.sights[:, :-1] = np.delete(tracks.sights[self._rows], scene.spare(), axis=1)
        # Tracks that agree with a rejected translation may be static or moving. The next frames decide.
        self._undecided = np.concatenate([undecided[stay], np.zeros(len(again), bool)])[order]
        following.sights[self._undecided] = np.nan
        self._current, self._scene = following, (scene, camera1)
        settled = Links(
            indices=np.stack([tracks.indices[self._rows], following.indices], axis=1).astype(np.int64),
            reference_points=tracks.points[self._rows],
            points=following.points.copy(),
            sigmas=following.sigmas.copy(),
            pair_sigmas=np.concatenate([links.pair_sigmas[stay], found.sigmas])[order],
            scores=np.concatenate([links.scores[stay], found.correlation])[order],
            track_ids=following.ids.copy(),
            refined=np.concatenate([links.refined[stay], found.good])[order],
        )
        return settled, pose.for_matches(np.concatenate([pose.inliers[stay], found.good])[order])

    def _search(
        self,
        current: View,
        camera: Camera,
        seen: np.ndarray,
        lost: np.ndarray,
        known: np.ndarray,
        scene: Structure,
    ) -> tuple[np.ndarray, Alignment]:
        """Search for tracks of the reference where the motion and their depths, or those of their neighbours, put them.

        Args:
            current: the image to search.
            camera: its calibration.
            seen: (F, 5, T) sights of all tracks of the reference.
            lost: (R,) the tracks to search for.
            known: (K,) the tracks whose points are known.
            scene: the points of these K tracks.

        Returns:
            Indices of the tracks found, and their alignment.
        """
        assert self._current is not None and self._reference is not None
        tracks, image = self._reference, current.pixels
        if len(known) < _DEPTH_NEIGHBOURS:
            lost = lost[:0]
        depths = scene.landmarks[2][tree(tracks.points[known]).query(tracks.points[lost], k=_DEPTH_NEIGHBOURS)[1]]
        middle = np.median(depths, axis=1)
        spread = np.median(np.abs(depths - middle[:, None]), axis=1) + _LEAST_SPREAD * np.abs(middle)
        # All inverse depths are 0 if the camera only turned.
        spread = np.maximum(spread, _SUFFICIENT_PRECISION * scene.noise)
        before = Window(scene.cameras.rotations[:-1], scene.cameras.translations[:-1])
        seen_before, prior_information = seen[:-1][:, :, lost], (scene.noise / spread) ** 2
        landmarks = triangulate(before, seen_before, prior=middle, prior_information=prior_information)[0]
        x, y, inverse_depths = landmarks
        tracks.landmarks[lost] = np.stack([x, y, np.ones_like(x), inverse_depths], axis=1)
        expected = camera.project(project(scene.cameras, landmarks).T).astype(np.float32)
        visible = inside(expected, *current.normalized.shape)
        lost, landmarks, expected = lost[visible], landmarks[:, visible], expected[visible]
        found = align(self._templates.patches[tracks.templates[lost]], image, expected, tracks.shapes[lost])
        seen = seen[:, :, lost]
        seen[-1] = sights(camera, found.points).T
        good = found.good & np.isfinite(seen[-1, 0])
        good[good] = ~current.hides(found.points[good])
        good &= ~place(scene.cameras, landmarks, seen, scene.noise).contradicts(_FALSE_FIND)
        good[good] = first_of_each_place(found.points[good], tracks.ids[lost[good]], found.correlation[good])
        places = np.zeros(len(tracks), bool)
        places[known] = True
        places = places[self._rows]
        good[good] = apart(found.points[good], self._current.points[places], 1.0)
        return lost[good], found.select(good)

    def advance(self, current: View, inliers: np.ndarray | None) -> None:
        """Make the current image the reference, and begin new tracks in empty areas.

        A track that contradicts the motion ends, unless it agrees with a translation that may be the correct one.

        Args:
            current: the image of the last :meth:`follow`.
            inliers: (M,) bool, which of the links agree with the motion; None if the motion is unknown.
        """
        assert self._current is not None and self._reference is not None
        reference = self._reference
        agree = np.ones(len(self._rows), bool) if inliers is None else inliers | self._undecided
        ended = reference.ids > 0
        ended[self._rows], ended[self._not_static] = False, False
        self._store_descriptors(agree)
        self._lost.move_on(reference, None if self._scene is None else self._scene[0])
        self._lost.remember(reference.select(ended), self.memory)
        tracks = self._current.select(agree)
        if self._scene is None:
            self._window, tracks.sights[:] = Window.start(), np.nan
        else:
            self._window = self._scene[0].cameras.advance(self._scene[0].spare())
        candidates = np.flatnonzero(without(len(current.keypoints), tracks.indices))
        candidates = candidates[apart(current.keypoints[candidates], tracks.points, _SPACE)]
        camera = None if self._scene is None else self._scene[1]
        recalled = self._lost.recall(self._templates, current, camera, candidates, self.limit - len(tracks))
        if recalled is not None:
            tracks = tracks.join(recalled)
            candidates = candidates[apart(current.keypoints[candidates], recalled.points, _SPACE)]
        self._reference = tracks.join(self._fill(tracks, current, candidates))
        # This comes after the recall: a track published at one place of this image must not be recalled at another.
        self._lost.remember(reference.select(self._rows[~agree]), self.memory)
        self._current = None

    def _new(self, view: View, indices: np.ndarray) -> TrackSet:
        points = view.keypoints[indices].astype(np.float32)
        count = len(points)
        return TrackSet(
            ids=np.zeros(count, np.uint64),
            points=points,
            sigmas=np.zeros(count, np.float32),
            indices=indices.astype(np.int64),
            shapes=no_change(count),
            anchors=np.zeros(count, np.float32),
            templates=self._templates.add(cut(view.pixels, points), view.descriptors[indices]),
            sights=np.full((count, FRAMES, 5), np.nan, np.float32),
            landmarks=np.full((count, 4), np.nan, np.float32),
        )

    def _store_descriptors(self, agree: np.ndarray) -> None:
        """Store the reference's descriptors of tracks that are keypoints there, and end or are no longer keypoints."""
        assert self._current is not None and self._reference is not None
        reference, now = self._reference, self._reference.templates.copy()
        now[self._rows] = self._current.templates
        last = (reference.indices >= 0) & (reference.ids > 0)
        last[self._rows] &= (self._current.indices < 0) | ~agree
        descriptors = self._descriptors[reference.indices[last]]
        for templates in (reference.templates, now):
            self._templates.descriptors[templates[last]] = descriptors

    def _fill(self, tracks: TrackSet, view: View, candidates: np.ndarray) -> TrackSet:
        """New tracks at keypoints (C,) away from other tracks. Cells with the fewest tracks come first."""
        room = max(self.limit - len(tracks), 0)
        if len(candidates) > room:
            crowd = np.zeros([side // _CELL + 2 for side in view.normalized.shape], int)
            np.add.at(crowd, tuple((tracks.points[:, ::-1] // _CELL).astype(int).T), 1)
            rows, columns = (view.keypoints[candidates][:, ::-1] // _CELL).astype(int).T
            cells = rows * crowd.shape[1] + columns
            by_cell = np.argsort(cells, kind="stable")
            _, first, numbers = np.unique(cells[by_cell], return_index=True, return_inverse=True)
            rank = np.empty(len(cells), int)  # of each candidate within its cell
            rank[by_cell] = np.arange(len(cells)) - first[numbers]
            candidates = np.sort(candidates[np.argsort(crowd.ravel()[cells] + rank, kind="stable")[:room]])
        return self._new(view, candidates)


def pair_sigma(resolution: float) -> float:
    """Standard deviation of a coordinate of a keypoint relative to another image's keypoint; both have errors."""
    return float(np.sqrt(2) * keypoint_sigma(resolution))


def refine_pair(view0: View, view1: View, points0: np.ndarray, points1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Refine matches of two images taken at the same time.

    Args:
        view0: the left image.
        view1: the right image.
        points0: (M, 2) float32 pixels in the left image.
        points1: (M, 2) float32 pixels in the right image, the same matches.

    Returns:
        (M, 2) float32 points1, refined where the surroundings match, and (M,) float32 standard deviations, pixels.
    """
    found = align_matches(view0.normalized, view1.normalized, points0, points1, view1.resolution)
    return found.points, np.where(found.good, found.sigmas, pair_sigma(view1.resolution)).astype(np.float32)
