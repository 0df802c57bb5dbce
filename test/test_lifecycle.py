"""Tests of the node's transitions: a failed one leaves nothing behind, and none waits for an impossible event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
from domain_coordinator import domain_id
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger

from kpmatch_ros.msg import MatchArray
from kpmatch_ros.parameters import ParameterError
from kpmatch_ros.ros import inputs, senders
from kpmatch_ros.ros import node as matcher
from kpmatch_ros.ros.manager_bond import ManagerBond
from kpmatch_ros.ros.node import MatcherNode
from kpmatch_ros.srv import MatchFeatures

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
SMALL = {"autostart": False, "device": "cpu", "precision": "float32", "max_keypoints": 64}
LIMIT = 60.0  # time limit for a transition that does not hang, seconds

MakeNode = Callable[..., MatcherNode]


@pytest.fixture
def executor() -> Iterator[SingleThreadedExecutor]:
    """An executor in a separate domain."""
    context = rclpy.Context()
    with domain_id() as domain:
        rclpy.init(context=context, domain_id=domain)
        executor = SingleThreadedExecutor(context=context)
        yield executor
        executor.shutdown()
        rclpy.shutdown(context=context)


@pytest.fixture
def make_node(executor: SingleThreadedExecutor) -> Iterator[MakeNode]:
    """make_node(override="qos_overrides...:=...", **parameters) makes the node in this process."""
    made = []

    def make(override: str = "", **parameters: Any) -> MatcherNode:
        values = [Parameter(name, value=value) for name, value in {**SMALL, **parameters}.items()]
        arguments = ["--ros-args", "-p", override] if override else []
        node = MatcherNode(context=executor.context, parameter_overrides=values, cli_args=arguments)
        executor.add_node(node)
        made.append(node)
        return node

    yield make
    for node in made:
        node.end()


def spin_until(executor: SingleThreadedExecutor, condition: Callable[[], Any]) -> None:
    """Handle callbacks until a condition holds."""
    for _ in range(int(LIMIT / 0.1)):
        if condition():
            return
        executor.spin_once(timeout_sec=0.1)
    pytest.fail("the condition did not become true")


def reported_problems(node: MatcherNode) -> str:
    """Return the problems that the diagnostics report."""
    return "; ".join(problem.explanation for problem in node._condition().problems)  # noqa: SLF001


def picture(nanoseconds: int = 0) -> Image:
    message = Image(height=48, width=64, encoding="mono8", step=64, data=bytes(48 * 64))
    message.header.stamp.sec, message.header.stamp.nanosec = 100, nanoseconds
    return message


def result_without_hang(work: Callable[[], Any]) -> Any:
    """Return the result of some work, and fail if it hangs."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert results, "it hangs"
    return results[0]


@pytest.mark.parametrize("precision", ["float32", "float12"])
def test_a_node_that_ended_or_failed_to_start_leaves_the_graph_while_still_referenced(
    executor: SingleThreadedExecutor, precision: str
) -> None:
    peer = rclpy.create_node("peer", context=executor.context)
    values = [Parameter(name, value=value) for name, value in {**SMALL, "precision": precision}.items()]
    held: list[Any] = []
    try:
        held.append(MatcherNode(context=executor.context, parameter_overrides=values))
        spin_until(executor, lambda: "matcher" in peer.get_node_names())
        held[0].end()
    except ParameterError as error:
        held.append(error)  # its traceback keeps the node alive
    spin_until(executor, lambda: "matcher" not in peer.get_node_names())
    peer.destroy_node()
    assert isinstance(held[0], MatcherNode if precision == "float32" else ParameterError)


def test_weights_on_a_file_system_that_times_out_fail_the_configuration(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_out(parameters: Any) -> None:
        raise TimeoutError(110, "Connection timed out", "/mnt/robot/superpoint.safetensors")

    monkeypatch.setattr(matcher, "FrontEnd", time_out)
    node = make_node()
    assert result_without_hang(node.trigger_configure) == FAILURE
    assert "Connection timed out" in node.fault


def test_a_failed_configuration_leaves_no_topic_and_no_thread(make_node: MakeNode) -> None:
    before = threading.active_count()
    node = make_node("qos_overrides./relative_pose.publisher.reliability:=most")
    for _ in range(2):
        assert node.trigger_configure() == FAILURE and "most" in node.fault
        assert node.count_publishers("matches") == 0
    for thread in threading.enumerate():
        if thread.name.startswith("inference"):
            thread.join(LIMIT)
    assert threading.active_count() <= before + 1


def test_a_failed_activation_leaves_no_subscription(make_node: MakeNode) -> None:
    node = make_node("qos_overrides./camera_info.subscription.reliability:=most")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, FAILURE)
    assert "most" in node.fault and node.count_subscribers("image") == 0
    assert node.trigger_cleanup() == SUCCESS and node.fault == ""


