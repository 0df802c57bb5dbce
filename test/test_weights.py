"""Tests that invalid weights are refused with a remedy."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpmatch_ros import FeatureMatcher, weights
from kpmatch_ros.models import ALIKED, DISK, LightGlue, SuperPoint
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.checkpoint import NETWORKS
from kpmatch_ros.models.convert import convert
from kpmatch_ros.weights import REGISTRY, Hub, Packaged, Weights, WeightsError

SaveFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def good_folder(random_folder: SaveFolder) -> Path:
    return random_folder()


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    """A copy of a Hugging Face folder with a LightGlue and its detector, for changes."""
    return Path(shutil.copytree(good_folder, tmp_path / "folder"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# -------------------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("item", REGISTRY.values(), ids=lambda item: item.name)
def test_registered_weights_have_a_licence_an_origin_and_a_hash(item: Weights) -> None:
    assert item.licence
    assert item.origin
    assert len(item.sha256) == (0 if isinstance(item.source, Hub) else 64)
    assert set(item.networks) <= set(NETWORKS)
    if item.extractor:
        assert REGISTRY[item.extractor].model in ("superpoint", "aliked", "disk", "xfeat")
        assert item.commercial <= REGISTRY[item.extractor].commercial


def test_a_registered_matcher_fits_its_own_extractor_and_unknown_ones() -> None:
    item = REGISTRY["ETH-CVG/lightglue_superpoint"]
    assert item.fits("magic-leap-community/superpoint") and item.fits("ETH-CVG/lightglue_superpoint")
    assert item.fits("some/folder") and not item.fits("superpoint-open")
    assert not REGISTRY["lightglue-aliked"].fits("lightglue-aliked")


@pytest.mark.parametrize("name", [name for name, item in REGISTRY.items() if isinstance(item.source, Packaged)])
def test_packaged_weights_are_complete(name: str) -> None:
    item = REGISTRY[name]
    assert item.file.stat().st_size == item.size
    weights.verify(item)
    assert weights.resolve(item.name) == item.path
    assert weights.fetch(item.name) == item.path


def test_an_unknown_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(WeightsError, match=r"'superpiont'.*superpoint-open.*kpmatch weights list"):
        SuperPoint.from_pretrained("superpiont")
    with pytest.raises(WeightsError, match="no weights are called"):
        weights.fetch("superpiont")


# --------------------------------------------------------------------------------------------------- a folder's faults


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"folder is not a folder of weights: its config\.json cannot be read"):
        LightGlue.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "<html></html>"])
def test_an_invalid_config_json_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    for network in (SuperPoint, LightGlue):
        with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
            network.from_pretrained(folder)


def test_a_folder_without_tensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        LightGlue.from_pretrained(folder)


def test_an_unknown_option_is_named(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(add_scale_ori=True))
    with pytest.raises(WeightsError, match="sets add_scale_ori, which this lightglue does not support"):
        LightGlue.from_pretrained(folder)
    edit_config(folder, lambda config: config["keypoint_detector_config"].update(sharpen=3, rotate=1))
    with pytest.raises(WeightsError, match="sets rotate, sharpen, which this superpoint does not support"):
        SuperPoint.from_pretrained(folder)


@pytest.mark.parametrize(
    ("network", "change"),
    [
        (LightGlue, {"num_attention_heads": 0}),
        (LightGlue, {"num_attention_heads": 5}),
        (LightGlue, {"num_key_value_heads": 3}),
        (LightGlue, {"num_hidden_layers": -1}),
        (LightGlue, {"descriptor_dim": "wide"}),
        (LightGlue, {"hidden_act": "xielu"}),
        (LightGlue, {"num_hidden_layers": 6}),
        (LightGlue, {"descriptor_dim": 128}),
        (LightGlue, {"attention_bias": False}),
        (LightGlue, {"model_type": "superglue"}),
        (LightGlue, {"keypoint_detector_config": {"descriptor_decoder_dim": 128}}),
        (SuperPoint, {"keypoint_detector_config": None}),
        (SuperPoint, {"keypoint_detector_config": {"encoder_hidden_sizes": []}}),
        (SuperPoint, {"keypoint_detector_config": {"encoder_hidden_sizes": [8, 8, 8, 8]}}),
        (SuperPoint, {"keypoint_detector_config": {"model_type": "disk"}}),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(
    folder: Path, network: Any, change: dict[str, Any]
) -> None:
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(WeightsError, match=str(folder)):
        network.from_pretrained(folder)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["positional_encoder.projector.weight"]
        tensors["log_assignment.bias"] = torch.zeros(1)
        tensors["token_confidence.0.token.weight"] = torch.zeros(1, 63)

    edit_tensors(folder, change)
    with pytest.raises(WeightsError) as error:
        LightGlue.from_pretrained(folder)
    assert "positional_encoder.projector.weight is missing" in str(error.value)
    assert "log_assignment.bias is unknown" in str(error.value)
    assert "token_confidence.0.token.weight is (1, 63), not (1, 64)" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["positional_encoder.projector.weight"][0, 0] = value
        tensors["keypoint_detector.encoder.conv_blocks.0.conv_a.bias"][0] = value

    edit_tensors(folder, change)
    for network in (SuperPoint, LightGlue):
        with pytest.raises(WeightsError, match="not finite"):
            network.from_pretrained(folder)


def test_half_precision_weights_are_loaded_as_float32(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    assert {tensor.dtype for tensor in LightGlue.from_pretrained(folder).state_dict().values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------- a file's faults


@pytest.mark.parametrize("left", [0, 7, 5000, -1])
def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path, left: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:left])
    with pytest.raises(WeightsError, match=r"model\.safetensors cannot be read as weights .*fetch it again"):
        LightGlue.from_pretrained(folder)
    checkpoint = tmp_path / "lightglue.pth"
    torch.save({"a": torch.zeros(5000)}, checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"lightglue\.pth cannot be read as weights .*fetch it again"):
        LightGlue.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["superpoint_v1.pth", "model.safetensors", "pytorch_model.bin", "weights"])
def test_a_web_page_saved_as_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    with pytest.raises(WeightsError, match=rf"{name} cannot be read as weights .*web page"):
        SuperPoint.from_pretrained(tmp_path / name)


class _Command:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "bare pickle"])
def test_code_inside_a_file_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "was-run", tmp_path / "weights.pth"
    content = {"conv1a.weight": torch.zeros(1), "conv1a.bias": _Command(marker)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    for network in (SuperPoint, LightGlue):
        with pytest.raises(WeightsError, match=r"weights\.pth cannot be read as weights"):
            network.from_pretrained(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists()  # otherwise the file was harmless and the test proved nothing


def test_recursive_and_deeply_nested_dictionaries_are_refused(tmp_path: Path) -> None:
    itself: dict[str, Any] = {}
    itself["model"] = itself
    for content in (itself, {"a": {"b": {"c": {"d": {"e": torch.zeros(1)}}}}}):
        torch.save(content, tmp_path / "some.pth")
        with pytest.raises(WeightsError, match=r"some\.pth holds no named tensors"):
            SuperPoint.from_pretrained(tmp_path / "some.pth")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensor: tensor.to_sparse(), "is sparse or nested"),
        (lambda tensor: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is sparse or nested"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "is of the type qint8"),
        (lambda tensor: tensor + 1j, "is of the type complex64"),
        (lambda tensor: tensor.to("meta"), "is on the device meta"),
        (lambda tensor: torch.zeros(1).expand(tensor.shape), "repeats its numbers"),
        (lambda tensor: torch.zeros(1).expand(10**6, 10**6), "repeats its numbers"),
    ],
    ids=["sparse", "nested", "quantised", "complex", "meta", "expanded", "4 TB"],
)
def test_tensors_that_are_not_plain_arrays_are_named(
    tmp_path: Path, small_superpoint: dict[str, Any], change: Any, fault: str
) -> None:
    tensors = SuperPoint(**small_superpoint).state_dict()
    name = "encoder.conv_blocks.0.conv_a.weight"
    torch.save({**tensors, name: change(tensors[name])}, tmp_path / "some.pth")
    with pytest.raises(WeightsError, match=rf"some\.pth holds {name}, which {fault}; weights must be plain arrays"):
        SuperPoint.from_pretrained(tmp_path / "some.pth")


def test_shapes_are_compared_before_anything_is_copied(tmp_path: Path) -> None:
    # Many tensors share the memory of one: copies would take several times its memory.
    numbers = torch.zeros(64 << 20, dtype=torch.uint8)
    names = [f"{name}.{kind}" for name in ("conv1a", "convPa", "convDa", "convDb") for kind in ("weight", "bias")]
    torch.save(dict.fromkeys(names, numbers), tmp_path / "some.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=r"some\.pth"):
        SuperPoint.from_pretrained(tmp_path / "some.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {}, torch.zeros(3), {"model": {}}])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "some.pth")
    with pytest.raises(WeightsError, match=r"some\.pth holds no named tensors"):
        SuperPoint.from_pretrained(tmp_path / "some.pth")


@pytest.mark.parametrize(
    "tensors",
    [
        {"conv1a.weight": torch.zeros(64, 1, 3, 3)},
        {"conv1a.weight": torch.zeros(64, 1, 3, 3), "step": torch.zeros(1)},
        {"log_assignment.0.final_proj.weight": torch.zeros(256, 256)},
        {"log_assignment.0.final_proj.weight": torch.zeros(()), "posenc.Wr.weight": torch.zeros(())},
        {"fc.weight": torch.zeros(10, 10)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_a_file_with_only_some_of_the_tensors_is_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    torch.save(tensors, tmp_path / "some.pth")
    for network in (SuperPoint, LightGlue):
        with pytest.raises(WeightsError, match=r"some\.pth"):
            network.from_pretrained(tmp_path / "some.pth")


# -------------------------------------------------------------------------------------------- networks that do not fit


def test_an_extractor_given_as_matcher_is_refused_and_the_other_way_round(random_folder: SaveFolder) -> None:
    with pytest.raises(WeightsError, match="superpoint-open holds a superpoint, not a lightglue"):
        FeatureMatcher(matcher="superpoint-open")
    with pytest.raises(WeightsError, match="lightglue-superpoint-open holds a lightglue, not a superpoint"):
        FeatureMatcher(extractor="lightglue-superpoint-open")


def test_a_detector_alone_is_refused_as_a_matcher(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(config["keypoint_detector_config"]))
    with pytest.raises(WeightsError, match="holds a superpoint, not a lightglue; check which is given as extractor"):
        LightGlue.from_pretrained(folder)


def test_descriptors_of_another_size_are_refused(good_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"takes descriptors of size 128, but .* makes descriptors of size 64"):
        FeatureMatcher(extractor=str(good_folder), device="cpu")


def test_a_registered_matcher_accepts_only_the_extractor_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "superpoint-other", REGISTRY["superpoint-open"])
    with pytest.raises(WeightsError, match="lightglue-superpoint-open was made for the extractor superpoint-open, not"):
        FeatureMatcher(extractor="superpoint-other", device="cpu")


@pytest.mark.parametrize("network", [DISK, ALIKED])
def test_an_extractor_of_another_kind_is_refused_even_if_its_descriptor_size_fits(
    network: Any, random_folder: SaveFolder, tmp_path: Path
) -> None:
    """In this test SuperPoint has descriptors of 128 numbers, as have DISK and ALIKED."""
    file = tmp_path / "other.safetensors"
    save_file(network().state_dict(), file)
    of_a_superpoint = random_folder(superpoint={"descriptor_decoder_dim": 128})
    for matcher in ("lightglue-superpoint-open", str(of_a_superpoint)):
        with pytest.raises(WeightsError, match=f"made for the features of a superpoint, but .* a {network.MODEL_TYPE}"):
            FeatureMatcher(extractor=str(file), matcher=matcher, device="cpu")
    with pytest.raises(WeightsError, match="made for the features of a superpoint"):
        convert("lightglue-superpoint-open", tmp_path / "both", extractor=file)
    FeatureMatcher(extractor=str(file), matcher="nearest", device="cpu")


def test_the_fast_extractor_works_with_the_matchers_of_its_teacher() -> None:
    for suffix in ("", "-small"):
        assert REGISTRY[f"lightglue-superpoint-open{suffix}"].fits("superpoint-open-fast")
    assert not REGISTRY["lightglue-superpoint-open"].fits("aliked-n16")
    assert not REGISTRY["lightglue-superpoint-open-fast"].fits("superpoint-open")  # it knows only the fast one


def test_the_small_matcher_matches_with_the_first_layers_of_the_large_one() -> None:
    large, small = (LightGlue.from_pretrained(f"lightglue-superpoint-open{suffix}") for suffix in ("", "-small"))
    count = len(small.transformer_layers)
    assert 0 < count == small.config["num_hidden_layers"] < len(large.transformer_layers)
    large.transformer_layers = large.transformer_layers[:count]
    large.depth_confidence = large.width_confidence = small.depth_confidence = small.width_confidence = -1
    points = torch.rand(1, 60, 2) * 300
    descriptors = torch.nn.functional.normalize(torch.randn(1, 60, large.input_dim), dim=2)
    size = torch.tensor([[300, 300]])
    images = ImageFeatures(points, descriptors, size), ImageFeatures(points + 3, descriptors, size)
    expected, found = large(*images), small(*images)
    assert (found.matches0 >= 0).sum() > 30 and torch.equal(found.layers, expected.layers)
    assert torch.equal(found.matches0, expected.matches0) and torch.equal(found.scores0, expected.scores0)


# ----------------------------------------------------------------------------------------------------- on this machine


def test_damaged_packaged_weights_ask_the_user_to_reinstall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    item = REGISTRY["superpoint-open"]
    damaged = bytearray(item.file.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
    (tmp_path / "config.json").write_bytes((item.path / "config.json").read_bytes())
    moved = Weights(**{**vars(item), "source": Packaged(str(tmp_path))})
    monkeypatch.setitem(REGISTRY, item.name, moved)
    for action in (SuperPoint.from_pretrained, weights.fetch):
        with pytest.raises(WeightsError, match=r"damaged or was replaced: install kpmatch_ros again"):
            action(item.name)
    moved.file.unlink()
    with pytest.raises(WeightsError, match=r"not on this machine .*install kpmatch_ros again"):
        SuperPoint.from_pretrained(item.name)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "chosen"))
    assert weights.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("KPMATCH_WEIGHTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_folder() == tmp_path / "xdg" / "kpmatch_ros"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / ".cache" / "kpmatch_ros"
