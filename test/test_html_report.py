"""Tests of the page that `kpmatch bag --report` writes."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kpmatch_ros
from kpmatch_ros.bags import BagWriter, read_messages
from kpmatch_ros.bags.frame_figures import STATUS_COLOURS, EvenlyChosen
from kpmatch_ros.bags.html_report import HtmlReport
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose

pytest.importorskip("plotly")

DEMO = Path(kpmatch_ros.__file__).parent / "data" / "demo"
FAST = ("--resize", "160", "--max-keypoints", "128", "--device", "cpu")


def result(number: int, status: PoseStatus = PoseStatus.OK) -> Any:
    """Return a frame of noise, which JPEG compresses worst, and its pair with the previous frame.

    The first frame has no pair, and a frame that is INTERRUPTED has none either.
    """
    random = np.random.default_rng(number)
    image = random.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    frame = SimpleNamespace(number=number, stamp=number * 10**8, image=image, extract_ms=1.0)
    if number == 0 or status is PoseStatus.INTERRUPTED:
        return SimpleNamespace(frame=frame, pair=None)
    points = random.uniform(0, 200, (50, 2))
    pose = RelativePose(status, np.eye(3), np.array([0.0, 0.0, 1.0]), np.eye(6), True, 50, 50, 9.0, np.ones(50, bool))
    pair = SimpleNamespace(
        reference=SimpleNamespace(number=number - 1, stamp=(number - 1) * 10**8, image=image),
        current=frame,
        reference_points=points,
        points=points,
        scores=np.ones(50),
        inliers=np.ones(50, bool),
        indices=np.zeros((50, 2), int),
        num_inliers=50,
        layers=9,
        match_ms=1.0,
        pose=pose,
        reset=number == 1,
    )
    return SimpleNamespace(frame=frame, pair=pair)


def page_of(path: Path, frames: int, statuses: dict[int, PoseStatus] | None = None) -> str:
    report = HtmlReport(metric=True)
    for number in range(frames):
        report.add(result(number, (statuses or {}).get(number, PoseStatus.OK)), 12.5)
    report.write(path, "a <drive>", [("frames", str(frames))], ["one <image> was lost"])
    return path.read_text()


def test_a_page_of_1000_frames_is_below_10_mb_and_has_images_from_all_parts(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 1000)
    assert len(page.encode()) < 10_000_000
    pictured = [int(number) for number in re.findall(r'"point":(\d+),', page)]
    assert 60 <= len(pictured) <= 120 and set(np.diff(pictured)) == {16}
    assert pictured[0] == 0 and pictured[-1] >= 980 and "one frame of 16" in page
    assert sum(map(len, re.findall(r'"jpeg":"([^"]*)"', page))) < 3_000_000 * 4 / 3


def test_many_points_are_not_drawn_as_vectors(tmp_path: Path) -> None:
    report = HtmlReport(metric=True)
    made = result(1)
    report.add(result(0), 12.5)
    for _ in range(5001):
        report.add(made, 12.5)
    report.write(tmp_path / "page.html", "drive", [], [])
    own = (tmp_path / "page.html").read_text().rpartition("<script>")[2]  # the page's own script, after plotly's
    assert '"type":"scatter"' not in own and own.count('"type":"scattergl"') == 6


def test_an_even_choice_keeps_at_least_half_of_the_maximum_number() -> None:
    for count in (0, 1, 119, 120, 121, 240, 241, 5000):
        chosen = EvenlyChosen[int](120)
        for number in range(count):
            chosen.add(lambda number=number: number)
        assert chosen.kept == list(range(0, count, chosen.every))
        assert min(count, 60) <= len(chosen.kept) <= 120


def test_texts_are_escaped_and_nothing_is_loaded_from_the_network(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 3, {2: PoseStatus.FAILED})
    assert "a &lt;drive&gt;" in page and "one &lt;image&gt; was lost" in page and "a <drive>" not in page
    own = page.replace(page[page.index("<script>") : page.rindex("<script>")], "")  # without plotly's script
    assert not re.search(r"https?://|@[A-Z]+@", own)
    assert '"FAILED"' in own and "#d1495b" in own
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page[: page.index("<script>")])


def test_an_ambiguous_pose_is_shown_with_its_rotation_but_without_position(tmp_path: Path) -> None:
    certain = page_of(tmp_path / "certain.html", 4)
    page = page_of(tmp_path / "page.html", 4, {2: PoseStatus.AMBIGUOUS})
    lost = page_of(tmp_path / "lost.html", 4, {2: PoseStatus.FAILED})
    assert '"AMBIGUOUS"' in page and "#f2c14e" in page and "#f2c14e" not in certain
    for text, shown in ((certain, [0, 1, 2, 3]), (page, [0, 1, 3]), (lost, [0, 1, 3])):
        (names,) = re.findall(r'"text":(\["frame 0"[^]]*\])', text)
        assert json.loads(names) == [f"frame {number}" for number in shown]
    # Plotly uses null for a missing value. FAILED has one, for its rotation.
    assert certain.count("null") == page.count("null") == lost.count("null") - 1


def trace(page: str, name: str) -> tuple[list[Any], list[Any]]:
    """Return the x and y values of a plot's line."""
    (found,) = re.findall(rf'"name":"{name}","x":(\[[^]]*\]),"y":(\[[^]]*\])', page)
    return json.loads(found[0]), json.loads(found[1])


