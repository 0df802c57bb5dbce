"""Tests of bags from killed recorders, from other tools and with poor metadata: every loss is reported."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bag_harness import QUICK, refused

from kpmatch_ros.bags import (
    BagError,
    BagWriter,
    Topic,
    bag_topics,
    camera_info_message,
    image_message,
    read_messages,
    typestore,
)
from kpmatch_ros.bags.storage import zstd
from simulation import demo_camera
from simulation.bags import write_camera_bag

Run = Callable[..., tuple[int, str, str]]
STAMPS = [1_700_000_000_000_000_000 + 100_000_000 * i for i in range(8)]
IMAGE, INFO = "sensor_msgs/msg/Image", "sensor_msgs/msg/CameraInfo"
TOPIC = "/camera/image_raw"


def picture(number: int = 0) -> np.ndarray:
    """Return a part of one scene, shifted with the number."""
    return np.random.default_rng(5).integers(0, 256, (120, 240), dtype=np.uint8)[:, 4 * number : 160 + 4 * number]


def raw_image(number: int) -> bytes:
    return bytes(typestore().serialize_cdr(image_message(picture(number), STAMPS[number], "eye", "mono8"), IMAGE))


def stamps_of(path: Path, topic: str = TOPIC) -> list[int]:
    return [record.stamp for record in read_messages(path, [topic])]


def remarks_of(path: Path, topics: Sequence[str] | None = None) -> str:
    remarks: list[str] = []
    for _ in read_messages(path, topics, remarks):
        pass
    return "\n".join(remarks)


# MCAP, written by hand


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<I", len(content)) + content


def record(code: int, content: bytes) -> bytes:
    return struct.pack("<BQ", code, len(content)) + content


def write_mcap(
    path: Path,
    *,
    kind: str = IMAGE,
    topic: str = TOPIC,
    chunks: int = 2,
    summary: bool = True,
    statistics: bool = True,
    message_indexes: bool = True,
    repeated: bool = True,
    chunk_indexes: bool = True,
    foreign: Sequence[tuple[str, str, bytes]] = (),
    declared: int | None = None,
    profile: str = "ros2",
    schema_encoding: str = "",
    outside: int = 0,
    schemas: str = "first",
    too_long: int = 0,
    compression: str = "",
    definition: str = "",
) -> Path:
    """Write eight images to an MCAP file with a more or less complete index.

    `foreign` channels: topic, encoding, content of the schema. `outside`: chunks whose messages lie outside any chunk.
    `schemas`: first, last or absent, in the summary. `too_long`: bytes by which the index overstates chunk lengths.
    `compression`: of the chunks, zstd or none.
    """
    schema_of_images = record(3, struct.pack("<H", 1) + text(kind) + text(schema_encoding) + text(definition))
    channel_of_images = record(4, struct.pack("<HH", 1, 1) + text(topic) + text("cdr") + text(b""))
    head = schema_of_images + channel_of_images
    for number, (name, encoding, schema) in enumerate(foreign, 2):
        head += record(3, struct.pack("<H", number) + text("foxglove.Log") + text(encoding) + text(schema))
        head += record(4, struct.pack("<HH", number, number) + text(name) + text(encoding) + text(b""))

    def message(channel: int, number: int, content: bytes) -> bytes:
        return record(5, struct.pack("<HIQQ", channel, number, STAMPS[number], STAMPS[number]) + content)

    groups = np.array_split(np.arange(8), chunks) if chunks else [np.arange(8)]
    data = b"\x89MCAP0\r\n" + record(1, text(profile) + text("by hand"))
    in_summary = {"first": head, "last": channel_of_images + schema_of_images, "absent": channel_of_images}
    index = in_summary[schemas] if repeated else b""
    for position, group in enumerate(groups):
        content = head if position == 0 else b""
        places = []
        for number in map(int, group):
            places.append((STAMPS[number], len(content)))
            content += message(1, number, raw_image(number))
            for channel in range(2, 2 + len(foreign)):
                content += message(channel, number, b"\x08\x96\x01")
        if position >= chunks - outside:
            data += content
            continue
        first, last = STAMPS[int(group[0])], STAMPS[int(group[-1])]
        place = len(data)
        packed, check = (zstd.compress(content), zlib.crc32(content)) if compression else (content, 0)
        data += record(6, struct.pack("<QQQI", first, last, len(content), check) + text(compression) + struct.pack("<Q", len(packed)) + packed)  # fmt: skip # noqa: E501
        end = len(data)
        offsets = b""
        if message_indexes:
            offsets = struct.pack("<HQ", 1, end)
            data += record(7, struct.pack("<H", 1) + text(b"".join(struct.pack("<QQ", *entry) for entry in places)))
        if chunk_indexes:
            fixed = struct.pack("<QQQQ", first, last, place, end - place + too_long)
            index += record(8, fixed + text(offsets) + struct.pack("<Q", len(data) - end) + text(compression) + struct.pack("<QQ", len(packed), len(content)))  # fmt: skip # noqa: E501
    data += record(15, struct.pack("<I", 0))
    start = len(data)
    if summary:
        data += index
        if statistics:
            count = 8 if declared is None else declared
            counts = struct.pack("<HQ", 1, count) + b"".join(struct.pack("<HQ", 2 + i, 8) for i in range(len(foreign)))
            total = count + 8 * len(foreign)
            fixed = struct.pack("<QHIIIIQQ", total, 1, 1 + len(foreign), 0, 0, chunks - outside, STAMPS[0], STAMPS[-1])
            data += record(11, fixed + text(counts))
    data += record(2, struct.pack("<QQI", start if summary else 0, 0, 0)) + b"\x89MCAP0\r\n"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"message_indexes": False},
        {"message_indexes": False, "statistics": False},
        {"statistics": False},
        {"chunk_indexes": False},
        {"chunk_indexes": False, "message_indexes": False},
        {"repeated": False},
        {"summary": False},
        {"summary": False, "message_indexes": False},
        {"chunks": 0},
        {"chunks": 0, "statistics": False},
        {"chunks": 0, "summary": False},
        {"outside": 1},
        {"outside": 1, "message_indexes": False},
        {"chunks": 3, "outside": 2, "statistics": False},
        {"outside": 1, "too_long": 5},
        {"outside": 1, "too_long": 1 << 40},
        {"outside": 1, "too_long": -5},
        {"schemas": "last"},
        {"schemas": "absent"},
        {"profile": ""},
        {"kind": "sensor_msgs/Image"},
        {"kind": "sensor_msgs::msg::dds_::Image_"},
        {"foreign": [("/log", "protobuf", b"\n\xff\xfe\x00\x80 descriptor")]},
        {"foreign": [("/log", "json", b"{}"), ("/flat", "flatbuffer", b"\xc3\x28"), ("/ros1", "ros1", b"")]},
        {"foreign": [("/log", "protobuf", b"\xff")], "summary": False},
    ],
    ids=lambda parts: ",".join(f"{key}={value}" for key, value in parts.items())[:60],
)
def test_an_mcap_is_read_completely_even_if_its_index_is_incomplete(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write_mcap(tmp_path / "bag.mcap", **parts)
    assert bag_topics(path) == [Topic(TOPIC, IMAGE, 8)]
    messages = [found.message for found in read_messages(path, [TOPIC])]
    assert [bytes(message.data) for message in messages] == [picture(number).tobytes() for number in range(8)]
    assert stamps_of(path) == STAMPS
    remarks = remarks_of(path, [TOPIC])
    for topic, encoding, _ in parts.get("foreign", ()):
        assert f"{topic} ({encoding})" in remarks
    assert bool(remarks) == ("foreign" in parts)


def test_a_requested_topic_in_another_encoding_is_refused_with_its_encoding(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap", foreign=[("/log", "protobuf", b"\xff")])
    with pytest.raises(BagError, match=r"has no topic /log.*the messages on /log are in the encoding protobuf"):
        list(read_messages(path, ["/log"]))


def test_an_index_that_declares_too_many_messages_is_reported(kpmatch: Run, tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap", declared=100)
    status, out, err = kpmatch("bag", path, tmp_path / "out", *QUICK)
    said = f"{TOPIC}: the bag's index declares 100 messages, 8 were read"
    assert status == 0 and said in err and said in out


# sqlite3 of a killed recorder


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A bag of a killed recorder: its last four frames are only in the write-ahead log."""
    camera = demo_camera(160, 120)
    with BagWriter(tmp_path / "bag", "sqlite3") as bag:
        for number, stamp in enumerate(STAMPS):
            bag.write(TOPIC, image_message(picture(number), stamp, "eye", "mono8"), stamp)
            bag.write("/camera/camera_info", camera_info_message(camera, stamp, "eye"), stamp)
    (file,) = (tmp_path / "bag").glob("*.db3")
    database = sqlite3.connect(file)
    late = database.execute("SELECT * FROM messages WHERE timestamp >= ?", (STAMPS[4],)).fetchall()
    database.execute("DELETE FROM messages WHERE timestamp >= ?", (STAMPS[4],))
    database.commit()
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA wal_autocheckpoint=0")
    database.executemany("INSERT INTO messages VALUES (?, ?, ?, ?)", late)
    database.commit()
    (tmp_path / "killed").mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{file}{suffix}", tmp_path / "killed" / f"killed_0.db3{suffix}")
    database.close()
    return tmp_path / "killed"


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("shared_memory", [False, True])
def test_the_write_ahead_log_of_a_killed_recorder_is_read_and_nothing_is_written(
    killed: Path, bare: bool, shared_memory: bool
) -> None:
    if shared_memory:  # the recorder also leaves this file
        (killed / "killed_0.db3-shm").write_bytes(bytes(32768))
    before = {path.name: path.read_bytes() for path in killed.iterdir()}
    path = killed / "killed_0.db3" if bare else killed
    assert stamps_of(path) == STAMPS
    assert bag_topics(path) == [Topic("/camera/camera_info", INFO, 8), Topic(TOPIC, IMAGE, 8)]
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == before


