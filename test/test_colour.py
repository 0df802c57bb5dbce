"""Tests that colour images are converted to grey, resized and uploaded without a copy value by value."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from image_encodings import image

from kpmatch_ros.geometry.refinement import normalize_contrast
from kpmatch_ros.imaging.colour import grey_levels, in_memory_order, resize, to_grey
from kpmatch_ros.imaging.images import to_array

RGB = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
ENCODINGS = ["rgb8", "bgr8", "rgba8", "bgra8"]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pixels_of_each_colour_encoding_have_contiguous_channels_for_opencv(encoding: str, padding: int) -> None:
    pixels, blue_first = in_memory_order(to_array(image(encoding, RGB, padding=padding)))
    assert pixels.strides[1:] == (3, 1)
    np.testing.assert_array_equal(pixels[..., ::-1] if blue_first else pixels, RGB)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_channel_order_affects_neither_grey_conversion_nor_resizing(encoding: str, padding: int) -> None:
    pixels = to_array(image(encoding, RGB, padding=padding))
    np.testing.assert_array_equal(to_grey(pixels), cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY))
    np.testing.assert_array_equal(normalize_contrast(pixels), normalize_contrast(RGB))
    for longest in (32, 100):
        np.testing.assert_array_equal(resize(pixels, longest), resize(RGB, longest))


def test_a_grey_image_is_returned_without_a_copy() -> None:
    grey = RGB[..., 0]
    assert to_grey(grey) is grey
    assert in_memory_order(grey) == (grey, False)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_grey_levels_are_the_unrounded_weighted_sum_of_the_channels(encoding: str) -> None:
    levels = grey_levels(*in_memory_order(to_array(image(encoding, RGB))))
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, (RGB / 255) @ [0.299, 0.587, 0.114], atol=3e-7)
