"""Opens a recording: the files of a bag, and their metadata.

metadata.yaml is only a hint, because it is often wrong: written by hand, by another tool, or by a recorder that was
killed. The content of the files is authoritative. If the metadata or an index declares something else, a remark says
so.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Collection, Generator, Iterator
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
    "ChangedError",
    "Findings",
    "OutputError",
    "Raw",
    "Recording",
    "Storage",
    "bag_information",
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
_ZSTD = b"\x28\xb5\x2f\xfd"  # magic bytes of a compressed message or file; an uncompressed message begins with 0


class BagError(ValueError):
    """A bag is missing or broken, lacks a topic, or cannot be written. The text says which, and what to do."""


class ChangedError(BagError):
    """A file of a bag was replaced or removed while the bag was open. Another attempt may succeed."""


class OutputError(BagError):
    """The output cannot be written, for example because the disk is full. The bag that is read is not at fault."""


@contextmanager
def explained(path: Path, what: str = "cannot be read") -> Iterator[None]:
    """Turn any error of the parsers or writers into a BagError."""
    try:
        yield
    except BagError:
        raise
    except Exception as error:  # storages, compressions and message parsers raise errors of their own types
        raise BagError(f"{path}: {what}: {with_remedy(reason_of(error), path)}") from error


def with_remedy(reason: str, path: Path) -> str:
    """The reason why a file or a bag's folder cannot be read, with a remedy appended unless it names one already."""
    if "mcap recover" in reason or ".recover`" in reason:
        return reason
    if "database" in reason and "malformed" in reason:
        file = shlex.quote(str(path)) if path.is_file() else "FILE"
        return f"{reason}; `sqlite3 {file} .recover` may recover its content"
    if "magic" in reason or "runcated" in reason:
        return f"{reason}; if the recording was cut short, `mcap recover` may recover its content"
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


class Findings(NamedTuple):
    """What is odd about a bag, in words for the user.

    Attributes:
        remarks: what is odd, without the damage.
        lost: files that cannot be read.
        damaged: what cannot be read in the other files, by name.
    """

    remarks: list[str]
    lost: list[str]
    damaged: dict[str, list[str]]

    @property
    def damage(self) -> list[str]:
        """Which parts of the bag cannot be read."""
        return self.lost + [f"{name}: {each}" for name, found in self.damaged.items() for each in found]

    def copy(self) -> Findings:
        """A copy for one pass over the messages. The pass adds to it what it finds."""
        return Findings([*self.remarks], [*self.lost], {name: [*found] for name, found in self.damaged.items()})


class _File(NamedTuple):
    """A file of an open bag."""

    name: str
    path: Path  # of the file itself, or of its decompressed content
    status: os.stat_result  # of `path` when it was opened
    storage: StorageFile


