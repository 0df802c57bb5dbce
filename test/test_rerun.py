"""Tests of the recording that `kpmatch bag --rerun` writes, read with Rerun's own reader."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from test_html_report import result

import kpmatch_ros
from kpmatch_ros.bags import read_messages
from kpmatch_ros.bags.rerun_recording import RerunRecording
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.messages import nanoseconds

DEMO = Path(kpmatch_ros.__file__).parent / "data" / "demo"
FAST = ("--resize", "160", "--max-keypoints", "128", "--device", "cpu")

if sys.version_info >= (3, 11):
    pytest.importorskip("rerun")
else:
    pytest.skip("rerun-sdk 0.41 is for Python 3.11 and later", allow_module_level=True)


def rows_of(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each entity in the order of frames. Rows without a time come first."""
    from rerun.chunk import RrdReader

    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for chunk in RrdReader(file).stream().to_chunks():
        found[chunk.entity_path] += chunk.to_record_batch().to_pylist()
    for rows in found.values():
        rows.sort(key=lambda row: row.get("frame", -1))
    return found


def values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """Return the values of a column by row; an empty list for an empty value."""
    return [row[name] for row in rows if row.get(name) is not None]


def times(rows: list[dict[str, Any]]) -> list[int]:
    """Return the nanoseconds of the rows that have a time."""
    return [int(np.datetime64(row["stamp"], "ns").astype(np.int64)) for row in rows if "stamp" in row]


def picture(row: dict[str, Any]) -> np.ndarray:
    """Return the image of a row."""
    (blob,) = row["EncodedImage:blob"]
    return cv2.imdecode(np.frombuffer(bytes(blob), np.uint8), cv2.IMREAD_UNCHANGED)


