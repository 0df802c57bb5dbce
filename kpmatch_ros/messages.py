"""Results to ROS messages. Arrays are filled from memory, never element by element."""
from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import Pose, TransformStamped
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from kpmatch_ros.front_end import Frame, Pair
from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from kpmatch_ros.odometry import OdometryPose
from kpmatch_ros.parameters import Declaration

__all__ = [
    "diagnostic_status",
    "feature_array",
    "header_of",
    "image_message",
    "match_array",
    "nanoseconds",
    "odometry",
    "parameter_descriptor",
    "relative_pose",
    "transform_of",
]

_UNKNOWN = 1e9  # variance of a velocity that nobody estimated


def nanoseconds(stamp: Time) -> int:
    """A stamp as one number."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def header_of(frame: Frame) -> Header:
    """Stamp and frame id of the image a frame was made from."""
    seconds, nanosec = divmod(frame.stamp, 1_000_000_000)
    return Header(stamp=Time(sec=seconds, nanosec=nanosec), frame_id=frame.frame_id)


def match_array(pair: Pair, pairing: int, extractor: str, matcher: str) -> MatchArray:
    """The matches of a pair of frames."""
    current, reference = pair.current, pair.reference
    message = MatchArray()
    message.header = header_of(current)
    message.reference = header_of(reference)
    message.pairing = pairing
    message.width, message.height = current.features.size
    message.reference_width, message.reference_height = reference.features.size
    message.num_keypoints = len(current.keypoints)
    message.reference_num_keypoints = len(reference.keypoints)
    message.points = _array("f", pair.points)
    message.reference_points = _array("f", pair.reference_points)
    message.indices = _array("I", pair.indices[:, 1])
    message.reference_indices = _array("I", pair.indices[:, 0])
    message.scores = _array("f", pair.scores)
    if pairing == MatchArray.CONSECUTIVE:
        message.track_ids = _array("Q", pair.track_ids)
    if pair.pose.inliers is not None:
        message.inliers = _array("B", pair.pose.inliers)
    message.layers = pair.layers
    message.reset = pair.reset
    message.extract_ms = current.extract_ms
    message.match_ms = pair.match_ms
    message.extractor = extractor
    message.matcher = matcher
    return message


def relative_pose(pair: Pair) -> RelativePose:
    """The pose of the current camera in the reference camera's frame."""
    pose = pair.pose
    message = RelativePose()
    message.header = header_of(pair.current)
    message.reference = header_of(pair.reference)
    _fill(message.pose.pose, pose.rotation, pose.translation)
    message.pose.covariance = np.ascontiguousarray(pose.covariance, np.float64).reshape(36)
    message.metric = pose.metric
    message.status = int(pose.status)
    message.num_matches = pose.num_matches
    message.num_inliers = pose.num_inliers
    message.median_parallax = float(pose.median_parallax)
    return message


def odometry(frame: Frame, pose: OdometryPose) -> Odometry:
    """Every chain has a frame of its own, so that nobody takes one for the other's continuation."""
    message = Odometry(header=header_of(frame), child_frame_id=frame.frame_id)
    message.header.frame_id = f"odom_{pose.chain}" if pose.chain else "odom"
    _fill(message.pose.pose, pose.rotation, pose.position)
    message.pose.covariance = np.ascontiguousarray(pose.covariance, np.float64).reshape(36)
    message.twist.covariance = _UNKNOWN * np.eye(6).reshape(36)
    return message


def transform_of(message: Odometry) -> TransformStamped:
    """The same for TF: the camera's frame below the odometry frame."""
    found = TransformStamped(header=message.header, child_frame_id=message.child_frame_id)
    position = message.pose.pose.position
    found.transform.translation.x, found.transform.translation.y = position.x, position.y
    found.transform.translation.z = position.z
    found.transform.rotation = message.pose.pose.orientation
    return found


def _fill(pose: Pose, rotation: np.ndarray, translation: np.ndarray) -> None:
    position, orientation = pose.position, pose.orientation
    position.x, position.y, position.z = (float(value) for value in translation)
    orientation.x, orientation.y, orientation.z, orientation.w = (
        float(value) for value in Rotation.from_matrix(rotation).as_quat()
    )


def feature_array(frame: Frame, extractor: str) -> FeatureArray:
    """The keypoints and descriptors of a frame."""
    features = frame.features.numpy()
    message = FeatureArray()
    message.header = header_of(frame)
    message.width, message.height = features.size
    message.points = _array("f", frame.keypoints)
    message.scores = _array("f", features.scores)
    message.descriptor_size = features.descriptors.shape[1]
    message.descriptors = _array("f", features.descriptors)
    message.extractor = extractor
    return message


def image_message(pixels: np.ndarray, header: Header) -> Image:
    """An RGB picture (H, W, 3) as ``rgb8``."""
    message = Image(header=header, encoding="rgb8")
    message.height, message.width = pixels.shape[:2]
    message.step = 3 * message.width
    message.data = _array("B", pixels)
    return message


def diagnostic_status(level: bytes, name: str, text: str, hardware_id: str, values: dict[str, str]) -> DiagnosticStatus:
    """One entry of ``/diagnostics``."""
    return DiagnosticStatus(
        level=level,
        name=name,
        message=text,
        hardware_id=hardware_id,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )


def parameter_descriptor(item: Declaration) -> ParameterDescriptor:
    """What `ros2 param describe` shows of a parameter."""
    constraints = [item.constraint] if item.choices else []
    constraints += [] if item.dynamic else ["takes effect when the node is configured"]
    descriptor = ParameterDescriptor(
        description=f"{item.description}{f' [{item.unit}]' if item.unit else ''}",
        additional_constraints="; ".join(constraints),
        # A whole number in a file is an integer to ROS; Declaration.check takes it for a float and checks the rest.
        dynamic_typing=item.type is float,
    )
    if item.minimum is None:
        return descriptor
    if item.type is int:
        highest = 2**31 - 1 if item.maximum is None else int(item.maximum)
        descriptor.integer_range = [IntegerRange(from_value=int(item.minimum), to_value=highest, step=1)]
    elif item.type is float:
        upper = 1e9 if item.maximum is None else item.maximum
        descriptor.floating_point_range = [FloatingPointRange(from_value=item.minimum, to_value=upper, step=0.0)]
    return descriptor


def _array(typecode: str, values: Any) -> array:
    # rclpy takes an array.array as it is, but assigns a NumPy array element by element.
    filled = array(typecode)
    filled.frombytes(np.ascontiguousarray(values, dtype=np.dtype(typecode)).tobytes())
    return filled
