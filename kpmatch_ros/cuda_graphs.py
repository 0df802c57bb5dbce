"""CUDA graphs: the networks' work is recorded once for fixed shapes, and then started with a single call.

A GPU runs LightGlue's 1,400 kernels in less time than the host needs to launch them one by one. A recording launches
all of them. It reads and writes memory at fixed addresses. Therefore the inputs are copied to these addresses, numbers
of keypoints are rounded up to one of :data:`SIZES`, and masks mark the padding.

If something cannot be recorded, the networks run without recordings, with one warning.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kpmatch_ros.models import LightGlue, SuperGlue
from kpmatch_ros.models.assignment import Assignment, ImageFeatures
from kpmatch_ros.models.base import Extractor
from kpmatch_ros.models.detections import Detections
from kpmatch_ros.models.lightglue import PendingBool
from kpmatch_ros.models.lightglue_layers import Points

__all__ = ["SIZES", "CudaGraphs", "Recording", "batch_is_small", "padded_size"]

SIZES = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)  # numbers of keypoints that recordings are made for

_KEPT = 12  # largest number of recordings; the least recently used one is discarded first
_PAIRS = 4  # a larger batch keeps a GPU busy even without recordings

Outputs = tuple[Tensor, ...]


class Recorder(Protocol):
    """Something that can record work and repeat it."""

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the work of a function on tensors at fixed addresses.

        Returns:
            A function that repeats the work, and the tensors that hold its results after each repetition.

        Raises:
            RuntimeError: if the work cannot be recorded.
        """


