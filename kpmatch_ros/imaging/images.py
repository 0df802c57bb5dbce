"""Converts ROS image messages to NumPy arrays.

`to_array` converts a `sensor_msgs/Image` or a `sensor_msgs/CompressedImage`, from rclpy or from rosbags, to 8-bit grey
or RGB pixels. ROS need not be installed.

Where `sensor_msgs/image_encodings` leaves the meaning of an encoding open, these rules apply:

- `mono8`, `rgb8`, `bgr8`, `rgba8`, `bgra8` and the types `8UC1`, `8UC3`, `8UC4` are not copied: the pixels are a view
  of the message's data. Alpha is dropped.
- A type without colour names (`8UC3`, `16UC4`, `32FC3`) has blue first, as in OpenCV and RViz; one channel is grey.
  (cv_bridge does not decide: it refuses to convert these to colours or `mono8`.)
- 16-bit values are divided by 257 and rounded, so 65535 becomes 255, or converted by `scale`. The range of a single
  picture is not used, because the brightness would jump between frames. The parameter `stretch` follows the range over
  time, for cameras that leave the upper bits empty (12 bits in `mono16`).
- A float image must have all values in [0, 1], which become [0, 255]. Others (depth in metres, NaN) are rejected.
- Bayer and YUV are converted by the ROS 2 `cv_bridge` if it works, otherwise by `rosbags-image`. YUV is BT.601 with
  limited range, as in OpenCV. In `nv12`, `nv21` and `nv24` the chroma rows follow the `height` rows of luma. Their
  distance is also `step` bytes, in `nv24` twice that.
- Types with two channels, signed types and 32-bit integers are not pictures and are rejected.

The last row may lack its padding, as in a region of a larger image. Data after the image is ignored.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.imaging.image_headers import JPEG, PNG, image_size, jpeg_end, jpeg_scans, png_picture

MAX_SIDE = 32766  # pixels: the limit of src/geometry.c, and of most of OpenCV
LARGEST_FILE = 8192 * 8192  # pixels: limit of a decoded image; `resize` gives no larger ones; in colour 0.2 GB
_MOST_SCANS = 100  # scans of a progressive JPEG: encoders write about ten, and each costs a pass over the whole image


class ImageError(ValueError):
    """An image message that cannot be used.

    Attributes:
        reason: a short stable key for counters: "encoding" (unknown, not a picture, or no converter installed), "size"
            (width or height), "step", "data" (too short, or not bytes), "decode" (compressed data that is damaged or of
            another format) or "value" (floats outside [0, 1]).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Layout(NamedTuple):
    """The memory layout of an encoding's samples."""

    dtype: str  # type of a sample, without byte order
    channels: int  # samples per pixel in the first plane
    colour: str  # a key of _CHANNELS, an 8-bit encoding that both converters know, or one with a chroma plane


# The channels of the picture, without alpha and in RGB order.
_CHANNELS: dict[str, Any] = {"grey": np.s_[..., 0], "rgb": np.s_[..., :3], "bgr": np.s_[..., 2::-1]}


def _layouts() -> dict[str, Layout]:
    layouts = {}
    for bits, dtype in (("8", "u1"), ("16", "u2")):
        layouts["mono" + bits] = Layout(dtype, 1, "grey")
        for colour in ("rgb", "bgr"):
            layouts[colour + bits] = Layout(dtype, 3, colour)
            layouts[colour + "a" + bits] = Layout(dtype, 4, colour)
        for pattern in ("rggb", "bggr", "gbrg", "grbg"):
            layouts[f"bayer_{pattern}{bits}"] = Layout(dtype, 1, f"bayer_{pattern}8")
    for depth, dtype in (("8U", "u1"), ("16U", "u2"), ("32F", "f4"), ("64F", "f8")):
        layouts[depth] = layouts[depth + "C1"] = Layout(dtype, 1, "grey")
        layouts[depth + "C3"] = Layout(dtype, 3, "bgr")
        layouts[depth + "C4"] = Layout(dtype, 4, "bgr")
    # cv_bridge knows the packed YUV encodings only by their deprecated names.
    layouts["uyvy"] = layouts["yuv422"] = Layout("u1", 2, "yuv422")
    layouts["yuyv"] = layouts["yuv422_yuy2"] = Layout("u1", 2, "yuv422_yuy2")
    for name in ("nv12", "nv21", "nv24"):
        layouts[name] = Layout("u1", 1, name)
    return layouts