def test_a_request_refused_because_of_the_state_names_the_required_transition(
    make_node: MakeNode, executor: SingleThreadedExecutor
) -> None:
    node = make_node(matcher="nearest")
    peer = rclpy.create_node("peer", context=executor.context)
    executor.add_node(peer)
    reset, match = peer.create_client(Trigger, "reset"), peer.create_client(MatchFeatures, "match_features")
    spin_until(executor, lambda: reset.service_is_ready() and match.service_is_ready())

    def refusals() -> list[str]:
        answers = reset.call_async(Trigger.Request()), match.call_async(MatchFeatures.Request())
        spin_until(executor, lambda: all(answer.done() for answer in answers))
        return [answer.result().message for answer in answers]

    def changed() -> str:
        reason: str = node.set_parameters([Parameter("mode", value="stereo")])[0].reason
        return reason

    assert all("the node is unconfigured: configure and activate the node" in message for message in refusals())
    assert node.trigger_configure() == SUCCESS
    assert "the node is inactive: activate the node" in refusals()[1]
    assert changed() == "mode takes effect when the node is configured: clean it up first (ros2 lifecycle set)"
    assert node.trigger_activate() == SUCCESS
    assert "when the node is configured: deactivate it and clean it up first" in changed()
    assert node.trigger_shutdown() == SUCCESS
    end = "is finalized: it processes no more images; start it again"
    assert all(end in message for message in (*refusals(), changed()))


@pytest.mark.parametrize(("kind", "name"), [(Trigger, "reset"), (MatchFeatures, "match_features")])
def test_all_requests_of_many_clients_are_answered(
    make_node: MakeNode, executor: SingleThreadedExecutor, kind: Any, name: str
) -> None:
    make_node()
    peer = rclpy.create_node("peer", context=executor.context)
    executor.add_node(peer)
    deep = QoSProfile(depth=100)  # a client receives the answers to all of them
    clients = [peer.create_client(kind, name, qos_profile=deep) for _ in range(3)]
    spin_until(executor, lambda: all(client.service_is_ready() for client in clients))
    answers = [client.call_async(kind.Request()) for client in clients for _ in range(15)]
    spin_until(executor, lambda: all(answer.done() for answer in answers))


