"""Tests that SuperPoint finds the same keypoints and descriptors as the reference implementations.

Weights are random; `transformers` saves them and this package loads its folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kpmatch_ros.models import SuperPoint, superpoint, trace
from kpmatch_ros.models.detections import read_out
from kpmatch_ros.models.superpoint import Detections, select_keypoints, suppress_non_maxima
from kpmatch_ros.weights import resolve

Pair = Callable[..., tuple[Any, SuperPoint]]
Found = dict[tuple[int, int], tuple[float, Tensor]]

SIZES = [(120, 160), (163, 117), (64, 72), (97, 203), (240, 320)]  # height, width


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
    small_superpoint: dict[str, Any],
    randomise_superpoint: Callable[[Any, int], None],
) -> Pair:
    """pair(seed, **config) returns `transformers`' SuperPoint and ours with the same random weights."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    def make(seed: int, **config: Any) -> tuple[Any, SuperPoint]:
        theirs = transformers.SuperPointForKeypointDetection(
            transformers.SuperPointConfig(**{**small_superpoint, **config})
        ).eval()
        randomise_superpoint(theirs, seed)
        folder = tmp_path_factory.mktemp("superpoint")
        theirs.save_pretrained(folder)
        return theirs, SuperPoint.from_pretrained(folder)

    return make


@pytest.fixture(scope="module")
def ours(
    small_superpoint: dict[str, Any], randomise_superpoint: Callable[[Any, int], None]
) -> Callable[..., SuperPoint]:
    """ours(**config) returns a SuperPoint with random weights."""

    def make(**config: Any) -> SuperPoint:
        model = SuperPoint(**{**small_superpoint, **config})
        randomise_superpoint(model, 0)
        return model

    return make


def batch(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).float()[:, None] / 255


def run_theirs(model: Any, images: Tensor) -> list[Found]:
    """Return score and descriptor by pixel, for each image."""
    with torch.inference_mode():
        output = model(images.repeat(1, 3, 1, 1))
    size = torch.tensor([images.shape[3], images.shape[2]])
    return [
        {
            tuple((point * size).round().int().tolist()): (score.item(), descriptor)
            for point, score, descriptor in zip(points[mask > 0], scores[mask > 0], descriptors[mask > 0])
        }
        for points, scores, descriptors, mask in zip(output.keypoints, output.scores, output.descriptors, output.mask)
    ]


def as_found(detections: Detections) -> list[Found]:
    return [
        {
            tuple(point.int().tolist()): (score.item(), descriptor)
            for point, score, descriptor in zip(points[mask], scores[mask], descriptors[mask])
        }
        for points, scores, descriptors, mask in zip(
            detections.keypoints, detections.scores, detections.descriptors, detections.mask
        )
    ]


def assert_equal(found: Found, expected: Found, record_difference: Callable[[str, float], None]) -> None:
    assert found.keys() == expected.keys()
    scores = max(abs(found[point][0] - expected[point][0]) for point in expected)
    descriptors = max(float((found[point][1] - expected[point][1]).abs().max()) for point in expected)
    record_difference("SuperPoint, scores", scores)
    record_difference("SuperPoint, descriptors", descriptors)
    assert scores < 1e-4
    assert descriptors < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_finds_and_describes_the_keypoints_that_transformers_does(
    pair: Pair, texture: Any, record_difference: Any, height: int, width: int, seed: int
) -> None:
    theirs, ours = pair(seed)
    image = batch(texture(height, width, 10 + seed))
    (expected,) = run_theirs(theirs, image)
    (found,) = as_found(ours(image))
    assert len(expected) > height * width / 100
    assert np.ptp([score for score, _ in expected.values()]) > 0.5
    assert_equal(found, expected, record_difference)


