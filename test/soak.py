"""A long run of the node with everything that other nodes may do, and a table of the observations (make soak).

The node runs as its own process. A camera bag is played to it in a loop, faster than it can process, with faults mixed
in: broken messages, unusable calibrations, silences, jumps in time, subscribers that come and go, resets, parameter
changes, deactivation. Ends with status 1 if a check failed: the node died, a diagnostics message did not
account for every frame, a result was older than the processing of two frames, memory, threads or files grew, or
something published was not a number.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger
from test_endurance import Resources
from test_fuzz import assert_nothing_but_numbers, random_calibration, random_frame, random_image, random_stamp, stamped

from kpmatch_ros.bags import image_topics, read_messages, typestore
from kpmatch_ros.msg import FeatureArray, MatchArray
from kpmatch_ros.runtime.processor import BFLOAT16, processor_features
from node_harness import NodeUnderTest, running_node
from simulation.bags import write_demo_bag

SLACK = 0.15  # seconds allowed besides the inference: pose, publishing and transport
WARM_UP = 0.3  # part of the run after which the node's memory, threads and files must not grow
FRAMES = 12  # number of frames after each of which memory is measured
PARAMETERS = {"max_keypoints": 1024, "reference": "previous", "filter_threshold": 0.1, "depth_confidence": 0.95}
ODDITIES = 24  # number of invalid images and images of all sizes to choose from
SUBSCRIPTIONS = ((Image, "match_image"), (FeatureArray, "features"), (MatchArray, "matches"))


class Camera:
    """Plays images and calibrations of a camera or a stereo pair in a loop. The stamps continue, or jump."""

    def __init__(self, node: NodeUnderTest, sides: list[list[tuple[Image, CameraInfo]]]) -> None:
        topics = ["left/", "right/"] if len(sides) == 2 else [""]
        qos = QoSProfile(depth=1000)
        self.images = [node.node.create_publisher(Image, f"{topic}image", qos) for topic in topics]
        self.infos = [node.node.create_publisher(CameraInfo, f"{topic}camera_info", qos) for topic in topics]
        self.jump = 0.0
        self.sent: dict[int, float] = {}
        self._sides = sides
        self._number = 0

    def send(self) -> None:
        seconds = 1000.0 + 0.05 * self._number + self.jump
        for side, image_publisher, info_publisher in zip(self._sides, self.images, self.infos):
            image, info = side[self._number % len(side)]
            info_publisher.publish(stamped(info, seconds, "camera"))
            image_publisher.publish(stamped(image, seconds, "camera"))
        self._number += 1
        self.sent[nanoseconds(image.header.stamp)] = time.monotonic()
        while len(self.sent) > 1000:
            self.sent.pop(next(iter(self.sent)))


def nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def inference(matches: MatchArray) -> float:
    """Return the time that a message's feature extraction and matching took, seconds."""
    return float(matches.extract_ms + matches.match_ms) / 1e3


def read_bag(path: Path, topic: str) -> list[tuple[Image, CameraInfo]]:
    """Return the images of a topic with their calibrations, as rclpy messages."""
    info_topic = f"{topic.rsplit('/', 1)[0]}/camera_info"
    store = typestore()
    images, infos = [], []
    for record in read_messages(path, [topic, info_topic]):
        kind, into = (Image, images) if record.topic == topic else (CameraInfo, infos)
        raw = store.serialize_cdr(record.message, record.message.__msgtype__)
        into.append(deserialize_message(bytes(raw), kind))
    return list(zip(images, infos, strict=True))


