"""Print the messages of a running matcher node: python examples/print_matches.py"""

from __future__ import annotations

import contextlib
import time

import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node

from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.msg import MatchArray, RelativePose


class MatchPrinter(Node):
    """Prints the number of matches and inliers of each pair of frames, and its translation."""

    def __init__(self) -> None:
        super().__init__("match_printer")
        self.create_subscription(MatchArray, "matches", self._on_matches, 10)
        self.create_subscription(RelativePose, "relative_pose", self._on_pose, 10)

    def _on_matches(self, message: MatchArray) -> None:
        # The array is empty if inliers are not known, for example without calibration.
        inliers = f"{np.count_nonzero(message.inliers)} inliers" if message.inliers else "inliers unknown"
        print(f"{len(message.scores)} matches, {inliers}, tracks restart: {message.reset}")

    def _on_pose(self, message: RelativePose) -> None:
        position = message.pose.pose.position
        if message.status in (RelativePose.OK, RelativePose.AMBIGUOUS):
            unit = " m" if message.metric else ""
            doubt = ", ambiguous" if message.status == RelativePose.AMBIGUOUS else ""
            print(f"moved ({position.x:.3f}, {position.y:.3f}, {position.z:.3f}){unit}{doubt}")
        else:
            print(f"no translation: {PoseStatus(message.status).name}")


def main() -> None:
    """Run the node until Ctrl-C."""
    rclpy.init()
    printer = None
    try:
        printer = MatchPrinter()
        while rclpy.ok():  # not rclpy.spin: after SIGTERM it may wake before the shutdown, see none, and sleep on
            rclpy.spin_once(printer, timeout_sec=1.0)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        time.sleep(1.0)  # a signal may interrupt rclpy anywhere, and a separate thread shuts ROS down: wait for it
        if rclpy.ok():
            raise
    finally:
        if printer is not None:  # ends the middleware's threads: they may crash if its libraries are unloaded first
            printer.destroy_node()
        with contextlib.suppress(RuntimeError):  # the signal's shutdown may be in progress (ros2/rclpy#1352)
            rclpy.try_shutdown()


if __name__ == "__main__":
    main()
