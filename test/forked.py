"""Starts the matcher from a process that has already loaded PyTorch, which takes most of a node's start-up time.

The forking process runs this file as a program. It loads the node's modules except ROS, whose libraries start threads.
Each node is then a separate process, which runs the matcher's own program from its first line.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PAUSE = 0.01  # seconds between two checks whether a process has ended

_server: subprocess.Popen[str] | None = None


def _python(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that decide which modules Python finds and how it loads them."""
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


_MODULES = _python(os.environ)  # before a test changes them


class ForkedProcess:
    """A process forked by the server, with those methods of :class:`subprocess.Popen` that the tests use."""

    def __init__(self, server: subprocess.Popen[str], request: dict[str, Any]) -> None:
        self._server = server
        self.pid: int = _ask(server, request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self._server, {"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"the forked process {self.pid}", timeout or 0.0)
            time.sleep(_PAUSE)
        return status

    def send_signal(self, sent: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        self.send_signal(9)


def start(arguments: list[str], environment: dict[str, str], log: Path) -> ForkedProcess | None:
    """Start the matcher with arguments and environment variables. Its output is appended to the log.

    Returns None if the environment would load other modules than those of the server.
    """
    global _server
    if _python(environment) != _MODULES:
        return None
    if _server is None:
        command = [sys.executable, __file__]
        # Overrides the user's environment: OpenBLAS starts its threads when it is loaded, and a fork loses them.
        alone = {**environment, "OPENBLAS_NUM_THREADS": "1"}
        _server = subprocess.Popen(command, env=alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(_end, _server)
    return ForkedProcess(_server, {"arguments": arguments, "variables": environment, "log": str(log)})


def _ask(server: subprocess.Popen[str], request: dict[str, Any]) -> Any:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks nodes has ended"
    return json.loads(answer)


def _end(server: subprocess.Popen[str]) -> None:
    """Close the server's input, which ends it, and wait for its end."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.close()
    server.stdout.close()
    server.wait(timeout=10)


def _serve(program: str) -> None:
    """Answer requests until there are no more: fork a process, or report the exit status of one."""
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(program, **request)
                return
        print(json.dumps(answer), flush=True)


def _become(program: str, arguments: list[str], variables: dict[str, str], log: str) -> None:
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        file = os.open(log if number else os.devnull, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [program, *arguments]


if __name__ == "__main__":
    faulthandler.enable()  # a crash of a node leaves a traceback in its log
    from kpmatch_ros.process import configure_process

    configure_process()
    import kpmatch_ros.pipeline  # noqa: F401  (with PyTorch, OpenCV and SciPy)

    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    gc.freeze()  # a garbage collection in a node would copy the pages of all loaded objects, which takes half a second
    matcher = shutil.which("matcher")
    assert matcher is not None, "the matcher is not installed: make build"
    _serve(matcher)
    if sys.argv[0] == matcher:  # a forked process continues here, and ends as the program does
        sys.path[0] = str(Path(matcher).parent)
        runpy.run_path(matcher, run_name="__main__")
