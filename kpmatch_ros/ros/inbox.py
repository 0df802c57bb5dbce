"""Hands frames from the subscription callbacks, which must return at once, to the inference thread."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Inbox", "Remaining"]

Item = TypeVar("Item")
Request = TypeVar("Request")

_MOST_REQUESTS = 16  # waiting requests


@dataclass(frozen=True)  # a NamedTuple cannot be generic in Python 3.10
class Remaining(Generic[Request]):
    """The items and requests that were waiting when an inbox was closed. Items are only counted."""

    items: int
    requests: list[Request]


class Inbox(Generic[Item, Request]):
    """Hands items from one thread to another in order, with requests in between.

    If both are waiting, items and requests alternate. So a request waits for at most one item (and for earlier
    requests), and at most one request is taken between two items.

    One item may wait behind all others, see :meth:`put_last`.

    Args:
        latest: keep only the newest item. A new item displaces those that still wait.
        memory: largest total size of the waiting items, bytes. The oldest items are dropped; the newest one always
            stays.

    Attributes:
        overtaken: number of items dropped between the item taken last and the one before it.
    """

    def __init__(self, latest: bool, memory: int) -> None:
        self._latest = latest
        self._memory = memory
        self.overtaken = 0
        self._dropped = 0  # since the last item was taken
        self._items: deque[tuple[Item, int]] = deque()  # each with its size in bytes
        self._held = 0  # bytes
        self._last: Item | None = None
        self._requests: deque[Request] = deque()
        self._request_is_next = True
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Item, size: int) -> int:
        """Add an item of ``size`` bytes, and return the number of items dropped: older ones, or this one if closed."""
        with self._changed:
            if self._closed:
                return 1
            before = len(self._items)
            while self._items and (self._latest or self._held + size > self._memory):
                self._held -= self._items.popleft()[1]
            dropped = before - len(self._items)
            self._dropped += dropped
            self._items.append((item, size))
            self._held += size
            self._last = None
            self._changed.notify()
            return dropped

    def put_last(self, item: Item) -> None:
        """Add an item that is taken when no other waits. A later item discards it; a later call replaces it."""
        with self._changed:
            if not self._closed:
                self._last = item
                self._changed.notify()

    def ask(self, request: Request) -> bool:
        """Add a request. Returns false if the inbox is closed or too many requests wait."""
        with self._changed:
            if self._closed or len(self._requests) >= _MOST_REQUESTS:
                return False
            self._requests.append(request)
            self._changed.notify()
            return True

    def take(self) -> Item | Request | None:
        """Wait for the next item or request and return it; None once the inbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_item or self._requests or self._closed)
            if self._closed:
                return None
            if self._requests and (self._request_is_next or not self._has_item):
                self._request_is_next = False
                return self._requests.popleft()
            self._request_is_next = True
            if not self._items:
                last, self._last = self._last, None
                return last
            item, size = self._items.popleft()
            self._held -= size
            self.overtaken, self._dropped = self._dropped, 0
            return item

    @property
    def _has_item(self) -> bool:
        return bool(self._items) or self._last is not None

    def close(self) -> Remaining[Request]:
        """Close the inbox: wake the waiting thread, refuse new items and requests, and return what was waiting."""
        with self._changed:
            self._closed = True
            remaining = Remaining(len(self._items), list(self._requests))
            self._items.clear()
            self._last = None
            self._requests.clear()
            self._changed.notify_all()
            return remaining
