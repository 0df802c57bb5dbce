"""Tests of the node as a robot sees it: in its own process, over real DDS, with good and bad input."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import DescribeParameters, SetParametersAtomically
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import Trigger

from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from node_harness import NodeUnderTest, running_node, stamp_of

WIDTH, HEIGHT = 320, 240
FAST = {"profile": "fast", "max_keypoints": 256}


def textured(shift: int = 0) -> np.ndarray:
    """Return a picture full of corners, shifted to the left by ``shift`` pixels."""
    rng = np.random.default_rng(7)
    picture = np.full((HEIGHT, WIDTH + 200), 128, np.uint8)
    for _ in range(400):
        x, y, size = rng.integers(0, WIDTH + 200), rng.integers(0, HEIGHT), rng.integers(5, 30)
        shade = int(rng.integers(0, 256))
        cv2.rectangle(picture, (int(x), int(y)), (int(x + size), int(y + size)), shade, -1)
    return np.ascontiguousarray(cv2.GaussianBlur(picture, (0, 0), 0.8)[:, shift : shift + WIDTH])


def image(pixels: np.ndarray, seconds: float, encoding: str = "mono8") -> Image:
    """Return an image message as a camera driver fills it."""
    message = Image(encoding=encoding, height=pixels.shape[0], width=pixels.shape[1])
    message.step = pixels.strides[0]
    message.data = pixels.tobytes()
    return stamped(message, seconds)


def stamped(message, seconds: float):
    nanoseconds = round(seconds * 1e9)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(nanoseconds, 1_000_000_000)
    message.header.frame_id = "camera_optical"
    return message


def calibration(seconds: float, focal: float = 300.0) -> CameraInfo:
    info = CameraInfo(width=WIDTH, height=HEIGHT, distortion_model="plumb_bob")
    info.d = [0.0] * 5
    info.k = [focal, 0.0, WIDTH / 2, 0.0, focal, HEIGHT / 2, 0.0, 0.0, 1.0 if focal else 0.0]
    info.p = [focal, 0.0, WIDTH / 2, 0.0, 0.0, focal, HEIGHT / 2, 0.0, 0.0, 0.0, 1.0 if focal else 0.0, 0.0]
    return stamped(info, seconds)


def send_frames(node: NodeUnderTest, count: int, start: float = 100.0, calibrated: bool = True) -> None:
    """Send the images of a camera that moves sideways along a wall, by 4 pixels per frame."""
    for i in range(count):
        seconds = start + 0.1 * i
        node.send(image(textured(4 * i), seconds), calibration(seconds) if calibrated else None)
        node.spin(0.02)


def set_parameters(node: NodeUnderTest, **values):
    request = SetParametersAtomically.Request()
    request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
    return node.call(SetParametersAtomically, "matcher/set_parameters_atomically", request).result


def change_state(node: NodeUnderTest, transition: str) -> bool:
    request = ChangeState.Request()
    request.transition.label = transition
    return node.call(ChangeState, "matcher/change_state", request).success


def state(node: NodeUnderTest) -> str:
    return node.call(GetState, "matcher/get_state", GetState.Request()).current_state.label


def test_every_pair_of_frames_gives_one_match_array_and_one_pose(tmp_path: Path) -> None:
    with running_node(tmp_path, max_keypoints=256) as node:
        features: list[FeatureArray] = []
        node.subscribe(FeatureArray, "features", features.append)
        node.wait_until_connected()
        send_frames(node, 5)
        node.wait_for(lambda: len(node.poses) == 4 and len(node.matches) == 4 and len(features) == 5, "four pairs")
        for i, (matches, pose) in enumerate(zip(node.matches, node.poses)):
            assert stamp_of(matches.header) == pytest.approx(100.1 + 0.1 * i)
            assert stamp_of(matches.reference) == pytest.approx(100.0 + 0.1 * i)
            assert matches.header == pose.header and matches.reference == pose.reference
            assert matches.header.frame_id == "camera_optical"
            assert matches.pairing == MatchArray.CONSECUTIVE
            count = len(matches.scores)
            assert count > 50
            assert len(matches.points) == len(matches.reference_points) == 2 * count
            assert len(matches.indices) == len(matches.reference_indices) == len(matches.track_ids) == count
            assert len(matches.inliers) == count and pose.num_matches == count
            assert sum(matches.inliers) == pose.num_inliers
            assert (matches.width, matches.height) == (WIDTH, HEIGHT)
            assert 0 < matches.num_keypoints <= 256
            assert matches.reset == (i == 0)
            detected = [i for i in matches.indices if i != MatchArray.NOT_DETECTED]
            assert len(set(detected)) == len(detected) > count / 2
            assert len(set(matches.track_ids)) == len(matches.sigmas) == count
            assert 1 <= matches.layers <= 9
            assert (matches.extractor, matches.matcher) == ("superpoint-open", "lightglue-superpoint-open")
            # The next pair refers to the published features of a frame, so features are extracted only once.
            for own, points, indices in (
                (features[i], matches.reference_points, matches.reference_indices),
                (features[i + 1], matches.points, matches.indices),
            ):
                published, numbers = np.array(own.points).reshape(-1, 2), np.array(indices)
                known = numbers != MatchArray.NOT_DETECTED
                away = published[numbers[known]] - np.array(points).reshape(-1, 2)[known]
                assert np.linalg.norm(away, axis=1).max() <= 3, "a refined point is near its keypoint"
            assert own.descriptor_size * len(own.scores) == len(own.descriptors)
            shift = np.median(np.array(matches.points) - np.array(matches.reference_points), axis=0)
            assert shift == pytest.approx(0, abs=4)
        first, last = node.matches[0], node.matches[-1]
        survivors = set(first.track_ids) & set(last.track_ids)
        assert len(survivors) > 20, "tracks persist over frames"
        where = {track: i for i, track in enumerate(last.track_ids)}
        moved = np.array(
            [
                last.points[2 * where[track]] - first.reference_points[2 * i]
                for i, track in enumerate(first.track_ids)
                if track in survivors
            ]
        )
        # Except for occasional wrong matches, which a track follows.
        assert (np.abs(moved + 16) < 6).mean() > 0.95, "a track is the same point of the scene throughout"
        assert node.stop() == 0


def test_superglue_works_as_the_matcher(tmp_path: Path, random_folder: Callable[..., Path]) -> None:
    folder = str(random_folder(superglue={}))
    with running_node(tmp_path, calibrated=False, extractor=folder, matcher=folder, **FAST) as node:
        node.wait_until_connected()
        for i in range(3):  # by whole cells, because random weights match nothing else
            node.send(image(textured(16 * i), 100.0 + i))
        node.wait_for(lambda: len(node.matches) == 2, "two pairs")
        for matches in node.matches:
            assert (matches.extractor, matches.matcher) == (folder, folder)
            assert matches.layers == 4
            moved = np.reshape(matches.reference_points, (-1, 2)) - np.reshape(matches.points, (-1, 2))
            assert (np.linalg.norm(moved - (16, 0), axis=1) < 2).sum() > 20


def test_bad_input_is_counted_and_reported_and_later_frames_are_processed(tmp_path: Path) -> None:
    short = image(textured(), 50.0)
    short.data = short.data[:-100]
    unknown = image(textured(), 50.1, encoding="rgb7")
    empty = image(textured(), 50.2)
    empty.width = empty.height = 0
    empty.data = b""
    with running_node(tmp_path, **FAST) as node:
        node.wait_until_connected()
        for bad in (short, unknown, empty):
            node.send(bad)
        node.send(image(textured(), 60.0), calibration(60.0, focal=0.0))
        figures = node.wait_for_figure("frames rejected", "3")
        assert figures["rejected: data"] == figures["rejected: encoding"] == figures["rejected: size"] == "1"
        status = node.diagnostics[-1].status[0]
        assert status.level == DiagnosticStatus.WARN
        assert "rgb7" in status.message
        node.wait_for_figure("frames processed", "1")
        node.wait_for(lambda: "camera_info refused: uncalibrated" in node.figures(), "its calibration to be named")
        send_frames(node, 3, start=60.1)
        node.wait_for(lambda: len(node.poses) == 3, "the good frames")
        assert node.poses[0].status == RelativePose.NO_CALIBRATION, "the reference had no calibration"
        # For 4 pixels of motion and a planar wall, this test makes no assumption about the pose.
        known = (RelativePose.OK, RelativePose.NO_TRANSLATION, RelativePose.AMBIGUOUS)
        assert all(pose.status in known for pose in node.poses[1:])
        figures = node.wait_for_figure("frames processed", "4")
        assert figures["frames received"] == "7"


def test_a_black_frame_gives_an_empty_message_and_is_skipped_as_a_reference(tmp_path: Path) -> None:
    with running_node(tmp_path, **FAST) as node:
        node.wait_until_connected()
        node.send(image(textured(), 1.0), calibration(1.0))
        node.send(image(np.zeros((HEIGHT, WIDTH), np.uint8), 1.1), calibration(1.1))
        node.send(image(textured(), 1.2), calibration(1.2))
        node.wait_for(lambda: len(node.poses) == 2, "two pairs")
        black, after = node.matches
        assert len(black.points) == len(black.scores) == 0
        assert node.poses[0].status == RelativePose.TOO_FEW_MATCHES
        assert node.poses[0].pose.pose.orientation.w == 1.0
        assert (after.reference.stamp.sec, after.reference.stamp.nanosec) == (1, 0)
        assert len(after.scores) > 50 and node.poses[1].status != RelativePose.TOO_FEW_MATCHES


def test_without_calibration_the_pose_and_the_diagnostics_give_the_reason(tmp_path: Path) -> None:
    with running_node(tmp_path, calibrated=False, **FAST) as node:
        node.wait_until_connected()
        send_frames(node, 2, calibrated=False)
        node.wait_for(lambda: len(node.poses) == 1, "a pair")
        assert node.poses[0].status == RelativePose.NO_CALIBRATION
        assert len(node.matches[0].scores) > 50 and len(node.matches[0].inliers) == 0
        reason = f"no calibration on {node.namespace}/camera_info"
        node.wait_for(lambda: reason in node.message(), "the reason")
        node.wait_for(lambda: node.figures()["matches"], "the figures of the pair")
        assert node.figures()["inlier ratio"] == ""


def test_with_queue_all_the_first_frame_waits_for_a_late_calibration(tmp_path: Path) -> None:
    with running_node(tmp_path, queue="all", **FAST) as node:
        node.wait_until_connected()
        node.send(image(textured(), 1.0))
        node.wait_for_figure("frames waiting", "1")
        node.spin(2)
        node.send(image(textured(1), 1.1), calibration(1.0))
        node.wait_for(lambda: node.poses, "a pair")
        assert node.poses[0].status != RelativePose.NO_CALIBRATION


def test_a_reset_a_jump_back_in_time_and_a_long_gap_start_new_tracks(tmp_path: Path) -> None:
    with running_node(tmp_path, max_gap=2.0, **FAST) as node:
        node.wait_until_connected()
        send_frames(node, 3, start=100.0)
        node.wait_for(lambda: len(node.matches) == 2, "two pairs")
        assert node.call(Trigger, "reset", Trigger.Request()).success
        send_frames(node, 2, start=100.3)
        node.wait_for(lambda: len(node.matches) == 3, "one pair after the reset")
        send_frames(node, 2, start=50.0)
        node.wait_for(lambda: len(node.matches) == 4, "one pair after the jump back")
        send_frames(node, 2, start=60.0)
        node.wait_for(lambda: len(node.matches) == 5, "one pair after the gap")
        assert [matches.reset for matches in node.matches] == [True, False, True, True, True]
        ids = [set(matches.track_ids) for matches in node.matches]
        assert not (ids[2] & ids[1]) and not (ids[3] & ids[2]) and not (ids[4] & ids[3])
        node.wait_for_figure("frames processed", "9")
        node.wait_for(lambda: len(node.poses) == 7, "the last pose")
        assert len(node.matches) == 5
        kinds = [pose.status == RelativePose.INTERRUPTED for pose in node.poses]
        assert kinds == [False, False, False, True, False, True, False], "a pose for every pair, and for every break"


def test_with_queue_latest_overtaken_frames_are_dropped_and_counted(tmp_path: Path) -> None:
    # Reliable, so that missing frames were dropped by the node and not during transport.
    reliable = {"qos_overrides./image.subscription.reliability": "reliable"}
    with running_node(tmp_path, queue="latest", **reliable, **FAST) as node:
        node.wait_until_connected()
        views = [image(textured(i), 10.0) for i in range(60)]
        newest = 10.0

        def dropped() -> bool:  # a node that was delayed finds only the newest image and drops nothing
            nonlocal newest
            for view in views:
                newest += 0.01
                node.send(stamped(view, newest))
                node.spin(0.002)
            return int(node.figures().get("frames dropped", 0)) > 0

        node.wait_for(dropped, "frames that were overtaken")

        def newest_is_done() -> bool:
            return bool(node.matches) and stamp_of(node.matches[-1].header) == pytest.approx(newest)

        node.wait_for(newest_is_done, "the newest frame's matches")
        figures = node.wait_for_figure("frames processed", str(len(node.matches) + 1))
        counts = {key: int(value) for key, value in figures.items() if key.startswith("frames")}
        assert counts["frames dropped"] > 0
        assert counts["frames waiting"] == counts["frames rejected"] == 0
        assert counts["frames received"] == counts["frames processed"] + counts["frames dropped"]


def test_a_node_that_is_too_slow_for_max_gap_says_why_it_has_no_poses(tmp_path: Path) -> None:
    with running_node(tmp_path, queue="latest", max_gap=0.001, **FAST) as node:
        node.wait_until_connected()
        seconds = itertools.count(10.0, 0.1)

        def said() -> bool:
            for _ in range(5):  # all at once, because a fast machine keeps up with single frames
                node.send(image(textured(), next(seconds)))
            node.spin(0.05)
            return "more than max_gap, and frames that arrived in the meantime were dropped" in node.message()

        node.wait_for(said, "the reason")
        node.wait_for(lambda: any(pose.status == RelativePose.INTERRUPTED for pose in node.poses), "an interruption")
        assert not node.matches and "no frame was processed for" in node.log


def test_the_memory_of_waiting_frames_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "matcher"  # replaces the real program, with room for five images
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport sys\nfrom kpmatch_ros.process import configure_process\nconfigure_process()\n"
        f"from kpmatch_ros.ros import main, node\nnode.WAITING_MEMORY = {5 * WIDTH * HEIGHT}\nsys.exit(main.main())\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    with running_node(tmp_path, queue="all", fork=False, **FAST) as node:
        node.wait_until_connected()
        for number in range(20):  # the first frame waits for a calibration, and the others wait for the first
            node.send(image(textured(number), 10.0 + 0.05 * number))
        node.wait_for(lambda: "dropped although queue is all" in node.message(), "the dropped frames to be named")
        assert "Play the bag slower" in node.message() and "queue to latest" in node.message()
        node.calibrate((node.infos, calibration(10.0)))
        node.wait_for(lambda: node.matches and stamp_of(node.matches[-1].header) == pytest.approx(10.95), "the newest")
        figures = node.wait_for_figure("frames waiting", "0")
        counts = [int(figures[f"frames {each}"]) for each in ("received", "processed", "dropped", "rejected")]
        assert counts[0] == 20 and counts[1] == len(node.matches) + 1 == 6 and counts[2:] == [14, 0]


def test_images_of_a_best_effort_publisher_are_received_with_both_queues(tmp_path: Path) -> None:
    for queue in ("latest", "all"):
        folder = tmp_path / queue
        folder.mkdir()
        with running_node(folder, calibrated=False, queue=queue, **FAST) as node:
            node.node.destroy_publisher(node.images)
            node.images = node.node.create_publisher(Image, "image", qos_profile_sensor_data)
            node.wait_until_connected()
            numbers = itertools.count()

            def heard(node: NodeUnderTest = node, numbers: Iterator[int] = numbers) -> bool:
                i = next(numbers)
                node.send(image(textured(i % 20), 10 + 0.1 * i))
                node.spin(0.1)
                return len(node.matches) > 2

            node.wait_for(heard, "three pairs")


def test_compressed_images_are_received_on_their_own_topic(tmp_path: Path) -> None:
    arguments = ("-r", "image:=camera/image_raw")
    with running_node(tmp_path, arguments, calibrated=False, image_transport="compressed", **FAST) as node:
        publisher = node.node.create_publisher(CompressedImage, "camera/image_raw/compressed", 10)
        node.wait_for(publisher.get_subscription_count, "the node to come up")
        node.wait_for(lambda: node.node.count_publishers("matches"), "its topics")
        node.wait_until_known()
        for i in range(3):
            jpeg = cv2.imencode(".jpg", textured(4 * i))[1].tobytes()
            publisher.publish(stamped(CompressedImage(format="jpeg", data=jpeg), 1 + 0.1 * i))
        publisher.publish(stamped(CompressedImage(format="jpeg", data=jpeg[: len(jpeg) // 3]), 2.0))
        publisher.publish(stamped(CompressedImage(format="jpeg", data=jpeg), 2.1))
        node.wait_for(lambda: len(node.matches) == 3, "three pairs")
        assert node.wait_for_figure("frames processed", "4")["rejected: decode"] == "1"


def test_match_images_are_published_if_there_is_a_subscriber(tmp_path: Path) -> None:
    with running_node(tmp_path, **FAST) as node:
        node.subscribe(Image, "match_image", node.pictures.append)
        node.wait_until_connected()
        node.wait_for(lambda: node.node.count_publishers("match_image"), "the topic")
        send_frames(node, 2)
        node.wait_for(lambda: node.pictures, "a picture")
        picture = node.pictures[0]
        assert picture.encoding == "rgb8" and picture.step == 3 * picture.width
        pixels = np.array(picture.data, np.uint8).reshape(picture.height, picture.width, 3)
        assert picture.width >= 2 * WIDTH and picture.height >= HEIGHT
        assert (pixels.max(axis=2) != pixels.min(axis=2)).sum() > 500, "the matches are drawn in colour"


def test_parameters_change_while_the_node_runs_or_are_refused_with_the_reason(tmp_path: Path) -> None:
    with running_node(tmp_path, **FAST) as node:
        node.wait_until_connected()
        assert set_parameters(node, max_keypoints=40).successful
        refused = set_parameters(node, max_keypoints=50, filter_threshold=1.5)
        assert not refused.successful and "filter_threshold" in refused.reason and "1.5" in refused.reason
        refused = set_parameters(node, nms_radius=2)
        assert not refused.successful and "deactivate" in refused.reason
        for value in ("x", 5):
            assert not set_parameters(node, filter_threshold=value).successful
        send_frames(node, 2)
        node.wait_for(lambda: node.matches, "a pair")
        assert node.matches[0].num_keypoints == 40, "the accepted change took effect, the refused set left it alone"
        request = DescribeParameters.Request(names=["max_keypoints", "filter_threshold", "device"])
        described = node.call(DescribeParameters, "matcher/describe_parameters", request).descriptors
        assert "largest number of keypoints per image" in described[0].description
        assert (described[0].integer_range[0].from_value, described[0].integer_range[0].to_value) == (1, 16384)
        assert described[1].floating_point_range[0].to_value == 1.0
        assert described[1].type == ParameterType.PARAMETER_DOUBLE, "not that of the values refused"
        assert "when the node is configured" in described[2].additional_constraints


def test_lifecycle_transitions_work_and_a_failed_configuration_can_be_corrected(tmp_path: Path) -> None:
    with running_node(tmp_path, autostart=False, extractor="no-such-weights", **FAST) as node:
        assert state(node) == "unconfigured"
        assert not change_state(node, "configure")
        assert state(node) == "unconfigured"
        node.wait_for(lambda: "no-such-weights" in node.message(), "the reason")
        assert node.diagnostics[-1].status[0].level == DiagnosticStatus.ERROR
        assert set_parameters(node, extractor="superpoint-open-fast").successful
        for _ in range(2):
            assert change_state(node, "configure") and state(node) == "inactive"
            assert change_state(node, "activate") and state(node) == "active"
            node.wait_until_connected()
            node.matches.clear()
            send_frames(node, 3)
            node.wait_for(lambda: len(node.matches) == 2, "two pairs")
            assert change_state(node, "deactivate") and state(node) == "inactive"
            node.wait_until_gone()
            assert change_state(node, "cleanup") and state(node) == "unconfigured"
        assert set_parameters(node, mode="stereo").successful
        assert change_state(node, "configure") and change_state(node, "activate")
        node.wait_for(lambda: node.node.count_subscribers("right/camera_info"), "the topics of a stereo pair")
        assert change_state(node, "deactivate") and change_state(node, "cleanup")
        assert node.stop() == 0


def test_the_node_ends_cleanly_on_sigterm_while_it_processes_frames(tmp_path: Path) -> None:
    with running_node(tmp_path, **FAST) as node:
        node.wait_until_connected()
        send_frames(node, 8)
        assert node.stop(signal.SIGTERM) == 0
        assert "Traceback" not in node.log


def test_a_start_with_a_bad_parameter_says_what_is_wrong(tmp_path: Path) -> None:
    with running_node(tmp_path, precision="float12") as node:
        assert node.process.wait(timeout=60) == 1
        assert "precision is 'float12'" in node.log and "Traceback" not in node.log


def test_an_incompatible_quality_of_service_of_a_publisher_or_subscriber_is_reported(tmp_path: Path) -> None:
    demanding = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    wanted = {"qos_overrides./image.subscription.durability": "transient_local"}
    with running_node(tmp_path, **wanted, **FAST) as node:
        ns = node.namespace
        late = node.node.create_subscription(MatchArray, "matches", lambda message: None, demanding)
        node.wait_for(lambda: f"a subscriber of {ns}/matches asks for another durability" in node.message(), "ours")
        assert f"qos_overrides.{ns}/matches.publisher.durability" in node.message()
        node.wait_for(lambda: f"the publisher of {ns}/image offers another durability" in node.message(), "theirs")
        assert f"qos_overrides.{ns}/image.subscription.durability" in node.message()
        node.node.destroy_subscription(late)
        node.wait_for(lambda: "a subscriber of" not in node.message(), "the subscriber to be forgotten")


def test_the_node_works_while_simulated_time_stands_still(tmp_path: Path) -> None:
    with running_node(tmp_path, use_sim_time=True, **FAST) as node:
        node.wait_until_connected()
        send_frames(node, 3)
        node.wait_for(lambda: len(node.matches) == 2, "two pairs")
        node.wait_for_figure("frames processed", "3")


def test_a_frame_that_needs_too_much_memory_is_rejected_and_later_ones_are_matched(tmp_path: Path) -> None:
    with running_node(tmp_path, max_keypoints=256) as node:  # the memory left would suffice for the fast networks
        node.wait_until_connected()
        send_frames(node, 2)
        node.wait_for(lambda: len(node.matches) == 1, "a pair")
        limit = psutil.Process(node.process.pid).memory_info().vms + 300_000_000
        resource.prlimit(node.process.pid, resource.RLIMIT_AS, (limit, limit))
        node.send(image(np.tile(textured(), (8, 8)), 101.0))
        node.wait_for_figure("rejected: memory", "1")
        assert "out of memory" in node.message() and "lower resize" in node.message()
        send_frames(node, 2, start=102.0)
        node.wait_for(lambda: len(node.matches) == 2, "the pair after it")
        assert "Traceback" not in node.log
