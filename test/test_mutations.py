"""Tests with randomly damaged files: `kpmatch` ends with status 0, or with 2 and one line, but never with a traceback.

Every run damages the same MUTATIONS files of bags, images, calibrations and parameters. KPMATCH_MUTATIONS sets a larger
number; 2,000 take about two minutes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bag_harness import QUICK

from kpmatch_ros import feature_matcher
from kpmatch_ros.bags import BagWriter, camera_info_message, image_message
from kpmatch_ros.parameters import Parameters
from simulation import demo_camera

Run = Callable[..., tuple[int, str, str]]
MUTATIONS = int(os.environ.get("KPMATCH_MUTATIONS", "270"))
KINDS = ("mcap", "sqlite3", "metadata", "png", "jpeg", "webp", "tiff", "calibration", "parameters")
SIZE = (48, 32)
CONFIGURATION = Path(__file__).resolve().parents[1] / "config" / "matcher.yaml"
# Replacements that often break parsers: for bytes, and for values in text.
BYTES = [
    b"\0",
    b"\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff" * 8,
    b"\x7f\xff\xff\xff",
    b"\x01\0\0\0",
    b"[" * 300,
    b"\n",
]
VALUES = [
    *(
        "",
        "0",
        "-1",
        "1e300",
        "-1e300",
        ".nan",
        ".inf",
        "99999999999999999999",
        "[]",
        "{}",
        "null",
        "~",
        "'",
        "?",
        "0x",
    ),
    *("[" * 2000, "true", "2001-99-99", "!!python/object:os.system x", "&a *a", "x" * 5000, "ß", "/**", "../../x"),
]


def mutated(content: bytes, random: np.random.Generator, text: bool) -> bytes:
    """Return the content with one to four changes: bytes flipped, cut, doubled, swapped or replaced; values in text."""
    for _ in range(int(random.integers(1, 5))):
        kind = int(random.integers(0, 9 if text else 6))
        at, other = sorted(int(place) for place in random.integers(0, len(content) + 1, 2))
        if kind == 0:
            content = content[:at] + bytes(random.integers(0, 256, 1, dtype=np.uint8)) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] if random.random() < 0.3 else content[:at] + content[min(other, at + 64) :]
        elif kind == 2:
            content = content[:other] + content[at : min(other, at + 500)] + content[other:]
        elif kind in (3, 4):
            new = BYTES[int(random.integers(0, len(BYTES)))]
            content = content[:at] + new + content[at + (len(new) if kind == 3 else 0) :]
        elif kind == 5:
            content = (
                content[:at]
                + random.permutation(np.frombuffer(content[at:other], np.uint8).copy()).tobytes()
                + content[other:]
            )
        else:
            lines = content.decode(errors="replace").split("\n")
            number = int(random.integers(0, len(lines)))
            value = VALUES[int(random.integers(0, len(VALUES)))]
            key = lines[number].split(":")[0]
            lines[number] = f"{key}: {value}" if kind < 8 else lines[number].replace(" ", "", 2)
            content = "\n".join(lines).encode()
    return content


def pictures() -> list[np.ndarray]:
    scene = cv2.resize(np.random.default_rng(3).integers(0, 256, (20, 30), dtype=np.uint8), (64, 40))
    return [scene[4 : 4 + SIZE[1], shift : shift + SIZE[0]] for shift in (0, 3)]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with valid files of every kind."""
    folder = tmp_path_factory.mktemp("seeds")
    for storage in ("mcap", "sqlite3"):
        with BagWriter(folder / storage, storage) as bag:  # type: ignore[arg-type]
            for number, picture in enumerate(pictures()):
                stamp = 10**18 + number * 10**8
                bag.write("/camera/image_raw", image_message(picture, stamp, "eye", "mono8"), stamp)
                bag.write("/camera/camera_info", camera_info_message(demo_camera(*SIZE), stamp, "eye"), stamp)
    for extension in ("png", "jpeg", "webp", "tiff"):
        cv2.imwrite(str(folder / f"picture.{extension}"), pictures()[0])
    shutil.copy(CONFIGURATION, folder / "params.yaml")
    return folder


