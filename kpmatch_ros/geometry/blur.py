"""Blur that only one of two images has, because the camera turned or focused in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import cv2
import numpy as np
from scipy.linalg import eigh, eigvalsh

from kpmatch_ros.geometry.patches import about_grey, align, cut, gradients, no_change, signed

__all__ = ["EqualBlur", "equalise_blur", "focus_kernel", "gradient_energy", "line_kernel", "smeared_image"]

_REACH = 20  # pixels around a point: half the widest blur, half a patch, and the largest error of the point's position
_SIDE = 2 * _REACH + 1
_FEWEST, _MOST = 20, 64  # points used to estimate the blur
_SHARP = 0.65  # part of the other image's squared gradients; above it, an image is as sharp as the other one
_SMEARED = 0.2  # the same for a whole image at half the resolution; lines of 25 pixels and more leave less
_DIRECTED = 1.5  # smallest ratio of the parts left across and along a line blur
_NOISE = 1.2  # ratio of the gradients' eigenvalues: noise has a smaller one, the gradients left by blur a larger one
_LEAST_GAIN = 0.02  # smallest gain of the patches' correlation by a blur
_LENGTHS = (3.0, 5.0, 7.0, 9.0, 12.0, 16.0, 21.0)  # pixels
_WIDTHS = (1.0, 1.5, 2.2, 3.3)  # pixels
_ANGLES = (0.25, -0.25, 0.12, -0.12)  # radians from the direction of the gradients
_FACTORS = (1.15, 0.87)  # on the length
_HALVINGS = 2  # of the images, for wider blur
_WIDEST = 28.0  # pixels of a line: with wider blur, patches and keypoints are found anywhere along it

_Blur = tuple[float, float | None]  # size in pixels; direction in radians, or None for all directions
_Blurs = list[_Blur | None]  # of image 0 and image 1; None without blur


@dataclass(frozen=True, eq=False)
class EqualBlur:
    """Two images with the same blur.

    Attributes:
        images: float32 (2 H, 2 W), from :func:`kpmatch_ros.geometry.patches.signed`.
        smeared: index of the image, 0 or 1, whose blur is so wide that points are found anywhere along it; None if
            neither image has such a blur.
    """

    images: tuple[np.ndarray, np.ndarray]
    smeared: int | None


def line_kernel(length: float, angle: float) -> np.ndarray:
    """Blur of a point that moves by `length` pixels in the direction `angle`, radians: (K, K) float32 with sum one."""
    half = math.ceil(length / 2)
    along = np.linspace(-0.5, 0.5, 8 * math.ceil(length)) * (length - 1)
    x, y = half + along * math.cos(angle), half + along * math.sin(angle)
    columns, rows = np.floor(x).astype(int), np.floor(y).astype(int)
    kernel = np.zeros((2 * half + 2, 2 * half + 2))
    for i in (0, 1):
        for j in (0, 1):
            np.add.at(kernel, (rows + j, columns + i), (1 - abs(x - columns - i)) * (1 - abs(y - rows - j)))
    return (kernel[:-1, :-1] / kernel.sum()).astype(np.float32)


def focus_kernel(width: float) -> np.ndarray:
    """Gaussian blur with the standard deviation `width`, pixels: (K, K) float32 with sum one."""
    row = cv2.getGaussianKernel(2 * math.ceil(3 * width) + 1, width)
    return np.asarray(row @ row.T, np.float32)


def equalise_blur(image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray) -> EqualBlur | None:
    """Two images of a scene, with the sharper one blurred like the other one.

    Between a sharp and a blurred image, the surroundings leak into a patch and shift it. Blur reduces the gradients
    along it. Therefore the direction of the blur is the one in which one image has the smallest part of the other's
    gradients, around the same points (a generalised eigenvalue problem). The width of the blur is the one that makes
    patches most similar when it is applied to the other image. If each image is blurred in a direction of its own, both
    are blurred. Blur wider than the surroundings is estimated at half the resolution.

    Args:
        image0: uint8 (H, W), from :func:`kpmatch_ros.geometry.refinement.normalize_contrast`.
        image1: the same of the other image, which may have another size.
        points0: (M, 2) pixels in image 0.
        points1: (M, 2) pixels in image 1, roughly the same points.

    Returns:
        Both images, at least one of them blurred or smeared; None if they have the same blur, or with too few points.
    """
    blurs = _missing_blurs(image0, image1, points0, points1, _HALVINGS)
    if blurs == [None, None]:
        return None
    for side, blur in enumerate(blurs):
        if blur is not None and blur[1] is not None and blur[0] > _WIDEST:
            return EqualBlur((signed(image0), signed(image1)), 1 - side)
    found0, found1 = (_filtered(about_grey(image), blur) for image, blur in zip((image0, image1), blurs))
    return EqualBlur((found0, found1), None)


def gradient_energy(image: np.ndarray) -> np.ndarray:
    """(2, 2) mean products of the gradients along x and y, of an image (H, W) uint8 at half the resolution."""
    half = _half(image).astype(np.float32)
    return _energies((cv2.Sobel(half, cv2.CV_32F, 1, 0, scale=0.125), cv2.Sobel(half, cv2.CV_32F, 0, 1, scale=0.125)))


def smeared_image(energy0: np.ndarray, energy1: np.ndarray) -> int | None:
    """Index of the image, 0 or 1, with so wide a line blur that its points carry no information; None for neither.

    Such a blur leaves only a small part of the other image's gradients along the line, and more of those across it.
    This test uses no matches, because matches lie anywhere along the blur. It excludes images of noise, as with a
    covered lens, which have gradients in all directions.

    Args:
        energy0: of image 0, from :func:`gradient_energy`.
        energy1: of image 1, which shows about the same scene.
    """
    least, most = eigh(energy1, energy0, eigvals_only=True)
    for side, energy, left, across in ((1, energy1, least, most), (0, energy0, 1 / most, 1 / least)):
        if left < min(_SMEARED, across / _DIRECTED) and eigvalsh(energy) @ (_NOISE, -1) < 0:
            return side
    return None


def _missing_blurs(
    image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray, halvings: int
) -> _Blurs:
    """The blur to apply to each image, which the other image has."""
    pair = _Pair.of(image0, image1, points0, points1)
    blurs: _Blurs = [None, None]
    if pair is None:
        return blurs
    # The eigenvalue is the ratio of the squared gradients along v, in image 1 to those in image 0.
    (least, most), directions = eigh(
        *(_energies(gradients(cut(signed(image), points))) for image, points in (pair.sides[1], pair.sides[0]))
    )
    for side, is_sharper, direction in (
        (0, least < _SHARP, directions[:, 0]),
        (1, most > 1 / _SHARP, directions[:, 1]),
    ):
        if is_sharper:
            blurs[side] = pair.find(blurs, side, math.atan2(direction[1], direction[0]))
    if halvings and any(blur is not None and blur[0] >= _LENGTHS[-1] for blur in blurs):
        wider = _missing_blurs(_half(image0), _half(image1), (points0 - 0.5) / 2, (points1 - 0.5) / 2, halvings - 1)
        if wider != [None, None]:
            return [None if blur is None else (2 * blur[0], blur[1]) for blur in wider]
    return blurs


@dataclass(frozen=True, eq=False)
class _Pair:
    """Surroundings of the same points in two images, stacked vertically.

    Each side is a float32 array (N _SIDE, _SIDE) with 0 for mid-grey, and points (N, 2) in it.
    """

    sides: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, image0: np.ndarray, image1: np.ndarray, points0: np.ndarray, points1: np.ndarray) -> _Pair | None:
        whole = np.flatnonzero(_surrounded(points0, image0) & _surrounded(points1, image1))
        if len(whole) < _FEWEST:
            return None
        some = whole[np.linspace(0, len(whole) - 1, min(len(whole), _MOST)).astype(int)]
        return cls((_surroundings(image0, points0[some]), _surroundings(image1, points1[some])))

    def find(self, blurs: _Blurs, side: int, angle: float) -> _Blur | None:
        """The blur of one side, given the other's, that makes patches most similar; None if no blur helps."""
        both = list(blurs)

        def correlation(blur: _Blur) -> float:
            both[side] = blur
            return self._correlation(both)

        best = max(
            _climb([(length, angle) for length in _LENGTHS], correlation),
            _climb([(width, None) for width in _WIDTHS], correlation),
            key=itemgetter(0),
        )
        if best[0] < self._correlation(blurs) + _LEAST_GAIN:
            return None
        size, direction = best[1]
        if direction is not None:
            best = max(
                [best, *((correlation(each), each) for each in ((size, direction + turn) for turn in _ANGLES))],
                key=itemgetter(0),
            )
            direction = best[1][1]
            best = max(
                [best, *((correlation(each), each) for each in ((size * factor, direction) for factor in _FACTORS))],
                key=itemgetter(0),
            )
        return best[1]

    def _correlation(self, blurs: _Blurs) -> float:
        (image0, points0), (image1, points1) = (
            (_filtered(image, blur), points) for (image, points), blur in zip(self.sides, blurs)
        )
        return float(align(cut(image0, points0), image1, points1, no_change(len(points0)), 1).correlation.mean())


