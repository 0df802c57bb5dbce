"""Reads and writes ROS 2 bags (rosbag2: MCAP and sqlite3) without ROS, through the library rosbags.

Messages are rosbags' dataclasses: they have the fields of the .msg file, and arrays are NumPy arrays. `new_message`
makes a message of any type, including this package's types, with every field zero or empty:

    with BagWriter("out") as bag:
        message = new_message("kpmatch_ros/msg/MatchArray", width=640, height=480)
        bag.write("matches", message, stamp)
    for topic, type_name, stamp, message in read_messages("out"):
        ...

A `Bag` is opened once and read several times. That saves time with large bags without an index, and with bags that are
compressed as a whole:

    with Bag("drive.mcap.zstd") as bag:
        info = next(bag.messages(["/camera/camera_info"]))
        for topic, type_name, stamp, message in bag.messages(["/camera/image_raw"]):
            ...

ROS 2 Humble and later can play the bags that are written (metadata version 8). Bags of all distributions up to Kilted
can be read, with or without message definitions in the bag. A bag that cannot be read raises BagError.
"""

from kpmatch_ros.bags.message_types import (
    CAMERA_INFO_TYPE,
    IMAGE_TYPES,
    Encoding,
    camera_info_message,
    image_message,
    new_message,
    pose_message,
    typestore,
)
from kpmatch_ros.bags.reading import (
    GROUND_TRUTH,
    Bag,
    Record,
    Topic,
    bag_storage,
    bag_topics,
    ground_truth,
    image_topics,
    read_ground_truth,
    read_messages,
)
from kpmatch_ros.bags.recording import BagError, OutputError, Storage
from kpmatch_ros.bags.writing import BagWriter

__all__ = [
    "CAMERA_INFO_TYPE",
    "GROUND_TRUTH",
    "IMAGE_TYPES",
    "Bag",
    "BagError",
    "BagWriter",
    "Encoding",
    "OutputError",
    "Record",
    "Storage",
    "Topic",
    "bag_storage",
    "bag_topics",
    "camera_info_message",
    "ground_truth",
    "image_message",
    "image_topics",
    "new_message",
    "pose_message",
    "read_ground_truth",
    "read_messages",
    "typestore",
]
