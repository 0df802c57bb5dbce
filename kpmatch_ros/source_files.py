"""The files that something is read from, which nothing is to be written over."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kpmatch_ros.parameters import Parameters
from kpmatch_ros.weights import REGISTRY

__all__ = ["files_read", "named_files", "overwritten"]

_OF_WEIGHTS = ("extractor", "matcher")  # parameters that name what is registered, or files
_OF_FILES = (*_OF_WEIGHTS, "mask", "mask_right")  # parameters that may name files
_IN_WEIGHTS = ("config.json", "model.safetensors", "pytorch_model.bin")  # what is read of a folder of weights


def named_files(parameters: Parameters) -> dict[str, Path]:
    """The files and folders that parameters name and that exist, by parameter.

    What is registered is none, whatever lies here.
    """
    found = {}
    for name in _OF_FILES:
        text = getattr(parameters, name)
        if not text or (name in _OF_WEIGHTS and (text in REGISTRY or text == "nearest")):
            continue
        try:
            path = Path(text).expanduser()
            if path.exists():
                found[name] = path
        except (OSError, RuntimeError, ValueError):  # a name that is too long, ~nobody, a zero byte
            continue
    return found


def files_read(parameters: Parameters) -> list[Path]:
    """The files that parameters name, and those that are read of the folders that they name."""
    named = named_files(parameters).values()
    return [file for path in named for file in ([path / name for name in _IN_WEIGHTS] if path.is_dir() else [path])]


def overwritten(place: Path, sources: Iterable[Path]) -> Path | None:
    """The source that a file written to that place would change; None where there is none.

    All that lies in a folder belongs to it. Names are compared by what they lead to: symbolic and hard links hide no
    source.
    """
    real = place.resolve()
    try:
        there = real.stat()
    except OSError:  # nothing yet
        there = None
    for source in sources:
        target = source.resolve()
        if target == real or target in real.parents:
            return source
        if there is not None and any(_is(file, there) for file in (target.iterdir() if target.is_dir() else [target])):
            return source
    return None


def _is(file: Path, there: os.stat_result) -> bool:
    try:
        return os.path.samestat(file.stat(), there)
    except OSError:
        return False
