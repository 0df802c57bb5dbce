"""A bag in, a bag out: what the matcher node would publish, every frame in order, without ROS. `kpmatch bag`."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname, join
from typing import Any, TextIO

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from kpmatch_ros import messages
from kpmatch_ros.bags.files import (
    IMAGE_TYPES,
    BagError,
    BagWriter,
    Topic,
    bag_storage,
    bag_topics,
    new_message,
    read_messages,
)
from kpmatch_ros.drawing import draw_matches
from kpmatch_ros.front_end import Frame, FrontEnd, Pair
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.stereo_motion import StereoCamera
from kpmatch_ros.images import ImageError, to_array
from kpmatch_ros.odometry import Odometry
from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.stereo_sync import Pairing

__all__ = ["CameraTopics", "Report", "Trajectory", "choose_camera", "choose_stereo_cameras", "replay"]

CAMERA_INFO = "sensor_msgs/msg/CameraInfo"

_SIDES = (("left", "right"), ("cam0", "cam1"), ("infra1", "infra2"))  # how drivers name the two cameras of a pair
_WAITING = 100  # images of one camera that wait for the other's at most, as in the node with queue 'all'


# Input


@dataclass(frozen=True)
class CameraTopics:
    """The topics of one camera in a bag.

    Attributes:
        image: sensor_msgs/Image or CompressedImage.
        camera_info: its calibration; empty where there is none.
        num_images: how many images there are.
    """

    image: str
    camera_info: str
    num_images: int


def choose_camera(bag: Path, image: str | None = None, camera_info: str | None = None) -> CameraTopics:
    """The camera of a bag: of the topics that are not given, those that leave no choice.

    The calibration is camera_info beside the image topic, as image_pipeline has it, or else the only one in the bag.

    Raises:
        BagError: when a topic is not in the bag, or there are several to choose from.
    """
    images, infos = _candidates(bag)
    if image is None and len(images) > 1 and _pairs(images):
        raise BagError(
            f"{bag}: has {len(images)} image topics, choose one with --image, or a stereo pair with --left "
            f"and --right: {_names(images)}"
        )
    chosen = _only(bag, images, image, "image", "--image")
    info = _calibration_of(bag, chosen, infos, camera_info, "--camera-info")
    if not info and len(infos) == 1:
        info = infos[0].name
    return CameraTopics(chosen.name, info, chosen.num_messages)


def choose_stereo_cameras(
    bag: Path,
    left: str | None = None,
    right: str | None = None,
    left_info: str | None = None,
    right_info: str | None = None,
) -> tuple[CameraTopics, CameraTopics]:
    """The left and the right camera of a bag: what is not given is guessed where the bag leaves no choice.

    Image topics are taken for a pair where their names differ in left and right, cam0 and cam1, or infra1 and infra2.
    The calibration of each is camera_info beside its images.

    Raises:
        BagError: when a topic is not in the bag, or there is no pair or several to choose from.
    """
    images, infos = _candidates(bag)
    given = [
        None if name is None else _only(bag, images, name, "image", option)
        for name, option in ((left, "--left"), (right, "--right"))
    ]
    if given[0] is not None and given[1] is not None:
        pairs = [(given[0], given[1])]
    else:
        pairs = [pair for pair in _pairs(images) if all(topic in (None, own) for topic, own in zip(given, pair))]
    if len(pairs) != 1:
        why = f"{len(pairs)} pairs of topics may be" if pairs else "no two topics are named like"
        raise BagError(f"{bag}: {why} a left and a right camera; name them with --left and --right: {_names(images)}")
    (pair,) = pairs
    if pair[0] == pair[1]:
        raise BagError(f"{bag}: --left and --right are both {pair[0].name}; stereo needs two cameras")
    calibrations = (
        _calibration_of(bag, topic, infos, name, option)
        for topic, name, option in zip(pair, (left_info, right_info), ("--left-info", "--right-info"))
    )
    first, second = (CameraTopics(topic.name, info, topic.num_messages) for topic, info in zip(pair, calibrations))
    return first, second


def _candidates(bag: Path) -> tuple[list[Topic], list[Topic]]:
    """The topics with images, at least one, and those with calibrations."""
    topics = bag_topics(bag)
    images = [topic for topic in topics if topic.type in IMAGE_TYPES]
    if not images:
        raise BagError(f"{bag}: has no image topic with messages in it")
    return images, [topic for topic in topics if topic.type == CAMERA_INFO]


def _pairs(images: list[Topic]) -> list[tuple[Topic, Topic]]:
    """Topics whose names differ in the side."""
    return [
        (one, other)
        for one in images
        for other in images
        if any(left in one.name and one.name.replace(left, right) == other.name for left, right in _SIDES)
    ]


def _calibration_of(bag: Path, image: Topic, infos: list[Topic], name: str | None, option: str) -> str:
    """The topic with the calibration of images: the one given, or camera_info beside them, or ""."""
    if name is not None:
        return _only(bag, infos, name, "camera_info", option).name
    beside = join(dirname(image.name.removesuffix("/compressed")), "camera_info")
    return beside if any(topic.name == beside for topic in infos) else ""


def _names(topics: list[Topic]) -> str:
    return ", ".join(topic.name for topic in topics)


def _only(bag: Path, candidates: list[Topic], name: str | None, what: str, option: str) -> Topic:
    if not candidates:
        raise BagError(f"{bag}: has no {what} topic with messages in it")
    if name is None:
        if len(candidates) > 1:
            raise BagError(
                f"{bag}: has {len(candidates)} {what} topics, choose one with {option}: {_names(candidates)}"
            )
        return candidates[0]
    for topic in candidates:
        if topic.name.lstrip("/") == name.lstrip("/"):
            return topic
    raise BagError(
        f"{bag}: {option} {name}: there is no such {what} topic with messages in it; there is {_names(candidates)}"
    )


class _Calibration:
    """The camera, or the pair of them, of the latest camera_infos, as the node takes them."""

    def __init__(self, bag: Path, topics: Sequence[str], rectified: bool) -> None:
        self._topics = topics
        self._rectified = rectified
        self._infos: dict[str, Any] = {}
        self._changed = False
        self._camera: Camera | StereoCamera | None = None
        self._fault: CalibrationError | None = None
        for topic in filter(None, topics):  # images that were recorded before the first calibration have that one
            self.update(topic, next(read_messages(bag, [topic])).message)

    def update(self, topic: str, info: Any) -> None:
        """A newer camera_info."""
        self._infos[topic] = info
        self._changed = True

    def camera_for(self, sizes: Sequence[tuple[int, int]]) -> Camera | StereoCamera | None:
        """The camera, or the pair, for images of these (width, height); None where a calibration is missing.

        Raises CalibrationError.
        """
        if self._changed:
            self._changed, self._camera, self._fault = False, None, None
            try:
                self._camera = self._make()
            except CalibrationError as error:
                self._fault = error
        if self._fault is not None:
            raise self._fault
        if isinstance(self._camera, StereoCamera):
            self._camera.check_size(sizes[0], sizes[1])
        elif self._camera is not None:
            self._camera.check_size(*sizes[0])
        return self._camera

    def _make(self) -> Camera | StereoCamera | None:
        infos = [self._infos[topic] for topic in self._topics if topic in self._infos]
        if len(infos) < len(self._topics):
            return None
        if len(infos) == 1:
            return Camera.from_camera_info(infos[0], rectified=self._rectified)
        return StereoCamera.from_camera_infos(infos[0], infos[1], rectified=self._rectified)


# Output


class Trajectory:
    """Relative poses chained, as lines of a TUM file: seconds, x y z, quaternion x y z w of the camera in the world.

    The world is the first camera's optical frame, in stereo the left one's, and its unit the metre. From one camera,
    each translation has length one: the path's shape within a pair is right, its scale is arbitrary from pair to pair.
    A frame whose pose is not known has no line; one that can only be related to such a frame breaks the chain, which
    goes on from the last known pose after a comment.
    """

    def __init__(self, stream: TextIO) -> None:
        self.breaks = 0
        self._stream = stream
        self._known: dict[int, tuple[Rotation, np.ndarray]] = {}  # by the frames' stamps
        self._last = Rotation.identity(), np.zeros(3)
        stream.write("# timestamp tx ty tz qx qy qz qw: pose of the camera in the first camera's optical frame\n")

    def add(self, frame: Frame, pair: Pair | None) -> None:
        """The next frame, and its pair with the reference."""
        if pair is None:
            if not self._known:
                self._write(frame, *self._last)
            return
        if pair.pose.status not in (PoseStatus.OK, PoseStatus.NO_TRANSLATION):
            self._known.pop(frame.stamp, None)
            return
        start = self._known.get(pair.reference.stamp)
        if start is None:
            self.breaks += 1
            self._stream.write(f"# broken: the pose of the frame at {_seconds(pair.reference.stamp)} is not known\n")
            start = self._last
        rotation, position = start
        self._write(
            frame, rotation * Rotation.from_matrix(pair.pose.rotation), position + rotation.apply(pair.pose.translation)
        )
        reference = pair.reference.stamp
        self._known = {stamp: pose for stamp, pose in self._known.items() if stamp in (reference, frame.stamp)}

    def _write(self, frame: Frame, rotation: Rotation, position: np.ndarray) -> None:
        self._last = self._known[frame.stamp] = rotation, position
        numbers = " ".join(f"{value:.9f}" for value in (*position, *rotation.as_quat()))
        self._stream.write(f"{_seconds(frame.stamp)} {numbers}\n")


def _seconds(stamp: int) -> str:
    return f"{stamp // 10**9}.{stamp % 10**9:09d}"


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """Where to write what is to be at `path`: it gets there when all went well, and otherwise leaves no trace."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Report:
    """What a replay did.

    Attributes:
        cameras: one, or the left and the right one.
        size: width and height of the last image, pixels.
        unpaired: of a stereo pair, how many images on each topic found no partner; a frame is a pair.
        latencies: of each frame, from its (last) message to its results in the bag, milliseconds.
        keypoints: of each frame.
        matches, inliers: of each pair of frames.
        stereo_matches, stereo_inliers: of each pair of images.
        poses: how many frames have which status.
        rejected, calibrations_refused: how many frames could not be used, or had a calibration that could not, by
            reason.
        faults: what was wrong, in words: the first of each kind.
        recorded: time from the first to the last image, seconds.
        elapsed: time that it took, seconds.
        breaks: of the chain of poses; None where it was not written.
        odometry_breaks: of the chain of odometry; None where it was not written.
    """

    cameras: tuple[CameraTopics, ...]
    size: tuple[int, int] = (0, 0)
    latencies: list[float] = field(default_factory=list)
    keypoints: list[int] = field(default_factory=list)
    matches: list[int] = field(default_factory=list)
    inliers: list[int] = field(default_factory=list)
    stereo_matches: list[int] = field(default_factory=list)
    stereo_inliers: list[int] = field(default_factory=list)
    unpaired: Counter[str] = field(default_factory=Counter)
    poses: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    calibrations_refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    recorded: float = 0.0
    elapsed: float = 0.0
    breaks: int | None = None
    odometry_breaks: int | None = None

    def add(self, frame: Frame, pair: Pair | None, stereo: Pair | None, milliseconds: float) -> None:
        """A frame that went all the way."""
        self.size = frame.features.size
        self.latencies.append(milliseconds)
        self.keypoints.append(len(frame.keypoints))
        if stereo is not None:
            self.stereo_matches.append(len(stereo.indices))
            self.stereo_inliers.append(stereo.pose.num_inliers)
        if pair is not None:
            self.matches.append(len(pair.indices))
            self.inliers.append(pair.pose.num_inliers)
            self.poses[pair.pose.status.name] += 1

    def fault(self, counter: Counter[str], reason: str, explanation: str) -> None:
        """A frame, or its calibration, that could not be used."""
        counter[reason] += 1
        if counter[reason] == 1:
            self.faults.append(explanation)

    def figures(self) -> dict[str, Any]:
        """All of it as what JSON can hold; medians are null where there is nothing to take them of."""
        names = ("image",) if len(self.cameras) == 1 else ("left", "right")
        infos = ("camera_info",) if len(self.cameras) == 1 else ("left_info", "right_info")
        figures = {
            **{name: camera.image for name, camera in zip(names, self.cameras)},
            **{name: camera.camera_info or None for name, camera in zip(infos, self.cameras)},
            "frames": len(self.latencies),
            "rejected": dict(self.rejected),
            "camera_info_refused": dict(self.calibrations_refused),
            "rate": _rounded(len(self.latencies) / self.elapsed),
            "times_real_time": _rounded(self.recorded / self.elapsed),
            "latency_ms": {"median": _percentile(self.latencies, 50), "95 %": _percentile(self.latencies, 95)},
            "keypoints": _percentile(self.keypoints, 50),
            "matches": _percentile(self.matches, 50),
            "inliers": _percentile(self.inliers, 50),
            "poses": dict(self.poses),
            "breaks": self.breaks,
        }
        if len(self.cameras) == 2:
            figures |= {
                "unpaired": dict(self.unpaired),
                "stereo_matches": _percentile(self.stereo_matches, 50),
                "stereo_inliers": _percentile(self.stereo_inliers, 50),
                "odometry_breaks": self.odometry_breaks,
            }
        return figures

    def rows(self) -> list[tuple[str, str]]:
        """The same for people."""
        figures = self.figures()

        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

        def of_pairs(name: str) -> str:
            return "-" if figures[name] is None else f"{figures[name]:.0f} per pair (median)"

        width, height = self.size
        latency = figures["latency_ms"]
        topics = " with ".join(camera.image for camera in self.cameras)
        rows = [
            ("frames", f"{figures['frames']} of {width} x {height} ({topics})"),
            ("rate", f"{figures['rate']:.1f} frames a second, {figures['times_real_time']:.1f} times as fast as "
                     "recorded"),
            ("latency", f"{latency['median']:.0f} ms (median), {latency['95 %']:.0f} ms (95 %)"),
            ("keypoints", f"{figures['keypoints']:.0f} per frame (median)"),
            ("matches", of_pairs("matches")),
            ("inliers", of_pairs("inliers")),
            ("poses", counts(self.poses) or "none"),
        ]  # fmt: skip
        stereo = len(self.cameras) == 2
        if stereo:
            rows.insert(
                4,
                (
                    "stereo",
                    f"{figures['stereo_matches']:.0f} matches of left and right, "
                    f"{figures['stereo_inliers']:.0f} inliers per frame (median)",
                ),
            )
        if self.odometry_breaks:
            rows.append(("odometry", f"begins anew {self.odometry_breaks} times: in frames of its own, odom_1 and on"))
        if self.breaks:
            rows.append(("chain", f"broken {self.breaks} times: see the comments among the poses"))
        if self.rejected:
            rows.insert(
                1,
                (
                    "rejected",
                    f"{sum(self.rejected.values())} {'frames' if stereo else 'images'}: {counts(self.rejected)}",
                ),
            )
        if self.unpaired:
            rows.insert(1, ("unpaired", f"images without a partner: {counts(self.unpaired)}"))
        if self.calibrations_refused:
            rows.append(("camera_info", f"refused: {counts(self.calibrations_refused)}"))
        return rows


