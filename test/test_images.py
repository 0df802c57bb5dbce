"""Tests that to_array reads every encoding of images that were built from known colours."""

from __future__ import annotations

import array
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_encodings import (
    BAYER,
    CONVERTERS,
    NO_PICTURE,
    PACKED_YUV,
    PIXELS,
    PLANAR_YUV,
    ROSBAGS,
    WITHOUT_COPY,
    Array,
    compressed,
    deepen,
    encode,
    image,
    inside_patches,
    noise,
    patches,
    planes,
    refused,
)
from sensor_msgs.msg import Image

from kpmatch_ros.imaging import images
from kpmatch_ros.imaging.images import ImageError, to_array


@pytest.fixture(params=CONVERTERS)
def converter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes only this converter importable."""
    for other in CONVERTERS:
        if other != request.param:
            monkeypatch.setitem(sys.modules, other, None)
    images.converter.cache_clear()
    convert, faults = images.converter()
    if convert is None and request.param == "cv_bridge":
        pytest.skip(faults)  # for example, for the ROS 1 port
    yield request.param
    images.converter.cache_clear()


layouts = pytest.mark.parametrize(("big", "padding"), list(itertools.product((False, True), (0, 1, 6))))


@layouts
@pytest.mark.parametrize("kind", ["rclpy", "rosbags", "bytes"])
@pytest.mark.parametrize("encoding", PIXELS)
def test_grey_and_colour_images_of_every_depth_are_read_exactly(
    encoding: str, kind: str, big: bool, padding: int
) -> None:
    picture = noise()
    result = to_array(image(encoding, picture, big=big, padding=padding, kind=kind))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, picture[..., 0] if PIXELS[encoding][1] == "grey" else picture)


@layouts
@pytest.mark.parametrize("encoding", BAYER)
def test_a_bayer_mosaic_is_converted_to_its_colours(converter: str, encoding: str, big: bool, padding: int) -> None:
    result = to_array(image(encoding, patches(), big=big, padding=padding))
    assert result.dtype == np.uint8 and result.shape == patches().shape
    np.testing.assert_array_equal(inside_patches(result), inside_patches(patches()))


@layouts
@pytest.mark.parametrize("encoding", [*PACKED_YUV, *PLANAR_YUV])
def test_yuv_is_converted_to_its_colours(converter: str, encoding: str, big: bool, padding: int) -> None:
    picture = noise(15, 23) if encoding == "nv24" else patches()
    result = to_array(image(encoding, picture, big=big, padding=padding))
    assert result.dtype == np.uint8
    np.testing.assert_allclose(result.astype(int), picture, atol=3)  # Y, U and V are rounded and have a smaller range


@pytest.mark.parametrize("encoding", ["nv12", "nv21"])
def test_planar_yuv_with_an_odd_height_has_an_additional_chroma_row(converter: str, encoding: str) -> None:
    result = to_array(image(encoding, patches()[:15], padding=3))
    np.testing.assert_allclose(result.astype(int), patches()[:15], atol=3)


@pytest.mark.parametrize("kind", ["rclpy", "rosbags", "bytes"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", WITHOUT_COPY)
def test_8_bit_grey_and_colour_are_not_copied(encoding: str, kind: str, padding: int) -> None:
    message = image(encoding, noise(), kind=kind, padding=padding)
    assert np.shares_memory(to_array(message), np.frombuffer(message.data, np.uint8))


def test_every_standard_encoding_is_known_as_readable_or_not_an_image() -> None:
    folders = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)]
    headers = [folder / "include/sensor_msgs/sensor_msgs/image_encodings.hpp" for folder in folders]
    present = [header for header in headers if header.exists()]
    if not present:
        pytest.skip("sensor_msgs comes without image_encodings.hpp here")
    standard = set(re.findall(r'const char \w+\[\] = "(\w+)"', present[0].read_text()))
    assert len(standard) > 40
    assert standard <= {*PIXELS, *BAYER, *PACKED_YUV, *PLANAR_YUV} | NO_PICTURE


@pytest.mark.parametrize("encoding", [*sorted(NO_PICTURE), "", "BGR8", "8UC0", "8UC33", "32FC", "x" * 9999])
def test_an_unsupported_encoding_is_refused_and_supported_ones_are_named(encoding: str) -> None:
    message = image("mono8", noise())
    message.encoding = encoding
    text = refused(message, "encoding")
    assert repr(encoding)[:20] in text and "bgr8" in text and len(text) < 300


def test_16_bit_values_are_rounded_to_the_nearest_8_bit_value() -> None:
    every = np.arange(65536, dtype=np.uint16)
    data = array.array("B", every.astype("<u2").tobytes())
    message = Image(height=256, width=256, encoding="mono16", step=512, data=data)
    np.testing.assert_array_equal(to_array(message).ravel(), (every.astype(int) + 128) // 257)


def test_16_bit_data_at_an_odd_address_is_read() -> None:
    message = image("mono16", noise(), kind="bytes")
    message.data = memoryview(b"\0" + message.data)[1:]
    np.testing.assert_array_equal(to_array(message), noise()[..., 0])


@pytest.mark.parametrize("encoding", ["32FC1", "64FC1", "32FC3", "64FC4"])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -0.01, 1.01, 3.5, 1e30])
def test_floats_outside_0_to_1_are_refused(encoding: str, big: bool, bad: float) -> None:
    message = image(encoding, noise(), big=big, kind="bytes")
    dtype = (">" if big else "<") + PIXELS[encoding][0]
    values = np.frombuffer(message.data, dtype).copy()
    values[0] = bad
    message.data = values.tobytes()
    assert "[0, 1]" in refused(message, "value")


def test_the_alpha_channel_may_contain_any_float() -> None:
    message = image("32FC4", noise(), kind="bytes")
    values = np.frombuffer(message.data, "<f4").copy()
    values[3::4] = np.nan
    message.data = values.tobytes()
    np.testing.assert_array_equal(to_array(message), noise())


@pytest.mark.parametrize("encoding", [*PIXELS, *BAYER, *PACKED_YUV, *PLANAR_YUV])
def test_padding_of_the_last_row_may_be_missing_but_no_image_byte(encoding: str) -> None:
    message = image(encoding, patches(), padding=4)
    data, padding, whole = message.data, 8 if encoding == "nv24" else 4, to_array(message)
    message.data = data[:-padding]
    np.testing.assert_array_equal(to_array(message), whole)
    message.data = data[: -padding - 1]
    text = refused(message, "data")
    assert str(len(message.data)) in text and str(len(message.data) + 1) in text


def test_data_after_the_image_is_ignored() -> None:
    message = image("bgr8", noise())
    message.data.frombytes(b"\xff" * 1000)
    np.testing.assert_array_equal(to_array(message), noise())


def test_an_image_without_data_is_refused() -> None:
    message = image("mono8", noise())
    message.data = array.array("B")
    refused(message, "data")


@pytest.mark.parametrize("data", [None, 7, "text", [1, 2, 3], np.zeros((64, 64), np.uint8)[:, ::2]])
def test_data_that_is_not_contiguous_bytes_is_refused(data: Any) -> None:
    message = image("mono8", noise(), kind="bytes")
    message.data = data
    refused(message, "data")


@pytest.mark.parametrize("field", ["width", "height"])
@pytest.mark.parametrize("value", [0, 32767, 65536, 2**32 - 1])
def test_an_invalid_width_or_height_is_refused(field: str, value: int) -> None:
    message = image("mono8", noise())
    setattr(message, field, value)
    assert str(value) in refused(message, "size")


def test_an_image_with_more_pixels_than_the_limit_is_refused() -> None:
    message = image("mono16", noise())
    pixels = message.width * message.height
    assert to_array(message, pixels).size == pixels
    with pytest.raises(ImageError, match="set resize") as error:
        to_array(message, pixels - 1)
    assert error.value.reason == "size"


@pytest.mark.parametrize("encoding", [*PACKED_YUV, "nv12", "nv21"])
def test_an_odd_width_is_refused_for_encodings_with_shared_chroma(encoding: str) -> None:
    message = image(encoding, patches())
    message.width -= 1
    assert "even" in refused(message, "size")


@pytest.mark.parametrize("shape", [(2, 16), (16, 2), (1, 1)])
def test_a_bayer_mosaic_that_is_too_small_to_interpolate_is_refused(shape: tuple[int, int]) -> None:
    assert "3 x 3" in refused(image("bayer_rggb8", noise(*shape)), "size")


@pytest.mark.parametrize("encoding", [*PIXELS, *BAYER, *PACKED_YUV, *PLANAR_YUV])
def test_a_step_shorter_than_a_row_is_refused(encoding: str) -> None:
    message = image(encoding, patches())
    message.step -= 1
    text = refused(message, "step")
    assert str(message.step) in text and str(message.step + 1) in text


@pytest.mark.parametrize(("field", "reason"), [("width", "size"), ("height", "size"), ("step", "step")])
def test_a_size_that_is_not_an_integer_is_refused(field: str, reason: str) -> None:
    message = image("mono8", noise(), kind="bytes")
    setattr(message, field, 16.5)
    assert "16.5" in refused(message, reason)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
def test_the_smallest_images_are_read(shape: tuple[int, int]) -> None:
    for encoding in ("mono8", "bgr8", "mono16", "rgba16", "32FC1", "nv24"):
        assert to_array(image(encoding, noise(*shape), padding=1)).shape[:2] == shape


FORMATS = ["jpeg", "png", "rgb8; jpeg compressed bgr8", "bgr8; png compressed bgr8", "mono8; png compressed ", ""]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["rclpy", "rosbags", "bytes"])
def test_a_compressed_colour_image_is_read_for_any_format_string(format: str, kind: str) -> None:
    data = encode(".png", noise())
    if kind == "rosbags":
        header = ROSBAGS["std_msgs/msg/Header"](ROSBAGS["builtin_interfaces/msg/Time"](0, 0), "camera")
        message: Any = ROSBAGS["sensor_msgs/msg/CompressedImage"](header, format, np.frombuffer(data, np.uint8))
    else:
        message = compressed(data, format) if kind == "rclpy" else SimpleNamespace(format=format, data=data)
    np.testing.assert_array_equal(to_array(message), noise())


def test_a_jpeg_is_read_with_its_colours() -> None:
    picture = np.full((32, 48, 3), (200, 100, 30), np.uint8)
    np.testing.assert_allclose(to_array(compressed(encode(".jpg", picture))).astype(int), picture, atol=3)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
def test_a_compressed_grey_image_stays_grey(extension: str) -> None:
    picture = np.full((32, 48), 90, np.uint8)
    np.testing.assert_array_equal(to_array(compressed(encode(extension, picture), "mono8; jpeg compressed ")), picture)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_16_bit_png_is_scaled_like_a_raw_image(channels: int) -> None:
    picture = np.concatenate([noise(), noise()[..., :1]], axis=2)[..., :channels]
    result = to_array(compressed(encode(".png", deepen(picture, "u2").squeeze()), "16UC1; png compressed "))
    np.testing.assert_array_equal(result, picture.squeeze()[..., :3] if channels > 1 else picture[..., 0])


@pytest.mark.parametrize("encoding", BAYER)
def test_a_bayer_mosaic_compressed_as_grey_is_converted_to_colour(converter: str, encoding: str) -> None:
    data = encode(".png", planes(encoding, patches())[0])
    result = to_array(compressed(data, f"{encoding}; png compressed "))
    np.testing.assert_array_equal(inside_patches(result), inside_patches(patches()))


def test_the_orientation_tag_of_a_jpeg_message_is_ignored() -> None:
    # Exif, big-endian: one entry with tag 0x112 (orientation), one short with value 6 (rotated by 90 degrees).
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = encode(".jpg", noise(16, 24))
    tagged = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    turned = cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR)
    assert turned is not None and turned.shape[:2] == (24, 16)
    assert to_array(compressed(tagged)).shape == (16, 24, 3)


@pytest.mark.parametrize("extension", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_file_is_refused_and_nothing_is_printed(
    extension: str, kept: float, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encode(extension, noise(64, 64))
    refused(compressed(data[: int(kept * len(data))]), "decode")
    assert capfd.readouterr() == ("", "")


def test_padding_after_a_jpeg_is_ignored() -> None:
    data = encode(".jpg", noise())
    np.testing.assert_array_equal(to_array(compressed(data + bytes(4096))), to_array(compressed(data)))


NO_FILES = [b"", bytes(64), b"junk" * 100, b"BM" + bytes(100), images.JPEG, images.PNG, b"\x89PNG\r\n\x1a\nIEND"]


@pytest.mark.parametrize("data", NO_FILES)
def test_data_that_is_not_a_jpeg_or_png_is_refused_and_nothing_is_printed(
    data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    assert str(len(data)) in refused(compressed(data), "decode")
    assert capfd.readouterr() == ("", "")


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encode(".png", noise()))
    data[len(data) // 2] ^= 0xFF
    refused(compressed(bytes(data), "png"), "decode")


def test_a_file_that_declares_an_absurd_size_is_refused() -> None:
    data = bytearray(encode(".jpg", noise()))
    size = data.index(b"\xff\xc0") + 5  # in the start-of-frame segment
    data[size : size + 4] = (60000).to_bytes(2, "big") * 2
    refused(compressed(bytes(data)), "size")


def test_compressed_depth_is_refused_by_name() -> None:
    data = bytes(12) + encode(".png", deepen(noise()[..., 0], "u2"))
    assert "depth" in refused(compressed(data, "16UC1; compressedDepth png"), "encoding")


def test_compressed_data_that_is_not_bytes_is_refused() -> None:
    refused(SimpleNamespace(format="jpeg", data=[255, 216, 255]), "data")


def test_rosbags_image_replaces_a_broken_cv_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv_bridge.py").write_text(
        "class CvBridge:\n    def imgmsg_to_cv2(self, message, encoding):\n        raise KeyError(message.encoding)\n"
    )
    monkeypatch.delitem(sys.modules, "cv_bridge", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    images.converter.cache_clear()
    try:
        result = to_array(image("uyvy", patches()))
        assert "cv_bridge: KeyError" in images.converter()[1]
    finally:
        images.converter.cache_clear()
        sys.modules.pop("cv_bridge", None)
    np.testing.assert_allclose(result.astype(int), patches(), atol=3)


def test_without_a_converter_the_error_names_the_packages_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv_bridge", None)
    monkeypatch.setitem(sys.modules, "rosbags.image", None)
    images.converter.cache_clear()
    try:
        text = refused(image("bayer_rggb8", patches()), "encoding")
        np.testing.assert_array_equal(to_array(image("bgr16", noise())), noise())
    finally:
        images.converter.cache_clear()
    assert "cv-bridge" in text and "pip install rosbags-image" in text


def test_the_module_works_without_ros_and_without_a_converter() -> None:
    script = """
