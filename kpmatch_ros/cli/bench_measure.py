"""Makes the measurements of kpmatch bench.

Wall time is the time that a robot waits. Processor time is the cost of the work; on a busy machine it varies far less.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import kpmatch_ros
from kpmatch_ros.bags import Bag, BagError, image_message
from kpmatch_ros.bags.cameras import choose_camera
from kpmatch_ros.bags.demo import demo_frames
from kpmatch_ros.cli.bench import Request
from kpmatch_ros.cli.bench_report import STAGES, Comparison, Row, Spread, draw, report
from kpmatch_ros.cli.common import CommandError, check_outputs, read_image, resized
from kpmatch_ros.cli.ros_answers import ProcessEndedError, ask_ros
from kpmatch_ros.feature_matcher import LARGEST_IMAGE, FeatureMatcher
from kpmatch_ros.frames import Pair
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.imaging.images import ImageError, to_array
from kpmatch_ros.parameters import ParameterError, Parameters, declarations
from kpmatch_ros.runtime.device import choose_device, choose_precision, format_name
from kpmatch_ros.runtime.processor import processor_name

__all__ = ["back_and_forth", "alternated", "run_bench"]

_PERIOD = 100_000_000  # nanoseconds between two frames
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".webp")

Image = NDArray[np.uint8]


class Lap(NamedTuple):
    """Wall time and processor time (of all threads) that some work took, milliseconds."""

    wall: float
    cpu: float

    def less(self, other: Lap) -> Lap:
        """The time without that of a part."""
        return Lap(self.wall - other.wall, self.cpu - other.cpu)


class Film(NamedTuple):
    """A sequence of images, and the calibration of a camera for the size of the first image; None if not known."""

    images: list[Image]
    camera: Camera | None

    def resized(self, size: tuple[int, int]) -> Film:
        """The sequence with each image resized to (width, height), and the calibration scaled accordingly."""
        images = [resized(image, size) for image in self.images]
        if self.camera is None or (self.camera.width, self.camera.height) == size:
            return Film(images, self.camera)
        # Scaling keeps the corner of the image in place, which is at (-0.5, -0.5): pixel (0, 0) has its centre at 0.
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        scale = np.diag([size[0] / self.camera.width, size[1] / self.camera.height, 1.0])
        matrix = np.linalg.inv(half) @ scale @ half @ self.camera.matrix
        return Film(images, replace(self.camera, width=size[0], height=size[1], matrix=matrix))


class Served(NamedTuple):
    """The result of another implementation for a pair of images."""

    lap: Lap
    matches: int
    reference: Lap | None  # share for extracting the reference image's features; None if they cannot be kept


def run_bench(request: Request) -> None:
    """Measure, print the tables, and write the files of the request.

    Raises:
        CommandError: the request cannot be met.
        ParameterError: a parameter has a value that is not allowed.
        WeightsError: the weights are missing or damaged.
    """
    _check_files(request)
    publish = _publisher()  # before anything is printed, because loading ROS may restart the process
    settings = _settings(request)
    films = _films(request)
    rows: list[Row] = []
    steps = len(settings) * len(films) * len(request.keypoints)
    with tqdm(total=steps, unit="setting", disable=None, leave=False) as progress:
        for parameters in settings:
            matcher = FeatureMatcher(parameters)
            formats = dict.fromkeys(choose_precision(name, matcher.device) for name in request.peer_precisions)
            peers = [_make_peer(name, matcher, each) for name in request.against for each in formats]
            for film, count in itertools.product(films, request.keypoints):
                height, width = film.images[0].shape[:2]
                progress.set_postfix_str(f"{matcher.device} {width}x{height} {count} keypoints")
                rows.append(_measure(matcher, film, count, request.repeats, peers, publish))
                progress.update()
    machine = describe_machine({row.device for row in rows})
    print(report(rows, machine, publish is not None))
    if request.json is not None:
        content = {"kpmatch_ros": kpmatch_ros.__version__, "machine": machine, "rows": [asdict(row) for row in rows]}
        request.json.write_text(json.dumps(content, indent=1) + "\n")
    if request.plot is not None:
        draw(request.plot, rows, machine)


def _settings(request: Request) -> list[Parameters]:
    """The parameters for each combination of device and precision that this machine supports.

    Others are reported on stderr. If there is no supported combination, ParameterError is raised.
    """
    settings, refused = [], []
    for device, precision in itertools.product(request.devices, request.precisions):
        try:
            parameters = request.parameters.replace({"device": device, "precision": precision})
            choose_precision(precision, choose_device(device))
            settings.append(parameters)
        except ParameterError as error:
            refused.append(error)
    if not settings:
        raise refused[0]
    for reason in refused:
        print(f"kpmatch bench: left out: {reason}", file=sys.stderr)
    return settings


def _check_files(request: Request) -> None:
    """Check the output files before the work, not after it. Raises CommandError."""
    for option, path in (("--json", request.json), ("--plot", request.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise CommandError(f"{option} {path}: there is no folder {path.parent}")
    sources = [] if request.images is None else _picture_files(request.images)
    check_outputs({"--json": request.json, "--plot": request.plot}, [*sources, request.bag], request.parameters)
    if request.plot is not None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
        except ImportError as error:
            raise CommandError(f"--plot needs matplotlib ({error}): pip install matplotlib") from error
        if request.plot.suffix.lstrip(".").lower() not in FigureCanvasAgg.filetypes:
            raise CommandError(f"--plot {request.plot}: pictures are written as .png, .svg or .pdf")


# Images


def _films(request: Request) -> list[Film]:
    """The sequence of images in each size.

    Without requested sizes, all images get the size of the first one. Images that are resized for this are reported on
    stderr.
    """
    count = request.repeats + 1
    if request.images is not None:
        film = Film(_pictures(request.images, count), None)
    elif request.bag is not None:
        film = _recorded(request.bag, request.topic, count, request.parameters.rectified)
    else:
        frames = list(demo_frames(count))
        film = Film([frame.image for frame in frames], Camera.from_camera_info(frames[0].camera_info, rectified=False))
    of_images = [_size(image) for image in film.images]
    others = sum(size != of_images[0] for size in of_images)
    if others and not request.sizes:
        first = "{}x{}".format(*of_images[0])
        print(f"kpmatch bench: {others} of {len(of_images)} images were resized to {first} pixels", file=sys.stderr)
    sizes = request.sizes or of_images[:1]
    for width, height in sizes:
        if width * height > LARGEST_IMAGE:
            most = f"the {LARGEST_IMAGE / 1e6:.1f} million that the networks accept"
            raise CommandError(
                f"images of {width}x{height} pixels are more than {most}: choose a smaller size with --sizes"
            )
    return [film.resized(size) for size in sizes]


def _size(image: Image) -> tuple[int, int]:
    """Width and height, pixels."""
    height, width = image.shape[:2]
    return width, height


def _picture_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CommandError(f"--images {folder}: there is no such folder")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)


def _pictures(folder: Path, count: int) -> list[Image]:
    paths = _picture_files(folder)
    if len(paths) < 2:
        raise CommandError(f"--images {folder}: holds {len(paths)} pictures; a pair needs two")
    return [read_image(path) for path in paths[:count]]


def _recorded(path: Path, topic: str, count: int, rectified: bool) -> Film:
    try:
        with Bag(path) as bag:
            chosen = choose_camera(bag, topic or None)
            records = itertools.islice(bag.messages([chosen.image]), count)
            images = [np.ascontiguousarray(to_array(record.message)) for record in records]
            info = next(bag.messages([chosen.camera_info]), None) if chosen.camera_info else None
    except (BagError, ImageError) as error:
        raise CommandError(str(error)) from error
    if len(images) < 2:
        raise CommandError(f"--bag {path}: holds {len(images)} images on {chosen.image}; a pair needs two")
    return Film(images, None if info is None else _calibration(info.message, _size(images[0]), rectified))


def _calibration(info: Any, size: tuple[int, int], rectified: bool) -> Camera | None:
    """The camera of a camera_info; None, with the reason on stderr, if it is not a calibration for these images."""
    try:
        camera = Camera.from_camera_info(info, rectified=rectified)
        camera.check_size(*size)
    except CalibrationError as error:
        print(f"kpmatch bench: the calibration is not used: {error}", file=sys.stderr)
        return None
    return camera


def back_and_forth(film: Sequence[Image]) -> Iterator[Image]:
    """Yield the images for ever, forwards and backwards alternately, so that the sequence never jumps."""
    yield film[0]
    while True:
        yield from film[1:]
        yield from reversed(film[:-1])


# Measuring


def _timed(work: Callable[[], Any]) -> tuple[Any, Lap]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Lap((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)


Publish = Callable[[Any, FeatureMatcher], Any]


def _publisher() -> Publish | None:
    """The function that makes a pair's messages and serialises them; None if ROS is missing or cannot be imported."""
    try:
        ask_ros("messages")
    except ProcessEndedError as error:
        print(f"kpmatch bench: publishing is not measured: ROS is not usable, {error}", file=sys.stderr)
        return None
    try:
        from kpmatch_ros.ros.serialization import serialize_pair
    except ImportError:
        return None
    return lambda pair, matcher: serialize_pair(pair, matcher.parameters.extractor, matcher.parameters.matcher)


