"""Converts results to messages: rclpy messages for the node, rosbags messages for bags.

Each function here fills the fields of a message. The message object is created by the argument `new`, called as

    new("std_msgs/msg/Header", stamp=stamp, frame_id="camera")

with NumPy arrays for array fields. `new` is `ros_message`, the default, or `new_message` of `kpmatch_ros.bags`, which
does not need ROS. ROS is imported when the first rclpy message is created.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable
from enum import IntEnum
from importlib import import_module
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.encodable import encodable
from kpmatch_ros.frames import Frame, ImagePair, Pair
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.landmarks import Landmarks
from kpmatch_ros.odometry import OdometryPose, Twist
from kpmatch_ros.tracking.tracks import NOT_DETECTED

__all__ = [
    "NewMessage",
    "Pairing",
    "feature_array",
    "header_of",
    "image_message",
    "point_cloud",
    "interruption",
    "match_array",
    "nanoseconds",
    "no_pose",
    "odometry",
    "relative_pose",
    "ros_message",
    "transform_of",
]

NewMessage = Callable[..., Any]

# Memory layout of a point of the topic `landmarks`, little-endian, and datatypes of sensor_msgs/PointField.
_LANDMARK = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("track_id", "<u8"), ("sigma", "<f4"), ("rgb", "<u4")])
_FLOAT32, _UINT32 = 7, 6
_NOT_DETECTED = 2**32 - 1  # MatchArray.NOT_DETECTED
_LAST = 2**31 * 10**9 - 1  # largest time that a builtin_interfaces/Time can hold, nanoseconds
_UNKNOWN = 1e9  # variance of an unknown velocity
_TYPECODES = {"u1": "B", "u4": "I", "u8": "Q", "f4": "f"}  # type codes of array.array, by NumPy type


class Pairing(IntEnum):
    """The kind of a pair of images. The values are the constants of msg/MatchArray."""

    CONSECUTIVE = 0
    STEREO = 1
    REQUESTED = 2


def ros_message(type_name: str, **fields: Any) -> Any:
    """Create an rclpy message, such as "std_msgs/msg/Header", with these fields. Needs ROS and the built message."""
    message_class, kinds = _ros_class(type_name)
    for name, value in fields.items():
        if isinstance(value, np.ndarray) and kinds[name].startswith("sequence"):
            # rclpy adopts an array.array as a whole, but copies a NumPy array element by element.
            fields[name] = array(_TYPECODES[value.dtype.str[1:]])
            fields[name].frombytes(value.data.cast("B") if value.size else b"")
    return message_class(**fields)


@functools.cache
def _ros_class(type_name: str) -> tuple[Callable[..., Any], dict[str, str]]:
    """Return the class of a message and the types of its fields."""
    module, name = type_name.rsplit("/", 1)
    message_class = getattr(import_module(module.replace("/", ".")), name)
    return message_class, message_class.get_fields_and_field_types()


def nanoseconds(stamp: Any) -> int:
    """Return a builtin_interfaces/Time in nanoseconds, limited to the largest time that a message can hold.

    The limit is needed because an invalid message may have a `nanosec` of one second or more.
    """
    return min(int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec), _LAST)


def header_of(frame: Frame, new: NewMessage = ros_message) -> Any:
    """Return a std_msgs/Header with stamp and frame id of the frame's image."""
    seconds, nanosec = divmod(frame.stamp, 1_000_000_000)
    time = new("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanosec)
    return new("std_msgs/msg/Header", stamp=time, frame_id=frame.frame_id)


def match_array(pair: ImagePair, pairing: int, extractor: str, matcher: str, new: NewMessage = ros_message) -> Any:
    """Return a kpmatch_ros/MatchArray with the matches of a pair of frames, or of a left and a right image."""
    current, reference = pair.current, pair.reference
    width, height = current.features.size
    reference_width, reference_height = reference.features.size
    return new(
        "kpmatch_ros/msg/MatchArray",
        header=header_of(current, new),
        reference=header_of(reference, new),
        pairing=int(pairing),
        width=width,
        height=height,
        reference_width=reference_width,
        reference_height=reference_height,
        num_keypoints=len(current.keypoints),
        reference_num_keypoints=len(reference.keypoints),
        points=_flat(pair.points, np.float32),
        reference_points=_flat(pair.reference_points, np.float32),
        indices=_indices(pair.indices[:, 1]),
        reference_indices=_indices(pair.indices[:, 0]),
        scores=_flat(pair.scores, np.float32),
        track_ids=_flat(pair.track_ids if isinstance(pair, Pair) else (), np.uint64),
        inliers=_flat(() if pair.inliers is None else pair.inliers, np.uint8),
        layers=pair.layers,
        reset=pair.reset,
        extract_ms=current.extract_ms,
        match_ms=pair.match_ms,
        extractor=encodable(extractor),
        matcher=encodable(matcher),
        sigmas=_flat(pair.sigmas, np.float32),
    )


def relative_pose(pair: Pair, new: NewMessage = ros_message) -> Any:
    """Return a kpmatch_ros/RelativePose: the pose of the current camera in the reference camera's frame."""
    pose = pair.pose
    return new(
        "kpmatch_ros/msg/RelativePose",
        header=header_of(pair.current, new),
        reference=header_of(pair.reference, new),
        pose=_pose_message(pose.rotation, pose.translation, pose.covariance, new),
        metric=pose.metric,
        status=int(pose.status),
        num_matches=pose.num_matches,
        num_inliers=pose.num_inliers,
        median_parallax=float(pose.median_parallax),
    )


def interruption(header: Any, new: NewMessage = ros_message) -> Any:
    """Return a kpmatch_ros/RelativePose for an image that has nothing to be matched with, from its std_msgs/Header."""
    return new(
        "kpmatch_ros/msg/RelativePose",
        header=header,
        pose=_pose_message(np.eye(3), np.zeros(3), np.zeros((6, 6)), new),
        status=int(PoseStatus.INTERRUPTED),
    )


def no_pose(header: Any, reference: Any, new: NewMessage = ros_message) -> Any:
    """Return a kpmatch_ros/RelativePose for two images that could not be matched, from their std_msgs/Header."""
    pose = interruption(header, new)
    pose.reference, pose.status = reference, int(PoseStatus.FAILED)
    return pose


def odometry(frame: Frame, pose: OdometryPose, odom_frame: str, child_frame: str, new: NewMessage = ros_message) -> Any:
    """Return a nav_msgs/Odometry with the pose of the child frame, and its velocity in its own axes.

    Each chain has its own odometry frame, so that a new chain cannot be mistaken for a continuation.
    """
    header = header_of(frame, new)
    header.frame_id = f"{odom_frame}_{pose.chain}" if pose.chain else odom_frame
    return new(
        "nav_msgs/msg/Odometry",
        header=header,
        child_frame_id=child_frame,
        pose=_pose_message(pose.rotation, pose.position, pose.covariance, new),
        twist=_twist_message(pose.twist, new),
    )


def _twist_message(twist: Twist | None, new: NewMessage) -> Any:
    velocity = np.zeros(6) if twist is None else twist.velocity
    covariance = _UNKNOWN * np.eye(6) if twist is None else twist.covariance
    linear, angular = (
        new("geometry_msgs/msg/Vector3", x=float(x), y=float(y), z=float(z)) for x, y, z in velocity.reshape(2, 3)
    )
    return new(
        "geometry_msgs/msg/TwistWithCovariance",
        twist=new("geometry_msgs/msg/Twist", linear=linear, angular=angular),
        covariance=_flat(covariance, np.float64),
    )


def transform_of(message: Any, new: NewMessage = ros_message) -> Any:
    """Return the geometry_msgs/TransformStamped of an Odometry, from the odometry frame to its child frame."""
    position = message.pose.pose.position
    return new(
        "geometry_msgs/msg/TransformStamped",
        header=message.header,
        child_frame_id=message.child_frame_id,
        transform=new(
            "geometry_msgs/msg/Transform",
            translation=new("geometry_msgs/msg/Vector3", x=position.x, y=position.y, z=position.z),
            rotation=message.pose.pose.orientation,
        ),
    )


def _pose_message(rotation: np.ndarray, translation: np.ndarray, covariance: np.ndarray, new: NewMessage) -> Any:
    x, y, z = (float(value) for value in translation)
    qx, qy, qz, qw = (float(value) for value in Rotation.from_matrix(rotation).as_quat())
    position = new("geometry_msgs/msg/Point", x=x, y=y, z=z)
    orientation = new("geometry_msgs/msg/Quaternion", x=qx, y=qy, z=qz, w=qw)
    return new(
        "geometry_msgs/msg/PoseWithCovariance",
        pose=new("geometry_msgs/msg/Pose", position=position, orientation=orientation),
        covariance=_flat(covariance, np.float64),
    )


def feature_array(frame: Frame, extractor: str, new: NewMessage = ros_message) -> Any:
    """Return a kpmatch_ros/FeatureArray with the keypoints and descriptors of a frame."""
    features = frame.features.numpy()
    width, height = features.size
    return new(
        "kpmatch_ros/msg/FeatureArray",
        header=header_of(frame, new),
        width=width,
        height=height,
        points=_flat(frame.keypoints, np.float32),
        scores=_flat(features.scores, np.float32),
        descriptor_size=features.descriptors.shape[1],
        descriptors=_flat(features.descriptors, np.float32),
        extractor=encodable(extractor),
    )


def image_message(pixels: np.ndarray, header: Any, new: NewMessage = ros_message) -> Any:
    """Return a sensor_msgs/Image with an RGB picture (H, W, 3) as ``rgb8``."""
    height, width = pixels.shape[:2]
    return new(
        "sensor_msgs/msg/Image",
        header=header,
        height=height,
        width=width,
        encoding="rgb8",
        step=3 * width,
        data=_flat(pixels, np.uint8),
    )


def point_cloud(landmarks: Landmarks, header: Any, new: NewMessage = ros_message) -> Any:
    """Return a sensor_msgs/PointCloud2 of landmarks: x y z, track_id (two uint32: low, high), sigma, rgb."""
    cloud = np.zeros(len(landmarks.points), _LANDMARK)
    cloud["x"], cloud["y"], cloud["z"] = landmarks.points.T
    cloud["track_id"], cloud["sigma"] = landmarks.track_ids, landmarks.sigmas
    red, green, blue = landmarks.colours.astype(np.uint32).T
    cloud["rgb"] = red << 16 | green << 8 | blue
    fields = [
        new(
            "sensor_msgs/msg/PointField",
            name=name,
            offset=place[1],
            datatype=_UINT32 if name == "track_id" else _FLOAT32,  # rgb is float32, too: readers use its bits
            count=2 if name == "track_id" else 1,
        )
        for name, place in (_LANDMARK.fields or {}).items()
    ]
    size = _LANDMARK.itemsize
    return new(
        "sensor_msgs/msg/PointCloud2",
        header=header,
        height=1,
        width=len(cloud),
        fields=fields,
        is_bigendian=False,
        point_step=size,
        row_step=size * len(cloud),
        data=np.frombuffer(cloud.tobytes(), np.uint8),
        is_dense=True,
    )


def _indices(values: np.ndarray) -> np.ndarray:
    """Return indices into features as (M,) uint32, with the message's constant for NOT_DETECTED."""
    return np.where(values == NOT_DETECTED, _NOT_DETECTED, values).astype(np.uint32)


def _flat(values: Any, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(values, dtype).reshape(-1)
