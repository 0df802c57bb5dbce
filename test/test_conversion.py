"""Tests of all five networks, converted from their authors' files to our formats and to `transformers`', and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_aliked import random_tensors as aliked_of_the_authors
from test_disk import random_tensors as disk_of_the_authors
from test_lightglue import authors_names as lightglue_of_the_authors
from test_superglue_weights import authors_file as superglue_of_the_authors
from test_superpoint import authors_names as superpoint_of_the_authors
from test_xfeat import random_tensors as xfeat_of_the_authors

from kpmatch_ros.models import ALIKED, DISK, LightGlue, SuperGlue, SuperPoint, XFeat
from kpmatch_ros.models.convert import convert, describe
from kpmatch_ros.weights import WeightsError

NETWORKS: dict[str, Any] = {kind.MODEL_TYPE: kind for kind in (LightGlue, SuperGlue, SuperPoint, ALIKED, DISK, XFeat)}
AuthorsFile = Callable[..., Path]


@pytest.fixture(scope="module")
def authors_file(
    tmp_path_factory: pytest.TempPathFactory,
    small_superpoint: dict[str, Any],
    small_lightglue: dict[str, Any],
    small_superglue: dict[str, Any],
    randomise_lightglue: Any,
    randomise_superglue: Any,
) -> AuthorsFile:
    """authors_file(model, input_dim=64) writes a small network with random weights in its authors' format."""

    def make(model: str, input_dim: int = 64) -> Path:
        path = tmp_path_factory.mktemp("authors") / f"{model}.pth"
        torch.manual_seed(0)
        content: Any
        if model == "superpoint":
            content = superpoint_of_the_authors(SuperPoint(**small_superpoint))
        elif model == "lightglue":
            matcher = LightGlue(input_dim=input_dim, **{**small_lightglue, "num_hidden_layers": 2})
            randomise_lightglue(matcher, 0)
            for layer in matcher.transformer_layers:
                layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
            content = lightglue_of_the_authors(matcher, old=False)
        elif model == "superglue":
            glue = SuperGlue(**small_superglue)
            randomise_superglue(glue, 0)
            content = superglue_of_the_authors(glue.state_dict(), heads=4)
        elif model == "aliked":
            content = aliked_of_the_authors(0, torch.rand(3, 64, 96))
        elif model == "disk":
            content = {"extractor": disk_of_the_authors(0)}
        else:
            content = xfeat_of_the_authors(0)
        torch.save(content, path)
        return path

    return make


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert found.config == expected.config
    tensors, others = found.state_dict(), expected.state_dict()
    assert list(tensors) == list(others)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in others.items())


@pytest.mark.parametrize("target", ["folder", "net.safetensors"])
@pytest.mark.parametrize("model", ["superpoint", "aliked", "disk", "xfeat"])
def test_an_extractor_keeps_its_weights_and_configuration(
    authors_file: AuthorsFile, tmp_path: Path, model: str, target: str
) -> None:
    source = authors_file(model)
    original = NETWORKS[model].from_pretrained(source)
    (written,) = convert(source, tmp_path / target)
    assert written.model == model
    assert_same(NETWORKS[model].from_pretrained(tmp_path / target), original)
    convert(tmp_path / target, tmp_path / "back")
    assert_same(NETWORKS[model].from_pretrained(tmp_path / "back"), original)


@pytest.mark.parametrize("model", ["lightglue", "superglue"])
def test_a_matcher_alone_can_be_written_to_one_file(authors_file: AuthorsFile, tmp_path: Path, model: str) -> None:
    source = authors_file(model)
    (written,) = convert(source, tmp_path / "net.safetensors")
    assert (written.model, written.precision) == (model, "float32")
    assert_same(NETWORKS[model].from_pretrained(tmp_path / "net.safetensors"), NETWORKS[model].from_pretrained(source))


@pytest.mark.parametrize(
    ("matcher", "extractor"),
    [
        ("lightglue", "superpoint"),
        ("superglue", "superpoint"),
        ("lightglue", "aliked"),
        ("lightglue", "disk"),
        ("lightglue", "xfeat"),
    ],
)
def test_a_matcher_and_its_extractor_share_a_folder(
    authors_file: AuthorsFile, tmp_path: Path, matcher: str, extractor: str
) -> None:
    detector = NETWORKS[extractor].from_pretrained(authors_file(extractor))
    sources = authors_file(matcher, detector.descriptor_size), authors_file(extractor)
    with pytest.raises(WeightsError, match=r"holds a matcher without the extractor .*--extractor"):
        convert(sources[0], tmp_path / "folder")
    networks = convert(sources[0], tmp_path / "folder", sources[1])
    assert [network.model for network in networks] == [matcher, extractor]
    for model, source in zip((matcher, extractor), sources):
        assert_same(NETWORKS[model].from_pretrained(tmp_path / "folder"), NETWORKS[model].from_pretrained(source))
    for found, written in zip(describe(tmp_path / "folder"), networks):
        assert (found.model, found.config, found.parameters) == (written.model, written.config, written.parameters)
    with pytest.raises(WeightsError, match=f"holds {matcher} and {extractor}, but a .safetensors file only one"):
        convert(tmp_path / "folder", tmp_path / "net.safetensors")


