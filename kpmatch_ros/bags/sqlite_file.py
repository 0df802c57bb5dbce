"""Reads and writes the sqlite3 files of rosbag2, and reads what a killed recorder left in the write-ahead log.

From a damaged file, as many messages as possible are read. If the index by time is intact, these are all messages
except those on damaged pages. If it is not, these are the messages in the table before the first damage.
"""

from __future__ import annotations

import os
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from rosbags.rosbag2.enums import CompressionMode
from rosbags.rosbag2.storage_sqlite3 import Sqlite3Writer

from kpmatch_ros.bags.storage import Channel, Definition, reason_of, so_far

__all__ = ["MAGIC", "SqliteFile", "SqliteWriter"]

MAGIC = b"SQLite format 3\0"
_FIRST = (-(2**63), -(2**63))  # a time and a row before all messages
_FORMATS = {"ros2msg": "msg", "ros2idl": "idl"}


def _quoted(path: Path) -> str:
    """A path as it is written in SQLite's file URIs. Its bytes need not be UTF-8.

    The two leading slashes stand for an empty host. Without them, SQLite would take the start of a path that itself
    starts with two slashes for a host.
    """
    return f"//{quote(os.fsencode(path.absolute()))}"


class SqliteWriter(Sqlite3Writer):
    """Writes the .db3 file of a bag in a folder of any name. rosbags gives SQLite a URI that is not quoted."""

    def __init__(self, path: Path, compression: CompressionMode) -> None:
        super().__init__(Path(_quoted(path)), compression)
        self.path = path / f"{path.name}.db3"


class SqliteFile:
    """A .db3 file. It is open only while it is read. Nothing is written to it or beside it.

    Attributes:
        channels: by id.
        counts: number of messages of each channel; in a damaged file, of those that could be counted.
        unfinished, damage: see :class:`kpmatch_ros.bags.storage.StorageFile`.

    Raises:
        sqlite3.Error, ValueError: it is not a .db3 file, or it is so damaged or cut short that no message can be read.
    """

    def __init__(self, path: Path) -> None:
        log = path.with_name(path.name + "-wal")
        left = log.is_file() and log.stat().st_size > 0
        # A killed recorder leaves its last messages in the write-ahead log. To read the log, SQLite needs an index in
        # shared memory, which is a file beside the bag. With an exclusive lock, it keeps the index in its own memory
        # instead. The VFS "unix-none" makes the lock a no-op, so that the medium may be read-only. Without a log, no
        # lock is needed.
        access = "mode=ro&vfs=unix-none" if left else "immutable=1"
        self._address, self._with_log = f"file:{_quoted(path)}?{access}", left
        self.unfinished = ""
        self.damage: list[str] = []
        missing = 0 if left else _missing_bytes(path)  # with a log, the last pages may be in it
        self._cut = missing > 0
        if missing:
            self.damage.append(f"it was cut short: its last {missing} bytes are missing")
        with closing(self._opened()) as database:
            self.channels = _read_topics(database)
            self.counts = self._count(database)

    def messages(self, ids: Collection[int], damage: list[str]) -> Iterator[tuple[int, int, bytes]]:
        """Yield the messages of some channels in the order of recording: channel, nanoseconds, content.

        `damage` receives what cannot be read, see :class:`kpmatch_ros.bags.storage.StorageFile`.
        """
        last: int | None = None  # time of the last message that was read
        left_out = 0

        def report(what: str, error: Exception) -> None:
            damage.append(f"{what} is damaged: {reason_of(error)}; {so_far(last)}")

        with closing(self._opened()) as database:
            # Contents are fetched one by one. Some tools write no index by time. SQLite then sorts the result of the
            # query in a temporary file, which would be as large as the bag if the result had the contents.
            for time, row, channel in self._in_order(database, ids, report):
                try:
                    content = _content(database, row)
                    if not isinstance(time, int):
                        raise _DamageError("it has no time")
                    if channel is None:
                        raise _DamageError("it has no topic")
                except _DamageError as error:
                    left_out += 1
                    if left_out == 1:
                        report(f"messages were left out; the first one, in row {row},", error)
                    continue
                last = time
                yield channel, time, content

    def _count(self, database: sqlite3.Connection) -> Counter[int]:
        """The number of messages that can be found, by channel."""
        try:
            with _damage():
                return Counter(dict(database.execute("SELECT topic_id, COUNT(*) FROM messages GROUP BY topic_id")))
        except _DamageError as error:
            found = Counter(channel for *_, channel in self._around_damage(database, _FIRST, lambda *_: None))
            lost = found.pop(None, 0)
            if not found:
                raise
            self.damage.append(
                f"its table of messages is damaged: {error}"
                + (f"; {lost} messages in it cannot be read" if lost else "")
            )
            return Counter({channel: count for channel, count in found.items() if channel is not None})

    def _in_order(
        self, database: sqlite3.Connection, ids: Collection[int], report: Callable[[str, Exception], None]
    ) -> Iterator[tuple[int, int, int | None]]:
        """Yield time, row and channel of messages in the order of recording; the channel is None if unreadable."""
        last = _FIRST
        if not self._cut:
            marks = ", ".join("?" for _ in ids)
            with suppress(_DamageError), _damage():
                for found in database.execute(
                    f"SELECT timestamp, rowid, topic_id FROM messages WHERE topic_id IN ({marks}) "
                    "ORDER BY timestamp, rowid",
                    tuple(ids),
                ):
                    if isinstance(found[0], int):
                        last = found[:2]
                    yield found
                return
        for found in self._around_damage(database, last, report):
            if found[2] is None or found[2] in ids:
                yield found

    def _around_damage(
        self, database: sqlite3.Connection, last: tuple[int, int], report: Callable[[str, Exception], None]
    ) -> Iterator[tuple[int, int, int | None]]:
        """Yield time, row and channel of all messages after `last`, if the table or its index by time is damaged."""
        if not self._cut:
            try:
                with _damage():
                    # The index by time answers this query alone, so SQLite reads no page of the table.
                    for time, row in database.execute(
                        "SELECT timestamp, rowid FROM messages WHERE (timestamp, rowid) > (?, ?) "
                        "ORDER BY timestamp, rowid",
                        last,
                    ):
                        if isinstance(time, int):
                            last = time, row
                        yield time, row, _channel(database, row)
                return
            except _DamageError as error:
                report("its table of messages, or the table's index,", error)
        rows, rest = array("q"), []
        with suppress(_DamageError):
            for time, row, channel in _in_table(database):
                rows.append(row)
                if isinstance(time, int) and (time, row) > last:
                    rest.append((time, row, channel))
        if self._cut:  # SQLite reads missing bytes of the last message as zeros: drop incomplete messages
            while rows and not _is_readable(database, rows.pop()):
                pass
            rest = [found for found in rest if rows and found[1] <= rows[-1]]
        yield from sorted(rest)

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._address, uri=True)
        database.text_factory = lambda content: content.decode(errors="replace")
        try:
            if self._with_log:
                database.execute("PRAGMA locking_mode=EXCLUSIVE")
            if self._cut:  # otherwise SQLite refuses a file that is shorter than its header says
                database.execute("PRAGMA writable_schema=ON")
        except BaseException:
            database.close()
            raise
        return database


