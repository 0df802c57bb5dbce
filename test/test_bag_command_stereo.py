"""Tests of kpmatch bag with a stereo pair."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import FIRST, QUICK, Run, bag_command, by_topic, differences, header_stamp, read_tum, refused
from rosbags.highlevel import AnyReader
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags import Bag, BagWriter, bag_topics, new_message, read_ground_truth, read_messages
from kpmatch_ros.bags.cameras import choose_stereo_cameras
from kpmatch_ros.geometry.pose import PoseStatus, relative_motion
from kpmatch_ros.messages import nanoseconds
from node_harness import running_node
from simulation.bags import write_demo_bag


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bag` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bag")


STEREO = (*QUICK, "--mode", "stereo", "--rectified")


@pytest.fixture(scope="module")
def stereo_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five frames of the courtyard. The baseline of 0.5 m compensates for the small images."""
    path = tmp_path_factory.mktemp("stereo") / "in"
    write_demo_bag(path, num_frames=5, size=(320, 240), baseline=0.5, encoding="mono8")
    return path


@pytest.fixture(scope="module")
def stereo_output(stereo_bag: Path) -> Path:
    """The folder with the command's output `out` and `poses.txt` for this bag."""
    folder = stereo_bag.parent
    words = ["--left", "/left/image_rect", "--right", "/right/image_rect", "--rectified", "--publish-odometry",
             "--device", "cpu", "--precision", "float32", "--max-keypoints", "512", "--features"]  # fmt: skip
    bag_command(stereo_bag, folder / "out", *words, "--poses", folder / "poses.txt")
    return folder


def altered_bag(source: Path, target: Path, change: Callable[[int, Any], Any]) -> Path:
    """Write a bag with all records after `change`, called with the number within the topic. None drops the record."""
    numbers: dict[str, int] = {}
    with BagWriter(target) as bag:
        for record in read_messages(source):
            number = numbers[record.topic] = numbers.get(record.topic, -1) + 1
            changed = change(number, record)
            if changed is not None:
                bag.write(changed.topic, changed.message, changed.stamp)
    return target


def test_the_stereo_output_bag_equals_the_messages_of_the_node_bit_for_bit(
    stereo_bag: Path, stereo_output: Path, tmp_path: Path
) -> None:
    from nav_msgs.msg import Odometry
    from rclpy.qos import QoSProfile
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import CameraInfo, Image

    from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose

    inputs = {
        f"/{side}/{name}": (kind, f"{side}/{topic}")
        for side in ("left", "right")
        for name, kind, topic in (("image_rect", Image, "image"), ("camera_info", CameraInfo, "camera_info"))
    }
    odometry: list[Odometry] = []
    with running_node(tmp_path, mode="stereo", rectified=True, publish_odometry=True, max_keypoints=512) as node:
        node.subscribe(Odometry, "odometry", odometry.append)
        node.subscribe(FeatureArray, "features", node.features.append)
        peers = {topic: node.node.create_publisher(kind, name, QoSProfile(depth=100))
                 for topic, (kind, name) in inputs.items()}  # fmt: skip
        node.wait_for(lambda: all(peer.get_subscription_count() for peer in peers.values()), "the node to subscribe")
        topics = ("stereo_matches", "matches", "relative_pose", "odometry", "features")
        node.wait_for(lambda: all(node.node.count_publishers(topic) for topic in topics), "its topics")
        node.wait_for(lambda: node.node.count_subscribers("features") == 1, "the subscription")
        node.wait_until_known()
        with AnyReader([stereo_bag]) as reader:
            for connection, _, raw in reader.messages():
                if connection.topic in peers:
                    peers[connection.topic].publish(bytes(raw))
                    node.spin(0.01)
        node.wait_for(lambda: len(node.poses) == len(node.matches) == len(odometry) == 4, "every pair")
        node.wait_for(lambda: len(node.stereo_matches) == 5 and len(node.features) == 10, "every frame")
    kinds = {"/stereo_matches": MatchArray, "/matches": MatchArray, "/relative_pose": RelativePose,
             "/odometry": Odometry, "/features": FeatureArray}  # fmt: skip
    written: dict[str, list[Any]] = {topic: [] for topic in kinds}
    with AnyReader([stereo_output / "out"]) as reader:
        assert {connection.topic for connection in reader.connections} == {*kinds, "/tf"}
        for connection, _, raw in reader.messages():
            if connection.topic in kinds:
                written[connection.topic].append(deserialize_message(bytes(raw), kinds[connection.topic]))
    found = {"/stereo_matches": node.stereo_matches, "/matches": node.matches, "/relative_pose": node.poses,
             "/odometry": odometry, "/features": node.features}  # fmt: skip
    for messages in (found, written):
        for message in [*messages["/matches"], *messages["/stereo_matches"]]:
            message.extract_ms = message.match_ms = 0.0  # only the measured times differ
    for topic in ("/features", "/stereo_matches", "/matches", "/relative_pose", "/odometry"):  # causes first
        assert differences(written[topic], found[topic]) == [], topic
    assert {pose.status for pose in node.poses} == {RelativePose.OK} and len(node.stereo_matches[0].scores) > 50


