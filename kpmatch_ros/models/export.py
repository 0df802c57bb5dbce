"""Export of the networks as ONNX graphs for other runtimes: ONNX Runtime, TensorRT, OpenVINO.

A graph holds what a network computes from tensors to tensors: the dense part of SuperPoint, or all layers of a matcher
with the assignment. It does not include the selection of keypoints: use :meth:`SuperPoint.select`.
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

OPSET = 17  # the first opset with layer normalisation; TensorRT 8.6 and OpenVINO 2023 support it


class ExportError(ValueError):
    """A network cannot be exported, or a package for it is not installed; the text gives the reason and the remedy."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: name of the tensor.
        dtype: float32, int64 or bool.
        shape: for each dimension its size, or a name if the dimension is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """The inputs and outputs of a graph, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class DensePart(nn.Module):
    """SuperPoint without the selection of keypoints, and without the optimisations for the processor."""

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
    """A matcher with all layers, in operations on real numbers, with a control flow that does not depend on values."""

    def __init__(self, matcher: LightGlue | SuperGlue) -> None:
        super().__init__()
        self.matcher = copy.deepcopy(matcher).float().to("cpu")
        if isinstance(self.matcher, LightGlue):
            self.matcher.positional_encoder.as_complex = False
        else:
            self.matcher.steps_between = 0
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Match two images, given for each of them keypoints, descriptors, mask, size, and for SuperGlue scores."""
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
    """Features with zeros at padding, where the given values may be anything, even NaN."""
    keypoints, descriptors = (torch.where(mask[..., None], given, 0.0) for given in (keypoints, descriptors))
    return ImageFeatures(keypoints, descriptors, size, mask, None if scores is None else torch.where(mask, scores, 0.0))


def check_exportable(extractor: nn.Module, matcher: nn.Module) -> None:
    """Raise ExportError if the networks cannot be exported, before any file is written."""
    if not isinstance(extractor, SuperPoint):
        raise ExportError(
            f"the extractor is {type(extractor).__name__}, but only SuperPoint can be exported: choose a SuperPoint "
            "extractor and a matcher made for it"
        )
    if not isinstance(matcher, (LightGlue, SuperGlue)):
        raise ExportError(
            f"the matcher is {type(matcher).__name__}, which has no network to export: choose LightGlue or SuperGlue"
        )
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError(f"onnx is not installed ({error}): pip install onnx onnxruntime") from error


def export_extractor(extractor: SuperPoint, file: Path, size: tuple[int, int], dynamic: bool) -> Graph:
    """Export SuperPoint's dense part.

    Args:
        extractor: a network in any precision, on any device. It is not changed. The graph is float32.
        file: the file to write.
        size: width and height of the images, pixels, at least 8 each, with a product of LARGEST_IMAGE or less.
        dynamic: whether the number and the size of the images are dynamic.

    Raises:
        ExportError: the size is too small or too large.
        OSError: the file cannot be written.
    """
    width, height = size
    if min(size) < CELL:
        raise ExportError(
            f"images of {width} x {height} pixels are too small: SuperPoint needs {CELL} x {CELL} or more"
        )
    if width * height > LARGEST_IMAGE:
        raise ExportError(
            f"images of {width} x {height} pixels are too large for the networks, whose limit is "
            f"{LARGEST_IMAGE / 1e6:.1f} million pixels: choose a smaller size"
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
    """Export a matcher with all its layers and its ``filter_threshold``.

    Args:
        matcher: a network in any precision, on any device. It is not changed. The graph is float32.
        file: the file to write.
        keypoints: number of keypoints of each image including padding; masks mark the real ones.
        dynamic: whether the number of pairs and each image's number of keypoints are dynamic.

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
    # Different sizes, so that the tracing does not confuse two dynamic dimensions.
    numbers = {"B": 2, "N0": 24, "N1": 40}
    shapes = [[numbers[d] if isinstance(d, str) else d for d in port.shape] for port in inputs]
    examples = [
        torch.ones(*shape, dtype=getattr(torch, port.dtype), device="cpu") for shape, port in zip(shapes, inputs)
    ]
    export_module(WholeMatcher(matcher), examples, graph, file)
    return graph


@torch.no_grad()
def export_module(module: nn.Module, examples: Sequence[Tensor], graph: Graph, file: Path) -> None:
    """Trace a module, name the dimensions of its graph, and check the graph with ONNX.

    Args:
        module: a module from tensors to tensors.
        examples: its inputs, of any size in the dynamic dimensions.
        graph: names and shapes of its inputs and outputs.
        file: the file to write.

    Raises:
        OSError: the file cannot be written.
    """
    import onnx

    # Tracing takes seconds, torch.export minutes, and every PyTorch supports tracing.
    options: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with ExitStack() as stack:
        # PyTorch's exporter creates constants on the default device, with the default data type.
        stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(warnings.catch_warnings())
        # The warnings say that this exporter is old, and that values become constants. export_check compares results.
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
