"""Keypoints of a batch of images, and their selection from a score map."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kpmatch_ros.models.base import rounded_up

__all__ = [
    "Detections",
    "are_finite",
    "clear_border",
    "clear_masked",
    "read_out",
    "select_keypoints",
    "suppress_non_maxima",
    "unless_masked",
    "within_border",
]


class Detections(NamedTuple):
    """Keypoints of a batch of B images, padded to the same number N. The best scores come first, padding last.

    Attributes:
        keypoints: (B, N, 2) float32 x, y in pixels; the centre of the top-left pixel is (0, 0).
        scores: (B, N) float32, 0 for padding.
        descriptors: (B, N, D) float32 unit vectors.
        mask: (B, N) bool, true for keypoints, false for padding.
        finite: (B,) bool, whether all scores of the image's score map were finite.
    """

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    mask: Tensor
    finite: Tensor

    def are_sound(self) -> Tensor:
        """Whether an image's score map and descriptors have no NaN or infinity, (B,) bool.

        They have some if the data type cannot represent the values. The whole score map is checked, because a pixel
        whose score is NaN never becomes a keypoint.
        """
        return self.finite & torch.isfinite(self.descriptors).flatten(1).all(dim=1)

    @classmethod
    def none(cls, batch: int, descriptor_size: int, device: torch.device) -> Detections:
        """Detections without any keypoint."""
        return cls(
            torch.zeros(batch, 0, 2, dtype=torch.float32, device=device),
            torch.zeros(batch, 0, dtype=torch.float32, device=device),
            torch.zeros(batch, 0, descriptor_size, dtype=torch.float32, device=device),
            torch.zeros(batch, 0, dtype=torch.bool, device=device),
            torch.ones(batch, dtype=torch.bool, device=device),
        )


def vector(x: float, y: float, like: Tensor) -> Tensor:
    """(x, y) as a tensor (2,), created on the device: copying it from the host would make a GPU wait."""
    return torch.stack([like.new_full((), x), like.new_full((), y)])


def are_finite(scores: Tensor) -> Tensor:
    """Whether all scores (B, ...) of each image are finite, (B,) bool."""
    return scores.flatten(1).sum(dim=1, dtype=torch.float32).isfinite()


def suppress_non_maxima(scores: Tensor, radius: int, again: int = 2) -> Tensor:
    """Set all scores to zero except those that are the largest within ``radius`` pixels in x and y.

    Args:
        scores: (B, H, W) float32.
        radius: pixels; 0 returns a copy of all scores.
        again: number of further passes. Each pass looks for maxima among the pixels that the maxima found so far do
            not suppress. The code of SuperPoint's authors makes two.
    """

    if radius == 0:
        return scores.clone()  # callers clear the border and the mask in place
    if _may_look(scores) and not scores.requires_grad:
        found = [torch.from_numpy(_maxima(each.numpy(), radius, again)) for each in scores]
        return found[0][None] if len(found) == 1 else torch.stack(found)
    maxima = scores == _largest_nearby(scores, radius)
    for _ in range(again):
        suppressed = _largest_nearby(maxima.to(torch.uint8), radius).to(torch.bool)
        remaining = torch.where(suppressed, 0, scores)
        maxima = maxima | ((remaining == _largest_nearby(remaining, radius)) & ~suppressed)
    return torch.where(maxima, scores, 0)


def _may_look(x: Tensor) -> bool:
    """Whether the code may branch on values: a GPU would have to be waited for, and a traced graph has no values."""
    return x.device.type == "cpu" and not torch.jit.is_tracing()


def _maxima(scores: np.ndarray, radius: int, again: int) -> np.ndarray:
    """Compute :func:`suppress_non_maxima` for scores (H, W) with OpenCV.

    PyTorch's pooling also records the place of each maximum, which costs time.
    """
    window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    maxima = cv2.compare(scores, cv2.dilate(scores, window), cv2.CMP_EQ)
    for _ in range(again):
        free = cv2.bitwise_not(cv2.dilate(maxima, window))
        remaining = cv2.copyTo(scores, free)
        found = cv2.compare(remaining, cv2.dilate(remaining, window), cv2.CMP_EQ)
        maxima = cv2.bitwise_or(maxima, cv2.bitwise_and(found, free))
    return cv2.copyTo(scores, maxima)


def _largest_nearby(x: Tensor, radius: int) -> Tensor:
    """For each of the values (B, H, W), float32 or uint8, the largest within ``radius`` in both directions."""
    size = 2 * radius + 1
    # Rows first, then columns: 2 (2r+1) comparisons per pixel instead of (2r+1)^2.
    rows = F.max_pool2d(x[:, None].float(), (1, size), stride=1, padding=(0, radius))
    return F.max_pool2d(rows, (size, 1), stride=1, padding=(radius, 0))[:, 0].to(x.dtype)


def clear_border(scores: Tensor, border: int) -> Tensor:
    """Set the scores (B, H, W) within ``border`` pixels of the sides to zero, in place.

    H and W cover whole cells, as in the authors' code: pixels beyond an image's last whole cell have no scores.
    """
    if border > 0:
        scores[:, :border] = 0
        scores[:, -border:] = 0
        scores[:, :, :border] = 0
        scores[:, :, -border:] = 0
    return scores


def clear_masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Set the scores (B, H, W) to zero where ``mask`` is false, in place.

    Call it after non-maximum suppression. Before it, the scores next to the mask would become maxima.

    Args:
        scores: scores, or bool that is true for maxima.
        mask: (B, H', W') bool, of at least as many rows and columns; None changes nothing.
    """
    if mask is not None:
        scores.masked_fill_(~mask[:, : scores.shape[1], : scores.shape[2]], 0)
    return scores


