"""Weights are what they claim to be, or are refused with what to do about it; fetching never leaves half a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpmatch_ros import FeatureMatcher, weights
from kpmatch_ros.models import LightGlue, SuperPoint
from kpmatch_ros.models.checkpoint import NETWORKS
from kpmatch_ros.weights import REGISTRY, Hub, Packaged, Url, Weights, WeightsError

SaveFolder = Callable[..., Path]


@pytest.fixture(scope="module")
def good_folder(random_folder: SaveFolder) -> Path:
    return random_folder()


@pytest.fixture
def folder(good_folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil of a Hugging Face folder with a LightGlue and its detector."""
    return Path(shutil.copytree(good_folder, tmp_path / "folder"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# -------------------------------------------------------------------------------------------------- what is registered


@pytest.mark.parametrize("item", REGISTRY.values(), ids=lambda item: item.name)
def test_registered_weights_say_where_they_come_from_and_what_one_may_do(item: Weights) -> None:
    assert item.licence
    assert item.origin
    assert len(item.sha256) == (0 if isinstance(item.source, Hub) else 64)
    assert set(item.networks) <= set(NETWORKS)
    if item.extractor:
        assert REGISTRY[item.extractor].model in ("superpoint", "aliked", "disk")
        assert item.commercial <= REGISTRY[item.extractor].commercial


def test_a_registered_matcher_fits_its_own_extractor_and_unknown_ones() -> None:
    item = REGISTRY["ETH-CVG/lightglue_superpoint"]
    assert item.fits("magic-leap-community/superpoint") and item.fits("ETH-CVG/lightglue_superpoint")
    assert item.fits("some/folder") and not item.fits("superpoint-open")
    assert not REGISTRY["lightglue-aliked"].fits("lightglue-aliked")


@pytest.mark.parametrize("name", [name for name, item in REGISTRY.items() if isinstance(item.source, Packaged)])
def test_weights_inside_the_package_are_there_and_whole(name: str) -> None:
    item = REGISTRY[name]
    assert item.file.stat().st_size == item.size
    weights.verify(item)
    assert weights.resolve(item.name) == item.path
    assert weights.fetch(item.name) == item.path


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"'superpiont'.*superpoint-open.*kpmatch weights list"):
        SuperPoint.from_pretrained("superpiont")
    with pytest.raises(WeightsError, match="no weights are called"):
        weights.fetch("superpiont")


# --------------------------------------------------------------------------------------------------- a folder's faults


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"folder is no folder of weights: its config\.json cannot be read"):
        LightGlue.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "<html></html>"])
def test_a_config_that_is_no_configuration_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    for network in (SuperPoint, LightGlue):
        with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
            network.from_pretrained(folder)


def test_a_folder_without_tensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        LightGlue.from_pretrained(folder)


def test_an_option_that_is_not_known_is_named(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(add_scale_ori=True))
    with pytest.raises(WeightsError, match="sets add_scale_ori, which this lightglue does not know"):
        LightGlue.from_pretrained(folder)
    edit_config(folder, lambda config: config["keypoint_detector_config"].update(subpixel=3, rotate=1))
    with pytest.raises(WeightsError, match="sets rotate, subpixel, which this superpoint does not know"):
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


def test_half_precision_weights_are_loaded_in_single(folder: Path) -> None:
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
    """Unpickled carelessly, it creates a file."""

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
    assert marker.exists()  # or the file was harmless and nothing was tested


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


# --------------------------------------------------------------------------------------- what does not belong together


def test_an_extractor_given_as_matcher_is_refused_and_the_other_way_round(random_folder: SaveFolder) -> None:
    with pytest.raises(WeightsError, match="superpoint-open holds a superpoint, not a lightglue"):
        FeatureMatcher(matcher="superpoint-open")
    with pytest.raises(WeightsError, match="lightglue-superpoint-open holds a lightglue, not a superpoint"):
        FeatureMatcher(extractor="lightglue-superpoint-open")


def test_a_detector_alone_is_no_matcher(folder: Path) -> None:
    edit_config(folder, lambda config: config.update(config["keypoint_detector_config"]))
    with pytest.raises(WeightsError, match="holds a superpoint, not a lightglue; check which is given as extractor"):
        LightGlue.from_pretrained(folder)


def test_descriptors_of_another_size_are_refused(good_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"takes descriptors of size 128, but .* makes descriptors of size 64"):
        FeatureMatcher(extractor=str(good_folder), device="cpu")


def test_a_registered_matcher_wants_the_extractor_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "superpoint-other", REGISTRY["superpoint-open"])
    with pytest.raises(WeightsError, match="lightglue-superpoint-open was made for the extractor superpoint-open, not"):
        FeatureMatcher(extractor="superpoint-other", device="cpu")


def test_the_small_matcher_matches_with_the_first_layers_of_the_large_one() -> None:
    large, small = (LightGlue.from_pretrained(f"lightglue-superpoint-open{suffix}") for suffix in ("", "-small"))
    count = len(small.transformer_layers)
    assert 0 < count == small.config["num_hidden_layers"] < len(large.transformer_layers)
    large.transformer_layers = large.transformer_layers[:count]
    large.depth_confidence = large.width_confidence = small.depth_confidence = small.width_confidence = -1
    points = torch.rand(1, 60, 2) * 300
    descriptors = torch.nn.functional.normalize(torch.randn(1, 60, large.input_dim), dim=2)
    size = torch.tensor([[300, 300]])
    inputs = points, points + 3, descriptors, descriptors, size, size
    expected, found = large(*inputs), small(*inputs)
    assert (found.matches0 >= 0).sum() > 30 and torch.equal(found.layers, expected.layers)
    assert torch.equal(found.matches0, expected.matches0) and torch.equal(found.scores0, expected.scores0)


