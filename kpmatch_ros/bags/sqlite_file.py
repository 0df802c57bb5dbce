"""The sqlite3 files of rosbag2: read, also what a killed recorder left in the write-ahead log, and written."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from rosbags.rosbag2.enums import CompressionMode
from rosbags.rosbag2.storage_sqlite3 import Sqlite3Writer

from kpmatch_ros.bags.storage import Channel, Definition

__all__ = ["MAGIC", "SqliteFile", "SqliteWriter"]

MAGIC = b"SQLite format 3\0"
_FORMATS = {"ros2msg": "msg", "ros2idl": "idl"}


def _quoted(path: Path) -> str:
    """A path as SQLite's addresses have it. Its bytes need not be UTF-8.

    The first two slashes say that no machine is named: SQLite takes a path for one that itself begins with two.
    """
    return f"//{quote(os.fsencode(path.absolute()))}"


class SqliteWriter(Sqlite3Writer):
    """Writes the .db3 file of a bag in a folder of any name: rosbags gives SQLite an address that is not quoted."""

    def __init__(self, path: Path, compression: CompressionMode) -> None:
        super().__init__(Path(_quoted(path)), compression)
        self.path = path / f"{path.name}.db3"


class SqliteFile:
    """A .db3 file. It is open only while it is read, and only read: nothing is written beside it either.

    Attributes:
        channels: by id.
        counts: how many messages each channel has.

    Raises:
        sqlite3.Error, ValueError: it is no such file, cut short, or damaged.
    """

    def __init__(self, path: Path) -> None:
        log = path.with_name(path.name + "-wal")
        left = log.is_file() and log.stat().st_size > 0
        # A recorder that was killed leaves its last messages in the log. To read it, SQLite wants an index of it in
        # shared memory, a file beside the bag. With an exclusive lock it keeps that to itself, and with the file system
        # layer "unix-none" the lock is none: the medium may be read-only. Without a log nothing needs a lock.
        access = "mode=ro&vfs=unix-none" if left else "immutable=1"
        self._address, self._with_log = f"file:{_quoted(path)}?{access}", left
        with closing(self._opened()) as database:
            self.channels, self.counts = _read_topics(database)

    def messages(self, ids: Collection[int]) -> Iterator[tuple[int, int, bytes]]:
        """The messages of some channels in the order of recording: channel, nanoseconds, content."""
        marks = ", ".join("?" for _ in ids)
        with closing(self._opened()) as database:
            # Contents are fetched one by one. Where there is no index by time, as some tools write none, SQLite sorts
            # what it is asked for in a temporary file, which would be as large as the bag.
            for place, channel, time in database.execute(
                f"SELECT rowid, topic_id, timestamp FROM messages WHERE topic_id IN ({marks}) ORDER BY timestamp, id",
                tuple(ids),
            ):
                found = database.execute("SELECT data FROM messages WHERE rowid = ?", (place,)).fetchone()
                content = None if found is None else found[0]
                if not isinstance(time, int) or not isinstance(content, bytes):
                    raise ValueError("the database is malformed: a message has no time or no content")
                yield channel, time, content

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._address, uri=True)
        database.text_factory = lambda content: content.decode(errors="replace")
        if self._with_log:
            try:
                database.execute("PRAGMA locking_mode=EXCLUSIVE")
            except BaseException:
                database.close()
                raise
        return database


def _read_topics(database: sqlite3.Connection) -> tuple[dict[int, Channel], Counter[int]]:
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
    counts = Counter(dict(database.execute("SELECT topic_id, COUNT(*) FROM messages GROUP BY topic_id")))
    return channels, counts
