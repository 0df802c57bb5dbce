"""The page that `kpmatch bag --report` writes."""

from __future__ import annotations

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
from kpmatch_ros.bags.html_report import HtmlReport
from kpmatch_ros.geometry.pose import PoseStatus

pytest.importorskip("plotly")

DEMO = Path(kpmatch_ros.__file__).parent / "data" / "demo"
FAST = ("--resize", "160", "--max-keypoints", "128", "--device", "cpu")


def result(number: int, status: PoseStatus = PoseStatus.OK) -> Any:
    """A frame of noise, which JPEG compresses worst, and its pair with the one before; the first has none."""
    random = np.random.default_rng(number)
    image = random.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    frame = SimpleNamespace(number=number, stamp=number * 10**8, image=image, extract_ms=1.0)
    if number == 0:
        return SimpleNamespace(frame=frame, pair=None)
    points = random.uniform(0, 200, (50, 2))
    pose = SimpleNamespace(status=status, rotation=np.eye(3), translation=np.array([0.0, 0.0, 1.0]))
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
    report = HtmlReport(frames, metric=True)
    for number in range(frames):
        report.add(result(number, (statuses or {}).get(number, PoseStatus.OK)), 12.5)
    report.write(path, "a <drive>", [("frames", str(frames))], ["one <image> was lost"])
    return path.read_text()


def test_a_page_of_a_thousand_frames_is_below_ten_megabytes_and_has_pictures_from_all_of_it(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 1000)
    assert len(page.encode()) < 10_000_000
    pictured = [int(number) for number in re.findall(r'"point":(\d+),', page)]
    assert 100 <= len(pictured) <= 120 and pictured[0] == 0 and pictured[-1] >= 980


def test_texts_are_escaped_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 3, {2: PoseStatus.FAILED})
    assert "a &lt;drive&gt;" in page and "one &lt;image&gt; was lost" in page and "a <drive>" not in page
    own = page.replace(page[page.index("<script>") : page.rindex("<script>")], "")  # without plotly
    assert not re.search(r"https?://|@[A-Z]+@", own)
    assert '"FAILED"' in own and "#d1495b" in own
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page[: page.index("<script>")])


def test_of_an_ambiguous_pose_the_page_shows_the_rotation_but_no_position(tmp_path: Path) -> None:
    certain = page_of(tmp_path / "certain.html", 4)
    page = page_of(tmp_path / "page.html", 4, {2: PoseStatus.AMBIGUOUS})
    lost = page_of(tmp_path / "lost.html", 4, {2: PoseStatus.FAILED})
    assert '"AMBIGUOUS"' in page and "#f2c14e" in page and "#f2c14e" not in certain
    for text, shown in ((certain, ["0", "1", "2"]), (page, ["0", "2"]), (lost, ["0", "2"])):
        (numbers,) = re.findall(r'"text": ?\[("start"[^]]*)\]', text)
        assert re.findall(r'"(\d+)"', numbers) == shown
    # Without a value Plotly has null: FAILED has one, for its rotation.
    assert certain.count("null") == page.count("null") == lost.count("null") - 1


def trace(page: str, name: str) -> tuple[list[Any], list[Any]]:
    """The x and y of a plot's line."""
    (found,) = re.findall(rf'"name":"{name}","x":(\[[^]]*\]),"y":(\[[^]]*\])', page)
    return json.loads(found[0]), json.loads(found[1])


def test_a_broken_chain_is_marked_where_it_goes_on(tmp_path: Path) -> None:
    assert "broken" not in page_of(tmp_path / "whole.html", 5)
    page = page_of(tmp_path / "page.html", 5, {3: PoseStatus.FAILED})
    (broken,) = re.findall(r'"x":\[0.0\],"y":\[2.0\],"text":(\["\d"\])', page)
    assert json.loads(broken) == ["3"] and "the chain is broken before frame %{text}" in page


def test_without_calibration_the_page_shows_no_number_of_inliers(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", 4, {2: PoseStatus.NO_CALIBRATION})
    assert trace(page, "inliers")[1] == [50, None, 50] and trace(page, "matches")[1] == [50, 50, 50]
    captions = re.findall(r"50 matches, [^\"<]*(?:OK|NO_CALIBRATION)", page)
    assert captions[0] == "50 matches, 50 inliers, 9 layers, 2 ms, OK"
    assert captions[1] == "50 matches, 9 layers, 2 ms, NO_CALIBRATION"


def test_frames_without_a_time_stand_beside_one_another(tmp_path: Path) -> None:
    report = HtmlReport(4, metric=True)
    for number in range(4):
        given = result(number)
        given.frame.stamp = 0
        report.add(given, 12.5)
    report.write(tmp_path / "page.html", "drive", [], [])
    page = (tmp_path / "page.html").read_text()
    assert trace(page, "matches")[0] == [0, 1, 2] and "pair: all stamps are the same" in page
    assert "pair: all stamps" not in page_of(tmp_path / "other.html", 4)


def test_no_line_leads_back_in_time(tmp_path: Path) -> None:
    report = HtmlReport(5, metric=True)
    for number, seconds in enumerate((0, 1, 2, 1, 2)):
        given = result(number)
        given.frame.stamp = seconds * 10**9
        report.add(given, 12.5)
    report.write(tmp_path / "page.html", "drive", [], [])
    assert trace((tmp_path / "page.html").read_text(), "matches") == ([0, 1, None, 0, 1], [50, 50, None, 50, 50])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_the_page_opens_in_a_browser_without_a_network(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    status, printed, _ = kpmatch("bag", DEMO, tmp_path / "out", "--report", page, *FAST)
    assert status == 0 and page.stat().st_size < 10_000_000
    for row in printed.splitlines():  # the table of the terminal, whose last line only names the bag
        assert row.split(None, 1)[0] == "bag" or row.split(None, 1)[1] in page.read_text()
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body and 'data-ready="11"' in body[0] and 'data-shown="0"' in body[0]  # the script went to its end
    assert done.stdout.count('class="main-svg"') >= 2
    assert re.search(r'id="caption">0\.000 s, pair 0: \d+ matches', done.stdout)


def test_the_page_is_written_whole_or_not_at_all(kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--report", tmp_path / "no" / "page.html", *FAST)
    assert (status, list(tmp_path.iterdir())) == (2, []) and "there is no folder" in error


def test_without_plotly_the_command_says_what_to_install(
    kpmatch: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = kpmatch("bag", DEMO, tmp_path / "out", "--report", tmp_path / "page.html", *FAST)
    assert status == 2 and "pip install plotly" in error and len(error.splitlines()) == 1
