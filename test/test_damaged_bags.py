"""Tests of unfinished and damaged bags: everything readable is read, and a remark reports what is missing."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import QUICK, refused, table
from rosbags.rosbag2 import StoragePlugin, Writer
from test_recordings import IMAGE, INFO, STAMPS, TOPIC, picture, raw_image, remarks_of, stamps_of, write_mcap

from kpmatch_ros.bags import (
    BagError,
    BagWriter,
    Topic,
    bag_topics,
    camera_info_message,
    image_message,
    mcap_file,
    read_messages,
    typestore,
)
from simulation import demo_camera
from simulation.bags import write_camera_bag

Run = Callable[..., tuple[int, str, str]]
Monkey = pytest.MonkeyPatch
STRING = "std_msgs/msg/String"
MAGIC = b"\x89MCAP0\r\n"
CHUNK, DATA_END, FOOTER, MESSAGE = 6, 15, 2, 5


def records(content: bytes) -> list[tuple[int, int, int]]:
    """Return code, begin and end of each record of an MCAP file."""
    found, place = [], len(MAGIC)
    while place < len(content) - len(MAGIC):
        code, length = struct.unpack_from("<BQ", content, place)
        found.append((code, place, place + 9 + length))
        place += 9 + length
    return found


def places(path: Path, code: int) -> list[tuple[int, int]]:
    return [(begin, end) for each, begin, end in records(path.read_bytes()) if each == code]


def overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def read(path: Path) -> tuple[list[int], str]:
    """Return the stamps of the readable images, and the remarks."""
    remarks: list[str] = []
    stamps = [found.stamp for found in read_messages(path, [TOPIC], remarks)]
    return stamps, "\n".join(remarks)


# a recorder that was killed or lost power


@pytest.mark.parametrize("parts", [{}, {"compression": "zstd"}, {"message_indexes": False}, {"outside": 1}])
def test_an_unfinished_mcap_is_read_up_to_its_last_complete_chunk(
    kpmatch: Run, tmp_path: Path, parts: dict[str, Any]
) -> None:
    path = write_mcap(tmp_path / "drive.mcap", chunks=4, **parts)
    last = places(path, CHUNK)[-1]
    count = 2 * len(places(path, CHUNK)) - 2
    path.write_bytes(path.read_bytes()[: last[1] - 10])
    stamps, remarks = read(path)
    assert stamps == STAMPS[:count] == stamps_of(path)
    rest = last[1] - 10 - last[0]
    assert remarks == (
        "drive.mcap: the recording was not finished, or was cut short; the last message read before that is at "
        f"1700000000.{count - 1}00000000 s; its last {rest} bytes, from byte {last[0]} on, hold no complete record"
    )
    assert bag_topics(path) == [Topic(TOPIC, IMAGE, count)]
    status, out, err = kpmatch("bag", path, tmp_path / "out", *QUICK)
    assert status == 0 and f"frames     {count} of" in out
    assert remarks in err and remarks in out


def test_an_mcap_that_lacks_only_its_end_is_read_completely(tmp_path: Path) -> None:
    for parts in ({"chunks": 4}, {"chunks": 0}, {"summary": False}):
        path = write_mcap(tmp_path / "bag.mcap", **parts)
        data, footer, size = places(path, DATA_END)[0], places(path, FOOTER)[0], path.stat().st_size
        index = f"the recording was finished, but its index, from byte {data[1]} on, was cut short or is damaged"
        for end, said in ((data[0], "was not finished"), (footer[0], index), (size - 1, index)):
            path.write_bytes(path.read_bytes()[:end])
            stamps, remarks = read(path)
            assert stamps == STAMPS == stamps_of(path) and said in remarks and "no complete record" not in remarks
            write_mcap(path, **parts)


@pytest.mark.parametrize("parts", [{"chunks": 4}, {"chunks": 0}, {"chunks": 3, "outside": 1, "compression": "zstd"}])
def test_an_mcap_cut_at_any_byte_gives_the_messages_before_the_cut(tmp_path: Path, parts: dict[str, Any]) -> None:
    content = write_mcap(tmp_path / "whole.mcap", **parts).read_bytes()
    path, most = tmp_path / "cut.mcap", 0
    for end in [*range(0, len(content), 997), *range(len(content) - 60, len(content))]:
        path.write_bytes(content[:end])
        try:
            stamps, remarks = read(path)
        except BagError as error:
            assert most == 0 and str(path) in str(error)
            continue
        assert stamps == STAMPS[: len(stamps)] and len(stamps) >= most and "the recording was" in remarks
        most = len(stamps)
    assert most == 8


def test_an_unfinished_mcap_without_a_complete_message_is_refused(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap")
    for end in (len(MAGIC) + 40, 5000):
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(BagError, match=r"it was not finished, and no message in it can be read.*`mcap recover`"):
            read(path)
        write_mcap(path)


# damage


@pytest.mark.parametrize("parts", [{}, {"summary": False}, {"chunk_indexes": False}, {"message_indexes": False}])
def test_a_damaged_chunk_loses_only_its_own_messages(kpmatch: Run, tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write_mcap(tmp_path / "drive.mcap", chunks=4, compression="zstd", **parts)
    begin, _ = places(path, CHUNK)[2]
    overwrite(path, begin + 1000, bytes(4096))
    stamps, remarks = read(path)
    assert stamps == [*STAMPS[:4], *STAMPS[6:]]
    said = f"drive.mcap: the data at byte {begin} is damaged: "
    assert said in remarks and "the last message read before that is at 1700000000.300000000 s" in remarks
    with pytest.raises(BagError, match=rf"drive\.mcap: cannot be read: {said}"):
        stamps_of(path)
    status, out, err = kpmatch("bag", path, tmp_path / "out", *QUICK)
    assert status == 0 and "frames     6 of" in out and said in out and said in err
    _, out, _ = kpmatch("bag", path, tmp_path / "again", *QUICK, "--json")
    assert any(remark.startswith(said) for remark in json.loads(out)["remarks"])


@pytest.mark.parametrize("summary", [True, False])
def test_messages_before_the_damage_in_an_uncompressed_chunk_are_kept(tmp_path: Path, summary: bool) -> None:
    path = write_mcap(tmp_path / "bag.mcap", chunks=2, summary=summary)
    begin, end = places(path, CHUNK)[1]
    overwrite(path, end - len(raw_image(7)) - 22 - 9, b"\xff" * 9)  # the header of its last message
    stamps, remarks = read(path)
    assert stamps == STAMPS[:7]
    said = f"the data at byte {begin} is damaged: a record in a chunk is truncated; its content after the damage was "
    assert remarks.count(said + "left out; ") == 1 == remarks.count(f"byte {begin}")
    assert "at 1700000000.600000000 s" in remarks


def test_the_index_gives_the_next_chunk_if_a_chunks_length_is_lost(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap", chunks=4, statistics=False)  # without statistics the file is scanned
    begin, _ = places(path, CHUNK)[2]
    overwrite(path, begin, bytes(200))
    stamps, remarks = read(path)
    assert stamps == [*STAMPS[:4], *STAMPS[6:]]
    assert f"the data at byte {begin} is damaged: no record begins there; it was left out" in remarks


@pytest.mark.parametrize("parts", [{"chunks": 4, "summary": False}, {"chunks": 0}])
def test_reading_ends_at_a_lost_length_without_an_index(tmp_path: Path, parts: dict[str, Any]) -> None:
    path = write_mcap(tmp_path / "bag.mcap", **parts)
    begin, _ = places(path, CHUNK)[2] if parts["chunks"] else places(path, MESSAGE)[4]
    overwrite(path, begin, b"\xff" * 9)
    stamps, remarks = read(path)
    assert stamps == STAMPS[:4]
    assert f"bag.mcap: it is damaged at byte {begin}: a record is truncated; the rest was not read" in remarks
    assert "the last message read before that is at 1700000000.300000000 s" in remarks


@pytest.mark.parametrize("lost", [bytes(9), b"\xff" * 9])
def test_damage_in_an_unfinished_mcap_is_not_mistaken_for_its_end(tmp_path: Path, lost: bytes) -> None:
    path = write_mcap(tmp_path / "bag.mcap", chunks=4)
    begin, _ = places(path, CHUNK)[1]
    path.write_bytes(path.read_bytes()[: places(path, DATA_END)[0][0]])
    overwrite(path, begin, lost)
    stamps, remarks = read(path)
    assert f"bag.mcap: it is damaged at byte {begin}: " in remarks and "the rest was not read" in remarks
    assert stamps == STAMPS[:2] and "was not finished" in remarks and "no complete record" not in remarks
    with pytest.raises(BagError, match=f"it is damaged at byte {begin}"):
        stamps_of(path)


def test_a_damaged_index_loses_no_message(tmp_path: Path) -> None:
    for code, at, content in ((DATA_END, 13, b"\xff" * 9), (FOOTER, 9, b"\xff" * 8), (FOOTER, 0, b"\xff" * 9)):
        path = write_mcap(tmp_path / "bag.mcap", chunks=4)
        overwrite(path, places(path, code)[0][0] + at, content)
        stamps, remarks = read(path)
        assert stamps == STAMPS and "bag.mcap: its index was not used, because it is damaged: " in remarks


def test_topics_defined_in_a_damaged_chunk_are_reported_as_lost(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap", chunks=4, compression="zstd", summary=False)
    begin, _ = places(path, CHUNK)[0]
    overwrite(path, begin + 1000, bytes(4096))
    with pytest.raises(BagError, match=r"holds no messages; .*6 messages were left out, because the records that name"):
        read(path)


def test_a_bag_with_only_damaged_chunks_is_refused(kpmatch: Run, tmp_path: Path) -> None:
    for summary in (True, False):
        path = write_mcap(tmp_path / "bag.mcap", chunks=2, compression="zstd", summary=summary)
        for begin, _ in places(path, CHUNK):
            overwrite(path, begin + 1000, bytes(4096))
        with pytest.raises(BagError, match=r"bag\.mcap: cannot be read: .*damaged"):
            list(read_messages(path, remarks=[]))
        assert "is damaged" in refused(kpmatch("bag", path, tmp_path / "out", *QUICK))


# sqlite3


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A bag with forty images in one sqlite3 file of about 800 kB."""
    with BagWriter(tmp_path / "bag", "sqlite3") as bag:
        for number in range(40):
            stamp = STAMPS[0] + number * 10**8
            bag.write(TOPIC, image_message(picture(number % 8), stamp, "eye", "mono8"), stamp)
    return tmp_path / "bag" / "bag.db3"


