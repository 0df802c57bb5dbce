"""Tests that sizes are read from headers before decoding, and that a decoder gets only the picture's part of a file."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kpmatch_ros.imaging.image_headers import image_size, jpeg_end, jpeg_scans
from kpmatch_ros.imaging.images import ImageError, to_array

Run = Callable[..., tuple[int, str, str]]


def encoded(extension: str, width: int = 41, height: int = 30, *options: int) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return bytes(cv2.imencode(extension, cv2.GaussianBlur(pixels, (0, 0), 3), list(options))[1])


def with_declared_size(data: bytes, width: int, height: int) -> bytes:
    """Return a JPEG or PNG whose header declares another size."""
    if data[:1] == b"\x89":
        return data[:16] + struct.pack(">II", width, height) + data[24:]
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def compressed(data: bytes, form: str = "jpeg") -> SimpleNamespace:
    return SimpleNamespace(format=form, data=data)


WRITTEN = [".png", ".jpg", ".webp", ".tiff", ".bmp", ".pgm", ".jp2"]


@pytest.mark.parametrize("extension", WRITTEN)
@pytest.mark.parametrize("size", [(41, 30), (300, 7)])
def test_the_size_from_the_header_equals_the_decoded_size(extension: str, size: tuple[int, int]) -> None:
    if not cv2.haveImageWriter("x" + extension):
        pytest.skip(f"this OpenCV writes no {extension}")
    # OpenCV's JPEG 2000 needs whole tiles, and a .pgm is grey.
    width, height = (size[0] + 64, size[1] + 64) if extension == ".jp2" else size
    pixels = np.zeros((height, width), np.uint8)
    assert image_size(bytes(cv2.imencode(extension, pixels)[1])) == (width, height)


def test_the_size_of_a_lossless_webp_and_a_progressive_jpeg_is_read() -> None:
    assert image_size(encoded(".webp", 41, 30, cv2.IMWRITE_WEBP_QUALITY, 101)) == (41, 30)
    progressive = encoded(".jpg", 41, 30, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert image_size(progressive) == (41, 30) and jpeg_end(progressive) == len(progressive)


def test_sizes_are_read_from_headers_of_formats_that_opencv_cannot_write() -> None:
    assert image_size(b"GIF89a" + struct.pack("<HH", 640, 480)) == (640, 480)
    extended = bytes(8) + (1023).to_bytes(3, "little") + (767).to_bytes(3, "little")
    assert image_size(b"RIFF\0\0\0\0WEBPVP8X" + extended) == (1024, 768)
    assert image_size(b"MM\0*" + struct.pack(">IHHHIHHHHIHH", 8, 2, 256, 3, 1, 70, 0, 257, 3, 1, 50, 0)) == (70, 50)
    assert image_size(b"MM\0+" + struct.pack(">HHQQHHQQHHQQ", 8, 0, 16, 2, 256, 16, 1, 70, 257, 16, 1, 50)) == (70, 50)
    assert image_size(b"P5\n# made by hand\n640 480\n255\n") == (640, 480)


@pytest.mark.parametrize("extension", [".png", ".jpg"])
@pytest.mark.parametrize("claimed", [(32_000, 32_000), (65_535, 1_100), (30_000, 30_000), (8_193, 8_192)])
def test_a_file_that_declares_a_too_large_size_is_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch, extension: str, claimed: tuple[int, int]
) -> None:
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ImageError, match=f"{claimed[0]} x {claimed[1]} pixels") as caught:
        to_array(compressed(with_declared_size(encoded(extension), *claimed)))
    assert caught.value.reason == "size"


def test_the_pixel_limit_is_that_of_the_caller() -> None:
    data = encoded(".png", 200, 100)
    assert to_array(compressed(data), 20_000).shape == (100, 200, 3)
    with pytest.raises(ImageError, match="200 x 100 pixels, more than"):
        to_array(compressed(data), 19_999)


@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_kpmatch_match_refuses_a_file_that_declares_a_too_large_size(
    kpmatch: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, extension: str
) -> None:
    (tmp_path / "small.png").write_bytes(encoded(".png"))
    (tmp_path / f"bomb{extension}").write_bytes(with_declared_size(encoded(extension), 32_000, 32_000))
    monkeypatch.setattr(cv2, "imdecode", None)
    status, out, err = kpmatch("match", tmp_path / f"bomb{extension}", tmp_path / "small.png")
    assert (status, out) == (2, "") and "bomb" in err and "32000 x 32000" in err and err.count("\n") == 1


TRAILERS: dict[str, bytes] = {
    "the video of a motion photo": b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40 + b"\xff\xda\0\x03\xff\xda",
    "a stale frame": encoded(".jpg", 64, 48)[100:],
    "the rest of a stale frame, cut": encoded(".jpg", 64, 48)[100:-2] + b"\xff\xda",
    "a second picture": encoded(".jpg", 64, 48),
    "zeros": bytes(1000),
}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The data that the decoder was given."""
    given: list[bytes] = []
    decode = cv2.imdecode

    def recording(data: NDArray[np.uint8], flags: int) -> Any:
        given.append(data.tobytes())
        return decode(data, flags)

    monkeypatch.setattr(cv2, "imdecode", recording)
    return given


