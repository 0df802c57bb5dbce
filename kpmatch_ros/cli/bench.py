"""kpmatch bench: measures how long each step takes on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpmatch_ros.cli.common import (
    MATCHING_OPTIONS,
    CommandError,
    add_command,
    add_parameter,
    image_size,
    warn_of_idle,
    whole_number,
)
from kpmatch_ros.parameters import ParameterError, Parameters, declaration, profile_values

__all__ = ["PEERS", "Request", "add_bench"]

PEERS = ("transformers", "lightglue", "xfeat", "opencv")

_KEYPOINTS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Request:
    """What to measure: every combination of devices, precisions, sizes and numbers of keypoints.

    Attributes:
        parameters: of the matcher, except those below.
        devices: values of the parameter ``device``.
        precisions: values of the parameter ``precision``.
        keypoints: values of the parameter ``max_keypoints``.
        sizes: (width, height) in pixels to which the images are resized; if empty, the size of the first image.
        repeats: number of measurements of each combination.
        images: a folder of pictures, used in the order of their names; None for another source.
        bag: a bag with images. Without `images` and `bag`, the images of the demo bag are used.
        topic: of the images in the bag; if empty, the bag must have only one image topic.
        against: other implementations, names from :data:`PEERS`.
        peer_precisions: number formats in which each of them is measured.
        json: file for all figures; None for no file.
        plot: file for a plot of time against keypoints; None for no plot.
    """

    parameters: Parameters = field(default_factory=Parameters)
    devices: Sequence[str] = ("auto",)
    precisions: Sequence[str] = ("auto",)
    keypoints: Sequence[int] = _KEYPOINTS
    sizes: Sequence[tuple[int, int]] = ()
    repeats: int = 8
    images: Path | None = None
    bag: Path | None = None
    topic: str = ""
    against: Sequence[str] = ()
    peer_precisions: Sequence[str] = ("float32",)
    json: Path | None = None
    plot: Path | None = None


def add_bench(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        _bench,
        "measure the speed on this machine",
        "Measure how long each step takes, for a pair of images and for a sequence whose features are cached, by "
        "device, precision, image size and number of keypoints. --against also measures other implementations, in "
        "alternation in the same process, with the same weights and images. Times are medians in milliseconds.",
        "kpmatch bench --keypoints 512,1024",
        "kpmatch bench --profile fast",
        "kpmatch bench --bag recording --against transformers --depth-confidence -1 --width-confidence -1",
        "kpmatch bench --device cpu,cuda --json speed.json --plot speed.png",
    )
    parser.add_argument(
        "--keypoints",
        metavar="N,...",
        type=_list_of("max_keypoints"),
        help="largest numbers of keypoints per image; an image may have fewer above --keypoint-threshold (default "
        "512,1024,2048,4096, or the profile's)",
    )
    parser.add_argument("--sizes", metavar="WxH,...", type=_sizes, default=[], help="image sizes (default: unchanged)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--images", metavar="FOLDER", type=Path, help="folder of pictures, taken in the order of their names"
    )
    source.add_argument(
        "--bag", metavar="BAG", type=Path, help="bag whose first images are taken (default: the demo bag)"
    )
    parser.add_argument("--image", metavar="TOPIC", default="", help="topic of the images in the bag")
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=whole_number(1),
        default=8,
        help="number of measurements of each time (default 8)",
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        action="append",
        choices=PEERS,
        default=[],
        help="another implementation: transformers, lightglue (cvg's package), opencv (the networks in OpenCV 5's DNN "
        "module), or xfeat (the authors' implementation of XFeat and LighterGlue); may be repeated",
    )
    parser.add_argument(
        "--peer-precision",
        metavar="PRECISION,...",
        type=_list_of("precision"),
        default=["float32"],
        help="number formats of the other implementations, all measured; auto is the one that this package uses "
        "(default float32)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="plot time against keypoints (needs matplotlib)")
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
        # SUPPRESS, so that the profile can distinguish a default from a value that the user gave.
        add_parameter(group, declaration(name), argparse.SUPPRESS)


_BENCH_OPTIONS = [name for name in MATCHING_OPTIONS if name not in ("device", "precision", "max_keypoints", "resize")]


def _list_of(name: str) -> Any:
    """A converter for argparse: a parameter's values, separated by commas."""
    item = declaration(name)

    def parse(text: str) -> list[Any]:
        try:
            return [item.check(item.type(part)) for part in text.split(",")]
        except ParameterError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from None

    return parse


def _sizes(text: str) -> list[tuple[int, int]]:
    return [image_size(part) for part in text.split(",")]


def _bench(options: argparse.Namespace) -> int:
    if options.image and options.bag is None:
        raise CommandError("--image names a topic of a bag: it needs --bag")
    from kpmatch_ros.cli.bench_measure import run_bench

    chosen = {name: getattr(options, name) for name in _BENCH_OPTIONS if hasattr(options, name)}
    parameters = Parameters.given(chosen)
    warn_of_idle(parameters, options.name)
    of_profile = profile_values(chosen.get("profile")).get("max_keypoints")
    run_bench(
        Request(
            parameters=parameters,
            devices=options.device,
            precisions=options.precision,
            keypoints=options.keypoints or (_KEYPOINTS if of_profile is None else (of_profile,)),
            sizes=options.sizes,
            repeats=options.repeats,
            images=options.images,
            bag=options.bag,
            topic=options.image,
            against=options.against,
            peer_precisions=options.peer_precision,
            json=options.json,
            plot=options.plot,
        )
    )
    return 0
