"""kpmatch demo: the real node, in a process of its own, on a camera bag whose true motion is known."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpmatch_ros.cli.common import CommandError, add_command, format_table, whole_number

if TYPE_CHECKING:
    from kpmatch_ros.geometry.pose import Pose

__all__ = ["add_demo"]

_IMAGE_TOPIC = "/camera/image_raw"
_INFO_TOPIC = "/camera/camera_info"
_START_TIMEOUT = 120.0  # seconds for the node to load its networks and subscribe
_FRAME_TIMEOUT = 60.0  # seconds for the results of one frame
_FIRST_DOMAIN_PORT = 32768  # whoever holds port 32768 + N uses ROS domain N: the convention of ROS's domain_coordinator


def add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        _demo,
        "run the whole node on a camera bag, and compare its poses with the truth",
        "Start the matcher node as a process of its own, send it the camera bag that ships with the package over DDS, "
        "receive what it publishes, and compare with the true motion. Needs ROS 2 and the built messages.",
        "kpmatch demo --out demo",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("demo"), help="for the bag and the picture (default demo)"
    )
    parser.add_argument("--frames", metavar="N", type=whole_number(2), default=12, help="images to send (default 12)")


def _demo(options: argparse.Namespace) -> int:
    run_demo(options.out, options.frames)
    return 0


@dataclass(frozen=True)
class Step:
    """What the node said of one pair of frames, beside the truth.

    Attributes:
        matches: its MatchArray.
        pose: its RelativePose.
        latency: from publishing the image to having both messages, milliseconds.
        rotation_error: degrees; None where the node gave no rotation.
        direction_error: of the translation, degrees; None where the node gave none.
    """

    matches: Any
    pose: Any
    latency: float
    rotation_error: float | None
    direction_error: float | None

    @property
    def num_matches(self) -> int:
        """Matches between the two frames."""
        return len(self.matches.scores)

    @property
    def inlier_ratio(self) -> float:
        """Share of the matches that agree with the pose."""
        return self.pose.num_inliers / self.num_matches if self.num_matches else 0.0


def run_demo(out: Path, frames: int) -> None:
    """Make a bag, run the node on it, print how well it did, save a picture.

    Args:
        out: folder for the bag, the picture and the node's log; made where it is missing.
        frames: images in the bag, at least two.

    Raises:
        CommandError: when ROS 2 or the messages are missing, or the node fails.
    """
    _check_ros()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _ros_domain() as domain, _node_process(domain, out / "node.log") as node:
        bag = out / "bag"  # made while the node loads PyTorch and its networks
        _make_bag(bag, frames)
        steps, pictures = _replay(bag, domain, node)
    picture = _save_best_picture(out / "matches.png", steps, pictures)
    _print_results(steps, bag, picture, time.monotonic() - started)


def _check_ros() -> None:
    try:
        import rclpy  # noqa: F401
        import sensor_msgs.msg  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"the demo runs a ROS 2 node, and ROS 2 is not here for {sys.executable} ({error}): source your ROS "
            "installation, or run make demo in a checkout of kpmatch_ros, which installs ROS 2 into .venv/"
        ) from error
    try:
        import kpmatch_ros.msg  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"the messages of kpmatch_ros are not built, or their workspace is not sourced ({error}): colcon build "
            "--packages-select kpmatch_ros and . install/setup.sh, or make demo in a checkout (kpmatch doctor)"
        ) from error


def _make_bag(bag: Path, frames: int) -> None:
    from kpmatch_ros.bags.demo import unpack_demo_bag
    from kpmatch_ros.bags.files import BagError

    print(f"unpacking a bag of {frames} frames ...", file=sys.stderr)
    try:
        unpack_demo_bag(bag, frames)
    except BagError as error:
        raise CommandError(str(error)) from error


# The node


@contextlib.contextmanager
def _ros_domain() -> Iterator[int]:
    """A ROS domain that nobody else on this machine uses, and talk that stays on this machine."""
    domains = [domain for domain in range(1, 101) if str(domain) != os.environ.get("ROS_DOMAIN_ID")]
    random.shuffle(domains)
    for domain in domains:
        with socket.socket() as lock:
            try:
                lock.bind(("", _FIRST_DOMAIN_PORT + domain))
            except OSError:
                continue
            os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
            if os.environ.get("ROS_DISTRO") == "humble":  # which does not know the range yet; later ones warn of this
                os.environ["ROS_LOCALHOST_ONLY"] = "1"
            yield domain
            return
    raise CommandError("all ROS domains from 1 to 100 are in use on this machine")


class _Node:
    """The matcher's process and what it has printed."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def check(self) -> None:
        """Raise CommandError when it has ended, or said that it cannot work."""
        lines = self._log.read_text(errors="replace").splitlines()
        complaints = [line for line in lines if "[ERROR]" in line or "[FATAL]" in line]
        if self._process.poll() is not None or complaints:
            said = (complaints or lines[-1:] or ["nothing"])[0]
            raise CommandError(f"the node cannot work; it said: {said} (all of it is in {self._log})")


