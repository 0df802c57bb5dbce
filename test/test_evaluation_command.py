"""Tests of the command training/evaluate.py: its comparisons, its output and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from training_scripts import photographs

# isort: split
import evaluate
import shards

Texture = Callable[[int, int, int], np.ndarray]
SaveFolder = Callable[..., Path]


def test_the_command_writes_figures_and_a_table(tmp_path: Path, random_folder: SaveFolder, texture: Texture) -> None:
    photographs(tmp_path / "eval", texture, "photos_heldout.npz", 1)
    words = ["--data", str(tmp_path), "--groups", "photographs", "--peers", "sift", "--keypoints", "100"]
    words += ["--weights", f"new={random_folder()}", "--nms-radius", "2", "--subpixel", "both"]
    evaluate.main([*words, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "results")])
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["groups"]["photographs"]["matchers"]) == ["SIFT, ratio test", "new r2", "new r2 sub"]
    assert "| new r2 sub |" in (tmp_path / "results.md").read_text()


def test_output_names_with_a_dot_are_kept_complete(tmp_path: Path, texture: Texture) -> None:
    photographs(tmp_path / "eval", texture, "photos_heldout.npz", 1)
    for name in ("new_0.1", "new_0.2"):
        words = ["--data", str(tmp_path), "--groups", "photographs", "--peers", "sift", "--keypoints", "200"]
        evaluate.main([*words, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / name)])
    written = sorted(path.name for path in tmp_path.glob("new*"))
    assert written == ["new_0.1.json", "new_0.1.md", "new_0.2.json", "new_0.2.md"]
    content = json.loads((tmp_path / "new_0.1.json").read_text())
    assert content["groups"]["photographs"]["places"] == 1
    assert set(content["code"]) == {"matches", "refined", "poses"}


def refusal(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error text of the command, which overwrites nothing."""
    (folder / "results.md").write_text("before")
    with pytest.raises(SystemExit) as ended:
        evaluate.main([*words, "--data", str(folder), "--cache", str(folder / "c"), "--out", str(folder / "results")])
    assert ended.value.code == 2
    assert (folder / "results.md").read_text() == "before"
    return capsys.readouterr().err


def test_without_a_pair_to_compare_the_command_is_refused_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(["--peers", "sift"], tmp_path, capsys)
    assert all(str(tmp_path / "eval" / name) in said for name in ("rooms_heldout.npz", "photos_heldout.npz", "scannet"))
    said = refusal(["--peers", "sift", "--groups", "graf", "rooms"], tmp_path, capsys)
    assert f"missing: {tmp_path / 'eval' / 'opencv'}, {tmp_path / 'eval' / 'rooms_heldout.npz'}\n" in said
    (tmp_path / "eval").mkdir()
    shards.write_photos(tmp_path / "eval" / "photos_heldout.npz", [], [])
    assert "no pair to compare" in refusal(["--peers", "sift"], tmp_path, capsys)


def test_two_weights_with_the_same_name_are_refused(
    tmp_path: Path, random_folder: SaveFolder, texture: Texture, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(tmp_path / "eval", texture, "photos_heldout.npz", 1)
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "export").symlink_to(random_folder())
    words = ["--peers", "--nms-radius", "2", "--weights", *(f"{tmp_path}/{run}/export" for run in ("first", "second"))]
    assert "2 matchers are called export r2 sub: give them different names" in refusal(words, tmp_path, capsys)


def test_peers_with_missing_files_are_skipped_unless_requested(
    tmp_path: Path, texture: Texture, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(tmp_path / "shards", texture, "photos_0.npz", 21)
    words = ["--validation", str(tmp_path / "shards"), "--validation-pairs", "1", "--keypoints", "100"]
    common = ["--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "results")]
    evaluate.main([*words, *common])
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["groups"]["validation photographs"]["matchers"]) == ["SIFT, ratio test"]
    printed = capsys.readouterr().out
    for name in ("ALIKED+LightGlue", "DISK+LightGlue", "XFeat+LighterGlue"):
        assert f"{name} is left out: {tmp_path / 'teachers'}" in printed
    said = refusal([*words, "--peers", "disk"], tmp_path, capsys)
    assert f"{tmp_path / 'teachers' / 'disk-depth-save.pth'}" in said and "DISK+LightGlue needs them" in said
