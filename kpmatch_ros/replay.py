"""A bag in, a bag out: what the matcher node would publish, every frame in order, without ROS. `kpmatch bag`."""
from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname, join
from typing import Any, TextIO

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from kpmatch_ros import messages
from kpmatch_ros.bags import (
    IMAGE_TYPES,
    BagError,
    BagWriter,
    Topic,
    bag_storage,
    bag_topics,
    new_message,
    read_messages,
)
from kpmatch_ros.camera import CalibrationError, Camera
from kpmatch_ros.drawing import draw_matches
from kpmatch_ros.front_end import Frame, FrontEnd, Pair
from kpmatch_ros.geometry import PoseStatus
from kpmatch_ros.images import ImageError, to_array
from kpmatch_ros.parameters import ParameterError, Parameters

__all__ = ["CameraTopics", "Report", "Trajectory", "choose_camera", "replay"]

CAMERA_INFO = "sensor_msgs/msg/CameraInfo"


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
    topics = bag_topics(bag)
    chosen = _only(bag, [topic for topic in topics if topic.type in IMAGE_TYPES], image, "image", "--image")
    infos = [topic for topic in topics if topic.type == CAMERA_INFO]
    if camera_info is not None:
        info = _only(bag, infos, camera_info, "camera_info", "--camera-info").name
    else:
        raw = chosen.name
        if chosen.type == IMAGE_TYPES[1]:  # <image>/compressed
            raw = dirname(raw)
        names = [topic.name for topic in infos]
        beside = join(dirname(raw), "camera_info")
        info = beside if beside in names else names[0] if len(names) == 1 else ""
    return CameraTopics(chosen.name, info, chosen.num_messages)


def _only(bag: Path, candidates: list[Topic], name: str | None, what: str, option: str) -> Topic:
    known = ", ".join(topic.name for topic in candidates)
    if not candidates:
        raise BagError(f"{bag}: has no {what} topic with messages in it")
    if name is None:
        if len(candidates) > 1:
            raise BagError(f"{bag}: has {len(candidates)} {what} topics, choose one with {option}: {known}")
        return candidates[0]
    for topic in candidates:
        if topic.name.lstrip("/") == name.lstrip("/"):
            return topic
    raise BagError(f"{bag}: {option} {name}: there is no such {what} topic with messages in it; there is {known}")


class _Calibration:
    """The camera of the latest camera_info, as the node takes it."""

    def __init__(self, bag: Path, topic: str, rectified: bool) -> None:
        self._rectified = rectified
        self._camera: Camera | None = None
        self._fault: CalibrationError | None = None
        if topic:  # images that were recorded before the first calibration have that one
            self.update(next(read_messages(bag, [topic])).message)

    def update(self, info: Any) -> None:
        """A newer camera_info."""
        self._camera = self._fault = None
        try:
            self._camera = Camera.from_camera_info(info, rectified=self._rectified)
        except CalibrationError as error:
            self._fault = error

    def camera_for(self, width: int, height: int) -> Camera | None:
        """The camera for images of this size; None where there is no calibration. Raises CalibrationError."""
        if self._fault is not None:
            raise self._fault
        if self._camera is not None:
            self._camera.check_size(width, height)
        return self._camera


# Output