def test_all_frames_of_a_killed_recorder_are_processed(kpmatch: Run, killed: Path, tmp_path: Path) -> None:
    status, out, _ = kpmatch("bag", killed, tmp_path / "out", *QUICK, "--json")
    assert status == 0 and json.loads(out)["frames"] == 8


# poor metadata


def test_a_database_without_a_time_index_is_read_without_a_large_temporary_file(tmp_path: Path) -> None:
    with BagWriter(tmp_path / "bag", "sqlite3") as bag:
        for number in (2, 0, 1, *range(3, 8)):
            view = np.tile(picture(number), (10, 10))
            bag.write(TOPIC, image_message(view, STAMPS[number], "eye", "mono8"), STAMPS[number])
    file = tmp_path / "bag" / "bag.db3"
    database = sqlite3.connect(file)
    database.execute("DROP INDEX timestamp_idx")
    database.commit()
    database.close()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # the bag has 15 MB

    code = (
        "import sys; from kpmatch_ros.bags import read_messages; "
        "print([record.stamp for record in read_messages(sys.argv[1])])"
    )
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == STAMPS


@pytest.fixture(params=["mcap", "sqlite3"])
def bag(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    images = [np.repeat(picture(number)[..., None], 3, axis=2) for number in range(8)]
    write_camera_bag(tmp_path / "bag", images, STAMPS, demo_camera(160, 120), storage=request.param)
    return tmp_path / "bag"


def change_metadata(bag: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = bag / "metadata.yaml"
    tree = yaml.safe_load(file.read_text())
    change(tree["rosbag2_bagfile_information"])
    file.write_text(yaml.safe_dump(tree))


KEYS = ("version", "storage_identifier", "relative_file_paths", "duration", "starting_time", "message_count",
        "topics_with_message_count", "compression_format", "compression_mode", "files", "ros_distro")  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(lambda tree, key=key: tree.pop(key, None), id=f"no {key}") for key in KEYS),
        pytest.param(lambda tree: tree.update(storage_identifier=""), id="empty storage_identifier"),
        pytest.param(lambda tree: tree.update(storage_identifier="my_plugin"), id="foreign storage_identifier"),
        pytest.param(lambda tree: tree.update(version=99), id="a later version"),
        pytest.param(lambda tree: tree.update(duration=None, starting_time=3), id="wrong times"),
        pytest.param(lambda tree: tree.update(files=None, message_count=None), id="no files and no count"),
        pytest.param(lambda tree: tree["topics_with_message_count"][0].pop("topic_metadata"), id="a nameless topic"),
        pytest.param(
            lambda tree: [t["topic_metadata"].pop("serialization_format") for t in tree["topics_with_message_count"]],
            id="no encoding",
        ),
        pytest.param(
            lambda tree: [
                t["topic_metadata"].update(type="sensor_msgs/Odd") for t in tree["topics_with_message_count"]
            ],
            id="wrong types",
        ),
    ],
)
def test_a_bag_with_poor_metadata_is_read(bag: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    change_metadata(bag, change)
    assert stamps_of(bag) == STAMPS
    assert bag_topics(bag) == [Topic("/camera/camera_info", INFO, 8), Topic(TOPIC, IMAGE, 8)]


def test_message_counts_in_the_metadata_that_differ_from_the_files_are_reported(
    kpmatch: Run, bag: Path, tmp_path: Path
) -> None:
    def declare(tree: dict[str, Any]) -> None:
        for topic in tree["topics_with_message_count"]:
            topic["message_count"] = 50

    assert remarks_of(bag) == ""
    change_metadata(bag, declare)
    status, out, err = kpmatch("bag", bag, tmp_path / "out", *QUICK)
    said = f"{TOPIC}: metadata.yaml declares 50 messages, the files hold 8"
    assert status == 0 and said in err and said in out
    _, out, _ = kpmatch("bag", bag, tmp_path / "again", *QUICK, "--json")
    assert said in json.loads(out)["remarks"]


def test_files_that_the_metadata_omits_are_reported_in_the_order_of_their_numbers(bag: Path, tmp_path: Path) -> None:
    (file,) = (path for path in bag.iterdir() if path.name != "metadata.yaml")
    for number in (1, 2, 10):
        shutil.copy(file, bag / f"bag_{number}{file.suffix}")
    change_metadata(
        bag, lambda tree: tree.update(relative_file_paths=[f"bag_{number}{file.suffix}" for number in (1, 2)])
    )
    assert stamps_of(bag) == STAMPS * 2
    assert f"bag_10{file.suffix}, which was not read" in remarks_of(bag)
    file.unlink()
    change_metadata(bag, lambda tree: tree.update(relative_file_paths=[]))
    remarks = remarks_of(bag)
    assert f"bag_1{file.suffix}, bag_2{file.suffix}, bag_10{file.suffix}" in remarks


def test_a_bag_may_have_more_files_than_a_process_may_have_open(bag: Path) -> None:
    (file,) = (path for path in bag.iterdir() if path.name != "metadata.yaml")
    names = [f"bag_{number}{file.suffix}" for number in range(80)]
    for name in names[1:]:
        shutil.copy(file, bag / name)
    file.rename(bag / names[0])
    change_metadata(bag, lambda tree: tree.update(relative_file_paths=names))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, limits[1]))
    try:
        assert stamps_of(bag) == STAMPS * 80
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_file_that_the_metadata_lists_twice_is_read_once(bag: Path) -> None:
    change_metadata(bag, lambda tree: tree.update(relative_file_paths=tree["relative_file_paths"] * 2))
    assert stamps_of(bag) == STAMPS


