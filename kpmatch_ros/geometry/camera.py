"""Camera calibration: from the pixels of an image as received to directions in the camera's optical frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

__all__ = ["AHEAD", "BEHIND", "CalibrationError", "Camera"]

_POLYNOMIAL_SIZES = (4, 5, 8, 12, 14)  # what cv2.projectPoints takes
_COEFFICIENTS = {
    "plumb_bob": _POLYNOMIAL_SIZES,
    "rational_polynomial": _POLYNOMIAL_SIZES,
    "equidistant": (4,),
}
# A focal length outside this range, in units of the longer image side, is a mistake: millimetres or a fraction of the
# image's width instead of pixels, most often. The widest fisheye lens has about 0.2, a long telephoto lens 50.
_FOCAL_RANGE = (0.01, 1000.0)
_NEWTON_ITERATIONS = 50
_NEWTON_TOLERANCE = 1e-10  # normalised units: about 1e-7 px
_LARGEST_TANGENT = 50.0  # a direction within about one degree of the image plane is no usable one

AHEAD = 0.02
"""Cosine to a camera's axis: a point further off, 89 degrees, is behind the camera."""

BEHIND = 1e6
"""Pixels: the residual of a point behind a camera."""


class CalibrationError(ValueError):
    """A calibration cannot be used; the text says what to do.

    Attributes:
        reason: "uncalibrated" (the driver has no calibration), "size" (it is for another image size), "model" (unknown
            distortion model) or "value" (numbers that no camera has). A stereo pair has more: see StereoCamera.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Camera:
    """Pinhole camera with lens distortion, as calibrated for one image size.

    Attributes:
        width, height: size of the image as received, pixels.
        matrix: (3, 3) float64, the camera matrix in pixels of that image; the centre of its top-left pixel is (0, 0).
        distortion_model: "plumb_bob", "rational_polynomial" (both as cv2.projectPoints), "equidistant" (cv2.fisheye),
            or "" for none (the names of sensor_msgs/distortion_models.hpp).
        distortion: (n,) float64, the model's coefficients in OpenCV's order. Empty or all zero means no distortion
            whatever the model, as in image_geometry.

    Raises:
        CalibrationError: no camera has these numbers, or the distortion model is unknown.
    """

    width: int
    height: int
    matrix: np.ndarray
    distortion_model: str = ""
    distortion: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        for name, value in (("matrix", self.matrix), ("distortion", self.distortion)):
            array = np.array(value, dtype=np.float64)  # a copy: the caller's buffer may be a reused message's
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "width", int(self.width))
        object.__setattr__(self, "height", int(self.height))

        if self.width <= 0 or self.height <= 0:
            raise CalibrationError(
                "size", f"the calibration is for images of {self.width}x{self.height} pixels: set its width and height"
            )
        _check_matrix(self.matrix, max(self.width, self.height))
        _check_distortion(self.distortion_model, self.distortion)

    @classmethod
    def from_camera_info(cls, info: Any, *, rectified: bool) -> Camera:
        """The camera of a sensor_msgs/CameraInfo message.

        Region of interest and binning (0 means 1) turn the full-resolution calibration into that of the image received,
        as in image_geometry.

        Args:
            info: the message, of rclpy, rosbags or ROS 1 (k or K, and so on).
            rectified: the images are already rectified (image_rect): P is used, without distortion; otherwise K and D.

        Raises:
            CalibrationError: it is no calibration, or none that this package can use.
        """
        name = "P" if rectified else "K"
        numbers = np.asarray(_field(info, name), dtype=np.float64).ravel()
        expected = 12 if rectified else 9
        if numbers.size != expected:
            raise CalibrationError("value", f"camera_info: {name} has {numbers.size} numbers instead of {expected}")
        if numbers[0] == 0.0:  # how sensor_msgs/CameraInfo says so
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
        # The region is given in pixels of the full resolution, so it comes before the binning.
        matrix[:2, 2] -= (roi.x_offset, roi.y_offset)
        matrix[0] /= binning_x
        matrix[1] /= binning_y

        model, distortion = ("", np.zeros(0)) if rectified else (info.distortion_model, _field(info, "D"))
        return cls(width // binning_x, height // binning_y, matrix, model, np.asarray(distortion, dtype=np.float64))

    def check_size(self, width: int, height: int) -> None:
        """Check that the calibration is for images of this size in pixels.

        Raises:
            CalibrationError: it is not ("size").
        """
        if (width, height) != (self.width, self.height):
            raise CalibrationError(
                "size",
                f"the image is {width}x{height} pixels but its calibration is for {self.width}x{self.height}: publish "
                "the camera_info of this image size, or its binning and region of interest",
            )

    @property
    def focal(self) -> float:
        """Mean focal length in pixels."""
        return float(self.matrix[0, 0] + self.matrix[1, 1]) / 2

    def normalise(self, points: np.ndarray) -> np.ndarray:
        """Pixels (N, 2) to undistorted normalised coordinates x/z, y/z in the optical frame, (N, 2) float64.

        The result is NaN where a pixel is NaN or infinite, and where the lens model has no direction for it: outside
        the part of the image in which the distortion can be inverted, or 89 degrees and more off the axis.

        Raises:
            ValueError: the pixels are not of shape (N, 2).
        """
        return self.normalise_with_jacobian(points)[0]

    def normalise_with_jacobian(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `normalise`, with the jacobian (N, 2, 2) float64 by the pixel's coordinates; NaN where `normalise` is NaN.

        Raises:
            ValueError: the pixels are not of shape (N, 2).
        """
        pixels = np.asarray(points, dtype=np.float64)
        if pixels.ndim != 2 or pixels.shape[1] != 2:
            raise ValueError(f"points must have shape (N, 2), not {pixels.shape}")
        normalised = np.full_like(pixels, np.nan)
        jacobian = np.full((len(pixels), 2, 2), np.nan)
        good = np.asarray(np.isfinite(pixels).all(axis=1))
        per_pixel = np.linalg.inv(self.matrix[:2, :2])
        distorted = (pixels[good] - self.matrix[:2, 2]) @ per_pixel.T
        near = np.abs(distorted).max(axis=1) < _LARGEST_TANGENT
        good[good], distorted = near, distorted[near]
        if not self.distortion.any():
            normalised[good], jacobian[good] = distorted, per_pixel
        elif good.any():
            normalised[good], inverse = self._undistort(distorted)
            jacobian[good] = inverse @ per_pixel
        return normalised, jacobian

    def _undistort(self, distorted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Newton's method on the distortion, (N, 2) to (N, 2), and the jacobian (N, 2, 2); NaN without a solution.

        cv2.undistortPoints is not used: it stops after five fixed-point steps (its criteria are no argument of it
        in the OpenCV 4 of ROS 2 Humble and Jazzy), does not say which points did not converge, and gives no jacobian.
        """
        points = distorted.copy()
        inverses = np.full((len(points), 2, 2), np.nan)
        active = np.arange(len(points))
        for _ in range(_NEWTON_ITERATIONS):
            residuals, inverse, determinant = self._distort(points[active])
            residuals -= distorted[active]
            # Where the determinant is not positive the lens model folds over, as no lens does.
            sound = (determinant > 0) & (np.abs(points[active]).max(axis=1) < _LARGEST_TANGENT)
            converged = sound & (np.abs(residuals).max(axis=1) < _NEWTON_TOLERANCE)
            inverses[active[converged]] = inverse[converged]
            going_on = sound & ~converged
            if not going_on.any():
                break
            active, residuals, inverse = active[going_on], residuals[going_on], inverse[going_on]
            step = np.einsum("nij,nj->ni", inverse, residuals)
            # Steps shorter than half the way to the axis, plus a half, do not leap over a fold unseen.
            longest = 0.5 * (1 + np.linalg.norm(points[active], axis=1))
            step *= np.minimum(1, longest / np.maximum(np.linalg.norm(step, axis=1), 1e-300))[:, None]
            points[active] -= step
        points[np.isnan(inverses[:, 0, 0])] = np.nan
        return points, inverses

    def _distort(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distorts normalised (N, 2); with the inverse (N, 2, 2) and determinant (N,) of the jacobian."""
        rays = np.column_stack([points, np.ones(len(points))])[:, None, :]
        # With z = 1 and no rotation, the derivative by the camera's position is that by x and y. OpenCV gives it for
        # both lens models, in other columns.
        if self.distortion_model == "equidistant":
            image, jacobian = cv2.fisheye.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), self.distortion)
            jacobian = jacobian[:, 11:13]
        else:
            image, jacobian = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), self.distortion)
            jacobian = jacobian[:, 3:5]
        (a, b), (c, d) = jacobian.reshape(-1, 2, 2).transpose(1, 2, 0)
        determinant = a * d - b * c
        with np.errstate(divide="ignore", invalid="ignore"):  # the caller looks at the determinant
            inverse = np.stack([d, -b, -c, a], axis=-1).reshape(-1, 2, 2) / determinant[:, None, None]
        return image.reshape(-1, 2), inverse, determinant


