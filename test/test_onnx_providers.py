"""Tests of the parameter providers: available ones are used in their order, missing ones reported; TensorRT's options.

The ONNX Runtime of the tests has only the CPU provider. Others are imitated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kpmatch_ros import FeatureMatcher, Parameters
from kpmatch_ros.parameters import ParameterError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from kpmatch_ros.models.onnx_providers import PROVIDERS  # noqa: E402

OPTIONS: dict[str, Any] = {"keypoint_threshold": 0.0, "filter_threshold": 0.01, "max_keypoints": 60, "threads": 1}
SMALLER = {"num_hidden_layers": 1}  # so that graphs are made faster
VERSION = onnxruntime.__version__


@pytest.fixture(scope="module")
def weights(random_folder: Callable[..., Path]) -> Path:
    return random_folder(lightglue=SMALLER)


@pytest.fixture
def images(texture: Any) -> list[np.ndarray]:
    wide = texture(96, 136, 3)
    return [wide[:, :128].copy(), wide[:, 8:].copy()]


def load(folder: Path, providers: str, **options: Any) -> FeatureMatcher:
    return FeatureMatcher.from_pretrained(folder, backend="onnxruntime", providers=providers, **{**OPTIONS, **options})


class Sessions:
    """An imitation of ONNX Runtime.

    Attributes:
        providers: the requested providers of each session, with their options.
        runs: the number of runs of each session.
    """

    def __init__(self, built_in: list[str], starting: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.providers: list[list[tuple[str, dict[str, Any]]]] = []
        self.runs: list[int] = []
        self._starting = [PROVIDERS[name] for name in starting]
        self._real = onnxruntime.InferenceSession
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS[name] for name in built_in])
        monkeypatch.setattr(onnxruntime, "InferenceSession", self._make)

    def _make(self, file: str, options: Any, providers: list[tuple[str, dict[str, Any]]]) -> SimpleNamespace:
        session, which = self._real(file, options, providers=["CPUExecutionProvider"]), len(self.runs)
        self.providers.append(providers)
        self.runs.append(0)

        def run(*arguments: Any) -> Any:
            self.runs[which] += 1
            return session.run(*arguments)

        running = [name for name, _ in providers if name in self._starting]
        return SimpleNamespace(get_providers=lambda: list(dict.fromkeys([*running, PROVIDERS["cpu"]])), run=run)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replaces the user's folder for TensorRT."""
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], list[str]], Sessions]:
    """sessions(built_in, starting) imitates an ONNX Runtime with these providers, some of which can start."""
    return lambda built_in, starting: Sessions(built_in, starting, monkeypatch)


def test_missing_providers_are_reported_and_the_next_available_one_is_used(weights: Path, images: list[Any]) -> None:
    said = f"onnxruntime {VERSION} lacks the providers tensorrt (not built in), cuda (not built in); it runs on cpu"
    with pytest.warns(RuntimeWarning, match=r"lacks the providers tensorrt .* it runs on cpu$"):
        matcher = load(weights, "tensorrt, cuda,cpu")
    assert matcher.onnx is not None and matcher.onnx.providers == ["cpu"] and matcher.onnx.note == said
    plain = load(weights, "cpu")
    assert plain.onnx is not None and plain.onnx.note == ""
    found = [each.match(*map(each.extract, images)) for each in (matcher, plain)]
    assert len(found[0]) > 5
    assert torch.equal(found[0].indices, found[1].indices)


def test_if_no_requested_provider_is_available_the_error_lists_the_available_ones(weights: Path, sessions: Any) -> None:
    with pytest.raises(ParameterError, match=rf"onnxruntime {VERSION} has no tensorrt or cuda .*; it has cpu; or use"):
        load(weights, "tensorrt,cuda")
    sessions(["cuda", "openvino", "cpu"], ["openvino", "cpu"])
    with pytest.raises(
        ParameterError, match=r"could not start cuda .*; it has openvino, cpu; or use the backend torch"
    ):
        load(weights, "tensorrt,cuda")


