"""The `kpmatch` command.

Exit status 0 on success and 2 on bad usage or input, with one line on stderr that says what was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import kpmatch_ros
from kpmatch_ros import weights
from kpmatch_ros.parameters import Declaration, ParameterError, Parameters, declaration

# PyTorch and OpenCV take seconds to import: only the commands that need them do, so that --help is instant.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kpmatch_ros.bags.replay import CameraTopics
    from kpmatch_ros.front_end import Pair
    from kpmatch_ros.geometry.camera import Camera

__all__ = ["CommandError", "main"]

# The parameters that say how two images are matched; the others are the node's alone.
MATCHING_OPTIONS = (
    "extractor",
    "matcher",
    "device",
    "precision",
    "threads",
    "max_keypoints",
    "keypoint_threshold",
    "nms_radius",
    "border",
    "resize",
    "filter_threshold",
    "ratio_threshold",
    "depth_confidence",
    "width_confidence",
    "max_reprojection_error",
    "min_inliers",
)
# Those that say, besides, how frames follow one another and what the images are.
BAG_OPTIONS = (
    *MATCHING_OPTIONS,
    "reference",
    "keyframe_min_matches",
    "keyframe_max_parallax",
    "max_gap",
    "rectified",
    "mode",
    "sync_tolerance",
    "publish_odometry",
)
MONO_TOPICS: tuple[str, ...] = ("image", "camera_info")
STEREO_TOPICS: tuple[str, ...] = ("left", "right", "left_info", "right_info")


class CommandError(Exception):
    """What a command was given is no good; the text goes to the user as it is."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a --help away."""

    def __init__(self, **options: Any) -> None:
        # Abbreviations would change their meaning with every option added.
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: the words after `kpmatch`; those of this process where not given.
    """
    parser = _build_parser()
    options = parser.parse_args(_join_negative_values(sys.argv[1:] if arguments is None else arguments))
    try:
        with _sigterm_as_ctrl_c():
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader, `head` say, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{options.name}: stopped", file=sys.stderr)
        return 130
    except (CommandError, ParameterError, weights.WeightsError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        print(f"{options.name}: {' '.join(text.split())}", file=sys.stderr)
        return 2


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What a command began is undone or ended in its `finally`s, whichever way it is stopped."""
    if threading.current_thread() is not threading.main_thread():  # nobody else may handle signals
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _join_negative_values(arguments: Sequence[str]) -> list[str]:
    """Write `--distortion -0.2,0.1,0,0` as `--distortion=-0.2,0.1,0,0`: argparse would take the value for an option."""
    joined: list[str] = []
    for word in arguments:
        if re.match(r"-[\d.]", word) and joined and re.fullmatch(r"--[a-z][a-z0-9-]*", joined[-1]):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="kpmatch",
        description="Learned feature matching: SuperPoint and LightGlue on images and ROS 2 camera topics.",
        epilog="example:\n  kpmatch match left.png right.png --save matches.png",
    )
    parser.add_argument("--version", action="version", version=f"kpmatch_ros {kpmatch_ros.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_match(commands)
    _add_bag(commands)
    _add_demo(commands)
    _add_weights(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, summary: str, description: str, *examples: str) -> _Parser:
    parser: _Parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 100),
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples]),
    )
    parser.set_defaults(run=run, name=parser.prog)
    return parser


# kpmatch match


