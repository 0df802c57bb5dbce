"""The front end: computes features, matches, tracks and a relative pose for each frame. Does not depend on ROS."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.features import Features, to_numpy
from kpmatch_ros.frame_motion import FrameMotion
from kpmatch_ros.frames import Frame, GivenFrame, Pair, Result, RightImage, StereoPair, two_of_each
from kpmatch_ros.geometry.blur import smeared_image
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose
from kpmatch_ros.geometry.robust import SMALLEST_SAMPLE
from kpmatch_ros.geometry.stereo_agreement import StereoAgreement, check_stereo_matches
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.imaging.masks import both, fit, load_masks
from kpmatch_ros.kept_features import check_features, frame_without_image
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.reference_choice import ReferenceChoice
from kpmatch_ros.tracking.tracks import (
    LARGEST_SIGMA,
    NOT_DETECTED,
    Links,
    Tracks,
    View,
    keypoint_sigma,
    pair_sigma,
    refine_pair,
)

__all__ = ["FrontEnd"]

_KEPT_VIEWS = 4  # left and right views of the reference frame and of the current frame


class FrontEnd:
    """Registers successive frames of one camera or of a stereo pair.

    Features are extracted once per image. A frame is first the current frame, and may later serve as the reference.

    Args:
        parameters: parameter set. Defaults to the parameters of ``matcher``, or to the default parameters if there is
            no matcher either. Some parameters may change between two frames, see :meth:`configure`.
        matcher: the networks. They take over the dynamic parameters of ``parameters``. Loaded here if not given.

    Raises:
        ParameterError: if a mask cannot be read, or for the reasons of :class:`FeatureMatcher`.
        WeightsError: for the reasons of :class:`FeatureMatcher`.

    Attributes:
        parameters: the parameters in force.
        matcher: the networks.
        reference: the frame that the next frame is matched with; None after a reset.
    """

    def __init__(self, parameters: Parameters | None = None, matcher: FeatureMatcher | None = None) -> None:
        self.parameters = parameters or (Parameters() if matcher is None else matcher.parameters)
        self._masks = load_masks(self.parameters)  # for the left and the right camera
        self.matcher = matcher or FeatureMatcher(self.parameters)
        self.matcher.configure(self.parameters)
        self.parameters = self.matcher.parameters
        self.reference: Frame | None = None
        self._last_stamp: int | None = None
        self._last_frame_ids: tuple[str, ...] = ()
        self._next_number = 0
        # The largest max_keypoints so far: match_features must accept features stored before the limit was lowered.
        self._most_kept = self.parameters.max_keypoints
        self._motion = FrameMotion()
        self._tracks = Tracks(self.parameters.max_keypoints, self.parameters.lost_tracks)
        self._views: tuple[View, ...] = ()
        self._choice = ReferenceChoice()
        self._fresh = True

    def configure(self, parameters: Parameters) -> None:
        """Apply the parameters that may change between two frames."""
        if parameters.refine != self.parameters.refine:
            self._begin_tracks()
        self.matcher.configure(parameters)
        self.parameters = self.matcher.parameters
        self._tracks.limit, self._tracks.memory = parameters.max_keypoints, parameters.lost_tracks
        self._most_kept = max(self._most_kept, parameters.max_keypoints)

    def reset(self) -> None:
        """Discard the cached features and the tracks. The next frame then has no pair."""
        self.reference = self._last_stamp = None
        self._motion.forget()
        self._choice.reset()
        self._begin_tracks()
        self._views = ()

    def _begin_tracks(self) -> None:
        """Discard all tracks, including those of the reference frame."""
        self._tracks.reset()
        self._fresh = True
        if self.reference is not None:
            self.reference.track_ids[:] = 0

    def register(
        self,
        images: Sequence[np.ndarray],
        stamps: Sequence[int],
        camera: Camera | StereoCamera | None = None,
        frame_ids: Sequence[str] = ("", ""),
        masks: Sequence[np.ndarray | None] = (None, None),
    ) -> Result:
        """Match a frame with the reference frame and estimate the camera motion between the two.

        Args:
            images: one image, or the left and the right image: uint8 grey (H, W) or RGB (H, W, 3), NumPy arrays or
                tensors. Two images of the same size go through the network as one batch.
            stamps: time of each image, integer nanoseconds.
            camera: calibration of the camera or of the stereo pair. Without it, poses have the status NO_CALIBRATION.
            frame_ids: names of the cameras' optical frames.
            masks: one mask per image, uint8 or bool, 0 where no keypoint may be detected; None for no mask. The masks
                of the parameters `mask` and `mask_right` apply in addition. A mask of another size is scaled to the
                image.

        Raises:
            ValueError: if there are more than two images; if the stamps, calibration, masks or names do not fit the
                number of images; if a mask has a wrong shape or type; or for the reasons of
                :meth:`FeatureMatcher.extract`.
            TypeError: if an image is not an array, or a stamp, the calibration or a name has a wrong type.
        """
        given = GivenFrame.of(images, stamps, camera, frame_ids, masks)
        frames = self._extract(given)  # before any state changes: a rejected image must have no effect
        if self.interruption(given.stamps[0], given.frame_ids):
            self.reset()
        self._last_stamp, self._last_frame_ids = given.stamps[0], given.frame_ids
        current, stereo = frames[0], None
        both_cameras = camera if isinstance(camera, StereoCamera) else None
        linked = self._link(current)
        if len(frames) == 2:
            stereo = self._match_sides(current, frames[1], both_cameras, linked)
            current = stereo.reference
        pair = self._finish(current, linked)
        if stereo is not None and pair is not None:
            stereo = self._rejoin(stereo, pair, both_cameras)
        return Result(current, pair, stereo)

    def register_frame(self, image: np.ndarray, stamp: int, camera: Camera | None = None) -> tuple[Frame, Pair | None]:
        """Register an image of one camera, and return the frame and the pair of :meth:`register`'s result."""
        result = self.register([image], [stamp], camera)
        return result.frame, result.pair

    def _link(self, current: Frame) -> _Linked | None:
        """Find the reference frame's points in the current frame. Returns None if there is no reference."""
        if self.reference is None:
            return None
        indices, scores, layers, match_ms = self._match(self.reference, current)
        if not self.parameters.refine:
            return _Linked(self._link_keypoints(self.reference, current, indices, scores), layers, match_ms)
        started = time.perf_counter()
        links = self._tracks.follow(self._view(self.reference), self._view(current), indices, scores)
        return _Linked(links, layers, match_ms + _milliseconds_since(started))

    def _finish(self, current: Frame, linked: _Linked | None) -> Pair | None:
        """Estimate the pose of the current frame, and decide whether it becomes the reference."""
        reference, self.reference = self.reference, self.reference or current
        if reference is None or linked is None:
            self._view(current)  # computed now, because the next image may overwrite this image's memory
            return None
        links, started = linked.links, time.perf_counter()
        smeared = smeared_image(reference.gradients, current.gradients)
        smeared = links.smeared if smeared is None else smeared
        none = np.zeros(len(links.points), bool)
        if smeared is not None:
            links = replace(links, sigmas=np.full_like(links.sigmas, LARGEST_SIGMA))
        if smeared is not None and reference.is_calibrated and current.is_calibrated:
            pose = RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, len(none), none)
        else:
            pose = self.estimate_pose(reference, current, links)
        if self.parameters.refine:
            cameras = reference.camera, current.camera
            links, pose = self._tracks.settle(self._view(current), cameras, links, pose)
            if pose.status.is_certain and pose.num_inliers < max(self.parameters.min_inliers, SMALLEST_SAMPLE):
                pose = RelativePose.undefined(PoseStatus.TOO_FEW_MATCHES, pose.num_matches, pose.inliers)
        pair = Pair(
            reference=reference,
            current=current,
            indices=links.indices,
            reference_points=links.reference_points,
            points=links.points,
            sigmas=links.sigmas,
            scores=links.scores,
            layers=linked.layers,
            reset=self._fresh,
            match_ms=linked.match_ms,
            track_ids=links.track_ids,
            pose=pose,
            pose_ms=_milliseconds_since(started),
            smeared=smeared,
        )
        self._fresh = False
        if self._choice.becomes_reference(pair, self.parameters):
            self.reference, view = current, self._view(current)  # computed now, as for the first frame
            if self.parameters.refine:
                agree = pair.inliers if pair.pose.status.is_certain else None
                self._tracks.advance(view, agree if smeared is None else none)
            self._motion.remember(pair)
        elif pair.pose.status.is_certain:  # the reference stays: the motion that ended at it is too old for a prior
            self._motion.forget()
        return pair

    def _view(self, frame: Frame) -> View:
        """Return the data of a frame that tracking needs. It is cached: four calls use it, as current and reference."""
        for view in self._views:
            if view.normalized is frame.normalized:
                return view
        resolution = self._keypoint_resolution(frame)
        view = View(frame.normalized, frame.keypoints, frame.descriptors, resolution, frame.mask)
        self._views = (*self._views[-_KEPT_VIEWS + 1 :], view)
        return view

    def _link_keypoints(self, reference: Frame, current: Frame, indices: np.ndarray, scores: np.ndarray) -> Links:
        """Return the network's matches as links, with the keypoints as detected (not refined)."""
        return Links(
            indices=indices,
            reference_points=reference.keypoints[indices[:, 0]],
            points=current.keypoints[indices[:, 1]],
            sigmas=np.full(len(indices), keypoint_sigma(self._keypoint_resolution(current)), np.float32),
            pair_sigmas=np.full(len(indices), pair_sigma(self._keypoint_resolution(current)), np.float32),
            scores=scores,
            track_ids=self._continue_tracks(reference, current, indices),
            refined=np.zeros(len(indices), bool),
        )

    def _match_sides(
        self, left: Frame, right: Frame, camera: StereoCamera | None, linked: _Linked | None
    ) -> StereoPair:
        """Match the left with the right image, and store in the left frame what a metric pose needs of the right."""
        indices, scores, layers, match_ms = self._match(left, right)
        left_points, right_points = left.keypoints.copy(), np.full_like(left.keypoints, np.nan)
        if linked is not None:
            tracked = linked.links.indices[:, 1]
            left_points[tracked[tracked != NOT_DETECTED]] = linked.links.points[tracked != NOT_DETECTED]
        reference_points = left_points[indices[:, 0]]
        points = right.keypoints[indices[:, 1]]
        sigmas = np.full(len(indices), pair_sigma(self._keypoint_resolution(right)), np.float32)
        if self.parameters.refine:
            started = time.perf_counter()
            start = points + reference_points - left.keypoints[indices[:, 0]]
            points, sigmas = refine_pair(self._view(left), self._view(right), reference_points, start)
            found = indices, reference_points, points, sigmas, scores
            shown = self._view(right).shows(points)
            indices, reference_points, points, sigmas, scores = (each[shown] for each in found)
            match_ms += _milliseconds_since(started)
        agreement = self._check_sides(reference_points, points, camera)
        right_points[indices[:, 0]] = points
        usable = camera if agreement.status is PoseStatus.OK else None
        return StereoPair(
            reference=left.with_right(RightImage(usable, left_points, right_points, right.normalized)),
            current=right,
            indices=indices,
            reference_points=reference_points,
            points=points,
            sigmas=sigmas,
            scores=scores,
            layers=layers,
            reset=self.reference is None,
            match_ms=match_ms,
            agreement=agreement,
        )

    def _check_sides(self, left: np.ndarray, right: np.ndarray, camera: StereoCamera | None) -> StereoAgreement:
        """Check which matches of left and right pixels, each (M, 2), agree with the calibration."""
        return check_stereo_matches(
            left,
            right,
            camera,
            max_reprojection_error=self.parameters.max_reprojection_error,
            min_inliers=self.parameters.min_inliers,
        )

    def _rejoin(self, stereo: StereoPair, pair: Pair, camera: StereoCamera | None) -> StereoPair:
        """Return the stereo matches with the left points at the settled tracks, and refine the right points there.

        :meth:`Tracks.settle` may move or recover tracks after left and right were matched.
        """
        left, moved = stereo.tracked(pair)
        if not moved.any():
            return stereo
        right, sigmas = stereo.points.copy(), stereo.sigmas.copy()
        start = (right + left - stereo.reference_points)[moved]
        views = self._view(stereo.reference), self._view(stereo.current)
        right[moved], sigmas[moved] = refine_pair(*views, left[moved], start)
        stereo = replace(stereo, reference_points=left, points=right, sigmas=sigmas).only(views[1].shows(right))
        return replace(stereo, agreement=self._check_sides(stereo.reference_points, stereo.points, camera))

    def _match(self, reference: Frame, current: Frame) -> tuple[np.ndarray, np.ndarray, int, float]:
        """Return match indices, scores, number of layers run, and milliseconds taken."""
        started = time.perf_counter()
        matches = self.matcher.match(reference.features, current.features)
        indices, scores = to_numpy(matches.indices), to_numpy(matches.scores)  # the assignment stays on the device
        return indices, scores, matches.layers, _milliseconds_since(started)

    def match_features(
        self,
        reference: Features,
        current: Features,
        cameras: Sequence[Camera | None] = (None, None),
        stamps: Sequence[int] = (0, 0),
        frame_ids: Sequence[str] = ("", ""),
    ) -> Pair:
        """Match stored features of two images, for loop closure and relocalisation.

        This changes neither the reference frame nor the tracks. Points cannot be refined without the images, and there
        are no tracks: `track_ids` is empty.

        Args:
            reference: the features of image 0.
            current: the features of image 1.
            cameras: calibration of each image. Without both, the pose has the status NO_CALIBRATION.
            stamps: time of each image, nanoseconds.
            frame_ids: names of the cameras' optical frames.

        Raises:
            FeatureError: if features or calibration cannot be used. It is a subclass of ValueError.
            ValueError: if there are not two calibrations, two stamps and two names.
            TypeError: if a calibration is not a camera, or a stamp or a name has a wrong type.
        """
        cameras, stamps, frame_ids = two_of_each(cameras, stamps, frame_ids)
        frames = []
        given = zip(("reference_features", "features"), (reference, current), cameras, stamps, frame_ids)
        for name, features, camera, stamp, frame_id in given:
            checked = check_features(features, name, self.matcher.extractor.descriptor_size, self._most_kept)
            frames.append(frame_without_image(checked, name, camera, stamp, frame_id))
        indices, scores, layers, match_ms = self._match(frames[0], frames[1])
        points = [frame.keypoints[side] for frame, side in zip(frames, indices.T)]
        pose = estimate_relative_pose(
            *points,
            *cameras,
            max_reprojection_error=self.parameters.max_reprojection_error,
            min_inliers=self.parameters.min_inliers,
            keypoint_resolution=self._keypoint_resolution(frames[1]),
        )
        return Pair(
            reference=frames[0],
            current=frames[1],
            indices=indices,
            reference_points=points[0],
            points=points[1],
            sigmas=np.full(len(indices), keypoint_sigma(self._keypoint_resolution(frames[1])), np.float32),
            scores=scores,
            layers=layers,
            reset=False,
            match_ms=match_ms,
            track_ids=np.zeros(0, np.uint64),
            pose=pose,
        )

    def interruption(self, stamp: int, frame_ids: Sequence[str], overtaken: int = 0) -> str:
        """Explain why a frame cannot continue the sequence. Returns an empty text if it can.

        Reasons: the stamp went back, the gap to the last frame exceeds `max_gap`, or a frame_id changed.

        Args:
            stamp: time of the frame, nanoseconds.
            frame_ids: names of the optical frames of its images.
            overtaken: number of frames dropped since the last one; used in the text only.
        """
        if self._last_stamp is None:
            return ""
        for before, now in zip(self._last_frame_ids, frame_ids):
            if before != now:
                return f"the frame_id changed from {before!r:.80} to {now!r:.80}"
        elapsed = (stamp - self._last_stamp) * 1e-9
        if elapsed < 0:
            return f"the stamps went back by {-elapsed:.3f} s"
        if 0 < self.parameters.max_gap < elapsed:
            remedy = (
                f", and frames that arrived in the meantime were dropped ({overtaken}): if they arrive faster than "
                "they are processed, choose profile fast, set resize, lower max_keypoints, or raise max_gap"
            )
            return f"no frame was processed for {elapsed:.3f} s, more than max_gap{remedy if overtaken else ''}"
        return ""

    def _extract(self, given: GivenFrame) -> list[Frame]:
        started = time.perf_counter()
        allowed = [
            both(*(None if mask is None else fit(mask, image.shape[1], image.shape[0]) for mask in (always, now)))
            for image, always, now in zip(given.images, self._masks, given.masks)
        ]
        found = self.matcher.extract_batch(given.images, allowed)
        keypoints = [to_numpy(features.keypoints) for features in found]  # waits for the device, so the timing is right
        self._next_number += 1
        extract_ms = _milliseconds_since(started) / len(found)
        return [
            Frame(
                number=self._next_number,
                stamp=stamp,
                image=image,
                frame_id=frame_id,
                camera=camera,
                features=features,
                keypoints=points,
                track_ids=np.zeros(len(points), np.uint64),
                extract_ms=extract_ms,
                mask=mask,
            )
            for image, stamp, camera, frame_id, features, points, mask in zip(
                given.images, given.stamps, given.cameras, given.frame_ids, found, keypoints, allowed
            )
        ]

    def _continue_tracks(self, reference: Frame, current: Frame, indices: np.ndarray) -> np.ndarray:
        """Copy the track ids of matched reference keypoints to the current keypoints, with new ids where none exist."""
        ids = reference.track_ids[indices[:, 0]]
        new = ids == 0
        ids[new] = self._tracks.new_ids(int(new.sum()))
        reference.track_ids[indices[:, 0]] = ids
        current.track_ids[indices[:, 1]] = ids
        return ids

    def estimate_pose(self, reference: Frame, current: Frame, links: Links) -> RelativePose:
        """Estimate the camera motion between two frames, in metres for stereo frames.

        See :meth:`kpmatch_ros.frame_motion.FrameMotion.estimate`.
        """
        return self._motion.estimate(reference, current, links, self.parameters, self._keypoint_resolution(current))

    def _keypoint_resolution(self, frame: Frame) -> float:
        """Return the spacing of the positions that the extractor can output, in pixels of the original image."""
        seen = self.parameters.resize
        return self.matcher.keypoint_resolution * (max(frame.features.size) / seen if seen else 1.0)


@dataclass(frozen=True, eq=False)
class _Linked:
    """The reference frame's points in the current frame, with the layers and milliseconds that finding them took."""

    links: Links
    layers: int
    match_ms: float


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
