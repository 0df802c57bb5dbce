"""Replays a bag without ROS: writes a bag of what the node would publish for every frame in order. `kpmatch bag`."""

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
from kpmatch_ros.bags.reading import Bag
from kpmatch_ros.bags.readout import ReadoutSearch
from kpmatch_ros.bags.recording import BagError, OutputError, is_recording
from kpmatch_ros.bags.report import Report
from kpmatch_ros.bags.rerun_recording import RerunRecording
from kpmatch_ros.bags.trajectory import Trajectory
from kpmatch_ros.bags.writing import BagWriter
from kpmatch_ros.encodable import encodable
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.odometry import check_odometry
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.pipeline import PATIENCE, Pipeline
from kpmatch_ros.source_files import overwritten

__all__ = ["replay"]

_TF_STATIC = "/tf_static"
_MOST_WAITING = 100  # frames; bounds the memory, whatever the recorder's clock says
_PAUSE = 10  # times the 90th percentile of the steps between images: a longer step is a pause of the recording
_LOOK = 100_000_000  # nanoseconds between two checks whether a camera of a pair has fallen silent, as in the node
_MOST_LOOKS = 100  # checks between two messages: further ones find nothing new
_INFO_OPTIONS = {"mono": ["--camera-info"], "stereo": ["--left-info", "--right-info"]}


class _Waiting(NamedTuple):
    """A frame that waits for its masks or its calibration."""

    images: tuple[Any, ...]  # image messages: one, or left and right
    recorded_at: int  # nanoseconds


def replay(
    bag: Bag,
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
    """Write a bag with everything the node would publish for a bag's camera, or for its stereo pair.

    The topics are matches and relative_pose; in stereo also stereo_matches; with publish_odometry also odometry and
    (with publish_tf) /tf; and features, landmarks and match_image if they are requested. Messages have the stamps of
    their images, and the record time of these: in stereo, that of the later image. The new bag has the storage format
    of the source, and its custom_data records how it was made. It is written completely or not at all.

    Args:
        bag: to read.
        out: folder to write, which must not exist.
        cameras: one camera, or in mode stereo the left and the right one.
        parameters: as the node's. Every frame is processed: `queue` is set to all.
        poses: text file for the chained poses in the TUM format.
        page: HTML file for a report of the replay, see :class:`HtmlReport`.
        rerun: file for the Rerun viewer with the same content, see :class:`RerunRecording`.
        features: write `features` too.
        match_image: write `match_image` too.
        landmarks: in stereo, write `landmarks` too.
        readout: for one camera, also search for the `readout_time` that explains the matches best.

    Returns:
        the figures of the replay.

    Raises:
        OutputError: the output cannot be written, for example because the disk is full.
        BagError: the bag is broken, none of its images can be used, or `out` exists.
        ParameterError, WeightsError: the networks cannot be loaded, or odometry is requested for one camera.
        OSError: a file cannot be written.
        ValueError: the number of cameras does not fit the mode.
    """
    stereo = parameters.mode == "stereo"
    if len(cameras) != 1 + stereo:
        raise ValueError(f"mode {parameters.mode} with {len(cameras)} cameras")
    check_odometry(parameters)
    try:
        if out.exists() or out.is_symlink():
            raise BagError(f"{out}: exists already; remove it or choose another name")
        os.lstat(out.with_name(f"{out.name}.mcap"))  # checked early: the longest name that will be written
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BagError(f"{out}: cannot be written: {error.strerror}; choose another name") from error
    if bag.path.resolve() in out.resolve().parents:
        raise BagError(f"{out}: lies in the bag that is read; choose another place")
    files = [path for path in (poses, page, rerun) if path is not None]
    for path in (out, *files):
        if not path.resolve().parent.is_dir():
            raise BagError(f"{path}: there is no folder {path.parent}")
    shown = None if page is None else HtmlReport(metric=stereo)
    if rerun is not None:
        RerunRecording.check_installed()
    for path in files:
        _check_place(path, bag.path, out)
        if [each.resolve() for each in files].count(path.resolve()) > 1:
            raise BagError(
                f"{path}: is named for two of the poses, the report and the Rerun recording; choose another name"
            )
    front_end = FrontEnd(parameters.replace({"queue": "all"}))
    front_end.matcher.warm_up()
    with ExitStack() as stack:
        # The stack unwinds in reverse: all outputs are finished, then the bag is moved to its place, then the files.
        text, page_file, file = (
            None if path is None else stack.enter_context(_whole_or_not(path)) for path in (poses, page, rerun)
        )
        folder = stack.enter_context(_whole_or_not(out))
        notes = origin(bag.path, cameras, front_end.parameters, front_end.matcher)
        writer = stack.enter_context(BagWriter(folder, bag.storage, notes=notes))
        trajectory = Trajectory(None if text is None else stack.enter_context(text.open("w")))
        asked = {"features": features, "landmarks": landmarks, "match_image": match_image}
        wanted = {"/tf", *(topic for topic, given in asked.items() if given)}
        for topic, type_name in _outputs(parameters, wanted).items():
            writer.declare(topic, type_name)
        recording = None
        title = encodable(f"Matches of {bag.path.resolve().name}")
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
                f"{bag.path}: none of the {sum(camera.num_images for camera in cameras)} images on {topics} can "
                f"be used: {next(filter(None, why))}"
            )
        for camera, option in zip(cameras, _INFO_OPTIONS[parameters.mode]):
            if not camera.camera_info:
                missing = f"there is no camera_info beside {camera.image}, so no relative pose; name one with {option}"
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
    """Raise BagError if a file would replace something else. It is checked before the work, not after it."""
    place = file.resolve()
    if place == out.resolve():
        raise BagError(f"{file}: is the bag to write, so it cannot be a file too; choose another name for one of them")
    if overwritten(file, [bag]) is not None:
        raise BagError(f"{file}: belongs to the bag that is read; choose another name")
    if place.is_dir():
        raise BagError(f"{file}: is a folder; give the name of a file")
    if (place.name == "metadata.yaml" and place.exists()) or is_recording(place):
        raise BagError(f"{file}: belongs to a bag; choose another name")
    if place.exists() and not place.is_file():  # /dev/null would become a regular file for the whole machine
        raise BagError(f"{file}: is a device or a pipe, which cannot be replaced; give the name of a file")