# damaged MCAP


def test_a_declared_calibration_without_messages_is_reported(kpmatch: Run, tmp_path: Path) -> None:
    """The index declares a channel for camera_info, but no chunk contains a message of it."""
    path = write_mcap(tmp_path / "bag.mcap")
    content = path.read_bytes()
    start = content.rindex(record(11, b"")[:1] + struct.pack("<Q", 42 + 4 + 10))
    channel = record(3, struct.pack("<H", 9) + text(INFO) + text("") + text(""))
    channel += record(4, struct.pack("<HH", 9, 9) + text("/camera/camera_info") + text("cdr") + text(b""))
    fixed = struct.pack("<QHIIIIQQ", 16, 2, 2, 0, 0, 2, STAMPS[0], STAMPS[-1])
    counts = struct.pack("<HQHQ", 1, 8, 9, 8)
    path.write_bytes(content[:start] + channel + record(11, fixed + text(counts)) + content[-37:])
    assert bag_topics(path)[0] == Topic("/camera/camera_info", INFO, 8)
    status, out, err = kpmatch("bag", path, tmp_path / "out", *QUICK)
    assert status == 0 and "declares messages on /camera/camera_info, but holds none that can be read" in err
    assert "NO_CALIBRATION 7" in out


def test_a_record_with_a_wrong_length_is_reported_as_truncated(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap", summary=False)
    content = bytearray(path.read_bytes())
    chunk = 8 + len(record(1, text("ros2") + text("by hand")))
    for length in (64 << 30, 900 << 30, len(content)):
        struct.pack_into("<Q", content, chunk + 1, length)
        path.write_bytes(content)
        with pytest.raises(BagError, match=r"a record is truncated; if the recording was cut short, `mcap recover`"):
            bag_topics(path)


@pytest.mark.parametrize(
    "definition",
    [
        "int32 odd",
        "uint32 height",
        "std_msgs/Header header\n" + "=" * 80 + "\nMSG: std_msgs/Header\nuint32 seq",
        "std_msgs/Header header",
    ],
)
def test_a_definition_of_an_image_with_other_fields_is_refused(kpmatch: Run, tmp_path: Path, definition: str) -> None:
    path = write_mcap(tmp_path / "bag.mcap", schema_encoding="ros2msg", definition=definition)
    assert f"the definition of {IMAGE} cannot be used" in refused(kpmatch("bag", path, tmp_path / "out", *QUICK))
