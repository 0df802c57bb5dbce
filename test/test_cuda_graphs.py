"""Tests of CUDA graphs: what the warm-up records, and the state after a failure. test_gpu.py checks their results.

On a CPU they are imitated (benchmarks.imitation.Imitation).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.imitation import Imitation
from kpmatch_ros import FeatureMatcher, Features
from kpmatch_ros.cuda_graphs import SIZES, CudaGraphs, Recording

Make = Callable[..., FeatureMatcher]

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU; the same ran on the processor")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def make(random_folder: Callable[..., Path]) -> Make:
    """make(options...) returns small networks with random weights, without pruning."""

    def build(superglue: bool = False, **options: Any) -> FeatureMatcher:
        folder = random_folder(superglue={} if superglue else None)
        options = {"device": "cpu", "precision": "float32", "width_confidence": -1.0, **options}
        return FeatureMatcher.from_pretrained(folder, **options)

    return build


class CountingRecorder:
    """Records, and counts the recordings."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._recorder = Recording(device) if device.type == "cuda" else Imitation()

    def record(self, work: Callable[[], Any]) -> Any:
        self.count += 1
        return self._recorder.record(work)


def random_features(matcher: FeatureMatcher, count: int, seed: int) -> Features:
    """Return random features of a 128 x 96 image."""
    random = np.random.default_rng(seed)
    descriptors = random.normal(size=(count, matcher.extractor.descriptor_size))
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    keypoints = (random.random((count, 2)) * (128, 96)).astype(np.float32)
    return Features(keypoints, np.ones(count, np.float32), descriptors.astype(np.float32), (128, 96))


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"max_keypoints": 300, "depth_confidence": -1.0}, 1),
        ({"max_keypoints": 700, "depth_confidence": 0.7}, 3),
        ({"max_keypoints": 512, "depth_confidence": 0.7}, 3),  # with the largest number of places there is no padding
        ({"max_keypoints": 100, "depth_confidence": 0.7, "mode": "stereo"}, 2),
        ({"max_keypoints": 300, "superglue": True}, 1),
    ],
    ids=str,
)
def test_no_frame_records_a_graph_after_the_warm_up(
    make: Make, device: torch.device, texture: Any, options: dict[str, Any], layers: int
) -> None:
    matcher = make(device=str(device), **options)
    recorder = CountingRecorder(device)
    matcher.graphs = CudaGraphs(recorder)
    matcher.warm_up(128, 96)
    recorded = recorder.count
    assert recorded > 1
    most = options["max_keypoints"]
    run = set()
    for places in SIZES:
        if places - 255 <= most:  # if the limit reaches these places, all or some of them are needed
            for count0, count1 in ((places - 1, places - 1), (places - 9, 1), (3, places - 200), (places, places)):
                if places == count0 != most:
                    continue
                pair = random_features(matcher, min(count0, most), 1), random_features(matcher, min(count1, most), 2)
                run.update((matcher.match(*pair).layers, matcher.match(pair[0], pair[0]).layers))
    assert len(run) >= layers  # early stopping ends after different numbers of layers
    matcher.extract_batch([texture(96, 128, seed) for seed in range(2 if matcher.parameters.mode == "stereo" else 1)])
    assert recorder.count == recorded


def test_a_masked_image_records_no_graph_after_a_warm_up_with_a_mask(
    make: Make, device: torch.device, texture: Any, tmp_path: Path
) -> None:
    matcher = make(device=str(device), max_keypoints=100, mask=str(tmp_path / "body.png"))  # read by the front end
    recorder = CountingRecorder(device)
    matcher.graphs = CudaGraphs(recorder)
    matcher.warm_up(128, 96)
    recorded = recorder.count
    matcher.extract(texture(96, 128, 0), np.eye(96, 128, dtype=np.uint8))
    assert recorder.count == recorded


def test_without_graphs_the_warm_up_matches_once(make: Make) -> None:
    matcher = make(max_keypoints=4096)
    calls: list[int] = []
    matcher.matcher.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: calls.append(inputs[0].num_keypoints)
    )
    matcher.warm_up(64, 48)
    assert len(calls) == 1 and calls[0] > 0


class FailingRecorder:
    """Fails to record, after it has let other waiting threads run."""

    def __init__(self, others: list[threading.Thread]) -> None:
        self.count = 0
        self._others = others

    def record(self, work: Any) -> Any:
        self.count += 1
        if self.count == 1:
            for other in self._others:
                other.start()
                other.join(timeout=0.1)  # it waits for this thread
        raise RuntimeError("CUDA error: out of memory")


def test_threads_that_waited_for_a_failed_recording_do_not_record(make: Make, texture: Any) -> None:
    matcher, image = make(max_keypoints=50), texture(64, 96, 0)
    expected = matcher.extract(image).numpy()
    found: list[Features] = []
    others = [threading.Thread(target=lambda: found.append(matcher.extract(image).numpy())) for _ in range(3)]
    recorder = FailingRecorder(others)
    matcher.graphs = CudaGraphs(recorder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.append(matcher.extract(image).numpy())
        for other in others:
            other.join()
    assert recorder.count == len(caught) == 1 and "CUDA error: out of memory" in str(caught[0].message)
    assert len(matcher.graphs) == 0 and not matcher.graphs.enabled
    assert len(found) == 4 and all(np.array_equal(each.keypoints, expected.keypoints) for each in found)
