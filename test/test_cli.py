"""Tests of the kpmatch command: its output, the files it writes, and its refusals."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import kpmatch_ros
from kpmatch_ros import FeatureMatcher
from kpmatch_ros.cli.common import MATCHING_OPTIONS, read_image
from kpmatch_ros.parameters import declaration, declarations

SHIFT = (7, 3)  # image B lies this many pixels to the left of and above image A
CAMERA = ["--intrinsics", "300,300,160,120"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(kpmatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(words...) runs the command in a separate folder, and returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return kpmatch


@pytest.fixture(scope="module")
def pictures(texture: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two image files with the same texture, shifted by SHIFT."""
    folder = tmp_path_factory.mktemp("pictures")
    wide = texture(260, 340, 5)
    paths = folder / "a.png", folder / "b.png"
    for path, (x, y) in zip(paths, ((0, 0), SHIFT)):
        cv2.imwrite(str(path), wide[y : y + 240, x : x + 320])
    return paths


def refused(result: tuple[int, str, str]) -> str:
    """Check that the command refused its arguments, and return the one line of its error text."""
    status, out, err = result
    assert status == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err
    return err


# kpmatch match


def test_json_has_the_matches_under_the_documented_keys(run: Run, pictures: tuple[Path, Path]) -> None:
    status, out, err = run("match", *pictures, "--json", "--device", "cpu")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == [
        "points0", "points1", "scores", "inliers", "num_keypoints", "layers", "pose", "extractor", "matcher",
        "milliseconds",
    ]  # fmt: skip
    count = len(found["scores"])
    assert count > 50 and np.shape(found["points0"]) == np.shape(found["points1"]) == (count, 2)
    assert np.median(np.subtract(found["points0"], found["points1"]), axis=0) == pytest.approx(SHIFT, abs=0.5)
    assert all(0 < score <= 1 for score in found["scores"])
    assert found["inliers"] is None and found["pose"] is None
    assert len(found["num_keypoints"]) == 2 and min(found["num_keypoints"]) >= count
    assert 1 <= found["layers"] <= 9 and found["milliseconds"] > 0
    assert (found["extractor"], found["matcher"]) == ("superpoint-open", "lightglue-superpoint-open")


def test_json_has_the_pose_if_intrinsics_are_given(run: Run, pictures: tuple[Path, Path]) -> None:
    status, out, _ = run("match", *pictures, "--json", "--device", "cpu", *CAMERA)
    found = json.loads(out)
    assert status == 0 and list(found["pose"]) == ["status", "rotation", "translation", "metric"]
    assert found["pose"]["status"] in ("OK", "NO_TRANSLATION") and found["pose"]["metric"] is False
    rotation = np.array(found["pose"]["rotation"])
    assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-9) and len(found["pose"]["translation"]) == 3
    assert len(found["inliers"]) == len(found["scores"]) and set(found["inliers"]) <= {True, False}
    assert sum(found["inliers"]) >= 15


def test_a_missing_pose_is_reported_with_its_status(run: Run, pictures: tuple[Path, Path]) -> None:
    _, out, _ = run("match", *pictures, "--json", "--device", "cpu", "--max-keypoints", 5, *CAMERA)
    found = json.loads(out)
    assert found["pose"]["status"] == "TOO_FEW_MATCHES" and found["pose"]["translation"] == [0, 0, 0]
    _, out, _ = run("match", *pictures, "--device", "cpu", "--max-keypoints", 5, *CAMERA)
    assert "TOO_FEW_MATCHES" in out


@pytest.mark.parametrize("camera", [CAMERA, []])
def test_a_smeared_image_is_reported(run: Run, pictures: tuple[Path, Path], tmp_path: Path, camera: list[str]) -> None:
    smeared = tmp_path / "smeared.png"
    cv2.imwrite(str(smeared), cv2.blur(cv2.imread(str(pictures[1])), (61, 1)))
    for images, name in (((pictures[0], smeared), "B"), ((smeared, pictures[0]), "A")):
        _, out, _ = run("match", *images, "--device", "cpu", *camera)
        assert f"blur       {name}, by tens of pixels: its points cannot be located" in out


