"""Starts and ends ROS in a process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import rclpy

from kpmatch_ros.parameters import declarations
from kpmatch_ros.ros.domain import domain_fault
from kpmatch_ros.shell import matcher_in_shell

__all__ = ["THREAD_NAME", "answer_to", "ignore_signals", "shut_down", "told_to_end", "why_ros_cannot_start"]

THREAD_NAME = "inference"
"""Name prefix of the thread that runs the networks."""

_USAGE = """\
usage: matcher --ros-args [-r image:=TOPIC] [-r camera_info:=TOPIC] [-p PARAMETER:=VALUE] [--params-file FILE]

Matches the images of a camera. The node takes only ROS arguments, after --ros-args.
docs/topics.md lists the topics, docs/parameters.md the parameters.
"""

_SHUTDOWN_WAIT = 1.0  # seconds that rclpy's signal thread may take to shut ROS down


def why_ros_cannot_start(error: Exception) -> str:
    """Explain an exception of `rclpy.init`, with a remedy if one is known."""
    # Fast DDS fails later, when the first node is created. Cyclone DDS on Humble fails here, without naming the domain.
    if fault := domain_fault(os.environ.get("ROS_DOMAIN_ID", ""), rclpy.get_rmw_implementation_identifier()):
        return f"{fault}; set it to one of these"
    if "log directory" in str(error):  # for example, a system service without a writable home folder
        return f"ROS cannot start: {error}; set ROS_LOG_DIR to a folder that this user may write to"
    return f"ROS cannot start with these arguments: {error}"


def answer_to(words: Sequence[str]) -> int:
    """Answer arguments that are not ROS arguments, and return the exit status.

    The node takes only ROS arguments. Prints the usage for --help, otherwise an error text.
    """
    if words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    name, assigned, value = words[0].lstrip("-_").partition(":=")
    is_parameter = name in {item.name for item in declarations()}
    instead = f"{'-p' if is_parameter else '-r'} {name}:={value}" if assigned else "-r image:=TOPIC"
    print(
        f"matcher: {words[0]!r} is not a ROS argument. The node takes only ROS arguments, after --ros-args: "
        f"{matcher_in_shell(f'--ros-args {instead}')}",
        file=sys.stderr,
    )
    return 1


def told_to_end() -> bool:
    """Whether ROS is shut down in this process, or about to be, as after Ctrl-C. Then the shutdown explains an error.

    Both a thread of rclpy and Python handle a signal. Python may be first, and its interrupt may surface as another
    exception. So this waits up to a second for rclpy.
    """
    end = time.monotonic() + _SHUTDOWN_WAIT
    while rclpy.ok() and time.monotonic() < end:
        time.sleep(0.01)
    return not rclpy.ok()


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM while the process ends, so that no Ctrl-C interrupts the clean-up.

    rclpy may handle a signal before Python does. Python then raises its interrupt in the next call, which is this one.
    """
    for sent in (signal.SIGINT, signal.SIGTERM):
        with suppress(KeyboardInterrupt):
            signal.signal(sent, signal.SIG_IGN)
        signal.signal(sent, signal.SIG_IGN)


def shut_down() -> None:
    """Shut ROS down, and retry once: `rclpy.try_shutdown` fails during a shutdown by a signal (ros2/rclpy#1352)."""
    try:
        rclpy.try_shutdown()
    except RuntimeError:
        rclpy.try_shutdown()