def test_the_fast_weights_give_the_same_keypoints_and_descriptors_as_in_transformers(
    texture: Any, record_difference: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = resolve("superpoint-open-fast")
    theirs = transformers.LightGlueForKeypointMatching.from_pretrained(folder, dtype=torch.float32).keypoint_detector
    theirs.eval().keypoint_decoder.border_removal_distance = 0  # it defines borders differently
    options = {"border_removal_distance": 0, "subpixel": False}  # theirs finds whole pixels only
    ours = SuperPoint.from_pretrained("superpoint-open-fast", **options)
    image = batch(texture(240, 320, 3))
    (expected,) = run_theirs(theirs, image)
    (found,) = as_found(ours(image))
    assert len(expected) > 200
    assert_equal(found, expected, record_difference)


def test_hidden_states_are_those_of_transformers(pair: Pair, texture: Any, record_difference: Any) -> None:
    theirs, ours = pair(0)
    images = batch(texture(64, 72, 1), texture(64, 72, 2))
    with torch.inference_mode():
        expected = theirs(images.repeat(1, 3, 1, 1), output_hidden_states=True).hidden_states
    with trace(ours) as recorded:
        ours(images)
    assert len(recorded.hidden_states) == len(expected) == 4 and not recorded.attentions
    for mine, reference in zip(recorded.hidden_states, expected):
        difference = float((mine - reference).abs().max())
        record_difference("SuperPoint, hidden states", difference)
        assert difference < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"max_keypoints": 50},
        {"max_keypoints": 0},
        {"nms_radius": 0},
        {"nms_radius": 1},
        {"nms_radius": 9},
        {"keypoint_threshold": 0.5},
        {"descriptor_decoder_dim": 128},
        {"encoder_hidden_sizes": [8, 24, 16, 40], "decoder_hidden_size": 48},
        {"encoder_hidden_sizes": [64, 64, 128, 128], "decoder_hidden_size": 256, "descriptor_decoder_dim": 256},
    ],
    ids=str,
)
def test_follows_every_option_of_the_configuration_as_transformers_does(
    pair: Pair, texture: Any, record_difference: Any, config: dict[str, Any]
) -> None:
    theirs, ours = pair(2, **config)
    image = batch(texture(97, 123, 12))
    (expected,) = run_theirs(theirs, image)
    (found,) = as_found(ours(image))
    if config.get("max_keypoints") == 0:
        assert expected == found == {}
    else:
        assert_equal(found, expected, record_difference)


def test_removes_keypoints_at_all_four_borders(pair: Pair, texture: Any, record_difference: Any) -> None:
    # At the right and bottom, transformers removes keypoints only at a distance that is 8 times further out.
    theirs, ours = pair(3, border_removal_distance=7)
    image = batch(texture(97, 123, 13))
    (expected,) = run_theirs(theirs, image)
    inside = {(x, y): what for (x, y), what in expected.items() if x < 120 - 7 and y < 96 - 7}
    assert 0 < len(inside) < len(expected)
    (found,) = as_found(ours(image))
    assert_equal(found, inside, record_difference)


def test_a_border_wider_than_the_image_leaves_no_keypoints(ours: Callable[..., SuperPoint], texture: Any) -> None:
    assert ours(border_removal_distance=500)(batch(texture(40, 48, 0))).keypoints.shape == (1, 0, 2)


def test_images_of_a_batch_give_what_each_gives_alone(pair: Pair, texture: Any, record_difference: Any) -> None:
    theirs, ours = pair(4, keypoint_threshold=0.6)
    images = batch(texture(96, 128, 1), texture(96, 128, 2) // 2, texture(96, 128, 3) // 8)
    detections = ours(images)
    together = as_found(detections)
    assert len({len(found) for found in together}) == 3
    for i, (found, expected) in enumerate(zip(together, run_theirs(theirs, images))):
        (alone,) = as_found(ours(images[i : i + 1]))
        assert_equal(found, alone, record_difference)
        assert_equal(found, expected, record_difference)
    assert not detections.scores[~detections.mask].any()
    assert not detections.keypoints[~detections.mask].any()


def test_an_image_without_keypoints_may_share_a_batch_with_one_that_has_some(
    ours: Callable[..., SuperPoint], texture: Any
) -> None:
    model, images = ours(), batch(np.full((96, 128), 128, np.uint8), texture(96, 128, 5))
    model.keypoint_threshold = float(model(images[:1]).scores.max()) + 1e-4
    none, some = as_found(model(images))
    assert len(none) == 0
    assert len(some) > 0


@pytest.mark.parametrize("count", [0, 1])
def test_zero_or_one_keypoint_is_found_as_in_transformers(
    pair: Pair, texture: Any, record_difference: Any, count: int
) -> None:
    theirs, ours = pair(0)
    image = batch(texture(96, 128, 6))
    scores = sorted((score for score, _ in run_theirs(theirs, image)[0].values()), reverse=True)
    threshold = (1.0, *scores)[count] if count == 0 else (scores[0] + scores[1]) / 2
    theirs.keypoint_decoder.keypoint_threshold = ours.keypoint_threshold = threshold
    (expected,) = run_theirs(theirs, image)
    detections = ours(image)
    assert len(expected) == count
    assert detections.descriptors.shape == (1, count, 64)
    if count:
        assert_equal(as_found(detections)[0], expected, record_difference)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 900), (900, 7)])
