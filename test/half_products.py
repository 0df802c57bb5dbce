"""Products of matrices and convolutions in half precision, for processors without instructions for it.

PyTorch computes them there one number at a time: two images of 384 points take LightGlue 4 s in bfloat16, and 0.3 s in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kpmatch_ros.runtime.processor import BFLOAT16, processor_features

FLOAT16 = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})


class RoundedProducts(TorchDispatchMode):
    """Computes products of tensors in half precision in float32, and rounds the result.

    Instructions for half precision do the same, and so does PyTorch without them: the product of two numbers and the
    sum are in float32, and the result is rounded once. Only the order of the sum differs. All else is left to PyTorch.
    """

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self._dtypes = dtypes
        aten = torch.ops.aten
        products = aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.linear, aten.matmul, aten.convolution, aten.conv2d
        self._products = {product.default for product in products}
        self.count = 0  # of products so far

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        dtypes = {each.dtype for each in tensors if each.device.type == "cpu"}
        # PyTorch refuses tensors of different types. It has to see them.
        if func not in self._products or len(dtypes) != 1 or not dtypes <= set(self._dtypes):
            return func(*args, **(kwargs or {}))
        self.count += 1
        exact = [each.float() if isinstance(each, torch.Tensor) else each for each in args]
        return func(*exact, **(kwargs or {})).to(*dtypes)


def fast_products() -> AbstractContextManager[Any]:
    """Compute the products as :class:`RoundedProducts` in formats for which this processor has no instructions."""
    features = processor_features()
    instructions = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
    slow = [dtype for dtype, any_of in instructions.items() if not features & any_of]
    return RoundedProducts(*slow) if slow else nullcontext()
