"""Checks the number of a ROS domain. Does not depend on ROS."""

from __future__ import annotations

__all__ = ["domain_fault"]

_HIGHEST = 232  # higher domains would need DDS port numbers above 65535


def domain_fault(domain: int | str, middleware: str) -> str:
    """Explain why no node can start in a domain. Returns an empty text if a node can start.

    ROS accepts any number, but Fast DDS then ends the process when the first node is created.

    Args:
        domain: number of the domain, or the value of ROS_DOMAIN_ID. ROS itself refuses text that is no number.
        middleware: name of the RMW implementation. Zenoh has no such limit.
    """
    if not str(domain).isdecimal() or int(domain) <= _HIGHEST or "zenoh" in middleware:
        return ""
    return f"ROS_DOMAIN_ID is {domain}, but {middleware} has domains 0 to {_HIGHEST}"
