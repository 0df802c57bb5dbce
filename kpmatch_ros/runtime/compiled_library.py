"""Loads the libraries that the build of the ROS package compiles and puts beside the modules."""

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
    """Load a library; None if it does not exist, or is for another version or processor.

    Args:
        path: path of the library.
        version: the value that its function ``kpmatch_version`` must return.
        functions: the return type and the argument types of each of its functions.
        instead: name of what replaces the library, for the warning.
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
        problem = f"has version {found}, not {version}: rebuild the package"
    except (OSError, AttributeError) as error:
        # For a library of another processor, the operating system reports that there is no such file.
        problem = f"cannot be loaded on {platform.machine()}: {error}. Rebuild the package"
    warnings.warn(f"{path} {problem}. {instead} is used instead", RuntimeWarning, stacklevel=3)
    return None
