"""Builds image messages of every encoding from pictures with known colours."""

from __future__ import annotations

import array
import importlib.util
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image

from kpmatch_ros.imaging.images import ImageError, to_array

Array = NDArray[Any]
PATCH = 8  # pixels; even, so that neighbouring patches do not share chroma
ROSBAGS = get_typestore(Stores.ROS2_JAZZY).types
CONVERTERS = [name for name in ("cv_bridge", "rosbags.image") if importlib.util.find_spec(name)]

# Encodings with consecutive samples per pixel: dtype, and for each sample the channel of RGB (3: alpha), or grey.
PIXELS: dict[str, tuple[str, list[int] | str]] = {
    "mono8": ("u1", "grey"),
    "mono16": ("u2", "grey"),
    "rgb8": ("u1", [0, 1, 2]),
    "bgr8": ("u1", [2, 1, 0]),
    "rgba8": ("u1", [0, 1, 2, 3]),
    "bgra8": ("u1", [2, 1, 0, 3]),
    "rgb16": ("u2", [0, 1, 2]),
    "bgr16": ("u2", [2, 1, 0]),
    "rgba16": ("u2", [0, 1, 2, 3]),
    "bgra16": ("u2", [2, 1, 0, 3]),
    "8U": ("u1", "grey"),
    "16U": ("u2", "grey"),
    "32F": ("f4", "grey"),
    "64F": ("f8", "grey"),
    "8UC1": ("u1", "grey"),
    "16UC1": ("u2", "grey"),
    "32FC1": ("f4", "grey"),
    "64FC1": ("f8", "grey"),
    "8UC3": ("u1", [2, 1, 0]),
    "16UC3": ("u2", [2, 1, 0]),
    "32FC3": ("f4", [2, 1, 0]),
    "64FC3": ("f8", [2, 1, 0]),
    "8UC4": ("u1", [2, 1, 0, 3]),
    "16UC4": ("u2", [2, 1, 0, 3]),
    "32FC4": ("f4", [2, 1, 0, 3]),
    "64FC4": ("f8", [2, 1, 0, 3]),
}
BAYER = [f"bayer_{pattern}{bits}" for pattern in ("rggb", "bggr", "gbrg", "grbg") for bits in (8, 16)]
PACKED_YUV = {"uyvy": "uyvy", "yuv422": "uyvy", "yuyv": "yuyv", "yuv422_yuy2": "yuyv"}
PLANAR_YUV = ["nv12", "nv21", "nv24"]
WITHOUT_COPY = [
    name for name, (dtype, channels) in PIXELS.items() if dtype == "u1" and channels in ("grey", [0, 1, 2], [2, 1, 0])
]
NO_PICTURE = {f"{depth}C{channels}" for depth in ("8S", "16S", "32S") for channels in (1, 2, 3, 4)}
NO_PICTURE |= {f"{depth}C2" for depth in ("8U", "16U", "32F", "64F")}


