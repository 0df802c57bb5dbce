"""Tests that mutual nearest neighbours agree with a search through all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmatch_ros.models import NearestNeighbour
from kpmatch_ros.models.assignment import Assignment, ImageFeatures


def unit_vectors(count: int, seed: int, size: int = 16) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, size, generator=random), dim=-1)


def descriptors(count0: int, count1: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return descriptors. Many of image 1 are disturbed versions of those of image 0, in another order."""
    first = unit_vectors(count0, seed)
    noise = torch.cat([unit_vectors(count0, seed + 1), unit_vectors(count1, seed + 2)])
    second = torch.nn.functional.normalize(torch.cat([first, torch.zeros(count1, 16)]) + 0.7 * noise, dim=-1)[:count1]
    return first, second.flip(0)


def match(
    model: NearestNeighbour, first: Tensor, second: Tensor, mask0: Tensor | None = None, mask1: Tensor | None = None
) -> Assignment:
    """Match descriptors (N0, D) and (N1, D), or batches of them."""
    if first.ndim == 2:
        first, second = first[None], second[None]
    size = torch.tensor([[640, 480]]).expand(len(first), 2)
    return model(
        ImageFeatures(torch.zeros(*first.shape[:2], 2), first, size, mask0),
        ImageFeatures(torch.zeros(*second.shape[:2], 2), second, size, mask1),
    )


def brute_force(
    first: NDArray[np.float32], second: NDArray[np.float32], ratio: float, threshold: float
) -> tuple[list[int], list[float]]:
    """Return match and score for each row of ``first``, by plain loops over Euclidean distances."""

    def nearest(vector: NDArray[np.float32], others: NDArray[np.float32]) -> tuple[int, bool]:
        distances = np.linalg.norm(others - vector, axis=1)
        order = np.argsort(distances)
        sure = len(order) == 1 or distances[order[0]] <= ratio * distances[order[1]]
        return int(order[0]), bool(sure or ratio == 1)

    matches, scores = [], []
    for i, vector in enumerate(first):
        j, sure = nearest(vector, second)
        back, sure_too = nearest(second[j], first)
        similarity = float(np.clip(vector @ second[j], 0, 1))
        matches.append(j if back == i and sure and sure_too and similarity > threshold else -1)
        scores.append(similarity)
    return matches, scores


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.8, 0.5])
@pytest.mark.parametrize(("count0", "count1"), [(50, 60), (60, 50), (1, 1), (1, 40), (40, 1), (2, 2)])
def test_matches_are_those_of_a_search_through_all_pairs(count0: int, count1: int, ratio: float) -> None:
    first, second = descriptors(count0, count1)
    found = match(NearestNeighbour(ratio_threshold=ratio), first, second)
    expected, scores = brute_force(first.numpy(), second.numpy(), ratio, 0)
    assert found.matches0[0].tolist() == expected
    for i, j in enumerate(expected):
        if j >= 0:
            assert found.scores0[0, i] == pytest.approx(scores[i], abs=1e-6)
            assert found.matches1[0, j] == i
            assert found.scores1[0, j] == found.scores0[0, i]
    assert (found.matches1 >= 0).sum() == sum(j >= 0 for j in expected)


def test_a_stricter_ratio_leaves_fewer_matches() -> None:
    first, second = descriptors(80, 80)
    counts = [
        int((match(NearestNeighbour(ratio_threshold=ratio), first, second).matches0 >= 0).sum())
        for ratio in (1.0, 0.9, 0.8, 0.6)
    ]
    assert counts == sorted(set(counts), reverse=True)
    assert counts[-1] > 0


def test_only_scores_above_the_threshold_match() -> None:
    first, second = descriptors(50, 60)
    expected, scores = brute_force(first.numpy(), second.numpy(), 1, 0.8)
    assert 5 < sum(j >= 0 for j in expected) < 40
    assert match(NearestNeighbour(filter_threshold=0.8), first, second).matches0[0].tolist() == expected


def test_equal_descriptors_score_one_and_opposite_ones_never_match() -> None:
    first = unit_vectors(5, 0)
    found = match(NearestNeighbour(ratio_threshold=0.8), first, first)
    assert found.matches0.tolist() == [[0, 1, 2, 3, 4]]
    assert found.scores0[0].tolist() == pytest.approx([1] * 5, abs=1e-6)
    assert (found.scores0 <= 1).all()
    assert match(NearestNeighbour(), first[:1], -first[:1]).matches0.tolist() == [[-1]]


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_pairs_match_in_a_batch_as_they_do_alone(ratio: float) -> None:
    pairs = [descriptors(*counts, seed=counts[0]) for counts in [(30, 20), (1, 25), (25, 1), (4, 30), (1, 1)]]
    first, second = (torch.nn.utils.rnn.pad_sequence(list(each), batch_first=True) for each in zip(*pairs))
    # The content of padding must not matter. Here it would be the best match.
    mask0, mask1 = (each.abs().sum(-1) > 0 for each in (first, second))
    best = first[0, 0].clone()
    first[~mask0], second[~mask1] = best, best
    model = NearestNeighbour(ratio_threshold=ratio)
    found = match(model, first, second, mask0=mask0, mask1=mask1)
    for b, (alone0, alone1) in enumerate(pairs):
        expected = match(model, alone0, alone1)
        assert found.matches0[b, : len(alone0)].tolist() == expected.matches0[0].tolist()
        assert found.matches1[b, : len(alone1)].tolist() == expected.matches1[0].tolist()
        assert torch.allclose(found.scores0[b, : len(alone0)], expected.scores0[0])
        assert (found.matches0[b, len(alone0) :] == -1).all()
        assert (found.matches1[b, len(alone1) :] == -1).all()


def test_the_ratio_test_passes_if_there_is_no_second_nearest_neighbour() -> None:
    first, second = torch.eye(16)[:1], torch.eye(16)[:1] * 0.3 + torch.eye(16)[1:2] * 0.91**0.5
    padding = torch.tensor([[True, False]])
    model = NearestNeighbour(ratio_threshold=0.3)
    assert match(model, first, second).matches0.tolist() == [[0]]
    first, second = first.repeat(2, 1), second.repeat(2, 1)
    assert match(model, first, second, mask0=padding, mask1=padding).matches0.tolist() == [[0, -1]]


@pytest.mark.parametrize("ratio", [1.0, 0.9])
@pytest.mark.parametrize(("count0", "count1"), [(0, 0), (0, 5), (5, 0)])
def test_no_descriptors_give_no_matches(count0: int, count1: int, ratio: float) -> None:
    found = match(NearestNeighbour(ratio_threshold=ratio), torch.zeros(count0, 16), torch.zeros(count1, 16))
    assert found.matches0.tolist() == [[-1] * count0]
    assert found.matches1.tolist() == [[-1] * count1]


def test_half_precision_descriptors_are_compared_in_float32() -> None:
    first, second = descriptors(50, 60)
    found = match(NearestNeighbour(), first.half(), second.half())
    assert found.scores0.dtype == torch.float32
    assert found.matches0[0].tolist() == brute_force(first.numpy(), second.numpy(), 1, 0)[0]
