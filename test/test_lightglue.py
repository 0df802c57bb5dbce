"""Tests of LightGlue with random weights: early stopping, pruning, batches, padding, and its authors' files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kpmatch_ros.models import LightGlue, NearestNeighbour, trace
from kpmatch_ros.models.assignment import Assignment, ImageFeatures, mutual_matches
from kpmatch_ros.models.lightglue import PendingBool, normalise_keypoints
from kpmatch_ros.models.lightglue_layers import Attention

Modes = dict[str, float]

FIXED: Modes = {"depth_confidence": -1.0, "width_confidence": -1.0}
ADAPTIVE: Modes = {"depth_confidence": 0.5, "width_confidence": 0.8}  # with random weights, this stops early and prunes


def test_confidences_and_threshold_are_read_from_the_configuration(
    random_folder: Callable[..., Path],
) -> None:
    folder = random_folder(lightglue={"depth_confidence": 0.5, "width_confidence": 0.75, "filter_threshold": 0.25})
    loaded = LightGlue.from_pretrained(folder)
    assert (loaded.depth_confidence, loaded.width_confidence, loaded.filter_threshold) == (0.5, 0.75, 0.25)
    assert LightGlue.from_pretrained(folder, depth_confidence=-1.0).depth_confidence == -1


def scene(count0: int, count1: int, seed: int = 0, size: int = 64) -> tuple[ImageFeatures, ImageFeatures]:
    """Return two images. The second has the first one's first points, moved."""
    random = torch.Generator().manual_seed(seed)
    count = max(count0, count1)
    keypoints = torch.rand(1, count, 2, generator=random) * torch.tensor([200.0, 150.0])
    descriptors = torch.nn.functional.normalize(torch.randn(1, count, size, generator=random), dim=-1)
    pixels = torch.tensor([[200, 150]])
    moved = keypoints + torch.tensor([16.0, 8.0])
    return (
        ImageFeatures(keypoints[:, :count0], descriptors[:, :count0], pixels),
        ImageFeatures(moved[:, :count1], descriptors[:, :count1], pixels),
    )


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize(("count0", "count1"), [(0, 0), (0, 30), (30, 0), (1, 1), (1, 30), (30, 1), (2, 50)])
def test_few_or_no_keypoints_give_few_or_no_matches(
    lightglue: Callable[..., LightGlue], count0: int, count1: int, modes: Modes
) -> None:
    found = lightglue(filter_threshold=0.0, **modes)(*scene(count0, count1))
    assert found.matches0.shape == found.scores0.shape == found.layers0.shape == (1, count0)
    assert found.matches1.shape == found.scores1.shape == found.layers1.shape == (1, count1)
    assert (found.matches0 >= 0).sum() == (found.matches1 >= 0).sum() <= min(count0, count1)
    for scores in (found.scores0, found.scores1):
        assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_an_image_without_keypoints_does_not_affect_other_pairs_of_the_batch(
    lightglue: Callable[..., LightGlue], modes: Modes
) -> None:
    model = lightglue(filter_threshold=0.0, **modes)
    masks = torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 50, dtype=torch.bool)
    masks[0][0] = False
    twice = [
        ImageFeatures(*(torch.cat([tensor, tensor]) for tensor in image[:3]), mask)
        for image, mask in zip(scene(40, 50), masks)
    ]
    found, alone = model(*twice), model(*scene(40, 50))
    assert (found.matches0[0] == -1).all()
    assert (found.matches1[0] == -1).all()
    assert not found.scores0[0].any()
    assert not found.scores1[0].any()
    assert torch.equal(found.matches0[1], alone.matches0[0])
    assert torch.allclose(found.scores0[1], alone.scores0[0], atol=1e-5)
    assert (alone.matches0 >= 0).sum() > 20


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("which", [0, 1])
def test_padding_of_one_image_has_no_effect(lightglue: Callable[..., LightGlue], modes: Modes, which: int) -> None:
    model, inputs = lightglue(**modes), list(scene(40, 50))
    expected = model(*inputs)
    count = (40, 50)[which]
    keypoints, descriptors = (torch.cat([each, torch.rand(1, 7, each.shape[2])], dim=1) for each in inputs[which][:2])
    mask = torch.arange(count + 7)[None] < count
    inputs[which] = ImageFeatures(keypoints, descriptors, inputs[which].size, mask)
    found = model(*inputs)
    matches = (found.matches0, found.matches1)[which]
    scores = (found.scores0, found.scores1)[which]
    assert torch.equal(matches[:, :count], (expected.matches0, expected.matches1)[which])
    assert torch.allclose(scores[:, :count], (expected.scores0, expected.scores1)[which], atol=1e-5)
    assert (matches[:, count:] == -1).all()
    assert not scores[:, count:].any()


