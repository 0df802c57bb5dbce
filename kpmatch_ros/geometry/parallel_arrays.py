"""Parallel arrays: row i of each array describes the same object."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

__all__ = ["ParallelArrays"]

Arrays = TypeVar("Arrays", bound="ParallelArrays")


class ParallelArrays:
    """Base class of dataclasses whose members are all arrays of the same length."""

    def select(self: Arrays, chosen: np.ndarray | slice) -> Arrays:
        """The rows selected by a mask, an array of indices or a slice."""
        return type(self)(*(values[chosen] for values in vars(self).values()))

    def join(self: Arrays, *others: Arrays) -> Arrays:
        """These rows, followed by the others'."""
        return type(self)(*map(np.concatenate, zip(*(vars(part).values() for part in (self, *others)))))