def _field(info: Any, name: str) -> Any:
    """K, D or P: lower case in ROS 2, upper case in ROS 1."""
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
            f"focal lengths of {fx:g} and {fy:g} pixels make no sense for an image of {size} pixels: they must be "
            "given in pixels of this image",
        )
    if matrix[1, 0] != 0 or (matrix[2] != (0, 0, 1)).any():
        raise CalibrationError("value", f"the camera matrix must be [fx 0 cx; 0 fy cy; 0 0 1], not {matrix.tolist()}")


def _check_distortion(model: str, distortion: np.ndarray) -> None:
    known = ", ".join(_COEFFICIENTS)
    if model not in _COEFFICIENTS and (model or distortion.any()):
        raise CalibrationError(
            "model",
            f"distortion model {model!r} with {distortion.size} coefficients: the known ones are {known}. Give the "
            "calibration in one of these, or use rectified images",
        )
    if distortion.ndim != 1 or not np.isfinite(distortion).all():
        raise CalibrationError("value", f"the distortion coefficients must be finite numbers: {distortion.tolist()}")
    if distortion.any() and distortion.size not in _COEFFICIENTS[model]:
        sizes = " or ".join(str(size) for size in _COEFFICIENTS[model])
        raise CalibrationError("value", f"{model} takes {sizes} distortion coefficients, not {distortion.size}")
