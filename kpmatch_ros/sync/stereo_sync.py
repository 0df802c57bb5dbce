"""Puts left and right images together by their stamps, or where these say nothing by their arrival. No ROS in here."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["StereoSynchroniser"]

Item = TypeVar("Item")

_LONGEST_STEP = 0.2  # seconds between two calls that count at most: a caller that was held up did not listen


_STEPS = 9  # of a stream, whose median is its period: images are lost, sent twice, or come in a burst


class _Waiting(NamedTuple):
    """An image that waits for its partner."""

    stamp: int
    arrived: int
    item: Any
    size: int


class StereoSynchroniser(Generic[Item]):
    """Finds each left image's right image: the one of equal stamp, or else the nearest within a tolerance.

    Each stream comes in order; the two may come at any time. An image is unpaired once its partner can no longer come:
    the other stream is past its time, a later image of its own stream has a partner, or too many images wait.

    Stamps that are zero, or repeat, fit several images alike. Among these the one that arrived nearest is the partner,
    where the two are less than half a period apart: or else one lost image would shift all pairs that follow.

    Args:
        tolerance: largest difference of two stamps that are not equal, nanoseconds. It never exceeds half the time
            between two images of a stream: at that, the partner might as well be another image's.
        capacity: how many images of a stream wait at most.
        memory: how many bytes those of a stream have at most, but for the newest one.

    Attributes:
        unpaired: (left, right), images that found no partner.
        since: (left, right), images of the other stream since the last one of this that had no partner when they came.
        offset: by how much the stamps differed when two images last missed each other, nanoseconds; None before.
        by_arrival: whether the last image had no stamp of its own, so that arrival decided.
    """

    def __init__(self, tolerance: int, capacity: int, memory: int) -> None:
        self._tolerance = tolerance
        self._capacity, self._memory = capacity, memory
        self._waiting: tuple[deque[_Waiting], ...] = (deque(), deque())
        self._last: list[int | None] = [None, None]
        self._periods: tuple[deque[int], ...] = (deque(maxlen=_STEPS), deque(maxlen=_STEPS))  # by stamp
        self._arrived: list[int | None] = [None, None]
        self._steps: tuple[deque[int], ...] = (deque(maxlen=_STEPS), deque(maxlen=_STEPS))  # by arrival
        self.by_arrival = False
        self.unpaired = [0, 0]
        self.since = [0, 0]
        self._waited: list[float | None] = [None, None]  # seconds that the other stream's images waited for this one
        self._now: float | None = None
        self.offset: int | None = None

    def put(self, side: int, stamp: int, item: Item, arrived: int = 0, size: int = 0) -> tuple[Item, Item] | None:
        """Add an image of the left (0) or right (1) stream, and return the pair that it completes, left first.

        Args:
            side: of the stream.
            stamp: of the image, nanoseconds.
            item: is given back in the pair.
            arrived: when it arrived or was recorded, nanoseconds of any clock.
            size: its bytes.
        """
        before = self._last[side]
        self.by_arrival = stamp == 0 or stamp == before
        self._measure(side, stamp, arrived)
        if self._waited[side] is not None:  # this is the answer
            self._waited[side] = None
        elif self._waited[1 - side] is None:
            self._waited[1 - side] = 0.0
        own, others = self._waiting[side], self._waiting[1 - side]
        differences = [abs(stamp - other.stamp) for other in others]
        # Of those that are equally near the newest, which is also the nearest by arrival.
        nearest = min(range(len(others)), key=lambda i: (differences[i], -i), default=None)
        if (
            nearest is None
            or differences[nearest] > self._limit()
            or (self.by_arrival and abs(arrived - others[nearest].arrived) > self._arrival_limit())
        ):
            if nearest is not None:
                self.offset = differences[nearest]
            # This stream is past their partner's time. One stamp alone may be far ahead.
            past = (stamp if before is None else min(stamp, before)) - self._tolerance
            while others and others[0].stamp < past:
                others.popleft()
                self.unpaired[1 - side] += 1
            own.append(_Waiting(stamp, arrived, item, size))
            held = sum(image.size for image in own)
            while len(own) > self._capacity or (held > self._memory and len(own) > 1):  # the oldest make way
                held -= own.popleft().size
                self.unpaired[side] += 1
            return None
        self.since[1 - side] -= 1
        # What came before either of the two has no partner: by arrival, as stamps may have gone back.
        self.unpaired[side] += len(own)
        own.clear()
        for _ in range(nearest):
            others.popleft()
        self.unpaired[1 - side] += nearest
        partner = others.popleft().item
        # Both have come. Or else, after a lost image, each later one would pass for the answer to the last pair.
        self._waited[1 - side], self._waited[side] = None, 0.0 if others else None
        return (item, partner) if side == 0 else (partner, item)

    @property
    def waiting(self) -> list[int]:
        """How many left and right images still wait for their partner."""
        return [len(images) for images in self._waiting]

    def newest(self, side: int) -> Item | None:
        """The last image of the left (0) or right (1) stream, where it has no partner yet."""
        return self._waiting[side][-1].item if self._waiting[side] else None

    def wait(self, now: float) -> None:
        """Let time pass: to be called every tenth of a second or so, with the seconds of any clock."""
        step = 0.0 if self._now is None else min(max(now - self._now, 0.0), _LONGEST_STEP)
        self._now = now
        self._waited = [None if waited is None else waited + step for waited in self._waited]

    def silent(self, side: int, after: float = 0.5) -> bool:
        """Whether an image of the other stream has gone for longer than `after` seconds without one of the left (0) or
        right (1) stream: it has stopped, or not begun."""
        waited = self._waited[side]
        return waited is not None and waited > after

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
