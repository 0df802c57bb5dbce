"""What the reports of a replay show of each frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.frames import Pair
from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["STATUS_COLOURS", "FrameFigures", "small_jpeg"]

_QUALITIES = (85, 70, 55)  # of JPEG, tried in this order

STATUS_COLOURS = {
    PoseStatus.OK: "#2f9e6e",
    PoseStatus.NO_TRANSLATION: "#3b82c4",
    PoseStatus.AMBIGUOUS: "#f2c14e",
    PoseStatus.TOO_FEW_MATCHES: "#e0a030",
    PoseStatus.NO_CALIBRATION: "#8a8f98",
    PoseStatus.FAILED: "#d1495b",
}


@dataclass(frozen=True)
class FrameFigures:
    """What a report says of a frame.

    Attributes:
        stamp: nanoseconds.
        matches, inliers: of the frame with its reference. Without calibration nothing is known of inliers: None.
        rotation: between them, degrees; None without a pose.
        latency: milliseconds.
        status: of the pose.
        position: (3,) of the camera in the first camera's optical frame; None where it is not known for certain.
    """

    stamp: int
    matches: int
    inliers: int | None
    rotation: float | None
    latency: float
    status: PoseStatus
    position: np.ndarray | None

    @classmethod
    def of(cls, pair: Pair, position: np.ndarray, milliseconds: float) -> FrameFigures:
        """Of a pair, the position (3,) where the chain of poses is, and what the frame took."""
        status = pair.pose.status
        cosine = (np.trace(pair.pose.rotation) - 1) / 2
        return cls(
            pair.current.stamp,
            len(pair.indices),
            None if status is PoseStatus.NO_CALIBRATION else pair.num_inliers,
            float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))) if status.has_pose else None,
            milliseconds,
            status,
            position if status.is_certain else None,
        )


def small_jpeg(image: NDArray[np.uint8], most: int, widths: Sequence[int]) -> tuple[bytes, tuple[int, int]]:
    """An image as a JPEG of at most so many bytes, if the smallest that is tried has no more; and its width and height.

    Args:
        image: uint8, (H, W) grey or (H, W, 3) RGB.
        most: bytes.
        widths: pixels, tried in this order. The last is tried also where the image is smaller.
    """
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    encoded, size = b"", (0, 0)
    for width in widths:
        if width > bgr.shape[1] and width != widths[-1]:
            continue
        size = (width, max(1, round(bgr.shape[0] * width / bgr.shape[1])))
        scaled = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
        for quality in _QUALITIES:
            encoded = cv2.imencode(".jpg", scaled, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
            if len(encoded) <= most:
                return encoded, size
    return encoded, size
