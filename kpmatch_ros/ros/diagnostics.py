"""The node's reports on /diagnostics and in its log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.lifecycle import LifecycleNode

from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.ros.monitor import Monitor, Problem
from kpmatch_ros.runtime.device import format_name, resident_memory
from kpmatch_ros.weights import REGISTRY

__all__ = ["Condition", "Diagnostics", "LoggingMonitor", "in_short", "log_weights", "next_step"]

_LONGEST = 600  # characters for one problem
_MOST_PROBLEMS = 6  # problems in one message
# The next step for a node that is not active.
_NEXT = {
    "unconfigured": "configure and activate the node to have it process images",
    "configuring": "loading the networks",
    "inactive": "activate the node to have it process images",
    "finalized": "it processes no more images; start it again",
}
_LOG_INTERVAL = 5.0  # seconds between two log lines of one kind of warning that may occur with every frame


@dataclass
class Condition:
    """The present condition of the node.

    Attributes:
        state: lifecycle state.
        fault: reason why the last transition failed; empty if it succeeded.
        hardware: the cameras, by their image topics.
        problems: the problems of an active node.
        matcher: the networks; None until they are loaded.
    """

    state: str
    fault: str
    hardware: str
    problems: list[Problem] = field(default_factory=list)
    matcher: FeatureMatcher | None = None


class Diagnostics:
    """Publishes diagnostics once a second, and immediately when a new problem occurs.

    Args:
        node: creates the publisher.
        monitor: provides the figures.
        condition: called for the present condition of the node.
    """

    def __init__(self, node: LifecycleNode, monitor: Monitor, condition: Callable[[], Condition]) -> None:
        self._node = node
        self._monitor = monitor
        self._condition = condition
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._told: set[str] = set()  # the kinds of problems in the last message
        self._told_early = False

    def every_second(self) -> None:
        """Publish the regular message."""
        stamp = self._now()
        self._publish(stamp, self._condition())
        self._told_early = False

    def watch(self) -> None:
        """Publish if there is a new kind of problem, at most once between two regular messages."""
        if self._told_early:
            return
        stamp, condition = self._now(), self._condition()
        if {problem.kind for problem in condition.problems} - self._told:
            self._told_early = True
            self._publish(stamp, condition)

    def _now(self) -> Any:
        """Return the current time. Taken before the condition, so a message includes all problems up to its stamp."""
        return self._node.get_clock().now().to_msg()

    def _publish(self, stamp: Any, condition: Condition) -> None:
        self._told = {problem.kind for problem in condition.problems}
        level, text = _assess(condition, self._monitor.is_receiving)
        values = {"state": condition.state, **self._monitor.values(), **_resources(condition.matcher)}
        array = DiagnosticArray()
        array.header.stamp = stamp
        array.status = [
            DiagnosticStatus(
                level=level,
                name=f"{self._node.get_fully_qualified_name().lstrip('/')}: feature matching",
                message=text,
                hardware_id=condition.hardware,
                values=[KeyValue(key=key, value=value) for key, value in values.items()],
            )
        ]
        self._publisher.publish(array)


class LoggingMonitor(Monitor):
    """A monitor that also writes warnings into the node's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger
        self._doubts: set[str] = set()  # kinds logged so far; each is logged once, and diagnostics repeat it

    def rejected(self, reason: str, explanation: str) -> None:
        super().rejected(reason, explanation)
        self._logger.warning(explanation, throttle_duration_sec=_LOG_INTERVAL)

    def overflowed(self, frames: int, explanation: str) -> None:
        super().overflowed(frames, explanation)
        self._logger.warning(explanation, throttle_duration_sec=_LOG_INTERVAL)

    def calibration_refused(self, reason: str, explanation: str) -> None:
        super().calibration_refused(reason, explanation)
        self._logger.warning(explanation, throttle_duration_sec=_LOG_INTERVAL)

    def doubted(self, kind: str, explanation: str) -> None:
        super().doubted(kind, explanation)
        if kind not in self._doubts:
            self._doubts.add(kind)
            self._logger.warning(explanation)

    def interrupted(self, explanation: str) -> None:
        super().interrupted(explanation)
        # Two cameras on one topic interrupt each other with every frame.
        self._logger.warning(explanation, throttle_duration_sec=_LOG_INTERVAL)


def log_weights(logger: Any, matcher: FeatureMatcher) -> None:
    """Log the loaded weights, their licence terms, and the device that they run on."""
    for role in ("extractor", "matcher"):
        name = getattr(matcher.parameters, role)
        if name in REGISTRY:
            terms = REGISTRY[name].terms
        else:
            terms = "no network" if name == "nearest" else "licence unknown: check where it comes from"
        logger.info(f"{role} {name} ({terms})")
    if matcher.onnx is None:
        logger.info(f"on {matcher.device} in {format_name(matcher.dtype)}")
        return
    logger.info(f"in onnxruntime on {', '.join(matcher.onnx.providers)}")
    if matcher.onnx.note:
        logger.warning(matcher.onnx.note)


def next_step(state: str) -> str:
    """Return the state of a node that is not active, and what to do so that it processes images."""
    return f"{state}: {_NEXT[state]}"


def _assess(condition: Condition, is_receiving: bool) -> tuple[bytes, str]:
    """Return level and text of the status. ``is_receiving`` says whether frames arrive."""
    if condition.fault:
        return DiagnosticStatus.ERROR, _cut(condition.fault)
    if condition.state != "active":
        return DiagnosticStatus.OK, next_step(condition.state)
    if condition.problems:
        return DiagnosticStatus.WARN, in_short(condition.problems)
    return DiagnosticStatus.OK, "matching" if is_receiving else "waiting for images"


def in_short(problems: list[Problem]) -> str:
    """Return one sentence per kind of problem, limited in length and in number."""
    sentences = {problem.kind: problem.explanation for problem in problems}
    texts = list(dict.fromkeys(_cut(" ".join(text.split())) for text in sentences.values()))
    left_out = [f"and {len(texts) - _MOST_PROBLEMS} other problems"] if len(texts) > _MOST_PROBLEMS else []
    return "; ".join(texts[:_MOST_PROBLEMS] + left_out)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]} …"


def _resources(matcher: FeatureMatcher | None) -> dict[str, str]:
    values = {"resident memory (MB)": f"{resident_memory() / 1e6:.0f}"}
    if matcher is not None:
        values["device"] = str(matcher.device)
        values["precision"] = format_name(matcher.dtype)
        values["repeated in float32"] = str(matcher.repeated_in_float32)
        values["extractor"] = matcher.parameters.extractor
        values["matcher"] = matcher.parameters.matcher
        values |= matcher.confidences()
        if matcher.onnx is not None:
            values["onnxruntime"] = matcher.onnx.note or f"on {', '.join(matcher.onnx.providers)}"
        if matcher.device.type == "cuda":
            values["GPU"] = torch.cuda.get_device_name(matcher.device)
            if matcher.graphs is not None and matcher.graphs.failure:
                values["CUDA graphs"] = f"none, so the networks run slower: {_cut(matcher.graphs.failure)}"
            values["GPU memory (MB)"] = f"{torch.cuda.memory_allocated(matcher.device) / 1e6:.0f}"
    return values