def test_the_intrinsics_of_image_b_and_the_distortion_affect_the_pose(run: Run, pictures: tuple[Path, Path]) -> None:
    def pose(*options: str) -> Any:
        quick = ("--device", "cpu", "--matcher", "nearest", "--max-keypoints", 300)
        _, out, _ = run("match", *pictures, "--json", *quick, *CAMERA, *options)
        found = json.loads(out)["pose"]
        return np.append(found["rotation"], found["translation"])

    plain = pose()
    assert np.abs(pose("--intrinsics1", "300,300,160,180") - plain).max() > 0.01
    assert np.abs(pose("--distortion", "-0.3,0.1,0,0") - plain).max() > 1e-4
    assert np.array_equal(pose("--distortion", "0,0,0,0,0", "--intrinsics1", "300,300,160,120"), plain)
    lens, rational = pose("--distortion", "-0.3,0.1,0,0,0"), ["--distortion-model", "rational_polynomial"]
    assert np.allclose(pose("--distortion", "-0.3,0.1,0,0,0,0,0,0", *rational), lens, atol=1e-6)
    fisheye = pose("--distortion", "-0.3,0.1,0,0", "--distortion-model", "equidistant")
    assert np.abs(fisheye - lens).max() > 1e-4
    assert np.array_equal(pose("--distortion", "-0.3,0.1,0,0", "--distortion1", "-0.3,0.1,0,0"), lens)
    of_b = pose("--distortion1", "-0.3,0.1,0,0")
    assert np.abs(of_b - lens).max() > 1e-4 and np.abs(of_b - plain).max() > 1e-4
    mixed = pose("--distortion1", "-0.3,0.1,0,0", "--distortion-model1", "equidistant")
    assert np.abs(mixed - of_b).max() > 1e-4


def test_without_json_a_few_readable_lines_are_printed(run: Run, pictures: tuple[Path, Path]) -> None:
    status, out, err = run("match", *pictures, "--device", "cpu", *CAMERA)
    assert (status, err) == (0, "")
    assert "320 x 240" in out and "inliers" in out and "degrees" in out and 3 < out.count("\n") < 8


