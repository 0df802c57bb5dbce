"""Frames in, matches with the reference frame, tracks and relative pose out: the flow of the package, without ROS."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from kpmatch_ros.feature_matcher import FeatureMatcher, Features, to_numpy
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.refinement import INDEPENDENT_POINTS, REFINED_RESOLUTION, flatten, refine
from kpmatch_ros.geometry.stereo_motion import StereoCamera, check_stereo_matches, estimate_stereo_motion
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.parameters import Parameters

__all__ = ["Frame", "FrontEnd", "Pair", "Stereo"]

_REFINABLE = 0.5  # part of the matches: with fewer, the images differ too much, and all are taken as they are


@dataclass(frozen=True)
class Stereo:
    """What a stereo frame adds to its left image.

    Attributes:
        camera: the calibration of the pair; None where there is none, or where the matches contradict it.
        right_points: (N, 2) float32 the left image's keypoints in the right image, NaN where there is no match.
        right_flat: the right image as :func:`kpmatch_ros.geometry.refinement.flatten` gives it.
    """

    camera: StereoCamera | None
    right_points: np.ndarray
    right_flat: np.ndarray


@dataclass(frozen=True)
class Frame:
    """One image and what is kept of it as long as it serves as the reference.

    Attributes:
        stamp: time of the image, nanoseconds.
        image: the pixels, uint8 grey (H, W) or RGB (H, W, 3).
        frame_id: the camera's optical frame.
        camera: its calibration; None where there is none.
        features: on the device.
        keypoints: (N, 2) float32 keypoints of the features, on the host.
        track_ids: (N,) uint64 the track of each keypoint; 0 as long as it was never matched.
        extract_ms: what finding and describing the keypoints took, milliseconds.
        stereo: what a left image has besides; None for one camera.
    """

    stamp: int
    image: np.ndarray
    frame_id: str
    camera: Camera | None
    features: Features
    keypoints: np.ndarray
    track_ids: np.ndarray
    extract_ms: float
    stereo: Stereo | None = None

    @cached_property
    def flat(self) -> np.ndarray:
        """The image as :func:`kpmatch_ros.geometry.refinement.flatten` gives it, once for all pairs."""
        return flatten(self.image)


@dataclass(frozen=True)
class Pair:
    """A frame matched with its reference, or the right image with the left: M matches, parallel arrays.

    Attributes:
        reference: the reference frame, or the left image's.
        current: the frame just registered, or the right image's.
        indices: (M, 2) int64 indices into the features of reference and current.
        scores: (M,) float32 in [0, 1].
        track_ids: (M,) uint64; empty for left and right.
        layers: transformer layers run.
        pose: of the current camera in the reference camera's frame. From left to right it is the calibration's, and
            tells which matches agree with it (see stereo.check_stereo_matches).
        reset: the first pair after the cache was emptied.
        match_ms: what matching took, milliseconds.
    """

    reference: Frame
    current: Frame
    indices: np.ndarray
    scores: np.ndarray
    track_ids: np.ndarray
    layers: int
    pose: RelativePose
    reset: bool
    match_ms: float

    @property
    def reference_points(self) -> np.ndarray:
        """(M, 2) float32 matched keypoints in the reference image, pixels."""
        return self.reference.keypoints[self.indices[:, 0]]

    @property
    def points(self) -> np.ndarray:
        """(M, 2) float32 matched keypoints in the current image, pixels."""
        return self.current.keypoints[self.indices[:, 1]]

    @property
    def inlier_ratio(self) -> float:
        """Share of the matches that agree with the pose; 0 where none was estimated."""
        return self.pose.num_inliers / len(self.indices) if len(self.indices) else 0.0


@dataclass
class FrontEnd:
    """Registers frame after frame of one camera, or of a stereo pair of cameras.

    Each image is described once: as current, then as reference.

    Attributes:
        parameters: may be exchanged between two frames with :meth:`configure`.
        matcher: the networks.
        reference: the frame that the next one is matched with; None after a reset.
    """

    parameters: Parameters = field(default_factory=Parameters)
    matcher: FeatureMatcher = None  # type: ignore[assignment]
    reference: Frame | None = None
    _last_stamp: int | None = None
    _next_track_id: int = 1
    _fresh: bool = True

    def __post_init__(self) -> None:
        if self.matcher is None:
            self.matcher = FeatureMatcher(self.parameters)

    def configure(self, parameters: Parameters) -> None:
        """Take over the parameters that may change while running."""
        self.parameters = parameters
        self.matcher.configure(parameters)

    def reset(self) -> None:
        """Forget the cached features and the tracks; the next frame starts anew."""
        self.reference = None
        self._last_stamp = None
        self._fresh = True

    def register_frame(
        self, image: np.ndarray, stamp: int, camera: Camera | None = None, frame_id: str = ""
    ) -> tuple[Frame, Pair | None]:
        """Match an image with the reference and estimate how the camera moved in between.

        Args:
            image: uint8 grey (H, W) or RGB (H, W, 3).
            stamp: time of the image, nanoseconds.
            camera: calibration; without one the pose has the status NO_CALIBRATION.
            frame_id: name of the camera's optical frame.

        Returns:
            the frame, and its pair with the reference; None for the first frame after a reset.
        """
        self._begin(stamp)
        (current,) = self._describe([image], [stamp], [camera], [frame_id])
        return current, self._match_with_reference(current)

    def register_stereo_frame(
        self,
        left: np.ndarray,
        right: np.ndarray,
        stamp: int,
        camera: StereoCamera | None = None,
        frame_ids: tuple[str, str] = ("", ""),
        right_stamp: int | None = None,
    ) -> tuple[Pair, Pair | None]:
        """Match left with right, and left with the reference frame's left; estimate the motion in metres.

        Args:
            left: the left image, uint8 grey (H, W) or RGB (H, W, 3).
            right: the right image. Both go through the network together where their sizes are equal.
            stamp: time of the left image, nanoseconds.
            camera: calibration of the pair; without one the pose has the status NO_CALIBRATION.
            frame_ids: names of the left and the right camera's optical frames.
            right_stamp: time of the right image where it is another.

        Returns:
            left (its frame is the pair's reference) with right, and left with the reference, which is None for the
            first frame after a reset.
        """
        self._begin(stamp)
        cameras = (None, None) if camera is None else (camera.left, camera.right)
        stamps = [stamp, stamp if right_stamp is None else right_stamp]
        left_frame, right_frame = self._describe([left, right], stamps, cameras, frame_ids)
        stereo = self._match_sides(left_frame, right_frame, camera)
        return stereo, self._match_with_reference(stereo.reference)

    def _begin(self, stamp: int) -> None:
        if self.interruption(stamp):
            self.reset()
        self._last_stamp = stamp

    def _match_with_reference(self, current: Frame) -> Pair | None:
        reference, self.reference = self.reference, self.reference or current
        if reference is None:
            return None
        indices, scores, layers, match_ms = self._match(reference, current)
        pair = Pair(
            reference=reference,
            current=current,
            indices=indices,
            scores=scores,
            track_ids=self._continue_tracks(reference, current, indices),
            layers=layers,
            pose=self.estimate_pose(reference, current, indices),
            reset=self._fresh,
            match_ms=match_ms,
        )
        self._fresh = False
        if self._wants_new_reference(pair):
            self.reference = current
        return pair

    def _match_sides(self, left: Frame, right: Frame, camera: StereoCamera | None) -> Pair:
        """The left frame with what it needs of the right one for a pose in metres, matched with the right frame."""
        indices, scores, layers, match_ms = self._match(left, right)
        pose = check_stereo_matches(
            left.keypoints[indices[:, 0]],
            right.keypoints[indices[:, 1]],
            camera,
            max_reprojection_error=self.parameters.max_reprojection_error,
            min_inliers=self.parameters.min_inliers,
        )
        right_points = np.full_like(left.keypoints, np.nan)
        right_points[indices[:, 0]] = right.keypoints[indices[:, 1]]
        usable = camera if pose.status is PoseStatus.OK else None
        return Pair(
            reference=replace(left, stereo=Stereo(usable, right_points, right.flat)),
            current=right,
            indices=indices,
            scores=scores,
            track_ids=np.zeros(0, np.uint64),
            layers=layers,
            pose=pose,
            reset=self.reference is None,
            match_ms=match_ms,
        )

    def _match(self, reference: Frame, current: Frame) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Indices, scores, layers, and milliseconds."""
        started = time.perf_counter()
        matches = self.matcher.match(reference.features, current.features)
        indices, scores = to_numpy(matches.indices), to_numpy(matches.scores)  # alone: the rest stays on the device
        return indices, scores, matches.layers, _milliseconds_since(started)

    def interruption(self, stamp: int) -> str:
        """Why a frame of this time cannot follow the last one, in words: time went back, or the gap is too long."""
        if self._last_stamp is None:
            return ""
        elapsed = (stamp - self._last_stamp) * 1e-9
        if elapsed < 0:
            return f"the stamps went back by {-elapsed:.3f} s"
        if 0 < self.parameters.max_gap < elapsed:
            return f"there was no frame for {elapsed:.3f} s, more than max_gap"
        return ""

    def _describe(
        self,
        images: Sequence[np.ndarray],
        stamps: Sequence[int],
        cameras: Sequence[Camera | None],
        frame_ids: Sequence[str],
    ) -> list[Frame]:
        started = time.perf_counter()
        found = self.matcher.extract_batch(images)
        keypoints = [to_numpy(features.keypoints) for features in found]  # also waits for the device
        extract_ms = _milliseconds_since(started) / len(images)
        return [
            Frame(
                stamp=stamp,
                image=image,
                frame_id=frame_id,
                camera=camera,
                features=features,
                keypoints=points,
                track_ids=np.zeros(len(points), np.uint64),
                extract_ms=extract_ms,
            )
            for image, stamp, camera, frame_id, features, points in zip(
                images, stamps, cameras, frame_ids, found, keypoints
            )
        ]

    def _continue_tracks(self, reference: Frame, current: Frame, indices: np.ndarray) -> np.ndarray:
        """Hand the tracks of matched reference keypoints on to the current ones, and begin new ones."""
        ids = reference.track_ids[indices[:, 0]]
        new = ids == 0
        count = int(new.sum())
        ids[new] = np.arange(self._next_track_id, self._next_track_id + count, dtype=np.uint64)
        self._next_track_id += count
        reference.track_ids[indices[:, 0]] = ids
        current.track_ids[indices[:, 1]] = ids
        return ids

    def estimate_pose(self, reference: Frame, current: Frame, indices: np.ndarray) -> RelativePose:
        """How the camera moved between two frames, from their matches ``indices`` (M, 2); in metres with stereo frames.

        The keypoints, which a detector finds again to about a pixel, are first refined to a fraction of one: in all
        images where the surroundings of the reference's keypoint are, unless they changed too much for that.
        """
        index0, index1 = indices.T
        points0, points1 = reference.keypoints[index0], current.keypoints[index1]
        stereo0, stereo1 = reference.stereo, current.stereo
        calibrated = reference.camera is not None and current.camera is not None
        found = self._keypoint_resolution(current)
        fine = refine(reference.flat, current.flat, points0, points1, found) if calibrated else np.empty((0, 2))
        refined = np.isfinite(fine[:, 0]).sum() > _REFINABLE * len(indices)
        options: dict[str, Any] = {
            "max_reprojection_error": self.parameters.max_reprojection_error,
            "min_inliers": self.parameters.min_inliers,
            "keypoint_resolution": REFINED_RESOLUTION if refined else found,
            "independent_points": INDEPENDENT_POINTS if refined else math.inf,
        }
        if stereo0 is None or stereo1 is None:
            if refined:
                points1 = np.where(np.isfinite(fine), fine, points1)
            return estimate_relative_pose(points0, points1, reference.camera, current.camera, **options)
        right0, right1 = stereo0.right_points[index0], stereo1.right_points[index1]
        if refined:
            right0 = refine(reference.flat, stereo0.right_flat, points0, right0, found)
            right1 = refine(current.flat, stereo1.right_flat, fine, right1 + fine - points1, found)
            points1 = fine
        return estimate_stereo_motion(points0, right0, points1, right1, stereo0.camera, stereo1.camera, **options)

    def _keypoint_resolution(self, frame: Frame) -> float:
        """Pixels of the image received between neighbouring positions that the extractor can give."""
        seen = self.parameters.resize
        return self.matcher.keypoint_resolution * (max(frame.features.size) / seen if seen else 1.0)

    def _wants_new_reference(self, pair: Pair) -> bool:
        if self.parameters.reference == "previous" or len(pair.indices) < self.parameters.keyframe_min_matches:
            return True
        if pair.pose.inliers is not None:
            parallax = pair.pose.median_parallax
        else:
            parallax = float(np.median(np.linalg.norm(pair.points - pair.reference_points, axis=1)))
        return parallax > self.parameters.keyframe_max_parallax


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
