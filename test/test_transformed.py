"""Tests that convolutions through a transform give the results of ordinary convolutions, except for rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kpmatch_ros import feature_matcher
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.models import compiled, transformed
from kpmatch_ros.models.transformed import TransformedConv2d, can_transform, transform_convolutions, uses_transform
from kpmatch_ros.runtime import processor

pytestmark = pytest.mark.skipif(not can_transform(), reason="this PyTorch has no NNPACK, or not for this processor")


def convolution(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(inputs + outputs)
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options}).requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch", "height", "width"),
    [(48, 48, 1, 1, 1), (64, 65, 1, 13, 7), (50, 128, 2, 60, 80), (128, 64, 3, 5, 200), (64, 64, 1, 52, 640)],
)
def test_the_transform_gives_the_result_of_a_convolution(
    inputs: int, outputs: int, batch: int, height: int, width: int
) -> None:
    plain = convolution(inputs, outputs)
    x = torch.randn(batch, inputs, height, width)
    expected = plain.double()(x.double()).float()
    ours = TransformedConv2d.of(plain.float())
    assert uses_transform(ours, x)
    for given in (x, x.to(memory_format=torch.channels_last), torch.cat([x, x], dim=3)[..., :width]):
        assert torch.allclose(ours(given), expected, rtol=0, atol=2e-4)  # values of up to 3


def test_only_suitable_convolutions_are_transformed() -> None:
    kept = [
        convolution(47, 64),  # the transforms would cost more than they save
        convolution(64, 64, 1),
        convolution(64, 64, 5),
        convolution(64, 64, stride=2),
        convolution(64, 64, padding=0),
        convolution(64, 64, padding=2, dilation=2),
        convolution(64, 64, groups=2),
        convolution(64, 64, padding_mode="reflect"),
    ]
    network = transform_convolutions(nn.Sequential(*kept, convolution(64, 64)))
    assert [type(layer) for layer in network] == [nn.Conv2d] * len(kept) + [TransformedConv2d]


def test_inputs_too_large_for_the_transform_use_the_plain_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = convolution(48, 48)
    x = torch.randn(1, 48, 20, 20)
    expected = plain(x)
    ours = TransformedConv2d.of(plain)
    assert not torch.equal(ours(x), expected)
    monkeypatch.setattr(transformed, "MOST_NUMBERS", x.numel() - 1)
    assert not uses_transform(ours, x)
    assert torch.equal(ours(x), expected)


def test_transforming_a_network_does_not_change_its_tensors() -> None:
    network = nn.Sequential(convolution(64, 64), nn.ReLU(), convolution(64, 64, bias=False)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    after = transform_convolutions(network).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(layer.training for layer in network.modules())


@pytest.mark.parametrize("extractor", ["superpoint-open", "superpoint-open-fast"])
def test_transformed_convolutions_give_the_same_features_as_plain_ones(
    texture: Any, monkeypatch: pytest.MonkeyPatch, extractor: str
) -> None:
    image = texture(131, 163, 3)
    monkeypatch.setattr(compiled, "_library", None)
    monkeypatch.setattr(feature_matcher, "has_amx", lambda: False)
    found = FeatureMatcher(extractor=extractor, device="cpu", precision="float32", matcher="nearest")
    assert any(isinstance(layer, TransformedConv2d) for layer in found.extractor.modules())
    ours = found.extract(image).numpy()
    monkeypatch.setattr(feature_matcher, "can_transform", lambda: False)
    plain = FeatureMatcher(extractor=extractor, device="cpu", precision="float32", matcher="nearest")
    assert not any(isinstance(layer, TransformedConv2d) for layer in plain.extractor.modules())
    theirs = plain.extract(image).numpy()
    # Rounding decides the order of two keypoints with nearly equal scores.
    places = {tuple(place): i for i, place in enumerate(np.round(theirs.keypoints, 1).tolist())}
    same = [(i, places.get(tuple(place))) for i, place in enumerate(np.round(ours.keypoints, 1).tolist())]
    pairs = np.array([(i, j) for i, j in same if j is not None])
    assert len(theirs) > 50
    assert len(pairs) >= 0.99 * len(theirs)
    assert np.abs(ours.scores[pairs[:, 0]] - theirs.scores[pairs[:, 1]]).max() < 1e-4
    assert np.abs(ours.descriptors[pairs[:, 0]] - theirs.descriptors[pairs[:, 1]]).max() < 1e-4


@pytest.mark.parametrize("widest", ["AVX2", "AVX512"])
def test_amx_processors_use_the_transform_only_if_pytorch_is_limited_to_avx2(
    monkeypatch: pytest.MonkeyPatch, widest: str
) -> None:
    monkeypatch.setattr(compiled, "_library", None)
    monkeypatch.setattr(processor, "_all_features", lambda: frozenset({"avx512_bf16", "amx_bf16"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)  # the instruction set for PyTorch
    extractor = FeatureMatcher(device="cpu", precision="float32", matcher="nearest").extractor
    transformed = any(isinstance(layer, TransformedConv2d) for layer in extractor.modules())
    assert transformed == (widest == "AVX2")


def test_networks_in_bfloat16_have_plain_convolutions() -> None:
    extractor = FeatureMatcher(device="cpu", precision="bfloat16", matcher="nearest").extractor
    assert not any(isinstance(layer, TransformedConv2d) for layer in extractor.modules())
