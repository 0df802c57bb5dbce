"""A recording: the files of a bag, and what its metadata says of them.

metadata.yaml is taken as a hint. Bags come with poor ones: written by hand, by another tool, or by a recorder that was
killed. What the files hold is what is read. Where the metadata or an index declares something else, a remark says so.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import yaml

from kpmatch_ros.bags import mcap_file, sqlite_file
from kpmatch_ros.bags.mcap_file import McapFile
from kpmatch_ros.bags.sqlite_file import SqliteFile
from kpmatch_ros.bags.storage import Definition, StorageFile, from_zstd, reason_of, type_name, zstd

__all__ = [
    "BagError",
    "OutputError",
    "Raw",
    "Recording",
    "Storage",
    "bag_information",
    "encodable",
    "explained",
    "has_stored_name",
    "is_recording",
    "is_unfinished",
    "own_files",
    "stored_files",
    "with_remedy",
]

Storage = Literal["mcap", "sqlite3"]

_SUFFIXES = (".mcap", ".db3")
_ZSTD = b"\x28\xb5\x2f\xfd"  # what a compressed message or file begins with; a message that is not begins with 0


class BagError(ValueError):
    """A bag is missing or broken, lacks a topic, or cannot be written. The text says which, and what to do."""


class OutputError(BagError):
    """There is no place to write to: the disk is full, say. The bag that is read is not at fault."""


@contextmanager
def explained(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn any error of the parsers, or of the writers, into a BagError."""
    try:
        yield
    except BagError:
        raise
    except Exception as error:  # storages, compressions and message parsers have errors of their own
        raise BagError(f"{path}: {what}: {with_remedy(reason_of(error), path)}") from error


def with_remedy(reason: str, path: Path) -> str:
    """Why a file, or a bag's folder, cannot be read, and what may help, unless that is said already."""
    if "mcap recover" in reason or ".recover`" in reason:
        return reason
    if "database" in reason and "malformed" in reason:
        file = shlex.quote(str(path)) if path.is_file() else "FILE"
        return f"{reason}; `sqlite3 {file} .recover` may save what is in it"
    if "magic" in reason or "runcated" in reason:
        return f"{reason}; if the recording was cut short, `mcap recover` may save what is in it"
    return reason


class Raw(NamedTuple):
    """A message as it is stored."""

    topic: str
    type: str
    stamp: int
    stored: bytes

    def content(self) -> bytes:
        """The message, decompressed. Raises ValueError, or zstd's own errors."""
        return from_zstd(self.stored) if self.stored[:4] == _ZSTD else self.stored