def test_a_node_that_shuts_down_refuses_the_waiting_requests(
    make_node: MakeNode, executor: SingleThreadedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, end = threading.Event(), threading.Event()

    def match_slowly(pipeline: Any, request: Any, response: Any) -> Any:
        begun.set()
        assert end.wait(LIMIT)
        return response

    monkeypatch.setattr(matcher.Pipeline, "match_features", match_slowly)
    node = make_node()
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    peer = rclpy.create_node("peer", context=executor.context)
    executor.add_node(peer)
    match, change = (
        peer.create_client(MatchFeatures, "match_features"),
        peer.create_client(ChangeState, "matcher/change_state"),
    )
    spin_until(executor, lambda: match.service_is_ready() and change.service_is_ready())
    answers = [match.call_async(MatchFeatures.Request()) for _ in range(3)]
    spin_until(executor, begun.is_set)
    for _ in range(20):  # so that the other requests arrive
        executor.spin_once(timeout_sec=0.05)
    shutdown = ChangeState.Request()
    shutdown.transition.label = "shutdown"
    threading.Timer(1.0, end.set).start()  # the transition waits for the present match
    change.call_async(shutdown)
    spin_until(executor, lambda: all(answer.done() for answer in answers))
    assert [answer.result().message for answer in answers[1:]] == 2 * [
        "the node was deactivated while the request waited"
    ]


def test_deactivation_does_not_wait_for_a_calibration(
    make_node: MakeNode, executor: SingleThreadedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()

    class Patient(threading.Event):
        """Never stops waiting."""

        def wait(self, timeout: float | None = None) -> bool:
            waits.set()
            return super().wait(2 * LIMIT)

    monkeypatch.setattr(inputs, "threading", SimpleNamespace(Event=Patient))
    node = make_node(queue="all")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    peer = rclpy.create_node("peer", context=executor.context)
    executor.add_node(peer)
    images = peer.create_publisher(Image, "image", QoSProfile(depth=10))
    infos = peer.create_publisher(CameraInfo, "camera_info", QoSProfile(depth=10))  # publishes nothing
    spin_until(executor, lambda: images.get_subscription_count() and infos.get_subscription_count())
    images.publish(Image(width=64, height=64, encoding="mono8", step=64, data=bytes(64 * 64)))
    spin_until(executor, waits.is_set)
    assert result_without_hang(node.trigger_deactivate) == SUCCESS


def test_the_value_off_is_accepted_even_if_ros_parses_it_as_a_boolean(make_node: MakeNode) -> None:
    node = make_node("stretch:=off")
    assert node.parameters.stretch == "off"
    assert node.set_parameters([Parameter("stretch", value="auto")])[0].successful
    assert node.set_parameters([Parameter("stretch", value=False)])[0].successful and node.parameters.stretch == "off"
    refused = node.set_parameters([Parameter("stretch", value=True)])[0]
    assert not refused.successful and "it must be a str" in refused.reason


def test_changing_the_profile_of_a_running_node_is_refused_with_alternatives(make_node: MakeNode) -> None:
    node = make_node()
    refused = node.set_parameters([Parameter("profile", value="fast")])[0]
    assert not refused.successful and "start it with profile:=fast, or set extractor, matcher" in refused.reason
    assert node.parameters.profile == "accurate"
    assert node.set_parameters([Parameter("profile", value="accurate")])[0].successful, (
        "the current profile is accepted"
    )


@pytest.mark.parametrize("value", ["depth:=-1", "reliability:=unknown", "depth:=2147483648"])
def test_a_qos_override_that_the_middleware_refuses_is_named(make_node: MakeNode, value: str) -> None:
    node = make_node(f"qos_overrides./image.subscription.{value}", matcher="nearest")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, FAILURE)
    assert "qos_overrides of image" in node.fault and "depth a whole number" in node.fault


@pytest.mark.parametrize(("first", "second"), [("latest", "all"), ("all", "latest")])
def test_a_changed_queue_changes_the_qos_at_the_next_configuration(
    make_node: MakeNode, executor: SingleThreadedExecutor, first: str, second: str
) -> None:
    """rclpy would keep the QoS of the first configuration, and treat it as the user's."""
    expected = {"latest": ("best_effort", 10, 1), "all": ("reliable", 1000, 1000)}
    override = "qos_overrides./camera_info.subscription.depth"
    node = make_node(f"{override}:=7", matcher="nearest", queue=first)
    peer = rclpy.create_node("peer", context=executor.context)
    names = [
        f"qos_overrides./{policy}"
        for policy in ("image.subscription.reliability", "matches.publisher.depth", "image.subscription.depth")
    ]
    for queue in (first, second):
        assert node.set_parameters([Parameter("queue", value=queue)])[0].successful
        for _ in range(2):
            assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
            spin_until(executor, lambda: peer.count_subscribers("/image") == 1)
            (image,) = peer.get_subscriptions_info_by_topic("/image")
            assert image.qos_profile.reliability.name.lower() == expected[queue][0]
            assert tuple(parameter.value for parameter in node.get_parameters(names)) == expected[queue]
            assert node.get_parameter(override).value == 7, "as the user gave it"
            assert not node.set_parameters([Parameter(override, value=8)])[0].successful, "it would have no effect"
            assert (node.trigger_deactivate(), node.trigger_cleanup()) == (SUCCESS, SUCCESS)
            assert node.get_parameters_by_prefix("qos_overrides") == {}
            spin_until(executor, lambda: peer.count_subscribers("/image") == 0)
    peer.destroy_node()


def test_the_latched_calibration_of_a_restarted_driver_is_received(
    make_node: MakeNode, executor: SingleThreadedExecutor
) -> None:
    node = make_node(matcher="nearest")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    received: list[float] = []
    taken = node._pipeline.add_info  # noqa: SLF001
    node._pipeline.add_info = lambda side, info: (received.append(info.k[0]), taken(side, info))  # noqa: SLF001
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    for focal in (300.0, 600.0, 900.0):
        driver = rclpy.create_node("driver", context=executor.context)
        infos = driver.create_publisher(CameraInfo, "camera_info", latched)
        infos.publish(CameraInfo(width=320, height=240, k=[focal, 0.0, 160.0, 0.0, focal, 120.0, 0.0, 0.0, 1.0]))
        spin_until(executor, lambda focal=focal: focal in received)
        driver.destroy_node()
        if focal == 600.0:
            assert (node.trigger_deactivate(), node.trigger_activate()) == (SUCCESS, SUCCESS)


def test_a_best_effort_mask_publisher_does_not_change_the_image_reliability(
    make_node: MakeNode, executor: SingleThreadedExecutor
) -> None:
    node = make_node(matcher="nearest", queue="all")
    peer = rclpy.create_node("peer", context=executor.context)
    executor.add_node(peer)
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)

    def reliability(topic: str) -> Any:
        (one,) = peer.get_subscriptions_info_by_topic(f"/{topic}")
        return one.qos_profile.reliability

    spin_until(executor, lambda: peer.count_subscribers("/mask") == peer.count_subscribers("/image") == 1)
    assert reliability("mask") == reliability("image") == ReliabilityPolicy.RELIABLE
    masks = peer.create_publisher(Image, "mask", qos_profile_sensor_data)
    spin_until(executor, lambda: reliability("mask") == ReliabilityPolicy.BEST_EFFORT)
    assert reliability("image") == reliability("camera_info") == ReliabilityPolicy.RELIABLE
    spin_until(executor, masks.get_subscription_count)
    peer.destroy_node()


