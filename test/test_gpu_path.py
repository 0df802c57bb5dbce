"""What a GPU would be asked for, checked without one.

Tensors of PyTorch's device ``meta`` have no values: whatever asks for one fails there, as does whatever mixes devices.
On a GPU each such question makes the host wait until all that was begun before it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.models import ALIKED, DISK, LightGlue, NearestNeighbour, SuperPoint, lightglue
from kpmatch_ros.models.assignment import Assignment

META = torch.device("meta")
POINTS = 50


def inputs(device: torch.device, size: int = 128, padded: bool = False) -> list[Tensor | None]:
    """What matchers take, of one pair: the second image shows the first one's points, moved."""
    random = torch.Generator().manual_seed(7)
    keypoints = torch.rand(1, POINTS, 2, generator=random) * torch.tensor([200.0, 150.0])
    descriptors = nn.functional.normalize(torch.randn(1, POINTS, size, generator=random), dim=-1)
    image = torch.tensor([[220, 170]])
    mask = torch.arange(POINTS)[None] < 40 if padded else None
    scores = torch.rand(1, POINTS, generator=random)
    made = [keypoints, keypoints + 12.0, descriptors, descriptors, image, image, mask, mask, scores, scores]
    return [None if tensor is None else tensor.to(device) for tensor in made]


@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK])
def test_finding_and_describing_keypoints_asks_for_nothing(kind: type[SuperPoint | ALIKED | DISK]) -> None:
    extractor = kind(max_keypoints=POINTS).to(META)
    found = extractor(torch.zeros(2, kind.CHANNELS, 96, 128, device=META))
    assert found.keypoints.shape == (2, POINTS, 2)
    assert found.scores.shape == found.mask.shape == (2, POINTS)
    assert found.descriptors.shape == (2, POINTS, extractor.descriptor_size)
    assert {tensor.device for tensor in found} == {META}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [
    lambda: LightGlue(input_dim=128, depth_confidence=-1.0, width_confidence=-1.0).fuse(),
    lambda: NearestNeighbour(ratio_threshold=0.9),
], ids=["LightGlue", "nearest"])
def test_matching_with_all_layers_asks_for_nothing(make: Callable[[], nn.Module], padded: bool) -> None:
    found = make().to(META)(*inputs(META, padded=padded))
    assert found.matches0.shape == found.matches1.shape == (1, POINTS)
    assert {tensor.device for tensor in found} == {META}


@pytest.mark.parametrize("image", [
    np.zeros((96, 128), np.uint8), np.zeros((96, 128, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)[..., ::-1],
], ids=["grey", "RGB", "view of BGR"])
def test_of_an_image_only_its_bytes_travel(image: np.ndarray) -> None:
    matcher = FeatureMatcher(Parameters(device="cpu", precision="float32"), matcher="nearest")
    matcher.device, matcher._luma = META, matcher._luma.to(META)
    assert matcher._upload(image).shape == (1, 1, 96, 128)


# ------------------------------------------------------------------------------------------------------ stopping early


@pytest.fixture
def adaptive(
    small_lightglue: dict[str, Any], randomise_lightglue: Callable[[Any, int], None]
) -> Callable[..., LightGlue]:
    """adaptive(seed, **config): a network that stops before its last layer."""

    def make(seed: int, **config: Any) -> LightGlue:
        config = {"depth_confidence": 0.5, "width_confidence": -1.0, **config}
        model = LightGlue(**{**small_lightglue, "input_dim": 64, **config})
        randomise_lightglue(model, seed)
        return model

    return make


def run(model: LightGlue, ahead: bool, above: int = 0) -> Assignment:
    model.run_ahead, model.prune_above = ahead, above
    return model(*inputs(torch.device("cpu"), size=64))


@pytest.mark.parametrize("depth_confidence", [-1.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_running_ahead_changes_nothing(adaptive: Callable[..., LightGlue], seed: int, depth_confidence: float) -> None:
    model = adaptive(seed, depth_confidence=depth_confidence)
    for ahead, at_once in zip(run(model, True), run(model, False)):
        assert torch.equal(ahead, at_once)


def test_the_next_layer_has_begun_before_the_host_asks_whether_the_last_was_enough(
    adaptive: Callable[..., LightGlue], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, events = adaptive(0), []
    for i, layer in enumerate(model.transformer_layers):
        layer.register_forward_hook(lambda *_, i=i: events.append(f"layer {i + 1}"))

    class Watched(lightglue.OnItsWay):
        def __bool__(self) -> bool:
            events.append("asked")
            return super().__bool__()

    monkeypatch.setattr(lightglue, "OnItsWay", Watched)
    layers = int(run(model, ahead=True).layers)
    assert 1 < layers < len(model.transformer_layers) - 1
    assert events == ["layer 1", *(event for i in range(layers) for event in (f"layer {i + 2}", "asked"))]


def test_points_are_dropped_only_from_images_with_more_than_so_many(adaptive: Callable[..., LightGlue]) -> None:
    model = adaptive(0, depth_confidence=-1.0, width_confidence=0.8)
    last = len(model.transformer_layers)
    assert (run(model, ahead=True, above=POINTS).layers0 == last).all()
    assert (run(model, ahead=True, above=POINTS - 1).layers0 < last).any()


def test_where_points_are_dropped_running_ahead_changes_nothing(adaptive: Callable[..., LightGlue]) -> None:
    model = adaptive(0, width_confidence=0.8)
    for ahead, at_once in zip(run(model, True), run(model, False)):
        assert torch.equal(ahead, at_once)