def test_stereo_poses_are_written_in_metres(stereo_bag: Path, stereo_output: Path) -> None:
    true_stamps, truth = read_ground_truth(stereo_bag)
    times, rows = read_tum(stereo_output / "poses.txt")
    assert times == [f"{stamp // 10**9}.{stamp % 10**9:09d}" for stamp in true_stamps.tolist()]
    turned, moved = relative_motion(truth[0], truth[4])
    length = np.linalg.norm(moved)
    assert np.linalg.norm(rows[4, 1:4] - moved) < 0.03 * length and length > 0.5
    assert np.degrees((Rotation.from_quat(rows[4, 4:]).inv() * Rotation.from_matrix(turned)).magnitude()) < 0.3
    found = by_topic(stereo_output / "out")
    assert all(record.message.metric for record in found["/relative_pose"])
    # The odometry, with x forward, ends at the same distance from its start, and TF agrees.
    last, (transform,) = found["/odometry"][-1].message, found["/tf"][-1].message.transforms
    position, translation = last.pose.pose.position, transform.transform.translation
    x, y, z = rows[4, 1:4]
    assert [position.x, position.y, position.z] == pytest.approx([z, -x, -y], abs=1e-6)
    assert [translation.x, translation.y, translation.z] == [position.x, position.y, position.z]
    assert (transform.header.frame_id, transform.child_frame_id) == ("odom", "left_optical_frame")