def _add_match(commands: Any) -> None:
    parser = _add_command(
        commands,
        "match",
        _match,
        "match two image files",
        "Match two image files. A is the reference and B the current image: the pose is that of B's camera in A's "
        "optical frame, x_A = R x_B + t. A photograph whose file says how the camera was held (EXIF) is turned "
        "upright, as image viewers do: points and intrinsics are in pixels of the upright image, and the centre of "
        "its top-left pixel is (0, 0).",
        "kpmatch match a.jpg b.jpg --save matches.png",
        "kpmatch match a.jpg b.jpg --intrinsics 520,521,322,236 --distortion -0.2,0.05,0,0 --json",
    )
    parser.add_argument("image_a", metavar="A", type=Path, help="reference image: JPEG, PNG, or what else OpenCV reads")
    parser.add_argument("image_b", metavar="B", type=Path, help="current image")
    parser.add_argument(
        "--intrinsics", metavar="FX,FY,CX,CY", type=_numbers(4), help="of the camera, pixels; gives the pose too"
    )
    parser.add_argument(
        "--intrinsics1", metavar="FX,FY,CX,CY", type=_numbers(4), help="of the camera of B, where it is another one"
    )
    parser.add_argument(
        "--distortion",
        metavar="K1,K2,P1,P2[,K3]",
        type=_numbers(4, 5),
        help="of the lens, as in camera_info's plumb_bob; needs --intrinsics",
    )
    parser.add_argument("--save", metavar="FILE", type=Path, help="draw the matches: .png, .jpg, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object with everything")
    group = parser.add_argument_group("matching options", "the matcher node's parameters of the same names")
    for name in MATCHING_OPTIONS:
        _add_parameter(group, declaration(name), declaration(name).default)


def _add_parameter(group: Any, item: Declaration, default: Any) -> None:
    """An option of the parameter's name; `default` is what it is where the option is not given."""

    def value(text: str) -> Any:
        try:
            return item.check(item.type(text))
        except ParameterError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None

    shown = f"{item.default:g}" if item.type is float else str(item.default).lower()
    notes = ["" if item.choices else item.constraint, item.unit, f"default {shown}"]
    help_text = f"{item.description} ({', '.join(note for note in notes if note)})".replace("%", "%%")
    option = f"--{item.name.replace('_', '-')}"
    if item.type is bool:
        group.add_argument(
            option, dest=item.name, action=argparse.BooleanOptionalAction, default=default, help=help_text
        )
        return
    group.add_argument(
        option,
        dest=item.name,
        metavar={int: "N", float: "X"}.get(item.type, "|".join(item.choices) or item.name.upper()),
        type=value,
        default=default,
        help=help_text,
    )


def _numbers(*counts: int) -> Any:
    def parse(text: str) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) not in counts:
            expected = " or ".join(str(count) for count in counts)
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected} numbers with commas between them")
        return values

    return parse


def _count(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def _match(options: argparse.Namespace) -> int:
    parameters = Parameters(**{name: getattr(options, name) for name in MATCHING_OPTIONS})
    if options.intrinsics is None and (options.intrinsics1 is not None or options.distortion is not None):
        given = "--intrinsics1" if options.intrinsics1 is not None else "--distortion"
        raise CommandError(f"{given} needs --intrinsics too")
    if options.save is not None:
        _check_picture_file(options.save)
    image_a, image_b = read_image(options.image_a), read_image(options.image_b)
    camera_a = _camera(image_a, options.intrinsics, options.distortion)
    camera_b = _camera(image_b, options.intrinsics1 or options.intrinsics, options.distortion)

    from kpmatch_ros.front_end import FrontEnd

    front_end = FrontEnd(parameters)
    started = time.perf_counter()
    front_end.register_frame(image_a, 0, camera_a)
    _, pair = front_end.register_frame(image_b, 1, camera_b)
    milliseconds = (time.perf_counter() - started) * 1e3
    assert pair is not None
    if options.save is not None:
        _save_picture(options.save, pair)
    if options.json:
        print(json.dumps(_report(pair, parameters, milliseconds)))
    else:
        print(_summary(pair, parameters, milliseconds))
    return 0


def read_image(path: Path) -> NDArray[np.uint8]:
    """The picture in a file: uint8, grey (H, W) or RGB (H, W, 3), upright where its EXIF data says how it was held.

    Raises:
        CommandError: when there is no whole picture in it.
        OSError: when it cannot be read.
    """
    import cv2
    import numpy as np

    data = path.read_bytes()
    # OpenCV 4.6 fills in what a JPEG cut short lacks. After its last scan there is only the end marker.
    complete = not data.startswith(b"\xff\xd8\xff") or data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    pixels = None
    if data and complete:
        with _quiet_stderr():
            try:
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_ANYCOLOR)
            except cv2.error:  # a size beyond OpenCV's limit, a codec that is switched off
                pixels = None
    if pixels is None:
        reason = "is empty" if not data else "is no image that OpenCV reads" if complete else "is cut short"
        raise CommandError(f"{path} {reason}{', or it is damaged or cut short' if data and complete else ''}")
    return np.asarray(pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence the image libraries, which write to the process's stderr themselves."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _camera(
    image: NDArray[np.uint8], intrinsics: tuple[float, ...] | None, distortion: tuple[float, ...] | None
) -> Camera | None:
    import numpy as np

    from kpmatch_ros.geometry.camera import CalibrationError, Camera

    if intrinsics is None:
        return None
    fx, fy, cx, cy = intrinsics
    height, width = image.shape[:2]
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    try:
        return Camera(width, height, matrix, "plumb_bob", np.array(distortion or ()))
    except CalibrationError as error:
        raise CommandError(str(error)) from error


