"""Reads MCAP files (mcap.dev/spec), including files whose index is incomplete.

The summary is used only if it is complete. If it is absent, damaged, or lists less than the file holds, the data
section is scanned instead. Unfinished recordings, which may end in the middle of a record, are scanned too. A damaged
chunk is left out. A channel in another encoding than ROS 2's (protobuf, JSON) is reported and does not affect the
others.
"""

from __future__ import annotations

import heapq
import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kpmatch_ros.bags.storage import LARGEST, Channel, Definition, from_lz4, from_zstd, reason_of, so_far, zstd

__all__ = ["MAGIC", "McapFile"]

MAGIC = b"\x89MCAP0\r\n"
_HEADER, _FOOTER, _SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 1, 2, 3, 4, 5, 6
_CHUNK_INDEX, _ATTACHMENT, _STATISTICS, _SUMMARY_OFFSET, _DATA_END = 8, 9, 0x0B, 0x0E, 0x0F
_MOST_REPORTED = 10  # damaged places that are reported one by one
# The errors that damaged bytes raise; RuntimeError is lz4's. OSError and MemoryError are not among them: a failing disk
# or network, or too little memory, is no fault of the file, and another attempt may succeed.
_DAMAGE = (ValueError, struct.error, zstd.ZstdError, RuntimeError)
_FORMATS = {"ros2msg": "msg", "ros2idl": "idl", "omgidl": "idl"}


class _Record(NamedTuple):
    code: int
    content: bytes


class _Fields:
    """Reads the fields of a record in order."""

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
    start: int  # earliest log time of its messages, nanoseconds
    place: int  # of its record in the file, bytes
    channels: frozenset[int]  # the channels in its message indexes; empty if it has none


class _Scanned(NamedTuple):
    reached: int  # byte up to which records were found
    obstacle: Exception | None  # why the scan stopped there
    finished: bool  # whether the data section ends with a DataEnd record, as a recorder writes it


class McapFile:
    """An MCAP file. It is open only while it is read: a bag may have more files than a process may have open.

    Attributes:
        channels: by id.
        counts: number of messages of each channel, from the file's statistics, or else counted.
        unfinished, damage: see :class:`kpmatch_ros.bags.storage.StorageFile`.

    Raises:
        ValueError, struct.error: it is not an MCAP file, or it is so damaged or cut short that no message can be read.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            index = _Index(file)
        self.channels, self.counts = index.channels, index.counts
        self.unfinished, self.damage = index.unfinished, index.damage
        self._chunks, self._unchunked, self._damaged = index.chunks, index.unchunked, index.damaged
        self._path = path

    def messages(self, ids: Collection[int], damage: list[str]) -> Iterator[tuple[int, int, bytes]]:
        """Yield the messages of some channels in the order of their log times: channel, log time, content.

        `damage` receives what cannot be read, see :class:`kpmatch_ros.bags.storage.StorageFile`. Places that were found
        to be damaged when the file was opened are not reported again.
        """
        with self._path.open("rb") as file:
            yield from _Pass(file, damage, self._damaged).messages(ids, self._chunks, self._unchunked)


class _Reading:
    """Reads the records of an open file, and notes where it is damaged.

    Attributes:
        damage: what cannot be read, and where, in words.
        damaged: damaged places that were found so far.
    """

    def __init__(self, file: BinaryIO, damage: list[str], damaged: Collection[int] = ()) -> None:
        self.damage = damage
        self.damaged = set(damaged)
        self._last: int | None = None  # log time of the last message that could be read
        self._file = file
        self._size = file.seek(0, 2)

    def _at(self, place: int) -> _Record:
        code, after = self._head(place)
        return _Record(code, self._exactly(after - place - 9))

    def _walk(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield code, begin and end of each record between two places. The file is then at the record's content."""
        place = begin
        while place < end:
            code, after = self._head(place)
            yield code, place, after
            place = after

    def _head(self, place: int) -> tuple[int, int]:
        """Code and end of the record at a place. The file is then at its content."""
        if place > self._size:  # from a damaged index; seeking there may raise an OSError
            raise ValueError("a record is truncated")
        self._file.seek(place)
        code, length = struct.unpack("<BQ", self._exactly(9))
        if not code:  # a disk that lost writes leaves zeros
            raise ValueError("no record begins there")
        if place + 9 + length > self._size:
            raise ValueError("a record is truncated")
        return code, place + 9 + length

    def _exactly(self, length: int) -> bytes:
        found = self._file.read(length)
        if len(found) != length:
            raise ValueError("a record is truncated")
        return found

    def _leave_out(self, place: int, error: Exception, before: int = 0) -> None:
        """Report damage in the record at a place; `before` messages in that record were read before the damage."""
        if place in self.damaged:  # reported already, for example when the file was opened
            return
        self.damaged.add(place)
        if len(self.damaged) <= _MOST_REPORTED:
            left_out = "its content after the damage" if before else "it"
            self.damage.append(
                f"the data at byte {place} is damaged: {reason_of(error)}; {left_out} was left out; "
                + so_far(self._last)
            )
        elif len(self.damaged) == _MOST_REPORTED + 1:
            self.damage.append(f"more damaged data was left out, the first at byte {place}")