import sys
for name in ("rclpy", "sensor_msgs", "cv_bridge", "rosbags", "rosbags.image"):
    sys.modules[name] = None
from types import SimpleNamespace
from kpmatch_ros.imaging.images import to_array
message = SimpleNamespace(height=1, width=2, encoding="bgr8", is_bigendian=0, step=6, data=bytes(range(6)))
print(to_array(message).tolist())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=True)
    assert result.stdout.strip() == "[[[2, 1, 0], [5, 4, 3]]]"


sizes = st.one_of(st.integers(0, 20), st.integers(-(2**40), 2**40), st.none(), st.floats())
names = st.one_of(st.sampled_from([*PIXELS, *BAYER, *PACKED_YUV, *PLANAR_YUV]), st.text(), st.none())


@settings(max_examples=500, deadline=None)
@given(height=sizes, width=sizes, step=sizes, encoding=names, big=st.integers(0, 255), data=st.binary(max_size=3000))
def test_any_message_gives_an_image_or_an_image_error(
    height: Any, width: Any, step: Any, encoding: Any, big: int, data: bytes
) -> None:
    message = SimpleNamespace(height=height, width=width, step=step, encoding=encoding, is_bigendian=big, data=data)
    check_any(message, lambda result: result.shape[:2] == (height, width))