class Recording:
    """An open bag: a folder, or a bare .mcap or .db3 file.

    Attributes:
        storage: of its messages.
        counts: messages in ROS 2's encoding, by topic and type.
        foreign: the other topics that hold messages, with their encoding.
        definitions: of the types; those that the bag does not define are absent.
        remarks: what is odd about the bag, in words for the user. Reading may add to them.

    Raises:
        BagError: the folder is no bag, or files of it are missing, or none can be read.
        OSError: metadata.yaml, or the folder, cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.foreign: dict[str, str] = {}
        self.definitions: dict[str, Definition] = {}
        self.remarks: list[str] = []
        self._declared: dict[str, int] = {}
        self._types: dict[str, str] = {}  # as metadata.yaml has them, by topic
        self._files: dict[str, StorageFile] = {}  # by name
        self._lost: list[str] = []  # files that cannot be read
        self._stack = ExitStack()
        try:
            files = self._files_of(path) if path.is_dir() else [path]
            self.storage: Storage = "mcap" if ".mcap" in files[0].suffixes else "sqlite3"
            for file in files:
                try:
                    self._open(file)
                except (OutputError, MemoryError, OSError, sqlite3.OperationalError):  # of the machine, not the bag
                    raise
                except Exception as error:
                    reason = with_remedy(reason_of(error), file)
                    if len(files) == 1:
                        raise BagError(f"{path}: cannot be read: {reason}") from error
                    self._lost.append(f"{file.name}: cannot be read, so its messages are missing: {reason}")
            if not self._files:
                raise BagError(f"{path}: none of its {len(files)} files can be read: {'; '.join(self._lost[:3])}")
        except BaseException:
            self._stack.close()
            raise
        self._compare_with_metadata()

    @property
    def damage(self) -> list[str]:
        """What cannot be read of the bag, in words for the user. Reading may add to it."""
        return self._lost + [f"{name}: {each}" for name, file in self._files.items() for each in file.damage]

    def close(self) -> None:
        """Remove what was decompressed."""
        self._stack.close()

    def messages(self, topics: Collection[str]) -> Iterator[Raw]:
        """The messages on some topics, file by file, each in the order of recording."""
        read: Counter[str] = Counter()
        for storage in self._files.values():
            wanted = {
                key: (channel.topic, self._type(channel.topic, channel.type))
                for key, channel in storage.channels.items()
                if channel.topic in topics and channel.encoding == "cdr"
            }
            if not wanted:
                continue
            for key, stamp, content in storage.messages(wanted):
                topic, kind = wanted[key]
                read[topic] += 1
                yield Raw(topic, kind, stamp, content)
        for topic in sorted(topics):
            indexed = sum(count for (name, _), count in self.counts.items() if name == topic)
            if read[topic] != indexed:
                self.remarks.append(f"{topic}: the bag's index declares {indexed} messages, {read[topic]} were read")

    def _files_of(self, folder: Path) -> list[Path]:
        present = stored_files(folder)
        if not (folder / "metadata.yaml").exists():
            if not present:
                if old := sorted(entry.name for entry in folder.glob("*.bag") if entry.is_file()):
                    raise BagError(f"{folder}: is not a bag of ROS 2; {old[0]} is one of ROS 1: name that file")
                raise BagError(f"{folder}: is not a bag; a bag's folder holds metadata.yaml and .mcap or .db3 files")
            # A recording that was killed before it wrote its metadata has one file, or several that are numbered.
            if len(present) > 1:
                if not _are_numbered(present):
                    raise BagError(
                        f"{folder}: has {len(present)} files but no metadata.yaml, and they are not numbered as those "
                        f"of one bag: {_in_short(present)}; name one of them, or if all are of one bag, "
                        f"ros2 bag reindex {folder} writes metadata.yaml"
                    )
                self.remarks.append(
                    f"there is no metadata.yaml: read as one bag were {len(present)} files, {_in_short(present)}"
                )
            return present
        names = self._read_metadata(folder / "metadata.yaml")
        if not names:
            if not present:
                raise BagError(f"{folder}: cannot be read: it has no .mcap or .db3 file")
            self.remarks.append(f"metadata.yaml names no files: read were {', '.join(file.name for file in present)}")
            return present
        listed = _listed(folder, names)
        if missing := [file.name for file in listed if not file.is_file()]:
            raise BagError(
                f"{folder}: cannot be read: files that metadata.yaml names are missing: {', '.join(missing)}"
            )
        if unlisted := [file.name for file in present if file not in listed]:
            self.remarks.append(f"metadata.yaml does not name {', '.join(unlisted)}, which was not read")
        return listed

    def _read_metadata(self, file: Path) -> list[str]:
        """The names of the bag's files. Every key may be absent."""
        content = bag_information(file)
        for entry in _list(content, "topics_with_message_count"):
            about = entry.get("topic_metadata") if isinstance(entry, dict) else None
            if isinstance(about, dict) and isinstance(about.get("name"), str):
                count = entry.get("message_count")
                if isinstance(count, int):
                    self._declared[about["name"]] = self._declared.get(about["name"], 0) + count
                if isinstance(about.get("type"), str):
                    self._types[about["name"]] = about["type"]
        return _file_names(content)

    def _open(self, path: Path) -> None:
        name = path.name
        if path.suffix == ".zstd":
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            plain = Path(folder, path.stem)
            try:
                with path.open("rb") as stream, zstd.open(stream, "rb") as packed, plain.open("wb") as target:
                    shutil.copyfileobj(packed, target)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise OutputError(
                    f"{path}: is compressed as a whole, and there is no place for what is in it in "
                    f"{tempfile.gettempdir()}: {error.strerror}; TMPDIR names another folder"
                ) from error
            path = plain
        with path.open("rb") as stream:
            begin = stream.read(16)
        storage: StorageFile
        if begin.startswith(sqlite_file.MAGIC) or (path.suffix == ".db3" and not begin.startswith(mcap_file.MAGIC)):
            storage = SqliteFile(path)
        else:
            storage = McapFile(path)
        self._files[name] = storage
        if storage.unfinished:
            self.remarks.append(f"{name}: {storage.unfinished}")
        for key, channel in storage.channels.items():
            if channel.encoding != "cdr":
                if storage.counts[key]:
                    self.foreign[channel.topic] = channel.encoding or "unnamed"
                continue
            kind = self._type(channel.topic, channel.type)
            self.counts[channel.topic, kind] += storage.counts[key]
            if channel.definition.form:
                self.definitions.setdefault(kind, channel.definition)

    def _type(self, topic: str, spelling: str) -> str:
        return type_name(spelling or self._types.get(topic, ""))

    def _compare_with_metadata(self) -> None:
        if self.foreign:
            named = ", ".join(f"{topic} ({encoding})" for topic, encoding in sorted(self.foreign.items()))
            self.remarks.append(f"left out, because it is not in ROS 2's encoding: {named}")
        held: Counter[str] = Counter()
        for (topic, _), count in self.counts.items():
            held[topic] += count
        for topic, declared in sorted(self._declared.items()):
            if topic not in self.foreign and declared != held[topic]:
                self.remarks.append(
                    f"{topic}: metadata.yaml declares {declared} messages, the files hold {held[topic]}"
                )


