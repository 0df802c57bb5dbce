"""Reads the headers of image files before anything is decoded.

A file of a few hundred bytes can declare a billion pixels, and a decoder allocates the memory for them. So the size is
read from the header first. Headers are untrusted data: these functions never raise, whatever the bytes are.

Sources: ITU-T T.81 annex B (JPEG), PNG 3rd edition 5.4 and 11.2.1, RFC 9649 (WebP), TIFF 6.0 section 2,
BITMAPINFOHEADER, Netpbm's pgm(5), ISO 15444-1 annex I (JPEG 2000).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

__all__ = ["image_size", "jpeg_end", "jpeg_scans", "png_picture"]

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

# JPEG markers (the byte after 0xff).
_START_OF_SCAN, _END = 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # these contain the size; the others are tables and extensions
# In compressed data, 0xff is followed by 0, by a restart marker, or by 0xff as a fill byte. Decoders also skip these
# elsewhere.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels as declared in a file's header; None for an unknown format or header.

    Known formats are JPEG, PNG, WebP, TIFF, BMP, GIF, JPEG 2000 and Netpbm.
    """
    try:
        return _size(data)
    except (struct.error, IndexError, ValueError, OverflowError):  # the header is truncated or damaged
        return None


def jpeg_end(data: bytes) -> int | None:
    """Return the length of a JPEG in bytes, including its end marker; None if it has no end marker.

    Bytes after it are another file (the video of a motion photo), padding, or the rest of an older frame in a buffer.
    """
    return next((position for marker, position in _jpeg_markers(data) if marker == _END), None)


def jpeg_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG: one, or about ten if progressive. Each is a pass over the whole image."""
    return sum(marker == _START_OF_SCAN for marker, _ in _jpeg_markers(data))


def png_picture(data: bytes) -> bytes | None:
    """Return a PNG with only the chunks that define its picture and orientation; None if it is truncated.

    OpenCV 5.0 allocates as much memory as a chunk's length declares. For an animation with a damaged first picture, it
    crashes with a segmentation fault. Compressed texts and colour profiles may expand without limit.
    """
    chunks, position = [data[:8]], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, begin = data[position + 4 : position + 8], position
        position += 12 + length
        if position > len(data):
            return None
        if kind[:1].isupper() or kind == b"eXIf":  # upper case marks what the standard calls a critical chunk
            chunks.append(data[begin:position])
        if kind == b"IEND":
            return b"".join(chunks)
    return None


def _jpeg_markers(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the markers of a JPEG in order, each with the position after it, up to and including the end marker.

    Bytes between two segments that are not a marker are skipped, as libjpeg does. Otherwise a stray byte would hide the
    size from this check, but not from the decoder.
    """
    position = 2
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.end() - 1], found.end()
        yield marker, position
        if marker == _END:
            return
        position += max(2, int.from_bytes(data[position : position + 2], "big"))


def _size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(JPEG):
        for marker, position in _jpeg_markers(data):
            if marker in _FRAMES:
                height, width = struct.unpack_from(">HH", data, position + 3)
                return width, height
            if marker == _START_OF_SCAN:
                break
        return None
    if data.startswith(PNG):
        width, height = struct.unpack_from(">II", data, 16)
        return width, height
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff_size(data)
    if data[:2] == b"BM":
        width, height = struct.unpack_from("<ii", data, 18)
        return abs(width), abs(height)
    if data[:4] == b"GIF8":
        width, height = struct.unpack_from("<HH", data, 6)
        return width, height
    if data[4:8] == b"jP  ":
        height, width = struct.unpack_from(">II", data, data.index(b"ihdr", 0, 4096) + 4)
        return width, height
    if data[:4] == b"\xff\x4f\xff\x51":  # a JPEG 2000 codestream without a container
        right, bottom, left, top = struct.unpack_from(">4I", data, 8)
        return right - left, bottom - top
    found = re.match(rb"P[1-6fF](?:\s+|#[^\n]*\n)+(\d{1,18})(?:\s+|#[^\n]*\n)+(\d{1,18})\s", data[:4096])
    return (int(found[1]), int(found[2])) if found else None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _tiff_size(data: bytes) -> tuple[int, int] | None:
    order = "<" if data[:1] == b"I" else ">"
    big = 43 in data[2:4]
    (place,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, place)
    place += 8 if big else 2
    found = {}
    for number in range(min(count, 4096)):
        entry = place + number * (20 if big else 12)
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (256, 257):
            form = {3: "H", 4: "I", 16: "Q"}.get(kind)
            if form is None:
                return None
            (found[tag],) = struct.unpack_from(order + form, data, entry + (12 if big else 8))
    return (found[256], found[257]) if len(found) == 2 else None
