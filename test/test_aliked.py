"""Tests that ALIKED computes what its paper and its authors' files define, with random and with real weights.

The reference implementation in this file is dense: batch norms, deformable convolutions by definition, and the
features of all pixels. Real weights are read from the folder in KPMATCH_TEST_WEIGHTS (``aliked-n16.pth``,
``aliked_lightglue.pth`` and so on). `kornia` is a second reference if it is installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models.aliked import ALIKED, DeformableConv, FeatureMap, refine
from kpmatch_ros.models.superpoint import Detections, suppress_non_maxima
from kpmatch_ros.weights import WeightsError

Tensors = dict[str, Tensor]
Ours = Callable[..., ALIKED]

CHANNELS, DIM, SAMPLES = [4, 8, 8, 16], 16, 5


# The reference


def bilinear(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sample a map x (C, H, W) at points, and return (C, ...). The map is zero outside."""
    total = torch.zeros(())
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        r, c = rows.floor() + row, columns.floor() + column
        inside = (r >= 0) & (r < x.shape[1]) & (c >= 0) & (c < x.shape[2])
        weight = (1 - (rows - r).abs()) * (1 - (columns - c).abs()) * inside
        total = total + x[:, r.clamp(0, x.shape[1] - 1).long(), c.clamp(0, x.shape[2] - 1).long()] * weight
    return total


