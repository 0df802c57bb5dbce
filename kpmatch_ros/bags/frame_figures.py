"""The figures and pictures that the reports of a replay show for each frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.frames import Result
from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["STATUS_COLOURS", "EvenlyChosen", "FrameFigures", "Jpeg"]

_QUALITIES = (85, 70, 55)  # of JPEG, tried in this order

STATUS_COLOURS = {
    PoseStatus.OK: "#2f9e6e",
    PoseStatus.NO_TRANSLATION: "#3b82c4",
    PoseStatus.AMBIGUOUS: "#f2c14e",
    PoseStatus.TOO_FEW_MATCHES: "#e0a030",
    PoseStatus.NO_CALIBRATION: "#8a8f98",
    PoseStatus.FAILED: "#d1495b",
    PoseStatus.INTERRUPTED: "#9b5de5",
}

T = TypeVar("T")


@dataclass(frozen=True)
class FrameFigures:
    """What a report shows for one frame.

    Attributes:
        stamp: nanoseconds.
        matches: number of matches with the reference frame; None without a reference.
        inliers: number of inliers among them; None without a reference or without calibration.
        rotation: between the reference and the frame, degrees; None without a pose.
        latency: milliseconds.
        status: of the pose; INTERRUPTED if the frame has no reference.
        position: (3,) of the camera in the first camera's optical frame; None if the pose is not certain.
    """

    stamp: int
    matches: int | None
    inliers: int | None
    rotation: float | None
    latency: float
    status: PoseStatus
    position: np.ndarray | None

    @classmethod
    def of(cls, result: Result, position: np.ndarray, milliseconds: float) -> FrameFigures:
        """The figures of a frame that is not the first one.

        Args:
            result: of the frame.
            position: (3,) of the last known camera in the chain of poses.
            milliseconds: latency of the frame.
        """
        pair, stamp = result.pair, result.frame.stamp
        if pair is None:
            return cls(stamp, None, None, None, milliseconds, PoseStatus.INTERRUPTED, None)
        status = pair.pose.status
        return cls(
            stamp,
            len(pair.indices),
            None if status is PoseStatus.NO_CALIBRATION else pair.num_inliers,
            math.degrees(pair.pose.angle) if status.has_pose else None,
            milliseconds,
            status,
            position if status.is_certain else None,
        )


class EvenlyChosen(Generic[T]):
    """Keeps every n-th item of a sequence. n doubles whenever more than `most` items would be kept.

    The length of the sequence need not be known in advance: a bag may declare another number of messages than it holds.

    Args:
        most: largest number of items that are kept. Once there are more items than that, at least half as many are
            kept.

    Attributes:
        every: n.
        kept: the items kept so far.
    """

    def __init__(self, most: int) -> None:
        self.every = 1
        self.kept: list[T] = []
        self._most = most
        self._count = 0

    def add(self, make: Callable[[], T]) -> None:
        """Add the next item. `make` is called only if the item is kept."""
        if self._count % self.every == 0:
            self.kept.append(make())
        if len(self.kept) > self._most:
            del self.kept[1::2]
            self.every *= 2
        self._count += 1


class Jpeg(NamedTuple):
    """A picture encoded as JPEG, and its width and height in pixels."""

    data: bytes
    size: tuple[int, int]

    @classmethod
    def of(cls, image: NDArray[np.uint8], most: int, widths: Sequence[int]) -> Jpeg:
        """Encode an image with the first width and quality that fit in `most` bytes, or else with the last ones.

        Args:
            image: uint8, (H, W) grey or (H, W, 3) RGB.
            most: bytes.
            widths: pixels, tried in this order. Widths above the image's are skipped, except for the last one.
        """
        return _encoded(cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image, most, widths)

    def within(self, most: int, widths: Sequence[int]) -> Jpeg:
        """The picture itself if it has at most `most` bytes, and otherwise a smaller one, see :meth:`of`."""
        if len(self.data) <= most:
            return self
        image = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_UNCHANGED)
        return _encoded(np.asarray(image), most, widths)


def _encoded(image: np.ndarray, most: int, widths: Sequence[int]) -> Jpeg:
    """Encode a grey or BGR image, see :meth:`Jpeg.of`."""
    encoded, size = b"", (0, 0)
    for width in widths:
        if width > image.shape[1] and width != widths[-1]:
            continue
        size = (width, max(1, round(image.shape[0] * width / image.shape[1])))
        scaled = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for quality in _QUALITIES:
            encoded = cv2.imencode(".jpg", scaled, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
            if len(encoded) <= most:
                return Jpeg(encoded, size)
    return Jpeg(encoded, size)