def _process(
    bag: Bag,
    cameras: tuple[CameraTopics, ...],
    front_end: FrontEnd,
    writer: BagWriter,
    wanted: set[str],
    trajectory: Trajectory,
    watchers: Sequence[HtmlReport | RerunRecording | ReadoutSearch],
) -> Report:
    report = Report(cameras)
    recorded: list[int] = []  # record times of the first camera's images, nanoseconds
    images = 0
    waiting: deque[_Waiting] = deque()
    processed_at = 0  # record time of the frame that is processed, nanoseconds

    def publish(topic: str, message: Any) -> None:
        writer.write(f"/{topic.lstrip('/')}", message, processed_at)

    sides = {camera.image: side for side, camera in enumerate(cameras)}
    pipeline = Pipeline(front_end, list(sides), publish, wanted.__contains__, report, new_message)
    infos: dict[str, list[int]] = {}  # sides by topic: both cameras may share one topic
    for side, camera in enumerate(cameras):
        if camera.camera_info:
            infos.setdefault(camera.camera_info, []).append(side)
            # Images that were recorded before the first calibration use that one.
            first = next(bag.messages({camera.camera_info: [CAMERA_INFO_TYPE]}, []), None)
            if first is None:
                report.faults.append(
                    f"{bag.path}: declares messages on {camera.camera_info}, but holds none that can be read"
                )
            else:
                pipeline.add_info(side, first.message)
    places = front_end.parameters.publish_odometry or front_end.parameters.base_frame
    if places and any(topic.name == _TF_STATIC for topic in bag.topics):
        odd: list[str] = []
        for record in bag.messages({_TF_STATIC: [TF_TYPE]}, odd):
            pipeline.transforms.update(record.message)
        # Remarks about the whole bag come when the images are read, so only those about this topic are kept.
        report.remarks += [remark for remark in odd if remark.startswith(f"{_TF_STATIC}: ")]
    masks: dict[str, list[int]] = {}
    for side, camera in enumerate(cameras):
        if camera.mask:
            masks.setdefault(camera.mask, []).append(side)
    pipeline.masks.expected = [side for sides_of_mask in masks.values() for side in sides_of_mask]

    def process(now: int | None) -> None:
        """Process the frames that are complete or have waited long enough; all frames if `now` is None."""
        nonlocal processed_at
        while waiting and (
            now is None
            or abs(now - waiting[0].recorded_at) > PATIENCE * 1e9  # abs, because the recorder's clock may go back
            or len(waiting) > _MOST_WAITING
            or pipeline.complete(waiting[0].images)
        ):
            images, processed_at = waiting.popleft()
            begun = time.perf_counter()
            result = pipeline.process(images)
            if result is not None:
                trajectory.add(result.frame, result.pair)
                milliseconds = (time.perf_counter() - begun) * 1e3
                report.processed(result, milliseconds)
                for watcher in watchers:
                    watcher.add(result, milliseconds)

    looked: int | None = None

    def advance_clock(until: int) -> None:
        """Advance the recorder's clock. As in the node, a pose reports a camera of a pair that has fallen silent."""
        nonlocal looked, processed_at
        if looked is None or until < looked:
            looked = until
        for _ in range(min((until - looked) // _LOOK, _MOST_LOOKS)):
            looked += _LOOK
            alone = pipeline.watch(looked * 1e-9)
            if alone is not None:
                process(looked)
                processed_at = looked
                pipeline.interrupt(alone)
        if until - looked >= _LOOK:
            looked = until

    wanted_types: dict[str, Sequence[str]] = {
        **dict.fromkeys(masks, IMAGE_TYPES[:1]),
        **{topic: [CAMERA_INFO_TYPE] for topic in infos},
        **dict.fromkeys(sides, IMAGE_TYPES),
    }
    started = time.perf_counter()
    # disable=None: no progress bar if stderr is not a terminal
    with tqdm(total=cameras[0].num_images, desc="frames", unit="frame", disable=None, leave=False) as bar:
        for topic, _, recorded_at, message in bag.messages(wanted_types, report.remarks):
            advance_clock(recorded_at)
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
    """Mean time between images in seconds, from their record times in nanoseconds; 0 for a single image.

    Pauses of the recording do not count. A pause is measured against the 90th percentile of the steps, because images
    may have been recorded in bursts: most steps are then shorter than the usual one.
    """
    steps = np.sort(np.abs(np.diff(stamps)))
    if not len(steps):
        return 0.0
    usual = steps[int(0.9 * (len(steps) - 1))]
    return float(steps[steps <= _PAUSE * usual].mean()) * 1e-9


@contextmanager
def _whole_or_not(path: Path) -> Iterator[Path]:
    """Give a temporary path for a file or folder. It is moved to `path` on success, and otherwise leaves no trace.

    If `path` is a link, the file that it points to is replaced.
    """
    target = path.resolve()
    folder = target.parent / f".kpmatch.{secrets.token_hex(8)}"  # the name itself may already have the largest length
    place = folder / path.name
    try:
        folder.mkdir(mode=0o700)  # inside the try, so that it is removed if a signal comes at once
        yield place
        os.replace(place, target)
    except BagError as error:  # its text names the temporary path, which the user does not know
        raise type(error)(str(error).replace(str(place), str(path))) from error
    except OSError as error:  # a full disk does not report the file
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR) and target.exists():
            raise BagError(f"{path}: was created by another program while this one ran; choose another name") from error
        if str(folder) in map(str, (error.filename, error.filename2)):  # the user does not know the temporary folder
            raise OutputError(f"{path}: cannot be written to {target.parent}: {error.strerror}") from error
        if error.filename is not None:
            raise
        raise OutputError(f"{path}, or a file beside it, cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
