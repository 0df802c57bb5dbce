"""Tests of the work for a GPU, without a GPU.

Tensors on PyTorch's device ``meta`` have no values. Reading a value fails there, and so does mixing devices. On a GPU
each read makes the host wait for all pending work.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_features import random_features
from torch import Tensor, nn

from benchmarks.imitation import Imitation
from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.cuda_graphs import CudaGraphs
from kpmatch_ros.models import ALIKED, DISK, LightGlue, NearestNeighbour, SuperGlue, SuperPoint, XFeat, trace
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.lightglue_layers import Points

META = torch.device("meta")
POINTS = 50


def features(padded: bool) -> ImageFeatures:
    """Return a matcher's input for one image."""
    return ImageFeatures(
        torch.zeros(1, POINTS, 2, device=META),
        torch.zeros(1, POINTS, 128, device=META),
        torch.zeros(1, 2, device=META),
        torch.ones(1, POINTS, dtype=torch.bool, device=META) if padded else None,
        torch.zeros(1, POINTS, device=META),
    )


def inputs(kind: type[SuperPoint | ALIKED | DISK | XFeat], batch: int, masked: bool) -> list[Tensor]:
    """Return an extractor's input."""
    masks = [torch.ones(batch, 96, 128, dtype=torch.bool, device=META)] if masked else []
    return [torch.zeros(batch, kind.CHANNELS, 96, 128, device=META), *masks]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK, XFeat])
def test_extractors_do_not_synchronise_with_the_host(kind: Any, masked: bool) -> None:
    extractor = kind(max_keypoints=POINTS).to(META)
    found = extractor(*inputs(kind, 2, masked))
    assert found.keypoints.shape == (2, POINTS, 2)
    assert found.scores.shape == found.mask.shape == (2, POINTS)
    assert found.descriptors.shape == (2, POINTS, extractor.descriptor_size)
    assert {tensor.device for tensor in found} == {META}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LightGlue(input_dim=128, depth_confidence=-1.0, width_confidence=-1.0).fuse().match_as_one_batch(),
        lambda: NearestNeighbour(ratio_threshold=0.9),
    ],
    ids=["LightGlue", "nearest"],
)
def test_matchers_with_all_layers_do_not_synchronise_with_the_host(make: Callable[[], nn.Module], padded: bool) -> None:
    found = make().to(META)(features(padded), features(padded))
    assert found.matches0.shape == found.matches1.shape == (1, POINTS)
    assert {tensor.device for tensor in found} == {META}


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((96, 128), np.uint8),
        np.zeros((96, 128, 3), np.uint8),
        np.zeros((96, 128, 3), np.uint8)[..., ::-1],
    ],
    ids=["grey", "RGB", "view of BGR"],
)
def test_an_upload_copies_only_the_bytes_of_the_image(image: np.ndarray) -> None:
    matcher = FeatureMatcher(Parameters(device="cpu", precision="float32"), matcher="nearest")
    matcher.device, matcher.luma = META, matcher.luma.to(META)
    assert matcher.upload(image).shape == (1, 1, 96, 128)


# Operations that are not allowed during a recording (kpmatch_ros.cuda_graphs)


@pytest.fixture
def no_tensors_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids tensors from Python numbers or arrays, because a recording would refuse the copy."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a tensor is created from host data")

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch, "from_numpy"), (Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, refuse)


@pytest.mark.usefixtures("no_tensors_from_the_host")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK, XFeat])
def test_extractors_can_be_recorded_as_graphs(kind: Any, masked: bool) -> None:
    found = CudaGraphs(Imitation()).run(kind(max_keypoints=50).to(META), *inputs(kind, 1, masked))
    assert found.keypoints.shape == (1, 50, 2)


@pytest.mark.parametrize(
    "matcher",
    [
        LightGlue(input_dim=128, depth_confidence=-1.0, width_confidence=-1.0),
        LightGlue(input_dim=128, depth_confidence=-1.0, width_confidence=0.99),
        SuperGlue(hidden_size=128, num_attention_heads=4, gnn_layers_types=["self", "cross"]),
    ],
    ids=["LightGlue", "LightGlue that would drop points", "SuperGlue"],
)
@pytest.mark.parametrize("counts", [(50, 40), (256, 256)], ids=str)
def test_matchers_can_be_recorded_as_graphs(
    no_tensors_from_the_host: None, matcher: Any, counts: tuple[int, int]
) -> None:
    images = [
        ImageFeatures(
            keypoints=torch.zeros(1, count, 2, device=META),
            descriptors=torch.zeros(1, count, 128, device=META),
            size=torch.zeros(1, 2, device=META),
            scores=torch.zeros(1, count, device=META),
        )
        for count in counts
    ]
    matcher = matcher.to(META)
    if isinstance(matcher, SuperGlue):
        matcher.sinkhorn_iterations = 1  # with more iterations it reads its progress, outside of the recording
    found = CudaGraphs(Imitation()).run(matcher, *images)
    assert found.matches0.shape == (1, counts[0]) and found.matches1.shape == (1, counts[1])


@pytest.mark.usefixtures("no_tensors_from_the_host")
def test_the_confidence_check_does_not_synchronise_with_the_host() -> None:
    matcher = LightGlue(input_dim=128).to(META)
    states, index = torch.zeros(1, 30, 256, device=META), torch.arange(30, device=META)
    for mask in (None, torch.ones(1, 30, dtype=torch.bool, device=META)):
        points = Points(states, states, mask, index, index)
        assert matcher.are_sure(points, points, 0).shape == ()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))])
def test_a_copy_of_a_matcher_with_graphs_records_its_own_graphs(again: Any) -> None:
    matcher = FeatureMatcher(matcher="nearest", device="cpu", precision="float32", max_keypoints=64)
    matcher.graphs = CudaGraphs(Imitation())
    image = np.random.default_rng(0).integers(0, 255, (96, 128), np.uint8)
    expected = matcher.extract(image).numpy()
    copied = again(matcher)
    assert len(matcher.graphs) > 0 and copied.graphs is not None and len(copied.graphs) == 0
    np.testing.assert_array_equal(copied.extract(image).numpy().keypoints, expected.keypoints)


# Cases without recordings


class FrozenRecorder:
    """Like a GPU's recordings: a repetition runs no Python code."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        outputs = tuple(output.clone() for output in work())
        return (lambda: None), outputs


@pytest.mark.parametrize("kind", ["lightglue", "superglue"])
def test_tracing_works_even_if_graphs_are_in_use(kind: str, request: pytest.FixtureRequest) -> None:
    network = request.getfixturevalue(kind)()
    image = random_features(network.input_dim)
    graphs, inputs = CudaGraphs(FrozenRecorder()), (network, image, image)
    with trace(network) as expected:
        network(image, image)
    with trace(network) as first:
        graphs.run(*inputs)
    assert len(graphs) == 0
    graphs.run(*inputs)
    assert len(graphs) == 1
    with trace(network) as later:
        graphs.run(*inputs)
    for recorded in (first, later):
        for name in ("hidden_states", "attentions"):
            ours, theirs = getattr(recorded, name), getattr(expected, name)
            assert len(ours) > 0 and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_missing_scores_for_superglue_are_reported_with_graphs_too(superglue: Callable[..., SuperGlue]) -> None:
    network = superglue()
    image = ImageFeatures(torch.rand(1, 20, 2), torch.rand(1, 20, network.input_dim), torch.tensor([[10, 10]]))
    with pytest.raises(ValueError, match="SuperGlue needs the keypoints' detection scores"):
        CudaGraphs(Imitation()).run(network, image, image)
