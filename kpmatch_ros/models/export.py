"""The networks as ONNX graphs, for other runtimes: ONNX Runtime, TensorRT, OpenVINO.

A graph holds what a network computes from tensors to tensors: of SuperPoint the dense part, of a matcher all layers and
the assignment. The selection of keypoints is not in it: :meth:`SuperPoint.select` does that.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.base import LARGEST_IMAGE
from kpmatch_ros.models.lightglue import LightGlue
from kpmatch_ros.models.superglue import SuperGlue
from kpmatch_ros.models.superpoint import CELL, ConvBlock, SuperPoint
from kpmatch_ros.models.transformed import TransformedConv2d

__all__ = [
    "OPSET",
    "DensePart",
    "ExportError",
    "Graph",
    "Port",
    "WholeMatcher",
    "check_exportable",
    "export_extractor",
    "export_matcher",
    "export_module",
]

OPSET = 17  # the first with layer normalisation, and one that TensorRT 8.6 and OpenVINO 2023 know


class ExportError(ValueError):
    """A network cannot be exported, or what exports is not installed; the text says why and what to do."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: of the tensor.
        dtype: float32, int64 or bool.
        shape: a number for each dimension, or a name where it is free.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """What a graph takes and gives, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class DensePart(nn.Module):
    """SuperPoint without the selection of keypoints, and without what only a processor asks for."""

    def __init__(self, extractor: SuperPoint) -> None:
        super().__init__()
        self.extractor = copy.deepcopy(extractor).float().cpu()
        for module in self.extractor.modules():
            if isinstance(module, ConvBlock):
                module.in_bands = False
            elif isinstance(module, TransformedConv2d):
                module.transformed = False
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.extractor.dense(image)


class WholeMatcher(nn.Module):
    """A matcher with all layers, in operations on real numbers that do not depend on a value."""

    def __init__(self, matcher: LightGlue | SuperGlue) -> None:
        super().__init__()
        self.matcher = copy.deepcopy(matcher).float().to("cpu")
        if isinstance(self.matcher, LightGlue):
            self.matcher.positional_encoder.as_complex = False
        else:
            self.matcher.steps_between = 0
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Arguments: for each image keypoints, descriptors, mask, size, and for SuperGlue detection scores."""
        half = len(tensors) // 2
        image0, image1 = (_features(*part) for part in (tensors[:half], tensors[half:]))
        if isinstance(self.matcher, LightGlue):
            found = self.matcher.match_all(image0, image1)
        else:
            found = self.matcher.assign(*self.matcher.states(image0, image1), image0.mask, image1.mask)
        return found.matches0, found.matches1, found.scores0, found.scores1


def _features(
    keypoints: Tensor, descriptors: Tensor, mask: Tensor, size: Tensor, scores: Tensor | None = None
) -> ImageFeatures:
    """With zeros in the places without a keypoint: what stands there may not even be a number."""
    keypoints, descriptors = (torch.where(mask[..., None], given, 0.0) for given in (keypoints, descriptors))
    return ImageFeatures(keypoints, descriptors, size, mask, None if scores is None else torch.where(mask, scores, 0.0))


def check_exportable(extractor: nn.Module, matcher: nn.Module) -> None:
    """Say what cannot be exported before anything is. Raises ExportError."""
    if not isinstance(extractor, SuperPoint):
        raise ExportError(
            f"the extractor is {type(extractor).__name__}, and only SuperPoint can be exported: take a SuperPoint "
            "extractor and a matcher made for it"
        )
    if not isinstance(matcher, (LightGlue, SuperGlue)):
        raise ExportError(
            f"the matcher is {type(matcher).__name__}, which has no network to export: take LightGlue or SuperGlue"
        )
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError(f"onnx is not installed ({error}): pip install onnx onnxruntime") from error


