"""Tests of foreign weights, names and machines: refused in one sentence, with little memory and without a traceback."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bag_harness import QUICK, refused
from safetensors.torch import load_file, save_file

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models import ALIKED, DISK, LightGlue, SuperGlue, SuperPoint, XFeat
from kpmatch_ros.parameter_file import read_parameter_file
from kpmatch_ros.parameters import ParameterError
from kpmatch_ros.weights import WeightsError, resolve
from simulation.bags import write_demo_bag

Run = Callable[..., tuple[int, str, str]]


def changed(folder: Path, target: Path, part: str = "", **config: Any) -> Path:
    """Copy a folder of weights with changes in its configuration, or in `part` of it."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    read = json.loads((folder / "config.json").read_text())
    (read[part] if part else read).update(config)
    (target / "config.json").write_text(json.dumps(read))
    return target


@pytest.fixture(scope="module")
def folder(random_folder: Any) -> Path:
    return random_folder()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (LightGlue, {"num_hidden_layers": 100_000}),
        (LightGlue, {"num_hidden_layers": 10**30}),
        (LightGlue, {"num_hidden_layers": "9"}),
        (LightGlue, {"descriptor_dim": 30_000}),
        (LightGlue, {"descriptor_dim": 4 * 10**9}),
        (LightGlue, {"descriptor_dim": [64]}),
        (LightGlue, {"num_attention_heads": 0}),
        (LightGlue, {"filter_threshold": "high"}),
        (LightGlue, {"depth_confidence": float("nan")}),
        (SuperPoint, {"descriptor_decoder_dim": 10**6}),
        (SuperPoint, {"encoder_hidden_sizes": [64] * 100_000}),
        (SuperPoint, {"encoder_hidden_sizes": 64}),
        (SuperPoint, {"nms_radius": -5}),
        (SuperPoint, {"nms_radius": 10**9}),
        (SuperPoint, {"nms_radius": 2.5}),
        (SuperPoint, {"border_removal_distance": -1}),
        (SuperPoint, {"max_keypoints": -7}),
        (SuperPoint, {"keypoint_threshold": {}}),
    ],
)
def test_a_configuration_that_does_not_fit_the_file_is_refused_before_memory_is_allocated(
    folder: Path, tmp_path: Path, model: Any, config: dict[str, Any]
) -> None:
    part = "keypoint_detector_config" if model is SuperPoint else ""
    source = changed(folder, tmp_path / "weights", part, **config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=str(tmp_path)):
        model.from_pretrained(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_superglue_of_a_hundred_thousand_layers_is_refused(random_folder: Any, tmp_path: Path) -> None:
    source = changed(random_folder(superglue={}), tmp_path / "weights", gnn_layers_types=["self"] * 100_000)
    with pytest.raises(WeightsError, match="gnn_layers_types"):
        SuperGlue.from_pretrained(source)


@pytest.mark.parametrize(
    ("kind", "built", "said", "message"),
    [
        (SuperPoint, {}, {"keypoint_decoder_dim": 66}, "keypoint_decoder_dim is 66; it must be 65"),
        (SuperPoint, {}, {"keypoint_decoder_dim": 129}, "keypoint_decoder_dim is 129; it must be 65"),
        (SuperPoint, {}, {"encoder_hidden_sizes": [8, 8, 8]}, r"encoder_hidden_sizes is \[8, 8, 8\]; it must be four"),
        (SuperPoint, {}, {"encoder_hidden_sizes": [8] * 5}, "encoder_hidden_sizes is .*; it must be four"),
        (SuperPoint, {}, {"decoder_hidden_size": 0}, "decoder_hidden_size is 0; it must be 1 or more"),
        (SuperPoint, {}, {"subpixel": "false"}, "sets subpixel to 'false', which is not true or false"),
        (SuperPoint, {}, {"subpixel": 1}, "sets subpixel to 1, which is not true or false"),
        (LightGlue, {"num_hidden_layers": 2}, {"attention_bias": "false"}, "attention_bias to 'false', which is not"),
        (LightGlue, {"descriptor_dim": 24}, {"num_attention_heads": 8}, "8 heads .* an even number of channels"),
        (DISK, {}, {"kernel_size": 4}, "kernel_size is 4; it must be odd"),
        (DISK, {}, {"up": [64, 64]}, r"up is \[64, 64\]; it must be two numbers shorter than down"),
        (ALIKED, {}, {"encoder_sizes": [8, 8, 8]}, r"encoder_sizes is \[8, 8, 8\]; it must be 4 numbers"),
        (ALIKED, {}, {"descriptor_dim": 126}, "descriptor_dim is 126; it must be a multiple of 4"),
        (ALIKED, {}, {"refinement_radius": 200}, "refinement_radius is 200; it must be from 0 to 16"),
        (ALIKED, {}, {"refinement_radius": -1}, "refinement_radius is -1; it must be from 0 to 16"),
        (XFeat, {}, {"descriptor_dim": 32}, "descriptor_dim is 32; it must be 64"),
        (SuperGlue, {"gnn_layers_types": ["self"]}, {"sinkhorn_iterations": 10**18}, "sinkhorn_iterations is 10.*; it"),
        (SuperGlue, {"gnn_layers_types": ["self"]}, {"sinkhorn_iterations": 0}, "sinkhorn_iterations is 0; it must be"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused_with_its_key_and_value(
    kind: Any, built: dict[str, Any], said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    network = kind(**built)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {key: value for key, value in network.config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **said}))
    with pytest.raises(WeightsError, match=f"{tmp_path}.*{message}"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [ALIKED, DISK, XFeat])
def test_an_extractor_with_an_invalid_nms_radius_is_refused(kind: Any) -> None:
    with pytest.raises(WeightsError, match="nms_radius is -5; it must be from 0 to 64"):
        kind(nms_radius=-5)


def test_deeply_nested_json_is_refused(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, tmp_path / "weights")
    (source / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(WeightsError, match="nested too deeply"):
        LightGlue.from_pretrained(source)
    single = tmp_path / "single.safetensors"
    save_file(load_file(folder / "model.safetensors"), single, {"kpmatch_config": "[" * 100_000})
    with pytest.raises(WeightsError, match="single"):
        LightGlue.from_pretrained(single)


@pytest.mark.parametrize(
    "name", ["x" * 300, "a/" * 3000 + "b", "~nouser_at_all/x", "~nouser_at_all", "a\0b", "", "\n" * 9]
)
def test_an_impossible_name_of_weights_is_refused_in_one_line(kpmatch: Run, name: str) -> None:
    if name:
        with pytest.raises(WeightsError):
            FeatureMatcher(extractor=name)
    for words in (("weights", "info", name), ("weights", "fetch", name)):
        status, out, err = kpmatch(*words)
        assert (status, out) == (2, "") and err.count("\n") == 1 and "unexpected" not in err


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", ""])
def test_weights_in_a_fifo_are_refused_without_waiting(folder: Path, tmp_path: Path, part: str) -> None:
    source = tmp_path / "weights"
    if part:
        changed(folder, source)
        (source / part).unlink()
        os.mkfifo(source / part)
    else:
        os.mkfifo(source)
    with pytest.raises(WeightsError, match=r"FIFO|not a regular file"):
        LightGlue.from_pretrained(source)


def test_a_parameter_file_with_deep_nesting_or_an_invalid_date_is_refused(tmp_path: Path) -> None:
    for text in ("[" * 5000, "{a: " * 5000, "- " * 5000 + "x", "a: 2001-99-99"):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(ParameterError, match=r"params\.yaml"):
            read_parameter_file(tmp_path / "params.yaml")


# Machines and files


def test_packaged_weights_are_found_without_a_home_directory(kpmatch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(*_: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "KPMATCH_WEIGHTS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    status, out, err = kpmatch("weights", "list")
    assert status == 0 and "superpoint-open" in out and err == ""
    assert resolve("superpoint-open").exists()


def test_a_user_without_home_and_passwd_entry_can_match(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 80), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    words = ["match", str(tmp_path / "a.png"), str(tmp_path / "a.png"), "--device", "cpu", "--json"]
    code = (
        "import pwd, sys\ndef nobody(*_): raise KeyError('getpwuid(): uid not found: 54321')\n"
        f"pwd.getpwuid = nobody\nfrom kpmatch_ros.cli import main\nsys.exit(main({words!r}))"
    )
    keep = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "KPMATCH_WEIGHTS")
    }
    done = subprocess.run([sys.executable, "-c", code], env=keep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_keypoints"]


def test_kpmatch_match_scales_a_too_large_image_down_and_says_so(
    kpmatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the picture is written there
    monkeypatch.setattr("kpmatch_ros.feature_matcher.LARGEST_IMAGE", 100_000)  # otherwise this would take a minute
    small = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "large.jpg"), cv2.resize(small, (600, 400)))
    cv2.imwrite(str(tmp_path / "small.png"), cv2.resize(small, (300, 200)))
    words = ("match", tmp_path / "large.jpg", tmp_path / "small.png", *QUICK)
    status, out, err = kpmatch(*words, "--json")
    assert status == 0 and "large.jpg has 600 x 400 pixels" in err and "--resize 387" in err
    assert err.count("\n") == 1
    found = json.loads(out)
    assert found["num_keypoints"][0] > 0
    assert np.max(found["points0"], initial=388) > 387  # points are in pixels of the file
    status, _, err = kpmatch(*words, "--resize", 300)
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("sizes", "more", "said"),
    [
        ([(8900, 12), (8900, 12)], [], ["a.png has 8900 x 12 pixels, more", "--resize 8192\n", "b.png"]),
        ([(1000, 110), (400, 200)], [], ["a.png has 1000 x 110 pixels, more", "--resize 446\n"]),
        (
            [(100, 100), (100, 80)],
            ["--resize", 8192],
            ["a.png has 100 x 100 pixels, 8192 x 8192 with --resize 8192, m"],
        ),
    ],
    ids=["within the range of resize", "the other image is enlarged too", "enlarged by the user"],
)
def test_the_size_that_kpmatch_match_chooses_suits_both_images(
    kpmatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Any, more: list[Any], said: list[str]
) -> None:
    monkeypatch.setattr("kpmatch_ros.feature_matcher.LARGEST_IMAGE", 100_000)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, (width, height) in zip(files, sizes):
        cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
    status, out, err = kpmatch("match", *files, *QUICK, *more, "--json")
    assert status == 0 and len(json.loads(out)["num_keypoints"]) == 2, err
    assert all(text in err for text in said), err


def test_an_internal_error_is_one_line_unless_a_traceback_is_requested(
    kpmatch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KPMATCH_TRACEBACK", raising=False)
    monkeypatch.setattr("kpmatch_ros.weights.REGISTRY", None)
    status, out, err = kpmatch("weights", "list")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "AttributeError" in err
    monkeypatch.setenv("KPMATCH_TRACEBACK", "1")
    with pytest.raises(AttributeError):
        kpmatch("weights", "list")


@pytest.mark.parametrize("poses", ["out", "./out", "bag", "bag/metadata.yaml", "folder"])
def test_a_poses_path_that_is_already_in_use_is_refused_before_any_work(
    kpmatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poses: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_demo_bag(tmp_path / "bag", num_frames=2, size=(80, 60))
    (tmp_path / "folder").mkdir()
    before = (tmp_path / "bag" / "metadata.yaml").read_bytes()
    assert Path(poses).name in refused(kpmatch("bag", "bag", "out", "--poses", poses, *QUICK))
    assert not (tmp_path / "out").exists() and (tmp_path / "bag" / "metadata.yaml").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bag", "folder"]
