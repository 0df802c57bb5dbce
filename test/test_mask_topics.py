"""Tests of masks as messages: each image gets its own mask, or is processed after a limited wait, with a report."""

from __future__ import annotations

import functools
import json
import threading
import time
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
from kpmatch_ros.bags import Bag, BagWriter, camera_info_message, image_message, new_message
from kpmatch_ros.frames import Result
from kpmatch_ros.pipeline import Pipeline
from kpmatch_ros.sync.mask_sync import MaskSynchroniser
from simulation import demo_camera

MS = 1_000_000
WIDTH, HEIGHT = SIZE

Images = list[NDArray[np.uint8]]


def sync(tolerance: int = 10 * MS, cameras: int = 1, *masks: int) -> MaskSynchroniser[str]:
    made: MaskSynchroniser[str] = MaskSynchroniser(cameras, tolerance, 30, 10**9)
    made.expected = range(cameras)
    for mask in masks:
        made.put(0, mask * MS, str(mask))
    return made


# The assignment of masks to images


def test_an_image_gets_the_mask_with_its_stamp_or_the_nearest_within_the_tolerance() -> None:
    masks = sync(10 * MS, 1, 1000, 1093, 1205)
    assert [masks.take(0, stamp * MS) for stamp in (1000, 1100, 1200, 1300)] == ["1000", "1093", "1205", None]
    assert masks.offset == [95 * MS]


def test_a_long_tolerance_does_not_give_an_image_the_mask_of_another_image() -> None:
    masks = sync(1000 * MS, 1, 0, 100, 300, 400)
    assert [masks.take(0, stamp * MS) for stamp in range(0, 500, 100)] == ["0", "100", None, "300", "400"]


def test_masks_at_a_lower_rate_go_only_to_the_images_with_their_stamps() -> None:
    masks = sync(1000 * MS, 1, 0, 100, 200)
    found = [masks.take(0, stamp * MS) for stamp in range(0, 225, 25)]
    assert found == ["0", None, None, None, "100", None, None, None, "200"]


def test_images_with_the_same_stamp_get_the_newest_mask_with_that_stamp() -> None:
    masks = sync()
    masks.put(0, 0, "first")
    assert masks.take(0, 0) == "first"
    masks.put(0, 0, "second")
    assert masks.take(0, 0) == masks.take(0, 0) == "second"


def test_masks_from_before_a_jump_back_in_time_are_forgotten() -> None:
    masks = sync(10 * MS, 1, 5000, 5100)
    assert masks.take(0, 5100 * MS) == "5100"
    masks.put(0, 1000 * MS, "again")
    assert masks.take(0, 1000 * MS) == "again"
    assert not masks.complete([1100 * MS])  # its mask may still arrive


def test_masks_from_after_a_jump_back_may_arrive_before_the_last_images_from_before_it() -> None:
    masks = sync(10 * MS, 1, 5000, 5100, 1000, 1100)
    order = (5000, 5050, 5100, 5200, 1000, 1100)
    assert [masks.take(0, stamp * MS) for stamp in order] == ["5000", None, "5100", None, "1000", "1100"]


def test_after_a_jump_back_an_image_waits_for_its_mask_even_if_older_masks_are_left() -> None:
    masks = sync(10 * MS, 1, 5000, 5100)
    assert masks.take(0, 5000 * MS) == "5000"
    assert not masks.complete([1000 * MS])
    masks.put(0, 1000 * MS, "again")
    assert masks.complete([1000 * MS]) and masks.take(0, 1000 * MS) == "again"


@pytest.mark.parametrize("far", [0, 2_000_000_000_000])
def test_one_mask_with_a_wrong_stamp_does_not_cost_other_images_their_masks(far: int) -> None:
    masks = sync(10 * MS, 1, 1000)
    assert masks.take(0, 1000 * MS) == "1000"
    masks.put(0, far * MS, "far")
    for stamp in range(1100, 1500, 100):  # each mask arrives after its image
        assert not masks.complete([stamp * MS])
        masks.put(0, stamp * MS, str(stamp))
        assert masks.complete([stamp * MS]) and masks.take(0, stamp * MS) == str(stamp)


