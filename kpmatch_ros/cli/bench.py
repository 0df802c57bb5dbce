"""How long each step takes on this machine, and how long it takes other implementations of the same networks.

Wall time is what a robot waits for. Processor time, beside it, is what the work cost: on a machine that does other
things meanwhile it varies far less.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from unittest import mock

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import kpmatch_ros
from kpmatch_ros.bags.files import BagError, image_message, image_topics, read_messages
from kpmatch_ros.cli.main import CommandError, format_table, read_image
from kpmatch_ros.device import choose_device, choose_precision
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.images import ImageError, to_array
from kpmatch_ros.models.convert import convert
from kpmatch_ros.parameters import ParameterError, Parameters

__all__ = ["PEERS", "Request", "run_bench"]

PEERS = ("transformers", "lightglue")

_PERIOD = 100_000_000  # nanoseconds between two frames
_STAGES = ("decode", "convert", "upload", "extract", "match", "pose", "publish")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".pgm", ".ppm", ".webp")

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Request:
    """What to measure: every combination of devices, precisions, sizes and numbers of keypoints.

    Attributes:
        parameters: of the matcher, but for those below.
        devices: values of the parameter ``device``.
        precisions: values of the parameter ``precision``.
        keypoints: values of the parameter ``max_keypoints``.
        sizes: (width, height) in pixels that the images are brought to; the images' own where empty.
        repeats: measurements of each.
        images: a folder of pictures, in the order of their names; None for another source.
        bag: a bag with images; without both, a synthetic camera's are taken.
        topic: of the images in the bag; guessed where it is empty.
        against: names from :data:`PEERS`.
        peer_precision: the number format of these.
        json: file to write everything to.
        plot: file to draw time against keypoints in.
    """

    parameters: Parameters = field(default_factory=Parameters)
    devices: Sequence[str] = ("auto",)
    precisions: Sequence[str] = ("auto",)
    keypoints: Sequence[int] = (512, 1024, 2048, 4096)
    sizes: Sequence[tuple[int, int]] = ()
    repeats: int = 8
    images: Path | None = None
    bag: Path | None = None
    topic: str = ""
    against: Sequence[str] = ()
    peer_precision: str = "float32"
    json: Path | None = None
    plot: Path | None = None


class Lap(NamedTuple):
    """What some work took, in milliseconds of time and of all processors' time."""

    wall: float
    cpu: float

    def less(self, other: Lap) -> Lap:
        """Without a part of it."""
        return Lap(self.wall - other.wall, self.cpu - other.cpu)