def test_a_built_in_provider_that_does_not_start_is_reported(weights: Path, sessions: Any) -> None:
    imitated = sessions(["tensorrt", "cuda", "cpu"], ["cuda", "cpu"])
    with pytest.warns(
        RuntimeWarning,
        match=r"lacks the providers tensorrt \(did not start\); it runs on cuda, in float32, .* supports float16",
    ):
        matcher = load(weights, "tensorrt,cuda,cpu", precision="float16")
    assert matcher.onnx is not None and matcher.onnx.providers == ["cuda", "cpu"]
    for providers in imitated.providers:  # ONNX Runtime passes to the next provider what the first one cannot do
        assert [name for name, _ in providers] == [PROVIDERS[name] for name in ("tensorrt", "cuda", "cpu")]


def test_tensorrt_gets_its_cache_folder_its_shapes_and_its_precision(
    weights: Path, random_folder: Any, images: list[Any], sessions: Any, tmp_path: Path
) -> None:
    imitated = sessions(["tensorrt", "cpu"], ["tensorrt", "cpu"])
    matchers = [load(weights, "tensorrt,cpu"), load(weights, "tensorrt,cpu", precision="float16")]
    matchers += [load(random_folder(seed=1, lightglue=SMALLER), "tensorrt,cpu")]
    assert [matcher.dtype for matcher in matchers] == [torch.float32] * 3
    options = [dict(providers)["TensorrtExecutionProvider"] for providers in imitated.providers]
    assert [each["trt_fp16_enable"] for each in options] == [False, False, True, True, False, False]
    folders = [Path(each["trt_engine_cache_path"]) for each in options]
    # Each folder is for one graph with its weights, because TensorRT finds an engine by the names in its graph.
    assert folders[:2] == folders[2:4] and len(set(folders)) == 4
    assert all(folder.is_dir() and tmp_path in folder.parents for folder in folders)
    for i, names in enumerate((["image"], ["keypoints0", "descriptors0", "mask0", "size0", "keypoints1"])):
        ranges = []
        for which in ("min", "opt", "max"):
            shapes = dict(item.split(":") for item in options[i][f"trt_profile_{which}_shapes"].split(","))
            ranges.append({name: [int(number) for number in shape.split("x")] for name, shape in shapes.items()})
        assert set(names) <= ranges[0].keys() == ranges[1].keys() == ranges[2].keys()
        for name in ranges[0]:
            assert all(a <= b <= c for a, b, c in zip(*(each[name] for each in ranges)))
    assert ranges[1]["keypoints0"] == [1, 1024, 2] and ranges[2]["descriptors1"][1:] == [4096, 64]


def test_inputs_outside_the_range_of_an_engine_are_computed_by_pytorch(
    weights: Path, images: list[Any], sessions: Any
) -> None:
    imitated = sessions(["tensorrt", "cpu"], ["tensorrt", "cpu"])
    matcher = load(weights, "tensorrt")
    first, second, small = (matcher.extract(image) for image in (*images, images[0][:56, :80]))
    assert imitated.runs == [2, 0] and len(small) > 5  # that image has fewer than 64 rows
    assert len(matcher.match(first, second)) > 5
    assert imitated.runs == [2, 1]
    more = torch.arange(4100) % len(first)  # more than 4096 keypoints
    many = replace(first, **{name: getattr(first, name)[more] for name in ("keypoints", "scores", "descriptors")})
    matcher.match(many, second)
    assert imitated.runs == [2, 1]


def test_float16_requires_tensorrt_and_provider_names_are_checked() -> None:
    with pytest.raises(
        ParameterError, match="precision is 'float16', but backend onnxruntime supports only auto or float32"
    ):
        Parameters(backend="onnxruntime", providers="cuda,cpu", precision="float16")
    for wrong in ("", "gpu", "cuda;cpu", "cpu,"):
        with pytest.raises(ParameterError, match=f"providers is '{wrong}'; with backend onnxruntime"):
            Parameters(providers=wrong)
