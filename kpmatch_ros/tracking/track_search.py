"""Search for the tracks of one image in another, with the matcher, optical flow and the tracks' patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kpmatch_ros.geometry.blur import equalise_blur
from kpmatch_ros.geometry.flow import Neighbours, flow_far, flow_forth_and_back, pyramid
from kpmatch_ros.geometry.patches import LONGEST_STEP, Alignment, align, cut, no_change, signed, unaligned
from kpmatch_ros.geometry.refinement import REFINABLE, align_deformed
from kpmatch_ros.tracking.track_set import Templates, TrackSet

__all__ = ["LARGEST_DISAGREEMENT", "Places", "View", "find_places", "keypoint_sigma"]

LARGEST_DISAGREEMENT = 3.0
"""Factor on the disagreement of the neighbours: a point is at most this far from where its neighbours moved."""

_SHIFTS = 1  # shift-only steps from the position by the matcher or the neighbours
_LOWEST_CORRELATION = 0.5  # with the patch; below it, optical flow alone leads to random places
_SIGMA_STEP = 0.05  # pixels, error of a step between two images in addition to the patches' own
_SIGMA_FLOW = 0.7  # pixels
_SIGMA_KEYPOINT = 0.8  # per pixel between positions that the detector can report


@dataclass(frozen=True, eq=False)
class View:
    """An image with its features, as the tracking uses it.

    Attributes:
        normalized: uint8 (H, W), from :func:`kpmatch_ros.geometry.refinement.normalize_contrast`.
        keypoints: (N, 2) float32 pixels.
        descriptors: (N, D) float32 unit vectors.
        resolution: pixels between neighbouring positions that the detector can report.
        mask: (H, W) uint8 or bool, 0 where points are ignored; None if there is no mask.
    """

    normalized: np.ndarray
    keypoints: np.ndarray
    descriptors: np.ndarray
    resolution: float
    mask: np.ndarray | None = None

    @cached_property
    def pixels(self) -> np.ndarray:
        """The normalized image from :func:`kpmatch_ros.geometry.patches.signed`, for patch search."""
        return signed(self.normalized)

    @cached_property
    def pyramid(self) -> list[np.ndarray]:
        """The normalized image and its smaller levels, for optical flow."""
        return pyramid(self.normalized)

    def shows(self, points: np.ndarray) -> np.ndarray:
        """(T,) bool which points (T, 2) are inside the image and not masked."""
        height, width = self.normalized.shape
        shown = np.asarray(((points > -0.5) & (points < (width - 0.5, height - 0.5))).all(axis=1))
        shown[shown] = ~self.hides(points[shown])
        return shown

    def hides(self, points: np.ndarray) -> np.ndarray:
        """(T,) bool which points (T, 2) inside the image are masked."""
        if self.mask is None:
            return np.zeros(len(points), bool)
        columns, rows = np.rint(points).astype(int).T
        return np.asarray(self.mask[rows, columns] == 0)


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of T tracks of a reference image in the current one.

    Attributes:
        found: points, shapes, correlation, and whether each track was found.
        anchors: (T,) float32 standard deviation of the position where the patch was cut, pixels.
        pair_sigmas: (T,) float32 standard deviation of a coordinate of the point, given the point in the reference.
        as_detected: (T,) bool which points are keypoints as detected.
        renewed: (R,) tracks that continue with a new patch.
        patches: (R, P) float32 the new patches.
        smeared: see :class:`kpmatch_ros.geometry.blur.EqualBlur`.
    """

    found: Alignment
    anchors: np.ndarray
    pair_sigmas: np.ndarray
    as_detected: np.ndarray
    renewed: np.ndarray
    patches: np.ndarray
    smeared: int | None


def keypoint_sigma(resolution: float) -> float:
    """Standard deviation of a coordinate of a keypoint as detected, pixels.

    Args:
        resolution: pixels between neighbouring positions that the detector can report.
    """
    return _SIGMA_KEYPOINT * max(resolution, 1.0)


