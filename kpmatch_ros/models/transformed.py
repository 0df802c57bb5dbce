"""Convolutions through a transform, which take a processor half the time in float32.

A 3 x 3 convolution in tiles of 6 x 6 takes 1.8 multiplications a pixel in place of 9 (Lavin, Gray: Fast Algorithms for
Convolutional Neural Networks, CVPR 2016). NNPACK computes so. It comes with PyTorch, which itself takes it only where
oneDNN is missing, and for batches of 16 images. There is none for bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["TransformedConv2d", "can_transform", "takes_transform", "transform_convolutions"]

Network = TypeVar("Network", bound=nn.Module)

FEWEST_CHANNELS = 48  # with fewer, the transforms cost what the products save
MOST_NUMBERS = 4 << 20  # seen at a time: the transforms of more would take hundreds of MB


def _nnpack() -> Callable[..., Tensor] | None:
    """NNPACK's convolution; None where PyTorch does not bring it, or it does not know the processor.

    Its threads are as many as PyTorch computes with when the first convolution is asked for.
    """
    available, convolve = (
        getattr(torch.ops.aten, name, None) for name in ("_nnpack_available", "_nnpack_spatial_convolution")
    )
    # The question sets NNPACK up: before it is asked, all of its convolutions fail.
    return convolve if available is not None and available() else None


_CONVOLVE = _nnpack()


class TransformedConv2d(nn.Conv2d):
    """A convolution that keeps the size of what it sees; where NNPACK is, see :func:`can_transform`.

    Attributes:
        transformed: go through the transform; if false, as any other convolution.
    """

    transformed = True

    @classmethod
    def of(cls, conv: nn.Conv2d) -> TransformedConv2d:
        """The same convolution, with the same tensors."""
        made = cls(conv.in_channels, conv.out_channels, 3, padding=1, device="meta")
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if _CONVOLVE is None or not takes_transform(self, input):
            return super().forward(input)
        return _CONVOLVE(input, self.weight, self.bias, self.padding, self.stride)


def can_transform() -> bool:
    """Whether this PyTorch brings NNPACK, and NNPACK knows the processor."""
    return _CONVOLVE is not None


def takes_transform(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution of x goes through the transform."""
    is_small = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= MOST_NUMBERS
    return isinstance(conv, TransformedConv2d) and conv.transformed and is_small


def transform_convolutions(network: Network) -> Network:
    """Let a network's wide convolutions go through the transform; its tensors and their names stay."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and _fits(child):
                setattr(parent, name, TransformedConv2d.of(child))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.out_channels >= FEWEST_CHANNELS:
            # NNPACK wants a channel's pixels beside each other. contiguous() sees no difference in one input channel.
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