class _Pass(_Reading):
    """Reads the messages of some channels."""

    def messages(
        self, ids: Collection[int], chunks: Sequence[_Chunk], unchunked: Mapping[int, array[int]]
    ) -> Iterator[tuple[int, int, bytes]]:
        """Yield channel, log time and content in the order of the log times."""
        chunks = [chunk for chunk in chunks if not chunk.channels or not chunk.channels.isdisjoint(ids)]
        sources = [self._of_chunk(number, chunk, ids) for number, chunk in enumerate(chunks)]
        sources.append(self._of_unchunked(len(chunks), ids, unchunked))
        for time, _, _, channel, content in heapq.merge(*sources):
            if content is not None:
                self._last = time
                yield channel, time, content

    def _of_chunk(
        self, number: int, chunk: _Chunk, ids: Collection[int]
    ) -> Iterator[tuple[int, int, int, int, bytes | None]]:
        yield chunk.start, number, -1, 0, None  # a placeholder: the chunk is decompressed only when its turn comes
        found: list[tuple[int, int, int, int, bytes | None]] = []
        before, obstacle = 0, None  # messages of any channel before the damage
        try:
            record = self._at(chunk.place)
            if record.code != _CHUNK:
                raise ValueError("there is no chunk where the index lists one")
            for inner in _split(_unpacked(record.content)):
                if inner.code == _MESSAGE:
                    channel, _, time, _ = struct.unpack_from("<HIQQ", inner.content)
                    before += 1
                    if channel in ids:
                        found.append((time, number, len(found), channel, inner.content[22:]))
        except _DAMAGE as error:
            obstacle = error
        found.sort(key=lambda entry: entry[0])
        yield from found
        if obstacle is not None:
            self._leave_out(chunk.place, obstacle, before)

    def _of_unchunked(
        self, number: int, ids: Collection[int], unchunked: Mapping[int, array[int]]
    ) -> Iterator[tuple[int, int, int, int, bytes | None]]:
        stored = {channel: unchunked.get(channel, array("Q")) for channel in ids}
        places = sorted(entry for channel, both in stored.items()
                        for entry in zip(both[::2], both[1::2], repeat(channel)))  # fmt: skip
        for order, (time, place, channel) in enumerate(places):
            yield time, number, order, channel, self._at(place).content[22:]


