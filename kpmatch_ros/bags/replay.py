"""A bag in, a bag out: what the matcher node would publish, every frame in order, without ROS. `kpmatch bag`."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from kpmatch_ros.bags.cameras import CameraTopics
from kpmatch_ros.bags.html_report import HtmlReport
from kpmatch_ros.bags.message_types import CAMERA_INFO_TYPE, IMAGE_TYPES, TF_TYPE, new_message
from kpmatch_ros.bags.origin import origin
from kpmatch_ros.bags.reading import bag_storage, bag_topics, read_messages
from kpmatch_ros.bags.readout import ReadoutSearch
from kpmatch_ros.bags.recording import BagError, OutputError, encodable, is_recording
from kpmatch_ros.bags.report import Report
from kpmatch_ros.bags.rerun_recording import RerunRecording
from kpmatch_ros.bags.trajectory import Trajectory
from kpmatch_ros.bags.writing import BagWriter
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.odometry import check_odometry
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.pipeline import PATIENCE, Pipeline
from kpmatch_ros.source_files import overwritten

__all__ = ["replay"]

_TF_STATIC = "/tf_static"
_MOST_WAITING = 100  # frames, whatever the recorder's clock says: that memory stays bounded
_PAUSE = 10  # times as long as nine of ten steps from image to image: the recording paused
_LOOK = 100_000_000  # nanoseconds after which the node looks whether a camera has fallen silent
_MOST_LOOKS = 100  # between two messages: longer, nothing new is found
_INFO_OPTIONS = {"mono": ["--camera-info"], "stereo": ["--left-info", "--right-info"]}


class _Waiting(NamedTuple):
    """A frame that waits for its masks or its calibration."""

    images: tuple[Any, ...]  # messages: one, or left and right
    recorded_at: int  # nanoseconds


def replay(
    bag: Path,
    out: Path,
    cameras: tuple[CameraTopics, ...],
    parameters: Parameters,
    *,
    poses: Path | None = None,
    page: Path | None = None,
    rerun: Path | None = None,
    features: bool = False,
    match_image: bool = False,
    landmarks: bool = False,
    readout: bool = False,
) -> Report:
    """Write a bag of what the node would publish for a bag's camera, or for its stereo pair of cameras.

    The topics are matches and relative_pose, in stereo also stereo_matches, with publish_odometry odometry and /tf, and
    features, landmarks and match_image where they are wanted. Messages have the stamps of their images and are
    recorded when these were: in stereo, when the later one was. The bag has the storage of the one read, and says in
    its custom_data what it was made from and by. It is written whole or not at all.

    Args:
        bag: to read.
        out: folder to write, which must not exist.
        cameras: one, or with mode stereo the left and the right one.
        parameters: as the node's. Every frame is processed: `queue` is all.
        poses: text file for the chained poses in TUM's format.
        page: HTML file for a page with everything that the replay shows, see :class:`HtmlReport`.
        rerun: file for the Rerun viewer with the same, see :class:`RerunRecording`.
        features: write `features` too.
        match_image: write `match_image` too.
        landmarks: in stereo, write `landmarks` too.
        readout: of one camera, look for the `readout_time` that explains the matches best, too.

    Raises:
        OutputError: when there is no place for what is to be written.
        BagError: when the bag is broken, none of its images can be used, or `out` exists.
        ParameterError, WeightsError: when the networks cannot be loaded, or odometry is asked of one camera.
        OSError: when a file cannot be written.
        ValueError: when there are more or fewer cameras than the mode has.
    """
    stereo = parameters.mode == "stereo"
    if len(cameras) != 1 + stereo:
        raise ValueError(f"mode {parameters.mode} with {len(cameras)} cameras")
    check_odometry(parameters)
    try:
        os.lstat(out.with_name(f"{out.name}.mcap"))  # the longest name that will be written
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BagError(f"{out}: cannot be written: {error.strerror}; choose another name") from error
    if out.exists() or out.is_symlink():
        raise BagError(f"{out}: exists already; remove it or choose another name")
    if bag.resolve() in out.resolve().parents:
        raise BagError(f"{out}: lies in the bag that is read; choose another place")
    files = [path for path in (poses, page, rerun) if path is not None]
    for path in (out, *files):
        if not path.resolve().parent.is_dir():
            raise BagError(f"{path}: there is no folder {path.parent}")
    shown = None if page is None else HtmlReport(metric=stereo)
    if rerun is not None:
        RerunRecording.check_installed()
    for path in files:
        _check_place(path, bag, out)
        if [each.resolve() for each in files].count(path.resolve()) > 1:
            raise BagError(
                f"{path}: cannot hold two of the poses, the report and the recording for Rerun; choose another name"
            )
    front_end = FrontEnd(parameters.replace({"queue": "all"}))
    front_end.matcher.warm_up()
    with ExitStack() as stack:
        # The last to be entered is the first to end: all are finished, then the bag is moved to its place, then files.
        text, page_file, file = (
            None if path is None else stack.enter_context(_whole_or_not(path)) for path in (poses, page, rerun)
        )
        folder = stack.enter_context(_whole_or_not(out))
        notes = origin(bag, cameras, front_end.parameters, front_end.matcher)
        writer = stack.enter_context(BagWriter(folder, bag_storage(bag), notes=notes))
        trajectory = Trajectory(None if text is None else stack.enter_context(text.open("w")))
        asked = {"features": features, "landmarks": landmarks, "match_image": match_image}
        wanted = {"/tf", *(topic for topic, given in asked.items() if given)}
        for topic, type_name in _outputs(parameters, wanted).items():
            writer.declare(topic, type_name)
        recording = None
        title = encodable(f"Matches of {bag.resolve().name}")
        if file is not None:
            recording = stack.enter_context(RerunRecording(file, title, metric=stereo))
        search = ReadoutSearch(parameters) if readout else None
        watchers = [each for each in (shown, recording, search) if each is not None]
        report = _process(bag, cameras, front_end, writer, wanted, trajectory, watchers)
        if not report.latencies:
            topics = " and ".join(camera.image for camera in cameras)
            why = [
                report.first_rejection,
                *report.faults,
                *report.remarks,
                "the bag declares them, but none can be read",
            ]
            raise BagError(
                f"{bag}: none of the {sum(camera.num_images for camera in cameras)} images on {topics} can "
                f"be used: {next(filter(None, why))}"
            )
        for camera, option in zip(cameras, _INFO_OPTIONS[parameters.mode]):
            if not camera.camera_info:
                missing = f"no camera_info beside {camera.image}, so no relative pose; {option} names one"
                report.faults.append(missing)
        report.readout = search
        if shown is not None and page_file is not None:
            shown.write(page_file, title, report.rows(), report.faults)
        if recording is not None:
            recording.finish(report.rows(), report.faults)
    return report


def _outputs(parameters: Parameters, wanted: set[str]) -> dict[str, str]:
    """The topics of the bag to write, and their types."""
    types = {"/matches": "kpmatch_ros/msg/MatchArray", "/relative_pose": "kpmatch_ros/msg/RelativePose"}
    if parameters.mode == "stereo":
        types["/stereo_matches"] = "kpmatch_ros/msg/MatchArray"
    if parameters.publish_odometry:
        types["/odometry"] = "nav_msgs/msg/Odometry"
        types |= {"/tf": TF_TYPE} if parameters.publish_tf else {}
    asked = {
        "features": "kpmatch_ros/msg/FeatureArray",
        "landmarks": "sensor_msgs/msg/PointCloud2",
        "match_image": IMAGE_TYPES[0],
    }
    return types | {f"/{topic}": type_name for topic, type_name in asked.items() if topic in wanted}


def _check_place(file: Path, bag: Path, out: Path) -> None:
    """Refuse a file in the place of something else, before the work rather than after it."""
    place = file.resolve()
    if place == out.resolve():
        raise BagError(f"{file}: is to hold the bag, so it cannot be a file too; choose another name for one of them")
    if overwritten(file, [bag]) is not None:
        raise BagError(f"{file}: belongs to the bag that is read; choose another name")
    if place.is_dir():
        raise BagError(f"{file}: is a folder; give the name of a file")
    if (place.name == "metadata.yaml" and place.exists()) or is_recording(place):
        raise BagError(f"{file}: belongs to a bag; choose another name")
    if place.exists() and not place.is_file():  # /dev/null would become a file, and be one for all of the machine
        raise BagError(f"{file}: is a device or a pipe, which cannot be replaced; give the name of a file")


def _process(
    bag: Path,
    cameras: tuple[CameraTopics, ...],
    front_end: FrontEnd,
    writer: BagWriter,
    wanted: set[str],
    trajectory: Trajectory,
    watchers: Sequence[HtmlReport | RerunRecording | ReadoutSearch],
) -> Report:
    report = Report(cameras)
    recorded: list[int] = []  # when the images of the first camera were, nanoseconds
    images = 0
    waiting: deque[_Waiting] = deque()
    at_hand = 0  # when the frame at hand was recorded

    def publish(topic: str, message: Any) -> None:
        writer.write(f"/{topic.lstrip('/')}", message, at_hand)

    sides = {camera.image: side for side, camera in enumerate(cameras)}
    pipeline = Pipeline(front_end, list(sides), publish, wanted.__contains__, report, new_message)
    infos: dict[str, list[int]] = {}  # one topic may be given for both cameras
    for side, camera in enumerate(cameras):
        if camera.camera_info:
            infos.setdefault(camera.camera_info, []).append(side)
            # Images that were recorded before the first calibration have that one.
            first = next(read_messages(bag, {camera.camera_info: [CAMERA_INFO_TYPE]}, []), None)
            if first is None:
                report.faults.append(
                    f"{bag}: declares messages on {camera.camera_info}, but holds none that can be read"
                )
            else:
                pipeline.add_info(side, first.message)
    places = front_end.parameters.publish_odometry or front_end.parameters.base_frame
    if places and any(topic.name == _TF_STATIC for topic in bag_topics(bag)):
        odd: list[str] = []
        for record in read_messages(bag, {_TF_STATIC: [TF_TYPE]}, odd):
            pipeline.transforms.update(record.message)
        # What is odd about the whole bag, reading the images tells.
        report.remarks += [remark for remark in odd if remark.startswith(f"{_TF_STATIC}: ")]
    masks: dict[str, list[int]] = {}
    for side, camera in enumerate(cameras):
        if camera.mask:
            masks.setdefault(camera.mask, []).append(side)
    pipeline.masks.expected = [side for sides_of_mask in masks.values() for side in sides_of_mask]

    def process(now: int | None) -> None:
        """Process the frames that are complete, or have waited for long; all of them where now is None."""
        nonlocal at_hand
        while waiting and (
            now is None
            or abs(now - waiting[0].recorded_at) > PATIENCE * 1e9  # the recorder's clock may go back
            or len(waiting) > _MOST_WAITING
            or pipeline.complete(waiting[0].images)
        ):
            images, at_hand = waiting.popleft()
            begun = time.perf_counter()
            result = pipeline.process(images)
            if result is not None:
                trajectory.add(result.frame, result.pair)
                milliseconds = (time.perf_counter() - begun) * 1e3
                report.processed(result, milliseconds)
                for watcher in watchers:
                    watcher.add(result, milliseconds)

    looked: int | None = None

    def listen(until: int) -> None:
        """Let the recorder's clock go on: a camera of a pair that has fallen silent is told of, as by the node."""
        nonlocal looked, at_hand
        if looked is None or until < looked:
            looked = until
        for _ in range(min((until - looked) // _LOOK, _MOST_LOOKS)):
            looked += _LOOK
            alone = pipeline.watch(looked * 1e-9)
            if alone is not None:
                process(looked)
                at_hand = looked
                pipeline.interrupt(alone)
        if until - looked >= _LOOK:
            looked = until

    wanted_types: dict[str, Sequence[str]] = {
        **dict.fromkeys(masks, IMAGE_TYPES[:1]),
        **{topic: [CAMERA_INFO_TYPE] for topic in infos},
        **dict.fromkeys(sides, IMAGE_TYPES),
    }
    started = time.perf_counter()
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=cameras[0].num_images, desc="frames", unit="frame", disable=None, leave=False) as bar:
        for topic, _, recorded_at, message in read_messages(bag, wanted_types, report.remarks):
            listen(recorded_at)
            for side in infos.get(topic, ()):
                pipeline.add_info(side, message)
            for side in masks.get(topic, ()):
                pipeline.add_mask(side, message)
            if topic in sides:
                images += 1
                if sides[topic] == 0:
                    recorded.append(recorded_at)
                    bar.update()
                received = pipeline.add_image(sides[topic], message, recorded_at)
                if received is not None:
                    waiting.append(_Waiting(received, recorded_at))
            process(recorded_at)
        process(None)
    if not images:
        return report
    pipeline.finish()
    report.finish()
    report.elapsed = time.perf_counter() - started
    report.recorded = (max(recorded) - min(recorded)) * 1e-9 if recorded else 0.0
    report.period = _period(recorded)
    report.breaks, report.chain_doubts = trajectory.breaks, trajectory.doubts
    report.odometry_breaks = pipeline.odometry_breaks
    return report


def _period(stamps: list[int]) -> float:
    """Mean time between images, recorded at these nanoseconds, seconds; 0 of one. Pauses of the recording do not count.

    Images may have been recorded in bursts: most of the steps are then shorter.
    """
    steps = np.sort(np.abs(np.diff(stamps)))
    if not len(steps):
        return 0.0
    usual = steps[int(0.9 * (len(steps) - 1))]
    return float(steps[steps <= _PAUSE * usual].mean()) * 1e-9


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """A place to write a file or folder that moves to `path` when all went well, and otherwise leaves no trace.

    Where `path` is a link, the file that it names is written.
    """
    target = path.resolve()
    folder = target.parent / f".kpmatch.{secrets.token_hex(8)}"  # the name itself may be as long as names can be
    place = folder / path.name
    try:
        folder.mkdir(mode=0o700)  # in here, so that it is removed where a signal comes at once
        yield place
        os.replace(place, target)
    except BagError as error:  # it names the place that nobody knows
        raise type(error)(str(error).replace(str(place), str(path))) from error
    except OSError as error:  # a disk that is full does not say of which file
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR) and target.exists():
            raise BagError(f"{path}: was made by another program while this one ran; choose another name") from error
        if str(folder) in map(str, (error.filename, error.filename2)):  # nobody knows it
            raise OutputError(f"{path}: cannot be written to {target.parent}: {error.strerror}") from error
        if error.filename is not None:
            raise
        raise OutputError(f"{path}, or a file beside it, cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