def test_a_broken_chain_is_marked_where_it_continues(tmp_path: Path) -> None:
    assert "broken" not in page_of(tmp_path / "whole.html", 5)
    page = page_of(tmp_path / "page.html", 5, {3: PoseStatus.FAILED})
    (broken,) = re.findall(r'"x":\[0.0\],"y":\[2.0\],"text":(\["frame \d"\])', page)
    assert json.loads(broken) == ["frame 4"] and "the chain is broken before %{text}" in page


def test_an_interruption_is_a_separate_point_and_a_gap_in_the_lines(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 6, {1: PoseStatus.INTERRUPTED, 4: PoseStatus.INTERRUPTED})
    assert trace(page, "matches") == ([0.1, 0.2, 0.3, 0.4, 0.5], [None, 50, 50, None, 50])
    assert trace(page, "inliers")[1] == [None, 50, 50, None, 50] and trace(page, "latency")[1] == [12.5] * 5
    assert '"y":["INTERRUPTED","OK","OK","INTERRUPTED","OK"]' in page
    assert re.findall(r'"point":(\d+),', page) == ["1", "2", "4"]
    assert set(STATUS_COLOURS) == set(PoseStatus)


def test_without_calibration_the_page_shows_no_number_of_inliers(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 4, {2: PoseStatus.NO_CALIBRATION})
    assert trace(page, "inliers")[1] == [50, None, 50] and trace(page, "matches")[1] == [50, 50, 50]
    captions = re.findall(r"50 matches, [^\"<]*(?:OK|NO_CALIBRATION)", page)
    assert captions[0] == "50 matches, 50 inliers, 9 layers, 2 ms, OK"
    assert captions[1] == "50 matches, 9 layers, 2 ms, NO_CALIBRATION"


def test_frames_with_equal_stamps_are_plotted_by_frame_number(tmp_path: Path) -> None:
    report = HtmlReport(metric=True)
    for number in range(4):
        given = result(number)
        given.frame.stamp = 0
        report.add(given, 12.5)
    report.write(tmp_path / "page.html", "drive", [], [])
    page = (tmp_path / "page.html").read_text()
    assert trace(page, "matches")[0] == [1, 2, 3] and "frame: all stamps are the same" in page
    assert "frame: all stamps" not in page_of(tmp_path / "other.html", 4)


def page_that_goes_back(path: Path) -> str:
    """Write a page of a bag in which the last two frames repeat earlier stamps."""
    report = HtmlReport(metric=True)
    for number, seconds in enumerate((0, 1, 2, 1, 2)):
        given = result(number)
        given.frame.stamp = seconds * 10**9
        report.add(given, 12.5)
    report.write(path, "drive", [], [])
    return path.read_text()


def test_lines_are_interrupted_if_time_goes_back(tmp_path: Path) -> None:
    page = page_that_goes_back(tmp_path / "page.html")
    assert trace(page, "matches") == ([1, 2, None, 1, 2], [50, 50, None, 50, 50])


def dom_in_chromium(page: Path, profile: Path) -> str:
    """Return the page's DOM after its script has finished."""
    return subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_click_shows_the_image_of_its_frame_even_if_another_has_the_same_time(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    click = """<script>
const {x, customdata} = figures.data.find(line => line.name === NAME);
document.getElementById("figures").emit("plotly_click", {points: [{x: x.at(-1), customdata: customdata.at(-1)}]});
</script></body>"""
    text = page_that_goes_back(page)
    for name in ("matches", "status"):
        page.write_text(text.replace("</body>", click.replace("NAME", repr(name))))
        assert 'data-shown="3"' in dom_in_chromium(page, tmp_path / "profile"), name


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_opens_in_a_browser_without_a_network(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    status, printed, _ = kpmatch("bag", DEMO, tmp_path / "out", "--report", page, *FAST)
    assert status == 0 and page.stat().st_size < 10_000_000
    for row in printed.splitlines():  # the rows of the terminal's table, whose last row only names the bag
        assert row.split(None, 1)[0] == "bag" or row.split(None, 1)[1] in page.read_text()
    shown = dom_in_chromium(page, tmp_path / "profile")
    body = re.search(r"<body[^>]*>", shown)
    assert body and 'data-ready="11"' in body[0] and 'data-shown="0"' in body[0]  # the script has run to its end
    assert shown.count('class="main-svg"') >= 2
    assert re.search(r'id="caption">0\.\d+ s, frame 1: \d+ matches', shown)


def test_the_page_states_why_a_camera_without_calibration_has_no_pose(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    with BagWriter(tmp_path / "in") as bag:
        for record in itertools.islice(read_messages(DEMO, ["/camera/image_raw/compressed"]), 2):
            bag.write(record.topic, record.message, record.stamp)
    status, _, error = kpmatch("bag", tmp_path / "in", tmp_path / "out", "--report", tmp_path / "page.html", *FAST)
    why = (
        "there is no camera_info beside /camera/image_raw/compressed, so no relative pose; name one with --camera-info"
    )
    assert (
        status == 0 and error == f"kpmatch bag: {why}\n" and f"<li>{why}</li>" in (tmp_path / "page.html").read_text()
    )


def test_a_page_that_cannot_be_written_leaves_no_output(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--report", tmp_path / "no" / "page.html", *FAST)
    assert (status, list(tmp_path.iterdir())) == (2, []) and "there is no folder" in error


def test_without_plotly_the_command_names_the_package_to_install(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--report", tmp_path / "page.html", *FAST)
    assert status == 2 and "pip install plotly" in error and len(error.splitlines()) == 1
