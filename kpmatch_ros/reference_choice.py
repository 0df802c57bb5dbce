"""Chooses the frames that become the reference for matching later frames."""

from __future__ import annotations

import numpy as np

from kpmatch_ros.frames import Pair
from kpmatch_ros.parameters import Parameters

__all__ = ["ReferenceChoice"]


_REFERENCE = 0  # value of Pair.smeared for the reference image


class ReferenceChoice:
    """Decides for each frame whether it becomes the reference, by the parameter `reference`."""

    def __init__(self) -> None:
        self._shown_at: int | None = None  # stamp of the last frame with enough keypoints, nanoseconds
        self._is_lost = False  # whether the previous frame could not be placed

    def reset(self) -> None:
        """Discard the state."""
        self._shown_at = None
        self._is_lost = False

    def becomes_reference(self, pair: Pair, parameters: Parameters) -> bool:
        """Whether the current frame of a pair becomes the reference. To be called for every pair, in order."""
        was_lost, self._is_lost = self._is_lost, _is_lost(pair)
        if self._shows_nothing(pair, parameters):
            return False
        if pair.current.is_calibrated and not pair.reference.is_calibrated:
            return True  # with an uncalibrated reference, no later frame would have a pose
        if pair.smeared == _REFERENCE:
            return True
        if len(pair.reference.keypoints) < parameters.min_inliers <= len(pair.current.keypoints):
            return True  # the reference shows nothing, so no later image can match it
        if self._is_lost and not was_lost:
            return False  # the image may be blurred or covered: the next one may match the present reference again
        if parameters.reference == "previous" or len(pair.indices) < parameters.keyframe_min_matches:
            return True
        if pair.pose.status.has_pose:
            parallax = pair.pose.median_parallax
        else:
            parallax = float(np.median(np.linalg.norm(pair.points - pair.reference_points, axis=1)))
        return parallax > parameters.keyframe_max_parallax

    def _shows_nothing(self, pair: Pair, parameters: Parameters) -> bool:
        """Whether the current image has too few keypoints (dark, covered or blank), so the reference should stay.

        It stays for at most `max_gap`.
        """
        if len(pair.current.keypoints) >= min(parameters.min_inliers, len(pair.reference.keypoints)):
            self._shown_at = pair.current.stamp
            return False
        since = pair.reference.stamp if self._shown_at is None else self._shown_at
        return not 0 < parameters.max_gap < (pair.current.stamp - since) * 1e-9


def _is_lost(pair: Pair) -> bool:
    """Whether the current frame could not be placed relative to its reference, although it should be possible."""
    return pair.smeared is not None or (pair.reference.is_calibrated and not pair.pose.is_placed)
