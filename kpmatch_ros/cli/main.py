"""The `kpmatch` command.

Its exit status is 0 on success, 130 if it is stopped, and 2 on any error. An error is one line on stderr that says what
is wrong.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import kpmatch_ros
from kpmatch_ros.cli.archive import add_archive
from kpmatch_ros.cli.bag import add_bag
from kpmatch_ros.cli.bench import add_bench
from kpmatch_ros.cli.common import CommandError, Parser
from kpmatch_ros.cli.demo import add_demo
from kpmatch_ros.cli.doctor import add_doctor
from kpmatch_ros.cli.export import add_export
from kpmatch_ros.cli.match import add_match
from kpmatch_ros.cli.streams import prepare_streams
from kpmatch_ros.cli.weights import add_weights
from kpmatch_ros.parameters import ParameterError
from kpmatch_ros.process import configure_process
from kpmatch_ros.runtime.interpreter import explain
from kpmatch_ros.shell import in_shell
from kpmatch_ros.weights import WeightsError

__all__ = ["main"]

_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # errors that may come without a file name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: the words after `kpmatch`; those of this process if not given.
    """
    prepare_streams()
    configure_process()
    parser = _build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions; see docs/command_line.md
        import argcomplete

        argcomplete.autocomplete(parser)
    words = _join_negative_values(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words, argparse.Namespace(words=words))
    try:
        with _signals_as_ctrl_c():
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{options.name}: stopped", file=sys.stderr)
        return 130
    except (CommandError, ParameterError, WeightsError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        elif isinstance(error, OSError) and error.errno in _WRITING:
            text = f"the output cannot be written: {error.strerror}"
        print(f"{options.name}: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except Exception as error:  # a bug, too little memory, or a module that is not installed
        if os.environ.get("KPMATCH_TRACEBACK"):
            raise
        if isinstance(error, ImportError) and not (error.name or "").startswith("kpmatch_ros"):
            print(f"{options.name}: {explain(error)}", file=sys.stderr)
            return 2
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"{options.name}: an unexpected error, {text:.300}; KPMATCH_TRACEBACK=1 shows where: please report it "
            "with the input",
            file=sys.stderr,
        )
        return 2


@contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too, so that each command cleans up in its `finally` blocks.

    SIGHUP is sent when a terminal is closed or a connection to another machine ends. With `nohup` it stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join_negative_values(arguments: Sequence[str]) -> list[str]:
    """Join `--distortion -0.2,0.1,0,0` to `--distortion=-0.2,0.1,0,0`: argparse would take the value for an option."""
    joined: list[str] = []
    for word in arguments:
        if re.match(r"-[\d.]", word) and joined and re.fullmatch(r"--[a-z][a-z0-9-]*", joined[-1]):
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


def _build_parser() -> Parser:
    parser = Parser(
        prog="kpmatch",
        description="Learned feature matching: SuperPoint and LightGlue on images and ROS 2 camera topics.",
        epilog=f"example:\n  {in_shell('kpmatch match left.png right.png')}",
    )
    parser.add_argument("--version", action="version", version=f"kpmatch_ros {kpmatch_ros.__version__}")
    commands = parser.add_subparsers(
        title="commands", description="Start with the first four.", metavar="COMMAND", required=True
    )
    add_match(commands)
    add_bag(commands)
    add_demo(commands)
    add_doctor(commands)
    add_weights(commands)
    add_bench(commands)
    add_archive(commands)
    add_export(commands)
    return parser
