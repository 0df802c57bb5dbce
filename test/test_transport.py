"""Tests of optimal transport: Sinkhorn's algorithm as SuperGlue uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

import kpmatch_ros.models.superglue as superglue_module
from kpmatch_ros.models.superglue import sinkhorn, transport


def plain_sinkhorn(matrix: Any, rows: Any, columns: Any, iterations: int) -> Any:
    """Return the logarithm of the scaled matrix, computed with logarithms in float64."""
    u, v = np.zeros_like(rows), np.zeros_like(columns)
    for _ in range(iterations):
        u = rows - logsumexp(matrix + v[None], axis=1)
        v = columns - logsumexp(matrix + u[:, None], axis=0)
    return matrix + u[:, None] + v[None]


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    spread=st.sampled_from([0.1, 1.0, 5.0, 20.0, 100.0]),
    iterations=st.sampled_from([1, 2, 16, 17, 50, 100]),
)
@settings(max_examples=60, deadline=None)
def test_sinkhorn_equals_the_log_domain_algorithm_in_float64(
    seed: int, rows: int, columns: int, spread: float, iterations: int
) -> None:
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, columns)) * spread
    log_rows, log_columns = np.log(random.random(rows) + 0.1), np.log(random.random(columns) + 0.1)
    inputs = [torch.from_numpy(each).float()[None] for each in (matrix, log_rows, log_columns)]
    u, v = sinkhorn(*inputs, iterations)
    found = (inputs[0] + u[:, :, None] + v[:, None, :])[0].exp().numpy()
    expected = np.exp(plain_sinkhorn(*(each[0].double().numpy() for each in inputs), iterations))
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("trusted", [True, False])
def test_sinkhorn_is_correct_whether_or_not_it_computes_with_products(
    monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    # Rows compete for one column, each with e^100 times the weight of the previous one, so this needs iterations.
    matrix = np.stack([np.arange(6) * 100.0, np.zeros(6)], axis=1)
    rows, columns = np.zeros(6), np.log([3.0, 3.0])
    if not trusted:
        monkeypatch.setattr(superglue_module, "LARGEST_CHANGE", 0.0)
    for iterations in (1, 2, 20, 40, 150):
        u, v = sinkhorn(*(torch.from_numpy(each).float()[None] for each in (matrix, rows, columns)), iterations)
        found = torch.from_numpy(matrix).float() + u[0][:, None] + v[0][None]
        expected = plain_sinkhorn(matrix, rows, columns, iterations)
        assert found.numpy() == pytest.approx(expected, abs=0.01)


def test_a_transport_plan_assigns_every_point_at_most_once() -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(2, 20, 30, generator=generator) * 3
    mask0 = torch.arange(20)[None] < torch.tensor([[20], [12]])
    mask1 = torch.arange(30)[None] < torch.tensor([[30], [9]])
    plan = transport(similarity, torch.tensor(1.0), 200, mask0, mask1).exp()
    assert (plan.sum(dim=1) <= 1 + 1e-4).all() and (plan.sum(dim=2) <= 1 + 1e-4).all()
    assert (plan[1, 12:] == 0).all() and (plan[1, :, 9:] == 0).all()
    generous = transport(similarity, torch.tensor(-20.0), 200, mask0, mask1).exp()
    assert generous[0].sum(dim=1) == pytest.approx(torch.ones(20).numpy(), abs=1e-2)  # nothing goes to the dustbin
    assert transport(similarity, torch.tensor(50.0), 200).exp().max() < 1e-3  # everything goes to the dustbin


@pytest.mark.parametrize("iterations", [1, 2, 17, 100])
def test_padding_has_no_effect_on_transport_after_any_number_of_iterations(iterations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randn(1, 20, 30, generator=generator) * 3
    mask0, mask1 = torch.arange(20)[None] < 13, torch.arange(30)[None] < 9
    padded = transport(similarity, torch.tensor(1.0), iterations, mask0, mask1)[:, :13, :9]
    alone = transport(similarity[:, :13, :9], torch.tensor(1.0), iterations)
    assert torch.allclose(padded, alone, atol=1e-4)