def test_an_image_smaller_than_a_cell_has_no_keypoints(
    ours: Callable[..., SuperPoint], height: int, width: int
) -> None:
    detections = ours()(torch.rand(2, 1, height, width))
    assert [tuple(field.shape) for field in detections] == [(2, 0, 2), (2, 0), (2, 0, 64), (2, 0), (2,)]


def test_an_image_of_one_cell_can_have_keypoints(ours: Callable[..., SuperPoint], texture: Any) -> None:
    detections = ours(keypoint_threshold=0.0)(batch(texture(8, 8, 0)))
    assert detections.keypoints.shape[1] > 0
    assert detections.keypoints.max() < 8
    assert detections.descriptors.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(64, 80), (57, 40), (97, 75), (131, 64)])
def test_an_image_processed_in_bands_gives_the_same_features_as_a_whole(
    ours: Callable[..., SuperPoint], texture: Any, monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    model, images = ours(), batch(texture(height, width, 1), texture(height, width, 2))
    expected = model.encoder(images)
    monkeypatch.setattr(superpoint, "BAND", 1)
    shapes: list[torch.Size] = []
    model.encoder.conv_blocks[0].conv_b.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    assert torch.allclose(model.encoder(images), expected, rtol=0, atol=1e-5)
    assert len(shapes) >= height // 8
    assert all(shape[2] <= 13 for shape in shapes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("round_up", [False, True])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 72), (64, 8), (97, 75)])
