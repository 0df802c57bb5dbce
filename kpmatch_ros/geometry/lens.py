"""Models of lens distortion: their names, their coefficients, and their inverse."""

from __future__ import annotations

import functools
import re

import cv2
import numpy as np

__all__ = [
    "LARGEST_TANGENT",
    "LEAST_INVERTIBLE",
    "CalibrationError",
    "invertible_part",
    "known_distortion",
    "undistort",
]

_POLYNOMIAL_SIZES = (4, 5, 8, 12, 14)  # what cv2.projectPoints takes
_COEFFICIENTS = {
    "plumb_bob": _POLYNOMIAL_SIZES,
    "rational_polynomial": _POLYNOMIAL_SIZES,
    "equidistant": (4,),
}
# The same models by the names that other calibration tools and drivers give them, in small letters and digits alone.
# Kalibr and Basalt say radtan; RealSense, OAK and isaac_ros say fisheye or kannala_brandt.
_SPELLINGS = {
    "plumbbob": "plumb_bob",
    "radtan": "plumb_bob",
    "radialtangential": "plumb_bob",
    "rationalpolynomial": "rational_polynomial",
    "equidistant": "equidistant",
    "equidistant4": "equidistant",
    "equi": "equidistant",
    "fisheye": "equidistant",
    "kannalabrandt": "equidistant",
    "kannalabrandt4": "equidistant",
    "kb4": "equidistant",
}
# The part of the image for which a lens model must have a direction. Calibrations that saw no corners fold over in
# them, which costs little. Of the orders that leave the coefficients of two lenses a fold, all left 34 to 74 %.
LEAST_INVERTIBLE = 0.8
_GRID = 24  # pixels along each side at which a lens model is looked at
_NEWTON_ITERATIONS = 50
_NEWTON_TOLERANCE = 1e-10  # normalised units: about 1e-7 px
LARGEST_TANGENT = 50.0  # a direction within about one degree of the image plane is no usable one


class CalibrationError(ValueError):
    """A calibration cannot be used; the text says what to do.

    Attributes:
        reason: "uncalibrated" (the driver has no calibration), "size" (it is for another image size), "model" (unknown
            distortion model), "value" (numbers that no camera has) or "lens" (distortion that no lens has). A stereo
            pair has more: see StereoCamera.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def known_distortion(model: str, distortion: np.ndarray) -> tuple[str, np.ndarray]:
    """The model by its name in _COEFFICIENTS, or "" for none, and as many coefficients as it takes."""
    if distortion.ndim != 1 or not np.isfinite(distortion).all():
        raise CalibrationError("value", f"the distortion coefficients must be finite numbers: {distortion.tolist()}")
    name = _SPELLINGS.get(re.sub(r"[^a-z0-9]", "", model.lower()), "")
    if not distortion.any():
        return name, np.zeros(distortion.size if name and distortion.size in _COEFFICIENTS[name] else 0)
    if not name:
        known = ", ".join(_COEFFICIENTS)
        raise CalibrationError(
            "model",
            f"distortion model {model!r:.80} with {distortion.size} coefficients: the known ones are {known}. Give the "
            "calibration in one of these, or use rectified images",
        )
    sizes = _COEFFICIENTS[name]
    if distortion.size in sizes:
        return name, distortion
    used = int(np.flatnonzero(distortion)[-1]) + 1
    for size in sizes:
        if used <= size < distortion.size:
            return name, distortion[:size].copy()
    raise CalibrationError(
        "value",
        f"{model} takes {' or '.join(str(size) for size in sizes)} distortion coefficients, not {distortion.size}",
    )


@functools.lru_cache(maxsize=16)
def invertible_part(width: int, height: int, matrix: bytes, model: str, distortion: bytes) -> float:
    """The part of the image for which the lens model has a direction. Kept: each image comes with its calibration."""
    coefficients = np.frombuffer(distortion)
    if not coefficients.any() or (model == "equidistant" and _is_monotonic_ahead(coefficients)):
        return 1.0
    camera = np.frombuffer(matrix).reshape(3, 3)
    x, y = np.meshgrid(np.linspace(0, width - 1, _GRID), np.linspace(0, height - 1, _GRID))
    pixels = np.column_stack([x.ravel(), y.ravel()])
    with np.errstate(all="ignore"):
        distorted = (pixels - camera[:2, 2]) @ np.linalg.inv(camera[:2, :2]).T
        near = np.abs(distorted).max(axis=1) < LARGEST_TANGENT
        directions = undistort(distorted[near], model, coefficients)[0]
    return float(np.isfinite(directions).all(axis=1).sum() / len(pixels))


def _is_monotonic_ahead(coefficients: np.ndarray) -> bool:
    """Whether the equidistant model's radius, theta (1 + k1 theta^2 + ...), grows up to 90 degrees off the axis."""
    theta = np.linspace(0, np.pi / 2, 181)
    slope = np.polynomial.polynomial.polyval(theta**2, np.r_[1.0, coefficients * (3, 5, 7, 9)])
    return bool((slope > 0).all())


def undistort(distorted: np.ndarray, model: str, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method on the distortion, (N, 2) to (N, 2), and the jacobian (N, 2, 2); NaN without a solution.

    cv2.undistortPoints is not used: it stops after five fixed-point steps (its criteria are no argument of it
    in the OpenCV 4 of ROS 2 Humble and Jazzy), does not say which points did not converge, and gives no jacobian.
    """
    points = distorted.copy()
    inverses = np.full((len(points), 2, 2), np.nan)
    active = np.arange(len(points))
    for _ in range(_NEWTON_ITERATIONS):
        residuals, inverse, determinant = _distort(points[active], model, coefficients)
        residuals -= distorted[active]
        # Where the determinant is not positive the lens model folds over, as no lens does.
        sound = (determinant > 0) & (np.abs(points[active]).max(axis=1) < LARGEST_TANGENT)
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


def _distort(points: np.ndarray, model: str, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distorts normalised (N, 2); with the inverse (N, 2, 2) and determinant (N,) of the jacobian."""
    rays = np.column_stack([points, np.ones(len(points))])[:, None, :]
    # With z = 1 and no rotation, the derivative by the camera's position is that by x and y. OpenCV gives it for
    # both lens models, in other columns.
    if model == "equidistant":
        image, jacobian = cv2.fisheye.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
        jacobian = jacobian[:, 11:13]
    else:
        image, jacobian = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
        jacobian = jacobian[:, 3:5]
    (a, b), (c, d) = jacobian.reshape(-1, 2, 2).transpose(1, 2, 0)
    with np.errstate(all="ignore"):  # the caller looks at the determinant
        determinant = a * d - b * c
        inverse = np.stack([d, -b, -c, a], axis=-1).reshape(-1, 2, 2) / determinant[:, None, None]
    return image.reshape(-1, 2), inverse, determinant
