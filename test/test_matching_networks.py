"""Tests of every kind of extractor and matcher through the same interface: SuperGlue, ALIKED, DISK, XFeat, nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from kpmatch_ros import FeatureMatcher, Features, Matches
from kpmatch_ros.models import ALIKED, DISK, SuperGlue, XFeat

Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def colour(texture: Any) -> Image:
    """An RGB image with different channels."""
    return np.dstack([texture(96, 128, seed) for seed in (4, 5, 6)])


def same(first: Features, second: Features) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(second, name)))
        for name in ("keypoints", "scores", "descriptors")
    )


def same_matches(found: Matches, expected: Matches) -> bool:
    """Check for the same pairs with the same scores, except for rounding."""
    return torch.equal(found.indices, expected.indices) and torch.allclose(found.scores, expected.scores, atol=1e-4)


def two_views(texture: Any) -> tuple[Image, Image]:
    """Two views, the second shifted by 16 pixels to the right and 8 down."""
    picture = texture(104, 144, 7)
    return picture[:96, :128], picture[8:, 16:]


def test_superglue_matches_cached_features_and_uses_their_scores(
    random_folder: Callable[..., Path], texture: Any
) -> None:
    folder = random_folder(superglue={})
    matcher = FeatureMatcher.from_pretrained(folder, device="cpu", precision="float32", max_keypoints=150)
    assert isinstance(matcher.matcher, SuperGlue)
    features = [matcher.extract(image) for image in two_views(texture)]
    matches = matcher.match(*features)
    assert matches.layers == 4
    moved = features[0].keypoints[matches.indices[:, 0]] - features[1].keypoints[matches.indices[:, 1]]
    assert ((moved - torch.tensor([16.0, 8.0])).norm(dim=1) < 2).sum() > 20
    # SuperGlue uses the detection scores.
    other = replace(features[0], scores=features[0].scores.flip(0))
    assert not same_matches(matcher.match(other, features[1]), matches)
    strict = matcher.parameters.replace({"filter_threshold": float(matches.scores.median())})
    matcher.configure(strict)
    assert 0 < len(matcher.match(*features)) < len(matches)


@pytest.fixture(scope="module")
def colour_extractor(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """colour_extractor(name) returns a folder with a random ALIKED, DISK or XFeat."""

    def make(name: str) -> Path:
        torch.manual_seed(0)
        model = {"aliked": ALIKED, "disk": DISK, "xfeat": XFeat}[name]()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
        folder = tmp_path_factory.mktemp(name)
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**model.config, "model_type": name}))
        return folder

    return make


@pytest.mark.parametrize(("name", "resolution"), [("aliked", 0.0), ("disk", 1.0), ("xfeat", 1.0)])
def test_colour_extractors_get_the_colours_in_any_memory_layout(
    colour_extractor: Callable[[str], Path], colour: Image, name: str, resolution: float
) -> None:
    matcher = FeatureMatcher(
        extractor=str(colour_extractor(name)),
        matcher="nearest",
        device="cpu",
        precision="float32",
        keypoint_threshold=0.0,
        max_keypoints=100,
    )
    assert matcher.keypoint_resolution == resolution
    features = matcher.extract(colour)
    assert len(features) == 100
    assert_unit_vectors(features)
    bgr = np.ascontiguousarray(colour[..., ::-1])
    assert same(matcher.extract(bgr[..., ::-1]), features)
    assert not same(matcher.extract(bgr), features)
    assert len(matcher.match(features, features)) == 100
    matcher.extract(cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY))


def assert_unit_vectors(features: Features) -> None:
    assert torch.linalg.vector_norm(torch.as_tensor(features.descriptors), dim=1).allclose(torch.tensor(1.0), atol=1e-3)


def test_settings_published_with_the_weights_apply_unless_overridden(random_folder: Callable[..., Path]) -> None:
    folder = random_folder(superpoint={"nms_radius": 7, "border_removal_distance": 11, "keypoint_threshold": 0.25})
    matcher = FeatureMatcher.from_pretrained(folder, device="cpu")
    extractor = matcher.extractor
    assert (extractor.nms_radius, extractor.border, extractor.keypoint_threshold) == (7, 11, 0.25)
    matcher.configure(matcher.parameters.replace({"nms_radius": 0, "border": 0, "keypoint_threshold": 0.0}))
    assert (extractor.nms_radius, extractor.border, extractor.keypoint_threshold) == (0, 0, 0.0)
    matcher.configure(matcher.parameters.replace({"nms_radius": -1, "border": -1, "keypoint_threshold": -1.0}))
    assert (extractor.nms_radius, extractor.border, extractor.keypoint_threshold) == (7, 11, 0.25)


@pytest.mark.parametrize("kind", ["fixed", "adaptive", "superglue", "nearest", "onnxruntime"])
def test_pairs_match_in_a_batch_as_they_do_alone(random_folder: Callable[..., Path], texture: Any, kind: str) -> None:
    if kind == "onnxruntime":
        pytest.importorskip("onnxruntime")
    folder = random_folder(superglue={} if kind == "superglue" else None)
    confidence = (
        dict(depth_confidence=0.5, width_confidence=0.8)
        if kind == "adaptive"
        else dict(depth_confidence=-1.0, width_confidence=-1.0)
    )
    matcher = FeatureMatcher(
        extractor=str(folder),
        matcher="nearest" if kind == "nearest" else str(folder),
        device="cpu",
        precision="float32",
        max_keypoints=120,
        backend="onnxruntime" if kind == "onnxruntime" else "torch",
        **confidence,
    )
    first, second = (matcher.extract(image) for image in two_views(texture))
    small = matcher.extract(texture(40, 56, 3))
    nothing = matcher.extract(np.zeros((5, 5), np.uint8))
    assert len(nothing) == 0 and len(small) < len(first)
    pairs = [(first, second), (small, first), (second, nothing), (second, first)]
    found = matcher.match_batch(*zip(*pairs))  # type: ignore[arg-type]
    for pair, matches in zip(pairs, found, strict=True):
        alone = matcher.match(*pair)
        assert same_matches(matches, alone)
        assert matches.layers == alone.layers  # 0 if an image has no keypoint
        assert torch.equal(matches.assignment.layers0, alone.assignment.layers0)
        assert [tensor.shape for tensor in matches.assignment] == [tensor.shape for tensor in alone.assignment]
    assert len(found[0]) > 20 and len(found[2]) == 0
    assert matcher.match_batch([], []) == []
    with pytest.raises(ValueError, match="2 reference images and 1 current"):
        matcher.match_batch([first, second], [first])
