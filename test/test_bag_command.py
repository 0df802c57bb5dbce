"""Tests of kpmatch bag: its output equals what the node publishes, and each problem of a bag takes one line."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bag_harness import (
    FIRST,
    QUICK,
    SIZE,
    Run,
    bag_command,
    by_topic,
    differences,
    header_stamp,
    read_tum,
    refused,
    stamps,
)
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags import (
    Bag,
    BagWriter,
    bag_storage,
    bag_topics,
    camera_info_message,
    image_message,
    new_message,
    read_ground_truth,
)
from kpmatch_ros.bags.cameras import choose_camera
from kpmatch_ros.geometry.pose import PoseStatus, relative_motion
from kpmatch_ros.messages import nanoseconds
from node_harness import NodeUnderTest, running_node
from simulation import demo_camera
from simulation.bags import write_camera_bag, write_demo_bag


@pytest.fixture
def run(kpmatch: Run) -> Run:
    """run(words...) runs `kpmatch bag` and returns exit status, stdout and stderr."""
    return functools.partial(kpmatch, "bag")


@pytest.fixture(scope="module")
def views(texture: Any) -> list[NDArray[np.uint8]]:
    """Six images of a moving textured plane."""
    wide = texture(150, 240, 5)
    return [np.ascontiguousarray(wide[i : i + SIZE[1], 4 * i : 4 * i + SIZE[0]]) for i in range(6)]


@pytest.fixture(scope="module")
def bag(views: list[NDArray[np.uint8]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bag") / "in"
    write_camera_bag(path, views, stamps(6), demo_camera(*SIZE))
    return path


# The messages


def publish_images_and_infos(node: NodeUnderTest, bag: Path) -> None:
    with AnyReader([bag]) as reader:
        for connection, _, raw in reader.messages():
            if connection.topic == "/camera/image_raw":
                node.images.publish(bytes(raw))
            elif connection.topic == "/camera/camera_info":
                node.infos.publish(bytes(raw))
            node.spin(0.01)


def test_the_output_bag_equals_the_messages_of_the_node_bit_for_bit(tmp_path: Path) -> None:
    from rclpy.serialization import deserialize_message

    from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose

    write_demo_bag(tmp_path / "in", num_frames=5, size=(320, 240))
    with running_node(tmp_path, max_keypoints=512) as node:
        node.subscribe(FeatureArray, "features", node.features.append)
        node.wait_until_connected()
        node.wait_for(lambda: node.node.count_subscribers("features") == 1, "the subscription")
        publish_images_and_infos(node, tmp_path / "in")
        node.wait_for(lambda: len(node.poses) == len(node.matches) == 4 and len(node.features) == 5, "every pair")
    bag_command(tmp_path / "in", tmp_path / "out", "--device", "cpu", "--precision", "float32",
                "--max-keypoints", 512, "--features")  # fmt: skip
    written: dict[str, list[Any]] = {"/matches": [], "/relative_pose": [], "/features": []}
    kinds = {"/matches": MatchArray, "/relative_pose": RelativePose, "/features": FeatureArray}
    with AnyReader([tmp_path / "out"]) as reader:
        for connection, _, raw in reader.messages():
            written[connection.topic].append(deserialize_message(bytes(raw), kinds[connection.topic]))
    for message in [*node.matches, *written["/matches"]]:
        message.extract_ms = message.match_ms = 0.0  # only the measured times differ
    assert len(node.matches[0].scores) > 50
    for topic, published in (("/features", node.features), ("/matches", node.matches), ("/relative_pose", node.poses)):
        assert differences(written[topic], published) == [], topic


def test_messages_have_the_header_stamps_and_recording_times_of_their_images(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    delay = 7_000_000  # from exposure to recording
    with BagWriter(tmp_path / "in") as bag:
        for stamp, view in zip(stamps(6), views):
            bag.write("/eye/image", image_message(view, stamp, "eye", "mono8"), stamp + delay)
            bag.write("/eye/camera_info", camera_info_message(demo_camera(*SIZE), stamp, "eye"), stamp + delay)
    status, _, err = run(tmp_path / "in", tmp_path / "out", *QUICK)
    assert (status, err) == (0, "")
    found = by_topic(tmp_path / "out")
    assert set(found) == {"/matches", "/relative_pose"}
    for records in found.values():
        assert [header_stamp(record.message) for record in records] == stamps(6)[1:]
        assert [record.stamp for record in records] == [stamp + delay for stamp in stamps(6)[1:]]
        assert {record.message.header.frame_id for record in records} == {"eye"}


def test_a_frame_after_a_time_jump_has_no_pair_and_its_pose_is_interrupted(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    times = [FIRST + tenth * 100_000_000 for tenth in (50, 51, 0, 1, 30, 31)]  # the time goes back, then has a gap
    with BagWriter(tmp_path / "in") as bag:
        for recorded_at, stamp, view in zip(stamps(6), times, views):
            bag.write("/eye/image", image_message(view, stamp, "eye", "mono8"), recorded_at)
    status, out, err = run(tmp_path / "in", tmp_path / "out", *QUICK, "--max-gap", 1, "--json")
    assert status == 0 and json.loads(out)["poses"]["INTERRUPTED"] == 2
    assert "the stamps went back by 5.100 s" in err and "no frame was processed for 2.900 s" in err
    found = by_topic(tmp_path / "out")
    assert [header_stamp(record.message) for record in found["/matches"]] == [times[i] for i in (1, 3, 5)]
    poses = [record.message for record in found["/relative_pose"]]
    assert sorted(header_stamp(pose) for pose in poses) == sorted(times[1:])
    alone = [pose for pose in poses if pose.status == PoseStatus.INTERRUPTED]
    assert [header_stamp(pose) for pose in alone] == [times[2], times[4]]
    assert all(pose.num_matches == 0 and pose.reference.frame_id == "" for pose in alone)


def test_features_and_match_images_are_written_on_request(run: Run, bag: Path, tmp_path: Path) -> None:
    assert run(bag, tmp_path / "out", *QUICK, "--features", "--match-image")[0] == 0
    counts = {topic.name: topic.num_messages for topic in bag_topics(tmp_path / "out")}
    assert counts == {"/features": 6, "/matches": 5, "/match_image": 5, "/relative_pose": 5}
    picture = by_topic(tmp_path / "out")["/match_image"][0].message
    assert picture.width > 2 * SIZE[0] and len(picture.data) == picture.step * picture.height


@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_the_output_bag_has_the_storage_format_of_the_input_bag(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path, storage: Any
) -> None:
    write_camera_bag(tmp_path / "in", views[:2], stamps(2), None, storage=storage)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK)[0] == 0
    assert bag_storage(tmp_path / "out") == storage
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"metadata.yaml", "out.mcap" if storage == "mcap" else "out.db3"}


def test_compressed_images_are_matched_too(run: Run, views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    topic = "/camera/image_raw/compressed"
    write_camera_bag(tmp_path / "in", views, stamps(6), demo_camera(*SIZE), image_topic=topic,
                     info_topic="/camera/camera_info", compressed="png")  # fmt: skip
    write_camera_bag(tmp_path / "raw", views, stamps(6), demo_camera(*SIZE))
    found = []
    for name in ("in", "raw"):
        assert run(tmp_path / name, tmp_path / f"out_{name}", *QUICK)[0] == 0
        found.append([record.message.points for record in by_topic(tmp_path / f"out_{name}")["/matches"]])
    # Colours are summed in another order, so a refinement may end one step earlier.
    assert all(len(one) == len(other) and np.allclose(one, other, atol=0.02) for one, other in zip(*found))
    assert len(found[0][0]) > 20


# The figures


def test_the_command_prints_a_table_at_the_end(run: Run, bag: Path, tmp_path: Path) -> None:
    status, out, err = run(bag, tmp_path / "out", *QUICK)
    assert (status, err) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert list(rows) == ["frames", "rate", "latency", "keypoints", "matches", "inliers", "poses", "bag"]
    assert "6 of 160 x 120 (/camera/image_raw)" in rows["frames"] and "95 %" in rows["latency"]


def test_the_json_output_agrees_with_the_messages_in_the_bag(run: Run, bag: Path, tmp_path: Path) -> None:
    figures = json.loads(run(bag, tmp_path / "out", *QUICK, "--json")[1])
    found = by_topic(tmp_path / "out")
    assert figures["frames"] == 6 and sum(figures["poses"].values()) == 5 and figures["rejected"] == {}
    assert figures["matches"] == np.median([len(record.message.scores) for record in found["/matches"]])
    assert figures["inliers"] == np.median([record.message.num_inliers for record in found["/relative_pose"]])
    assert figures["rate"] > 0 and 0 < figures["latency_ms"]["median"] <= figures["latency_ms"]["95 %"]


def test_unusable_images_are_counted_and_the_run_continues(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    with BagWriter(tmp_path / "in") as bag:
        for number, (stamp, view) in enumerate(zip(stamps(6), views)):
            message = image_message(view, stamp, "eye", "mono8")
            if number == 2:
                message.encoding = "mono7"
            if number in (3, 4):
                message.data = message.data[:100]
            bag.write("/image", message, stamp)
    status, out, err = run(tmp_path / "in", tmp_path / "out", *QUICK, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["frames"] == 3 and figures["rejected"] == {"encoding": 1, "data": 2}
    assert "mono7" in err and err.count("an image was rejected") == 2  # each reason is reported once
    matches = by_topic(tmp_path / "out")["/matches"]
    assert [header_stamp(record.message) for record in matches] == [stamps(6)[1], stamps(6)[5]]


def test_a_calibration_for_another_image_size_gives_no_pose_and_a_warning(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    write_camera_bag(tmp_path / "in", views, stamps(6), demo_camera(320, 240))
    status, out, err = run(tmp_path / "in", tmp_path / "out", *QUICK, "--json")
    figures = json.loads(out)
    assert status == 0 and figures["poses"] == {"NO_CALIBRATION": 5} and figures["camera_info_refused"] == {"size": 6}
    assert "the image is 160x120 pixels but its calibration is for 320x240" in err and err.count("\n") == 1


# Parameters


def points_at_keypoints(matches: Any) -> NDArray[np.float32]:
    """Return the points (M, 2) at keypoints of the current image, without those of other tracks."""
    return np.reshape(matches.points, (-1, 2))[np.array(matches.indices) != matches.NOT_DETECTED]


def test_options_override_the_parameter_file_which_overrides_the_defaults(run: Run, bag: Path, tmp_path: Path) -> None:
    (tmp_path / "matcher.yaml").write_text(
        "/**:\n  ros__parameters:\n    max_keypoints: 50\n    matcher: nearest\n    use_sim_time: true\n"
        "/other:\n  ros__parameters: {max_keypoints: 7}\n"
        "/matcher:\n  ros__parameters: {border: 9, device: cpu, keypoint_threshold: 1e-4}\n"
    )
    assert run(bag, tmp_path / "out", "--params", tmp_path / "matcher.yaml", "--border", 20)[0] == 0
    matches = by_topic(tmp_path / "out")["/matches"][0].message
    assert matches.num_keypoints == 50 and matches.matcher == "nearest"
    assert points_at_keypoints(matches).min() >= 17, "a refined point is near its keypoint"
    assert run(bag, tmp_path / "out2", "--params", tmp_path / "matcher.yaml")[0] == 0
    assert points_at_keypoints(by_topic(tmp_path / "out2")["/matches"][0].message).min() < 17


def test_the_installed_parameter_file_gives_the_defaults() -> None:
    from kpmatch_ros.parameter_file import read_parameter_file
    from kpmatch_ros.parameters import Parameters

    assert read_parameter_file(Path(__file__).parents[1] / "config" / "matcher.yaml") == Parameters()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/**:\n  ros__parameters:\n    max_keypoints: 0\n", "max_keypoints is 0; it must be 1 to 16384"),
        ("/camera:\n  ros__parameters:\n    rate: 5\n", "has no section for /matcher; it has /camera"),
        ("max_keypoints: 5\n", "has no section for /matcher; it has none"),
        ("/**:\n  ros__parameters: [1]\n", "there must be parameters"),
        ("a: [\n", "is not a YAML file"),
        ("/**:\n  ros__parameters:\n    mode: stereo\n", "no two topics are named like a left and a right camera"),
        ("/**:\n  ros__parameters:\n    publish_odometry: true\n", "publish_odometry needs mode stereo"),
    ],
)
def test_a_bad_parameter_file_is_refused_in_one_line(run: Run, bag: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert said in refused(run(bag, tmp_path / "out", "--params", tmp_path / "bad.yaml"))
    assert not (tmp_path / "out").exists()


def test_an_option_that_is_wrong_is_not_blamed_on_the_parameter_file(run: Run, bag: Path, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("/**:\n  ros__parameters:\n    max_keypoints: 64\n")
    words = ("--params", tmp_path / "good.yaml", "--odom-frame", "x", "--base-frame", "x")
    said = refused(run(bag, tmp_path / "out", *words))
    assert "base_frame and odom_frame are both 'x'" in said and "good.yaml" not in said


def test_a_folder_without_a_name_of_its_own_is_refused_as_the_output(run: Run, bag: Path) -> None:
    for place in (".", "/", ""):
        assert "exists already" in refused(run(bag, place, *QUICK))


def test_the_reference_may_be_a_keyframe(run: Run, bag: Path, tmp_path: Path) -> None:
    assert run(bag, tmp_path / "out", *QUICK, "--reference", "keyframe", "--keyframe-min-matches", 1)[0] == 0
    matches = by_topic(tmp_path / "out")["/matches"]
    assert [nanoseconds(record.message.reference.stamp) for record in matches] == [FIRST] * 5


# Topics


def two_cameras(path: Path, views: list[NDArray[np.uint8]]) -> Path:
    with BagWriter(path) as bag:
        for stamp, view in zip(stamps(3), views):
            for eye, size in (("left", SIZE), ("right", (320, 240))):
                bag.write(f"/{eye}/image_rect", image_message(view, stamp, eye, "mono8"), stamp)
                bag.write(f"/{eye}/camera_info", camera_info_message(demo_camera(*size), stamp, eye), stamp)
    return path


def test_one_of_several_cameras_must_be_chosen(run: Run, views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    bag = two_cameras(tmp_path / "in", views)
    line = refused(run(bag, tmp_path / "out", *QUICK))
    assert "has 2 image topics, choose one with --image, or a stereo pair with --left and --right: /left/im" in line
    line = refused(run(bag, tmp_path / "out", *QUICK, "--image", "/up/image_rect"))
    assert "--image /up/image_rect: there is no such image topic" in line and "/left/image_rect" in line
    line = refused(run(bag, tmp_path / "out", *QUICK, "--image", "/left/image_rect", "--camera-info", "/info"))
    assert "--camera-info /info" in line and "/right/camera_info" in line
    figures = json.loads(run(bag, tmp_path / "out", *QUICK, "--image", "/left/image_rect", "--json")[1])
    assert figures["camera_info"] == "/left/camera_info" and figures["camera_info_refused"] == {}
    other = ("--image", "left/image_rect", "--camera-info", "right/camera_info")
    figures = json.loads(run(bag, tmp_path / "out2", *QUICK, *other, "--json")[1])
    assert figures["camera_info"] == "/right/camera_info" and figures["camera_info_refused"] == {"size": 3}


def test_the_only_calibration_of_a_bag_is_used_whatever_its_topic(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    write_camera_bag(tmp_path / "in", views, stamps(6), demo_camera(*SIZE), info_topic="/calibration")
    assert json.loads(run(tmp_path / "in", tmp_path / "out", *QUICK, "--json")[1])["camera_info"] == "/calibration"


def test_the_only_calibration_of_a_bag_is_not_used_for_another_camera(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    with BagWriter(tmp_path / "in") as bag:
        for stamp, view in zip(stamps(3), views):
            for eye in ("one", "other"):
                bag.write(f"/{eye}/image", image_message(view, stamp, eye, "mono8"), stamp)
            bag.write("/one/camera_info", camera_info_message(demo_camera(*SIZE), stamp, "one"), stamp)
    _, out, err = run(tmp_path / "in", tmp_path / "out", "--image", "/other/image", "--json", *QUICK)
    assert json.loads(out)["camera_info"] is None and "so no relative pose; name one with --camera-info" in err
    given = ("--image", "/other/image", "--camera-info", "/one/camera_info")
    _, out, err = run(tmp_path / "in", tmp_path / "given", *given, "--json", *QUICK)
    assert json.loads(out)["camera_info"] == "/one/camera_info"
    assert "have the frame_id 'other', but their camera_info has 'one'" in err, (
        "it was chosen explicitly, so there is only a warning"
    )
    with Bag(tmp_path / "in") as opened:
        assert choose_camera(opened, "/one/image").camera_info == "/one/camera_info"


@pytest.mark.parametrize("image", ["/eye/image_raw/compressed", "/eye/compressed_image"])
def test_the_calibration_beside_compressed_images_is_found(
    views: list[NDArray[np.uint8]], tmp_path: Path, image: str
) -> None:
    camera = demo_camera(*SIZE)
    with BagWriter(tmp_path / "in") as bag:
        bag.write(image, image_message(views[0], FIRST, "eye", "mono8", "png"), FIRST)
        for name in ("/eye/camera_info", "/other/camera_info"):
            bag.write(name, camera_info_message(camera, FIRST, "eye"), FIRST)
    with Bag(tmp_path / "in") as opened:
        assert choose_camera(opened).camera_info == "/eye/camera_info"


def test_without_calibration_there_are_matches_but_no_poses(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    write_camera_bag(tmp_path / "in", views, stamps(6), None)
    status, out, err = run(tmp_path / "in", tmp_path / "out", *QUICK)
    assert status == 0 and "no camera_info beside /camera/image_raw" in err and "NO_CALIBRATION 5" in out
    assert ["inliers", "-"] in [line.split() for line in out.splitlines()]  # the number of inliers is unknown, not 0


def test_with_one_image_the_figures_of_pairs_are_null(run: Run, views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    write_camera_bag(tmp_path / "in", views[:1], stamps(1), demo_camera(*SIZE))
    figures = json.loads(run(tmp_path / "in", tmp_path / "out", *QUICK, "--json")[1])
    assert figures["frames"] == 1 and figures["keypoints"] > 20 and figures["poses"] == {}
    assert all(figures[name] is None for name in ("matches", "inliers", "times_real_time"))
    assert "times as fast" not in run(tmp_path / "in", tmp_path / "again", *QUICK)[1]


# Poses


def test_poses_are_chained_from_the_first_camera_pose(run: Run, tmp_path: Path) -> None:
    write_demo_bag(tmp_path / "in", num_frames=4, size=(320, 240))
    assert run(tmp_path / "in", tmp_path / "out", "--device", "cpu", "--poses", tmp_path / "poses.txt")[0] == 0
    times, rows = read_tum(tmp_path / "poses.txt")
    true_stamps, truth = read_ground_truth(tmp_path / "in")
    assert times == [f"{stamp // 10**9}.{stamp % 10**9:09d}" for stamp in true_stamps.tolist()]
    rotation, position = Rotation.identity(), np.zeros(3)
    chain = [(rotation, position)]
    for record in by_topic(tmp_path / "out")["/relative_pose"]:
        p, q = record.message.pose.pose.position, record.message.pose.pose.orientation
        position = position + rotation.apply([p.x, p.y, p.z])
        rotation = rotation * Rotation.from_quat([q.x, q.y, q.z, q.w])
        chain.append((rotation, position))
    for row, (rotation, position) in zip(rows, chain):
        assert row[1:4] == pytest.approx(position, abs=1e-6)
        assert (Rotation.from_quat(row[4:]).inv() * rotation).magnitude() < 1e-6
    # The third camera is at its true position in the first one's frame, except for the scale.
    turned, moved = relative_motion(truth[0], truth[2])
    assert np.degrees((Rotation.from_quat(rows[2, 4:]).inv() * Rotation.from_matrix(turned)).magnitude()) < 1.5
    assert rows[2, 1:4] @ moved > 0.97 * np.linalg.norm(rows[2, 1:4]) * np.linalg.norm(moved)


def test_a_negative_time_is_written_with_its_sign(run: Run, views: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    with BagWriter(tmp_path / "in") as bag:
        for number, view in enumerate(views[:2]):
            bag.write("/eye/image", image_message(view, (2 * number - 1) * 250_000_000, "eye", "mono8"), FIRST + number)
    assert run(tmp_path / "in", tmp_path / "out", *QUICK, "--poses", tmp_path / "poses.txt")[0] == 0
    assert (tmp_path / "poses.txt").read_text().splitlines()[1].startswith("-0.250000000 0.0")


def test_frames_without_a_pose_are_marked_as_a_break_of_the_chain(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    blank = np.full_like(views[0], 128)
    write_camera_bag(tmp_path / "in", [*views[:3], blank, blank, *views[3:]], stamps(8), demo_camera(*SIZE))
    enough = ("--max-keypoints", "512", "--keypoint-threshold", "0.0005")  # so that poses are not ambiguous
    status, out, _ = run(tmp_path / "in", tmp_path / "out", *QUICK, *enough, "--poses", tmp_path / "poses.txt")
    poses = [record.message for record in by_topic(tmp_path / "out")["/relative_pose"]]
    known = [FIRST, *(header_stamp(pose) for pose in poses if pose.status in (pose.OK, pose.NO_TRANSLATION))]
    assert known == [stamps(8)[i] for i in (0, 1, 2, 6, 7)]
    times, rows = read_tum(tmp_path / "poses.txt")
    assert [float(time) for time in times] == pytest.approx([stamp * 1e-9 for stamp in known])
    lines = (tmp_path / "poses.txt").read_text().splitlines()
    broken = [number for number, line in enumerate(lines) if line.startswith("# broken")]
    assert status == 0 and broken == [4] and "broken 1 time:" in out
    # The chain continues at the last known pose, as if the camera had not moved in between.
    step = poses[5].pose.pose
    q, p = step.orientation, step.position
    last = Rotation.from_quat(rows[2, 4:])
    assert rows[3, 1:4] == pytest.approx(rows[2, 1:4] + last.apply([p.x, p.y, p.z]), abs=1e-6)
    turned = last * Rotation.from_quat([q.x, q.y, q.z, q.w])
    assert (turned.inv() * Rotation.from_quat(rows[3, 4:])).magnitude() < 1e-6


# What is not written


def test_an_unusable_output_path_is_refused_and_nothing_is_changed(run: Run, bag: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    assert "out: exists already" in refused(run(bag, tmp_path / "out", *QUICK))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]
    assert "there is no folder" in refused(run(bag, tmp_path / "nowhere" / "out", *QUICK))
    assert "there is no folder" in refused(run(bag, tmp_path / "new", *QUICK, "--poses", tmp_path / "nowhere" / "p"))
    assert "lies in the bag that is read" in refused(run(bag, bag / "out", *QUICK))
    assert "/proc/out: cannot be written to /proc: No such file" in refused(run(bag, "/proc/out", *QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_bag_or_one_without_images_is_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    assert "there is no such bag" in refused(run(tmp_path / "in", tmp_path / "out"))
    (tmp_path / "in").mkdir()
    assert "is not a bag" in refused(run(tmp_path / "in", tmp_path / "out"))
    with BagWriter(tmp_path / "text") as bag:
        bag.write("/text", new_message("std_msgs/msg/String", data="hello"), FIRST)
    assert "has no image topic" in refused(run(tmp_path / "text", tmp_path / "out"))


def test_a_bag_without_a_usable_image_leaves_no_output(
    run: Run, views: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    with BagWriter(tmp_path / "in") as bag:
        for stamp in stamps(2):
            bag.write("/depth", new_message("sensor_msgs/msg/Image", encoding="16SC1", width=4, height=4), stamp)
    line = refused(run(tmp_path / "in", tmp_path / "out", *QUICK, "--poses", tmp_path / "poses.txt"))
    assert "none of the 2 images on /depth can be used" in line and "16SC1" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_report_names_the_bags_folder_even_if_the_path_is_a_dot(
    run: Run, bag: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    monkeypatch.chdir(bag)
    assert run(".", tmp_path / "out", *QUICK, "--report", tmp_path / "report.html")[0] == 0
    assert f"<title>Matches of {bag.name}</title>" in (tmp_path / "report.html").read_text()


def test_the_command_needs_no_ros(bag: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from kpmatch_ros.cli import main\n"
        f"status = main(['bag', {str(bag)!r}, 'out', *{QUICK!r}])\n"
        "print(status, [name for name in sys.modules if name in ('rclpy', 'kpmatch_ros.msg', 'std_msgs')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_an_option_without_effect_is_reported(run: Run, bag: Path, tmp_path: Path) -> None:
    status, _, errors = run(bag, tmp_path / "out", *QUICK, "--keyframe-min-matches", 40)
    warning = "keyframe_min_matches is 40 and has no effect: it needs reference 'keyframe', which is 'previous'"
    assert status == 0 and f"kpmatch bag: {warning}\n" in errors


def test_a_misspelt_parameter_in_a_file_is_named_and_the_bag_is_processed(run: Run, bag: Path, tmp_path: Path) -> None:
    file = tmp_path / "matcher.yaml"
    file.write_text("/**:\n  ros__parameters:\n    max_keypoint: 100\n")
    status, _, err = run(bag, tmp_path / "out", *QUICK, "--params", file)
    assert (status, err.count("\n")) == (0, 1), err
    assert "'max_keypoint' does not exist and has no effect, did you mean max_keypoints?" in err
    assert len(by_topic(tmp_path / "out")["/matches"]) == 5
