"""Starting ROS in a process, and ending it."""

from __future__ import annotations

import time

import rclpy

__all__ = ["shut_down", "told_to_end", "why_ros_cannot_start"]

_HEARING = 1.0  # seconds that a thread of rclpy may take to shut ROS down after a signal


def why_ros_cannot_start(error: Exception) -> str:
    """What `rclpy.init` raised, with what to do about it where that is known."""
    if "log directory" in str(error):  # as of a service without a home, or with one that it may not write to
        return f"ROS cannot start: {error}; set ROS_LOG_DIR to a folder that this user may write to"
    return f"ROS cannot start with these arguments: {error}"


def told_to_end() -> bool:
    """Whether ROS is shut down in this process, or about to be, as after Ctrl-C: then what fails, fails for that.

    A signal is heard by a thread of rclpy, and by Python, whose interrupt may come sooner and as another exception.
    """
    end = time.monotonic() + _HEARING
    while rclpy.ok() and time.monotonic() < end:
        time.sleep(0.01)
    return not rclpy.ok()


def shut_down() -> None:
    """Shut ROS down. `rclpy.try_shutdown` fails where a signal does so at the same time (ros2/rclpy#1352)."""
    try:
        rclpy.try_shutdown()
    except RuntimeError:
        rclpy.try_shutdown()
