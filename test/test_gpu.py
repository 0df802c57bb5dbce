"""Tests of the package on a GPU: its results, the memory it takes, and its behaviour when memory is exhausted.

Each test also runs on the CPU, where CUDA graphs are imitated (benchmarks.imitation.Imitation). So a machine without a
GPU runs all of this code except the recording itself. `make gpu` runs this file and the benchmark.
"""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.imitation import Imitation
from kpmatch_ros import FeatureMatcher, Features, Matches, Parameters
from kpmatch_ros.cuda_graphs import SIZES, CudaGraphs, padded_size
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.models import ALIKED, DISK, SuperPoint, XFeat
from kpmatch_ros.runtime.device import is_out_of_memory, release_memory

pytestmark = pytest.mark.usefixtures("fast_half_products")

Image = NDArray[np.uint8]
Make = Callable[..., FeatureMatcher]

HAS_GPU = torch.cuda.is_available()
ON_GPU = pytest.mark.skipif(not HAS_GPU, reason="PyTorch sees no GPU; the same test ran on the processor")

# float16 cannot be tested on a CPU, because the package refuses it there.
SETTINGS = [
    pytest.param(("cpu", "float32"), id="cpu-float32"),
    pytest.param(("cpu", "bfloat16"), id="cpu-bfloat16"),
    pytest.param(("cuda", "float32"), id="cuda-float32", marks=ON_GPU),
    pytest.param(("cuda", "float16"), id="cuda-float16", marks=ON_GPU),
    pytest.param(("cuda", "bfloat16"), id="cuda-bfloat16", marks=ON_GPU),
]


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A device and a precision."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="module")
def small(random_folder: Callable[..., Path]) -> dict[str, str]:
    """Folders of small networks with random weights, by their matcher."""
    return {"lightglue": str(random_folder()), "superglue": str(random_folder(superglue={}))}


@pytest.fixture
def make(small: dict[str, str]) -> Make:
    """make(device, precision, recorded=True, random="", options...) returns the packaged networks, with all layers.

    ``random`` is "lightglue" or "superglue" for small networks with random weights instead.
    """

    def build(
        device: str | torch.device = "cpu",
        precision: str = "float32",
        recorded: bool = True,
        random: str = "",
        **options: Any,
    ) -> FeatureMatcher:
        if random:
            options = {"extractor": small[random], "matcher": small[random], **options}
        options = {"max_keypoints": 100, "depth_confidence": -1.0, "width_confidence": -1.0, **options}
        return with_recordings(FeatureMatcher(device=str(device), precision=precision, **options), recorded)

    return build


@pytest.fixture(scope="module")
def film(texture: Any) -> list[Image]:
    """Images 96 x 128 of a camera that moves to the right."""
    picture = cv2.GaussianBlur(texture(96, 192, 5), (0, 0), 1)
    return [np.ascontiguousarray(picture[:, 3 * i : 3 * i + 128]) for i in range(20)]


def graphs_for(device: torch.device) -> CudaGraphs:
    """Return CUDA graphs, imitated on a CPU."""
    return CudaGraphs.for_device(device) or CudaGraphs(Imitation())


def with_recordings(matcher: FeatureMatcher, recorded: bool = True) -> FeatureMatcher:
    """Return the matcher with CUDA graphs (imitated on a CPU) or without."""
    if not recorded:
        matcher.graphs = None
    elif matcher.graphs is None:
        matcher.graphs = graphs_for(matcher.device)
    return matcher


def match(matcher: FeatureMatcher, image0: Image, image1: Image) -> tuple[Features, Features, Matches]:
    features0, features1 = matcher.extract(image0), matcher.extract(image1)
    return features0.numpy(), features1.numpy(), matcher.match(features0, features1).numpy()


def common_matches(first: Matches, second: Matches) -> float:
    """Return the number of common matches as a fraction of all matches of both; 1 if there are none."""
    ours, theirs = (set(map(tuple, np.asarray(matches.indices).tolist())) for matches in (first, second))
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def common_keypoints(first: Features, second: Features, pixels: float) -> float:
    """Return the fraction of the first keypoints with one of the second keypoints within this distance."""
    distances = np.linalg.norm(np.asarray(first.keypoints)[:, None] - np.asarray(second.keypoints)[None], axis=2)
    return float((distances.min(axis=1) < pixels).mean())


