"""Shared functions for tests of extractors: keypoints by position, and a batch compared with its single images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kpmatch_ros.models.detections import Detections

__all__ = ["Found", "as_found", "assert_a_batch_gives_what_each_gives_alone"]

Found = dict[tuple[float, float], tuple[float, Tensor]]
"""Score and descriptor of an image's keypoints, by x and y."""


def as_found(detections: Detections) -> list[Found]:
    """Return the keypoints of each image, without padding."""
    return [
        {tuple(p): (s, d) for p, s, d in zip(points[mask].tolist(), scores[mask].tolist(), descriptors[mask])}
        for points, scores, descriptors, mask in zip(*detections[:4])
    ]


def assert_a_batch_gives_what_each_gives_alone(
    model: Callable[[Tensor], Detections], images: Tensor, tolerance: float
) -> None:
    """Check images (B, C, H, W) with different numbers of keypoints, and that the padding is zero."""
    together = model(images)
    assert len(set(together.mask.sum(dim=1).tolist())) > 1
    for image, found in zip(images, as_found(together)):
        (alone,) = as_found(model(image[None]))
        assert alone.keys() == found.keys()
        for point, (score, descriptor) in alone.items():
            assert found[point][0] == pytest.approx(score, abs=tolerance)
            assert torch.allclose(found[point][1], descriptor, atol=tolerance)
    assert (together.scores[~together.mask] == 0).all() and (together.keypoints[~together.mask] == 0).all()
