"""Frames, and pairs of them that were matched: what the front end registers and gives. No ROS in here."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kpmatch_ros.features import Features, to_numpy
from kpmatch_ros.geometry.blur import gradient_energy
from kpmatch_ros.geometry.camera import Camera, check_camera
from kpmatch_ros.geometry.pose import RelativePose
from kpmatch_ros.geometry.refinement import normalize_contrast
from kpmatch_ros.geometry.stereo_agreement import StereoAgreement
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.tracking.tracks import NOT_DETECTED

__all__ = [
    "Frame",
    "GivenFrame",
    "ImagePair",
    "Pair",
    "Result",
    "RightImage",
    "StereoPair",
    "two_of_each",
]


@dataclass(frozen=True, eq=False)
class RightImage:
    """What a stereo frame keeps of its right image.

    Attributes:
        camera: the calibration of both cameras; None where there is none, or where the matches contradict it.
        left_points: (N, 2) float32 where the left image's keypoints are, refined where tracks are at them.
        points: (N, 2) float32 the same points in the right image, NaN where there is no match.
        normalized: the right image as :func:`kpmatch_ros.geometry.refinement.normalize_contrast` gives it.
    """

    camera: StereoCamera | None
    left_points: np.ndarray
    points: np.ndarray
    normalized: np.ndarray

    def beside(self, indices: np.ndarray, points: np.ndarray) -> np.ndarray:
        """(M, 2) float32 where points (M, 2) of the left image are in the right one; NaN where that is not known.

        Args:
            indices: (M,) the left image's keypoints, or NOT_DETECTED.
            points: (M, 2) pixels at those keypoints, or near them.
        """
        found = np.full(points.shape, np.nan, np.float32)
        known = indices != NOT_DETECTED
        found[known] = self.points[indices[known]] + points[known] - self.left_points[indices[known]]
        return found


@dataclass(frozen=True, eq=False)
class Frame:
    """One image and what is kept of it for as long as it serves as the reference.

    Attributes:
        number: of the frame, counted from the front end's beginning; a right image has that of its left one. Stamps may
            repeat, or be zero: what is known of a frame is kept under its number.
        stamp: time of the image, nanoseconds.
        image: the pixels as they were given, not a copy: uint8 grey (H, W) or RGB (H, W, 3).
        frame_id: the camera's optical frame.
        camera: its calibration; None where there is none.
        features: on the device.
        keypoints: (N, 2) float32 keypoints of the features, on the host.
        track_ids: (N,) uint64 the track of each keypoint; 0 until it is first matched.
        extract_ms: what finding and describing the keypoints took, milliseconds.
        right: of a left image, its right image; None for one camera.
        mask: (H, W) bool, false where nothing is to be detected; None where everything may be.
    """

    number: int
    stamp: int
    image: np.ndarray
    frame_id: str
    camera: Camera | None
    features: Features
    keypoints: np.ndarray
    track_ids: np.ndarray
    extract_ms: float
    right: RightImage | None = None
    mask: np.ndarray | None = None

    def with_right(self, right: RightImage) -> Frame:
        """The frame with its right image, and with what was made of it before."""
        frame = replace(self, right=right)
        for name in ("normalized", "gradients", "descriptors"):
            if name in self.__dict__:
                frame.__dict__[name] = self.__dict__[name]
        return frame

    @property
    def is_calibrated(self) -> bool:
        """Whether a pose can be had of it: with a right image, in metres."""
        return self.camera is not None and (self.right is None or self.right.camera is not None)

    @cached_property
    def normalized(self) -> np.ndarray:
        """The image as :func:`kpmatch_ros.geometry.refinement.normalize_contrast` gives it, made once for all pairs."""
        return normalize_contrast(self.image)

    @cached_property
    def gradients(self) -> np.ndarray:
        """(2, 2) as :func:`kpmatch_ros.geometry.blur.gradient_energy` gives them."""
        return gradient_energy(self.normalized)

    @cached_property
    def descriptors(self) -> np.ndarray:
        """(N, D) descriptors of the features, brought to the host once for all pairs."""
        return to_numpy(self.features.descriptors)


@dataclass(frozen=True, eq=False)
class ImagePair:
    """Two images that were matched: M matches, parallel arrays.

    Attributes:
        reference: the reference frame, or the left image's.
        current: the frame just registered, or the right image's.
        indices: (M, 2) int64 indices into the features of reference and current, NOT_DETECTED where a track is no
            keypoint of the image.
        reference_points: (M, 2) float32 pixels in the reference image.
        points: (M, 2) float32 pixels in the current image.
        sigmas: (M,) float32 standard deviation of a coordinate of points, pixels.
        scores: (M,) float32 in [0, 1].
        layers: transformer layers run.
        inliers: (M,) bool which matches agree with the geometry; None where none was estimated or is known.
        num_inliers: how many do.
        reset: the first pair after the cache was emptied.
        match_ms: what matching took, milliseconds.
    """

    reference: Frame
    current: Frame
    indices: np.ndarray
    reference_points: np.ndarray
    points: np.ndarray
    sigmas: np.ndarray
    scores: np.ndarray
    layers: int
    reset: bool
    match_ms: float

    @property
    def inliers(self) -> np.ndarray | None:
        raise NotImplementedError

    @property
    def num_inliers(self) -> int:
        raise NotImplementedError

    @property
    def inlier_ratio(self) -> float:
        """Share of the matches that agree with the geometry; 0 where none was estimated."""
        return self.num_inliers / len(self.indices) if len(self.indices) else 0.0


@dataclass(frozen=True, eq=False)
class Pair(ImagePair):
    """A frame matched with its reference.

    Attributes:
        track_ids: (M,) uint64.
        pose: of the current camera in the reference camera's frame.
        pose_ms: what the pose took, and settling the tracks by it, milliseconds.
        smeared: which image, 0 the reference or 1 the current one, is blurred so much more than the other that nothing
            tells where points are, and there is no pose; None for neither.
    """

    track_ids: np.ndarray
    pose: RelativePose
    pose_ms: float = 0.0
    smeared: int | None = None

    @property
    def inliers(self) -> np.ndarray | None:
        return self.pose.inliers

    @property
    def num_inliers(self) -> int:
        return self.pose.num_inliers


@dataclass(frozen=True, eq=False)
class StereoPair(ImagePair):
    """A left image, the reference, matched with its right image.

    Attributes:
        agreement: which matches agree with the calibration, and whether it can be right.
    """

    agreement: StereoAgreement

    def only(self, shown: np.ndarray) -> StereoPair:
        """The matches that a mask (M,) bool names; the agreement is that of all."""
        names = "indices", "reference_points", "points", "sigmas", "scores"
        return replace(self, **{name: getattr(self, name)[shown] for name in names})

    def tracked(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """(M, 2) float32 the left points by the tracks of their frame, and (M,) bool which ones that moves."""
        places = np.full_like(self.reference.keypoints, np.nan)
        known = pair.indices[:, 1] != NOT_DETECTED
        places[pair.indices[known, 1]] = pair.points[known]
        places = places[self.indices[:, 0]]
        known = np.isfinite(places[:, 0])
        places = np.where(known[:, None], places, self.reference_points)
        return places, (places != self.reference_points).any(axis=1)

    @property
    def inliers(self) -> np.ndarray | None:
        return self.agreement.inliers

    @property
    def num_inliers(self) -> int:
        return self.agreement.num_inliers


@dataclass(frozen=True, eq=False)
class Result:
    """What came of one frame.

    Attributes:
        frame: the image, or the left one.
        pair: the frame with its reference; None for the first frame after a reset.
        stereo: the left image with the right one; None for one camera.
    """

    frame: Frame
    pair: Pair | None
    stereo: StereoPair | None

    @property
    def frames(self) -> list[Frame]:
        """The frame, and in stereo that of the right image."""
        return [self.frame] if self.stereo is None else [self.frame, self.stereo.current]


@dataclass(frozen=True, eq=False)
class GivenFrame:
    """What somebody gave to be registered, with NumPy arrays and whole numbers.

    Attributes:
        images: one, or the left and the right one.
        stamps: of each image, nanoseconds.
        cameras: calibration of each image's camera; None where there is none.
        frame_ids: of each image.
        masks: of each image; None where there is none.
    """

    images: list[Any]
    stamps: list[int]
    cameras: tuple[Camera | None, Camera | None]
    frame_ids: tuple[str, ...]
    masks: list[Any]

    @classmethod
    def of(cls, images: Any, stamps: Any, camera: Any, frame_ids: Any, masks: Any) -> GivenFrame:
        """From the arguments of :meth:`kpmatch_ros.front_end.FrontEnd.register`, which says what it raises."""
        images = _one_each("images", images, 1, to_numpy)
        stamps = _one_each("stamps", stamps, len(images), _stamp, most=len(images))
        frame_ids = _one_each("frame_ids", frame_ids, len(images), _frame_id)
        masks = _one_each("masks", masks, len(images), to_numpy)
        both = (camera.left, camera.right) if isinstance(camera, StereoCamera) else (check_camera(camera), None)
        if camera is not None and isinstance(camera, StereoCamera) != (len(images) == 2):
            raise ValueError(f"a {type(camera).__name__} is no calibration for {len(images)} image(s)")
        return cls(
            images=images,
            stamps=stamps,
            cameras=both,
            frame_ids=tuple(frame_ids[: len(images)]),
            masks=masks[: len(images)],
        )


def two_of_each(cameras: Any, stamps: Any, frame_ids: Any) -> tuple[list[Camera | None], list[int], list[str]]:
    """The calibrations, stamps and names of two images, checked.

    Raises:
        TypeError: one of the three is no list, or what is in it is of another type.
        ValueError: there are not two.
    """
    return (
        _one_each("cameras", cameras, 2, check_camera),
        _one_each("stamps", stamps, 2, _stamp),
        _one_each("frame_ids", frame_ids, 2, _frame_id),
    )


def _one_each(name: str, given: Any, least: int, check: Callable[[Any], Any], most: int = 2) -> list[Any]:
    """What was given for each image, checked one by one. More than the images is for a camera that has none."""
    try:
        found = None if isinstance(given, str) else list(given)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name} is {given!r:.80}; it must be a list, with one for each image")
    if not least <= len(found) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"{name} has the length {len(found)}, not {wanted}: one for each image")
    return [check(one) for one in found]


def _frame_id(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"frame_ids has {name!r:.80}; names of frames are texts")
    return name


def _stamp(stamp: Any) -> int:
    try:
        return operator.index(stamp)
    except TypeError:
        raise TypeError(f"a stamp is {stamp!r}; stamps are whole numbers of nanoseconds") from None
