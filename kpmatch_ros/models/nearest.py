"""Mutual nearest neighbours: matching of descriptors without a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.models.assignment import Assignment, ImageFeatures, mutual_matches

__all__ = ["NearestNeighbour"]

_PADDED = -2.0  # similarity to padding: below that of any two unit vectors


class NearestNeighbour(nn.Module):
    """Matches descriptors that are each other's nearest, by cosine similarity.

    The score of a match is the similarity, clipped to [0, 1].

    Args:
        ratio_threshold: threshold of the ratio test (Lowe, IJCV 2004): the largest ratio of the Euclidean distances to
            the nearest and the second nearest descriptor of the other image; 1 disables the test.
        filter_threshold: a match's score must exceed it.
    """

    def __init__(self, ratio_threshold: float = 1.0, filter_threshold: float = 0.0) -> None:
        super().__init__()
        self.ratio_threshold = ratio_threshold
        self.filter_threshold = filter_threshold

    def forward(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        """Match the descriptors of B pairs of images, unit vectors; keypoints and their scores are not used."""
        similarity = image0.descriptors.float() @ image1.descriptors.float().transpose(-1, -2)
        if image0.mask is not None:
            similarity = similarity.masked_fill(~image0.mask[:, :, None], _PADDED)
        if image1.mask is not None:
            similarity = similarity.masked_fill(~image1.mask[:, None, :], _PADDED)
        assignment = mutual_matches(similarity, lambda best: best.clamp(0, 1), self.filter_threshold)
        if self.ratio_threshold < 1 and similarity.numel() > 0:
            passed = self._passes_ratio_test(similarity) & _at(
                self._passes_ratio_test(similarity.transpose(-1, -2)), assignment.matches0
            )
            assignment = assignment.keep(passed)
        return assignment

    def _passes_ratio_test(self, similarity: Tensor) -> Tensor:
        if similarity.shape[-1] == 1:
            similarity = F.pad(similarity, (0, 1), value=_PADDED)
        best = similarity.topk(2, dim=-1).values
        distance = (2 - 2 * best.clamp(-1, 1)).sqrt()  # between unit vectors
        unambiguous = best[..., 1] == _PADDED  # there is no second nearest descriptor
        return unambiguous | (distance[..., 0] <= self.ratio_threshold * distance[..., 1])


def _at(values: Tensor, index: Tensor) -> Tensor:
    return torch.gather(values, 1, index.clamp(min=0)) & (index >= 0)
