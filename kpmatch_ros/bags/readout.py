"""Searches for the `readout_time` of a rolling shutter that explains the matches of a recording best."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kpmatch_ros.frames import Frame, Pair, Result
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.refinement import REFINED_RESOLUTION
from kpmatch_ros.geometry.rolling_shutter import residuals_read_at_once
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.geometry.two_view_errors import Motion
from kpmatch_ros.parameters import Parameters

__all__ = ["Readout", "ReadoutSearch"]

_STEP = 0.004  # seconds between two candidate times
_LONGEST = 0.072  # seconds; all candidates are shorter
_FEWEST = 10  # pairs
_ALIKE = 0.2  # largest difference of the previous pair's interval, as a fraction of this pair's
_SURE = 0.008  # seconds: width of the 90 % interval below which the result is trusted
_RESAMPLED = 500  # bootstrap samples
_FLOOR = 0.02  # pixels: matches are at best this accurate, so smaller residuals count for no more


class Readout(NamedTuple):
    """The best readout time and its 90 % bootstrap interval, in seconds, and the number of pairs."""

    best: float
    low: float
    high: float
    pairs: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval is narrow enough to set `readout_time` to the best time."""
        return self.high - self.low < _SURE


class ReadoutSearch:
    """Estimates each pose of one camera with several candidate readout times, and compares the residuals.

    While a camera with a rolling shutter turns, the matches agree with the epipolar geometry of one motion only if the
    readout time is right. The cost of a candidate for a pair is the number of its matches times the logarithm of their
    median absolute residual.

    Args:
        parameters: those of the replay.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._times = np.arange(0.0, _LONGEST, _STEP)
        self._costs: list[list[float]] = []
        self._intervals: list[float] = []  # seconds
        self._last: tuple[Frame | None, int, list[Motion | None]] = None, 0, []

    def add(self, result: Result, milliseconds: float) -> None:
        """Add the next frame. It is ignored unless it has an OK pose of one camera."""
        pair = result.pair
        if (
            pair is None
            or pair.current.stamp <= pair.reference.stamp
            or pair.pose.status is not PoseStatus.OK
            or pair.pose.metric
        ):
            return
        interval = pair.current.stamp - pair.reference.stamp
        end, before, motions = self._last
        follows = end is pair.reference and abs(before - interval) < _ALIKE * interval
        poses = [
            self._motion(pair, 1e9 * float(time) / interval, motions[number] if follows else None)
            for number, time in enumerate(self._times)
        ]
        self._last = pair.current, interval, [motion for motion, _ in poses]
        if follows:
            self._costs.append([cost for _, cost in poses])
            self._intervals.append(1e-9 * interval)

    def _motion(self, pair: Pair, readout: float, before: Motion | None) -> tuple[Motion | None, float]:
        """Estimate a pair's motion with one candidate.

        Args:
            pair: to estimate.
            readout: the candidate as a fraction of the pair's interval, 0 to 1.
            before: motion of the previous pair with the same candidate; None if it is not known.

        Returns:
            the motion, and its cost; None and infinity if the motion cannot be estimated.
        """
        cameras = pair.reference.camera, pair.current.camera
        if not 0 <= readout <= 1 or cameras[0] is None or cameras[1] is None:
            return None, math.inf
        points = pair.reference_points, pair.points
        pose = estimate_relative_pose(
            *points,
            *cameras,
            max_reprojection_error=self._parameters.max_reprojection_error,
            min_inliers=self._parameters.min_inliers,
            keypoint_resolution=REFINED_RESOLUTION,
            prior=before,
            readout=readout,
            before=before,
        )
        if pose.status is not PoseStatus.OK:
            return None, math.inf
        motion = Motion(pose.rotation, pose.translation)
        residuals = residuals_read_at_once(*points, cameras[0], cameras[1], readout, motion, before)
        return motion, len(residuals) * math.log(math.hypot(float(np.median(np.abs(residuals))), _FLOOR))

    def found(self) -> Readout | None:
        """The time that explains all pairs best; None if there are too few pairs."""
        if not self._costs:
            return None
        # Reading an image takes no longer than the interval to the next image.
        tried = self._times <= np.median(self._intervals)
        costs, times = np.array(self._costs)[:, tried], self._times[tried]
        costs = costs[np.isfinite(costs).all(axis=1)]
        if len(costs) < _FEWEST or len(times) < 3:
            return None
        drawn = np.random.default_rng(0).integers(len(costs), size=(_RESAMPLED, len(costs)))
        low, high = np.percentile([_lowest(times, costs[one].sum(axis=0)) for one in drawn], [5, 95])
        return Readout(_lowest(times, costs.sum(axis=0)), float(low), float(high), len(costs))

    def in_words(self) -> str:
        """The result and what the user should do, in words."""
        found = self.found()
        if found is None:
            if self._intervals and np.median(self._intervals) < self._times[2]:
                return f"not known: the frames follow each other in less than {self._times[2]:.3f} s"
            return (
                f"not known: fewer than {_FEWEST} pairs of one camera have a calibration and a pose, and directly "
                "follow another such pair"
            )
        interval = f"{found.best:.4f} s (90 %: {found.low:.4f} to {found.high:.4f}, {found.pairs} pairs)"
        if not found.is_sure:
            return f"not known: {interval}; the camera should turn more, and for longer"
        if found.low == 0.0:
            return f"{interval}: a global shutter, or a rolling shutter with no visible effect in this recording"
        return f"{interval}: a rolling shutter; set readout_time to it"


def _lowest(times: np.ndarray, costs: np.ndarray) -> float:
    """The minimum of the parabola through the lowest cost and its two neighbours, seconds."""
    middle = int(np.clip(costs.argmin(), 1, len(costs) - 2))
    left, here, right = costs[middle - 1 : middle + 2]
    bend = left - 2 * here + right
    away = 0.5 * (left - right) / bend if bend > 0 else math.copysign(1.0, left - right)
    return float(np.clip(times[middle] + _STEP * np.clip(away, -1, 1), 0.0, times[-1]))