def set_random_weights(model: nn.Module, seed: int) -> nn.Module:
    """Set random weights that preserve the spread of the activations."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan = math.prod(module.weight.shape[1:])
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * math.sqrt(2 / fan))
    return model


# Same results as on the CPU


def test_matches_on_the_device_agree_with_those_on_the_cpu(warped: Any, setting: tuple[str, str]) -> None:
    parameters = Parameters(max_keypoints=256)
    reference = match(FeatureMatcher(parameters, device="cpu", precision="float32"), *warped[:2])
    ours = with_recordings(FeatureMatcher(parameters, device=setting[0], precision=setting[1]))
    assert ours.extract(warped[0]).keypoints.device.type == setting[0]  # type: ignore[union-attr]
    features0, features1, matches = match(ours, *warped[:2])
    assert len(matches) > 0.9 * len(reference[2])
    assert common_keypoints(features0, reference[0], pixels=1.5) > 0.95
    seen = cv2.perspectiveTransform(np.float64(features0.keypoints)[matches.indices[:, 0]][None], warped[2])[0]
    distances = np.linalg.norm(seen - np.asarray(features1.keypoints)[matches.indices[:, 1]], axis=1)
    assert (distances < 3).mean() > 0.9
    # Features stored on the host can be matched, too.
    again = ours.match(features0, features1).numpy()
    assert common_matches(again, matches) > 0.99


@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK, XFeat])
def test_extractors_find_nearly_the_same_keypoints_as_on_the_cpu(
    kind: Any, setting: tuple[str, str], picture: Callable[..., Tensor]
) -> None:
    threshold = {"keypoint_threshold": -1e30 if kind is DISK else 0.0}
    model = set_random_weights(kind(max_keypoints=100, **threshold), seed=2)
    image = picture(96, 128)[None]
    image = image.mean(dim=1, keepdim=True) if kind.CHANNELS == 1 else image
    expected = model(image)
    moved = model.to(setting[0])
    dtype = getattr(torch, setting[1])
    found = graphs_for(torch.device(setting[0])).run(moved.to_precision(dtype), image.to(setting[0]))
    assert found.mask.all() and torch.isfinite(found.descriptors).all()
    near = torch.cdist(found.keypoints.float().cpu(), expected.keypoints).amin(dim=2) < 1.5
    # Random weights give scores that differ little. With half precision, or the TensorFloat-32 of a GPU's convolutions,
    # other keypoints are among the best.
    assert near.float().mean() > {("cpu", "float32"): 0.9, ("cuda", "float32"): 0.7}.get(setting, 0.4)


@pytest.mark.parametrize("name", ["LightGlue", "SuperGlue", "nearest"])
def test_matchers_find_nearly_the_same_matches_as_on_the_cpu(
    make: Make, film: list[Image], setting: tuple[str, str], name: str
) -> None:
    options = {"LightGlue": {}, "SuperGlue": {"random": "superglue"}, "nearest": {"matcher": "nearest"}}[name]
    reference = make("cpu", "float32", recorded=False, **options)
    features = [reference.extract(image) for image in film[:2]]
    expected = reference.match(*features).numpy()
    ours = make(*setting, **options)
    found = ours.match(*(each.numpy() for each in features)).numpy()
    assert len(expected) > 20
    assert common_matches(found, expected) > (0.99 if setting[1] == "float32" else 0.8)


# Same results with CUDA graphs


@pytest.mark.parametrize("kind", [SuperPoint, ALIKED, DISK, XFeat])
def test_extractors_with_graphs_give_the_same_results(
    kind: Any, device: torch.device, picture: Callable[..., Tensor]
) -> None:
    model = set_random_weights(kind(max_keypoints=60, keypoint_threshold=-1e30 if kind is DISK else 0.0), seed=1).to(
        device
    )
    graphs = graphs_for(device)
    images = [picture(height, 96, seed)[None].to(device) for seed, height in enumerate((64, 64, 72, 64))]
    for image in images:
        image = image.mean(dim=1, keepdim=True) if kind.CHANNELS == 1 else image
        found, expected = graphs.run(model, image), model(image)
        assert all(torch.allclose(ours.float(), theirs.float(), atol=1e-4) for ours, theirs in zip(found, expected))
    assert graphs.enabled and len(graphs) == 2  # one for each shape


@pytest.mark.parametrize("random", ["lightglue", "superglue"])
@pytest.mark.parametrize("counts", [(256, 256), (100, 100), (200, 40), (1, 256), (300, 2)], ids=str)
def test_matchers_with_graphs_give_the_same_results(
    make: Make, setting: tuple[str, str], random: str, counts: tuple[int, int]
) -> None:
    matcher = make(*setting, random=random)
    features = [random_features(count, matcher.extractor.descriptor_size, seed) for seed, count in enumerate(counts)]
    found = matcher.match(*features).numpy()
    found_again = matcher.match(*features).numpy()
    assert matcher.graphs is not None and matcher.graphs.enabled and len(matcher.graphs) == 1
    matcher.graphs = None
    expected = matcher.match(*features).numpy()
    assert np.array_equal(found.indices, found_again.indices)
    assert found.assignment.matches0.shape == (1, counts[0]) and found.assignment.matches1.shape == (1, counts[1])
    tolerance = 1e-3 if setting[1] == "float32" else 0.1
    assert np.abs(np.asarray(found.assignment.scores0) - np.asarray(expected.assignment.scores0)).mean() < tolerance
    assert common_matches(found, expected) >= (0.99 if setting[1] == "float32" else 0.8)
    assert found.layers == expected.layers


def random_features(count: int, size: int, seed: int) -> Features:
    """Return features of 640 x 480 images. Descriptors at the same index are similar for all seeds."""
    random = np.random.default_rng(7)
    keypoints, descriptors = random.random((1024, 2)) * (640, 480), random.normal(size=(1024, size))
    descriptors += 0.1 * np.random.default_rng(seed).normal(size=descriptors.shape)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return Features(
        keypoints=keypoints[:count].astype(np.float32),
        scores=np.linspace(1, 0.5, count, dtype=np.float32),
        descriptors=descriptors[:count].astype(np.float32),
        size=(640, 480),
    )


def test_a_larger_match_does_not_affect_a_later_smaller_one(make: Make, device: torch.device) -> None:
    matcher = make(device)
    size = matcher.extractor.descriptor_size
    few = [random_features(20, size, seed) for seed in (0, 1)]
    before = matcher.match(*few).numpy()
    spoilt = random_features(200, size, 2)
    infinite = np.full_like(spoilt.descriptors, np.inf)
    matcher.match(spoilt, Features(spoilt.keypoints, spoilt.scores, infinite, spoilt.size))
    after = matcher.match(*few).numpy()
    assert np.array_equal(before.indices, after.indices) and np.array_equal(before.scores, after.scores)


@pytest.mark.parametrize("count", [*SIZES, 1, 257, 4097])
def test_numbers_of_points_are_rounded_up_to_a_few_sizes(count: int) -> None:
    size = padded_size(count)
    assert size is None if count > SIZES[-1] else size in SIZES and size >= count


def test_changed_parameters_take_effect_at_once(make: Make, device: torch.device, film: list[Image]) -> None:
    matcher = make(device, max_keypoints=60, keypoint_threshold=0.0005)
    features0, _, matches = match(matcher, *film[:2])
    matcher.configure(matcher.parameters.replace({"max_keypoints": 30, "filter_threshold": 0.99}))
    fewer, _, stricter = match(matcher, *film[:2])
    assert len(features0) == 60 and len(fewer) == 30
    assert len(matches) > 0 and (np.asarray(stricter.scores) > 0.99).all()
    matcher.configure(matcher.parameters.replace({"max_keypoints": 60, "filter_threshold": 0.1}))
    assert np.array_equal(match(matcher, *film[:2])[2].indices, matches.indices)


# Sequences, pairs, batches


@pytest.mark.parametrize("confidence", [-1.0, 0.6])
def test_matches_of_a_sequence_agree_with_and_without_graphs(
    make: Make, setting: tuple[str, str], film: list[Image], confidence: float
) -> None:
    matchers = [make(*setting, recorded=recorded, depth_confidence=confidence) for recorded in (True, False)]
    fronts = [FrontEnd(matcher.parameters, matcher) for matcher in matchers]
    shares, layers = [], []
    frames = 8 if setting[0] == "cuda" else 3  # the imitation computes everything twice
    for i, image in enumerate(film[:frames]):
        pairs = [front.register_frame(image, i * 100_000_000)[1] for front in fronts]
        if None not in pairs and i > 0:
            shares.append(common_matches(*pairs))  # type: ignore[arg-type]
            layers.append(tuple(pair.layers for pair in pairs))  # type: ignore[union-attr]
            assert len(pairs[0].indices) > 20  # type: ignore[union-attr]
    assert len(shares) == frames - 1
    assert np.mean(shares) > (0.99 if setting[1] == "float32" else 0.8)
    if setting[1] == "float32":
        assert all(ours == theirs for ours, theirs in layers)


def test_matches_of_a_stereo_pair_agree_with_and_without_graphs(
    make: Make, setting: tuple[str, str], film: list[Image]
) -> None:
    matcher, plain = make(*setting), make(*setting, recorded=False)
    left, right = film[3], film[4]
    found = matcher.extract_batch([left, right])
    expected = plain.extract_batch([left, right])
    assert [len(each) for each in found] == [len(each) for each in expected]
    front = FrontEnd(matcher.parameters, matcher)
    for stamp in (0, 100_000_000):
        front.register([left, right], [stamp, stamp])
    matches, reference = matcher.match(*found).numpy(), plain.match(*expected).numpy()
    assert len(matches) > 20
    assert common_matches(matches, reference) > (0.99 if setting[1] == "float32" else 0.8)


@pytest.mark.parametrize("confidence", [-1.0, 0.6])
@pytest.mark.parametrize("pairs", [2, 6])  # as recordings pair by pair, and as one batch
def test_a_batch_of_pairs_gives_the_same_matches_as_each_pair_alone(
    make: Make, setting: tuple[str, str], film: list[Image], pairs: int, confidence: float
) -> None:
    matcher = make(*setting, depth_confidence=confidence)
    features = [matcher.extract(image).numpy() for image in film[: pairs + 1]]
    cut = [
        Features(each.keypoints[:n], each.scores[:n], each.descriptors[:n], each.size)
        for n, each in zip((100, 70, 100, 12, 90, 100, 55), features)
    ]
    together = matcher.match_batch(cut[:-1], cut[1:])
    shares = []
    for i, found in enumerate(together):
        alone = matcher.match(cut[i], cut[i + 1]).numpy()
        shares.append(common_matches(found.numpy(), alone))
        assert found.layers == alone.layers or setting[1] != "float32"
    if setting[1] == "float32":
        assert min(shares) >= 0.99
    else:
        assert np.mean(shares) >= 0.7  # an image has 12 keypoints, so a single match is a large fraction


def test_images_without_keypoints_have_no_matches_and_do_not_affect_later_ones(
    make: Make, setting: tuple[str, str], film: list[Image]
) -> None:
    matcher = make(*setting)
    before = match(matcher, *film[:2])[2]
    recordings = len(matcher.graphs)  # type: ignore[arg-type]
    black, seen, none = match(matcher, np.zeros_like(film[0]), film[1])
    assert len(black) == len(none) == 0 and len(seen) > 0
    assert np.array_equal(match(matcher, *film[:2])[2].indices, before.indices)
    assert len(matcher.graphs) == recordings  # type: ignore[arg-type]


# Stopping early


def test_early_stopping_uses_the_same_number_of_layers_with_and_without_graphs(
    make: Make, device: torch.device
) -> None:
    stopped = set()
    for confidence in (0.1, 0.5, 0.8, 0.95, 0.999):
        matcher = make(device, random="lightglue", depth_confidence=confidence)
        features = [random_features(count, matcher.extractor.descriptor_size, 1) for count in (150, 220)]
        found = matcher.match(*features).numpy()
        matcher.graphs = None
        expected = matcher.match(*features).numpy()
        assert found.layers == expected.layers
        assert common_matches(found, expected) > 0.99
        stopped.add(found.layers)
    assert len(stopped) > 1 and min(stopped) < 5


def test_an_easy_pair_takes_fewer_layers_than_a_hard_one(device: torch.device, warped: Any) -> None:
    matcher = with_recordings(FeatureMatcher(device=str(device), precision="float32", max_keypoints=200))
    easy, other = matcher.extract(warped[0]), matcher.extract(np.ascontiguousarray(warped[1].T[::-1]))
    assert matcher.match(easy, easy).layers < matcher.match(easy, other).layers


# Failures


class RefusingRecorder:
    """Refuses every recording."""

    def record(self, work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


def test_a_failed_graph_recording_gives_one_warning_and_matching_continues(make: Make, film: list[Image]) -> None:
    matcher = make("cpu")
    expected = match(matcher, *film[:2])[2]
    matcher.graphs = CudaGraphs(RefusingRecorder())
    with pytest.warns(RuntimeWarning, match=r"CUDA graphs are not used.*: operation not permitted when stream is ca"):
        found = match(matcher, *film[:2])[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match(matcher, *film[2:4])
    assert np.array_equal(found.indices, expected.indices)
    assert not matcher.graphs.enabled and matcher.graphs.failure.startswith("operation not permitted")


ASKING = """
import warnings
import numpy as np
from kpmatch_ros import FeatureMatcher