def _percentile(values: list[float] | list[int], percent: float) -> float | None:
    return _rounded(float(np.percentile(values, percent))) if values else None


def _rounded(value: float) -> float:
    return round(value, 3)


# The replay


def replay(
    bag: Path,
    out: Path,
    cameras: tuple[CameraTopics, ...],
    parameters: Parameters,
    *,
    poses: Path | None = None,
    features: bool = False,
    match_image: bool = False,
) -> Report:
    """Write a bag with what the node publishes for a bag's camera, or for its stereo pair of cameras.

    That is matches and relative_pose, in stereo stereo_matches and, with publish_odometry, odometry and /tf, and if
    wanted the others. Messages have the stamps of their images, and are recorded at the times of these: in stereo, of
    the later one. The bag is stored as the one read is, and is there whole or not at all.

    Args:
        bag: to read.
        out: folder to write, which must not exist.
        cameras: one, or with mode stereo the left and the right one.
        parameters: as the node's; every frame is processed whatever `queue` says.
        poses: text file for the chained poses in TUM's format.
        features: write `features` too.
        match_image: write `match_image` too.

    Raises:
        BagError: when the bag is broken, none of its images can be used, or `out` cannot be written.
        ParameterError, WeightsError: when the networks cannot be loaded, or odometry is asked of one camera.
        OSError: when a file cannot be written.
        ValueError: when there are more or fewer cameras than the mode has.
    """
    stereo = parameters.mode == "stereo"
    if len(cameras) != 1 + stereo:
        raise ValueError(f"mode {parameters.mode} with {len(cameras)} cameras")
    if parameters.publish_odometry and not stereo:
        raise ParameterError("publish_odometry needs mode stereo: the poses of one camera are without metres")
    if out.exists() or out.is_symlink():
        raise BagError(f"{out}: exists already; remove it or choose another name")
    for path in (out, poses):
        if path is not None and not path.resolve().parent.is_dir():
            raise BagError(f"{path}: there is no folder {path.parent}")
    front_end = FrontEnd(parameters)
    front_end.matcher.warm_up()
    with ExitStack() as stack:
        # The last to be entered is the first to be finished and moved to its place.
        text = stack.enter_context(_whole_or_not(poses)) if poses is not None else None
        folder = stack.enter_context(_whole_or_not(out))
        writer = stack.enter_context(BagWriter(folder, bag_storage(bag)))
        trajectory = Trajectory(stack.enter_context(text.open("w"))) if text is not None else None
        output = _Output(writer, parameters, Odometry() if parameters.publish_odometry else None, features, match_image)
        report = _process(bag, cameras, front_end, output, trajectory)
        if not report.latencies:
            topics = " and ".join(camera.image for camera in cameras)
            raise BagError(
                f"{bag}: none of the {sum(camera.num_images for camera in cameras)} images on {topics} can "
                f"be used: {report.faults[0]}"
            )
    return report