@dataclass(frozen=True)
class Spread:
    """The median of several values and the quartiles around it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(round(median, 4), round(lower, 4), round(upper, 4))


@dataclass(frozen=True)
class Comparison:
    """Another implementation beside this one. Ratios are its time over ours, larger than 1 where we are faster.

    Attributes:
        peer: its name and version.
        work: "pair", "sequence" or "sequence, features kept".
        wall: its time, milliseconds.
        cpu: its processors' time, milliseconds.
        matches: how many it found, on average.
        wall_ratio: of two measurements made one after the other.
        cpu_ratio: the same of processor time.
    """

    peer: str
    work: str
    wall: Spread
    cpu: Spread
    matches: float
    wall_ratio: Spread
    cpu_ratio: Spread


@dataclass(frozen=True)
class Row:
    """What was measured with one setting; times in milliseconds.

    Attributes:
        device: where.
        precision: number format.
        width: of the images, pixels.
        height: the same.
        max_keypoints: as asked for.
        keypoints: found in an image, on average.
        matches: of a pair in the sequence, on average.
        layers: that the matcher ran, on average.
        stages: wall time by the name of the stage; ``upload`` is a part of ``extract``.
        frame: wall time of a frame of the sequence, from the pixels to the pose; its reference's features are cached.
        frame_cpu: processor time of the same.
        pair: wall time of a still pair, both images extracted and matched.
        pair_cpu: processor time of the same.
        resident_mb: most memory that the process had meanwhile; None where others ran in it, or it cannot be told.
        gpu_mb: most memory allocated on the GPU; None on the processor.
        comparisons: with other implementations.
    """

    device: str
    precision: str
    width: int
    height: int
    max_keypoints: int
    keypoints: float
    matches: float
    layers: float
    stages: dict[str, Spread]
    frame: Spread
    frame_cpu: Spread
    pair: Spread
    pair_cpu: Spread
    resident_mb: float | None
    gpu_mb: float | None
    comparisons: list[Comparison]


def run_bench(request: Request) -> None:
    """Measure, print tables, write what was asked for.

    Raises:
        CommandError: when the request cannot be met.
        ParameterError: when a parameter has a value it may not have.
        WeightsError: when the weights are missing or damaged.
    """
    publish = _publisher()  # first of all: loading ROS may start the process anew
    settings = _settings(request)
    _check_files(request)
    films = _films(request)
    rows: list[Row] = []
    steps = len(settings) * len(films) * len(request.keypoints)
    with tqdm(total=steps, unit="setting", disable=None, leave=False) as progress, contextlib.ExitStack() as stack:
        for parameters in settings:
            matcher = FeatureMatcher(parameters)
            peers = [_make_peer(name, matcher, request, stack) for name in request.against]
            for film, count in itertools.product(films, request.keypoints):
                height, width = film[0].shape[:2]
                progress.set_postfix_str(f"{matcher.device} {width}x{height} {count} keypoints")
                rows.append(_measure(matcher, film, count, request.repeats, peers, publish))
                progress.update()
    machine = describe_machine({row.device for row in rows})
    print(_report(rows, machine, publish is not None))
    if request.json is not None:
        content = {"kpmatch_ros": kpmatch_ros.__version__, "machine": machine, "rows": [asdict(row) for row in rows]}
        request.json.write_text(json.dumps(content, indent=1) + "\n")
    if request.plot is not None:
        _draw(request.plot, rows, machine)


def _settings(request: Request) -> list[Parameters]:
    """The combinations of device and precision that there are."""
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
    """Before the work rather than after it."""
    for option, path in (("--json", request.json), ("--plot", request.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise CommandError(f"{option} {path}: there is no folder {path.parent}")
    if request.plot is not None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
        except ImportError as error:
            raise CommandError(f"--plot draws with matplotlib ({error}): pip install matplotlib") from error
        if request.plot.suffix.lstrip(".").lower() not in FigureCanvasAgg.filetypes:
            raise CommandError(f"--plot {request.plot}: pictures are written as .png, .svg or .pdf")


# Images


def _films(request: Request) -> list[list[Image]]:
    """The sequence of images in each size."""
    count = request.repeats + 1
    if request.images is None and request.bag is None:
        from simulation import Scene, camera_path, demo_camera  # of the checkout: it is not installed

        scene = Scene(seed=0)
        return [
            [view.image for view in scene.film(camera_path(count), demo_camera(*size), noise=2.0)]
            for size in request.sizes or [(640, 480)]
        ]
    film = _pictures(request.images, count) if request.images else _recorded(request.bag, request.topic, count)
    sizes = request.sizes or [(film[0].shape[1], film[0].shape[0])]
    return [[_resized(image, size) for image in film] for size in sizes]


def _resized(image: Image, size: tuple[int, int]) -> Image:
    return image if image.shape[1::-1] == size else np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def _pictures(folder: Path, count: int) -> list[Image]:
    if not folder.is_dir():
        raise CommandError(f"--images {folder}: there is no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if len(paths) < 2:
        raise CommandError(f"--images {folder}: holds {len(paths)} pictures; a pair needs two")
    return [read_image(path) for path in paths[:count]]


def _recorded(bag: Path | None, topic: str, count: int) -> list[Image]:
    assert bag is not None
    try:
        topics = [each.name for each in image_topics(bag)]
        if not topic and len(topics) != 1:
            known = ", ".join(topics) or "none"
            raise CommandError(f"--bag {bag}: has {len(topics)} topics with images ({known}): choose with --image")
        records = itertools.islice(read_messages(bag, [topic or topics[0]]), count)
        film = [np.ascontiguousarray(to_array(record.message)) for record in records]
    except (BagError, ImageError) as error:
        raise CommandError(str(error)) from error
    if len(film) < 2:
        raise CommandError(f"--bag {bag}: holds {len(film)} images on {topic or topics[0]}; a pair needs two")
    return film


def _forth_and_back(film: Sequence[Image]) -> Iterator[Image]:
    """For ever, without a jump."""
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
    """What makes a pair's messages and serialises them; None without ROS."""
    try:
        from rclpy.serialization import serialize_message

        from kpmatch_ros import messages
    except ImportError:
        return None

    def publish(pair: Any, matcher: FeatureMatcher) -> None:
        parameters = matcher.parameters
        serialize_message(messages.match_array(pair, 0, parameters.extractor, parameters.matcher))
        serialize_message(messages.relative_pose(pair))

    return publish