def find_places(
    tracks: TrackSet, templates: Templates, keypoints: np.ndarray, reference: View, current: View
) -> Places:
    """Find the tracks of the reference image in the current one.

    Args:
        tracks: T tracks in the reference image.
        templates: the tracks' patches.
        keypoints: (T, 2) float32 matched keypoints in the current image, pixels; NaN without a match.
        reference: the reference image.
        current: the current image.
    """
    matched = np.isfinite(keypoints[:, 0])
    neighbours, near, unmatched = Neighbours(tracks.points, keypoints), keypoints.copy(), np.flatnonzero(~matched)
    near[unmatched], _ = neighbours.expect(unmatched)
    found, anchors = unaligned(near.copy(), np.zeros(len(tracks), np.float32), good=False), tracks.anchors.copy()
    rest = np.flatnonzero(_reachable(near, current.normalized))
    patches = templates.patches[tracks.templates[rest]]
    found.put(rest, align(patches, current.pixels, near[rest], tracks.shapes[rest], _SHIFTS))
    align_deformed(found, rest, patches, current.pixels, near, tracks.shapes, neighbours)
    equalised = equalise_blur(reference.normalized, current.normalized, tracks.points[rest], near[rest])
    # The first patch of a new track was cut from the reference, so a step from the reference adds nothing.
    known = (tracks.ids > 0) | (equalised is not None)
    images = (reference.pixels, current.pixels) if equalised is None else equalised.images
    steps = _step(tracks, found, rest[known[rest]], near, *images)
    rest = rest[~found.good[rest]]
    near[rest] = flow_far(reference.pyramid, current.pyramid, tracks.points[rest], near[rest])
    found.put(rest, align(templates.patches[tracks.templates[rest]], current.pixels, near[rest], tracks.shapes[rest]))
    steps = np.fmin(steps, _step(tracks, found, rest[known[rest]], near, *images))
    # The same patch locates a track in both images. The patch of a new track comes from the reference.
    own = np.sqrt(np.maximum(tracks.sigmas**2 - tracks.anchors**2, 0))
    pair_sigmas = np.where(np.isfinite(steps), steps, np.hypot(found.sigmas, own))
    # Where no patch fits, optical flow may still find the point, and lead back from it.
    rest = np.flatnonzero(~found.good & (found.correlation > _LOWEST_CORRELATION))
    expected, spread = neighbours.expect(rest)
    flowed, good = flow_forth_and_back(
        reference.pyramid, current.pyramid, tracks.points[rest], expected, LARGEST_DISAGREEMENT * spread
    )
    rest, flowed = rest[good], flowed[good]
    found.put(rest, unaligned(flowed, found.correlation[rest]))
    anchors[rest], pair_sigmas[rest] = np.hypot(tracks.sigmas[rest], _SIGMA_FLOW), _SIGMA_FLOW
    # If the images differ too much for patches and flow, the matched keypoints are used as detected.
    as_detected = matched & ~found.good
    if found.good[matched].sum() > REFINABLE * matched.sum():
        as_detected[:] = False
    found.put(np.flatnonzero(as_detected), unaligned(keypoints[as_detected], found.correlation[as_detected]))
    anchors[as_detected] = pair_sigmas[as_detected] = keypoint_sigma(current.resolution)
    renewed = np.concatenate([rest, np.flatnonzero(as_detected)])
    return Places(
        found=found,
        anchors=anchors,
        pair_sigmas=pair_sigmas.astype(np.float32),
        as_detected=as_detected,
        renewed=renewed,
        patches=cut(current.pixels, found.points[renewed]),
        smeared=None if equalised is None else equalised.smeared,
    )


def _step(
    tracks: TrackSet, found: Alignment, rows: np.ndarray, near: np.ndarray, before: np.ndarray, now: np.ndarray
) -> np.ndarray:
    """Align tracks with their surroundings in the reference image if this is more precise than with their first patch.

    A sharp first patch fits a blurred image poorly. The reference has the same blur as the current image, or is blurred
    to have it. The track keeps its first patch for later sharp images. Errors accumulate over such steps.

    Args:
        tracks: T tracks in the reference image.
        found: alignment with the first patches. Better results are written into it.
        rows: (R,) the tracks to search for.
        near: (T, 2) float32 pixels, where the search begins.
        before: the reference image, from :func:`kpmatch_ros.geometry.patches.signed`.
        now: the current image, in the same form.

    Returns:
        (T,) standard deviation of a coordinate of the step, pixels, for tracks that became better; NaN for the others.
    """
    sigmas = np.where(found.good, np.hypot(found.sigmas, tracks.anchors), np.inf)
    rows = rows[sigmas[rows] > np.hypot(tracks.sigmas[rows], _SIGMA_STEP)]
    step = align(cut(before, tracks.points[rows]), now, near[rows], no_change(len(rows)), _SHIFTS)
    errors = np.hypot(step.sigmas, _SIGMA_STEP)
    spread = np.hypot(errors, tracks.sigmas[rows])
    better = step.good & (spread < sigmas[rows])
    rows, step, errors, spread = rows[better], step.select(better), errors[better], spread[better]
    # The published sigma combines this one with the anchor. The track keeps its first patch and its anchor.
    beside = np.sqrt(np.maximum(spread**2 - tracks.anchors[rows] ** 2, 0))
    shapes = step.shapes @ tracks.shapes[rows]
    found.put(rows, replace(step, shapes=shapes, sigmas=beside, correlation=found.correlation[rows]))
    steps = np.full(len(tracks), np.nan)
    steps[rows] = errors
    return steps


def _reachable(points: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(T,) bool which points (T, 2) are close enough to the image (H, W) for their patches to be found in it."""
    height, width = image.shape
    beyond = LONGEST_STEP
    return np.asarray((points > -beyond).all(axis=1) & (points < (width + beyond, height + beyond)).all(axis=1))