def test_descriptors_computed_at_keypoints_equal_those_sampled_from_the_whole_map(
    ours: Callable[..., SuperPoint],
    monkeypatch: pytest.MonkeyPatch,
    layout: Any,
    round_up: bool,
    height: int,
    width: int,
) -> None:
    monkeypatch.setattr(superpoint, "WINDOWS", 50)  # more cells than this are processed in parts
    model = ours().to(memory_format=layout)
    features = torch.randn(2, model.encoder.conv_blocks[-1].channels, height // 8, width // 8).to(memory_format=layout)
    size = torch.tensor([width // 8 * 8 - 1.0, height // 8 * 8 - 1.0])
    keypoints = torch.rand(2, 30, 2) * size
    keypoints[:, 0], keypoints[:, 1] = 0, size  # the far corners, beyond the centres of the outermost cells
    expected = superpoint.sample_descriptors(model.descriptor_decoder(features), keypoints)
    found = model.descriptor_decoder.at(features, keypoints, round_up)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_pooling_by_comparison_equals_ordinary_pooling(ours: Callable[..., SuperPoint], texture: Any) -> None:
    model, images = ours(), batch(texture(97, 75, 1), texture(97, 75, 2))
    found = model.encoder(images)
    for block in model.encoder.conv_blocks:
        block.in_bands = False
    assert torch.equal(found, model.encoder(images))


@pytest.mark.parametrize("pooling", [True, False])
def test_the_first_convolution_in_bfloat16_is_as_accurate_as_the_rounded_float32_result(
    texture: Any, monkeypatch: pytest.MonkeyPatch, pooling: bool
) -> None:
    torch.manual_seed(0)
    block = superpoint.ConvBlock(1, 16, pooling).eval().requires_grad_(False)
    block.conv_b.to(torch.bfloat16)
    image = batch(texture(97, 75, 1), texture(97, 75, 2)) + 3.0  # far from zero, where bfloat16 has steps of 0.016
    precise = block.conv_a(image)
    found = superpoint.PartsConvolution(block.conv_a)(superpoint.in_parts(image))
    # Each value is the nearest bfloat16 number, or almost: the borders are not less accurate.
    assert found.dtype == torch.bfloat16
    error = (found.float() - precise).abs()
    assert (error <= precise.abs() * 2**-8 + 1e-4).all()
    assert (error[:, :, [0, -1]] <= precise.abs()[:, :, [0, -1]] * 2**-8 + 1e-4).all()
    in_one, rounded = block(image), block.conv_a.weight.bfloat16().float()
    monkeypatch.setattr(superpoint, "BAND", 1)
    assert torch.equal(block(image), in_one)
    coarse = torch.nn.functional.conv2d(image.bfloat16().float(), rounded, block.conv_a.bias, padding=1)
    assert (coarse - precise).abs().mean() > 4 * (found.float() - precise.bfloat16().float()).abs().mean()


def test_training_in_bfloat16_stays_in_bfloat16_between_convolutions() -> None:
    block = superpoint.ConvBlock(1, 16, pooling=True).train()
    seen: list[torch.dtype] = []
    block.conv_b.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = block(torch.rand(1, 1, 32, 32))
    found.float().sum().backward()
    assert seen == [torch.bfloat16] and found.dtype == torch.bfloat16
    assert block.conv_a.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relu_sets_negative_values_to_zero_in_every_precision(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([-torch.inf, -3.0, -tiny, -0.0, 0.0, tiny, 3.0, torch.inf], dtype=dtype)
    expected = torch.tensor([0, 0, 0, 0, 0, tiny, 3.0, torch.inf], dtype=dtype)
    assert torch.equal(superpoint.relu_(values), expected)
    assert torch.equal(values, expected)


def test_keypoints_come_best_first_and_the_best_are_kept(ours: Callable[..., SuperPoint], texture: Any) -> None:
    model, image = ours(), batch(texture(96, 128, 7))
    everything = model(image)
    model.max_keypoints = 20
    best = model(image)
    assert everything.keypoints.shape[1] > 40
    assert (everything.scores.diff() <= 0).all()
    assert best.keypoints.shape[1] == 20
    assert torch.equal(best.keypoints, everything.keypoints[:, :20])
    assert torch.equal(best.descriptors, everything.descriptors[:, :20])


def test_descriptors_have_unit_length(ours: Callable[..., SuperPoint], texture: Any) -> None:
    detections = ours()(batch(texture(96, 128, 8)))
    assert torch.allclose(detections.descriptors.norm(dim=-1), torch.ones(1), atol=1e-5)


def test_shifting_a_picture_by_whole_cells_shifts_its_keypoints(ours: Callable[..., SuperPoint], texture: Any) -> None:
    model, picture = ours(), texture(200, 200, 9)
    (first,) = as_found(model(batch(picture[:192, :176])))
    (second,) = as_found(model(batch(picture[8:200, 16:192])))
    inside = {(x, y) for x, y in first if 70 <= x < 120 and 62 <= y < 130}  # not influenced by the borders
    assert len(inside) > 10
    for x, y in inside:
        assert second[x - 16, y - 8][0] == pytest.approx(first[x, y][0], abs=1e-4)


@pytest.mark.parametrize("radius", [1, 3, 4])
def test_suppression_keeps_local_maxima_that_are_further_apart_than_the_radius(radius: int) -> None:
    scores = torch.rand(2, 50, 70, generator=torch.Generator().manual_seed(radius))
    kept = suppress_non_maxima(scores.clone(), radius)
    for image, result in zip(scores, kept):
        points = result.nonzero()
        distance = (points[:, None] - points[None]).abs().amax(dim=-1).fill_diagonal_(99)
        assert distance.min() > radius
        y, x = divmod(int(image.argmax()), 70)
        assert result[y, x] == image[y, x]
        assert torch.equal(result[result > 0], image[result > 0])


def test_selection_does_not_change_the_scores_even_without_suppression(
    ours: Callable[..., SuperPoint], texture: Any
) -> None:
    model = ours(nms_radius=0)
    scores, descriptors = model.dense(batch(texture(96, 128, 8)))
    allowed = torch.ones(1, 96, 128, dtype=torch.bool)
    allowed[:, :, 64:] = False
    before = scores.clone()
    assert model.select(scores, descriptors, allowed).mask.any()
    assert torch.equal(scores, before)


def test_a_point_suppressed_only_by_a_suppressed_neighbour_is_kept() -> None:
    scores = torch.zeros(1, 1, 20)
    scores[0, 0, [5, 8, 11]] = torch.tensor([0.9, 0.8, 0.7])
    assert suppress_non_maxima(scores, 4).nonzero()[:, 2].tolist() == [5, 11]


def test_selection_gives_x_before_y_and_only_scores_above_the_threshold() -> None:
    scores = torch.zeros(2, 6, 9)
    scores[0, 2, 7], scores[0, 5, 1], scores[0, 0, 0] = 0.75, 0.875, 0.25
    scores[1, 1, 3], scores[1, 4, 4] = 0.5, 0.25
    keypoints, best, mask = select_keypoints(scores, 0.25, -1)
    assert keypoints.tolist() == [[[1, 5], [7, 2]], [[3, 1], [0, 0]]]
    assert best.tolist() == [[0.875, 0.75], [0.5, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_most_keypoints_and_returns_float32(
    ours: Callable[..., SuperPoint], texture: Any, dtype: torch.dtype
) -> None:
    model, image = ours(max_keypoints=150), batch(texture(120, 160, 3))
    (expected,) = as_found(model(image))
    detections = model.to(dtype)(image)
    (found,) = as_found(detections)
    assert detections.scores.dtype == detections.keypoints.dtype == detections.descriptors.dtype == torch.float32
    assert len(found.keys() & expected.keys()) > (0.8 if dtype == torch.bfloat16 else 0.95) * len(expected)


def authors_names(model: SuperPoint) -> dict[str, Tensor]:
    """Return the tensors with the names in Magic Leap's superpoint_v1.pth."""
    heads = {"score_a": "Pa", "score_b": "Pb", "descriptor_a": "Da", "descriptor_b": "Db"}
    tensors = {}
    for name, tensor in model.state_dict().items():
        *_, layer, kind = name.split(".")
        if name.startswith("encoder"):
            tensors[f"conv{int(name.split('.')[2]) + 1}{layer[-1]}.{kind}"] = tensor
        else:
            tensors[f"conv{heads[layer.removeprefix('conv_')]}.{kind}"] = tensor
    return tensors


@pytest.mark.parametrize("descriptor_size", [64, 256])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_file_gives_the_same_network(
    ours: Callable[..., SuperPoint], texture: Any, tmp_path: Path, descriptor_size: int, wrapped: bool
) -> None:
    model = ours(descriptor_decoder_dim=descriptor_size)
    tensors = authors_names(model)
    assert {"conv1a.weight", "conv4b.bias", "convPa.weight", "convPb.bias", "convDa.weight", "convDb.bias"} <= set(
        tensors
    )
    path = tmp_path / "superpoint_v1.pth"
    torch.save({"model": tensors} if wrapped else tensors, path)
    loaded = SuperPoint.from_pretrained(path, keypoint_threshold=0.1, border_removal_distance=0)
    image = batch(texture(96, 128, 1))
    for found, expected in zip(loaded(image), model(image)):
        assert torch.equal(found, expected)


def test_the_authors_file_is_loaded_with_the_authors_settings(ours: Callable[..., SuperPoint], tmp_path: Path) -> None:
    path = tmp_path / "superpoint_v1.pth"
    torch.save(authors_names(ours()), path)
    loaded = SuperPoint.from_pretrained(path)
    assert (loaded.keypoint_threshold, loaded.nms_radius, loaded.border, loaded.max_keypoints) == (0.005, 4, 4, -1)


def test_read_out_locates_keypoints_with_subpixel_precision() -> None:
    true = torch.tensor([[[10.3, 20.6], [30.0, 8.45]]])
    x, y = torch.meshgrid(torch.arange(48.0), torch.arange(32.0), indexing="xy")
    squared = (x - true[0, :, 0, None, None]).square() + (y - true[0, :, 1, None, None]).square()
    scores = (-squared / (2 * 0.6**2)).exp().sum(dim=0)[None]
    assert torch.allclose(read_out(scores, true.round()), true, atol=0.05)
    at_the_corner = torch.tensor([[[0.0, 0.0]]])
    assert read_out(scores, at_the_corner).isfinite().all()


def test_subpixel_moves_keypoints_by_at_most_two_pixels_and_keeps_their_scores(
    small_superpoint: dict[str, Any], randomise_superpoint: Any, texture: Any
) -> None:
    image = torch.from_numpy(texture(120, 160, 3))[None, None].float() / 255
    model = SuperPoint(**small_superpoint)
    randomise_superpoint(model, 0)
    whole = model(image)
    model.subpixel = True
    fractions = model(image)
    assert torch.equal(whole.scores, fractions.scores)
    assert torch.equal(whole.mask, fractions.mask)
    moved = (fractions.keypoints - whole.keypoints).abs()
    assert 0 < moved.max() <= 2
    assert fractions.keypoints[whole.mask].frac().any()