@dataclass
class Soak:
    """A run: sends everything to the node and records the observations."""

    node: NodeUnderTest
    camera: Camera
    rng: np.random.Generator
    ages: deque[float] = field(default_factory=deque)
    late: int = 0
    oldest: float = 0.0
    results: int = 0
    events: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    at_rest: list[float] = field(default_factory=list)
    between_frames: list[float] = field(default_factory=list)
    _last_cost: float = 0.0
    _stereo_costs: dict[int, float] = field(default_factory=dict)
    _subscriptions: list[Any] = field(default_factory=list)
    _subscribed: int = 0
    _arrived: dict[int, float] = field(default_factory=dict)
    _seen: int = 0

    def __post_init__(self) -> None:
        # Few enough that each occurs before memory is noted, because code compiled for an image size stays in memory.
        self._images = [random_image(self.rng) for _ in range(ODDITIES)]
        self.node.subscribe(MatchArray, "matches", self._note_arrival)
        # Everything that takes memory permanently happens once at the start. From then on memory must not grow.
        self._rehearsal = [self.send_the_largest, *(self.subscribe,) * len(SUBSCRIPTIONS), *self._kinds()]

    def _note_arrival(self, matches: MatchArray) -> None:
        """Record the time when a result arrives, which is earlier than the time when this program checks it."""
        self._arrived[nanoseconds(matches.header.stamp)] = time.monotonic()

    def send_oddities(self, pause: float) -> None:
        """Send each of the odd images once, to all cameras with the same stamp, because otherwise they form no pair."""
        for image in self._images:
            self.send_oddity(image)
            self.node.spin(pause)

    def send_oddity(self, image: Image) -> None:
        stamp, frame = random_stamp(self.rng), random_frame(self.rng)
        for publisher in self.camera.images:
            publisher.publish(stamped(image, stamp, frame))

    def measure_processing(self, frames: int = 12) -> float:
        """Return the seconds that a frame takes if each is sent after the result of the one before."""
        started = 0.0
        for i in range(frames):
            if i == 2:
                started = time.monotonic()
            self.node.matches.clear()
            self.camera.send()
            if i == 0:
                self.node.wait_for_figure("frames processed", "1", timeout=120)
            else:
                self.node.wait_for(lambda: self.node.matches, "a pair")
        self.node.matches.clear()
        self.node.poses.clear()
        return (time.monotonic() - started) / (frames - 2)

    def run(self, seconds: float, processing: float, interval: float, report: Callable[[float], None]) -> None:
        """Send a frame every ``interval`` seconds, some of them faulty, and call ``report`` once a minute."""
        started = due = time.monotonic()
        next_event, next_report = started + 5, started + 60
        while (now := time.monotonic()) < started + seconds:
            if self.node.process.poll() is not None:
                self.faults.append(f"the node ended with status {self.node.process.returncode}")
                return
            if now >= due:
                self.send_frame()
                due = max(due + interval, now - 1.0)
            self.node.spin(min(max(due - time.monotonic(), 0.0), 0.02))
            self.check_messages()
            if now >= next_event:
                self.perform_event()
                next_event = time.monotonic() + float(self.rng.uniform(2, 15))
            if not self.at_rest and now >= started + WARM_UP * seconds:
                self.note_memory(processing)
            if next_report <= (now := time.monotonic()) < started + seconds - 5:
                report(now - started)
                next_report = max(next_report + 60, now)
        report(seconds)
        self.note_memory(processing)

    def send_frame(self) -> None:
        """Send a frame, or occasionally something invalid."""
        kind = self.rng.random()
        if kind < 0.03:
            self.send_oddity(self._random_image())
        elif kind < 0.04:
            publisher = self.camera.infos[int(self.rng.integers(0, len(self.camera.infos)))]
            publisher.publish(stamped(random_calibration(self.rng), 1.0, random_frame(self.rng)))
        elif kind < 0.05:
            self.camera.images[-1].publish(stamped(self._random_image(), random_stamp(self.rng), "lonely"))
        else:
            self.camera.send()

    def _random_image(self) -> Image:
        return self._images[int(self.rng.integers(0, len(self._images)))]

    def check_messages(self) -> None:
        """Check the messages that have arrived."""
        for matches in self.node.stereo_matches:
            self._stereo_costs[nanoseconds(matches.header.stamp)] = inference(matches)
        for matches in self.node.matches:
            # A stereo frame has two images and two pairs.
            cost = inference(matches) + self._stereo_costs.pop(nanoseconds(matches.header.stamp), 0.0)
            stamp = nanoseconds(matches.header.stamp)
            sent, arrived = self.camera.sent.get(stamp), self._arrived.pop(stamp, None)
            if sent is not None and arrived is not None:
                age = arrived - sent
                self.ages.append(age)
                self.oldest = max(self.oldest, age)
                self.late += age > 2 * max(cost, self._last_cost) + SLACK
                self.results += 1
            self._last_cost = cost
        try:
            assert_nothing_but_numbers(self.node.matches + self.node.stereo_matches, self.node.poses)
        except AssertionError as error:
            self.faults.append(f"published: {error}")
        self.node.matches.clear()
        self.node.stereo_matches.clear()
        self.node.poses.clear()
        self.node.pictures.clear()
        self.node.features.clear()
        for array in self.node.diagnostics[self._seen :]:
            counts = {item.key: int(item.value) for item in array.status[0].values if item.key.startswith("frames ")}
            received = counts.pop("frames received")
            if received != sum(counts.values()) or min(counts.values()) < 0:
                self.faults.append(f"diagnostics: {received} frames received, but {counts}")
        del self.node.diagnostics[:-1]
        self._seen = len(self.node.diagnostics)

    def perform_event(self) -> None:
        """Perform one of the events that happen between frames."""
        kinds = self._kinds()
        event = self._rehearsal.pop(0) if self._rehearsal else kinds[int(self.rng.integers(0, len(kinds)))]
        self.events[event.__name__.replace("_", " ")] += 1
        event()

    def _kinds(self) -> tuple[Callable[[], None], ...]:
        return (
            self.subscribe,
            self.unsubscribe,
            self.reset,
            self.change_parameters,
            self.be_silent,
            self.jump_in_time,
            self.offer_another_qos,
            self.deactivate_for_a_moment,
        )

    def call(self, kind: type, name: str, request: Any) -> Any:
        client = self.node.node.create_client(kind, name)
        self.node.wait_for(client.service_is_ready, f"the service {name}")
        future = client.call_async(request)
        self.node.wait_for(future.done, f"the answer of {name}")
        self.node.node.destroy_client(client)
        return future.result()

    def subscribe(self) -> None:
        kind, topic = SUBSCRIPTIONS[self._subscribed % len(SUBSCRIPTIONS)]
        self._subscribed += 1
        self._subscriptions.append(self.node.subscribe(kind, topic, lambda message: None))

    def send_the_largest(self) -> None:
        image = Image(encoding="mono8", width=7680, height=4320, step=7680, data=bytes(7680 * 4320))
        for publisher in self.camera.images:
            publisher.publish(stamped(image, 1.0, "large"))

    def unsubscribe(self) -> None:
        if self._subscriptions:
            self.node.node.destroy_subscription(self._subscriptions.pop(0))

    def reset(self) -> None:
        self.call(Trigger, "reset", Trigger.Request())

    def change_parameters(self) -> None:
        changes = [
            *PARAMETERS.items(),
            ("max_keypoints", 512),
            ("max_keypoints", -5),
            ("reference", "keyframe"),
            ("filter_threshold", 0.3),
            ("filter_threshold", 2.0),
            ("depth_confidence", -1.0),
        ]
        self.set_parameters(changes[int(self.rng.integers(0, len(changes)))])

    def set_parameters(self, *changes: tuple[str, Any]) -> None:
        request = SetParametersAtomically.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in changes]
        self.call(SetParametersAtomically, "matcher/set_parameters_atomically", request)

    def be_silent(self) -> None:
        self.node.spin(float(self.rng.uniform(1, 4)))

    def jump_in_time(self) -> None:
        self.camera.jump += float(self.rng.choice([-500.0, 0.001, 3600.0, 31_557_600.0]))
        self.camera.jump = float(np.clip(self.camera.jump, -900, 1e9))

    def offer_another_qos(self) -> None:
        profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        publisher = self.node.node.create_publisher(Image, self.camera.images[0].topic_name, profile)
        self.node.spin(0.5)
        publisher.publish(stamped(self._random_image(), 1.0, "other"))
        self.node.node.destroy_publisher(publisher)

    def deactivate_for_a_moment(self) -> None:
        self.make(Transition.TRANSITION_DEACTIVATE)
        self.make(Transition.TRANSITION_ACTIVATE)

    def note_memory(self, processing: float) -> None:
        """Record the node's memory between frames and while it is inactive. Neither may grow.

        The parameters are always the same, because half as many keypoints take less memory. During a frame the memory
        varies by a third. So the smallest of several measurements counts, each after another frame.
        """
        self.set_parameters(*PARAMETERS.items())
        held = []
        for _ in range(FRAMES):
            self.camera.send()
            self.node.spin(1.5 * processing)
            self.check_messages()
            held.append(self.memory())
        self.between_frames.append(min(held))
        self.make(Transition.TRANSITION_DEACTIVATE)
        self.at_rest.append(self.memory())
        self.make(Transition.TRANSITION_ACTIVATE)

    def memory(self) -> float:
        """Return the node's memory in MB."""
        return Resources(self.node.process.pid).memory / 1e6

    def make(self, transition: int) -> None:
        """Perform a lifecycle transition of the node."""
        request = ChangeState.Request(transition=Transition(id=transition))
        if not self.call(ChangeState, "matcher/change_state", request).success:
            self.faults.append(f"transition {transition} failed")


