"""Writes new bags."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rosbags.rosbag2 import StoragePlugin, Writer

from kpmatch_ros.bags.message_types import typestore
from kpmatch_ros.bags.recording import BagError, OutputError, Storage, explained, own_files
from kpmatch_ros.bags.sqlite_file import SqliteWriter

__all__ = ["BagWriter"]


@contextmanager
def _written(path: Path, file: Path | None = None) -> Iterator[None]:
    """Turn any error of the writers into a BagError; those of the disk into an OutputError.

    Args:
        path: of the bag.
        file: that holds its messages, once it is open. If it is missing, the error says so, whatever the writer says.
    """
    try:
        with explained(path, "cannot be written"):
            try:
                yield
            except Exception as error:  # SQLite of 2024 and later: "attempt to write a readonly database"
                _check_present(file, error)
                raise
            _check_present(file)
    except BagError as error:
        if isinstance(error.__cause__, (OSError, sqlite3.OperationalError)):
            raise OutputError(str(error)) from error
        raise


def _check_present(file: Path | None, cause: Exception | None = None) -> None:
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"{file.name}, which holds its messages, is missing") from cause


class _Writer(Writer):
    STORAGE_PLUGINS = {**Writer.STORAGE_PLUGINS, StoragePlugin.SQLITE3: SqliteWriter}


class BagWriter:
    """Context manager that writes a bag, which is a folder. If an exception is raised inside it, the bag is removed.

    Args:
        path: of the folder, which must not exist yet.
        storage: format of the files.
        overwrite: replace the folder if it holds a bag and nothing else.
        notes: custom_data for the bag's metadata.yaml.

    Raises:
        OutputError: the folder cannot be written, for example because the disk is full.
        BagError: the folder cannot be written for another reason.
    """

    def __init__(
        self,
        path: str | Path,
        storage: Storage = "mcap",
        overwrite: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            if not overwrite:
                raise BagError(f"{self.path}: exists already; remove it or choose another name")
            with _written(self.path):
                for file in own_files(self.path):
                    file.unlink()
                self.path.rmdir()
        self._connections: dict[tuple[str, str], Any] = {}
        plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
        with _written(self.path):
            self._writer = _Writer(self.path, version=8, storage_plugin=plugin)
            for key, note in (notes or {}).items():
                self._writer.set_custom_data(key, note)
            self._writer.open()

    def declare(self, topic: str, type_name: str) -> None:
        """Add a topic. It is in the bag even if no message is written to it."""
        if (topic, type_name) not in self._connections:
            with _written(self.path):
                new = self._writer.add_connection(topic, type_name, typestore=typestore())
            self._connections[topic, type_name] = new

    def write(self, topic: str, message: Any, stamp: int) -> None:
        """Add a message of :func:`typestore`, with the record time `stamp` in nanoseconds."""
        type_name = message.__msgtype__
        data = typestore().serialize_cdr(message, type_name)
        self.declare(topic, type_name)
        with _written(self.path):
            self._writer.write(self._connections[topic, type_name], int(stamp), data)

    def close(self) -> None:
        """Finish the bag. Only this writes its metadata."""
        storage = self._writer.storage
        with _written(self.path, None if storage is None else storage.path):
            try:
                self._writer.close()
            except BaseException:
                if storage is not None:  # close the file: an open one keeps its space on a full disk
                    with suppress(Exception):
                        storage.abort()
                raise

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(Exception):
                self._writer.abort()
            shutil.rmtree(self.path, ignore_errors=True)
