"""Tests that kpmatch archive resumes: it repeats no finished bag, and takes no changed bag for a finished one."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import QUICK, SIZE, Run, stamps, table
from numpy.typing import NDArray

from kpmatch_ros.bags import Bag
from kpmatch_ros.bags.archive import Settings, claimed, find_bags, jobs_for, replay_one
from kpmatch_ros.bags.replay import replay
from kpmatch_ros.cli.bag import BAG_OPTIONS
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.weights import REGISTRY, Hub
from simulation import demo_camera
from simulation.bags import write_camera_bag


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch archive` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "archive")


def test_outputs_are_not_read_as_input_bags_even_through_links(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    out = tmp_path / "data" / "matched"
    (tmp_path / "data").mkdir()
    write_camera_bag(tmp_path / "data" / "x", views[:3], stamps(3), demo_camera(*SIZE))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all").symlink_to(tmp_path / "data")
    for _ in range(2):
        assert run(tmp_path / "in", out, *QUICK, "--match-image")[0] == 0
        assert list(table(out)) == ["all/x"]
    (tmp_path / "in" / "deeper").symlink_to(out / "all")
    (tmp_path / "in" / "latest.mcap").symlink_to(out / "all" / "x" / "x.mcap")
    assert [path.name for path in find_bags(tmp_path / "in", out)] == ["x"]


def test_outputs_of_another_bag_with_the_same_name_are_not_reused(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    for place, count in (("one", 3), ("two", 5)):
        (tmp_path / place).mkdir()
        write_camera_bag(tmp_path / place / "drive", views[:count], stamps(count), demo_camera(*SIZE))
    assert run(tmp_path / "one", tmp_path / "out", *QUICK)[0] == 0
    status, _, errors = run(tmp_path / "two", tmp_path / "out", *QUICK)
    assert status == 2 and f"{tmp_path / 'out' / 'drive'}: was made from another bag than {tmp_path / 'two'}" in errors
    assert table(tmp_path / "out")["drive"]["state"] == "failed"
    (tmp_path / "one").rename(tmp_path / "moved")  # a moved bag is the same bag
    assert "1 done (1 of them in an earlier run)" in run(tmp_path / "moved", tmp_path / "out", *QUICK)[1]
    shutil.rmtree(tmp_path / "out" / "drive")
    assert run(tmp_path / "two", tmp_path / "out", *QUICK)[0] == 0
    assert table(tmp_path / "out")["drive"]["frames"] == "5"


def test_other_weights_under_the_name_of_a_repository_are_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "cached", lambda self: None)
    monkeypatch.setenv("KPMATCH_WEIGHTS", str(tmp_path))
    item = REGISTRY["magic-leap-community/superpoint"]
    settings = Settings(Parameters(extractor=item.name, matcher="nearest"), {})
    described = []
    for content in (b"", b"one", b"other"):
        if content:
            item.file.parent.mkdir(parents=True, exist_ok=True)
            item.file.write_bytes(content)
        described.append(settings.described())
    hashes = [each[f"content of {item.name}"] for each in described]
    assert hashes == ["", *(hashlib.sha256(content).hexdigest() for content in (b"one", b"other"))]


def test_a_bag_that_changes_while_it_is_read_is_processed_in_the_next_run(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, count in (("in", 3), ("whole", 7)):
        (tmp_path / place).mkdir()
        write_camera_bag(tmp_path / place / "g", views[:count], stamps(count), None, storage="sqlite3")

    def copied(*words: Any, **options: Any) -> Any:
        report = replay(*words, **options)
        shutil.copy(tmp_path / "whole" / "g" / "g.db3", tmp_path / "in" / "g" / "g.db3")
        return report

    monkeypatch.setattr("kpmatch_ros.bags.replay.replay", copied)
    status, _, errors = run(tmp_path / "in", tmp_path / "out", *QUICK)
    assert status == 2 and f"{tmp_path / 'in' / 'g'}: changed while it was read" in errors
    row = table(tmp_path / "out")["g"]
    assert (row["state"], row["frames"]) == ("failed", "") and not (tmp_path / "out" / "g").exists()
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
    assert table(tmp_path / "out")["g"]["frames"] == "7"


def test_a_bag_with_more_files_or_another_write_ahead_log_counts_as_another_bag(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    split, killed = tmp_path / "in" / "split", tmp_path / "in" / "killed"
    (tmp_path / "in").mkdir()
    for bag in (split, tmp_path / "more", killed):
        storage = "sqlite3" if bag == killed else "mcap"
        write_camera_bag(bag, views[:3], stamps(3), demo_camera(*SIZE), storage=storage)
    shutil.copy(tmp_path / "more" / "more.mcap", split / "split_1.mcap")
    database = killed / "killed.db3"
    recorder = sqlite3.connect(database)
    recorder.execute("PRAGMA journal_mode=WAL")
    for kept in (1, 2):  # each step deletes one message, recorded only in the write-ahead log
        recorder.execute("DELETE FROM messages WHERE id = ?", (kept,))
        recorder.commit()
        shutil.copy(f"{database}-wal", tmp_path / f"{kept}-wal")
    shutil.copy(database, tmp_path / "db3")
    recorder.close()
    (killed / "metadata.yaml").unlink()

    def restore_files_of_killed_recorder(log: int) -> None:
        """Restore the files that a killed recorder leaves."""
        shutil.copy(tmp_path / "db3", database)
        shutil.copy(tmp_path / f"{log}-wal", f"{database}-wal")

    database.unlink()
    database = killed / "killed_0.db3"
    restore_files_of_killed_recorder(1)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
    restore_files_of_killed_recorder(2)
    metadata = split / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace("- split.mcap\n", "- split.mcap\n  - split_1.mcap\n", 1))
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 2
    rows = table(tmp_path / "out")
    assert {name: (row["state"], row["frames"]) for name, row in rows.items()} == {
        "split": ("failed", ""), "killed": ("done", "2")  # an unfinished bag may be continued
    }  # fmt: skip
    assert f"{tmp_path / 'out' / 'split'}: was made from another bag" in rows["split"]["message"]


def test_a_bag_read_during_its_copy_is_read_again_when_it_is_complete(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for count, end in ((3, -40), (6, None), (6, None)):
        write_camera_bag(tmp_path / "bag", views[:count], stamps(count), demo_camera(*SIZE))
        (tmp_path / "in" / "drive.mcap").write_bytes((tmp_path / "bag" / "bag.mcap").read_bytes()[:end])
        shutil.rmtree(tmp_path / "bag")
        assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
        (row,) = table(tmp_path / "out").values()
        assert (row["state"], row["frames"]) == ("done", str(count))
        assert ("cut short" in row["message"]) == (end is not None)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["drive_mcap"]


@pytest.mark.parametrize("damage", ["[" * 3000, "rosbag2_bagfile_information: !!bool maybe"])
def test_damaged_metadata_fails_only_its_own_bag(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, damage: str
) -> None:
    for name in ("done", "good", "never"):
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), None)
    (tmp_path / "in" / "good").rename(tmp_path / "good")
    (tmp_path / "in" / "never" / "metadata.yaml").write_text(damage)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
    (tmp_path / "good").rename(tmp_path / "in" / "good")
    (tmp_path / "in" / "done" / "metadata.yaml").write_text(damage)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 2
    rows = table(tmp_path / "out")
    assert {name: row["state"] for name, row in rows.items()} == {"done": "failed", "good": "done", "never": "broken"}
    assert "was made from another bag" in rows["done"]["message"]
    assert "metadata.yaml is damaged" in rows["never"]["message"]


def test_a_bag_stays_done_if_its_worker_died_after_finishing_it(
    views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bag = tmp_path / "in" / "drive"
    bag.parent.mkdir()
    write_camera_bag(bag, views[:3], stamps(3), demo_camera(*SIZE))
    options = dict(zip((word[2:].replace("-", "_") for word in QUICK[::2]), QUICK[1::2]))
    settings = Settings(Parameters.given({**options, "max_keypoints": 256}), {"image": None})
    with claimed(tmp_path / "out", settings) as unfinished:
        (job,) = jobs_for([bag], bag.parent, tmp_path / "out", unfinished)
        first = replay_one(job, settings)
        monkeypatch.setattr("yaml.safe_load", lambda text: pytest.fail("this takes longer than all else"))
        assert first["state"] == "done" and replay_one(job, settings) == first


DEADLY = """
import os, signal, sys
from kpmatch_ros.bags import archive
from kpmatch_ros.cli import main
choose = archive.choose_cameras
def choose_cameras(bag, *words):
    if bag.path.name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    return choose(bag, *words)
