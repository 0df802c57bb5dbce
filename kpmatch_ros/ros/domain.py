"""The numbers of ROS domains, without ROS."""

from __future__ import annotations

__all__ = ["domain_fault"]

_HIGHEST = 232  # above it, the numbers of DDS's ports are above 65535


def domain_fault(domain: int, middleware: str) -> str:
    """Why no node can start in a domain; empty where one can.

    ROS takes any number, and Fast DDS ends the process where the first node is made.

    Args:
        domain: its number.
        middleware: the name of the RMW implementation. Zenoh's has no such limit.
    """
    if domain <= _HIGHEST or "zenoh" in middleware:
        return ""
    return f"ROS_DOMAIN_ID is {domain}, and {middleware} has domains 0 to {_HIGHEST}"
