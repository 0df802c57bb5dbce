"""Puts images and their masks together by their stamps. No ROS in here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["MaskSynchroniser"]

Item = TypeVar("Item")

_STEPS = 9  # of a stream, of which the shortest is its period: where messages are lost, the others are longer

_FAR = 10 * 10**9  # nanoseconds by which a mask is not ahead of an image that waits for its own, unless time jumps


class _Mask(NamedTuple):
    """A mask that waits for its image."""

    stamp: int
    item: Any
    size: int


class MaskSynchroniser(Generic[Item]):
    """Finds each image's mask: the one of equal stamp, or else the nearest within a tolerance.

    Masks of a camera come in order, before or after their images. A mask cannot come any more once the last one that
    came is later. Stamps may jump, for good or for one message, which costs no other image its mask.
    One thread may put masks while another waits for them and takes them.

    Args:
        cameras: one, or two.
        tolerance: largest difference of the two stamps, nanoseconds. It never exceeds half the time between two masks,
            or two images that were processed: at that, the mask might as well be another image's.
        capacity: how many masks of a camera wait at most; None where memory alone limits them.
        memory: how many bytes the masks of a camera have at most while they wait, but for the newest one.

    Attributes:
        expected: the cameras, 0 or 1, whose masks somebody sends. Images of others do not wait.
        offset: of each camera, by how much the stamps differed when an image last found no mask, nanoseconds; None
            before, and where there was no mask at all.
        came_late: of each camera, whether a mask came after its image had gone on without, since one came in time.
    """

    def __init__(self, cameras: int, tolerance: int, capacity: int | None, memory: int) -> None:
        self.expected: Collection[int] = ()
        self.offset: list[int | None] = [None] * cameras
        self.came_late = [False] * cameras
        self._tolerance = tolerance
        self._capacity, self._memory = capacity, memory
        self._masks: list[deque[_Mask]] = [deque() for _ in range(cameras)]
        self._held = [0] * cameras  # bytes
        self._taken: list[int | None] = [None] * cameras  # stamp of the last image
        # Stamp of the last mask, or of the first image where time began or went back.
        self._given: list[int | None] = [None] * cameras
        self._alone: list[int | None] = [None] * cameras  # that of the last image that went on without a mask
        self._steps: list[deque[int]] = [deque(maxlen=_STEPS) for _ in range(2 * cameras)]  # of images, of masks
        self._changed = threading.Condition()

    def put(self, camera: int, stamp: int, item: Item, size: int = 0) -> int:
        """Add a mask of camera 0 or 1, and return how many older ones were let go, as too many wait.

        Args:
            camera: whose mask it is.
            stamp: of the mask, nanoseconds.
            item: the mask.
            size: its bytes.
        """
        with self._changed:
            masks, alone = self._masks[camera], self._alone[camera]
            if masks:
                self._measure(2 * camera + 1, masks[-1].stamp, stamp)
            masks.append(_Mask(stamp, item, size))
            self._held[camera] += size
            self.came_late[camera] |= alone is not None and abs(stamp - alone) <= self._limit(camera)
            before = len(masks)
            while self._too_many(camera):
                self._held[camera] -= masks.popleft().size
            self._changed.notify_all()
            return before - len(masks)

    def _too_many(self, camera: int) -> bool:
        waiting = len(self._masks[camera])
        too_many = self._capacity is not None and waiting > self._capacity
        return too_many or (self._held[camera] > self._memory and waiting > 1)

    def complete(self, stamps: Sequence[int]) -> bool:
        """Whether no image of a frame, by their stamps, has to wait: its mask is there, or cannot come any more."""
        with self._changed:
            return self._complete(stamps)

    def wait(self, stamps: Sequence[int], seconds: float) -> None:
        """Wait until the frame is complete, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete(stamps), max(0.0, seconds))

    def take(self, camera: int, stamp: int) -> Item | None:
        """The mask of an image; None where there is none. To be called with every image that is processed, in order."""
        with self._changed:
            found, masks = self._find(camera, stamp), self._masks[camera]
            taken, self._taken[camera] = self._taken[camera], stamp
            if taken is not None:
                self._measure(2 * camera, taken, stamp)
            self.offset[camera] = self._alone[camera] = None
            self.came_late[camera] &= found is None
            if found is None:
                self._alone[camera] = stamp
                self.offset[camera] = min((abs(mask.stamp - stamp) for mask in masks), default=None)
                self._forget(camera, stamp, taken)
                return None
            # What came before is useless, whatever its stamp. The mask is kept: another image may have the same stamp.
            while masks[0] is not found:
                self._held[camera] -= masks.popleft().size
            self._given[camera] = found.stamp
            return found.item

    def _forget(self, camera: int, stamp: int, taken: int | None) -> None:
        """Let go of masks whose images have gone by, when one without a mask follows one of the stamp `taken`."""
        given = self._given[camera]
        if taken is None or stamp < taken:  # the first one, or time went back: masks of either time may be needed
            self._given[camera] = stamp
            return
        # Those older than what was given came after it, so they are of images to come, of a time that went back.
        masks = self._masks[camera]
        gone = range(0 if given is None else given, taken)  # and not to `stamp`: one image's may be far off
        self._masks[camera] = deque(mask for mask in masks if mask.stamp not in gone)
        self._held[camera] = sum(mask.size for mask in self._masks[camera])

    def _complete(self, stamps: Sequence[int]) -> bool:
        return all(
            camera not in self.expected or self._find(camera, stamp) is not None or self._is_past(camera, stamp)
            for camera, stamp in enumerate(stamps)
        )

    def _is_past(self, camera: int, stamp: int) -> bool:
        """Whether the masks are past an image. The last one tells: an older one may be of a time that went back."""
        masks, taken = self._masks[camera], self._taken[camera]
        if not masks or masks[-1].stamp <= stamp:
            return False
        ahead = masks[-1].stamp - stamp
        if ahead > _FAR and (len(masks) == 1 or masks[-2].stamp <= stamp):  # one stamp that is far off tells nothing
            return False
        # Where time went back, a mask that is nearer to the time before belongs to that.
        return taken is None or stamp >= taken or ahead < abs(masks[-1].stamp - taken)

    def _find(self, camera: int, stamp: int) -> _Mask | None:
        """The mask of an image, the newest of those equally near."""
        limit, taken = self._limit(camera), self._taken[camera]
        if taken is not None and stamp > taken:  # this step tells too
            limit = min(limit, (stamp - taken) // 2)
        near = [mask for mask in self._masks[camera] if abs(mask.stamp - stamp) <= limit]
        return min(reversed(near), key=lambda mask: abs(mask.stamp - stamp), default=None)

    def _measure(self, stream: int, before: int, now: int) -> None:
        if now > before:
            self._steps[stream].append(now - before)

    def _limit(self, camera: int) -> int:
        periods = (min(steps) for steps in self._steps[2 * camera : 2 * camera + 2] if steps)
        return min([self._tolerance, *(period // 2 for period in periods)])
