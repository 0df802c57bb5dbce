"""Tests that half_products.py, which other tests use, computes what PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from half_products import RoundedProducts
from torch import Tensor

HALF = [torch.bfloat16, torch.float16]
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "matrices": (torch.matmul, [(30, 256), (256, 40)]),
    "batches": (torch.matmul, [(2, 30, 64), (2, 64, 40)]),
    "a linear layer": (F.linear, [(30, 256), (40, 256), (40,)]),
    "a linear layer without bias": (F.linear, [(2, 30, 256), (40, 256)]),
    "a convolution": (F.conv2d, [(2, 16, 12, 10), (8, 16, 3, 3), (8,)]),
}


def numbers(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once_as_those_of_pytorch_are(name: str, dtype: torch.dtype, inference: bool) -> None:
    product, shapes = PRODUCTS[name]
    operands = numbers(dtype, shapes)
    exact = product(*(each.double() for each in operands))
    # Half a step of the format, and for sums of up to 256 numbers around 1 the error of float32.
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 256 * torch.finfo(torch.float32).eps
    mode = RoundedProducts(dtype)
    for context in (nullcontext(), mode):
        with torch.inference_mode(inference), context:
            found = product(*operands)
        assert found.dtype == dtype and ((found.double() - exact).abs() <= allowed).all(), context
    assert mode.count == 1
    assert ((exact.to(dtype).double() - exact).abs() > allowed / 4).any()  # float32 would be noticed


def test_other_formats_and_operations_are_left_to_pytorch() -> None:
    with RoundedProducts(torch.bfloat16) as mode:
        (first, second), (half, _) = (numbers(dtype, [(5, 5), (5, 5)]) for dtype in (torch.float32, torch.bfloat16))
        assert torch.equal(first @ second, torch.mm(first, second))
        assert torch.equal(half.exp() + half, half + half.exp())
        with pytest.raises(RuntimeError, match="same dtype"):
            first @ half
    assert mode.count == 0
