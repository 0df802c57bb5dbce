"""Tests that SuperGlue finds `transformers`' matches with the same weights, from both file formats.

Weights are random, scaled such that descriptors decide and all layers have an effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kpmatch_ros.models import SuperPoint, trace
from kpmatch_ros.models.assignment import Assignment, ImageFeatures
from kpmatch_ros.models.superglue import SuperGlue, normalise_keypoints

Pair = Callable[..., tuple[Any, SuperGlue]]  # transformers' and ours
RecordDifference = Callable[[str, float], None]
Inputs = tuple[ImageFeatures, ImageFeatures]

SIZE = (640, 480)
COUNTS = [(150, 150), (150, 100), (90, 150), (1, 1), (1, 7), (7, 1)]


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
    small_superpoint: dict[str, Any],
    small_superglue: dict[str, Any],
    randomise_superglue: Callable[[Any, int], None],
) -> Pair:
    """pair(seed, **config) returns `transformers`' SuperGlue and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, tuple[Any, SuperGlue]] = {}

    def make(seed: int, **config: Any) -> tuple[Any, SuperGlue]:
        key = f"{seed} {config}"
        if key not in made:
            config = {**small_superglue, **config}
            detector = {**small_superpoint, "descriptor_decoder_dim": config["hidden_size"]}
            theirs = transformers.SuperGlueForKeypointMatching(
                transformers.SuperGlueConfig(
                    keypoint_detector_config=transformers.SuperPointConfig(**detector).to_dict(), **config
                )
            ).eval()
            randomise_superglue(theirs, seed)
            folder = tmp_path_factory.mktemp("superglue")
            theirs.save_pretrained(folder)
            made[key] = theirs, SuperGlue.from_pretrained(folder)
        return made[key]

    return make


def features(seed: int, count0: int, count1: int, dim: int = 64) -> Inputs:
    """Return two images of mostly the same points in another order, with descriptors of different similarity."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    most = max(count0, count1)
    keypoints = torch.rand(most, 2, generator=generator) * torch.tensor(SIZE)
    descriptors = nn.functional.normalize(noise(most, dim), dim=1)
    scores = torch.rand(most, generator=generator)
    order = torch.randperm(most, generator=generator)[:count1]
    strength = 0.3 * torch.rand(count1, 1, generator=generator)
    moved = nn.functional.normalize(descriptors[order] + strength * noise(count1, dim), dim=1)
    return (
        image(keypoints[None, :count0], descriptors[None, :count0], scores[None, :count0]),
        image(keypoints[None, order] + 3 * noise(count1, 2), moved[None], scores[None, order]),
    )


def image(keypoints: Tensor, descriptors: Tensor, scores: Tensor, mask: Tensor | None = None) -> ImageFeatures:
    return ImageFeatures(keypoints, descriptors, torch.tensor([SIZE]).expand(len(keypoints), 2), mask, scores)


def pad(features: ImageFeatures, count: int) -> ImageFeatures:
    """Pad to ``count`` points with values that would show if they were used, and add the mask."""

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.full((1, count - tensor.shape[1], *tensor.shape[2:]), 7.0)], dim=1)

    mask = torch.arange(count)[None] < features.num_keypoints
    return image(padded(features.keypoints), padded(features.descriptors), padded(features.scores), mask)


def run_theirs(model: Any, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Return `transformers`' matches and scores. It needs equal numbers of keypoints, so one image may be padded."""
    counts = [each.num_keypoints for each in inputs]
    padded = [pad(each, max(counts)) for each in inputs]
    keypoints, descriptors, scores, mask = (
        torch.cat([getattr(each, name) for each in padded])[None]
        for name in ("keypoints", "descriptors", "scores", "mask")
    )
    with torch.inference_mode():
        matches, scores, *_ = model._match_image_pair(  # noqa: SLF001 - its forward pass takes images alone
            keypoints, descriptors, scores, SIZE[1], SIZE[0], mask=mask.int()
        )
    return [matches[0, i, : counts[i]] for i in range(2)], [scores[0, i, : counts[i]] for i in range(2)]


