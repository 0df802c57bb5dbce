"""Starting ROS in a process, and ending it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import rclpy

from kpmatch_ros.parameters import declarations
from kpmatch_ros.shell import matcher_in_shell

__all__ = ["THREAD_NAME", "answer_to", "ignore_signals", "shut_down", "told_to_end", "why_ros_cannot_start"]

THREAD_NAME = "inference"
"""Of the thread that runs the networks."""

_USAGE = """\
usage: matcher --ros-args [-r image:=TOPIC] [-r camera_info:=TOPIC] [-p PARAMETER:=VALUE] [--params-file FILE]

Matches the images of a camera. All arguments are ROS's own, and stand after --ros-args.
docs/topics.md lists the topics, docs/parameters.md the parameters.
"""

_HEARING = 1.0  # seconds that a thread of rclpy may take to shut ROS down after a signal


def why_ros_cannot_start(error: Exception) -> str:
    """What `rclpy.init` raised, with what to do about it where that is known."""
    if "log directory" in str(error):  # as of a service without a home, or with one that it may not write to
        return f"ROS cannot start: {error}; set ROS_LOG_DIR to a folder that this user may write to"
    return f"ROS cannot start with these arguments: {error}"


def answer_to(words: Sequence[str]) -> int:
    """Print the usage, or what is wrong with words that are not ROS's, of which the node takes none: exit status."""
    if words[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    name, assigned, value = words[0].lstrip("-_").partition(":=")
    is_parameter = name in {item.name for item in declarations()}
    instead = f"{'-p' if is_parameter else '-r'} {name}:={value}" if assigned else "-r image:=TOPIC"
    print(
        f"matcher: {words[0]!r} is not one of ROS's arguments, which stand after --ros-args: "
        f"{matcher_in_shell(f'--ros-args {instead}')}",
        file=sys.stderr,
    )
    return 1


def told_to_end() -> bool:
    """Whether ROS is shut down in this process, or about to be, as after Ctrl-C: then what fails, fails for that.

    A signal is heard by a thread of rclpy, and by Python, whose interrupt may come sooner and as another exception.
    """
    end = time.monotonic() + _HEARING
    while rclpy.ok() and time.monotonic() < end:
        time.sleep(0.01)
    return not rclpy.ok()


def ignore_signals() -> None:
    """Ignore what tells to end, as ending is under way: a second Ctrl-C must not break into it, nor the first one.

    rclpy may be told of a signal before Python is. Python's interrupt then comes with the next call, which is this one.
    """
    for sent in (signal.SIGINT, signal.SIGTERM):
        with suppress(KeyboardInterrupt):
            signal.signal(sent, signal.SIG_IGN)
        signal.signal(sent, signal.SIG_IGN)


def shut_down() -> None:
    """Shut ROS down. `rclpy.try_shutdown` fails where a signal does so at the same time (ros2/rclpy#1352)."""
    try:
        rclpy.try_shutdown()
    except RuntimeError:
        rclpy.try_shutdown()