HEADER = " minute  received  processed  dropped  rejected  age 50 %  age 99 %   oldest  memory MB  threads  files"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--overload", type=float, default=4.0, help="frames sent for each that can be processed")
    parser.add_argument("--stereo", action="store_true", help="a pair of cameras instead of one")
    parser.add_argument("--bag", type=Path, help="of one camera, or of a pair; a synthetic one by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("auto", "float32", "bfloat16"),
        default=["auto"],
        help="of the networks; with several, one run after the other",
    )
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE", help="of the node")
    options = parser.parse_args()
    if "bfloat16" in options.precision and not processor_features() & BFLOAT16:
        parser.error("--precision bfloat16: this processor does not compute in it")
    return max(run_soak(options, precision) for precision in options.precision)


def run_soak(options: argparse.Namespace, precision: str) -> int:
    """Perform a run in one precision, and return the exit status."""
    print(f"precision {precision}")
    parameters = {"precision": precision, **dict(item.split("=", 1) for item in options.parameter)}
    with tempfile.TemporaryDirectory() as folder:
        bag = options.bag
        if bag is None:
            bag = Path(folder) / "bag"
            baseline = 0.11 if options.stereo else None
            write_demo_bag(bag, num_frames=8, size=(320, 240), encoding="mono8", baseline=baseline)
        if options.stereo:
            parameters = {"mode": "stereo", "rectified": options.bag is None, "publish_odometry": True, **parameters}
        topics = sorted(topic.name for topic in image_topics(bag))[: 2 if options.stereo else 1]
        with running_node(Path(folder), queue="latest", **parameters) as node:
            return soak(node, Camera(node, [read_bag(bag, topic) for topic in topics]), options)