def test_images_without_a_partner_are_counted_and_reported(run: Run, stereo_bag: Path, tmp_path: Path) -> None:
    def change(number: int, record: Any) -> Any:
        return None if record.topic == "/right/image_rect" and number in (1, 3) else record

    altered_bag(stereo_bag, tmp_path / "in", change)
    status, out, err = run(tmp_path / "in", tmp_path / "out", *STEREO, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["frames"] == 3 and figures["unpaired"] == {"/left/image_rect": 2}
    assert "2 images on /left/image_rect have no partner within sync_tolerance" in err and err.count("\n") == 1
    counts = {topic.name: topic.num_messages for topic in bag_topics(tmp_path / "out")}
    assert counts == {"/stereo_matches": 3, "/matches": 2, "/relative_pose": 2}
    status, out, _ = run(tmp_path / "in", tmp_path / "again", *STEREO)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "3 of 320 x 240 (/left/image_rect with /right/image_rect)" in rows["frames"]
    assert "/left/image_rect 2" in rows["unpaired"] and "of left and right" in rows["stereo"]


def test_a_camera_that_stops_gives_interrupted_poses_as_in_the_node(run: Run, stereo_bag: Path, tmp_path: Path) -> None:
    """From the third frame on only left images arrive, ten per second, for 8 s. A pose reports it from 5 s on."""
    counts = {"/left/image_rect": 0, "/right/image_rect": 0}
    with BagWriter(tmp_path / "silent") as bag:
        for topic, _, recorded, message in read_messages(stereo_bag):
            if topic in counts:
                counts[topic] += 1
            if counts.get(topic, 0) < 3:
                bag.write(topic, message, recorded)
            elif counts[topic] == 3 and topic == "/left/image_rect":
                begun = recorded
                first = nanoseconds(message.header.stamp)
                for later in range(0, 8 * 10**9, 10**8):
                    message.header.stamp.sec, message.header.stamp.nanosec = divmod(first + later, 10**9)
                    bag.write(topic, message, begun + later)
    status, out, _ = run(str(tmp_path / "silent"), str(tmp_path / "out"), *STEREO)
    poses = [record for record in read_messages(tmp_path / "out") if record.topic == "/relative_pose"]
    alone = [pose for pose in poses if pose.message.status == PoseStatus.INTERRUPTED]
    assert status == 0 and len(poses) == 1 + len(alone) and "INTERRUPTED 3" in out
    assert [(pose.stamp - begun) * 1e-9 for pose in alone] == pytest.approx([5.1, 6.1, 7.1], abs=0.2)
    assert all(0 <= pose.stamp - nanoseconds(pose.message.header.stamp) <= 2 * 10**8 for pose in alone)


def test_stamps_are_paired_within_the_tolerance(run: Run, stereo_bag: Path, tmp_path: Path) -> None:
    def late(number: int, record: Any) -> Any:
        if record.topic == "/right/image_rect":
            record.message.header.stamp.nanosec += 20_000_000
        return record

    altered_bag(stereo_bag, tmp_path / "in", late)
    line = refused(run(tmp_path / "in", tmp_path / "out", *STEREO))
    assert "none of the 10 images on /left/image_rect and /right/image_rect can be used: 5 images on" in line
    assert "have no partner within sync_tolerance" in line and "differed by 0.020000 s" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert run(tmp_path / "in", tmp_path / "out", *STEREO, "--sync-tolerance", "0.03")[0] == 0
    stereo = by_topic(tmp_path / "out")["/stereo_matches"]
    late_by = [header_stamp(record.message) - nanoseconds(record.message.reference.stamp) for record in stereo]
    assert late_by == [20_000_000] * 5


def test_a_broken_image_drops_only_its_own_frame(run: Run, stereo_bag: Path, tmp_path: Path) -> None:
    def cut(number: int, record: Any) -> Any:
        if record.topic == "/right/image_rect" and number == 1:
            record.message.data = record.message.data[:100]
        return record

    altered_bag(stereo_bag, tmp_path / "in", cut)
    figures = json.loads(run(tmp_path / "in", tmp_path / "out", *STEREO, "--json")[1])
    assert figures["frames"] == 4 and figures["rejected"] == {"data": 1} and figures["unpaired"] == {}


def test_a_calibration_that_does_not_fit_the_pair_is_reported(run: Run, stereo_bag: Path, tmp_path: Path) -> None:
    sides = ("--left", "/right/image_rect", "--right", "/left/image_rect")
    status, out, err = run(stereo_bag, tmp_path / "swapped", *STEREO, *sides, "--json")
    assert status == 0 and "left and right are swapped" in err and err.count("\n") == 1
    assert json.loads(out)["poses"] == {"NO_CALIBRATION": 4}
    assert json.loads(out)["camera_info_refused"] == {"swapped": 5}
    infos = ("--left-info", "/left/camera_info", "--right-info", "/right/camera_info")
    status, out, err = run(stereo_bag, tmp_path / "images", *STEREO, *sides, *infos, "--json")
    assert status == 0 and "stereo matches agree with the camera_infos: left and right images are swapped" in err
    assert json.loads(out)["camera_info_refused"] == {"stereo matches": 5}
    altered_bag(stereo_bag, tmp_path / "in", lambda _, record: None if record.topic == "/right/camera_info" else record)
    status, out, err = run(tmp_path / "in", tmp_path / "none", *STEREO, "--json")
    assert status == 0 and json.loads(out)["poses"] == {"NO_CALIBRATION": 4}
    assert "no camera_info beside /right/image_rect, so no relative pose; name one with --right-info" in err


@pytest.mark.parametrize(
    ("lost", "frames_of_odometry"),
    [({2}, {1: "odom", 3: "odom", 4: "odom", 5: "odom"}), ({2, 3}, {1: "odom", 5: "odom_1"})],
)
def test_one_lost_frame_keeps_the_chain_and_two_start_a_new_odometry_frame(
    run: Run, tmp_path: Path, lost: set[int], frames_of_odometry: dict[int, str]
) -> None:
    def without_baseline(number: int, record: Any) -> Any:
        if record.topic == "/right/camera_info" and number in lost:  # recorded after its image
            record.message.p = np.where(np.arange(12) == 3, 0.0, record.message.p)
        return record

    write_demo_bag(tmp_path / "whole", num_frames=6, size=(320, 240), baseline=0.5, encoding="mono8")
    altered_bag(tmp_path / "whole", tmp_path / "in", without_baseline)
    status, out, err = run(tmp_path / "in", tmp_path / "out", *STEREO, "--max-keypoints", 512, "--publish-odometry",
                           "--poses", tmp_path / "poses.txt")  # fmt: skip
    assert status == 0 and "the baseline is zero" in err
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert f"baseline {len(lost)}" in rows["camera_info"]
    assert (
        ("broken 1 time:" in rows.get("chain", ""))
        == ("restarted 1 time; each restart uses a new frame: odom_1" in out)
        == (len(lost) == 2)
    )
    found = by_topic(tmp_path / "out")
    frames = [header_stamp(record.message) for record in found["/stereo_matches"]]
    odometry = [(header_stamp(record.message), record.message.header.frame_id) for record in found["/odometry"]]
    assert odometry == [(frames[number], frame) for number, frame in frames_of_odometry.items()]
    assert len(read_tum(tmp_path / "poses.txt")[0]) == 1 + len(odometry)


def bag_with_topics(path: Path, *topics: str) -> Path:
    with BagWriter(path) as bag:
        for topic in topics:
            kind = "sensor_msgs/msg/CameraInfo" if topic.endswith("info") else "sensor_msgs/msg/Image"
            bag.write(topic, new_message(kind), FIRST)
    return path


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("/stereo/left/image_raw", "/stereo/right/image_raw"),
        ("/cam0/image_raw", "/cam1/image_raw"),
        ("/camera/infra1/image_rect_raw", "/camera/infra2/image_rect_raw"),
        ("/left_camera/image", "/right_camera/image"),
        ("/left/image_left", "/right/image_right"),
        ("/left_arm/left/image_raw", "/left_arm/right/image_raw"),
    ],
)
def test_a_stereo_pair_is_recognised_by_its_topic_names(tmp_path: Path, left: str, right: str) -> None:
    infos = [f"{topic.rsplit('/', 1)[0]}/camera_info" for topic in (left, right)]
    path = bag_with_topics(tmp_path / "in", right, left, "/colour/image", *infos)
    with Bag(path) as bag:
        found = choose_stereo_cameras(bag)
        assert [camera.image for camera in found] == [left, right]
        assert [camera.camera_info for camera in found] == infos
        assert choose_stereo_cameras(bag, right=right)[0].image == left


