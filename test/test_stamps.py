"""Tests of stamps that are zero, repeat, or come from two cameras: they are reported, and no pose depends on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bag_harness import QUICK, Run, by_topic, read_tum

from kpmatch_ros.bags import BagWriter, read_messages
from simulation.bags import write_demo_bag

KEYFRAMES = ("--reference", "keyframe", "--keyframe-min-matches", "20", "--keyframe-max-parallax", "60")


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bag = tmp_path_factory.mktemp("bag") / "mono"
    write_demo_bag(bag, num_frames=6, encoding="mono8")
    return bag


def rewritten(bag: Path, out: Path, stamp: int | None = None, frame_ids: tuple[str, ...] = ()) -> Path:
    """Write a copy of the bag with one stamp for all images, or with frame_ids that change from image to image."""
    with BagWriter(out) as writer:
        images = 0
        for topic, _, recorded, message in read_messages(bag):
            if hasattr(message, "encoding"):
                if stamp is not None:
                    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
                if frame_ids:
                    message.header.frame_id = frame_ids[images % len(frame_ids)]
                images += 1
            writer.write(topic, message, recorded)
    return out


@pytest.mark.parametrize(("stamp", "fault", "count"), [(0, "zero stamps", 6), (5 * 10**9, "repeated stamps", 5)])
def test_zero_and_repeated_stamps_are_reported_and_do_not_change_the_poses(
    walk: Path, tmp_path: Path, kpmatch: Run, stamp: int, fault: str, count: int
) -> None:
    bag = rewritten(walk, tmp_path / "bag", stamp)
    found = []
    for number, source in enumerate((walk, bag)):
        poses = tmp_path / f"{number}.txt"
        words = ("bag", source, tmp_path / f"out{number}", "--poses", poses, *KEYFRAMES, *QUICK)
        status, out, err = kpmatch(*words)
        assert status == 0, err
        found.append(read_tum(poses)[1][:, 1:])
    assert len(found[0]) == 6
    np.testing.assert_array_equal(found[0], found[1])
    assert f"{fault} on /camera/image" in out and f"{count}" in out
    assert "have the driver stamp each image" in err


def test_two_cameras_on_one_topic_are_reported_and_never_matched_with_each_other(
    walk: Path, tmp_path: Path, kpmatch: Run
) -> None:
    bag = rewritten(walk, tmp_path / "bag", frame_ids=("a", "a", "b", "a"))
    status, _, err = kpmatch("bag", bag, tmp_path / "out", *QUICK)
    assert status == 0 and "the frame_id changed from 'a' to 'b'" in err
    written = by_topic(tmp_path / "out")
    for record in written["/matches"]:
        assert record.message.header.frame_id == record.message.reference.frame_id
    statuses = [record.message.status for record in written["/relative_pose"]]
    assert statuses.count(5) == 2, "a, a, b, a, a, a: each change is an interruption"