def noise(height: int = 16, width: int = 24) -> Array:
    """Return an RGB picture in which every pixel has another colour."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def patches() -> Array:
    """Return an RGB picture of squares with one colour each, which Bayer patterns and shared chroma preserve."""
    return noise(3, 4).repeat(PATCH, axis=0).repeat(PATCH, axis=1)


def inside_patches(picture: Array) -> Array:
    """Return the pixels whose neighbours have the same colour."""
    rows, columns = (np.arange(length) % PATCH for length in picture.shape[:2])
    return picture[(rows > 0) & (rows < PATCH - 1)][:, (columns > 0) & (columns < PATCH - 1)]


def deepen(values: Array, dtype: str) -> Array:
    """Convert 8-bit values to samples of another depth with the same brightness."""
    if dtype == "u2":  # with noise that rounds to the same 8-bit value
        jitter = np.random.default_rng(1).integers(-128, 129, values.shape)
        return np.asarray(np.clip(values.astype(int) * 257 + jitter, 0, 65535), "u2")
    return values if dtype == "u1" else np.asarray(values / 255, dtype)


def yuv(rgb: Array) -> Array:
    """Convert RGB to YUV, BT.601 with limited range: Y in [16, 235], U and V in [16, 240]."""
    matrix = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
    return np.asarray(np.rint(rgb / 255 @ matrix.T + (16, 128, 128)), np.uint8)


def planes(encoding: str, rgb: Array) -> list[Array]:
    """Return the image as one or two planes of samples, each (rows, samples per row)."""
    height, width = rgb.shape[:2]
    if encoding in PIXELS:
        dtype, order = PIXELS[encoding]
        if order == "grey":
            return [deepen(rgb[..., 0], dtype)]
        alpha = np.random.default_rng(2).integers(0, 256, (height, width, 1), dtype=np.uint8)
        return [deepen(np.concatenate([rgb, alpha], axis=2)[..., order], dtype).reshape(height, -1)]
    if encoding in BAYER:
        mosaic = np.empty((height, width), np.uint8)
        for place, colour in enumerate(encoding[6:10]):
            mosaic[place // 2 :: 2, place % 2 :: 2] = rgb[place // 2 :: 2, place % 2 :: 2, "rgb".index(colour)]
        return [deepen(mosaic, "u2" if encoding.endswith("16") else "u1")]
    luma, u, v = np.moveaxis(yuv(rgb), 2, 0)
    if encoding in PACKED_YUV:
        first, second, u, v = luma[:, 0::2], luma[:, 1::2], u[:, ::2], v[:, ::2]
        samples = [u, first, v, second] if PACKED_YUV[encoding] == "uyvy" else [first, u, second, v]
        return [np.stack(samples, axis=2).reshape(height, -1)]
    if encoding == "nv24":
        return [luma, np.stack([u, v], axis=2).reshape(height, -1)]
    chroma = [u[::2, ::2], v[::2, ::2]] if encoding == "nv12" else [v[::2, ::2], u[::2, ::2]]
    return [luma, np.stack(chroma, axis=2).reshape((height + 1) // 2, -1)]


def image(encoding: str, rgb: Array, *, big: bool = False, padding: int = 0, kind: str = "rclpy") -> Any:
    """Return the message, in which `padding` meaningless bytes follow each row."""
    data, steps = b"", list[int]()
    for plane in planes(encoding, rgb):
        ordered = plane.astype(plane.dtype.newbyteorder(">" if big else "<"))
        extra = padding * (2 if encoding == "nv24" and steps else 1)  # a chroma row of nv24 is as long as two luma rows
        steps.append(ordered.shape[1] * ordered.itemsize + extra)
        data += b"".join(row.tobytes() + b"\xa5" * extra for row in ordered)
    fields: dict[str, Any] = {
        "height": rgb.shape[0],
        "width": rgb.shape[1],
        "encoding": encoding,
        "is_bigendian": int(big),
        "step": steps[0],
    }
    if kind == "rosbags":
        header = ROSBAGS["std_msgs/msg/Header"](ROSBAGS["builtin_interfaces/msg/Time"](0, 0), "camera")
        return ROSBAGS["sensor_msgs/msg/Image"](header=header, data=np.frombuffer(data, np.uint8), **fields)
    if kind == "bytes":
        return SimpleNamespace(data=data, **fields)
    return Image(data=array.array("B", data), **fields)


def compressed(data: bytes, format: str = "jpeg") -> CompressedImage:
    return CompressedImage(format=format, data=array.array("B", data))


def encode(extension: str, rgb: Array) -> bytes:
    channels = rgb if rgb.ndim == 2 else rgb[..., [2, 1, 0, 3][: rgb.shape[2]]]
    return bytes(cv2.imencode(extension, channels)[1].tobytes())


def refused(message: Any, reason: str) -> str:
    """Check that a message is rejected with this reason, and return the error text."""
    with pytest.raises(ImageError) as error:
        to_array(message)
    assert error.value.reason == reason
    return str(error.value)