def test_the_matches_are_drawn_to_a_file(run: Run, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    status, _, _ = run("match", *pictures, "--device", "cpu", "--save", tmp_path / "drawn.png")
    drawn = cv2.imread(str(tmp_path / "drawn.png"))
    assert status == 0 and drawn.shape[0] == 240 and drawn.shape[1] > 640
    assert drawn.std(axis=2).max() > 40  # the images are grey, but the lines are coloured


@pytest.mark.parametrize("links", ["none", "symbolic", "hard"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_input_image_is_never_overwritten_by_the_drawing(
    run: Run, pictures: tuple[Path, Path], tmp_path: Path, number: int, links: str
) -> None:
    own = [Path(shutil.copy(picture, tmp_path)) for picture in pictures]
    content = own[number].read_bytes()
    # Without --save, the picture's default path may be a link.
    drawn, words = tmp_path / "a_b_matches.png", []
    if links == "symbolic":
        drawn.symlink_to(own[number].name)
    elif links == "hard":
        drawn.hardlink_to(own[number])
    else:
        words = ["--save", tmp_path / "nowhere" / ".." / own[number].name]
        (tmp_path / "nowhere").mkdir()
    line = refused(run("match", *own, "--matcher", "nearest", "--device", "cpu", *words))
    assert f"belongs to the input {own[number]}; choose another name" in line
    assert ("--save" in line) == (links == "none")
    assert own[number].read_bytes() == content


def test_options_have_the_same_effect_as_the_parameters_of_the_same_name(run: Run, pictures: tuple[Path, Path]) -> None:
    options = {"max_keypoints": 100, "matcher": "nearest", "filter_threshold": 0.5, "border": 40, "device": "cpu"}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    _, out, _ = run("match", *pictures, "--json", *words)
    found = json.loads(out)
    matcher = FeatureMatcher(**options)
    features = [matcher.extract(read_image(path)) for path in pictures]
    expected = matcher.match(*features)
    assert found["matcher"] == "nearest" and found["num_keypoints"] == [100, 100]
    assert np.array_equal(found["points0"], features[0].keypoints[expected.indices[:, 0]])
    assert min(np.min(found["points0"], axis=0)) >= 40


def test_each_parameter_is_either_a_matching_option_or_only_for_the_node() -> None:
    node_alone = {
        "mode", "reference", "keyframe_min_matches", "keyframe_max_parallax", "max_gap", "queue", "image_transport",
        "rectified", "sync_tolerance", "publish_odometry", "autostart", "motion_prior", "stretch", "odom_frame",
        "publish_tf", "bond_heartbeat_period", "readout_time", "mask", "mask_right", "base_frame", "refine",
        "lost_tracks",
    }  # fmt: skip
    assert set(MATCHING_OPTIONS) | node_alone == {item.name for item in declarations()}
    assert not set(MATCHING_OPTIONS) & node_alone


def test_help_shows_each_option_with_its_description_range_and_default(run: Run) -> None:
    status, out, _ = run("match", "--help")
    text = " ".join(out.split())
    assert status == 0 and "example" in text
    for name in MATCHING_OPTIONS:
        item = declaration(name)
        assert f"--{name.replace('_', '-')}" in text and item.description.split(" (")[0] in text
    assert "(1 to 16384, default 1024)" in text and "auto|float32|float16|bfloat16" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-keypoints", "0"], "max_keypoints is 0; it must be 1 to 16384"),
        (["--max-keypoints", "many"], "'many' is not a number"),
        (["--filter-threshold", "nan"], "filter_threshold is nan"),
        (["--precision", "float8"], "must be one of auto, float32"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--device", "cuda:77"], "device is 'cuda:77'"),
        (["--extractor", "superpint"], "no weights are called 'superpint'"),
        (["--matcher", "superpoint-open"], "holds a superpoint, not a lightglue"),
        (["--intrinsics", "300,300,160"], "'300,300,160' is not 4 numbers"),
        (["--intrinsics", "0,300,160,120"], "focal lengths of 0 and 300"),
        (["--intrinsics1", "300,300,160,120"], "--intrinsics1 needs --intrinsics"),
        (["--distortion", "-0.1,0,0,0"], "--distortion needs --intrinsics"),
        ([*CAMERA, "--distortion", "-0.1"], "'-0.1' is not 4 or 5 or 8 or 12 or 14 numbers"),
        (
            [*CAMERA, "--distortion", "0.1,0,0,0", "--distortion-model", "fov"],
            "is not supported; the supported models are plumb_bob",
        ),
        ([*CAMERA, "--distortion-model", "equidistant"], "--distortion-model needs --distortion"),
        (["--distortion1", "-0.1,0,0,0"], "--distortion1 needs --intrinsics"),
        ([*CAMERA, "--distortion-model1", "equidistant"], "--distortion-model1 needs --distortion1"),
        (["--save", "matches.xyz"], "--save matches.xyz"),
        (["--save", "no-such-folder/matches.png"], "there is no folder no-such-folder"),
        (["--max-keypoint", "5"], "unrecognized arguments: --max-keypoint 5, did you mean --max-keypoints?"),
        (["--max_keypoints", "5"], "did you mean --max-keypoints? ("),
        (["--Jsn"], "did you mean --json?"),
        (["c.png"], "kpmatch match: unrecognized arguments: c.png ("),
        (["--extractor", "superpoint-opne"], "did you mean superpoint-open or superpoint-open-fast"),
        (["--extractor", "a/b.pth"], "'a/b.pth', and there is no such file or folder ("),
        (["--extractor", "aliked-n16"], "For aliked-n16 set matcher to lightglue-aliked or nearest"),
    ],
)
def test_an_invalid_option_is_refused_in_one_line(
    run: Run, pictures: tuple[Path, Path], words: list[str], said: str
) -> None:
    assert said in refused(run("match", *pictures, *words))


def test_missing_arguments_are_refused_in_one_line(run: Run, pictures: tuple[Path, Path]) -> None:
    assert "B" in refused(run("match", pictures[0]))
    assert "COMMAND" in refused(run())
    assert "'matsch'" in refused(run("matsch"))
    assert "COMMAND" in refused(run("weights"))


# Image files


def encoded(image: np.ndarray, extension: str) -> bytes:
    return bytes(cv2.imencode(extension, image)[1].tobytes())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("empty.png", lambda data: b"", "is empty"),
        ("note.png", lambda data: b"not a picture", "is not an image"),
        ("half.png", lambda data: data[: len(data) // 2], "cut short"),
        ("end.png", lambda data: data[:-20], "cut short"),
        ("half.jpg", lambda data: data[: len(data) // 2], "cut short"),
        ("end.jpg", lambda data: data[:-2], "cut short"),
        ("half.bmp", lambda data: data[: len(data) // 2], "cut short"),
        ("holes.png", lambda data: data[:2000] + bytes(200) + data[2200:], "damaged"),
    ],
)
def test_a_damaged_image_is_refused_in_one_line(
    tmp_path: Path, pictures: tuple[Path, Path], texture: Any, name: str, change: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(change(encoded(texture(240, 320, 5), path.suffix)))
    # As a separate process, because the image libraries write to stderr themselves.
    command = [sys.executable, "-m", "kpmatch_ros.cli", "match", str(pictures[0]), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    line = refused((done.returncode, done.stdout, done.stderr))
    assert name in line and said in line


def test_a_missing_image_file_is_named(run: Run, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    assert "nowhere.png: No such file" in refused(run("match", pictures[0], tmp_path / "nowhere.png"))
    assert f"{tmp_path}: Is a directory" in refused(run("match", pictures[0], tmp_path))


def test_a_default_output_name_that_is_too_long_is_refused(
    run: Run, pictures: tuple[Path, Path], tmp_path: Path
) -> None:
    long = [shutil.copy(picture, tmp_path / f"{letter * 130}.png") for picture, letter in zip(pictures, "ab")]
    assert "is too long for a file name; choose one with --save" in refused(run("match", *long))


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp", ".webp", ".tif"])
def test_common_image_formats_are_read_as_rgb(tmp_path: Path, extension: str) -> None:
    bgr = np.zeros((48, 64, 3), np.uint8)
    bgr[..., 2] = 200
    path = tmp_path / f"red{extension}"
    path.write_bytes(encoded(bgr, extension))
    image = read_image(path)
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - (200, 0, 0)).max() < 16


def test_grey_images_stay_grey_and_16_bits_become_8(tmp_path: Path) -> None:
    ramp = np.arange(64 * 48).reshape(48, 64) * 20
    (tmp_path / "deep.png").write_bytes(encoded(ramp.astype(np.uint16), ".png"))
    image = read_image(tmp_path / "deep.png")
    assert image.shape == (48, 64) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - ramp / 257).max() <= 1


def test_the_alpha_channel_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "clear.png").write_bytes(encoded(np.full((48, 64, 4), 77, np.uint8), ".png"))
    assert (read_image(tmp_path / "clear.png") == 77).all() and read_image(tmp_path / "clear.png").shape == (48, 64, 3)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_photograph_is_rotated_according_to_its_exif_orientation(
    tmp_path: Path, texture: Any, orientation: int, turn: int
) -> None:
    stored = texture(48, 64, 1)
    jpeg = encoded(stored, ".jpg")
    # One EXIF entry: tag Orientation, type SHORT, one value.
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", 0)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "held.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    upright = read_image(tmp_path / "held.jpg")
    assert upright.shape == ((48, 64) if turn % 2 == 0 else (64, 48))
    assert np.abs(upright.astype(int) - np.rot90(stored, turn)).mean() < 5


# The command as a process


def kpmatch(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # From another folder: in a source checkout, python -m would use the package there instead of the installed one.
    command = [sys.executable, "-m", "kpmatch_ros.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "match",
        "bag",
        "demo",
        "weights",
        "weights list",
        "weights fetch",
        "weights info",
        "weights convert",
        "bench",
        "doctor",
        "export",
    ],
)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    status, out, err = run(*command.split(), "--help")
    assert (status, err) == (0, "")
    assert f"kpmatch {command}" in out.split("example")[-1]


def test_in_a_checkout_the_help_shows_commands_with_their_prefix(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPMATCH_PREFIX", "tools/with_ros")
    assert "\n  tools/with_ros kpmatch bench --keypoints" in run("bench", "--help")[1]
    assert run("bench", "--nonsense")[2].endswith("--nonsense (tools/with_ros kpmatch bench --help)\n")
    monkeypatch.delenv("KPMATCH_PREFIX")
    assert "\n  kpmatch bench --keypoints" in run("bench", "--help")[1]


def test_files_whose_names_are_not_utf8_are_read_and_written(pictures: tuple[Path, Path], tmp_path: Path) -> None:
    for number, picture in enumerate(pictures):
        (tmp_path / os.fsdecode(b"r\xe9%d.png" % number)).write_bytes(picture.read_bytes())
    code = (
        "import sys; from kpmatch_ros.cli import main\n"
        "for extra in [], sys.argv[-2:]: assert main([*sys.argv[1:-2], *extra]) == 0"
    )
    words = [b"r\xe90.png", b"r\xe91.png", "--extractor", "superpoint-open-fast", "--matcher", "nearest"]
    command = [sys.executable, "-c", code, "match", *words, "--save", b"\xe9.jpg"]
    assert subprocess.run(command, check=False, cwd=tmp_path).returncode == 0
    for written in b"r\xe90_r\xe91_matches.png", b"\xe9.jpg":
        assert cv2.imdecode(np.frombuffer((tmp_path / os.fsdecode(written)).read_bytes(), np.uint8), 1) is not None


@pytest.mark.parametrize("words", [["export", b"r\xe9"], ["bag", "in", "out", "--rerun", b"r\xe9.rrd"]])
def test_names_that_are_not_utf8_are_refused_if_a_library_needs_utf8(run: Run, words: list[Any]) -> None:
    assert "is not UTF-8; choose another name" in refused(run(*map(os.fsdecode, words)))


def test_help_does_not_import_pytorch_or_opencv(tmp_path: Path) -> None:
    code = (
        "import sys; from kpmatch_ros.cli import main\n"
        "try: main(['match', '--help'])\n"
        "finally: print([name for name in ('torch', 'cv2', 'numpy', 'rclpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version")[1].split() == ["kpmatch_ros", kpmatch_ros.__version__]


def test_a_closed_pipe_on_stdout_is_not_an_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "kpmatch_ros.cli", "weights", "list"],
            stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_usage_ends_the_process_with_status_2(tmp_path: Path) -> None:
    done = kpmatch("match", "nowhere.png", "nowhere.png", folder=tmp_path)
    assert "nowhere.png: No such file" in refused((done.returncode, done.stdout, done.stderr))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_the_exit_status_is_the_same_if_stderr_cannot_be_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kpmatch_ros.cli", "match", "none.png", "nothing.png"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full, cwd=tmp_path, check=False).returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stderr=writer, stdout=subprocess.PIPE, cwd=tmp_path, check=False)
    os.close(writer)
    assert done.returncode == 2
