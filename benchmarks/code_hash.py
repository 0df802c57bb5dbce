"""Hashes of code, for the names of cached results of benchmarks and trainings."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch

__all__ = ["hash_of_code", "versions"]

SUFFIXES = (".py", ".so", ".safetensors")  # code, compiled code, and weights


def versions() -> dict[str, str]:
    """Return the versions that figures depend on besides the code and the weights."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def hash_of_code(files: Iterable[Path], **settings: object) -> str:
    """Return 12 hexadecimal digits that identify code, weights, versions and settings.

    Args:
        files: code and weights; other kinds of files are ignored. The location of their folder does not matter.
        settings: values that JSON can represent.
    """
    digest = hashlib.sha256(json.dumps([versions(), settings], sort_keys=True).encode())
    chosen = {path for path in files if path.suffix in SUFFIXES}
    for path in sorted(chosen, key=lambda each: (each.name, each.parent.name)):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