def within_border(keypoints: Tensor, scores: Tensor, border: int) -> Tensor:
    """Clamp keypoints (..., 2) to at least ``border`` pixels from the sides of the scores (B, H, W)."""
    rows, columns = scores.shape[1:]
    x, y = keypoints.unbind(dim=-1)
    return torch.stack([x.clamp(border, columns - 1 - border), y.clamp(border, rows - 1 - border)], dim=-1)


def unless_masked(refined: Tensor, whole: Tensor, mask: Tensor | None) -> Tensor:
    """Return the refined keypoints (B, N, 2), but the unrefined ones where refinement moves a keypoint into the mask.

    Args:
        refined: keypoints after subpixel refinement.
        whole: the same keypoints before refinement, on pixels that the mask allows.
        mask: (B, H, W) bool, false where no keypoint may be; None accepts all refined keypoints.
    """
    if mask is None:
        return refined
    _, height, width = mask.shape
    x, y = refined.round().long().unbind(dim=-1)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return torch.where(mask.flatten(1).gather(1, index)[..., None], refined, whole)


def select_keypoints(
    scores: Tensor, threshold: float, max_keypoints: int, round_up: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the pixels of highest score above ``threshold``, at most ``max_keypoints`` of each image (-1: all).

    Args:
        scores: (B, H, W) scores after suppression.
        round_up: round N up to one of a few values, see :func:`kpmatch_ros.models.base.rounded_up`.

    Returns:
        keypoints (B, N, 2) as x, y; scores (B, N), descending; mask (B, N).
    """
    batch, _, width = scores.shape
    flat = scores.reshape(batch, -1)
    count = flat.shape[1] if max_keypoints < 0 else min(max_keypoints, flat.shape[1])
    candidates = None
    if max_keypoints < 0 or _may_look(scores):
        # For a single image, search only the pixels above the threshold, which are a few per cent of all pixels.
        candidates = (flat[0] > threshold).nonzero()[:, 0] if batch == 1 and _may_look(scores) else None
        found = len(candidates) if candidates is not None else int((flat > threshold).sum(dim=1).max())
        count = min(count, rounded_up(found) if round_up and found else found)
    if candidates is not None and count <= len(candidates):
        best, order = flat[:, candidates].topk(count, dim=1)
        index = candidates[order]
    else:
        best, index = flat.topk(count, dim=1)
    mask = best > threshold
    rows = torch.div(index, width, rounding_mode="floor")
    keypoints = torch.stack([index - rows * width, rows], dim=-1).float()
    return keypoints * mask[..., None], best * mask, mask


def read_out(scores: Tensor, keypoints: Tensor, radius: int = 2) -> Tensor:
    """Refine keypoints to a fraction of a pixel: the centre of mass of the scores around each.

    This is a soft-argmax, as in ALIKE (Zhao et al., IEEE Transactions on Multimedia 2022, section III-B). The training
    uses the same function.

    Args:
        scores: (B, H, W) scores before any suppression.
        keypoints: (B, N, 2) float32 whole pixels x, y.
        radius: radius of the square of scores that is used, pixels.

    Returns:
        (B, N, 2) float32 x, y.
    """
    batch, height, width = scores.shape
    around = torch.arange(-radius, radius + 1, device=scores.device)
    steps = torch.stack(torch.meshgrid(around, around, indexing="xy"), dim=-1).view(1, 1, -1, 2)
    x, y = (keypoints.long()[:, :, None] + steps).unbind(dim=-1)  # (B, N, (2 radius + 1)^2)
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    weights = scores.reshape(batch, -1).gather(1, index.flatten(1)).view_as(index)[..., None]
    return keypoints + (weights * steps).sum(dim=2) / weights.sum(dim=2).clamp(min=1e-9)
