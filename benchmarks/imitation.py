"""Recordings of the networks' work imitated where there is no GPU, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Imitation"]


class Imitation:
    """Repeats work by calling the function again: what :class:`kpmatch_ros.cuda_graphs.Recording` does on a GPU.

    Results land where the first ones were, as on a GPU. Their number may change, since on a processor SuperPoint gives
    as many keypoints as there are.
    """

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """As :meth:`kpmatch_ros.cuda_graphs.Recorder.record`."""
        outputs = tuple(output.clone() for output in work())

        def replay() -> None:
            for place, result in zip(outputs, work()):
                place.resize_(result.shape).copy_(result)

        return replay, outputs
