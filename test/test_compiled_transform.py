"""Tests that SuperPoint's float32 convolutions in src/transformed.c and its scores are those of PyTorch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.models import SuperPoint, compiled

pytestmark = pytest.mark.skipif(not compiled.transforms(), reason="the compiled networks are not built")
SIZES = [(1, 1), (2, 3), (5, 7), (8, 8), (9, 33), (31, 16), (70, 21), (41, 64), (130, 17)]  # height, width
EXTRACTORS = ("superpoint-open", "superpoint-open-fast")


@pytest.fixture(params=[16, 8, 4])
def vectors(request: pytest.FixtureRequest) -> Iterator[int]:
    """Simulates a processor with vectors of this many numbers."""
    library = compiled.open_library(compiled.LIBRARY)
    assert library is not None
    if library.kpmatch_vectors(request.param) != request.param:
        pytest.skip("this processor has shorter ones")
    yield request.param
    library.kpmatch_vectors(16)


def convolutions(*channels: int) -> list[nn.Conv2d]:
    torch.manual_seed(len(channels))
    return [nn.Conv2d(*pair, 3, padding=1).requires_grad_(False) for pair in zip(channels, channels[1:])]


def compute(layers: list[nn.Conv2d], pooling: bool, x: Tensor) -> Tensor:
    return compiled.CompiledConvolutions([(each.weight, each.bias) for each in layers], pooling, torch.float32)(x)


def compute_in_float64(layers: list[nn.Conv2d], pooling: bool, x: Tensor) -> Tensor:
    x = x.double()
    for each in layers:
        x = F.relu(F.conv2d(x, each.weight.double(), each.bias.double(), padding=1))
    return F.max_pool2d(x, 2) if pooling else x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(1, 16), (16, 16), (16, 48), (1, 16, 32), (32, 48, 16), (64, 64, 64), (112, 128)])
def test_convolutions_give_the_results_of_pytorch(
    channels: tuple[int, ...], size: tuple[int, int], threads: int, vectors: int
) -> None:
    layers = convolutions(*channels)
    x = torch.randn(2, channels[0], *size, generator=torch.Generator().manual_seed(7))
    for pooling in (False, True):
        if pooling and (min(size) < 2 or channels == (1, 16)):
            continue
        found, exact = compute(layers, pooling, x), compute_in_float64(layers, pooling, x)
        assert found.shape == exact.shape
        assert (found - exact).abs().max() <= 3e-5 * exact.abs().max()


def test_the_number_of_threads_does_not_change_the_result(vectors: int) -> None:
    layers, x = convolutions(16, 32, 32), torch.randn(1, 16, 75, 50)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5, 64):
        torch.set_num_threads(threads)
        found.append(compute(layers, True, x))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_nan_pixel_affects_only_its_receptive_field(vectors: int) -> None:
    layers, x = convolutions(16, 16, 16), torch.randn(1, 16, 40, 40)
    x[0, 3, 20, 21] = torch.nan
    found, plain = compute(layers, False, x), compute_in_float64(layers, False, x)
    assert found.isnan().any() and not found[:, :, :12].isnan().any() and not found[..., 30:].isnan().any()
    assert torch.allclose(found[:, :, :12].double(), plain[:, :, :12], atol=1e-4)


def test_layers_with_other_channels_are_left_to_pytorch() -> None:
    network = SuperPoint(encoder_hidden_sizes=[16, 24, 32, 32], decoder_hidden_size=32, descriptor_decoder_dim=32)
    network.use_compiled(torch.float32)
    assert [block.compiled is None for block in network.encoder.conv_blocks] == [False, True, False, False]
    assert network(torch.rand(1, 1, 64, 72)).keypoints.shape[2] == 2


def matcher_of(extractor: str, precision: str) -> FeatureMatcher:
    return FeatureMatcher(
        Parameters(device="cpu", precision=precision, extractor=extractor, matcher="nearest", max_keypoints=256)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_features_agree_with_those_of_pytorch(
    walk: list[np.ndarray], extractor: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = walk[0][:235, :307]
    monkeypatch.setattr(compiled, "_support", 0)  # simulates a processor without tiles
    found = matcher_of(extractor, precision)
    assert isinstance(found.extractor, SuperPoint) and found.extractor.dtype == torch.float32
    assert all(block.compiled is not None for block in found.extractor.encoder.conv_blocks)
    ours = found.extract(image).numpy()
    monkeypatch.setattr(compiled, "_library", None)
    plain = matcher_of(extractor, "float32")
    assert isinstance(plain.extractor, SuperPoint)
    assert all(block.compiled is None for block in plain.extractor.encoder.conv_blocks)
    theirs = plain.extract(image).numpy()
    # Rounding decides the order of two keypoints with nearly equal scores.
    places = {tuple(place): i for i, place in enumerate(np.round(theirs.keypoints, 1).tolist())}
    same = [(i, places.get(tuple(place))) for i, place in enumerate(np.round(ours.keypoints, 1).tolist())]
    pairs = np.array([(i, j) for i, j in same if j is not None])
    assert len(theirs) > 50 and len(pairs) >= 0.98 * len(theirs)
    assert np.abs(ours.scores[pairs[:, 0]] - theirs.scores[pairs[:, 1]]).max() < 1e-4
    assert np.abs(ours.descriptors[pairs[:, 0]] - theirs.descriptors[pairs[:, 1]]).max() < 1e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_matcher_unpickled_without_the_library_uses_pytorch(
    walk: list[np.ndarray], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = Parameters(device="cpu", precision=precision, max_keypoints=256, depth_confidence=-1.0)
    stored = pickle.dumps(FeatureMatcher(parameters))
    monkeypatch.setattr(compiled, "_support", 0)
    monkeypatch.setattr(compiled, "_library", None)
    loaded, made_there = pickle.loads(stored), FeatureMatcher(parameters)
    features = [loaded.extract(image) for image in walk[:2]]
    found, expected = (each.match(*features) for each in (loaded, made_there))
    assert len(found) > 50 and torch.equal(found.indices, expected.indices)
    assert loaded.matcher.round_up == made_there.matcher.round_up == (precision == "bfloat16")


def test_a_batch_of_two_images_gives_the_same_features_as_each_alone(walk: list[np.ndarray]) -> None:
    images = walk[:2]
    ours = matcher_of("superpoint-open", "float32")
    for together, image in zip(ours.extract_batch(images), images):
        alone = ours.extract(image)
        assert torch.equal(together.keypoints, alone.keypoints)
        assert torch.allclose(together.descriptors, alone.descriptors, atol=1e-6)


@pytest.mark.parametrize("spread", [0.1, 5.0, 200.0])
def test_pixel_scores_are_the_softmax_of_each_cell(spread: float) -> None:
    logits = spread * torch.randn(2, 5, 7, 65, generator=torch.Generator().manual_seed(1))
    exact = F.pixel_shuffle(logits.double().softmax(dim=3)[..., :-1].permute(0, 3, 1, 2), 8)[:, 0]
    found = compiled.pixel_scores(logits)
    assert found.shape == exact.shape and torch.allclose(found.double(), exact, rtol=1e-6 * max(spread, 1), atol=1e-9)
