"""Matches images and their masks by their stamps. This module does not need ROS."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["MaskSynchroniser"]

Item = TypeVar("Item")

_STEPS = 9  # last intervals of a stream; the shortest is its period, because lost messages make intervals longer

_FAR = 10 * 10**9  # nanoseconds: a mask that is further ahead of a waiting image has a wrong stamp, or time jumped


class _Mask(NamedTuple):
    """A mask that waits for its image."""

    stamp: int
    item: Any
    size: int


class MaskSynchroniser(Generic[Item]):
    """Finds each image's mask: the one with the same stamp, or else the nearest one within a tolerance.

    Masks of a camera arrive in order, before or after their images. Once a mask later than an image has arrived, the
    image's own mask can no longer arrive. Stamps may jump, permanently or for one message; this costs no other image
    its mask.

    One thread may put masks while another waits for them and takes them.

    Args:
        cameras: number of cameras, one or two.
        tolerance: largest difference between the two stamps, nanoseconds. It is reduced to half the time between two
            masks, or between two processed images, because beyond that the mask may belong to another image.
        capacity: largest number of waiting masks for each camera; None if only `memory` limits them.
        memory: largest size of the waiting masks of each camera, bytes, except the newest one.

    Attributes:
        expected: the cameras, 0 or 1, whose masks are published. Images of other cameras do not wait.
        offset: by camera, if the last image found no mask, the distance to the nearest mask's stamp, nanoseconds. None
            if it found its mask, or if no mask was waiting.
        came_late: by camera, whether a mask came after its image had been processed without it. It is reset when an
            image finds its mask.
    """

    def __init__(self, cameras: int, tolerance: int, capacity: int | None, memory: int) -> None:
        self.expected: Collection[int] = ()
        self.offset: list[int | None] = [None] * cameras
        self.came_late = [False] * cameras
        self._tolerance = tolerance
        self._capacity, self._memory = capacity, memory
        self._masks: list[deque[_Mask]] = [deque() for _ in range(cameras)]
        self._held = [0] * cameras  # bytes of the waiting masks
        self._taken: list[int | None] = [None] * cameras  # stamp of the last processed image
        # Stamp of the last image before time went back, until an image of the new time has found its mask.
        self._before: list[int | None] = [None] * cameras
        # Stamp of the last mask that was taken, or of the first image without a mask at the start or after time went
        # back.
        self._given: list[int | None] = [None] * cameras
        self._alone: list[int | None] = [None] * cameras  # stamp of the last image, if it was processed without a mask
        self._steps: list[deque[int]] = [deque(maxlen=_STEPS) for _ in range(2 * cameras)]  # intervals: images, masks
        self._changed = threading.Condition()

    def put(self, camera: int, stamp: int, item: Item, size: int = 0) -> int:
        """Add a mask of camera 0 or 1, and return how many older masks were dropped because too many wait.

        Args:
            camera: of the mask, 0 or 1.
            stamp: of the mask, nanoseconds.
            item: the mask.
            size: of the mask, bytes.
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
        """Whether no image of a frame, given by the stamps, has to wait: each mask is there or can no longer arrive."""
        with self._changed:
            return self._complete(stamps)

    def wait(self, stamps: Sequence[int], seconds: float) -> None:
        """Wait until the frame is complete, for at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete(stamps), max(0.0, seconds))

    def take(self, camera: int, stamp: int) -> Item | None:
        """The mask of an image; None if there is none. Call it for every image that is processed, in order."""
        with self._changed:
            found, masks = self._find(camera, stamp), self._masks[camera]
            taken, self._taken[camera] = self._taken[camera], stamp
            if taken is not None:
                self._measure(2 * camera, taken, stamp)
                if stamp < taken:
                    self._before[camera] = taken
            if found is not None:
                self._before[camera] = None
            self.offset[camera] = self._alone[camera] = None
            self.came_late[camera] &= found is None
            if found is None:
                self._alone[camera] = stamp
                self.offset[camera] = min((abs(mask.stamp - stamp) for mask in masks), default=None)
                self._forget(camera, stamp, taken)
                return None
            # Masks that arrived before this one are not needed any more, whatever their stamps. This mask is kept,
            # because another image may have the same stamp.
            while masks[0] is not found:
                self._held[camera] -= masks.popleft().size
            self._given[camera] = found.stamp
            return found.item

    def _forget(self, camera: int, stamp: int, taken: int | None) -> None:
        """Drop masks whose images have passed, after an image without a mask. The previous image has stamp `taken`."""
        given = self._given[camera]
        if taken is None or stamp < taken:  # first image, or time went back: masks of both times may be needed
            self._given[camera] = stamp
            return
        # Masks older than the last one taken arrived after it. They belong to images to come, after time went back.
        masks = self._masks[camera]
        gone = range(0 if given is None else given, taken)  # not up to `stamp`: a single image's stamp may be wrong
        self._masks[camera] = deque(mask for mask in masks if mask.stamp not in gone)
        self._held[camera] = sum(mask.size for mask in self._masks[camera])

    def _complete(self, stamps: Sequence[int]) -> bool:
        return all(
            camera not in self.expected or self._is_there(camera, stamp) or self._is_past(camera, stamp)
            for camera, stamp in enumerate(stamps)
        )

    def _is_there(self, camera: int, stamp: int) -> bool:
        """Whether an image's mask has arrived.

        Until two images or masks have shown a period, a mask with another stamp may belong to another image.
        """
        found = self._find(camera, stamp)
        return found is not None and (found.stamp == stamp or any(self._steps[2 * camera : 2 * camera + 2]))

    def _is_past(self, camera: int, stamp: int) -> bool:
        """Whether the masks are past an image, so that its own can no longer arrive.

        Only the last mask counts, because an older one may be from before a jump back in time.
        """
        masks, taken = self._masks[camera], self._taken[camera]
        if not masks or masks[-1].stamp <= stamp:
            return False
        ahead = masks[-1].stamp - stamp
        if ahead > _FAR and (len(masks) == 1 or masks[-2].stamp <= stamp):  # a single stamp far ahead may be wrong
            return False
        # After time went back, a mask that is nearer to the last image before the jump is still from before it.
        before = taken if taken is not None and stamp < taken else self._before[camera]
        return before is None or ahead < abs(masks[-1].stamp - before)

    def _find(self, camera: int, stamp: int) -> _Mask | None:
        """The mask of an image; of several equally near masks, the newest one."""
        limit, taken = self._limit(camera), self._taken[camera]
        if taken is not None and stamp > taken:  # the interval to the previous image limits the tolerance too
            limit = min(limit, (stamp - taken) // 2)
        near = [mask for mask in self._masks[camera] if abs(mask.stamp - stamp) <= limit]
        return min(reversed(near), key=lambda mask: abs(mask.stamp - stamp), default=None)

    def _measure(self, stream: int, before: int, now: int) -> None:
        if now > before:
            self._steps[stream].append(now - before)

    def _limit(self, camera: int) -> int:
        periods = (min(steps) for steps in self._steps[2 * camera : 2 * camera + 2] if steps)
        return min([self._tolerance, *(period // 2 for period in periods)])
