"""Tests that a SuperPoint learns which of its points are the best ones, and that nothing else of it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_scripts import image_names

from kpmatch_ros.models import LightGlue, SuperPoint

# isort: split
import export
import rank
import shards
from views import Planar

SIZE = (160, 120)


@pytest.fixture(scope="module")
def folder(texture: Callable[[int, int, int], np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    pictures = [shards.encode_grey(texture(240, 320, i)) for i in range(7)]
    shards.write_photos(path / "photos_0.npz", pictures, image_names("{}", 5) + image_names("{}", 2, validation=True))
    return path


def run(folder: Path, out: Path, *options: str) -> list[dict[str, float]]:
    """Run the training; return the figures of each step, or of the validations if options say so."""
    fixed = ["--start", "superpoint-open", "--shards", str(folder), "--out", str(out), "--precision", "float32"]
    sizes = ["--size", *map(str, SIZE), "--batch", "2", "--batches", "2", "--watch-views", "2", "--log-every", "1"]
    rank.main([*fixed, *sizes, "--device", "cpu", *options])
    return [json.loads(line) for line in (out / "ranking.jsonl").read_text().splitlines()]


def test_the_probabilities_of_selection_rise_with_the_scores_and_sum_to_the_number_wanted() -> None:
    scores = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 200, dtype=torch.bool)
    valid[1, 150:] = False
    valid[2, 40:] = False
    chosen = rank.selected(scores, valid, 60)
    assert chosen[:2].sum(dim=1).tolist() == pytest.approx([60, 60], abs=0.01)
    assert not chosen[~valid].any()
    order = scores[0].argsort()
    assert (chosen[0][order].diff() >= 0).all()
    assert float(chosen[2].sum()) == pytest.approx(39.5, abs=0.01)  # fewer candidates than wanted


def test_the_gradient_of_a_selection_includes_its_threshold() -> None:
    scores = torch.rand(1, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.9 + 0.05
    valid = torch.ones(1, 12, dtype=torch.bool)
    jacobian = torch.autograd.functional.jacobian(lambda x: rank.selected(x, valid, 5)[0], scores)[:, 0]
    for i in range(12):
        step = torch.zeros_like(scores)
        step[0, i] = 1e-5
        change = rank.selected(scores + step, valid, 5) - rank.selected(scores - step, valid, 5)
        assert torch.allclose(jacobian[:, i], change[0] / 2e-5, atol=1e-4)
    assert torch.allclose(jacobian.sum(dim=0), torch.zeros(12, dtype=torch.float64), atol=1e-9)


def test_points_agree_where_the_geometry_says_so_and_match_where_their_descriptors_do() -> None:
    points = torch.tensor([[[20.0, 20], [60, 20], [100, 60], [140, 100]]])
    shifted = points + torch.tensor([8.0, 0])
    shifted[0, 1] += torch.tensor([0.0, 2])  # off by two pixels
    shifted[0, 2] += torch.tensor([0.0, 4])  # off by four
    move = torch.eye(3)
    move[0, 2] = 8
    geometry = Planar((move[None], torch.linalg.inv(move)[None]), SIZE)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    views = tuple(rank.Candidates(each, torch.ones(1, 4), everywhere) for each in (points, shifted))
    # Descriptors that depend on the place, and are those of the same point of the scene in both views.
    maps = [
        torch.nn.functional.normalize(torch.randn(1, 32, 15, 20, generator=torch.Generator().manual_seed(0)), dim=1)
    ]
    maps.append(maps[0].roll(1, dims=3))
    agreement = rank.compare((views[0], views[1]), (maps[0], maps[1]), geometry)
    assert agreement.near.tolist() == [[True, True, False, True]]
    assert agreement.matched.tolist() == [[True, True, False, True]]
    assert agreement.distances[0].tolist() == pytest.approx([0, 2, 4, 0], abs=1e-4)
    exchanged = maps[1].roll(5, dims=3)
    assert not rank.compare((views[0], views[1]), (maps[0], exchanged), geometry).matched.all()


@pytest.mark.parametrize(
    ("blocks", "learnt"), [("0", ("keypoint_decoder.",)), ("1", ("keypoint_decoder.", "encoder.conv_blocks.3."))]
)
def test_more_of_the_best_points_match_after_the_training_and_only_its_part_has_changed(
    folder: Path, tmp_path: Path, blocks: str, learnt: tuple[str, ...]
) -> None:
    options = ["--steps", "25", "--rate", "1e-3", "--blocks", blocks]
    steps = [each for each in run(folder, tmp_path, *options) if "validation" not in each]
    for name, sign in (("full matches", 1), ("full total", -1)):
        values = [sign * each[name] for each in steps]
        assert np.mean(values[-4:]) > np.mean(values[:4])
    before = SuperPoint.from_pretrained("superpoint-open").state_dict()
    after = export.read_trained(SuperPoint, tmp_path / "ranking.weights.pt", "full").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name].float())}
    for part in ("keypoint_decoder.", "encoder.", "descriptor_decoder."):
        assert any(name.startswith(part) for name in changed) == any(each.startswith(part) for each in learnt)
    assert all(name.startswith(learnt) for name in changed)


def test_a_resumed_ranking_continues_as_if_it_had_not_been_interrupted(folder: Path, tmp_path: Path) -> None:
    whole = [each for each in run(folder, tmp_path / "whole", "--steps", "4") if "validation" not in each]
    run(folder, tmp_path / "parts", "--steps", "4", "--stop-after", "2")
    parts = [each for each in run(folder, tmp_path / "parts", "--steps", "4") if "validation" not in each]
    assert [each["full total"] for each in parts] == pytest.approx([each["full total"] for each in whole], abs=2e-4)


def test_a_ranked_superpoint_is_exported_with_the_lightglue_of_the_weights_it_started_from(
    folder: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path, "--steps", "2", "--rate", "1e-3")
    points = str(tmp_path / "ranking.weights.pt")
    export.main(["--points", points, "--matching", "lightglue-superpoint-open", str(tmp_path / "both")])
    trained = export.read_trained(SuperPoint, points, "full").state_dict()
    written = SuperPoint.from_pretrained(tmp_path / "both")
    assert all(torch.allclose(tensor, trained[name].float()) for name, tensor in written.state_dict().items())
    assert written.config["nms_radius"] == export.DETECTION["full"]["nms_radius"]
    shipped = LightGlue.from_pretrained("lightglue-superpoint-open").state_dict()
    assert all(
        torch.equal(tensor, shipped[name])
        for name, tensor in LightGlue.from_pretrained(tmp_path / "both").state_dict().items()
    )


def test_the_loss_keeps_the_descriptors_if_the_encoder_learns(folder: Path, tmp_path: Path) -> None:
    options = ["--steps", "25", "--rate", "1e-3", "--blocks", "1"]
    steps = [each for each in run(folder, tmp_path / "kept", *options) if "validation" not in each]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rank.WEIGHTS, "descriptors", 0.0)
        free = [each for each in run(folder, tmp_path / "free", *options) if "validation" not in each]
    assert steps[0]["full descriptors"] < 1e-3  # the descriptors kept are float16
    assert (
        0
        < np.mean([each["full descriptors"] for each in steps[-4:]])
        < np.mean([each["full descriptors"] for each in free[-4:]])
    )