def test_the_undamaged_part_of_a_database_is_read(kpmatch: Run, database: Path, tmp_path: Path) -> None:
    stamps = stamps_of(database)
    overwrite(database, database.stat().st_size * 93 // 100 // 4096 * 4096, bytes(8192))
    kept, remarks = read(database)
    assert 36 <= len(kept) < 40 and set(kept) < set(stamps) and kept == sorted(kept)
    assert "bag.db3: " in remarks and "is damaged: database disk image is malformed" in remarks
    assert "the last message read before that is at 170000000" in remarks
    with pytest.raises(BagError, match=r"bag\.db3: cannot be read: .*malformed; .*`sqlite3 .*bag\.db3 \.recover` may"):
        stamps_of(database)
    status, out, err = kpmatch("bag", database.parent, tmp_path / "out", *QUICK)
    assert status == 0 and f"frames     {len(kept)} of" in out and "is malformed" in out and "is malformed" in err


def test_a_truncated_database_gives_only_recorded_messages(database: Path) -> None:
    whole = {found.stamp: bytes(found.message.data) for found in read_messages(database)}
    content, most = database.read_bytes(), 0
    for end in range(4096, len(content), 20_011):
        database.write_bytes(content[:end])
        remarks: list[str] = []
        try:
            found = {each.stamp: bytes(each.message.data) for each in read_messages(database, [TOPIC], remarks)}
        except BagError:
            assert not most
            continue
        assert found.items() <= whole.items()
        assert f"bag.db3: it was cut short: its last {len(content) - end} bytes are missing" in remarks
        most = max(most, len(found))
    assert most > 30


@pytest.mark.parametrize("page", range(0, 190, 7))
def test_each_lost_page_of_a_database_is_reported(database: Path, page: int) -> None:
    """The database's own pages are checked. The last page of an image contains nothing that can be checked."""
    stamps = stamps_of(database)
    size = database.stat().st_size
    overwrite(database, page * size // 190 // 4096 * 4096, b"\xff" * 4096)
    try:
        kept, remarks = read(database)
    except BagError as error:
        assert str(database) in str(error)
        return
    assert kept == [stamp for stamp in stamps if stamp in kept]
    assert bool(remarks) == (kept != stamps) or "index" in remarks


def test_a_database_that_cannot_be_opened_is_refused_with_the_sqlite_remedy(database: Path) -> None:
    overwrite(database, 100, bytes(3000))
    for path in (database, database.parent):
        with pytest.raises(BagError, match=rf"malformed; `sqlite3 {database} \.recover` may recover its content"):
            bag_topics(path)


@pytest.fixture
def text_database(tmp_path: Path) -> Path:
    """A message on a topic of its own, then 2,000 small messages on /a, in a database without overflow pages."""
    store = typestore()
    with Writer(tmp_path / "small", version=8, storage_plugin=StoragePlugin.SQLITE3) as writer:
        sparse, many = (writer.add_connection(name, STRING, typestore=store) for name in ("/tf_static_like", "/a"))
        for number in range(2001):
            content = store.serialize_cdr(store.types[STRING](f"number {number}"), STRING)
            writer.write(many if number else sparse, STAMPS[0] + number, content)
    return tmp_path / "small" / "small.db3"


def lose_a_leaf(path: Path) -> set[int]:
    """Overwrite the page one third into the table of messages, and return the numbers of the lost messages."""
    content = path.read_bytes()
    (size,) = struct.unpack_from(">H", content, 16)
    pages = (content[page : page + size] for page in range(0, len(content), size))
    leaves = [number * size for number, page in enumerate(pages) if page[0] == 13 and b"number " in page]
    page = leaves[len(leaves) // 3]
    overwrite(path, page, bytes(size))
    return {int(each[1]) for each in re.finditer(rb"number (\d+)", content[page : page + size])}


def numbers(path: Path, topic: str, remarks: list[str]) -> list[int]:
    return [int(found.message.data.split()[1]) for found in read_messages(path, [topic], remarks)]


def test_a_lost_page_of_a_table_loses_only_its_own_messages(text_database: Path) -> None:
    lost = lose_a_leaf(text_database)
    remarks: list[str] = []
    kept = numbers(text_database, "/tf_static_like", remarks) + numbers(text_database, "/a", remarks)
    assert lost and kept == [number for number in range(2001) if number not in lost]
    said = "\n".join(remarks)
    assert f"is damaged: database disk image is malformed; {len(lost)} messages in it cannot be read\n" in said
    assert f"messages were left out; the first one, in row {min(lost) + 1}, is damaged: " in said
    assert [topic.num_messages for topic in bag_topics(text_database)] == [2000 - len(lost), 1]


def test_without_an_index_all_messages_before_the_lost_page_are_read(text_database: Path) -> None:
    with closing(sqlite3.connect(text_database)) as database:
        database.execute("DROP INDEX timestamp_idx")
    lost = lose_a_leaf(text_database)
    assert numbers(text_database, "/tf_static_like", []) + numbers(text_database, "/a", []) == list(range(min(lost)))


def failing_at(function: Callable[..., Any], fault: Exception, place: int) -> Callable[..., Any]:
    """Return a function that raises an exception at one of its calls."""
    calls = itertools.count()

    def call(*args: Any) -> Any:
        if next(calls) == place:
            raise fault
        return function(*args)

    return call


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_io_or_memory_errors_are_not_damage_of_an_mcap(tmp_path: Path, monkeypatch: Monkey, fault: Exception) -> None:
    reading = mcap_file._Reading  # noqa: SLF001
    read_bytes = reading._exactly  # noqa: SLF001
    for summary, place in [(True, place) for place in range(32)] + [(False, place) for place in range(27)]:
        path = write_mcap(tmp_path / "bag.mcap", chunks=4, summary=summary)
        monkeypatch.setattr(reading, "_exactly", failing_at(read_bytes, fault, place))
        with pytest.raises(BagError, match=str(fault.args[-1])):
            read(path)


def test_a_disk_error_is_not_reported_as_damage_of_a_database(text_database: Path, monkeypatch: Monkey) -> None:
    lose_a_leaf(text_database)
    fault, connect = sqlite3.OperationalError("disk I/O error"), sqlite3.connect
    for place in (*range(12), 700, 900, 1700, 3000):
        execute = failing_at(sqlite3.Connection.execute, fault, place)
        kind = type("Failing", (sqlite3.Connection,), {"execute": lambda *args, execute=execute: execute(*args)})
        monkeypatch.setattr(sqlite3, "connect", functools.partial(connect, factory=kind))
        with pytest.raises(BagError, match="disk I/O error"):
            numbers(text_database, "/a", [])


# several files of one bag


@pytest.fixture(params=["mcap", "sqlite3"])
def split_bag(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A bag in twelve files with two images each, without metadata.yaml."""
    (tmp_path / "drive").mkdir()
    for number in range(12):
        stamps = [STAMPS[0] + (2 * number + each) * 10**8 for each in range(2)]
        images = [np.repeat(picture(each)[..., None], 3, axis=2) for each in range(2)]
        write_camera_bag(tmp_path / "part", images, stamps, demo_camera(160, 120), image_topic=TOPIC, storage=request.param)  # fmt: skip # noqa: E501
        (file,) = (path for path in (tmp_path / "part").iterdir() if path.stem == "part")
        file.rename(tmp_path / "drive" / f"drive_{number}{file.suffix}")
        shutil.rmtree(tmp_path / "part")
    return tmp_path / "drive"


def file_of(split_bag: Path, number: int) -> Path:
    (file,) = split_bag.glob(f"drive_{number}.*")
    return file


def test_numbered_files_without_metadata_are_one_bag(kpmatch: Run, split_bag: Path, tmp_path: Path) -> None:
    stamps, remarks = read(split_bag)
    assert stamps == [STAMPS[0] + number * 10**8 for number in range(24)]
    first, last = file_of(split_bag, 0).name, file_of(split_bag, 11).name
    assert remarks == f"there is no metadata.yaml: 12 files were read as one bag: {first} to {last}"
    file_of(split_bag, 0).unlink()  # a recorder that is short of space deletes its oldest file
    assert len(read(split_bag)[0]) == 22
    status, out, _ = kpmatch("bag", split_bag, tmp_path / "out", *QUICK)
    assert status == 0 and "frames     22 of" in out and "there is no metadata.yaml" in out


def test_files_of_several_bags_or_with_a_gap_are_not_read_as_one_bag(split_bag: Path) -> None:
    for change in (lambda: file_of(split_bag, 5).rename(split_bag / f"walk_5{file_of(split_bag, 5).suffix}"),
                   lambda: next(split_bag.glob("walk_5*")).unlink()):  # fmt: skip
        change()
        with pytest.raises(BagError, match=r"files but no metadata\.yaml, and they are not numbered.*ros2 bag reindex"):
            read(split_bag)


def test_a_damaged_file_of_a_split_bag_leaves_a_gap(kpmatch: Run, split_bag: Path, tmp_path: Path) -> None:
    name = file_of(split_bag, 3).name
    file_of(split_bag, 3).write_bytes(b"")
    stamps, remarks = read(split_bag)
    assert stamps == [STAMPS[0] + number * 10**8 for number in range(24) if number not in (6, 7)]
    said = f"{name}: cannot be read, so its messages are missing: "
    assert said in remarks
    with pytest.raises(BagError, match=f"drive: cannot be read: {name}"):
        stamps_of(split_bag)
    (tmp_path / "all").mkdir()
    split_bag.rename(tmp_path / "all" / "drive")
    status, printed, errors = kpmatch("archive", tmp_path / "all", tmp_path / "out", *QUICK)
    assert status == 0 and "1 done" in printed, errors
    row = table(tmp_path / "out")["drive"]
    assert row["state"] == "done" and row["frames"] == "22" and said in row["message"]


def test_a_split_bag_without_a_readable_file_is_refused(split_bag: Path) -> None:
    for number in range(12):
        file_of(split_bag, number).write_bytes(b"something else")
    with pytest.raises(BagError, match=r"drive: none of its 12 files can be read: drive_0\.\w+: cannot be read"):
        read(split_bag)


# definitions

_HEADER = "std_msgs/Header header\n"
_PIXELS = "uint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data\n"
_NESTED = f"{'=' * 80}\nMSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n"
_TIME = f"{'=' * 80}\nMSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n"


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        (_HEADER + _PIXELS + _NESTED + _TIME, ""),
        ((_HEADER + _PIXELS + _NESTED + _TIME).replace("\n", "\r\n"), ""),
        ("", "is empty"),
        (" \r\n", "is empty"),
        ("\x00\xff", "cannot be parsed"),
        (_HEADER + _PIXELS, "lacks std_msgs/msg/Header"),
        ((_HEADER + _PIXELS + _NESTED).replace("\n", "\r\n"), ""),
    ],
)
def test_images_are_read_even_with_a_damaged_message_definition(tmp_path: Path, definition: str, said: str) -> None:
    path = write_mcap(tmp_path / "bag.mcap", schema_encoding="ros2msg", definition=definition)
    found = [bytes(found.message.data) for found in read_messages(path, [TOPIC])]
    assert found == [picture(number).tobytes() for number in range(8)]
    remark = f"{IMAGE}: was decoded with this package's definition, because the bag's definition {said}"
    assert remarks_of(path) == (remark if said else "")


@pytest.mark.parametrize("storage", list(StoragePlugin))
@pytest.mark.parametrize(
    "change",
    [lambda _: "", lambda text: text.replace("\n", "\r\n"), lambda text: text.split("=" * 80)[0]],
    ids=["empty", "other line ends", "what it is made of left out"],
)
def test_calibration_is_read_even_with_a_damaged_message_definition(
    tmp_path: Path, storage: StoragePlugin, change: Callable[[str], str]
) -> None:
    store, camera = typestore(), demo_camera(160, 120)
    with Writer(tmp_path / "bag", version=8, storage_plugin=storage) as writer:
        definition = change(store.generate_msgdef(INFO)[0])
        connection = writer.add_connection("/info", INFO, msgdef=definition, rihs01="RIHS01_0")
        writer.write(connection, STAMPS[0], store.serialize_cdr(camera_info_message(camera, STAMPS[0], "eye"), INFO))
    (found,) = read_messages(tmp_path / "bag")
    assert found.message.k.tolist() == camera.matrix.ravel().tolist() and found.message.header.frame_id == "eye"


# messages outside chunks


def test_reading_a_topic_does_not_read_the_contents_of_others(tmp_path: Path) -> None:
    path = write_mcap(tmp_path / "bag.mcap", chunks=0, foreign=[("/points", "cdr", b"")], summary=False)
    content = path.read_bytes()
    end = places(path, DATA_END)[0][0]
    large = 1 << 28
    with path.open("r+b") as file:  # with holes, which take no disk space
        file.truncate(end)
        file.seek(end)
        for number in range(4):
            file.write(struct.pack("<BQ", MESSAGE, 22 + large) + struct.pack("<HIQQ", 2, 8, STAMPS[number] + 1, 0))
            file.seek(large, 1)
        file.write(content[end:])

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = bytes_read()
    assert stamps_of(path) == STAMPS
    assert bytes_read() - before < 10_000_000 < path.stat().st_size // 100
    assert Topic("/points", "foxglove.Log", 12) in bag_topics(path)
