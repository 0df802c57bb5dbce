"""Runs the matcher node as a process."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import rclpy
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.utilities import remove_ros_args

from kpmatch_ros.parameter_file import unused_files
from kpmatch_ros.parameters import ParameterError
from kpmatch_ros.ros.domain import domain_fault
from kpmatch_ros.ros.start import (
    THREAD_NAME,
    answer_to,
    ignore_signals,
    shut_down,
    told_to_end,
    why_ros_cannot_start,
)

if TYPE_CHECKING:
    from kpmatch_ros.ros.node import MatcherNode

__all__ = ["main"]


def main(args: list[str] | None = None) -> int:
    """Run the node until it is asked to stop. Returns the exit status: 0 after a clean end, 1 if it could not start."""
    arguments = sys.argv if args is None else args
    try:
        own = remove_ros_args(arguments)[args is None :]
        if own:
            return answer_to(own)
        rclpy.init(args=args)
    except RuntimeError as error:  # for example, a parameter file that does not exist or is not one
        print(f"matcher: {why_ros_cannot_start(error)}", file=sys.stderr)
        return 1
    if fault := domain_fault(rclpy.get_default_context().get_domain_id(), rclpy.get_rmw_implementation_identifier()):
        print(f"matcher: {fault}; set it to one of these", file=sys.stderr)
        shut_down()
        return 1
    node = None
    status = 0
    try:
        from kpmatch_ros.ros.node import MatcherNode  # loads PyTorch, which takes seconds: only after ROS has started

        node = MatcherNode()
        for text in unused_files(arguments, node.get_fully_qualified_name()):
            node.get_logger().warning(text)
        if not node.parameters.autostart or _start(node):
            rclpy.spin(node)
        elif rclpy.ok():
            node.get_logger().fatal(
                "the node exits: it cannot start with these parameters. With autostart: false it waits for a "
                "lifecycle manager; with respawn:=true the launch file starts it again"
            )
            status = 1
    except (ParameterError, InvalidParameterTypeException, InvalidParameterValueException) as error:
        print(f"matcher: {error}", file=sys.stderr)
        status = 1
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        if not told_to_end():
            raise
        # The process was asked to end while the executor was working, which then met objects that no longer exist.
    finally:
        ignore_signals()
        if node is not None:
            node.end()
        shut_down()
        if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
            # A network is still processing the last frame, or loading. Only the end of the process can interrupt it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


def _start(node: MatcherNode) -> bool:
    """Configure and activate the node, and return whether both succeeded."""
    success = TransitionCallbackReturn.SUCCESS
    return bool(node.trigger_configure() == success and node.trigger_activate() == success)
