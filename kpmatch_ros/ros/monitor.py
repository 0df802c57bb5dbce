"""Counts frames and measures rates and latencies, and remembers recent problems. Does not depend on ROS."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kpmatch_ros.frames import ImagePair, Result
from kpmatch_ros.geometry.pose import PoseStatus

__all__ = ["Monitor", "Problem"]


_NO_MATCHES_AFTER = 1.0  # seconds of frames with hardly any match before a warning


class Problem(NamedTuple):
    """A problem to report."""

    kind: str  # a stable name
    explanation: str  # text for the user; its figures may change from call to call


class Monitor:
    """Counts frames and remembers the last seconds. Thread-safe.

    Every received frame is counted as exactly one of processed, dropped and rejected, unless it is still waiting.

    Args:
        window: period that rates, percentiles and problems cover, seconds.
        clock: returns monotonic time, seconds.
    """

    def __init__(self, window: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._lock = threading.Lock()
        self._received = 0
        self._processed = 0
        self._dropped = 0
        self._rejected = 0
        self._faults: Counter[str] = Counter()
        self._interruptions = 0
        self._odometry_breaks: int | None
        self._answered: Counter[str] = Counter()
        self._no_matches: tuple[float, float, str] | None  # begin and end of a period without matches, and the reason
        # By kind, only the last one with its time: every frame may cause a problem, and explanations may be long.
        self._failures: dict[str, tuple[float, Problem]] = {}
        self._arrivals: deque[float] = deque()
        self._latencies: deque[tuple[float, float]] = deque()
        self._statuses: Counter[str] = Counter()
        self._last: dict[str, str]
        self.configured()

    def configured(self) -> None:
        """Record that a new pipeline was created. Discards the values of the old one's last pair; counters continue."""
        with self._lock:
            self._last = dict.fromkeys(("keypoints", "matches", "inlier ratio", "layers"), "")
            self._odometry_breaks = None
            self._no_matches = None

    def received(self) -> None:
        """Count a frame that arrived."""
        with self._lock:
            self._received += 1
            self._arrivals.append(self._clock())

    @property
    def is_receiving(self) -> bool:
        """Whether a frame has arrived within the last `window` seconds."""
        with self._lock:
            return bool(self._arrivals) and self._arrivals[-1] >= self._clock() - self._window

    def dropped(self, frames: int = 1) -> None:
        """Count frames that were displaced by a newer one or left over when the node stopped."""
        with self._lock:
            self._dropped += frames

    def overflowed(self, frames: int, explanation: str) -> None:
        """Count frames that were dropped with queue 'all', because too many were waiting."""
        with self._lock:
            self._dropped += frames
            self._fail("queue full", explanation)

    def rejected(self, reason: str, explanation: str) -> None:
        """Count a frame that could not be used.

        Args:
            reason: short stable text that names the counter.
            explanation: text for the user.
        """
        with self._lock:
            self._rejected += 1
            self._count(f"rejected: {reason}", explanation)

    def calibration_refused(self, reason: str, explanation: str) -> None:
        """Count a frame that was processed without its calibration, which could not be used."""
        with self._lock:
            self._count(f"camera_info refused: {reason}", explanation)

    def interrupted(self, explanation: str) -> None:
        """Count an interruption of the sequence, after which features and tracks were discarded."""
        with self._lock:
            self._interruptions += 1
            self._no_matches = None
            self._fail("interruption", explanation)

    def pose(self, status: PoseStatus) -> None:
        """Count a published pose by its status."""
        with self._lock:
            self._statuses[status.name] += 1

    def unpaired(self, topic: str, images: int, explanation: str) -> None:
        """Count images of a stereo pair's camera that found no partner. They do not count as frames."""
        with self._lock:
            self._count(f"unpaired: {topic}", explanation, images)

    def stamp_fault(self, fault: str, topic: str, explanation: str) -> None:
        """Count an image whose stamp is not its time (zero or repeated)."""
        with self._lock:
            self._count(f"{fault}: {topic}", explanation)

    def doubted(self, kind: str, explanation: str) -> None:
        """Record that something about a frame is suspicious."""
        with self._lock:
            self._fail(kind, explanation)

    def mask_fault(self, fault: str, topic: str, explanation: str) -> None:
        """Count an image without its mask or with a mask that hides everything, or a mask that was dropped."""
        with self._lock:
            self._count(f"{fault}: {topic}", explanation)

    def message_lost(self, topic: str, explanation: str) -> None:
        """Count a message whose callback failed: in rclpy's own subscriptions, as to /clock, or in this program."""
        with self._lock:
            self._count(f"messages left out: {topic}", explanation)

    def matched(self, fault: str) -> None:
        """Record that a frame was matched. A non-empty fault says why there are too few keypoints or matches."""
        with self._lock:
            now = self._clock()
            self._no_matches = (now if self._no_matches is None else self._no_matches[0], now, fault) if fault else None

    def odometry(self, breaks: int, explanation: str) -> None:
        """Record the number of breaks in the odometry chain after a pose was added, and explain a new break."""
        with self._lock:
            if breaks > (self._odometry_breaks or 0):
                self._fail("odometry break", explanation)
            self._odometry_breaks = breaks

    def answered(self, refusal: str) -> None:
        """Count an answered request to match features. A non-empty refusal is the reason why it was refused."""
        with self._lock:
            self._answered["refused" if refusal else "answered"] += 1

    def processed(self, latency_ms: float, result: Result) -> None:
        """Count a processed frame, with its latency from arrival to publication."""
        with self._lock:
            if result.stereo is not None:
                self._last["stereo matches"] = str(len(result.stereo.indices))
                self._last["stereo inlier ratio"] = _inlier_ratio(result.stereo)
            self._processed += 1
            self._latencies.append((self._clock(), latency_ms))
            self._last["keypoints"] = str(len(result.frame.keypoints))
            if result.pair is not None:
                self._last["matches"] = str(len(result.pair.indices))
                self._last["inlier ratio"] = _inlier_ratio(result.pair)
                self._last["layers"] = str(result.pair.layers)

    def problems(self) -> list[Problem]:
        """Return the problems of the last `window` seconds, the newest of each kind."""
        with self._lock:
            self._forget()
            found = {kind: problem for kind, (_, problem) in self._failures.items()}
            if self._no_matches is not None:
                since, last, why = self._no_matches
                if last - since >= _NO_MATCHES_AFTER and self._clock() - last <= self._window:
                    kind = "nothing matches"
                    found[kind] = Problem(kind, f"nothing has matched for {last - since:.0f} s: {why}")
            return list(found.values())

    def values(self) -> dict[str, str]:
        """Return all figures as text, by name."""
        with self._lock:
            self._forget()
            latencies = [latency for _, latency in self._latencies]
            values = {
                "frames received": str(self._received),
                "frames processed": str(self._processed),
                "frames dropped": str(self._dropped),
                "frames rejected": str(self._rejected),
                "frames waiting": str(self._received - self._processed - self._dropped - self._rejected),
                "input rate (Hz)": f"{len(self._arrivals) / self._window:.2f}",
                "output rate (Hz)": f"{len(self._latencies) / self._window:.2f}",
            }
            for percentile in (50, 95, 99):
                figure = f"{np.percentile(latencies, percentile):.1f}" if latencies else ""
                values[f"latency, {percentile}th percentile (ms)"] = figure
            values.update(self._last)
            values.update((fault, str(count)) for fault, count in sorted(self._faults.items()))
            values["interruptions"] = str(self._interruptions)
            if self._odometry_breaks is not None:
                values["odometry breaks"] = str(self._odometry_breaks)
            for answer, count in sorted(self._answered.items()):
                values[f"match_features {answer}"] = str(count)
            for status in PoseStatus:
                values[f"poses {status.name}"] = str(self._statuses[status.name])
            return values

    def _count(self, fault: str, explanation: str, times: int = 1) -> None:
        self._faults[fault] += times
        self._fail(fault, explanation)

    def _fail(self, kind: str, explanation: str) -> None:
        self._failures[kind] = self._clock(), Problem(kind, explanation)

    def _forget(self) -> None:
        limit = self._clock() - self._window
        while self._arrivals and self._arrivals[0] < limit:
            self._arrivals.popleft()
        while self._latencies and self._latencies[0][0] < limit:
            self._latencies.popleft()
        self._failures = {kind: timed for kind, timed in self._failures.items() if timed[0] >= limit}


def _inlier_ratio(pair: ImagePair) -> str:
    """Return the inlier ratio, or an empty text if inliers are unknown, as without calibration.

    A ratio of 0 would claim that all matches are wrong.
    """
    return "" if pair.inliers is None else f"{pair.inlier_ratio:.3f}"
