"""Imitation of CUDA graphs on machines without a GPU, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Imitation"]


class Imitation:
    """Imitates :class:`kpmatch_ros.cuda_graphs.Recording` by calling the function again.

    As on a GPU, results are written to the tensors of the first call. Their size may change, because on a processor
    SuperPoint returns as many keypoints as it finds.
    """

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """See :meth:`kpmatch_ros.cuda_graphs.Recorder.record`."""
        outputs = tuple(output.clone() for output in work())

        def replay() -> None:
            for place, result in zip(outputs, work()):
                place.resize_(result.shape).copy_(result)

        return replay, outputs