def _report(pair: Pair, parameters: Parameters, milliseconds: float) -> dict[str, Any]:
    """What --json prints."""
    pose = pair.pose
    return {
        "points0": pair.reference_points.tolist(),
        "points1": pair.points.tolist(),
        "scores": pair.scores.tolist(),
        "inliers": None if pose.inliers is None else [bool(flag) for flag in pose.inliers],
        "num_keypoints": [len(pair.reference.keypoints), len(pair.current.keypoints)],
        "layers": pair.layers,
        "pose": None
        if pair.current.camera is None
        else {
            "status": pose.status.name,
            "rotation": pose.rotation.tolist(),
            "translation": pose.translation.tolist(),
            "metric": bool(pose.metric),
        },
        "extractor": parameters.extractor,
        "matcher": parameters.matcher,
        "milliseconds": round(milliseconds, 3),
    }


def _summary(pair: Pair, parameters: Parameters, milliseconds: float) -> str:
    """What is printed for people."""
    sizes = (pair.reference.features.size, pair.current.features.size)
    lines = [
        f"images     {' and '.join(f'{width} x {height}' for width, height in sizes)}",
        f"keypoints  {len(pair.reference.keypoints)} and {len(pair.current.keypoints)} ({parameters.extractor})",
        f"matches    {_figures_of(pair)} ({parameters.matcher})",
    ]
    if pair.current.camera is not None:
        lines += [f"pose       {line}" if n == 0 else f"           {line}" for n, line in enumerate(_pose_of(pair))]
    lines.append(f"time       {milliseconds:.0f} ms for both images, the first run of the networks included")
    return "\n".join(lines)


def _figures_of(pair: Pair) -> str:
    figures = f"{len(pair.indices)}"
    if pair.pose.inliers is not None:
        figures += f", {pair.pose.num_inliers} inliers ({100 * pair.inlier_ratio:.0f} %)"
    return figures + (f", {pair.layers} layers" if pair.layers else "")


def _pose_of(pair: Pair) -> list[str]:
    import numpy as np

    pose = pair.pose
    if pose.status.name not in ("OK", "NO_TRANSLATION"):
        return [pose.status.name]
    turned = np.degrees(np.arccos(np.clip((np.trace(pose.rotation) - 1) / 2, -1, 1)))
    x, y, z = pose.translation
    direction = f"translation direction ({x:.3f}, {y:.3f}, {z:.3f})" if pose.status.name == "OK" else "no translation"
    return [f"{pose.status.name}: turned by {turned:.2f} degrees, {direction}; x right, y down, z forward in A"]


def _check_picture_file(path: Path) -> None:
    """Before the work rather than after it."""
    import cv2

    try:
        known = cv2.haveImageWriter(str(path))
    except cv2.error:
        known = False
    if not known:
        raise CommandError(f"--save {path}: pictures are written as .png or .jpg")
    if not path.resolve().parent.is_dir():
        raise CommandError(f"--save {path}: there is no folder {path.parent}")


