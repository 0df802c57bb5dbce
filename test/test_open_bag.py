"""Tests of open bags: a command opens a bag once, and the passes over an open bag do not affect each other."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import QUICK, refused, table
from numpy.typing import NDArray
from test_damaged_bags import CHUNK, overwrite, places
from test_odd_bags import write
from test_recordings import IMAGE, INFO, STAMPS, TOPIC, picture, write_mcap

from kpmatch_ros.bags import Bag, BagError, BagWriter, camera_info_message, image_message, new_message, reading
from kpmatch_ros.bags.replay import replay
from kpmatch_ros.bags.storage import zstd
from simulation import demo_camera
from simulation.bags import write_camera_bag

Run = Callable[..., tuple[int, str, str]]
Monkey = pytest.MonkeyPatch
TF = "tf2_msgs/msg/TFMessage"


def storage_file(bag: Path) -> Path:
    return next(path for path in bag.iterdir() if path.suffix in (".mcap", ".db3"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: Monkey) -> Path:
    """The folder in which bags are decompressed."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def decompressed(monkeypatch: Monkey) -> list[str]:
    """The names of the files that have been decompressed."""
    names: list[str] = []
    opened = zstd.open

    def noted(stream: Any, *words: Any) -> Any:
        names.append(Path(stream.name).name)
        return opened(stream, *words)

    monkeypatch.setattr(zstd, "open", noted)
    return names


@pytest.fixture(params=["mcap", "sqlite3"])
def packed(request: pytest.FixtureRequest, tmp_path: Path, views: list[NDArray[np.uint8]]) -> Path:
    """A bag with a camera and its transform to the robot. Its one file is compressed as a whole."""
    with BagWriter(tmp_path / "packed", request.param) as bag:
        bag.write("/tf_static", new_message(TF), STAMPS[0])
        for stamp, view in zip(STAMPS[:4], views):
            bag.write("/camera/camera_info", camera_info_message(demo_camera(160, 120), stamp, "eye"), stamp)
            bag.write(TOPIC, image_message(view, stamp, "eye", "mono8"), stamp)
    plain = storage_file(tmp_path / "packed")
    plain.with_name(f"{plain.name}.zstd").write_bytes(zstd.compress(plain.read_bytes()))
    plain.unlink()
    return tmp_path / "packed"


# Commands


def test_a_replay_decompresses_a_bag_that_is_compressed_as_a_whole_exactly_once(
    kpmatch: Run, packed: Path, temporary: Path, decompressed: list[str], tmp_path: Path
) -> None:
    (file,) = packed.glob("*.zstd")
    status, out, err = kpmatch("bag", packed, tmp_path / "out", "--base-frame", "base", "--json", *QUICK)
    assert status == 0 and json.loads(out)["frames"] == 4, err
    assert decompressed == [file.name] and not list(temporary.iterdir())


