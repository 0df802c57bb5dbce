"""How this package's programs are called from a shell."""

from __future__ import annotations

import os

__all__ = ["in_shell"]


def in_shell(command: str) -> str:
    """A command such as ``kpmatch doctor`` as it works in a fresh shell, copied from a message.

    In a checkout the programs are found by way of ``tools/with_ros``, which names itself in ``KPMATCH_PREFIX``.
    """
    return f"{os.environ.get('KPMATCH_PREFIX', '')} {command}".strip()
