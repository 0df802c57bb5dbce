"""Tests that left and right images are paired by their stamps, and that images without a partner are counted."""

from __future__ import annotations

import random

import pytest

from kpmatch_ros.sync.stereo_sync import StereoSynchroniser

MS = 1_000_000
LEFT, RIGHT = 0, 1


def feed(synchroniser: StereoSynchroniser[str], *events: tuple[int, float]) -> list[tuple[str, str]]:
    """Feed sides and stamps (milliseconds) in order of arrival, and return the stamps of the pairs."""
    found = [synchroniser.put(side, round(stamp * MS), f"{'LR'[side]}{stamp:g}") for side, stamp in events]
    return [pair for pair in found if pair]


def test_equal_stamps_are_a_pair_whichever_side_comes_first() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found = feed(synchroniser, (LEFT, 0), (RIGHT, 0), (RIGHT, 50), (LEFT, 50))
    assert found == [("L0", "R0"), ("L50", "R50")]
    assert synchroniser.unpaired == [0, 0]


def test_near_stamps_are_a_pair_within_the_tolerance() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    assert feed(synchroniser, (LEFT, 0), (RIGHT, 9), (LEFT, 50), (RIGHT, 61)) == [("L0", "R9")]
    assert synchroniser.offset == 11 * MS


def test_without_tolerance_only_equal_stamps_are_a_pair() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(0, 10, 10**9)
    assert feed(synchroniser, (LEFT, 0), (RIGHT, 0.001), (RIGHT, 50), (LEFT, 50)) == [("L50", "R50")]
    assert synchroniser.unpaired == [1, 1]


def test_an_image_does_not_take_the_partner_of_the_next_one() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)  # at 200 Hz twice the interval
    found = feed(synchroniser, (LEFT, 0), (RIGHT, 0), (LEFT, 5), (RIGHT, 10), (LEFT, 10), (LEFT, 15), (RIGHT, 15))
    assert found == [("L0", "R0"), ("L10", "R10"), ("L15", "R15")]
    assert synchroniser.unpaired == [1, 0]


def test_lost_images_leave_their_partners_unpaired_and_counted() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found = feed(synchroniser, (LEFT, 0), (LEFT, 50), (RIGHT, 50), (RIGHT, 100), (RIGHT, 150), (LEFT, 150))
    assert found == [("L50", "R50"), ("L150", "R150")]
    assert synchroniser.unpaired == [1, 1]


def test_a_silent_camera_is_detected_and_the_number_of_waiting_images_is_limited() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 5, 10**9)
    feed(synchroniser, (LEFT, 0), (RIGHT, 0), *((LEFT, 50 * i) for i in range(1, 101)))
    assert synchroniser.since == [0, 100]
    assert synchroniser.unpaired == [95, 0]
    assert feed(synchroniser, (RIGHT, 5000)) == [("L5000", "R5000")]
    assert synchroniser.unpaired == [99, 0] and synchroniser.since == [0, 0], "no image lacks a partner"


def test_the_memory_of_waiting_images_is_limited() -> None:
    synchroniser: StereoSynchroniser[int] = StereoSynchroniser(10 * MS, 100, 100)
    sizes = (40, 40, 20, 70, 500, 10)
    for number, size in enumerate(sizes):
        assert synchroniser.put(LEFT, 100 * number * MS, number, size=size) is None
    assert synchroniser.put(RIGHT, 1000 * MS, 0, size=100) is None  # the other camera's image
    assert synchroniser.unpaired == [6, 0], "the right one is past all of them"
    for number, (size, unpaired) in enumerate(zip(sizes, (0, 0, 0, 2, 4, 5))):  # the newest always stays
        assert synchroniser.put(LEFT, (2000 + 100 * number) * MS, number, size=size) is None
        assert synchroniser.unpaired[LEFT] == 6 + unpaired
    assert synchroniser.put(RIGHT, 2500 * MS, 50) == (5, 50)


@pytest.mark.parametrize("late", [RIGHT, LEFT])
def test_a_camera_is_silent_half_a_second_after_an_unpaired_image_of_the_other(late: int) -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    for tenth in range(200):
        if tenth % 50 == 0:  # one image in 5 s, the late one 0.2 s after the other; the last one has no partner
            synchroniser.put(1 - late, 100 * tenth * MS, "")
        if tenth % 50 == 2 and tenth < 150:
            synchroniser.put(late, 100 * (tenth - 2) * MS, "")
        synchroniser.wait(7.0 + 0.1 * tenth)
        if tenth not in (153, 154):
            assert synchroniser.silent(late) == (tenth >= 155) and not synchroniser.silent(1 - late)
    synchroniser.put(late, 15_000 * MS, "")
    assert not synchroniser.silent(late)