@pytest.mark.parametrize("far", [0, 2_000_000_000_000])
@pytest.mark.parametrize("place", [0, 2])
def test_one_image_with_a_wrong_stamp_does_not_cost_other_images_their_masks(far: int, place: int) -> None:
    stamps = list(range(1000, 1500, 100))
    masks = sync(10 * MS, 1, *stamps)  # they arrive before their images
    images = [*stamps[:place], far, *stamps[place:]]
    assert [masks.take(0, stamp * MS) for stamp in images] == [None if each == far else str(each) for each in images]


def test_the_second_image_waits_for_its_own_mask_instead_of_using_that_of_the_first() -> None:
    masks = sync(100 * MS, 1, 0)
    assert masks.take(0, 0) == "0"
    assert not masks.complete([33 * MS])  # although the period of the masks is not known yet


def test_the_period_is_the_shortest_interval_if_masks_or_images_are_lost() -> None:
    masks = sync(1000 * MS, 1, 0, 100, 200, 500)
    assert masks.take(0, 430 * MS) is None, "the period of the masks is 100 ms, not 300"
    masks = sync(1000 * MS)
    for stamp in (0, 100, 400):
        assert masks.take(0, stamp * MS) is None
    masks.put(0, 120 * MS, "of another image")
    assert masks.take(0, 50 * MS) is None, "the period of the images is 100 ms too, although time went back"


def test_the_period_is_the_shortest_of_nine_intervals() -> None:
    lossy = sync(1000 * MS, 1, 0, 100, 400, 700, 1000)  # at 10 Hz, with two of three lost
    assert [lossy.take(0, stamp * MS) for stamp in (0, 100, 400, 700, 1000)] == ["0", "100", "400", "700", "1000"]
    lossy.put(0, 1400 * MS, "1400")
    assert lossy.take(0, 1300 * MS) is None
    slowing = sync(100 * MS, 1)
    stamps = [0, 20, 40, 60, *range(260, 2260, 200)]  # a camera whose rate changes from 50 Hz to 5 Hz
    for stamp in stamps:
        slowing.put(0, stamp * MS, str(stamp))
        assert slowing.take(0, stamp * MS) == str(stamp)
    slowing.put(0, 2320 * MS, "2320")
    assert slowing.take(0, 2260 * MS) == "2320"


def test_an_image_after_a_jump_back_does_not_cost_the_next_images_their_masks() -> None:
    masks = sync(10 * MS, 1, 1000, 1100)
    assert [masks.take(0, stamp * MS) for stamp in (5000, 950, 1000, 1100)] == [None, None, "1000", "1100"]


def test_unused_masks_are_removed_once_images_have_passed_their_stamps() -> None:
    masks: MaskSynchroniser[int] = MaskSynchroniser(1, 10 * MS, 5, 10**9)
    for stamp in range(0, 2000 * MS, 100 * MS):
        assert masks.put(0, stamp + 40 * MS, stamp) == 0 and masks.take(0, stamp) is None
        assert masks.offset == [40 * MS]
    masks.put(0, 2000 * MS, 2000)
    assert masks.take(0, 2000 * MS) == 2000 and masks.offset == [None]


def test_unused_masks_are_removed_after_a_jump_back_in_time_too() -> None:
    masks: MaskSynchroniser[int] = MaskSynchroniser(1, 10 * MS, 5, 10**9)
    masks.put(0, 90_000 * MS, 90_000)
    assert masks.take(0, 90_000 * MS) == 90_000
    for stamp in range(0, 2000 * MS, 100 * MS):
        assert masks.put(0, stamp + 40 * MS, stamp) == 0 and masks.take(0, stamp) is None


def test_an_image_sent_twice_does_not_cost_images_after_a_jump_back_their_masks() -> None:
    masks = sync(10 * MS, 1, 5000)
    assert masks.take(0, 5000 * MS) == "5000"
    masks.put(0, 1000 * MS, "1000")
    assert [masks.take(0, stamp * MS) for stamp in (5100, 5100, 5200, 1000)] == [None, None, None, "1000"]


def test_masks_are_late_if_their_image_was_already_taken_until_one_arrives_in_time() -> None:
    masks = sync(1000 * MS)
    assert masks.take(0, 0) is masks.take(0, 100 * MS) is None
    masks.put(0, 200 * MS, "of the next one")
    assert masks.came_late == [False]
    masks.put(0, 110 * MS, "late")
    assert masks.came_late == [True]
    assert masks.take(0, 200 * MS) == "of the next one" and masks.came_late == [False]
    masks.put(0, 100 * MS, "of the time after it went back, in time")
    assert masks.came_late == [False]