def deformable_convolution(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Convolve x (C, H, W) by definition: tap k is moved by ``offsets[2 k]`` rows and ``offsets[2 k + 1]`` columns."""
    rows, columns = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(x.shape[2]), indexing="ij")
    total = torch.zeros(())
    for k in range(9):
        samples = bilinear(x, rows + k // 3 - 1 + offsets[2 * k], columns + k % 3 - 1 + offsets[2 * k + 1])
        total = total + torch.einsum("oc,chw->ohw", weight[:, :, k // 3, k % 3], samples)
    return total


def dense_maps(tensors: Tensors, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return score logits (H, W) and unit features (C, H, W) of all pixels of an image (3, H, W)."""
    rows, columns = (-size % 32 for size in image.shape[1:])
    top, left = rows // 2, columns // 2
    x = F.pad(image[None], (left, columns - left, top, rows - top), mode="replicate")

    def convolution(x: Tensor, block: int, layer: int) -> Tensor:
        name = f"block{block}.conv{layer}"
        if block < 3:
            y = F.conv2d(x, tensors[f"{name}.weight"], padding=1)
        else:
            furthest = max(x.shape[-2:]) / 4
            offsets = F.conv2d(x, tensors[f"{name}.offset_conv.weight"], tensors[f"{name}.offset_conv.bias"], padding=1)
            weight = tensors[f"{name}.regular_conv.weight"]
            y = deformable_convolution(x[0], offsets[0].clamp(-furthest, furthest), weight)[None]
        norm = [tensors[f"block{block}.bn{layer}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(y, *norm)

    levels = []
    for block in (1, 2, 3, 4):
        x = x if block == 1 else F.avg_pool2d(x, 2 if block == 2 else 4)
        y = convolution(F.selu(convolution(x, block, 1)), block, 2)
        if block > 1:
            y = y + F.conv2d(x, tensors[f"block{block}.downsample.weight"], tensors[f"block{block}.downsample.bias"])
        x = F.selu(y)
        level = F.selu(F.conv2d(x, tensors[f"conv{block}.weight"]))
        levels.append(F.interpolate(level, scale_factor=[1, 2, 8, 32][block - 1], mode="bilinear", align_corners=True))
    features = torch.cat(levels, dim=1)
    logits = F.conv2d(features, tensors["score_head.0.weight"])
    for i in (2, 4, 6):
        logits = F.conv2d(F.selu(logits), tensors[f"score_head.{i}.weight"], padding=1)
    crop = np.s_[..., top : top + image.shape[1], left : left + image.shape[2]]
    return logits[0, 0][crop], F.normalize(features, dim=1)[0][crop]


def refined(scores: Tensor, row: int, column: int) -> tuple[float, float]:
    """Return the centre x, y of a 5 x 5 window, weighted by exp(score / 0.1)."""
    window = F.pad(scores, (2, 2, 2, 2))[row : row + 5, column : column + 5].double()
    weights = torch.exp(window / 0.1)
    steps = torch.arange(-2, 3)
    return (
        column + float((weights * steps[None]).sum() / weights.sum()),
        row + float((weights * steps[:, None]).sum() / weights.sum()),
    )


def description(tensors: Tensors, features: Tensor, x: float, y: float) -> Tensor:
    """Return the descriptor of a keypoint."""
    height, width = features.shape[1:]
    top, left = (min(max(math.floor(at) - 1, 0), size - 4) for at, size in ((y, height), (x, width)))
    patch = features[None, :, top : top + 3, left : left + 3]
    hidden = F.conv2d(patch, tensors["desc_head.offset_conv.0.weight"], tensors["desc_head.offset_conv.0.bias"])
    offsets = F.conv2d(
        F.selu(hidden), tensors["desc_head.offset_conv.2.weight"], tensors["desc_head.offset_conv.2.bias"]
    )
    offset_x, offset_y = offsets.flatten().clamp(-max(height, width) / 4, max(height, width) / 4).view(2, -1)
    sampled = F.selu(tensors["desc_head.sf_conv.weight"][:, :, 0, 0] @ bilinear(features, y + offset_y, x + offset_x))
    return F.normalize(torch.einsum("cm,mcd->d", sampled, tensors["desc_head.agg_weights"]), dim=0)


def reference(
    tensors: Tensors, image: Tensor, threshold: float, border: int
) -> list[tuple[float, float, float, Tensor]]:
    """Return x, y, score and descriptor of all keypoints of an image (3, H, W)."""
    logits, features = dense_maps(tensors, image)
    scores = logits.sigmoid()
    peaks = suppress_non_maxima(scores[None], 2)[0]
    keypoints = []
    for row, column in (peaks > threshold).nonzero().tolist():
        if border <= row < image.shape[1] - border and border <= column < image.shape[2] - border:
            x, y = refined(scores, row, column)
            score = float(bilinear(scores[None], torch.tensor(y), torch.tensor(x)))
            keypoints.append((x, y, score, description(tensors, features, x, y)))
    return keypoints


# Weights


def random_tensors(seed: int, picture: Tensor) -> Tensors:
    """Return tensors named as in the authors' files, scaled so that scores and positions vary over the picture."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}

    def add(name: str, *shape: int, gain: float = 1.0) -> None:
        tensors[name] = torch.randn(shape, generator=generator) * gain / math.sqrt(math.prod(shape[1:]))

    def add_norm(name: str, channels: int) -> None:
        tensors[f"{name}.running_mean"] = torch.randn(channels, generator=generator) * 0.2
        tensors[f"{name}.running_var"] = torch.rand(channels, generator=generator) + 0.5
        tensors[f"{name}.weight"] = torch.rand(channels, generator=generator) + 0.5
        tensors[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.2
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    inputs = [3, *CHANNELS]
    for block in (1, 2, 3, 4):
        for layer, channels in ((1, inputs[block - 1]), (2, inputs[block])):
            name = f"block{block}.conv{layer}"
            if block < 3:
                add(f"{name}.weight", inputs[block], channels, 3, 3)
            else:
                add(f"{name}.regular_conv.weight", inputs[block], channels, 3, 3)
                add(f"{name}.offset_conv.weight", 18, channels, 3, 3, gain=2.0)
                add(f"{name}.offset_conv.bias", 18)
            add_norm(f"block{block}.bn{layer}", inputs[block])
        if block > 1:
            add(f"block{block}.downsample.weight", inputs[block], inputs[block - 1], 1, 1)
            add(f"block{block}.downsample.bias", inputs[block], gain=0.2)
        add(f"conv{block}.weight", DIM // 4, inputs[block], 1, 1)
    for i, outputs, channels, size in ((0, 8, DIM, 1), (2, 4, 8, 3), (4, 4, 4, 3), (6, 1, 4, 3)):
        add(f"score_head.{i}.weight", outputs, channels, size, size)
    tensors["desc_head.agg_weights"] = torch.randn(SAMPLES, DIM, DIM, generator=generator)
    add("desc_head.offset_conv.0.weight", 2 * SAMPLES, DIM, 3, 3, gain=6.0)
    add("desc_head.offset_conv.0.bias", 2 * SAMPLES)
    add("desc_head.offset_conv.2.weight", 2 * SAMPLES, 2 * SAMPLES, 1, 1, gain=4.0)
    add("desc_head.offset_conv.2.bias", 2 * SAMPLES)
    add("desc_head.sf_conv.weight", DIM, DIM, 1, 1, gain=3.0)
    # The last layer is linear without a bias: a combination of two random layers gives logits of mean 0 and spread 2.
    mean = dense_maps(tensors, picture)[0].mean()
    other = torch.randn(1, 4, 3, 3, generator=generator)
    other_mean = dense_maps({**tensors, "score_head.6.weight": other}, picture)[0].mean()
    tensors["score_head.6.weight"] -= mean / other_mean * other
    tensors["score_head.6.weight"] *= 2 / dense_maps(tensors, picture)[0].std()
    return tensors


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, picture: Callable[..., Tensor]) -> Ours:
    """ours(seed=0, **options) returns an ALIKED with random weights, loaded from a file in the authors' format."""

    def make(seed: int = 0, **options: Any) -> ALIKED:
        path = tmp_path_factory.mktemp("aliked") / "aliked.pth"
        torch.save(random_tensors(seed, picture(64, 96, seed)), path)
        return ALIKED.from_pretrained(path, **{"keypoint_threshold": 0.6, **options})

    return make


# The network


@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 83), (32, 37), (12, 70), (8, 8)])
@pytest.mark.parametrize(("seed", "border"), [(0, 2), (1, 0), (2, 1)])
def test_keypoints_and_descriptors_equal_the_dense_reference(
    picture: Callable[..., Tensor], ours: Ours, seed: int, border: int, height: int, width: int
) -> None:
    image = picture(height, width, seed + 5)
    threshold = 0.6 if height * width > 1000 else 0.02
    expected = reference(random_tensors(seed, picture(64, 96, seed)), image, threshold, border)
    found = ours(seed, keypoint_threshold=threshold, border_removal_distance=border)(image[None])
    assert len(expected) > (15 if height * width > 1000 else 0)
    assert found.keypoints.shape[:2] == (1, len(expected)) and found.mask.all()
    for x, y, score, descriptor in expected:
        distance, nearest = (found.keypoints[0] - torch.tensor([x, y])).norm(dim=1).min(dim=0)
        assert distance < 1e-3
        assert float(found.scores[0, nearest]) == pytest.approx(score, abs=1e-4)
        assert torch.allclose(found.descriptors[0, nearest], descriptor, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(7, 9), (1, 5), (4, 1), (15, 20)])
