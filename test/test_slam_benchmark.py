"""Tests of benchmarks/slam.py: stored results are used only for the same input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("gtsam")
pytest.importorskip("evo")
pytest.importorskip("matplotlib")

from benchmarks import slam
from kpmatch_ros.parameters import Parameters


def keypoints(bag: Path) -> int:
    """Return the largest number of keypoints of an image."""
    return max(message.num_keypoints for topic, message in slam.recorded(bag) if topic == "stereo_matches")


def test_stored_results_are_reused_only_for_the_same_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slam, "_FRAMES", 2)
    monkeypatch.setattr(slam, "_SIZE", (160, 120))
    bag = slam.rounds(tmp_path, False)
    few = Parameters(mode="stereo", rectified=True, device="cpu", max_keypoints=32)
    many = replace(few, max_keypoints=100)
    kept = [slam.outputs(bag, "tracks", parameters) for parameters in (few, many)]
    assert keypoints(kept[0]) == 32 < keypoints(kept[1])
    written = [(out / "metadata.yaml").stat().st_mtime_ns for out in kept]
    assert [slam.outputs(bag, "tracks", parameters) for parameters in (few, many)] == kept
    assert [(out / "metadata.yaml").stat().st_mtime_ns for out in kept] == written
    monkeypatch.setattr(slam, "_FRAMES", 3)
    assert slam.rounds(tmp_path, False) != bag
