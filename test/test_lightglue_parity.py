"""Tests that LightGlue finds the same matches as `transformers` and kornia with the same weights.

Weights are random unless stated otherwise. `transformers` saves them and this package loads its folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from test_lightglue import ADAPTIVE, FIXED, Modes, authors_names, scene
from torch import Tensor

from kpmatch_ros import weights
from kpmatch_ros.models import LightGlue, SuperPoint, trace
from kpmatch_ros.models.assignment import Assignment, ImageFeatures
from kpmatch_ros.models.convert import convert

Networks = tuple[Any, Any, Any]  # transformers' model, and this package's SuperPoint and LightGlue
Pair = Callable[..., Networks]
RecordDifference = Callable[[str, float], None]

SIZES = [(96, 128), (123, 87), (80, 104), (67, 203), (136, 176)]  # height, width
DEFAULT: Modes = {"depth_confidence": 0.95, "width_confidence": 0.99}


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
    small_superpoint: dict[str, Any],
    small_lightglue: dict[str, Any],
    randomise_superpoint: Callable[[Any, int], None],
    randomise_lightglue: Callable[[Any, int], None],
) -> Pair:
    """pair(seed, modes, superpoint={}, **config) returns `transformers`' LightGlue and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, Networks] = {}

    def make(seed: int, modes: Modes, superpoint: dict[str, Any] | None = None, **config: Any) -> Networks:
        key = f"{seed} {superpoint} {config}"
        if key not in made:
            made[key] = save_and_load(seed, superpoint, **config)
        return with_modes(made[key], modes)

    def save_and_load(seed: int, superpoint: dict[str, Any] | None, **config: Any) -> Networks:
        detector = transformers.SuperPointConfig(**{**small_superpoint, **(superpoint or {})})
        theirs = transformers.LightGlueForKeypointMatching(
            transformers.LightGlueConfig(keypoint_detector_config=detector.to_dict(), **{**small_lightglue, **config})
        ).eval()
        randomise_superpoint(theirs.keypoint_detector, seed)
        randomise_lightglue(theirs, seed)
        folder = tmp_path_factory.mktemp("lightglue")
        theirs.save_pretrained(folder)
        return theirs, SuperPoint.from_pretrained(folder), LightGlue.from_pretrained(folder)

    return make


def with_modes(networks: Networks, modes: Modes) -> Networks:
    """Return the networks with early stopping and pruning set by ``modes``."""
    for name, value in modes.items():
        setattr(networks[0], name, value)
        setattr(networks[2], name, value)
    return networks


def two_views(texture: Any, height: int, width: int, seed: int) -> Tensor:
    """Return (2, 1, height, width). The second view is shifted by 16 pixels to the right and 8 down."""
    picture = texture(height + 8, width + 16, 100 + seed)
    return torch.from_numpy(np.stack([picture[:height, :width], picture[8:, 16:]])).float()[:, None] / 255


