"""Shell commands of this package's programs, for messages to the user."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

__all__ = ["in_shell", "matcher_in_shell"]


def in_shell(command: str) -> str:
    """Return a command such as ``kpmatch doctor`` in a form that works when copied into a new shell.

    In a source checkout the programs run through ``tools/with_ros``, which sets ``KPMATCH_PREFIX`` to its own path.
    """
    return f"{shlex.quote(os.environ['KPMATCH_PREFIX'])} {command}" if os.environ.get("KPMATCH_PREFIX") else command


def matcher_in_shell(arguments: str) -> str:
    """Return the command that starts the node without ``ros2``: its name if PATH has it, otherwise its full path.

    A sourced workspace has only ``kpmatch`` on PATH. The node's program is where ``ros2 run`` looks for it.
    """
    program = "matcher"
    if shutil.which(program) is None:
        prefixes = filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))
        places = (Path(prefix, "lib", "kpmatch_ros", program) for prefix in prefixes)
        program = next((str(place) for place in places if place.is_file()), program)
    return in_shell(f"{shlex.quote(program)} {arguments}")
