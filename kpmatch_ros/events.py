"""The interface through which a pipeline reports events."""

from __future__ import annotations

from typing import Protocol

from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["Events"]


class Events(Protocol):
    """Receives a pipeline's reports.

    Explanations are texts for the user. Reasons, kinds and faults are short and stable, because they name counters.
    """

    def rejected(self, reason: str, explanation: str) -> None:
        """A frame could not be used."""

    def calibration_refused(self, reason: str, explanation: str) -> None:
        """A frame was processed without its calibration, which could not be used."""

    def doubted(self, kind: str, explanation: str) -> None:
        """A frame was processed, but something about it is suspicious."""

    def interrupted(self, explanation: str) -> None:
        """A frame could not continue the sequence. Features and tracks were discarded."""

    def unpaired(self, topic: str, images: int, explanation: str) -> None:
        """Images of one camera of a stereo pair have no partner."""

    def stamp_fault(self, fault: str, topic: str, explanation: str) -> None:
        """The stamp of an image is not its time. The fault is "zero stamps" or "repeated stamps"."""

    def mask_fault(self, fault: str, topic: str, explanation: str) -> None:
        """An image was processed without its mask, its mask hides everything, or too many masks wait for an image."""

    def pose(self, status: PoseStatus) -> None:
        """A pose was published."""

    def matched(self, fault: str) -> None:
        """A frame was matched. A non-empty fault says why there are too few keypoints or matches."""

    def odometry(self, breaks: int, explanation: str) -> None:
        """A pose was added to the odometry, whose chain has broken ``breaks`` times. The text explains a new break."""