@pytest.mark.parametrize("trailer", TRAILERS)
@pytest.mark.parametrize("progressive", [0, 1])
def test_data_after_the_end_of_a_jpeg_never_reaches_the_decoder(
    tmp_path: Path, decoded: list[bytes], trailer: str, progressive: int
) -> None:
    data = encoded(".jpg", 41, 30, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    pixels = to_array(compressed(data))
    with_trailer = data + TRAILERS[trailer]
    assert jpeg_end(with_trailer) == len(data)
    assert np.array_equal(to_array(compressed(with_trailer)), pixels)
    from kpmatch_ros.cli.common import read_image

    (tmp_path / "photo.jpg").write_bytes(with_trailer)
    assert np.array_equal(read_image(tmp_path / "photo.jpg"), pixels)
    assert decoded == [data] * 3


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.99])
def test_a_truncated_jpeg_has_no_end_and_is_refused(kept: float) -> None:
    data = encoded(".jpg", 64, 48, cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
    assert jpeg_end(data) == len(data)
    cut = data[: int(kept * len(data))]
    assert jpeg_end(cut) is None
    with pytest.raises(ImageError, match="cut short"):
        to_array(compressed(cut))


STRAY: dict[str, bytes] = {
    "a byte": b"\0",
    "filling": b"\xff\xff\0",
    "a restart marker": b"\xff\xd3",
    "a segment of length zero": b"\xff\xe5\0\0",
    "a segment of length one": b"\xff\xfe\0\1",
}


@pytest.mark.parametrize("stray", STRAY)
def test_stray_bytes_before_the_size_of_a_jpeg_do_not_hide_it(monkeypatch: pytest.MonkeyPatch, stray: str) -> None:
    data = encoded(".jpg")
    place = data.index(b"\xff\xc0")
    assert np.array_equal(to_array(compressed(data[:place] + STRAY[stray] + data[place:])), to_array(compressed(data)))
    bomb = with_declared_size(data, 16_000, 16_000)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ImageError, match="16000 x 16000 pixels") as caught:
        to_array(compressed(bomb[:place] + STRAY[stray] + bomb[place:]))
    assert caught.value.reason == "size"


def test_a_jpeg_without_a_declared_size_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(".jpg")
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ImageError, match="declares no size") as caught:
        to_array(compressed(data.replace(b"\xff\xc0", b"\xff\xe0")))
    assert caught.value.reason == "decode"


def test_a_jpeg_with_a_thousand_scans_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(".jpg", 41, 30, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert 1 < jpeg_scans(data) < 20
    start, first, second, *rest = data.split(b"\xff\xda")
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(ImageError, match=r"it has 10\d\d scans") as caught:
        to_array(compressed(b"\xff\xda".join([start, first, *1000 * [second], second, *rest])))
    assert caught.value.reason == "decode"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def animated(other: bytes) -> bytes:
    """Return a PNG of 8 x 8 white pixels, with an animation whose second picture has the given data."""
    header, white = struct.pack(">IIBBBBB", 8, 8, 8, 6, 0, 0, 0), zlib.compress(8 * (b"\0" + 32 * b"\xff"))
    pictures = [
        chunk(b"acTL", struct.pack(">II", 2, 0)),
        chunk(b"IDAT", white),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 0, 1, 0, 0)),
        chunk(b"fdAT", struct.pack(">I", 1) + zlib.compress(other)),
    ]
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *pictures, chunk(b"IEND", b"")])


def test_an_animated_png_is_read_as_its_first_picture() -> None:
    assert (to_array(compressed(animated(8 * bytes(33)))) == 255).all()


def test_a_png_with_a_damaged_animation_does_not_crash_the_process() -> None:
    code = (
        "import sys\nfrom types import SimpleNamespace\nfrom kpmatch_ros.imaging.images import to_array\n"
        "print(to_array(SimpleNamespace(format='png', data=sys.stdin.buffer.read())).min())"
    )
    damaged = animated(8 * (b"\x63" + bytes(32)))  # PNG has no filter 0x63: OpenCV 5.0 crashes (SIGSEGV)
    done = subprocess.run([sys.executable, "-c", code], input=damaged, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"255\n")


@pytest.mark.parametrize("length", [0x7FFF_FFFF, 0xFFFF_FFFF, 5000])
def test_a_png_with_a_chunk_longer_than_the_file_is_not_decoded(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    data = encoded(".png")
    place = data.index(b"IDAT") - 4
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it takes as much memory as the chunk declares"))
    with pytest.raises(ImageError, match="cut short") as caught:
        to_array(compressed(data[:place] + struct.pack(">I", length) + data[place + 4 :]))
    assert caught.value.reason == "decode"


def test_the_exif_orientation_of_a_png_is_applied(tmp_path: Path) -> None:
    from kpmatch_ros.cli.common import read_image

    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    data = encoded(".png")
    place = data.index(b"IDAT") - 4
    turned = data[:place] + exif + data[place:]
    (tmp_path / "photo.png").write_bytes(turned)
    decoded = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_ANYCOLOR)
    assert decoded is not None and read_image(tmp_path / "photo.png").shape == decoded.shape


STARTS = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"RIFF\0\0\0\0WEBPVP8 ", b"RIFF\0\0\0\0WEBPVP8L", b"II*\0",
          b"MM\0+", b"BM", b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P6 ", b""]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=80))
def test_any_bytes_give_a_size_or_none(start: bytes, rest: bytes) -> None:
    found: Any = image_size(start + rest)
    assert found is None or (isinstance(found[0], int) and isinstance(found[1], int))
    end = jpeg_end(start + rest)
    assert end is None or 0 < end <= len(start + rest)
