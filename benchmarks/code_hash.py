"""Tells what one code worked out from what another one did: for the names of what benchmarks and trainings keep."""

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

SUFFIXES = (".py", ".so", ".safetensors")  # code, what was compiled of it, and weights


def versions() -> dict[str, str]:
    """What figures depend on besides the code and the weights."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def hash_of_code(files: Iterable[Path], **settings: object) -> str:
    """12 hexadecimal digits that tell code and weights, versions and settings from all others.

    Args:
        files: code and weights; files of other kinds do not count. Where their folder lies does not count either.
        settings: what JSON can hold.
    """
    digest = hashlib.sha256(json.dumps([versions(), settings], sort_keys=True).encode())
    chosen = {path for path in files if path.suffix in SUFFIXES}
    for path in sorted(chosen, key=lambda each: (each.name, each.parent.name)):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]
