"""Tests that the two views of photographs cut into layers, and the geometry that comes with them, agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

# isort: split
import training_scripts  # noqa: F401  (finds training/)
from layers import Layered, Layers
from views import HIDDEN, VISIBLE, Photos, ViewPairs

SIZE = (160, 120)


@pytest.fixture(scope="module")
def layers(texture: Callable[[int, int, int], np.ndarray]) -> Layers:
    return Layers(Photos([texture(240, 320, i) for i in range(6)], torch.device("cpu")))


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def geometry_of(pairs: ViewPairs) -> Layered:
    assert isinstance(pairs.geometry, Layered)
    return pairs.geometry


def pixels(count: int) -> torch.Tensor:
    x, y = (torch.arange(float(n)) for n in SIZE)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2).expand(count, -1, -1)


def sampled(images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    grid = points / (points.new_tensor(SIZE) - 1) * 2 - 1
    return torch.nn.functional.grid_sample(images, grid[:, None], align_corners=True)[:, 0, 0]


@pytest.mark.parametrize("of", [0, 1])
def test_a_visible_point_has_the_same_grey_value_in_both_views(layers: Layers, of: int) -> None:
    pairs = layers.pairs(draw(3), 6, SIZE)
    points = pixels(6)
    places, state = pairs.geometry.places(points, of)
    visible = state == VISIBLE
    here = pairs.images[of].flatten(1)
    difference = (sampled(pairs.images[1 - of], places) - here).abs()
    assert 0.2 < float(visible.float().mean()) < 0.95
    assert float(difference[visible].mean()) < 0.05
    elsewhere = sampled(pairs.images[1 - of], places + 6)  # the test would notice an error of six pixels
    assert float((elsewhere - here).abs()[visible].mean()) > 2 * float(difference[visible].mean())


def test_a_hidden_point_is_outside_the_other_view_or_behind_another_layer(layers: Layers) -> None:
    geometry = geometry_of(layers.pairs(draw(4), 6, SIZE))
    points = pixels(6)
    places, state = geometry.places(points, 0)
    inside = ((places >= 0) & (places <= torch.tensor(SIZE) - 1)).all(dim=-1)
    occluded = (state == HIDDEN) & inside
    at = places.round().long()
    shown = geometry.labels[1].flatten(1).gather(1, torch.where(inside, at[..., 1] * SIZE[0] + at[..., 0], 0))
    own = geometry.labels[0].flatten(1)
    assert occluded.any()
    assert (shown != own)[occluded].all()
    # At the most a line of pixels along the outlines shows a layer further behind, because of rounding.
    assert float((shown > own)[occluded].float().mean()) > 0.8
    assert not (state[~inside] == VISIBLE).any()


def test_there_and_back_leads_to_the_same_point(layers: Layers) -> None:
    geometry = layers.pairs(draw(5), 4, SIZE).geometry
    points = pixels(4)
    places, state = geometry.places(points, 0)
    back, again = geometry.places(places, 1)
    both = (state == VISIBLE) & (again == VISIBLE)
    assert float(both.float().mean()) > 0.2
    assert torch.allclose(back[both], points[both], atol=0.02)


def test_layers_in_front_move_further_along_one_direction(layers: Layers) -> None:
    geometry = geometry_of(layers.pairs(draw(6), 8, SIZE))
    middle = (torch.tensor(SIZE) - 1) / 2
    for b in range(8):
        first = torch.linalg.inv(geometry.homographies[0][0, b])
        # What a layer's point moves beyond the background's, seen in the first view.
        moves = [first @ each[b] @ torch.tensor([*middle.tolist(), 1.0]) for each in geometry.homographies[0]]
        shifts = torch.stack([each[:2] / each[2] - middle for each in moves])
        lengths = shifts.norm(dim=1)
        assert (lengths.diff() > -1e-3).all()
        directions = shifts[2:] / lengths[2:, None]
        assert torch.allclose(directions, directions[:1].expand_as(directions), atol=0.02)


def test_a_point_moves_with_the_layer_that_its_pixel_shows() -> None:
    move = torch.eye(3).repeat(2, 1, 1, 1)
    labels = torch.zeros(1, SIZE[1], SIZE[0], dtype=torch.int64)
    labels[0, 40:60, 50:80] = 1
    move[1, 0, 0, 2] = 10
    moved = torch.zeros_like(labels)
    moved[0, 40:60, 60:90] = 1
    geometry = Layered((move, torch.linalg.inv(move)), (labels, moved), SIZE)
    points = torch.tensor([[[50.0, 40.0], [49.4, 50.0], [85.0, 50.0], [45.0, 50.0], [155.0, 50.0]]])
    places, state = geometry.places(points, 0)
    assert places[0, :, 0].tolist() == pytest.approx([60, 49.4, 85, 45, 155], abs=1e-4)
    # A corner of the layer moves with it. The background stays, and is hidden where the layer has moved to.
    assert state[0].tolist() == [VISIBLE, VISIBLE, HIDDEN, VISIBLE, VISIBLE]


def test_the_same_random_numbers_give_the_same_views(layers: Layers) -> None:
    first, again = (layers.pairs(draw(8), 2, SIZE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images))
    assert all(float(image.min()) >= 0 and float(image.max()) <= 1 for image in first.images)