class Recording:
    """An open bag: a folder, or a bare .mcap or .db3 file. Reading its messages changes none of its attributes.

    Attributes:
        storage: format of its files.
        counts: number of messages in ROS 2's encoding, by topic and type.
        foreign: topics that hold messages in another encoding, and that encoding.
        definitions: message definitions by type; types that the bag does not define are absent.
        findings: what is odd about the bag, as far as opening it shows that.

    Raises:
        BagError: the folder is not a bag, some of its files are missing, or none of them can be read.
        OSError: metadata.yaml or the folder cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.foreign: dict[str, str] = {}
        self.definitions: dict[str, Definition] = {}
        self.findings = Findings([], [], {})
        self._path = path
        self._declared: dict[str, int] = {}  # number of messages by topic, from metadata.yaml
        self._types: dict[str, str] = {}  # by topic, from metadata.yaml
        self._files: list[_File] = []
        self._stack = ExitStack()
        try:
            files = self._files_of(path) if path.is_dir() else [path]
            self.storage: Storage = "mcap" if ".mcap" in files[0].suffixes else "sqlite3"
            for file in files:
                try:
                    self._open(file)
                except (OutputError, MemoryError, OSError, sqlite3.OperationalError):  # the machine's, not the bag's
                    raise
                except Exception as error:
                    reason = with_remedy(reason_of(error), file)
                    if len(files) == 1:
                        raise BagError(f"{path}: cannot be read: {reason}") from error
                    self.findings.lost.append(f"{file.name}: cannot be read, so its messages are missing: {reason}")
            if not self._files:
                reasons = "; ".join(self.findings.lost[:3])
                raise BagError(f"{path}: none of its {len(files)} files can be read: {reasons}")
        except BaseException:
            self._stack.close()
            raise
        self._compare_with_metadata()

    def close(self) -> None:
        """Remove the temporary files that were decompressed."""
        self._stack.close()

    def messages(self, topics: Collection[str], findings: Findings) -> Generator[Raw, None, None]:
        """Yield the messages on some topics: file by file, and within a file in the order of recording.

        Args:
            topics: to read.
            findings: a copy of those of the recording. This pass adds to it what it finds, and each pass needs its own.

        Raises:
            ChangedError: a file was replaced or removed after the bag was opened.
        """
        read: Counter[str] = Counter()
        for file in self._files:
            wanted = {
                key: (channel.topic, self._type(channel.topic, channel.type))
                for key, channel in file.storage.channels.items()
                if channel.topic in topics and channel.encoding == "cdr"
            }
            if not wanted:
                continue
            if not _is_still(file.path, file.status):  # what was found when it was opened is not true of another file
                raise ChangedError(
                    f"{self._path}: cannot be read: {file.name} was replaced or removed after the bag was opened"
                )
            for key, stamp, content in file.storage.messages(wanted, findings.damaged[file.name]):
                topic, kind = wanted[key]
                read[topic] += 1
                yield Raw(topic, kind, stamp, content)
        for topic in sorted(topics):
            indexed = sum(count for (name, _), count in self.counts.items() if name == topic)
            if read[topic] != indexed:
                findings.remarks.append(
                    f"{topic}: the bag's index declares {indexed} messages, {read[topic]} were read"
                )

    def _files_of(self, folder: Path) -> list[Path]:
        present = stored_files(folder)
        if not (folder / "metadata.yaml").exists():
            if not present:
                if old := sorted(entry.name for entry in folder.glob("*.bag") if entry.is_file()):
                    raise BagError(f"{folder}: is not a ROS 2 bag; {old[0]} is a ROS 1 bag: name that file")
                raise BagError(f"{folder}: is not a bag; a bag's folder holds metadata.yaml and .mcap or .db3 files")
            # A recorder that was killed before it wrote the metadata leaves one file, or several numbered files. If it
            # was compressing one, that file is there twice, and only the original is sure to be whole.
            twice = [file for file in present if file.suffix == ".zstd" and file.with_suffix("") in present]
            for file in twice:
                present.remove(file)
                self.findings.remarks.append(f"{file.name} was not read, because {file.stem} is there as well")
            if len(present) > 1:
                if not _are_numbered(present):
                    raise BagError(
                        f"{folder}: has {len(present)} files but no metadata.yaml, and they are not numbered like "
                        f"those of one bag: {_in_short(present)}; name one of them, or if all belong to one bag, "
                        f"ros2 bag reindex {folder} writes metadata.yaml"
                    )
                self.findings.remarks.append(
                    f"there is no metadata.yaml: {len(present)} files were read as one bag: {_in_short(present)}"
                )
            return present
        names = self._read_metadata(folder / "metadata.yaml")
        if not names:
            if not present:
                raise BagError(f"{folder}: cannot be read: it has no .mcap or .db3 file")
            self.findings.remarks.append(
                f"metadata.yaml names no files: these were read: {', '.join(file.name for file in present)}"
            )
            return present
        listed = _listed(folder, names)
        if missing := [file.name for file in listed if not file.is_file()]:
            raise BagError(
                f"{folder}: cannot be read: files that metadata.yaml names are missing: {', '.join(missing)}"
            )
        if unlisted := [file.name for file in present if file not in listed]:
            self.findings.remarks.append(f"metadata.yaml does not name {', '.join(unlisted)}, which was not read")
        return listed

    def _read_metadata(self, file: Path) -> list[str]:
        """Read declared counts and types, and return the names of the bag's files. Every key may be absent."""
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
                    f"{path}: is compressed as a whole, and there is no space for its content in "
                    f"{tempfile.gettempdir()}: {error.strerror}; set TMPDIR to another folder"
                ) from error
            path = plain
        with path.open("rb") as stream:
            begin, status = stream.read(16), os.fstat(stream.fileno())
        storage: StorageFile
        if begin.startswith(sqlite_file.MAGIC) or (path.suffix == ".db3" and not begin.startswith(mcap_file.MAGIC)):
            storage = SqliteFile(path)
        else:
            storage = McapFile(path)
        self._files.append(_File(name, path, status, storage))
        self.findings.damaged[name] = storage.damage
        if storage.unfinished:
            self.findings.remarks.append(f"{name}: {storage.unfinished}")
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
            self.findings.remarks.append(f"topics left out, because they are not in ROS 2's encoding: {named}")
        held: Counter[str] = Counter()
        for (topic, _), count in self.counts.items():
            held[topic] += count
        for topic, declared in sorted(self._declared.items()):
            if topic not in self.foreign and declared != held[topic]:
                self.findings.remarks.append(
                    f"{topic}: metadata.yaml declares {declared} messages, the files hold {held[topic]}"
                )


def _is_still(file: Path, before: os.stat_result) -> bool:
    """Whether a path is still that of the file with this status. A recorder may have added to the file since.

    Another inode number alone is no proof of another file, because some network file systems change the numbers.
    """
    try:
        now = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    another = not os.path.samestat(now, before) and now.st_mtime_ns != before.st_mtime_ns
    return now.st_size >= before.st_size and not another


