"""kpmatch export: writes the networks as ONNX graphs, and compares their results with PyTorch's."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kpmatch_ros
from kpmatch_ros.cli.common import (
    CommandError,
    add_command,
    add_parameters,
    image_size,
    read_image,
    resized,
    utf8_path,
    whole_number,
)
from kpmatch_ros.parameters import Parameters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kpmatch_ros.feature_matcher import FeatureMatcher
    from kpmatch_ros.models.export_check import Parity

__all__ = ["add_export"]

# The parameters that affect the graphs. The others say how PyTorch computes, or what the layers may skip.
_OPTIONS = (
    "profile",
    "extractor",
    "matcher",
    "threads",
    "keypoint_threshold",
    "nms_radius",
    "border",
    "subpixel",
    "filter_threshold",
)

_FILES = ("extractor.onnx", "matcher.onnx", "export.json")
_LEAST_SHARE = 0.99  # fraction of the matches that PyTorch and ONNX Runtime must have in common
_FRAMES = 3  # frames of the demo bag for the comparison


def add_export(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        _export,
        "write the networks as ONNX graphs for other runtimes",
        "Write OUT/extractor.onnx (SuperPoint's dense part, without the selection of keypoints), OUT/matcher.onnx "
        "(LightGlue or SuperGlue with all layers) and OUT/export.json, which describes them, in float32. Then match "
        "images with PyTorch and with ONNX Runtime, and compare the results.",
        "kpmatch export onnx --keypoints 1024 --size 640x480",
        "kpmatch export onnx --dynamic --images a.png b.png",
    )
    parser.add_argument("target", metavar="OUT", type=utf8_path, help="output folder; it must be empty or not exist")
    parser.add_argument(
        "--keypoints",
        metavar="N",
        type=whole_number(1),
        help="number of keypoints per image in the graph (default: that of the profile)",
    )
    parser.add_argument(
        "--size", metavar="WxH", type=image_size, default=(640, 480), help="image size, pixels (default 640x480)"
    )
    parser.add_argument(
        "--dynamic",
        action="store_true",
        help="leave the numbers of images, pairs and keypoints and the image size variable; --keypoints and --size "
        "then apply to the check only",
    )
    check = parser.add_mutually_exclusive_group()
    check.add_argument(
        "--images",
        metavar=("A", "B"),
        nargs=2,
        type=Path,
        help="images for the check (default: frames of the demo bag)",
    )
    check.add_argument("--no-check", action="store_true", help="do not compare with PyTorch")
    add_parameters(parser, "matching options", _OPTIONS)


def _export(options: argparse.Namespace) -> int:
    target: Path = options.target
    is_there = target.is_dir()
    if os.path.lexists(target) and not (is_there and not any(target.iterdir())):
        raise CommandError(f"{target} exists already: name another folder, or remove it")
    pictures = [read_image(path) for path in options.images or ()]  # before the work, so that faults show at once

    from kpmatch_ros.feature_matcher import FeatureMatcher
    from kpmatch_ros.models.export import ExportError, check_exportable

    chosen = {name: value for name, value in vars(options).items() if name in _OPTIONS}
    if options.keypoints is not None:
        chosen["max_keypoints"] = options.keypoints
    # For the comparison, PyTorch computes as the graphs do: all layers, in float32.
    as_graphs = {"device": "cpu", "precision": "float32", "depth_confidence": -1.0, "width_confidence": -1.0}
    parameters = Parameters.given({**chosen, **as_graphs})
    networks = FeatureMatcher(parameters)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        check_exportable(networks.extractor, networks.matcher)
        # The files are written to a temporary folder first, so that the target is complete or not there at all.
        with tempfile.TemporaryDirectory(dir=target if is_there else target.parent, prefix=".kpmatch.") as folder:
            parity, said = _write(Path(folder, "out"), networks, options, pictures)
            if not is_there:
                os.replace(Path(folder, "out"), target)
            else:  # fill the folder instead of replacing it: it may be a link, a mount or a working directory
                for name in _FILES:
                    os.replace(Path(folder, "out", name), target / name)
    except ExportError as error:
        raise CommandError(str(error)) from error
    for name in _FILES:
        print(f"wrote      {target / name}")
    if parity is None:
        if said:
            print(f"{options.name}: not compared with PyTorch: {said}", file=sys.stderr)
        return 0
    print(f"parity     {said}")
    if parity.share < _LEAST_SHARE:
        raise CommandError(
            f"only {100 * parity.share:.2f} % of the matches agree with PyTorch, but at least {100 * _LEAST_SHARE:g} % "
            f"should: do not use {target}"
            if parity.total
            else f"the images have no matches to compare, so {target} is not checked: choose others with --images"
        )
    return 0


def _write(
    folder: Path, networks: FeatureMatcher, options: argparse.Namespace, pictures: list[NDArray[np.uint8]]
) -> tuple[Parity | None, str]:
    """Write all files.

    Returns:
        the comparison with PyTorch, or None; and a text about it, or why it is missing although it was requested.
    """
    import torch

    from kpmatch_ros.models.export import OPSET, export_extractor, export_matcher
    from kpmatch_ros.models.export_check import RuntimeMissing, Session, compare

    folder.mkdir()
    parameters = networks.parameters
    extractor: Any = networks.extractor
    matcher: Any = networks.matcher
    files = folder / _FILES[0], folder / _FILES[1]
    graphs = (
        export_extractor(extractor, files[0], options.size, options.dynamic),
        export_matcher(matcher, files[1], parameters.max_keypoints, options.dynamic),
    )
    parity, said = None, ""
    if not options.no_check:
        images = [networks.upload(resized(picture, options.size)) for picture in pictures or _demo()]
        try:
            sessions = Session(files[0], graphs[0]), Session(files[1], graphs[1])
        except RuntimeMissing as error:
            said = str(error)
        else:
            places = None if options.dynamic else parameters.max_keypoints
            parity = compare(extractor, matcher, sessions, images, places)
            said = (
                f"{100 * parity.share:.2f} % of {parity.total} matches in {parity.pairs} pairs are equal; largest "
                f"differences: detection scores {parity.score_difference:.1e}, descriptors "
                f"{parity.descriptor_difference:.1e}, match scores {parity.match_score_difference:.1e}"
            )
    description = {
        "kpmatch_ros": kpmatch_ros.__version__,
        "torch": torch.__version__,
        "opset": OPSET,
        "precision": "float32",
        "dynamic": options.dynamic,
        "extractor": {
            "weights": parameters.extractor,
            "file": files[0].name,
            **asdict(graphs[0]),
            "non_maximum_suppression": False,
        },
        "matcher": {
            "weights": parameters.matcher,
            "file": files[1].name,
            **asdict(graphs[1]),
            "filter_threshold": parameters.filter_threshold,
        },
        "parity": None if parity is None else {**asdict(parity), "share": parity.share},
    }
    (folder / _FILES[2]).write_text(json.dumps(description, indent=2) + "\n")
    return parity, said


def _demo() -> Iterator[NDArray[np.uint8]]:
    from kpmatch_ros.bags.demo import demo_frames

    for frame in demo_frames(_FRAMES):
        yield frame.image
