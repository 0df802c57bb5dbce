"""Runs the real node as its own process and talks to it over DDS, as a robot's other nodes would."""

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
SMALL = {"profile": "fast", "max_keypoints": 64}  # where the networks play no part

_PATIENCE = 1.0  # seconds after which a question is asked again
_ARRIVAL = 60.0  # seconds that a message may take


def stamp_of(header: Header) -> float:
    """Seconds of a header's stamp."""
    return float(header.stamp.sec + 1e-9 * header.stamp.nanosec)


def _without_header(info: CameraInfo) -> CameraInfo:
    plain = copy.copy(info)
    plain.header = Header()
    return plain


class NodeUnderTest:
    """A matcher process and a peer that publishes to it and keeps what it sends."""

    def __init__(self, start: Callable[[], Process], node: Any, executor: Any, log: Path, calibrated: bool) -> None:
        self.namespace: str = node.get_namespace()  # of both
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
        self._calibration: tuple[CameraInfo, ...] = ()  # that was sent last
        # The node waits for the calibration that somebody offers: only those who send one offer it.
        self.infos = (
            self.node.create_publisher(CameraInfo, "camera_info", QoSProfile(depth=1000)) if calibrated else None
        )

    def subscribe(self, kind: type, topic: str, callback: Callable[[Any], None]) -> Any:
        """Receive from the node without losing anything."""
        return self.node.create_subscription(kind, topic, callback, QoSProfile(depth=1000))

    def _take_diagnostics(self, message: DiagnosticArray) -> None:
        """Keep what the node under test says, and nothing of another node on the machine."""
        if message.status[0].name.startswith(f"{self.namespace.lstrip('/')}/"):
            self.diagnostics.append(message)

    @property
    def log(self) -> str:
        """What the node has printed: nothing where its process has not begun yet."""
        return self._log.read_text() if self._log.exists() else ""

    def spin(self, seconds: float = 0.05) -> None:
        """Receive for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait_for(self, condition: Callable[[], Any], what: str, timeout: float = 120.0) -> None:
        """Receive until a condition holds."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"{self._ending()} while the test waited for {what}:\n{self.log}"
            assert time.monotonic() < end, f"waited {timeout} s in vain for {what}:\n{self._last_words()}"
            self._executor.spin_once(timeout_sec=0.05)

    def _ending(self) -> str:
        """How the node's process ended."""
        status = self.process.returncode
        how = f"by the signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return f"the node ended {how}"

    def _last_words(self) -> str:
        """What the node printed, and its last diagnostics."""
        if not self.diagnostics:
            return f"{self.log}\nno diagnostics"
        said = self.diagnostics[-1]
        age = time.time() - said.header.stamp.sec
        return f"{self.log}\n{len(self.diagnostics)} diagnostics, the last {age:.0f} s ago: {said.status[0]}"

    def is_there(self) -> bool:
        """Whether the node has been discovered, configured or not."""
        offers = self.node.get_publishers_info_by_topic("/diagnostics")
        return any(offer.node_namespace == self.namespace for offer in offers)

    def wait_until_connected(self) -> None:
        """Wait until the node is active: it subscribes, and its publications are known here."""

        def connected() -> bool:
            ours = all(one.get_subscription_count() for one in (self.images, self.infos) if one is not None)
            theirs = self.node.count_publishers("relative_pose") and self.node.count_publishers("matches")
            return bool(ours and theirs)

        self.wait_for(connected, "the node to come up")
        self.wait_until_known()

    def wait_until_known(self, name: str = "matcher") -> None:
        """Wait until a node, the matcher or another one, knows the peer's publishers, subscriptions and clients.

        What it publishes from then on arrives. That this side knows of it says nothing of the other side. Discovery
        tells of a participant's endpoints in the order in which they were made: who answers the newest of all clients
        knows of everything before it. An answer to a client that is not known yet is lost, so it is asked again.
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
        """Wait until this side knows that the node, which was deactivated, subscribes no more.

        Before that, what is told of the subscriptions of the next activation may still be said of the ones before.
        """
        publishers = [one for one in (self.images, self.infos) if one is not None]
        self.wait_for(lambda: not any(one.get_subscription_count() for one in publishers), "the node to unsubscribe")

    def call(self, kind: type, name: str, request: Any) -> Any:
        """The answer of one of the node's services. The request is sent once, when the answer cannot be lost."""
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self.node.create_client(kind, name)
            self.wait_for(client.service_is_ready, f"the service {name}")
            self.wait_until_known()
        future = client.call_async(request)
        self.wait_for(future.done, f"the answer of {name}")
        return future.result()

    def calibrate(self, *infos: tuple[Any, CameraInfo]) -> None:
        """Publish calibrations, each with its publisher, and where they are new wait until the node has taken them.

        An image that follows at once may overtake it: a topic's messages come in order, those of two topics do not. The
        node waits for a while, on a busy machine not long enough, and goes by the one that it has.
        """
        for publisher, info in infos:
            publisher.publish(info)
        calibration = tuple(_without_header(info) for _, info in infos)
        if calibration != self._calibration:
            for publisher, _ in infos:  # where a reliable message has to be sent again, later ones may overtake it
                assert publisher.wait_for_all_acked(Duration(seconds=_ARRIVAL)), "a calibration did not arrive"
            self.wait_until_known()  # it answers after it has taken what came before the question
            self._calibration = calibration

    def send(self, image: Image, info: CameraInfo | None = None) -> None:
        """Publish a frame, its calibration first."""
        if info is not None:
            self.calibrate((self.infos, info))
        self.images.publish(image)

    def figures(self) -> dict[str, str]:
        """The newest diagnostics; none before the first."""
        values = self.diagnostics[-1].status[0].values if self.diagnostics else []
        return {item.key: item.value for item in values}

    def wait_for_news(self) -> DiagnosticArray:
        """Wait for diagnostics of a time after now, and return the first: earlier ones may still be on their way."""
        now = time.time()

        def later() -> list[DiagnosticArray]:
            return [each for each in self.diagnostics if stamp_of(each.header) > now]

        self.wait_for(later, "diagnostics")
        return later()[0]

    def message(self) -> str:
        """What the newest diagnostics say; nothing before the first."""
        return self.diagnostics[-1].status[0].message if self.diagnostics else ""

    def wait_for_figure(self, key: str, value: str, timeout: float = 120.0) -> dict[str, str]:
        """Wait until the diagnostics show a value, and return all of them."""
        self.wait_for(
            lambda: self.diagnostics and self.figures().get(key) == value,
            f"diagnostics to show {key} = {value}",
            timeout,
        )
        return self.figures()

    def restart(self, sent: signal.Signals) -> None:
        """End the node by a signal and start it again; this side keeps its publishers and subscriptions."""
        self.process.send_signal(sent)
        self.process.wait(timeout=30)
        self.process = self._start()

    def stop(self, sent: signal.Signals = signal.SIGINT) -> int:
        """End the node as a launch file does, and return its exit status."""
        self.process.send_signal(sent)
        status = self.process.wait(timeout=30)
        if status != 0:
            print(self.log)  # pytest shows it where that was not to be
        return status

    def end(self) -> None:
        """End the node if it still runs. It is asked first: a kill may damage the memory that both processes share."""
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
    """Start the node in a ROS domain and a namespace of its own.

    A domain keeps apart what takes part in the choice of domains. Another node on the machine may be in the same one:
    its topics and services have other names.

    Args:
        tmp_path: for the logs.
        arguments: ROS arguments of the node.
        calibrated: whether camera_info is offered to the node.
        discovery_range: as ROS_AUTOMATIC_DISCOVERY_RANGE.
        fork: whether the node may be forked from a process that has loaded PyTorch (forked.py), which saves seconds. A
            node that starts from nothing has other seeds of Python's and NumPy's random numbers than the one before.
        parameters: of the node. The topics in the names of quality of service overrides are those without a namespace.
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
