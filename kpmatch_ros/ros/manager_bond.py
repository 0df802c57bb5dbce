"""The bond with which nav2's lifecycle manager detects that the node has died. Without bondpy there is no bond."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from rclpy.duration import Duration
from rclpy.exceptions import InvalidHandle

try:
    from bondpy.bondpy import Bond
except ImportError:  # a ROS package of its own (ros-…-bondpy)
    Bond = None

__all__ = ["ManagerBond"]

_TOPIC = "bond"
_TIMEOUT = 4.0  # seconds without a heartbeat after which the bond is broken; the value of nav2's own nodes
_LAST_MESSAGE_WAIT = Duration(seconds=0.5)  # longest wait for the arrival of the bond's last message


class ManagerBond:
    """The node's side of a bond, on the topic `bond` and with the node's name as id, as in nav2's own nodes.

    The bond exists while the node is active.

    Args:
        node: the lifecycle node.
    """

    def __init__(self, node: Any) -> None:
        self._node = node
        self._bond: Any = None

    def form(self, period: float) -> None:
        """Start to send heartbeats, one every ``period`` seconds. With a period of 0 there is no bond."""
        if not period or self._bond is not None:
            return
        log = self._node.get_logger()
        if Bond is None:
            log.info(
                "no bond with a lifecycle manager: bondpy is not installed. Set bond_timeout of nav2's lifecycle "
                "manager to 0.0"
            )
            return
        self._bond = Bond(self._node, _TOPIC, self._node.get_name(), on_broken=self._on_broken)
        self._bond.set_heartbeat_period(period)
        self._bond.set_heartbeat_timeout(_TIMEOUT)
        self._bond.start()

    def release(self) -> None:
        """Break the bond, if there is one, and notify the manager."""
        bond, self._bond = self._bond, None
        if bond is not None:
            try:
                bond.shutdown()
                with suppress(InvalidHandle):  # bondpy has destroyed it already (Humble)
                    bond.pub.wait_for_all_acked(_LAST_MESSAGE_WAIT)  # the publisher's end discards what has not arrived
            except (InvalidHandle, RuntimeError):
                if self._node.context.ok():
                    raise  # otherwise the context is shut down: nothing can be sent, and the manager's timeout applies
            finally:  # the node still knows them, and Humble's executor fails on what bondpy destroyed
                self._node.destroy_subscription(bond.sub)
                self._node.destroy_publisher(bond.pub)

    def _on_broken(self) -> None:
        if self._bond is not None:
            self._node.get_logger().warning("the bond with the lifecycle manager is broken, or none was formed")
