"""Tests that LightGlue's layers in src/lightglue*.c give the results of PyTorch's operators, with the same accuracy."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.cli import doctor
from kpmatch_ros.models import LightGlue, compiled, trace
from kpmatch_ros.models.lightglue_layers import Points, TransformerLayer

ROOT = Path(__file__).resolve().parent.parent
MISSING = "not built, or not for this processor"
SIZES = [(64, 2), (128, 4), (192, 2), (256, 4)]  # channels, heads
SOURCES = ("lightglue", "lightglue_avx2", "networks", "scores", "superpoint", "transformed")
COUNTS = [(1, 1), (2, 31), (33, 32), (100, 65), (16, 257)]


def skip_without(dtype: torch.dtype) -> None:
    if not (compiled.available() if dtype == torch.bfloat16 else compiled.in_float32()):
        pytest.skip(MISSING)


KINDS = {"tiles": (torch.bfloat16, True), "vectors": (torch.bfloat16, False), "float32": (torch.float32, False)}


@pytest.fixture(params=KINDS)
def make_compiled(request: pytest.FixtureRequest) -> partial[compiled.CompiledLayer]:
    """A function that makes a compiled layer of a PyTorch layer."""
    dtype, tiles = KINDS[request.param]
    skip_without(dtype)
    return partial(compiled.CompiledLayer, dtype=dtype, tiles=tiles)


@pytest.fixture(params=["bfloat16", "float32"])
def precision(request: pytest.FixtureRequest) -> str:
    """A precision in which the layers are compiled."""
    skip_without(getattr(torch, request.param))
    return str(request.param)


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
def layer_of(size: int, heads: int, shared: bool = True, scale: float = 1.0, seed: int = 0) -> TransformerLayer:
    """Return a layer in float32 with random weights that are rounded to bfloat16."""
    torch.manual_seed(seed)
    layer = TransformerLayer(size, heads, heads, True, "gelu").requires_grad_(False).eval()
    for name, values in layer.named_parameters():
        if name.endswith("layer_norm.weight"):
            values.copy_(1 + 0.2 * torch.randn_like(values))
        elif "_proj" in name:
            values.mul_(scale)
    if shared:
        layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    layer.fuse()
    return layer.to(torch.bfloat16).float()


def points_of(count: int, size: int, heads: int, seed: int, batch: int = 1) -> Points:
    random = torch.Generator().manual_seed(seed)
    angles = 3 * torch.randn(batch, 1, count, size // heads // 2, generator=random)
    x = torch.randn(batch, count, size, generator=random)
    rotation = torch.polar(torch.ones_like(angles), angles)
    return Points(x, rotation, None, torch.arange(count), torch.ones(count, dtype=torch.int64))


def two_images(layer: TransformerLayer, counts: tuple[int, int]) -> tuple[Points, Points]:
    size, heads = layer.self_mlp.fc2.out_features, layer.self_attention.heads
    first, second = (points_of(count, size, heads, seed) for seed, count in enumerate(counts))
    return first, second


def error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """Return the largest relative difference of an image's states."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("size", "heads"), SIZES)
@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_is_as_accurate_as_in_pytorch(
    size: int, heads: int, counts: tuple[int, int], shared: bool, make_compiled: partial[compiled.CompiledLayer]
) -> None:
    layer = layer_of(size, heads, shared)
    points = two_images(layer, counts)
    exact, found = layer(*points), make_compiled(layer)(*points)
    if make_compiled.keywords["dtype"] == torch.float32:
        assert error(found, exact) < 1e-6  # both round
        return
    by_pytorch = copy.deepcopy(layer).to(torch.bfloat16)(*points)
    assert error(found, exact) < min(1.05 * error(by_pytorch, exact), 0.004)