def test_a_lost_image_of_a_slow_camera_does_not_make_it_silent_permanently() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    for tenth in range(100):  # one image a second, the right one after the left one; the third left image is lost
        number = tenth // 10
        if tenth % 10 == 0 and number != 2:
            synchroniser.put(LEFT, 1000 * number * MS, "")
        if tenth % 10 == 0:
            synchroniser.put(RIGHT, 1000 * number * MS, "")
        synchroniser.wait(7.0 + 0.1 * tenth)
        if tenth != 24:  # 0.5 s later, except for rounding
            assert synchroniser.silent(LEFT) == (25 <= tenth < 30) and not synchroniser.silent(RIGHT)


def test_a_camera_is_silent_while_images_of_the_other_wait_despite_an_older_pair() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    feed(synchroniser, (LEFT, 0), (LEFT, 50), (LEFT, 100), (RIGHT, 0))
    for tenth in range(7):
        synchroniser.wait(7.0 + 0.1 * tenth)
    assert synchroniser.silent(RIGHT) and not synchroniser.silent(LEFT)


def test_a_camera_is_not_silent_because_this_process_was_delayed() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    synchroniser.wait(1.0)
    synchroniser.put(LEFT, 0, "")
    synchroniser.wait(5.0)  # the process was delayed, and the right image is waiting
    assert not synchroniser.silent(RIGHT)
    for tenth in range(5):
        synchroniser.wait(5.1 + 0.1 * tenth)
    assert synchroniser.silent(RIGHT) and synchroniser.newest == ""


def test_cameras_are_unpaired_if_both_send_images_but_none_fit() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    for tenth in range(10):
        feed(synchroniser, (LEFT, 100 * tenth), (RIGHT, 100 * tenth + 20))
        synchroniser.wait(0.1 * tenth)
        assert not synchroniser.silent(LEFT) and not synchroniser.silent(RIGHT)
        assert synchroniser.is_unpaired(0.45) == (tenth >= 5)
    assert synchroniser.newest == "L900"
    feed(synchroniser, (LEFT, 1000), (RIGHT, 1000))
    synchroniser.wait(2.0)
    assert not synchroniser.is_unpaired(0.0) and synchroniser.newest is None


def test_images_of_a_delayed_camera_are_still_paired() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found = feed(synchroniser, *((LEFT, 50 * i) for i in range(8)), *((RIGHT, 50 * i) for i in range(8)))
    assert len(found) == 8 and synchroniser.unpaired == [0, 0]


def test_after_a_jump_back_in_time_only_images_without_a_partner_are_lost() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found = feed(synchroniser, (LEFT, 1000), (RIGHT, 1000), (LEFT, 1050), (LEFT, 0), (RIGHT, 1050), (RIGHT, 0))
    assert found == [("L1000", "R1000"), ("L1050", "R1050"), ("L0", "R0")]
    found = feed(synchroniser, (LEFT, 1100), (LEFT, 50), (RIGHT, 50), (RIGHT, 1100))
    assert found == [("L50", "R50")], "an image from before the jump is not paired after it"
    assert synchroniser.unpaired == [1, 0]


def test_a_camera_whose_stamps_run_backwards_gives_no_pairs() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 5, 10**9)
    events = [event for i in range(30) for event in ((LEFT, 1025 + 50 * i), (RIGHT, 1000 - 50 * i))]
    assert feed(synchroniser, *events) == []
    assert synchroniser.unpaired == [25, 29] and synchroniser.offset is not None


def test_images_whose_stamps_do_not_match_are_counted_as_unpaired_one_image_later() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 100, 10**9)
    assert feed(synchroniser, *((side, 50 * i + 20 * side) for i in range(5) for side in (LEFT, RIGHT))) == []
    assert synchroniser.unpaired == [4, 3] and synchroniser.offset == 20 * MS


@pytest.mark.parametrize("stamp", [0, 5000, 1e12])
@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_one_wrong_stamp_does_not_cost_any_other_pair(stamp: float, side: int) -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 100, 10**9)
    early, late = 1 - side, side  # the late side comes 150 ms after the other
    events = [(50 * i, early, 1000 + 50 * i) for i in range(20)] + [
        (50 * i + 150, late, 1003 + 50 * i) for i in range(20)
    ]
    for bad in (LEFT, RIGHT):
        found = feed(synchroniser, *((side, value) for _, side, value in sorted([*events, (510, bad, stamp)])))
        assert len(found) == 20
        assert synchroniser.unpaired[bad] + synchroniser.waiting[bad] == 1
        synchroniser = StereoSynchroniser(10 * MS, 100, 10**9)


