"""Hands frames from the subscriptions, which must return at once, to the thread that does the work."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Inbox", "Left"]

Item = TypeVar("Item")
Request = TypeVar("Request")

_MOST_REQUESTS = 16  # that wait


class Left(NamedTuple, Generic[Request]):
    """What still waited when an inbox was closed."""

    items: int
    requests: list[Request]


class Inbox(Generic[Item, Request]):
    """Hands items from one thread to another, in order, and requests between them.

    Where both wait, items and requests take turns: a request waits for one item at most, beside other requests, and no
    more than one request comes between two items.

    Args:
        latest: keep only the newest item. Those that still wait when it arrives are dropped.
    """

    def __init__(self, latest: bool) -> None:
        self._latest = latest
        self._items: deque[Item] = deque()
        self._requests: deque[Request] = deque()
        self._request_is_next = True
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

    def ask(self, request: Request) -> bool:
        """Add a request; false where the inbox is closed, or too many wait."""
        with self._changed:
            if self._closed or len(self._requests) >= _MOST_REQUESTS:
                return False
            self._requests.append(request)
            self._changed.notify()
            return True

    def take(self) -> Item | Request | None:
        """Wait for the next item or request; None once the inbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._requests or self._closed)
            if self._closed:
                return None
            if self._requests and (self._request_is_next or not self._items):
                self._request_is_next = False
                return self._requests.popleft()
            self._request_is_next = True
            return self._items.popleft()

    def close(self) -> Left[Request]:
        """Wake the thread that waits, refuse whatever comes, and return what was still waiting."""
        with self._changed:
            self._closed = True
            left = Left(len(self._items), list(self._requests))
            self._items.clear()
            self._requests.clear()
            self._changed.notify_all()
            return left