def soak(node: NodeUnderTest, camera: Camera, options: argparse.Namespace) -> int:
    """Perform a run, print the table and the verdict, and return the exit status."""
    run = Soak(node, camera, np.random.default_rng(options.seed))
    node.wait_for(lambda: node.node.count_publishers("matches"), "the node to come up")
    node.wait_for(lambda: all(publisher.get_subscription_count() for publisher in camera.images), "its subscriptions")
    node.spin(0.5)
    processing = run.measure_processing()
    interval = processing / options.overload
    print(f"a frame takes {1e3 * processing:.0f} ms; one is sent every {1e3 * interval:.0f} ms, faults among them")
    print(HEADER, flush=True)
    history: list[tuple[float, Resources]] = []

    def report(elapsed: float) -> None:
        held = Resources(node.process.pid)
        history.append((elapsed, held))
        figures = node.figures()
        ages = 1e3 * np.array(run.ages or [np.nan])
        print(
            f"{elapsed / 60:7.1f} {figures['frames received']:>9} {figures['frames processed']:>10}"
            f" {figures['frames dropped']:>8} {figures['frames rejected']:>9} {np.percentile(ages, 50):>6.0f} ms"
            f" {np.percentile(ages, 99):>6.0f} ms {1e3 * run.oldest:>5.0f} ms {held.memory / 1e6:>10.1f}"
            f" {held.threads:>8} {held.files:>6}",
            flush=True,
        )
        run.ages.clear()

    run.send_oddities(1.5 * processing)
    run.run(60 * options.minutes, processing, interval, report)
    faults = list(dict.fromkeys(run.faults))
    warm = [held for elapsed, held in history if elapsed >= WARM_UP * 60 * options.minutes]
    memory = {"at rest": run.at_rest, "between frames": run.between_frames}
    growth = {when: 100 * (held[-1] / held[0] - 1) for when, held in memory.items() if held}
    faults += [f"memory {when} grew by {more:.1f} % after the warm-up" for when, more in growth.items() if more > 1]
    if warm[-1].threads > warm[0].threads + 1 or warm[-1].files > warm[0].files + 2:
        faults.append(f"threads {warm[0].threads} to {warm[-1].threads}, files {warm[0].files} to {warm[-1].files}")
    if run.late > 0.01 * run.results:
        faults.append(f"{run.late} of {run.results} results were older than the processing of two frames")
    if "Traceback" in node.log:
        faults.append("the node's log holds a traceback")
    if node.process.poll() is None and node.stop() != 0:
        faults.append("the node did not end cleanly")
    print("\nevents: " + ", ".join(f"{count} x {name}" for name, count in sorted(run.events.items())))
    print(
        "rejected: "
        + ", ".join(
            f"{key.removeprefix('rejected: ')} {value}"
            for key, value in sorted(node.figures().items())
            if key.startswith("rejected: ")
        )
    )
    print(f"{run.late} of {run.results} results older than the processing of two frames")
    for when, more in growth.items():
        print(f"memory {when} {memory[when][0]:.1f} and {memory[when][-1]:.1f} MB, {more:+.2f} %")
    for fault in faults:
        print(f"FAULT: {fault}")
    print("passed" if not faults else "failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
