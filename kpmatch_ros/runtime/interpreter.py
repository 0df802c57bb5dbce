"""The Python that runs this: which packages it sees, and how one that is missing gets to it.

On a robot that is a virtual environment that sees the system's packages, ROS's among them (README, "Install").
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
    """A package that this one needs (setup.cfg and package.xml have their versions and their keys).

    Attributes:
        module: as Python imports it.
        pip: as pip names it.
        apt: as rosdep installs it into the system of a robot; empty for what no rosdep key installs everywhere.
        only_for: what does not work without it; empty where nothing does.
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
    """Whether this is the Python of a virtual environment."""
    return sys.prefix != sys.base_prefix


def is_externally_managed() -> bool:
    """Whether pip refuses to install into the system's Python: on Debian 12, Ubuntu 24.04 and later (PEP 668)."""
    return Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").is_file()


def how_to_install(packages: str) -> str:
    """What to do so that this Python has packages.

    Args:
        packages: as pip names them, with spaces between.
    """
    if not in_environment() and (is_externally_managed() or "ROS_DISTRO" in os.environ):
        return (
            "activate the virtual environment that has it (. venv/bin/activate); to make one: "
            f"python3 -m venv --system-site-packages venv && . venv/bin/activate && pip install {packages}"
        )
    return f"{sys.executable} -m pip install {packages}"


def how_to_get(module: str) -> str:
    """What to do so that this Python has a module; empty for one that is no dependency of this package.

    What a robot has from apt, other machines have from pip.
    """
    for each in DEPENDENCIES:
        if each.module == module.partition(".")[0]:
            if not each.apt:
                return how_to_install(_FROM_PIP)
            return f"sudo apt install {each.apt}" if "ROS_DISTRO" in os.environ else how_to_install(each.pip)
    return ""


def explain(error: ImportError) -> str:
    """One line for a user: which module this Python lacks or cannot load, and what to do."""
    said = " ".join(str(error).split())[:200]
    remedy = how_to_get(error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if remedy:
        return f"{said} ({sys.executable}): {remedy}; kpmatch doctor says more"
    return f"{said} ({sys.executable}); kpmatch doctor says what to do"


def numpy_clash(module: str) -> str:
    """What to do where a NumPy of the virtual environment hides the one that a module of the system is built for.

    Args:
        module: one that cannot be imported.

    Returns:
        The remedy; empty where NumPy and the module come from one place.
    """
    hidden = in_environment() and _is_inside("numpy") and _place("numpy", _system_folders()) is not None
    if hidden and _place(module, sys.path) is not None and not _is_inside(module):
        return f"{sys.executable} -m pip uninstall numpy: it hides the system's, which the system's {module} needs"
    return ""


def unseen_packages() -> list[str]:
    """The system's modules that ROS and this package need, and that the virtual environment does not show.

    Returns:
        Their names. None where ROS itself lies in the environment, or is not there.
    """
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if not in_environment() or not configuration.is_file() or _place("rclpy", _system_folders()) is None:
        return []
    settings = dict(line.lower().replace(" ", "").partition("=")[::2] for line in configuration.read_text().split("\n"))
    if settings.get("include-system-site-packages") != "false" or _is_inside("rclpy"):
        return []
    return [each.module for each in DEPENDENCIES if each.apt and _place(each.module, sys.path) is None]


def _place(module: str, folders: list[str]) -> Path | None:
    """The file that a module would be imported from. Nothing is imported, and what was imported does not count."""
    found = PathFinder.find_spec(module, folders)
    return Path(found.origin) if found is not None and found.origin is not None else None


def _is_inside(module: str) -> bool:
    """Whether a module lies in this environment."""
    place = _place(module, sys.path)
    return place is not None and Path(sys.prefix) in place.parents


def _system_folders() -> list[str]:
    """The folders of modules that are not this environment's."""
    environment = Path(sys.prefix)
    return [folder for folder in sys.path if environment not in Path(folder).parents]
