"""Tests that a narrow LightGlue made from a wide one gives the same result, as far as its channels allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_scripts  # noqa: F401
from torch import nn

from kpmatch_ros.models import LightGlue

# isort: split
import lightglue_loss
from narrow import load_narrow, narrow, save_narrow

SIZE = (160, 120)


@pytest.fixture
def wide(randomise_lightglue: Any) -> LightGlue:
    model = LightGlue(input_dim=32, descriptor_dim=48, num_hidden_layers=2)
    randomise_lightglue(model, 0)
    for layer in model.transformer_layers:
        layer.cross_attention.k_proj = layer.cross_attention.q_proj
    return model


def batch(seed: int) -> lightglue_loss.Batch:
    """Return two pairs of 200 points. Positions and descriptors of the second image are similar to the first's."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.rand(2, 200, 2, generator=draw) * 100
    descriptors = nn.functional.normalize(torch.randn(2, 200, 32, generator=draw), dim=-1)
    noise = 0.05 * torch.randn(2, 200, 32, generator=draw)
    alike = nn.functional.normalize(descriptors + noise, dim=-1)
    partners, unmatched = torch.arange(200).expand(2, -1), torch.zeros(2, 200, dtype=torch.bool)
    return lightglue_loss.Batch((points, points + 1), (descriptors, alike), partners, (unmatched, unmatched), SIZE)


def last_states(model: LightGlue, seen: lightglue_loss.Batch) -> torch.Tensor:
    points = lightglue_loss.encoded(model, seen)
    for layer in model.transformer_layers:
        for each, x in zip(points, layer(*points)):
            each.x = x
    return points[0].x


def test_a_network_as_wide_as_before_gives_the_same_result(wide: LightGlue) -> None:
    made = narrow(wide, [batch(0), batch(1)], 48)
    assert isinstance(made.model.input_projection, nn.Linear)
    theirs, ours = (lightglue_loss.opinion(model, batch(2)) for model in (wide, made.model))
    assert theirs.matches.float().amax(dim=2).median() > 0.05, "the wide network finds matches"
    torch.testing.assert_close(ours.matches.float(), theirs.matches.float(), rtol=0.02, atol=2e-3)
    for mine, other in zip(ours.matchable, theirs.matchable):
        torch.testing.assert_close(mine.float(), other.float(), rtol=0.02, atol=5e-3)
    states = last_states(wide, batch(2))
    torch.testing.assert_close(last_states(made.model, batch(2)), made.coordinates.of(states), rtol=0.02, atol=5e-3)


def test_a_network_as_wide_as_the_descriptors_needs_no_projection_for_a_similar_result(wide: LightGlue) -> None:
    made = narrow(wide, [batch(0), batch(1)], 32)
    assert isinstance(made.model.input_projection, nn.Identity)
    seen = batch(2)
    states, wide_states = (lightglue_loss.encoded(model, seen)[0].x for model in (made.model, wide))
    assert torch.equal(states, seen.descriptors[0])
    # The descriptors' weakest directions are dropped if the wide network's layers have stronger ones.
    assert (made.coordinates.of(wide_states) - states).norm() < 0.25 * states.norm()
    theirs, ours = (lightglue_loss.opinion(model, seen).matches.float() for model in (wide, made.model))
    same = theirs.argmax(dim=2) == ours.argmax(dim=2)
    assert same.float().mean() > 0.8


def test_the_loss_includes_the_distance_to_the_teachers_states(wide: LightGlue) -> None:
    made, seen = narrow(wide, [batch(0), batch(1)], 32), batch(2)
    wanted = lightglue_loss.opinion(wide, seen, made.coordinates.of)
    assert wanted.states is not None and wanted.states[0].shape == (2, 2, 200, 32)
    parts = lightglue_loss.losses(made.model, seen._replace(opinion=wanted))
    own = seen._replace(opinion=lightglue_loss.opinion(made.model, seen, lambda x: x))
    assert lightglue_loss.losses(made.model, own)["distance"] < 1e-5 < 1e-3 < parts["distance"] < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lightglue_loss.opinion(wide, seen, made.coordinates.of)
    assert rounded.states is not None and rounded.states[0].dtype == torch.float16


def test_a_narrow_network_is_saved_and_loaded_with_its_coordinates(wide: LightGlue, tmp_path: Path) -> None:
    made = narrow(wide, [batch(0)], 32)
    save_narrow(tmp_path / "narrow.pt", made, wide)
    again = load_narrow(tmp_path / "narrow.pt", wide, 32, torch.device("cpu"))
    x = torch.randn(3, 48)
    assert torch.equal(again.coordinates.of(x), made.coordinates.of(x))
    assert torch.equal(last_states(again.model, batch(2)), last_states(made.model, batch(2)))


def test_a_saved_network_is_refused_for_another_width_or_another_teacher(
    wide: LightGlue, tmp_path: Path, randomise_lightglue: Any
) -> None:
    file = tmp_path / "narrow.pt"
    save_narrow(file, narrow(wide, [batch(0)], 32), wide)
    with pytest.raises(ValueError, match=r"narrow\.pt has 32 channels of the same teacher, not 16 of this one"):
        load_narrow(file, wide, 16, torch.device("cpu"))
    randomise_lightglue(wide, 1)
    with pytest.raises(ValueError, match=r"narrow\.pt has 32 channels of another teacher"):
        load_narrow(file, wide, 32, torch.device("cpu"))
    state = torch.load(file, weights_only=True)
    del state["wide"]  # as in old files, which do not name the teacher
    torch.save(state, file)
    assert load_narrow(file, wide, 32, torch.device("cpu")).model.config["descriptor_dim"] == 32


def test_a_network_with_different_weights_for_keys_and_queries_is_refused(wide: LightGlue) -> None:
    attention: Any = wide.transformer_layers[1].cross_attention
    attention.k_proj = nn.Linear(48, 48)
    with pytest.raises(ValueError, match="layer 1 has different weights for keys and queries"):
        narrow(wide, [batch(0)], 32)