def _measure(
    matcher: FeatureMatcher, film: list[Image], count: int, repeats: int, peers: Sequence[Peer], publish: Publish | None
) -> Row:
    from simulation import demo_camera

    height, width = film[0].shape[:2]
    parameters = matcher.parameters.replace({"max_keypoints": count})
    matcher.configure(parameters)
    for peer in peers:
        peer.max_keypoints(count)
    camera = demo_camera(width, height)  # made up for a folder or a bag: the pose costs what it costs with a true one

    def match_still() -> int:
        return len(matcher.match(matcher.extract(film[0]), matcher.extract(film[1])).numpy())

    match_still()  # the first run is never like the others
    cuda = matcher.device.type == "cuda"
    can_tell_memory = _forget_peak_memory(matcher.device) and not peers
    pair_laps: list[Lap] = []
    peer_pairs: list[list[Served]] = [[] for _ in peers]
    for i in range(repeats):
        for peer, served in _in_turn([None, *peers], [[], *peer_pairs], i):
            if peer is None:
                pair_laps.append(_timed(match_still)[1])
            else:
                served.append(peer.match(film[0], film[1]))

    front_end = FrontEnd(parameters, matcher)
    stages: dict[str, list[float]] = {name: [] for name in _STAGES}
    frame_laps: list[Lap] = []
    pose_laps: list[Lap] = []
    pairs = []
    peer_frames: list[list[Served]] = [[] for _ in peers]
    images = _forth_and_back(film)
    previous = next(images)
    first, _ = front_end.register_frame(previous, 0)
    reference = replace(first, camera=camera)
    for i in range(repeats):
        image, stamp = next(images), (i + 1) * _PERIOD
        for peer, served in _in_turn([None, *peers], [[], *peer_frames], i):
            if peer is not None:
                served.append(peer.match(previous, image))
                continue
            # Without calibration, and the pose by itself: the others estimate none.
            (frame, pair), lap = _timed(lambda: front_end.register_frame(image, stamp))  # noqa: B023
            current = replace(frame, camera=camera)
            pose, pose_lap = _timed(lambda: front_end.estimate_pose(reference, current, pair.indices))  # noqa: B023
            reference = current
            frame_laps.append(lap)
            pose_laps.append(pose_lap)
            pair = replace(pair, pose=pose)
            pairs.append(pair)
            stages["extract"].append(frame.extract_ms)
            stages["match"].append(pair.match_ms)
            stages["pose"].append(pose_lap.wall)
            if publish is not None:
                stages["publish"].append(_timed(lambda: publish(pair, matcher))[1].wall)  # noqa: B023
            for name, work in _small_stages(matcher, image, stamp):
                stages[name].append(_timed(work)[1].wall)
        previous = image

    def comparisons(peer: Peer, still: list[Served], moving: list[Served]) -> Iterator[Comparison]:
        yield _compare(peer.name, "pair", still, [one.lap for one in still], pair_laps)
        yield _compare(peer.name, "sequence", moving, [one.lap for one in moving], frame_laps)
        kept = [one.lap.less(one.reference) for one in moving if one.reference is not None]
        if kept:
            yield _compare(peer.name, "sequence, features kept", moving, kept, frame_laps)

    return Row(
        device=torch.cuda.get_device_name(matcher.device) if cuda else "cpu",
        precision=str(matcher.dtype).removeprefix("torch."),
        width=width,
        height=height,
        max_keypoints=count,
        keypoints=statistics.mean(len(pair.current.keypoints) for pair in pairs),
        matches=statistics.mean(len(pair.indices) for pair in pairs),
        layers=statistics.mean(pair.layers for pair in pairs),
        stages={name: Spread.of(times) for name, times in stages.items() if times},
        frame=Spread.of([lap.wall + pose.wall for lap, pose in zip(frame_laps, pose_laps)]),
        frame_cpu=Spread.of([lap.cpu + pose.cpu for lap, pose in zip(frame_laps, pose_laps)]),
        pair=Spread.of([lap.wall for lap in pair_laps]),
        pair_cpu=Spread.of([lap.cpu for lap in pair_laps]),
        resident_mb=_peak_memory() if can_tell_memory else None,
        gpu_mb=torch.cuda.max_memory_allocated(matcher.device) / 1e6 if cuda else None,
        comparisons=[each for args in zip(peers, peer_pairs, peer_frames) for each in comparisons(*args)],
    )


