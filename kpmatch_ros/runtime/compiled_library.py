"""Opens what the build of the ROS package compiled and has put beside the modules."""

from __future__ import annotations

import ctypes
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["open_library"]


def open_library(
    path: Path, version: int, functions: Mapping[str, tuple[Any, Sequence[Any]]], instead: str
) -> ctypes.CDLL | None:
    """The library; None where there is none for this version and processor.

    Args:
        path: of the library.
        version: what its function ``kpmatch_version`` has to return.
        functions: the types of what each of its functions returns and takes.
        instead: what does its work without it, for the warning.
    """
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        found = library.kpmatch_version()
        if found == version:
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
            return library
        problem = f"has version {found}, not {version}: build the package again"
    except (OSError, AttributeError) as error:
        # Of another processor's library, the system says that there is no such file.
        problem = f"cannot be loaded on {platform.machine()}: {error}. Build the package again"
    warnings.warn(f"{path} {problem}. {instead} does its work", RuntimeWarning, stacklevel=3)
    return None
