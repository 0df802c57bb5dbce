"""Tests of requests that the node's services must refuse and survive, with the real node over DDS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builtin_interfaces.msg import Time
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.srv import (
    DescribeParameters,
    GetParameters,
    GetParameterTypes,
    ListParameters,
    SetParameters,
    SetParametersAtomically,
)
from rclpy.parameter import Parameter
from rosgraph_msgs.msg import Clock

from node_harness import SMALL, NodeUnderTest, running_node

MANY = 20_000


def ask(node: NodeUnderTest, kind: type, name: str, request: Any) -> Any:
    """Return the answer of one of the node's services."""
    return node.call(kind, f"matcher/{name}", request)


def state(node: NodeUnderTest) -> str:
    return ask(node, GetState, "get_state", GetState.Request()).current_state.label


def typed(name: str, kind: int) -> ParameterMessage:
    message = ParameterMessage(name=name)
    message.value.type = kind
    return message


def test_a_transition_that_is_not_allowed_is_refused_by_id_and_by_label(tmp_path: Path) -> None:
    with running_node(tmp_path, matcher="nearest", **SMALL) as node:
        node.wait_until_connected()
        for number in (1, 2, 3, 10, 50, 99, 255):  # configure, cleanup and activate are transitions of other states
            request = ChangeState.Request()
            request.transition.id = number
            assert not ask(node, ChangeState, "change_state", request).success
            assert state(node) == "active"
        request = ChangeState.Request()
        request.transition.label = "configure"
        assert not ask(node, ChangeState, "change_state", request).success
        request.transition.label, request.transition.id = "", 4
        assert ask(node, ChangeState, "change_state", request).success and state(node) == "inactive"
        assert "Traceback" not in node.log


def test_parameters_of_unknown_types_and_very_long_lists_are_refused(tmp_path: Path) -> None:
    with running_node(tmp_path, autostart=False) as node:
        node.wait_for(node.is_discovered, "the node")
        good = Parameter("max_keypoints", value=77).to_parameter_msg()
        for kind in (10, 255):
            parameters = [typed("max_keypoints", kind), good]
            request = SetParameters.Request(parameters=parameters)
            results = ask(node, SetParameters, "set_parameters", request).results
            assert [result.successful for result in results] == [False, True]
            assert f"type {kind}" in results[0].reason
            request = SetParametersAtomically.Request(parameters=parameters)
            result = ask(node, SetParametersAtomically, "set_parameters_atomically", request).result
            assert not result.successful and f"type {kind}" in result.reason
        request = SetParameters.Request(parameters=[typed("threads", 0), typed("no_such", 2)])
        results = ask(node, SetParameters, "set_parameters", request).results
        assert [result.successful for result in results] == [False, False]
        # The refusal of an unknown name suggests the most similar one.
        parameters = [good, Parameter("max_keypoint", value=5).to_parameter_msg()]
        request = SetParameters.Request(parameters=parameters)
        results = ask(node, SetParameters, "set_parameters", request).results
        assert [result.successful for result in results] == [True, False]
        assert "'max_keypoint', did you mean max_keypoints?" in results[1].reason
        request = SetParametersAtomically.Request(parameters=parameters)
        result = ask(node, SetParametersAtomically, "set_parameters_atomically", request).result
        assert not result.successful and "'max_keypoint', did you mean max_keypoints?" in result.reason

        # A very long list is refused before its entries are processed: rclpy takes at least 0.1 ms for each.
        names, entries = ["threads"] * MANY, [good] * MANY
        request = SetParameters.Request(parameters=entries)
        results = ask(node, SetParameters, "set_parameters", request).results
        assert len(results) == MANY and not any(result.successful for result in results)
        assert "in one request" in results[0].reason
        request = SetParametersAtomically.Request(parameters=entries)
        result = ask(node, SetParametersAtomically, "set_parameters_atomically", request).result
        assert not result.successful and "in one request" in result.reason
        assert not ask(node, GetParameters, "get_parameters", GetParameters.Request(names=names)).values
        assert not ask(node, GetParameterTypes, "get_parameter_types", GetParameterTypes.Request(names=names)).types
        request = DescribeParameters.Request(names=names)
        assert not ask(node, DescribeParameters, "describe_parameters", request).descriptors
        ask(node, ListParameters, "list_parameters", ListParameters.Request(prefixes=names))
        for refused, times in ((f"{MANY} parameters in one request", 2), (f"{MANY} names in one request", 3)):
            node.wait_for(lambda refused=refused, times=times: node.log.count(refused) == times, refused)
        node.wait_for(lambda: f"{MANY} prefixes in one request" in node.log, "the refusal of prefixes")
        request = GetParameters.Request(names=["max_keypoints"])
        assert ask(node, GetParameters, "get_parameters", request).values[0].integer_value == 77
        assert "Traceback" not in node.log


def test_a_negative_time_on_the_clock_is_counted_and_reported_and_the_node_goes_on(tmp_path: Path) -> None:
    with running_node(tmp_path, calibrated=False, use_sim_time=True, matcher="nearest", **SMALL) as node:
        node.wait_until_connected()
        clock = node.node.create_publisher(Clock, "/clock", 10)

        def counted() -> bool:
            clock.publish(Clock(clock=Time(sec=-1)))
            return "messages left out: /clock" in node.figures()

        node.wait_for(counted, "the count of what is wrong with /clock")
        node.wait_for(lambda: "a message on /clock was left out" in node.message(), "the sentence")
        assert "Seconds value must not be negative" in node.message()
        assert node.stop() == 0


def test_a_profile_sets_the_parameters_that_were_not_given(tmp_path: Path) -> None:
    with running_node(tmp_path, autostart=False, profile="fast", matcher="nearest") as node:
        node.wait_for(node.is_discovered, "the node")
        request = GetParameters.Request(names=["profile", "matcher", "max_keypoints"])
        values = ask(node, GetParameters, "get_parameters", request).values
        assert [values[0].string_value, values[1].string_value, values[2].integer_value] == ["fast", "nearest", 512]


def test_the_diagnostics_say_that_the_node_loads_networks_or_is_finalized(tmp_path: Path) -> None:
    with running_node(tmp_path, autostart=False, matcher="nearest", **SMALL) as node:
        node.wait_for(lambda: node.diagnostics, "diagnostics")
        request = ChangeState.Request()
        request.transition.label = "configure"
        assert ask(node, ChangeState, "change_state", request).success
        for text in (
            "unconfigured: configure and activate the node to have it process images",
            "configuring: loading the networks",
        ):
            node.wait_for(lambda text=text: text in [each.status[0].message for each in node.diagnostics], text)
        request.transition.label = "shutdown"
        assert ask(node, ChangeState, "change_state", request).success
        node.wait_for_figure("state", "finalized")
        assert "start it again" in node.message()
