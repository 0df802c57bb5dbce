"""Models of lens distortion: names, coefficients, and inversion."""

from __future__ import annotations

import functools
import re

import cv2
import numpy as np

from kpmatch_ros.geometry import compiled

__all__ = [
    "LARGEST_TANGENT",
    "LEAST_INVERTIBLE",
    "CalibrationError",
    "distort",
    "fold",
    "invertible_part",
    "known_distortion",
    "undistort",
]

_POLYNOMIAL_SIZES = (4, 5, 8, 12, 14)  # the sizes that cv2.projectPoints accepts
_COEFFICIENTS = {
    "plumb_bob": _POLYNOMIAL_SIZES,
    "rational_polynomial": _POLYNOMIAL_SIZES,
    "equidistant": (4,),
}
# The names of the same models in other calibration tools and drivers, in lower case and without other characters.
# Kalibr and Basalt use radtan; RealSense, OAK and isaac_ros use fisheye or kannala_brandt.
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
# The part of the image for which a lens model must have a direction. Calibrations without points in the corners fold
# over there, which costs little. For two lenses, wrong orders of the coefficients that caused a fold left 34 to 74 %.
LEAST_INVERTIBLE = 0.8
_GRID = 24  # pixels along each side at which a lens model is checked
_PLAIN = 8  # coefficients of the purely polynomial models, without a thin prism and a tilted sensor
_NEWTON_ITERATIONS = 50
_BEFORE_THE_FOLD = 0.98  # relative to the fold's radius: the largest radius from which the search starts
_NEWTON_TOLERANCE = 1e-10  # normalised units: about 1e-7 px
LARGEST_TANGENT = 50.0  # a direction within about one degree of the image plane is not usable
# Tangents at which the radius is compared, 0.25 degrees apart: two pixels of a typical camera. Narrower features, such
# as a pole next to a zero of the rational model, affect no more than a ring of pixels and are ignored.
_TANGENTS = np.tan(np.radians(np.arange(0.25, 88.86, 0.25)))


class CalibrationError(ValueError):
    """A calibration that cannot be used; the text says what to do.

    Attributes:
        reason: "uncalibrated" (the driver has no calibration), "size" (it is for another image size), "model" (unknown
            distortion model), "value" (values that no camera has) or "lens" (distortion that no lens has). A stereo
            pair has more reasons, see StereoCamera.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def listed(numbers: np.ndarray) -> str:
    """Coefficients for a message to the user; only the first ones if there are more than any model takes."""
    most = max(_POLYNOMIAL_SIZES)
    more = f" and {numbers.size - most} more" if numbers.size > most else ""
    return f"{numbers.ravel()[:most].tolist()}{more}"


def known_distortion(model: str, distortion: np.ndarray) -> tuple[str, np.ndarray]:
    """The model's name in _COEFFICIENTS, or "" for none, and as many coefficients as it takes."""
    if distortion.ndim != 1 or not np.isfinite(distortion).all():
        raise CalibrationError("value", f"the distortion coefficients must be finite numbers: {listed(distortion)}")
    name = _SPELLINGS.get(re.sub(r"[^a-z0-9]", "", model.lower()), "")
    if not distortion.any():
        return name, np.zeros(distortion.size if name and distortion.size in _COEFFICIENTS[name] else 0)
    if not name:
        known = ", ".join(_COEFFICIENTS)
        raise CalibrationError(
            "model",
            f"distortion model {model!r:.80} with {distortion.size} coefficients is not supported; the supported "
            f"models are {known}. Convert the calibration to one of these, or use rectified images",
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
        f"{model:.80} takes {' or '.join(str(size) for size in sizes)} distortion coefficients, not {distortion.size}",
    )


@functools.lru_cache(maxsize=16)
def invertible_part(width: int, height: int, matrix: bytes, model: str, distortion: bytes) -> float:
    """The part of the image for which the lens model has a direction. Cached, because every image has a calibration."""
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
    """Whether the equidistant model's radius, theta (1 + k1 theta^2 + ...), increases up to 90 degrees off the axis."""
    theta = np.linspace(0, np.pi / 2, 181)
    slope = np.polynomial.polynomial.polyval(theta**2, np.r_[1.0, coefficients * (3, 5, 7, 9)])
    return bool((slope > 0).all())


@functools.lru_cache(maxsize=16)
def fold(model: str, coefficients: bytes) -> float:
    """Tangent of the angle to the axis up to which the radius in the image increases; infinite if it always does."""
    rays = np.column_stack([_TANGENTS, np.zeros_like(_TANGENTS)])
    numbers = np.frombuffer(coefficients).copy()
    if model != "equidistant":
        numbers[2:4], numbers[8:] = 0.0, 0.0  # keep the radial part only
    with np.errstate(all="ignore"):
        radius = distort(rays, model, numbers)[:, 0]
        shrinks = np.flatnonzero(~(np.diff(radius, prepend=0.0) > 0))
    return float(_TANGENTS[shrinks[0]]) if len(shrinks) else np.inf