matcher = FeatureMatcher(device="cuda", max_keypoints=100)
image = np.random.default_rng(0).integers(0, 256, (96, 128), dtype=np.uint8)
expected = matcher.extract(image).numpy()
matcher.graphs.clear()
forward = matcher.extractor.forward
matcher.extractor.forward = lambda image: forward(image + 0 * image.sum().item())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = matcher.extract(image).numpy()
    found = matcher.extract(image).numpy()
assert [str(each.message)[:28] for each in caught] == ["CUDA graphs are not used, an"], caught
assert np.array_equal(found.keypoints, expected.keypoints)
assert len(matcher.match(found, found)) == len(found) > 10
"""


@ON_GPU
def test_a_network_that_synchronises_with_the_host_runs_without_graphs() -> None:
    # In a separate process, because PyTorch does not fully recover from a recording that CUDA aborted.
    done = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@contextmanager
def exhausted_memory(matcher: FeatureMatcher) -> Iterator[None]:
    """Limits the matcher's device to the memory that it uses now."""
    if matcher.device.type == "cuda":
        release_memory()
        device = torch.cuda.current_device()  # this function refuses a device without an index
        total = torch.cuda.get_device_properties(device).total_memory
        used = torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction((used + 32e6) / total, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    forward = matcher.extractor.forward

    def fail(image: Tensor) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    matcher.extractor.forward = fail  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        matcher.extractor.forward = forward  # type: ignore[method-assign]


def test_out_of_memory_is_recognised_and_matching_works_afterwards(
    make: Make, device: torch.device, film: list[Image], texture: Any
) -> None:
    matcher = make(device)
    before = match(matcher, *film[:2])[2]
    large = texture(1000, 1400, 0) if device.type == "cuda" else texture(200, 280, 0)  # on a CPU it is imitated
    with exhausted_memory(matcher):
        with pytest.raises(RuntimeError) as error:
            matcher.extract(large)
        assert is_out_of_memory(error.value)
        release_memory()
    assert np.array_equal(match(matcher, *film[:2])[2].indices, before.indices)
    assert len(matcher.extract(large)) > 0


def test_memory_stays_constant_over_many_frames(make: Make, device: torch.device, film: list[Image]) -> None:
    on_gpu = device.type == "cuda"
    matcher = make(device, "float16" if on_gpu else "float32", depth_confidence=0.6)
    front = FrontEnd(matcher.parameters, matcher)
    frames, used = (1000 if on_gpu else 12), []
    for i in range(frames):
        image = film[(i if i // len(film) % 2 == 0 else -1 - i) % len(film)]
        # Numbers of keypoints and image sizes change, as on a robot.
        matcher.configure(matcher.parameters.replace({"max_keypoints": (60, 80, 100)[i % 3]}))
        front.register_frame(image if i % 50 else image[:88], i * 100_000_000)
        if i in (frames // 2, frames - 1):
            used.append(memory_in_use(device))
    assert used[1] - used[0] < 16e6
    assert matcher.graphs is not None and matcher.graphs.enabled and len(matcher.graphs) <= 12


def memory_in_use(device: torch.device) -> float:
    """Return the GPU memory that PyTorch holds, bytes; 0 for a CPU, whose memory test_feature_matcher.py checks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return float(torch.cuda.memory_reserved(device))
    return 0.0


def test_several_threads_may_match_at_once(make: Make, device: torch.device, film: list[Image]) -> None:
    matcher = make(device)
    expected = match(matcher, *film[:2])[2]
    found: list[Matches] = []
    threads = [threading.Thread(target=lambda: found.append(match(matcher, *film[:2])[2])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(np.array_equal(each.indices, expected.indices) for each in found)
