"""Compiled code for the processor: LightGlue's layers and assignment, SuperPoint's convolutions and scores.

The build of the ROS package compiles the library from src/*.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.runtime import compiled_library
from kpmatch_ros.runtime.working_memory import working_memory

if TYPE_CHECKING:
    from kpmatch_ros.models.lightglue_layers import Attention, FeedForward, Points, TransformerLayer

__all__ = [
    "LIBRARY",
    "CompiledConvolutions",
    "CompiledLayer",
    "available",
    "best_pairs",
    "has_tiles",
    "has_vectors",
    "image_parts",
    "in_float32",
    "open_library",
    "pixel_scores",
    "may_process",
    "transforms",
]

LIBRARY = Path(__file__).with_name("libkpmatch_networks.so")
# These values must agree with src/networks.c and networks.h.
_VERSION = 5  # of the library's interface: the arguments and the meaning of its functions
_FLOATS, _VECTORS, _TILES = 1, 2, 3  # what kpmatch_support() returns for this processor; 0: no support
_MOST_THREADS = 64
_MULTIPLE = 32  # in bfloat16, a head's size must be a multiple of this, and so are all other sizes
_LEAST_ROWS = 8  # image rows for each thread; a thread computes up to two rows more
_BLOCK = 16  # channels in float32
# Winograd transform of a 3 x 3 kernel for tiles of 6 x 6. src/transformed.h has the transforms of the input and output.
_TRANSFORM = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]


class _Half(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("project", "project_bias", "inner", "inner_bias")),
        *((name, ctypes.c_void_p) for name in ("gain", "shift", "outer", "outer_bias")),
        ("parts", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
    ]


class _Points(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("x", "rotation", "out"))]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("size", "heads", "threads", "tiles")),
        ("within", _Half),
        ("across", _Half),
        ("points", _Points * 2),
        ("work", ctypes.c_void_p),
    ]


class _Convolution(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("height", "width", "threads", "count", "pooling")),
        ("convolutions", _Convolution * 2),
        *((name, ctypes.c_void_p) for name in ("image", "out", "work")),
    ]


def open_library(path: Path) -> ctypes.CDLL | None:
    """Open the library, see :func:`kpmatch_ros.runtime.compiled_library.open_library`."""
    layer, block = ctypes.POINTER(_Layer), ctypes.POINTER(_Block)
    size, address = ctypes.c_int64, ctypes.c_void_p
    functions: dict[str, tuple[Any, list[Any]]] = {
        "kpmatch_support": (ctypes.c_int, []),
        "kpmatch_layer_work": (ctypes.c_int64, [layer]),
        "kpmatch_layer": (None, [layer]),
        "kpmatch_float_layer_work": (ctypes.c_int64, [layer]),
        "kpmatch_float_layer": (None, [layer]),
        "kpmatch_convolve_work": (size, [block]),
        "kpmatch_convolve": (None, [block]),
        "kpmatch_transformed_work": (size, [block]),
        "kpmatch_transformed": (None, [block]),
        "kpmatch_vectors": (ctypes.c_int, [ctypes.c_int]),
        "kpmatch_parts": (None, [size, address, address]),
        "kpmatch_scores": (None, [size, size, address, address]),
        "kpmatch_best": (None, [size, size, *7 * [address]]),
    }
    return compiled_library.open_library(path, _VERSION, functions, "PyTorch")


_library: Any = open_library(LIBRARY)
# ATEN_CPU_CAPABILITY may forbid PyTorch some vector instructions: this module obeys it too.
_WIDTH = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
_support: int = 0
if _library is not None:
    _library.kpmatch_vectors(_WIDTH)
    _support = min(_library.kpmatch_support(), {16: _TILES, 8: _FLOATS}.get(_WIDTH, 0))


def available() -> bool:
    """Whether the library is present and the processor can run all of it, which needs AVX-512 with bfloat16."""
    return _support >= _VECTORS


def in_float32() -> bool:
    """Whether the library computes LightGlue's layers in float32.

    It needs AVX2. With AVX-512 PyTorch computes them: the two were not compared there yet.
    """
    return _support == _FLOATS and _WIDTH == 8


def may_process(numbers: Tensor) -> bool:
    """Whether the compiled code may process a tensor: it is on the processor, and PyTorch need not see the operations.

    PyTorch must see the operations for gradients and while it traces or compiles a network, as for ONNX.
    """
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return numbers.device.type == "cpu" and not numbers.requires_grad and not recorded


def has_vectors() -> bool:
    """Whether the library computes SuperPoint's scores and LightGlue's assignment, which needs AVX2."""
    return _support >= _FLOATS


def has_tiles() -> bool:
    """Whether the library multiplies with matrix tiles (AMX)."""
    return _support >= _TILES


def transforms() -> bool:
    """Whether the library computes float32 convolutions with the Winograd transform; it does so on any processor."""
    return _library is not None


class _Compiled:
    """Base class of compiled operations.

    Copying or unpickling one gives None where the processor cannot run it. PyTorch then computes the operation.
    """

    dtype: torch.dtype

    @staticmethod
    def runs(dtype: torch.dtype) -> bool:
        """Whether the library and the processor support this data type."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.__dict__)