def _process(
    bag: Path, cameras: tuple[CameraTopics, ...], front_end: FrontEnd, output: _Output, trajectory: Trajectory | None
) -> Report:
    report = Report(cameras)
    parameters = front_end.parameters
    calibration = _Calibration(bag, [camera.camera_info for camera in cameras], parameters.rectified)
    sides = {camera.image: side for side, camera in enumerate(cameras)}
    infos = {camera.camera_info for camera in cameras if camera.camera_info}
    pairing: Pairing[Any] = Pairing(round(parameters.sync_tolerance * 1e9), _WAITING)
    frames = 0
    recorded: list[int] = []
    started = time.perf_counter()
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=cameras[0].num_images, desc="frames", unit="frame", disable=None, leave=False) as bar:
        for topic, _, recorded_at, message in read_messages(bag, [*sides, *infos]):
            if topic not in sides:
                calibration.update(topic, message)
                continue
            arrived = time.perf_counter()
            recorded.append(recorded_at)
            bar.update(sides[topic] == 0)
            received: tuple[Any, ...] | None = (message,)
            if len(cameras) == 2:
                received = pairing.put(sides[topic], messages.nanoseconds(message.header.stamp), message)
            if received is None:
                continue
            frames += 1
            try:
                images = [to_array(one) for one in received]
            except ImageError as error:
                report.fault(report.rejected, error.reason, f"an image was rejected: {error}")
                continue
            try:
                camera = calibration.camera_for([(image.shape[1], image.shape[0]) for image in images])
            except CalibrationError as error:
                camera = None
                report.fault(report.calibrations_refused, error.reason, f"camera_info is of no use: {error}")
            interrupted = bool(front_end.interruption(messages.nanoseconds(received[0].header.stamp)))
            frame, pair, stereo = _register(front_end, received, images, camera)
            if stereo is not None and stereo.pose.status is PoseStatus.FAILED:
                text = (
                    f"only {stereo.pose.num_inliers} of {len(stereo.indices)} stereo matches agree with the "
                    "camera_infos: left and right images are swapped, or the calibration is another pair's, or no "
                    "longer right"
                )
                report.fault(report.calibrations_refused, "stereo matches", text)
            output.write(recorded_at, frame, pair, stereo, interrupted)
            if trajectory is not None:
                trajectory.add(frame, pair)
            if interrupted:
                report.poses[PoseStatus.INTERRUPTED.name] += 1
            report.add(frame, pair, stereo, (time.perf_counter() - arrived) * 1e3)
    report.elapsed = time.perf_counter() - started
    report.recorded = (max(recorded) - min(recorded)) * 1e-9
    report.breaks = None if trajectory is None else trajectory.breaks
    report.odometry_breaks = None if output.odometry is None else output.odometry.breaks
    if len(cameras) == 2:
        _count_unpaired(report, frames, pairing.offset)
    return report


