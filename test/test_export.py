"""Tests of kpmatch export: the graphs give the networks' results, and the command reports its output or its refusal."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from test_lightglue_parity import SIZES as LIGHTGLUE_SIZES
from test_superglue import COUNTS
from test_superpoint import SIZES as SUPERPOINT_SIZES
from torch import Tensor

from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.models import ALIKED, ImageFeatures, LightGlue, NearestNeighbour, SuperGlue, SuperPoint
from kpmatch_ros.models.export import OPSET, ExportError, check_exportable, export_extractor, export_matcher
from kpmatch_ros.models.superglue import transport
from kpmatch_ros.parameters import ParameterError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from kpmatch_ros.models.export_check import Parity, Session, compare  # noqa: E402

Run = Callable[..., tuple[int, str, str]]
Matcher = LightGlue | SuperGlue

WIDTH, HEIGHT = 128, 96
PLACES = 40
# Few layers, because the export takes time for each operation of a graph.
FEW_LAYERS = {"num_hidden_layers": 2}
FEW_STEPS = {"gnn_layers_types": ["self", "cross"], "sinkhorn_iterations": 5}


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch export` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "export")


@pytest.fixture(scope="module")
def weights(random_folder: Any) -> str:
    return str(random_folder())


@pytest.fixture(scope="module")
def extractor(weights: str) -> SuperPoint:
    return SuperPoint.from_pretrained(weights, max_keypoints=PLACES, keypoint_threshold=0.0)


@pytest.fixture(scope="module")
def views(texture: Any) -> list[Tensor]:
    """Three images (1, 1, H, W) of a moving texture."""
    wide = torch.from_numpy(texture(HEIGHT, WIDTH + 16, 3)).float() / 255
    return [wide[None, None, :, 8 * i : 8 * i + WIDTH] for i in range(3)]


@pytest.fixture(scope="module", params=["LightGlue", "SuperGlue"])
def matcher(request: pytest.FixtureRequest, lightglue: Any, superglue: Any) -> Matcher:
    if request.param == "LightGlue":
        model: Matcher = lightglue(depth_confidence=-1.0, width_confidence=-1.0, **FEW_LAYERS)
        model.fuse()
    else:
        model = superglue(**FEW_STEPS)
    model.filter_threshold = 0.01
    return model


@pytest.fixture(scope="module", params=["fixed", "dynamic"])
def sessions(
    request: pytest.FixtureRequest, extractor: SuperPoint, matcher: Matcher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, Session, bool]:
    """Return sessions of both graphs, and whether counts and sizes are dynamic."""
    folder, dynamic = tmp_path_factory.mktemp("onnx"), request.param == "dynamic"
    dense = export_extractor(extractor, folder / "e.onnx", (WIDTH, HEIGHT), dynamic)
    match = export_matcher(matcher, folder / "m.onnx", PLACES, dynamic)
    return Session(folder / "e.onnx", dense), Session(folder / "m.onnx", match), dynamic


def features(images: int, count: int, size: int, seed: int) -> ImageFeatures:
    """Return random features with scores and a mask that is true everywhere."""
    random = torch.Generator().manual_seed(seed)
    return ImageFeatures(
        keypoints=torch.rand(images, count, 2, generator=random) * torch.tensor([WIDTH, HEIGHT]),
        descriptors=torch.nn.functional.normalize(torch.randn(images, count, size, generator=random), dim=-1),
        size=torch.tensor([[WIDTH, HEIGHT]] * images, dtype=torch.float32),
        mask=torch.ones(images, count, dtype=torch.bool),
        scores=torch.rand(images, count, generator=random),
    )


def inputs(matcher: Matcher, image: ImageFeatures) -> list[Tensor]:
    tensors = [image.keypoints, image.descriptors, image.mask, image.size]
    return [*tensors, image.scores] if isinstance(matcher, SuperGlue) else tensors  # type: ignore[return-value, list-item]


def pair(matcher: Matcher, count0: int, count1: int, images: int = 1) -> tuple[ImageFeatures, ImageFeatures]:
    """Return features of two images, where the first ones have similar counterparts in the other image."""
    image0 = features(images, count0, matcher.input_dim, 1)
    image1 = features(images, count1, matcher.input_dim, 2)
    common = min(count0, count1) * 3 // 4
    image1.keypoints[:, :common] = image0.keypoints[:, :common] + 1
    image1.descriptors[:, :common] = image0.descriptors[:, :common]
    return image0, image1


def check_same(found: tuple[Tensor, ...], expected: Any) -> None:
    matches0, matches1, scores0, scores1 = found
    torch.testing.assert_close(matches0, expected.matches0)
    torch.testing.assert_close(matches1, expected.matches1)
    torch.testing.assert_close(scores0, expected.scores0, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores1, expected.scores1, atol=1e-4, rtol=0)


def test_graphs_match_images_like_the_networks(
    sessions: tuple[Session, Session, bool], extractor: SuperPoint, matcher: Matcher, views: list[Tensor]
) -> None:
    *graphs, dynamic = sessions
    parity = compare(extractor, matcher, (graphs[0], graphs[1]), views, None if dynamic else PLACES)
    assert parity.pairs == 2
    assert parity.matches > 20
    assert parity.share >= 0.99
    assert parity.score_difference < 1e-4
    assert parity.descriptor_difference < 1e-4
    assert parity.match_score_difference < 1e-3


@pytest.mark.parametrize("sessions", ["dynamic"], indirect=True)
@pytest.mark.parametrize(("height", "width"), list(dict.fromkeys([*SUPERPOINT_SIZES, *LIGHTGLUE_SIZES])))
def test_the_dense_part_is_equal_at_many_image_sizes(
    sessions: tuple[Session, Session, bool], extractor: SuperPoint, texture: Any, height: int, width: int
) -> None:
    image = torch.from_numpy(texture(height, width, 7)).float()[None, None] / 255
    for found, expected in zip(sessions[0](image), extractor.dense(image)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sessions", ["dynamic"], indirect=True)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_matches_are_equal_for_many_numbers_of_keypoints(
    sessions: tuple[Session, Session, bool], matcher: Matcher, counts: tuple[int, int]
) -> None:
    image0, image1 = pair(matcher, *counts)
    expected = matcher(image0, image1)
    assert (expected.matches0 >= 0).sum() > min(counts) / 4 or min(counts) == 1
    found = sessions[1](*inputs(matcher, image0), *inputs(matcher, image1))
    assert (found[0] == expected.matches0).float().mean() >= 0.99
    assert (found[1] == expected.matches1).float().mean() >= 0.99
    torch.testing.assert_close(found[2], expected.scores0, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[3], expected.scores1, atol=1e-3, rtol=0)


def test_padding_has_no_effect(sessions: tuple[Session, Session, bool], matcher: Matcher) -> None:
    image0, image1 = pair(matcher, 25, 31)
    expected = matcher(image0._replace(mask=None), image1._replace(mask=None))
    assert (expected.matches0 >= 0).sum() > 5
    padded = [image.padded(PLACES) for image in (image0, image1)]
    for left_over in (1e4, 3e38, float("nan")):
        for image in padded:
            for tensor in (image.keypoints, image.descriptors, image.scores):
                tensor[~image.mask] = left_over
        found = sessions[1](*inputs(matcher, padded[0]), *inputs(matcher, padded[1]))
        assert (found[0][:, 25:] == -1).all() and (found[1][:, 31:] == -1).all()
        check_same((found[0][:, :25], found[1][:, :31], found[2][:, :25], found[3][:, :31]), expected)


def test_an_image_without_keypoints_has_no_matches(sessions: tuple[Session, Session, bool], matcher: Matcher) -> None:
    image0, image1 = pair(matcher, PLACES, PLACES)
    for masks in ((False, True), (True, False), (False, False)):
        images = [
            image._replace(mask=torch.full_like(image.mask, real)) for image, real in zip((image0, image1), masks)
        ]
        matches0, matches1, scores0, scores1 = sessions[1](*inputs(matcher, images[0]), *inputs(matcher, images[1]))
        assert (matches0 == -1).all() and (matches1 == -1).all()
        assert (scores0 == 0).all() and (scores1 == 0).all()


def test_only_dynamic_graphs_accept_other_numbers_and_sizes(
    sessions: tuple[Session, Session, bool], extractor: SuperPoint, matcher: Matcher, views: list[Tensor]
) -> None:
    dense, match, dynamic = sessions
    image = torch.cat([views[0][..., :72, :104], views[1][..., :72, :104], views[2][..., :72, :104]])
    image0, image1 = pair(matcher, 17, 50, images=3)
    if not dynamic:
        with pytest.raises(Exception, match="invalid dimensions"):
            dense(image)
        with pytest.raises(Exception, match="invalid dimensions"):
            match(*inputs(matcher, image0), *inputs(matcher, image1))
        return
    for found, expected in zip(dense(image), extractor.dense(image)):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    found = match(*inputs(matcher, image0), *inputs(matcher, image1))
    check_same(found, matcher(image0, image1))


def test_exporting_does_not_change_the_networks(
    extractor: SuperPoint, matcher: Matcher, views: list[Tensor], tmp_path: Path
) -> None:
    image0, image1 = pair(matcher, 20, 30)
    before = [*extractor.dense(views[0]), *matcher(image0, image1)]
    export_extractor(extractor, tmp_path / "e.onnx", (WIDTH, HEIGHT), False)
    export_matcher(matcher, tmp_path / "m.onnx", 8, False)
    for a, b in zip(before, [*extractor.dense(views[0]), *matcher(image0, image1)]):
        assert torch.equal(a, b)


def test_sinkhorn_in_log_space_gives_the_same_plan() -> None:
    similarity = torch.randn(2, 12, 15, generator=torch.Generator().manual_seed(0)) * 4
    plans = [transport(similarity, torch.tensor(1.0), 40, steps_between=steps) for steps in (0, 15)]
    torch.testing.assert_close(plans[0], plans[1], atol=1e-4, rtol=0)


def test_unsupported_networks_and_sizes_are_refused(extractor: SuperPoint, lightglue: Any) -> None:
    with pytest.raises(ExportError, match="extractor is ALIKED, but only SuperPoint"):
        check_exportable(ALIKED(), lightglue())
    with pytest.raises(ExportError, match="matcher is NearestNeighbour, which has no network"):
        check_exportable(extractor, NearestNeighbour())
    with pytest.raises(ExportError, match="4 x 96 pixels are too small"):
        export_extractor(extractor, Path("unused"), (4, 96), False)
    with pytest.raises(ExportError, match=r"99999 x 99999 pixels are too large .* 8\.4 million"):
        export_extractor(extractor, Path("unused"), (99999, 99999), True)


# The backend


@pytest.fixture(scope="module", params=[None, {"sinkhorn_iterations": 20}], ids=["LightGlue", "SuperGlue"])
def both_backends(request: pytest.FixtureRequest, random_folder: Any) -> tuple[FeatureMatcher, FeatureMatcher]:
    """The same networks in PyTorch and in ONNX Runtime."""
    folder = random_folder(superglue=request.param)
    options = {"keypoint_threshold": 0.0, "filter_threshold": 0.01, "max_keypoints": PLACES, "threads": 1}
    options |= {"device": "cpu", "precision": "float32", "depth_confidence": -1.0, "width_confidence": -1.0}
    torch_matcher, onnx_matcher = (
        FeatureMatcher.from_pretrained(folder, backend=backend, **options) for backend in ("torch", "onnxruntime")
    )
    return torch_matcher, onnx_matcher


def test_the_onnx_backend_gives_the_matches_of_pytorch(
    both_backends: tuple[FeatureMatcher, FeatureMatcher], views: list[Tensor]
) -> None:
    images = [(view[0, 0].numpy() * 255).round().astype(np.uint8) for view in views]
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    mask[:, :40] = 0
    found = []
    for matcher in both_backends:
        features = matcher.extract_batch(images, [None, mask, None])
        small = matcher.extract(images[0][:48, :72])
        none = matcher.extract(images[0][:4, :4])
        pairs = [(features[0], features[1]), (features[1], features[2]), (features[2], small), (none, small)]
        batch = matcher.match_batch(*zip(*pairs[:3]))
        matcher.configure(matcher.parameters.replace({"filter_threshold": 0.3}))
        strict = matcher.match(*pairs[0])
        matcher.configure(matcher.parameters.replace({"filter_threshold": 0.01}))
        found.append((features, [*batch, *(matcher.match(*pair) for pair in pairs), strict]))
    for ours, theirs in zip(found[0][0], found[1][0]):
        assert torch.equal(ours.keypoints, theirs.keypoints)
        torch.testing.assert_close(ours.descriptors, theirs.descriptors, atol=1e-4, rtol=0)
    assert found[1][0][1].keypoints[:, 0].min() >= 40
    for ours, theirs in zip(found[0][1], found[1][1]):
        assert torch.equal(ours.indices, theirs.indices) and ours.layers == theirs.layers
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-3, rtol=0)
    counts = [len(matches) for matches in found[1][1]]
    assert counts[0] > 5 and counts[6] == 0 and counts[7] < counts[3]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda original: pickle.loads(pickle.dumps(original))])
def test_a_matcher_with_the_onnx_backend_can_be_copied(
    both_backends: tuple[FeatureMatcher, FeatureMatcher], views: list[Tensor], again: Any
) -> None:
    images = [(view[0, 0].numpy() * 255).round().astype(np.uint8) for view in views[:2]]
    copied = again(both_backends[1])
    assert copied.onnx is not both_backends[1].onnx and copied.onnx.providers == ["cpu"]
    expected, found = (each.match(*(each.extract(image) for image in images)) for each in (both_backends[1], copied))
    assert len(found) > 5 and torch.equal(found.indices, expected.indices)


def test_options_that_the_onnx_backend_does_not_support_are_refused(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("device", "cuda"), ("precision", "bfloat16")):
        with pytest.raises(ParameterError, match=f"{name} is '{value}', but backend onnxruntime supports only"):
            FeatureMatcher(backend="onnxruntime", **{name: value})
    with pytest.raises(ParameterError, match="NearestNeighbour, which has no network"):
        FeatureMatcher(extractor=weights, matcher="nearest", backend="onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ParameterError, match=r"onnxruntime is not installed.*or use the backend torch"):
        FeatureMatcher.from_pretrained(weights, backend="onnxruntime")


# The command


@pytest.fixture
def words(weights: str, views: list[Tensor], tmp_path: Path) -> list[Any]:
    """Return options for small networks and images."""
    for i, view in enumerate(views[:2]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), (view[0, 0].numpy() * 255).round().astype(np.uint8))
    return [
        *("--extractor", weights, "--matcher", weights, "--keypoints", PLACES, "--size", f"{WIDTH}x{HEIGHT}"),
        *("--keypoint-threshold", 0, "--filter-threshold", 0.01),
        *("--images", tmp_path / "0.png", tmp_path / "1.png"),
    ]


def test_the_command_writes_and_checks_the_graphs_and_describes_them_in_json(
    run: Run, words: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "onnx"
    status, printed, errors = run(out, *words)
    assert (status, errors) == (0, "")
    assert "100.00 % of" in printed
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "extractor.onnx", "matcher.onnx"]
    assert [path.name for path in out.parent.iterdir()] == ["onnx"]  # no temporary files are left
    said = json.loads((out / "export.json").read_text())
    assert said["opset"] == OPSET and said["parity"]["share"] == 1 and said["matcher"]["filter_threshold"] == 0.01
    for name in ("extractor", "matcher"):
        session = onnxruntime.InferenceSession(out / said[name]["file"], providers=["CPUExecutionProvider"])
        for ports, theirs in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            kinds = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}
            assert said[name][ports] == [
                {"name": port.name, "dtype": kinds[port.type], "shape": port.shape} for port in theirs
            ]
    status, _, errors = run(out, *words)
    assert (status, errors) == (2, f"kpmatch export: {out} exists already: name another folder, or remove it\n")


def test_an_empty_output_folder_is_kept_even_as_a_link_or_the_current_folder(
    run: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    before = [(tmp_path / name).stat().st_ino for name in ("here", "linked")]
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", tmp_path / "link"):
        status, _, errors = run(out, *words)
        assert (status, errors) == (0, "")
        assert sorted(path.name for path in Path(out).iterdir()) == ["export.json", "extractor.onnx", "matcher.onnx"]
    assert (tmp_path / "link").is_symlink() and Path.cwd() == tmp_path / "here"
    assert [(tmp_path / name).stat().st_ino for name in ("here", "linked")] == before
    (tmp_path / "nowhere").symlink_to("missing")
    status, _, errors = run(tmp_path / "nowhere", *words)
    assert status == 2 and "nowhere exists already: name another folder, or remove it" in errors


def test_matches_that_differ_are_an_error(
    run: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = Parity(1, 0.0, 0.0, matches=100, equal=98, total=100, match_score_difference=0.0)
    monkeypatch.setattr("kpmatch_ros.models.export_check.compare", lambda *_: parity)
    status, _, errors = run(tmp_path / "out", *words)
    assert status == 2 and errors.count("\n") == 1
    assert "only 98.00 % of the matches agree with PyTorch, but at least 99 % should: do not use" in errors


def test_images_without_a_match_cannot_be_used_for_the_check(run: Run, words: list[Any], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((HEIGHT, WIDTH), np.uint8))
    status, _, errors = run(tmp_path / "out", *words, "--filter-threshold", 0.999)
    assert status == 2 and "the images have no matches to compare" in errors


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--size", "640"], "'640' is not a size such as 640x480"),
        (["--size", "4x480"], "images of 4 x 480 pixels are too small"),
        (["--size", "3841x2176"], "images of 3841 x 2176 pixels are too large"),
        (["--keypoints", "0"], "'0' is not a whole number of at least 1"),
        (["--matcher", "nearest"], "the matcher is NearestNeighbour, which has no network to export"),
        (["--no-check"], "not allowed with argument"),
    ],
)
def test_bad_usage_is_refused_in_one_line(
    run: Run, words: list[Any], tmp_path: Path, more: list[str], expected: str
) -> None:
    status, printed, errors = run(tmp_path / "out", *words, *more)
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert expected in errors
    assert not (tmp_path / "out").exists()


def test_missing_libraries_are_named(
    run: Run, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, printed, errors = run(tmp_path / "a", *words)
    assert status == 0 and "parity" not in printed
    assert "not compared with PyTorch: onnxruntime is not installed" in errors
    assert json.loads((tmp_path / "a" / "export.json").read_text())["parity"] is None
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, printed, errors = run(tmp_path / "b", *words)
    assert (status, printed) == (2, "")
    assert "onnx is not installed" in errors and "pip install onnx onnxruntime" in errors
    assert not (tmp_path / "b").exists()


def test_with_no_check_the_graphs_are_not_compared(run: Run, words: list[Any], tmp_path: Path) -> None:
    status, _, errors = run(tmp_path / "out", *words[:-3], "--no-check", "--dynamic")
    assert (status, errors) == (0, "")
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert said["dynamic"] and said["matcher"]["inputs"][4]["shape"] == ["B", "N1", 2]
