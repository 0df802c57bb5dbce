"""Colour images whose channels lie in memory the other way round, and grey ones made of them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["grey_levels", "in_memory_order", "resize", "to_grey"]

Image = NDArray[np.uint8]


def in_memory_order(image: Image) -> tuple[Image, bool]:
    """The pixels as they lie in memory, and whether blue comes first: what OpenCV takes as it is.

    RGB of a camera that sends BGR is a view with a negative stride. Whatever wants it in a row, as all of OpenCV does,
    has NumPy copy it value by value: 2 ms for 640x480 and 66 ms for 3840x2160, many times what is done with it.

    Args:
        image: uint8 grey (H, W) or RGB (H, W, 3).
    """
    blue_first = image.ndim == 3 and image.strides[2] < 0
    return (image[..., ::-1] if blue_first else image), blue_first


def to_grey(image: Image) -> Image:
    """Grey (H, W) of an image, uint8 grey (H, W) or RGB (H, W, 3), by OpenCV's weights; the image itself if grey."""
    if image.ndim == 2:
        return image
    pixels, blue_first = in_memory_order(image)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY if blue_first else cv2.COLOR_RGB2GRAY))


def grey_levels(pixels: Image, blue_first: bool) -> NDArray[np.float32]:
    """Grey (H, W) between 0 and 1, not rounded, of the colours (H, W, 3) that :func:`in_memory_order` gives."""
    code = cv2.COLOR_BGR2GRAY if blue_first else cv2.COLOR_RGB2GRAY
    grey: NDArray[np.float32] = np.asarray(cv2.cvtColor(pixels.astype(np.float32), code))
    grey /= 255
    return grey


def resized_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height, pixels, that :func:`resize` gives an image of this size."""
    scale = longest / max(height, width) if longest else 1.0
    return max(round(width * scale), 1), max(round(height * scale), 1)


def resize(pixels: Image, longest: int) -> Image:
    """The image with a longest side of so many pixels; 0 keeps its size. Down by area averaging, up bilinearly."""
    height, width = pixels.shape[:2]
    size = resized_size(width, height, longest)
    if size == (width, height):
        return pixels
    way = cv2.INTER_AREA if longest < max(height, width) else cv2.INTER_LINEAR
    pixels, blue_first = in_memory_order(pixels)
    resized = np.asarray(cv2.resize(pixels, size, interpolation=way), np.uint8)
    return resized[..., ::-1] if blue_first else resized
