"""kpmatch bag: replays a bag, and writes a bag with the messages that the node would publish."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kpmatch_ros.cli.common import (
    MATCHING_OPTIONS,
    CommandError,
    Parser,
    add_command,
    add_parameters,
    check_outputs,
    option_of,
    utf8_path,
    warn_of_idle,
)
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.tables import format_table

__all__ = ["add_bag", "add_replay_options", "chosen_topics", "replay_parameters"]

# The matching parameters, and those for sequences of frames, for images and for odometry.
BAG_OPTIONS = (
    *MATCHING_OPTIONS,
    "reference",
    "keyframe_min_matches",
    "keyframe_max_parallax",
    "refine",
    "lost_tracks",
    "max_gap",
    "stretch",
    "mask",
    "mask_right",
    "rectified",
    "readout_time",
    "motion_prior",
    "mode",
    "sync_tolerance",
    "publish_odometry",
    "odom_frame",
    "base_frame",
    "publish_tf",
)
MONO_TOPICS: tuple[str, ...] = ("image", "camera_info", "mask_topic")
STEREO_TOPICS: tuple[str, ...] = ("left", "right", "left_info", "right_info", "left_mask", "right_mask")


def add_bag(commands: Any) -> None:
    parser = add_command(
        commands,
        "bag",
        _bag,
        "run the matcher on a bag, and write a bag with the messages that the node would publish",
        "Run the matcher on a camera, or a stereo pair of cameras, in a bag (rosbag2: MCAP or sqlite3), every frame in "
        "order, without ROS. The output bag holds the node's messages for these frames, with the stamps of the images: "
        "/matches and /relative_pose, and in stereo also /stereo_matches. It does not hold the images. Options "
        "override the parameter file; parameters that neither sets have the node's defaults.",
        "kpmatch bag drive out --poses poses.txt",
        "kpmatch bag drive out --report drive.html",
        "kpmatch bag drive out --image /camera/image_raw --params matcher.yaml --device cuda",
        "kpmatch bag drive out --left /cam0/image_raw --right /cam1/image_raw --poses poses.txt",
    )
    parser.add_argument(
        "source", metavar="IN", type=Path, help="bag to read: a folder, or a .mcap or .db3 file, also .zstd"
    )
    parser.add_argument("target", metavar="OUT", type=Path, help="bag to write: a folder that does not exist yet")
    parser.add_argument(
        "--poses",
        metavar="FILE",
        type=Path,
        help="also write the chained poses in TUM's text format, which evo reads: in metres in stereo; with one "
        "camera, the scale is arbitrary",
    )
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        type=Path,
        help="also write an HTML page: trajectory, figures per frame, pictures of the matches (needs plotly)",
    )
    parser.add_argument(
        "--rerun",
        metavar="FILE.rrd",
        type=utf8_path,
        help="also write a recording with the same content for the Rerun viewer (needs rerun-sdk)",
    )
    parser.add_argument(
        "--readout",
        action="store_true",
        help="with one camera, also search for the readout_time of its rolling shutter that explains the matches best; "
        "the camera must turn in the recording",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_replay_options(parser)


def add_replay_options(parser: Parser) -> None:
    """Add the options that say what is replayed and how. `kpmatch bag` and `kpmatch archive` share them."""
    parser.add_argument(
        "--image", metavar="TOPIC", help="images, compressed or not; not needed if the bag has only one such topic"
    )
    parser.add_argument(
        "--camera-info",
        metavar="TOPIC",
        help="calibration of these images (default camera_info beside the image topic)",
    )
    for side in ("left", "right"):
        parser.add_argument(
            f"--{side}",
            metavar="TOPIC",
            help=f"images of a stereo pair's {side} camera; not needed with --mode stereo if two topics are named "
            "left and right, cam0 and cam1, or infra1 and infra2",
        )
    for side in ("left", "right"):
        parser.add_argument(
            f"--{side}-info",
            metavar="TOPIC",
            help="calibration of these images (default camera_info beside the image topic)",
        )
    for option in ("mask-topic", "left-mask", "right-mask"):
        parser.add_argument(
            f"--{option}",
            metavar="TOPIC",
            help="masks of these images, mono8, 0 where nothing is to be detected (default mask beside the image "
            "topic)",
        )
    parser.add_argument(
        "--params", metavar="FILE", type=Path, help="ROS 2 parameter file for /matcher, like config/matcher.yaml"
    )
    parser.add_argument("--features", action="store_true", help="also write /features, with the descriptors")
    parser.add_argument("--match-image", action="store_true", help="also write /match_image, pictures of the matches")
    parser.add_argument("--landmarks", action="store_true", help="in stereo, also write /landmarks: points in metres")
    add_parameters(parser, "parameters", BAG_OPTIONS)


def _bag(options: argparse.Namespace) -> int:
    from kpmatch_ros.bags import Bag, BagError
    from kpmatch_ros.bags.cameras import choose_cameras

    parameters = replay_parameters(options)
    if options.readout and parameters.mode == "stereo":
        raise CommandError("--readout: works with one camera only; name it with --image")
    outputs = {"--poses": options.poses, "--report": options.report, "--rerun": options.rerun}
    check_outputs(outputs, [options.params], parameters)
    try:
        with Bag(options.source) as bag:
            cameras = choose_cameras(bag, parameters.mode, chosen_topics(options, parameters))
            # Imported here, because PyTorch takes seconds to load: a bag that cannot be read is refused before that.
            from kpmatch_ros.bags.replay import replay

            report = replay(
                bag, options.target, cameras, parameters, poses=options.poses, page=options.report,
                rerun=options.rerun, features=options.features, match_image=options.match_image,
                landmarks=options.landmarks, readout=options.readout,
            )  # fmt: skip
    except BagError as error:
        raise CommandError(str(error)) from error
    for fault in report.faults:
        print(f"{options.name}: {fault}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report.figures(), "out": str(options.target)}))
    else:
        print(format_table([*report.rows(), ("bag", str(options.target))]))
    return 0


def replay_parameters(options: argparse.Namespace) -> Parameters:
    """The parameters from the options and the parameter file.

    Raises:
        CommandError: an option belongs to the other mode.
        ParameterError: a value is not allowed, or the file is not a parameter file.
    """
    from kpmatch_ros.parameter_file import read_parameter_file

    given = vars(options)
    changes = {name: given[name] for name in BAG_OPTIONS if name in given}
    if any(given[name] is not None for name in STEREO_TOPICS):
        changes.setdefault("mode", "stereo")
    if options.params is None:
        parameters = Parameters.given(changes)
    else:
        parameters = read_parameter_file(
            options.params, warn=lambda text: print(f"{options.name}: {text}", file=sys.stderr), options=changes
        )
    _check_topic_options(given, parameters.mode)
    if options.landmarks and parameters.mode != "stereo":
        raise CommandError(
            "--landmarks: a single camera has no metric scale; name a stereo pair with --left and --right"
        )
    warn_of_idle(parameters, options.name)
    return parameters


def chosen_topics(options: argparse.Namespace, parameters: Parameters) -> dict[str, str | None]:
    """The topics that the options name, by the names of the mode's options; None for options that are not given."""
    names = STEREO_TOPICS if parameters.mode == "stereo" else MONO_TOPICS
    return {name: vars(options)[name] for name in names}


def _check_topic_options(given: dict[str, Any], mode: str) -> None:
    """Raise CommandError if a topic option of the other mode is given: it would have no effect."""
    foreign, own = (STEREO_TOPICS, "--image") if mode == "mono" else (MONO_TOPICS, "--left and --right")
    for name in foreign:
        if given[name] is not None:
            raise CommandError(f"{option_of(name)} {given[name]}: the mode is {mode}; name its images with {own}")
