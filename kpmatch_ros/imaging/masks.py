"""Masks exclude image areas from detection, such as the robot's own body. Does not depend on ROS.

A mask is 0 (or false) where no keypoint may be detected. It may have any size and is scaled to the image.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.imaging.image_headers import JPEG
from kpmatch_ros.imaging.images import ImageError, check_header, whole_file
from kpmatch_ros.parameters import ParameterError, Parameters

__all__ = ["both", "fit", "load_masks", "shrink_or_enlarge"]

_HALF_OF_JPEG = 128  # zeros are not exact in a JPEG, so darker pixels than this count as 0


def load_masks(parameters: Parameters) -> list[NDArray[np.bool_] | None]:
    """Load the masks of the parameters `mask` and `mask_right`, (H, W) bool; None for a parameter that is not set.

    Raises:
        ParameterError: if a file cannot be read or is not an image, or `mask_right` is set for one camera.
    """
    if parameters.mask_right and parameters.mode != "stereo":
        raise ParameterError(
            f"mask_right is {parameters.mask_right!r}, but the mode is {parameters.mode}: one camera has no right "
            "image; use mask, or set mode to stereo"
        )
    named = [("mask", parameters.mask), ("mask_right", parameters.mask_right)]
    return [_read(name, path) if path else None for name, path in named]


def _read(name: str, path: str) -> NDArray[np.bool_]:
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # no such file; an invalid name; an unknown home folder
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ParameterError(f"{name} is {path!r}, which cannot be read: {reason}; give an image file") from None
    jpeg = data.startswith(JPEG)
    whole = whole_file(data)
    pixels = None
    if whole:
        try:
            check_header(whole, path)
            pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
        except ImageError as error:
            raise ParameterError(f"{name}: {error}") from None
        except cv2.error:
            pixels = None
    if pixels is None:
        raise ParameterError(
            f"{name} is {path!r}, which is not an image that OpenCV can read, or is cut short: use a PNG that is 0 "
            "(black) where no keypoint may be detected, and white elsewhere"
        )
    return np.asarray(pixels >= _HALF_OF_JPEG if jpeg else pixels != 0)


def fit(mask: np.ndarray, width: int, height: int) -> NDArray[np.bool_]:
    """Scale a mask to an image by nearest neighbour, and return it as (height, width) bool.

    Raises:
        ValueError: if the mask has a wrong shape or type.
    """
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_) or mask.size == 0:
        raise ValueError(
            f"the mask is {mask.dtype} of shape {mask.shape}; it must be uint8 or bool and (H, W), 0 where nothing is "
            "to be detected"
        )
    allowed = mask if mask.dtype == np.bool_ else mask != 0
    if allowed.shape == (height, width):
        return allowed
    # INTER_NEAREST_EXACT uses pixel centres. INTER_NEAREST would shift the mask by up to half a mask pixel.
    scaled = cv2.resize(allowed.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(scaled, np.bool_)


def both(*masks: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Combine masks of the same size: true where all of them are true. Returns None if no mask is given."""
    given = [mask for mask in masks if mask is not None]
    return np.logical_and.reduce(given) if len(given) > 1 else given[0] if given else None


def shrink_or_enlarge(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    """Scale a mask (H, W) from the image's size to the extractor's input size, (height, width).

    A pixel is allowed only if all pixels that it covers are allowed. So no keypoint lies in a masked area.
    """
    if mask.shape == (height, width):
        return mask
    interpolation = cv2.INTER_AREA if height < mask.shape[0] else cv2.INTER_LINEAR
    covered = cv2.resize(mask.astype(np.float32), (width, height), interpolation=interpolation)
    return np.asarray(covered > 1 - 1e-3)
