"""Hands frames from the subscriptions, which must return at once, to the thread that does the work."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Inbox"]

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Hands items from one thread to another, in order.

    Args:
        latest: keep only the newest item. Those that still wait when it arrives are dropped.
    """

    def __init__(self, latest: bool) -> None:
        self._latest = latest
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item) -> int:
        """Add an item, and return how many were dropped: older ones, or this one where the inbox is closed."""
        with self._changed:
            if self._closed:
                return 1
            dropped = 0
            if self._latest:
                dropped = len(self._items)
                self._items.clear()
            self._items.append(item)
            self._changed.notify()
            return dropped

    def take(self) -> Item | None:
        """Wait for the next item; None once the inbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return None if self._closed else self._items.popleft()

    def close(self) -> int:
        """Wake the thread that waits, refuse further items, and return how many were still waiting."""
        with self._changed:
            self._closed = True
            left = len(self._items)
            self._items.clear()
            self._changed.notify_all()
            return left
