"""Image patches, and their alignment in other images under an affine change (Shi and Tomasi, CVPR 1994)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.parallel_arrays import ParallelArrays

__all__ = [
    "LONGEST_STEP",
    "Alignment",
    "about_grey",
    "align",
    "cut",
    "gradients",
    "inside",
    "inverse",
    "no_change",
    "signed",
    "unaligned",
]

_SIDE = 13  # pixels; the same as the window of geometry.flow
_WIDE = _SIDE + 2  # with a border, for the gradients
_WIDE_OFFSETS = np.arange(_WIDE, dtype=np.float32) - _WIDE // 2
_WIDE_X, _WIDE_Y = (grid.ravel() for grid in np.meshgrid(_WIDE_OFFSETS, _WIDE_OFFSETS))
_INNER = (abs(_WIDE_X) <= _SIDE // 2) & (abs(_WIDE_Y) <= _SIDE // 2) & ((_WIDE_X + _WIDE_Y) % 2 == 0)
_SPARSE = np.flatnonzero(_INNER & (_WIDE_X % 2 == 1))
_USED = np.concatenate([_SPARSE, np.flatnonzero(_INNER & (_WIDE_X % 2 == 0))])
"""Indices of the patch pixels that are compared: every second one, like the dark squares of a chessboard.

This halves the work, and the search finds points equally well. The pixels with odd x and y offsets come first. They are
enough to estimate a shift.
"""
_FEW = slice(len(_SPARSE))
_X, _Y = _WIDE_X[_USED], _WIDE_Y[_USED]
_PLACES = np.stack([np.ones_like(_X), _X, _Y])  # (3, U)
_AFFINE = 63  # numbers in the equations of an affine change with blur
_ONES = np.ones(len(_USED), np.float32)

LONGEST_STEP = 3.0
"""Pixels, the longest move from the start of the search. A point that moves further is another corner."""

_FEWEST_ITERATIONS, _ITERATIONS, _SEARCHES = 2, 10, 2
_SETTLED = 0.01
"""Pixels: the search ends when a step is shorter.

If one image is sharp and the other blurred, each step only halves the remaining error. The search begins at a keypoint,
and blur shifts all keypoints by a tenth of a pixel in the same direction.
"""
_LAST_STEP = 0.3  # pixels: if the last step is longer, the search has not converged
_BLOCK = 1024  # patches aligned at a time, so that their arrays stay in the cache
_CUT_BLOCK = 384  # patches cut at a time; cutting needs more arrays, and OpenBLAS splits larger products over all cores
_DAMPING = np.array([1.0, 1e4, 1e4], np.float32)
"""Prior: squared ratio of the noise, 10 grey levels, to the expected change.

The expected deformation is 0.1. The expected shift, 10 pixels, is practically no limit.
"""
_BLUR_DAMPING = np.float32(1e4)  # the same prior for blur, whose expected change is a fifth of a square pixel
_FINE = 2
"""Pixels of the image that patches are found in, per pixel of the original image.

Interpolation is wrong for details as fine as the pixels: linear and also cubic interpolation move them by less than the
requested fraction of a pixel. Noise and the artefacts of compression, which do not move with the scene, are also at
this scale. An image smoothed by half a pixel and sampled at half the distance has little of such detail left.
"""
_BLUR = 0.5
"""Square pixels: variance of an image's total blur, by its pixels, its lens, interpolation and smoothing."""
_WIDEST = 2.0  # in units of that variance; beyond it, the Laplacian does not describe the added blur
_LOWEST_CORRELATION = 0.82  # with the patch; with a lower one, it is another point
_LARGEST_SCALE = 3.0  # largest change of length since the patch was cut
_LEAST_CONTRAST = 0.1  # squared norm of a patch's grey levels; smaller values are rounding
_LARGEST_GAIN = 2.0  # largest change of contrast; with a larger one, it is another point or noise

_SIGMA_FLOOR = 0.0275  # pixels
_SIGMA_GROWTH = 27.5  # pixels per square pixel of the variance from white noise as large as the residuals; measured


@dataclass(frozen=True, eq=False)
class Alignment(ParallelArrays):
    """Result of the alignment of T patches.

    Attributes:
        points: (T, 2) float32 pixels.
        shapes: (T, 2, 2) float32: maps an offset in the patch to the offset in the image.
        sigmas: (T,) float32 standard deviation of a coordinate of points, pixels.
        correlation: (T,) float32 correlation with the patch, in [0, 1].
        good: (T,) bool whether the patch was found.
    """

    points: np.ndarray
    shapes: np.ndarray
    sigmas: np.ndarray
    correlation: np.ndarray
    good: np.ndarray

    def put(self, rows: np.ndarray, part: Alignment) -> None:
        """Replace the rows (R,) by the rows of another alignment of R patches."""
        for whole, values in zip(vars(self).values(), vars(part).values()):
            whole[rows] = values


