"""Which `readout_time` explains the matches of a recording best."""

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

_STEP = 0.004  # seconds between two times that are tried
_LONGEST = 0.072
_FEWEST = 10  # pairs
_ALIKE = 0.2  # part of its time by which that of the pair before may differ
_SURE = 0.008  # seconds
_RESAMPLED = 500  # times, with pairs drawn anew
_FLOOR = 0.02  # pixels: as exact as matches are, at best


class Readout(NamedTuple):
    """Seconds, with the 90 % interval from drawing the pairs anew."""

    best: float
    low: float
    high: float
    pairs: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval is narrow enough to choose a time by."""
        return self.high - self.low < _SURE


class ReadoutSearch:
    """Estimates each pose of one camera as if its images were read in so many seconds, and compares what is left.

    While the camera turns, matches of a rolling shutter's images are near one motion's epipolar lines only once the
    time is right. How large residuals are is compared by the logarithm of their median, for all matches of a pair.

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
        """The next frame."""
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
        """The motion with a readout, and the cost of what is left; infinite without a motion."""
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
        )
        if pose.status is not PoseStatus.OK:
            return None, math.inf
        motion = Motion(pose.rotation, pose.translation)
        residuals = residuals_read_at_once(*points, cameras[0], cameras[1], readout, motion, before)
        return motion, len(residuals) * math.log(math.hypot(float(np.median(np.abs(residuals))), _FLOOR))

    def found(self) -> Readout | None:
        """The time that explains all pairs best; None where there are too few."""
        if not self._costs:
            return None
        # Nothing is read for longer than until the next image.
        tried = self._times <= np.median(self._intervals)
        costs, times = np.array(self._costs)[:, tried], self._times[tried]
        costs = costs[np.isfinite(costs).all(axis=1)]
        if len(costs) < _FEWEST or len(times) < 3:
            return None
        drawn = np.random.default_rng(0).integers(len(costs), size=(_RESAMPLED, len(costs)))
        low, high = np.percentile([_lowest(times, costs[one].sum(axis=0)) for one in drawn], [5, 95])
        return Readout(_lowest(times, costs.sum(axis=0)), float(low), float(high), len(costs))

    def in_words(self) -> str:
        """What was found, and what to do."""
        found = self.found()
        if found is None:
            return (
                f"not known: fewer than {_FEWEST} pairs of one camera with a pose and a calibration follow each other"
            )
        interval = f"{found.best:.4f} s (90 %: {found.low:.4f} to {found.high:.4f}, {found.pairs} pairs)"
        if not found.is_sure:
            return f"not known: {interval}; the camera should turn more, and for longer"
        if found.low == 0.0:
            return f"{interval}: a global shutter, or one that makes no difference here"
        return f"{interval}: a rolling shutter; set readout_time to it"


def _lowest(times: np.ndarray, costs: np.ndarray) -> float:
    """Where the parabola through the lowest cost and its neighbours is lowest, seconds."""
    middle = int(np.clip(costs.argmin(), 1, len(costs) - 2))
    left, here, right = costs[middle - 1 : middle + 2]
    bend = left - 2 * here + right
    away = 0.5 * (left - right) / bend if bend > 0 else math.copysign(1.0, left - right)
    return float(np.clip(times[middle] + _STEP * np.clip(away, -1, 1), 0.0, times[-1]))
