"""Random features, for tests of code that computes with features."""

from __future__ import annotations

import torch

from kpmatch_ros.models.assignment import ImageFeatures

__all__ = ["random_features"]


def random_features(descriptor_size: int, count: int = 20) -> ImageFeatures:
    """Return ``count`` points of an image of 100 x 100 pixels, with unit descriptors. Each call returns the same."""
    random = torch.Generator().manual_seed(0)
    return ImageFeatures(
        torch.rand(1, count, 2, generator=random) * 100,
        torch.nn.functional.normalize(torch.randn(1, count, descriptor_size, generator=random), dim=-1),
        torch.tensor([[100, 100]]),
        scores=torch.rand(1, count, generator=random),
    )
