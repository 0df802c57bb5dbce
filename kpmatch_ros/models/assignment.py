"""Code that all matchers share: their inputs and outputs, mutual best matches from similarities, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kpmatch_ros.runtime.processor import disabled_features

__all__ = [
    "Assignment",
    "ImageFeatures",
    "attend",
    "attention_weights",
    "common_masks",
    "mutual_matches",
    "mutual_of_best",
]


class ImageFeatures(NamedTuple):
    """The features of B images, padded to the same number N. A matcher takes one such object for each image.

    Attributes:
        keypoints: (B, N, 2) float32 x, y in pixels.
        descriptors: (B, N, D) float, unit vectors.
        size: (B, 2) width and height of the images, pixels.
        mask: (B, N) bool, true for keypoints, false for padding; None without padding.
        scores: (B, N) float32 detection scores in [0, 1]; None for a matcher that does not use them.
    """

    keypoints: Tensor
    descriptors: Tensor
    size: Tensor
    mask: Tensor | None = None
    scores: Tensor | None = None

    @property
    def num_keypoints(self) -> int:
        """N, the number of keypoints including padding."""
        return self.keypoints.shape[1]

    def padded(self, size: int) -> ImageFeatures:
        """Pad the features to ``size`` keypoints. Features of that size stay as they are, without a new mask."""
        count = self.num_keypoints
        if count == size:
            return self
        behind = (0, size - count)
        real = torch.ones_like(self.keypoints[..., 0], dtype=torch.bool) if self.mask is None else self.mask
        return ImageFeatures(
            keypoints=F.pad(self.keypoints, (0, 0, *behind)),
            descriptors=F.pad(self.descriptors, (0, 0, *behind)),
            size=self.size,
            mask=F.pad(real, behind),
            scores=None if self.scores is None else F.pad(self.scores, behind),
        )


def common_masks(image0: ImageFeatures, image1: ImageFeatures) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the masks (B, N0) and (B, N1) of two images' features, or None for both if neither has padding."""
    if image0.mask is None and image1.mask is None:
        return None, None
    mask0, mask1 = (
        torch.ones_like(image.keypoints[..., 0], dtype=torch.bool) if image.mask is None else image.mask
        for image in (image0, image1)
    )
    return mask0, mask1