def run_ours(detector: SuperPoint, matcher: LightGlue, images: Tensor) -> tuple[list[Tensor], Assignment]:
    """Return the keypoints of images (2 B, 1, H, W), and the assignment of the B pairs, with padding."""
    found = detector(images)
    size = torch.tensor([[images.shape[3], images.shape[2]]]).expand(len(images) // 2, 2)
    features = [
        ImageFeatures(found.keypoints[i::2], found.descriptors[i::2], size, found.mask[i::2], found.scores[i::2])
        for i in range(2)
    ]
    assignment = matcher(*features)
    return [points[mask] for points, mask in zip(found.keypoints, found.mask)], assignment


Matches = dict[tuple[int, ...], tuple[int, ...]]
Numbers = dict[tuple[int, ...], float]


class Result:
    """The result for one pair, by pixels instead of indices, so that the order of keypoints does not matter."""

    def __init__(self, points: list[Tensor], matches: list[Tensor], scores: list[Tensor], layers: list[Tensor]) -> None:
        pixels = [[tuple(point) for point in each.round().int().tolist()] for each in points]
        self.matches: list[Matches] = [
            {pixels[i][k]: pixels[1 - i][m] for k, m in enumerate(matches[i][: len(pixels[i])].tolist()) if m >= 0}
            for i in range(2)
        ]
        self.scores: list[Numbers] = [dict(zip(pixels[i], scores[i].tolist())) for i in range(2)]
        self.layers: list[Numbers] = [dict(zip(pixels[i], layers[i].tolist())) for i in range(2)]


def as_results(points: list[Tensor], found: Assignment) -> list[Result]:
    """Return the result of each pair."""
    return [
        Result(
            points[2 * b : 2 * b + 2],
            [found.matches0[b], found.matches1[b]],
            [found.scores0[b], found.scores1[b]],
            [found.layers0[b], found.layers1[b]],
        )
        for b in range(len(found.layers))
    ]


def their_results(model: Any, images: Tensor) -> list[Result]:
    """Return `transformers`' result of each pair."""
    with torch.inference_mode():
        output = model(images.unflatten(0, (-1, 2)).repeat(1, 1, 3, 1, 1))
    pairs, _, count = output.mask.shape
    matches, scores = (t.reshape(pairs, 2, count) for t in (output.matches, output.matching_scores))
    size = torch.tensor([images.shape[3], images.shape[2]])
    results = []
    for b in range(pairs):
        points = [output.keypoints[b, i][output.mask[b, i] > 0] * size for i in range(2)]
        result = Result(points, list(matches[b]), list(scores[b]), list(output.prune[b]))
        kept = [int((output.prune[b, i] == output.prune[b].max()).sum()) for i in range(2)]
        if kept[0] != kept[1]:
            # It writes the padding of pruned pairs to index -1, over the values of the image's last keypoint.
            for i in range(2):
                if len(points[i]) == count:
                    last = tuple(points[i][-1].round().int().tolist())
                    for values in (result.matches[i], result.scores[i]):
                        values.pop(last, None)
        results.append(result)
    return results


def assert_equal(found: Result, expected: Result, record_difference: RecordDifference) -> None:
    """Check that at least 99.9 % of the matches agree, the scores within 1e-3, and that the pruning is the same."""
    for i in range(2):
        assert found.layers[i] == expected.layers[i]
        compared = expected.scores[i].keys()
        ours = {point: match for point, match in found.matches[i].items() if point in compared}
        theirs = expected.matches[i]
        either = ours.items() | theirs.items()
        same = len(ours.items() & theirs.items()) / len(either) if either else 1.0
        # A score is 0 unless both points are each other's best. For unlikely pairs, rounding may decide that.
        scores = [(found.scores[i][point], expected.scores[i][point]) for point in compared]
        both = [(score, reference) for score, reference in scores if score > 0 and reference > 0]
        assert len(both) >= sum(reference > 0 for _, reference in scores) - 2
        difference = max((abs(score - reference) for score, reference in both), default=0)
        record_difference("LightGlue, share of matches that differ", 1 - same)
        record_difference("LightGlue, matching scores", difference)
        assert same >= 0.999
        assert difference < 1e-3


def assert_many_matches(result: Result) -> None:
    right = sum(abs(x - 16 - u) <= 2 and abs(y - 8 - v) <= 2 for (x, y), (u, v) in result.matches[0].items())
    assert right > 5
    assert np.ptp([result.scores[0][point] for point in result.matches[0]]) > 0.3


@pytest.mark.parametrize(("seed", "height", "width"), [(seed, *size) for seed, size in enumerate(SIZES)])
def test_matches_agree_with_transformers_without_stopping_and_pruning(
    pair: Pair, texture: Any, record_difference: RecordDifference, height: int, width: int, seed: int
) -> None:
    theirs, *ours = pair(seed, FIXED)
    images = two_views(texture, height, width, seed)
    (expected,) = their_results(theirs, images)
    points, assignment = run_ours(*ours, images)
    assert_equal(as_results(points, assignment)[0], expected, record_difference)
    assert_many_matches(expected)
    assert assignment.layers.tolist() == [5]


@pytest.mark.parametrize(("seed", "height", "width"), [(seed, *size) for seed, size in enumerate(SIZES)])
def test_matches_agree_with_transformers_with_stopping_and_pruning(
    pair: Pair, texture: Any, record_difference: RecordDifference, height: int, width: int, seed: int
) -> None:
    theirs, *ours = pair(seed, ADAPTIVE)
    images = two_views(texture, height, width, seed)
    (expected,) = their_results(theirs, images)
    points, assignment = run_ours(*ours, images)
    assert_equal(as_results(points, assignment)[0], expected, record_difference)
    assert_many_matches(expected)
    assert 1 < assignment.layers < 5
    assert (assignment.layers0[0, : len(points[0])] < assignment.layers).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_stopping_without_pruning_agrees_with_transformers(
    pair: Pair, texture: Any, record_difference: RecordDifference, seed: int
) -> None:
    theirs, detector, matcher = pair(seed, {"depth_confidence": 0.5, "width_confidence": 1.0})
    matcher.width_confidence = -1.0  # -1 fails in transformers; 1 prunes only what is surely unmatchable
    images = two_views(texture, 96, 128, seed)
    points, assignment = run_ours(detector, matcher, images)
    assert 1 < assignment.layers < 5
    assert_equal(as_results(points, assignment)[0], their_results(theirs, images)[0], record_difference)


@pytest.mark.parametrize("seed", [0, 1])
def test_pruning_without_stopping_agrees_with_transformers(
    pair: Pair, texture: Any, record_difference: RecordDifference, seed: int
) -> None:
    theirs, detector, matcher = pair(seed, {"depth_confidence": 1.0, "width_confidence": 0.8})
    matcher.depth_confidence = -1.0
    # transformers fails with -1. With 1 it never stops, and if all points are confident, only matchability decides.
    theirs = copy.deepcopy(theirs)
    for layer in theirs.token_confidence:
        layer.token.weight.data.zero_()
        layer.token.bias.data.fill_(50)
    images = two_views(texture, 96, 128, seed)
    points, assignment = run_ours(detector, matcher, images)
    assert assignment.layers == 5
    assert (assignment.layers0[0, : len(points[0])] < 5).sum() > 20
    assert_equal(as_results(points, assignment)[0], their_results(theirs, images)[0], record_difference)


@pytest.mark.parametrize(
    "config",
    [
        {"superpoint": {"descriptor_decoder_dim": 32}},
        {"superpoint": {"descriptor_decoder_dim": 128}, "descriptor_dim": 96},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 2},
        {"num_attention_heads": 8},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 2},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"hidden_act": "gelu_new"},
        {"attention_bias": False},
        {"filter_threshold": 0.6},
    ],
    ids=str,
)
def test_every_configuration_option_has_the_same_effect_as_in_transformers(
    pair: Pair, texture: Any, record_difference: RecordDifference, config: dict[str, Any]
) -> None:
    images = two_views(texture, 80, 104, 6)
    for modes in (FIXED, ADAPTIVE):
        theirs, *ours = pair(6, modes, **config)
        if config.get("num_hidden_layers") == 1 and modes == ADAPTIVE:
            continue  # transformers fails in this case
        (expected,) = their_results(theirs, images)
        assert len(expected.matches[0]) > 5
        assert_equal(as_results(*run_ours(*ours, images))[0], expected, record_difference)