def test_topics_must_be_given_if_left_and_right_cannot_be_recognised(run: Run, tmp_path: Path) -> None:
    bag = bag_with_topics(tmp_path / "in", "/one/image", "/two/image", "/info")
    target = tmp_path / "out"
    line = refused(run(bag, target, "--mode", "stereo"))
    assert "no two topics are named like a left and a right camera; name them with --left and --right: /one/" in line
    assert "no two topics" in refused(run(bag, target, "--left", "/one/image"))
    assert "--right /three: there is no such image topic" in refused(run(bag, target, "--right", "/three"))
    assert "are both /one/image" in refused(run(bag, target, "--left", "one/image", "--right", "/one/image"))
    bag = bag_with_topics(
        tmp_path / "four", "/left/image_raw", "/right/image_raw", "/left/image_rect", "/right/image_rect"
    )
    assert "2 pairs of topics may be a left and a right camera" in refused(run(bag, target, "--mode", "stereo"))
    with Bag(bag) as opened:
        assert choose_stereo_cameras(opened, left="/left/image_raw")[1].image == "/right/image_raw"


def test_topics_of_the_other_mode_are_refused(run: Run, stereo_bag: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    line = refused(run(stereo_bag, target, "--left", "/left/image_rect", "--image", "/left/image_rect"))
    assert "--image /left/image_rect: the mode is stereo; name its images with --left and --right" in line
    line = refused(run(stereo_bag, target, "--mode", "mono", "--left-info", "/left/camera_info"))
    assert "--left-info /left/camera_info: the mode is mono; name its images with --image" in line
