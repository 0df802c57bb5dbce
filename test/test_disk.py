"""Tests that DISK computes what its paper and its authors' file define, with random and with real weights.

The reference implementation in this file computes every convolution everywhere, with library instance norms and loops
for maxima. Real weights are read from the folder in KPMATCH_TEST_WEIGHTS (``disk-depth-save.pth``,
``disk_lightglue.pth``). `kornia` is a second reference if it is installed.
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
from detections_harness import as_found, assert_a_batch_gives_what_each_gives_alone
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models.disk import DISK, activate, strict_maxima
from kpmatch_ros.weights import WeightsError

Tensors = dict[str, Tensor]
Ours = Callable[..., DISK]

DOWN, UP, DIM = [4, 6, 8, 8, 8], [8, 8, 8, 9], 8


# The reference


def dense_output(tensors: Tensors, image: Tensor) -> Tensor:
    """Return (descriptor + 1, H, W) for all pixels of an image (3, H, W)."""
    height, width = image.shape[1:]
    x = F.pad(image[None], (0, -width % 16, 0, -height % 16))

    def convolution(x: Tensor, name: str) -> Tensor:
        if f"{name}.1.weight" in tensors:
            x = F.prelu(F.instance_norm(x), tensors[f"{name}.1.weight"])
        return F.conv2d(x, tensors[f"{name}.3.weight"], tensors[f"{name}.3.bias"], padding="same")

    maps = []
    for i in range(len(DOWN)):
        x = convolution(F.avg_pool2d(x, 2) if i > 0 else x, f"unet.path_down.{i}.1")
        maps.append(x)
    for i in range(len(UP)):
        larger = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = convolution(torch.cat([larger, maps[-2 - i]], dim=1), f"unet.path_up.{i}.conv")
    return x[0, :, :height, :width]


def reference(tensors: Tensors, image: Tensor, border: int) -> dict[tuple[int, int], tuple[float, Tensor]]:
    """Return score and descriptor of the keypoints of an image (3, H, W), by x and y."""
    output = dense_output(tensors, image)
    heat = output[-1]
    found = {}
    for y in range(border, heat.shape[0] - border):
        for x in range(border, heat.shape[1] - border):
            window = heat[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            if heat[y, x] > 0 and (window >= heat[y, x]).sum() == 1:
                found[x, y] = float(heat[y, x]), F.normalize(output[:-1, y, x], dim=0)
    return found


def random_tensors(seed: int) -> Tensors:
    """Return tensors named as in the authors' file."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}

    def add(name: str, inputs: int, outputs: int, gated: bool = True) -> None:
        if gated:
            tensors[f"{name}.1.weight"] = torch.rand(inputs, generator=generator)
        weight = torch.randn(outputs, inputs, 5, 5, generator=generator)
        tensors[f"{name}.3.weight"] = weight / math.sqrt(25 * inputs)
        tensors[f"{name}.3.bias"] = torch.randn(outputs, generator=generator) * 0.2

    for i, (inputs, outputs) in enumerate(zip([3, *DOWN], DOWN)):
        add(f"unet.path_down.{i}.1", inputs, outputs, gated=i > 0)
    for i, (below, beside, outputs) in enumerate(zip([DOWN[-1], *UP], DOWN[-2::-1], UP)):
        add(f"unet.path_up.{i}.conv", below + beside, outputs)
    return tensors


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Ours:
    """ours(seed=0, **options) returns a DISK with random weights, loaded from a file in the authors' format."""

    def make(seed: int = 0, **options: Any) -> DISK:
        path = tmp_path_factory.mktemp("disk") / "depth-save.pth"
        torch.save({"extractor": random_tensors(seed)}, path)
        return DISK.from_pretrained(path, **options)

    return make


# The network


@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 83), (32, 37), (7, 50), (20, 5)])
@pytest.mark.parametrize(
    ("seed", "border", "layout"), [(0, 2, torch.contiguous_format), (1, 0, torch.channels_last)], ids=str
)
def test_keypoints_and_descriptors_equal_the_dense_reference(
    picture: Callable[..., Tensor],
    ours: Ours,
    seed: int,
    border: int,
    layout: torch.memory_format,
    height: int,
    width: int,
) -> None:
    image = picture(height, width, seed + 5)
    expected = reference(random_tensors(seed), image, border)
    model = ours(seed, border_removal_distance=border).to(memory_format=layout)  # type: ignore[call-overload]
    (found,) = as_found(model(image[None]))
    assert len(expected) > (10 if min(height, width) > 7 else -1)
    assert found.keys() == expected.keys()
    for point, (score, descriptor) in expected.items():
        assert found[point][0] == pytest.approx(score, abs=1e-4)
        assert torch.allclose(found[point][1], descriptor, atol=1e-4)


