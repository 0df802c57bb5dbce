"""Reads MCAP files (mcap.dev/spec), also those of recorders that left out part of the index.

A summary is a convenience: where it is absent, or holds less than the file, the data section is scanned instead. A
channel in another encoding than ROS 2's (protobuf, JSON) is reported and does no harm to the others.
"""

from __future__ import annotations

import heapq
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kpmatch_ros.bags.storage import Channel, Definition, from_lz4, from_zstd

__all__ = ["MAGIC", "McapFile"]

MAGIC = b"\x89MCAP0\r\n"
_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 1, 2, 3, 4, 5, 6
_CHUNK_INDEX, _STATISTICS, _SUMMARY_OFFSET, _DATA_END = 8, 0x0B, 0x0E, 0x0F
_FORMATS = {"ros2msg": "msg", "ros2idl": "idl", "omgidl": "idl"}


class _Record(NamedTuple):
    code: int
    content: bytes


class _Fields:
    """Reads the fields of a record one after the other."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    def numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from("<" + form, self._content, self._place)
        self._place += struct.calcsize("<" + form)
        return found

    def counted(self, form: str = "I") -> bytes:
        (length,) = self.numbers(form)
        found = self._content[self._place : self._place + length]
        if len(found) != length:
            raise ValueError("a record is truncated")
        self._place += length
        return found

    def text(self) -> str:
        return self.counted().decode(errors="replace")


class _Chunk(NamedTuple):
    start: int  # log time of its first message, nanoseconds
    place: int  # of its record in the file
    channels: frozenset[int]  # in its message indexes; empty where it has none


class McapFile:
    """An MCAP file. It is open only while it is read: a bag may have more files than a process may have open.

    Attributes:
        channels: by id.
        counts: how many messages each channel has, as the file's statistics declare, or else as counted.

    Raises:
        ValueError, struct.error: it is no MCAP file, cut short, or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.channels: dict[int, Channel] = {}
        self.counts: Counter[int] = Counter()
        self._schemas: dict[int, tuple[str, Definition]] = {0: ("", Definition("", b""))}  # 0 is none
        self._declared: dict[int, tuple[int, str, str]] = {}  # channels: schema, topic, encoding
        self._chunks: list[_Chunk] = []
        self._loose: list[tuple[int, int]] = []  # log times and places of messages outside any chunk
        self._path = path
        self._file: BinaryIO
        with path.open("rb") as self._file:
            self._open()

    def messages(self, ids: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """The messages of some channels in the order of their log times: channel, log time, content."""
        chunks = [chunk for chunk in self._chunks if not chunk.channels or not chunk.channels.isdisjoint(ids)]
        sources = [self._of_chunk(number, chunk, ids) for number, chunk in enumerate(chunks)]
        sources.append(self._of_loose(len(chunks), ids))
        with self._path.open("rb") as self._file:
            for time, _, _, channel, content in heapq.merge(*sources):
                if content is not None:
                    yield channel, time, content

    def _of_chunk(
        self, number: int, chunk: _Chunk, ids: Collection[int]
    ) -> Iterator[tuple[int, int, int, int, bytes | None]]:
        yield chunk.start, number, -1, 0, None  # so that a chunk is decompressed when its turn comes
        found: list[tuple[int, int, int, int, bytes | None]] = []
        for record in _split(_unpacked(self._at(chunk.place).content)):
            if record.code == _MESSAGE:
                channel, _, time, _ = struct.unpack_from("<HIQQ", record.content)
                if channel in ids:
                    found.append((time, number, len(found), channel, record.content[22:]))
        found.sort(key=lambda entry: entry[0])
        yield from found

    def _of_loose(self, number: int, ids: Collection[int]) -> Iterator[tuple[int, int, int, int, bytes | None]]:
        for order, (time, place) in enumerate(sorted(self._loose)):
            content = self._at(place).content
            (channel,) = struct.unpack_from("<H", content)
            if channel in ids:
                yield time, number, order, channel, content[22:]

    def _open(self) -> None:
        size = self._size = self._file.seek(0, 2)
        if not size:
            raise ValueError("the file is empty")
        self._file.seek(0)
        if self._file.read(8) != MAGIC:
            raise ValueError("the magic bytes at its begin are not MCAP's")
        if self._at(8).code != _HEADER:
            raise ValueError("its first record is no header")
        begin = self._file.tell()
        self._file.seek(max(size - 37, 8))
        footer = self._file.read()
        if footer[-8:] != MAGIC:
            raise ValueError("the magic bytes at its end are not MCAP's: it was not finished")
        if footer[0] != _FOOTER or len(footer) != 37:
            raise ValueError("it has no footer")
        (summary,) = struct.unpack_from("<Q", footer, 9)
        if summary and not begin <= summary <= size - 37:
            raise ValueError("its footer is damaged: the summary is outside the file")
        if not (summary and self._read_summary(begin, summary, size - 37)):
            self._scan(begin, summary or size - 37)
        for key, (schema, topic, encoding) in self._declared.items():
            name, definition = self._schemas.get(schema, self._schemas[0])
            self.channels[key] = Channel(topic, name, encoding, definition)

    def _read_summary(self, data: int, begin: int, end: int) -> bool:
        """Take over the summary, which stands behind the data; whether everything in the file is known then."""
        declared = (0, 0, 0)
        indexed: list[tuple[int, int]] = []  # begin and end of each chunk and its message indexes
        for code, place, _ in self._walk(begin, end):
            record = self._at(place)
            self._define(record)
            if code == _CHUNK_INDEX:
                fields = _Fields(record.content)
                start, _, chunk, length = fields.numbers("QQQQ")
                offsets = fields.counted()
                entries = struct.iter_unpack("<HQ", offsets[: len(offsets) // 10 * 10])
                self._chunks.append(_Chunk(start, chunk, frozenset(channel for channel, _ in entries)))
                indexed.append((chunk, chunk + length + fields.numbers("Q")[0]))
            elif code == _STATISTICS:
                fields = _Fields(record.content)
                messages, _, channels, _, _, chunks, _, _ = fields.numbers("QHIIIIQQ")
                entries = struct.iter_unpack("<HQ", fields.counted())
                self.counts = Counter(dict(entries))
                declared = messages, channels, chunks
        messages, channels, chunks = declared
        counted = sum(self.counts.values()) == messages
        return bool(
            messages
            and counted
            and len(self._declared) >= channels
            and len(self._chunks) >= chunks
            and self._read_between(data, begin, indexed)
            and all(schema in self._schemas for schema, _, _ in self._declared.values())
        )

    def _read_between(self, begin: int, end: int, indexed: list[tuple[int, int]]) -> bool:
        """Take over what stands between the chunks of the index, which does not name it; whether no chunk does."""
        place = begin
        try:
            for start, after in [*sorted(indexed), (end, end)]:
                for code, here, place_after in self._walk(place, start):
                    if code == _CHUNK:
                        return False
                    if code == _MESSAGE:
                        self._loose.append((self._head_of_message()[1], here))
                    elif code in (_SCHEMA, _CHANNEL):
                        self._define(self._at(here))
                    place = place_after
                if place != start:
                    return False
                place = after
        except (ValueError, struct.error):  # the index has wrong lengths
            return False
        return True

    def _scan(self, begin: int, end: int) -> None:
        """Find channels, chunks and messages where they stand."""
        self._chunks, self._loose, self.counts = [], [], Counter()
        for code, place, _ in self._walk(begin, end):
            if code == _MESSAGE:
                channel, time = self._head_of_message()
                self.counts[channel] += 1
                self._loose.append((time, place))
            elif code in (_SCHEMA, _CHANNEL):
                self._define(self._at(place))
            elif code == _CHUNK:
                times, held = [], set()
                for inner in _split(_unpacked(self._at(place).content)):
                    self._define(inner)
                    if inner.code == _MESSAGE:
                        channel, _, time, _ = struct.unpack_from("<HIQQ", inner.content)
                        self.counts[channel] += 1
                        held.add(channel)
                        times.append(time)
                if times:
                    self._chunks.append(_Chunk(min(times), place, frozenset(held)))
            elif code == _DATA_END:
                break

    def _define(self, record: _Record) -> None:
        """Take over a schema or a channel; other records say nothing here."""
        if record.code == _SCHEMA:
            fields = _Fields(record.content)
            (key,) = fields.numbers("H")
            name, encoding = fields.text(), fields.text()
            form = _FORMATS.get(encoding, "")
            self._schemas[key] = name, Definition(form, fields.counted() if form else b"")
        elif record.code == _CHANNEL:
            fields = _Fields(record.content)
            key, schema = fields.numbers("HH")
            self._declared[key] = schema, fields.text(), fields.text()

    def _at(self, place: int) -> _Record:
        code, after = self._head(place)
        return _Record(code, self._exactly(after - place - 9))

    def _walk(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The records between two places: code, begin and end of each. The file is then at its content."""
        place = begin
        while place < end:
            code, after = self._head(place)
            yield code, place, after
            place = after

    def _head(self, place: int) -> tuple[int, int]:
        """Code and end of a record. The file is then at its content."""
        self._file.seek(place)
        code, length = struct.unpack("<BQ", self._exactly(9))
        if place + 9 + length > self._size:
            raise ValueError("a record is truncated")
        return code, place + 9 + length

    def _head_of_message(self) -> tuple[int, int]:
        """Channel and log time of a message at whose content the file is."""
        channel, _, time, _ = struct.unpack("<HIQQ", self._exactly(22))
        return channel, time

    def _exactly(self, length: int) -> bytes:
        found = self._file.read(length)
        if len(found) != length:
            raise ValueError("a record is truncated")
        return found


def _split(content: bytes) -> Iterator[_Record]:
    """The records of an uncompressed chunk."""
    place = 0
    while place < len(content):
        code, length = struct.unpack_from("<BQ", content, place)
        if place + 9 + length > len(content):
            raise ValueError("a record in a chunk is truncated")
        yield _Record(code, content[place + 9 : place + 9 + length])
        place += 9 + length


def _unpacked(chunk: bytes) -> bytes:
    """The records of a chunk, decompressed and checked."""
    fields = _Fields(chunk)
    _, _, size, check = fields.numbers("QQQI")
    compression, content = fields.text(), fields.counted("Q")
    if compression == "zstd":
        content = from_zstd(content)
    elif compression == "lz4":
        content = from_lz4(content)
    elif compression:
        raise ValueError(f"a chunk has the unknown compression {compression!r:.40}")
    if len(content) != size:
        raise ValueError(f"a chunk is damaged: it has {len(content)} bytes instead of {size}")
    if check and zlib.crc32(content) != check:
        raise ValueError("a chunk is damaged: its checksum is wrong")
    return content