def _save_picture(path: Path, pair: Pair) -> None:
    import cv2

    from kpmatch_ros.drawing import draw_matches

    picture = draw_matches(
        pair.reference.image,
        pair.current.image,
        pair.reference_points,
        pair.points,
        pair.scores,
        pair.pose.inliers,
        f"matches {_figures_of(pair)}",
    )
    with _quiet_stderr():
        saved = cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not saved:
        raise CommandError(f"--save {path}: the picture could not be written")


# kpmatch bag


def _add_bag(commands: Any) -> None:
    parser = _add_command(
        commands,
        "bag",
        _bag,
        "run the matcher on a bag, and write another bag with what the node would publish",
        "Run the matcher on a camera, or a stereo pair of cameras, in a bag (rosbag2: MCAP or sqlite3), every frame in "
        "order, without ROS. The bag written holds /matches and /relative_pose, and in stereo /stereo_matches: the "
        "node's messages for these frames with the images' stamps, and not the images. Options override the parameter "
        "file; what neither names has the node's default.",
        "kpmatch bag drive out --poses poses.txt",
        "kpmatch bag drive out --image /camera/image_raw --params matcher.yaml --device cuda",
        "kpmatch bag drive out --left /cam0/image_raw --right /cam1/image_raw --poses poses.txt",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="bag to read: a folder, or a .mcap or .db3 file")
    parser.add_argument("target", metavar="OUT", type=Path, help="bag to write: a folder that does not exist yet")
    parser.add_argument(
        "--image", metavar="TOPIC", help="images, compressed or not; not needed where the bag has one such topic"
    )
    parser.add_argument(
        "--camera-info", metavar="TOPIC", help="their calibration (default camera_info beside the image topic)"
    )
    for side in ("left", "right"):
        parser.add_argument(
            f"--{side}",
            metavar="TOPIC",
            help=f"images of a stereo pair's {side} camera; not needed with --mode stereo where two topics are named "
            "left and right, cam0 and cam1, or infra1 and infra2",
        )
    for side in ("left", "right"):
        parser.add_argument(
            f"--{side}-info", metavar="TOPIC", help="their calibration (default camera_info beside the image topic)"
        )
    parser.add_argument(
        "--params", metavar="FILE", type=Path, help="ROS 2 parameter file like config/matcher.yaml, for /matcher"
    )
    parser.add_argument(
        "--poses",
        metavar="FILE",
        type=Path,
        help="also write the chained poses, as TUM's text format has them (evo reads it): in metres in stereo; "
        "of one camera the scale is arbitrary",
    )
    parser.add_argument("--features", action="store_true", help="also write /features, with the descriptors")
    parser.add_argument("--match-image", action="store_true", help="also write /match_image, pictures of the matches")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    group = parser.add_argument_group("parameters", "the matcher node's of the same names")
    for name in BAG_OPTIONS:
        _add_parameter(group, declaration(name), argparse.SUPPRESS)


