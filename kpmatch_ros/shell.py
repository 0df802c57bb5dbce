"""How this package's programs are called from a shell."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

__all__ = ["in_shell", "matcher_in_shell"]


def in_shell(command: str) -> str:
    """A command such as ``kpmatch doctor`` as it works in a fresh shell, copied from a message.

    In a checkout the programs are found by way of ``tools/with_ros``, which names itself in ``KPMATCH_PREFIX``.
    """
    return f"{shlex.quote(os.environ['KPMATCH_PREFIX'])} {command}" if os.environ.get("KPMATCH_PREFIX") else command


def matcher_in_shell(arguments: str) -> str:
    """The node as a shell without ``ros2`` starts it: by its name where the path has it, otherwise by its place.

    A sourced workspace has no program but ``kpmatch`` on the path; ``ros2 run`` finds the node's.
    """
    program = "matcher"
    if shutil.which(program) is None:
        prefixes = filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep))
        places = (Path(prefix, "lib", "kpmatch_ros", program) for prefix in prefixes)
        program = next((str(place) for place in places if place.is_file()), program)
    return in_shell(f"{shlex.quote(program)} {arguments}")
