"""The weights that are known by name: licence, origin, size, hash, and where they lie on this machine."""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

__all__ = ["REGISTRY", "Weights", "WeightsError", "cache_folder", "fetch", "find", "file_hash", "resolve", "verify"]


class WeightsError(ValueError):
    """Weights are missing, damaged, or made for something else; the text says which and what to do."""


@dataclass(frozen=True)
class Weights:
    """Registered weights.

    Attributes:
        name: what the parameters ``extractor`` and ``matcher`` call them.
        model: the network they are for, ``superpoint`` or ``lightglue``.
        licence: SPDX name of their licence.
        commercial: whether the licence allows commercial use.
        origin: who made them, from what.
        size: of the file, bytes.
        sha256: of the file, hexadecimal.
        packaged: folder inside the package that holds them, or empty.
        url: where they are fetched from, or empty where they come with the package.
        extractor: for a matcher, the extractor it was made for.
    """

    name: str
    model: str
    licence: str
    commercial: bool
    origin: str
    size: int
    sha256: str
    packaged: str = ""
    url: str = ""
    extractor: str = ""

    @property
    def file(self) -> Path:
        """Where the tensors lie, or would lie once fetched."""
        if self.packaged:
            return Path(str(resources.files("kpmatch_ros"))) / self.packaged / "model.safetensors"
        return cache_folder() / self.name / self.url.rsplit("/", 1)[-1]

    @property
    def path(self) -> Path:
        """What to read: the folder where there is a config.json beside the tensors, otherwise the file."""
        return self.file.parent if self.packaged else self.file


_OPEN_PAIR = dict(
    licence="Apache-2.0",
    commercial=True,
    size=27_527_212,
    sha256="12b9e8d58c34b8e254e62998f07e4a6d933b7b49af9696f20a8981a5012f083b",
    packaged="data/kpmatch-superpoint-lightglue",
)

REGISTRY: dict[str, Weights] = {
    item.name: item
    for item in (
        Weights(
            name="superpoint-open",
            model="superpoint",
            origin="trained for this package as a student of ALIKED-n16 (BSD-3-Clause)",
            **_OPEN_PAIR,  # type: ignore[arg-type]
        ),
        Weights(
            name="lightglue-superpoint-open",
            model="lightglue",
            extractor="superpoint-open",
            origin="ALIKED's LightGlue (Apache-2.0), fine-tuned for this package on superpoint-open's features",
            **_OPEN_PAIR,  # type: ignore[arg-type]
        ),
    )
}


def cache_folder() -> Path:
    """Where fetched weights are kept: ``$KPMATCH_WEIGHTS``, or ``kpmatch_ros`` in the user's cache folder."""
    chosen = os.environ.get("KPMATCH_WEIGHTS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpmatch_ros"


def find(name: str) -> Weights:
    """The registered weights called ``name``.

    Raises:
        WeightsError: when there are none.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise WeightsError(
            f"no weights are called {name!r} and there is no such file; registered are {', '.join(REGISTRY)} "
            "(kpmatch weights list)"
        ) from None


def resolve(source: str | Path) -> Path:
    """Turn a registered name, a folder or a file into a path that exists and, where registered, has the right hash.

    Raises:
        WeightsError: when there is nothing there, or not what was registered.
    """
    if str(source) in REGISTRY:
        item = REGISTRY[str(source)]
        verify(item)
        return item.path
    path = Path(source).expanduser()
    if not path.exists():
        find(str(source))
    return path


def verify(item: Weights) -> None:
    """Check that the file is there and is the one registered.

    Raises:
        WeightsError: when it is not.
    """
    remedy = f"kpmatch weights fetch {item.name}" if item.url else "install kpmatch_ros again"
    if not item.file.exists():
        raise WeightsError(f"the weights {item.name} are not on this machine ({item.file}): {remedy}")
    status = item.file.stat()
    found = _hash_of_version(item.file, status.st_size, status.st_mtime_ns)
    if found != item.sha256:
        raise WeightsError(
            f"{item.file} is not the registered {item.name}: its SHA-256 is {found}, not {item.sha256}; it is damaged "
            f"or was replaced: {remedy}"
        )


@lru_cache(maxsize=16)
def _hash_of_version(path: Path, size: int, modified: int) -> str:
    """Hashed once for each state of the file: extractor and matcher often share one."""
    return file_hash(path)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(name: str, progress: Callable[[int], None] = lambda size: None) -> Path:
    """Fetch registered weights into the cache, unless they are there, and check their hash.

    The file appears under its name only when it is whole, so that a fetch cut half-way, or two at once, leave nothing
    broken behind.

    Args:
        progress: called with the number of bytes of each block received.

    Raises:
        WeightsError: when the name is unknown, the server cannot be reached, or sends something else.
    """
    item = find(name)
    with contextlib.suppress(WeightsError):
        verify(item)
        return item.path
    if not item.url:
        verify(item)
    partial = None
    try:
        item.file.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=item.file.parent, suffix=".part")
        digest, received = hashlib.sha256(), 0
        with os.fdopen(handle, "wb") as stream, urllib.request.urlopen(item.url, timeout=30) as response:
            while block := response.read(1 << 16):
                digest.update(block)
                stream.write(block)
                received += len(block)
                progress(len(block))
        if digest.hexdigest() != item.sha256:
            raise WeightsError(
                f"{item.url} sent {received} bytes with SHA-256 {digest.hexdigest()}, not the registered {item.size} "
                f"bytes with {item.sha256}; nothing was kept: try again, or put the file at {item.file} yourself"
            )
        os.chmod(partial, 0o644)  # temporary files are private; a cache may be shared
        os.replace(partial, item.file)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{name} could not be fetched from {item.url} ({error}); fetch it on another machine, put it at "
            f"{item.file}, and run kpmatch weights info {name}"
        ) from error
    finally:
        if partial is not None and os.path.exists(partial):
            os.unlink(partial)
    return item.path