def test_an_image_sent_twice_does_not_cost_any_other_pair() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    events = [event for i in range(20) for event in ((LEFT, 50 * i), (RIGHT, 50 * i + 3))]
    events.insert(21, (LEFT, 500.001))  # after the eleventh
    assert len(feed(synchroniser, *events)) == 20
    assert synchroniser.unpaired == [1, 0]


def test_images_with_equal_stamps_are_a_pair_even_if_one_arrives_two_periods_late() -> None:
    synchroniser: StereoSynchroniser[int] = StereoSynchroniser(10 * MS, 10, 10**9)
    pairs = []
    for number in range(1, 20):  # each right image comes 2.3 periods after the left one
        pairs.append(synchroniser.put(LEFT, number * 50 * MS, number, arrived=number * 50 * MS))
        if number > 2:
            pairs.append(synchroniser.put(RIGHT, (number - 2) * 50 * MS, number - 2, arrived=(number * 50 + 15) * MS))
    assert [pair for pair in pairs if pair] == [(number, number) for number in range(1, 18)]
    assert synchroniser.unpaired == [0, 0]


def test_lost_images_do_not_widen_the_tolerance_beyond_half_a_period() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(100 * MS, 10, 10**9)
    feed(synchroniser, *((side, 50 * i) for i in range(10) for side in (LEFT, RIGHT)))
    assert feed(synchroniser, (LEFT, 500), (RIGHT, 550), (LEFT, 600), (RIGHT, 650), (LEFT, 700), (RIGHT, 750)) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_image_is_paired_or_counted_or_waiting_and_no_pair_is_wrong(seed: int) -> None:
    generator = random.Random(seed)
    streams = [
        [50 * i + generator.uniform(-3, 3) for i in range(40) if generator.random() < 0.8] for _ in (LEFT, RIGHT)
    ]
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found, sent = [], [0, 0]
    while any(streams):
        side = generator.choice([side for side in (LEFT, RIGHT) if streams[side]])
        sent[side] += 1
        found += feed(synchroniser, (side, streams[side].pop(0)))
    assert all(abs(float(left[1:]) - float(right[1:])) <= 10 for left, right in found)
    assert len({left for left, _ in found}) == len(found) == len({right for _, right in found})
    for side in (LEFT, RIGHT):
        assert sent[side] - len(found) - 10 <= synchroniser.unpaired[side] <= sent[side] - len(found)


@pytest.mark.parametrize("stamp", [0, 7 * 10**9])
def test_images_with_identical_stamps_are_paired_by_arrival_even_if_some_are_lost(stamp: int) -> None:
    """Arrival decides: the right image follows 20 ms after the left one, ten times a second, and two are lost."""
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found = []
    for number in range(12):
        for side in (LEFT, RIGHT):
            if (number, side) not in ((4, RIGHT), (8, LEFT)):
                arrived = (100 * number + 20 * side) * MS
                found.append(synchroniser.put(side, stamp, f"{'LR'[side]}{number}", arrived))
    assert [pair for pair in found if pair] == [(f"L{i}", f"R{i}") for i in range(12) if i not in (4, 8)]
    assert synchroniser.unpaired == [1, 1]


def test_images_without_stamps_are_paired_in_changing_order_and_in_bursts() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    found = []
    for number in range(9):
        burst = 500 if number in (4, 5) else 100 * number  # two frames at once, after a pause of this process
        for side in (LEFT, RIGHT) if number % 2 else (RIGHT, LEFT):
            found.append(synchroniser.put(side, 0, f"{'LR'[side]}{number}", burst * MS + len(found)))
    assert [pair for pair in found if pair] == [(f"L{i}", f"R{i}") for i in range(9)]


def test_among_images_with_equal_stamp_and_arrival_the_newest_is_paired() -> None:
    synchroniser: StereoSynchroniser[str] = StereoSynchroniser(10 * MS, 10, 10**9)
    assert feed(synchroniser, (LEFT, 10), (LEFT, 10)) == []
    assert synchroniser.put(LEFT, 10 * MS, "newest") is None
    assert synchroniser.put(RIGHT, 10 * MS, "right") == ("newest", "right")
    assert synchroniser.unpaired == [2, 0]