def _in_turn(workers: Sequence[Any], results: Sequence[Any], turn: int) -> list[tuple[Any, Any]]:
    """Who goes first changes every turn: what warms or cools the machine is the same for all."""
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


def _forget_peak_memory(device: torch.device) -> bool:
    """Whether the process's peak can be told from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return False
    return True


def _peak_memory() -> float:
    """Of the process, MB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1.024e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3


def describe_machine(devices: set[str] | None = None) -> dict[str, Any]:
    """What the figures depend on."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpus": sorted((devices or set()) - {"cpu"}),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# Other implementations


class Served(NamedTuple):
    """What another implementation did for a pair of images."""

    lap: Lap
    matches: int
    reference: Lap | None  # of it, what describing the reference took; None where that cannot be left out


class Peer(Protocol):
    """Another implementation, with the same weights."""

    @property
    def name(self) -> str:
        """With its version and precision."""

    def max_keypoints(self, count: int) -> None:
        """Keep so many per image from now on."""

    def match(self, image0: Image, image1: Image) -> Served:
        """From two uint8 images to matches on the host."""


def _make_peer(name: str, matcher: FeatureMatcher, request: Request, stack: contextlib.ExitStack) -> Peer:
    parameters, dtype = matcher.parameters, choose_precision(request.peer_precision, matcher.device)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights"
    kinds = [network.model for network in convert(parameters.matcher, folder, parameters.extractor)]
    if kinds != ["lightglue", "superpoint"]:
        raise CommandError(f"--against {name}: compared are SuperPoint and LightGlue, not {' and '.join(kinds)}")
    make = _Transformers if name == "transformers" else _CvgLightGlue
    try:
        return make(folder, matcher, dtype)
    except ImportError as error:
        raise CommandError(
            f"--against {name}: it cannot be imported here ({error}); "
            + ("pip install transformers" if name == "transformers" else "install it from github.com/cvg/LightGlue")
        ) from error


def _grey(image: Image) -> Image:
    return np.asarray(image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


class _Transformers:
    """LightGlueForKeypointMatching: a pair of images in, its matches out; it keeps no features."""

    def __init__(self, folder: Path, matcher: FeatureMatcher, dtype: torch.dtype) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        adaptive = {name: getattr(matcher.parameters, name) for name in ("depth_confidence", "width_confidence")}
        if (adaptive["depth_confidence"] > 0) != (adaptive["width_confidence"] > 0):
            raise CommandError(
                "--against transformers: it fails where only one of depth_confidence and width_confidence is off (-1)"
            )
        self.name = f"transformers {transformers.__version__} {str(dtype).removeprefix('torch.')}"
        self._model: Any = transformers.LightGlueForKeypointMatching.from_pretrained(
            folder, dtype=dtype, filter_threshold=matcher.parameters.filter_threshold, **adaptive
        )
        self._model.eval().to(matcher.device)
        decoder = self._model.keypoint_detector.keypoint_decoder
        decoder.keypoint_threshold = matcher.extractor.keypoint_threshold
        decoder.nms_radius = matcher.extractor.nms_radius
        decoder.border_removal_distance = matcher.extractor.border
        self._device, self._dtype = matcher.device, dtype

    def max_keypoints(self, count: int) -> None:
        self._model.keypoint_detector.keypoint_decoder.max_keypoints = count

    @torch.inference_mode()
    def match(self, image0: Image, image1: Image) -> Served:
        def run() -> int:
            pixels = torch.from_numpy(np.stack([_grey(image0), _grey(image1)])).to(self._device, self._dtype) / 255
            # It takes colour pictures and looks at one channel.
            found = self._model(pixels[None, :, None].expand(-1, -1, 3, -1, -1))
            return int((found.matches.flatten(0, -2)[0].cpu() >= 0).sum())

        matches, lap = _timed(run)
        return Served(lap, matches, None)


class _CvgLightGlue:
    """The authors' package: features of each image, then matches, as in its README."""

    def __init__(self, folder: Path, matcher: FeatureMatcher, dtype: torch.dtype) -> None:
        import lightglue

        extractor, ours = matcher.extractor, kpmatch_ros.models.LightGlue.from_pretrained(folder)
        detector = kpmatch_ros.models.SuperPoint.from_pretrained(folder)
        # It fetches the published weights whenever it is made; these take their place.
        weights = _authors_superpoint(detector.state_dict())
        with mock.patch("torch.hub.load_state_dict_from_url", return_value=weights):
            self._extractor = lightglue.SuperPoint(
                descriptor_dim=detector.descriptor_size,
                nms_radius=extractor.nms_radius,
                detection_threshold=extractor.keypoint_threshold,
                remove_borders=extractor.border,
            )
        self._matcher = lightglue.LightGlue(
            features=None,
            input_dim=ours.input_dim,
            descriptor_dim=ours.config["descriptor_dim"],
            n_layers=ours.config["num_hidden_layers"],
            num_heads=ours.config["num_attention_heads"],
            depth_confidence=matcher.parameters.depth_confidence,
            width_confidence=matcher.parameters.width_confidence,
            filter_threshold=matcher.parameters.filter_threshold,
        )
        self._matcher.load_state_dict(_authors_lightglue(ours.state_dict()), strict=False)
        for network in (self._extractor, self._matcher):
            network.eval().to(matcher.device, dtype)
        self.name = f"cvg/LightGlue {str(dtype).removeprefix('torch.')}"
        self._device, self._dtype = matcher.device, dtype

    def max_keypoints(self, count: int) -> None:
        self._extractor.conf.max_num_keypoints = count

    @torch.inference_mode()
    def match(self, image0: Image, image1: Image) -> Served:
        reference, describing = _timed(lambda: self._extract(image0))

        def run() -> int:
            found = self._matcher({"image0": reference, "image1": self._extract(image1)})
            return len(found["matches"][0].cpu())

        matches, lap = _timed(run)
        return Served(Lap(lap.wall + describing.wall, lap.cpu + describing.cpu), matches, describing)

    def _extract(self, image: Image) -> dict[str, Tensor]:
        pixels = torch.from_numpy(_grey(image).copy()).to(self._device, self._dtype) / 255
        return self._extractor.extract(pixels[None], resize=None)


