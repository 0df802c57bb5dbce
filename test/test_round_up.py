"""Tests of the rounding of the number of points: results do not change, and memory does not grow.

For bfloat16 on a CPU, oneDNN stores about 2 MB for every number of points that it has seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models import ALIKED, DISK, LightGlue, SuperGlue, XFeat
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.base import rounded_up
from kpmatch_ros.runtime.processor import has_amx, processor_features


@given(st.integers(1, 16384))
def test_rounding_up_adds_at_most_127_points_or_a_quarter(count: int) -> None:
    assert count <= rounded_up(count) <= max(64, count + 127, 1.25 * count)
    assert rounded_up(rounded_up(count)) == rounded_up(count)


def test_there_are_few_rounded_numbers_of_points() -> None:
    assert len({rounded_up(count) for count in range(1, 1025)}) == 9
    assert len({rounded_up(count) for count in range(1, 16385)}) <= 27


def pair(count0: int, count1: int, size: int, seed: int = 0) -> tuple[ImageFeatures, ImageFeatures]:
    """Return two images. The second has the first one's first points, moved."""
    random = torch.Generator().manual_seed(seed)
    count = max(count0, count1)
    keypoints = torch.rand(1, count, 2, generator=random) * torch.tensor([200.0, 150.0])
    descriptors = torch.nn.functional.normalize(torch.randn(1, count, size, generator=random), dim=-1)
    scores = torch.rand(1, count, generator=random)
    pixels = torch.tensor([[200, 150]])
    return (
        ImageFeatures(keypoints[:, :count0], descriptors[:, :count0], pixels, scores=scores[:, :count0]),
        ImageFeatures(keypoints[:, :count1] + 8.0, descriptors[:, :count1], pixels, scores=scores[:, :count1]),
    )


def assert_rounding_up_changes_nothing(model: LightGlue | SuperGlue, counts: tuple[int, int], size: int) -> None:
    images = pair(*counts, size)
    expected = model(*images)
    model.round_up = True
    found = model(*images)
    assert min(counts) == 1 or (expected.matches0 >= 0).any()
    for name, there, here in zip(expected._fields, expected, found):
        if name.startswith("scores"):
            assert torch.allclose(here, there, atol=1e-5), name
        else:
            assert torch.equal(here, there), name


@pytest.mark.parametrize("counts", [(1, 1), (64, 64), (64, 65), (100, 150), (300, 129)], ids=str)
@pytest.mark.parametrize("depth_confidence", [-1.0, 0.2, 0.8])
@pytest.mark.parametrize("width_confidence", [-1.0, 0.6, 0.9])
def test_lightglue_matches_stops_and_prunes_as_without_rounding_up(
    lightglue: Callable[..., LightGlue], counts: tuple[int, int], depth_confidence: float, width_confidence: float
) -> None:
    model = lightglue(depth_confidence=depth_confidence, width_confidence=width_confidence, filter_threshold=0.0)
    assert_rounding_up_changes_nothing(model, counts, 64)


def test_lightglue_with_all_points_pruned_gives_no_matches(lightglue: Callable[..., LightGlue]) -> None:
    model = lightglue(depth_confidence=-1.0, width_confidence=0.9)
    model.match_assignment_layers[1].matchability.weight.zero_()
    model.match_assignment_layers[1].matchability.bias.fill_(-20)
    model.round_up = True
    found = model(*pair(70, 90, 64))
    assert found.layers.tolist() == [2]
    assert found.matches0.shape == (1, 70) and (found.matches0 == -1).all()


@pytest.mark.parametrize("counts", [(1, 1), (64, 65), (100, 150)], ids=str)
def test_superglue_matches_as_without_rounding_up(counts: tuple[int, int], randomise_superglue: Any) -> None:
    model = SuperGlue(hidden_size=64, keypoint_encoder_sizes=[16], gnn_layers_types=["self", "cross"] * 2)
    randomise_superglue(model, 0)
    assert_rounding_up_changes_nothing(model, counts, 64)


def test_padded_batches_match_as_without_rounding_up(lightglue: Callable[..., LightGlue]) -> None:
    model = lightglue(depth_confidence=0.5, width_confidence=0.8)
    together = [
        ImageFeatures(
            *(torch.cat([tensor, tensor]) for tensor in image[:3]), torch.arange(image.num_keypoints) < counts
        )
        for image, counts in zip(pair(90, 80, 64), (torch.tensor([[90], [70]]), torch.tensor([[66], [80]])))
    ]
    expected = model(*together)
    model.round_up = True
    assert torch.equal(model(*together).matches0, expected.matches0)