def test_the_activation_is_an_accurate_instance_norm_in_every_layout(picture: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 200, 300) * torch.tensor([0.01, 0.1, 1, 10, 100])[:, None, None] + 30
    gate = torch.nn.PReLU(5).requires_grad_(False)
    expected = F.prelu(F.instance_norm(x.double()), gate.weight.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        found = activate(x.contiguous(memory_format=layout), gate)
        assert torch.allclose(found[:, 1:].double(), expected[:, 1:], atol=1e-4)
    assert (activate(torch.full((1, 5, 8, 8), 3.0), gate) == 0).all()


@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_a_strict_maximum_is_larger_than_every_neighbour(radius: int) -> None:
    generator = torch.Generator().manual_seed(radius)
    scores = torch.randint(0, 40, (2, 17, 23), generator=generator).float() - 20
    found = strict_maxima(scores, radius)
    for image, row, column in np.ndindex(2, 17, 23):
        rows, columns = (slice(max(at - radius, 0), at + radius + 1) for at in (row, column))
        rivals = int((scores[image, rows, columns] >= scores[image, row, column]).sum()) - 1
        assert bool(found[image, row, column]) == (rivals == 0)


def test_an_image_smaller_than_the_networks_downsampling_gives_valid_keypoints(ours: Ours) -> None:
    for height, width in ((5, 5), (1, 30), (4, 3)):
        found = ours(border_removal_distance=0, keypoint_threshold=-100.0)(torch.rand(1, 3, height, width))
        assert found.mask.any() and torch.isfinite(found.scores).all() and torch.isfinite(found.descriptors).all()
        assert not ours(border_removal_distance=2)(torch.rand(1, 3, 4, width)).mask.any()


def test_an_image_of_one_colour_has_no_keypoints(ours: Ours) -> None:
    model = ours(border_removal_distance=0, keypoint_threshold=-100.0)
    model.head.score.weight.zero_()  # all pixels are equal, also at the border
    found = model(torch.full((2, 3, 32, 48), 0.5))
    assert [tuple(each.shape) for each in found] == [(2, 0, 2), (2, 0), (2, 0, DIM), (2, 0), (2,)]


def test_a_batch_gives_the_same_keypoints_as_its_images_one_by_one(ours: Ours, picture: Callable[..., Tensor]) -> None:
    model = ours()
    images = torch.stack([picture(64, 96, 1), picture(64, 96, 2), picture(64, 96, 3) * 0.01])
    assert_a_batch_gives_what_each_gives_alone(model, images, 1e-3)


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
    assert torch.equal(few.keypoints, every.keypoints[:, :10])
    assert torch.allclose(few.descriptors.norm(dim=-1), torch.ones(1, 10))


def test_the_nms_radius_the_border_and_the_threshold_are_respected(ours: Ours, picture: Callable[..., Tensor]) -> None:
    image = picture(64, 96)[None]
    usual = ours()(image)
    sparse = ours(nms_radius=6)(image).keypoints[0]
    assert 1 < len(sparse) < usual.mask.sum()
    gaps = (sparse[:, None] - sparse[None]).abs().amax(dim=-1) + 100 * torch.eye(len(sparse))
    assert gaps.min() > 6
    inner = ours(border_removal_distance=20)(image).keypoints[0]
    assert len(inner) > 0 and inner.min() >= 20 and (inner <= torch.tensor([75, 43])).all()
    middle = float(usual.scores[0].median())
    stricter = ours(keypoint_threshold=middle)(image)
    assert torch.equal(stricter.scores[0], usual.scores[0][usual.scores[0] > middle])
    laxer = ours(keypoint_threshold=-100.0)(image)
    assert laxer.mask.sum() > usual.mask.sum() and laxer.scores.min() < 0 and torch.isfinite(laxer.scores).all()


def test_half_precision_finds_most_keypoints_and_returns_float32(ours: Ours, picture: Callable[..., Tensor]) -> None:
    model, image = ours(max_keypoints=60), picture(64, 96)[None]
    (single,) = as_found(model(image))
    found = model.to(torch.bfloat16)(image)
    assert found.scores.dtype == found.keypoints.dtype == found.descriptors.dtype == torch.float32
    assert len(as_found(found)[0].keys() & single.keys()) > 0.7 * len(single)


# Files


def test_saved_weights_load_again(ours: Ours, picture: Callable[..., Tensor], tmp_path: Path) -> None:
    model, image = ours(), picture(64, 96)[None]
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**model.config, "model_type": "disk"}))
    for before, after in zip(model(image), DISK.from_pretrained(tmp_path)(image)):
        assert torch.equal(before, after)