def _authors_superpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of superpoint_v1.pth."""
    heads = {"score_a": "Pa", "score_b": "Pb", "descriptor_a": "Da", "descriptor_b": "Db"}
    named = {}
    for name, tensor in tensors.items():
        *path, layer, kind = name.split(".")
        part = f"{int(path[2]) + 1}{layer[-1]}" if path[0] == "encoder" else heads[layer.removeprefix("conv_")]
        named[f"conv{part}.{kind}"] = tensor
    return named


def _authors_lightglue(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the authors' module, which computes queries, keys and values of an image together."""
    named = {}
    for name, tensor in tensors.items():
        if ".self_attention.q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensor = torch.stack(parts, dim=1).flatten(0, 1)  # interleaved, channel by channel
        elif ".cross_attention.q_proj." in name and not tensor.equal(tensors[name.replace("q_proj", "k_proj")]):
            raise CommandError("--against lightglue: it has one projection for queries and keys, these weights two")
        elif ".k_proj." in name or ".self_attention.v_proj." in name:
            continue
        for old, new in _AUTHORS_NAMES:
            name = name.replace(old, new)
        named[name] = tensor
    return named


_AUTHORS_NAMES = (
    ("transformer_layers.", "transformers."),
    (".self_attention.q_proj.", ".self_attn.Wqkv."),
    (".self_attention.o_proj.", ".self_attn.out_proj."),
    (".cross_attention.q_proj.", ".cross_attn.to_qk."),
    (".cross_attention.v_proj.", ".cross_attn.to_v."),
    (".cross_attention.o_proj.", ".cross_attn.to_out."),
    ("_mlp.fc1.", "_attn.ffn.0."),
    ("_mlp.layer_norm.", "_attn.ffn.1."),
    ("_mlp.fc2.", "_attn.ffn.3."),
    ("input_projection.", "input_proj."),
    ("positional_encoder.projector.", "posenc.Wr."),
    (".token.", ".token.0."),
    ("match_assignment_layers.", "log_assignment."),
    (".final_projection.", ".final_proj."),
)


