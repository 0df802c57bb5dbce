"""Prepares the standard streams of a command for closed and broken streams, and for texts that cannot be encoded."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

__all__ = ["prepare_streams"]

_STREAMS = ("stdin", "stdout", "stderr")


def prepare_streams() -> None:
    """Open closed standard streams on /dev/null, let stdout and stderr take any text, and ignore errors of stderr.

    Without this, the next file that is opened would get the number of a closed stream, so that a library's output to
    stderr would end up in a bag. File names need not be UTF-8, and a terminal may not support every character:
    characters that cannot be encoded are escaped.
    """
    for descriptor, name in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)  # like the streams that a shell provides
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, _BestEffortStream):
        sys.stderr = _BestEffortStream(sys.stderr)  # type: ignore[assignment]


class _BestEffortStream:
    """A text stream that ignores OSErrors: a message about the work must not end the work if nobody can read it."""

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
