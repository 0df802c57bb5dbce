"""Stretches 16-bit images to 8 bits, and describes images without contrast. Does not depend on ROS.

Thermal cameras and 12-bit sensors use a small part of the 16-bit range. Divided by 257, such an image is nearly black.
A :class:`Stretch` maps the part in use to 8 bits. Its limits follow the images slowly, so that the brightness does not
jump from frame to frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.imaging.colour import to_grey

__all__ = ["Stretch", "appearance"]

_FULL = 65535
_SMALL_PART = 0.25  # images that use a smaller part of the 16-bit range than this are stretched
_LEAST_SPAN = 128.0  # smallest range of values that is mapped to 8 bits, so that noise is not amplified to a picture
_FOLLOWED = 0.1  # with each image, the limits move this part of the way to the image's own limits
_LARGEST_STEP = 0.02  # largest move of a limit per image, as part of the span between the limits
# With more than this part of the pixels outside of the limits, the limits are set again. This happens after a thermal
# camera has calibrated itself.
_OUTSIDE = 0.1
_SAMPLES = 20_000  # number of pixels for the percentiles
_PERCENTILES = (0.5, 99.5)  # robust against defective pixels and a lamp

_DARK, _BRIGHT, _FLAT, _FAINT = 12, 243, 4, 40  # of 255


class Stretch:
    """Converts the 16-bit images of one camera to 8 bits.

    Attributes:
        enabled: whether the following images are stretched.
        used: part of the 16-bit range that the last image used, in [0, 1]; None if it was not a 16-bit image.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.used: float | None = None
        self._limits: tuple[float, float] | None = None  # None while images are not stretched

    def to_8_bits(self, pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """Convert an image to 8-bit pixels of the same shape.

        The values between two percentiles, smoothed over the images so far, are mapped to 0 to 255 if they span less
        than a quarter of the range. Otherwise values are divided by 257.

        Args:
            pixels: (H, W, channels) uint16.
        """
        every = max(1, int(np.sqrt(pixels.shape[0] * pixels.shape[1] / _SAMPLES)))
        sample = pixels[::every, ::every, :3]  # without alpha
        low, high = (float(value) for value in np.percentile(sample, _PERCENTILES))
        self.used = (high - low) / _FULL
        if not self.enabled:
            self._limits = None
        limits = self._limits
        if limits is None or np.mean((sample < limits[0]) | (sample > limits[1])) > _OUTSIDE:
            if not self.enabled or high - low >= _SMALL_PART * _FULL:
                self._limits = None
                return scaled(pixels, 0.0, float(_FULL))
            self._limits = low, high
        else:
            first, last = limits
            step = _LARGEST_STEP * max(last - first, _LEAST_SPAN)
            first += float(np.clip(_FOLLOWED * (low - first), -step, step))
            last += float(np.clip(_FOLLOWED * (high - last), -step, step))
            self._limits = first, last
        middle, half = sum(self._limits) / 2, max(self._limits[1] - self._limits[0], _LEAST_SPAN) / 2
        return scaled(pixels, middle - half, middle + half)


def scaled(pixels: NDArray[np.uint16], low: float, high: float) -> NDArray[np.uint8]:
    """Map values linearly to 8 bits, rounded: ``low`` and below to 0, ``high`` and above to 255."""
    gain = 255.0 / (high - low)
    table = np.clip(np.round((np.arange(_FULL + 1) - low) * gain), 0, 255).astype(np.uint8)
    result: NDArray[np.uint8] = table[pixels]
    return result


def appearance(image: NDArray[np.uint8], used: float | None = None) -> str:
    """Describe an image in which hardly anything was detected. Returns an empty text for an 8-bit image with contrast.

    Args:
        image: uint8 grey (H, W) or RGB (H, W, 3).
        used: part of the 16-bit range that the original image used; None if it was an 8-bit image. The text names it,
            also for an image with contrast.
    """
    every = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / _SAMPLES)))
    sample = to_grey(image[::every, ::every])
    low, middle, high = (float(value) for value in np.percentile(sample, (0.5, 50, 99.5)))
    of_16 = "" if used is None else f"; their 16-bit values use {100 * used:.2g} % of the range"
    if high - low <= _FLAT:
        shade = "dark" if high <= _DARK else "white" if low >= _BRIGHT else f"one value ({middle:.0f} of 255)"
        return f"the images are all {shade}{of_16}"
    if high <= _DARK:
        return f"the images are all dark (values to {high:.0f} of 255){of_16}"
    if low >= _BRIGHT:
        return f"the images are all white (values from {low:.0f} of 255){of_16}"
    if high - low <= _FAINT:
        return f"the images have almost no contrast (values {low:.0f} to {high:.0f} of 255){of_16}"
    return of_16.removeprefix("; ")