def test_results_are_identical_for_any_number_of_threads(
    make_compiled: partial[compiled.CompiledLayer], threads: int
) -> None:
    layer = layer_of(128, 4)
    points, runs = two_images(layer, (300, 170)), []
    for count in (threads, 1):
        torch.set_num_threads(count)
        runs.append(make_compiled(layer)(*points))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_very_large_similarities_stay_finite_and_accurate(make_compiled: partial[compiled.CompiledLayer]) -> None:
    layer = layer_of(64, 2, scale=40.0)
    points = two_images(layer, (90, 70))
    found, exact = make_compiled(layer)(*points), layer(*points)
    by_pytorch = copy.deepcopy(layer).to(torch.bfloat16)(*points)
    assert all(torch.isfinite(each).all() for each in found)
    assert error(found, exact) < max(1.2 * error(by_pytorch, exact), 0.01)


def test_nan_propagates_to_all_points(make_compiled: partial[compiled.CompiledLayer]) -> None:
    layer = layer_of(64, 2)
    points = two_images(layer, (50, 40))
    points[0].x[0, 7, 3] = torch.nan
    # Every point attends to all points of both images.
    assert all(each.isnan().all() for each in make_compiled(layer)(*points))


def test_padding_at_any_position_does_not_change_the_result(make_compiled: partial[compiled.CompiledLayer]) -> None:
    layer = layer_of(64, 2)
    chosen = make_compiled(layer)
    padded = [points_of(count, 64, 2, seed, batch=3) for seed, count in enumerate((40, 50))]
    random = torch.Generator().manual_seed(5)
    for points in padded:
        points.mask = torch.rand(points.x.shape[:2], generator=random) < 0.7
    padded[0].mask[2] = False  # an image without points
    new = chosen(*padded)
    for b in range(3):
        real = [points.mask[b] for points in padded]
        alone = chosen(
            *(Points(p.x[b : b + 1, r], p.rotation[b : b + 1, :, r], None, r, r) for p, r in zip(padded, real))
        )
        for points, states, mask, expected in zip(padded, new, real, alone):
            assert torch.equal(states[b, mask], expected[0])
            assert torch.equal(states[b, ~mask], points.x[b, ~mask])
    assert torch.equal(new[1][2], padded[1].x[2])  # there is nothing to attend to


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.self_attention, "joint", None),
        lambda layer: setattr(layer.cross_mlp, "activation", torch.tanh),
        lambda layer: setattr(layer.self_attention, "head_size", 8),
        lambda layer: setattr(layer.cross_attention, "key_value_heads", 1),
        lambda layer: setattr(layer.cross_attention, "o_proj", torch.nn.Linear(64, 64)),
    ],
)
def test_unsupported_layers_are_left_to_pytorch(change: Callable[[TransformerLayer], None], precision: str) -> None:
    layer, dtype = layer_of(64, 2), getattr(torch, precision)
    assert compiled.CompiledLayer.fits(layer, dtype)
    change(layer)
    assert not compiled.CompiledLayer.fits(layer, dtype)
    layer.use_compiled(dtype)
    assert layer.compiled is None


@pytest.mark.parametrize(("limit", "computed"), [("avx2", True), ("default", False)])
def test_the_limit_of_pytorch_on_cpu_instructions_is_respected(limit: str, computed: bool, tmp_path: Path) -> None:
    if not compiled.transforms() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip(MISSING)
    program = (
        "import torch; from kpmatch_ros.models import compiled;"
        "logits = 3 * torch.randn(1, 4, 5, 65); cells = logits.double().softmax(3)[..., :-1].unflatten(3, (8, 8));"
        "assert torch.allclose(compiled.pixel_scores(logits).double(), cells.transpose(2, 3).reshape(1, 32, 40));"
        "print(compiled.available(), compiled.in_float32())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": limit}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"False {computed}\n", done.stderr


# In the whole matcher

needs_bfloat16 = pytest.mark.skipif(not compiled.available(), reason=MISSING)


def matcher(precision: str, **changes: Any) -> FeatureMatcher:
    values = {"device": "cpu", "max_keypoints": 256, "depth_confidence": -1.0, "width_confidence": -1.0, **changes}
    return FeatureMatcher(Parameters(precision=precision, **values))


def pairs(matcher: FeatureMatcher, walk: list[np.ndarray]) -> set[tuple[int, int]]:
    found = matcher.match(*(matcher.extract(image) for image in walk[:2]))
    return set(map(tuple, np.asarray(found.indices).tolist()))