def test_an_archive_decompresses_each_bag_exactly_once(
    kpmatch: Run, packed: Path, temporary: Path, decompressed: list[str], tmp_path: Path
) -> None:
    (file,) = packed.glob("*.zstd")
    (tmp_path / "in").mkdir()
    packed.rename(tmp_path / "in" / "packed")
    assert kpmatch("archive", tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
    assert table(tmp_path / "out")["packed"]["frames"] == "4"
    assert decompressed == [file.name] and not list(temporary.iterdir())


@pytest.mark.parametrize("parts", [{}, {"summary": False}])
def test_a_replay_opens_a_bag_exactly_once(
    kpmatch: Run, tmp_path: Path, parts: dict[str, Any], monkeypatch: Monkey
) -> None:
    opened = []

    class Noted(reading.Recording):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(reading, "Recording", Noted)
    path = write_mcap(tmp_path / "drive.mcap", **parts)
    assert kpmatch("bag", path, tmp_path / "out", *QUICK)[0] == 0
    assert opened == [path]


def test_the_decompressed_file_is_removed_after_an_error(
    kpmatch: Run, packed: Path, temporary: Path, tmp_path: Path, monkeypatch: Monkey
) -> None:
    words = ("bag", packed, tmp_path / "out")
    assert "no such image topic" in refused(kpmatch(*words, "--image", "/other", *QUICK))
    assert "is the bag to write" in refused(kpmatch(*words, "--poses", tmp_path / "out", *QUICK))
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            assert list(temporary.iterdir())
            raise KeyboardInterrupt

        patch.setattr("kpmatch_ros.pipeline.Pipeline.process", stop)
        assert kpmatch(*words, *QUICK)[0] == 130
    assert not list(temporary.iterdir())


def test_a_compressed_bag_without_messages_leaves_no_decompressed_file(tmp_path: Path, temporary: Path) -> None:
    with BagWriter(tmp_path / "bag", "sqlite3"):
        pass
    plain = storage_file(tmp_path / "bag")
    packed = tmp_path / "packed.db3.zstd"
    packed.write_bytes(zstd.compress(plain.read_bytes()))
    with pytest.raises(BagError, match="holds no messages"):
        Bag(packed)
    assert not list(temporary.iterdir())


# Passes


def healthy(folder: Path) -> Path:
    write_camera_bag(folder / "bag", [picture(0)] * 4, STAMPS[:4], demo_camera(160, 120), encoding="mono8")
    return folder / "bag"


def with_a_damaged_chunk(folder: Path, **parts: Any) -> Path:
    path = write_mcap(folder / "drive.mcap", chunks=4, compression="zstd", **parts)
    overwrite(path, places(path, CHUNK)[2][0] + 1000, bytes(4096))
    return path


def with_a_damaged_chunk_and_no_index(folder: Path) -> Path:
    return with_a_damaged_chunk(folder, summary=False)


def with_many_damaged_chunks(folder: Path) -> Path:
    """A bag in two files, each with more damaged chunks than are reported one by one."""
    (folder / "drive").mkdir()
    for number in range(2):
        path = write_mcap(folder / "drive" / f"drive_{number}.mcap", chunks=8, compression="zstd")
        for begin, _ in places(path, CHUNK)[1:]:
            overwrite(path, begin + 1000, bytes(4096))
    return folder / "drive"


def with_damaged_pages(folder: Path) -> Path:
    with BagWriter(folder / "bag", "sqlite3") as bag:
        for number in range(40):
            stamp = STAMPS[0] + number * 10**8
            bag.write(TOPIC, image_message(picture(number % 8), stamp, "eye", "mono8"), stamp)
    path = storage_file(folder / "bag")
    overwrite(path, path.stat().st_size * 93 // 100 // 4096 * 4096, bytes(8192))
    return path


def with_undecodable_messages(folder: Path) -> Path:
    info = camera_info_message(demo_camera(160, 120), STAMPS[0], "eye")
    images = [image_message(picture(number), STAMPS[number], "eye", "mono8") for number in range(3)]
    return write(
        folder / "bag",
        ("/camera/camera_info", INFO, STAMPS[0], info),
        *[(TOPIC, IMAGE, stamp, image) for stamp, image in zip(STAMPS, images)],
        (TOPIC, IMAGE, STAMPS[3], b"\0\1\0\0"),
        (TOPIC, INFO, STAMPS[4], info),
    )


def with_a_lost_file(folder: Path) -> Path:
    (folder / "drive").mkdir()
    for number in range(3):
        write_mcap(folder / "drive" / f"drive_{number}.mcap", schema_encoding="ros2msg", declared=100)
    (folder / "drive" / "drive_1.mcap").write_bytes(b"")
    return folder / "drive"


BAGS = [
    *(healthy, with_a_damaged_chunk, with_a_damaged_chunk_and_no_index, with_many_damaged_chunks, with_damaged_pages),
    *(with_undecodable_messages, with_a_lost_file),
]


@pytest.fixture(params=BAGS, ids=lambda make: make.__name__)
def bag(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path)


def content(record: Any) -> tuple[Any, ...]:
    message = record.message
    return record.topic, record.type, record.stamp, bytes(message.data) if record.type == IMAGE else message.k.tolist()


def pass_over(bag: Bag, topics: Any = None) -> tuple[list[Any], list[str], str]:
    """Return the messages, the remarks, and the error that a pass without remarks raises."""
    remarks: list[str] = []
    messages = [content(record) for record in bag.messages(topics, remarks)]
    try:
        for _ in bag.messages(topics):
            pass
    except BagError as error:
        return messages, remarks, str(error)
    return messages, remarks, ""


def open_files(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    names = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [name for name in names if name.startswith(str(folder))]


def test_passes_over_an_open_bag_give_the_same_messages_remarks_and_damage(bag: Path) -> None:
    for topics in (None, [TOPIC], {TOPIC: [IMAGE]}):
        with Bag(bag) as fresh:
            damage, first = [*fresh.damage], pass_over(fresh, topics)
        assert first[0]
        with Bag(bag) as opened:
            assert pass_over(opened) == pass_over(opened)
            assert pass_over(opened, topics) == first == pass_over(opened, topics)
            assert opened.damage == damage


def test_each_odd_bag_of_these_tests_has_remarks_and_an_error(tmp_path: Path) -> None:
    for make in BAGS:
        (tmp_path / make.__name__).mkdir()
        with Bag(make(tmp_path / make.__name__)) as opened:
            _, remarks, error = pass_over(opened)
        assert bool(remarks) == bool(error) == (make is not healthy), make.__name__


def test_an_abandoned_pass_changes_no_other_one_and_leaves_no_file_open(bag: Path, tmp_path: Path) -> None:
    with Bag(bag) as opened:
        first = pass_over(opened)
        for count in range(1, len(first[0]) + 1):
            remarks: list[str] = []
            abandoned = opened.messages(None, remarks)
            assert [content(next(abandoned)) for _ in range(count)] == first[0][:count]
            assert open_files(tmp_path)
            del abandoned
            assert not open_files(tmp_path) and not remarks
        assert pass_over(opened) == first


def test_passes_at_the_same_time_do_not_affect_each_other(bag: Path) -> None:
    with Bag(bag) as opened:
        messages, remarks, _ = pass_over(opened)
        said: list[list[str]] = [[], [], []]
        passes = [opened.messages(None, each) for each in said]
        found: list[list[Any]] = [[], [], []]
        next(passes[2])  # it remains there while the others are read
        for _ in range(len(messages) + 1):
            for number, each in enumerate(passes[:2]):
                found[number] += map(content, [record for record in [next(each, None)] if record is not None])
        found[2] = [messages[0], *map(content, passes[2])]
    assert found == [messages] * 3 and said == [remarks] * 3


# Files that change while the bag is open


def test_a_removed_or_replaced_file_is_reported_as_such(tmp_path: Path) -> None:
    for storage in ("mcap", "sqlite3"):
        for change in (Path.unlink, lambda file: os.replace(file.parent / "other", file)):
            write_camera_bag(tmp_path / "bag", [picture(0)] * 4, STAMPS[:4], None, encoding="mono8", storage=storage)
            file = storage_file(tmp_path / "bag")
            shutil.copyfile(file, file.parent / "other")
            with Bag(file) as bare, Bag(file.parent) as whole:
                change(file)
                for bag in (bare, whole):
                    said = f"{bag.path}: cannot be read: {file.name} was replaced or removed after the bag was opened"
                    for remarks in (None, []):
                        with pytest.raises(BagError) as caught:
                            list(bag.messages(None, remarks))
                        assert str(caught.value) == said
            shutil.rmtree(tmp_path / "bag")


def test_a_bag_of_an_archive_that_is_replaced_while_it_is_open_is_tried_again(
    kpmatch: Run, tmp_path: Path, monkeypatch: Monkey
) -> None:
    path = write_mcap(tmp_path / "drive.mcap")
    (tmp_path / "in").mkdir()
    shutil.copyfile(path, tmp_path / "in" / "drive.mcap")

    def replaced(bag: Bag, *words: Any, **options: Any) -> Any:
        os.replace(path, bag.path)
        return replay(bag, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr("kpmatch_ros.bags.replay.replay", replaced)
        assert kpmatch("archive", tmp_path / "in", tmp_path / "out", *QUICK)[0] == 2
    row = table(tmp_path / "out")["drive.mcap"]
    assert row["state"] == "failed" and "drive.mcap: changed while it was read, for example" in row["message"]
    assert kpmatch("archive", tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0


def test_a_compressed_bag_may_be_removed_once_it_is_open(packed: Path) -> None:
    with Bag(packed) as bag:
        first = [record.stamp for record in bag.messages()]
        shutil.rmtree(packed)
        assert [record.stamp for record in bag.messages()] == first and len(first) == 9


def test_a_recording_that_grows_is_read_as_far_as_when_it_was_opened(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "drive.mcap", chunks=4, compression="zstd")
    whole, end = path.read_bytes(), places(path, CHUNK)[3][0]
    path.write_bytes(whole[:end])
    with Bag(path) as bag:
        first = pass_over(bag)
        with path.open("ab") as file:
            file.write(whole[end:])
        assert pass_over(bag) == first and len(first[0]) == 6
    with Bag(path) as bag:
        assert len(list(bag.messages())) == 8