def test_a_mask_at_the_limit_of_the_tolerance_counts_as_late() -> None:
    masks = sync(10 * MS)
    assert masks.take(0, 1000 * MS) is None
    masks.put(0, 1011 * MS, "too far")
    assert masks.came_late == [False]
    masks.put(0, 1010 * MS, "near enough")
    assert masks.came_late == [True]


def test_the_number_of_waiting_masks_is_limited() -> None:
    masks: MaskSynchroniser[int] = MaskSynchroniser(1, MS, 3, 10**9)
    assert [masks.put(0, stamp * 100 * MS, stamp) for stamp in range(5)] == [0, 0, 0, 1, 1]
    assert [masks.take(0, stamp * 100 * MS) for stamp in range(5)] == [None, None, 2, 3, 4]


def test_the_memory_of_waiting_masks_is_limited() -> None:
    masks: MaskSynchroniser[int] = MaskSynchroniser(2, MS, 30, 100)
    sizes = (40, 40, 20, 70, 500, 10)
    let_go = [masks.put(0, number * 100 * MS, number, size) for number, size in enumerate(sizes)]
    assert let_go == [0, 0, 0, 2, 2, 1]  # the newest always stays, regardless of its size
    assert masks.put(1, 0, 0, 100) == 0  # the other camera's mask
    assert [masks.take(0, number * 100 * MS) for number in range(len(sizes))] == [None] * 5 + [5]


def test_masks_that_were_used_do_not_count_towards_the_memory_limit() -> None:
    masks: MaskSynchroniser[int] = MaskSynchroniser(1, MS, 30, 100)
    for stamp in range(0, 2000 * MS, 100 * MS):
        assert masks.put(0, stamp, stamp, 50) == 0 and masks.take(0, stamp) == stamp


# Waiting


def test_an_image_waits_while_its_mask_may_still_arrive() -> None:
    masks = sync(10 * MS, 2)
    assert not masks.complete([100 * MS, 101 * MS])
    masks.put(0, 100 * MS, "left")
    assert not masks.complete([100 * MS, 101 * MS])
    masks.put(1, 101 * MS, "right")
    assert masks.complete([100 * MS, 101 * MS])
    masks.put(0, 300 * MS, "a later one")
    assert not masks.complete([200 * MS, 201 * MS])
    masks.expected = [0]
    assert masks.complete([200 * MS, 201 * MS])
    masks.expected = []
    assert masks.complete([400 * MS, 401 * MS])


def test_an_image_waits_for_its_mask_even_if_the_first_mask_has_a_wrong_stamp() -> None:
    masks = sync(10 * MS, 1, 20_000)
    assert not masks.complete([1000 * MS])
    masks.put(0, 1000 * MS, "1000")
    assert masks.complete([1000 * MS]) and masks.take(0, 1000 * MS) == "1000"


def test_an_image_does_not_wait_if_later_masks_have_arrived() -> None:
    masks = sync(10 * MS, 1, 2000)
    assert masks.take(0, 1000 * MS) is None
    assert masks.complete([1000 * MS]), "another image of the same stamp"
    masks = sync(10 * MS, 1, 0)
    assert masks.take(0, 0) == "0"
    masks.put(0, 1_000_000 * MS, "far ahead")
    assert not masks.complete([100 * MS])
    masks.put(0, 1_000_100 * MS, "where time went for good")
    assert masks.complete([100 * MS])
    masks = sync(10 * MS)
    assert masks.take(0, 5000 * MS) is None
    for stamp in (1000, 1100):  # time goes back
        masks.put(0, stamp * MS, str(stamp))
    assert masks.complete([1050 * MS])


def test_waiting_ends_when_the_mask_arrives_or_the_time_is_over() -> None:
    masks = sync()
    begun = time.monotonic()
    masks.wait([MS], -1.0)
    masks.wait([MS], 0.05)
    assert time.monotonic() - begun >= 0.05
    sender = threading.Timer(0.05, lambda: masks.put(0, MS, "mask"))
    sender.start()
    masks.wait([MS], 60.0)
    assert time.monotonic() - begun < 60 and masks.take(0, MS) == "mask"
    sender.join()


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
