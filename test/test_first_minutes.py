"""Tests of a new user's first steps: a picture without options, the order of the help, completion, and next steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

import kpmatch_ros.cli.doctor as doctor
from kpmatch_ros.cli.doctor import FAIL, OK, WARN, Finding, run_doctor

Run = Callable[..., tuple[int, str, str]]
FAST = ("--device", "cpu", "--matcher", "nearest", "--max-keypoints", "60")


@pytest.fixture
def folder(texture: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KPMATCH_PREFIX", raising=False)
    for name in ("left hand.png", "right.png"):
        cv2.imwrite(name, texture(120, 160, 5))
    return tmp_path


def test_match_without_options_prints_the_path_of_the_picture_and_the_next_command(kpmatch: Run, folder: Path) -> None:
    status, out, err = kpmatch("match", "left hand.png", "right.png", *FAST)
    assert (status, err) == (0, "")
    assert out.splitlines()[-2].split(None, 1) == ["picture", "left hand_right_matches.png"]
    again = f"kpmatch match 'left hand.png' right.png {' '.join(FAST)} --intrinsics FX,FY,CX,CY"
    assert again in out.splitlines()[-1]  # the command for the pose of these matches, with the same networks
    assert cv2.imread(str(folder / "left hand_right_matches.png")).shape[0] == 120


def test_match_with_intrinsics_suggests_kpmatch_bag(kpmatch: Run, folder: Path) -> None:
    _, out, _ = kpmatch("match", "left hand.png", "right.png", *FAST, "--intrinsics", "150,150,80,60")
    assert "kpmatch bag BAG OUT --report report.html" in out.splitlines()[-1]


def test_json_and_save_write_no_default_picture(kpmatch: Run, folder: Path) -> None:
    before = set(folder.iterdir())
    kpmatch("match", "left hand.png", "right.png", *FAST, "--json")
    kpmatch("match", "left hand.png", "right.png", *FAST, "--save", "mine.png")
    assert set(folder.iterdir()) - before == {folder / "mine.png"}


def test_help_begins_with_the_four_main_commands(kpmatch: Run) -> None:
    _, out, _ = kpmatch("--help")
    names = re.findall(r"^    (\w+) ", out, re.MULTILINE)
    assert names[names.index("match") :][:4] == ["match", "bag", "demo", "doctor"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("kpmatch ba", ["bag "]),
        ("kpmatch match --intr", ["--intrinsics", "--intrinsics1"]),
        ("kpmatch d", ["demo", "doctor"]),
    ],
)
def test_a_shell_completes_commands_and_options(line: str, expected: list[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    answers = tmp_path / "answers"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SUPPRESS_SPACE": "0",
             "COMP_LINE": line, "COMP_POINT": str(len(line)),
             "COMP_TYPE": "9"}  # fmt: skip
    completion = 'exec "$0" -m kpmatch_ros.cli 8> "$1" 9> /dev/null'  # descriptors of argcomplete, of old versions too
    subprocess.run(
        ["sh", "-c", completion, sys.executable, answers], env={**os.environ, **asked}, check=True, timeout=60
    )
    assert answers.read_text().split("\n") == expected


@pytest.mark.parametrize(
    ("findings", "last"),
    [
        ([Finding(OK, "node", "")], "next: kpmatch demo, or matcher --ros-args -r image:=TOPIC"),
        ([Finding(WARN, "ROS 2", "not here")], "next: kpmatch match A.jpg B.jpg"),
        (
            [Finding(FAIL, "OpenCV", "", "x"), Finding(FAIL, "node", "")],
            "next: fix OpenCV as described above, then kpmatch doctor",
        ),
    ],
)
def test_the_last_line_of_the_doctor_suggests_the_next_command(
    findings: list[Finding], last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KPMATCH_PREFIX", raising=False)
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    monkeypatch.setattr("shutil.which", lambda name: None if name == "ros2" else f"/bin/{name}")
    run_doctor()
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_the_doctor_names_the_launch_file_if_ros2_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KPMATCH_PREFIX", raising=False)
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding(OK, "node", "")]))
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    run_doctor()
    assert capsys.readouterr().out.endswith("or ros2 launch kpmatch_ros matcher.launch.py image:=TOPIC\n")


def test_a_bag_that_cannot_be_read_is_refused_before_pytorch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from kpmatch_ros.cli import main\n"
        "print(main(['bag', 'none', 'out']), main(['archive', '.', '../out']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "2 2 False", done.stderr
