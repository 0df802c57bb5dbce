"""Tests that float32 replaces half precision after an overflow, and that an image without content is no overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpmatch_ros import FeatureMatcher, Features, Parameters
from kpmatch_ros.models import ALIKED, DISK, SuperPoint, XFeat

pytestmark = pytest.mark.usefixtures("fast_half_products")

Image = NDArray[np.uint8]

# The threshold is low enough for hundreds of keypoints in small images.
PARAMETERS = Parameters(device="cpu", precision="float32", max_keypoints=300, keypoint_threshold=0.0005)


@pytest.fixture(scope="module")
def views(texture: Any) -> tuple[Image, Image]:
    """Two images of a plane."""
    homography = np.array([[0.97, 0.05, 6.0], [-0.04, 0.98, 9.0], [8e-5, -4e-5, 1.0]])
    picture = cv2.GaussianBlur(texture(180, 240, 3), (0, 0), 1)
    return picture, cv2.warpPerspective(picture, homography, (240, 180))


@pytest.fixture
def half() -> FeatureMatcher:
    return FeatureMatcher(PARAMETERS, precision="bfloat16")


def same(first: Features, second: Features) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(second, name)))
        for name in ("keypoints", "scores", "descriptors")
    )


def test_results_that_overflow_in_half_precision_are_recomputed_in_float32(
    half: FeatureMatcher, views: tuple[Image, Image]
) -> None:
    single = FeatureMatcher(PARAMETERS)

    def overflow(module: Any, inputs: Any, output: Any) -> Any:
        if module.dtype != torch.bfloat16:
            return output
        broken = "descriptors" if hasattr(output, "descriptors") else "scores0"
        return output._replace(**{broken: torch.full_like(getattr(output, broken), torch.nan)})

    # On a CPU without bfloat16 tiles, SuperPoint stays in float32.
    formats = [network.dtype for network in (half.extractor, half.matcher)]  # type: ignore[union-attr]
    half.extractor.register_forward_hook(overflow)
    half.matcher.register_forward_hook(overflow)  # type: ignore[union-attr]
    features = [half.extract(image) for image in views]
    assert all(torch.isfinite(torch.as_tensor(each.descriptors)).all() for each in features)
    matches = half.match(*features)
    assert torch.isfinite(torch.as_tensor(matches.scores)).all()
    assert half.repeated_in_float32 == sum(dtype == torch.bfloat16 for dtype in (*2 * [formats[0]], formats[1]))
    assert formats[1] == torch.bfloat16
    assert [half.extractor.dtype, half.matcher.dtype] == formats  # type: ignore[union-attr]
    reference = single.match(*(single.extract(image) for image in views))
    # The weights were rounded, but the arithmetic was float32.
    assert abs(len(matches) - len(reference)) < 0.1 * len(reference)
    # The repeated computation follows the parameters.
    half.configure(PARAMETERS.replace({"max_keypoints": 20, "filter_threshold": 0.9}))
    fewer = [half.extract(image) for image in views]
    assert [len(each) for each in fewer] == [20, 20]
    assert (torch.as_tensor(half.match(*fewer).scores) > 0.9).all()


def test_the_float32_recomputation_uses_the_current_weights_and_settings(
    half: FeatureMatcher, views: tuple[Image, Image]
) -> None:
    def overflow(module: Any, inputs: Any, output: Any) -> Any:
        return output._replace(scores0=output.scores0 * torch.nan) if module.dtype == torch.bfloat16 else output

    matcher: Any = half.matcher
    features = [half.extract(image) for image in views]
    matcher.register_forward_hook(overflow)
    before = half.match(*features)
    matcher.filter_threshold = 0.9
    assert (torch.as_tensor(half.match(*features).scores) > 0.9).all() and len(before) > 30
    matcher.filter_threshold = half.parameters.filter_threshold
    matcher.load_state_dict({name: 0.5 * weight for name, weight in matcher.state_dict().items()})
    assert not torch.equal(half.match(*features).scores, before.scores)
    assert half.repeated_in_float32 == 3


def test_an_image_without_content_is_not_treated_as_an_overflow(
    half: FeatureMatcher, views: tuple[Image, Image]
) -> None:
    half.configure(PARAMETERS.replace({"keypoint_threshold": -1.0}))  # the threshold of the weights
    black = np.zeros_like(views[0])
    expected = half.extract_batch([views[0], views[1]])[0]
    good, nothing = half.extract_batch([views[0], black])
    assert same(good, expected) and len(good) > 10
    assert len(nothing) == len(half.extract(black)) == 0
    assert half.repeated_in_float32 == 0


def test_only_the_images_that_overflowed_are_recomputed(half: FeatureMatcher, views: tuple[Image, Image]) -> None:
    if half.extractor.dtype == torch.float32:
        pytest.skip("SuperPoint stays in float32 on this processor")
    expected = half.extract_batch(views)

    def overflow(module: Any, inputs: Any, output: Any) -> Any:
        if module.dtype != torch.bfloat16:
            return output
        spoilt = output.mask.clone()
        spoilt[1] = False  # NaN exceeds no threshold
        return output._replace(mask=spoilt, finite=torch.tensor([True, False]))

    half.extractor.register_forward_hook(overflow)
    good, again = half.extract_batch(views)
    assert same(good, expected[0])
    assert len(again) > 100 and not same(again, expected[1])
    assert half.repeated_in_float32 == 1


def test_only_the_pairs_that_overflowed_are_recomputed(half: FeatureMatcher, views: tuple[Image, Image]) -> None:
    half.configure(half.parameters.replace({"depth_confidence": -1.0, "width_confidence": -1.0}))
    features = [half.extract(image) for image in views]
    all_of = features[1]
    few = Features(all_of.keypoints[:100], all_of.scores[:100], all_of.descriptors[:100], all_of.size)  # has padding
    pairs = [features[0], features[0]], [features[1], few]
    expected = half.match_batch(*pairs)

    def overflow(module: Any, inputs: Any, output: Any) -> Any:
        if module.dtype == torch.bfloat16:
            output.scores0[1] = torch.nan
        return output

    half.matcher.register_forward_hook(overflow)  # type: ignore[union-attr]
    good, again = half.match_batch(*pairs)
    assert torch.equal(good.indices, expected[0].indices) and torch.equal(good.scores, expected[0].scores)
    assert len(again) > 30 and len(again.assignment.matches1[0]) == 100
    assert abs(len(again) - len(expected[1])) < 0.1 * len(expected[1])
    assert half.repeated_in_float32 == 1


@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK, XFeat])
def test_extractors_distinguish_an_overflow_from_an_image_without_content(
    kind: Any, picture: Callable[..., Tensor]
) -> None:
    model = kind(max_keypoints=50, keypoint_threshold=0.9)
    good = picture(64, 96).mean(dim=0, keepdim=True).expand(model.CHANNELS, -1, -1)
    images = torch.stack([torch.full_like(good, torch.nan), torch.zeros_like(good), good])
    found = model(images)
    assert found.finite.tolist() == found.are_sound().tolist() == [False, True, True]
    assert not found.mask[0].any()
    assert model(images[:1]).finite.tolist() == [False]


def test_xfeat_detects_an_overflow_of_only_its_reliability_map(picture: Callable[..., Tensor]) -> None:
    model = XFeat(max_keypoints=50)
    image = picture(64, 96)[None]
    assert model(image).finite.tolist() == [True]
    model.reliability_head[-1].register_forward_hook(lambda module, inputs, output: output * torch.nan)  # type: ignore[union-attr]
    assert model(image).finite.tolist() == [False]
