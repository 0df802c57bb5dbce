"""Tests of the content of kpmatch archive's table."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from bag_harness import QUICK, SIZE, Run, by_topic, read_tum, stamps, table
from numpy.typing import NDArray

from kpmatch_ros.bags import BagWriter
from kpmatch_ros.bags.message_types import camera_info_message, image_message
from simulation import demo_camera
from simulation.bags import write_camera_bag


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch archive` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "archive")


def test_a_bag_without_the_requested_topics_is_unsuitable_and_not_broken(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    fleet = tmp_path / "in"
    for name in ("front", "cut"):
        write_camera_bag(fleet / name, views[:3], stamps(3), demo_camera(*SIZE), image_topic="/front/image")
    write_camera_bag(fleet / "rear", views[:3], stamps(3), demo_camera(*SIZE), image_topic="/rear/image")
    with BagWriter(fleet / "no images") as bag:
        bag.write("/front/camera_info", camera_info_message(demo_camera(*SIZE), stamps(1)[0], "eye"), stamps(1)[0])
    cut = fleet / "cut" / "cut.mcap"
    cut.write_bytes(cut.read_bytes()[:3000])
    status, printed, errors = run(fleet, tmp_path / "out", *QUICK, "--image", "/front/image")
    assert status == 0 and "1 done, 1 broken, 2 unsuitable" in printed
    assert {name: row["state"] for name, row in table(tmp_path / "out").items()} == {
        "cut": "broken",
        "front": "done",
        "no images": "unsuitable",
        "rear": "unsuitable",
    }
    assert f"{fleet / 'rear'}: --image /front/image: there is no such image topic" in errors
    assert f"{fleet / 'no images'}: has no image topic" in errors
    status, _, errors = run(fleet, tmp_path / "none", *QUICK, "--image", "/top/image")
    assert status == 2 and errors.splitlines()[-1] == "kpmatch archive: none of the 4 bags can be used"


def test_a_bag_whose_images_are_in_a_damaged_file_is_broken_and_not_unsuitable(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    drive = tmp_path / "in" / "drive"
    write_camera_bag(drive, views[:3], stamps(3), demo_camera(*SIZE))
    with BagWriter(tmp_path / "other") as bag:
        bag.write("/info", camera_info_message(demo_camera(*SIZE), stamps(1)[0], "eye"), stamps(1)[0])
    (drive / "metadata.yaml").unlink()
    (drive / "drive.mcap").unlink()
    (drive / "drive_0.mcap").write_bytes(b"garbage")  # this file held the images
    shutil.copy(tmp_path / "other" / "other.mcap", drive / "drive_1.mcap")
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 2
    row = table(tmp_path / "out")["drive"]
    assert row["state"] == "broken" and "drive_0.mcap: cannot be read" in row["message"]


def test_a_row_has_latencies_counts_and_the_device_that_computed_it(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    write_camera_bag(tmp_path / "in" / "drive", views[:3], stamps(3), demo_camera(*SIZE))
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, "--threads", "1")[0] == 0
    row = table(tmp_path / "out")["drive"]
    assert (row["device"], row["precision"], row["threads"]) == ("cpu", "float32", "1")
    assert float(row["recorded"]) == 0.2 and row["status_ok"] == "2" and row["rejected"] == "0"
    assert 0 < float(row["latency_p50"]) <= float(row["latency_p95"]) < 1000 * float(row["seconds"])
    assert (row["breaks"], row["odometry_breaks"], row["unpaired"]) == ("0", "", "")  # odometry was not requested


def test_the_row_of_a_stereo_bag_counts_the_images_without_a_partner(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    with BagWriter(tmp_path / "in" / "pair") as bag:
        for side, shown in (("left", views[:4]), ("right", views[2:5])):
            for view, stamp in zip(shown, stamps(4)):
                bag.write(f"/{side}/image", image_message(view, stamp, side, "mono8"), stamp)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, "--mode", "stereo", "--landmarks")[0] == 0
    row = table(tmp_path / "out")["pair"]
    assert (row["frames"], row["unpaired"], row["status_no_calibration"]) == ("3", "1", "2")


def test_poses_and_report_are_written_to_each_bags_output_folder(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    for name in ("monday/drive", "poses.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), demo_camera(*SIZE))
    out = tmp_path / "out"
    assert run(tmp_path / "in", out, *QUICK, "--poses", "--report")[0] == 0
    for name, row in table(out).items():
        _, places = read_tum(out / name / "poses.txt")
        assert len(places) == 3 and row["breaks"] == "0"
        assert "Matches of " in (out / name / "report.html").read_text()
        assert set(by_topic(out / name)) == {"/matches", "/relative_pose"}
    status, _, error = run(tmp_path / "in", out, *QUICK, "--poses")
    assert status == 2 and "was started with report True, but now it is False" in error


def test_an_option_that_fails_for_every_bag_is_refused_once(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_camera_bag(tmp_path / "in" / name, views[:3], stamps(3), demo_camera(*SIZE))
    status, _, error = run(tmp_path / "in", tmp_path / "out", *QUICK, "--landmarks")
    assert status == 2 and "a single camera has no metric scale" in error and error.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = run(tmp_path / "in", tmp_path / "out", *QUICK, "--report")
    assert status == 2 and "pip install plotly" in error and error.count("\n") == 1