def test_a_deformable_convolution_follows_its_definition(height: int, width: int) -> None:
    torch.manual_seed(0)
    conv = DeformableConv(3, 4).requires_grad_(False)
    conv.conv.bias.zero_()
    conv.offset_conv.weight.mul_(5)  # offsets of several pixels, many of them beyond the border
    x = torch.randn(2, 3, height, width)
    furthest = max(height, width) / 4
    offsets = conv.offset_conv(x).clamp(-furthest, furthest)
    expected = torch.stack([deformable_convolution(*each, conv.conv.weight) for each in zip(x, offsets)])
    assert offsets.abs().max() > min(1, furthest / 2)
    assert torch.allclose(conv(x), expected, atol=1e-4)


def test_a_deformable_convolution_without_offsets_is_a_convolution() -> None:
    torch.manual_seed(0)
    conv = DeformableConv(3, 4).requires_grad_(False)
    conv.offset_conv.weight.zero_()
    conv.offset_conv.bias.zero_()
    x = torch.randn(1, 3, 9, 11)
    assert torch.allclose(conv(x), conv.conv(x), atol=1e-5)


def test_sampled_features_equal_those_of_the_full_feature_map() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(2, 3, 64 // stride, 96 // stride) for stride in (1, 2, 8, 32)]
    whole = [F.interpolate(level, (64, 96), mode="bilinear", align_corners=True) for level in levels]
    crop = F.normalize(torch.cat(whole, dim=1), dim=1)[:, :, 2:62, 5:90]
    features = FeatureMap(levels, (5, 2), width=85, height=60)
    pixels = torch.stack([torch.randint(0, 85, (2, 50)), torch.randint(0, 60, (2, 50))], dim=-1).float()
    for i in range(2):
        x, y = pixels[i].long().T
        assert torch.allclose(features.at(pixels)[i], crop[i, :, y, x].T, atol=1e-4)
    positions = torch.rand(2, 200, 2) * torch.tensor([110.0, 80.0]) - 12  # some positions lie outside of the image
    sampled = features.between(positions)
    for i in range(2):
        x, y = positions[i].T
        assert torch.allclose(sampled[i], bilinear(crop[i], y, x).T, atol=1e-4)


def test_refinement_finds_the_centre_of_a_blob() -> None:
    rows, columns = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    scores = torch.exp(-((rows - 9.3) ** 2 + (columns - 14.6) ** 2) / 4)
    keypoints, found = refine(scores[None], torch.tensor([[[15.0, 9.0]]]), 2)
    assert keypoints[0, 0].tolist() == pytest.approx([14.6, 9.3], abs=0.1)
    sampled = bilinear(scores[None], keypoints[0, :, 1], keypoints[0, :, 0])
    assert float(found) == pytest.approx(float(sampled), abs=1e-5)


def test_a_batch_gives_the_same_keypoints_as_its_images_one_by_one(ours: Ours, picture: Callable[..., Tensor]) -> None:
    model = ours()
    images = torch.stack([picture(64, 96, 1), picture(64, 96, 2), torch.zeros(3, 64, 96)])
    together = model(images)
    counts = together.mask.sum(dim=1).tolist()
    assert counts[0] != counts[1]
    for i, image in enumerate(images):
        alone = model(image[None])
        assert alone.mask.sum() == counts[i]
        for field in ("keypoints", "scores", "descriptors"):
            mine, theirs = getattr(together, field)[i][together.mask[i]], getattr(alone, field)[0]
            assert torch.allclose(mine, theirs, atol=1e-3)
        assert (together.scores[i][~together.mask[i]] == 0).all()


def test_a_grey_image_gives_the_same_result_as_three_equal_channels(ours: Ours, picture: Callable[..., Tensor]) -> None:
    grey = picture(64, 96)[None, :1]
    model = ours()
    for one, three in zip(model(grey), model(grey.repeat(1, 3, 1, 1))):
        assert torch.equal(one, three)
    assert not torch.equal(model(grey).keypoints, model(picture(64, 96)[None]).keypoints)


def test_keypoints_are_sorted_by_score_and_the_best_are_kept(ours: Ours, picture: Callable[..., Tensor]) -> None:
    image = picture(64, 96)[None]
    every, few = ours()(image), ours(max_keypoints=10)(image)
    assert (every.scores[0].diff() <= 0).all()
    assert few.keypoints.shape == (1, 10, 2)
    assert {tuple(point) for point in few.keypoints[0].tolist()} <= {tuple(p) for p in every.keypoints[0].tolist()}
    assert few.scores[0, 0] == every.scores[0, 0]


def test_the_nms_radius_the_border_and_the_threshold_are_respected(ours: Ours, picture: Callable[..., Tensor]) -> None:
    image = picture(64, 96)[None]
    usual = ours()(image)
    sparse = ours(nms_radius=6, refinement_radius=0)(image).keypoints[0]
    assert 1 < len(sparse) < usual.mask.sum()
    gaps = (sparse[:, None] - sparse[None]).abs().amax(dim=-1) + 100 * torch.eye(len(sparse))
    assert gaps.min() > 6
    inner = ours(border_removal_distance=20, refinement_radius=0)(image).keypoints[0]
    assert len(inner) > 0 and inner.min() >= 20 and (inner <= torch.tensor([75, 43])).all()
    assert 0 < ours(keypoint_threshold=0.8)(image).mask.sum() < usual.mask.sum()


@pytest.mark.parametrize("border", [4, 10])
def test_refinement_moves_no_keypoint_into_the_border(ours: Ours, picture: Callable[..., Tensor], border: int) -> None:
    model = ours(keypoint_threshold=0.02)
    model.nms_radius, model.border = 0, border  # every pixel is a keypoint, and some move outwards
    keypoints = model(picture(64, 96)[None]).keypoints[0]
    assert keypoints.min() == border and (keypoints <= torch.tensor([95.0, 63.0]) - border).all()


def test_without_refinement_keypoints_lie_on_whole_pixels(ours: Ours, picture: Callable[..., Tensor]) -> None:
    image = picture(64, 96)[None]
    whole, refined_points = (ours(refinement_radius=r)(image).keypoints for r in (0, 2))
    assert torch.equal(whole, whole.round())
    assert not torch.equal(refined_points, refined_points.round())


@pytest.mark.parametrize("shape", [(1, 3, 7, 40), (2, 3, 40, 1), (1, 1, 0, 0)])
def test_an_image_that_is_too_small_has_no_keypoints(ours: Ours, shape: tuple[int, ...]) -> None:
    assert_nothing_found(ours()(torch.rand(shape)), shape[0])


def test_the_descriptor_head_accepts_zero_keypoints(ours: Ours) -> None:
    model = ours()
    levels = model.encoder(torch.rand(2, 3, 64, 96))
    described = model.descriptor_head(FeatureMap(levels, (0, 0), 96, 64), torch.zeros(2, 0, 2))
    assert described.shape == (2, 0, model.descriptor_size)


def test_a_batch_without_keypoints_gives_empty_tensors(ours: Ours, picture: Callable[..., Tensor]) -> None:
    assert_nothing_found(ours(keypoint_threshold=1.0)(picture(64, 96)[None].repeat(2, 1, 1, 1)), 2)


def assert_nothing_found(found: Detections, batch: int) -> None:
    assert [tuple(each.shape) for each in found] == [(batch, 0, 2), (batch, 0), (batch, 0, DIM), (batch, 0), (batch,)]


def test_half_precision_finds_most_keypoints_and_returns_float32(ours: Ours, picture: Callable[..., Tensor]) -> None:
    model, image = ours(max_keypoints=60), picture(64, 96)[None]
    single = model(image)
    found = model.to(torch.bfloat16)(image)
    assert found.scores.dtype == found.keypoints.dtype == found.descriptors.dtype == torch.float32
    distances = torch.cdist(single.keypoints[0], found.keypoints[0]).min(dim=1).values
    assert (distances < 1).float().mean() > 0.8


# Files


def test_saved_weights_load_again(ours: Ours, picture: Callable[..., Tensor], tmp_path: Path) -> None:
    model, image = ours(), picture(64, 96)[None]
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**model.config, "model_type": "aliked"}))
    for before, after in zip(model(image), ALIKED.from_pretrained(tmp_path)(image)):
        assert torch.equal(before, after)


