"""`pip install .`: the Python API and the kpmatch command, on machines without ROS too (see setup.cfg).

Where there is a C compiler, the compiled part is built as the ROS package builds it. Where there is none, NumPy and
PyTorch do its work.
"""

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CMAKE = (Path(__file__).parent / "CMakeLists.txt").read_text()


def words(command: str, library: str) -> list[str]:
    """What CMakeLists.txt says of a library."""
    found = re.search(rf"{command}\({library} (?:SHARED|PRIVATE)([^)]*)\)", CMAKE)
    if found is None:
        raise SystemExit(f"CMakeLists.txt has no {command} of {library}")
    return found[1].split()


def library(name: str, package: str) -> Extension:
    threads = ["-pthread"] if "Threads::Threads" in words("target_link_libraries", name) else []
    return Extension(
        f"{package}.lib{name}",
        words("add_library", name),
        depends=[str(path) for path in Path("src").glob("*.h")],
        extra_compile_args=[*words("target_compile_options", name), *threads],
        extra_link_args=threads,
        libraries=["m"],
        optional=True,
    )


class BuildLibraries(build_ext):
    """Libraries that ctypes opens, which know nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python."""
        return f"{Path(*fullname.split('.'))}.so"


setup(
    ext_modules=[
        library("kpmatch_geometry", "kpmatch_ros.geometry"),
        library("kpmatch_networks", "kpmatch_ros.models"),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
