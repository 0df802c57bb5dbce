"""Frames and matched pairs of frames: the front end's input and output types. Does not depend on ROS."""

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
    """The data of the right image that a stereo frame keeps.

    Attributes:
        camera: calibration of both cameras; None if there is none or the matches contradict it.
        left_points: (N, 2) float32 positions of the left image's keypoints, pixels; refined for keypoints with a track.
        points: (N, 2) float32 the same points in the right image, NaN for a point without a match.
        normalized: the right image after :func:`kpmatch_ros.geometry.refinement.normalize_contrast`.
    """

    camera: StereoCamera | None
    left_points: np.ndarray
    points: np.ndarray
    normalized: np.ndarray

    def beside(self, indices: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Return the positions (M, 2) float32 of left points in the right image; NaN for an unknown position.

        Args:
            indices: (M,) indices of the left image's keypoints, or NOT_DETECTED.
            points: (M, 2) left pixels at these keypoints, or near them.
        """
        found = np.full(points.shape, np.nan, np.float32)
        known = indices != NOT_DETECTED
        found[known] = self.points[indices[known]] + points[known] - self.left_points[indices[known]]
        return found


@dataclass(frozen=True, eq=False)
class Frame:
    """One image with its features, and all data needed while it is the current or the reference frame.

    Attributes:
        number: number of the frame, counted by the front end; left and right image have the same. It identifies a
            frame, because stamps may repeat or be zero.
        stamp: time of the image, nanoseconds.
        image: the pixels as given, not a copy: uint8 grey (H, W) or RGB (H, W, 3).
        frame_id: name of the camera's optical frame.
        camera: calibration; None without calibration.
        features: the features, on the device.
        keypoints: (N, 2) float32 keypoints of the features, on the host.
        track_ids: (N,) uint64 track of each keypoint; 0 until the keypoint is first matched.
        extract_ms: time of the feature extraction, milliseconds.
        right: data of the right image, for the left image of a stereo pair; None for one camera.
        mask: (H, W) bool, false where no keypoint may be detected; None without a mask.
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
        """Return a copy with data of the right image, and with the cached properties of this frame."""
        frame = replace(self, right=right)
        for name in ("normalized", "gradients", "descriptors"):
            if name in self.__dict__:
                frame.__dict__[name] = self.__dict__[name]
        return frame

    @property
    def is_calibrated(self) -> bool:
        """Whether the calibration allows a pose: for a stereo frame, a metric pose."""
        return self.camera is not None and (self.right is None or self.right.camera is not None)

    @cached_property
    def normalized(self) -> np.ndarray:
        """The image after :func:`kpmatch_ros.geometry.refinement.normalize_contrast`, computed once for all pairs."""
        return normalize_contrast(self.image)

    @cached_property
    def gradients(self) -> np.ndarray:
        """(2, 2) result of :func:`kpmatch_ros.geometry.blur.gradient_energy`."""
        return gradient_energy(self.normalized)

    @cached_property
    def descriptors(self) -> np.ndarray:
        """(N, D) descriptors of the features, copied to the host once for all pairs."""
        return to_numpy(self.features.descriptors)


@dataclass(frozen=True, eq=False)
class ImagePair:
    """Two matched images with M matches, as parallel arrays.

    Attributes:
        reference: the reference frame; in a stereo pair the left image's frame.
        current: the frame just registered; in a stereo pair the right image's frame.
        indices: (M, 2) int64 indices into the features of reference and current; NOT_DETECTED if a track is not at a
            keypoint of the image.
        reference_points: (M, 2) float32 pixels in the reference image.
        points: (M, 2) float32 pixels in the current image.
        sigmas: (M,) float32 standard deviation of a coordinate of ``points``, pixels.
        scores: (M,) float32 in [0, 1].
        layers: number of transformer layers run.
        inliers: (M,) bool which matches agree with the geometry; None if no geometry was estimated or is known.
        num_inliers: number of inliers.
        reset: whether this is the first pair after a reset.
        match_ms: time of the matching, milliseconds.
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
        """Fraction of the matches that agree with the geometry; 0 if no geometry was estimated."""
        return self.num_inliers / len(self.indices) if len(self.indices) else 0.0


@dataclass(frozen=True, eq=False)
class Pair(ImagePair):
    """A frame matched with its reference frame.

    Attributes:
        track_ids: (M,) uint64 track of each match.
        pose: pose of the current camera in the reference camera's frame.
        pose_ms: time of the pose estimation and of settling the tracks, milliseconds.
        smeared: the image, 0 for the reference and 1 for the current one, that is blurred so much more than the other
            that point positions are unknown and there is no pose; None if neither is.
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
    """A left image (``reference``) matched with its right image (``current``).

    Attributes:
        agreement: which matches agree with the calibration, and whether the calibration can be correct.
    """

    agreement: StereoAgreement

    def only(self, shown: np.ndarray) -> StereoPair:
        """Return the matches selected by a mask (M,) bool. The agreement is left as it is."""
        names = "indices", "reference_points", "points", "sigmas", "scores"
        return replace(self, **{name: getattr(self, name)[shown] for name in names})

    def tracked(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """Return the left points (M, 2) float32 at the tracks of a pair's current frame, and (M,) bool which moved."""
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
    """The result of registering one frame.

    Attributes:
        frame: the frame; for a stereo pair the left image's.
        pair: the frame matched with its reference; None for the first frame after a reset.
        stereo: the left image matched with the right one; None for one camera.
    """

    frame: Frame
    pair: Pair | None
    stereo: StereoPair | None

    @property
    def frames(self) -> list[Frame]:
        """The frame, and for a stereo pair the right image's frame."""
        return [self.frame] if self.stereo is None else [self.frame, self.stereo.current]


@dataclass(frozen=True, eq=False)
class GivenFrame:
    """The checked arguments of a frame to register, with NumPy arrays and Python integers.

    Attributes:
        images: one image, or the left and the right image.
        stamps: stamp of each image, nanoseconds.
        cameras: calibration of each image's camera; None without calibration.
        frame_ids: name of each image's optical frame.
        masks: mask of each image; None without a mask.
    """

    images: list[Any]
    stamps: list[int]
    cameras: tuple[Camera | None, Camera | None]
    frame_ids: tuple[str, ...]
    masks: list[Any]

    @classmethod
    def of(cls, images: Any, stamps: Any, camera: Any, frame_ids: Any, masks: Any) -> GivenFrame:
        """Check the arguments of :meth:`kpmatch_ros.front_end.FrontEnd.register`, whose docstring lists the errors."""
        images = _one_each("images", images, 1, to_numpy)
        stamps = _one_each("stamps", stamps, len(images), _stamp, most=len(images))
        frame_ids = _one_each("frame_ids", frame_ids, len(images), _frame_id)
        masks = _one_each("masks", masks, len(images), to_numpy)
        both = (camera.left, camera.right) if isinstance(camera, StereoCamera) else (check_camera(camera), None)
        if camera is not None and isinstance(camera, StereoCamera) != (len(images) == 2):
            raise ValueError(f"a {type(camera).__name__} is not a calibration for {len(images)} image(s)")
        return cls(
            images=images,
            stamps=stamps,
            cameras=both,
            frame_ids=tuple(frame_ids[: len(images)]),
            masks=masks[: len(images)],
        )


def two_of_each(cameras: Any, stamps: Any, frame_ids: Any) -> tuple[list[Camera | None], list[int], list[str]]:
    """Check the calibrations, stamps and frame names of two images, and return them as lists.

    Raises:
        TypeError: if an argument is not a list, or one of its items has a wrong type.
        ValueError: if an argument does not have two items.
    """
    return (
        _one_each("cameras", cameras, 2, check_camera),
        _one_each("stamps", stamps, 2, _stamp),
        _one_each("frame_ids", frame_ids, 2, _frame_id),
    )


def _one_each(name: str, given: Any, least: int, check: Callable[[Any], Any], most: int = 2) -> list[Any]:
    """Check the items given per image, and return them as a list of ``least`` to ``most`` items.

    More items than images are allowed where the items may be those of two cameras, one of which has no image.
    """
    try:
        found = None if isinstance(given, str) else list(given)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name} is {given!r:.80}; it must be a list with one item for each image")
    if not least <= len(found) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        raise ValueError(f"{name} has the length {len(found)}, not {wanted}: one for each image")
    return [check(one) for one in found]


def _frame_id(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"frame_ids has {name!r:.80}; a frame_id must be a string")
    return name


def _stamp(stamp: Any) -> int:
    try:
        return operator.index(stamp)
    except TypeError:
        raise TypeError(f"a stamp is {stamp!r}; it must be a whole number of nanoseconds") from None
