"""Tests of kpmatch archive: every bag once and complete, in spite of broken bags and killed processes."""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from bag_harness import QUICK, SIZE, Run, by_topic, stamps, table
from numpy.typing import NDArray

from kpmatch_ros.bags import BagWriter, image_message
from kpmatch_ros.bags.archive import find_bags, jobs_for
from simulation import demo_camera
from simulation.bags import write_camera_bag


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch archive` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "archive")


@pytest.fixture
def bags(views: list[NDArray[np.uint8]], tmp_path: Path) -> Path:
    """Two valid bags, one of which is a single file, and two broken ones."""
    folder = tmp_path / "in"
    for name in ("monday/a", "c", "cut", "other"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_camera_bag(folder / name, views[:3], stamps(3), demo_camera(*SIZE))
    shutil.move(folder / "c" / "c.mcap", folder / "c.mcap")
    shutil.rmtree(folder / "c")
    cut = folder / "cut" / "cut.mcap"
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "other" / "other.mcap").write_bytes(b"something else")
    return folder


def test_each_bag_gives_the_output_of_kpmatch_bag_and_broken_bags_are_named(
    run: Run, kpmatch: Run, bags: Path, tmp_path: Path
) -> None:
    status, printed, errors = run(bags, tmp_path / "out", *QUICK)
    assert status == 0 and "2 done, 2 broken" in printed
    named = errors.splitlines()
    assert len(named) == 2 and str(bags / "cut") in named[0] and str(bags / "other") in named[1]
    assert kpmatch("bag", bags / "monday" / "a", tmp_path / "alone", *QUICK)[0] == 0
    ours, alone = by_topic(tmp_path / "out" / "monday" / "a"), by_topic(tmp_path / "alone")
    assert set(ours) == {"/matches", "/relative_pose"}
    for one, other in zip(ours["/matches"], alone["/matches"], strict=True):
        assert np.array_equal(one.message.points, other.message.points) and len(one.message.points) > 20
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock", "archive.csv", "archive.json", "c_mcap", "monday",
        *(["archive.parquet"] if importlib.util.find_spec("pyarrow") else []),
    }  # fmt: skip


def test_the_table_has_a_row_for_each_bag_in_both_formats(
    run: Run, views: list[NDArray[np.uint8]], bags: Path, tmp_path: Path
) -> None:
    with BagWriter(bags / "odd") as bag:
        for number, (stamp, view) in enumerate(zip(stamps(4), views)):
            message = image_message(view, stamp, "eye", "mono8")
            message.encoding = "mono7" if number == 2 else "mono8"
            bag.write("/eye/image", message, stamp)
    assert run(bags, tmp_path / "out", *QUICK)[0] == 0
    rows = table(tmp_path / "out")
    assert list(rows) == ["c.mcap", "cut", "monday/a", "odd", "other"]
    odd = rows["odd"]
    assert (odd["state"], odd["frames"], odd["rejected"], odd["rejected_encoding"]) == ("done", "3", "1", "1")
    assert (odd["status_no_calibration"], odd["status_ok"]) == ("2", "0") and "no camera_info" in odd["message"]
    good = rows["monday/a"]
    assert good["frames"] == "3" and good["rejected_encoding"] == "0" and float(good["matches"]) > 20
    assert float(good["seconds"]) > 0 and good["where"].endswith(f":{os.getpid()}")
    assert (
        rows["cut"]["state"] == "broken" and rows["cut"]["frames"] == "" and "cannot be read" in rows["cut"]["message"]
    )
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out" / "archive.parquet").to_pylist()
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in parquet] == [
        *rows.values()
    ]


def test_a_second_run_processes_a_repaired_bag_but_no_finished_bag(
    run: Run, views: list[NDArray[np.uint8]], bags: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(bags, out, *QUICK)[0] == 0
    first = table(out)
    (out / ".unfinished" / "of a run that was killed").mkdir(parents=True)
    shutil.rmtree(bags / "cut")
    write_camera_bag(bags / "cut", views[:3], stamps(3), demo_camera(*SIZE))
    status, printed, _ = run(bags, out, *QUICK)
    assert status == 0 and "3 done (2 of them in an earlier run), 1 broken" in printed
    second = table(out)
    assert second["cut"]["state"] == "done" and not (out / ".unfinished").exists()
    for name in ("c.mcap", "monday/a"):
        assert second[name] == first[name]  # including its times


def test_a_run_is_not_resumed_with_other_settings(run: Run, bags: Path, tmp_path: Path) -> None:
    assert run(bags, tmp_path / "out", *QUICK)[0] == 0
    status, _, error = run(bags, tmp_path / "out", *QUICK, "--border", 9)
    assert status == 2 and "was started with border -1, but now it is 9" in error and len(error.splitlines()) == 1
    assert run(bags, tmp_path / "out", *QUICK, "--threads", 1)[0] == 0  # the number of threads affects only rounding


@pytest.mark.parametrize("name", ["archive.csv", "archive.json"])
def test_a_parameter_file_with_the_name_of_a_table_is_not_overwritten(
    run: Run, bags: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir()
    file.write_text("/**:\n  ros__parameters:\n    max_keypoints: 50\n")
    before = file.read_bytes()
    status, _, error = run(bags, file.parent, *QUICK, "--params", file)
    assert status == 2 and f"{file}: belongs to the input" in error and len(error.splitlines()) == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["archive.csv", "archive.parquet", "archive.json"])
def test_a_file_that_kpmatch_archive_did_not_write_is_not_overwritten(
    run: Run, bags: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir()
    file.write_text('{"my": "list"}')
    status, _, error = run(bags, file.parent, *QUICK)
    assert status == 2 and f"{file}: was not written by kpmatch archive" in error and len(error.splitlines()) == 1
    assert file.read_text() == '{"my": "list"}'


def test_a_run_that_fails_at_once_does_not_fix_the_settings(run: Run, bags: Path, tmp_path: Path) -> None:
    status, _, error = run(bags, tmp_path / "out", *QUICK, "--extractor", "no_such_weights")
    assert status == 2 and "no_such_weights" in error and len(error.splitlines()) == 1
    status, printed, _ = run(bags, tmp_path / "out", *QUICK)
    assert status == 0 and "2 done, 2 broken" in printed


def test_a_bag_that_fails_half_way_leaves_no_output(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), demo_camera(*SIZE))
    write = BagWriter.write
    written: list[str] = []

    def fail(self: BagWriter, topic: str, message: Any, stamp: int) -> None:
        written.append(topic)
        if len(written) == 2:
            raise ZeroDivisionError("a fault of the program")
        write(self, topic, message, stamp)

    monkeypatch.setattr(BagWriter, "write", fail)
    status, _, errors = run(tmp_path / "in", tmp_path / "out", *QUICK)
    assert status == 2 and "ZeroDivisionError" in errors and "1 of 2 bags failed" in errors.splitlines()[-1]
    assert [row["state"] for row in table(tmp_path / "out").values()] == ["failed", "done"]
    assert not (tmp_path / "out" / "a").exists() and (tmp_path / "out" / "b" / "metadata.yaml").exists()
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_two_runs_do_not_write_to_one_archive(run: Run, bags: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, error = run(bags, tmp_path / "out", *QUICK)
    assert status == 2 and "another kpmatch archive" in error


def test_bags_are_found_in_every_layout_that_recorders_write(tmp_path: Path) -> None:
    for name in (
        "k/k_3.mcap", "k/k_4.mcap",  # a recorder that is short of space deletes its oldest files
        "a/metadata.yaml", "a/x_0.db3",  # a bag
        "b/b_0.mcap", "b/b_1.mcap",  # a recorder that was killed
        "c/one.mcap", "c/two.db3", "c/old.bag", "c/note.txt",  # bare files
        "d/metadata.yaml", "d/e/e_0.mcap.zstd",  # the metadata of something else
        "i/three.mcap.zstd", "i/four.db3.zstd", "i/log.zstd",  # files that are compressed as a whole
        ".trash/f.mcap",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "g").symlink_to(tmp_path)
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "metadata.yaml").symlink_to("/no/such/disk/metadata.yaml")  # unreadable metadata must be reported
    found = [str(path.relative_to(tmp_path)) for path in find_bags(tmp_path)]
    packed = ["i/four.db3.zstd", "i/three.mcap.zstd"]
    assert found == ["a", "b", "c/old.bag", "c/one.mcap", "c/two.db3", "d/e", "h", *packed, "k"]
    jobs = jobs_for([tmp_path / name for name in packed], tmp_path, Path("out"), Path("unfinished"))
    assert [str(job.target) for job in jobs] == ["out/i/four_db3_zstd", "out/i/three_mcap_zstd"]


def test_a_bag_with_several_links_to_it_is_found_once_by_its_real_place(tmp_path: Path) -> None:
    for name in ("runs/monday/day_0.mcap", "runs/tuesday/metadata.yaml", "runs/tuesday/x_0.db3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "wednesday.mcap").touch()
    (tmp_path / "runs" / "a_link").symlink_to("tuesday")
    (tmp_path / "runs" / "latest").symlink_to("monday")
    (tmp_path / "runs" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "farther").symlink_to(tmp_path / "elsewhere")
    found = [str(path.relative_to(tmp_path / "runs")) for path in find_bags(tmp_path / "runs")]
    assert found == ["far/wednesday.mcap", "monday/day_0.mcap", "tuesday"]


def test_a_name_too_long_for_the_output_fails_only_its_own_bag(run: Run, bags: Path, tmp_path: Path) -> None:
    for length in (240, 255):
        shutil.copytree(bags / "monday" / "a", bags / ("n" * length))
    assert run(bags, tmp_path / "out", *QUICK)[0] == 0
    rows = table(tmp_path / "out")
    assert rows["n" * 240]["state"] == rows["monday/a"]["state"] == "done"
    said = f"{tmp_path / 'out' / ('n' * 255)}: cannot be written: File name too long"
    assert rows["n" * 255]["state"] == "broken" and said in rows["n" * 255]["message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{in}/none", "{out}"], "there is no such folder"),
        (["{in}/monday/a", "{out}"], "is a single bag, not a folder"),
        (["{in}/empty", "{out}"], "there is no bag in it"),
        (["{in}", "{in}/out"], "would be read too"),
        (["{in}", "{out}", "--gpus-per-bag", "1"], "give --ray too"),
        (["{in}", "{out}", "--ray", "local", "--cpus-per-bag", "0"], "Ray would start all bags at once"),
        (
            ["{in}", "{out}", "--ray", "local", "--cpus-per-bag", "1.5"],
            "is neither a fraction from 0 to 1 nor a whole number",
        ),
        (["{in}", "{out}", "--ray", "127.0.0.1:1"], "nothing answers at this address"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    run: Run, bags: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    if "127.0.0.1:1" in words:
        pytest.importorskip("ray")
    (bags / "empty").mkdir()
    status, printed, error = run(*(word.format(**{"in": bags, "out": tmp_path / "out"}) for word in words))
    assert (status, printed, len(error.splitlines())) == (2, "", 1) and said in error


def test_the_exit_status_is_2_if_no_bag_can_be_used(run: Run, bags: Path, tmp_path: Path) -> None:
    for name in ("monday", "c.mcap"):
        (bags / name).rename(tmp_path / name)
    status, _, errors = run(bags, tmp_path / "out", *QUICK)
    assert status == 2 and errors.splitlines()[-1] == "kpmatch archive: none of the 2 bags can be used"


def test_missing_packages_are_named(run: Run, bags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = run(bags, tmp_path / "out", *QUICK, "--ray", "local")
    assert status == 2 and "pip install ray" in error and len(error.splitlines()) == 1
    status, printed, _ = run(bags, tmp_path / "out", *QUICK)
    assert status == 0 and "archive.parquet needs pyarrow" in printed and len(table(tmp_path / "out")) == 4


@pytest.mark.timeout(600)  # Ray starts three times: 18 s on an idle machine, minutes on a busy one
def test_the_bag_of_a_killed_worker_is_processed_again(
    views: list[NDArray[np.uint8]], bags: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    odd = os.fsdecode(b"caf\xe9")
    write_camera_bag(bags / odd, views, stamps(12), demo_camera(*SIZE))
    out = tmp_path / "out"
    family: list[psutil.Process] = []
    with run_on_ray(bags, out, CUDA_VISIBLE_DEVICES="0") as process:
        at_work: list[psutil.Process] = []
        until = time.monotonic() + 120
        while not (at_work and any((out / ".unfinished").glob("tmp*"))):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
            family = process.children(recursive=True)
            at_work = [child for child in family if process_title(child).startswith("ray::kpmatch ")]
        bag, victim = process_title(at_work[0]).removeprefix("ray::kpmatch "), at_work[0].pid
        gpus = at_work[0].environ()["CUDA_VISIBLE_DEVICES"]
        os.kill(victim, signal.SIGKILL)
        printed, errors = process.communicate(timeout=420)
    assert process.returncode == 0 and printed.startswith("bags ") and "3 done, 2 broken" in printed, (printed, errors)
    rows = table(out)
    assert gpus == "" and rows[r"caf\udce9"]["state"] == "done"
    assert rows[bag]["state"] in ("done", "broken") and not rows[bag]["where"].endswith(f":{victim}")
    assert not (out / ".unfinished").exists() and len(by_topic(out / odd)["/matches"]) == 11
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_bag_that_runs_out_of_memory_is_not_retried_forever(views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "in").mkdir()
    write_camera_bag(tmp_path / "in" / "drive", views[:3], stamps(3), demo_camera(*SIZE))
    short = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "50"}  # no task has enough memory
    with run_on_ray(tmp_path / "in", tmp_path / "out", **short, RAY_task_oom_retry_delay_base_ms="10") as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and f"{tmp_path / 'in' / 'drive'}: its machine ran out of memory" in errors, errors
    assert table(tmp_path / "out")["drive"]["state"] == "failed" and "its worker died" not in errors


def test_stopping_a_run_counts_no_attempt_for_its_current_bags(views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for name in ("a", "b", "c"):
        write_camera_bag(tmp_path / "in" / name, views, stamps(12), demo_camera(*SIZE))
    attempts = tmp_path / "out" / ".attempts"
    with run_on_ray(tmp_path / "in", tmp_path / "out") as process:
        until = time.monotonic() + 120
        while not any(attempts.glob("*")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.terminate()
        process.communicate(timeout=120)
    assert process.returncode == 130 and not attempts.exists()


@contextmanager
def run_on_ray(bags: Path, out: Path, **environment: str) -> Iterator[psutil.Popen]:
    """Run `kpmatch archive` on two workers of this machine, and stop it if the test ends first."""
    command = [sys.executable, "-m", "kpmatch_ros.cli", "archive", bags, out, *QUICK,
               "--ray", "local", "--cpus-per-bag", max(1, (os.cpu_count() or 2) // 2)]  # fmt: skip
    process = psutil.Popen(
        [*map(str, command)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def process_title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def test_a_full_disk_stops_the_run_and_marks_no_bag_as_failed(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), demo_camera(*SIZE))
    write, written = BagWriter.write, []

    def fill(self: BagWriter, topic: str, message: Any, stamp: int) -> None:
        written.append(topic)
        if len(written) == 6:  # while it writes the second bag
            monkeypatch.setattr(self, "_writer", FullDiskWriter())
        write(self, topic, message, stamp)

    monkeypatch.setattr(BagWriter, "write", fill)
    out = tmp_path / "out"
    status, printed, errors = run(tmp_path / "in", out, *QUICK)
    assert (status, printed, errors.count("\n")) == (2, "", 1)
    assert f"{out / 'b'}: cannot be written: [Errno {errno.ENOSPC}] No space left on device" in errors
    assert "2 of 3 bags are not done yet" in errors
    assert (out / "a" / "metadata.yaml").exists() and not (out / "b").exists() and list(table(out)) == ["a"]
    monkeypatch.setattr(BagWriter, "write", write)
    assert "3 done (1 of them in an earlier run)\n" in run(tmp_path / "in", out, *QUICK)[1]


class FullDiskWriter:
    """A bag writer on a full disk."""

    def add_connection(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = abort = add_connection


@pytest.mark.parametrize("names", [("drive.mcap", "drive_mcap"), ("drive.mcap", "drive_mcap/a")])
def test_two_bags_with_the_same_output_path_are_refused(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, names: tuple[str, str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_camera_bag(tmp_path / "bag", views[:3], stamps(3), demo_camera(*SIZE))
    shutil.copy(tmp_path / "bag" / "bag.mcap", folder / names[0])
    shutil.copytree(tmp_path / "bag", folder / names[1])
    status, printed, error = run(folder, tmp_path / "out", *QUICK)
    assert (status, printed, error.count("\n")) == (2, "", 1)
    assert all(str(folder / name) in error for name in names) and "rename one of them" in error


def test_no_output_is_written_among_the_recordings(run: Run, views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    folder = tmp_path / "day"
    for name in ("day/drive", "drive"):  # the first would be named day/drive, which is the name of the second
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_camera_bag(folder / name, views[:3], stamps(3), demo_camera(*SIZE))
    status, printed, error = run(folder, tmp_path, *QUICK)
    assert (status, printed, error.count("\n")) == (2, "", 1)
    assert f"{folder / 'day' / 'drive'}: would be written to {folder / 'drive'}, below {folder}" in error
    assert "remove" not in error


def test_an_output_folder_linked_to_another_disk_fails_only_its_own_bag(run: Run, bags: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(elsewhere).st_dev == os.stat(out).st_dev:
            pytest.skip("there is one file system")
        (out / "monday").symlink_to(elsewhere)
        status, _, errors = run(bags, out, *QUICK)
        assert status == 2 and "1 of 4 bags failed" in errors
        rows = table(out)
        assert (rows["c.mcap"]["state"], rows["monday/a"]["state"]) == ("done", "failed")
        assert f"{out / 'monday' / 'a'}: the result cannot be moved there" in rows["monday/a"]["message"]
        assert not list(Path(elsewhere).iterdir())


def test_a_changed_mask_counts_as_another_setting(
    run: Run, views: list[NDArray[np.uint8]], bags: Path, tmp_path: Path
) -> None:
    mask = np.full_like(views[0], 255)
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    words = (bags, tmp_path / "out", *QUICK, "--mask", tmp_path / "mask.png")
    assert run(*words)[0] == 0
    mask[:20] = 0
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    status, _, error = run(*words)
    assert status == 2 and "was started with content of mask '" in error and error.count("\n") == 1


def test_bags_with_names_that_are_not_utf_8_are_processed(
    run: Run, kpmatch: Run, views: list[NDArray[np.uint8]], bags: Path, tmp_path: Path
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    write_camera_bag(bags / odd, views[:3], stamps(3), demo_camera(*SIZE), storage="sqlite3")
    (bags / "c.mcap").rename(bags / f"{odd}.mcap")
    assert run(bags, tmp_path / "out", *QUICK)[0] == 0
    rows = table(tmp_path / "out")
    assert rows[r"caf\udce9.mcap"]["state"] == rows[r"caf\udce9"]["state"] == "done"
    words = [f"--report={tmp_path / 'r.html'}"] if importlib.util.find_spec("plotly") else []
    words += [f"--rerun={tmp_path / 'r.rrd'}"] if importlib.util.find_spec("rerun") else []
    status, _, errors = kpmatch("bag", bags / f"{odd}.mcap", tmp_path / odd, *QUICK, *words)
    assert status == 0, errors
    assert all(Path(word.split("=")[1]).exists() for word in words)


def test_dangling_links_in_the_input_or_the_output_stop_no_other_bag(run: Run, bags: Path, tmp_path: Path) -> None:
    (bags / "monday" / "a" / "a_7.mcap").symlink_to("/nowhere/a_7.mcap")
    (bags / "c.mcap").rename(bags / "z.mcap")
    shutil.rmtree(bags / "other")
    out = tmp_path / "out"
    assert run(bags, out, *QUICK)[0] == 0
    assert {name: row["state"] for name, row in table(out).items()} == {
        "monday/a": "done",
        "cut": "broken",
        "z.mcap": "done",
    }
    shutil.rmtree(out / "monday")
    (out / "monday").symlink_to("/nowhere")
    run(bags, out, *QUICK)
    rows = table(out)
    assert rows["monday/a"]["state"] == "broken" and "remove it" in rows["monday/a"]["message"]
    assert rows["z.mcap"]["state"] == "done"


def test_a_folder_named_like_registered_weights_is_not_loaded_as_weights(
    run: Run, bags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nearest").mkdir()
    (tmp_path / "superpoint-open").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run(bags, tmp_path / "out", *QUICK)[0] == 0
    assert table(tmp_path / "out")["monday/a"]["state"] == "done"