def unaligned(points: np.ndarray, correlation: np.ndarray, good: bool = True) -> Alignment:
    """An alignment from points (T, 2) without a search, with the given correlation (T,) and the same `good` for all."""
    none = np.zeros(len(points), np.float32)
    return Alignment(points, no_change(len(points)), none, np.maximum(correlation, 0), np.full(len(points), good))


def about_grey(image: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W), as float32 with 0 for mid-grey."""
    return np.subtract(image, 128, dtype=np.float32)


def signed(image: np.ndarray) -> np.ndarray:
    """An image (H, W) in the form that :func:`cut` and :func:`align` take: float32 (2 H, 2 W), with 0 for mid-grey.

    Its pixel (2 x, 2 y) is the original pixel (x, y). Points and patches use the pixels of the original image. Beyond
    its border, the image counts as mid-grey.

    Args:
        image: uint8, or float32 from :func:`about_grey`.
    """
    pixels = about_grey(image) if image.dtype == np.uint8 else image
    if not pixels.size:
        return np.zeros((_FINE * pixels.shape[0], _FINE * pixels.shape[1]), np.float32)
    return np.asarray(cv2.pyrUp(pixels))


def cut(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T, P) float32 patches around points (T, 2) of an image from :func:`signed`, in the form :func:`align` takes.

    A patch holds, in this order: the pixels minus their mean, their gradients along x and y, their Laplacians minus
    their mean, their weights, and the equations of an affine change and of a shift. A pixel beyond the image or at its
    border, where there is no gradient, has weight 0. The others have weight 1. If pixels beyond the border were grey,
    they would form an edge that stands still while the point moves.
    """
    if compiled.available():
        return compiled.cut(image, _PLACES[1:], points)
    return _cut(image, points)


