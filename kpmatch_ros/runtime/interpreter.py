"""The Python interpreter: the packages that it sees, and how to install a missing one.

On a robot it belongs to a virtual environment that also sees the system's packages, including ROS (README, "Install").
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "DEPENDENCIES",
    "Dependency",
    "explain",
    "how_to_get",
    "how_to_install",
    "is_externally_managed",
    "numpy_clash",
    "unseen_packages",
]


class Dependency(NamedTuple):
    """A package that this package needs; setup.cfg and package.xml have versions and rosdep keys.

    Attributes:
        module: its name for Python's import.
        pip: its name for pip.
        apt: its name for apt, as rosdep installs it on a robot; empty if there is no rosdep key for all distributions.
        only_for: the features that need it; empty if the whole package needs it.
    """

    module: str
    pip: str
    apt: str = ""
    only_for: str = ""


_COMMANDS = "kpmatch bag, demo, bench and archive"
DEPENDENCIES = (
    Dependency("torch", "torch"),
    Dependency("safetensors", "safetensors"),
    Dependency("rosbags", "rosbags", only_for=f"{_COMMANDS}, and the comparison of kpmatch export"),
    Dependency("rosbags.image", "rosbags-image", only_for="Bayer and YUV images without cv_bridge"),
    Dependency("cv2", "opencv-python-headless", "python3-opencv"),
    Dependency("numpy", "numpy", "python3-numpy"),
    Dependency("psutil", "psutil", "python3-psutil"),
    Dependency("scipy", "scipy", "python3-scipy"),
    Dependency("tqdm", "tqdm", "python3-tqdm", only_for=_COMMANDS),
    Dependency("yaml", "PyYAML", "python3-yaml"),
)
_FROM_PIP = " ".join(each.pip for each in DEPENDENCIES if not each.apt)  # as the README installs them


def in_environment() -> bool:
    """Whether this Python belongs to a virtual environment."""
    return sys.prefix != sys.base_prefix


def is_externally_managed() -> bool:
    """Whether pip refuses to install into the system's Python, as on Debian 12, Ubuntu 24.04 and later (PEP 668)."""
    return Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").is_file()


def how_to_install(packages: str) -> str:
    """Return the instruction that installs packages for this Python.

    Args:
        packages: pip's names of the packages, separated by spaces.
    """
    if not in_environment() and (is_externally_managed() or "ROS_DISTRO" in os.environ):
        return (
            "activate the virtual environment that has it (. venv/bin/activate); to make one: "
            f"python3 -m venv --system-site-packages venv && . venv/bin/activate && pip install {packages}"
        )
    return f"{sys.executable} -m pip install {packages}"


def how_to_get(module: str) -> str:
    """Return the instruction that installs a module for this Python; empty if it is no dependency of this package.

    On a robot, dependencies with a rosdep key come from apt. On other machines they come from pip.
    """
    for each in DEPENDENCIES:
        if each.module == module.partition(".")[0]:
            if not each.apt:
                return how_to_install(_FROM_PIP)
            return f"sudo apt install {each.apt}" if "ROS_DISTRO" in os.environ else how_to_install(each.pip)
    return ""


def explain(error: ImportError) -> str:
    """One line for users: the module that this Python lacks or cannot load, and the remedy."""
    said = " ".join(str(error).split())[:200]
    remedy = how_to_get(error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if remedy:
        return f"{said} ({sys.executable}): {remedy}; kpmatch doctor shows more"
    return f"{said} ({sys.executable}); kpmatch doctor shows what to do"


def numpy_clash(module: str) -> str:
    """Return the remedy if a virtual environment's NumPy hides the NumPy that a module of the system was built for.

    Args:
        module: a module that cannot be imported.

    Returns:
        The remedy; empty if NumPy and the module come from the same place.
    """
    hidden = in_environment() and _is_inside("numpy") and _place("numpy", _system_folders()) is not None
    if hidden and _place(module, sys.path) is not None and not _is_inside(module):
        return (
            f"{sys.executable} -m pip uninstall numpy: it hides the system's NumPy, which the system's {module} needs"
        )
    return ""


def unseen_packages() -> list[str]:
    """Return the system modules that ROS and this package need, but that the virtual environment does not show.

    Returns:
        Their names; an empty list if ROS itself is in the environment or is not installed.
    """
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if not in_environment() or not configuration.is_file() or _place("rclpy", _system_folders()) is None:
        return []
    settings = dict(line.lower().replace(" ", "").partition("=")[::2] for line in configuration.read_text().split("\n"))
    if settings.get("include-system-site-packages") != "false" or _is_inside("rclpy"):
        return []
    return [each.module for each in DEPENDENCIES if each.apt and _place(each.module, sys.path) is None]


def _place(module: str, folders: list[str]) -> Path | None:
    """The file that a module would be imported from. Nothing is imported, and imported modules do not matter."""
    found = PathFinder.find_spec(module, folders)
    return Path(found.origin) if found is not None and found.origin is not None else None


def _is_inside(module: str) -> bool:
    """Whether a module belongs to this virtual environment."""
    place = _place(module, sys.path)
    return place is not None and Path(sys.prefix) in place.parents


def _system_folders() -> list[str]:
    """The folders of modules outside this virtual environment."""
    environment = Path(sys.prefix)
    return [folder for folder in sys.path if environment not in Path(folder).parents]
