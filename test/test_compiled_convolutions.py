"""Tests that SuperPoint's convolutions in src/superpoint.c give the results of PyTorch's operators."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.models import SuperPoint, compiled, trace
from kpmatch_ros.models.superpoint import ConvBlock, in_parts
from simulation import camera_path, demo_camera
from simulation.bags import build_scene

pytestmark = pytest.mark.skipif(not compiled.has_tiles(), reason="not built, or a processor without tiles")
SIZES = [(1, 1), (2, 3), (8, 32), (9, 33), (16, 31), (21, 70), (40, 64)]  # height, width


def convolution(inputs: int, outputs: int, seed: int) -> nn.Conv2d:
    """Return a convolution with weights that bfloat16 can represent."""
    torch.manual_seed(seed)
    made = nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)
    made.weight.copy_(made.weight.bfloat16())
    return made


def image(*shape: int) -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    return numbers.contiguous(memory_format=torch.channels_last)


def reference(x: Tensor, convolutions: list[nn.Conv2d], pooling: bool) -> Tensor:
    """Compute in float32, with the values between two convolutions rounded."""
    for each in convolutions:
        x = F.relu(F.conv2d(x.float(), each.weight, each.bias, padding=1)).bfloat16()
    return F.max_pool2d(x.float(), 2).bfloat16() if pooling else x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [(4, 16), (16, 32), (64, 64), (48, 112), (4, 16, 16), (16, 32, 48), (64, 64, 128)])
@pytest.mark.parametrize("pooling", [False, True])
def test_convolutions_give_the_results_of_pytorch(
    channels: tuple[int, ...], size: tuple[int, int], pooling: bool, threads: int
) -> None:
    if pooling and min(size) < 2:
        pytest.skip("nothing is left")
    convolutions = [convolution(*pair, seed) for seed, pair in enumerate(zip(channels, channels[1:]))]
    computed = compiled.CompiledConvolutions(
        [(each.weight, each.bias) for each in convolutions], pooling, torch.bfloat16
    )
    x = image(2, channels[0], *size)
    found, expected = computed(x).float(), reference(x, convolutions, pooling).float()
    assert found.shape == expected.shape
    # Sums in another order occasionally round differently, by at most 1/256, and then so does the next convolution.
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    assert ((found - expected).abs() > 0.004 * expected.abs() + 1e-3).float().mean() < 0.02


def test_the_number_of_threads_does_not_change_the_result(threads: int) -> None:
    convolutions = [convolution(16, 32, 0), convolution(32, 32, 1)]
    computed = compiled.CompiledConvolutions([(each.weight, each.bias) for each in convolutions], True, torch.bfloat16)
    x = image(1, 16, 75, 50)
    several = computed(x)
    torch.set_num_threads(1)
    assert torch.equal(several, computed(x))


def test_unsupported_convolutions_are_left_to_pytorch() -> None:
    block = ConvBlock(1, 24, True)
    block.use_compiled(torch.bfloat16)
    assert block.compiled is None


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 8), (7, 31)])
def test_image_parts_are_cut_as_by_pytorch(size: tuple[int, int]) -> None:
    image = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(2))
    found, expected = compiled.image_parts(image), in_parts(image)
    assert torch.equal(found, expected)
    assert torch.equal(found.permute(0, 2, 3, 1), found.permute(0, 2, 3, 1).contiguous())


@pytest.fixture(scope="module")
def view() -> np.ndarray:
    return next(build_scene(0).film(camera_path(2), demo_camera(328, 248), noise=2.0)).image


def extractor_of(precision: str) -> FeatureMatcher:
    return FeatureMatcher(Parameters(device="cpu", precision=precision, matcher="nearest", max_keypoints=256))


def shared_keypoints(a: FeatureMatcher, b: FeatureMatcher, view: np.ndarray) -> float:
    """Return the fraction of one's keypoints that the other finds within half a pixel."""
    first, second = (np.asarray(each.extract(view).keypoints) for each in (a, b))
    return float((np.linalg.norm(first[:, None] - second[None], axis=2).min(axis=1) < 0.5).mean())


def test_keypoints_are_as_accurate_as_with_pytorch(view: np.ndarray) -> None:
    exact, ours, by_pytorch = (extractor_of(precision) for precision in ("float32", "bfloat16", "bfloat16"))
    network = by_pytorch.extractor
    assert isinstance(network, SuperPoint) and isinstance(ours.extractor, SuperPoint)
    assert all(block.compiled is not None for block in ours.extractor.encoder.conv_blocks)
    for block in (*network.encoder.conv_blocks, network.keypoint_decoder):
        block.compiled = None
    assert shared_keypoints(exact, ours, view) >= max(0.98, shared_keypoints(exact, by_pytorch, view) - 0.01)
    again = extractor_of("bfloat16")
    again.extractor = copy.deepcopy(ours.extractor).float()  # as after an overflow
    assert shared_keypoints(exact, again, view) > 0.97


def test_a_network_converted_to_bfloat16_still_runs() -> None:
    network = copy.deepcopy(extractor_of("bfloat16").extractor).bfloat16()
    assert network(torch.rand(1, 1, 64, 64)).keypoints.shape[2] == 2


def test_the_outputs_of_the_blocks_can_still_be_recorded(view: np.ndarray) -> None:
    ours = extractor_of("bfloat16")
    with trace(ours.extractor) as recorded:
        ours.extract(view)
    assert [state.shape[1] for state in recorded.hidden_states] == [64, 64, 128, 128]
