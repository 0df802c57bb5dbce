"""Which frames become the reference that the next ones are matched with."""

from __future__ import annotations

import numpy as np

from kpmatch_ros.frames import Pair
from kpmatch_ros.parameters import Parameters

__all__ = ["ReferenceChoice"]


_REFERENCE = 0  # of a pair's images


class ReferenceChoice:
    """Decides of frame after frame whether it becomes the reference, by the parameter `reference`."""

    def __init__(self) -> None:
        self._shown_at: int | None = None  # the last frame in which there was something to see, nanoseconds
        self._is_lost = False  # the frame before

    def reset(self) -> None:
        """Forget the frames so far."""
        self._shown_at = None
        self._is_lost = False

    def takes(self, pair: Pair, parameters: Parameters) -> bool:
        """Whether the current frame of a pair becomes the reference. To be asked of every pair, in order."""
        was_lost, self._is_lost = self._is_lost, _is_lost(pair)
        if self._shows_nothing(pair, parameters):
            return False
        if pair.current.is_calibrated and not pair.reference.is_calibrated:
            return True  # with the reference of before no frame would have a pose
        if pair.smeared == _REFERENCE:
            return True
        if self._is_lost and not was_lost:
            return False  # a blurred or covered image, or a bad pair of them: the next one may go on where it could not
        if parameters.reference == "previous" or len(pair.indices) < parameters.keyframe_min_matches:
            return True
        if pair.pose.status.has_pose:
            parallax = pair.pose.median_parallax
        else:
            parallax = float(np.median(np.linalg.norm(pair.points - pair.reference_points, axis=1)))
        return parallax > parameters.keyframe_max_parallax

    def _shows_nothing(self, pair: Pair, parameters: Parameters) -> bool:
        """Whether the current image is dark, covered or blank, so that matching goes on better with the reference.

        The reference stays for as long as a gap between frames may be.
        """
        if len(pair.current.keypoints) >= min(parameters.min_inliers, len(pair.reference.keypoints)):
            self._shown_at = pair.current.stamp
            return False
        since = pair.reference.stamp if self._shown_at is None else self._shown_at
        return not 0 < parameters.max_gap < (pair.current.stamp - since) * 1e-9


def _is_lost(pair: Pair) -> bool:
    """Whether nothing places the current frame beside its reference, which could be placed."""
    return pair.smeared is not None or (pair.reference.is_calibrated and not pair.pose.is_placed)
