"""Protects input files: finds the files that a command reads and must not overwrite."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from kpmatch_ros.parameters import Parameters
from kpmatch_ros.weights import REGISTRY, Hub, Weights, hash_in_use

__all__ = ["changeable_weights", "files_read", "named_files", "overwritten", "registered_weights"]

_OF_WEIGHTS = ("extractor", "matcher")  # parameters that hold a registered name or a file
_OF_FILES = (*_OF_WEIGHTS, "mask", "mask_right")  # parameters that may hold a file
_IN_WEIGHTS = ("config.json", "model.safetensors", "pytorch_model.bin")  # files read from a folder of weights


def named_files(parameters: Parameters) -> dict[str, Path]:
    """Return the existing files and folders that the parameters name, by parameter.

    A registered name never counts as a file, even if a file with that name exists.
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
        except (OSError, RuntimeError, ValueError):  # for example, a name too long, ~unknown_user, a null byte
            continue
    return found


def files_read(parameters: Parameters) -> list[Path]:
    """Return the files that the parameters name, and the files that are read from the folders they name."""
    named = named_files(parameters).values()
    return [file for path in named for file in ([path / name for name in _IN_WEIGHTS] if path.is_dir() else [path])]


def registered_weights(parameters: Parameters) -> list[Weights]:
    """Return the registered weights that the parameters name."""
    return [REGISTRY[name] for name in (parameters.extractor, parameters.matcher) if name in REGISTRY]


def changeable_weights(parameters: Parameters) -> dict[str, str]:
    """Return the hashes of the registered weights that the parameters name, if their owner may replace the file."""
    changeable = (item for item in registered_weights(parameters) if isinstance(item.source, Hub))
    return {f"content of {item.name}": hash_in_use(item) for item in changeable}


def overwritten(place: Path, sources: Iterable[Path]) -> Path | None:
    """Return the source that writing to ``place`` would change; None if there is none.

    A source that is a folder includes everything in it. Symbolic and hard links are followed.
    """
    real = place.resolve()
    try:
        there = real.stat()
    except OSError:  # the place does not exist yet
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
