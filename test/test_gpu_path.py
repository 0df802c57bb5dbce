"""What a GPU would be asked for, checked without one.

Tensors of PyTorch's device ``meta`` have no values: whatever asks for one fails there, as does whatever mixes devices.
On a GPU each such question makes the host wait until all that was begun before it is done.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.models import ALIKED, DISK, LightGlue, NearestNeighbour, SuperPoint
from kpmatch_ros.models.assignment import ImageFeatures

META = torch.device("meta")
POINTS = 50


def features(padded: bool) -> ImageFeatures:
    """What a matcher takes of one image."""
    return ImageFeatures(
        torch.zeros(1, POINTS, 2, device=META),
        torch.zeros(1, POINTS, 128, device=META),
        torch.zeros(1, 2, device=META),
        torch.ones(1, POINTS, dtype=torch.bool, device=META) if padded else None,
        torch.zeros(1, POINTS, device=META),
    )


@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK])
def test_finding_and_describing_keypoints_asks_for_nothing(kind: type[SuperPoint | ALIKED | DISK]) -> None:
    extractor = kind(max_keypoints=POINTS).to(META)
    found = extractor(torch.zeros(2, kind.CHANNELS, 96, 128, device=META))
    assert found.keypoints.shape == (2, POINTS, 2)
    assert found.scores.shape == found.mask.shape == (2, POINTS)
    assert found.descriptors.shape == (2, POINTS, extractor.descriptor_size)
    assert {tensor.device for tensor in found} == {META}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: LightGlue(input_dim=128, depth_confidence=-1.0, width_confidence=-1.0).fuse(),
        lambda: NearestNeighbour(ratio_threshold=0.9),
    ],
    ids=["LightGlue", "nearest"],
)
def test_matching_with_all_layers_asks_for_nothing(make: Callable[[], nn.Module], padded: bool) -> None:
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
def test_of_an_image_only_its_bytes_travel(image: np.ndarray) -> None:
    matcher = FeatureMatcher(Parameters(device="cpu", precision="float32"), matcher="nearest")
    matcher.device, matcher.luma = META, matcher.luma.to(META)
    assert matcher.upload(image).shape == (1, 1, 96, 128)