def _bag(options: argparse.Namespace) -> int:
    from kpmatch_ros.bags.files import BagError
    from kpmatch_ros.bags.replay import choose_camera, choose_stereo_cameras, replay
    from kpmatch_ros.parameter_file import read_parameter_file

    parameters = Parameters() if options.params is None else read_parameter_file(options.params)
    given = vars(options)
    changes = {name: given[name] for name in BAG_OPTIONS if name in given}
    if any(given[name] is not None for name in STEREO_TOPICS):
        changes.setdefault("mode", "stereo")
    parameters = parameters.replace(changes)
    _check_topic_options(given, parameters.mode)
    source = options.source
    cameras: tuple[CameraTopics, ...]
    try:
        if parameters.mode == "stereo":
            cameras = choose_stereo_cameras(source, *(given[name] for name in STEREO_TOPICS))
            info_options = ["--left-info", "--right-info"]
        else:
            cameras = (choose_camera(source, options.image, options.camera_info),)
            info_options = ["--camera-info"]
        report = replay(
            source, options.target, cameras, parameters, poses=options.poses, features=options.features,
            match_image=options.match_image,
        )  # fmt: skip
    except BagError as error:
        raise CommandError(str(error)) from error
    for camera, option in zip(cameras, info_options):
        if not camera.camera_info:
            report.faults.append(f"no camera_info beside {camera.image}, so no relative pose; {option} names one")
    for fault in report.faults:
        print(f"{options.name}: {fault}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report.figures(), "out": str(options.target)}))
    else:
        print(format_table([*report.rows(), ("bag", str(options.target))]))
    return 0


def _check_topic_options(given: dict[str, Any], mode: str) -> None:
    """Topics of one mode say nothing in the other."""
    foreign, own = (STEREO_TOPICS, "--image") if mode == "mono" else (MONO_TOPICS, "--left and --right")
    for name in foreign:
        if given[name] is not None:
            option = f"--{name.replace('_', '-')}"
            raise CommandError(f"{option} {given[name]}: the mode is {mode}, whose images are named with {own}")


# kpmatch demo


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands,
        "demo",
        _demo,
        "run the whole node on a camera bag made here, and compare its poses with the truth",
        "Make a short camera bag of a synthetic scene with known motion, start the matcher node as a process of its "
        "own, send it the bag over DDS, receive what it publishes, and compare with the truth. Needs ROS 2 and the "
        "built messages.",
        "kpmatch demo --out demo",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path("demo"), help="for the bag and the picture (default demo)"
    )
    parser.add_argument("--frames", metavar="N", type=_count(2), default=12, help="images in the bag (default 12)")


def _demo(options: argparse.Namespace) -> int:
    from kpmatch_ros.cli.demo import run_demo

    run_demo(options.out, options.frames)
    return 0


# kpmatch weights