def test_a_file_that_lacks_tensors_or_is_another_network_is_refused(
    tmp_path: Path, picture: Callable[..., Tensor], random_folder: Callable[..., Path]
) -> None:
    tensors = random_tensors(0, picture(64, 96))
    del tensors["block3.bn2.running_var"]
    torch.save(tensors, tmp_path / "aliked.pth")
    with pytest.raises(WeightsError, match=r"aliked\.pth.*block3\.bn2\.running_var"):
        ALIKED.from_pretrained(tmp_path / "aliked.pth")
    with pytest.raises(WeightsError, match=r"holds a lightglue, not an? aliked"):
        ALIKED.from_pretrained(random_folder())


# Real weights and other implementations


def test_real_weights_find_the_same_keypoints_as_kornia(
    fetched: Callable[[str], Path], picture: Callable[..., Tensor]
) -> None:
    feature = pytest.importorskip("kornia.feature")
    theirs = feature.ALIKED(model_name="aliked-n16", detection_threshold=0.05).eval()
    stored = torch.load(fetched("aliked-n16"), map_location="cpu", weights_only=True)
    theirs.load_state_dict(stored, strict=False)  # the file lacks a constant
    ours = ALIKED.from_pretrained("aliked-n16", keypoint_threshold=0.05)
    image = picture(203, 317)[None]
    with torch.inference_mode():
        (expected,) = theirs(image)
    found = ours(image)
    gaps = (expected.keypoints[:, None] - found.keypoints[0][None]).norm(dim=-1)
    distances, nearest = gaps.min(dim=1)
    # Like the authors' code, ours also finds maxima that only suppressed pixels suppress.
    assert 50 < expected.n <= found.mask.sum() < 1.3 * expected.n
    same = distances < 1e-3
    assert same.float().mean() > 0.995
    assert torch.allclose(found.scores[0, nearest][same], expected.keypoint_scores[same], atol=1e-4)
    assert torch.allclose(found.descriptors[0, nearest][same], expected.descriptors[same], atol=1e-3)


