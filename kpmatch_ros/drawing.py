"""Draws pictures of matches."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kpmatch_ros.frames import Pair
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.imaging.colour import in_memory_order, to_grey

__all__ = ["caption", "draw_matches", "draw_pair"]

Image = NDArray[np.uint8]

_SHIFT = 4  # fractional bits of the coordinates for OpenCV's drawing functions: 1/16 pixel
_LEVELS = 24  # number of colours; all lines of one colour are drawn in a single call
_BACKGROUND = 20
_MOST_LINES = 80  # lines of inliers; outliers get half as many
_LINE_OPACITY = 0.6
_OUTLIER_OPACITY = 0.3
_DIM = 0.85
_SATURATION = 0.7
_OUTLIER = (255, 64, 72)  # red differs clearly from all colours of the score
_TEXT = (240, 240, 240)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_matches(
    image0: Image,
    image1: Image,
    points0: ArrayLike,
    points1: ArrayLike,
    scores: ArrayLike,
    inliers: ArrayLike | None = None,
    text: str = "",
) -> Image:
    """Draw two images side by side, with their matches as lines.

    A match is a dot in each image and a line between the dots, in the colour of its score: from violet (0) over blue to
    light green (1). The best scores are on top. Outliers are red crosses with thin red lines, below the inliers.
    Hundreds of lines would hide the images, so if there are many matches, only an even selection has lines.

    Args:
        image0: the left picture, uint8, (H, W) grey or (H, W, 3) RGB, with any strides.
        image1: the right picture; it may have another size.
        points0: (M, 2) x, y in pixels of image0; the centre of the top-left pixel is (0, 0).
        points1: (M, 2) x, y in pixels of image1.
        scores: (M,) in [0, 1].
        inliers: (M,) which matches agree with the estimated geometry. With None, no match is drawn as an outlier.
        text: one line of text, written over the lower edge.

    Returns:
        (max(H0, H1), W0 + W1 + gap, 3) uint8 RGB.

    Raises:
        ValueError: if an image has a wrong shape or type, or the arrays differ in length.
    """
    canvas, offset = _side_by_side(image0, image1)
    ends0 = np.asarray(points0, np.float64).reshape(-1, 2)
    ends1 = np.asarray(points1, np.float64).reshape(-1, 2) + (offset, 0)
    quality = np.asarray(scores, np.float64).reshape(-1)
    good = np.ones(len(ends0), bool) if inliers is None else np.asarray(inliers).astype(bool).reshape(-1)
    if not len(ends0) == len(ends1) == len(quality) == len(good):
        raise ValueError(
            f"there are {len(ends0)} points0, {len(ends1)} points1, {len(quality)} scores and {len(good)} inliers; a "
            "match needs one of each"
        )
    segments = np.rint(np.stack([ends0, ends1], axis=1) * (1 << _SHIFT)).astype(np.int32)
    _draw_outliers(canvas, segments[~good])
    _draw_inliers(canvas, segments[good], quality[good])
    if text:
        _draw_text(canvas, text)
    return canvas


def draw_pair(pair: Pair, text: str = "") -> Image:
    """Draw the matches of a pair with :func:`draw_matches`, the reference frame on the left."""
    return draw_matches(
        pair.reference.image, pair.current.image, pair.reference_points, pair.points, pair.scores, pair.inliers, text
    )


def _side_by_side(image0: Image, image1: Image) -> tuple[Image, int]:
    """Return both images on one canvas, and the x offset of the second image."""
    for name, image in (("image0", image0), ("image1", image1)):
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not shaped or 0 in image.shape:
            raise ValueError(
                f"{name} is {image.dtype} of shape {image.shape}; it must be uint8 and (H, W) grey or (H, W, 3) RGB"
            )
    gap = max(2, (image0.shape[1] + image1.shape[1]) // 320)
    offset = image0.shape[1] + gap
    height = max(image0.shape[0], image1.shape[0])
    canvas = np.full((height, offset + image1.shape[1], 3), _BACKGROUND, np.uint8)
    for image, left in ((image0, 0), (image1, offset)):
        rows, columns = image.shape[:2]
        canvas[:rows, left : left + columns] = _dimmed(image)
    return canvas, offset


def _dimmed(image: Image) -> Image:
    """Return the image as RGB, slightly darker and less saturated, so that the colours of the matches stand out."""
    if image.ndim == 2:
        grey = np.ascontiguousarray(image)
        return np.asarray(cv2.cvtColor(cv2.convertScaleAbs(grey, alpha=_DIM), cv2.COLOR_GRAY2RGB))
    pixels, blue_first = in_memory_order(image)
    rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if blue_first else np.ascontiguousarray(pixels)
    luma = cv2.cvtColor(to_grey(image), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(rgb, _DIM * _SATURATION, luma, _DIM * (1 - _SATURATION), 0))


def _draw_outliers(canvas: Image, segments: NDArray[np.int32]) -> None:
    if not len(segments):
        return
    layer = canvas.copy()
    lines = segments[_evenly_spread(len(segments), _MOST_LINES // 2)]
    cv2.polylines(layer, list(lines), False, _OUTLIER, 1, cv2.LINE_AA, _SHIFT)
    cv2.addWeighted(layer, _OUTLIER_OPACITY, canvas, 1 - _OUTLIER_OPACITY, 0, dst=canvas)
    reach = round(2.5 * _scale_of(canvas) * (1 << _SHIFT))
    diagonals = np.array([[[-reach, -reach], [reach, reach]], [[-reach, reach], [reach, -reach]]], np.int32)
    crosses = segments.reshape(-1, 1, 1, 2) + diagonals
    cv2.polylines(canvas, list(crosses.reshape(-1, 2, 2)), False, _OUTLIER, 1, cv2.LINE_AA, _SHIFT)


def _draw_inliers(canvas: Image, segments: NDArray[np.int32], scores: NDArray[np.float64]) -> None:
    if not len(segments):
        return
    order = np.argsort(np.nan_to_num(scores), kind="stable")  # the best scores last, so they are on top
    segments = segments[order]
    levels = np.clip(np.rint(np.nan_to_num(scores[order]) * (_LEVELS - 1)), 0, _LEVELS - 1).astype(int)
    with_line = _evenly_spread(len(segments), _MOST_LINES)
    scale = _scale_of(canvas)
    groups = [(tuple(_colours()[level].tolist()), levels == level) for level in np.unique(levels)]
    layer = canvas.copy()
    for colour, chosen in groups:
        lines = segments[chosen & with_line]
        cv2.polylines(layer, list(lines), False, colour, max(1, round(scale)), cv2.LINE_AA, _SHIFT)
    cv2.addWeighted(layer, _LINE_OPACITY, canvas, 1 - _LINE_OPACITY, 0, dst=canvas)
    # A line from a point to itself draws a dot. Unlike circles, all lines take a single call. The dark rims come first.
    rims = np.repeat(segments.reshape(-1, 1, 2), 2, axis=1)
    cv2.polylines(canvas, list(rims), False, (0, 0, 0), round(5 * scale), cv2.LINE_8, _SHIFT)
    for colour, chosen in groups:
        dots = np.repeat(segments[chosen].reshape(-1, 1, 2), 2, axis=1)
        cv2.polylines(canvas, list(dots), False, colour, round(3 * scale), cv2.LINE_AA, _SHIFT)


def _evenly_spread(count: int, most: int) -> NDArray[np.bool_]:
    """Return (count,) bool that selects at most ``most`` items, evenly spread."""
    step = max(1.0, count / most)
    chosen = np.zeros(count, bool)
    chosen[np.arange(0, count, step).astype(int)] = True
    return chosen


def _scale_of(canvas: Image) -> float:
    """Return the scale of lines and text: 1 for two VGA images side by side, larger for larger pictures.

    Larger pictures are usually viewed at a smaller scale.
    """
    return max(1.0, canvas.shape[1] / 1300)


@lru_cache(maxsize=1)
def _colours() -> Image:
    """Return the colours of the score, (levels, 3) RGB from violet to light green.

    Lightness grows linearly (CIE L*a*b*), and no hue is close to the red of the outliers.
    """
    share = np.linspace(0, 1, _LEVELS)
    hue = np.radians(305 - 180 * share)
    lab = np.stack([42 + 52 * share, 64 * np.cos(hue), 64 * np.sin(hue)], axis=-1)[None].astype(np.float32)
    return np.asarray(np.rint(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)[0] * 255).clip(0, 255).astype(np.uint8))


def _draw_text(canvas: Image, text: str) -> None:
    """Write a line of text on a shaded band at the lower edge, and a key of the scores' colours if there is room.

    The text shrinks to fit.
    """
    height, width = canvas.shape[:2]
    scale = _scale_of(canvas)
    margin = round(6 * scale)
    size = 0.5 * scale
    length, ascent, descent = _extent(text, size)
    size *= min(1.0, max(width - 2 * margin, 1) / max(length, 1), height / (ascent + 2 * descent + 4))
    length, ascent, descent = _extent(text, size)
    band = canvas[max(0, height - ascent - 2 * descent - 4) :]
    np.copyto(band, band // 4 + 8)
    baseline = height - descent - 2
    cv2.putText(canvas, text, (margin, baseline), _FONT, size, _TEXT, 1, cv2.LINE_AA)

    before, after = "score 0", "1"
    ramp_width = round(70 * scale)
    left = width - 4 * margin - ramp_width - _extent(before, size)[0] - _extent(after, size)[0]
    if left < 4 * margin + length or baseline < ascent:
        return
    cv2.putText(canvas, before, (left, baseline), _FONT, size, _TEXT, 1, cv2.LINE_AA)
    left += _extent(before, size)[0] + margin
    ramp = cv2.resize(_colours()[None], (ramp_width, ascent), interpolation=cv2.INTER_LINEAR)
    canvas[baseline - ascent : baseline, left : left + ramp_width] = ramp
    cv2.putText(canvas, after, (left + ramp_width + margin, baseline), _FONT, size, _TEXT, 1, cv2.LINE_AA)


def _extent(text: str, size: float) -> tuple[int, int, int]:
    """Return width, height above the baseline and height below it, pixels."""
    (width, ascent), descent = cv2.getTextSize(text, _FONT, size, 1)
    return width, ascent, descent


def caption(pair: Pair) -> str:
    """Return the line of figures for a picture of matches."""
    figures = [f"{len(pair.indices)} matches"]
    if pair.pose.status is not PoseStatus.NO_CALIBRATION:
        figures.append(f"{pair.num_inliers} inliers")
    if pair.layers:
        figures.append(f"{pair.layers} layers")
    return ", ".join([*figures, f"{pair.current.extract_ms + pair.match_ms:.0f} ms", pair.pose.status.name])