@contextlib.contextmanager
def _node_process(domain: int, log: Path) -> Iterator[_Node]:
    """Start the matcher node, and end it whatever happens here."""
    command = [
        *_executable(),
        "--ros-args",
        *("-r", f"image:={_IMAGE_TOPIC}", "-r", f"camera_info:={_INFO_TOPIC}"),
        *("-p", "queue:=all"),
    ]
    environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        yield _Node(process, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _executable() -> list[str]:
    """The installed executable, run by the Python that runs this, whatever its first line says."""
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    with contextlib.suppress(PackageNotFoundError):
        script = Path(get_package_prefix("kpmatch_ros"), "lib", "kpmatch_ros", "matcher")
        if script.is_file():
            return [sys.executable, str(script)]
    return [sys.executable, "-c", "import sys; from kpmatch_ros.ros.node import main; sys.exit(main())"]


# The replay


class _Peer:
    """A participant of its own in the node's domain."""

    def __init__(self, name: str, domain: int) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context, domain_id=domain)
        self.node = rclpy.create_node(name, context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)

    def spin(self) -> None:
        """Receive for a moment."""
        self._executor.spin_once(timeout_sec=0.02)

    def close(self) -> None:
        """Leave the domain."""
        import rclpy

        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)


def _replay(bag: Path, domain: int, process: _Node) -> tuple[list[Step], dict[int, Any]]:
    """Publish the bag frame by frame, and collect what the node makes of it.

    Each frame is sent when the results of the one before have arrived: the latency is then that of a frame, not of a
    queue.

    Returns:
        what the node said of each pair, and its pictures by their stamps.
    """
    from rclpy.qos import QoSProfile
    from sensor_msgs.msg import CameraInfo, Image
    from tqdm import tqdm

    from kpmatch_ros.msg import MatchArray, RelativePose

    source, listener = _Peer("demo_camera", domain), _Peer("demo_listener", domain)
    try:
        qos = QoSProfile(depth=100)  # reliable: nothing is lost on the way
        images = source.node.create_publisher(Image, _IMAGE_TOPIC, qos)
        infos = source.node.create_publisher(CameraInfo, _INFO_TOPIC, qos)
        matches: dict[int, Any] = {}
        poses: dict[int, Any] = {}
        pictures: dict[int, Any] = {}
        for kind, topic, received in (
            (MatchArray, "matches", matches),
            (RelativePose, "relative_pose", poses),
            (Image, "match_image", pictures),
        ):
            listener.node.create_subscription(kind, topic, _keep_in(received), qos)

        def wait_for(condition: Callable[[], bool], what: str, timeout: float) -> None:
            end = time.monotonic() + timeout
            while not condition():
                process.check()
                if time.monotonic() > end:
                    raise CommandError(f"waited {timeout:.0f} s in vain for {what}")
                listener.spin()

        def connected() -> bool:
            heard = images.get_subscription_count() and infos.get_subscription_count()
            return bool(heard) and all(
                listener.node.count_publishers(topic) for topic in ("matches", "relative_pose", "match_image")
            )

        print("waiting for the node ...", file=sys.stderr)
        wait_for(connected, "the node to come up", _START_TIMEOUT)
        frames, truth = _read_bag(bag)
        steps: list[Step] = []
        previous = None
        # disable=None: no bar where stderr is no terminal
        for stamp, info, image in tqdm(frames, desc="frames", unit="frame", disable=None, leave=False):
            sent = time.monotonic()
            infos.publish(info)
            images.publish(image)
            if previous is not None:

                def answered(stamp: int = stamp) -> bool:
                    return stamp in matches and stamp in poses

                wait_for(answered, "the results of a frame", _FRAME_TIMEOUT)
                latency = (time.monotonic() - sent) * 1e3
                errors = _errors(poses[stamp], truth[previous], truth[stamp])
                steps.append(Step(matches[stamp], poses[stamp], latency, *errors))
            previous = stamp
        with contextlib.suppress(CommandError):
            wait_for(lambda: len(pictures) >= len(steps), "the pictures", 2.0)
        return steps, pictures
    finally:
        source.close()
        listener.close()


def _keep_in(received: dict[int, Any]) -> Callable[[Any], None]:
    return lambda message: received.__setitem__(_nanoseconds(message.header.stamp), message)