class Recording:
    """Records with CUDA graphs. All recordings of an instance share memory, so only one of them may run at a time.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """As :meth:`Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as those that receive images, may use the GPU during the capture.
        options: Any = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device), torch.cuda.graph(graph, **options):
            outputs = work()
        return graph.replay, outputs

    def __reduce__(self) -> tuple[Any, ...]:
        return Recording, (self.device,)  # a copy gets its own stream and memory pool


class CudaGraphs:
    """Runs networks with recordings of their work.

    Args:
        recorder: makes the recordings; a :class:`Recording` for a GPU.

    Attributes:
        enabled: whether recordings are used. It becomes false when a recording fails.
        failure: reason why a recording failed; empty if none failed.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.enabled = True
        self.failure = ""
        self._recorder = recorder
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: a failed recording calls clear() while it holds the lock

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has no recordings, because recordings use the weights of the original at their addresses.
        return CudaGraphs, (self._recorder,), {"enabled": self.enabled, "failure": self.failure}

    @classmethod
    def for_device(cls, device: torch.device) -> CudaGraphs | None:
        """Return an instance for a GPU; None for a CPU, where recordings bring no gain."""
        return cls(Recording(device)) if device.type == "cuda" else None

    def __len__(self) -> int:
        """Return the number of shapes with recordings."""
        return len(self._recorded)

    def clear(self) -> None:
        """Discard all recordings and release their memory."""
        with self._lock:
            self._recorded.clear()
            if isinstance(self._recorder, Recording):
                self._recorder = Recording(self._recorder.device)  # a released memory pool cannot be used again

    @torch.inference_mode()
    def run(self, network: nn.Module, *inputs: Any) -> Any:
        """Return the result of ``network(*inputs)``, from a recording if possible.

        Args:
            network: an extractor or a matcher of :mod:`kpmatch_ros.models`. Its weights must stay at their addresses: a
                conversion to another precision moves them and requires :meth:`clear`.
            inputs: the network's inputs.
        """
        found = self._use(network, inputs, lambda recorded: recorded(*inputs))
        return network(*inputs) if found is None else found

    @torch.inference_mode()
    def record(self, network: nn.Module, *inputs: Any) -> None:
        """Record in advance everything that :meth:`run` may need for inputs of these shapes. Arguments as for run."""
        self._use(network, inputs, lambda recorded: recorded.record_all())

    def _use(self, network: nn.Module, inputs: Sequence[Any], use: Callable[[Any], Any]) -> Any:
        """Return the result of ``use`` for the recording of these inputs; None if they cannot be recorded."""
        with self._lock:
            if not self.enabled:  # checked under the lock: a recording may have failed while this thread was waiting
                return None
            try:
                recorded = self._find(network, inputs)
                return None if recorded is None else use(recorded)
            except _CannotRecord as error:
                self.enabled, self.failure = False, str(error)
                self.clear()
                warnings.warn(
                    f"CUDA graphs are not used, and the networks run slower: {error}", RuntimeWarning, stacklevel=3
                )
                return None

    def _find(self, network: nn.Module, inputs: Sequence[Any]) -> _Recorded | None:
        """Return the recording for these inputs; None if this kind of network or input is not recorded."""
        # A recording runs no Python code, so a trace would not see the network's operations.
        if getattr(network, "is_traced", False):
            return None
        if isinstance(network, Extractor):
            image, *masks = inputs  # with or without a mask of allowed pixels
            if network.max_keypoints < 0:
                return None  # the number of keypoints is not known in advance
            key: Hashable = (
                *_identity(network, image),
                *(getattr(network, name) for name in ("max_keypoints", "keypoint_threshold", "nms_radius", "border")),
                getattr(network, "subpixel", False),
                len(masks),
            )
            return self._get(key, lambda: _RecordedExtractor(network, inputs, self._record))
        if isinstance(network, (LightGlue, SuperGlue)):
            image0, image1 = inputs
            counts = image0.num_keypoints, image1.num_keypoints
            size = padded_size(max(counts))
            # Only single pairs without masks are recorded: small batches are passed pair by pair, without masks.
            has_mask = image0.mask is not None or image1.mask is not None
            if len(image0.keypoints) > 1 or has_mask or min(counts) == 0 or size is None:
                return None
            if isinstance(network, SuperGlue) and (image0.scores is None or image1.scores is None):
                return None  # the network itself raises the error about the missing scores
            padded = counts != (size, size)
            kind: Any = _RecordedLightGlue if isinstance(network, LightGlue) else _RecordedSuperGlue
            confidence = getattr(network, "depth_confidence", -1.0)
            key = (*_identity(network, image0.descriptors[:, :0]), size, padded, network.filter_threshold, confidence)
            return self._get(key, lambda: kind(network, image0, image1, size, padded, self._record))
        return None

    def _get(self, key: Hashable, make: Callable[[], _Recorded]) -> _Recorded:
        if key in self._recorded:
            self._recorded.move_to_end(key)
        else:
            while len(self._recorded) >= _KEPT:
                self._recorded.popitem(last=False)
            self._recorded[key] = make()
        return self._recorded[key]

    def _record(self, work: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        # Run once without recording. Libraries choose their algorithms in this run, which a capture does not allow.
        # Errors of the work itself are raised here, as without recordings.
        work()
        try:
            return self._recorder.record(work)
        except RuntimeError as error:
            raise _CannotRecord(str(error).strip().partition("\n")[0]) from error


class _CannotRecord(Exception):
    """A recording failed."""


def padded_size(count: int) -> int | None:
    """Return the smallest of :data:`SIZES` that is at least ``count``; None if all are smaller."""
    return next((size for size in SIZES if size >= count), None)


def batch_is_small(pairs: int) -> bool:
    """Whether a batch is matched faster pair by pair with recordings than as one batch without them."""
    return pairs <= _PAIRS


def _identity(network: nn.Module, example: Tensor) -> tuple[Hashable, ...]:
    return id(network), tuple(example.shape), example.dtype, example.device


Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


class _Recorded:
    """A recorded network for inputs of one shape. A call returns the network's result."""

    def __call__(self, *inputs: Any) -> Any:
        raise NotImplementedError

    def record_all(self) -> None:
        """Record everything that is otherwise recorded on first use. This base class has nothing of that kind."""


class _RecordedExtractor(_Recorded):
    """A recorded extractor for images of one shape, with or without masks."""

    def __init__(self, network: Extractor, inputs: Sequence[Tensor], record: Record) -> None:
        self._places = [tensor.clone() for tensor in inputs]
        self._replay, self._found = record(lambda: tuple(network(*self._places)))

    def __call__(self, *inputs: Tensor) -> Detections:
        for place, tensor in zip(self._places, inputs):
            place.copy_(tensor)
        self._replay()
        return Detections(*(tensor.clone() for tensor in self._found))


class _PaddedFeatures:
    """The memory from which recordings read an image's features, with ``size`` places for keypoints.

    Args:
        example: features of one image.
        size: number of places.
        padded: whether some places may be empty. A mask then marks the filled ones.
    """

    def __init__(self, example: ImageFeatures, size: int, padded: bool) -> None:
        device = example.keypoints.device
        kind: Any = {"dtype": torch.float32, "device": device}
        self._index = torch.arange(size, device=device)[None]
        self._filled = 0
        self._scores = torch.zeros(1, size, **kind)
        self.features = ImageFeatures(
            keypoints=torch.zeros(1, size, 2, **kind),
            descriptors=torch.zeros(1, size, example.descriptors.shape[2], **kind),
            size=torch.zeros_like(example.size),
            mask=torch.ones_like(self._index, dtype=torch.bool) if padded else None,
            scores=self._scores,
        )
        self.fill(example)

    def fill(self, image: ImageFeatures) -> None:
        """Copy an image's features into the places."""
        count, places = image.num_keypoints, self.features
        places.keypoints[:, :count].copy_(image.keypoints)
        places.descriptors[:, :count].copy_(image.descriptors)
        places.size.copy_(image.size)
        if image.scores is not None:
            self._scores[:, :count].copy_(image.scores)
        if places.mask is not None and count != self._filled:
            torch.lt(self._index, count, out=places.mask)
            # Old values in the padding could be infinite, and their product with a weight of zero would be NaN.
            places.keypoints[:, count:].zero_()
            places.descriptors[:, count:].zero_()
            self._scores[:, count:].zero_()
        self._filled = count


def _unpadded(found: Sequence[Tensor], count0: int, count1: int) -> Assignment:
    """Return a copy of a recording's assignment, without the padding."""
    return Assignment(*(tensor.clone() for tensor in Assignment(*found).first(count0, count1)))


class _RecordedSuperGlue(_Recorded):
    """SuperGlue for one number of places. Its layers are recorded; the optimal transport runs without a recording."""

    def __init__(
        self, network: SuperGlue, image0: ImageFeatures, image1: ImageFeatures, size: int, padded: bool, record: Record
    ) -> None:
        self._network = network
        self._places = [_PaddedFeatures(image, size, padded) for image in (image0, image1)]
        places0, places1 = (places.features for places in self._places)
        self._masks = places0.mask, places1.mask
        self._replay, self._states = record(lambda: network.states(places0, places1))

    def __call__(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        for places, image in zip(self._places, (image0, image1)):
            places.fill(image)
        self._replay()
        states0, states1 = self._states
        found = self._network.assign(states0, states1, *self._masks)
        return _unpadded(found, image0.num_keypoints, image1.num_keypoints)


class _RecordedLightGlue(_Recorded):
    """LightGlue for one number of places.

    Without early stopping there is one recording. With early stopping there is one for each layer and one for the
    assignment after each layer, made on first use. All of these read and write the points' states in two buffers in
    turn. So the output of a layer is still available after the next layer has run ahead. The buffers lie outside of the
    memory that recordings share.

    Points are not pruned, because their number would change from layer to layer.
    """

    def __init__(
        self, network: LightGlue, image0: ImageFeatures, image1: ImageFeatures, size: int, padded: bool, record: Record
    ) -> None:
        self._network, self._record = network, record
        self._places = [_PaddedFeatures(image, size, padded) for image in (image0, image1)]
        self._stops = network.depth_confidence > 0
        self._recorded: dict[Hashable, tuple[Callable[[], None], Outputs]] = {}
        if self._stops:
            encoded = self._encode()
            self._rotations = [points.rotation.clone() for points in encoded]
            self._states = [[points.x.clone() for points in encoded] for _ in range(2)]
            self._sure = [torch.zeros((), dtype=torch.bool, device=self._device) for _ in network.token_confidence]

    @property
    def _device(self) -> torch.device:
        return self._places[0].features.keypoints.device

    def __call__(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        for places, image in zip(self._places, (image0, image1)):
            places.fill(image)
        count0, count1 = image0.num_keypoints, image1.num_keypoints
        if not self._stops:
            found = self._run("all", self._match_all)
            return _unpadded(found, count0, count1)
        self._run("encode", self._encode_to_buffers)
        return _unpadded(self._run_assignment(self._run_layers()), count0, count1)

    def record_all(self) -> None:
        if not self._stops:
            self._run("all", self._match_all)
            return
        self._run("encode", self._encode_to_buffers)
        for layer in range(len(self._network.transformer_layers)):
            self._run_layer(layer)
            self._run_assignment(layer + 1)

    def _run(self, name: Hashable, work: Callable[[], Outputs]) -> Outputs:
        if name not in self._recorded:
            self._recorded[name] = self._record(work)
        replay, found = self._recorded[name]
        replay()
        return found

    def _run_layers(self) -> int:
        """Run layers until early stopping applies, and return the number of layers that count."""
        last = len(self._network.transformer_layers)
        enough: PendingBool | None = None
        for layer in range(last):
            self._run_layer(layer)
            # The GPU already runs this layer while the host reads the stopping decision of the previous layer.
            if enough:
                return layer
            if layer < last - 1:
                enough = PendingBool(self._sure[layer])
        return last

    def _run_layer(self, layer: int) -> None:
        self._run(layer, partial(self._layer_to_buffers, layer))

    def _run_assignment(self, layers: int) -> Outputs:
        return self._run(("assign", layers), partial(self._assign, layers))

    def _encode(self) -> list[Points]:
        return [self._network.encode(places.features) for places in self._places]

    def _points(self, place: int) -> list[Points]:
        """Return the points with the states in one of the two buffers."""
        index = torch.zeros(0, dtype=torch.int64, device=self._device)  # no point is pruned
        return [
            Points(x, rotation, places.features.mask, index, index)
            for x, rotation, places in zip(self._states[place], self._rotations, self._places)
        ]

    def _match_all(self) -> Outputs:
        places0, places1 = self._places
        return tuple(self._network.match_all(places0.features, places1.features))

    def _encode_to_buffers(self) -> Outputs:
        for points, state, rotation in zip(self._encode(), self._states[0], self._rotations):
            state.copy_(points.x)
            rotation.copy_(points.rotation)
        return ()

    def _layer_to_buffers(self, layer: int) -> Outputs:
        network, (points0, points1) = self._network, self._points(layer % 2)
        states = network.transformer_layers[layer](points0, points1)
        for place, state in zip(self._states[(layer + 1) % 2], states):
            place.copy_(state)
        if layer < len(self._sure):
            self._sure[layer].copy_(
                network.are_sure(replace(points0, x=states[0]), replace(points1, x=states[1]), layer)
            )
        return ()

    def _assign(self, layers: int) -> Outputs:
        points0, points1 = self._points(layers % 2)
        return tuple(self._network.assign(points0, points1, layers))