LAYOUTS = _layouts()  # by encoding


Scale = Callable[[NDArray[np.uint16]], NDArray[np.uint8]]


def to_array(message: Any, largest: int = LARGEST_FILE, scale: Scale | None = None) -> NDArray[np.uint8]:
    """Return the pixels of an image message, as 8-bit grey or RGB.

    Args:
        message: a `sensor_msgs/Image`, or a `sensor_msgs/CompressedImage` with JPEG or PNG data. Any object with the
            same fields works, with `data` as bytes, `array.array` or a NumPy array. The colours of a compressed image
            are those that its file declares. Its `format` is used only to reject depth and to recognise Bayer mosaics
            that are stored as grey.
        largest: largest number of pixels. An image that has or declares more is rejected before it is decoded.
        scale: converts 16-bit to 8-bit pixels, (H, W, channels), as :class:`kpmatch_ros.imaging.contrast.Stretch` does.
            Default: division by 257.

    Returns:
        uint8, (H, W) for a grey message, otherwise (H, W, 3) in RGB order. It is often a view of `message.data`: do not
        write to it. It may be read-only and have padded rows. If blue came first, its last stride is negative, which
        `torch.from_numpy` accepts only after `np.ascontiguousarray`.

    Raises:
        ImageError: if the content of the message is not a valid picture.
    """
    if hasattr(message, "format"):
        return _decompress(message, largest, scale)
    layout = LAYOUTS.get(message.encoding) if isinstance(message.encoding, str) else None
    if layout is None:
        raise ImageError(
            "encoding",
            f"encoding {message.encoding!r:.80} is not supported: publish mono8, rgb8, bgr8, mono16, bayer_rggb8, "
            "yuv422_yuy2, nv12 or the like",
        )
    width, height = _integer(message, "width", "size"), _integer(message, "height", "size")
    what = f"{message.encoding} image of {width} x {height} pixels"
    _check_size(width, height, layout.colour, what)
    _check_pixels(width * height, largest, f"{what}:")
    dtype = np.dtype(layout.dtype).newbyteorder(">" if message.is_bigendian else "<")
    step, row = _integer(message, "step", "step"), width * layout.channels * dtype.itemsize
    if step < row:
        raise ImageError("step", f"{what}: step is {step}, but a row holds {row} bytes: correct the publisher")

    data = _bytes(message.data, what)

    def plane(offset: int, rows: int, step: int, channels: int) -> NDArray[Any]:
        strides = (step, channels * dtype.itemsize, dtype.itemsize)
        end = offset + (rows - 1) * step + width * strides[1]
        if end > data.size:
            raise ImageError(
                "data",
                f"{what} with step {step}: holds {data.size} bytes of data, but needs {end}: the "
                "message was cut short, or its width, height or step is wrong",
            )
        return np.ndarray((rows, width, channels), dtype, data, offset, strides)

    pixels = plane(0, height, step, layout.channels)
    if layout.colour in ("nv12", "nv21"):
        # Convert to YUYV, with each chroma row used for two rows. So all YUV formats take the same path, and both
        # converters give the same result.
        chroma = plane(step * height, (height + 1) // 2, step, 1)
        if layout.colour == "nv21":  # V comes first
            chroma = chroma.reshape(-1, width // 2, 2)[..., ::-1].reshape(chroma.shape)
        return _convert(np.concatenate([pixels, np.repeat(chroma, 2, axis=0)[:height]], axis=2), "yuv422_yuy2", what)
    if layout.colour == "nv24":
        # Convert to YUYV with every pixel doubled.
        chroma = plane(step * height, height, 2 * step, 2)
        doubled = np.concatenate([pixels, chroma[..., :1], pixels, chroma[..., 1:]], axis=2)
        return _convert(doubled.reshape(height, 2 * width, 2), "yuv422_yuy2", what)[:, ::2]
    return _picture(pixels, layout.colour, what, scale)


def check_header(data: bytes, what: str, largest: int = LARGEST_FILE) -> None:
    """Check the header of a JPEG, PNG or other image file before the file is decoded.

    A file of another format with an unknown header passes the check. The decoder accepts or rejects it.

    Raises:
        ImageError: with the reason "size", if the image has no pixels or more than `largest`. With the reason "decode",
            if the header declares no size, or decoding would take a thousand times as long as usual.
    """
    declared = image_size(data)
    if declared is None:
        if data.startswith((JPEG, PNG)):
            raise ImageError("decode", f"{what}: its header declares no size: the file is damaged")
        return
    width, height = declared
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ImageError("size", f"{what}: its header declares {width} x {height} pixels; the sides must be from 1 to "
                         f"{MAX_SIDE}: the file is damaged, or too large")  # fmt: skip
    _check_pixels(width * height, largest, f"{what}: its header declares {width} x {height} pixels,")
    if data.startswith(JPEG) and (scans := jpeg_scans(data)) > _MOST_SCANS:
        raise ImageError(
            "decode",
            f"{what}: it has {scans} scans, but a JPEG has about ten: the file is damaged, or was made to take long",
        )


def whole_file(data: bytes) -> bytes:
    """Return the bytes of an image file that a decoder needs; empty if the file is truncated.

    For a JPEG, everything after its end is removed: the video of a motion photo, padding, or the rest of an older
    frame. For a PNG, animation, texts and profiles are removed. Files of other formats are returned unchanged.
    """
    if data.startswith(PNG):
        return png_picture(data) or b""
    if not data.startswith(JPEG):
        return data
    end = jpeg_end(data)
    if end is not None:
        return data[:end]
    # Damaged data may contain bytes that look like a marker. After the last start of scan, only the end marker is real.
    return data if data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") else b""


def _decompress(message: Any, largest: int, scale: Scale | None) -> NDArray[np.uint8]:
    encoding = str(message.format).split(";")[0].strip()  # as in "rgb8; jpeg compressed bgr8", or "jpeg" alone
    what = f"compressed image with format {message.format!r:.80}"
    if "compressedDepth" in str(message.format):
        raise ImageError(
            "encoding", f"{what}: it holds depth, not an image: subscribe to the camera's grey or colour image"
        )
    data = _bytes(message.data, what).tobytes()
    # OpenCV 4 fills the missing part of a truncated JPEG with grey, so completeness is checked here. Other formats are
    # rejected, so that data from the network never reaches the decoders of rarer formats.
    if not data.startswith((JPEG, PNG)):
        raise ImageError("decode", f"{what}: its {len(data)} bytes are neither JPEG nor PNG: publish one of these")
    whole = whole_file(data)
    if whole:
        check_header(whole, what, largest)
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(whole, np.uint8), flags) if whole else None
    except cv2.error:  # OpenCV itself rejects the data
        pixels = None
    if pixels is None:
        raise ImageError(
            "decode",
            f"{what}: its {len(data)} bytes are {'damaged' if whole else 'cut short'}: check for losses in transport, "
            "or a fault in the camera or its driver",
        )
    if pixels.ndim == 3:
        return _picture(pixels, "bgr", what, scale)
    # If the format names no converted encoding after "compressed", a Bayer image is sent as its mosaic.
    layout = LAYOUTS.get(encoding)
    colour = layout.colour if layout and layout.colour.startswith("bayer") else "grey"
    _check_size(pixels.shape[1], pixels.shape[0], colour, what)
    return _picture(pixels[..., None], colour, what, scale)


def _integer(message: Any, name: str, reason: str) -> int:
    try:
        return operator.index(getattr(message, name))
    except TypeError:
        raise ImageError(reason, f"{name} is {getattr(message, name)!r:.80}, not a whole number") from None


def _bytes(data: Any, what: str) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError):
        raise ImageError("data", f"{what}: data is a {type(data).__name__}, not contiguous bytes") from None