def test_the_detector_in_a_matchers_folder_is_loaded(
    ours: Ours, picture: Callable[..., Tensor], random_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((random_folder() / "config.json").read_text())
    config["keypoint_detector_config"] = {"model_type": "disk", "descriptor_decoder_dim": DIM}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {f"keypoint_detector.model.{name}": tensor for name, tensor in random_tensors(0).items()}
    save_file({**tensors, "input_projection.weight": torch.zeros(4, DIM)}, tmp_path / "model.safetensors")
    image = picture(64, 96)[None]
    assert torch.equal(DISK.from_pretrained(tmp_path)(image).keypoints, ours()(image).keypoints)


def test_a_file_that_lacks_tensors_or_is_another_network_is_refused(
    tmp_path: Path, random_folder: Callable[..., Path]
) -> None:
    tensors = random_tensors(0)
    del tensors["unet.path_down.2.1.1.weight"]
    torch.save(tensors, tmp_path / "disk.pth")
    with pytest.raises(WeightsError, match=r"disk\.pth.*unet\.down\.2\.gate\.weight is missing"):
        DISK.from_pretrained(tmp_path / "disk.pth")
    del tensors["unet.path_up.3.conv.3.bias"]
    torch.save(tensors, tmp_path / "disk.pth")
    with pytest.raises(WeightsError, match=r"disk\.pth"):
        DISK.from_pretrained(tmp_path / "disk.pth")
    with pytest.raises(WeightsError, match="holds a lightglue, not a disk"):
        DISK.from_pretrained(random_folder())


# Real weights and other implementations


@pytest.mark.parametrize(("height", "width"), [(160, 240), (203, 317)])
def test_real_weights_find_the_same_keypoints_as_kornia(
    fetched: Callable[[str], Path], picture: Callable[..., Tensor], height: int, width: int
) -> None:
    feature = pytest.importorskip("kornia.feature")
    theirs = feature.DISK().eval()
    stored = torch.load(fetched("disk"), map_location="cpu", weights_only=True)
    theirs.load_state_dict(stored["extractor"])
    image = picture(height, width)[None]
    with torch.inference_mode():
        (expected,) = theirs(image, n=400, pad_if_not_divisible=True)
    (found,) = as_found(DISK.from_pretrained("disk", max_keypoints=400)(image))
    points = [tuple(point) for point in expected.keypoints.int().tolist()]
    assert len(points) > 100 and len(found) == len(points)
    common = found.keys() & set(points)
    assert len(common) >= 0.995 * len(points)  # two keypoints may be equally good for the last place
    for point, score, descriptor in zip(points, expected.detection_scores.tolist(), expected.descriptors):
        if point in common:
            assert found[point][0] == pytest.approx(score, abs=1e-4 * abs(score) + 1e-2)
            assert torch.allclose(found[point][1], descriptor, atol=1e-3)


def test_real_weights_match_two_recorded_images(fetched: Callable[[str], Path], recorded_data: Path) -> None:
    for name in ("disk", "lightglue-disk"):
        fetched(name)
    matcher = FeatureMatcher(
        extractor="disk", matcher="lightglue-disk", device="cpu", precision="float32", max_keypoints=512
    )
    found = []
    for frame in ("000135", "000210"):
        path = recorded_data / "scannet_pairs" / f"scene0726_00_frame-{frame}.jpg"
        image = cv2.resize(cv2.imread(str(path)), (320, 240), interpolation=cv2.INTER_AREA)
        found.append(matcher.extract(image[..., ::-1]))
    assert len(matcher.match(*found)) > 20
