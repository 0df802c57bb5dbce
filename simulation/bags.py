"""Writes bags of simulated cameras, and of any images.

`python -m simulation.bags` in a checkout writes the bag of `kpmatch demo` (Makefile: demo-bag).
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.bags import (
    GROUND_TRUTH,
    BagWriter,
    Encoding,
    Storage,
    camera_info_message,
    image_message,
    pose_message,
)
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose
from simulation.poses import camera_path, demo_camera, stereo_right
from simulation.scene import Scene

__all__ = ["FIRST_STAMP", "build_scene", "write_camera_bag", "write_demo_bag"]

FIRST_STAMP = 1_700_000_000_000_000_000  # nanoseconds; an arbitrary time other than zero


def write_camera_bag(
    path: str | Path,
    images: Iterable[NDArray[np.uint8]],
    stamps: Iterable[int],
    camera: Camera | None,
    *,
    image_topic: str = "/camera/image_raw",
    info_topic: str | None = None,
    frame_id: str = "camera_optical_frame",
    encoding: Encoding = "rgb8",
    compressed: Literal["", "png", "jpeg"] = "",
    storage: Storage = "mcap",
    overwrite: bool = False,
) -> None:
    """Write a bag of one camera: RGB (H, W, 3) or grey (H, W) uint8 images, recorded at `stamps`, nanoseconds.

    If `camera` is given, its calibration is written with every image, on `info_topic` or else on camera_info beside the
    image topic. Raises BagError.
    """
    info_topic = info_topic or f"{image_topic.rsplit('/', 1)[0]}/camera_info"
    with BagWriter(path, storage, overwrite) as bag:
        for image, stamp in zip(images, stamps):
            bag.write(image_topic, image_message(image, stamp, frame_id, encoding, compressed), stamp)
            if camera is not None:
                bag.write(info_topic, camera_info_message(camera, stamp, frame_id), stamp)


@functools.lru_cache(maxsize=1)
def build_scene(seed: int) -> Scene:
    """The courtyard, which is built once per process.

    If the environment variable KPMATCH_SCENES names a folder, it is built once for all processes that use this folder.
    """
    folder = os.environ.get("KPMATCH_SCENES")
    if folder is None:
        return Scene(seed)
    file = Path(folder) / f"courtyard_{seed}.pickle"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            scene: Scene = pickle.loads(file.read_bytes())
        else:
            scene = Scene(seed)
            whole = file.with_suffix(".part")
            whole.write_bytes(pickle.dumps(scene))
            whole.rename(file)
    return scene


def write_demo_bag(
    path: str | Path,
    *,
    num_frames: int = 40,
    size: tuple[int, int] = (640, 480),
    seed: int = 0,
    motions: Iterable[tuple[str, int]] | None = None,
    step: float = 0.25,
    baseline: float | None = None,
    rate: float = 10.0,
    encoding: Encoding = "rgb8",
    compressed: Literal["", "png", "jpeg"] = "",
    storage: Storage = "mcap",
    overwrite: bool = False,
) -> list[Pose]:
    """Write a bag of a camera that walks through the synthetic courtyard, and return its poses in the world.

    The topics are /camera/image_raw (with some lens distortion and noise), /camera/camera_info and /ground_truth/pose.
    With a `baseline` in metres, the bag has a rectified stereo pair instead: image_rect and camera_info in /left and
    /right. The ground truth is then that of the left camera.

    `motions`, see :func:`simulation.camera_path`, replaces `num_frames` of walking. A walking camera moves `step`
    metres from frame to frame. Equal arguments give equal bags. Raises BagError.
    """
    poses = camera_path(num_frames if motions is None else motions, step)
    period = round(1e9 / rate)
    camera = demo_camera(*size, distorted=baseline is None)
    if baseline is None:
        eyes = [("/camera/image_raw", "/camera/camera_info", "camera_optical_frame", poses, 0.0)]
    else:
        right = [stereo_right(pose, baseline) for pose in poses]
        eyes = [
            ("/left/image_rect", "/left/camera_info", "left_optical_frame", poses, 0.0),
            ("/right/image_rect", "/right/camera_info", "right_optical_frame", right, baseline),
        ]
    suffix = "/compressed" if compressed else ""
    with BagWriter(path, storage, overwrite) as bag:
        films = [
            build_scene(seed).film(path_, camera, noise=2.0, noise_seed=1000 * seed + 10**6 * eye)
            for eye, (*_, path_, _) in enumerate(eyes)
        ]
        for number, (pose, *views) in enumerate(zip(poses, *films)):
            stamp = FIRST_STAMP + number * period
            bag.write(GROUND_TRUTH, pose_message(pose, stamp, "world"), stamp)
            for view, (image_topic, info_topic, frame_id, _, offset) in zip(views, eyes):
                bag.write(image_topic + suffix, image_message(view.image, stamp, frame_id, encoding, compressed), stamp)
                bag.write(info_topic, camera_info_message(camera, stamp, frame_id, offset), stamp)
    return poses


def main() -> None:
    """Write the bag of `kpmatch demo`, or one like it."""
    parser = argparse.ArgumentParser(prog="python -m simulation.bags", description=main.__doc__)
    parser.add_argument("bag", type=Path, help="folder to write; an existing bag there is replaced")
    parser.add_argument("--frames", type=int, default=12, help="images of each camera (default 12)")
    parser.add_argument("--baseline", type=float, help="of a stereo pair, metres (default: one camera)")
    parser.add_argument("--raw", action="store_true", help="write uncompressed images")
    options = parser.parse_args()
    compressed: Literal["", "jpeg"] = "" if options.raw else "jpeg"
    write_demo_bag(
        options.bag, num_frames=options.frames, baseline=options.baseline, compressed=compressed, overwrite=True
    )


if __name__ == "__main__":
    main()