@pytest.fixture
def transport_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `transformers`, padding takes part in optimal transport, with a weight of 1 each, and a dustbin absorbs it.

    This has no effect once Sinkhorn's algorithm has converged, but the steps differ. For a comparison of the steps, its
    function gets only the real keypoints, as in the authors' code.
    """
    modeling = pytest.importorskip("transformers.models.superglue.modeling_superglue")
    original = modeling.log_optimal_transport

    def cropped(scores: Tensor, reg_param: Tensor, iterations: int) -> Tensor:
        padding = scores == torch.finfo(scores.dtype).min
        plan = nn.functional.pad(scores, (0, 1, 0, 1)).fill_(-1e9)
        for i, real in enumerate(~padding):
            rows, columns = real.any(dim=1).sum(), real.any(dim=0).sum()
            if rows > 0:
                found = original(scores[i : i + 1, :rows, :columns], reg_param, iterations)[0]
                plan[i, :rows, :columns] = found[:-1, :-1]
        return plan

    monkeypatch.setattr(modeling, "log_optimal_transport", cropped)


def assert_equal(
    found: Assignment,
    matches: list[Tensor],
    scores: list[Tensor],
    threshold: float,
    record_difference: RecordDifference | None = None,
    note: str = "",
) -> None:
    """Check that at least 99.9 % of the matches agree, and scores within 1e-3, for a batch of one."""
    for ours, our_scores, theirs, their_scores in zip(found[:2], found[2:4], matches, scores):
        same = float((ours[0] == theirs).float().mean())
        # `transformers` sets scores below the threshold to zero.
        difference = float((our_scores[0] * (our_scores[0] > threshold) - their_scores).abs().max())
        assert same >= 0.999
        assert difference < 1e-3
        if record_difference is not None:
            record_difference("SuperGlue, share of matches that differ", 1 - same)
            record_difference(f"SuperGlue, matching scores{note}", difference)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_matches_as_transformers_does(
    pair: Pair, seed: int, counts: tuple[int, int], record_difference: RecordDifference
) -> None:
    theirs, ours = pair(seed)
    inputs = features(seed, *counts)
    matches, scores = run_theirs(theirs, inputs)
    assert (matches[0] >= 0).sum() > 0.8 * min(counts)
    assert scores[0].max() > 0.1
    note = "" if counts[0] == counts[1] else ", its padding in the transport"
    assert_equal(ours(*inputs), matches, scores, 0.0, record_difference, note)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 128, "keypoint_encoder_sizes": [8, 16, 32, 64]},
        {"hidden_size": 48, "num_attention_heads": 3},
        {"num_attention_heads": 1},
        {"num_attention_heads": 16},
        {"gnn_layers_types": ["cross", "cross", "self"]},
        {"gnn_layers_types": ["self"]},
        {"sinkhorn_iterations": 1},
        {"sinkhorn_iterations": 20},
        {"matching_threshold": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("counts", [(150, 90), (1, 7)], ids=str)
@pytest.mark.usefixtures("transport_without_padding")
def test_follows_every_option_of_the_configuration_as_transformers_does(
    pair: Pair, config: dict[str, Any], counts: tuple[int, int], record_difference: RecordDifference
) -> None:
    theirs, ours = pair(3, **config)
    inputs = features(3, *counts, dim=theirs.config.hidden_size)
    matches, scores = run_theirs(theirs, inputs)
    assert "matching_threshold" in config or (matches[0] >= 0).any()
    assert_equal(ours(*inputs), matches, scores, theirs.config.matching_threshold, record_difference)


def test_the_threshold_of_the_configuration_separates_matches_from_the_rest(pair: Pair) -> None:
    theirs, ours = pair(3, matching_threshold=0.8)
    inputs = features(3, 150, 150)
    strict, matches = ours(*inputs), run_theirs(theirs, inputs)[0]
    assert torch.equal(strict.matches0[0], matches[0])
    assert 0 < (strict.matches0 >= 0).sum() < 150
    ours.filter_threshold = 0.0
    every = ours(*inputs)
    ours.filter_threshold = 0.8
    assert (every.matches0 >= 0).sum() > (strict.matches0 >= 0).sum()
    assert torch.equal(every.scores0, strict.scores0)


@pytest.mark.usefixtures("transport_without_padding")
def test_a_network_of_the_usual_size_matches_as_transformers_does(
    pair: Pair, record_difference: RecordDifference
) -> None:
    layers = {"keypoint_encoder_sizes": [32, 64, 128, 256], "gnn_layers_types": ["self", "cross"] * 9}
    theirs, ours = pair(5, hidden_size=256, **layers)
    inputs = features(5, 300, 260, dim=256)
    matches, scores = run_theirs(theirs, inputs)
    assert (matches[0] >= 0).sum() > 200
    assert_equal(ours(*inputs), matches, scores, 0.0, record_difference)


@pytest.mark.usefixtures("transport_without_padding")
def test_superpoint_and_superglue_of_one_folder_match_images_as_in_transformers(
    tmp_path: Path,
    pair: Pair,
    texture: Any,
    randomise_superpoint: Callable[[Any, int], None],
    record_difference: RecordDifference,
) -> None:
    theirs, _ = pair(6)
    randomise_superpoint(theirs.keypoint_detector, 6)
    theirs.save_pretrained(tmp_path)
    picture = texture(104, 144, 7)
    views = [picture[:96, :128], picture[8:, 16:], texture(96, 128, 8), texture(96, 128, 9)]
    images = torch.from_numpy(np.stack(views)).float()[:, None] / 255  # two pairs with different numbers of keypoints
    with torch.inference_mode():
        expected = theirs(images.unflatten(0, (2, 2)).repeat(1, 1, 3, 1, 1))
    found = SuperPoint.from_pretrained(tmp_path)(images)
    size = torch.tensor([[128, 96]] * 2)
    inputs = [
        ImageFeatures(found.keypoints[i::2], found.descriptors[i::2], size, found.mask[i::2], found.scores[i::2])
        for i in range(2)
    ]
    assignment = SuperGlue.from_pretrained(tmp_path)(*inputs)
    assert (assignment.matches0[0] >= 0).sum() > 20
    assert len({int(count) for count in found.mask.sum(dim=1)}) > 1
    for b in range(2):
        for i in range(2):
            # Their keypoints have another order, so compare by pixel.
            points = [(expected.keypoints[b, k] * size[0]).round().int().tolist() for k in range(2)]
            real = expected.mask[b, i].bool()
            mine = [found.keypoints[2 * b + k].round().int().tolist() for k in range(2)]
            matches = zip(mine[i], assignment[i][b].tolist(), assignment[2 + i][b].tolist(), found.mask[2 * b + i])
            ours = {tuple(p): (tuple(mine[1 - i][m]) if m >= 0 else None, s) for p, m, s, is_real in matches if is_real}
            wanted = zip(points[i], expected.matches[b, i].tolist(), expected.matching_scores[b, i].tolist(), real)
            for point, match, score, is_real in wanted:
                if is_real:
                    ours_match, ours_score = ours[tuple(point)]
                    assert ours_match == (tuple(points[1 - i][match]) if match >= 0 else None)
                    assert ours_score == pytest.approx(score, abs=1e-3)
                    record_difference("SuperGlue, matching scores", abs(ours_score - score))


def test_hidden_states_and_attention_maps_are_those_of_transformers(
    pair: Pair, record_difference: RecordDifference
) -> None:
    theirs, ours = pair(0)
    inputs = features(0, 40, 40)
    size = ours.config["hidden_size"]
    both = [
        torch.stack([getattr(each, name) for each in inputs], dim=1) for name in ("keypoints", "descriptors", "scores")
    ]
    with torch.inference_mode():
        *_, states, attentions = theirs._match_image_pair(  # noqa: SLF001 - its forward pass takes images alone
            *both,
            SIZE[1],
            SIZE[0],
            mask=torch.ones(1, 2, 40, dtype=torch.int),
            output_hidden_states=True,
            output_attentions=True,
        )
    with trace(ours) as recorded:
        ours(*inputs)
    # Theirs are the increments of each layer, including the perceptrons' inner layers; ours are the sums.
    encoder = len(ours.config["keypoint_encoder_sizes"]) + 1
    expected = [states[encoder]]
    expected += [state for state in states[encoder + 1 : -1] if state.shape[-2] == size]
    assert len(expected) == 1 + len(ours.gnn.layers)
    sums = torch.stack(expected).cumsum(dim=0).transpose(-1, -2)  # (layers, 1, 2, N, C)
    assert len(recorded.hidden_states) == 2 * len(sums)
    assert len(recorded.attentions) == 2 * len(attentions) == 2 * len(ours.gnn.layers)
    for name, found, reference in (
        ("hidden states", recorded.hidden_states, sums),
        ("attention maps", recorded.attentions, attentions),
    ):
        images = [image[None] for both in reference for image in both[0]]
        difference = np.max([(mine - theirs).abs().max() for mine, theirs in zip(found, images, strict=True)])
        record_difference(f"SuperGlue, {name}", difference)
        assert difference < 1e-4


def test_no_keypoints_give_no_matches_as_in_transformers(pair: Pair) -> None:
    theirs, ours = pair(0)
    for counts in ((0, 7), (7, 0), (0, 0)):
        inputs = features(0, *counts)
        found = ours(*inputs)
        assert found.matches0.shape == (1, counts[0]) and found.matches1.shape == (1, counts[1])
        assert (found.matches0 == -1).all() and (found.matches1 == -1).all()
        matches, _ = run_theirs(theirs, inputs)
        assert all((each == -1).all() for each in matches)


def padded_batch(*pairs: Inputs) -> Inputs:
    """Return pairs as one batch, with at least three points of padding per image."""

    def batch(images: Sequence[ImageFeatures]) -> ImageFeatures:
        padded = [pad(each, max(each.num_keypoints for each in images) + 3) for each in images]
        return ImageFeatures(*(torch.cat(tensors) for tensors in zip(*padded)))

    image0, image1 = (batch(images) for images in zip(*pairs))
    return image0, image1


def test_pairs_of_a_padded_batch_match_as_each_alone(superglue: Callable[..., SuperGlue]) -> None:
    matcher = superglue()
    pairs = [features(1, 50, 40), features(2, 30, 61), features(3, 1, 5)]
    batch = padded_batch(*pairs)
    mask0, mask1 = (image.mask for image in batch)
    together = matcher(*batch)
    for i, inputs in enumerate(pairs):
        alone = matcher(*inputs)
        assert (alone.matches0 >= 0).any()
        for field, mask in (("matches0", mask0[i]), ("matches1", mask1[i])):
            assert torch.equal(getattr(together, field)[i][mask], getattr(alone, field)[0])
            assert (getattr(together, field)[i][~mask] == -1).all()
        for field, mask in (("scores0", mask0[i]), ("scores1", mask1[i])):
            assert torch.allclose(getattr(together, field)[i][mask], getattr(alone, field)[0], atol=1e-4)
            assert (getattr(together, field)[i][~mask] == 0).all()


def test_padding_of_one_image_changes_nothing(superglue: Callable[..., SuperGlue]) -> None:
    matcher, inputs = superglue(), features(1, 40, 30)
    alone = matcher(*inputs)
    found = matcher(inputs[0], pad(inputs[1], 36))
    assert torch.equal(found.matches0, alone.matches0)
    assert torch.allclose(found.scores0, alone.scores0, atol=1e-4)


def test_an_image_without_keypoints_does_not_affect_the_other_pairs_of_the_batch(
    superglue: Callable[..., SuperGlue],
) -> None:
    matcher = superglue()
    image0, image1 = padded_batch(features(1, 50, 40), features(2, 30, 20), features(3, 30, 20))
    image0.mask[1] = False
    image0.mask[2] = image1.mask[2] = False
    found = matcher(image0, image1)
    assert torch.equal(found.matches0[0, :50], matcher(*features(1, 50, 40)).matches0[0])
    assert (found.matches0[1:] == -1).all() and (found.matches1[1:] == -1).all()
    assert (found.scores0[1:] == 0).all() and (found.scores1[1:] == 0).all()


def test_the_order_of_keypoints_does_not_matter(superglue: Callable[..., SuperGlue]) -> None:
    matcher, inputs = superglue(), features(1, 40, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    image0, image1 = inputs
    reordered = image(image0.keypoints[:, order], image0.descriptors[:, order], image0.scores[:, order])
    shuffled = matcher(reordered, image1)
    assert torch.equal(shuffled.matches0[0], matcher(*inputs).matches0[0, order])


def test_positions_and_detection_scores_matter(superglue: Callable[..., SuperGlue]) -> None:
    matcher, inputs = superglue(), features(1, 40, 40)
    usual = matcher(*inputs).scores0
    image0, image1 = inputs
    for changed in (image0._replace(keypoints=image0.keypoints.flip(1)), image0._replace(scores=image0.scores.flip(1))):
        other = matcher(changed, image1).scores0
        assert (other - usual).abs().max() > 1e-3


def test_detection_scores_cannot_be_left_out(superglue: Callable[..., SuperGlue]) -> None:
    image0, image1 = features(1, 5, 5)
    with pytest.raises(ValueError, match="detection scores"):
        superglue()(image0, image1._replace(scores=None))


def test_every_layer_is_run_for_every_keypoint(superglue: Callable[..., SuperGlue]) -> None:
    found = superglue()(*features(1, 5, 6))
    assert found.layers.tolist() == [4]
    assert found.layers0.tolist() == [[4] * 5] and found.layers1.tolist() == [[4] * 6]


def test_normalised_positions_keep_the_aspect_ratio() -> None:
    corners = torch.tensor([[[0.0, 0.0], [640.0, 480.0]]])
    expected = torch.tensor([[[-1, -0.75], [1, 0.75]]]) / 1.4
    assert torch.allclose(normalise_keypoints(corners, torch.tensor([SIZE])), expected)


def test_bfloat16_keeps_most_matches_and_encodes_positions_in_float32(superglue: Callable[..., SuperGlue]) -> None:
    matcher, inputs = superglue(), features(1, 100, 100)
    single = matcher(*inputs)
    encoder = matcher.keypoint_encoder.state_dict()
    halved = matcher.to_precision(torch.bfloat16)
    assert halved.dtype == torch.bfloat16
    assert all(torch.equal(halved.keypoint_encoder.state_dict()[name], tensor) for name, tensor in encoder.items())
    found = halved(*inputs)
    assert found.scores0.dtype == torch.float32
    assert not torch.equal(found.scores0, single.scores0)
    assert (found.matches0 == single.matches0).float().mean() > 0.95


def test_transformers_loads_what_this_network_saves(superglue: Callable[..., SuperGlue], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    ours, inputs = superglue(8), features(8, 60, 60)
    save_file(ours.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**ours.config, "model_type": "superglue"}))
    theirs = transformers.SuperGlueForKeypointMatching.from_pretrained(tmp_path).eval()
    assert_equal(ours(*inputs), *run_theirs(theirs, inputs), threshold=0.0)