def _check_size(width: int, height: int, colour: str, what: str) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ImageError("size", f"{what}: width and height must be from 1 to {MAX_SIDE}: correct the publisher")
    if colour in ("yuv422", "yuv422_yuy2", "nv12", "nv21") and width % 2:
        raise ImageError("size", f"{what}: two neighbouring pixels share a colour, so the width must be even")
    if colour.startswith("bayer") and min(width, height) < 3:  # OpenCV would return black
        raise ImageError("size", f"{what}: a Bayer mosaic needs at least 3 x 3 pixels")


def _check_pixels(pixels: int, largest: int, what: str) -> None:
    """Reject an image that is too large, because later steps take several times its memory."""
    if pixels > largest:
        raise ImageError(
            "size",
            f"{what} more than the {largest / 1e6:.1f} million that are allowed: send smaller images, or set resize",
        )


def _picture(pixels: NDArray[Any], colour: str, what: str, scale: Scale | None) -> NDArray[np.uint8]:
    """Convert pixels (H, W, channels) of any depth and byte order to 8-bit grey or RGB."""
    if pixels.dtype.itemsize > 1:
        pixels = np.require(pixels, pixels.dtype.newbyteorder("="), ("C", "A"))
        if pixels.dtype.kind == "f":
            visible = pixels[_CHANNELS[colour]]
            with np.errstate(invalid="ignore"):
                low, high = visible.min(), visible.max()
            if not (low > -0.5 / 255 and high < 1 + 0.5 / 255):  # values that round to [0, 255]; false for NaN
                raise ImageError(
                    "value",
                    f"{what}: its floats are from {low:g} to {high:g}, but only [0, 1] is allowed: scale them, or "
                    "publish mono8; depth images cannot be matched",
                )
        if scale is not None and pixels.dtype.kind == "u":
            pixels = scale(pixels)
        else:
            factor = 255.0 if pixels.dtype.kind == "f" else 1 / 257
            pixels = cv2.convertScaleAbs(pixels, alpha=factor).reshape(pixels.shape)
    if colour not in _CHANNELS:
        return _convert(pixels, colour, what)
    if pixels.shape[2] == 4:  # a view of three of four channels would be copied value by value in later steps
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGRA2BGR)
    picture: NDArray[np.uint8] = pixels[_CHANNELS[colour]]
    return picture