def test_a_network_of_the_usual_size_agrees_with_transformers(
    pair: Pair, texture: Any, record_difference: RecordDifference
) -> None:
    superpoint = {"descriptor_decoder_dim": 256, "max_keypoints": 100}
    theirs, *ours = pair(7, DEFAULT, superpoint, descriptor_dim=256, num_hidden_layers=9)
    images = two_views(texture, 80, 104, 7)
    points, assignment = run_ours(*ours, images)
    assert 1 < assignment.layers < 9
    assert_equal(as_results(points, assignment)[0], their_results(theirs, images)[0], record_difference)


@pytest.fixture
def three_pairs(texture: Any) -> Tensor:
    """Six images with different numbers of keypoints."""
    views = [two_views(texture, 80, 104, seed) for seed in range(3)]
    views[0][1, :, :40], views[1][0, :, :, 70:], views[2][0, :, 30:60] = 0.5, 0.5, 0.5
    return torch.cat(views)


def test_batches_of_pairs_agree_with_transformers(
    pair: Pair, three_pairs: Tensor, record_difference: RecordDifference
) -> None:
    theirs, *ours = pair(18, FIXED)
    points, assignment = run_ours(*ours, three_pairs)
    assert len({len(each) for each in points}) > 4
    for found, expected in zip(as_results(points, assignment), their_results(theirs, three_pairs)):
        assert len(expected.matches[0]) > 5
        assert_equal(found, expected, record_difference)


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_each_pair_of_a_batch_gives_the_same_matches_as_alone(
    pair: Pair, three_pairs: Tensor, record_difference: RecordDifference, modes: Modes
) -> None:
    # transformers returns the pairs of a batch in the order in which they stopped.
    theirs, *ours = pair(18, modes)
    points, assignment = run_ours(*ours, three_pairs)
    for b, found in enumerate(as_results(points, assignment)):
        images = three_pairs[2 * b : 2 * b + 2]
        assert_equal(found, their_results(theirs, images)[0], record_difference)
        alone = as_results(*run_ours(*ours, images))[0]
        assert_equal(found, alone, record_difference)
    if modes == ADAPTIVE:
        assert len(set(assignment.layers.tolist())) > 1


