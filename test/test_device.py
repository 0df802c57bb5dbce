"""Tests of the networks' device, precision, number of threads and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kpmatch_ros import FeatureMatcher, ParameterError, Parameters
from kpmatch_ros.models.lightglue_layers import Attention
from kpmatch_ros.runtime import processor
from kpmatch_ros.runtime.device import choose_device, choose_precision, resident_memory

PARAMETERS = Parameters(device="cpu", precision="float32", max_keypoints=300)


def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"device is 'cuda:99', but PyTorch .* sees \d+ GPUs; use cpu or auto"):
        choose_device("cuda:99")


def test_the_cpu_uses_a_supported_precision() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    assert choose_precision("auto", torch.device("cuda")) == torch.float16
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ParameterError, match="precision is 'float16', but the device is the CPU"):
        choose_precision("float16", cpu)


@pytest.mark.parametrize(("capability", "usable"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_cpu_features_that_pytorch_may_not_use_are_not_used(
    capability: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_all_features", lambda: frozenset({"sse2", "avx2", "avx512_bf16", "amx_bf16"}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert processor.has_amx() == usable
    assert choose_precision("auto", torch.device("cpu")) == (torch.bfloat16 if usable else torch.float32)
    assert "sse2" in processor.processor_features()


def test_bfloat16_of_an_arm_processor_is_used_for_any_pytorch_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_all_features", lambda: frozenset({"asimd", "bf16"}))
    for capability in ("DEFAULT", "SVE256"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert choose_precision("auto", torch.device("cpu")) == torch.bfloat16


LIMITED = """
import sys
import numpy as np
import torch
from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models.assignment import attend

image = np.kron(np.random.default_rng(0).integers(0, 256, (15, 20), dtype=np.uint8), np.ones((8, 8), np.uint8))
for precision in ("auto", "bfloat16"):
    matcher = FeatureMatcher(device="cpu", precision=precision, max_keypoints=100)
    features = matcher.extract(image)
    assert len(matcher.match(features, features)) > 0.8 * len(features) > 10
    print(matcher.dtype)
heads = torch.randn(1, 4, 512, 64).bfloat16()  # as of SuperGlue, and of LightGlue with more than 1,024 keypoints
assert torch.allclose(attend(heads, heads, heads, None).float(), attend(*3 * [heads.float()], None), atol=0.05)
"""


def test_matching_works_with_a_limit_on_cpu_instructions(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("ATEN_CPU_CAPABILITY=avx2 is no limit for this processor")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    command = [sys.executable, "-c", LIMITED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "torch.float32\ntorch.bfloat16\n", done.stderr


@pytest.mark.parametrize("tiles", [False, True])
def test_attention_is_computed_by_pytorch_on_processors_with_amx(
    tiles: bool, random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmatch_ros.feature_matcher.has_amx", lambda: tiles)
    folder = str(random_folder())
    matcher = FeatureMatcher(PARAMETERS, extractor=folder, matcher=folder).matcher
    ways = {module.head_by_head for module in matcher.modules() if isinstance(module, Attention)}  # type: ignore[union-attr]
    assert ways == {not tiles}


def test_threads_sets_the_number_of_threads_and_zero_restores_it() -> None:
    before = torch.get_num_threads()

    def used(threads: int) -> int:
        FeatureMatcher(PARAMETERS, matcher="nearest", threads=threads)
        return torch.get_num_threads()

    try:
        assert [used(threads) for threads in (0, 2, 3, 0)] == [before, 2, 3, before]
        assert used(2) == 2
        torch.set_num_threads(4)
        assert used(0) == 4, "the number that the program set in the meantime"
    finally:
        torch.set_num_threads(before)


def test_memory_stays_constant_over_many_frames(random_folder: Callable[..., Path], texture: Any) -> None:
    matcher = FeatureMatcher.from_pretrained(random_folder(), device="cpu", precision="float32")
    images = [texture(64, 96, seed) for seed in range(5)]
    previous = matcher.extract(images[0])
    for frame in range(240):
        if frame == 40:
            before = resident_memory()
        current = matcher.extract(images[frame % 5])
        assert len(matcher.match(previous, current)) > 0
        previous = current
    # The features and matches of 200 frames take at least 10 MB. The heap after other tests varies by 2 MB.
    assert resident_memory() - before < 5e6
