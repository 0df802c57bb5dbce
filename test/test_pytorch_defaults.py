"""Tests that a program's default dtype and device in PyTorch have no effect on this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from random_features import random_features

from benchmarks.imitation import Imitation
from kpmatch_ros import FeatureMatcher, Matches
from kpmatch_ros.cuda_graphs import CudaGraphs

SETS: list[dict[str, Any]] = [
    {"extractor": "superpoint-open", "depth_confidence": -1.0},
    {"extractor": "superpoint-open", "width_confidence": 0.5},
    {"extractor": "superpoint-open", "matcher": "nearest"},
    {"extractor": "aliked-n16", "matcher": "nearest", "ratio_threshold": 0.9},
    {"extractor": "disk", "matcher": "nearest"},
    {"extractor": "xfeat", "matcher": "nearest"},
]


@pytest.fixture(autouse=True)
def restored_defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def loaded(options: dict[str, Any]) -> FeatureMatcher:
    return FeatureMatcher(**{"device": "cpu", "precision": "float32", "max_keypoints": 200, **options})


def results(matcher: FeatureMatcher, texture: Any) -> list[torch.Tensor]:
    image = cv2.GaussianBlur(texture(120, 160, 3), (0, 0), 1)
    mask = np.ones((120, 160), np.uint8)
    mask[:, :40] = 0
    colour = np.stack([image] * 3, axis=-1)
    features0, features1 = matcher.extract_batch([image, np.roll(colour, (3, 5), (0, 1))], [mask, None])
    nothing = matcher.extract(image, np.zeros_like(mask))
    found = matcher.match_batch([features0, features1, nothing], [features1, features0, features1])
    of_features = [each for kept in (features0, nothing) for each in (kept.keypoints, kept.scores, kept.descriptors)]
    return [*of_features, *(each for pair in found for each in assigned(pair))]


def assigned(pair: Matches) -> list[torch.Tensor]:
    return [pair.indices, pair.scores, *pair.assignment]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", SETS, ids=lambda options: "-".join(map(str, options.values())))
def test_results_do_not_depend_on_pytorchs_defaults(
    options: dict[str, Any], texture: Any, fetched: Callable[[str], Path]
) -> None:
    fetched(options["extractor"])
    matcher = loaded(options)
    expected = results(matcher, texture)
    assert len(expected[6]) > 0  # the matches
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        assert_same(results(matcher, texture), expected)
        assert_same(results(loaded(options), texture), expected)
    torch.set_default_device("meta")
    assert_same(results(matcher, texture), expected)
    assert_same(results(loaded(options), texture), expected)


@pytest.mark.parametrize("kind", ["lightglue", "superglue"])
def test_recorded_cuda_graphs_do_not_depend_on_pytorchs_defaults(kind: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue(kind)()
    features = random_features(network.input_dim)
    expected = CudaGraphs(Imitation()).run(network, features, features)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    assert_same(list(CudaGraphs(Imitation()).run(network, features, features)), list(expected))


def test_onnx_runtime_does_not_depend_on_pytorchs_defaults(texture: Any) -> None:
    pytest.importorskip("onnxruntime")
    options = {"backend": "onnxruntime"}
    expected = results(loaded(options), texture)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    assert_same(results(loaded(options), texture), expected)
