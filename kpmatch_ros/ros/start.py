"""Starting ROS in a process."""

from __future__ import annotations

__all__ = ["why_ros_cannot_start"]


def why_ros_cannot_start(error: Exception) -> str:
    """What `rclpy.init` raised, with what to do about it where that is known."""
    if "log directory" in str(error):  # as of a service without a home, or with one that it may not write to
        return f"ROS cannot start: {error}; set ROS_LOG_DIR to a folder that this user may write to"
    return f"ROS cannot start with these arguments: {error}"
