"""The standard streams of a command: closed ones, full ones, and texts that they cannot hold."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

__all__ = ["prepare_streams"]

_STREAMS = ("stdin", "stdout", "stderr")


def prepare_streams() -> None:
    """Open those that are closed, on nothing, and let those for texts take any text.

    The next file to be opened would get the number of a closed one: what a library writes to stderr would be written
    into a bag. A file's name need not be UTF-8, and a terminal need not show every letter: what cannot be encoded is
    escaped.
    """
    for descriptor, name in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)  # as those of a shell are
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, _Unheard):
        sys.stderr = _Unheard(sys.stderr)  # type: ignore[assignment]


class _Unheard:
    """A stream that nobody may read any longer: what is said of the work must not end it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