def bag_information(file: Path) -> dict[str, Any]:
    """The rosbag2_bagfile_information of a metadata.yaml. Every key may be absent.

    Raises:
        ValueError: the file is damaged, or does not describe a bag.
        OSError: the file cannot be read.
    """
    try:
        # Not libyaml's faster loader, because deeply nested text makes it crash.
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # PyYAML raises many types, for example for a value unlike its tag or for deep nesting
        said = str(error) if isinstance(error, (ValueError, yaml.YAMLError)) else f"{type(error).__name__}: {error}"
        reason = " ".join(said.replace('in "<unicode string>", ', "").split())
        raise ValueError(
            f"metadata.yaml is damaged: {reason}; the bag may be readable without it, and ros2 bag reindex "
            f"{file.parent} writes a new one"
        ) from error
    content = tree.get("rosbag2_bagfile_information") if isinstance(tree, dict) else None
    if not isinstance(content, dict):
        raise ValueError("metadata.yaml has no rosbag2_bagfile_information; the bag may be readable without it")
    return content


def has_stored_name(name: str) -> bool:
    """Whether a file may belong to a bag, by its name. macOS writes `._drive_0.mcap` beside drive_0.mcap."""
    return not name.startswith(".") and name.removesuffix(".zstd").endswith(_SUFFIXES)


def stored_files(folder: Path) -> list[Path]:
    """The entries of a folder that may belong to a bag by their names, in the order of recording.

    Raises:
        OSError: the folder cannot be read.
    """
    return sorted((entry for entry in folder.iterdir() if has_stored_name(entry.name)), key=_natural)


def _listed(folder: Path, names: list[str]) -> list[Path]:
    return list(dict.fromkeys(_as_it_is_now(folder / name) for name in names))  # metadata may name a file twice


def own_files(folder: Path) -> list[Path]:
    """The files of a bag's folder, which must hold nothing else, so that the bag can be replaced.

    Raises:
        BagError: the folder is not a bag, or holds something that does not belong to the bag.
        OSError: the folder cannot be read.
    """
    try:
        if folder.is_symlink():  # its files are elsewhere
            raise ValueError
        names = _file_names(bag_information(folder / "metadata.yaml"))
    except (ValueError, FileNotFoundError, NotADirectoryError):
        raise BagError(f"{folder}: exists and is not a bag, so it is not replaced") from None
    own = {folder / "metadata.yaml", *(_as_it_is_now(folder / name) for name in names)}
    present = sorted(folder.iterdir())
    foreign = [entry.name for entry in present if entry not in own or entry.is_dir()]
    if foreign:
        raise BagError(f"{folder}: holds {foreign[0]}, which does not belong to the bag, so it is not replaced")
    return present


def _file_names(content: dict[str, Any]) -> list[str]:
    return [PurePath(name).name for name in _list(content, "relative_file_paths") if isinstance(name, str)]


def _list(content: dict[str, Any], key: str) -> list[Any]:
    found = content.get(key)
    return found if isinstance(found, list) else []


def _as_it_is_now(file: Path) -> Path:
    """The path of a file, or of its compressed or decompressed form if only that exists.

    The file may have been compressed or decompressed after its metadata was written.
    """
    other = file.with_suffix("") if file.suffix == ".zstd" else file.with_name(f"{file.name}.zstd")
    return other if other.is_file() and not file.exists() else file


def _natural(path: Path) -> list[Any]:
    """Sorting key by which bag_2.db3 comes before bag_10.db3."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _are_numbered(files: list[Path]) -> bool:
    """Whether sorted files are numbered as rosbag2 numbers the files of one bag: drive_0.mcap, drive_1.mcap."""
    found = [re.fullmatch(r"(.+)_(0|[1-9]\d*)(\.\w+)", file.name.removesuffix(".zstd")) for file in files]
    parts = [match.groups() for match in found if match is not None]
    first = int(parts[0][1]) if parts else 0
    return len({(stem, suffix) for stem, _, suffix in parts}) == 1 and [int(number) for _, number, _ in parts] == list(
        range(first, first + len(files))
    )


def _in_short(files: list[Path]) -> str:
    """The names of sorted files; of more than four, only the first and the last name."""
    names = [file.name for file in files]
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} to {names[-1]}"


def is_unfinished(bag: Path) -> bool:
    """Whether a file of a bag is still being written, or was not finished.

    Such an MCAP file lacks its end, and such an SQLite file has a write-ahead log.
    """

    def is_open(file: Path) -> bool:
        if file.suffix == ".mcap":
            with file.open("rb") as stream:
                stream.seek(-min(len(mcap_file.MAGIC), file.stat().st_size), os.SEEK_END)
                return stream.read() != mcap_file.MAGIC
        return file.with_name(f"{file.name}-wal").exists()

    return any(is_open(file) for file in (stored_files(bag) if bag.is_dir() else [bag]) if file.is_file())


def is_recording(file: Path) -> bool:
    """Whether a file begins with the magic bytes of MCAP, SQLite or zstd."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(16).startswith((mcap_file.MAGIC, sqlite_file.MAGIC, _ZSTD))
