"""kpmatch demo: runs the real node, in its own process, on a camera bag with ground-truth poses."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpmatch_ros.cli.common import CommandError, add_command, whole_number, write_picture
from kpmatch_ros.shell import in_shell, matcher_in_shell
from kpmatch_ros.tables import format_table

if TYPE_CHECKING:
    from kpmatch_ros.geometry.pose import Pose
    from kpmatch_ros.ros.player import Answers, RecordedFrame

__all__ = ["add_demo"]

_PICTURES, _BEST_PAIR, _LOG = ("frame0.png", "frame1.png"), "matches.png", "node.log"  # beside the bag
_FIRST_DOMAIN_PORT = 32768  # a process that holds port 32768 + N uses domain N: convention of ROS's domain_coordinator


def add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        _demo,
        "run the whole node on a camera bag, and compare its poses with the ground truth",
        "Start the matcher node as a process of its own, send it the camera bag that ships with the package over DDS, "
        "receive its messages, and compare its poses with the true motion. Needs ROS 2 and the built messages.",
        "kpmatch demo --out demo",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("demo"),
        help="output folder for the bag and the pictures; files of an earlier demo in it are replaced (default demo)",
    )
    parser.add_argument("--frames", metavar="N", type=whole_number(2), default=12, help="images to send (default 12)")


def _demo(options: argparse.Namespace) -> int:
    run_demo(options.out, options.frames)
    return 0


@dataclass(frozen=True)
class Step:
    """The node's result for one pair of frames, compared with the ground truth.

    Attributes:
        matches: the node's MatchArray.
        pose: the node's RelativePose.
        latency: from publishing the image to having received both messages, milliseconds.
        rotation_error: degrees; None if the node gave no rotation.
        direction_error: of the translation's direction, degrees; None if the estimated or true translation is zero, or
            if the node gave no pose.
    """

    matches: Any
    pose: Any
    latency: float
    rotation_error: float | None
    direction_error: float | None

    @property
    def num_matches(self) -> int:
        """Number of matches between the two frames."""
        return len(self.matches.scores)

    @property
    def inlier_ratio(self) -> float:
        """Fraction of the matches that are inliers of the pose."""
        return self.pose.num_inliers / self.num_matches if self.num_matches else 0.0


def run_demo(out: Path, frames: int) -> None:
    """Run the node on the demo bag, print its errors against the ground truth, and save a picture of the matches.

    Args:
        out: folder for the bag, the pictures and the node's log; it is created if it is missing.
        frames: number of images in the bag, at least two.

    Raises:
        CommandError: ROS 2 or the messages are missing, something else is in the place of the demo's files, or the node
            fails.
    """
    _load_ros()
    from kpmatch_ros.bags.demo import IMAGE_TOPIC, INFO_TOPIC
    from kpmatch_ros.ros.player import play

    started = time.monotonic()
    _make_room(out)
    bag = _unpack(out, frames)  # first, because the bag shows the next demo that the other files are a demo's too
    with _ros_domain() as domain, _node_process(domain, out / _LOG) as node:
        recorded, truth = _read_bag(bag)
        print("waiting for the node ...", file=sys.stderr)
        answers = play(recorded, IMAGE_TOPIC, INFO_TOPIC, domain, node.check)
    steps = _compare(answers, truth)
    picture = _save_best_picture(out / _BEST_PAIR, steps, answers.pictures)
    _print_results(steps, bag, picture, time.monotonic() - started)


def _load_ros() -> None:
    """Import the modules that need ROS and the messages. Raises CommandError if that fails."""
    try:
        import kpmatch_ros.ros.player  # noqa: F401
    except ImportError as error:
        if (error.name or "").startswith("kpmatch_ros"):
            raise CommandError(
                f"the messages of kpmatch_ros are not built, or their workspace is not sourced ({error}): colcon build "
                "--packages-select kpmatch_ros and . install/setup.sh, or make demo in a checkout "
                f"({in_shell('kpmatch doctor')})"
            ) from error
        raise CommandError(
            f"the demo runs a ROS 2 node, but ROS 2 is not installed for {sys.executable} ({error}): source your ROS "
            "installation, or run make demo in a checkout of kpmatch_ros, which installs ROS 2 into .venv/"
        ) from error


def _make_room(folder: Path) -> None:
    """Create the folder, and remove what an earlier demo left in it, except the bag.

    Raises:
        CommandError: something with one of these names is there, such as a recording, and nothing shows that a demo
            made it.
    """
    from kpmatch_ros.bags.demo import is_demo_bag
    from kpmatch_ros.bags.recording import BagError, own_files

    folder.mkdir(parents=True, exist_ok=True)
    bag = folder / "bag"
    files = [folder / name for name in (*_PICTURES, _BEST_PAIR, _LOG)]
    if is_demo_bag(bag):
        try:
            own_files(bag)
        except BagError as error:
            raise CommandError(str(error)) from error
    elif taken := next(filter(os.path.lexists, (bag, *files)), None):
        raise CommandError(
            f"{taken}: exists already, and nothing shows that kpmatch demo made it; remove it, or choose another "
            "folder with --out"
        )
    for path in files:
        path.unlink(missing_ok=True)


def _unpack(folder: Path, frames: int) -> Path:
    """Write the demo's frames as a bag, and the first two as picture files. Returns the bag's path."""
    from kpmatch_ros.bags import BagError
    from kpmatch_ros.bags.demo import demo_frames, unpack_demo_bag

    bag = folder / "bag"
    try:
        unpack_demo_bag(bag, frames)
    except BagError as error:
        raise CommandError(str(error)) from error
    for name, frame in zip(_PICTURES, demo_frames(2)):
        write_picture(folder / name, frame.image)
    return bag


# The node


@contextlib.contextmanager
def _ros_domain() -> Iterator[int]:
    """Reserve a ROS domain that no other process on this machine uses, and restrict discovery to this machine."""
    domains = [domain for domain in range(1, 101) if str(domain) != os.environ.get("ROS_DOMAIN_ID")]
    random.shuffle(domains)
    for domain in domains:
        with socket.socket() as lock:
            try:
                lock.bind(("", _FIRST_DOMAIN_PORT + domain))
            except OSError:
                continue
            os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
            # Humble does not know the range, and later versions warn about this variable. Cyclone DDS fails if its own
            # configuration selects an interface too.
            if os.environ.get("ROS_DISTRO") == "humble" and "CYCLONEDDS_URI" not in os.environ:
                os.environ["ROS_LOCALHOST_ONLY"] = "1"
            yield domain
            return
    raise CommandError("all ROS domains from 1 to 100 are in use on this machine")


class _Node:
    """The process of the matcher node, and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def check(self) -> None:
        """Raise CommandError if the process has ended or has logged an error."""
        lines = self._log.read_text(errors="replace").splitlines()
        complaints = [line for line in lines if "[ERROR]" in line or "[FATAL]" in line]
        if self._process.poll() is not None or complaints:
            said = (complaints or lines[-1:] or ["nothing"])[0]
            raise CommandError(f"the node failed; its log says: {said} (the whole log is {self._log})")