def test_when_every_point_is_pruned_there_are_no_matches(lightglue: Callable[..., LightGlue]) -> None:
    model = lightglue(depth_confidence=1.0, width_confidence=0.99)
    model.match_assignment_layers[1].matchability.weight.zero_()
    model.match_assignment_layers[1].matchability.bias.fill_(-20)
    model.token_confidence[1].token.weight.zero_()
    model.token_confidence[1].token.bias.fill_(20)
    model.depth_confidence = 1.0
    found = model(*scene(40, 50))
    assert found.layers.tolist() == [2]
    assert set(found.layers0[0].tolist()) | set(found.layers1[0].tolist()) <= {1, 2}
    assert (found.matches0 == -1).all()
    assert (found.matches1 == -1).all()
    assert not found.scores0.any()


def test_the_states_of_the_last_layer_give_the_matches(lightglue: Callable[..., LightGlue]) -> None:
    model, images = lightglue(**FIXED), scene(40, 50)
    states = list(model.states(*images))
    assert len(states) == len(model.transformer_layers)
    scores = model.match_assignment_layers[-1](*states[-1])
    found = mutual_matches(scores, torch.exp, model.filter_threshold)
    assert torch.equal(found.matches0, model(*images).matches0)
    assert (found.matches0 >= 0).sum() > 20


def run(model: LightGlue, ahead: bool, above: int = 0) -> Assignment:
    """Match 50 points per image, as on a GPU if ``ahead``."""
    model.run_ahead, model.prune_above = ahead, above
    return model(*scene(50, 50))