def export_extractor(extractor: SuperPoint, file: Path, size: tuple[int, int], dynamic: bool) -> Graph:
    """Write SuperPoint's dense part.

    Args:
        extractor: in any precision, on any device. It stays as it is, and the graph is float32.
        file: to write.
        size: width and height of the images, pixels, at least 8 each, with a product of LARGEST_IMAGE or less.
        dynamic: number and size of the images are free.

    Raises:
        ExportError: the size is too small or too large.
        OSError: the file cannot be written.
    """
    width, height = size
    if min(size) < CELL:
        raise ExportError(
            f"images of {width} x {height} pixels are too small: SuperPoint takes {CELL} x {CELL} or more"
        )
    if width * height > LARGEST_IMAGE:
        raise ExportError(
            f"images of {width} x {height} pixels are too large for the networks, which take "
            f"{LARGEST_IMAGE / 1e6:.1f} million pixels: name a smaller size"
        )
    batch: int | str = "B" if dynamic else 1
    rows, columns = ("H / 8", "W / 8") if dynamic else (height // CELL, width // CELL)
    graph = Graph(
        (Port("image", "float32", (batch, 1, "H", "W") if dynamic else (1, 1, height, width)),),
        (
            Port("scores", "float32", (batch, "8 (H / 8)", "8 (W / 8)"))
            if dynamic
            else Port("scores", "float32", (1, height // CELL * CELL, width // CELL * CELL)),
            Port("descriptors", "float32", (batch, extractor.descriptor_size, rows, columns)),
        ),
    )
    export_module(
        DensePart(extractor), [torch.zeros(1, 1, height, width, dtype=torch.float32, device="cpu")], graph, file
    )
    return graph


def export_matcher(matcher: LightGlue | SuperGlue, file: Path, keypoints: int, dynamic: bool) -> Graph:
    """Write a matcher, with all its layers and its ``filter_threshold``.

    Args:
        matcher: in any precision, on any device. It stays as it is, and the graph is float32.
        file: to write.
        keypoints: places for keypoints in each image; masks say which hold one.
        dynamic: the numbers of pairs and of places are free, the latter for each image on its own.

    Raises:
        OSError: the file cannot be written.
    """
    batch: int | str = "B" if dynamic else 1
    counts: list[int | str] = ["N0", "N1"] if dynamic else [keypoints, keypoints]
    inputs: list[Port] = []
    for i, count in enumerate(counts):
        inputs += [
            Port(f"keypoints{i}", "float32", (batch, count, 2)),
            Port(f"descriptors{i}", "float32", (batch, count, matcher.input_dim)),
            Port(f"mask{i}", "bool", (batch, count)),
            Port(f"size{i}", "float32", (batch, 2)),
        ]
        if isinstance(matcher, SuperGlue):
            inputs.append(Port(f"detection_scores{i}", "float32", (batch, count)))
    outputs = [
        Port(f"{name}{i}", dtype, (batch, count))
        for name, dtype in (("matches", "int64"), ("scores", "float32"))
        for i, count in enumerate(counts)
    ]
    graph = Graph(tuple(inputs), tuple(outputs))
    # Numbers that differ, so that no free dimension is taken for another.
    numbers = {"B": 2, "N0": 24, "N1": 40}
    shapes = [[numbers[d] if isinstance(d, str) else d for d in port.shape] for port in inputs]
    examples = [
        torch.ones(*shape, dtype=getattr(torch, port.dtype), device="cpu") for shape, port in zip(shapes, inputs)
    ]
    export_module(WholeMatcher(matcher), examples, graph, file)
    return graph


@torch.no_grad()
def export_module(module: nn.Module, examples: Sequence[Tensor], graph: Graph, file: Path) -> None:
    """Trace a module, name the dimensions of its graph, and have ONNX check it.

    Args:
        module: of tensors to tensors.
        examples: its inputs, of any numbers in the free dimensions.
        graph: the names of its inputs and outputs, and their shapes.
        file: to write.

    Raises:
        OSError: the file cannot be written.
    """
    import onnx

    # Tracing takes seconds where torch.export takes minutes, and every PyTorch has it.
    options: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with ExitStack() as stack:
        # PyTorch's exporter makes constants on the default device, in the default number format.
        stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(warnings.catch_warnings())
        # Of the age of this way of exporting, and of values that become constants: export_check compares the results.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(examples),
            str(file),
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            dynamic_axes={
                port.name: {i: name for i, name in enumerate(port.shape) if isinstance(name, str)}
                for port in (*graph.inputs, *graph.outputs)
            },
            opset_version=OPSET,
            **options,
        )
    model = onnx.load(str(file))
    for value, port in zip(model.graph.output, graph.outputs):
        value.type.tensor_type.shape.CopyFrom(
            onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, port.shape).tensor_type.shape
        )
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