@settings(max_examples=300, deadline=None)
@given(
    extension=st.sampled_from([".jpg", ".png"]),
    format=st.sampled_from([*FORMATS, *BAYER, *PIXELS]) | st.text(),
    changes=st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 400),
)
def test_any_compressed_message_gives_an_image_or_an_image_error(
    extension: str, format: str, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(encode(extension, noise(9, 11)))
    for place, value in changes:
        data[place % len(data)] = value
    check_any(SimpleNamespace(format=format, data=bytes(data[: len(data) - cut % 3])), lambda result: True)


@settings(deadline=None)
@given(data=st.binary())
def test_random_bytes_with_a_jpeg_or_png_header_give_an_image_or_an_image_error(data: bytes) -> None:
    for start, end in ((images.JPEG, b"\xff\xd9"), (images.PNG, b"IEND")):
        check_any(SimpleNamespace(format="", data=start + data + end), lambda result: True)


def check_any(message: Any, right_shape: Callable[[Array], bool]) -> None:
    try:
        result = to_array(message)
    except ImageError as error:
        assert error.reason in {"encoding", "size", "step", "data", "decode", "value"} and str(error)
    else:
        assert result.dtype == np.uint8 and (result.ndim == 2 or result.shape[2:] == (3,)) and right_shape(result)