def encodable(text: str) -> str:
    """A text that holds a file's name, which need not be UTF-8, with what UTF-8 cannot hold escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def bag_information(file: Path) -> dict[str, Any]:
    """What a metadata.yaml says of its bag. Every key may be absent.

    Raises:
        ValueError: it is damaged, or says nothing of a bag.
        OSError: it cannot be read.
    """
    try:
        tree = _parsed(file.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # what PyYAML raises of a value that is none of its tag, or of deep nesting, is its own
        said = str(error) if isinstance(error, (ValueError, yaml.YAMLError)) else f"{type(error).__name__}: {error}"
        reason = " ".join(said.replace('in "<unicode string>", ', "").split())
        raise ValueError(
            f"metadata.yaml is damaged: {reason}; without metadata.yaml the bag may be read, and ros2 bag reindex "
            f"{file.parent} writes another one"
        ) from error
    content = tree.get("rosbag2_bagfile_information") if isinstance(tree, dict) else None
    if not isinstance(content, dict):
        raise ValueError("metadata.yaml has no rosbag2_bagfile_information; without metadata.yaml the bag may be read")
    return content


def has_stored_name(name: str) -> bool:
    """Whether a file may be one of a bag's, by its name. macOS writes `._drive_0.mcap` beside drive_0.mcap."""
    return not name.startswith(".") and name.removesuffix(".zstd").endswith(_SUFFIXES)


def stored_files(folder: Path) -> list[Path]:
    """What a bag's folder holds that may be the bag's by its name, in the order of recording.

    Raises:
        OSError: it cannot be read.
    """
    return sorted((entry for entry in folder.iterdir() if has_stored_name(entry.name)), key=_natural)


def _listed(folder: Path, names: list[str]) -> list[Path]:
    return list(dict.fromkeys(_as_it_is_now(folder / name) for name in names))  # one may be named twice


def own_files(folder: Path) -> list[Path]:
    """The files of a bag's folder that holds nothing else, so that the bag can be replaced.

    Raises:
        BagError: it is no bag's folder, or something in it is not the bag's.
        OSError: it cannot be read.
    """
    try:
        if folder.is_symlink():  # what it names lies elsewhere
            raise ValueError
        names = _file_names(bag_information(folder / "metadata.yaml"))
    except (ValueError, FileNotFoundError, NotADirectoryError):
        raise BagError(f"{folder}: exists and is not a bag, so it is not replaced") from None
    own = {folder / "metadata.yaml", *(_as_it_is_now(folder / name) for name in names)}
    present = sorted(folder.iterdir())
    foreign = [entry.name for entry in present if entry not in own or entry.is_dir()]
    if foreign:
        raise BagError(f"{folder}: holds {foreign[0]}, which is not of the bag there, so it is not replaced")
    return present


def _file_names(content: dict[str, Any]) -> list[str]:
    return [PurePath(name).name for name in _list(content, "relative_file_paths") if isinstance(name, str)]


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> Any:
    """What YAML text holds. A bag is opened several times, and a thousand topics take a second."""
    return yaml.safe_load(text)  # libyaml's loader is faster, and text that is nested deeply makes it crash


def _list(content: dict[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    return found if isinstance(found, list) else []


def _as_it_is_now(file: Path) -> Path:
    """A file, or where it was compressed or decompressed since its metadata was written, what became of it."""
    other = file.with_suffix("") if file.suffix == ".zstd" else file.with_name(f"{file.name}.zstd")
    return other if other.is_file() and not file.exists() else file


def _natural(path: Path) -> list[Any]:
    """bag_2.db3 comes before bag_10.db3."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _are_numbered(files: list[Path]) -> bool:
    """Whether files that are sorted have the names that rosbag2 gives those of one bag: drive_0.mcap, drive_1.mcap."""
    found = [re.fullmatch(r"(.+)_(0|[1-9]\d*)(\.\w+)", file.name.removesuffix(".zstd")) for file in files]
    parts = [match.groups() for match in found if match is not None]
    first = int(parts[0][1]) if parts else 0
    return len({(stem, suffix) for stem, _, suffix in parts}) == 1 and [int(number) for _, number, _ in parts] == list(
        range(first, first + len(files))
    )


def _in_short(files: list[Path]) -> str:
    """The names of files that are sorted, or where these are many, of the first and the last one."""
    names = [file.name for file in files]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"


def is_unfinished(bag: Path) -> bool:
    """Whether a file of a bag may still be written, or was not finished: an MCAP without its end, a log of SQLite's."""

    def is_open(file: Path) -> bool:
        if file.suffix == ".mcap":
            with file.open("rb") as stream:
                stream.seek(-min(len(mcap_file.MAGIC), file.stat().st_size), os.SEEK_END)
                return stream.read() != mcap_file.MAGIC
        return file.with_name(f"{file.name}-wal").exists()

    return any(is_open(file) for file in (stored_files(bag) if bag.is_dir() else [bag]) if file.is_file())


def is_recording(file: Path) -> bool:
    """Whether a file begins as those of bags do: MCAP, SQLite, or one compressed as a whole."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(16).startswith((mcap_file.MAGIC, sqlite_file.MAGIC, _ZSTD))
