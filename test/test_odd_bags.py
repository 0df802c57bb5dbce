"""Tests of unusual bags: `kpmatch bag` uses everything valid, and reports what it left out."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bag_harness import FIRST, QUICK, SIZE, Run, by_topic, header_stamp, refused, stamps
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from kpmatch_ros.bags import (
    BagError,
    BagWriter,
    camera_info_message,
    image_message,
    new_message,
    read_messages,
    typestore,
)
from kpmatch_ros.messages import nanoseconds
from kpmatch_ros.models import SuperPoint
from kpmatch_ros.pipeline import Pipeline
from simulation import demo_camera
from simulation.bags import write_camera_bag

IMAGE, INFO, TEXT = "sensor_msgs/msg/Image", "sensor_msgs/msg/CameraInfo", "std_msgs/msg/String"
CAMERA = demo_camera(*SIZE)


@pytest.fixture
def frames(texture: Any) -> list[Any]:
    wide = texture(150, 240, 5)
    views = [wide[i : i + SIZE[1], 4 * i : 4 * i + SIZE[0]] for i in range(6)]
    return [image_message(view, stamp, "eye", "mono8") for stamp, view in zip(stamps(6), views)]


def write(path: Path, *records: tuple[str, str, int, Any]) -> Path:
    """Write a bag of records: topic, type, time, and message or its bytes."""
    connections: dict[tuple[str, str], Any] = {}
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, kind, stamp, message in records:
            if (topic, kind) not in connections:
                connections[topic, kind] = writer.add_connection(topic, kind, typestore=typestore())
            data = message if isinstance(message, bytes) else typestore().serialize_cdr(message, kind)
            writer.write(connections[topic, kind], stamp, data)
    return path


def test_damaged_or_foreign_messages_are_left_out_and_all_valid_images_are_used(
    frames: list[Any], tmp_path: Path, kpmatch: Run
) -> None:
    text, info = new_message(TEXT, data="?"), camera_info_message(CAMERA, FIRST, "eye")
    damaged = [bytes(typestore().serialize_cdr(frames[0], IMAGE))[:length] for length in (0, 4, 40, 1000)]
    bag = write(
        tmp_path / "in",
        ("/eye/camera_info", TEXT, FIRST - 4, text),
        ("/eye/camera_info", INFO, FIRST - 3, b"\0\1\0\0"),
        ("/eye/camera_info", INFO, FIRST - 2, info),
        ("/tf_static", TEXT, FIRST - 1, text),
        *[("/eye/image", IMAGE, stamp, message) for stamp, message in zip(stamps(3), frames)],
        *[("/eye/image", IMAGE, stamps(3)[2] + 1, message) for message in damaged],
        ("/eye/image", TEXT, stamps(3)[2] + 2, text),
        *[("/eye/image", IMAGE, stamp, message) for stamp, message in zip(stamps(6)[3:], frames[3:])],
    )
    words = ("bag", bag, tmp_path / "out", "--json", "--base-frame", "base", *QUICK)
    status, out, err = kpmatch(*words)
    assert status == 0, err
    figures = json.loads(out)
    assert figures["frames"] == 6 and "NO_CALIBRATION" not in figures["poses"]
    assert "/eye/image: 5 of 11 messages were left out; the first one at 1700000000.200000001 s cannot be dec" in err
    assert "/eye/camera_info: 2 of 3 messages were left out; the first one at 1699999999.999999996 s has the" in err
    assert "/tf_static: 1 of 1 messages were left out; the first one at 1699999999.999999999 s has the type" in err
    with pytest.raises(BagError, match=r"a message on /eye/image at 1700000000\.200000001 s cannot be decoded"):
        list(read_messages(bag, {"/eye/image": [IMAGE]}))


def test_a_bag_with_only_damaged_images_is_refused_with_the_reason(tmp_path: Path, kpmatch: Run) -> None:
    bag = write(tmp_path / "in", *[("/image", IMAGE, stamp, b"\0\1\0\0") for stamp in stamps(3)])
    status, _, err = kpmatch("bag", bag, tmp_path / "out", *QUICK)
    assert status == 2 and err.count("\n") == 1
    assert "none of the 3 images on /image can be used: /image: 3 of 3 messages were left out; the first one at" in err


@pytest.mark.parametrize(("storage", "mode"), [("MCAP", "STORAGE"), ("SQLITE3", "MESSAGE")])
def test_data_that_is_too_large_when_decompressed_is_refused(
    tmp_path: Path, storage: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = new_message(IMAGE, encoding="mono8", data=np.zeros(2_000_000, np.uint8))
    writer = Writer(tmp_path / "in", version=8, storage_plugin=StoragePlugin[storage])
    writer.set_compression(CompressionMode[mode], CompressionFormat.ZSTD)
    with writer:
        connection = writer.add_connection("/image", IMAGE, typestore=typestore())
        writer.write(connection, FIRST, typestore().serialize_cdr(image, IMAGE))
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) < 100_000
    assert len(list(read_messages(tmp_path / "in"))) == 1
    monkeypatch.setattr("kpmatch_ros.bags.storage.LARGEST", 1_000_000)
    with pytest.raises(BagError, match="it is compressed, and has more than 1000000 bytes"):
        list(read_messages(tmp_path / "in"))


def test_raw_and_compressed_images_on_one_topic_are_one_camera(frames: list[Any], tmp_path: Path, kpmatch: Run) -> None:
    packed = image_message(frames[0].data.reshape(SIZE[::-1]), FIRST, "eye", "mono8", "png")
    bag = write(
        tmp_path / "in",
        ("/image", "sensor_msgs/msg/CompressedImage", FIRST, packed),
        *[("/image", IMAGE, stamp, message) for stamp, message in zip(stamps(3)[1:], frames[1:])],
    )
    status, out, err = kpmatch("bag", bag, tmp_path / "out", "--json", *QUICK)
    assert status == 0 and json.loads(out)["frames"] == 3, err


def test_stamps_beyond_the_largest_time_of_a_message_are_clamped(
    frames: list[Any], tmp_path: Path, kpmatch: Run
) -> None:
    frames[2].header.stamp.sec, frames[2].header.stamp.nanosec = 2**31 - 1, 2**32 - 1
    frames[3].header.stamp.sec, frames[3].header.stamp.nanosec = -(2**31), 0
    with BagWriter(tmp_path / "in") as bag:
        for stamp, message in zip(stamps(6), frames):
            bag.write("/image", message, stamp)
    status, out, err = kpmatch("bag", tmp_path / "in", tmp_path / "out", "--json", "--features", *QUICK)
    assert status == 0 and json.loads(out)["frames"] == 6, err
    found = [header_stamp(record.message) for record in by_topic(tmp_path / "out")["/features"]]
    assert found == [*stamps(2), 2**31 * 10**9 - 1, -(2**31) * 10**9, *stamps(6)[4:]]
    assert nanoseconds(frames[2].header.stamp) == found[2]


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
@pytest.mark.parametrize("most", [100, 30_000])
def test_a_full_disk_is_reported_with_the_file_and_no_output_is_left(
    frames: list[Any], tmp_path: Path, kpmatch: Run, storage: Any, most: int
) -> None:
    with BagWriter(tmp_path / "in", storage) as bag:
        for stamp, message in zip(stamps(6), frames):
            bag.write("/image", message, stamp)

    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        status, _, errors = kpmatch("bag", tmp_path / "in", out, "--match-image", "--poses", tmp_path / "p.txt", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith(f"kpmatch bag: {out}") and "cannot be written: " in errors
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_bag_created_by_another_program_is_reported_and_no_other_output_is_left(
    frames: list[Any], tmp_path: Path, kpmatch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    with BagWriter(tmp_path / "in") as bag:
        for stamp, message in zip(stamps(3), frames):
            bag.write("/image", message, stamp)

    class Late(BagWriter):
        def close(self) -> None:
            super().close()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "of another run").touch()

    monkeypatch.setattr("kpmatch_ros.bags.replay.BagWriter", Late)
    files = ("--report", tmp_path / "page.html", "--poses", tmp_path / "poses.txt")
    err = refused(kpmatch("bag", tmp_path / "in", tmp_path / "out", *files, *QUICK))
    assert f"{tmp_path / 'out'}: was created by another program" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_the_number_of_waiting_frames_is_limited_if_the_recorders_clock_goes_back(
    frames: list[Any], tmp_path: Path, kpmatch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number, (first, count) in enumerate([(FIRST + 10**12, 1), (FIRST, 150)]):
        with BagWriter(tmp_path / f"part{number}") as bag:
            if number == 0:
                bag.write("/mask", frames[0], FIRST)
            for stamp in range(first, first + count * 10**6, 10**6):
                message = image_message(frames[0].data.reshape(SIZE[::-1]), stamp, "eye", "mono8")
                bag.write("/image", message, stamp)
        (tmp_path / f"part{number}" / f"part{number}.mcap").rename(tmp_path / "in" / f"{number}.mcap")
    (tmp_path / "in" / "metadata.yaml").write_text(
        "rosbag2_bagfile_information: {relative_file_paths: [0.mcap, 1.mcap]}"
    )
    waiting, most = 0, 0
    add_image, process = Pipeline.add_image, Pipeline.process

    def added(*words: Any) -> Any:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return add_image(*words)

    def processed(*words: Any) -> Any:
        nonlocal waiting
        waiting -= 1
        return process(*words)

    monkeypatch.setattr(Pipeline, "add_image", added)
    monkeypatch.setattr(Pipeline, "process", processed)
    status, out, err = kpmatch("bag", tmp_path / "in", tmp_path / "out", "--json", "--image", "/image", *QUICK)
    assert status == 0 and json.loads(out)["frames"] == 151, err
    assert most <= 101


def write_frames(frames: list[Any], path: Path) -> None:
    with BagWriter(path) as bag:
        for stamp, message in zip(stamps(6), frames):
            bag.write("/image", message, stamp)


@pytest.mark.parametrize("option", ["--poses", "--report", "--rerun"])
def test_a_pipe_or_device_is_not_replaced_by_a_file(
    frames: list[Any], tmp_path: Path, kpmatch: Run, option: str
) -> None:
    if option != "--poses":
        pytest.importorskip({"--report": "plotly", "--rerun": "rerun"}[option])
    write_frames(frames, tmp_path / "in")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")  # as /dev/stdout links to a pipe
    for name in ("pipe", "link"):
        line = refused(kpmatch("bag", tmp_path / "in", tmp_path / "out", option, tmp_path / name, *QUICK))
        assert f"{tmp_path / name}: is a device or a pipe" in line
    assert (tmp_path / "pipe").is_fifo() and not (tmp_path / "out").exists()


def test_a_symbolic_link_stays_and_its_target_is_written(frames: list[Any], tmp_path: Path, kpmatch: Run) -> None:
    write_frames(frames, tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "poses.txt").symlink_to("elsewhere/poses.txt")
    status, _, err = kpmatch("bag", tmp_path / "in", tmp_path / "out", "--poses", tmp_path / "poses.txt", *QUICK)
    assert status == 0, err
    assert (tmp_path / "poses.txt").is_symlink() and (tmp_path / "elsewhere" / "poses.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "in", "out", "poses.txt"]


def test_a_full_disk_during_decompression_is_not_reported_as_a_damaged_bag(
    frames: list[Any], tmp_path: Path, kpmatch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = Writer(tmp_path / "in" / "bag", version=8, storage_plugin=StoragePlugin.SQLITE3)
    writer.set_compression(CompressionMode.FILE, CompressionFormat.ZSTD)
    (tmp_path / "in").mkdir()
    with writer:
        connection = writer.add_connection("/image", IMAGE, typestore=typestore())
        writer.write(connection, FIRST, typestore().serialize_cdr(frames[0], IMAGE))
    monkeypatch.setattr("kpmatch_ros.bags.recording.shutil.copyfileobj", full)
    for words in (("bag", tmp_path / "in" / "bag"), ("archive", tmp_path / "in")):
        status, out, err = kpmatch(*words, tmp_path / "out", *QUICK)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"no space for its content in {tempfile.gettempdir()}: No space left" in err and "TMPDIR" in err


@pytest.mark.parametrize("name", ["metadata.yaml", "in.mcap"])
def test_a_file_of_a_bag_is_never_overwritten(kpmatch: Run, tmp_path: Path, name: str) -> None:
    write_camera_bag(tmp_path / "in", [np.zeros((48, 64), np.uint8)] * 2, stamps(2), demo_camera(64, 48))
    content = (tmp_path / "in" / name).read_bytes()
    shutil.copytree(tmp_path / "in", tmp_path / "other")
    words = (tmp_path / "in" / "in.mcap", tmp_path / "out", "--poses")
    for folder in ("in", "other"):
        assert "belongs to" in refused(kpmatch("bag", *words, tmp_path / folder / name, *QUICK))
        assert (tmp_path / folder / name).read_bytes() == content


@pytest.mark.parametrize("option", ["--poses", "--report", "--rerun"])
def test_parameters_and_masks_are_never_overwritten(
    frames: list[Any], tmp_path: Path, kpmatch: Run, option: str
) -> None:
    write_frames(frames, tmp_path / "in")
    (tmp_path / "matcher.yaml").write_text("/**:\n  ros__parameters:\n    max_keypoints: 50\n")
    (tmp_path / "mask.png").write_bytes(b"a mask")
    (tmp_path / "link").symlink_to("mask.png")
    read = ["--params", tmp_path / "matcher.yaml", "--mask", tmp_path / "mask.png"]
    before = {path: path.read_bytes() for path in (tmp_path / "matcher.yaml", tmp_path / "mask.png")}
    for name in ("matcher.yaml", "mask.png", "link"):
        line = refused(kpmatch("bag", tmp_path / "in", tmp_path / "out", *read, option, tmp_path / name, *QUICK))
        assert f"{option} {tmp_path / name}: belongs to the input" in line
    assert before == {path: path.read_bytes() for path in before} and not (tmp_path / "out").exists()


def test_a_file_that_a_killed_recorder_was_compressing_is_read_once(kpmatch: Run, tmp_path: Path) -> None:
    folder = tmp_path / "drive"
    folder.mkdir()
    images = [np.full((48, 64), 40 * number, np.uint8) for number in range(4)]
    for number in range(2):
        part = tmp_path / f"part{number}"
        stamps = [FIRST + each * 10**8 for each in (2 * number, 2 * number + 1)]
        write_camera_bag(part, images[2 * number : 2 * number + 2], stamps, None, encoding="mono8")
        (part / f"part{number}.mcap").rename(folder / f"drive_{number}.mcap")
    (folder / "drive_1.mcap.zstd").write_bytes(b"half of it")
    status, out, _ = kpmatch("bag", folder, tmp_path / "out", *QUICK)
    assert status == 0 and "frames     4 of" in out
    assert "drive_1.mcap.zstd was not read, because drive_1.mcap is there as well" in out


def test_every_size_of_the_images_is_named(frames: list[Any], kpmatch: Run, tmp_path: Path) -> None:
    small = [image_message(np.full((48, 64), 99, np.uint8), stamp, "eye", "mono8") for stamp in stamps(9)[6:]]
    with BagWriter(tmp_path / "in") as writer:
        for message in [*frames, *small]:
            writer.write("/eye/image", message, header_stamp(message))
    status, out, _ = kpmatch("bag", tmp_path / "in", tmp_path / "out", *QUICK)
    assert status == 0 and "9 of 160 x 120 and 64 x 48 (/eye/image)" in out


def test_weights_whose_path_is_not_utf8_are_named_in_messages_with_escapes(
    kpmatch: Run, frames: list[Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / os.fsdecode(b"r\xe9.pth")
    torch.save(SuperPoint().state_dict(), weights)
    views = [np.frombuffer(frame.data, np.uint8).reshape(SIZE[::-1]) for frame in frames[:2]]
    write_camera_bag(tmp_path / "in", views, stamps(2), CAMERA, encoding="mono8")
    words = ("--extractor", weights, "--matcher", "nearest", "--keypoint-threshold", 0, "--max-keypoints", 50)
    assert kpmatch("bag", tmp_path / "in", tmp_path / "out", "--device", "cpu", *words)[0] == 0
    assert by_topic(tmp_path / "out")["/matches"][0].message.extractor.endswith("/r\\udce9.pth")
