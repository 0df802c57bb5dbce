"""Arrays side by side: row i of each says something of the same thing."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

__all__ = ["ParallelArrays"]

Arrays = TypeVar("Arrays", bound="ParallelArrays")


class ParallelArrays:
    """Base of dataclasses whose members are nothing but arrays of one length."""

    def select(self: Arrays, chosen: np.ndarray | slice) -> Arrays:
        """The rows that a mask, an array of indices or a slice names."""
        return type(self)(*(values[chosen] for values in vars(self).values()))

    def join(self: Arrays, *others: Arrays) -> Arrays:
        """These rows, and then the others'."""
        return type(self)(*map(np.concatenate, zip(*(vars(part).values() for part in (self, *others)))))