class FileDamager:
    """Writes a damaged file of a given kind, and returns the arguments of a command that reads it."""

    def __init__(self, seeds: Path, work: Path) -> None:
        self.seeds, self.work = seeds, work

    def __call__(self, kind: str, random: np.random.Generator) -> list[Any]:
        if kind in ("mcap", "sqlite3", "metadata"):
            storage = kind if kind != "metadata" else str(random.choice(["mcap", "sqlite3"]))
            bag = self.work / "bag"
            shutil.copytree(self.seeds / storage, bag)
            name = "metadata.yaml" if kind == "metadata" else f"{storage}.{'db3' if storage == 'sqlite3' else 'mcap'}"
            file = bag / name
            file.write_bytes(mutated(file.read_bytes(), random, kind == "metadata"))
            if random.random() < 0.3 and kind != "metadata":
                (bag / "metadata.yaml").unlink()
            return ["bag", bag, self.work / "out", *QUICK, "--poses", self.work / "poses.txt"]
        if kind == "calibration":
            return ["bag", self.bag_with_random_calibration(random), self.work / "out", *QUICK]
        if kind == "parameters":
            file = self.work / "params.yaml"
            file.write_bytes(mutated((self.seeds / "params.yaml").read_bytes(), random, True))
            # Overrides the file's choice of networks and image size, because this tests only the reading.
            return ["bag", self.seeds / "mcap", self.work / "out", "--params", file, *QUICK, "--extractor",
                    "superpoint-open", "--mode", "mono", "--resize", "0"]  # fmt: skip
        file = self.work / f"picture.{kind}"
        file.write_bytes(mutated((self.seeds / f"picture.{kind}").read_bytes(), random, False))
        return ["match", file, self.seeds / "picture.png", *QUICK, "--json"]

    def bag_with_random_calibration(self, random: np.random.Generator) -> Path:
        """Return a bag whose calibration contains impossible numbers."""
        numbers = [0.0, 1.0, -1.0, 1e300, -1e-300, float("nan"), float("inf"), -0.3, 0.1, 48.0]
        models = ["plumb_bob", "rational_polynomial", "equidistant", "fisheye", "none", "", "ß"]
        with BagWriter(self.work / "bag") as bag:
            for number, picture in enumerate(pictures()):
                stamp = 10**18 + number * 10**8
                info = camera_info_message(demo_camera(*SIZE), stamp, "eye")
                info.distortion_model = str(random.choice(models))
                info.d = random.choice(numbers, int(random.choice([0, 3, 4, 5, 8, 14, 20])))
                for name in ("k", "p", "r"):
                    if random.random() < 0.3:
                        values = getattr(info, name).copy()
                        values[random.integers(0, 9)] = random.choice(numbers)
                        setattr(info, name, values)
                if random.random() < 0.3:
                    info.width, info.binning_x, info.roi.width = (
                        int(n) for n in random.choice([0, 1, 48, 2**32 - 1], 3)
                    )
                bag.write("/camera/image_raw", image_message(picture, stamp, "eye", "mono8"), stamp)
                bag.write("/camera/camera_info", info, stamp)
        return self.work / "bag"


@pytest.mark.timeout(1200)
def test_no_damaged_file_ends_a_command_with_a_traceback(
    kpmatch: Run, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KPMATCH_TRACEBACK", "1")  # errors of one line become exceptions
    # All runs share one set of networks, because loading and warming up would take most of the time.
    parameters = Parameters(device="cpu", precision="float32", matcher="nearest", max_keypoints=256)
    networks = feature_matcher.FeatureMatcher(parameters)
    monkeypatch.setattr(networks, "warm_up", lambda: None)
    monkeypatch.setattr("kpmatch_ros.front_end.FeatureMatcher", lambda *_: networks)
    ends: Counter[tuple[str, int]] = Counter()
    for number in range(MUTATIONS):
        random = np.random.default_rng(number)
        kind = KINDS[number % len(KINDS)]
        work = tmp_path / "work"
        work.mkdir()
        words = FileDamager(seeds, work)(kind, random)
        try:
            status, _, err = kpmatch(*words)
        except Exception as error:
            raise AssertionError(f"mutation {number} of kind {kind}") from error
        assert status in (0, 2), f"mutation {number} of kind {kind}: {err}"
        assert "Traceback" not in err
        if status == 2:
            lines = err.splitlines()  # warnings, for example of unknown parameters, and the reason
            assert lines and all(line.startswith("kpmatch ") for line in lines), f"mutation {number} of {kind}: {err}"
            assert not (work / "out").exists()
        ends[kind, status] += 1
        shutil.rmtree(work)
    print(dict(ends))
    # If all mutations ended in the same way, the test would prove little.
    for status in (0, 2):
        assert sum(count for (_, end), count in ends.items() if end == status) > MUTATIONS / 20, ends


def test_an_image_too_large_for_the_networks_is_reported_and_the_others_are_processed(
    kpmatch: Run, tmp_path: Path
) -> None:
    with BagWriter(tmp_path / "bag") as bag:
        for number, picture in enumerate([*pictures(), np.zeros((3000, 4000), np.uint8), *pictures()]):
            stamp = 10**18 + number * 10**8
            bag.write("/camera/image_raw", image_message(picture, stamp, "eye", "mono8"), stamp)
    status, out, err = kpmatch("bag", tmp_path / "bag", tmp_path / "out", *QUICK, "--json")
    assert status == 0 and "4000 x 3000 pixels: more than the 8.4 million that are allowed" in err
    assert json.loads(out)["rejected"] == {"size": 1} and json.loads(out)["frames"] == 4