def test_the_recording_holds_what_the_bag_holds(kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file, out, poses = tmp_path / "demo.rrd", tmp_path / "out", tmp_path / "poses.txt"
    status, printed, _ = kpmatch("bag", DEMO, out, "--rerun", file, "--poses", poses, *FAST)
    assert status == 0
    matches, found = ([record.message for record in read_messages(out, [f"/{topic}"])]
                      for topic in ("matches", "relative_pose"))  # fmt: skip
    rows = rows_of(file)
    stamps = [nanoseconds(message.header.stamp) for message in matches]
    for name, expected in (
        ("matches", [len(message.track_ids) for message in matches]),
        ("inliers", [int(np.sum(message.inliers)) for message in matches]),
        ("rotation", [2 * np.degrees(np.arccos(min(1.0, abs(m.pose.pose.orientation.w)))) for m in found]),
    ):
        series = [row for row in rows[f"/figures/{name}"] if "stamp" in row]
        assert times(series) == stamps
        np.testing.assert_allclose([row["Scalars:scalars"][0] for row in series], expected, atol=1e-4)
    assert all(row["Scalars:scalars"][0] > 0 for row in rows["/figures/latency"] if "stamp" in row)
    assert values(rows["/figures/status"], "StateChange:state") == [["OK"]] * 11
    # The trajectory: as in the TUM file, and as one line.
    chained = np.array([line.split()[1:4] for line in poses.read_text().splitlines() if line[0] != "#"], float)
    places = [row["Transform3D:translation"][0] for row in rows["/world/camera"]]
    np.testing.assert_allclose(places, chained[1:], atol=1e-5)
    (line,) = rows["/world/path"][0]["LineStrips3D:strips"]
    np.testing.assert_allclose(line, chained, atol=1e-5)
    # The pictures: one per frame, with keypoints and matches at positions in the smaller picture.
    assert len(rows["/image"]) == 12 and len(rows["/image/keypoints"]) == 12 and len(rows["/image/matches"]) == 12
    assert picture(rows["/image"][-1]).shape == (480, 640, 3)
    ends = np.array(rows["/image/matches"][-1]["LineStrips2D:strips"])
    expected = np.stack([np.reshape(matches[-1].reference_points, (-1, 2)), np.reshape(matches[-1].points, (-1, 2))], 1)
    np.testing.assert_allclose(ends, expected + 0.5, atol=1e-3)
    assert printed.splitlines()[2].split(None, 1)[1] in rows["/table"][0]["TextDocument:text"][0]


def record(file: Path, frames: int, statuses: dict[int, PoseStatus] | None = None, shape: tuple[int, ...] = ()) -> None:
    with RerunRecording(file, "a drive", metric=True) as recording:
        for number in range(frames):
            each = result(number, (statuses or {}).get(number, PoseStatus.OK))
            each.frame.keypoints = np.array([[0.0, 0.0], [319.0, 239.0]])
            if shape:
                each.frame.image = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
            recording.add(each, 12.5)
        recording.finish([("frames", str(frames))], ["one image was lost"])


def test_a_frame_without_a_pose_is_a_gap_and_a_new_chain_is_a_separate_line(tmp_path: Path) -> None:
    record(tmp_path / "a.rrd", 6, {3: PoseStatus.FAILED})
    rows = rows_of(tmp_path / "a.rrd")
    rotations = [row["Scalars:scalars"] for row in rows["/figures/rotation"] if "stamp" in row]
    assert [len(each) for each in rotations] == [1, 1, 0, 1, 1]
    states = [state for (state,) in values(rows["/figures/status"], "StateChange:state")]
    assert states == ["OK", "OK", "FAILED", "OK", "OK"]
    assert [row["frame"] for row in rows["/world/camera"]] == [1, 2, 4, 5]
    strips = rows["/world/path"][0]["LineStrips3D:strips"]
    np.testing.assert_allclose([np.array(strip)[:, 2].tolist() for strip in strips], [[0, 1, 2], [2, 3, 4]])
    assert "one image was lost" in rows["/table"][0]["TextDocument:text"][0]


def test_an_interruption_clears_the_matches_and_figures_of_the_previous_frame(tmp_path: Path) -> None:
    record(tmp_path / "a.rrd", 6, {3: PoseStatus.INTERRUPTED})
    rows = rows_of(tmp_path / "a.rrd")
    assert [len(row["LineStrips2D:strips"]) for row in rows["/image/matches"]] == [0, 50, 50, 0, 50, 50]
    states = [state for (state,) in values(rows["/figures/status"], "StateChange:state")]
    assert states == ["OK", "OK", "INTERRUPTED", "OK", "OK"]
    for name, known in (("matches", 1), ("inliers", 1), ("rotation", 1), ("latency", 0)):
        series = [len(row["Scalars:scalars"]) for row in rows[f"/figures/{name}"] if "stamp" in row]
        assert series == [1, 1, 1 - known, 1, 1], name


def test_matches_have_a_separate_colour_if_no_motion_was_estimated(tmp_path: Path) -> None:
    with RerunRecording(tmp_path / "a.rrd", "a drive", metric=True) as recording:
        for number, inliers in enumerate((None, np.arange(50) < 49, None)):
            each = result(number)
            each.frame.keypoints = np.zeros((0, 2))
            if each.pair is not None:
                each.pair.inliers = inliers
            recording.add(each, 12.5)
        recording.finish([], [])
    judged, unknown = (row["LineStrips2D:colors"] for row in rows_of(tmp_path / "a.rrd")["/image/matches"][1:])
    assert len(set(judged)) == 2 and len(set(unknown)) == 1 and not set(unknown) & set(judged)


def test_large_and_grey_pictures_are_scaled_and_points_with_them(tmp_path: Path) -> None:
    record(tmp_path / "a.rrd", 2, shape=(480, 1280))
    rows = rows_of(tmp_path / "a.rrd")
    blob = bytes(rows["/image"][1]["EncodedImage:blob"][0])
    height, width = picture(rows["/image"][1]).shape
    assert len(blob) <= 60_000 and width <= 640 and width == round(height * 1280 / 480)
    np.testing.assert_allclose(
        rows["/image/keypoints"][1]["Points2D:positions"], np.array([[0.5, 0.5], [319.5, 239.5]]) * width / 1280
    )


def test_the_size_of_all_images_of_a_long_recording_is_limited(tmp_path: Path) -> None:
    with RerunRecording(tmp_path / "a.rrd", "a drive", metric=True) as recording:
        for number in range(2500):
            each = result(number)
            each.frame.keypoints, each.frame.image = np.zeros((0, 2)), each.frame.image[:60, :80]
            recording.add(each, 12.5)
        recording.finish([], [])
    rows = rows_of(tmp_path / "a.rrd")
    assert [row["frame"] for row in rows["/image"]] == list(range(0, 2500, 4))
    assert sum(len(bytes(row["EncodedImage:blob"][0])) for row in rows["/image"]) < 25_000_000
    assert len([row for row in rows["/figures/matches"] if "stamp" in row]) == 2499


def test_nothing_is_written_if_the_path_of_the_recording_is_refused(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--rerun", tmp_path / "no" / "a.rrd", *FAST)
    assert (status, list(tmp_path.iterdir())) == (2, []) and "there is no folder" in error
    same = tmp_path / "a.rrd"
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--rerun", same, "--poses", same, *FAST)
    assert (status, list(tmp_path.iterdir())) == (2, []) and "is also written by" in error


def test_without_rerun_the_command_says_what_to_install(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--rerun", tmp_path / "a.rrd", *FAST)
    assert status == 2 and "pip install rerun-sdk" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
