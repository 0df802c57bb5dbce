"""Tests that training views have correct geometry, that losses teach what they should, and that training resumes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from training_scripts import TRAINING, image_names

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models import ImageFeatures, LightGlue, SuperPoint

# isort: split
import degradation
import distil
import export
import lightglue_loss
import loop
import shards
import superpoint_loss
import train
import views
from views import HIDDEN, UNKNOWN, VISIBLE

Texture = Callable[[int, int, int], np.ndarray]
SaveFolder = Callable[..., Path]
CPU = torch.device("cpu")
SIZE = (160, 120)
GPU_RUN = [str(TRAINING / "gpu_run.sh")]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(step: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Return the pixels (1, N, 2) of a view."""
    x, y = torch.arange(0.0, size[0], step), torch.arange(0.0, size[1], step)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2)


def sampled(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return bilinear samples (B, N) of images (B, 1, H, W)."""
    limits = points.new_tensor(image.shape[:1:-1]) - 1
    return nn.functional.grid_sample(image, (points / limits * 2 - 1)[:, None], align_corners=True)[:, 0, 0]


@pytest.fixture(scope="module")
def folder(texture: Texture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 21 photographs, and of a wall with a board in front of it, seen by three cameras."""
    path = tmp_path_factory.mktemp("shards")
    pictures = [shards.encode_grey(texture(240, 320, i)) for i in range(21)]
    shards.write_photos(
        path / "photos_0.npz", pictures, image_names("photo_{}", 20) + image_names("photo_{}", 1, validation=True)
    )
    matrix = np.array([[200.0, 0, 159.5], [0, 200, 119.5], [0, 0, 1]])
    cameras, encoded = [], []
    for shift in (0.0, 0.3, 0.6):
        pose = np.eye(4)
        pose[0, 3] = shift
        cameras.append(pose)
        encoded.append(shards.encode_view(*room(texture, matrix, shift)))
    pairs, overlaps = [(0, 1), (1, 2), (0, 2)], [(0.8, 0.8)] * 3
    for number, (place,) in enumerate((image_names("hall_{}", 1), image_names("hall_{}", 1, validation=True))):
        shards.write_rooms(
            path / f"rooms_{number}.npz",
            encoded,
            np.stack([matrix] * 3),
            np.stack(cameras),
            np.zeros(3),
            ["hall"],
            np.full(3, number),
            [f"{place}_{i}" for i in range(3)],
            np.array(pairs),
            np.array(overlaps),
        )
    return path


def room(texture: Texture, matrix: np.ndarray, shift: float) -> tuple[np.ndarray, None, np.ndarray, np.ndarray]:
    """Return albedo (240, 320), light, normals and depth (120, 160): a wall at 4 m, and at x > 0.5 m a board at 2 m."""
    wall = texture(480, 960, 5)

    def look(columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rays = np.stack([(columns - matrix[0, 2]) / matrix[0, 0], (rows - matrix[1, 2]) / matrix[1, 1]])
        on_board = rays[0] * 2 + shift > 0.5
        depth = np.where(on_board, 2.0, 4.0)
        place = ((rays[0] * depth + shift) * 90 + 480, rays[1] * depth * 90 + 240 + 40 * on_board)
        grey = cv2.remap(wall, place[0].astype(np.float32), place[1].astype(np.float32), cv2.INTER_LINEAR)
        return grey, depth

    columns, rows = np.meshgrid(np.arange(320.0), np.arange(240.0))
    grey, depth = look(columns, rows)
    normals = np.zeros((120, 160, 3))
    normals[..., 2] = -1
    return grey, None, normals, depth[::2, ::2]


# --- views ---


def test_positions_of_photograph_points_in_the_other_view_are_correct(folder: Path) -> None:
    photos = views.load(folder, CPU)[0][0]
    pairs = photos.pairs(draw(), 4, SIZE)
    points = grid().expand(4, -1, -1)
    places, states = pairs.geometry.places(points, 0)
    seen = states == VISIBLE
    assert 0.2 < seen.float().mean() < 1
    difference = (sampled(pairs.images[1], places) - sampled(pairs.images[0], points)).abs()
    assert difference[seen].mean() < 0.02
    shifted = (sampled(pairs.images[1], places + 1.0) - sampled(pairs.images[0], points)).abs()
    assert shifted[seen].mean() > 1.5 * difference[seen].mean()
    back = pairs.geometry.places(places, 1)[0]
    assert (back - points)[seen].abs().max() < 0.01


def test_views_are_the_same_for_the_same_random_numbers(folder: Path) -> None:
    for source in views.load(folder, CPU)[0]:
        first, again, other = (source.pairs(draw(seed), 2, SIZE).images[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_positions_in_a_room_follow_the_depth_and_hidden_points_are_marked(folder: Path) -> None:
    rooms = views.load(folder, CPU)[0][1]
    assert isinstance(rooms, views.RoomViews)
    same = torch.eye(3)[None]
    geometry = views.Spatial(
        (same, same),
        (rooms.matrices[:1], rooms.matrices[2:3]),
        (rooms.poses[:1], rooms.poses[2:3]),
        (rooms.depth[:1], rooms.depth[2:3]),
        rooms.step,
        rooms.camera_size,
        rooms.camera_size,
    )
    # Points on the wall, on the board, on the wall where the board hides it from camera 2, and out of its view.
    points = torch.tensor([[[120.0, 100.0], [260.0, 60.0], [200.0, 120.0], [20.0, 120.0]]])
    places, states = geometry.places(points, 0)
    assert states.tolist() == [[VISIBLE, VISIBLE, HIDDEN, HIDDEN]]
    assert places[0, 0].tolist() == pytest.approx([120 - 200 * 0.6 / 4, 100], abs=0.05)
    assert places[0, 1].tolist() == pytest.approx([260 - 200 * 0.6 / 2, 60], abs=0.05)
    edge = torch.tensor([[[209.5, 120.0]]])  # between a sample of the wall and one of the board
    assert geometry.places(edge, 0)[1].item() == UNKNOWN


def test_two_views_of_a_room_show_the_same_surface_at_corresponding_positions(folder: Path) -> None:
    rooms = views.load(folder, CPU)[0][1]
    pairs = rooms.pairs(draw(3), 6, SIZE)
    points = grid().expand(6, -1, -1)
    places, states = pairs.geometry.places(points, 0)
    seen = states == VISIBLE
    assert seen.float().mean() > 0.2

    def agreement(shift: float) -> float:
        found = []
        for i in range(6):
            values = sampled(pairs.images[1], places + shift)[i, seen[i]], sampled(pairs.images[0], points)[i, seen[i]]
            found.append(float(torch.corrcoef(torch.stack(values))[0, 1]))
        return float(np.mean(found))

    assert agreement(0.0) > 0.8  # the light may differ
    assert agreement(0.0) > agreement(2.0) + 0.02


def test_positions_are_exact_along_the_border_of_the_depth_map() -> None:
    x, y = torch.meshgrid(torch.arange(160.0) * 2, torch.arange(120.0) * 2, indexing="xy")
    matrix, same, moved = torch.tensor([[[200.0, 0, 159.5], [0, 200, 119.5], [0, 0, 1]]]), torch.eye(3)[None], 0.5
    poses = torch.eye(4).repeat(2, 1, 1, 1)
    poses[1, 0, 0, 3] = moved

    def inverse(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the inverse depth of a slanted wall."""
        return 0.2 + 0.001 * x + 0.0005 * y

    depth = (1 / inverse(x, y))[None, None]
    wall = views.Spatial((same, same), (matrix, matrix), (poses[0], poses[1]), (depth, depth), 2.0, (320, 240))
    points = torch.tensor([[[x, y] for x in (0.0, 160.0, 316.5, 317.9, 318.0, 319.0) for y in (0.0, 237.0, 239.0)]])
    expected = points.clone()
    expected[..., 0] -= 200 * moved * inverse(points[..., 0], points[..., 1])
    assert (wall.places(points, 0)[0] - expected).abs().max() < 0.01


def test_one_in_twenty_photographs_and_places_of_rooms_is_always_kept_for_validation(
    folder: Path, texture: Texture, tmp_path: Path
) -> None:
    trained, validation = views.load(folder, CPU)
    assert [len(source) for source in trained] == [20, 3]
    assert [len(source) for source in validation] == [1, 3]
    names = [f"photo_{i}" for i in range(2000)]
    chosen = views.are_for_validation(names)
    assert 60 < chosen.sum() < 140
    assert views.are_for_validation(["one_more", *names])[1:].tolist() == chosen.tolist()
    few = image_names("photo_{}", 3)
    assert views.are_for_validation(few).sum() == 1  # there is always a validation image


def test_a_shard_without_room_views_is_ignored(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos_0.npz").symlink_to(folder / "photos_0.npz")
    nothing = np.zeros(0)
    shards.write_rooms(tmp_path / "rooms_0.npz", [], nothing, nothing, nothing, [], nothing, [], nothing, nothing)
    assert [len(sources) for sources in views.load(tmp_path, CPU)] == [1, 1]


def test_degradation_follows_its_strength_and_is_reproducible(texture: Texture) -> None:
    image = torch.from_numpy(texture(120, 160, 1))[None, None].float().expand(12, -1, -1, -1) / 255

    def change(strength: float, seed: int = 0) -> torch.Tensor:
        return degradation.degrade(draw(seed), image, torch.full((12,), strength)) - image

    assert change(0.0).abs().max() < 1e-6
    assert torch.equal(change(0.7), change(0.7))
    sizes = [float(change(strength).abs().mean()) for strength in (0.2, 0.5, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] > 0
    degraded = degradation.degrade(draw(), image, torch.ones(12))
    assert degraded.min() >= 0 and degraded.max() <= 1
    assert torch.allclose(degraded * 255, (degraded * 255).round(), atol=1e-3)


def test_degradation_does_not_move_image_content() -> None:
    width, height = SIZE
    x, y = grid()[0].T.view(2, 1, 1, height, width)  # its own coordinates, to show where content moves
    places = torch.cat([x, y])
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    for seed in range(40):
        for part in (degradation.coarser(draw(seed), places), degradation.blurred(draw(seed), places, torch.ones(2))):
            assert (part - places)[inner].abs().max() < 0.1
    coded = degradation.jpeg(places / 255, torch.full((2, 1, 1, 1), 100.0)) * 255
    assert (coded - places).view(2, 1, -1, 8, width // 8, 8).mean(dim=(3, 5)).abs().max() < 0.1  # means of 8 x 8 blocks


# --- SuperPoint ---


def peaks(points: torch.Tensor) -> torch.Tensor:
    """Return maps (B, 120, 160) with a peak around each of the points (B, N, 2)."""
    distance = (grid()[:, :, None] - points[:, None]).square().sum(dim=-1)
    return (0.6 * (-distance / (2 * 0.7**2)).exp()).amax(dim=2).view(-1, 120, 160)


def test_label_points_are_where_both_views_agree_with_subpixel_precision() -> None:
    shift = torch.eye(3)[None].clone()
    shift[0, 0, 2], shift[0, 1, 2] = 7.3, -4.6
    geometry = views.Planar((shift, torch.linalg.inv(shift)), SIZE)
    true = torch.tensor([[[40.2, 50.7], [90.5, 60.25], [60.0, 80.0]]])
    only_first = torch.tensor([[[120.0, 30.0]]])
    maps = peaks(torch.cat([true, only_first], dim=1)), peaks(true + torch.tensor([7.3, -4.6]))
    flat = torch.zeros(1, 1, 120, 160)
    labels = superpoint_loss.consensus(maps, (flat, flat), geometry, corners=0.0)
    found = labels.points[0][labels.valid]
    assert len(found) == 3
    distance = torch.cdist(found, true[0])
    assert distance.amin(dim=0).max() < 0.1
    assert torch.allclose(labels.points[1][labels.valid], found + torch.tensor([7.3, -4.6]), atol=1e-3)
    assert 0.7 < labels.covered[0].float().mean() < 1


def test_the_detector_loss_is_smallest_if_the_scores_equal_the_labels() -> None:
    points = torch.tensor([[[20.25, 33.5], [101.0, 70.0]]])
    valid, covered = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 15, 20, dtype=torch.bool)
    target = torch.zeros(1, 65, 15, 20)
    target[:, 64] = 1
    for x, y, weight in ((20, 33, 0.375), (20, 34, 0.375), (21, 33, 0.125), (21, 34, 0.125), (101, 70, 1.0)):
        target[0, (y % 8) * 8 + x % 8, y // 8, x // 8] += weight
        target[0, 64, y // 8, x // 8] -= weight

    def loss(scores: torch.Tensor) -> float:
        return float(superpoint_loss.detector_loss((scores + 1e-6).log(), points, valid, covered))

    best = loss(target)
    assert best < loss(target.roll(1, dims=1))
    assert best < loss(0.9 * target + 0.1 / 65)
    without = torch.zeros_like(covered)
    assert float(superpoint_loss.detector_loss(target, points, valid, without)) == 0


def test_the_reprojection_loss_is_the_distance_and_its_gradient_pulls_points_together() -> None:
    geometry = views.Planar((torch.eye(3)[None], torch.eye(3)[None]), SIZE)
    first = torch.tensor([[[50.0, 50.0], [100.0, 80.0]]], requires_grad=True)
    second = torch.tensor([[[50.6, 50.8], [100.0, 81.0], [20.0, 20.0]]])
    loss = superpoint_loss.reprojection_loss((first, second), geometry)
    assert loss.item() == pytest.approx(1.0, abs=0.01)
    loss.backward()
    assert first.grad is not None
    assert (first.grad[0, 0] < 0).all()  # the descent direction is right and down, towards the partner


def test_own_points_have_subpixel_precision() -> None:
    true = torch.tensor([[[40.3, 50.6], [90.45, 60.2]]])
    found = superpoint_loss.own_points(peaks(true), 2)
    assert torch.cdist(found, true).amin(dim=1).max() < 0.1


# --- LightGlue ---


def test_true_matches_are_mutual_and_close_and_doubtful_points_are_neither_matched_nor_unmatched() -> None:
    geometry = views.Planar((torch.eye(3)[None], torch.eye(3)[None]), SIZE)
    first = torch.tensor([[[10.0, 10.0], [12.0, 10.0], [50.0, 50.0], [90.0, 90.0], [100.0, 20.0]]])
    second = torch.tensor([[[10.5, 10.0], [50.0, 52.4], [90.0, 92.7], [140.0, 100.0], [141.0, 20.0]]])
    partners, (alone0, alone1) = lightglue_loss.truth((first, second), geometry)
    assert partners.tolist() == [[0, -1, 1, -1, -1]]
    assert alone0.tolist() == [[False, False, False, False, True]]
    assert alone1.tolist() == [[False, False, False, True, True]]


def matching_batch(model: LightGlue, partners: torch.Tensor) -> lightglue_loss.Batch:
    points = torch.rand(2, 20, 2, generator=draw(1)) * 100
    descriptors = nn.functional.normalize(torch.randn(2, 20, model.input_dim, generator=draw(2)), dim=-1)
    unmatched = partners < 0
    return lightglue_loss.Batch(
        (points, points + 1), (descriptors, descriptors), partners, (unmatched, unmatched), SIZE
    )


def test_the_loss_is_smaller_for_the_true_assignment_and_reaches_every_layer(randomise_lightglue: Any) -> None:
    model = LightGlue(input_dim=64, descriptor_dim=64, num_hidden_layers=3)
    randomise_lightglue(model, 0)
    model.requires_grad_(True)
    right = torch.arange(20).expand(2, -1)
    parts = lightglue_loss.losses(model, matching_batch(model, right))
    wrong = lightglue_loss.losses(model, matching_batch(model, right.roll(1, dims=1)))
    assert parts["last"] < wrong["last"]
    parts["assignment"].backward(retain_graph=True)
    assert all(
        any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters()) for m in model.transformer_layers
    )
    assert all(p.grad is None for p in model.token_confidence.parameters())
    model.zero_grad(set_to_none=True)
    parts["confidence"].backward()
    assert all(p.grad is None for p in model.transformer_layers.parameters())
    assert all(p.grad is not None for p in model.token_confidence.parameters())


def test_points_whose_true_match_the_network_rates_too_low_count_as_unmatched(randomise_lightglue: Any) -> None:
    model = LightGlue(input_dim=64, descriptor_dim=64, num_hidden_layers=3)
    randomise_lightglue(model, 0)
    batch = matching_batch(model, torch.arange(20).expand(2, -1).roll(1, dims=1).clone())
    batch.partners[:, ::2] = torch.arange(0, 20, 2)  # every second partner agrees with the descriptors
    opinion = lightglue_loss.opinion(model, batch)
    said = opinion.matches.gather(2, batch.partners[..., None])[..., 0]
    found = lightglue_loss.within_reach(opinion, batch, 0.01)
    assert torch.equal(found.partners, torch.where(said >= 0.01, batch.partners, -1))
    assert (found.partners[:, 1::2] < 0).all() and (found.partners[:, ::2] >= 0).sum() > 15
    for side, unmatched in enumerate(batch.unmatched):
        for b in range(len(said)):
            lost = said[b] < 0.01
            names = lost.nonzero()[:, 0] if side == 0 else batch.partners[b, lost]
            expected = unmatched[b].index_fill(0, names, True)
            assert torch.equal(found.unmatched[side][b], expected) and expected.sum() > unmatched[b].sum()


# --- runs ---


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that train within seconds."""
    sizes = {"encoder_hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16, "descriptor_decoder_dim": 32}
    monkeypatch.setattr(train, "SUPERPOINTS", {"full": sizes, "fast": {**sizes, "decoder_hidden_size": 8}})
    glue = {"input_dim": 32, "descriptor_dim": 32, "num_hidden_layers": 2}
    monkeypatch.setattr(train, "RATES", dict.fromkeys(train.RATES, 5e-3))
    monkeypatch.setattr(train, "LIGHTGLUES", {"full": glue, "fast": {**glue, "num_hidden_layers": 1}})


def run(folder: Path, out: Path, kind: str, *options: str) -> list[dict[str, Any]]:
    """Train, and return the lines of the log."""
    common = ["--shards", folder, "--out", out, "--batch", 2, "--size", *SIZE, "--log-every", 1,
              "--watch-views", 2, "--device", "cpu"]  # fmt: skip
    train.main([kind, *map(str, common), "--precision", "float32", *options])
    return [json.loads(line) for line in (out / f"{kind}.jsonl").read_text().splitlines()]


def steps(log: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Return the losses by step, without times."""
    return {
        line["step"]: {key: value for key, value in line.items() if key not in ("seconds", "progress")}
        for line in log
        if "validation" not in line
    }


@pytest.mark.usefixtures("small")
def test_a_resumed_training_has_the_same_losses_as_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    for kind, options in (("points", []), ("matching", ["--batches", "2", "--heads", "2"])):
        whole = steps(run(folder, tmp_path / "whole", kind, "--steps", "5", *options))
        run(folder, tmp_path / "parts", kind, "--steps", "5", "--stop-after", "2", *options)
        parts = steps(run(folder, tmp_path / "parts", kind, "--steps", "5", *options))
        assert sorted(parts) == sorted(whole) == [1, 2, 3, 4, 5]
        for step, losses in whole.items():
            assert parts[step] == pytest.approx(losses, rel=1e-3, abs=2e-3)


def settings() -> loop.Settings:
    return loop.Settings(CPU, 2, SIZE, 0, None)


def test_kept_batches_are_made_once_and_are_the_same_in_every_run() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    first, second = (loop.Batches(make, 3, settings()) for _ in range(2))
    used = [first.of(step) for step in range(1, 13)]
    assert sorted(made) == [0, 1, 2] == sorted(set(used))
    assert [second.of(step) for step in range(7, 13)] == used[6:]


def test_every_step_gets_a_new_batch_if_none_is_kept() -> None:
    batches = loop.Batches(lambda number: [number], 0, settings())
    assert [batches.of(step) for step in range(1, 7)] == [[1], [2], [3], [4], [5], [6]]
    assert set(batches.futures) <= {7, 8}


def test_new_batches_replace_the_oldest_ones_that_are_kept() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    batches = loop.Batches(make, 4, settings(), renewed=3)
    for step in range(1, 61):
        assert step // 3 <= batches.of(step) < step // 3 + 4
        assert len(batches.futures) <= 4 + 1  # one more is prepared for the step after the next
    assert len(made) == len(set(made)) > 15


def test_an_error_while_making_a_batch_is_raised_by_the_step_that_needs_it() -> None:
    def make(number: int) -> int:
        raise ValueError("no such view")

    with pytest.raises(ValueError, match="no such view"):
        loop.Batches(make, 0, settings()).of(1)


def test_a_batch_that_failed_once_is_made_again() -> None:
    failures = iter([MemoryError("no room")])

    def make(number: int) -> int:
        for failure in failures:
            raise failure
        return number

    batches = loop.Batches(make, 1, settings())
    with pytest.raises(MemoryError, match="no room"):
        batches.of(1)
    assert batches.of(2) == 0


def test_subnormal_numbers_are_zero_only_within_the_context() -> None:
    smallest = torch.tensor(1e-40)
    with loop.subnormals_are_zeros():
        assert smallest * 1 == 0
    assert smallest * 1 > 0


class Scale(nn.Linear):
    """A network that learns immediately."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.config = {"size": size}


def train_scales(
    out: Path, names: list[str], size: int, steps: int, factor: Callable[[int], float] = lambda step: 1
) -> None:
    """Train ``Scale`` networks, or resume a training. Each step's loss is multiplied by ``factor(step)``."""
    students = [loop.Student(name, Scale(size), 1e-2) for name in names]
    words = ["--shards", "none", "--out", str(out), "--steps", str(steps), "--device", "cpu"]
    parser = argparse.ArgumentParser()
    loop.add_options(parser, 1, SIZE)
    arguments = parser.parse_args(words)
    arguments.kind = "points"

    def learn(step: int, progress: float) -> dict[str, float]:
        for student in students:
            student.step(factor(step) * student.model(torch.ones(1, size)).square().sum(), 1.0, step)
        return {}

    loop.run(arguments, settings(), students, learn, dict)


def test_a_training_resumes_only_with_the_same_networks(tmp_path: Path) -> None:
    train_scales(tmp_path, ["full", "fast"], 2, 1)
    before = (tmp_path / "points.pt").read_bytes()
    for names in (["full"], ["full", "fast", "third"]):
        with pytest.raises(ValueError, match=r"points\.pt holds fast, full: continue with exactly these networks"):
            train_scales(tmp_path, names, 2, 2)
    assert (tmp_path / "points.pt").read_bytes() == before
    train_scales(tmp_path, ["full", "fast"], 2, 2)
    assert torch.load(tmp_path / "points.pt", weights_only=True)["step"] == 2


def test_a_training_without_memory_for_one_pair_ends_and_can_be_resumed(tmp_path: Path) -> None:
    def short_of_memory(step: int) -> float:
        if step > 3:
            raise torch.OutOfMemoryError("too large")
        return 1

    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        train_scales(tmp_path, ["full"], 2, 9, short_of_memory)
    assert not list(tmp_path.glob("*.weights.pt"))
    # A batch of two pairs did not fit, and then a single pair did not fit at the next step, which has to be repeated.
    assert torch.load(tmp_path / "points.pt", weights_only=True)["step"] == 4
    train_scales(tmp_path, ["full"], 2, 9)
    assert (tmp_path / "points.weights.pt").exists()


def test_losses_that_stay_non_finite_end_a_training_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FloatingPointError, match="the loss of full was not finite in any of 3 steps"):
        train_scales(tmp_path / "short", ["full"], 2, 3, lambda step: np.nan)
    monkeypatch.setattr(loop, "PATIENCE", 4)
    with pytest.raises(FloatingPointError, match="the loss of full was not finite in 4 steps in a row"):
        train_scales(tmp_path / "late", ["full"], 2, 100, lambda step: np.inf if step > 5 else 1)
    assert not list(tmp_path.glob("*/*.weights.pt"))
    train_scales(tmp_path / "now and then", ["full"], 2, 12, lambda step: np.inf if step % 4 else 1)
    assert (tmp_path / "now and then" / "points.weights.pt").exists()
    train_scales(tmp_path / "resumed", ["full"], 2, 3)
    train_scales(tmp_path / "resumed", ["full"], 2, 4, lambda step: np.nan)
    assert torch.load(tmp_path / "resumed" / "points.pt", weights_only=True)["step"] == 4


def test_the_parts_of_a_weights_file_always_join_to_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PART", 1000)
    for size in (30, 2):
        train_scales(tmp_path, ["full"], size, 1)
        (tmp_path / "points.pt").unlink()
    parts = sorted(tmp_path.glob("points.weights.pt.*"), key=lambda part: int(part.suffix[1:]))
    assert b"".join(part.read_bytes() for part in parts) == (tmp_path / "points.weights.pt").read_bytes()


@pytest.mark.usefixtures("small")
def test_a_training_lowers_its_losses_and_its_weights_can_be_loaded(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    points = steps(run(folder, out, "points", "--steps", "24"))
    for name in ("full", "fast"):
        parts = [losses[f"{name} points"] for losses in points.values()]
        assert np.mean(parts[-5:]) < np.mean(parts[:3]) - 0.05
    matching = steps(run(folder, out, "matching", "--steps", "16", "--networks", "full"))
    totals = [losses["full assignment"] for losses in matching.values()]
    assert np.mean(totals[-5:]) < np.mean(totals[:3])
    glue = torch.load(out / "matching.weights.pt", weights_only=True)["full"]
    layer = "transformer_layers.0.cross_attention"
    assert torch.equal(glue["tensors"][f"{layer}.q_proj.weight"], glue["tensors"][f"{layer}.k_proj.weight"])
    content = (out / "matching.weights.pt").read_bytes()
    assert b"".join(path.read_bytes() for path in sorted(out.glob("matching.weights.pt.*"))) == content
    loaded, fits = train.build("matching", "full", str(out / "matching.weights.pt"), CPU)
    assert fits and torch.equal(
        loaded.state_dict()[f"{layer}.q_proj.bias"], glue["tensors"][f"{layer}.q_proj.bias"].float()
    )


@pytest.mark.usefixtures("small")
def test_a_training_uses_the_given_learning_rate(folder: Path, tmp_path: Path) -> None:
    points = [
        steps(run(folder, tmp_path / rate, "points", "--steps", "3", "--rate", rate)) for rate in ("1e-9", "5e-3")
    ]
    given, usual = ([losses["full points"] for losses in each.values()] for each in points)
    assert given[0] == usual[0] and given[2] != usual[2]
    assert points[1] == steps(run(folder, tmp_path / "usual", "points", "--steps", "3"))


def points_file(folder: Path, **other: dict[str, Any]) -> Path:
    """Write a points.weights.pt of random networks, with another configuration for the named ones."""
    models = {name: SuperPoint(**{**config, **other.get(name, {})}) for name, config in train.SUPERPOINTS.items()}
    for model in models.values():
        for number, (_, tensor) in enumerate(sorted(model.state_dict().items())):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=draw(number)))
    path = folder / "some.weights.pt"
    torch.save({name: {"config": m.config, "tensors": m.state_dict()} for name, m in models.items()}, path)
    return path


@pytest.mark.usefixtures("small")
def test_only_the_detector_of_a_teacher_for_points_has_an_effect(folder: Path, tmp_path: Path) -> None:
    def losses(name: str, **other: dict[str, Any]) -> dict[int, dict[str, float]]:
        (tmp_path / name).mkdir()
        teacher = str(points_file(tmp_path / name, **other))
        return steps(run(folder, tmp_path / name, "points", "--steps", "2", "--networks", "fast", "--teacher", teacher))

    fits = losses("fits")
    assert losses("wide", full={"descriptor_decoder_dim": 64}) == fits
    assert losses("large", full={"decoder_hidden_size": 32}) != fits  # this part of the configuration is checked


@pytest.mark.usefixtures("small")
def test_distillation_refuses_start_weights_of_another_architecture(
    folder: Path, teacher: Path, tmp_path: Path
) -> None:
    start = str(points_file(tmp_path, fast={"decoder_hidden_size": 32}))
    with pytest.raises(ValueError, match="has another architecture than the fast network"):
        run_distillation(folder, teacher, tmp_path / "run", "points", "--steps", "1", "--start", start)
    with pytest.raises(KeyError, match="holds full, fast, but no network called slow"):
        export.read_trained(SuperPoint, Path(start), "slow")


@pytest.mark.usefixtures("small")
def test_a_network_that_starts_from_random_weights_is_reported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = points_file(tmp_path, fast={"descriptor_decoder_dim": 64})
    run(folder, tmp_path / "second", "points", "--steps", "1", "--start", str(start))
    said = f"starts from random weights: --start {start} has another architecture"
    assert f"fast {said}" in (printed := capsys.readouterr().out) and f"full {said}" not in printed


@pytest.mark.parametrize(
    ("stage", "more", "kinds"),
    [
        ("both", ["--networks", "fast"], ["points", "matching"]),
        ("distil", ["--batches", "1", "--keypoints", "32"], ["points", "matching"]),
        ("rank", ["--keypoints", "32"], ["ranking"]),
    ],
)
def test_gpu_run_sh_trains_from_tiny_shards(
    folder: Path, tmp_path: Path, stage: str, more: list[str], kinds: list[str]
) -> None:
    options = ["--size", "96", "64", "--batch", "1", "--device", "cpu", "--precision", "float32", *more]
    options += ["--watch-views", "1"]
    out = tmp_path / "run"
    shards_there = os.path.relpath(folder, tmp_path)
    done = subprocess.run(
        [*GPU_RUN, "--minutes", "0.02", "--stage", stage, "--shards", shards_there, "--out", "run", "--", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for kind in kinds:
        log = [json.loads(line) for line in (out / f"{kind}.jsonl").read_text().splitlines()]
        assert min(steps(log)) == 1 and (out / f"{kind}.weights.pt").exists()


def gpu_run_commands(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Return the Python calls that the script would make."""
    words = [*GPU_RUN, "--shards", "shards", "--out", "run", *options]
    return subprocess.run(words, cwd=folder, env={**os.environ, "PYTHON": "echo"}, capture_output=True, text=True)


def test_gpu_run_sh_starts_every_stage_from_the_given_weights(tmp_path: Path) -> None:
    starts = ["--start-points", "a b.weights.pt", "--start-matching", "c.weights.pt"]
    for stage in ("both", "distil"):
        points, matching = gpu_run_commands(tmp_path, "--stage", stage, *starts).stdout.splitlines()
        assert "--start a b.weights.pt" in points and "--start c.weights.pt" in matching
    points, matching = gpu_run_commands(tmp_path).stdout.splitlines()
    assert "--start superpoint-open" in points and "--start lightglue-superpoint-open" in matching
    assert "--start" not in gpu_run_commands(tmp_path, "--stage", "distil").stdout
    (ranking,) = gpu_run_commands(tmp_path, "--stage", "rank", *starts).stdout.splitlines()
    assert "rank.py" in ranking and "--start a b.weights.pt" in ranking
    assert "--start superpoint-open" in gpu_run_commands(tmp_path, "--stage", "rank").stdout


def test_gpu_run_sh_uses_the_batch_sizes_of_the_recipe_unless_others_are_given(tmp_path: Path) -> None:
    stages = {"both": ["16", "32"], "points": ["16"], "matching": ["32"], "distil": ["4", "32"], "rank": ["8"]}
    for stage, expected in stages.items():
        for more, batches in (([], expected), (["--", "--batch", "2"], ["2"] * len(expected))):
            commands = gpu_run_commands(tmp_path, "--stage", stage, *more).stdout.splitlines()
            assert [line.rpartition("--batch ")[2].split()[0] for line in commands] == batches


def test_gpu_run_sh_refuses_missing_options_and_unknown_stages(tmp_path: Path) -> None:
    done = subprocess.run([*GPU_RUN, "--minutes", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--shards and --out are required" in done.stderr
    done = gpu_run_commands(tmp_path, "--stage", "piont")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown stage piont" in done.stderr and not list(tmp_path.iterdir())


def test_clusters_of_a_room_are_numbered_from_the_given_first_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("drjit", "mitsuba"):  # the renderer is not installed
        monkeypatch.setitem(sys.modules, name, MagicMock())
    render = importlib.import_module("render")
    sys.modules.pop("render")  # so that the next import uses the installed modules
    rooms = [render.Room("hall", "hall"), render.Room("bath", "bath", held_out=True)]
    for held_out, room in ((False, rooms[0]), (True, rooms[1])):
        assert render.numbered(rooms, held_out, 100, 3) == [(100, room), (101, room), (102, room)]


# --- shipping ---


def test_exported_networks_give_the_same_matches_in_the_package_and_in_transformers(
    tmp_path: Path, random_folder: SaveFolder, texture: Texture
) -> None:
    transformers = pytest.importorskip("transformers")
    source = random_folder(lightglue={"depth_confidence": -1.0, "width_confidence": -1.0})
    superpoint = SuperPoint.from_pretrained(source, keypoint_threshold=0.04, nms_radius=3)
    export.export(superpoint, LightGlue.from_pretrained(source), tmp_path)
    image0 = texture(120, 160, 0)
    image1 = np.roll(image0, 5, axis=1)
    ours = FeatureMatcher.from_pretrained(
        tmp_path,
        device="cpu",
        precision="float32",
        depth_confidence=-1.0,
        width_confidence=-1.0,
        border=superpoint.border,
        subpixel=False,  # theirs finds whole pixels only
    )
    features0, features1 = ours.extract(image0), ours.extract(image1)
    matches = ours.match(features0, features1)
    assert len(matches) > 20

    theirs = transformers.LightGlueForKeypointMatching.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.keypoint_detector_config.keypoint_threshold == 0.04
    images = torch.stack([(torch.from_numpy(image).float() / 255).expand(3, -1, -1) for image in (image0, image1)])[
        None
    ]
    with torch.no_grad():
        found = theirs(images)
    matches0, count = found.matches.reshape(2, -1)[0], found.keypoints.shape[-2]
    assert count >= max(len(features0), len(features1))
    size = torch.tensor([160, 120])
    pixels = found.keypoints.reshape(2, count, 2) * size
    expected = {
        tuple(pixels[0, i].round().int().tolist() + pixels[1, j].round().int().tolist())
        for i, j in enumerate(matches0.tolist())
        if j >= 0
    }
    pairs = torch.cat([features0.keypoints[matches.indices[:, 0]], features1.keypoints[matches.indices[:, 1]]], dim=1)
    assert {tuple(pair) for pair in pairs.round().int().tolist()} == expected


def test_networks_with_different_descriptor_sizes_are_not_exported(
    tmp_path: Path, small_superpoint: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="descriptors have size 64, but the LightGlue takes size 128"):
        export.export(SuperPoint(**small_superpoint), LightGlue(input_dim=128), tmp_path)


# --- distillation ---


@pytest.fixture
def teacher(small: None, tmp_path: Path, randomise_superpoint: Any, randomise_lightglue: Any) -> Path:
    """A folder with a teacher pair whose descriptors have the size of the small networks' ones."""
    superpoint, lightglue = SuperPoint(**train.SUPERPOINTS["full"]), LightGlue(**train.LIGHTGLUES["full"])
    randomise_superpoint(superpoint, 1)
    randomise_lightglue(lightglue, 1)
    export.export(superpoint, lightglue, tmp_path / "teacher")
    return tmp_path / "teacher"


def run_distillation(folder: Path, teacher: Path, out: Path, kind: str, *options: str) -> dict[int, dict[str, float]]:
    """Distil, and return the losses by step."""
    common = ["--shards", folder, "--out", out, "--teacher", teacher, "--batch", 2, "--size", *SIZE, "--log-every", 1]
    few = ["--batches", 3, "--watch-views", 1, "--keypoints", 128, "--layers", 1, "--device", "cpu"]
    distil.main([kind, *map(str, common + few), "--precision", "float32", *options])
    return steps([json.loads(line) for line in (out / f"{kind}.jsonl").read_text().splitlines()])


def test_validation_views_are_the_same_in_every_run(folder: Path) -> None:
    """For any seed and batch size, so that runs can be compared."""
    _, validation = views.load(folder, CPU)
    seen = []
    for seed, batch in ((0, 1), (3, 7)):
        settings = loop.Settings(CPU, batch, SIZE, seed, None)
        seen.append(list(loop.validation_parts(validation, settings, 5)))
    assert [name for name, _, _ in seen[0]] == ["Photos", "Photos", "RoomViews", "RoomViews"]
    assert [len(pairs.images[0]) for _, pairs, _ in seen[0]] == [4, 1, 4, 1]
    for (_, first, draw0), (_, second, draw1) in zip(*seen):
        assert torch.equal(first.images[1], second.images[1])
        assert torch.equal(torch.rand(3, generator=draw0), torch.rand(3, generator=draw1))
    four, one = (pairs.images[1] for _, pairs, _ in seen[0][:2])
    assert not torch.equal(four[:1], one), "each part has views of its own"
    counts = iter((4.0, 9.0, 0.0, 5.0))
    figures = loop.validation_means(validation, settings, 5, lambda name, pairs, draw: {name: next(counts)})
    assert figures == {"Photos": 5.0, "RoomViews": 1.0}, "each pair counts alike"


def test_distillation_lowers_its_losses_and_resumes_where_it_was_stopped(
    folder: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "RATES", {"points": 5e-3, "matching": 1e-3})
    whole = tmp_path / "whole"
    points = run_distillation(folder, teacher, whole, "points", "--steps", "24")
    for part in ("points", "descriptors", "contrast"):
        losses = [figures[part] for figures in points.values()]
        assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.01
    matching = run_distillation(folder, teacher, whole, "matching", "--steps", "16")
    totals = [figures["total"] for figures in matching.values()]
    assert np.mean(totals[-6:]) < np.mean(totals[:6])
    parts = tmp_path / "parts"
    run_distillation(folder, teacher, parts, "points", "--steps", "24", "--stop-after", "3")
    again = run_distillation(folder, teacher, parts, "points", "--steps", "24", "--stop-after", "3")
    for step in range(1, 7):
        assert again[step] == pytest.approx(points[step], rel=1e-3, abs=2e-3)
    superpoint = export.read_trained(SuperPoint, whole / "points.weights.pt", "fast")
    lightglue = export.read_trained(LightGlue, whole / "matching.weights.pt", "fast")
    assert len(lightglue.transformer_layers) == 1
    export.export(superpoint, lightglue, whole)


def test_a_narrow_matcher_continues_from_the_weights_of_another_run(
    folder: Path, teacher: Path, tmp_path: Path, randomise_lightglue: Any
) -> None:
    narrow = LightGlue(input_dim=32, descriptor_dim=16, num_attention_heads=2, num_hidden_layers=2)
    randomise_lightglue(narrow, 2)
    for layer in narrow.transformer_layers:  # one projection for queries and keys, as in trained networks
        layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    state = {"config": narrow.config, "tensors": {name: t.half() for name, t in narrow.state_dict().items()}}
    torch.save({"fast": state}, tmp_path / "start.weights.pt")
    run = tmp_path / "run"
    run_distillation(folder, teacher, run, "points", "--steps", "1")
    run_distillation(folder, teacher, run, "matching", "--steps", "4", "--start", str(tmp_path / "start.weights.pt"))
    trained = export.read_trained(LightGlue, run / "matching.weights.pt", "fast")
    assert trained.config["descriptor_dim"] == 16 and len(trained.transformer_layers) == 2
    moved = [float((t - narrow.state_dict()[name]).abs().max()) for name, t in trained.state_dict().items()]
    assert 0 < max(moved) < 0.2


def test_the_distillation_loss_is_smallest_if_the_student_agrees_with_the_teacher(
    small: None, folder: Path, randomise_superpoint: Any, randomise_lightglue: Any
) -> None:
    settings = loop.Settings(CPU, 2, SIZE, 0, None)
    model, other = (SuperPoint(**train.SUPERPOINTS["full"]) for _ in range(2))
    for seed, each in enumerate((model, other)):
        randomise_superpoint(each, seed)
    targets = distil.teacher_outputs(model, views.load(folder, CPU)[0], settings, 0)
    images = targets.images.float() / 255
    same, differs = (distil.points_losses(superpoint_loss.run(each, images), targets) for each in (model, other))
    assert abs(same["points"]) < 1e-2 < differs["points"]
    assert abs(same["descriptors"]) < 1e-2 < differs["descriptors"]
    assert same["contrast"] < 0.5 * differs["contrast"]

    glue = LightGlue(input_dim=32, descriptor_dim=32, num_hidden_layers=3)
    randomise_lightglue(glue, 0)
    batch = matching_batch(glue, torch.arange(20).expand(2, -1))
    batch = batch._replace(opinion=lightglue_loss.opinion(glue, batch))
    right = lightglue_loss.losses(distil.first_layers(glue, 3), batch)["agreement"]
    randomise_lightglue(glue, 1)
    assert right < lightglue_loss.losses(glue, batch)["agreement"]


def test_the_first_layers_of_a_matcher_give_its_result_after_that_many_layers(randomise_lightglue: Any) -> None:
    glue = LightGlue(input_dim=32, descriptor_dim=32, num_hidden_layers=3)
    randomise_lightglue(glue, 0)
    batch = matching_batch(glue, torch.arange(20).expand(2, -1))
    size = torch.tensor([SIZE] * 2)
    images = [ImageFeatures(*values, size) for values in zip(batch.points, batch.descriptors)]
    states = [points for _, points in zip(range(2), glue.states(*images))][-1]
    expected = glue.match_assignment_layers[1](*states)
    first = distil.first_layers(glue, 2)
    found = first.match_assignment_layers[-1](*list(first.states(*images))[-1])
    assert torch.equal(found, expected)
