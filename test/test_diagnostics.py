"""Tests of the times of diagnostics messages, and of the publishers' queue depths for slow subscribers, without DDS."""

from __future__ import annotations

import itertools
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

from kpmatch_ros.parameters import Parameters
from kpmatch_ros.ros.diagnostics import Condition, Diagnostics
from kpmatch_ros.ros.monitor import Monitor, Problem
from kpmatch_ros.ros.outputs import Outputs
from kpmatch_ros.ros.senders import Senders, listed


class FakeNode:
    """Publishes for the diagnostics: stores the messages and each topic's quality of service, and has a clock."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.depths: dict[str, int] = {}
        self._times = itertools.count()

    def create_publisher(self, kind: type, topic: str, depth: int) -> Any:
        return SimpleNamespace(publish=self.said.append)

    def create_lifecycle_publisher(self, kind: type, topic: str, qos: Any, **options: Any) -> Any:
        self.depths[topic] = qos.depth
        return SimpleNamespace(topic_name=topic)

    def resolve_topic_name(self, name: str) -> str:
        return name

    def get_logger(self) -> Any:
        return SimpleNamespace(warning=lambda text, **options: None)

    def get_clock(self) -> Any:
        from builtin_interfaces.msg import Time

        now = Time(sec=next(self._times))
        return SimpleNamespace(now=lambda: SimpleNamespace(to_msg=lambda: now))

    def get_fully_qualified_name(self) -> str:
        return "/matcher"


def test_a_new_problem_is_published_at_once_but_only_once_between_regular_messages() -> None:
    node, wrong = FakeNode(), []
    monitor = Monitor()
    diagnostics = Diagnostics(node, monitor, lambda: Condition("active", "", "", list(wrong)))  # type: ignore[arg-type]

    def published_texts() -> list[str]:
        messages = [array.status[0].message for array in node.said]
        node.said.clear()
        return messages

    diagnostics.every_second()
    monitor.received()
    diagnostics.every_second()
    diagnostics.watch()
    assert published_texts() == ["waiting for images", "matching"], "nothing is new"
    wrong.append(Problem("one", "the first"))
    diagnostics.watch()
    diagnostics.watch()
    assert published_texts() == ["the first"]
    wrong.append(Problem("two", "the second"))
    diagnostics.watch()
    assert published_texts() == [], "one early message was sent already"
    diagnostics.every_second()
    diagnostics.watch()
    assert published_texts() == ["the first; the second"]
    wrong.append(Problem("three", "the third"))
    diagnostics.watch()
    assert published_texts() == ["the first; the second; the third"]


def test_a_problem_of_every_frame_does_not_accumulate_memory() -> None:
    monitor = Monitor()
    tracemalloc.start()
    try:
        for number in range(100):
            monitor.rejected("size", f"{number}" + " " * 10**6)
            monitor.doubted("frame", f"{number}" + " " * 10**6)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 5 * 10**6
    reported = [(problem.kind, problem.explanation.strip()) for problem in monitor.problems()]
    assert reported == [("rejected: size", "99"), ("frame", "99")]


def test_a_message_contains_all_problems_before_its_stamp() -> None:
    node = FakeNode()
    times_of_requests: list[int] = []

    def condition() -> Condition:
        times_of_requests.append(node.get_clock().now().to_msg().sec)
        return Condition("active", "", "", [Problem(str(len(times_of_requests)), "odd")])

    diagnostics = Diagnostics(node, Monitor(), condition)  # type: ignore[arg-type]
    diagnostics.every_second()
    diagnostics.watch()
    assert len(node.said) == 2
    assert all(array.header.stamp.sec < when for array, when in zip(node.said, times_of_requests))


def test_a_publisher_of_a_node_of_unknown_name_is_not_a_second_sender() -> None:
    camera = SimpleNamespace(node_name="camera", node_namespace="/", endpoint_gid=[1])
    restarted = SimpleNamespace(
        node_name="_NODE_NAME_UNKNOWN_", node_namespace="_NODE_NAMESPACE_UNKNOWN_", endpoint_gid=[2]
    )
    assert Senders().on("/image", [camera, restarted]) == ["/camera"]
    assert listed(["/camera", "", "/camera"]) == "/camera, a node of unknown name"


@pytest.mark.parametrize(("queue", "least"), [("latest", 1), ("all", 50)])
def test_with_queue_all_the_publishers_keep_50_messages_for_slow_subscribers(queue: str, least: int) -> None:
    node = FakeNode()
    Outputs(node, Parameters(queue=queue, mode="stereo", publish_odometry=True, device="cpu"))  # type: ignore[arg-type]
    del node.depths["match_image"]  # a picture for viewing: only the newest matters
    assert {"features", "landmarks", "matches", "stereo_matches", "relative_pose", "odometry"} <= set(node.depths)
    assert min(node.depths.values()) >= least, node.depths
