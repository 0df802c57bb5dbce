"""Creates messages without ROS: rosbags' dataclasses of ROS 2's types and of this package's own types.

They have the fields of the .msg file. Arrays are NumPy arrays.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags.recording import BagError
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose

__all__ = [
    "CAMERA_INFO_TYPE",
    "IMAGE_TYPES",
    "POSE_TYPE",
    "TF_TYPE",
    "Encoding",
    "camera_info_message",
    "image_message",
    "new_message",
    "pose_message",
    "typestore",
]

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO_TYPE = "sensor_msgs/msg/CameraInfo"
POSE_TYPE = "geometry_msgs/msg/PoseStamped"
TF_TYPE = "tf2_msgs/msg/TFMessage"

Encoding = Literal["rgb8", "bgr8", "mono8"]


@functools.cache
def typestore() -> Typestore:
    """The message types of ROS 2 Jazzy and of this package, for rosbags."""
    store = get_typestore(Stores.ROS2_JAZZY)
    for name, text in _own_definitions().items():
        store.register(get_types_from_msg(text, name))
    return store


def _own_definitions() -> dict[str, str]:
    """The package's .msg files by type name.

    A checkout has them in msg/, an installation in share/kpmatch_ros/msg.
    """
    above = Path(__file__).resolve().parents[2:]
    for folder in (above[0] / "msg", *(prefix / "share" / "kpmatch_ros" / "msg" for prefix in above)):
        if (folder / "MatchArray.msg").is_file():
            return {f"kpmatch_ros/msg/{path.stem}": path.read_text() for path in sorted(folder.glob("*.msg"))}
    raise FileNotFoundError(f"the package's .msg files are not installed: no share/kpmatch_ros/msg above {above[0]}")


def new_message(type_name: str, **fields: Any) -> Any:
    """A message of any type in :func:`typestore`. Fields that are not given are zero or empty.

    Raises:
        KeyError: the type is unknown.
        TypeError: the type does not have one of the fields.
    """
    store = typestore()
    defaults = {name: _default(kind, detail) for name, (kind, detail) in store.fielddefs[type_name][1]}
    if unknown := fields.keys() - defaults:
        raise TypeError(f"{type_name} has no field {', '.join(sorted(unknown))}; it has {', '.join(defaults)}")
    return store.types[type_name](**{**defaults, **fields})


def _default(kind: Nodetype, detail: Any) -> Any:
    if kind == Nodetype.NAME:
        return new_message(detail)
    if kind == Nodetype.BASE:
        name = detail[0]
        return "" if name == "string" else False if name == "bool" else 0.0 if name.startswith("float") else 0
    (element, element_detail), length = detail
    count = length if kind == Nodetype.ARRAY else 0
    if element == Nodetype.BASE and element_detail[0] != "string":
        name = element_detail[0]
        return np.zeros(count, np.uint8 if name in ("byte", "char") else np.dtype(name))
    return [_default(element, element_detail) for _ in range(count)]


def _header(stamp: int, frame_id: str) -> Any:
    seconds, nanoseconds = divmod(int(stamp), 10**9)
    time = new_message("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
    return new_message("std_msgs/msg/Header", stamp=time, frame_id=frame_id)


def image_message(
    image: NDArray[np.uint8],
    stamp: int,
    frame_id: str,
    encoding: Encoding = "rgb8",
    compressed: Literal["", "png", "jpeg"] = "",
) -> Any:
    """A sensor_msgs/Image, or a CompressedImage, with an RGB (H, W, 3) or grey (H, W) uint8 image.

    Args:
        image: RGB or grey; it is converted to `encoding`.
        stamp: nanoseconds.
        frame_id: of the header.
        encoding: of the pixels.
        compressed: format of a CompressedImage; empty for an Image.

    Raises:
        BagError: the image cannot be compressed.
    """
    grey = image.ndim == 2
    if encoding == "mono8":
        pixels = image if grey else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        pixels = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if grey else image
    header = _header(stamp, frame_id)
    if compressed:
        # cv2 expects BGR; the format string follows ROS's compressed_image_transport.
        ok, data = cv2.imencode(f".{compressed}", pixels if pixels.ndim == 2 else pixels[..., ::-1])
        if not ok:
            raise BagError(f"an image of shape {image.shape} cannot be stored as {compressed}")
        stored = "mono8" if pixels.ndim == 2 else "bgr8"
        return new_message(
            IMAGE_TYPES[1],
            header=header,
            format=f"{encoding}; {compressed} compressed {stored}",
            data=np.asarray(data, np.uint8).ravel(),
        )
    if encoding == "bgr8":
        pixels = pixels[..., ::-1]
    data = np.ascontiguousarray(pixels, np.uint8)
    return new_message(
        IMAGE_TYPES[0],
        header=header,
        height=data.shape[0],
        width=data.shape[1],
        encoding=encoding,
        step=data.strides[0],
        data=data.ravel(),
    )


def camera_info_message(camera: Camera, stamp: int, frame_id: str, baseline: float = 0.0) -> Any:
    """A sensor_msgs/CameraInfo at a stamp in nanoseconds.

    For the right camera of a rectified stereo pair, give the `baseline` in metres: P then holds -fx * baseline.
    """
    projection = np.column_stack([camera.matrix, [-camera.matrix[0, 0] * baseline, 0.0, 0.0]])
    distortion = camera.distortion if camera.distortion.size else np.zeros(5)
    return new_message(
        CAMERA_INFO_TYPE,
        header=_header(stamp, frame_id),
        height=camera.height,
        width=camera.width,
        distortion_model=camera.distortion_model or "plumb_bob",
        d=distortion.copy(),
        k=camera.matrix.ravel(),
        r=np.eye(3).ravel(),
        p=projection.ravel(),
    )


def pose_message(pose: Pose, stamp: int, frame_id: str) -> Any:
    """A geometry_msgs/PoseStamped at a stamp in nanoseconds."""
    x, y, z = (float(value) for value in pose.position)
    qx, qy, qz, qw = (float(value) for value in Rotation.from_matrix(pose.rotation).as_quat())
    return new_message(
        POSE_TYPE,
        header=_header(stamp, frame_id),
        pose=new_message(
            "geometry_msgs/msg/Pose",
            position=new_message("geometry_msgs/msg/Point", x=x, y=y, z=z),
            orientation=new_message("geometry_msgs/msg/Quaternion", x=qx, y=qy, z=qz, w=qw),
        ),
    )
