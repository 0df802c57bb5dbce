"""Reads the demo bag that ships with the package: a short walk of one camera, with its ground-truth poses.

The package `simulation/` rendered the bag (`make demo-bag` in a checkout). Reading it needs neither the simulation nor
ROS.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.bags.message_types import image_message, pose_message
from kpmatch_ros.bags.reading import GROUND_TRUTH, Bag, ground_truth
from kpmatch_ros.bags.recording import bag_information
from kpmatch_ros.bags.writing import BagWriter
from kpmatch_ros.geometry.pose import Pose
from kpmatch_ros.imaging.images import to_array

__all__ = ["DEMO_BAG", "DemoFrame", "demo_frames", "is_demo_bag", "unpack_demo_bag"]

DEMO_BAG = Path(__file__).resolve().parents[1] / "data" / "demo"
IMAGE_TOPIC = "/camera/image_raw"
INFO_TOPIC = "/camera/camera_info"

_NOTES = {"made_by": "kpmatch demo"}
_PERIOD = 100_000_000  # nanoseconds between two frames


class DemoFrame(NamedTuple):
    """One image of the walk.

    Attributes:
        stamp: nanoseconds.
        image: (H, W, 3) uint8, RGB.
        camera_info: the calibration, a sensor_msgs/CameraInfo of rosbags.
        pose: of the optical frame in the world.
    """

    stamp: int
    image: NDArray[np.uint8]
    camera_info: Any
    pose: Pose


def demo_frames(count: int) -> Iterator[DemoFrame]:
    """Yield `count` frames of the walk. If the bag holds fewer, the camera walks back and forth."""
    with Bag(DEMO_BAG) as bag:
        stamps, poses = ground_truth(bag)
        infos = {record.stamp: record.message for record in bag.messages([INFO_TOPIC])}
        images = {record.stamp: record.message for record in bag.messages([f"{IMAGE_TOPIC}/compressed"])}
    recorded = [
        DemoFrame(stamp, to_array(images[stamp]), infos[stamp], pose) for stamp, pose in zip(stamps.tolist(), poses)
    ]
    order = [*range(len(recorded)), *range(len(recorded) - 2, 0, -1)]
    for number in range(count):
        frame = recorded[order[number % len(order)]]
        stamp = recorded[0].stamp + number * _PERIOD
        info = copy.deepcopy(frame.camera_info)
        info.header.stamp.sec, info.header.stamp.nanosec = divmod(stamp, 10**9)
        yield DemoFrame(stamp, frame.image, info, frame.pose)


def is_demo_bag(path: str | Path) -> bool:
    """Whether :func:`unpack_demo_bag` wrote the bag at `path`."""
    try:
        notes = bag_information(Path(path, "metadata.yaml")).get("custom_data")
    except (OSError, ValueError):  # there is no bag, or it cannot be read
        return False
    return isinstance(notes, dict) and _NOTES.items() <= notes.items()


def unpack_demo_bag(path: str | Path, count: int) -> None:
    """Write `count` frames as a bag with raw images, their calibration and the ground-truth poses.

    A bag that this function wrote earlier is replaced.

    Raises:
        BagError: something else is at `path`, or the bag cannot be written.
    """
    with BagWriter(path, overwrite=is_demo_bag(path), notes=_NOTES) as bag:
        for frame in demo_frames(count):
            frame_id = frame.camera_info.header.frame_id
            bag.write(GROUND_TRUTH, pose_message(frame.pose, frame.stamp, "world"), frame.stamp)
            bag.write(IMAGE_TOPIC, image_message(frame.image, frame.stamp, frame_id, "rgb8"), frame.stamp)
            bag.write(INFO_TOPIC, frame.camera_info, frame.stamp)
