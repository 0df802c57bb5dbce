"""The bond by which nav2's lifecycle manager notices that the node is gone. It needs bondpy, or there is none."""

from __future__ import annotations

from typing import Any

from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle

try:
    from bondpy.bondpy import Bond
except ImportError:  # a ROS package of its own (ros-…-bondpy)
    Bond = None

__all__ = ["ManagerBond"]

_TOPIC = "bond"
_TIMEOUT = 4.0  # seconds without a heartbeat after which a bond is broken, as with nav2's own nodes
_FAREWELL = Duration(seconds=0.5)  # that the bond's last message has to arrive


class ManagerBond:
    """One end of a bond, as nav2's own nodes have it: on the topic `bond`, under the node's name, while it is active.

    Args:
        node: the lifecycle node.
    """

    def __init__(self, node: Any) -> None:
        self._node = node
        self._bond: Any = None

    def form(self, period: float) -> None:
        """Begin to send heartbeats, one in so many seconds; none where the period is 0."""
        if not period or self._bond is not None:
            return
        log = self._node.get_logger()
        if Bond is None:
            log.info("no bond with a lifecycle manager: bondpy is not installed. nav2's wants bond_timeout: 0.0 then")
            return
        self._bond = Bond(self._node, _TOPIC, self._node.get_name(), on_broken=self._on_broken)
        self._bond.set_heartbeat_period(period)
        self._bond.set_heartbeat_timeout(_TIMEOUT)
        self._bond.start()

    def release(self) -> None:
        """Break the bond, if there is one, and tell the manager."""
        bond, self._bond = self._bond, None
        if bond is not None:
            try:
                bond.shutdown()
                bond.pub.wait_for_all_acked(_FAREWELL)  # with the publisher, what has not arrived is gone
            except (InvalidHandle, RuntimeError):
                if self._node.context.ok():
                    raise  # else the process was told to end, nothing can be sent, and the manager misses heartbeats
            self._node.destroy_subscription(bond.sub)  # bondpy leaves it with the node
            self._node.destroy_publisher(bond.pub)

    def _on_broken(self) -> None:
        if self._bond is not None:
            self._node.get_logger().warning("the bond with the lifecycle manager is broken, or none was formed")
