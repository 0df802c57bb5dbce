"""Patches of an image, found in others under an affine change (Shi and Tomasi, CVPR 1994)."""

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

_SIDE = 13  # pixels, as the window of geometry.flow
_WIDE = _SIDE + 2  # with a border for gradients
_WIDE_OFFSETS = np.arange(_WIDE, dtype=np.float32) - _WIDE // 2
_WIDE_X, _WIDE_Y = (grid.ravel() for grid in np.meshgrid(_WIDE_OFFSETS, _WIDE_OFFSETS))
_INNER = (abs(_WIDE_X) <= _SIDE // 2) & (abs(_WIDE_Y) <= _SIDE // 2) & ((_WIDE_X + _WIDE_Y) % 2 == 0)
_SPARSE = np.flatnonzero(_INNER & (_WIDE_X % 2 == 1))
_USED = np.concatenate([_SPARSE, np.flatnonzero(_INNER & (_WIDE_X % 2 == 0))])
"""Pixels of a patch that are compared: like a chessboard's black fields, which is half the work, and finds as well.

First come those at odd places, which are enough for a shift.
"""
_FEW = slice(len(_SPARSE))
_X, _Y = _WIDE_X[_USED], _WIDE_Y[_USED]
_PLACES = np.stack([np.ones_like(_X), _X, _Y])  # (3, U)
_AFFINE = 63  # numbers of the equations of an affine change with blur
_ONES = np.ones(len(_USED), np.float32)

LONGEST_STEP = 3.0
"""Pixels from where the search began: what moves further is another corner."""

_FEWEST_ITERATIONS, _ITERATIONS, _SEARCHES = 2, 10, 2
_SETTLED = 0.01
"""Pixels: what moves less in a step is in place.

Where one image is sharp and the other blurred, a step halves what is left, and the search begins at a keypoint, which
blur shifts by a tenth of a pixel, all points alike.
"""
_LAST_STEP = 0.3  # pixels: what moves further in the last step is not yet, or nowhere, in place
_BLOCK = 1024  # patches at a time that are searched for: their arrays stay in the cache
_CUT_BLOCK = 384  # and that are cut, which takes more arrays; of larger products, OpenBLAS gives each core a part
_DAMPING = np.array([1.0, 1e4, 1e4], np.float32)
"""Noise of 10 grey levels over what a change is expected to be: any number of pixels, a tenth of a deformation."""
_BLUR_DAMPING = np.float32(1e4)  # the same for a fifth of a square pixel of blur
_FINE = 2
"""Pixels of an image that patches are found in, to one of the image itself.

What is as fine as the pixels is not interpolated right: linear interpolation, also a cubic one, moves it less than by
the fraction of a pixel that is asked for. It is also where noise is, and where compression leaves marks that stay.
Smoothed by half a pixel and drawn at half the distance, an image has little left that is so fine.
"""
_BLUR = 0.5
"""Square pixels: variance of the blur of an image by its pixels, its lens, and interpolation, and by smoothing."""
_WIDEST = 2.0  # times that variance: beyond, the Laplacian does not tell what blur adds
_ALIKE = 0.82  # correlation with the patch: with less, it is another point
_LARGEST_SCALE = 3.0  # change of length since the patch was cut
_LEAST_CONTRAST = 0.1  # squared norm of a patch's grey levels: less is rounding
_LARGEST_GAIN = 2.0  # change of contrast: more of it is another point, or noise

_SIGMA_FLOOR = 0.0275  # pixels
_SIGMA_GROWTH = 27.5  # pixels per square pixel that white noise as large as the residuals would make; measured


@dataclass(frozen=True, eq=False)
class Alignment(ParallelArrays):
    """Where T patches were found.

    Attributes:
        points: (T, 2) float32 pixels.
        shapes: (T, 2, 2) float32: an offset in the patch, times this, is the offset in the image.
        sigmas: (T,) float32 standard deviation of a coordinate of points, pixels.
        likeness: (T,) float32 correlation with the patch, in [0, 1].
        good: (T,) bool whether it is found.
    """

    points: np.ndarray
    shapes: np.ndarray
    sigmas: np.ndarray
    likeness: np.ndarray
    good: np.ndarray

    def put(self, rows: np.ndarray, part: Alignment) -> None:
        """Replace the rows (R,) by an alignment of R patches."""
        for whole, values in zip(vars(self).values(), vars(part).values()):
            whole[rows] = values


def unaligned(points: np.ndarray, likeness: np.ndarray, good: bool = True) -> Alignment:
    """Points (T, 2) taken as they are, which are alike by likeness (T,), and good or not."""
    none = np.zeros(len(points), np.float32)
    return Alignment(points, no_change(len(points)), none, np.maximum(likeness, 0), np.full(len(points), good))


def about_grey(image: np.ndarray) -> np.ndarray:
    """An image, uint8 (H, W), as float32 that is 0 where it is grey."""
    return np.subtract(image, 128, dtype=np.float32)


def signed(image: np.ndarray) -> np.ndarray:
    """An image (H, W) as :func:`cut` and :func:`align` take it: float32 (2 H, 2 W), 0 where it is grey, as all around.

    Its pixel (2 x, 2 y) is where the pixel (x, y) of the image is. Points and patches are in pixels of the image.

    Args:
        image: uint8, or float32 from :func:`about_grey`.
    """
    pixels = about_grey(image) if image.dtype == np.uint8 else image
    if not pixels.size:
        return np.zeros((_FINE * pixels.shape[0], _FINE * pixels.shape[1]), np.float32)
    return np.asarray(cv2.pyrUp(pixels))


def cut(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(T, P) float32 patches of an image, from :func:`signed`, around points (T, 2): what :func:`align` needs of them.

    These are the pixels, less their mean, their gradients, their Laplacians, less their mean, their weights, and the
    equations of an affine change and of a shift. A pixel beyond the image has the weight 0, as one at its border, which
    has no gradient; the others have 1. Grey in its place would be an edge that stays there while the point moves on.
    """
    if compiled.available():
        return compiled.cut(image, _PLACES[1:], points)
    return _cut(image, points)


def _cut(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The same by NumPy: a change here is one of src/geometry.c, too."""
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
    """(T, U) float32: 1 for pixels of patches around points (T, 2) that have neighbours in the image, 0 for others."""
    least, most = 1 - points.T, np.array(image.shape[::-1], np.float32)[:, None] / _FINE - 2 - points.T
    whole = [(places >= least[i, :, None]) & (places <= most[i, :, None]) for i, places in enumerate((_X, _Y))]
    return (whole[0] & whole[1]).astype(np.float32)


def gradients(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, U) gradients of patches (T, P), from :func:`cut`, along x and along y."""
    return patches[:, len(_USED) : 2 * len(_USED)], patches[:, 2 * len(_USED) : 3 * len(_USED)]


def no_change(count: int) -> np.ndarray:
    """(T, 2, 2) float32 shapes of patches that are not deformed."""
    return np.tile(np.eye(2, dtype=np.float32), (count, 1, 1))


def align(patches: np.ndarray, image: np.ndarray, points: np.ndarray, shapes: np.ndarray, shifts: int = 0) -> Alignment:
    """Find patches in an image, from :func:`signed`, near points (T, 2) float32, deformed as shapes (T, 2, 2) float32.

    Gauss-Newton on an affine map, inverse compositional (Baker and Matthews, IJCV 2004). Brightness and contrast of a
    patch may change. So many steps before shift the patches only: from further away this is surer. How much a patch is
    deformed beyond the shapes given has a Gaussian prior: what the images do not tell, steps do not add up to. What the
    prior keeps from a deformation moves all points of a surface alike. So a patch that is in place is searched for once
    more, from there, by a prior that has moved to the shape found (iterated Tikhonov regularisation).

    Sharpness may change too. The blur of an image is as wide in pixels everywhere. On a surface that is seen larger
    than in the patch it is therefore narrower, and each spot looks less enlarged than it is. To first order, blur adds
    the Laplacian (Lindeberg, Scale-Space Theory in Computer Vision, 1994). What the shapes say of it is taken from the
    patch. The rest is estimated besides the affine map.
    """
    if compiled.available():
        return Alignment(*compiled.align(patches, image, _PLACES[1:], points, shapes, shifts))
    return _align(patches, image, points, shapes, shifts)


def _align(patches: np.ndarray, image: np.ndarray, points: np.ndarray, shapes: np.ndarray, shifts: int) -> Alignment:
    """The same by NumPy: a change here is one of src/geometry.c, too."""
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
    likeness = (product / np.sqrt(power * contrast)).clip(0, 1)
    stretch = np.abs(shapes).sum(axis=2).max(axis=1, initial=0)
    area = shapes[:, 0, 0] * shapes[:, 1, 1] - shapes[:, 0, 1] * shapes[:, 1, 0]
    good = (_length(points - start) < LONGEST_STEP) & (likeness > _ALIKE) & (last_step < _LAST_STEP)
    good &= (stretch < _LARGEST_SCALE) & (area > 1 / _LARGEST_SCALE**2)
    good &= inside(points, image.shape[0] / _FINE, image.shape[1] / _FINE)
    variance = np.maximum(gain * gain * power - 2 * gain * product + contrast, 0) / counts
    sigmas = _SIGMA_FLOOR + _SIGMA_GROWTH * variance * (affine[:, 0] + affine[:, 21]) / 2
    return Alignment(points, shapes, sigmas.astype(np.float32), likeness.astype(np.float32), good)


def inside(points: np.ndarray, height: float, width: float) -> np.ndarray:
    """(T,) bool which points (T, 2) have pixels of an image of this size all around them; NaN has none."""
    return np.asarray((points >= 1).all(axis=1) & (points[:, 0] < width - 2) & (points[:, 1] < height - 2))


def _length(moves: np.ndarray) -> np.ndarray:
    """(T,) of moves (T, 2)."""
    return np.asarray(np.hypot(moves[:, 0], moves[:, 1]))


def _seen(image: np.ndarray, points: np.ndarray, shapes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(T, U) pixels of the image at places (3, U) of patches that are at points (T, 2), with shapes (T, 2, 2)."""
    columns, rows = np.concatenate([points[:, :, None], shapes], axis=2).transpose(1, 0, 2) @ places
    return _sample(image, columns, rows)


def _counts(weights: np.ndarray) -> np.ndarray:
    """(T,) float32 how many pixels count, of weights (T, U); 1 where none does."""
    return np.maximum(weights @ _ONES[: weights.shape[1]], 1)


def _brightness(
    seen: np.ndarray, counts: np.ndarray, contrast: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of pixels (T, U), 0 but for so many (T,), their mean, the squared norm of the rest, and the gain that gives it a
    contrast (T,); (T,) each.
    """
    mean = seen @ _ONES[: seen.shape[1]] / counts
    power = np.maximum(np.einsum("tp,tp->t", seen, seen) - counts * mean * mean, _LEAST_CONTRAST)
    return mean, power, np.sqrt(contrast / power).clip(1 / _LARGEST_GAIN, _LARGEST_GAIN)


def _narrowing(shapes: np.ndarray) -> np.ndarray:
    """(T,) how much narrower an image's blur is on surfaces seen through shapes (T, 2, 2): a part of its variance."""
    area = shapes[:, 0, 0] * shapes[:, 1, 1] - shapes[:, 0, 1] * shapes[:, 1, 0]
    widening = (shapes * shapes).sum(axis=(1, 2)) / np.maximum(2 * area * area, 1e-6)
    return np.asarray(1 - np.minimum(widening, _WIDEST), np.float32)


def _sharpened(affine: np.ndarray, narrower: np.ndarray) -> np.ndarray:
    """The equations of an affine change (T, 63) of patches less their Laplacians times so much (T,)."""
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
    """Equations of changes along x, and then along y, of pixels less their mean, for :func:`_step`.

    Args:
        template: (T, U) pixels of patches, less their mean.
        across: (T, U) gradients along x.
        down: (T, U) along y.
        places: (K, U) what a change is proportional to.
        counts: (T,) how many pixels count; the others are 0, as are their gradients and Laplacians.
        laplacian: (T, U) less their mean, if blur may change besides.

    Returns:
        (T, 4 K² + 4 K + 1): the inverse of the normal equations, the sums of the gradients times the places, those
        times the template, and the squared norm of the template. With Laplacians, there are 4 K + 2 more after the
        inverse: its column of blur, the sums of the gradients times the places and the Laplacians, and the products of
        the Laplacians with the template and with themselves.
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
    """(T, 2, K) changes of a patch that explain the pixels seen (T, U), the arguments as in :func:`_equations`.

    The prior is on these changes and those before, deformed (T, 2, K), together.
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
    """Of symmetric positive matrices (N, N, T), by elimination: many at once, which are small."""
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
    """Values (T, P) less their mean, by weights (T, P) that are 0 or 1; 0 where the weight is."""
    return weights * (values - ((weights * values) @ _ONES[: values.shape[1]] / _counts(weights))[:, None])


def _sample(image: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Values between the pixels of an image, from :func:`signed`, 0 beyond it.

    OpenCV 4's remap knows 32 places between two pixels.
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