def test_transformers_loads_a_superglue_folder_made_from_the_authors_files(
    authors_file: AuthorsFile, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    convert(authors_file("superglue"), tmp_path / "folder", authors_file("superpoint"))
    kind = transformers.SuperGlueForKeypointMatching
    model, loading = kind.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.matching_threshold == 0.2 and model.config.keypoint_detector_config.descriptor_decoder_dim == 64
    theirs = model.state_dict()
    for name, tensor in SuperGlue.from_pretrained(tmp_path / "folder").state_dict().items():
        assert torch.equal(theirs[name], tensor), name


def test_a_superglue_saved_by_transformers_is_described_and_converted(
    tmp_path: Path, small_superpoint: dict[str, Any], small_superglue: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.SuperGlueConfig(
        **small_superglue, keypoint_detector_config={"model_type": "superpoint", **small_superpoint}
    )
    model = transformers.SuperGlueForKeypointMatching(config)
    model.save_pretrained(tmp_path / "theirs")
    matcher, detector = describe(tmp_path / "theirs")
    counts = {name: tensor.numel() for name, tensor in model.state_dict().items() if "num_batches" not in name}
    assert matcher.parameters + detector.parameters == sum(counts.values())
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert_same(SuperGlue.from_pretrained(tmp_path / "ours"), SuperGlue.from_pretrained(tmp_path / "theirs"))


def test_a_lightglue_with_the_authors_disk_inside_is_described_and_converted(
    authors_file: AuthorsFile, tmp_path: Path
) -> None:
    # As on the hub, where the detector belongs to another library's module inside the matcher.
    folder, size = tmp_path / "folder", DISK.from_pretrained(authors_file("disk")).descriptor_size
    convert(authors_file("lightglue", size), folder, authors_file("disk"))
    both = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in both.items() if not name.startswith("keypoint_detector.")}
    inside = {f"keypoint_detector.model.{name}": tensor for name, tensor in disk_of_the_authors(0).items()}
    save_file({**tensors, **inside}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["input_dim"]
    detector_config = {"model_type": "disk", "descriptor_decoder_dim": size}
    config.update(trust_remote_code=True, keypoint_detector_config=detector_config)
    (folder / "config.json").write_text(json.dumps(config))
    matcher, detector = describe(folder)
    assert (matcher.model, matcher.descriptor_size) == ("lightglue", size)
    assert (detector.model, detector.descriptor_size) == ("disk", size)
    convert(folder, tmp_path / "ours")
    assert_same(DISK.from_pretrained(tmp_path / "ours"), DISK.from_pretrained(authors_file("disk")))
    assert_same(LightGlue.from_pretrained(tmp_path / "ours"), LightGlue.from_pretrained(folder))


@pytest.mark.parametrize(
    ("matcher", "extractor", "wrong"),
    [
        ("lightglue", "superpoint", "lightglue"),
        ("lightglue", "superpoint", "superpoint"),
        ("lightglue", "aliked", "aliked"),
        ("lightglue", "disk", "disk"),
        ("superglue", "superpoint", "superglue"),
        ("superglue", "superpoint", "superpoint"),
        ("", "superpoint", "superpoint"),
        ("", "aliked", "aliked"),
        ("", "disk", "disk"),
    ],
)
def test_an_unknown_option_in_a_configuration_is_named(
    authors_file: AuthorsFile, tmp_path: Path, matcher: str, extractor: str, wrong: str
) -> None:
    detector, folder = authors_file(extractor), tmp_path / "folder"
    if matcher:
        size = NETWORKS[extractor].from_pretrained(detector).descriptor_size
        convert(authors_file(matcher, size), folder, detector)
    else:
        convert(detector, folder)
    config = json.loads((folder / "config.json").read_text())
    part = config["keypoint_detector_config"] if matcher and wrong == extractor else config
    part["rotate_first"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"sets rotate_first, which this {wrong} does not support"):
        NETWORKS[wrong].from_pretrained(folder)
    with pytest.raises(WeightsError, match="rotate_first"):
        describe(folder)