def _restored(kind: type[_Compiled], state: dict[str, Any]) -> _Compiled | None:
    if not kind.runs(state["dtype"]):
        return None
    restored = kind.__new__(kind)
    restored.__dict__.update(state)
    return restored


class CompiledLayer(_Compiled):
    """A fused layer of LightGlue (:meth:`LightGlue.fuse`).

    It is computed by src/lightglue.c in bfloat16 and by src/lightglue_avx2.c in float32.

    Args:
        layer: a layer for which :meth:`fits` is true.
        dtype: data type of the matrix products.
        tiles: multiply with matrix tiles (AMX) where the processor has them.
    """

    def __init__(self, layer: TransformerLayer, dtype: torch.dtype, tiles: bool = True) -> None:
        self.size, self.heads = layer.self_mlp.fc2.out_features, layer.self_attention.heads
        self.dtype, self.tiles = dtype, tiles
        pack = _packed if dtype == torch.bfloat16 else _packed_floats
        self.within = _half(layer.self_attention, layer.self_mlp, pack)
        self.across = _half(layer.cross_attention, layer.cross_mlp, pack)

    @staticmethod
    def runs(dtype: torch.dtype) -> bool:
        return available() if dtype == torch.bfloat16 else in_float32()

    @staticmethod
    def fits(layer: TransformerLayer, dtype: torch.dtype) -> bool:
        """Whether the compiled code can compute this layer on this processor."""
        halves = ((layer.self_attention, layer.self_mlp), (layer.cross_attention, layer.cross_mlp))
        multiple = _MULTIPLE if dtype == torch.bfloat16 else _BLOCK
        return CompiledLayer.runs(dtype) and all(
            attention.joint is not None
            and attention.joint.bias is not None
            and isinstance(attention.o_proj, nn.Identity)
            and attention.key_value_heads == attention.heads
            and attention.head_size % multiple == 0
            and mlp.activation is F.gelu
            for attention, mlp in halves
        )

    def __call__(self, points0: Points, points1: Points) -> tuple[Tensor, Tensor]:
        """Return the new states (B, N, C) of both images' points, float32. The states of padding do not change."""
        states0, states1 = (points.x.float().contiguous() for points in (points0, points1))
        if points0.mask is None and points1.mask is None and len(states0) == 1:
            new0, new1 = self._run(states0[0], states1[0], _rotation(points0, 0), _rotation(points1, 0))
            return new0[None], new1[None]
        states0, states1 = states0.clone(), states1.clone()
        for b in range(len(states0)):
            real0, real1 = (slice(None) if points.mask is None else points.mask[b] for points in (points0, points1))
            rotation0, rotation1 = _rotation(points0, b)[real0], _rotation(points1, b)[real1]
            states0[b, real0], states1[b, real1] = self._run(states0[b, real0], states1[b, real1], rotation0, rotation1)
        return states0, states1

    def _run(self, x0: Tensor, x1: Tensor, rotation0: Tensor, rotation1: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one pair: states (N, C) and rotations (N, C / heads / 2, 2), float32, contiguous."""
        if len(x0) == 0 or len(x1) == 0:
            return x0, x1
        new0, new1 = torch.empty_like(x0), torch.empty_like(x1)
        layer = _Layer(self.size, self.heads, _threads(), self.tiles and has_tiles())
        layer.within, layer.across = _as_structure(self.within), _as_structure(self.across)
        for i, (x, rotation, new) in enumerate(((x0, rotation0, new0), (x1, rotation1, new1))):
            layer.points[i] = _Points(len(x), x.data_ptr(), rotation.data_ptr(), new.data_ptr())
        size_of, compute = (
            (_library.kpmatch_layer_work, _library.kpmatch_layer)
            if self.dtype == torch.bfloat16
            else (_library.kpmatch_float_layer_work, _library.kpmatch_float_layer)
        )
        work = working_memory(size_of(layer))
        layer.work = work.data_ptr()
        compute(layer)
        return new0, new1


class CompiledConvolutions(_Compiled):
    """One or two 3 x 3 convolutions, each followed by ReLU.

    src/superpoint.c computes them in bfloat16, with matrix tiles (AMX). src/transformed.c computes them in float32, in
    a third of PyTorch's time.

    Args:
        convolutions: weight (O, I, 3, 3) and bias (O,) of each; see :meth:`fits`.
        pooling: whether 2 x 2 max pooling follows.
        dtype: data type of images and results.
    """

    def __init__(self, convolutions: Sequence[tuple[Tensor, Tensor]], pooling: bool, dtype: torch.dtype) -> None:
        self.pooling, self.dtype = pooling, dtype
        self.outputs = len(convolutions[-1][1])
        pack = _packed_windows if dtype == torch.bfloat16 else _transformed
        self.convolutions = [
            (pack(weight), bias.detach().float().contiguous(), weight.shape[1], weight.shape[0])
            for weight, bias in convolutions
        ]

    @staticmethod
    def runs(dtype: torch.dtype) -> bool:
        return has_tiles() if dtype == torch.bfloat16 else dtype == torch.float32 and transforms()

    @staticmethod
    def fits(dtype: torch.dtype, *channels: int) -> bool:
        """Whether the compiled code can compute convolutions with so many output channels on this processor."""
        return CompiledConvolutions.runs(dtype) and all(each % _BLOCK == 0 for each in channels)

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (B, I, H, W) to (B, O, H, W), or with pooling to (B, O, H/2, W/2), channels last."""
        assert images.dtype == self.dtype
        by_tiles = self.dtype == torch.bfloat16
        size_of, compute = (
            (_library.kpmatch_convolve_work, _library.kpmatch_convolve)
            if by_tiles
            else (_library.kpmatch_transformed_work, _library.kpmatch_transformed)
        )
        images = images.permute(0, 2, 3, 1).contiguous()
        batch, height, width, inputs = images.shape
        assert inputs == self.convolutions[0][2]
        step = 2 if self.pooling else 1
        out = images.new_empty(batch, height // step, width // step, self.outputs)
        block = _Block(
            height, width, min(_threads(), max(height // _LEAST_ROWS, 1)), len(self.convolutions), self.pooling
        )
        for i, (weights, bias, channels, outputs) in enumerate(self.convolutions):
            block.convolutions[i] = _Convolution(weights.data_ptr(), bias.data_ptr(), channels, outputs)
        work = working_memory(size_of(block))
        block.work = work.data_ptr()
        for image, result in zip(images, out):
            block.image, block.out = image.data_ptr(), result.data_ptr()
            compute(block)
        return out.permute(0, 3, 1, 2)


def image_parts(image: Tensor) -> Tensor:
    """Compute :func:`kpmatch_ros.models.superpoint.in_parts` for an image (B, 1, H, W), float32."""
    assert image.dtype == torch.float32 and image.shape[1] == 1
    image = image.contiguous()
    parts = image.new_empty(*image[:, 0].shape, 4, dtype=torch.bfloat16)
    _library.kpmatch_parts(image.numel(), image.data_ptr(), parts.data_ptr())
    return parts.permute(0, 3, 1, 2)


def pixel_scores(logits: Tensor) -> Tensor:
    """Return the pixels' scores (B, 8 H, 8 W).

    Args:
        logits: (B, H, W, 65) float32, for the 8 x 8 pixels of each cell and for "no keypoint in this cell".
    """
    logits = logits.contiguous()
    batch, height, width, count = logits.shape
    assert count == 65 and logits.dtype == torch.float32
    if not has_vectors():
        scores = logits.softmax(dim=3)[..., :-1]
        return scores.reshape(batch, height, width, 8, 8).permute(0, 1, 3, 2, 4).reshape(batch, 8 * height, 8 * width)
    scores = logits.new_empty(batch, 8 * height, 8 * width)
    for cells, pixels in zip(logits, scores):
        _library.kpmatch_scores(height, width, cells.data_ptr(), pixels.data_ptr())
    return scores


def best_pairs(similarity: Tensor, certain0: Tensor, certain1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best partner of each point by the scores of :class:`MatchAssignment`.

    Args:
        similarity: (N0, N1) float32 on the processor, N0 and N1 at least 1.
        certain0: (N0,) float32, log probabilities that a point has a match.
        certain1: (N1,) float32, the same for image 1.

    Returns:
        partners (N0,) and (N1,) int64, and the log scores (N0,) of the first, NaN if similarities are NaN.
    """
    count0, count1 = similarity.shape
    inputs = [values.float().contiguous() for values in (similarity, certain0, certain1)]
    best0, best1 = (inputs[0].new_zeros(count, dtype=torch.int64) for count in (count0, count1))
    most0, work = inputs[0].new_empty(count0), inputs[0].new_empty(4, count1)
    assert inputs[1].shape == (count0,) and inputs[2].shape == (count1,)
    _library.kpmatch_best(count0, count1, *(each.data_ptr() for each in (*inputs, best0, best1, most0, work)))
    return best0, best1, most0


def _threads() -> int:
    return min(torch.get_num_threads(), _MOST_THREADS)


def _rotation(points: Points, b: int) -> Tensor:
    rotation = points.rotation[b, 0]
    return (torch.view_as_real(rotation) if rotation.is_complex() else rotation).float().contiguous()


_Weights = tuple[list[Tensor], int, float]


def _half(attention: Attention, mlp: FeedForward, pack: Callable[[Tensor], Tensor]) -> _Weights:
    """The tensors, the number of parts and the epsilon of a ``_Half``."""
    joint = attention.joint
    assert joint is not None
    tensors: list[Tensor] = []
    for linear in (joint, mlp.fc1):
        tensors += [pack(linear.weight), linear.bias.detach().float()]
    tensors += [values.detach().float() for values in (mlp.layer_norm.weight, mlp.layer_norm.bias)]
    tensors += [pack(mlp.fc2.weight), mlp.fc2.bias.detach().float()]
    return [each.contiguous() for each in tensors], joint.out_features // joint.in_features, mlp.layer_norm.eps


def _packed(weight: Tensor) -> Tensor:
    """Pack a weight (N, K) as the right-hand side of a product, see src/lightglue.c."""
    n, k = weight.shape
    pairs = weight.detach().to(torch.bfloat16).reshape(n // 16, 16, k // 32, 16, 2)
    return pairs.permute(0, 2, 3, 1, 4).contiguous()


def _packed_floats(weight: Tensor) -> Tensor:
    """Pack a weight (N, K) as the right-hand side of a product, see src/lightglue_avx2.c."""
    n, k = weight.shape
    return weight.detach().float().reshape(n // _BLOCK, _BLOCK, k).transpose(1, 2).contiguous()


def _packed_windows(weight: Tensor) -> Tensor:
    """Pack a convolution's weight (O, I, 3, 3) as the right-hand side of a product, see src/superpoint.c."""
    outputs, inputs = weight.shape[:2]
    rows = weight.detach().permute(0, 2, 3, 1).reshape(outputs, 3, 3 * inputs)
    rows = F.pad(rows, (0, -3 * inputs % _MULTIPLE, 0, 0, 0, -outputs % _MULTIPLE))
    return _packed(rows.flatten(1))


def _transformed(weight: Tensor) -> Tensor:
    """Transform a convolution's weight (O, I, 3, 3) and pack it, see src/transformed.c."""
    outputs, inputs = weight.shape[:2]
    weight = weight.detach()
    if inputs == 1:
        return weight.permute(2, 3, 1, 0).reshape(9, outputs).float().contiguous()
    turn = torch.tensor(_TRANSFORM, dtype=torch.float64, device=weight.device)
    numbers = torch.einsum("ay,bx,oiyx->aboi", turn, turn, weight.double())
    blocks = numbers.reshape(-1, outputs // _BLOCK, _BLOCK, inputs).transpose(2, 3)
    return blocks.float().contiguous()


def _as_structure(weights: _Weights) -> _Half:
    tensors, parts, epsilon = weights
    return _Half(*(each.data_ptr() for each in tensors), parts, epsilon)