# Showing


def _report(rows: list[Row], machine: dict[str, Any], with_ros: bool) -> str:
    cores = f"{machine['cores']} cores" if machine["cores"] > 1 else "1 core"
    lines = [
        f"{machine['processor']} ({machine['instructions']}), {cores}, {machine['threads']} threads"
        + "".join(f"; {gpu}" for gpu in machine["gpus"]),
        f"kpmatch_ros {kpmatch_ros.__version__}, PyTorch {machine['torch']}, Python {machine['python']}, "
        f"{machine['system']}",
        "",
        "milliseconds, medians; a frame is one of a sequence, its reference's features cached; a pair is two images",
    ]
    stages = [name for name in _STAGES if name in rows[0].stages]
    head = ["device", "precision", "image", "keypoints", "matches", "layers"]
    head += [*stages, "frame", "frames/s", "CPU", "pair", "CPU", "MB", *(["GPU MB"] if machine["gpus"] else [])]
    table = [head]
    for row in rows:
        cells = [row.device, row.precision, f"{row.width}x{row.height}", f"{row.keypoints:.0f}/{row.max_keypoints}"]
        cells += [f"{row.matches:.0f}", f"{row.layers:.1f}"]
        cells += [_short(row.stages[name].median) for name in stages]
        cells += [_short(row.frame.median), f"{1e3 / row.frame.median:.2f}", _short(row.frame_cpu.median)]
        cells += [_short(row.pair.median), _short(row.pair_cpu.median)]
        cells.append("" if row.resident_mb is None else f"{row.resident_mb:.0f}")
        if machine["gpus"]:
            cells.append("" if row.gpu_mb is None else f"{row.gpu_mb:.0f}")
        table.append(cells)
    lines.append(format_table(table, range(3, len(table[0]))))
    lines.append("upload is a part of extract; decode is of JPEG and, like convert and publish, not in frame")
    if not with_ros:
        lines.append("publish was not measured: it needs ROS 2 and the built messages")
    if any(row.comparisons for row in rows):
        lines += ["", "others, in turn with this package, without the pose; theirs over ours: median (quartiles)"]
        table = [["", "precision", "image", "keypoints", "work", "matches", "ms", "time ratio", "CPU time ratio"]]
        for row in rows:
            for one in row.comparisons:
                cells = [one.peer, f"ours {row.precision}", f"{row.width}x{row.height}", f"{row.max_keypoints}"]
                cells += [one.work, f"{one.matches:.0f}", _short(one.wall.median)]
                table.append([*cells, _ratio(one.wall_ratio), _ratio(one.cpu_ratio)])
        lines.append(format_table(table, (3, 5, 6)))
    return "\n".join(lines)


def _short(milliseconds: float) -> str:
    return (
        f"{milliseconds:.2f}"
        if milliseconds < 10
        else f"{milliseconds:.1f}"
        if milliseconds < 100
        else (f"{milliseconds:.0f}")
    )


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.lower:.2f} to {spread.upper:.2f})"


def _draw(path: Path, rows: list[Row], machine: dict[str, Any]) -> None:
    """Time of a frame against keypoints, a line for each setting and implementation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        size = f"{row.width}x{row.height}"
        lines.setdefault(f"kpmatch_ros {row.device} {row.precision} {size}", []).append(
            (row.keypoints, row.frame.median)
        )
        for one in row.comparisons:
            if one.work != "pair":
                kept = one.work.partition(", ")[2]
                label = f"{one.peer} {row.device} {size}" + (f" ({kept})" if kept else "")
                lines.setdefault(label, []).append((row.keypoints, one.wall.median))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(set(points))), marker="o", label=label, linestyle="-" if "kpmatch" in label else "--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({round(row.keypoints) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("keypoints in an image")
    axes.set_ylabel("milliseconds a frame")
    axes.set_title(f"{machine['processor']}, {machine['threads']} threads", fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