def normalised(points: Tensor, calibration: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return homogeneous directions of pixels in 640 x 480 images, for a calibration of 1296 x 968 images."""
    scale = np.array([640 / 1296, 480 / 968])
    pixels = (points.double().numpy() + 0.5) / scale - 0.5
    homogeneous = np.column_stack([pixels, np.ones(len(pixels))])
    return np.linalg.solve(calibration, homogeneous.T).T


def count_correct(points: list[Tensor], numbers: NDArray[np.float64]) -> int:
    """Count the matches with a symmetric epipolar distance below 5e-4 for the true pose."""
    first, second = (normalised(p, k.reshape(3, 3)) for p, k in zip(points, (numbers[:9], numbers[9:18])))
    pose = numbers[18:].reshape(4, 4)
    x, y, z = pose[:3, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose[:3, :3]
    lines1, lines0 = first @ essential.T, second @ essential
    products = (second * lines1).sum(axis=1) ** 2
    return int((products / (lines1[:, :2] ** 2).sum(1) + products / (lines0[:, :2] ** 2).sum(1) < 5e-4).sum())


@pytest.mark.timeout(900)
def test_real_weights_match_recorded_images_as_well_as_the_authors_code(
    fetched: Callable[[str], Path], recorded_data: Path
) -> None:
    for name in ("aliked-n16", "lightglue-aliked"):
        fetched(name)
    matcher = FeatureMatcher(
        extractor="aliked-n16", matcher="lightglue-aliked", device="cpu", precision="float32", keypoint_threshold=0.0
    )
    folder, correct = recorded_data / "scannet_pairs", 0
    for line in (folder / "pairs_with_gt.txt").read_text().splitlines():
        names, numbers = line.split()[:2], np.array(line.split()[4:], dtype=float)
        found = []
        for name in names:
            image = cv2.resize(cv2.imread(str(folder / name)), (640, 480), interpolation=cv2.INTER_AREA)
            found.append(matcher.extract(image[..., ::-1]))
        matches = matcher.match(*found)
        correct += count_correct([each.keypoints[matches.indices[:, i]] for i, each in enumerate(found)], numbers)
    # The authors' ALIKED and LightGlue (torch 2.13, float32) give 397 on the same images.
    assert correct == pytest.approx(397, rel=0.02)
