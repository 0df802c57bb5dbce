"""Calibration of a stereo camera."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpmatch_ros.geometry.camera import CalibrationError, Camera, camera_info_field

__all__ = ["StereoCamera", "check_stereo_camera"]

_ALIGNED = 0.1  # pixels, largest difference between the rows of two rectified images
_FOCAL_TOLERANCE = 1e-3
_ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class StereoCamera:
    """A calibrated stereo pair: x_right = rotation x_left + translation, for a point in both optical frames.

    For raw images, these are the frames of the cameras themselves, not those of the rectified images.

    Attributes:
        left: the left camera.
        right: the right camera, for images of the same size.
        rotation: (3, 3) float64.
        translation: (3,) float64, metres.

    Raises:
        CalibrationError: the values are not those of a stereo pair, or the image sizes differ.
    """

    left: Camera
    right: Camera
    rotation: np.ndarray
    translation: np.ndarray

    def __post_init__(self) -> None:
        for name, shape in (("rotation", (3, 3)), ("translation", (3,))):
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != shape or not np.isfinite(value).all():
                raise CalibrationError(
                    "value", f"the {name} between the cameras must have shape {shape} and finite numbers"
                )
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        _check_rotation(self.rotation, "the rotation between the cameras")
        sizes = [(camera.width, camera.height) for camera in (self.left, self.right)]
        if sizes[0] != sizes[1]:
            (width, height), (other_width, other_height) = sizes
            raise CalibrationError(
                "size",
                f"the left camera_info is for images of {width}x{height} pixels, the right one for {other_width}x"
                f"{other_height}: calibrate both for one size",
            )
        if self.baseline == 0:
            raise CalibrationError("baseline", "the two cameras are at the same place: depth needs a baseline")

    @classmethod
    def from_camera_infos(cls, left: Any, right: Any, *, rectified: bool) -> StereoCamera:
        """The stereo camera of two sensor_msgs/CameraInfo messages, of any type that Camera.from_camera_info takes.

        Args:
            left: of the left camera.
            right: of the right camera.
            rectified: whether the images are already rectified. Then only P of each message is used. Otherwise K, D and
                R of each are used, and P for the baseline: -P[3] / P[0] of the right camera.

        Raises:
            CalibrationError: in addition to the reasons of a Camera, "baseline" (it is zero), "swapped" (the right
                camera is on the left) and "alignment" (the two P do not belong to one rectified pair).
        """
        cameras = []
        for info, side in ((left, "left"), (right, "right")):
            with _named(side):
                cameras.append(Camera.from_camera_info(info, rectified=rectified))
        baseline = _baseline(_matrix(left, "P", (3, 4), "left"), _matrix(right, "P", (3, 4), "right"))
        turns = [np.eye(3), np.eye(3)]
        if not rectified:
            turns = [_matrix(info, "R", (3, 3), side) for info, side in ((left, "left"), (right, "right"))]
            for turn, side in zip(turns, ("left", "right")):
                _check_rotation(turn, f"R of the {side} camera_info")
        rotation = turns[1].T @ turns[0]
        return cls(cameras[0], cameras[1], rotation, turns[1].T @ (-baseline, 0.0, 0.0))

    @property
    def baseline(self) -> float:
        """Distance between the two cameras, metres."""
        return float(np.linalg.norm(self.translation))

    def check_size(self, left: tuple[int, int], right: tuple[int, int]) -> None:
        """Check that the calibration is for images of these sizes, (width, height) in pixels.

        Raises:
            CalibrationError: a size differs ("size").
        """
        with _named("left"):
            self.left.check_size(*left)
        with _named("right"):
            self.right.check_size(*right)


@contextmanager
def _named(side: str) -> Iterator[None]:
    """Add the side of the camera to the text of a CalibrationError."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(error.reason, f"the {side} camera: {error}") from None


def _matrix(info: Any, name: str, shape: tuple[int, int], side: str) -> np.ndarray:
    numbers = np.asarray(camera_info_field(info, name), dtype=np.float64).ravel()
    if numbers.size != shape[0] * shape[1] or not np.isfinite(numbers).all():
        count = shape[0] * shape[1]
        raise CalibrationError("value", f"{name} of the {side} camera_info must be {count} finite numbers")
    return numbers.reshape(shape)


def _check_rotation(matrix: np.ndarray, name: str) -> None:
    if np.abs(matrix @ matrix.T - np.eye(3)).max() > _ROTATION_TOLERANCE or np.linalg.det(matrix) < 0:
        raise CalibrationError(
            "value", f"{name} is not a rotation matrix: {matrix.tolist()}. Calibrate the two cameras as one stereo pair"
        )


def _baseline(left: np.ndarray, right: np.ndarray) -> float:
    """Baseline in metres, from the two P of one rectified pair."""
    together = "Calibrate the two cameras as one stereo pair (camera_calibration with two cameras)"
    for projection, side in ((left, "left"), (right, "right")):
        if projection[0, 0] <= 0 or projection[1, 1] <= 0:
            raise CalibrationError(
                "uncalibrated",
                f"P of the {side} camera_info has focal lengths {projection[0, 0]:g} and {projection[1, 1]:g}, but it "
                f"must hold the baseline. {together}",
            )
    focal = np.abs(left[[0, 1], [0, 1]] / right[[0, 1], [0, 1]] - 1).max()
    row = abs(left[1, 2] - right[1, 2]) + abs(left[1, 3] - right[1, 3])
    if focal > _FOCAL_TOLERANCE or row > _ALIGNED:
        raise CalibrationError(
            "alignment",
            "P of the left and the right camera_info are not those of one rectified pair, whose P differ only in P[2] "
            f"and P[3]: {left.ravel().tolist()} and {right.ravel().tolist()}. {together}",
        )
    baseline = float(left[0, 3] / left[0, 0] - right[0, 3] / right[0, 0])
    if baseline == 0:
        raise CalibrationError(
            "baseline",
            "the baseline is zero: P[3] of the right camera_info must be -P[0] times the baseline in metres. "
            f"{together}",
        )
    if baseline < 0:
        raise CalibrationError(
            "swapped",
            f"by the camera_infos, the right camera is {-baseline:g} m to the left of the left camera: left and right "
            "are swapped. Swap the topics",
        )
    return baseline


def check_stereo_camera(camera: Any) -> StereoCamera | None:
    """The stereo camera, or None.

    Raises:
        TypeError: it is another object, for example one camera or a message.
    """
    if camera is not None and not isinstance(camera, StereoCamera):
        raise TypeError(
            f"the stereo camera must be a kpmatch_ros.StereoCamera, not a {type(camera).__name__}: use "
            "StereoCamera(left, right, rotation, translation), or StereoCamera.from_camera_infos(left, right, "
            "rectified=...) for two CameraInfos"
        )
    return camera