def test_a_match_of_two_single_keypoints_agrees_with_transformers(
    pair: Pair, texture: Any, record_difference: RecordDifference
) -> None:
    for modes in (FIXED, ADAPTIVE):
        theirs, *ours = pair(1, modes, {"max_keypoints": 1}, filter_threshold=0.0)
        images = two_views(texture, 96, 128, 0)
        (expected,) = their_results(theirs, images)
        assert len(expected.matches[0]) == 1
        assert_equal(as_results(*run_ours(*ours, images))[0], expected, record_difference)


@pytest.fixture(scope="module", params=[f"lightglue-superpoint-open{suffix}" for suffix in ("", "-small", "-fast")])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """The packaged weights, in `transformers` and here, without a border."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = weights.find(request.param).path
    if weights.find(request.param).layers:  # the file has more layers than these weights use
        folder = tmp_path_factory.mktemp("small") / request.param
        convert(request.param, folder)
    theirs = transformers.LightGlueForKeypointMatching.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.keypoint_detector.keypoint_decoder.border_removal_distance = 0  # it defines borders differently
    theirs.keypoint_detector.keypoint_decoder.max_keypoints = 400
    # Theirs finds whole pixels only.
    options = {"border_removal_distance": 0, "max_keypoints": 400, "subpixel": False}
    detector = SuperPoint.from_pretrained(weights.find(request.param).extractor, **options)
    return theirs, detector, LightGlue.from_pretrained(request.param)


@pytest.mark.parametrize("modes", [FIXED, DEFAULT], ids=["fixed", "adaptive"])
def test_the_packaged_weights_agree_with_transformers(
    shipped: Networks, texture: Any, record_difference: RecordDifference, modes: Modes
) -> None:
    warp = np.array([[0.95, 0.06, 5.0], [-0.05, 0.97, 9.0], [1e-4, -5e-5, 1.0]])
    picture = texture(240, 320, 11)
    images = np.stack([picture, cv2.warpPerspective(picture, warp, (320, 240))])
    compare_shipped(shipped, images, record_difference, modes)


@pytest.mark.parametrize("modes", [FIXED, DEFAULT], ids=["fixed", "adaptive"])
def test_the_packaged_weights_agree_with_transformers_on_recorded_images(
    shipped: Networks, recorded_data: Path, record_difference: RecordDifference, modes: Modes
) -> None:
    names = ["scene0738_00_frame-000885.jpg", "scene0738_00_frame-001065.jpg"]
    pictures = [cv2.imread(str(recorded_data / "scannet_pairs" / name), cv2.IMREAD_GRAYSCALE) for name in names]
    images = np.stack([cv2.resize(picture, (320, 240), interpolation=cv2.INTER_AREA) for picture in pictures])
    compare_shipped(shipped, images, record_difference, modes)


def compare_shipped(networks: Networks, images: np.ndarray, record_difference: RecordDifference, modes: Modes) -> None:
    theirs, detector, matcher = with_modes(networks, modes)
    pixels = torch.from_numpy(images).float()[:, None] / 255
    (expected,) = their_results(theirs, pixels)
    assert len(expected.matches[0]) > 8
    assert_equal(as_results(*run_ours(detector, matcher, pixels))[0], expected, record_difference)


def in_kornia(model: LightGlue) -> Any:
    """Return kornia's LightGlue with the weights, under the authors' names."""
    feature = pytest.importorskip("kornia.feature")
    config = model.config
    theirs = feature.LightGlue(
        None,
        input_dim=config["input_dim"],
        descriptor_dim=config["descriptor_dim"],
        num_heads=config["num_attention_heads"],
        n_layers=config["num_hidden_layers"],
        depth_confidence=model.depth_confidence,
        width_confidence=model.width_confidence,
        filter_threshold=model.filter_threshold,
        flash=False,
    ).eval()
    theirs.load_state_dict(authors_names(model, old=False))
    return theirs


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize(
    ("config", "count0", "count1"),
    [
        ({}, 120, 120),
        ({}, 120, 80),
        ({}, 70, 120),
        ({}, 1, 30),
        ({}, 1, 1),
        ({"num_attention_heads": 2, "num_hidden_layers": 3}, 120, 80),
        ({"input_dim": 48}, 70, 120),
        ({"descriptor_dim": 128, "filter_threshold": 0.4}, 120, 80),
    ],
    ids=str,
)
def test_matches_agree_with_kornia(
    lightglue: Callable[..., LightGlue],
    record_difference: RecordDifference,
    count0: int,
    count1: int,
    config: dict[str, Any],
    modes: Modes,
) -> None:
    ours = lightglue(seed=count0, **config, **modes)
    for layer in ours.transformer_layers:
        layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    # kornia requires that all points lie inside the image.
    inputs = [each._replace(keypoints=0.9 * each.keypoints) for each in scene(count0, count1, size=ours.input_dim)]
    images = [
        {"keypoints": each.keypoints, "descriptors": each.descriptors, "image_size": each.size.float()}
        for each in inputs
    ]
    with torch.inference_mode():
        expected = in_kornia(ours)({"image0": images[0], "image1": images[1]})
    found = ours(*inputs)
    assert count0 < 70 or (found.matches0 >= 0).sum() > 10
    assert found.layers.item() == expected["stop"]
    for i in range(2):
        matches, scores = found[i], found[2 + i]
        same = float((matches == expected[f"matches{i}"]).float().mean())
        # For points without a match, kornia also returns a score of 0 if a pair is not mutually best.
        difference = float((scores - expected[f"matching_scores{i}"]).abs().max())
        record_difference("LightGlue and kornia's, share of matches that differ", 1 - same)
        record_difference("LightGlue and kornia's, matching scores", difference)
        assert same >= 0.999
        assert difference < 1e-3
        if modes is ADAPTIVE:
            assert torch.equal(found[5 + i].float(), expected[f"prune{i}"].float())


def test_hidden_states_and_attention_maps_agree_with_transformers(
    pair: Pair, record_difference: RecordDifference, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, _, ours = pair(0, FIXED)
    inputs = scene(40, 40)
    monkeypatch.setattr(theirs.config, "_attn_implementation", "eager")  # the fast one has no attention maps
    with torch.inference_mode():
        *_, states, attentions = theirs._match_image_pair(  # noqa: SLF001 - its forward pass takes images alone
            torch.stack([each.keypoints for each in inputs], dim=1),
            torch.stack([each.descriptors for each in inputs], dim=1),
            150,
            200,
            mask=torch.ones(1, 2, 40, dtype=torch.bool),
            output_hidden_states=True,
            output_attentions=True,
        )
    with trace(ours) as recorded:
        ours(*inputs)
    layers = len(ours.transformer_layers)
    # Of seven states per layer, ours are the input of the first layer, and those after self- and cross-attention.
    expected = [states[0], *(states[7 * layer + k] for layer in range(layers) for k in (1, 4))]
    assert len(recorded.hidden_states) == 2 * len(expected) == 2 * (1 + 2 * layers)
    assert len(recorded.attentions) == 2 * len(attentions) == 4 * layers
    for name, found, reference in (
        ("hidden states", recorded.hidden_states, expected),
        ("attention maps", recorded.attentions, attentions),
    ):
        images = [image[None] for both in reference for image in both]
        difference = np.max([(mine - theirs).abs().max() for mine, theirs in zip(found, images, strict=True)])
        record_difference(f"LightGlue, {name}", difference)
        assert difference < 1e-4
