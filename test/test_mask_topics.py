"""Tests of masks as messages, in the pipeline and in bags: an image has its mask, or its absence is reported."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import FIRST, QUICK, SIZE, Run, by_topic, header_stamp, refused, stamps
from numpy.typing import NDArray
from test_masks import left_third, under
from test_pipeline import image, make

from kpmatch_ros import pipeline as pipeline_module
from kpmatch_ros.bags import Bag, BagError, BagWriter, camera_info_message, image_message, new_message
from kpmatch_ros.frames import Result
from kpmatch_ros.pipeline import Pipeline
from simulation import demo_camera

MS = 1_000_000
WIDTH, HEIGHT = SIZE

Images = list[NDArray[np.uint8]]


@pytest.mark.parametrize(("queue", "longest"), [("latest", 0.02), ("all", 1.0)])
def test_a_frame_waits_no_longer_than_its_queue_allows(queue: str, longest: float) -> None:
    pipeline, _ = make("image", queue=queue, sync_tolerance=0.02)
    asked: list[Any] = []
    pipeline.masks.wait = lambda *arguments: asked.append(arguments)  # type: ignore[method-assign]
    for waited in (0.0, 0.25):
        pipeline.wait([image(MS)], waited)
    assert asked == [([MS], longest), ([MS], longest - 0.25)]


# The pipeline


def mask_message(stamp: int, pixels: NDArray[np.uint8] | None = None, **fields: Any) -> Any:
    message = image_message(left_third(HEIGHT, WIDTH) if pixels is None else pixels, stamp, "camera", "mono8")
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def processed(pipeline: Pipeline, stamp: int) -> Any:
    result = pipeline.process([image(stamp)])
    assert result is not None
    return result.frame


def test_each_image_is_registered_with_its_mask() -> None:
    pipeline, heard = make("image")
    pipeline.masks.expected = [0]
    pipeline.add_mask(0, mask_message(FIRST))
    assert np.array_equal(processed(pipeline, FIRST).mask, left_third(HEIGHT, WIDTH))
    assert heard.reports == []
    assert processed(pipeline, FIRST + 100 * MS).mask is None
    ((fault, topic, explanation),) = heard.reports
    assert (fault, topic) == ("no mask", "image")
    assert "without a mask: none came within sync_tolerance (0.01 s)" in explanation and "by 0.100000 s" in explanation


def test_a_mask_that_arrives_too_late_is_reported() -> None:
    pipeline, heard = make("image")
    pipeline.masks.expected = [0]
    for number in range(2):
        processed(pipeline, FIRST + number * 100 * MS)
        pipeline.add_mask(0, mask_message(FIRST + number * 100 * MS))
    assert "masks arrive too late: set sync_tolerance" in heard.reports[1][2]


@pytest.mark.parametrize(("queue", "named"), [("latest", 0), ("all", 5)])
def test_discarded_masks_are_reported_only_if_every_frame_is_processed(
    queue: str, named: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "WAITING_MEMORY", 100_000)
    pipeline, heard = make("image", queue=queue)
    for number in range(100):  # masks without an image and with hardly any data, but a message counts 1,000 bytes more
        pipeline.add_mask(0, mask_message(FIRST + number * MS, np.ones((7, 7), np.uint8)))
    assert [report[:2] for report in heard.reports] == [("masks let go", "image")] * named
    assert not named or "more than 0.0001 GB of masks for image are waiting" in heard.reports[0][2]


def test_the_memory_of_masks_without_an_image_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "WAITING_MEMORY", 22_000)
    pipeline, heard = make("left", "right", queue="all")
    for side in (0, 1):  # each camera has half of the memory
        for number in range(12):
            pipeline.add_mask(side, mask_message(FIRST + number * MS, np.ones((10, 10), np.uint8)))
    assert [report[:2] for report in heard.reports] == [("masks let go", "left")] * 2 + [("masks let go", "right")] * 2


def test_without_a_mask_publisher_no_missing_mask_is_reported() -> None:
    pipeline, heard = make("image")
    assert processed(pipeline, FIRST).mask is None and heard.reports == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"encoding": "rgb8"}, "its encoding is 'rgb8'; publish it as mono8"),
        ({"step": 3}, "step is 3, but a row holds"),
        ({"data": np.zeros(5, np.uint8)}, "holds 5 bytes of data"),
    ],
)
def test_an_invalid_mask_is_reported_and_the_image_is_processed_without_one(fields: dict[str, Any], said: str) -> None:
    pipeline, heard = make("image")
    pipeline.add_mask(0, mask_message(FIRST, **fields))
    assert processed(pipeline, FIRST).mask is None
    ((fault, topic, explanation),) = heard.reports
    assert (fault, topic) == ("unusable mask", "image") and said in explanation


def test_a_mask_that_hides_everything_is_reported() -> None:
    pipeline, heard = make("image")
    pipeline.add_mask(0, mask_message(FIRST, np.zeros((2, 2), np.uint8)))
    processed(pipeline, FIRST)
    assert heard.reports == [
        ("mask hides everything", "image", "the mask hides all of an image on image, so nothing is detected in it")
    ]


def test_each_camera_of_a_pair_has_its_own_masks() -> None:
    pipeline, _ = make("left", "right")
    seen: list[Any] = []

    def register(*arguments: Any) -> Result:
        seen.extend(arguments[4])
        frame: Any = type("Frame", (), {"stamp": FIRST, "frame_id": "", "keypoints": range(100), "mask": None})
        return Result(frame, None, None)

    pipeline.front_end.register = register  # type: ignore[method-assign]
    pipeline.add_mask(1, mask_message(FIRST + MS, np.ones((3, 3), np.uint8)))
    pipeline.process([image(FIRST, "left"), image(FIRST, "right")])
    assert seen[0] is None and seen[1].shape == (3, 3)


# Bags


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bag` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bag")


@pytest.fixture(scope="module")
def views(texture: Any) -> Images:
    wide = texture(150, 240, 5)
    return [np.ascontiguousarray(wide[i : i + HEIGHT, 4 * i : 4 * i + WIDTH]) for i in range(5)]


def write(
    path: Path, views: Images, late: int, masked: Callable[[int], bool] = lambda i: True, name: str = "mask"
) -> Path:
    """Write a bag whose masks are recorded ``late`` nanoseconds after their images."""
    records: list[tuple[int, str, Any]] = []
    for i, (stamp, view) in enumerate(zip(stamps(len(views)), views)):
        records.append((stamp, "/camera/image_raw", image_message(view, stamp, "camera", "mono8")))
        records.append((stamp, "/camera/camera_info", camera_info_message(demo_camera(*SIZE), stamp, "camera")))
        if masked(i):
            records.append((stamp + late, f"/camera/{name}", mask_message(stamp)))
    with BagWriter(path) as writer:
        for recorded_at, topic, message in sorted(records, key=lambda record: record[0]):
            writer.write(topic, message, recorded_at)
    return path


def written(path: Path) -> list[tuple[str, int, Any]]:
    """Return the content of a bag, without the measured times."""
    found = []
    for topic, records in by_topic(path).items():
        for record in records:
            if topic == "/matches":
                record.message.extract_ms = record.message.match_ms = 0.0
            found.append((topic, record.stamp, repr(record.message)))
    return found


def test_masks_recorded_before_or_after_their_images_apply(run: Run, views: Images, tmp_path: Path) -> None:
    for late in (-50 * MS, 250 * MS):
        source = write(tmp_path / f"in{late}", views, late)
        status, _, err = run(source, tmp_path / f"out{late}", *QUICK, "--features")
        assert (status, err) == (0, "")
    found = by_topic(tmp_path / f"out{250 * MS}")
    assert [header_stamp(record.message) for record in found["/features"]] == stamps(5)
    assert [record.stamp for record in found["/features"]] == stamps(5)
    for record in found["/features"]:
        points = record.message.points.reshape(-1, 2)
        assert len(points) > 30 and under(left_third(HEIGHT, WIDTH), points) == 0
    assert written(tmp_path / f"out{-50 * MS}") == written(tmp_path / f"out{250 * MS}")


def test_masks_in_a_bag_may_be_recorded_long_before_their_images(run: Run, views: Images, tmp_path: Path) -> None:
    source = write(tmp_path / "in", views * 8, -10_000 * MS)  # all masks come before the first image
    status, printed, err = run(source, tmp_path / "out", *QUICK, "--json")
    assert (status, err, json.loads(printed)["masks"]) == (0, "", {})


def test_images_in_a_bag_without_a_mask_are_counted(run: Run, views: Images, tmp_path: Path) -> None:
    source = write(tmp_path / "in", views, 20 * MS, lambda i: i not in (2, 4), name="body")
    for out in ("first", "again"):
        status, printed, err = run(
            source, tmp_path / out, *QUICK, "--features", "--json", "--mask-topic", "/camera/body", "--image",
            "/camera/image_raw",
        )  # fmt: skip
        assert status == 0 and "without a mask" in err
        assert json.loads(printed)["masks"] == {"no mask on /camera/image_raw": 2}
    hidden = [
        under(left_third(HEIGHT, WIDTH), record.message.points.reshape(-1, 2))
        for record in by_topic(tmp_path / "again")["/features"]
    ]
    assert [count > 0 for count in hidden] == [False, False, True, False, True]
    assert written(tmp_path / "first") == written(tmp_path / "again")


def test_a_mask_file_applies_together_with_the_masks_in_a_bag(run: Run, views: Images, tmp_path: Path) -> None:
    import cv2

    mask = left_third(HEIGHT, WIDTH)[::-1, ::-1]
    assert cv2.imwrite(str(tmp_path / "mask.png"), mask)
    source = write(tmp_path / "in", views, 0)
    status, printed, err = run(
        source, tmp_path / "out", *QUICK, "--features", "--json", "--mask", tmp_path / "mask.png"
    )
    assert (status, err, json.loads(printed)["masks"]) == (0, "", {})
    for record in by_topic(tmp_path / "out")["/features"]:  # both masks apply
        points = record.message.points.reshape(-1, 2)
        assert len(points) > 10 and under(np.minimum(mask, left_third(HEIGHT, WIDTH)), points) == 0


def test_mask_files_and_topics_that_do_not_exist_are_refused(run: Run, views: Images, tmp_path: Path) -> None:
    source = write(tmp_path / "in", views, 0)
    for words, said in (
        (["--mask", tmp_path / "none.png"], "mask is '"),
        (["--mask-right", tmp_path / "none.png"], "mask_right is"),
        (["--mask-topic", "/none"], "--mask-topic /none: there is no such mask topic"),
        (["--left-mask", "/camera/mask", "--mode", "mono"], "--left-mask /camera/mask: the mode is mono"),
    ):
        assert said in refused(run(source, tmp_path / "out", *QUICK, *words))
    assert not (tmp_path / "out").exists()


def test_a_mask_topic_beside_an_image_topic_is_not_taken_for_a_camera(run: Run, tmp_path: Path) -> None:
    from kpmatch_ros.bags.cameras import choose_camera, choose_stereo_cameras

    with BagWriter(tmp_path / "bag") as writer:
        for number, topic in enumerate(("/left/image", "/left/mask", "/right/image", "/right/mask", "/alone/mask")):
            writer.write(topic, new_message("sensor_msgs/msg/Image"), number)
    with Bag(tmp_path / "bag") as bag:
        left, right = choose_stereo_cameras(bag)
        topics = (left.image, left.mask, right.image, right.mask)
        assert topics == ("/left/image", "/left/mask", "/right/image", "/right/mask")
        assert choose_camera(bag, "/left/mask").mask == ""
        assert choose_camera(bag, "/left/image", mask_topic="/alone/mask").mask == "/alone/mask"
        with pytest.raises(BagError, match="/left/image cannot be a topic of masks"):
            choose_camera(bag, "/left/image", mask_topic="/left/image")
        with pytest.raises(BagError, match="/right/image cannot be a topic of masks"):
            choose_stereo_cameras(bag, left_mask="/right/image")
