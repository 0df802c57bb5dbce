"""Tests of the bond with nav2's lifecycle manager, with a substitute for bondpy, and with the real one if installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lifecycle_msgs.srv import ChangeState
from std_msgs.msg import String

from kpmatch_ros.ros import manager_bond
from kpmatch_ros.ros.manager_bond import ManagerBond
from node_harness import SMALL, NodeUnderTest, running_node

# It has the interface of bondpy's Bond, but not its messages, which are in the package bond.
FAKE_BONDPY = """
from std_msgs.msg import String

class Bond:
    def __init__(self, node, topic, bond_id, on_broken=None, on_formed=None):
        self.node, self.id = node, bond_id
        self.sub = node.create_subscription(String, "bond_of_the_manager", lambda message: None, 1)
        self.pub = node.create_publisher(String, topic, 10)

    def set_heartbeat_period(self, period):
        self.period = period

    def set_heartbeat_timeout(self, timeout):
        self.timeout = timeout

    def start(self):
        self.timer = self.node.create_timer(self.period, lambda: self.say("alive"))

    def say(self, what):
        self.pub.publish(String(data=f"{self.id} {what} {self.timeout}"))

    def shutdown(self):
        self.timer.cancel()
        self.say("dead")
        self.sub.destroy()
"""


def change(node: NodeUnderTest, transition: str) -> None:
    """Request a transition, as a lifecycle manager does."""
    request = ChangeState.Request()
    request.transition.label = transition
    assert node.call(ChangeState, "matcher/change_state", request).success, node.log


@pytest.fixture
def fake_bondpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the node find the substitute for bondpy. Returns its file."""
    package = tmp_path / "modules" / "bondpy"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bondpy.py").write_text(FAKE_BONDPY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    return package / "bondpy.py"


@pytest.mark.usefixtures("fake_bondpy")
def test_a_managed_node_has_a_bond_under_its_name_while_it_is_active(tmp_path: Path) -> None:
    with running_node(tmp_path, autostart=False, bond_heartbeat_period=0.05, matcher="nearest", **SMALL) as node:
        heard: list[str] = []
        node.subscribe(String, "bond", lambda message: heard.append(message.data))
        node.wait_for(node.is_discovered, "the node")
        change(node, "configure")
        node.spin(0.3)
        assert not heard
        for _ in range(2):
            change(node, "activate")
            node.wait_for(lambda: len(heard) > 5, "heartbeats")
            assert set(heard) == {"matcher alive 4.0"}
            change(node, "deactivate")
            node.wait_for(lambda: heard[-1] == "matcher dead 4.0", "the end of the bond")
            heard.clear()
            node.spin(0.3)
            assert not heard
        change(node, "activate")
        node.wait_for(lambda: heard, "heartbeats")
        assert node.stop() == 0, node.log


def test_a_bondpy_that_destroys_its_publisher_does_not_disturb_the_transitions(
    fake_bondpy: Path, tmp_path: Path
) -> None:
    fake_bondpy.write_text(FAKE_BONDPY + "        self.pub.destroy()\n")  # as bondpy 4.0 does
    with running_node(tmp_path, autostart=False, bond_heartbeat_period=0.05, matcher="nearest", **SMALL) as node:
        node.wait_for(node.is_discovered, "the node")
        change(node, "configure")
        for _ in range(2):
            change(node, "activate")
            node.spin(0.3)
            change(node, "deactivate")
        change(node, "cleanup")
        assert node.stop() == 0, node.log


@pytest.mark.usefixtures("fake_bondpy")
def test_a_node_with_autostart_has_no_bond(tmp_path: Path) -> None:
    with running_node(tmp_path, matcher="nearest", **SMALL) as node:
        node.wait_until_connected()
        assert not node.node.count_publishers("bond")


class FakeNode:
    """The part of a node that a bond uses."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def get_name(self) -> str:
        return "matcher"

    def get_logger(self) -> Any:
        return SimpleNamespace(info=self.said.append)


def test_without_bondpy_the_node_says_what_the_manager_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_bond, "Bond", None)
    node = FakeNode()
    bond = ManagerBond(node)
    bond.form(0.1)
    bond.release()
    (said,) = node.said
    assert "bondpy is not installed" in said and "Set bond_timeout of nav2's lifecycle manager to 0.0" in said


def test_a_period_of_zero_makes_no_bond(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*values: Any, **named: Any) -> None:
        raise AssertionError("a bond was made")

    monkeypatch.setattr(manager_bond, "Bond", refuse)
    ManagerBond(FakeNode()).form(0.0)


@pytest.mark.skipif(importlib.util.find_spec("bondpy") is None, reason="needs bondpy, which has no wheels")
def test_a_manager_with_bondpy_forms_a_bond_and_notices_a_kill(tmp_path: Path) -> None:
    from bondpy.bondpy import Bond

    with running_node(tmp_path, autostart=False, matcher="nearest", **SMALL) as node:
        node.wait_for(node.is_discovered, "the node")
        change(node, "configure")
        change(node, "activate")
        events: list[str] = []
        bond = Bond(node.node, "bond", "matcher", lambda: events.append("broken"), lambda: events.append("formed"))
        bond.set_heartbeat_timeout(4.0)
        bond.start()
        node.wait_for(lambda: events == ["formed"], "the bond", 10)
        node.spin(5.0)
        assert events == ["formed"]
        node.process.send_signal(signal.SIGKILL)
        node.process.wait()
        end = time.monotonic() + 8.0
        while events == ["formed"] and time.monotonic() < end:
            node.spin(0.1)
        assert events == ["formed", "broken"]
        bond.shutdown()
