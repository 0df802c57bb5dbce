"""Tests of kpmatch bench --against opencv: OpenCV's DNN module gives the same results as PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from benchmarks.peers import OpenCV
from kpmatch_ros import FeatureMatcher
from kpmatch_ros.weights import WeightsError

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.skipif(
    not hasattr(cv2, "LightGlueMatcher"), reason=f"OpenCV {cv2.__version__} has no networks"
)
ALL_LAYERS = {"device": "cpu", "precision": "float32", "depth_confidence": -1.0, "width_confidence": -1.0}


@pytest.fixture(autouse=True, scope="module")
def required_packages() -> Any:
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)
    threads = cv2.getNumThreads()
    yield
    cv2.setNumThreads(threads)


@pytest.fixture
def views(texture: Any) -> list[np.ndarray]:
    """Three grey views of a texture, not square and not a multiple of the cell size."""
    wide = texture(140, 180, 5)
    return [np.ascontiguousarray(wide[5 * i : 5 * i + 100, 7 * i : 7 * i + 134]) for i in range(3)]


def positions(points0: Any, points1: Any, indices: Any) -> np.ndarray:
    """Return the positions of matches (M, 2) in both images as (M, 4)."""
    return np.hstack([np.asarray(points0)[indices[:, 0]], np.asarray(points1)[indices[:, 1]]])


def fraction_in_both(some: np.ndarray, others: np.ndarray) -> float:
    """Return the fraction of all rows that are in both arrays, within 0.05 pixels."""
    both = int((np.abs(some[:, None] - others).max(axis=2).min(axis=1) < 0.05).sum())
    return both / (len(some) + len(others) - both)


def test_opencv_finds_the_same_matches_as_this_package(views: list[np.ndarray]) -> None:
    matcher = FeatureMatcher(max_keypoints=150, **ALL_LAYERS)
    peer = OpenCV(matcher, torch.float32)
    ours = [matcher.extract(view).numpy() for view in views]
    theirs = [peer.extract(view) for view in views]
    for i, j in ((0, 1), (1, 2)):
        found = matcher.match(ours[i], ours[j]).numpy()
        expected = positions(ours[i].keypoints, ours[j].keypoints, found.indices)
        assert len(expected) > 30
        got = positions(theirs[i].points, theirs[j].points, peer.pairs(theirs[i], theirs[j]))
        assert fraction_in_both(expected, got) >= 0.98
    assert peer.match(theirs[0], views[1]) == len(peer.pairs(theirs[0], theirs[1]))
    # A changed number of keypoints, for images of another size and for one without keypoints.
    matcher.configure(matcher.parameters.replace({"max_keypoints": 30}))
    peer.max_keypoints(30)
    few = matcher.extract(views[0][:64]).numpy()
    np.testing.assert_allclose(peer.extract(views[0][:64]).points, few.keypoints, atol=0.01)
    assert peer.match(theirs[0], np.zeros((64, 64), np.uint8)) == 0


def test_aliked_in_opencv_finds_the_same_keypoints_in_colour(random_folder: Callable[..., Path], texture: Any) -> None:
    matcher = random_folder(superpoint={"descriptor_decoder_dim": 128})
    try:
        ours = FeatureMatcher(extractor="aliked-n16", matcher=str(matcher), max_keypoints=60, **ALL_LAYERS)
    except WeightsError as error:
        pytest.skip(str(error))
    image = np.stack([texture(64, 96, seed) for seed in range(3)], axis=2)
    expected, found = ours.extract(image).numpy(), OpenCV(ours, torch.float32).extract(image)
    assert len(expected) > 20
    np.testing.assert_allclose(found.points, expected.keypoints, atol=0.01)
    np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-3)


def test_the_table_compares_opencv_with_and_without_cached_features(
    kpmatch: Run, random_folder: Callable[..., Path], views: list[np.ndarray], tmp_path: Path
) -> None:
    for i, view in enumerate(views):
        cv2.imwrite(str(tmp_path / f"{i}.png"), view)
    folder = random_folder()
    file = tmp_path / "speed.json"
    words = ["--images", tmp_path, "--keypoints", 100, "--repeats", 2, "--device", "cpu", "--precision", "float32"]
    words += ["--extractor", folder, "--matcher", folder, "--against", "opencv", "--json", file]
    status, out, err = kpmatch("bench", *words)
    assert (status, err) == (0, "")
    assert f"OpenCV {cv2.__version__} float32" in out
    (row,) = json.loads(file.read_text())["rows"]
    assert [one["work"] for one in row["comparisons"]] == ["pair", "sequence", "sequence, features kept"]
    assert all(one["cpu_ratio"]["median"] > 0 for one in row["comparisons"])
    assert cv2.getNumThreads() == torch.get_num_threads()


def test_other_networks_are_refused(kpmatch: Run, views: list[np.ndarray], tmp_path: Path) -> None:
    for i, view in enumerate(views):
        cv2.imwrite(str(tmp_path / f"{i}.png"), view)
    words = ["--images", tmp_path, "--keypoints", 20, "--repeats", 1, "--device", "cpu", "--against", "opencv"]
    status, out, err = kpmatch("bench", *words, "--matcher", "nearest")
    reason = "only SuperPoint or ALIKED with LightGlue can be compared, not SuperPoint and NearestNeighbour"
    assert (status, out, err) == (2, "", f"kpmatch bench: --against opencv: {reason}\n")
