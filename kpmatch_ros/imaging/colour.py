"""Converts colour images to grey and resizes them, without copying images whose channels are reversed in memory."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["grey_levels", "in_memory_order", "resize", "to_grey"]

Image = NDArray[np.uint8]


def in_memory_order(image: Image) -> tuple[Image, bool]:
    """Return the pixels in their order in memory, which OpenCV takes without a copy, and whether blue comes first.

    The RGB image of a camera that sends BGR is a view with a negative stride. OpenCV needs contiguous pixels, and NumPy
    makes them value by value: 2 ms for 640x480 and 66 ms for 3840x2160, many times as long as the operation itself.

    Args:
        image: uint8 grey (H, W) or RGB (H, W, 3).
    """
    blue_first = image.ndim == 3 and image.strides[2] < 0
    return (image[..., ::-1] if blue_first else image), blue_first


def to_grey(image: Image) -> Image:
    """Convert a uint8 image, RGB (H, W, 3), to grey (H, W) with OpenCV's weights. A grey image is returned as it is."""
    if image.ndim == 2:
        return image
    pixels, blue_first = in_memory_order(image)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY if blue_first else cv2.COLOR_RGB2GRAY))


def grey_levels(pixels: Image, blue_first: bool) -> NDArray[np.float32]:
    """Convert the colours (H, W, 3) from :func:`in_memory_order` to grey (H, W) in [0, 1], without rounding."""
    code = cv2.COLOR_BGR2GRAY if blue_first else cv2.COLOR_RGB2GRAY
    grey: NDArray[np.float32] = np.asarray(cv2.cvtColor(pixels.astype(np.float32), code))
    grey /= 255
    return grey


def resized_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return width and height, pixels, of an image of this size after :func:`resize`."""
    scale = longest / max(height, width) if longest else 1.0
    return max(round(width * scale), 1), max(round(height * scale), 1)


def resize(pixels: Image, longest: int) -> Image:
    """Resize an image to a longest side of ``longest`` pixels; 0 keeps the size.

    Shrinks by area averaging, enlarges bilinearly.
    """
    height, width = pixels.shape[:2]
    size = resized_size(width, height, longest)
    if size == (width, height):
        return pixels
    way = cv2.INTER_AREA if longest < max(height, width) else cv2.INTER_LINEAR
    pixels, blue_first = in_memory_order(pixels)
    resized = np.asarray(cv2.resize(pixels, size, interpolation=way), np.uint8)
    return resized[..., ::-1] if blue_first else resized
