"""Runs the real node in its own process and talks to it over DDS, like the other nodes of a robot."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from domain_coordinator import domain_id
from rcl_interfaces.srv import GetParameterTypes
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose

Process = subprocess.Popen[str] | forked.ForkedProcess
PARAMETERS = {"device": "cpu", "precision": "float32", "queue": "all"}
SMALL = {"profile": "fast", "max_keypoints": 64}  # for tests that do not depend on the networks

_PATIENCE = 1.0  # seconds after which a request is repeated
_ARRIVAL = 60.0  # longest time in seconds until a message arrives


def stamp_of(header: Header) -> float:
    """Return a header's stamp in seconds."""
    return float(header.stamp.sec + 1e-9 * header.stamp.nanosec)


def _without_header(info: CameraInfo) -> CameraInfo:
    plain = copy.copy(info)
    plain.header = Header()
    return plain


class NodeUnderTest:
    """A matcher process, and a peer node that publishes to it and stores the messages it sends."""

    def __init__(self, start: Callable[[], Process], node: Any, executor: Any, log: Path, calibrated: bool) -> None:
        self.namespace: str = node.get_namespace()  # of both nodes
        self._start = start
        self.process = start()
        self.node = node
        self._executor = executor
        self._log = log
        self.matches: list[MatchArray] = []
        self.stereo_matches: list[MatchArray] = []
        self.poses: list[RelativePose] = []
        self.features: list[FeatureArray] = []
        self.pictures: list[Image] = []
        self.diagnostics: list[DiagnosticArray] = []
        self.subscribe(MatchArray, "matches", self.matches.append)
        self.subscribe(MatchArray, "stereo_matches", self.stereo_matches.append)
        self.subscribe(RelativePose, "relative_pose", self.poses.append)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._take_diagnostics, 10)
        self.images = self.node.create_publisher(Image, "image", QoSProfile(depth=1000))
        self._clients: dict[str, Any] = {}
        self._calibration: tuple[CameraInfo, ...] = ()  # the last calibration sent
        # If there is a publisher of camera_info, the node waits for it. So only tests that send one create a publisher.
        self.infos = (
            self.node.create_publisher(CameraInfo, "camera_info", QoSProfile(depth=1000)) if calibrated else None
        )

    def subscribe(self, kind: type, topic: str, callback: Callable[[Any], None]) -> Any:
        """Subscribe to a topic of the node, with a queue deep enough to lose nothing."""
        return self.node.create_subscription(kind, topic, callback, QoSProfile(depth=1000))

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        """Store the diagnostics of the node under test, but not those of other nodes on the machine."""
        if message.status[0].name.startswith(f"{self.namespace.lstrip('/')}/"):
            self.diagnostics.append(message)

    @property
    def log(self) -> str:
        """What the node has printed; empty before its process has started."""
        return self._log.read_text() if self._log.exists() else ""

    def spin(self, seconds: float = 0.05) -> None:
        """Receive messages for this time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait_for(self, condition: Callable[[], Any], what: str, timeout: float = 120.0) -> None:
        """Receive messages until a condition holds. Fails if the node ends or the time is over."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"{self._ending()} while the test waited for {what}:\n{self.log}"
            assert time.monotonic() < end, f"waited {timeout} s in vain for {what}:\n{self._last_words()}"
            self._executor.spin_once(timeout_sec=0.05)

    def _ending(self) -> str:
        """Describe how the node's process ended."""
        status = self.process.returncode
        how = f"by the signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return f"the node ended {how}"

    def _last_words(self) -> str:
        """Return what the node printed, and its last diagnostics."""
        if not self.diagnostics:
            return f"{self.log}\nno diagnostics"
        said = self.diagnostics[-1]
        age = time.time() - said.header.stamp.sec
        return f"{self.log}\n{len(self.diagnostics)} diagnostics, the last {age:.0f} s ago: {said.status[0]}"

    def is_discovered(self) -> bool:
        """Whether the node has been discovered, configured or not."""
        offers = self.node.get_publishers_info_by_topic("/diagnostics")
        return any(offer.node_namespace == self.namespace for offer in offers)

    def wait_until_connected(self) -> None:
        """Wait until the node is active: it has subscribed, and the peer has discovered its publishers."""

        def connected() -> bool:
            ours = all(one.get_subscription_count() for one in (self.images, self.infos) if one is not None)
            theirs = self.node.count_publishers("relative_pose") and self.node.count_publishers("matches")
            return bool(ours and theirs)

        self.wait_for(connected, "the node to come up")
        self.wait_until_known()

    def wait_until_known(self, name: str = "matcher") -> None:
        """Wait until the matcher or another node has discovered the peer's publishers, subscriptions and clients.

        Messages that it publishes from then on arrive. Discovery may complete on this side before the other side.
        Endpoints of a participant are discovered in the order of their creation. So a node that answers the newest
        client has discovered everything created before. An answer to an undiscovered client is lost, so the request is
        repeated.
        """
        client = self.node.create_client(GetParameterTypes, f"{name}/get_parameter_types")
        try:
            self.wait_for(client.service_is_ready, f"the services of {name}")
            answers: list[Any] = []

            def answered() -> bool:
                answers.append(client.call_async(GetParameterTypes.Request()))
                end = time.monotonic() + _PATIENCE
                while not any(answer.done() for answer in answers) and time.monotonic() < end:
                    self._executor.spin_once(timeout_sec=0.05)
                return any(answer.done() for answer in answers)

            self.wait_for(answered, f"{name} to know this node")
        finally:
            self.node.destroy_client(client)

    def wait_until_gone(self) -> None:
        """Wait until this side has discovered that the deactivated node has unsubscribed.

        Before that, the subscriptions seen here may be the old ones instead of those of the next activation.
        """
        publishers = [one for one in (self.images, self.infos) if one is not None]
        self.wait_for(lambda: not any(one.get_subscription_count() for one in publishers), "the node to unsubscribe")

    def call(self, kind: type, name: str, request: Any) -> Any:
        """Call a service of the node and return its answer. The request is sent once the answer cannot be lost."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self.node.create_client(kind, name)
            self.wait_for(client.service_is_ready, f"the service {name}")
            self.wait_until_known()
        future = client.call_async(request)
        self.wait_for(future.done, f"the answer of {name}")
        return future.result()

    def calibrate(self, *infos: tuple[Any, CameraInfo]) -> None:
        """Publish calibrations, each with its publisher. If they are new, wait until the node has processed them.

        An image that is sent immediately afterwards may arrive first, because order is guaranteed only within a topic.
        The node waits for a calibration, but on a busy machine not long enough, and then uses the previous one.
        """
        for publisher, info in infos:
            publisher.publish(info)
        calibration = tuple(_without_header(info) for _, info in infos)
        if calibration != self._calibration:
            for publisher, _ in infos:  # later messages may overtake a reliable message that has to be sent again
                assert publisher.wait_for_all_acked(Duration(seconds=_ARRIVAL)), "a calibration did not arrive"
            self.wait_until_known()  # the node answers after it has processed what arrived before the request
            self._calibration = calibration

    def send(self, image: Image, info: CameraInfo | None = None) -> None:
        """Publish a frame, its calibration first."""
        if info is not None:
            self.calibrate((self.infos, info))
        self.images.publish(image)

    def figures(self) -> dict[str, str]:
        """Return the values of the newest diagnostics; empty before the first message."""
        values = self.diagnostics[-1].status[0].values if self.diagnostics else []
        return {item.key: item.value for item in values}

    def wait_for_news(self) -> DiagnosticArray:
        """Wait for diagnostics with a stamp after now, and return the first. Older messages may still arrive."""
        now = time.time()

        def later() -> list[DiagnosticArray]:
            return [each for each in self.diagnostics if stamp_of(each.header) > now]

        self.wait_for(later, "diagnostics")
        return later()[0]

    def message(self) -> str:
        """Return the text of the newest diagnostics; empty before the first message."""
        return self.diagnostics[-1].status[0].message if self.diagnostics else ""

    def wait_for_figure(self, key: str, value: str, timeout: float = 120.0) -> dict[str, str]:
        """Wait until the diagnostics show a value, and return all values."""
        self.wait_for(
            lambda: self.diagnostics and self.figures().get(key) == value,
            f"diagnostics to show {key} = {value}",
            timeout,
        )
        return self.figures()

    def restart(self, sent: signal.Signals) -> None:
        """End the node with a signal and start it again. This side keeps its publishers and subscriptions."""
        self.process.send_signal(sent)
        self.process.wait(timeout=30)
        self.process = self._start()

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        """End the node as a launch file does, and return its exit status."""
        self.process.send_signal(sent)
        status = self.process.wait(timeout=30)
        if status != 0:
            print(self.log)  # pytest shows it if the test fails
        return status

    def end(self) -> None:
        """End the node if it still runs. Starts with SIGINT, because SIGKILL may corrupt DDS's shared memory."""
        try:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def running_node(
    tmp_path: Path,
    arguments: tuple[str, ...] = (),
    calibrated: bool = True,
    discovery_range: str = "LOCALHOST",
    fork: bool = True,
    **parameters: Any,
) -> Iterator[NodeUnderTest]:
    """Start the node in a separate ROS domain and namespace.

    The domain separates tests that choose their domains together. Another node on the machine may use the same domain,
    so the namespace gives topics and services unique names.

    Args:
        tmp_path: folder for the logs.
        arguments: ROS arguments of the node.
        calibrated: whether the peer has a publisher of camera_info.
        discovery_range: value of ROS_AUTOMATIC_DISCOVERY_RANGE.
        fork: whether the node may be forked from a process that has loaded PyTorch (forked.py), which saves seconds.
            Only a node that is not forked has new seeds for the random numbers of Python and NumPy.
        parameters: parameters of the node. The topics in names of QoS overrides have no namespace.
    """
    namespace = f"/test_{uuid.uuid4().hex[:12]}"
    with domain_id() as domain:
        environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(domain),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": discovery_range,
            "ROS_LOG_DIR": str(tmp_path / "ros_log"),
            "OMP_NUM_THREADS": "1",
        }
        words = ["--ros-args", "-r", f"__ns:={namespace}"]
        for name, value in {**PARAMETERS, **parameters}.items():
            name = name.replace("qos_overrides./", f"qos_overrides.{namespace}/")
            words += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        log = tmp_path / "node.log"
        log.unlink(missing_ok=True)

        def start() -> Process:
            process = forked.start([*words, *arguments], environment, log) if fork else None
            if process is not None:
                return process
            with log.open("a") as stream:
                return subprocess.Popen(
                    ["matcher", *words, *arguments], env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True
                )

        context = rclpy.Context()
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = discovery_range
        rclpy.init(context=context, domain_id=domain)
        node = rclpy.create_node("peer", namespace=namespace, context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        under_test = NodeUnderTest(start, node, executor, log, calibrated)
        try:
            yield under_test
        finally:
            under_test.end()
            executor.shutdown()
            node.destroy_node()
            rclpy.shutdown(context=context)


__all__ = ["PARAMETERS", "SMALL", "NodeUnderTest", "running_node", "stamp_of"]