@contextlib.contextmanager
def _node_process(domain: int, log: Path) -> Iterator[_Node]:
    """Start the matcher node, and end it when the context is left, also after an exception."""
    from kpmatch_ros.bags.demo import IMAGE_TOPIC, INFO_TOPIC

    command = [
        *_executable(),
        "--ros-args",
        *("-r", f"image:={IMAGE_TOPIC}", "-r", f"camera_info:={INFO_TOPIC}"),
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
    """The command that starts the node: the installed executable with this Python, whatever its first line says."""
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    with contextlib.suppress(PackageNotFoundError):
        script = Path(get_package_prefix("kpmatch_ros"), "lib", "kpmatch_ros", "matcher")
        if script.is_file():
            return [sys.executable, str(script)]
    return [sys.executable, "-c", "import sys; from kpmatch_ros.ros.main import main; sys.exit(main())"]


# The recording


def _read_bag(path: Path) -> tuple[list[RecordedFrame], dict[int, Pose]]:
    """The recorded frames, serialised, and the camera's ground-truth poses by stamp."""
    from kpmatch_ros.bags import Bag, ground_truth
    from kpmatch_ros.bags.demo import IMAGE_TOPIC, INFO_TOPIC
    from kpmatch_ros.ros.player import RecordedFrame

    images: dict[int, bytes] = {}
    infos: dict[int, bytes] = {}
    recorded = {IMAGE_TOPIC: images, INFO_TOPIC: infos}
    with Bag(path) as bag:
        for raw in bag.raw_messages(recorded):
            recorded[raw.topic][raw.stamp] = raw.content()  # the record time is the stamp of the image
        stamps, poses = ground_truth(bag)
    frames = [RecordedFrame(stamp, infos[stamp], images[stamp]) for stamp in sorted(images)]
    return frames, dict(zip(stamps.tolist(), poses))


def _compare(answers: Answers, truth: dict[int, Pose]) -> list[Step]:
    """The node's result for each pair of consecutive frames, in order."""
    stamps = sorted(truth)
    return [
        Step(
            answers.matches[current],
            answers.poses[current],
            answers.latencies[current],
            *_errors(answers.poses[current], truth[previous], truth[current]),
        )
        for previous, current in zip(stamps, stamps[1:])
    ]


def _errors(pose: Any, reference: Pose, current: Pose) -> tuple[float | None, float | None]:
    """Errors of a RelativePose against the ground truth, degrees: of the rotation and of the translation's direction.

    An error is None if there is nothing to compare: no pose, or a translation of zero.
    """
    import numpy as np
    from scipy.spatial.transform import Rotation

    from kpmatch_ros.geometry.pose import PoseStatus, relative_motion

    if not PoseStatus(pose.status).has_pose:
        return None, None
    turned, moved = relative_motion(reference, current)
    q, p = pose.pose.pose.orientation, pose.pose.pose.position
    found_turn, found = Rotation.from_quat([q.x, q.y, q.z, q.w]), np.array([p.x, p.y, p.z])
    rotation_error = float(np.degrees((found_turn.inv() * Rotation.from_matrix(turned)).magnitude()))
    if not found.any() or not moved.any():
        return rotation_error, None
    # arctan2 of sine and cosine, because the arc cosine is inaccurate near zero.
    angle = np.arctan2(np.linalg.norm(np.cross(found, moved)), found @ moved)
    return rotation_error, float(np.degrees(angle))


# Output


def _save_best_picture(path: Path, steps: list[Step], pictures: dict[int, Any]) -> Path | None:
    """Save the node's picture of a pair with many inliers and visible motion. Returns its path, or None without one."""
    from kpmatch_ros.imaging.images import to_array
    from kpmatch_ros.ros.player import nanoseconds

    shown = [step for step in steps if nanoseconds(step.matches.header.stamp) in pictures]
    if not shown:
        return None
    best = max(shown, key=lambda step: step.pose.num_inliers * min(step.pose.median_parallax, 30.0))
    write_picture(path, to_array(pictures[nanoseconds(best.matches.header.stamp)]))
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
    said = steps[0].matches
    print(format_table(rows, right=range(1, 6)))
    print(
        f"\n{len(steps) + 1} frames of {said.width} x {said.height}, {said.extractor} with {said.matcher}, "
        f"{elapsed:.0f} s in total.\n"
        "Latency: from publishing an image to receiving its matches and its pose. Errors: from the bag's true motion."
    )
    print(f"\npicture    {picture or 'none arrived'}\nbag        {bag}\nnode's log {bag.parent / _LOG}")
    if shutil.which("ros2"):
        node = "ros2 launch kpmatch_ros matcher.launch.py image:=/camera/image_raw camera_info:=/camera/camera_info"
    else:
        node = matcher_in_shell("--ros-args -r image:=/camera/image_raw -r camera_info:=/camera/camera_info")
    first, second, pair = (shlex.quote(str(bag.parent / name)) for name in (*_PICTURES, "pair.png"))
    print(
        f"""
What next:
check this machine
  {in_shell("kpmatch doctor")}
match two image files
  {in_shell(f"kpmatch match {first} {second} --save {pair}")}
start the node for your own camera
  {node}"""
    )