def _convert(pixels: NDArray[np.uint8], encoding: str, what: str) -> NDArray[np.uint8]:
    """Convert 8-bit Bayer or packed YUV to RGB. Padding, byte order and 16 bits are handled before.

    The available converters differ in these.
    """
    convert, faults = converter()
    if convert is None:
        raise ImageError(
            "encoding",
            f"{what}: needs a converter: apt install ros-$ROS_DISTRO-cv-bridge, or "
            f"pip install rosbags-image ({faults})",
        )
    rgb: NDArray[np.uint8] = convert(_message(np.ascontiguousarray(pixels), encoding), "rgb8")
    return rgb


@functools.cache
def converter() -> tuple[Callable[[Any, str], Any] | None, str]:
    """Return the first converter that works, and the reasons why those before it do not.

    A converter is a function of a message and the desired encoding.
    """
    faults = []
    for load in (_cv_bridge, _rosbags_image):
        try:
            convert = load()
            # This test conversion detects PyPI's cv-bridge, a port from ROS 1 that does not know this encoding, and a
            # cv_bridge that was built for another NumPy version, which fails with any encoding.
            convert(_message(np.zeros((1, 2, 2), np.uint8), "yuv422_yuy2"), "rgb8")
        except Exception as error:  # noqa: BLE001 (the next one may work)
            faults.append(f"{load.__name__[1:]}: {error!r}")
        else:
            return convert, "; ".join(faults)
    return None, "; ".join(faults)


def _cv_bridge() -> Callable[[Any, str], Any]:
    from cv_bridge import CvBridge  # type: ignore[import-not-found,unused-ignore]

    convert: Callable[[Any, str], Any] = CvBridge().imgmsg_to_cv2
    return convert


def _rosbags_image() -> Callable[[Any, str], Any]:
    from rosbags.image import image_to_cvimage

    return image_to_cvimage


def _message(pixels: NDArray[np.uint8], encoding: str) -> SimpleNamespace:
    height, width, channels = pixels.shape
    return SimpleNamespace(
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=int(sys.byteorder == "big"),
        step=width * channels,
        data=pixels,
    )
