"""The message type of TF; None if tf2_msgs is not installed."""

from __future__ import annotations

try:
    from tf2_msgs.msg import TFMessage
except ImportError:  # a minimal ROS installation
    TFMessage = None

__all__ = ["INSTALL", "TFMessage"]

INSTALL = "tf2_msgs is not installed (apt install ros-$ROS_DISTRO-tf2-msgs)"