class Trajectory:
    """Relative poses chained, as lines of a TUM file: seconds, x y z, quaternion x y z w of the camera in the world.

    The world is the first camera's optical frame. From one camera, each translation has length one: the path's shape
    within a pair is right, its scale is arbitrary from pair to pair. A frame whose pose is not known has no line; one
    that can only be related to such a frame breaks the chain, which goes on from the last known pose after a comment.
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
        self._write(frame, rotation * Rotation.from_matrix(pair.pose.rotation),
                    position + rotation.apply(pair.pose.translation))
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
        topics: of the camera.
        size: width and height of the last image, pixels.
        latencies: of each frame, from its message to its results in the bag, milliseconds.
        keypoints: of each frame.
        matches, inliers: of each pair.
        poses: how many pairs have which status.
        rejected, calibrations_refused: how many frames could not be used, or had a calibration that could not, by
            reason.
        faults: what was wrong, in words: the first of each kind.
        recorded: time from the first to the last image, seconds.
        elapsed: time that it took, seconds.
        breaks: of the chain of poses; None where it was not written.
    """

    topics: CameraTopics
    size: tuple[int, int] = (0, 0)
    latencies: list[float] = field(default_factory=list)
    keypoints: list[int] = field(default_factory=list)
    matches: list[int] = field(default_factory=list)
    inliers: list[int] = field(default_factory=list)
    poses: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    calibrations_refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    recorded: float = 0.0
    elapsed: float = 0.0
    breaks: int | None = None

    def add(self, frame: Frame, pair: Pair | None, milliseconds: float) -> None:
        """A frame that went all the way."""
        self.size = frame.features.size
        self.latencies.append(milliseconds)
        self.keypoints.append(len(frame.keypoints))
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
        return {
            "image": self.topics.image,
            "camera_info": self.topics.camera_info or None,
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

    def rows(self) -> list[tuple[str, str]]:
        """The same for people."""
        figures = self.figures()

        def counts(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

        def of_pairs(name: str) -> str:
            return "-" if figures[name] is None else f"{figures[name]:.0f} per pair (median)"

        width, height = self.size
        latency = figures["latency_ms"]
        rows = [
            ("frames", f"{figures['frames']} of {width} x {height} ({self.topics.image})"),
            ("rate", f"{figures['rate']:.1f} frames a second, {figures['times_real_time']:.1f} times as fast as "
                     "recorded"),
            ("latency", f"{latency['median']:.0f} ms (median), {latency['95 %']:.0f} ms (95 %)"),
            ("keypoints", f"{figures['keypoints']:.0f} per frame (median)"),
            ("matches", of_pairs("matches")),
            ("inliers", of_pairs("inliers")),
            ("poses", counts(self.poses) or "none"),
        ]  # fmt: skip
        if self.breaks:
            rows.append(("chain", f"broken {self.breaks} times: see the comments among the poses"))
        if self.rejected:
            rows.insert(1, ("rejected", f"{sum(self.rejected.values())} images: {counts(self.rejected)}"))
        if self.calibrations_refused:
            rows.append(("camera_info", f"refused: {counts(self.calibrations_refused)}"))
        return rows


def _percentile(values: list[float] | list[int], percent: float) -> float | None:
    return _rounded(float(np.percentile(values, percent))) if values else None


def _rounded(value: float) -> float:
    return round(value, 3)


# The replay


def replay(
    bag: Path, out: Path, topics: CameraTopics, parameters: Parameters, *, poses: Path | None = None,
    features: bool = False, match_image: bool = False,
) -> Report:
    """Write a bag with what the node publishes for a bag's camera: matches, relative_pose and, if wanted, the others.

    Messages have the stamps of their images, and are recorded at the times of these. The bag is stored as the one read
    is, and is there whole or not at all.

    Args:
        bag: to read.
        out: folder to write, which must not exist.
        topics: of the camera.
        parameters: as the node's; every frame is processed whatever `queue` says.
        poses: text file for the chained poses in TUM's format.
        features: write `features` too.
        match_image: write `match_image` too.

    Raises:
        BagError: when the bag is broken, none of its images can be used, or `out` cannot be written.
        ParameterError, WeightsError: when the networks cannot be loaded, or the mode is not mono.
        OSError: when a file cannot be written.
    """
    if parameters.mode != "mono":
        raise ParameterError(f"mode is {parameters.mode!r}, which this version does not have yet; use mono")
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
        report = _process(bag, writer, topics, front_end, trajectory, features, match_image)
        if not report.latencies:
            raise BagError(f"{bag}: none of the {topics.num_images} images on {topics.image} can be used: "
                           f"{report.faults[0]}")
    return report


def _process(
    bag: Path, writer: BagWriter, topics: CameraTopics, front_end: FrontEnd, trajectory: Trajectory | None,
    features: bool, match_image: bool,
) -> Report:
    report = Report(topics)
    calibration = _Calibration(bag, topics.camera_info, front_end.parameters.rectified)
    wanted = [topics.image, *([topics.camera_info] if topics.camera_info else [])]
    recorded: list[int] = []
    started = time.perf_counter()
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=topics.num_images, desc="frames", unit="frame", disable=None, leave=False) as bar:
        for topic, _, recorded_at, message in read_messages(bag, wanted):
            if topic == topics.camera_info:
                calibration.update(message)
                continue
            arrived = time.perf_counter()
            recorded.append(recorded_at)
            bar.update()
            try:
                image = to_array(message)
            except ImageError as error:
                report.fault(report.rejected, error.reason, f"an image was rejected: {error}")
                continue
            try:
                camera = calibration.camera_for(image.shape[1], image.shape[0])
            except CalibrationError as error:
                camera = None
                report.fault(report.calibrations_refused, error.reason, f"camera_info is of no use: {error}")
            stamp = messages.nanoseconds(message.header.stamp)
            frame, pair = front_end.register_frame(image, stamp, camera, message.header.frame_id)
            _write(writer, recorded_at, frame, pair, front_end.parameters, features, match_image)
            if trajectory is not None:
                trajectory.add(frame, pair)
            report.add(frame, pair, (time.perf_counter() - arrived) * 1e3)
    report.elapsed = time.perf_counter() - started
    report.recorded = (max(recorded) - min(recorded)) * 1e-9
    report.breaks = None if trajectory is None else trajectory.breaks
    return report


def _write(
    writer: BagWriter, recorded_at: int, frame: Frame, pair: Pair | None, parameters: Parameters, features: bool,
    match_image: bool,
) -> None:
    """One frame's messages, in the order in which the node publishes them."""
    if features:
        writer.write("/features", messages.feature_array(frame, parameters.extractor, new_message), recorded_at)
    if pair is None:
        return
    matches = messages.match_array(
        pair, messages.Pairing.CONSECUTIVE, parameters.extractor, parameters.matcher, new_message
    )
    writer.write("/matches", matches, recorded_at)
    writer.write("/relative_pose", messages.relative_pose(pair, new_message), recorded_at)
    if match_image:
        text = f"{len(pair.indices)} matches, {pair.pose.num_inliers} inliers, {pair.pose.status.name}"
        picture = draw_matches(
            pair.reference.image, frame.image, pair.reference_points, pair.points, pair.scores, pair.pose.inliers, text
        )
        header = messages.header_of(frame, new_message)
        writer.write("/match_image", messages.image_message(picture, header, new_message), recorded_at)