archive.choose_cameras = choose_cameras
sys.exit(main(["archive", *sys.argv[1:]]))
"""


def test_a_bag_that_kills_its_process_comes_last_and_is_skipped_after_four_attempts(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("deadly", "good"):
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), demo_camera(*SIZE))
    command = [sys.executable, "-c", DEADLY, tmp_path / "in", out, *QUICK]
    for attempt in range(4):
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        assert (out / "good").exists() == (attempt > 0)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "1 of 2 bags failed" in done.stderr
    assert f"{tmp_path / 'in' / 'deadly'}: is skipped, because 4 processes died" in done.stderr
    assert {name: row["state"] for name, row in table(out).items()} == {"deadly": "failed", "good": "done"}
    assert run(tmp_path / "in", out, *QUICK)[0] == 0  # with enough memory
    assert table(out)["deadly"]["state"] == "done" and not (out / ".attempts").exists()


def test_an_interrupted_run_does_not_count_as_a_failed_attempt(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_camera_bag(tmp_path / "in" / "drive", views[:3], stamps(3), demo_camera(*SIZE))
    with monkeypatch.context() as patch:
        patch.setattr("kpmatch_ros.bags.replay.replay", stop)
        for _ in range(5):
            assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 130
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("full", [False, True])
def test_an_interrupted_run_writes_the_table_of_finished_bags(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    out = tmp_path / "out"
    for name in ("a", "b", "c"):
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), demo_camera(*SIZE))

    def stopped_at_b(bag: Bag, *words: Any, **options: Any) -> Any:
        return stop() if bag.path.name == "b" else replay(bag, *words, **options)

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("kpmatch_ros.bags.replay.replay", stopped_at_b)
    if full:
        monkeypatch.setattr("kpmatch_ros.bags.archive_table.write_tables", no_space)
    status, printed, errors = run(tmp_path / "in", out, *QUICK)
    assert (status, printed) == (130, "") and errors.endswith("kpmatch archive: stopped\n")
    assert "2 of 3 bags are not done yet" in errors and errors.count("\n") == 2
    assert ("the table cannot be written: No space left on device" in errors) == full
    assert full or {name: row["state"] for name, row in table(out).items()} == {"a": "done"}


def test_parameters_without_effect_on_the_output_may_change_between_runs(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    write_camera_bag(tmp_path / "in" / "drive", views[:3], stamps(3), demo_camera(*SIZE))
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
    described = set(json.loads((tmp_path / "out" / "archive.json").read_text()))
    options = set(BAG_OPTIONS) - {"device", "threads", "profile"}
    assert described == options | {"version", "features", "match_image", "landmarks", "poses", "report"}
    parameters = tmp_path / "node.yaml"
    lines = ("queue: all", "autostart: false", "bond_heartbeat_period: 1.0", "image_transport: compressed")
    parameters.write_text("/**:\n  ros__parameters:\n" + "".join(f"    {line}\n" for line in lines))
    status, printed, errors = run(tmp_path / "in", tmp_path / "out", *QUICK, "--params", parameters)
    assert status == 0 and "1 done (1 of them in an earlier run)" in printed, errors