def undistort(distorted: np.ndarray, model: str, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method on the distortion, (N, 2) to (N, 2), with the jacobian (N, 2, 2); NaN without a solution.

    cv2.undistortPoints is not used: it stops after five fixed-point steps (the OpenCV 4 of ROS 2 Humble and Jazzy has
    no argument for its criteria), does not report which points did not converge, and gives no jacobian.
    """
    folded = fold(model, coefficients.tobytes())
    # With a lens that magnifies more towards its edge, distorted points are beyond the fold, where no step leads back.
    furthest = _BEFORE_THE_FOLD * folded
    if compiled.available() and _is_polynomial(model, coefficients):
        points, inverse = compiled.undistort(distorted, _padded(coefficients), furthest)
    else:
        points, inverse = _undistort(distorted, model, coefficients, furthest)
    # Beyond a fold, the radius may increase again. The calibration had no points near such pixels, and the model's
    # direction there is not the lens's. At the fold it jumps, by 15 degrees in the median of random lenses.
    with np.errstate(invalid="ignore"):
        beyond = np.hypot(*points.T) > folded
    points[beyond], inverse[beyond] = np.nan, np.nan
    return points, inverse


def _undistort(
    distorted: np.ndarray, model: str, coefficients: np.ndarray, furthest: float
) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy version of :func:`undistort`. Keep it equal to src/lens.c."""
    # Each coordinate is contiguous, which takes a third of the time of rows of two.
    target = np.ascontiguousarray(distorted.T)
    points = target * np.minimum(1, furthest / np.maximum(np.hypot(*target), 1e-300))
    for _ in range(_NEWTON_ITERATIONS):
        image, inverse, determinant = _distort(points, model, coefficients)
        with np.errstate(over="ignore"):
            residuals = image - target
        # If the determinant is not positive, the lens model folds over, which no real lens does.
        valid = (determinant > 0) & (np.maximum(*np.abs(points)) < LARGEST_TANGENT)
        converged = valid & (np.maximum(*np.abs(residuals)) < _NEWTON_TOLERANCE)
        unfinished = valid & ~converged
        if not unfinished.any():
            break
        with np.errstate(all="ignore"):  # points that have stopped may give invalid values
            step = inverse[::2] * residuals[0] + inverse[1::2] * residuals[1]
            # Steps of at most half the distance to the axis, plus a half, do not jump over a fold unnoticed.
            longest = 0.5 * (1 + np.hypot(*points))
            step *= np.minimum(1, longest / np.maximum(np.hypot(*step), 1e-300))
        np.subtract(points, step, out=points, where=unfinished)
    # If the model folds over twice, it rotates the scene by 180 degrees: positive determinant, but negative trace.
    with np.errstate(all="ignore"):
        converged &= inverse[0] + inverse[3] > 0
    points[:, ~converged] = np.nan
    inverse[:, ~converged] = np.nan
    return np.ascontiguousarray(points.T), np.ascontiguousarray(inverse.T).reshape(-1, 2, 2)


def distort(points: np.ndarray, model: str, coefficients: np.ndarray) -> np.ndarray:
    """Distorted positions (N, 2) of normalised points (N, 2)."""
    return _distort(np.ascontiguousarray(points.T), model, coefficients)[0].T


def _is_polynomial(model: str, coefficients: np.ndarray) -> bool:
    return model != "equidistant" and len(coefficients) <= _PLAIN


def _padded(coefficients: np.ndarray) -> np.ndarray:
    return np.concatenate([coefficients, np.zeros(_PLAIN - len(coefficients))])


def _distort(points: np.ndarray, model: str, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distort normalised points (2, N); also the inverse (4, N), by rows, and the determinant (N,) of the jacobian."""
    if _is_polynomial(model, coefficients):
        image, (a, b, c, d) = _distort_polynomially(points, coefficients)
    else:
        image, (a, b, c, d) = _distort_by_opencv(points, model, coefficients)
    with np.errstate(all="ignore"):  # the caller checks the determinant
        determinant = a * d - b * c
        inverse = np.array([d, -b, -c, a]) / determinant
    return image, inverse, determinant


def _distort_by_opencv(points: np.ndarray, model: str, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distorted points (2, N) and the jacobian (4, N), by rows."""
    if not points.size:  # OpenCV would return None
        return np.empty((2, 0)), np.empty((4, 0))
    rays = np.ones((points.shape[1], 1, 3))
    rays[:, 0, :2] = points.T
    # With z = 1 and no rotation, the derivative by the camera's position is that by x and y. OpenCV returns it for both
    # lens models, in different columns.
    if model == "equidistant":
        image, jacobian = cv2.fisheye.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
        jacobian = jacobian[:, 11:13]
    else:
        image, jacobian = cv2.projectPoints(rays, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
        jacobian = jacobian[:, 3:5]
    return np.ascontiguousarray(image.reshape(-1, 2).T), np.ascontiguousarray(jacobian.reshape(-1, 4).T)


def _distort_polynomially(points: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same for OpenCV's model with up to eight coefficients, in a fifth of the time.

    cv2.projectPoints also computes the derivatives by all calibration parameters.
    """
    k1, k2, p1, p2, k3, k4, k5, k6 = _padded(coefficients)
    x, y = points
    with np.errstate(all="ignore"):
        square = x * x + y * y
        above, below = 1 + square * (k1 + square * (k2 + square * k3)), 1 + square * (k4 + square * (k5 + square * k6))
        radial = above / below
        # Derivative by the squared radius, times two.
        growth = 2 * (k1 + square * (2 * k2 + 3 * k3 * square)) / below
        growth -= 2 * radial * (k4 + square * (2 * k5 + 3 * k6 * square)) / below
        product, across = x * y, 2 * (p1 * x + p2 * y)
        image = np.array(
            [
                x * radial + 2 * p1 * product + p2 * (square + 2 * x * x),
                y * radial + p1 * (square + 2 * y * y) + 2 * p2 * product,
            ]
        )
        mixed = product * growth + across
        jacobian = [
            radial + x * x * growth + 2 * p1 * y + 6 * p2 * x,
            mixed,
            mixed,
            radial + y * y * growth + 6 * p1 * y + 2 * p2 * x,
        ]
    return image, np.array(jacobian)
