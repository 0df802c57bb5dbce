"""Tests of kpmatch bench: its images and calibration, and the files that it must not overwrite."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kpmatch_ros.bags import BagWriter, image_message
from kpmatch_ros.cli.bench_measure import Film
from simulation import demo_camera
from simulation.bags import write_camera_bag

Run = Callable[..., tuple[int, str, str]]
SMALL = ["--keypoints", "40", "--repeats", "2", "--device", "cpu", "--precision", "float32"]


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bench` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bench")


@pytest.fixture(scope="module")
def folder(random_folder: Callable[..., Path]) -> Path:
    """A folder with weights of small networks."""
    return random_folder()


def test_images_are_read_from_a_bag(run: Run, folder: Path, texture: Any, tmp_path: Path) -> None:
    images = [texture(80, 96, seed) for seed in range(2)]
    for topic in ("/front/image_raw", "/rear/image_raw"):
        write_camera_bag(tmp_path / topic.split("/")[1], images, [0, 10**8], None, image_topic=topic, encoding="mono8")
    words = ["--extractor", folder, "--matcher", folder, *SMALL, "--json", tmp_path / "speed.json"]
    assert run(*words, "--bag", tmp_path / "front")[0] == 0
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert (row["width"], row["height"]) == (96, 80)
    with BagWriter(tmp_path / "masked") as writer:
        for topic in ("/cam/image", "/cam/mask"):
            for stamp, image in enumerate(images):
                writer.write(topic, image_message(image, stamp, "camera", "mono8"), stamp)
    assert run(*words, "--bag", tmp_path / "masked")[0] == 0, "the masks are not another camera"
    status, _, err = run(*words, "--bag", tmp_path / "front", "--image", "/rear/image_raw")
    assert status == 2 and "there is no such image topic with messages in it; there is /front/image_raw" in err


def test_the_calibration_is_used_if_it_is_known_and_made_up_otherwise(
    run: Run, folder: Path, pictures: Path, texture: Any, tmp_path: Path
) -> None:
    words = ["--extractor", folder, "--matcher", folder, *SMALL, "--json", tmp_path / "speed.json"]

    def calibrated(*source: Any) -> bool:
        status, out, _ = run(*words, *source)
        assert status == 0
        (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
        assert row["calibrated"] == ("the calibration was made up" not in out)
        return bool(row["calibrated"])

    images = [texture(80, 96, seed) for seed in range(2)]
    for name, camera in (("with", demo_camera(96, 80)), ("without", None)):
        write_camera_bag(tmp_path / name, images, [0, 10**8], camera, encoding="mono8")
    assert calibrated("--sizes", "96x80") and calibrated("--bag", tmp_path / "with")
    assert not calibrated("--bag", tmp_path / "without") and not calibrated("--images", pictures)


def test_a_resized_film_has_a_resized_calibration() -> None:
    camera = demo_camera(640, 480)
    images = [np.zeros((480, 640), np.uint8)]
    assert Film(images, camera).resized((640, 480)).camera is camera
    smaller = Film(images, camera).resized((320, 120))
    assert smaller.images[0].shape == (120, 320) and smaller.camera is not None
    ahead = np.array([[0.1, 0.2], [-0.3, 0.1]])  # as x/z, y/z
    expected = (camera.project(ahead) + 0.5) * [0.5, 0.25] - 0.5
    np.testing.assert_allclose(smaller.camera.project(ahead), expected, atol=1e-6)
    assert Film(images, None).resized((320, 120)).camera is None


def test_images_are_resized_to_the_requested_size_or_to_that_of_the_first_image(
    run: Run, folder: Path, texture: Any, tmp_path: Path
) -> None:
    large = np.asarray(cv2.resize(texture(96, 80, 5), (4000, 3000)))  # too large for the networks
    cv2.imwrite(str(tmp_path / "0.png"), texture(80, 96, 5))
    cv2.imwrite(str(tmp_path / "1.png"), texture(96, 80, 5))
    cv2.imwrite(str(tmp_path / "2.png"), large)
    words = [
        "--extractor",
        folder,
        "--matcher",
        folder,
        "--images",
        tmp_path,
        *SMALL,
        "--json",
        tmp_path / "speed.json",
    ]
    for sizes, expected_err in (
        ([], "kpmatch bench: 2 of 3 images were resized to 96x80 pixels\n"),
        (["--sizes", "96x80"], ""),
    ):
        status, _, err = run(*words, *sizes)
        assert (status, err) == (0, expected_err)
        (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
        assert (row["width"], row["height"]) == (96, 80)
    images = [texture(80, 96, 5), texture(96, 80, 5), texture(40, 48, 5)]
    for size in ((96, 80), (64, 64)):
        assert {image.shape for image in Film(images, None).resized(size).images} == {size[::-1]}


def test_a_calibration_of_another_size_than_the_images_is_not_used(
    run: Run, folder: Path, texture: Any, tmp_path: Path
) -> None:
    images = [texture(80, 96, seed) for seed in range(2)]
    write_camera_bag(tmp_path / "bag", images, [0, 10**8], demo_camera(192, 160), encoding="mono8")
    words = ["--extractor", folder, "--matcher", folder, "--bag", tmp_path / "bag", *SMALL]
    status, out, err = run(*words, "--json", tmp_path / "speed.json")
    assert status == 0 and "the calibration was made up" in out
    assert err.startswith("kpmatch bench: the calibration is not used: the image is 96x80 pixels but its calibration")
    assert err.count("\n") == 1
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert not row["calibrated"]


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("links", ["none", "symbolic", "hard"])
def test_input_files_are_never_overwritten(
    run: Run, folder: Path, texture: Any, tmp_path: Path, option: str, links: str
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    for seed in range(2):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), texture(80, 96, seed))
    write_camera_bag(tmp_path / "bag", [texture(80, 96, 0)] * 2, [0, 10**8], None, encoding="mono8")
    (tmp_path / "links").mkdir()
    for words, file in (
        (["--images", tmp_path], tmp_path / "1.png"),
        (["--bag", tmp_path / "bag"], tmp_path / "bag" / "bag.mcap"),
        (["--images", tmp_path, "--extractor", folder], folder / "model.safetensors"),
    ):
        content, place = file.read_bytes(), tmp_path / "links" / f"{file.name}.png"
        if links == "symbolic":
            place.symlink_to(file)
        elif links == "hard":
            place.hardlink_to(file)
        else:
            place = file
        status, out, err = run(*words, *SMALL, option, place)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{option} {place}: belongs to the input" in err
        assert file.read_bytes() == content
        if links != "none":
            place.unlink()


def test_invalid_paths_are_refused_before_ros_is_queried(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("kpmatch_ros.cli.bench_measure.ask_ros", lambda *questions: asked.extend(questions))
    for words in (["--json", tmp_path / "none" / "a.json"], ["--json", pictures / "0.png"]):
        assert run("--images", pictures, *words)[0] == 2
    assert run("--images", tmp_path / "none")[0] == 2
    assert not asked


def test_json_and_plot_cannot_be_the_same_file(run: Run, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "link.svg").symlink_to("a.svg")
    words = ["--images", pictures, *SMALL, "--json", tmp_path / "a.svg", "--plot", tmp_path / "link.svg"]
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert f"--plot {tmp_path / 'link.svg'}: is also written by --json" in err


def test_an_output_beside_the_weights_and_images_is_written_and_overwritten(
    run: Run, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    for name in (*pictures.iterdir(), *folder.iterdir()):
        shutil.copy(name, tmp_path)
    words = ["--extractor", tmp_path, "--matcher", tmp_path, "--images", tmp_path, *SMALL]
    for _ in range(2):
        assert run(*words, "--json", tmp_path / "speed.json")[0] == 0
    assert json.loads((tmp_path / "speed.json").read_text())["rows"]