def _read_topics(database: sqlite3.Connection) -> dict[int, Channel]:
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"messages", "topics"} <= names:
        raise ValueError("the database has no tables of messages and topics")
    definitions: dict[str, Definition] = {}
    if "message_definitions" in names:
        for name, encoding, text in database.execute(
            "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        ):
            form = _FORMATS.get(encoding, "")
            definitions[str(name)] = Definition(form, str(text).encode() if form else b"")
    channels = {}
    for key, topic, kind, encoding in database.execute(
        "SELECT id, name, type, serialization_format FROM topics ORDER BY id"
    ):
        none = Definition("", b"")
        channels[int(key)] = Channel(str(topic), str(kind), str(encoding), definitions.get(str(kind), none))
    return channels


class _DamageError(ValueError):
    """Something in the file is damaged."""


@contextmanager
def _damage() -> Iterator[None]:
    """Raise _DamageError for damage in the file, but not for faults of the machine, such as a full or failing disk."""
    try:
        yield
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise _DamageError(reason_of(error)) from error


def _in_table(database: sqlite3.Connection) -> Iterator[tuple[int, int, int]]:
    """Yield time, row and channel of the messages in the order of the table. Raises _DamageError at damage.

    Each message has its own query: sqlite3 steps ahead, so one query for all would lose the message before the damage.
    """
    last = -(2**63)
    while True:
        with _damage():
            found = database.execute(
                "SELECT timestamp, rowid, topic_id FROM messages NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT 1",
                (last,),
            ).fetchone()
        if found is None or found[1] <= last:  # a damaged page may have its rows in any order
            return
        last = found[1]
        yield found


def _channel(database: sqlite3.Connection, row: int) -> int | None:
    """The channel of a message; None if it cannot be read."""
    with suppress(_DamageError), _damage():
        found = database.execute("SELECT topic_id FROM messages WHERE rowid = ?", (row,)).fetchone()
        return found[0] if found else None
    return None


def _content(database: sqlite3.Connection, row: int) -> bytes:
    """The content of a message. Raises _DamageError."""
    with _damage():
        found = database.execute("SELECT data FROM messages WHERE rowid = ?", (row,)).fetchone()
    if found is None or not isinstance(found[0], bytes):
        raise _DamageError("it has no content")
    return found[0]


def _is_readable(database: sqlite3.Connection, row: int) -> bool:
    try:
        return bool(_content(database, row))
    except _DamageError:
        return False


def _missing_bytes(path: Path) -> int:
    """By how many bytes a file is shorter than its header says; 0 if the header is invalid (sqlite.org/fileformat)."""
    with path.open("rb") as file:
        header, size = file.read(100), file.seek(0, 2)
    if len(header) < 100 or header[24:28] != header[92:96]:  # the last change of the file did not update the page count
        return 0
    page_size, pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
    return max(pages * (65536 if page_size == 1 else page_size) - size, 0)