def _nanoseconds(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def _read_bag(bag: Path) -> tuple[list[tuple[int, bytes, bytes]], dict[int, Pose]]:
    """Stamp, calibration and image of each frame, as recorded; and the camera's true poses."""
    from rosbags.highlevel import AnyReader

    from kpmatch_ros.bags.files import read_ground_truth

    recorded: dict[str, dict[int, bytes]] = {_IMAGE_TOPIC: {}, _INFO_TOPIC: {}}
    with AnyReader([bag]) as reader:
        for connection, _, raw in reader.messages([c for c in reader.connections if c.topic in recorded]):
            message: Any = reader.deserialize(raw, connection.msgtype)
            recorded[connection.topic][_nanoseconds(message.header.stamp)] = bytes(raw)
    images, infos = recorded[_IMAGE_TOPIC], recorded[_INFO_TOPIC]
    stamps, poses = read_ground_truth(bag)
    return [(stamp, infos[stamp], images[stamp]) for stamp in sorted(images)], dict(zip(stamps.tolist(), poses))


def _errors(pose: Any, reference: Pose, current: Pose) -> tuple[float | None, float | None]:
    """Angles between a RelativePose and the truth, degrees: of the rotation and of the translation's direction."""
    import numpy as np
    from scipy.spatial.transform import Rotation

    from kpmatch_ros.geometry.pose import relative_motion

    if pose.status not in (pose.OK, pose.NO_TRANSLATION):
        return None, None
    turned, moved = relative_motion(reference, current)
    q, p = pose.pose.pose.orientation, pose.pose.pose.position
    found_turn, found = Rotation.from_quat([q.x, q.y, q.z, q.w]), np.array([p.x, p.y, p.z])
    rotation_error = float(np.degrees((found_turn.inv() * Rotation.from_matrix(turned)).magnitude()))
    if not found.any() or not moved.any():
        return rotation_error, None
    # From sine and cosine: the arc cosine alone is coarse near zero.
    angle = np.arctan2(np.linalg.norm(np.cross(found, moved)), found @ moved)
    return rotation_error, float(np.degrees(angle))


# What is shown


def _save_best_picture(path: Path, steps: list[Step], pictures: dict[int, Any]) -> Path | None:
    """The node's picture of a pair with many good matches and visible motion."""
    import cv2

    from kpmatch_ros.images import to_array

    shown = [step for step in steps if _nanoseconds(step.matches.header.stamp) in pictures]
    if not shown:
        return None
    best = max(shown, key=lambda step: step.pose.num_inliers * min(step.pose.median_parallax, 30.0))
    picture = to_array(pictures[_nanoseconds(best.matches.header.stamp)])
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise CommandError(f"{path} could not be written")
    return path


def _print_results(steps: list[Step], bag: Path, picture: Path | None, elapsed: float) -> None:
    import numpy as np

    from kpmatch_ros.geometry.pose import PoseStatus

    def row(name: str, values: Sequence[float | None], status: str) -> tuple[str, ...]:
        formats = ("{:.0f}", "{:.0f} %", "{:.0f} ms", "{:.3f} °", "{:.2f} °")
        return (name, *("-" if value is None else text.format(value) for text, value in zip(formats, values)), status)

    columns = [
        (step.num_matches, 100 * step.inlier_ratio, step.latency, step.rotation_error, step.direction_error)
        for step in steps
    ]
    medians: list[float | None] = []
    for column in zip(*columns):
        known = [value for value in column if value is not None]
        medians.append(float(np.median(known)) if known else None)
    good = sum(step.pose.status == PoseStatus.OK for step in steps)
    rows: list[tuple[str, ...]] = [
        ("frame", "matches", "inlier ratio", "latency", "rotation error", "direction error", "pose"),
        *(
            row(f"{number - 1} -> {number}", values, PoseStatus(step.pose.status).name)
            for number, (step, values) in enumerate(zip(steps, columns), start=1)
        ),
        row("median", medians, f"{good} of {len(steps)} OK"),
    ]
    first = steps[0].matches
    print(format_table(rows, right=range(1, 6)))
    print(
        f"\n{len(steps) + 1} frames of {first.width} x {first.height}, {first.extractor} with {first.matcher}, "
        f"{elapsed:.0f} s in all.\n"
        "Latency: from publishing an image to having its matches and its pose. Errors: against the bag's true motion."
    )
    print(f"\npicture    {picture or 'none arrived'}\nbag        {bag}\nnode's log {bag.parent / 'node.log'}")
    print(
        "\nWhat next:\n"
        "  kpmatch doctor                               checks this machine\n"
        "  kpmatch match a.jpg b.jpg --save out.png     two images of your own\n"
        "  ros2 launch kpmatch_ros matcher.launch.py image:=/camera/image_raw camera_info:=/camera/camera_info"
    )
