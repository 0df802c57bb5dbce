"""Tests that the final stage of the networks in src/scores.c gives the results of PyTorch's operators."""

from __future__ import annotations

import pytest
import torch

from kpmatch_ros.models import compiled
from kpmatch_ros.models.lightglue_layers import MatchAssignment, Points

pytestmark = pytest.mark.skipif(not compiled.has_vectors(), reason="not built, or not for this processor")


@pytest.mark.parametrize("counts", [(1, 1), (1, 40), (16, 1), (33, 32), (100, 65), (257, 300)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
def test_the_best_pairs_agree_with_pytorch(counts: tuple[int, int], spread: float) -> None:
    random = torch.Generator().manual_seed(3)
    similarity = spread * torch.randn(*counts, generator=random)
    certain0, certain1 = (-torch.rand(count, generator=random) for count in counts)
    wide = similarity.double()
    scores = wide.log_softmax(1) + wide.log_softmax(0) + certain0[:, None] + certain1
    best0, best1, most0 = compiled.best_pairs(similarity, certain0, certain1)
    within = 1e-6 * spread + 3e-6
    assert torch.allclose(most0.double(), scores.amax(1), rtol=1e-6, atol=within)
    assert (scores.amax(1) - scores.gather(1, best0[:, None])[:, 0] <= within).all()
    assert (scores.amax(0) - scores.gather(0, best1[None])[0] <= within).all()


def test_the_first_of_equally_good_partners_is_chosen() -> None:
    best0, best1, _ = compiled.best_pairs(torch.zeros(40, 50), torch.zeros(40), torch.zeros(50))
    assert not best0.any() and not best1.any()


def test_nan_similarities_give_nan_scores_and_valid_indices() -> None:
    best0, best1, most0 = compiled.best_pairs(torch.full((20, 20), torch.nan), torch.zeros(20), torch.zeros(20))
    assert most0.isnan().all()  # FeatureMatcher then repeats the computation in float32
    assert ((best0 >= 0) & (best0 < 20) & (best1 >= 0) & (best1 < 20)).all()


@pytest.mark.parametrize("counts", [(7, 9), (300, 257)])
def test_the_matches_of_an_assignment_agree_with_pytorch(counts: tuple[int, int]) -> None:
    torch.manual_seed(5)
    network = MatchAssignment(64).requires_grad_(False)
    states, nothing = 3 * torch.randn(1, max(counts), 64), torch.empty(0)
    points = [
        Points(states[:, :count] + 0.1 * torch.randn(1, count, 64), nothing, None, nothing, nothing) for count in counts
    ]
    by_pytorch = network.mutual_matches(*points, 1e-3)
    network.use_compiled()
    assert network.compiled is not None
    found = network.mutual_matches(*points, 1e-3)
    assert (by_pytorch.matches0 >= 0).sum() > 0.5 * min(counts)
    assert torch.equal(found.matches0, by_pytorch.matches0) and torch.equal(found.matches1, by_pytorch.matches1)
    assert torch.allclose(found.scores0, by_pytorch.scores0, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.scores1, by_pytorch.scores1, rtol=1e-5, atol=1e-7)


def test_pixel_scores_are_the_softmax_of_each_cell() -> None:
    torch.manual_seed(6)
    logits = 10 * torch.randn(2, 3, 5, 65)
    logits[0, 0, 0] = 200 * torch.randn(65)
    cells = logits.double().softmax(dim=3)[..., :-1].unflatten(3, (8, 8))
    expected = cells.permute(0, 1, 3, 2, 4).reshape(2, 24, 40)
    assert torch.allclose(compiled.pixel_scores(logits).double(), expected, rtol=2e-5, atol=1e-36)