@pytest.mark.parametrize("kind", [ALIKED, DISK, XFeat])
def test_extractors_find_the_same_keypoints_as_without_rounding_up(
    kind: type[ALIKED | DISK | XFeat], texture: Any
) -> None:
    torch.manual_seed(0)
    model = kind()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    image = torch.from_numpy(texture(96, 128, 3)).float()[None, None] / 255
    model.keypoint_threshold, model.border = 0.0, 2
    every = model(image)
    # So that only few of the possible keypoints remain.
    model.keypoint_threshold = float(every.scores[0].sort(descending=True).values[80])
    model.max_keypoints = 1000
    expected = model(image)
    model.round_up = True
    found = model(image)
    count = int(expected.mask.sum())
    assert 64 < count < 128 == found.mask.shape[1]
    assert int(found.mask.sum()) == count
    for there, here in zip(expected[:4], found[:4]):
        assert torch.allclose(here[:, :count].float(), there.float(), atol=1e-5)
    model.max_keypoints = 75
    assert model(image).mask.shape[1] == 75


def test_layers_get_few_different_numbers_of_points(random_folder: Callable[..., Path]) -> None:
    matcher = FeatureMatcher.from_pretrained(
        random_folder(), device="cpu", precision="bfloat16", depth_confidence=0.8, width_confidence=0.8
    )
    network = matcher.matcher
    assert isinstance(network, LightGlue)
    network.prune_above = 0
    seen: set[int] = set()
    for layer in network.transformer_layers:
        layer.register_forward_hook(lambda module, points, _: seen.update(len(each) for each in points))
    dropped = 0
    rng = np.random.default_rng(0)
    for seed in range(20):
        counts = [int(count) for count in rng.integers(1, 400, 2)]
        found = network(*pair(*counts, network.input_dim, seed))
        dropped += int((found.layers0 < found.layers).sum())
    assert dropped > 100
    assert seen <= {64, 128, 256, 384, 512}


@pytest.mark.parametrize(("precision", "rounded"), [("float32", False), ("bfloat16", True)])
def test_numbers_are_rounded_up_only_in_bfloat16_and_not_for_a_compiled_matcher(precision: str, rounded: bool) -> None:
    matcher = FeatureMatcher(device="cpu", precision=precision)
    assert isinstance(matcher.matcher, LightGlue)
    assert matcher.extractor.round_up == rounded
    assert matcher.matcher.round_up == (rounded and not matcher.matcher.is_compiled)


MEMORY = """
import json, sys
from dataclasses import replace
import numpy as np, torch
from kpmatch_ros import FeatureMatcher, Features
from kpmatch_ros.runtime.device import resident_memory, trim_heap

adaptive, frames = sys.argv[1] == "adaptive", int(sys.argv[2])
torch.set_num_threads(1)
confidence = {} if adaptive else {"depth_confidence": -1.0, "width_confidence": -1.0}
matcher = FeatureMatcher(device="cpu", precision="bfloat16", max_keypoints=512, **confidence)
matcher.warm_up(320, 240)
rng = np.random.default_rng(0)

def features(count):
    keypoints = torch.from_numpy(rng.uniform(0, 240, (count, 2)).astype(np.float32))
    descriptors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(count, 128)).astype(np.float32)))
    return Features(keypoints, torch.ones(count), descriptors, (320, 240))

matcher.match(features(512), features(512))
trim_heap()
before = resident_memory()
dropped = 0
for count in rng.integers(200, 513, frames) if adaptive else [512] * 2:
    one, other = features(count), features(512)
    shared = count // 2  # the rest have no match
    other.descriptors[:shared], other.keypoints[:shared] = one.descriptors[:shared], one.keypoints[:shared] + 4
    found = matcher.match(one, other)
    dropped += int((found.assignment.layers0 < found.layers).sum())
trim_heap()
print(json.dumps([before / 1e6, resident_memory() / 1e6, dropped]))
"""


@pytest.mark.skipif(
    not processor_features() & {"avx512_bf16", "amx_bf16"}, reason="this processor does not compute in bfloat16"
)
def test_pruning_in_bfloat16_takes_at_most_10_percent_more_memory_than_all_layers() -> None:
    def measure(*arguments: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        measured: list[float] = json.loads(done.stdout)
        return measured

    _, all_layers, _ = measure("all layers", "2")
    _, adaptive, dropped = measure("adaptive", "30")
    if not has_amx():  # on these processors points are pruned
        assert dropped > 100
    assert adaptive < 1.1 * all_layers
