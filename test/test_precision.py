"""Tests that half precision costs no matches: bfloat16 finds float32's matches, with the packaged weights.

CPUs without bfloat16 compute it in software, slowly, so the images are few and small, and the products of matrices are
those of half_products.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kpmatch_ros import FeatureMatcher, Features, Matches
from kpmatch_ros.bags import read_messages
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.models import SuperPoint

pytestmark = pytest.mark.usefixtures("fast_half_products")

Image = NDArray[np.uint8]
Pair = tuple[Image, Image]
SIZE = (240, 180)
MANY: dict[str, Any] = {"max_keypoints": 384, "keypoint_threshold": 0.003}  # in such small images


EVERY_LAYER: dict[str, Any] = {"depth_confidence": -1.0, "width_confidence": -1.0}


def in_both_precisions(**parameters: Any) -> tuple[FeatureMatcher, FeatureMatcher]:
    """Return a matcher in float32 and one in bfloat16."""
    both = [FeatureMatcher(device="cpu", precision=name, **MANY, **parameters) for name in ("float32", "bfloat16")]
    return both[0], both[1]


@pytest.fixture(scope="module")
def matchers() -> tuple[FeatureMatcher, FeatureMatcher]:
    """Matchers in float32 and in bfloat16, with all layers and points. Early stopping has its own tests."""
    return in_both_precisions(nms_radius=2, **EVERY_LAYER)  # more keypoints than with the published radius


@pytest.fixture(scope="module")
def adaptive_matchers() -> tuple[FeatureMatcher, FeatureMatcher]:
    """Matchers in float32 and in bfloat16, with the default confidences."""
    return in_both_precisions()


@pytest.fixture(scope="module")
def synthetic(walk: list[Image]) -> list[Pair]:
    # Many pairs: rounding changes the number of matches of a single pair by about 3 %, of four pairs by 1.5 %.
    images = [cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA) for image in walk]
    return list(zip(images, images[1:]))


@pytest.fixture(scope="module")
def recorded(recorded_data: Path) -> list[Pair]:
    records = list(read_messages(recorded_data / "tum_fr3_office_1hz", ["/camera/image_raw"]))[:8]
    images = [cv2.resize(to_array(record.message), SIZE, interpolation=cv2.INTER_AREA) for record in records]
    return list(zip(images[::2], images[1::2]))


class ExtractedPairs(NamedTuple):
    """Pairs of consecutive frames of a camera, with features in both precisions.

    Attributes:
        images: the images of each pair.
        exact: features in float32.
        half: features in bfloat16.
        found_again: smallest fraction of the float32 matches that bfloat16 finds, starting from the images.
        same: smallest fraction of equal matches, given the same features.
    """

    images: list[Pair]
    exact: list[tuple[Features, Features]]
    half: list[tuple[Features, Features]]
    found_again: float
    same: float


# Rounding decides which of many weak keypoints are among the best: 1 to 2 % differ. For synthetic pairs the fraction
# is 0.97, and 0.95 with the first convolution in bfloat16.
@pytest.fixture(scope="module", params=[("synthetic", 0.957, 0.96), ("recorded", 0.93, 0.95)], ids=lambda each: each[0])
def extracted_pairs(request: pytest.FixtureRequest, matchers: tuple[FeatureMatcher, FeatureMatcher]) -> ExtractedPairs:
    name, *bounds = request.param
    pairs: list[Pair] = request.getfixturevalue(name)
    exact, half = (extracted(matcher, pairs) for matcher in matchers)
    return ExtractedPairs(pairs, exact, half, *bounds)


def extracted(matcher: FeatureMatcher, pairs: list[Pair]) -> list[tuple[Features, Features]]:
    """Return the features of both images of each pair. Features of an image in two pairs are extracted once."""
    images = {id(image): image for pair in pairs for image in pair}
    features = {name: matcher.extract(image) for name, image in images.items()}
    return [(features[id(first)], features[id(second)]) for first, second in pairs]


def matched_points(features: Sequence[Features], matches: Matches) -> NDArray[np.float64]:
    """Return matches (M, 4): x, y in the first and x, y in the second image."""
    points = [np.asarray(each.keypoints, np.float64) for each in features]
    return np.hstack([points[i][np.asarray(matches.indices)[:, i]] for i in range(2)])


def found_again(points: NDArray[np.float64], others: NDArray[np.float64], pixels: float) -> int:
    """Count the matches that are also among the others, with both ends within ``pixels``."""
    return int((np.abs(points[:, None] - others[None]).max(axis=2).min(axis=1, initial=np.inf) <= pixels).sum())


def test_bfloat16_keeps_the_matches_of_float32(
    matchers: tuple[FeatureMatcher, FeatureMatcher], extracted_pairs: ExtractedPairs
) -> None:
    counts, again = np.zeros(2), 0
    for pairs in zip(extracted_pairs.exact, extracted_pairs.half):
        exact, half = (matched_points(pair, matcher.match(*pair)) for matcher, pair in zip(matchers, pairs))
        counts += len(exact), len(half)
        again += found_again(exact, half, 1.0)
    assert counts[0] > 500
    assert counts[1] >= 0.98 * counts[0]
    assert again >= extracted_pairs.found_again * counts[0]


def test_bfloat16_matches_given_features_as_float32_does(
    matchers: tuple[FeatureMatcher, FeatureMatcher], extracted_pairs: ExtractedPairs
) -> None:
    counts, same = np.zeros(2), 0
    for pair in extracted_pairs.exact:
        exact, half = (set(map(tuple, matcher.match(*pair).indices.tolist())) for matcher in matchers)
        counts += len(exact), len(half)
        same += len(exact & half)
    assert counts[0] > 500
    assert counts[1] >= 0.98 * counts[0]
    assert same >= extracted_pairs.same * counts[0]


def test_bfloat16_stops_at_the_same_layer_as_float32_for_most_pairs(
    adaptive_matchers: tuple[FeatureMatcher, FeatureMatcher], extracted_pairs: ExtractedPairs
) -> None:
    layers, counts, same = [], np.zeros(2), 0
    for pair in extracted(adaptive_matchers[0], extracted_pairs.images):
        exact, half = (matcher.match(*pair) for matcher in adaptive_matchers)
        layers.append((exact.layers, half.layers))
        if exact.layers == half.layers:
            found = [set(map(tuple, each.indices.tolist())) for each in (exact, half)]
            counts += len(found[0]), len(found[1])
            same += len(found[0] & found[1])
    stops = np.array(layers)
    assert (stops < 9).any()
    assert (stops[:, 0] == stops[:, 1]).mean() >= 0.7, layers
    assert counts[1] >= 0.98 * counts[0]
    assert same >= 0.93 * counts[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_that_decide_which_keypoints_are_found_stay_precise(
    texture: Callable[..., Image], dtype: torch.dtype
) -> None:
    images = [torch.from_numpy(texture(96, 128, seed)).float()[None, None] / 255 for seed in range(3)]
    options: dict[str, Any] = {"max_keypoints": 100, "keypoint_threshold": 0.0005, "nms_radius": 2, "subpixel": False}
    found: list[Any] = []
    for model in (
        SuperPoint.from_pretrained("superpoint-open", **options),
        SuperPoint.from_pretrained("superpoint-open", **options).to_precision(dtype),
        SuperPoint.from_pretrained("superpoint-open", **options).to(dtype),
    ):
        keypoints = [model(image).keypoints[0] for image in images]
        found.append({(number, *point) for number, each in enumerate(keypoints) for point in each.tolist()})
    lost, lost_altogether = (len(found[0] - other) for other in found[1:])
    assert len(found[0]) == 300
    assert lost <= 9
    if dtype == torch.bfloat16:
        assert lost < lost_altogether