def _half(image: np.ndarray) -> np.ndarray:
    height, width = image.shape
    return np.asarray(cv2.resize(image, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA))


def _climb(blurs: Sequence[_Blur], correlation: Callable[[_Blur], float]) -> tuple[float, _Blur]:
    """The best of blurs in increasing order, and the correlation of patches with it, which has one maximum."""
    best = correlation(blurs[0]), blurs[0]
    for blur in blurs[1:]:
        reached = correlation(blur)
        if reached < best[0]:
            break
        best = reached, blur
    return best


def _kernel(blur: _Blur) -> np.ndarray:
    size, angle = blur
    return focus_kernel(size) if angle is None else line_kernel(size, angle)


def _filtered(image: np.ndarray, blur: _Blur | None) -> np.ndarray:
    """An image, float32 with 0 for mid-grey, with a blur applied, in the form that patches are cut from."""
    return signed(image if blur is None else np.asarray(cv2.filter2D(image, -1, _kernel(blur))))


def _surrounded(points: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(M,) bool which points (M, 2) have _REACH pixels on all sides; False for NaN."""
    height, width = image.shape
    return np.asarray((points > _REACH).all(axis=1) & (points < (width - _REACH - 1, height - _REACH - 1)).all(axis=1))


def _surroundings(image: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The surroundings of points (N, 2), stacked vertically, and the points (N, 2) float32 in this array."""
    middle, offsets = np.rint(points).astype(int), np.arange(-_REACH, _REACH + 1)
    pixels = image[(middle[:, 1:] + offsets)[:, :, None], (middle[:, :1] + offsets)[:, None, :]]
    below = _SIDE * np.arange(len(points))
    moved = points - middle + _REACH + np.c_[np.zeros_like(below), below]
    return about_grey(pixels.reshape(-1, _SIDE)), moved.astype(np.float32)


def _energies(gradients: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(2, 2) mean products of gradients along x and y."""
    across, down = (each.ravel().astype(np.float64) for each in gradients)
    return np.array([[across @ across, across @ down], [across @ down, down @ down]]) / len(across) + 1e-6 * np.eye(2)