def _cut(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The NumPy version of :func:`cut`. Keep it equal to src/geometry.c."""
    if len(points) > _CUT_BLOCK:
        return np.concatenate([_cut(image, points[block]) for block in _blocks(len(points), _CUT_BLOCK)])
    wide = _sample(image, points[:, :1] + _WIDE_X, points[:, 1:] + _WIDE_Y)
    middle, left, right, above, below = (wide.take(_USED + i, axis=1) for i in (0, -1, 1, -_WIDE, _WIDE))
    weights = _weights(image, points)
    template, across, down = _centred(middle, weights), weights * (right - left) / 2, weights * (below - above) / 2
    laplacian = _centred(left + right + above + below - 4 * middle, weights)
    affine = _equations(template, across, down, _PLACES, _counts(weights), laplacian)
    few = [each[:, _FEW] for each in (template, across, down, weights)]
    shift = _equations(_centred(few[0], few[3]), few[1], few[2], _PLACES[:1, _FEW], _counts(few[3]))
    return np.concatenate([template, across, down, laplacian, weights, affine, shift], axis=1)


def _weights(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T, U) float32 weights of the pixels of patches around points (T, 2): 1 with neighbours in the image, else 0."""
    least, most = 1 - points.T, np.array(image.shape[::-1], np.float32)[:, None] / _FINE - 2 - points.T
    whole = [(places >= least[i, :, None]) & (places <= most[i, :, None]) for i, places in enumerate((_X, _Y))]
    return (whole[0] & whole[1]).astype(np.float32)


def gradients(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, U) gradients along x and along y, of patches (T, P) from :func:`cut`."""
    return patches[:, len(_USED) : 2 * len(_USED)], patches[:, 2 * len(_USED) : 3 * len(_USED)]


def no_change(count: int) -> np.ndarray:
    """(T, 2, 2) float32 shapes of patches without deformation."""
    return np.tile(np.eye(2, dtype=np.float32), (count, 1, 1))


def align(patches: np.ndarray, image: np.ndarray, points: np.ndarray, shapes: np.ndarray, shifts: int = 0) -> Alignment:
    """Find patches in an image from :func:`signed`, near points (T, 2) float32, with shapes (T, 2, 2) float32.

    The method is Gauss-Newton on an affine map, inverse compositional (Baker and Matthews, IJCV 2004). Brightness and
    contrast of a patch may change. The first `shifts` steps only shift the patches, which converges better from further
    away. A Gaussian prior limits the deformation relative to the given shapes, so that the steps do not accumulate a
    deformation that the images do not support. The part of the deformation that the prior suppresses shifts all points
    of a surface in the same direction. Therefore a converged patch is searched for once more, with the prior centred on
    the shape found (iterated Tikhonov regularisation).

    Sharpness may change too. The blur of an image has the same width in pixels everywhere. On a surface that appears
    larger than in the patch, the blur is therefore narrower, and each spot looks less enlarged than it is. To first
    order, blur adds the Laplacian (Lindeberg, Scale-Space Theory in Computer Vision, 1994). The change of blur that the
    shapes imply is subtracted from the patch. The rest is estimated together with the affine map.
    """
    if compiled.available():
        return Alignment(*compiled.align(patches, image, _PLACES[1:], points, shapes, shifts))
    return _align(patches, image, points, shapes, shifts)


def _align(patches: np.ndarray, image: np.ndarray, points: np.ndarray, shapes: np.ndarray, shifts: int) -> Alignment:
    """The NumPy version of :func:`align`. Keep it equal to src/geometry.c."""
    if len(points) > _BLOCK:
        blocks = _blocks(len(points), _BLOCK)
        first, *others = (_align(patches[block], image, points[block], shapes[block], shifts) for block in blocks)
        return first.join(*others)
    start = points
    template, across, down, laplacian, weights = (patches[:, i * len(_USED) :][:, : len(_USED)] for i in range(5))
    affine, shift = (patches[:, 5 * len(_USED) :][:, part] for part in (slice(_AFFINE), slice(_AFFINE, None)))
    counts, few = _counts(weights), _counts(weights[:, _FEW])
    for _ in range(shifts):
        seen, places = weights[:, _FEW] * _seen(image, points, shapes, _PLACES[:, _FEW]), _PLACES[:1, _FEW]
        step = _step(shift, seen, across[:, _FEW], down[:, _FEW], places, few)[:, :, 0]
        points = points - np.einsum("tij,tj->ti", shapes, step.clip(-2, 2))
    points, shapes, last_step = points.copy(), shapes.copy(), np.zeros(len(points), np.float32)
    narrower, sharpened = np.zeros(len(points), np.float32), affine.copy()
    for _ in range(_SEARCHES):
        moving, deformed = np.flatnonzero(last_step < _LAST_STEP), np.zeros((len(points), 2, 3), np.float32)
        narrower[moving] = _BLUR / 2 * _narrowing(shapes[moving])
        sharpened[moving] = _sharpened(affine[moving], narrower[moving])
        for iteration in range(1, _ITERATIONS + 1):
            at, shape = points[moving], shapes[moving]
            seen = weights[moving] * _seen(image, at, shape, _PLACES)
            patch = sharpened[moving], seen, across[moving], down[moving]
            step = _step(*patch, _PLACES, counts[moving], laplacian[moving], deformed[moving])
            deformed[moving, :, 1:] += step[:, :, 1:]
            points[moving] = at - np.einsum("tij,tj->ti", shape, step[:, :, 0].clip(-2, 2))
            shapes[moving] = shape - shape @ step[:, :, 1:].clip(-0.3, 0.3)
            last_step[moving] = _length(step[:, :, 0])
            if iteration >= _FEWEST_ITERATIONS:
                moving = moving[(last_step[moving] >= _SETTLED) & (last_step[moving] < _LAST_STEP)]
    affine = sharpened
    seen, contrast = weights * _seen(image, points, shapes, _PLACES), affine[:, -1]
    _, power, gain = _brightness(seen, counts, contrast)
    product = np.einsum("tp,tp->t", seen, template) - narrower * np.einsum("tp,tp->t", seen, laplacian)
    correlation = (product / np.sqrt(power * contrast)).clip(0, 1)
    stretch = np.abs(shapes).sum(axis=2).max(axis=1, initial=0)
    area = shapes[:, 0, 0] * shapes[:, 1, 1] - shapes[:, 0, 1] * shapes[:, 1, 0]
    good = (_length(points - start) < LONGEST_STEP) & (correlation > _LOWEST_CORRELATION) & (last_step < _LAST_STEP)
    good &= (stretch < _LARGEST_SCALE) & (area > 1 / _LARGEST_SCALE**2)
    good &= inside(points, image.shape[0] / _FINE, image.shape[1] / _FINE)
    variance = np.maximum(gain * gain * power - 2 * gain * product + contrast, 0) / counts
    sigmas = _SIGMA_FLOOR + _SIGMA_GROWTH * variance * (affine[:, 0] + affine[:, 21]) / 2
    return Alignment(points, shapes, sigmas.astype(np.float32), correlation.astype(np.float32), good)


def inside(points: np.ndarray, height: float, width: float) -> np.ndarray:
    """(T,) bool which points (T, 2) have pixels of an image of this size on all sides; False for NaN."""
    return np.asarray((points >= 1).all(axis=1) & (points[:, 0] < width - 2) & (points[:, 1] < height - 2))


def _length(moves: np.ndarray) -> np.ndarray:
    """Lengths (T,) of moves (T, 2)."""
    return np.asarray(np.hypot(moves[:, 0], moves[:, 1]))


def _seen(image: np.ndarray, points: np.ndarray, shapes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(T, U) pixels of the image at the offsets `places` (3, U) of patches at points (T, 2) with shapes (T, 2, 2)."""
    columns, rows = np.concatenate([points[:, :, None], shapes], axis=2).transpose(1, 0, 2) @ places
    return _sample(image, columns, rows)


def _counts(weights: np.ndarray) -> np.ndarray:
    """(T,) float32 number of pixels with a weight, from weights (T, U); at least 1."""
    return np.maximum(weights @ _ONES[: weights.shape[1]], 1)


def _brightness(
    seen: np.ndarray, counts: np.ndarray, contrast: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, squared norm without the mean, and gain of pixels (T, U), of which `counts` (T,) are not 0; (T,) each.

    The gain scales the pixels to the squared norm `contrast` (T,).
    """
    mean = seen @ _ONES[: seen.shape[1]] / counts
    power = np.maximum(np.einsum("tp,tp->t", seen, seen) - counts * mean * mean, _LEAST_CONTRAST)
    return mean, power, np.sqrt(contrast / power).clip(1 / _LARGEST_GAIN, _LARGEST_GAIN)


def _narrowing(shapes: np.ndarray) -> np.ndarray:
    """(T,) decrease of the blur's variance on surfaces seen through shapes (T, 2, 2), as a part of this variance."""
    area = shapes[:, 0, 0] * shapes[:, 1, 1] - shapes[:, 0, 1] * shapes[:, 1, 0]
    widening = (shapes * shapes).sum(axis=(1, 2)) / np.maximum(2 * area * area, 1e-6)
    return np.asarray(1 - np.minimum(widening, _WIDEST), np.float32)


def _sharpened(affine: np.ndarray, narrower: np.ndarray) -> np.ndarray:
    """Equations of an affine change (T, 63), of the patches minus `narrower` (T,) times their Laplacians."""
    changed, (along, own, power) = affine.copy(), (affine[:, 42:48], affine[:, 48], affine[:, 49])
    changed[:, 48] -= narrower * power
    changed[:, -7:-1] -= narrower[:, None] * along
    changed[:, -1] += narrower * (narrower * power - 2 * own)
    changed[:, -1] = np.maximum(changed[:, -1], _LEAST_CONTRAST)
    return changed


def _equations(
    template: np.ndarray,
    across: np.ndarray,
    down: np.ndarray,
    places: np.ndarray,
    counts: np.ndarray,
    laplacian: np.ndarray | None = None,
) -> np.ndarray:
    """Equations of changes along x, and then along y, of pixels minus their mean, for :func:`_step`.

    Args:
        template: (T, U) pixels of patches, minus their mean.
        across: (T, U) gradients along x.
        down: (T, U) gradients along y.
        places: (K, U) the factors that a change is proportional to.
        counts: (T,) number of pixels that count; the others are 0, as are their gradients and Laplacians.
        laplacian: (T, U) Laplacians minus their mean, if blur may change too.

    Returns:
        (T, 4 K² + 4 K + 1): the inverse of the normal equations, the sums of the gradients times the places, the sums
        of the gradients times the places times the template, and the squared norm of the template. With Laplacians,
        4 K + 2 more numbers follow the inverse: its column of blur, the sums of the gradients times the places times
        the Laplacians, and the products of the Laplacians with the template and with themselves.
    """
    kinds, pixels = places.shape
    size = 2 * kinds
    products = (places[:, None] * places).reshape(-1, pixels)
    normal = np.empty((size if laplacian is None else size + 1,) * 2 + (len(across),), np.float32)
    for i, j, squares in ((0, 0, across * across), (0, kinds, across * down), (kinds, kinds, down * down)):
        normal[i : i + kinds, j : j + kinds] = (products @ squares.T).reshape(kinds, kinds, -1)
    normal[kinds:size, :kinds] = normal[:kinds, kinds:size]
    sums = np.concatenate([places @ across.T, places @ down.T])
    normal[:size, :size] -= sums[:, None] * sums / counts
    for k in range(size):
        normal[k, k] += _DAMPING[k % kinds]
    blur = []
    if laplacian is not None:
        along = np.concatenate([places @ (each * laplacian).T for each in (across, down)])
        products = np.stack([np.einsum("tp,tp->t", each, laplacian) for each in (template, laplacian)])
        normal[-1, :-1] = normal[:-1, -1] = along
        normal[-1, -1] = products[1] + _BLUR_DAMPING
        blur = [along, products]
    inverted = inverse(normal)
    if blur:
        blur.insert(0, inverted[:-1, -1])
        inverted = inverted[:-1, :-1]
    own = [places @ (each * template).T for each in (across, down)]
    contrast = np.maximum(np.einsum("tp,tp->t", template, template), _LEAST_CONTRAST)
    return np.concatenate([inverted.reshape(size * size, -1), *blur, sums, *own, contrast[None]]).T


def _step(
    equations: np.ndarray,
    seen: np.ndarray,
    across: np.ndarray,
    down: np.ndarray,
    places: np.ndarray,
    counts: np.ndarray,
    laplacian: np.ndarray | None = None,
    deformed: np.ndarray | None = None,
) -> np.ndarray:
    """(T, 2, K) changes of a patch that explain the pixels seen (T, U). The arguments are those of :func:`_equations`.

    The prior limits the sum of these changes and the previous ones, `deformed` (T, 2, K).
    """
    size = 2 * len(places)
    inverse, sums, own = (
        equations[:, : size * size],
        equations[:, -2 * size - 1 : -size - 1],
        equations[:, -size - 1 : -1],
    )
    mean, _, gain = _brightness(seen, counts, equations[:, -1])
    slope = np.concatenate([(each * seen) @ places.T for each in (across, down)], axis=1)
    slope = gain[:, None] * (slope - mean[:, None] * sums) - own
    if deformed is not None:
        slope -= (_DAMPING * deformed).reshape(-1, size)
    step = np.einsum("tij,tj->ti", inverse.reshape(-1, size, size), slope)
    if laplacian is not None:
        column, against = equations[:, size * size :][:, :size], equations[:, -2 * size - 3]
        step += (gain * np.einsum("tp,tp->t", laplacian, seen) - against)[:, None] * column
    return step.reshape(-1, 2, len(places))


def inverse(matrices: np.ndarray) -> np.ndarray:
    """Inverses of symmetric positive matrices (N, N, T), for many small ones at once, by elimination."""
    result = matrices.copy()
    for k in range(len(result)):
        pivot, column = 1 / result[k, k], result[:, k].copy()
        row = result[k] * pivot
        result -= column[:, None] * row
        result[k], result[:, k], result[k, k] = row, -column * pivot, pivot
    return result


def _blocks(count: int, most: int) -> list[slice]:
    return [slice(i, i + most) for i in range(0, count, most)]


def _centred(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values (T, P) minus their weighted mean; the weights (T, P) are 0 or 1. Values with weight 0 become 0."""
    return weights * (values - ((weights * values) @ _ONES[: values.shape[1]] / _counts(weights))[:, None])


def _sample(image: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Linear interpolation between the pixels of an image from :func:`signed`, 0 beyond it.

    OpenCV 4's remap is not used because it has only 32 positions between two pixels.
    """
    height, width = image.shape
    padded = np.pad(image, 2)
    x, y = (_FINE * np.clip(np.nan_to_num(places, nan=-2.0), -1e9, 1e9) for places in (columns, rows))
    left, top = np.clip(np.floor(x), -2, width).astype(np.intp), np.clip(np.floor(y), -2, height).astype(np.intp)
    across, down = (x - left).astype(np.float32), (y - top).astype(np.float32)
    place = (top + 2) * (width + 4) + left + 2
    flat = padded.ravel()
    above = flat[place] * (1 - across) + flat[place + 1] * across
    below = flat[place + width + 4] * (1 - across) + flat[place + width + 5] * across
    return np.asarray(above * (1 - down) + below * down, np.float32)
