"""Camera calibration: from pixels of an image as received to directions in the camera's optical frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpmatch_ros.geometry import lens
from kpmatch_ros.geometry.lens import CalibrationError

__all__ = ["AHEAD", "BEHIND", "CalibrationError", "Camera", "camera_info_field", "check_camera"]

# A focal length outside this range, in units of the longer image side, is an error. Typical errors are millimetres or a
# fraction of the image's width instead of pixels. The widest fisheye lens has about 0.2, a long telephoto lens 50.
_FOCAL_RANGE = (0.01, 1000.0)
AHEAD = 0.02
"""Smallest cosine to a camera's axis: a point at more than 89 degrees counts as behind the camera."""

BEHIND = 1e6
"""Pixels: the residual of a point behind a camera."""


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole camera with lens distortion, calibrated for one image size.

    Attributes:
        width, height: size of the image as received, pixels.
        matrix: (3, 3) float64, the camera matrix in pixels of that image; the centre of its top-left pixel is (0, 0).
        distortion_model: "plumb_bob", "rational_polynomial" (both as cv2.projectPoints), "equidistant" (cv2.fisheye),
            or "" for none (the names of sensor_msgs/distortion_models.hpp). Other names of these models are accepted
            too, in any spelling: "radtan", "fisheye", "Kannala-Brandt". The attribute holds the first name.
        distortion: (n,) float64, the model's coefficients in OpenCV's order. Empty or all zero means no distortion
            for any model, as in image_geometry. Zeros after the model's last coefficient are removed.

    Raises:
        CalibrationError: no real camera has these values, or the distortion model is unknown.
    """

    width: int
    height: int
    matrix: np.ndarray
    distortion_model: str = ""
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        for name, value in (("matrix", self.matrix), ("distortion", self.distortion)):
            array = np.array(value, dtype=np.float64)  # a copy, because the caller may reuse the message's buffer
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "width", int(self.width))
        object.__setattr__(self, "height", int(self.height))

        if self.width <= 0 or self.height <= 0:
            raise CalibrationError(
                "size", f"the calibration is for images of {self.width}x{self.height} pixels: set its width and height"
            )
        _check_matrix(self.matrix, max(self.width, self.height))
        model, distortion = lens.known_distortion(str(self.distortion_model), self.distortion)
        distortion.setflags(write=False)
        object.__setattr__(self, "distortion_model", model)
        object.__setattr__(self, "distortion", distortion)
        self._check_lens()

    @classmethod
    def from_camera_info(cls, info: Any, *, rectified: bool) -> Camera:
        """The camera of a sensor_msgs/CameraInfo message.

        Region of interest and binning (0 means 1) convert the full-resolution calibration to the received image, as in
        image_geometry.

        Args:
            info: the message, from rclpy, rosbags or ROS 1 (fields k or K, and so on).
            rectified: whether the images are already rectified (image_rect). Then P is used, without distortion.
                Otherwise K and D are used.

        Raises:
            CalibrationError: the message has no calibration, or one that this package cannot use.
        """
        name = "P" if rectified else "K"
        numbers = np.asarray(camera_info_field(info, name), dtype=np.float64).ravel()
        expected = 12 if rectified else 9
        if numbers.size != expected:
            raise CalibrationError("value", f"camera_info: {name} has {numbers.size} numbers instead of {expected}")
        if numbers[0] == 0.0:  # the convention of sensor_msgs/CameraInfo
            raise CalibrationError(
                "uncalibrated",
                f"camera_info: {name}[0] is 0, the camera is not calibrated. Calibrate it (camera_calibration) and "
                "give its driver the file (camera_info_url)",
            )
        matrix = numbers.reshape(3, -1)[:, :3].copy()

        roi = info.roi
        whole = roi.x_offset == roi.y_offset == roi.width == roi.height == 0
        width, height = (info.width, info.height) if whole else (roi.width, roi.height)
        binning_x, binning_y = max(1, info.binning_x), max(1, info.binning_y)
        # The region is given in pixels of the full resolution, so it is applied before the binning.
        matrix[:2, 2] -= (roi.x_offset, roi.y_offset)
        matrix[0] /= binning_x
        matrix[1] /= binning_y

        if width < binning_x or height < binning_y:
            what = "width and height are" if whole else "width and height of the region of interest are"
            remedy = "width and height to those of the full image" if whole else "roi as the camera has it, or all 0"
            binning = f" with binning {binning_x}x{binning_y}" if max(binning_x, binning_y) > 1 else ""
            raise CalibrationError(
                "size", f"camera_info: {what} {width}x{height}{binning}, which is not a valid image size: set {remedy}"
            )

        model, distortion = ("", np.zeros(0)) if rectified else (info.distortion_model, camera_info_field(info, "D"))
        return cls(width // binning_x, height // binning_y, matrix, model, np.asarray(distortion, dtype=np.float64))

    def check_size(self, width: int, height: int) -> None:
        """Check that the calibration is for images of this size, in pixels.

        Raises:
            CalibrationError: the size differs ("size").
        """
        if (width, height) != (self.width, self.height):
            raise CalibrationError(
                "size",
                f"the image is {width}x{height} pixels but its calibration is for {self.width}x{self.height}: publish "
                "the camera_info of this image size, or its binning and region of interest",
            )

    def _check_lens(self) -> None:
        """Check that the distortion can be inverted over nearly all of the image.

        A fisheye image may contain pixels without a direction in the model: black corners outside the image circle, and
        rays from behind the camera. Its model must only not fold over in front of the camera.

        Raises:
            CalibrationError: the distortion cannot be inverted ("lens").
        """
        key = self.matrix.tobytes(), self.distortion_model, self.distortion.tobytes()
        part = lens.invertible_part(self.width, self.height, *key)
        if part < lens.LEAST_INVERTIBLE:
            raise CalibrationError(
                "lens",
                f"no lens has this distortion: with {self.distortion_model} and the coefficients "
                f"{self.distortion.tolist()} only {100 * part:.0f} % of the image's pixels have a direction. Check the "
                "order of the coefficients and the name of the model, or calibrate again",
            )

    @property
    def focal(self) -> float:
        """Mean focal length in pixels."""
        return float(self.matrix[0, 0] + self.matrix[1, 1]) / 2

    def normalise(self, points: np.ndarray) -> np.ndarray:
        """Undistorted normalised coordinates x/z, y/z (N, 2) float64 in the optical frame, from pixels (N, 2).

        The result is NaN if the pixel is NaN or infinite, or if the lens model has no direction for it: outside the
        part of the image in which the distortion can be inverted, or at 89 degrees and more from the axis.

        Raises:
            ValueError: the pixels do not have the shape (N, 2).
        """
        return self.normalise_with_jacobian(points)[0]

    def project(self, directions: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) from normalised coordinates x/z, y/z (N, 2): the inverse of `normalise`.

        The result is NaN if the input is, and for directions beyond a fold of the lens model, which the model would
        project among other directions.
        """
        if self.distortion.any():
            with np.errstate(invalid="ignore"):
                beyond = np.hypot(*directions.T) > lens.fold(self.distortion_model, self.distortion.tobytes())
            directions = lens.distort(directions, self.distortion_model, self.distortion)
            directions[beyond] = np.nan
        return np.asarray(directions @ self.matrix[:2, :2].T + self.matrix[:2, 2])

    def normalise_with_jacobian(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `normalise`, with the jacobian (N, 2, 2) float64 by the pixel's coordinates; NaN where `normalise` is NaN.

        Raises:
            ValueError: the pixels do not have the shape (N, 2).
        """
        pixels = np.asarray(points, dtype=np.float64)
        if pixels.ndim != 2 or pixels.shape[1] != 2:
            raise ValueError(f"points must have shape (N, 2), not {pixels.shape}")
        per_pixel = _inverse(self.matrix)
        with np.errstate(invalid="ignore"):
            distorted = (pixels - self.matrix[:2, 2]) @ per_pixel.T
            good = (np.abs(distorted) < lens.LARGEST_TANGENT).all(axis=1)  # False for NaN
        if good.all():
            if not self.distortion.any():
                return distorted, np.broadcast_to(per_pixel, (len(pixels), 2, 2))
            return self._undistort(distorted, per_pixel)
        normalised = np.full_like(pixels, np.nan)
        jacobian = np.full((len(pixels), 2, 2), np.nan)
        if not self.distortion.any():
            normalised[good], jacobian[good] = distorted[good], per_pixel
        elif good.any():
            normalised[good], jacobian[good] = self._undistort(distorted[good], per_pixel)
        return normalised, jacobian

    def _undistort(self, distorted: np.ndarray, per_pixel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Undistorted coordinates, and their jacobian by the pixel's coordinates."""
        normalised, inverse = lens.undistort(distorted, self.distortion_model, self.distortion)
        return normalised, (inverse.reshape(-1, 2) @ per_pixel).reshape(-1, 2, 2)


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Derivative (2, 2) of normalised coordinates by pixels, for a camera matrix (3, 3)."""
    (fx, skew), (_, fy) = matrix[:2, :2]
    return np.array([[1 / fx, -skew / (fx * fy)], [0.0, 1 / fy]])


def camera_info_field(info: Any, name: str) -> Any:
    """The field K, D, R or P: lower case in ROS 2, upper case in ROS 1."""
    return getattr(info, name.lower()) if hasattr(info, name.lower()) else getattr(info, name)


def _check_matrix(matrix: np.ndarray, size: int) -> None:
    if matrix.shape != (3, 3):
        raise CalibrationError("value", f"the camera matrix has shape {matrix.shape} instead of (3, 3)")
    if not np.isfinite(matrix).all():
        raise CalibrationError("value", f"the camera matrix holds NaN or infinity: {matrix.tolist()}")
    fx, fy = matrix[0, 0], matrix[1, 1]
    low, high = (bound * size for bound in _FOCAL_RANGE)
    if not (low <= fx <= high and low <= fy <= high):
        raise CalibrationError(
            "value",
            f"focal lengths of {fx:g} and {fy:g} pixels are out of range for an image of {size} pixels, {low:g} to "
            f"{high:g}: give them in pixels of this image",
        )
    if matrix[1, 0] != 0 or (matrix[2] != (0, 0, 1)).any():
        raise CalibrationError("value", f"the camera matrix must be [fx 0 cx; 0 fy cy; 0 0 1], not {matrix.tolist()}")


def check_camera(camera: Any) -> Camera | None:
    """The camera, or None.

    Raises:
        TypeError: it is another object, for example a matrix or a message.
    """
    if camera is not None and not isinstance(camera, Camera):
        raise TypeError(
            f"the camera must be a kpmatch_ros.Camera, not a {type(camera).__name__}: use Camera(width, height, matrix)"
            ", or for a CameraInfo Camera.from_camera_info(info, rectified=...)"
        )
    return camera