def _register(
    front_end: FrontEnd, received: tuple[Any, ...], images: list[np.ndarray], camera: Camera | StereoCamera | None
) -> tuple[Frame, Pair | None, Pair | None]:
    """The frame, its pair with the reference, and in stereo that of left and right."""
    stamps = [messages.nanoseconds(message.header.stamp) for message in received]
    names = [message.header.frame_id for message in received]
    if len(images) == 1:
        assert not isinstance(camera, StereoCamera)
        frame, pair = front_end.register_frame(images[0], stamps[0], camera, names[0])
        return frame, pair, None
    assert not isinstance(camera, Camera)
    stereo, pair = front_end.register_stereo_frame(
        images[0], images[1], stamps[0], camera, (names[0], names[1]), stamps[1]
    )
    return stereo.reference, pair, stereo


def _count_unpaired(report: Report, frames: int, offset: int | None) -> None:
    """Name the images without a partner, those that still waited at the end among them."""
    near = "" if offset is None else f"; the last near miss was {offset * 1e-9:.6f} s off"
    for camera in report.cameras:
        if alone := camera.num_images - frames:
            report.unpaired[camera.image] = alone
            report.faults.append(
                f"{alone} images on {camera.image} find no partner within sync_tolerance of their stamps{near}"
            )


@dataclass
class _Output:
    """Writes each frame's messages, in the order in which the node publishes them."""

    writer: BagWriter
    parameters: Parameters
    odometry: Odometry | None
    features: bool
    match_image: bool

    def write(self, recorded_at: int, frame: Frame, pair: Pair | None, stereo: Pair | None, interrupted: bool) -> None:
        """All there is of a frame; ``interrupted`` where it cannot follow the one before."""

        def put(topic: str, message: Any) -> None:
            self.writer.write(topic, message, recorded_at)

        names = self.parameters.extractor, self.parameters.matcher
        if self.features:
            for described in [frame] if stereo is None else [frame, stereo.current]:
                put("/features", messages.feature_array(described, self.parameters.extractor, new_message))
        if stereo is not None:
            put("/stereo_matches", messages.match_array(stereo, messages.Pairing.STEREO, *names, new_message))
        if interrupted:
            put("/relative_pose", messages.interruption(messages.header_of(frame, new_message), new_message))
        if pair is None:
            return
        put("/matches", messages.match_array(pair, messages.Pairing.CONSECUTIVE, *names, new_message))
        put("/relative_pose", messages.relative_pose(pair, new_message))
        position = None if self.odometry is None else self.odometry.add(pair)
        if position is not None:
            message = messages.odometry(frame, position, new_message)
            put("/odometry", message)
            transform = messages.transform_of(message, new_message)
            put("/tf", new_message("tf2_msgs/msg/TFMessage", transforms=[transform]))
        if self.match_image:
            text = f"{len(pair.indices)} matches, {pair.pose.num_inliers} inliers, {pair.pose.status.name}"
            picture = draw_matches(
                pair.reference.image, frame.image, pair.reference_points, pair.points, pair.scores, pair.pose.inliers,
                text,
            )  # fmt: skip
            put("/match_image", messages.image_message(picture, messages.header_of(frame, new_message), new_message))