class _Index(_Reading):
    """Finds what a file holds, and where: from its summary, or else by a scan.

    Attributes:
        channels, counts, unfinished: see :class:`McapFile`.
        chunks: that hold messages.
        unchunked: log time and place of each message outside any chunk, by channel.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, [])
        self.channels: dict[int, Channel] = {}
        self.counts: Counter[int] = Counter()
        self.chunks: list[_Chunk] = []
        self.unchunked: dict[int, array[int]] = {}
        self.unfinished = ""
        self._schemas: dict[int, tuple[str, Definition]] = {0: ("", Definition("", b""))}  # id 0 means no schema
        self._declared: dict[int, tuple[int, str, str]] = {}  # by channel id: schema, topic, encoding
        self._open()

    def _open(self) -> None:
        size = self._size
        if not size:
            raise ValueError("the file is empty")
        self._file.seek(0)
        if self._file.read(8) != MAGIC:
            raise ValueError("the file does not begin with MCAP's magic bytes")
        if self._at(8).code != _HEADER:
            raise ValueError("its first record is not a header")
        begin = self._file.tell()
        self._file.seek(max(size - 37, begin))
        footer = self._file.read()
        if footer[-8:] == MAGIC:
            self._read_finished(begin, footer)
        else:
            self._read_unfinished(begin)
        for key, (schema, topic, encoding) in self._declared.items():
            name, definition = self._schemas.get(schema, self._schemas[0])
            self.channels[key] = Channel(topic, name, encoding, definition)
        if self.damage and (lost := sum(count for key, count in self.counts.items() if key not in self.channels)):
            self.damage.append(f"{lost} messages were left out, because the records that name their topics are damaged")

    def _read_finished(self, begin: int, footer: bytes) -> None:
        """Read the summary; if it is damaged or lists less than the file holds, scan the file instead."""
        end = self._size - len(footer)
        try:
            if footer[0] != _FOOTER or len(footer) != 37:
                raise ValueError("it has no footer")
            (summary,) = struct.unpack_from("<Q", footer, 9)
            if summary and not begin <= summary <= end:
                raise ValueError("its footer is damaged: the summary is outside the file")
            if summary and self._read_summary(begin, summary, end):
                return
        except (ValueError, struct.error) as error:
            self.damage.append(f"its index was not used, because it is damaged: {reason_of(error)}")
            summary = 0
        reached, obstacle, _ = self._scan(begin, summary or end, sorted(chunk.place for chunk in self.chunks))
        if not self.counts and (obstacle or self.damage):
            raise obstacle or ValueError(self.damage[0])
        if obstacle is not None:
            self._end_at(reached, obstacle)

    def _read_unfinished(self, begin: int) -> None:
        """Read up to the last complete record."""
        reached, obstacle, finished = self._scan(begin, self._size, [])
        cut = obstacle is None or self._is_cut(reached)
        if obstacle is not None and not cut:
            self._end_at(reached, obstacle)
        if not self.counts:
            raise ValueError(
                "the file does not end with MCAP's magic bytes: it was not finished, and no message in it can be read"
                + "".join(f"; {each}" for each in self.damage)
            )
        rest = self._size - reached
        if finished:
            self.unfinished = f"the recording was finished, but {self._what_follows(reached)}"
        elif not cut:
            self.unfinished = "the recording was not finished, or was cut short"
        else:
            self.unfinished = f"the recording was not finished, or was cut short; {so_far(self._last)}" + (
                f"; its last {rest} bytes, from byte {reached} on, hold no complete record" if rest else ""
            )

    def _is_cut(self, place: int) -> bool:
        """Whether the file ends within the record at a place, or holds only zeros from there on.

        A disk that lost the last writes leaves zeros. If neither holds, the file is damaged before its end.
        """
        self._file.seek(place)
        head = self._file.read(9)
        if len(head) == 9 and any(head):
            code, length = struct.unpack("<BQ", head)
            # No recorder writes a record (except an attachment) longer than LARGEST: such a length is itself damaged.
            return 0 < code <= _DATA_END and (length <= LARGEST or code == _ATTACHMENT)
        while block := self._file.read(1 << 20):
            if any(block):
                return False
        return True

    def _what_follows(self, place: int) -> str:
        """What is wrong after the data section of a finished recording, in words."""
        try:
            for code, _, after in self._walk(place, self._size):
                if code == _FOOTER:
                    self._file.seek(after)
                    if self._exactly(8) == MAGIC:
                        return f"{self._size - after - 8} bytes of other data follow its end at byte {after + 8}"
        except ValueError:
            pass
        return f"its index, from byte {place} on, was cut short or is damaged"

    def _end_at(self, place: int, obstacle: Exception) -> None:
        self.damage.append(
            f"it is damaged at byte {place}: {reason_of(obstacle)}; the rest was not read; {so_far(self._last)}"
        )

    def _read_summary(self, data: int, begin: int, end: int) -> bool:
        """Read the summary, which follows the data. Returns whether it describes everything in the file."""
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
                self.chunks.append(_Chunk(start, chunk, frozenset(channel for channel, _ in entries)))
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
            and len(self.chunks) >= chunks
            and self._read_between(data, begin, indexed)
            and all(schema in self._schemas for schema, _, _ in self._declared.values())
        )

    def _read_between(self, begin: int, end: int, indexed: list[tuple[int, int]]) -> bool:
        """Read the records between the indexed chunks, which the index does not list.

        Returns whether there is no chunk among them, and the lengths in the index are right.
        """
        place = begin
        try:
            for start, after in [*sorted(indexed), (end, end)]:
                for code, here, place_after in self._walk(place, start):
                    if code == _CHUNK:
                        return False
                    if code == _MESSAGE:
                        self._add_unchunked(here)
                    elif code in (_SCHEMA, _CHANNEL):
                        self._define(self._at(here))
                    place = place_after
                if place != start:
                    return False
                place = after
        except (ValueError, struct.error):  # the lengths in the index are wrong
            return False
        return True

    def _scan(self, begin: int, end: int, known: Sequence[int]) -> _Scanned:
        """Find channels, chunks and messages by reading the records one after the other.

        Where there is no valid record, the scan goes on at the next chunk in `known`, places of chunks from the index.
        """
        self.chunks, self.unchunked, self.counts = [], {}, Counter()
        place = begin
        while place < end:
            try:
                code, after = self._head(place)
            except ValueError as error:
                following = next((chunk for chunk in known if chunk > place), None)
                if following is None:
                    return _Scanned(place, error, finished=False)
                self._leave_out(place, error)
                place = following
                continue
            if code == _DATA_END:
                return _Scanned(after, None, finished=True)
            before = self.counts.total()
            try:
                if code == _MESSAGE:
                    channel, time = self._add_unchunked(place)
                    self._count([channel], [time])
                elif code in (_SCHEMA, _CHANNEL):
                    self._define(self._at(place))
                elif code == _CHUNK:
                    self._scan_chunk(place)
            except _DAMAGE as error:
                self._leave_out(place, error, self.counts.total() - before)
            place = after
        return _Scanned(place, None, finished=False)

    def _scan_chunk(self, place: int) -> None:
        times, held = [], []
        try:
            for inner in _split(_unpacked(self._at(place).content)):
                self._define(inner)
                if inner.code == _MESSAGE:
                    channel, _, time, _ = struct.unpack_from("<HIQQ", inner.content)
                    held.append(channel)
                    times.append(time)
        finally:  # the messages before the damage can be read
            if times:
                self._count(held, times)
                self.chunks.append(_Chunk(min(times), place, frozenset(held)))

    def _count(self, channels: Sequence[int], times: Sequence[int]) -> None:
        self.counts.update(channels)
        self._last = max(*times, self._last or 0)

    def _add_unchunked(self, place: int) -> tuple[int, int]:
        """Note a message outside any chunk. The file is positioned at its content, of which only the head is read.

        Returns its channel and log time.
        """
        channel, _, time, _ = struct.unpack("<HIQQ", self._exactly(22))
        self.unchunked.setdefault(channel, array("Q")).extend((time, place))
        return channel, time

    def _define(self, record: _Record) -> None:
        """Note a schema or a channel; other records are ignored."""
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