class Assignment(NamedTuple):
    """The matches of B pairs of images with N0 and N1 keypoints.

    Attributes:
        matches0: (B, N0) int64, index of the matching keypoint of image 1, -1 without a match.
        matches1: (B, N1) int64, the same for image 0.
        scores0: (B, N0) float32 in [0, 1], 0 for a keypoint that is not mutually best with another.
        scores1: (B, N1) float32, the same for image 1.
        layers: (B,) int64, transformer layers run; 0 for a matcher without layers.
        layers0: (B, N0) int64, number of layers that each keypoint took part in before it was pruned.
        layers1: (B, N1) int64, the same for image 1.
    """

    matches0: Tensor
    matches1: Tensor
    scores0: Tensor
    scores1: Tensor
    layers: Tensor
    layers0: Tensor
    layers1: Tensor

    @classmethod
    def empty(cls, batch: int, count0: int, count1: int, device: torch.device) -> Assignment:
        """An assignment without any match."""

        def full(count: int, value: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((batch, count), value, dtype=dtype, device=device)

        return cls(
            full(count0, -1),
            full(count1, -1),
            full(count0, 0, torch.float32),
            full(count1, 0, torch.float32),
            torch.zeros(batch, dtype=torch.int64, device=device),
            full(count0, 0),
            full(count1, 0),
        )

    def are_sound(self) -> Tensor:
        """Whether no score of a pair is NaN or infinite, (B,) bool: the data type could represent the values."""
        return torch.isfinite(self.scores0).all(dim=1)

    def first(self, count0: int, count1: int) -> Assignment:
        """The assignment of each image's first ``count0`` and ``count1`` keypoints; the others must be padding."""
        return Assignment(
            matches0=self.matches0[:, :count0],
            matches1=self.matches1[:, :count1],
            scores0=self.scores0[:, :count0],
            scores1=self.scores1[:, :count1],
            layers=self.layers,
            layers0=self.layers0[:, :count0],
            layers1=self.layers1[:, :count1],
        )

    def after(self, layers: int) -> Assignment:
        """The same assignment, with ``layers`` as the number of layers that every keypoint took part in."""
        return self._replace(
            layers=torch.full_like(self.layers, layers),
            layers0=torch.full_like(self.layers0, layers),
            layers1=torch.full_like(self.layers1, layers),
        )

    def keep(self, keep0: Tensor) -> Assignment:
        """The same assignment without the matches of the keypoints of image 0 where ``keep0`` (B, N0) is false."""
        matches0 = self.matches0.masked_fill(~keep0, -1)
        kept1 = torch.gather(keep0, 1, self.matches1.clamp(min=0)) & (self.matches1 >= 0)
        return self._replace(matches0=matches0, matches1=self.matches1.masked_fill(~kept1, -1))


def mutual_matches(similarity: Tensor, score: Callable[[Tensor], Tensor], threshold: float) -> Assignment:
    """Match keypoints that are each other's best partner and score above ``threshold``.

    Args:
        similarity: (B, N0, N1) float, larger for more similar descriptors.
        score: turns similarities into scores in [0, 1]. It is called only with those of the best pairs.
        threshold: a match's score must exceed it.
    """
    batch, count0, count1 = similarity.shape
    if count0 == 0 or count1 == 0:
        return Assignment.empty(batch, count0, count1, similarity.device)
    most0, best0 = similarity.max(dim=2)
    # Reduce along the last dimension in memory: reducing along another one takes a processor five times as long.
    best1 = similarity.transpose(1, 2).contiguous().argmax(dim=2)
    return mutual_of_best(best0, best1, score(most0).float(), threshold)


def mutual_of_best(best0: Tensor, best1: Tensor, scores0: Tensor, threshold: float) -> Assignment:
    """Compute :func:`mutual_matches` from the best partner of each keypoint.

    Args:
        best0: (B, N0) int64, the best partner in image 1 of each keypoint of image 0.
        best1: (B, N1) int64, the best partner in image 0 of each keypoint of image 1.
        scores0: (B, N0) float32, the scores of ``best0``.
        threshold: a match's score must exceed it.
    """
    (batch, count0), count1 = best0.shape, best1.shape[1]
    mutual0 = best1.gather(1, best0) == torch.arange(count0, device=best0.device)
    mutual1 = best0.gather(1, best1) == torch.arange(count1, device=best1.device)
    scores0 = scores0 * mutual0
    scores1 = scores0.gather(1, best1) * mutual1
    empty = Assignment.empty(batch, count0, count1, best0.device)
    return empty._replace(
        matches0=best0.masked_fill(~(mutual0 & (scores0 > threshold)), -1),
        matches1=best1.masked_fill(~(mutual1 & (scores1 > threshold)), -1),
        scores0=scores0,
        scores1=scores1,
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, computed by PyTorch.

    Args:
        query: (B, heads, N, C) of any floating-point type.
        key: (B, heads, M, C).
        value: (B, heads, M, C).
        mask: (B, M) bool, true for keys that count; None if all count.

    Returns:
        (B, heads, N, C) of the same type as ``query``.
    """
    wanted = query.dtype
    if wanted == torch.bfloat16 and query.device.type == "cpu" and "amx_bf16" in disabled_features():
        # PyTorch packs bfloat16 for AMX tiles on every processor that has them. If AVX-512 is disabled, it then fails.
        query, key, value = query.float(), key.float(), value.float()
    only = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=only).to(wanted)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The weights of scaled dot-product attention, float32.

    Args:
        query: (B, heads, N, C).
        key: (B, heads, M, C).
        mask: (B, M) bool, true for keys that count; None if all count.

    Returns:
        (B, heads, N, M), rows with sum 1.
    """
    similarity = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        similarity = similarity.masked_fill(~mask[:, None, None, :], -torch.inf)
    return similarity.softmax(dim=-1)
