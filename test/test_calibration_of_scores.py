"""Tests that scores are calibrated, and that trained weights are exported with their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_scripts  # noqa: F401

from kpmatch_ros.models import LightGlue, SuperPoint

# isort: split
import calibrate
import evaluation_pairs
import export
import shards
from evaluation_matchers import Ours, Weights
from evaluation_truth import ByHomography

Texture = Callable[[int, int, int], np.ndarray]
SaveFolder = Callable[..., Path]
CPU = torch.device("cpu")


def synthetic_evidence(seed: int, scale: float, shift: float, count: int = 1500) -> calibrate.Evidence:
    """Make matches that are correct as often as their scores say, after a change of similarities and logits."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 40, generator=draw)
    rows[:, 0] = 3 + 3 * torch.rand(count, generator=draw)
    columns = torch.randn(count, 40, generator=draw)
    columns[:, 0] = rows[:, 0]
    logits = 2 * torch.randn(count, 2, generator=draw) + 1
    evidence = calibrate.Evidence(
        rows.half(), columns.half(), torch.zeros(count, 2, dtype=torch.long), logits, torch.zeros(0), torch.ones(count)
    )
    scores = calibrate.log_scores([evidence], torch.tensor(scale), torch.tensor(shift)).exp()
    evidence.correct = torch.rand(count, generator=draw) < scores
    return evidence


def test_the_fit_recovers_the_true_scale_and_shift_of_the_scores() -> None:
    evidence = [synthetic_evidence(seed, 1.5, -0.8) for seed in range(4)]
    change = calibrate.fit(evidence)
    assert change.scale == pytest.approx(1.5, rel=0.15)
    assert change.shift == pytest.approx(-0.8, abs=0.15)
    assert calibrate.expected_error(evidence, change) < 0.03 < calibrate.expected_error(evidence, calibrate.Map())
    assert calibrate.fit([]) == calibrate.Map()


def test_folded_weights_give_the_calibrated_scores(random_folder: SaveFolder, texture: Texture) -> None:
    folder = random_folder()
    superpoint, matcher = SuperPoint.from_pretrained(folder), LightGlue.from_pretrained(folder)
    extractor = Ours(Weights("ours", superpoint, matcher, CPU, ""), 80, 2, False, 0.0, 0.1)
    image = texture(120, 160, 0)
    truth = ByHomography(np.eye(3))
    pair = evaluation_pairs.Pair("validation photographs", "0", (image, image), truth)
    change = calibrate.Map(1.3, -0.4)
    last = len(matcher.match_assignment_layers) - 1
    (before,) = calibrate.collect(extractor, matcher, [pair])[last]
    assert len(before.correct) > 10
    calibrate.fold(matcher.match_assignment_layers[last], change)  # type: ignore[arg-type]
    (after,) = calibrate.collect(extractor, matcher, [pair])[last]
    kept = [before.chosen.tolist().index(match) for match in after.chosen.tolist() if match in before.chosen.tolist()]
    assert len(kept) > 10
    expected = calibrate.log_scores([before], torch.tensor(change.scale), torch.tensor(change.shift))[kept]
    found = calibrate.log_scores([after], torch.tensor(1.0), torch.tensor(0.0))
    both = [after.chosen.tolist().index(before.chosen[i].tolist()) for i in kept]
    torch.testing.assert_close(found[both], expected, atol=0.03, rtol=0.02)  # similarities are stored in float16


def test_calibrated_weights_can_be_loaded_and_keep_their_settings(
    tmp_path: Path, random_folder: SaveFolder, texture: Texture, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [shards.encode_grey(texture(600, 800, i)) for i in range(2)]
    shards.write_photos(tmp_path / "photos_0.npz", pictures, ["0", "1"])
    own = {"nms_radius": 3, "keypoint_threshold": 0.001, "max_keypoints": 77, "subpixel": True}
    weights, out = str(random_folder(superpoint=own)), tmp_path / "out"
    words = ["--weights", weights, "--validation", str(tmp_path), "--pairs", "1", "--keypoints", "60", str(out)]
    for options, changed in (([], {}), (["--nms-radius", "2", "--no-subpixel"], {"nms_radius": 2, "subpixel": False})):
        calibrate.main([*words, *options])
        assert "layer 1:" in capsys.readouterr().out
        assert SuperPoint.from_pretrained(out).config.items() >= {**own, **changed}.items()
        LightGlue.from_pretrained(out)


def test_trained_weights_are_exported_with_their_settings(
    tmp_path: Path, small_superpoint: dict[str, Any], random_folder: SaveFolder
) -> None:
    folder = random_folder()
    networks = {"points": SuperPoint.from_pretrained(folder), "matching": LightGlue.from_pretrained(folder)}
    for kind, model in networks.items():
        trained = {"fast": {"config": model.config, "tensors": model.state_dict()}}
        torch.save(trained, tmp_path / f"{kind}.weights.pt")
    words = ["--points", str(tmp_path / "points.weights.pt"), "--matching", str(tmp_path / "matching.weights.pt")]
    export.main([*words, "--network", "fast", str(tmp_path / "out")])
    for model in networks.values():
        read = type(model).from_pretrained(tmp_path / "out").state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(read[name].float(), tensor.half().float())
    shipped = SuperPoint.from_pretrained("superpoint-open-fast").config
    settings = {name: shipped[name] for name in export.DETECTION["fast"]}
    assert SuperPoint.from_pretrained(tmp_path / "out").config.items() >= settings.items()
    export.main([*words, "--network", "fast", "--keypoint-threshold", "0.5", str(tmp_path / "out")])
    assert (
        SuperPoint.from_pretrained(tmp_path / "out").config.items() >= {**settings, "keypoint_threshold": 0.5}.items()
    )
    with pytest.raises(KeyError, match="no network called full"):
        export.main([*words, str(tmp_path / "out")])