@pytest.mark.parametrize("width_confidence", [-1.0, 0.8])
@pytest.mark.parametrize("depth_confidence", [-1.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_running_ahead_does_not_change_the_result(
    lightglue: Callable[..., LightGlue], seed: int, depth_confidence: float, width_confidence: float
) -> None:
    model = lightglue(seed, depth_confidence=depth_confidence, width_confidence=width_confidence)
    for ahead, at_once in zip(run(model, True), run(model, False)):
        assert torch.equal(ahead, at_once)


def test_the_next_layer_starts_before_the_stopping_criterion_is_read(
    lightglue: Callable[..., LightGlue], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, events = lightglue(depth_confidence=0.5, width_confidence=-1.0), []
    for i, layer in enumerate(model.transformer_layers):
        layer.register_forward_hook(lambda *_, i=i: events.append(f"layer {i + 1}"))

    class Watched(PendingBool):
        def __bool__(self) -> bool:
            events.append("asked")
            return super().__bool__()

    monkeypatch.setattr("kpmatch_ros.models.lightglue.PendingBool", Watched)
    layers = int(run(model, ahead=True).layers)
    assert 1 < layers < len(model.transformer_layers) - 1
    assert events == ["layer 1", *(event for i in range(layers) for event in (f"layer {i + 2}", "asked"))]


def test_points_are_pruned_only_in_images_with_more_points_than_prune_above(
    lightglue: Callable[..., LightGlue],
) -> None:
    model = lightglue(depth_confidence=-1.0, width_confidence=0.8)
    last = len(model.transformer_layers)
    assert (run(model, ahead=True, above=50).layers0 == last).all()
    assert (run(model, ahead=True, above=49).layers0 < last).any()
    model.prune_above = 60  # each image separately, as in the authors' code
    for counts in ((50, 70), (70, 50)):
        found = model(*scene(*counts))
        for count, layers in zip(counts, (found.layers0, found.layers1)):
            assert (layers < last).any() if count == 70 else (layers == last).all()


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_matches_are_one_to_one_and_agree_in_both_directions(lightglue: Callable[..., LightGlue], modes: Modes) -> None:
    found = lightglue(**modes)(*scene(60, 80))
    index0 = (found.matches0[0] >= 0).nonzero()[:, 0]
    index1 = found.matches0[0, index0]
    assert len(index0) > 20
    assert torch.equal(found.matches1[0, index1], index0)
    assert (found.matches1 >= 0).sum() == len(index0)
    assert torch.equal(found.scores1[0, index1], found.scores0[0, index0])
    assert (found.scores0[0, index0] > 0.1).all()


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
def test_the_order_of_keypoints_and_of_images_has_no_effect(lightglue: Callable[..., LightGlue], modes: Modes) -> None:
    model, (image0, image1) = lightglue(**modes), scene(60, 80)
    expected = model(image0, image1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = ImageFeatures(image0.keypoints[:, order], image0.descriptors[:, order], image0.size)
    found = model(image1, shuffled)
    assert (expected.matches0 >= 0).sum() > 20
    assert torch.equal(found.matches1, expected.matches0[:, order])
    assert torch.allclose(found.scores1, expected.scores0[:, order], atol=1e-4)
    assert torch.equal(found.layers1, expected.layers0[:, order])


def test_the_scale_of_an_image_has_no_effect(lightglue: Callable[..., LightGlue]) -> None:
    model, (image0, image1) = lightglue(**FIXED), scene(60, 80)
    enlarged = image1._replace(keypoints=3 * image1.keypoints, size=3 * image1.size)
    expected, found = model(image0, image1), model(image0, enlarged)
    assert torch.equal(found.matches0, expected.matches0)
    assert torch.allclose(found.scores0, expected.scores0, atol=1e-4)


def test_the_positions_of_keypoints_affect_the_scores(lightglue: Callable[..., LightGlue]) -> None:
    model, (image0, image1) = lightglue(**FIXED), scene(60, 80)
    elsewhere = image1._replace(keypoints=image1.keypoints.flip(-1))
    expected, found = model(image0, image1), model(image0, elsewhere)
    assert (found.scores0 - expected.scores0).abs().max() > 0.05


def test_normalised_positions_keep_the_aspect_ratio() -> None:
    keypoints = torch.tensor([[[320.0, 240.0], [0.0, 0.0], [640.0, 480.0]]])
    expected = [[[0.0, 0.0], [-1.0, -0.75], [1.0, 0.75]]]
    assert normalise_keypoints(keypoints, torch.tensor([[640, 480]])).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_most_matches(lightglue: Callable[..., LightGlue], dtype: torch.dtype) -> None:
    # Random weights are far more sensitive than trained ones.
    model, inputs = lightglue(**FIXED), scene(100, 120)
    expected = model(*inputs)
    projector = model.positional_encoder.projector.weight.clone()
    found = model.to_precision(dtype)(*inputs)
    assert model.dtype == dtype
    assert torch.equal(model.positional_encoder.projector.weight, projector)
    assert found.scores0.dtype == torch.float32
    assert found.scores0.isfinite().all()
    matched = expected.matches0 >= 0
    assert matched.sum() > 40
    assert (found.matches0 == expected.matches0)[matched].float().mean() > 0.7


@pytest.mark.parametrize("modes", [FIXED, ADAPTIVE], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("config", [{}, {"attention_bias": False}, {"num_key_value_heads": 2}], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["", "queries are keys"])
def test_a_fused_network_gives_the_same_matches_with_fewer_linear_layers(
    lightglue: Callable[..., LightGlue], modes: Modes, config: dict[str, Any], shared: bool
) -> None:
    model = lightglue(**modes, **config)
    shared &= "num_key_value_heads" not in config  # in that case there are more queries than keys
    if shared:
        for layer in model.transformer_layers:
            layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    inputs = scene(100, 120)
    expected, before = model(*inputs), linear_layers_run(model, inputs)
    found = model.fuse()(*inputs)
    assert (expected.matches0 >= 0).sum() > 40
    assert torch.equal(found.matches0, expected.matches0)
    assert torch.equal(found.layers0, expected.layers0)
    assert torch.allclose(found.scores0, expected.scores0, rtol=0, atol=1e-4)
    layers = int(expected.layers)
    assert before - linear_layers_run(model, inputs) == 12 * layers
    assert torch.equal(model.fuse()(*inputs).scores0, found.scores0)  # fusing twice changes nothing


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_processing_both_images_as_one_batch_gives_the_same_matches(
    lightglue: Callable[..., LightGlue], pairs: int, masked: bool, fused: bool
) -> None:
    model = lightglue(**FIXED)
    if fused:
        model.fuse()
    images = [
        ImageFeatures(*(None if tensor is None else torch.cat([tensor] * pairs) for tensor in image))  # type: ignore[arg-type]
        for image in scene(100, 100)
    ]
    if masked:
        images = [
            image._replace(mask=torch.arange(100).expand(pairs, -1) < count) for image, count in zip(images, (90, 70))
        ]
    expected = model(*images)
    found = model.match_as_one_batch()(*images)
    assert (expected.matches0 >= 0).sum() > 30 * pairs
    assert torch.equal(found.matches0, expected.matches0)
    assert torch.allclose(found.scores0, expected.scores0, rtol=0, atol=1e-4)


def test_as_one_batch_also_accepts_different_numbers_of_points(lightglue: Callable[..., LightGlue]) -> None:
    model, inputs = lightglue(**FIXED), scene(100, 120)
    expected = model(*inputs)
    assert torch.equal(model.match_as_one_batch()(*inputs).scores0, expected.scores0)


def linear_layers_run(model: LightGlue, inputs: tuple[ImageFeatures, ImageFeatures]) -> int:
    """Count the linear layers that run to match these."""
    runs = []
    layers = {module for module in model.modules() if isinstance(module, torch.nn.Linear)}
    hooks = [layer.register_forward_hook(lambda *_: runs.append(1)) for layer in layers]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return len(runs)


def authors_names(model: LightGlue, old: bool) -> dict[str, Tensor]:
    """Return the tensors with the names of cvg/LightGlue; with ``old``, those of its first release.

    There, cross-attention has one projection for queries and keys. Self-attention has one for queries, keys and values,
    which are adjacent for each channel.
    """
    mine = model.state_dict()
    layers = len(model.transformer_layers)
    tensors = {
        "posenc.Wr.weight": mine["positional_encoder.projector.weight"],
        "confidence_thresholds": torch.tensor([0.8 + 0.1 * math.exp(-4 * i / layers) for i in range(layers)]),
    }
    for kind in ("weight", "bias"):
        if f"input_projection.{kind}" in mine:
            tensors[f"input_proj.{kind}"] = mine[f"input_projection.{kind}"]
        for i in range(layers):
            self_block, cross_block = (
                (f"{block}_attn.{i}" if old else f"transformers.{i}.{block}_attn") for block in ("self", "cross")
            )
            layer = f"transformer_layers.{i}"
            qkv = [mine[f"{layer}.self_attention.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{self_block}.Wqkv.{kind}"] = torch.stack(qkv, dim=1).flatten(0, 1)
            tensors[f"{self_block}.out_proj.{kind}"] = mine[f"{layer}.self_attention.o_proj.{kind}"]
            tensors[f"{cross_block}.to_qk.{kind}"] = mine[f"{layer}.cross_attention.q_proj.{kind}"]
            tensors[f"{cross_block}.to_v.{kind}"] = mine[f"{layer}.cross_attention.v_proj.{kind}"]
            tensors[f"{cross_block}.to_out.{kind}"] = mine[f"{layer}.cross_attention.o_proj.{kind}"]
            for block, mlp in ((self_block, "self_mlp"), (cross_block, "cross_mlp")):
                for theirs, name in ((0, "fc1"), (1, "layer_norm"), (3, "fc2")):
                    tensors[f"{block}.ffn.{theirs}.{kind}"] = mine[f"{layer}.{mlp}.{name}.{kind}"]
            assignment = f"match_assignment_layers.{i}"
            tensors[f"log_assignment.{i}.final_proj.{kind}"] = mine[f"{assignment}.final_projection.{kind}"]
            tensors[f"log_assignment.{i}.matchability.{kind}"] = mine[f"{assignment}.matchability.{kind}"]
            if i < layers - 1:
                tensors[f"token_confidence.{i}.token.0.{kind}"] = mine[f"token_confidence.{i}.token.{kind}"]
    return tensors


@pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
@pytest.mark.parametrize("input_dim", [64, 128])
@pytest.mark.parametrize(("heads", "layers"), [(4, 5), (2, 3)])
def test_the_authors_file_gives_the_same_network(
    lightglue: Callable[..., LightGlue], tmp_path: Path, heads: int, layers: int, input_dim: int, old: bool
) -> None:
    model = lightglue(num_attention_heads=heads, num_hidden_layers=layers, input_dim=input_dim)
    for layer in model.transformer_layers:
        layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    path = tmp_path / "lightglue.pth"
    torch.save(authors_names(model, old), path)
    loaded = LightGlue.from_pretrained(path)
    inputs = scene(50, 60, size=input_dim)
    expected, found = model(*inputs), loaded(*inputs)
    assert (expected.matches0 >= 0).sum() > 10
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours, theirs)


def test_recording_states_ends_with_its_context_and_does_not_change_the_result(
    lightglue: Callable[..., LightGlue],
) -> None:
    model = lightglue(**ADAPTIVE)
    inputs = scene(60, 50)
    before = model(*inputs)
    with trace(model) as recorded:
        during = model(*inputs)
    count = len(recorded.attentions)
    model(*inputs)
    assert len(recorded.attentions) == count == 4 * int(during.layers)
    assert all(torch.equal(x, y) for x, y in zip(before, during))
    assert recorded.attentions[0].sum(dim=-1).allclose(torch.tensor(1.0))


def test_recording_states_of_a_network_without_attention_is_refused() -> None:
    with pytest.raises(TypeError, match="NearestNeighbour"), trace(NearestNeighbour()):
        pass


@pytest.mark.parametrize("count", [1, 100, 1100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_by_head", [False, True])
def test_self_attention_in_bfloat16_agrees_with_float32(count: int, masked: bool, head_by_head: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(64, heads=4, key_value_heads=2, bias=True).requires_grad_(False)
    attention.head_by_head = head_by_head
    x = torch.randn(2, count, 64).bfloat16().float()  # with 1100 points, a head is processed in two parts
    rotation = torch.polar(torch.ones(2, 1, count, 8), torch.rand(2, 1, count, 8))
    mask = torch.rand(2, count) < 0.7 if masked else None
    if mask is not None:
        mask[:, 0] = True
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        heads = attention.to(dtype).project(x.to(dtype), rotation)
        found.append(attention(heads, heads, mask).float())
    assert found[0].shape == (2, count, 64)
    assert (found[0] - found[1]).abs().max() < 0.02


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_by_head", [False, True])
def test_cross_attention_of_both_images_at_once_agrees_with_each_alone(masked: bool, head_by_head: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(64, heads=4, key_value_heads=4, bias=True).requires_grad_(False)
    attention.head_by_head = head_by_head
    attention.k_proj = attention.q_proj
    attention.q_proj.weight *= 20  # similarities of several hundred, as with trained weights
    attention.to(torch.bfloat16)
    heads = [attention.project(torch.randn(2, count, 64).bfloat16()) for count in (90, 120)]
    masks = [torch.rand(2, heads[i].query.shape[2]) < 0.7 if masked else None for i in range(2)]
    with_both, without = attention.both_ways(*heads, *masks), []
    for i in range(2):
        similarity = heads[i].query.float() @ heads[1 - i].key.float().transpose(-1, -2) / 4
        assert similarity.max() > 300
        mask = masks[1 - i]
        if mask is not None:
            similarity.masked_fill_(~mask[:, None, None], -torch.inf)
        message = similarity.softmax(dim=-1) @ heads[1 - i].value.float()
        without.append(attention.o_proj(message.transpose(1, 2).flatten(-2).bfloat16()))
    for found, expected, mask in zip(with_both, without, masks):
        real = slice(None) if mask is None else mask
        assert (found[real] - expected[real]).abs().max() < 0.02