def _measure(
    matcher: FeatureMatcher, film: Film, count: int, repeats: int, peers: Sequence[Any], publish: Publish | None
) -> Row:
    first, second = film.images[:2]
    height, width = first.shape[:2]
    parameters = matcher.parameters.replace({"max_keypoints": count})
    matcher.configure(parameters)
    made_up = np.array([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]])
    camera = film.camera or Camera(width, height, made_up)

    def match_still() -> int:
        return len(matcher.match(matcher.extract(first), matcher.extract(second)).numpy())

    match_still()  # warm-up: the first run always takes longer
    for peer in peers:
        peer.max_keypoints(count)
        _serve(peer, first, second)
    cuda = matcher.device.type == "cuda"
    measures_memory = _reset_peak_memory(matcher.device) and not peers
    pair_laps: list[Lap] = []
    peer_pairs: list[list[Served]] = [[] for _ in peers]
    for i in range(repeats):
        for peer, served in alternated([None, *peers], [[], *peer_pairs], i):
            if peer is None:
                pair_laps.append(_timed(match_still)[1])
            else:
                served.append(_serve(peer, first, second))

    # The other implementations neither refine points nor track them.
    parameters = parameters.replace({"refine": parameters.refine and not peers})
    front_end = FrontEnd(parameters, matcher)
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    frame_laps: list[Lap] = []
    without_pose: list[Lap] = []  # for the comparison: others estimate no pose. It runs on one thread: wall = CPU time
    pairs: list[Pair] = []
    peer_frames: list[list[Served]] = [[] for _ in peers]
    images = back_and_forth(film.images)
    previous = next(images)
    front_end.register_frame(previous, 0, camera)
    for i in range(repeats):
        image, stamp = next(images), (i + 1) * _PERIOD
        for peer, served in alternated([None, *peers], [[], *peer_frames], i):
            if peer is not None:
                served.append(_serve(peer, previous, image))
                continue
            (frame, pair), lap = _timed(lambda: front_end.register_frame(image, stamp, camera))  # noqa: B023
            frame_laps.append(lap)
            without_pose.append(lap.less(Lap(pair.pose_ms, pair.pose_ms)))
            pairs.append(pair)
            stages["extract"].append(frame.extract_ms)
            stages["match"].append(pair.match_ms)
            stages["pose"].append(pair.pose_ms)
            if publish is not None:
                if i == 0:
                    publish(pair, matcher)  # warm-up: loads the message types
                stages["publish"].append(_timed(lambda: publish(pair, matcher))[1].wall)  # noqa: B023
            for name, work in _small_stages(matcher, image, stamp):
                stages[name].append(_timed(work)[1].wall)
        previous = image

    def comparisons(peer: Any, still: list[Served], moving: list[Served]) -> Iterator[Comparison]:
        yield _compare(peer.name, "pair", still, [one.lap for one in still], pair_laps)
        yield _compare(peer.name, "sequence", moving, [one.lap for one in moving], without_pose)
        kept = [one.lap.less(one.reference) for one in moving if one.reference is not None]
        if kept:
            yield _compare(peer.name, "sequence, features kept", moving, kept, without_pose)

    return Row(
        extractor=parameters.extractor,
        matcher=parameters.matcher,
        parameters={
            item.name: value for item in declarations() if (value := getattr(parameters, item.name)) != item.default
        },
        device=torch.cuda.get_device_name(matcher.device) if cuda else "cpu",
        precision=format_name(matcher.dtype),
        width=width,
        height=height,
        calibrated=film.camera is not None,
        max_keypoints=count,
        keypoints=statistics.mean(len(pair.current.keypoints) for pair in pairs),
        matches=statistics.mean(len(pair.indices) for pair in pairs),
        layers=statistics.mean(pair.layers for pair in pairs),
        stages={name: Spread.of(times) for name, times in stages.items() if times},
        frame=Spread.of([lap.wall for lap in frame_laps]),
        frame_cpu=Spread.of([lap.cpu for lap in frame_laps]),
        pair=Spread.of([lap.wall for lap in pair_laps]),
        pair_cpu=Spread.of([lap.cpu for lap in pair_laps]),
        resident_mb=_peak_memory() if measures_memory else None,
        gpu_mb=torch.cuda.max_memory_allocated(matcher.device) / 1e6 if cuda else None,
        comparisons=[each for args in zip(peers, peer_pairs, peer_frames) for each in comparisons(*args)],
    )