# If rounding makes one version stop a layer earlier, more matches differ.
@pytest.mark.parametrize(
    ("confidences", "least"), [({}, 0.97), ({"depth_confidence": 0.95, "width_confidence": 0.99}, 0.9)]
)
def test_the_matches_agree_with_those_of_pytorch(
    walk: list[np.ndarray], confidences: dict[str, float], least: float, precision: str
) -> None:
    quick = matcher(precision, **confidences)
    assert isinstance(quick.matcher, LightGlue) and quick.matcher.is_compiled and not quick.matcher.round_up
    found = pairs(quick, walk)
    for layer in quick.matcher.transformer_layers:
        layer.compiled = None
    by_pytorch = pairs(quick, walk)
    least = least if precision == "bfloat16" else 0.99
    assert len(found) > 100 and len(found & by_pytorch) > least * len(found | by_pytorch)


@needs_bfloat16
def test_layers_compiled_in_bfloat16_are_not_used_in_float32(walk: list[np.ndarray]) -> None:
    for_a_moment = matcher("bfloat16")
    features = [for_a_moment.extract(image) for image in walk[:2]]
    network = for_a_moment.matcher.float()
    batch = [for_a_moment._batch([each]) for each in features]  # noqa: SLF001
    found = network(*batch)
    for layer in network.transformer_layers:
        layer.compiled = None
    assert all(torch.equal(a, b) for a, b in zip(found, network(*batch)))


def test_the_hidden_states_can_still_be_recorded(walk: list[np.ndarray], precision: str) -> None:
    ours = matcher(precision)
    features = [ours.extract(image) for image in walk[:2]]
    with trace(ours.matcher) as recorded:
        ours.match(*features)
    layers = len(ours.matcher.transformer_layers)
    assert len(recorded.hidden_states) == 2 + 4 * layers and len(recorded.attentions) == 4 * layers
    assert ours.matcher.is_compiled


def test_a_copy_gives_the_same_results_as_the_original(walk: list[np.ndarray], precision: str) -> None:
    ours = matcher(precision)
    batch = [ours._batch([ours.extract(image)]) for image in walk[:2]]  # noqa: SLF001
    again = copy.deepcopy(ours.matcher)
    before = ours.matcher(*batch)
    del ours
    assert all(torch.equal(a, b) for a, b in zip(before, again(*batch)))


def test_tensors_that_need_gradients_or_tracing_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros(2)
    assert compiled.may_process(numbers)
    assert not compiled.may_process(torch.zeros(2, requires_grad=True)) and not compiled.may_process(numbers.to("meta"))
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not compiled.may_process(numbers)


# Availability


@pytest.mark.skipif(not compiled.transforms(), reason=MISSING)
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler")
@pytest.mark.parametrize(("words", "is_empty"), [([], False), (["-U__linux__"], True)])
def test_the_source_compiles_without_a_warning_and_is_empty_on_other_systems(
    tmp_path: Path, words: list[str], is_empty: bool
) -> None:
    command = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Werror", *words]
    command += ["-shared", "-fPIC", "-pthread", "-o", "plain.so"]
    command += [
        *(str(ROOT / "src" / f"{name}.c") for name in SOURCES),
        "-lm",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    library = compiled.open_library(tmp_path / "plain.so")
    assert library is not None and (library.kpmatch_support() == 0) == is_empty


def test_the_doctor_reports_which_networks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled.transforms():
        pytest.skip(MISSING)
    (finding,) = doctor.check_compiled_networks()
    assert finding.level == doctor.OK and finding.text.startswith("compiled")
    monkeypatch.setattr(compiled, "available", lambda: False)
    for floats, parts in ((True, "SuperPoint and LightGlue in float32"), (False, "SuperPoint in float32")):
        monkeypatch.setattr(compiled, "in_float32", lambda floats=floats: floats)
        (finding,) = doctor.check_compiled_networks()
        assert parts in finding.text
    monkeypatch.setattr(compiled, "transforms", lambda: False)
    (finding,) = doctor.check_compiled_networks()
    assert finding.text.startswith("PyTorch")
