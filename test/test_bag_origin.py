"""Tests of the metadata of `kpmatch bag`'s output bag, its reported speed, and the files that it leaves."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bag_harness import FIRST, QUICK, Run
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader

import kpmatch_ros
from kpmatch_ros.bags import BagWriter, image_message
from kpmatch_ros.bags.recording import OutputError, Storage
from kpmatch_ros.weights import REGISTRY
from simulation import demo_camera
from simulation.bags import write_camera_bag

SIZE = (160, 120)


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bag` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bag")


@pytest.fixture
def image(texture: Any) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = texture(SIZE[1], SIZE[0], 0)
    return found


def custom_data(bag: Path) -> dict[str, str]:
    information = yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]
    return dict(information["custom_data"])


def test_the_metadata_names_the_input_the_parameters_and_the_weights(
    run: Run, image: NDArray[np.uint8], random_folder: Callable[..., Path], tmp_path: Path
) -> None:
    write_camera_bag(tmp_path / "drive", [image] * 2, [FIRST, FIRST + 10**8], demo_camera(*SIZE))
    weights = random_folder()
    words = ("--device", "cpu", "--precision", "float32", "--extractor", weights, "--matcher", "nearest")
    assert run(tmp_path / "drive", tmp_path / "out", *words)[0] == 0
    said = custom_data(tmp_path / "out")
    assert said["made by"] == f"kpmatch_ros {kpmatch_ros.__version__}" and said["made from"] == "drive"
    assert json.loads(said["parameters"])["matcher"] == "nearest"
    (camera,) = json.loads(said["topics"])
    assert (camera["image"], camera["num_images"]) == ("/camera/image_raw", 2)
    tensors = weights / "model.safetensors"
    assert json.loads(said["sha256"])[str(tensors)] == hashlib.sha256(tensors.read_bytes()).hexdigest()
    assert said["ran on"].startswith("cpu in float32 with ")
    assert run(tmp_path / "drive", tmp_path / "other", *QUICK)[0] == 0
    said = custom_data(tmp_path / "other")
    assert json.loads(said["sha256"])["superpoint-open"] == REGISTRY["superpoint-open"].sha256


@pytest.mark.parametrize("asked", [(), ("--features", "--match-image")])
def test_a_topic_without_messages_is_in_the_bag_with_its_type(
    run: Run, image: NDArray[np.uint8], tmp_path: Path, asked: tuple[str, ...]
) -> None:
    write_camera_bag(tmp_path / "in", [image], [FIRST], demo_camera(*SIZE))
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, *asked)[0] == 0
    types = {"/matches": "kpmatch_ros/msg/MatchArray", "/relative_pose": "kpmatch_ros/msg/RelativePose"}
    if asked:
        types |= {"/features": "kpmatch_ros/msg/FeatureArray", "/match_image": "sensor_msgs/msg/Image"}
    with AnyReader([tmp_path / "out"]) as reader:
        assert {connection.topic: connection.msgtype for connection in reader.connections} == types
        assert all(connection.msgdef.data for connection in reader.connections)


def test_pauses_and_bursts_in_the_recording_do_not_change_the_reported_speed(
    run: Run, image: NDArray[np.uint8], tmp_path: Path
) -> None:
    """Ten frames per second: evenly, with a pause of 100 s between the second and the third, and in bursts of three."""
    row = np.arange(9) * 10**8
    recorded = {"row": row, "pause": row + 100 * 10**9 * (np.arange(9) > 1), "bursts": row // (3 * 10**8) * 3 * 10**8}
    for name, times in recorded.items():
        write_camera_bag(tmp_path / name, [image] * 9, (FIRST + times).tolist(), demo_camera(*SIZE))
        figures = json.loads(run(tmp_path / name, tmp_path / f"{name}.out", *QUICK, "--json")[1])
        wanted = figures["rate"] * (0.075 if name == "bursts" else 0.1)  # the last burst is not followed by an interval
        assert figures["times_real_time"] == pytest.approx(wanted, abs=0.002, rel=0.01)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_that_cannot_be_finished_keeps_no_file_open(
    image: NDArray[np.uint8], tmp_path: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open file that is deleted still occupies space on a full disk."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bag = BagWriter(tmp_path / "out", storage)
    bag.write("/image", image_message(image, FIRST, "eye", "mono8"), FIRST)
    monkeypatch.setattr(vars(bag)["_writer"].storage, "close", full)
    with pytest.raises(OutputError, match="No space left"):
        bag.close()
    held = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [path for path in held if path.startswith(str(tmp_path))]