# ------------------------------------------------------------------------------------------------------------ fetching


class Server(ThreadingHTTPServer):
    """Serves ``content``, in the way that the path asks for."""

    content = b""
    both_asked: threading.Barrier | None = None
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests += 1
        content, way = self.server.content, self.path.split("/")[1]
        if way == "missing":
            self.send_error(404)
            return
        if self.server.both_asked is not None:
            self.server.both_asked.wait(timeout=20)
        self.close_connection = True
        self.send_response(200)
        if way == "chunked-cut":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + content[: len(content) // 2])
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if way == "cut" else content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content = os.urandom(300_000)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def register(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Weights]:
    """register(way): weights that the server sends in some way."""
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "cache"))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def make(way: str) -> Weights:
        url = f"http://127.0.0.1:{server.server_port}/{way}/test.pth"
        digest = hashlib.sha256(server.content).hexdigest()
        item = Weights("test", "superpoint", "MIT", True, "a test", Url(url), len(server.content), digest)
        monkeypatch.setitem(REGISTRY, "test", item)
        return item

    return make


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_weights_are_fetched_once_and_found_again(
    server: Server, register: Callable[[str], Weights], tmp_path: Path
) -> None:
    item = register("good")
    with pytest.raises(WeightsError, match=r"not on this machine .*: kpmatch weights fetch test"):
        weights.resolve("test")
    received: list[int] = []
    path = weights.fetch("test", received.append)
    assert path == weights.resolve("test") == item.path
    assert tmp_path in path.parents
    assert path.read_bytes() == server.content
    assert sum(received) == len(server.content)
    assert weights.fetch("test") == path
    assert server.requests == 1
    assert files_below(tmp_path) == ["test.pth"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of files")
def test_fetched_weights_can_be_read_by_other_users(register: Callable[[str], Weights]) -> None:
    register("good")
    assert stat.S_IMODE(weights.fetch("test").stat().st_mode) & 0o044 == 0o044


def test_what_is_not_the_registered_file_is_not_kept(
    server: Server, register: Callable[[str], Weights], tmp_path: Path
) -> None:
    register("good")
    server.content = bytes(reversed(server.content))
    with pytest.raises(WeightsError, match=r"sent 300000 bytes with SHA-256 .*, not the registered .*nothing was kept"):
        weights.fetch("test")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("way", ["cut", "chunked-cut", "missing"])
def test_a_fetch_that_fails_leaves_nothing_behind(register: Callable[[str], Weights], tmp_path: Path, way: str) -> None:
    item = register(way)
    with pytest.raises(WeightsError, match="404" if way == "missing" else "150000 bytes|Incomplete") as error:
        weights.fetch("test")
    assert str(item.source) in str(error.value)
    assert str(item.file) in str(error.value)
    assert files_below(tmp_path) == []
    register("good")
    assert weights.fetch("test").exists()


def test_a_server_that_is_not_there_is_reported(
    server: Server, register: Callable[[str], Weights], tmp_path: Path
) -> None:
    item = register("good")
    server.server_close()
    with pytest.raises(WeightsError, match=r"could not be fetched from .*on another machine"):
        weights.fetch("test")
    assert files_below(tmp_path) == []
    assert not item.file.exists()


def test_a_cache_that_cannot_be_written_is_reported(
    register: Callable[[str], Weights], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register("good")
    (tmp_path / "file").touch()
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="could not be fetched"):
        weights.fetch("test")


def test_a_disk_without_room_is_reported_and_left_as_it_was(register: Callable[[str], Weights], tmp_path: Path) -> None:
    register("good")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes that a file may have from now on
    try:
        with pytest.raises(WeightsError, match=r"could not be fetched from .* \(.*too large"):
            weights.fetch("test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_below(tmp_path) == []
    assert weights.fetch("test").exists()


def test_two_fetches_at_once_both_succeed(server: Server, register: Callable[[str], Weights], tmp_path: Path) -> None:
    register("good")
    server.both_asked = threading.Barrier(2)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(weights.fetch("test"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == 2
    assert len(results) == 2
    assert results[0].read_bytes() == server.content
    assert files_below(tmp_path) == ["test.pth"]


def test_a_flipped_bit_is_found_and_healed_by_fetching_again(
    server: Server, register: Callable[[str], Weights]
) -> None:
    register("good")
    path = weights.fetch("test")
    weights.resolve("test")  # found to be good, once
    damaged = bytearray(server.content)
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match=r"is not the registered test: its SHA-256 is .*kpmatch weights fetch test"):
        weights.resolve("test")
    with pytest.raises(WeightsError, match="is not the registered test"):
        SuperPoint.from_pretrained("test")
    assert weights.fetch("test").read_bytes() == server.content


def test_damaged_weights_of_the_package_ask_for_another_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    item = REGISTRY["superpoint-open"]
    damaged = bytearray(item.file.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
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