def _add_weights(commands: Any) -> None:
    parser = commands.add_parser(
        "weights",
        help="list, fetch, inspect and convert weights",
        description="The weights of the networks: what is known by name, its licence, size and origin.",
        epilog="example:\n  kpmatch weights list",
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_command(
        actions, "list", _weights_list, "weights known by name", "The weights known by name.", "kpmatch weights list"
    )
    fetch = _add_command(
        actions,
        "fetch",
        _weights_fetch,
        "fetch registered weights",
        "Fetch registered weights, unless they are here, and check their hash. Their licence is shown first. Those of "
        "the Hugging Face hub go into its own cache, by way of huggingface_hub, the others to $KPMATCH_WEIGHTS, or to "
        "kpmatch_ros in the user's cache folder.",
        "kpmatch weights fetch aliked-n16",
        "kpmatch weights fetch ETH-CVG/lightglue_disk",
    )
    fetch.add_argument("weights", metavar="NAME", help="a registered name (kpmatch weights list)")
    info = _add_command(
        actions,
        "info",
        _weights_info,
        "what is known of weights, and what is in them",
        "What is known of weights, and what is in them. Reading them never runs code from a file.",
        "kpmatch weights info superpoint-open",
        "kpmatch weights info superpoint_lightglue.pth",
    )
    info.add_argument("weights", metavar="NAME-or-FILE", help="a registered name, a Hugging Face folder or a file")
    convert = _add_command(
        actions,
        "convert",
        _weights_convert,
        "write weights in another format",
        "Write weights in another format. IN is a registered name, a Hugging Face folder, a .safetensors file or a "
        ".pth of the networks' authors. OUT becomes a Hugging Face folder (config.json, model.safetensors), which "
        "transformers loads too where it has the network; if it ends in .safetensors, a file with one network. A "
        "matcher's folder holds its extractor too: for a matcher without one, name it with --extractor.",
        "kpmatch weights convert superpoint_v1.pth superpoint",
        "kpmatch weights convert superpoint_lightglue.pth lightglue --extractor superpoint_v1.pth",
    )
    convert.add_argument("source", metavar="IN", help="weights to read")
    convert.add_argument("target", metavar="OUT", type=Path, help="folder or .safetensors file to write")
    convert.add_argument("--extractor", metavar="IN", help="the extractor that the matcher was made for")


def _weights_list(options: argparse.Namespace) -> int:
    rows = [("name", "network", "licence", "commercial use", "size", "here", "from", "origin")]
    for item in weights.REGISTRY.values():
        rows.append(
            (
                item.name,
                " + ".join(item.networks),
                item.licence,
                "yes" if item.commercial else "NO",
                _megabytes(item.size),
                _presence(item),
                type(item.source).__name__.lower(),
                item.origin,
            )
        )
    print(format_table(rows))
    print("\nhub: the Hugging Face hub's current revision; no hash is registered for it, the hub's own is checked")
    return 0


def _presence(item: weights.Weights) -> str:
    if not item.file.exists():
        return "no"
    try:
        weights.verify(item)
    except weights.WeightsError:
        return "DAMAGED"
    return "yes"


def _weights_fetch(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    item = weights.find(options.weights)
    with tqdm(
        total=item.size,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc=item.name,
        disable=None if isinstance(item.source, weights.Url) else True,  # pip and the hub's library show their own
        delay=0.5,
    ) as bar:

        def received(size: int) -> None:
            bar.update(size)

        path = weights.fetch(item.name, received, announce=lambda text: print(text, file=sys.stderr))
    print(f"{item.name} is at {path} ({item.terms})")
    return 0


def _weights_info(options: argparse.Namespace) -> int:
    from kpmatch_ros.models.checkpoint import tensor_file
    from kpmatch_ros.models.convert import describe

    source = options.weights
    item = weights.REGISTRY.get(source)
    here = item is None or item.file.exists()
    networks = describe(source) if here else []
    rows: list[tuple[str, ...]] = []
    known = [] if item is None else [item]
    if here:
        file = tensor_file(weights.resolve(source))
        sha256 = weights.file_hash(file)
        rows += [("file", str(file)), ("size", _megabytes(file.stat().st_size)), ("SHA-256", sha256)]
        known = known or [one for one in weights.REGISTRY.values() if one.sha256 == sha256]
    elif item is not None:
        rows += [("file", f"not on this machine: kpmatch weights fetch {item.name}"), ("size", _megabytes(item.size))]
    for one in known:
        rows += [
            ("name", f"{one.name} ({one.model}{f' for {one.extractor}' if one.extractor else ''})"),
            ("licence", one.terms),
            ("origin", one.origin),
            ("from", str(one.source)),
            ("hash", _hash_note(one)),
        ]
    if not known:
        rows.append(("licence", "unknown: this file is not registered, ask where it came from"))
    print(format_table(rows))
    for network in networks:
        rows = [
            ("network", network.model),
            ("tensors", f"{len(network.tensors)} ({network.precision})"),
            ("parameters", f"{network.parameters:,}"),
            *((f"  {key}", str(value)) for key, value in network.config.items()),
        ]
        print(f"\n{format_table(rows)}")
    return 0


def _hash_note(item: weights.Weights) -> str:
    if item.sha256:
        return f"registered: {item.sha256}"
    if item.file.exists() and weights.expected_hash(item):
        return "none registered: the hub's revision of the day; the file is as the hub sent it"
    return "none registered: the hub's revision of the day"


def _weights_convert(options: argparse.Namespace) -> int:
    from kpmatch_ros.models.convert import convert

    networks = convert(options.source, options.target, options.extractor)
    for network in networks:
        print(f"{options.target}: {network.model}, {network.parameters:,} parameters, {network.precision}")
    return 0


# kpmatch bench


def _add_bench(commands: Any) -> None:
    parser = _add_command(
        commands,
        "bench",
        _bench,
        "measure the speed on this machine",
        "Measure how long each step takes, on a still pair and on a sequence whose features are cached, by device, "
        "precision, image size and number of keypoints; beside other implementations with the same weights, on the "
        "same images, in turn, in the same process. Times are medians, in milliseconds.",
        "kpmatch bench --keypoints 512,1024",
        "kpmatch bench --bag recording --against transformers --depth-confidence -1 --width-confidence -1",
        "kpmatch bench --device cpu,cuda --json speed.json --plot speed.png",
    )
    parser.add_argument(
        "--keypoints",
        metavar="N,...",
        type=_list_of("max_keypoints"),
        default=[512, 1024, 2048, 4096],
        help="per image; fewer where the image has fewer above --keypoint-threshold (default 512,1024,2048,4096)",
    )
    parser.add_argument(
        "--sizes", metavar="WxH,...", type=_sizes, default=[], help="of the images (default their own, or 640x480)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", metavar="FOLDER", type=Path, help="pictures, in the order of their names")
    source.add_argument("--bag", metavar="BAG", type=Path, help="its first images; both default to synthetic ones")
    parser.add_argument("--image", metavar="TOPIC", default="", help="of the images in the bag")
    parser.add_argument("--repeats", metavar="N", type=_count(1), default=8, help="measurements of each (default 8)")
    parser.add_argument(
        "--against",
        metavar="NAME",
        action="append",
        choices=("transformers", "lightglue"),
        default=[],
        help="another implementation: transformers, or lightglue (cvg's package); may be given twice",
    )
    parser.add_argument(
        "--peer-precision",
        choices=declaration("precision").choices,
        default="float32",
        help="number format of the other implementations (default float32)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw time against keypoints (needs matplotlib)")
    group = parser.add_argument_group("matching options", "the matcher node's parameters of the same names")
    for name in ("device", "precision"):
        group.add_argument(
            f"--{name}",
            metavar=f"{name.upper()},...",
            type=_list_of(name),
            default=["auto"],
            help=f"{declaration(name).description} (default auto)",
        )
    for name in _BENCH_OPTIONS:
        _add_parameter(group, declaration(name), declaration(name).default)


_BENCH_OPTIONS = [name for name in MATCHING_OPTIONS if name not in ("device", "precision", "max_keypoints", "resize")]


def _list_of(name: str) -> Any:
    """Values of a parameter with commas between them."""
    item = declaration(name)

    def parse(text: str) -> list[Any]:
        try:
            return [item.check(item.type(part)) for part in text.split(",")]
        except ParameterError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers with commas between them") from None

    return parse


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not a size such as 640x480")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def _bench(options: argparse.Namespace) -> int:
    if options.image and options.bag is None:
        raise CommandError("--image names a topic of a bag: it needs --bag")
    from kpmatch_ros.cli.bench import Request, run_bench

    run_bench(
        Request(
            parameters=Parameters(**{name: getattr(options, name) for name in _BENCH_OPTIONS}),
            devices=options.device,
            precisions=options.precision,
            keypoints=options.keypoints,
            sizes=options.sizes,
            repeats=options.repeats,
            images=options.images,
            bag=options.bag,
            topic=options.image,
            against=options.against,
            peer_precision=options.peer_precision,
            json=options.json,
            plot=options.plot,
        )
    )
    return 0


# kpmatch doctor


def _add_doctor(commands: Any) -> None:
    _add_command(
        commands,
        "doctor",
        _doctor,
        "check this machine, and say what to do about each fault",
        "Check PyTorch, the GPU, OpenCV, the weights, ROS 2 and the build of the messages. Exit status 0 where what is "
        "installed works, 2 where something is at fault. ROS 2 may be absent: the Python API does not need it.",
        "kpmatch doctor",
    )


def _doctor(options: argparse.Namespace) -> int:
    from kpmatch_ros.cli.doctor import run_doctor

    return 0 if run_doctor() else 2


# Tables


def format_table(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> str:
    """Rows of text in columns as wide as their longest entry, those numbered in ``right`` flush right."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