@pytest.mark.parametrize(
    ("topic", "silence"),
    [("image", "no image on /image"), ("camera_info", "no calibration on /camera_info"), ("mask", "")],
)
def test_an_incompatible_publisher_is_reported_while_it_exists_and_hides_no_other_problem(
    make_node: MakeNode, executor: SingleThreadedExecutor, monkeypatch: pytest.MonkeyPatch, topic: str, silence: str
) -> None:
    monkeypatch.setattr(inputs, "_SILENT_AFTER", 0.0)
    node = make_node(f"qos_overrides./{topic}.subscription.reliability:=reliable", matcher="nearest", queue="latest")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    peer = rclpy.create_node("peer", context=executor.context)
    kind = CameraInfo if topic == "camera_info" else Image

    unheard = f"the publisher of /{topic} offers another reliability: its messages do not arrive"
    first = peer.create_publisher(kind, topic, qos_profile_sensor_data)
    spin_until(executor, lambda: unheard in reported_problems(node))
    assert not silence or silence not in reported_problems(node), "only one of the two problems is reported"
    second = peer.create_publisher(kind, topic, 10)
    spin_until(executor, lambda: silence in reported_problems(node))
    assert unheard in reported_problems(node)
    peer.destroy_publisher(first)
    spin_until(executor, lambda: unheard not in reported_problems(node))
    assert silence in reported_problems(node)
    peer.destroy_publisher(second)
    spin_until(
        executor,
        lambda: (
            not silence or (silence in reported_problems(node) and "nobody publishes it" in reported_problems(node))
        ),
    )
    assert unheard not in reported_problems(node)
    peer.destroy_node()


@pytest.mark.parametrize(("interval", "silent"), [(0.1, 2.0), (2.6, 7.8), (1000.0, 60.0)])
def test_a_camera_is_reported_as_silent_relative_to_its_frame_interval(
    make_node: MakeNode,
    executor: SingleThreadedExecutor,
    monkeypatch: pytest.MonkeyPatch,
    interval: float,
    silent: float,
) -> None:
    now = 5000.0
    monkeypatch.setattr(inputs, "time", SimpleNamespace(monotonic=lambda: now))
    node = make_node(matcher="nearest", queue="all")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    peer = rclpy.create_node("peer", context=executor.context)
    images = peer.create_publisher(Image, "image", 10)
    spin_until(executor, images.get_subscription_count)
    for number in range(4):
        now += interval
        images.publish(picture(number + 1))
        spin_until(executor, lambda: node.monitor.values()["frames received"] == str(number + 1))  # noqa: B023
    now += 0.99 * silent
    assert "no image on /image" not in reported_problems(node)
    now += 0.02 * silent
    assert "no image on /image" in reported_problems(node)
    peer.destroy_node()