def alternated(workers: Sequence[Any], results: Sequence[Any], turn: int) -> list[tuple[Any, Any]]:
    """Pairs of worker and result, in reverse order every other turn.

    So heating and cooling of the machine affect all workers alike.
    """
    order = list(zip(workers, results))
    return order if turn % 2 == 0 else order[::-1]


def _small_stages(matcher: FeatureMatcher, image: Image, stamp: int) -> list[tuple[str, Callable[[], Any]]]:
    encoding: Literal["mono8", "rgb8"] = "mono8" if image.ndim == 2 else "rgb8"
    raw = image_message(image, stamp, "camera", encoding)
    compressed = image_message(image, stamp, "camera", encoding, "jpeg")

    def upload() -> None:
        matcher.upload(image)
        if matcher.device.type == "cuda":
            torch.cuda.synchronize(matcher.device)

    return [("decode", lambda: to_array(compressed)), ("convert", lambda: to_array(raw)), ("upload", upload)]


def _compare(peer: str, work: str, served: list[Served], theirs: list[Lap], ours: list[Lap]) -> Comparison:
    return Comparison(
        peer=peer,
        work=work,
        wall=Spread.of([lap.wall for lap in theirs]),
        cpu=Spread.of([lap.cpu for lap in theirs]),
        matches=statistics.mean(one.matches for one in served),
        wall_ratio=Spread.of([their.wall / our.wall for their, our in zip(theirs, ours)]),
        cpu_ratio=Spread.of([their.cpu / max(our.cpu, 1e-6) for their, our in zip(theirs, ours)]),
    )


