"""Tests that each image gets its own mask by its stamp, and waits for it only while it may still arrive."""

from __future__ import annotations

import threading
import time

import pytest

from kpmatch_ros.sync.mask_sync import MaskSynchroniser

MS = 1_000_000


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


def test_after_a_jump_back_images_wait_for_their_masks_even_if_the_first_mask_was_lost() -> None:
    masks = sync(10 * MS, 1, 5000, 5100)
    assert [masks.take(0, stamp * MS) for stamp in (5000, 5100, 1000)] == ["5000", "5100", None]
    assert not masks.complete([1100 * MS])
    masks.put(0, 1100 * MS, "again")
    assert masks.complete([1100 * MS]) and masks.take(0, 1100 * MS) == "again"


def test_the_first_image_waits_for_its_own_mask_if_one_with_another_stamp_is_there() -> None:
    masks = sync(80 * MS, 1, 1000)
    assert not masks.complete([1033 * MS])
    masks.put(0, 1033 * MS, "its own")
    assert masks.complete([1033 * MS]) and masks.take(0, 1033 * MS) == "its own"


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
