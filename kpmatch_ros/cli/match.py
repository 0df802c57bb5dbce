"""kpmatch match: matches two image files."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpmatch_ros.cli.common import (
    MATCHING_OPTIONS,
    CommandError,
    add_command,
    add_parameters,
    can_write_picture,
    check_outputs,
    comma_separated,
    option_of,
    read_image,
    warn_of_idle,
    write_picture,
)
from kpmatch_ros.parameters import Parameters, declaration
from kpmatch_ros.shell import in_shell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kpmatch_ros.frames import Pair
    from kpmatch_ros.geometry.camera import Camera

__all__ = ["add_match"]

_NEEDS = {  # an option, and the one without which it has no effect
    "intrinsics1": "intrinsics",
    "distortion": "intrinsics",
    "distortion1": "intrinsics",
    "distortion_model": "distortion",
    "distortion_model1": "distortion1",
}


def add_match(commands: Any) -> None:
    parser = add_command(
        commands,
        "match",
        _match,
        "match two image files",
        "Match two image files. A is the reference and B the current image: the pose is that of B's camera in A's "
        "optical frame, x_A = R x_B + t. A photograph whose file says how the camera was held (EXIF) is turned "
        "upright, as image viewers do: points and intrinsics are in pixels of the upright image, and the centre of "
        "its top-left pixel is (0, 0).",
        "kpmatch match a.jpg b.jpg",
        "kpmatch match a.jpg b.jpg --intrinsics 520,521,322,236 --distortion -0.2,0.05,0,0 --json",
    )
    parser.add_argument(
        "image_a", metavar="A", type=Path, help="reference image: JPEG, PNG, or another format that OpenCV reads"
    )
    parser.add_argument("image_b", metavar="B", type=Path, help="current image")
    parser.add_argument(
        "--intrinsics",
        metavar="FX,FY,CX,CY",
        type=comma_separated(4),
        help="intrinsics of the camera, pixels; with them the pose is estimated too",
    )
    parser.add_argument(
        "--intrinsics1",
        metavar="FX,FY,CX,CY",
        type=comma_separated(4),
        help="intrinsics of B's camera, if it is another camera",
    )
    parser.add_argument(
        "--distortion",
        metavar="K1,K2,P1,P2[,K3]",
        type=comma_separated(4, 5, 8, 12, 14),
        help="coefficients of the lens, as in camera_info; needs --intrinsics",
    )
    parser.add_argument(
        "--distortion-model",
        metavar="MODEL",
        help="model of --distortion: plumb_bob (the default), rational_polynomial (8, 12 or 14 numbers) or equidistant "
        "(a fisheye lens, 4)",
    )
    parser.add_argument(
        "--distortion1",
        metavar="K1,K2,P1,P2[,K3]",
        type=comma_separated(4, 5, 8, 12, 14),
        help="coefficients of the lens of B's camera, if it is another camera (default: those of --distortion)",
    )
    parser.add_argument("--distortion-model1", metavar="MODEL", help="model of --distortion1 (default plumb_bob)")
    parser.add_argument(
        "--save",
        metavar="FILE",
        type=Path,
        help="picture of the matches to write: .png, .jpg, ... (default A_B_matches.png in this folder, with the names "
        "of both files; with --json no picture)",
    )
    parser.add_argument("--json", action="store_true", help="print all results as one JSON object")
    add_parameters(parser, "matching options", MATCHING_OPTIONS)


def _match(options: argparse.Namespace) -> int:
    chosen = {name: value for name, value in vars(options).items() if name in MATCHING_OPTIONS}
    parameters = Parameters.given({**chosen, "refine": False})
    warn_of_idle(parameters, options.name)
    for option, needed in _NEEDS.items():
        if getattr(options, option) is not None and getattr(options, needed) is None:
            raise CommandError(f"{option_of(option)} needs {option_of(needed)} too")
    picture = options.save
    if picture is None and not options.json:
        picture = Path(f"{options.image_a.stem}_{options.image_b.stem}_matches.png")
        if len(os.fsencode(picture)) > os.pathconf(".", "PC_NAME_MAX"):
            raise CommandError(f"{picture}: is too long for a file name; choose one with --save")
    elif picture is not None:
        _check_picture_file(picture)
    image_a, image_b = read_image(options.image_a), read_image(options.image_b)
    given = "" if options.save is None else "--save"
    check_outputs({given: picture}, [options.image_a, options.image_b], parameters)
    lens = options.distortion_model, options.distortion
    lens1 = lens if options.distortion1 is None else (options.distortion_model1, options.distortion1)
    camera_a = _camera(image_a, options.intrinsics, *lens)
    camera_b = _camera(image_b, options.intrinsics1 or options.intrinsics, *lens1)

    from kpmatch_ros.front_end import FrontEnd
    from kpmatch_ros.imaging.images import ImageError

    parameters = _fitting(parameters, {options.image_a: image_a, options.image_b: image_b}, options.name)
    front_end = FrontEnd(parameters)
    started = time.perf_counter()
    try:
        front_end.register_frame(image_a, 0, camera_a)
        _, pair = front_end.register_frame(image_b, 1, camera_b)
    except ImageError as error:
        raise CommandError(str(error)) from error
    milliseconds = (time.perf_counter() - started) * 1e3
    assert pair is not None
    if picture is not None:
        _save_picture(picture, pair)
    if options.json:
        print(json.dumps(_report(pair, parameters, milliseconds)))
    else:
        print(_summary(pair, parameters, milliseconds))
        print(f"picture    {picture}")
        print(f"next       {_next_command(options)}")
    return 0


def _next_command(options: argparse.Namespace) -> str:
    """The command to suggest next: the same with the relative pose, or if that was given, a recording."""
    if options.intrinsics is None:
        return f"{in_shell(f'kpmatch {shlex.join(options.words)} --intrinsics FX,FY,CX,CY')}  (adds the relative pose)"
    return f"{in_shell('kpmatch bag BAG OUT --report report.html')}  (the same for a recording)"


def _fitting(parameters: Parameters, images: dict[Path, NDArray[np.uint8]], command: str) -> Parameters:
    """The parameters. If an image is too large for the networks, `resize` is set to fit, and stderr says so."""
    from kpmatch_ros.feature_matcher import LARGEST_IMAGE
    from kpmatch_ros.imaging.colour import resized_size

    sizes = {path: (image.shape[1], image.shape[0]) for path, image in images.items()}

    def too_large(size: tuple[int, int], longest: int) -> bool:
        width, height = resized_size(*size, longest)
        return width * height > LARGEST_IMAGE

    refused = [path for path, size in sizes.items() if too_large(size, parameters.resize)]
    if not refused:
        return parameters
    # Both images get the same `resize`, and it enlarges smaller images too: search the largest value that fits both.
    most = int(declaration("resize").maximum or 0)
    longest = next(each for each in range(most, 0, -1) if not any(too_large(size, each) for size in sizes.values()))
    for path in refused:
        given = "{} x {} pixels".format(*sizes[path])
        if parameters.resize:
            width, height = resized_size(*sizes[path], parameters.resize)
            given += f", {width} x {height} with --resize {parameters.resize}"
        print(
            f"{command}: {path} has {given}, more than the {LARGEST_IMAGE / 1e6:.1f} million pixels that the networks "
            f"accept: matched with --resize {longest}",
            file=sys.stderr,
        )
    return parameters.replace({"resize": longest})


def _camera(
    image: NDArray[np.uint8],
    intrinsics: tuple[float, ...] | None,
    model: str | None,
    distortion: tuple[float, ...] | None,
) -> Camera | None:
    import numpy as np

    from kpmatch_ros.geometry.camera import CalibrationError, Camera

    if intrinsics is None:
        return None
    fx, fy, cx, cy = intrinsics
    height, width = image.shape[:2]
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    try:
        return Camera(width, height, matrix, model or "plumb_bob", np.array(distortion or ()))
    except CalibrationError as error:
        raise CommandError(str(error)) from error


def _report(pair: Pair, parameters: Parameters, milliseconds: float) -> dict[str, Any]:
    """The JSON object that --json prints."""
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
    """The text that is printed without --json."""
    sizes = (pair.reference.features.size, pair.current.features.size)
    lines = [
        f"images     {' and '.join(f'{width} x {height}' for width, height in sizes)}",
        f"keypoints  {len(pair.reference.keypoints)} and {len(pair.current.keypoints)} ({parameters.extractor})",
        f"matches    {_figures_of(pair)} ({parameters.matcher})",
    ]
    if pair.smeared is not None:
        lines.append(f"blur       {'AB'[pair.smeared]}, by tens of pixels: its points cannot be located")
    if pair.current.camera is not None:
        lines += [f"pose       {line}" if n == 0 else f"           {line}" for n, line in enumerate(_pose_of(pair))]
    lines.append(f"time       {milliseconds:.0f} ms for both images, including the first run of the networks")
    return "\n".join(lines)


def _figures_of(pair: Pair) -> str:
    figures = f"{len(pair.indices)}"
    if pair.pose.inliers is not None:
        figures += f", {pair.pose.num_inliers} inliers ({100 * pair.inlier_ratio:.0f} %)"
    return figures + (f", {pair.layers} layers" if pair.layers else "")


def _pose_of(pair: Pair) -> list[str]:
    pose = pair.pose
    if not pose.status.has_pose:
        return [pose.status.name]
    turned = math.degrees(pose.angle)
    x, y, z = pose.translation
    moved = pose.status.name != "NO_TRANSLATION"
    direction = f"translation direction ({x:.3f}, {y:.3f}, {z:.3f})" if moved else "no translation"
    return [f"{pose.status.name}: turned by {turned:.2f} degrees, {direction}; x right, y down, z forward in A"]


def _check_picture_file(path: Path) -> None:
    """Check the picture's path before the work, not after it. Raises CommandError."""
    if not can_write_picture(path):
        raise CommandError(f"--save {path}: pictures are written as .png or .jpg")
    if not path.resolve().parent.is_dir():
        raise CommandError(f"--save {path}: there is no folder {path.parent}")


def _save_picture(path: Path, pair: Pair) -> None:
    from kpmatch_ros.drawing import draw_pair

    write_picture(path, draw_pair(pair, f"matches {_figures_of(pair)}"))
