"""What a pipeline reports besides its messages."""

from __future__ import annotations

from typing import Protocol

from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["Events"]


class Events(Protocol):
    """What a pipeline reports besides its messages.

    Explanations are for the user. Reasons are short and stable: they name counters.
    """

    def rejected(self, reason: str, explanation: str) -> None:
        """A frame could not be used."""

    def calibration_refused(self, reason: str, explanation: str) -> None:
        """A frame was processed without its calibration, which could not be used."""

    def doubted(self, kind: str, explanation: str) -> None:
        """A frame was processed, but something about it is hardly meant so. The kind is short and stable."""

    def interrupted(self, explanation: str) -> None:
        """The frames' times jumped. Features and tracks were forgotten."""

    def unpaired(self, topic: str, images: int, explanation: str) -> None:
        """Images of one camera of a stereo pair found no partner."""

    def stamp_fault(self, fault: str, topic: str, explanation: str) -> None:
        """An image's stamp says nothing of its time. The fault is "zero stamps" or "repeated stamps"."""

    def mask_fault(self, fault: str, topic: str, explanation: str) -> None:
        """An image was processed without its mask, its mask is odd, or masks meet no image. The fault is stable."""

    def pose(self, status: PoseStatus) -> None:
        """A pose was published."""

    def matched(self, fault: str) -> None:
        """A frame was matched. The fault says why next to nothing came of it; it is empty where that is not so."""

    def odometry(self, breaks: int, explanation: str) -> None:
        """A pose was added to the odometry, whose chain broke so many times. The explanation is for a new break."""
