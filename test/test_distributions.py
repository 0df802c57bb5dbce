"""Tests of differences between ROS 2 distributions, as far as they can be shown on this one (docs/distributions.md)."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from domain_coordinator import domain_id

rclpy = pytest.importorskip("rclpy")
from sensor_msgs.msg import Image  # noqa: E402

from kpmatch_ros.ros import qos  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def ignore(message: Image) -> None:
    pass


@pytest.fixture
def node() -> Iterator[Any]:
    """A node in a separate domain."""
    with domain_id() as domain:
        context = rclpy.Context()
        rclpy.init(args=[], context=context, domain_id=domain)
        node = rclpy.create_node("camera", context=context)
        yield node
        node.destroy_node()
        rclpy.shutdown(context=context)


def test_the_node_works_with_a_middleware_without_events(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_event_handlers(self: Any, group: Any, entity: Any, topic: str) -> list[Any]:
        if self.incompatible_qos is not None or self.use_default_callbacks:
            raise qos.UnsupportedEventTypeError("as rclpy of Humble does")
        return []

    for kind in (qos.SubscriptionEventCallbacks, qos.PublisherEventCallbacks):
        monkeypatch.setattr(kind, "create_event_handlers", create_event_handlers)
    heard = qos.SubscriptionEventCallbacks(incompatible_qos=print, use_default_callbacks=False)
    offered = qos.PublisherEventCallbacks(incompatible_qos=print, use_default_callbacks=False)
    for _ in range(2):  # the first pass declares the parameters for overrides
        subscription = qos.with_events(
            node.create_subscription, Image, "image", ignore, 1,
            event_callbacks=heard, qos_overriding_options=qos.overridable(),
        )  # fmt: skip
        publisher = qos.with_events(
            node.create_publisher, Image, "image", 1,
            event_callbacks=offered, qos_overriding_options=qos.overridable(),
        )  # fmt: skip
    assert subscription.topic_name == publisher.topic_name == "/image"
    assert subscription.event_handlers == publisher.event_handlers == []


def test_events_are_used_if_the_middleware_has_them(node: Any) -> None:
    heard = qos.SubscriptionEventCallbacks(incompatible_qos=print, use_default_callbacks=False)
    subscription = qos.with_events(node.create_subscription, Image, "image", ignore, 1, event_callbacks=heard)
    assert len(subscription.event_handlers) == 1


def test_the_event_module_is_found_under_its_name_in_humble(monkeypatch: pytest.MonkeyPatch) -> None:
    humbles = ModuleType("rclpy.qos_event")
    for name in ("PublisherEventCallbacks", "SubscriptionEventCallbacks", "UnsupportedEventTypeError"):
        setattr(humbles, name, type(name, (Exception,), {}))
    monkeypatch.setitem(sys.modules, "rclpy.qos_event", humbles)
    monkeypatch.setitem(sys.modules, "rclpy.event_handler", None)  # makes the import raise ImportError
    spec = importlib.util.spec_from_file_location("qos_on_humble", qos.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SubscriptionEventCallbacks is humbles.SubscriptionEventCallbacks


def test_the_kilted_environment_differs_only_in_its_ros_packages() -> None:
    """It has the versions of requirements-dev.txt, and only known ROS packages are missing."""
    lines = (ROOT / "requirements-kilted.txt").read_text().splitlines()
    assert "-c requirements-dev.txt" in lines
    pinned = [line for line in lines if "==" in line]
    assert {re.split("[-=]", line)[0] for line in pinned} == {"ros"}
    first = re.findall(r"^ros-jazzy-([\w-]+)==", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    second = re.findall(r"^ros-kilted-([\w-]+)==", "\n".join(lines), re.MULTILINE)
    assert set(first) - set(second) == {
        "domain-coordinator",
        "fastrtps",
        "fastrtps-cmake-module",
        "python-cmake-module",
    }
    assert {"rclpy", "rosidl-default-generators"} <= set(second)
    wanted = re.findall(r"^([A-Za-z][\w-]+)$", "\n".join(lines), re.MULTILINE)
    development = (ROOT / "requirements-dev.txt").read_text()
    assert not [name for name in wanted if not re.search(rf"^{re.escape(name)}==", development, re.MULTILINE)]
