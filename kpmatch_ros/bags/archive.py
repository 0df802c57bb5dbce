"""Replays all bags below a folder as `kpmatch bag` does. `kpmatch archive` writes the figures of all into one table.

Ray schedules the bags and places them on several machines. This module makes a bag's result complete or absent, so that
any worker may die and any run can be resumed. It also counts the processes that died while they replayed a bag, so that
one bag does not stop the others.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kpmatch_ros
from kpmatch_ros.bags.archive_table import TABLES, Row
from kpmatch_ros.bags.cameras import UnsuitableError, choose_cameras
from kpmatch_ros.bags.reading import Bag
from kpmatch_ros.bags.recording import BagError, ChangedError, OutputError, has_stored_name, is_unfinished, stored_files
from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.source_files import changeable_weights, named_files
from kpmatch_ros.weights import WeightsError, file_hash

__all__ = [
    "ATTEMPTS",
    "WRITTEN",
    "Job",
    "Settings",
    "claimed",
    "find_bags",
    "finished_row",
    "jobs_for",
    "replay_one",
]

ATTEMPTS = 4
"""Attempts for a bag whose process dies each time, for example for lack of memory."""

_ROW = "kpmatch_archive.json"  # in the target folder of each finished bag
_SETTINGS = "archive.json"
_FIGURES = (
    *("frames", "rate", "latency_ms", "matches", "inliers", "poses", "breaks", "odometry_breaks"),
    *("unpaired", "rejected"),
)
WRITTEN = (*TABLES, _SETTINGS)
"""Names of the files that a run replaces in its output folder."""
_ATTEMPTS = ".attempts"  # folder beside .unfinished: the counts must survive a run that is killed
_SAMPLE = 4096  # bytes hashed at the beginning of a file, and at its end
_OF_THE_MACHINE = ("device", "threads")  # parameters that may differ between machines
# Parameters without effect on a replay: only the node uses them, and a profile is a name for other parameters.
_WITHOUT_EFFECT = ("autostart", "bond_heartbeat_period", "image_transport", "profile", "queue")


@dataclass(frozen=True)
class Settings:
    """How bags are replayed.

    Attributes:
        parameters: as the node's.
        topics: the topics that the user named, see :func:`kpmatch_ros.bags.cameras.choose_cameras`.
        features, match_image, landmarks: write these topics too.
        poses, report: write poses.txt and report.html into each bag's target folder too.
    """

    parameters: Parameters
    topics: Mapping[str, str | None]
    features: bool = False
    match_image: bool = False
    landmarks: bool = False
    poses: bool = False
    report: bool = False

    def with_whole_paths(self) -> Settings:
        """The settings with absolute paths: they stay valid in another working directory, as on another machine."""
        whole = {name: str(path.resolve()) for name, path in named_files(self.parameters).items()}
        return dataclasses.replace(self, parameters=self.parameters.replace(whole))

    def described(self) -> dict[str, Any]:
        """The settings that affect the results, as a dict for JSON."""
        chosen, excluded = dataclasses.asdict(self.parameters), (*_OF_THE_MACHINE, *_WITHOUT_EFFECT)
        parameters = {name: value for name, value in chosen.items() if name not in excluded}
        topics = {name: topic for name, topic in self.topics.items() if topic is not None}
        contents = {f"content of {name}": _digest(path) for name, path in named_files(self.parameters).items()}
        contents |= changeable_weights(self.parameters)
        return {
            "version": kpmatch_ros.__version__,
            **parameters,
            **contents,
            **topics,
            **{name: getattr(self, name) for name in ("features", "match_image", "landmarks", "poses", "report")},
        }


@dataclass(frozen=True)
class Job:
    """One bag to replay.

    Attributes:
        name: path of the bag relative to the folder that was searched.
        source: the bag to read.
        target: folder to write.
        unfinished: folder on the same file system, for incomplete results.
        attempts: file with one byte for each attempt that has not ended. It exists only while an attempt runs, or
            after a process has died.
    """

    name: str
    source: Path
    target: Path
    unfinished: Path
    attempts: Path

    @property
    def begun(self) -> int:
        """The number of attempts that have not ended, for example because their process died."""
        try:
            return self.attempts.stat().st_size
        except FileNotFoundError:
            return 0

    def forget_attempts_after(self, begun: int) -> None:
        """Reduce the count to `begun` attempts: the later ones have ended, or were stopped from outside."""
        if begun == 0:
            self.attempts.unlink(missing_ok=True)
        elif self.begun > begun:
            with suppress(FileNotFoundError):  # another worker that is still alive has removed it
                os.truncate(self.attempts, begun)

    @classmethod
    def of(cls, bag: Path, folder: Path, out: Path, unfinished: Path) -> Job:
        """The job for a bag below a folder. Its target has the same relative place below `out`."""
        name = bag.relative_to(folder)
        # Hashed, because the name contains slashes and may be as long as the file system allows.
        attempts = out / _ATTEMPTS / hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        if bag.is_dir():
            return cls(str(name), bag, out / name, unfinished, attempts)
        plain, packed = (name.with_suffix(""), "_zstd") if name.suffix == ".zstd" else (name, "")
        target = name.with_name(f"{plain.stem}_{plain.suffix[1:]}{packed}")
        return cls(str(name), bag, out / target, unfinished, attempts)


def find_bags(folder: Path, out: Path | None = None) -> list[Path]:
    """The bags below a folder, sorted.

    A bag is a folder with metadata.yaml, a folder whose first file is named after it (drive/drive_0.mcap), or any other
    .mcap or .db3 file, also with .zstd appended, or .bag file. A folder that cannot be read counts as a bag, so that
    the table names it. Everything inside `out` is left out, also where links lead there: the archive wrote it.

    Raises:
        BagError: there is no bag, or the folder itself is one.
    """
    found: list[Path] = []
    seen: set[str] = set()
    tops = deque([folder])

    def unreadable(error: OSError) -> None:
        found.append(Path(error.filename))

    while tops:
        for place, folders, files in os.walk(tops.popleft(), onerror=unreadable):
            here, real = Path(place), os.path.realpath(place)
            files = [name for name in files if not ((here / name).is_symlink() and _is_own(here / name, folder, out))]
            if real in seen or _is_own(here, folder, out):  # circular links, or links to the archive's own output
                folders.clear()
            elif _is_bag(here, files):
                found.append(here)
                folders.clear()
            else:
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                # Links are followed last, so that a bag is named after its real place: "latest" changes its target.
                tops += [here / name for name in folders if (here / name).is_symlink()]
                # The replay refuses ROS 1 bags, and names the tool that converts them.
                ros1 = [name for name in files if name.endswith(".bag") and not name.startswith(".")]
                found += [here / name for name in files if has_stored_name(name) or name in ros1]
            seen.add(real)
    if found == [folder]:
        raise BagError(f"{folder}: is a single bag, not a folder with bags; kpmatch bag replays it")
    if not found:
        raise BagError(f"{folder}: there is no bag in it: no folder with metadata.yaml, no .mcap and no .db3 file")
    return sorted(found)


def jobs_for(bags: list[Path], folder: Path, out: Path, unfinished: Path) -> list[Job]:
    """A job for each bag below a folder.

    Raises:
        BagError: two bags have the same target, or one target is inside another bag's target or inside the folder that
            was searched.
    """
    jobs = [Job.of(bag, folder, out, unfinished) for bag in bags]
    taken: dict[Path, Job] = {}
    for job in jobs:
        other = taken.setdefault(job.target, job)
        if other is not job:
            raise BagError(f"{job.source}: would be written to {job.target}, like {other.source}; rename one of them")
    for job in jobs:
        if folder in job.target.parents:  # the next run would read it, or it replaces a recording
            raise BagError(
                f"{job.source}: would be written to {job.target}, below {folder}; choose another output folder"
            )
        for place in job.target.parents:
            if place in taken:
                raise BagError(
                    f"{taken[place].source}: would be written to {place}, which also holds the output of {job.source}; "
                    "rename one of them"
                )
    return jobs


def _is_own(place: Path, folder: Path, out: Path | None) -> bool:
    """Whether a place is inside `out`, and not inside the searched folder (which itself may be inside `out`)."""
    real = Path(os.path.realpath(place))
    inside = (real, *real.parents)
    return out is not None and out.resolve() in inside and folder.resolve() not in inside


def _is_bag(folder: Path, files: list[str]) -> bool:
    stored = list(filter(has_stored_name, files))
    if "metadata.yaml" not in files:  # a killed recorder leaves none
        numbers = (name.partition(f"{folder.name}_") for name in stored)
        return any(not before and after.split(".")[0].isdigit() for before, _, after in numbers)
    try:
        text = (folder / "metadata.yaml").read_text(errors="replace")
    except OSError:
        return True  # so that the table names it
    return bool(stored) or "rosbag2_bagfile_information" in text


@contextmanager
def claimed(out: Path, settings: Settings) -> Iterator[Path]:
    """Lock an archive for this run, and give the folder for incomplete results in it.

    The folder is emptied at the start and removed at the end. The counts of attempts are kept until a run reaches its
    end.

    Raises:
        BagError: another run writes to the archive, it was made with other settings, or something else is in the way.
        OSError: the archive cannot be written.
    """
    out.mkdir(exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BagError(f"{out}: another kpmatch archive is writing to it; wait until it ends, or stop it") from None
        except OSError:
            pass  # a file system without locks
        unfinished = out / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        attempts = out / _ATTEMPTS
        attempts.mkdir(exist_ok=True)
        try:
            _check_settings(out / _SETTINGS, unfinished, settings.described())
            yield unfinished
            shutil.rmtree(attempts, ignore_errors=True)  # each bag has its row
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            with suppress(OSError):  # not empty: some attempts are counted
                attempts.rmdir()


def _check_settings(file: Path, unfinished: Path, settings: dict[str, Any]) -> None:
    """Refuse other settings than the archive was begun with.

    The figures of bags that were replayed with different settings cannot be compared. Until a first bag is finished,
    other settings are accepted, and replace those in `file`.
    """
    begun = next(file.parent.rglob(_ROW), None) is not None
    before = _settings_in(file) if os.path.lexists(file) else None
    if before is None and not begun:
        for table in (file.with_name(name) for name in TABLES):
            if os.path.lexists(table):
                raise _foreign(table)
    if before is None or not begun:
        (unfinished / file.name).write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(unfinished / file.name, file)
        return
    differing = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise BagError(
            f"{file.parent}: was started with {name} {before.get(name)!r}, but now it is {settings.get(name)!r}"
            f"{more}; use the same settings, or choose another output folder"
        )


def _settings_in(file: Path) -> dict[str, Any]:
    """The settings that an earlier run wrote. Raises BagError if kpmatch archive did not write the file."""
    try:
        before = dict(json.loads(file.read_text()))
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError):  # a broken link, a folder, other text
        before = {}
    if not {"version", "features", "match_image"} <= before.keys():
        raise _foreign(file)
    return before


def _foreign(file: Path) -> BagError:
    return BagError(f"{file}: was not written by kpmatch archive; choose another output folder")


def finished_row(job: Job) -> Row | None:
    """The figures of a bag that is finished; None if it is not, or if the target was made from another bag."""
    row = _row_in(job.target)
    if row is None:
        return None
    try:
        same = row.get("source") in (None, _source(job.source))
    except OSError:
        same = True
    return row if same else None


def _row_in(target: Path) -> Row | None:
    try:
        return dict(json.loads((target / _ROW).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _source(bag: Path) -> str:
    """A hash that distinguishes a bag from others of the same name.

    It covers metadata.yaml, and the size, beginning and end of each file, including SQLite's write-ahead logs, which
    may hold the last messages. It does not cover file names: the metadata names the files that are read. The metadata
    is not parsed, because that takes longer than all the rest, and because it may be damaged.

    Raises:
        OSError: the bag cannot be read.
    """
    found = hashlib.sha256()
    files = stored_files(bag) if bag.is_dir() else [bag]
    if (metadata := bag / "metadata.yaml").is_file():
        found.update(metadata.read_bytes())
    parts = [part for file in files for part in (file, file.with_name(f"{file.name}-wal"))]
    for file in filter(Path.is_file, parts):  # no broken links, no folders
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            for place in (0, max(size - _SAMPLE, 0)) if size else ():
                stream.seek(place)
                found.update(size.to_bytes(8, "little") + stream.read(_SAMPLE))
    return found.hexdigest()[:16]


def _digest(path: Path) -> str:
    """A hash of the name and content of a file, or of each file in a folder."""
    files = [file for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    lines = "\n".join(f"{file.name} {file_hash(file)}" for file in files)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]


class _NotKept(Exception):
    """The result cannot be kept, although the bag is not broken. The text says why, and what to do."""


def _changed(bag: Path) -> _NotKept:
    return _NotKept(
        f"{bag}: changed while it was read, for example because it is still being copied; when it is complete, run the "
        "same command again"
    )


def replay_one(job: Job, settings: Settings) -> Row:
    """Replay a bag, and return its row. The target appears, with its figures, only when the whole replay is done.

    A bag that is already done is not replayed again: its worker may have died afterwards. A bag is skipped once
    ATTEMPTS processes have died while they replayed it.

    Raises:
        ParameterError, WeightsError: no bag can be replayed with these settings.
        OutputError, OSError: the target cannot be written.
    """
    if (done := finished_row(job)) is not None:
        return done
    if settings.report and importlib.util.find_spec("plotly") is None:
        raise ParameterError(
            f"--report: the page needs plotly, which is not installed on {socket.gethostname()}: pip install plotly"
        )
    row: Row = {"bag": job.name, "where": f"{socket.gethostname()}:{os.getpid()}"}
    begun, kept = job.begun, 0
    if begun >= ATTEMPTS:
        return row | {
            "state": "failed",
            "message": f"{job.source}: is skipped, because {begun} processes died while they replayed it, for "
            "example because memory ran out; try it alone with kpmatch bag",
        }
    with job.attempts.open("ab") as file:
        file.write(b".")
    try:
        return _replay(job, settings, row)
    except BaseException as error:
        kept = 0 if isinstance(error, Exception) else begun  # stopped from outside: this says nothing about the bag
        raise
    finally:  # this process is alive, so its own attempt does not count
        job.forget_attempts_after(kept)


def _replay(job: Job, settings: Settings, row: Row) -> Row:
    """Make one attempt, and return its row, see :func:`replay_one`. `row` holds the columns known before it."""
    started = time.perf_counter()
    try:
        before = _row_in(job.target)
        if before is not None and not before.get("unfinished"):
            raise _NotKept(
                f"{job.target}: was made from another bag than {job.source}, or from an earlier version of it; remove "
                "it, or choose another output folder"
            )
        for place in (job.target, *job.target.parents):
            if os.path.lexists(place) and ((place == job.target and before is None) or not place.is_dir()):
                raise BagError(f"{place}: exists, and kpmatch archive did not make it; remove it")
        source = _source(job.source)
        with Bag(job.source) as bag, tempfile.TemporaryDirectory(dir=job.unfinished) as folder:
            cameras = choose_cameras(bag, settings.parameters.mode, settings.topics)
            beside = Path(folder) / "bag" / job.target.name  # in bag/: the name may be poses.txt or report.html
            beside.parent.mkdir()
            poses = Path(folder) / "poses.txt" if settings.poses else None
            page = Path(folder) / "report.html" if settings.report else None
            # Imported here, because PyTorch takes seconds to load: a folder without bags and Ray's driver do without.
            import torch

            from kpmatch_ros.bags.replay import replay
            from kpmatch_ros.runtime.device import choose_runtime, format_name

            device, precision = choose_runtime(settings.parameters)
            try:
                report = replay(
                    bag, beside, cameras, settings.parameters,
                    features=settings.features, match_image=settings.match_image, landmarks=settings.landmarks,
                    poses=poses, page=page,
                )  # fmt: skip
                for file in filter(None, (poses, page)):
                    os.replace(file, beside / file.name)
            except ChangedError as error:
                raise _changed(job.source) from error
            except BagError as error:  # its text names temporary paths
                text = str(error).replace(str(beside), str(job.target)).replace(folder, str(job.target))
                raise type(error)(text) from error
            if _source(job.source) != source:
                raise _changed(job.source)
            figures = report.figures()
            whole = row | {name: figures.get(name) for name in _FIGURES}
            whole |= {"state": "done", "message": "; ".join(report.faults), "recorded": round(report.recorded, 3)}
            whole |= {"device": str(device), "precision": format_name(precision)}
            whole |= {"threads": torch.get_num_threads(), "unfinished": is_unfinished(job.source)}
            whole |= {"seconds": round(time.perf_counter() - started, 3), "source": source}
            (beside / _ROW).write_text(json.dumps(whole))
            job.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if before is not None:  # made when the bag was incomplete
                    os.replace(job.target, Path(folder) / "before")
                os.replace(beside, job.target)
            except OSError as error:
                # Ray may have taken another worker for lost and started this one; the other may have finished first.
                if (done := finished_row(job)) is not None:
                    return done
                if error.errno != errno.EXDEV:
                    raise
                raise _NotKept(
                    f"{job.target}: the result cannot be moved there, because {job.target.parent} is on another file "
                    f"system than {job.unfinished.parent}; choose another output folder"
                ) from error
            return whole
    except OutputError:  # without space for this bag, there is none for the next one either
        raise
    except BagError as error:
        row |= {"state": "unsuitable" if isinstance(error, UnsuitableError) else "broken", "message": str(error)}
    except _NotKept as error:
        row |= {"state": "failed", "message": str(error)}
    except (ParameterError, WeightsError):
        raise
    except OSError as error:
        if not _is_of(job.source, error):
            raise
        row |= {"state": "broken", "message": f"{error.filename}: {error.strerror}"}
    except Exception as error:  # noqa: BLE001 - a fault of this program in one bag of many
        row |= {"state": "failed", "message": f"{job.source}: an unexpected error, {type(error).__name__}: {error}"}
    row["seconds"] = round(time.perf_counter() - started, 3)
    return row


def _is_of(bag: Path, error: OSError) -> bool:
    """Whether an error concerns one of the bag's own files, and not the output."""
    named = isinstance(error.filename, (str, os.PathLike))
    return named and bag in (file := Path(error.filename), *file.parents)
