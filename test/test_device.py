"""Where the networks run, in which precision and with how many threads, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kpmatch_ros import FeatureMatcher, ParameterError, Parameters
from kpmatch_ros.device import choose_device, choose_precision, resident_memory
from kpmatch_ros.models.lightglue_layers import Attention

PARAMETERS = Parameters(device="cpu", precision="float32", max_keypoints=300)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"device is 'cuda:99', but PyTorch .* sees \d+ GPUs; use cpu or auto"):
        choose_device("cuda:99")


def test_the_processor_computes_in_what_it_can() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    assert choose_precision("auto", torch.device("cuda")) == torch.float16
    assert choose_precision("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ParameterError, match="precision is 'float16', but the device is the CPU"):
        choose_precision("float16", cpu)


@pytest.mark.parametrize("tiles", [False, True])
def test_attention_is_left_to_pytorch_where_the_processor_multiplies_in_tiles(
    tiles: bool, random_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kpmatch_ros.feature_matcher.has_tiles", lambda: tiles)
    folder = str(random_folder())
    matcher = FeatureMatcher(PARAMETERS, extractor=folder, matcher=folder).matcher
    ways = {module.by_hand for module in matcher.modules() if isinstance(module, Attention)}  # type: ignore[union-attr]
    assert ways == {not tiles}


def test_threads_are_as_many_as_chosen_and_with_zero_as_many_as_before() -> None:
    before = torch.get_num_threads()

    def used(threads: int) -> int:
        FeatureMatcher(PARAMETERS, matcher="nearest", threads=threads)
        return torch.get_num_threads()

    try:
        assert [used(threads) for threads in (0, 2, 3, 0)] == [before, 2, 3, before]
        assert used(2) == 2
        torch.set_num_threads(4)
        assert used(0) == 4, "as the program chose itself in the meantime"
    finally:
        torch.set_num_threads(before)


def test_memory_stays_flat_over_many_frames(random_folder: Callable[..., Path], texture: Any) -> None:
    matcher = FeatureMatcher.from_pretrained(random_folder(), device="cpu", precision="float32")
    images = [texture(64, 96, seed) for seed in range(5)]
    previous = matcher.extract(images[0])
    for frame in range(240):
        if frame == 40:
            before = resident_memory()
        current = matcher.extract(images[frame % 5])
        assert len(matcher.match(previous, current)) > 0
        previous = current
    assert resident_memory() - before < 2e6
