"""The files of registered weights on this machine: checking and fetching them."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from kpmatch_ros.shell import in_shell
from kpmatch_ros.weights.registry import REGISTRY, Weights, WeightsError, find
from kpmatch_ros.weights.sources import Hub, Packaged, Wheel

__all__ = ["Presence", "expected_hash", "fetch", "file_hash", "hash_in_use", "presence", "resolve", "verify"]

_LOG = logging.getLogger(__name__)


def resolve(source: str | Path) -> Path:
    """Turn a registered name, a folder or a file into an existing path; a registered file is checked by its hash.

    Nothing is fetched, so that a robot needs no network to start.

    Raises:
        WeightsError: the path does not exist, or the file is not the registered one.
    """
    if str(source) in REGISTRY:
        item = REGISTRY[str(source)]
        verify(item)
        return item.path
    try:
        path = Path(source).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, ~nobody, a NUL character
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"no weights are called {str(source)!r:.80}, and it is not a path: {reason}") from error
    if not there:
        find(str(source))
    elif not (path.is_file() or path.is_dir()):
        raise WeightsError(f"{path} is neither a file nor a folder (perhaps a FIFO or a device): name a file")
    return path


class Presence(NamedTuple):
    """State of registered weights on this machine.

    Attributes:
        word: ``yes``; ``no`` if there are none; ``DAMAGED`` if the file is incomplete or not the registered one;
            ``UNREADABLE`` if it is not a regular file or the system refuses to read it.
        fault: the reason why they cannot be used; empty if they can.
        remedy: the instruction that solves the problem.
    """

    word: str
    fault: str = ""
    remedy: str = ""


def presence(item: Weights) -> Presence:
    """Check that all files exist and are the registered ones, or for the hub that they are complete and unchanged."""
    packaged = isinstance(item.source, Packaged)
    remedy = "install kpmatch_ros again" if packaged else in_shell(f"kpmatch weights fetch {item.name}")
    file, *beside = item.files
    for each in (file, *beside):
        try:
            regular = stat.S_ISREG(each.stat().st_mode)
            if regular:  # opening a FIFO would block for ever
                each.open("rb").close()
        except (FileNotFoundError, NotADirectoryError):
            if each != file:
                return Presence("DAMAGED", f"{each}, which belongs to {item.name}, is missing", remedy)
            terms = "" if packaged else f" ({item.terms})"
            place = f"neither in the Hugging Face cache nor at {file}" if isinstance(item.source, Hub) else str(file)
            return Presence("no", f"the weights {item.name}{terms} are not on this machine ({place})", remedy)
        except OSError as error:
            return _unreadable(each, error, remedy)
        if not regular:
            return Presence("UNREADABLE", f"{each} is not a regular file", f"remove it, then {remedy}")
    try:
        fault = _fault(item, file)
    except OSError as error:
        return _unreadable(file, error, remedy)
    return Presence("DAMAGED", fault, remedy) if fault else Presence("yes")


def _unreadable(file: Path, error: OSError, remedy: str) -> Presence:
    reason = error.strerror or str(error)
    return Presence(
        "UNREADABLE", f"{file} cannot be read ({reason})", f"let this user read it, or remove it, then {remedy}"
    )


def _fault(item: Weights, file: Path) -> str:
    """Why a file is not the registered one, as far as this can be checked; empty if no fault was found."""
    expected = expected_hash(item)
    if expected:
        status = file.stat()
        found = _hash_of_version(file, status.st_size, status.st_mtime_ns)
        if found == expected:
            return ""
        return (
            f"{file} is not the registered {item.name}: its SHA-256 is {found}, not {expected}; it is damaged or was "
            "replaced"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy"):  # it compares the file's length with the header
            pass
    except SafetensorError as error:
        return f"{file} is damaged or truncated ({error})"
    return ""


def verify(item: Weights) -> None:
    """Check that all files exist and are the registered ones, or for the hub that they are complete and unchanged.

    Raises:
        WeightsError: they are not; the text gives the remedy.
    """
    here = presence(item)
    if here.fault:
        raise WeightsError(f"{here.fault}: {here.remedy}")


def expected_hash(item: Weights) -> str:
    """Expected SHA-256 of the file of ``item``, hexadecimal; empty if it is unknown."""
    return item.source.hash(item.file) if isinstance(item.source, Hub) else item.sha256


def hash_in_use(item: Weights) -> str:
    """SHA-256 of the file of ``item``, hexadecimal: the expected one, or if that is unknown, of the file that is here.

    Empty if there is no file.
    """
    return expected_hash(item) or (file_hash(item.file) if item.file.is_file() else "")


@lru_cache(maxsize=16)
def _hash_of_version(path: Path, size: int, modified: int) -> str:
    """Hash a file once for each of its versions: extractor and matcher often share a file."""
    return file_hash(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(
    name: str,
    announce: Callable[[str], None] = _LOG.warning,
) -> Path:
    """Fetch registered weights unless they are on this machine, and check their hash.

    They are stored in the cache; weights of the hub in the cache of ``huggingface_hub``. A file gets its name only when
    it is complete, so that an interrupted fetch, or two at the same time, leave no damaged file.

    Args:
        name: a name in REGISTRY.
        announce: called before fetching, with a text that names the weights, their source and their licence.

    Returns:
        The path to read, as from :func:`resolve`.

    Raises:
        WeightsError: the name is unknown, the source cannot be reached, or it sends a different file.
    """
    item = find(name)
    here = presence(item)
    if here.word == "yes":
        return item.path
    if isinstance(item.source, Packaged) or here.word == "UNREADABLE":
        raise WeightsError(f"{here.fault}: {here.remedy}")
    announce(f"{name}: from {item.source}, by {item.origin}. Licence: {item.terms}")
    target = item.file
    try:
        if isinstance(item.source, Hub):
            item.source.fetch(again=here.word == "DAMAGED")
        else:
            _fetch_file(item, item.source, target)
    except OSError as error:
        where = f"and its config.json in {target.parent}" if isinstance(item.source, Hub) else f"at {target}"
        raise WeightsError(
            f"{name} could not be fetched from {item.source} ({error}); fetch it on another machine, put it {where}, "
            f"and run {in_shell(f'kpmatch weights info {name}')}"
        ) from error
    verify(item)
    return item.path


def _fetch_file(item: Weights, source: Wheel, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    partial = Path(name)
    try:
        source.save(partial)
        found, size = file_hash(partial), partial.stat().st_size
        if found != item.sha256:
            raise WeightsError(
                f"{source} sent {size} bytes with SHA-256 {found}, not the registered {item.size} bytes with "
                f"{item.sha256}; nothing was kept: try again, or put the file at {target} yourself"
            )
        partial.chmod(0o644)  # temporary files are private; a cache may be shared
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
