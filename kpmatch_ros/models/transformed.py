"""Float32 convolutions with the Winograd transform, which take a processor half the time.

A 3 x 3 convolution in tiles of 6 x 6 needs 1.8 multiplications per pixel instead of 9 (Lavin, Gray: Fast Algorithms for
Convolutional Neural Networks, CVPR 2016). NNPACK, which comes with PyTorch, implements it. PyTorch itself uses NNPACK
only if oneDNN is missing, and for batches of 16 images or more. There is no implementation for bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["TransformedConv2d", "can_transform", "transform_convolutions", "uses_transform"]

Network = TypeVar("Network", bound=nn.Module)

FEWEST_CHANNELS = 48  # with fewer channels, the transforms cost as much as the products save
MOST_NUMBERS = 4 << 20  # numbers of the input: the transforms of a larger one would take hundreds of MB


def _nnpack() -> Callable[..., Tensor] | None:
    """NNPACK's convolution; None if PyTorch does not include it, or if it does not support the processor.

    The number of its threads is PyTorch's number of threads at the first convolution.
    """
    available, convolve = (
        getattr(torch.ops.aten, name, None) for name in ("_nnpack_available", "_nnpack_spatial_convolution")
    )
    # _nnpack_available() also initialises NNPACK: before that call, all of its convolutions fail.
    return convolve if available is not None and available() else None


_CONVOLVE = _nnpack()


class TransformedConv2d(nn.Conv2d):
    """A 3 x 3 convolution that keeps the size of its input, computed by NNPACK if possible (:func:`can_transform`).

    Attributes:
        transformed: use the transform; if false, compute it like any other convolution.
    """

    transformed = True

    @classmethod
    def of(cls, conv: nn.Conv2d) -> TransformedConv2d:
        """Return the same convolution, with the same tensors."""
        made = cls(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if _CONVOLVE is None or not uses_transform(self, input):
            return super().forward(input)
        return _CONVOLVE(input, self.weight, self.bias, self.padding, self.stride)


def can_transform() -> bool:
    """Whether this PyTorch includes NNPACK, and NNPACK supports the processor."""
    return _CONVOLVE is not None


def uses_transform(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution of x is computed with the transform."""
    is_small = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= MOST_NUMBERS
    return isinstance(conv, TransformedConv2d) and conv.transformed and is_small


def transform_convolutions(network: Network) -> Network:
    """Let a network's wide convolutions use the transform. Its tensors and their names stay the same."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _fits(child):
                setattr(parent, name, TransformedConv2d.of(child))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.out_channels >= FEWEST_CHANNELS:
            # NNPACK needs contiguous channels. contiguous() does not copy a weight with a single input channel.
            module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
    return network


def _fits(conv: nn.Conv2d) -> bool:
    keeps_size = conv.kernel_size == (3, 3) and conv.padding == conv.stride == conv.dilation == (1, 1)
    return (
        keeps_size
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS
    )
