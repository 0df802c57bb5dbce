"""Pairs left and right images by their stamps, or by their arrival if the stamps are unusable.

This module does not need ROS.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["StereoSynchroniser"]

Item = TypeVar("Item")

_LONGEST_STEP = 0.2  # seconds between two calls of wait() that count at most: a delayed caller received nothing


_STEPS = 9  # last intervals of a stream; their median is its period: images are lost, sent twice, or come in bursts


class _Waiting(NamedTuple):
    """An image that waits for its partner."""

    stamp: int
    arrived: int
    item: Any
    size: int


class StereoSynchroniser(Generic[Item]):
    """Finds each left image's right image: the one with the same stamp, or else the nearest one within a tolerance.

    Each stream arrives in order; one may be delayed against the other. An image is unpaired once its partner can no
    longer arrive: the other stream is past its time, a later image of its own stream has a partner, or too many images
    wait.

    Stamps that are zero or repeated fit several images equally well. Then the image that arrived nearest in time is the
    partner, if the two arrived less than half a period apart. Without this limit, one lost image would shift all later
    pairs.

    Args:
        tolerance: largest difference of two stamps that are not equal, nanoseconds. It is reduced to half the time
            between two images of a stream, because beyond that the partner may belong to another image.
        capacity: largest number of waiting images for each stream.
        memory: largest size of the waiting images of each stream, bytes, except the newest one.

    Attributes:
        unpaired: (left, right) number of images that found no partner.
        since: (left, right) number of images of the other stream since the last image of this stream, without those
            that found a partner when they arrived.
        offset: difference of the stamps when two images last missed each other, nanoseconds; None before.
        by_arrival: whether the last image's stamp was zero or repeated, so that the time of arrival decided.
    """

    def __init__(self, tolerance: int, capacity: int, memory: int) -> None:
        self._tolerance = tolerance
        self._capacity, self._memory = capacity, memory
        self._waiting: tuple[deque[_Waiting], ...] = (deque(), deque())
        self._last: list[int | None] = [None, None]
        self._periods: tuple[deque[int], ...] = (deque(maxlen=_STEPS), deque(maxlen=_STEPS))  # intervals of stamps
        self._arrived: list[int | None] = [None, None]
        self._steps: tuple[deque[int], ...] = (deque(maxlen=_STEPS), deque(maxlen=_STEPS))  # intervals of arrival
        self.by_arrival = False
        self.unpaired = [0, 0]
        self.since = [0, 0]
        self._waited: list[float | None] = [None, None]  # seconds that the other stream's images waited for this stream
        self._without_pair: float | None = None  # seconds since the first image after the last pair; None without one
        self._now: float | None = None
        self.offset: int | None = None

    def put(self, side: int, stamp: int, item: Item, arrived: int = 0, size: int = 0) -> tuple[Item, Item] | None:
        """Add an image of the left (0) or right (1) stream, and return the pair that it completes, left first.

        Args:
            side: of the stream.
            stamp: of the image, nanoseconds.
            item: the image, which is returned in the pair.
            arrived: when it arrived or was recorded, nanoseconds of any clock.
            size: of the image, bytes.
        """
        before = self._last[side]
        self.by_arrival = stamp == 0 or stamp == before
        self._measure(side, stamp, arrived)
        if self._waited[side] is not None:  # the other stream waited for this image
            self._waited[side] = None
        elif self._waited[1 - side] is None:
            self._waited[1 - side] = 0.0
        if self._without_pair is None:
            self._without_pair = 0.0
        own, others = self._waiting[side], self._waiting[1 - side]
        differences = [abs(stamp - other.stamp) for other in others]
        # Of several equally near images, the newest one, which is also the nearest by arrival.
        nearest = min(range(len(others)), key=lambda i: (differences[i], -i), default=None)
        if (
            nearest is None
            or differences[nearest] > self._limit()
            or (self.by_arrival and abs(arrived - others[nearest].arrived) > self._arrival_limit())
        ):
            if nearest is not None:
                self.offset = differences[nearest]
            # Images of the other stream before this time can no longer get a partner. It is taken from the smaller of
            # the last two stamps, because a single stamp may be far ahead.
            past = (stamp if before is None else min(stamp, before)) - self._tolerance
            while others and others[0].stamp < past:
                others.popleft()
                self.unpaired[1 - side] += 1
            own.append(_Waiting(stamp, arrived, item, size))
            held = sum(image.size for image in own)
            while len(own) > self._capacity or (held > self._memory and len(own) > 1):  # drop the oldest images
                held -= own.popleft().size
                self.unpaired[side] += 1
            return None
        self.since[1 - side] -= 1
        # Images that arrived before either of the two have no partner. Arrival counts, as stamps may have gone back.
        self.unpaired[side] += len(own)
        own.clear()
        for _ in range(nearest):
            others.popleft()
        self.unpaired[1 - side] += nearest
        partner = others.popleft().item
        # The pair is complete, so neither stream waits for it. Otherwise, after a lost image, each later image would
        # count as the one that the last pair waited for.
        self._waited[1 - side], self._waited[side] = None, 0.0 if others else None
        self._without_pair = 0.0 if others else None
        return (item, partner) if side == 0 else (partner, item)

    @property
    def waiting(self) -> list[int]:
        """Number of left and right images that still wait for their partner."""
        return [len(images) for images in self._waiting]

    @property
    def newest(self) -> Item | None:
        """The newest image that still waits for its partner, of the left stream if it has one; None if none waits."""
        return next((images[-1].item for images in self._waiting if images), None)

    def wait(self, now: float) -> None:
        """Advance the time. Call it about every tenth of a second, with the seconds of any clock."""
        step = 0.0 if self._now is None else min(max(now - self._now, 0.0), _LONGEST_STEP)
        self._now = now
        self._waited = [None if waited is None else waited + step for waited in self._waited]
        if self._without_pair is not None:
            self._without_pair += step

    def silent(self, side: int, after: float = 0.5) -> bool:
        """Whether the left (0) or right (1) stream is silent: it has stopped or not begun.

        It is silent if the other stream's images have waited for an image of it for more than `after` seconds.
        """
        waited = self._waited[side]
        return waited is not None and waited > after

    def is_unpaired(self, after: float) -> bool:
        """Whether images have arrived for more than `after` seconds, but no pair: one stream is silent, or none fit."""
        return self._without_pair is not None and self._without_pair > after

    def _measure(self, side: int, stamp: int, arrived: int) -> None:
        before, self._arrived[side] = self._arrived[side], arrived
        if before is not None:
            self._steps[side].append(abs(arrived - before))
        last, self._last[side] = self._last[side], stamp
        if last is not None and stamp > last:
            self._periods[side].append(stamp - last)
        self.since[side] = 0
        self.since[1 - side] += 1

    def _limit(self) -> int:
        return min([self._tolerance, *(statistics.median_low(steps) // 2 for steps in self._periods if steps)])

    def _arrival_limit(self) -> float:
        return min((statistics.median(steps) / 2 for steps in self._steps if steps), default=float("inf"))