def test_publishers_with_the_same_node_name_count_as_two_after_the_lease_time(
    make_node: MakeNode, executor: SingleThreadedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(matcher="nearest")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    others = [rclpy.create_node(name, context=executor.context) for name in ("camera", "camera", "matcher", "usb")]
    images = [other.create_publisher(Image, "image", 10) for other in others[:2]]
    twin = others[2].create_publisher(MatchArray, "matches", 10)
    spin_until(
        executor, lambda: all(len(node.get_publishers_info_by_topic(name)) == 2 for name in ("image", "matches"))
    )
    assert "publishers send" not in reported_problems(node) and "another node publishes" not in reported_problems(node)
    images.append(others[3].create_publisher(Image, "image", 10))
    spin_until(executor, lambda: "2 publishers send on /image (/camera, /usb)" in reported_problems(node))
    monkeypatch.setattr(senders, "_LEASE", 0.0)
    spin_until(executor, lambda: "3 publishers send on /image (/camera, /usb)" in reported_problems(node))
    spin_until(
        executor, lambda: "another node publishes on /matches too (/matcher, another node of" in reported_problems(node)
    )
    assert len(images) == 3 and twin is not None
    for other in others:
        other.destroy_node()


def test_dropped_frames_are_named_as_the_cause_of_a_gap_and_slow_frames_are_no_gap(
    make_node: MakeNode, executor: SingleThreadedExecutor
) -> None:
    node = make_node(matcher="nearest", max_gap=1e-6)
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    stamp = sent = 0

    def send(apart: int) -> None:
        nonlocal stamp, sent
        stamp, sent = stamp + apart, sent + 1
        node._take_image(0, picture(stamp))  # noqa: SLF001

    def process(apart: int) -> str:
        send(apart)
        spin_until(executor, lambda: node.monitor.values()["frames processed"] == str(sent))
        return reported_problems(node)

    assert all("max_gap" not in process(1) for _ in range(3)), "each took more than a microsecond"
    alone = process(10_000)
    assert "no frame was processed for 0.000 s, more than max_gap" in alone and "dropped" not in alone

    def overtaken() -> bool:
        for _ in range(3):
            send(10_000)
        return "and frames that arrived in the meantime were dropped" in reported_problems(node)

    spin_until(executor, overtaken)
    assert "lower max_keypoints, or raise max_gap" in reported_problems(node)


def test_a_new_configuration_clears_the_figures_of_the_last_pair_but_not_the_counters(
    make_node: MakeNode, executor: SingleThreadedExecutor
) -> None:
    node = make_node(matcher="nearest", mode="stereo")
    assert (node.trigger_configure(), node.trigger_activate()) == (SUCCESS, SUCCESS)
    for side in (0, 1):
        node._take_image(side, picture(1))  # noqa: SLF001
    spin_until(executor, lambda: node.monitor.values()["frames processed"] == "1")
    node.monitor.odometry(1, "the chain broke")
    before = node.monitor.values()
    assert (before["keypoints"], before["stereo matches"], before["odometry breaks"]) == ("0", "0", "1")
    assert (node.trigger_deactivate(), node.trigger_cleanup()) == (SUCCESS, SUCCESS)
    assert node.set_parameters([Parameter("mode", value="mono")])[0].successful
    assert node.trigger_configure() == SUCCESS
    after = node.monitor.values()
    assert (after["keypoints"], after["frames processed"]) == ("", "1")
    assert not {"stereo matches", "stereo inlier ratio", "odometry breaks"} & set(after)


def test_activation_works_after_a_failed_activation(
    make_node: MakeNode, executor: SingleThreadedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(matcher="nearest", queue="all", autostart=False)
    peer = rclpy.create_node("peer", context=executor.context)

    def refuse(manager: ManagerBond, period: float) -> None:
        raise RuntimeError("the middleware has no more room")

    assert node.trigger_configure() == SUCCESS
    with monkeypatch.context() as patched:
        patched.setattr(ManagerBond, "form", refuse)
        assert node.trigger_activate() == TransitionCallbackReturn.FAILURE
    assert node.trigger_activate() == SUCCESS
    images = peer.create_publisher(Image, "image", 10)
    spin_until(executor, lambda: images.get_subscription_count() == 1)
    images.publish(picture())
    spin_until(executor, lambda: node.monitor.values()["frames processed"] == "1")
    assert node.monitor.values()["frames received"] == "1"
    peer.destroy_node()