def _reset_peak_memory(device: torch.device) -> bool:
    """Reset the counters of peak memory. Returns whether the peak of the process can be measured (only on Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident memory
    except OSError:
        return False
    return True


def _peak_memory() -> float:
    """Peak memory of the process in MB. It needs Linux: call it only if :func:`_reset_peak_memory` returned True."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM:"))


def describe_machine(devices: set[str]) -> dict[str, Any]:
    """Hardware and software on which the figures depend."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpus": sorted(devices - {"cpu"}),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# Other implementations


def _make_peer(name: str, matcher: FeatureMatcher, dtype: torch.dtype) -> Any:
    """An implementation from `benchmarks/peers.py`, a plug-in that only the source checkout has."""
    try:
        peers = importlib.import_module("benchmarks.peers")
    except ImportError as error:
        raise CommandError(
            f"--against {name}: comparing needs benchmarks/peers.py, which is not installed ({error}): run it in a "
            f"checkout of kpmatch_ros, as tools/with_ros kpmatch bench --against {name}"
        ) from error
    try:
        return peers.PEERS[name](matcher, dtype)
    except ValueError as error:
        raise CommandError(f"--against {name}: {error}") from error
    except ImportError as error:
        raise CommandError(
            f"--against {name}: it cannot be imported here ({error}); {peers.PEERS[name].INSTALL}"
        ) from error


def _serve(peer: Any, image0: Image, image1: Image) -> Served:
    """Match a pair of images with another implementation, from pixels to matches in host memory."""
    reference, extracting = _timed(lambda: peer.extract(image0))
    matches, matching = _timed(lambda: peer.match(reference, image1))
    both = Lap(extracting.wall + matching.wall, extracting.cpu + matching.cpu)
    return Served(both, matches, extracting if peer.KEEPS_FEATURES else None)
