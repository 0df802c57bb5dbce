"""Tests of the example examples/stereo_slam: its back-end with known points, and its node over DDS."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gtsam")
pytest.importorskip("matplotlib")
pytest.importorskip("kpmatch_ros.msg")

import gtsam
import rclpy
from domain_coordinator import domain_id
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import CameraInfo
from stereo_slam_robot import PLACES, TURNS
from stereo_slam_world import (
    BASELINE,
    CENTRE,
    FAILED,
    FOCAL,
    INTERRUPTED,
    NOISE,
    NOT_DETECTED,
    OK,
    TOO_FEW_MATCHES,
    World,
    camera_info,
    errors,
    feed,
    header,
    new_slam,
    true_pose,
)
from test_stereo_node import rig, stamped

from examples.stereo_slam.pose_graph import Keyframe, Keyframes, Loop, PoseGraph, align
from examples.stereo_slam.slam import StereoSlam
from examples.stereo_slam.smoother import Calibration

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_smoothing_follows_the_good_tracks_and_ignores_slipping_ones() -> None:
    slam, world = new_slam(), World()
    slam.add("stereo_matches", world.stereo(0))
    for frame in range(1, 13):
        feed(slam, world, frame - 1, frame)
    assert len(slam.stamps) == 13 and slam.breaks == 0
    assert errors(slam).max() < 0.01, "the guess of each motion alone is off by 0.017 m"


def test_tracks_bridge_a_frame_without_a_pose_and_a_lost_frame() -> None:
    slam, world = new_slam(), World()
    slam.add("stereo_matches", world.stereo(0))
    for frame in range(1, 10):
        if frame != 6:  # no messages for this frame, but it is the reference of the next one
            feed(slam, world, frame - 1, frame, status=FAILED if frame == 4 else OK)
    assert len(slam.stamps) == 9 and errors(slam).max() < 0.02


def test_the_path_continues_across_a_dark_frame() -> None:
    slam, world = new_slam(), World()
    slam.add("stereo_matches", world.stereo(0))
    for frame in (1, 2, 3):
        feed(slam, world, frame - 1, frame)
    dark, stereo = world.pair(3, 4, status=TOO_FEW_MATCHES), world.stereo(4)
    for message in (dark["matches"], stereo):
        for name, values in vars(message).items():
            if isinstance(values, np.ndarray):
                setattr(message, name, values[:0])
    for topic, message in {**dark, "stereo_matches": stereo}.items():
        slam.add(topic, message)
    for reference, frame in ((3, 5), (5, 6)):
        feed(slam, world, reference, frame)
    assert np.delete(errors(slam), 4).max() < 0.015
    drifted = slam.smoother.poses[6].between(slam.smoother.poses[0])
    slam.graph.close(
        Loop(
            0, 6, drifted.inverse().compose(gtsam.Pose3(gtsam.Rot3(), np.array([0.0, 0, 0.1]))), np.eye(6) * 1e-8, 100
        ),
        slam.smoother.poses,
    )
    moved = [a.between(b).translation() for a, b in zip(slam.smoother.poses, slam.graph.poses(slam.smoother.poses))]
    assert np.linalg.norm(moved[3]) > 0.03, "all share the correction; the dark frame's guess does not take it alone"


@pytest.mark.parametrize("aside", [0.0, 2.0])
def test_a_right_point_that_belongs_to_another_left_point_is_ignored(
    monkeypatch: pytest.MonkeyPatch, aside: float
) -> None:
    world, slam = World(), new_slam()
    world.aside = aside
    add_frame, seen = slam.smoother.add_frame, []

    def watch(motion: Any, sigmas: Any, reference: int, before: Any, now: Any) -> None:
        seen.extend([before, now])
        add_frame(motion, sigmas, reference, before, now)

    monkeypatch.setattr(slam.smoother, "add_frame", watch)
    for frame in range(1, 4):
        feed(slam, world, frame - 1, frame)
    for observations in seen[1:]:  # the first frame here has no stereo matches
        assert np.isfinite(observations.right_x).sum() == (0 if aside else (world.indices != NOT_DETECTED).sum())


@pytest.mark.parametrize("right", ["right", "left"])
def test_the_disparities_of_a_keyframe_come_from_its_stereo_matches(right: str) -> None:
    """Its keypoints are as detected, at whole pixels. The stereo matches are at the tracks."""
    world, calibration = World(), (camera_info("left"), camera_info("right"))
    slam = StereoSlam(*calibration, rectified=True, keyframes=Keyframes(step=0.05, least_path=0.0))
    for frame in range(1, 3):
        # Both cameras of a rectified pair may have the same frame_id: the left camera's features come first.
        for frame_id, columns in (("left", [0, 1]), (right, [2, 1])):
            points = np.round(world.pixels(frame)[:, columns]).ravel()
            slam.add("features", SimpleNamespace(header=header(frame, frame_id), points=points))
        feed(slam, world, frame - 1, frame)
    keyframe = slam.requests[0].reference
    pixels, matched = world.pixels(keyframe.number), world.indices != NOT_DETECTED
    np.testing.assert_allclose(keyframe.points, np.round(pixels[:, :2]), atol=1e-9)
    assert np.array_equal(np.isfinite(keyframe.right_x), matched)
    disparities = (keyframe.points[:, 0] - keyframe.right_x)[matched]
    np.testing.assert_allclose(disparities, (pixels[:, 0] - pixels[:, 2])[matched], atol=1e-9)


def test_the_code_in_front_end_md_makes_a_factor_with_the_messages_pose_and_covariance() -> None:
    random = np.random.default_rng(0)
    turn, moved = Rotation.from_rotvec([0.3, -0.8, 0.5]), np.array([0.4, -0.2, 1.0])
    spread = 1e-4 * random.normal(size=(6, 6))
    pose = SimpleNamespace(
        position=SimpleNamespace(**dict(zip("xyz", moved))),
        orientation=SimpleNamespace(**dict(zip("xyzw", turn.as_quat()))),
    )
    message = SimpleNamespace(pose=SimpleNamespace(pose=pose, covariance=(spread @ spread.T).ravel()))
    page = (EXAMPLES.parent / "docs" / "front_end.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "BetweenFactorPose3" in block)
    names: dict[str, Any] = {"gtsam": gtsam, "np": np, "message": message, "reference": 1, "current": 2}
    exec(code, names)
    error = spread @ random.normal(size=6)  # as in messages.md: t + dt, and exp(w) R
    true = gtsam.Pose3(gtsam.Rot3((Rotation.from_rotvec(error[3:]) * turn).as_matrix()), moved + error[:3])
    values = gtsam.Values()
    values.insert(1, gtsam.Pose3())
    values.insert(2, true)
    expected = error @ np.linalg.solve(spread @ spread.T, error) / 2
    assert names["factor"].error(values) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("order", list(itertools.permutations(["relative_pose", "matches", "stereo_matches"])))
def test_messages_of_a_frame_may_come_in_any_order(order: tuple[str, ...]) -> None:
    slam, world = new_slam(), World()
    messages = {"stereo_matches": world.stereo(1), **world.pair(0, 1)}
    slam.add("stereo_matches", world.stereo(0))
    completed = [slam.add(topic, messages[topic]) for topic in order]
    assert completed == [0, 0, 2], "the first frame is known with the first pair"


def test_after_a_reset_only_a_motion_guess_connects_the_frames() -> None:
    slam, world = new_slam(), World()
    slam.add("stereo_matches", world.stereo(0))
    feed(slam, world, 0, 1)
    slam.add("stereo_matches", world.stereo(5))
    feed(slam, world, 5, 6, reset=True, first_id=1001)
    assert slam.breaks == 1 and [stamp // 10**9 for stamp in slam.stamps] == [0, 1, 5, 6]
    moved, true = slam.poses()[2].between(slam.poses()[3]), true_pose(5).between(true_pose(6))
    assert np.linalg.norm(moved.translation() - true.translation()) < 0.01


@pytest.mark.parametrize("first", [0, 20])
@pytest.mark.parametrize("reset", [True, False])
def test_frames_start_a_new_sequence_after_stamps_went_back(first: int, reset: bool) -> None:
    """A bag is looped, or a clock is set back. The first pair afterwards may be lost, and its reset with it."""
    slam, world = new_slam(), World()
    slam.add("stereo_matches", world.stereo(first))
    for frame in range(first + 1, first + 13):
        feed(slam, world, frame - 1, frame)
    before = len(slam.stamps)
    slam.add("relative_pose", SimpleNamespace(header=header(0), status=INTERRUPTED))
    slam.add("stereo_matches", world.stereo(0))
    for frame in range(1, 13):
        feed(slam, world, frame - 1, frame, reset=reset and frame == 1, first_id=1000)
    again = slam.stamps[before:]
    assert [stamp // 10**9 for stamp in again] == list(range(0 if reset else 1, 13)) and slam.breaks == reset
    poses = slam.poses()[before:]
    moved = poses[0].between(poses[-1]), true_pose(12 - len(poses) + 1).between(true_pose(12))
    assert np.linalg.norm(moved[0].translation() - moved[1].translation()) < 0.02


def test_old_messages_are_not_combined_with_new_frames_after_stamps_went_back() -> None:
    """Old stereo matches and features are still waiting, and their stamps occur again in the new sequence."""
    world, keyframes = World(), Keyframes(step=0.05)
    slam = StereoSlam(camera_info("left"), camera_info("right"), rectified=True, keyframes=keyframes)

    def walk(again: bool, order: list[str], last: list[str]) -> list[tuple[int, ...]]:
        world.seen.clear()  # other pictures
        slam.add("stereo_matches", world.stereo(0))
        completed = []
        for frame in range(1, 8):
            pair = world.pair(frame - 1, frame, reset=again and frame == 1, first_id=1000 if again else 1)
            features = SimpleNamespace(header=header(frame), points=world.pixels(frame)[:, :2].ravel(), again=again)
            messages = {"features": features, "stereo_matches": world.stereo(frame), **pair}
            topics = last if frame == 7 else order
            completed.append(tuple(slam.add(topic, messages[topic]) for topic in topics))
        return completed

    order = ["relative_pose", "matches", "stereo_matches"]
    walk(False, ["features", *order], order)
    assert walk(True, [*order, "features"], [*order, "features"]) == [(0, 0, 2, 0)] + [(0, 0, 1, 0)] * 6
    assert len(slam.stamps) == 2 * 8 and slam.breaks == 1
    assert {each.features.again for each in keyframes.kept if each.number >= 8} == {True}


def test_an_image_with_a_late_partner_gets_its_own_pose() -> None:
    """The node has reported it as INTERRUPTED before."""
    slam, world = new_slam(), World()
    slam.add("stereo_matches", world.stereo(0))
    feed(slam, world, 0, 1)
    slam.add("relative_pose", SimpleNamespace(header=header(3), status=INTERRUPTED))
    for frame in (2, 3):
        messages = {"stereo_matches": world.stereo(frame), **world.pair(frame - 1, frame)}
        completed = [slam.add(topic, message) for topic, message in messages.items()]
        assert completed == [0, 0, 1], "with its own relative_pose, not with the earlier INTERRUPTED one"


@pytest.mark.parametrize("info_frame_id", ["", "/left", "left"])
def test_left_features_are_recognised_by_the_frame_id_of_the_matches(info_frame_id: str) -> None:
    """The camera_info may have another frame or none. Lost left features are not replaced by the right ones."""
    info, world = camera_info("left"), World()
    info.header.frame_id = info_frame_id
    keyframes = Keyframes(step=0.05, least_path=0.0)
    slam = StereoSlam(info, camera_info("right"), rectified=True, keyframes=keyframes)
    slam.add("stereo_matches", world.stereo(0))
    for frame in range(1, 7):
        sides = ("right",) if frame == 3 else ("left", "right")
        for side in sides:
            slam.add("features", SimpleNamespace(header=header(frame, side), points=world.pixels(frame)[:, :2].ravel()))
        feed(slam, world, frame - 1, frame)
    assert [each.number for each in keyframes.kept] == [1, 2, 4, 5, 6]
    assert {each.features.header.frame_id for each in keyframes.kept} == {"left"}


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("crop", ["binning", "region of interest", "principal points"])
def test_binning_and_region_of_interest_are_applied_to_the_calibration(rectified: bool, crop: str) -> None:
    """The images have half the calibration's size, by binning or cropping, or the principal points differ."""
    random = np.random.default_rng(1)
    inside = np.c_[random.uniform(-1, 1, (50, 2)), random.uniform(4, 9, 50)]
    infos = [camera_info(side) for side in ("left", "right")]
    received = []
    for side, info in enumerate(infos):
        if crop == "principal points":
            info.p[2] += 7.0 * side
            info.k = np.reshape(info.p, (3, 4))[:, :3].ravel()
        seen = inside - (side * BASELINE, 0, 0)
        pixels = seen[:, :2] / seen[:, 2:] * FOCAL + (info.p[2], info.p[6])
        if crop == "binning":
            info.binning_x = info.binning_y = 2
            pixels /= 2
        elif crop == "region of interest":
            info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height = 160, 120, 320, 240
            pixels -= (160, 120)
        received.append(pixels)
    slam = StereoSlam(*infos, rectified=rectified)
    seen = []
    slam.smoother.add_frame = lambda motion, sigmas, reference, before, now: seen.append(now)  # type: ignore[method-assign]
    world = World()
    for frame in (0, 1):
        stereo = world.stereo(frame)
        stereo.reference_indices, stereo.sigmas, stereo.inliers = np.arange(50), np.full(50, NOISE), np.ones(50)
        stereo.reference_points, stereo.points = received[0].ravel(), received[1].ravel()
        slam.add("stereo_matches", stereo)
    pair = world.pair(0, 1)
    matches = pair["matches"]
    matches.track_ids, matches.sigmas, matches.inliers = np.arange(50) + 1, np.full(50, NOISE), np.ones(50)
    matches.indices = matches.reference_indices = np.arange(50)
    matches.points = matches.reference_points = received[0].ravel()
    for topic, message in pair.items():
        slam.add(topic, message)
    camera = slam.calibration
    (now,) = seen
    depth = camera.fx * camera.baseline / (now.points[:, 0] - now.right_x)
    found = (now.points - (camera.cx, camera.cy)) / (camera.fx, camera.fy) * depth[:, None]
    np.testing.assert_allclose(np.c_[found, depth], inside, rtol=1e-6)
    assert camera.fx == pytest.approx(FOCAL / 2 if crop == "binning" else FOCAL), "the pixels of sigmas"


def test_a_calibration_without_a_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="Calibrate the two cameras as one stereo pair"):
        StereoSlam(camera_info("left"), camera_info("left"), rectified=True)


# Loops


def keyframe(world: World, frame: int) -> Keyframe:
    pixels = world.pixels(frame)
    return Keyframe(frame, None, pixels[:, :2], pixels[:, 2], np.full(120, NOISE))


def test_two_keyframes_give_a_loop_in_metres_and_random_matches_give_none() -> None:
    world = World()
    world.slip *= 0.0
    calibration = Calibration(FOCAL, FOCAL, *CENTRE, BASELINE)
    pairs, scores = np.c_[np.arange(120), np.arange(120)], np.ones(120)
    pairs[:10, 1] = np.roll(pairs[:10, 1], 1)  # wrong matches
    loop = align(keyframe(world, 0), keyframe(world, 8), pairs, scores, calibration)
    assert loop is not None and loop.num_inliers >= 100
    error = gtsam.Pose3.Logmap(loop.pose.between(true_pose(0).between(true_pose(8))))
    assert error @ np.linalg.solve(loop.covariance, error) < 22.5, "chi square, 6 degrees of freedom, 99.9 %"
    assert np.linalg.norm(error[3:]) < 0.02
    pairs[:, 1] = world.random.permutation(120)
    assert align(keyframe(world, 0), keyframe(world, 8), pairs, scores, calibration) is None


def test_loops_remove_the_drift_of_all_poses_and_a_wrong_loop_has_little_effect() -> None:
    sigmas = np.full(6, 0.01)
    drift = gtsam.Pose3.Expmap(np.array([0, 0, 0.001, 0.005, 0, 0]))
    smoothed, graph = [gtsam.Pose3()], PoseGraph()
    graph.add_frame(0, sigmas)
    for frame in range(1, 30):
        smoothed.append(smoothed[-1].compose(true_pose(frame - 1).between(true_pose(frame))).compose(drift))
        graph.add_frame(frame - 1, sigmas)

    def worst() -> float:
        apart = [
            pose.translation() - true_pose(number).translation() for number, pose in enumerate(graph.poses(smoothed))
        ]
        return float(np.linalg.norm(apart, axis=1).max())

    before = worst()
    tight = np.eye(6) * 1e-6
    for end in (29, 28, 27):
        graph.close(Loop(0, end, true_pose(0).between(true_pose(end)), tight, 100), smoothed)
    assert before > 0.1 and worst() < 0.2 * before
    graph.close(Loop(3, 20, gtsam.Pose3(gtsam.Rot3(), np.array([5.0, 0, 0])), tight, 100), smoothed)
    assert worst() < 0.3 * before


# The node


def test_the_node_follows_a_camera_and_closes_a_loop_over_dds(tmp_path: Path) -> None:
    """A motion to the right and back, with the matcher's own topics and its service."""
    places = [0.06 * step for step in (0, 1, 2, 3, 2, 1, 0)]
    with rig(tmp_path) as camera:
        node, picture, log = camera.node, tmp_path / "trajectory.png", tmp_path / "slam.log"
        paths: list[PathMessage] = []
        node.subscribe(PathMessage, "path", paths.append)
        truth = node.node.create_publisher(PoseStamped, "ground_truth/pose", QoSProfile(depth=100))
        parameters = {"rectified": "true", "picture": str(picture), "keyframe_step": "0.05", "loop_path": "0.2"}
        command = [sys.executable, "-m", "stereo_slam.node", "--ros-args", "-r", f"__ns:={node.namespace}"]
        command += [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        environment = {**os.environ, "ROS_DOMAIN_ID": str(node.node.context.get_domain_id()), "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            slam = subprocess.Popen(command, cwd=EXAMPLES, env=environment, stdout=stream, stderr=stream)
        try:
            topics = ("matches", "stereo_matches", "relative_pose")
            node.wait_for(lambda: all(node.node.count_subscribers(topic) > 1 for topic in topics), "the back-end")
            node.wait_for(lambda: node.node.count_subscribers("features"), "the back-end to subscribe to features")
            node.wait_for(truth.get_subscription_count, "the back-end to subscribe to the true poses")
            sent = 0
            while not paths:  # the matcher's messages are lost until it has discovered the back-end
                camera.send(10 + 0.1 * sent, places[0])
                node.wait_for(lambda count=sent: len(node.poses) == count, "the matcher")
                node.spin(0.5)
                sent += 1
                assert sent < 100, log.read_text()
            for frame, x in enumerate(places, sent):
                message = stamped(PoseStamped(), 10 + 0.1 * frame, "world")
                message.pose.position.x = x
                truth.publish(message)
                camera.send(10 + 0.1 * frame, x)
                node.wait_for(lambda count=frame: len(node.poses) == count, "the matcher")
            node.wait_for(lambda: paths[-1].poses[-1].header.stamp == message.header.stamp, "the whole path")
            node.wait_for(lambda: "loop closed: frame" in log.read_text(), "a loop")
        finally:
            slam.send_signal(signal.SIGINT)
            slam.wait(timeout=30)
    assert paths[-1].header.frame_id == "map"
    steps = paths[-1].poses[-len(places) :]
    found = np.array([[p.x, p.y, p.z] for p in (step.pose.position for step in steps)])
    # The camera's right is -y in a frame with x forward.
    np.testing.assert_allclose(found, [[0, -x, 0] for x in places], atol=0.006)
    assert slam.returncode == 0 and picture.stat().st_size > 10_000, log.read_text()


def test_a_latched_calibration_is_received_and_a_missing_one_is_reported() -> None:
    """There is a latched camera_info (durability transient_local) only of the left camera, from before the back-end."""
    context = rclpy.Context()
    with domain_id() as domain:
        rclpy.init(context=context, domain_id=domain)
        try:
            peer = rclpy.create_node("peer", context=context)
            latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            peer.create_publisher(CameraInfo, "left/camera_info", latched).publish(camera_info("left"))
            environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "stereo_slam.node", "--ros-args", "-r", "right/camera_info:=/other"]
            slam = subprocess.Popen(command, cwd=EXAMPLES, env=environment, stderr=subprocess.PIPE, text=True)
            try:
                assert slam.stderr is not None
                said = slam.stderr.readline()
            finally:
                slam.send_signal(signal.SIGINT)
                slam.communicate(timeout=30)
        finally:
            rclpy.try_shutdown(context=context)
    assert "no message has arrived on /other\n" in said


def test_raw_cameras_give_a_path_and_tf_over_dds(tf2_environment: dict[str, str], tmp_path: Path) -> None:
    """With lens distortion and rotated cameras, the path is that of the left camera, and TF agrees with it."""
    robot = Path(__file__).with_name("stereo_slam_robot.py")
    done = subprocess.run(
        [sys.executable, robot, tmp_path], env=tf2_environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["frame"] == "map"
    path = np.array(found["path"])
    np.testing.assert_allclose(path[:, 0], path[0, 0] + 0.1 * np.arange(len(PLACES)), atol=1e-6)
    # The pair moves along the rectified x axis, which is rotated for the raw camera. The map's x is the raw camera's z.
    along = Rotation.from_rotvec(TURNS["left"]).inv().apply([1.0, 0, 0])
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    np.testing.assert_allclose(path[:, 1:4], np.outer(PLACES, optical @ along), atol=0.006)
    turns = Rotation.from_quat(path[:, 4:])
    assert np.degrees((turns[0].inv() * turns).magnitude()).max() < 0.3
    np.testing.assert_allclose(turns[0].as_matrix(), optical, atol=1e-3)
    # TF per frame: from map to odom, and from odom to the camera.
    assert [link[:2] for link in found["tf"]] == [["map", "odom"], ["odom", "left_optical"]] * (len(found["tf"]) // 2)
    (correction, drifted) = (np.array([link[2:] for link in found["tf"][side::2]]) for side in (0, 1))
    np.testing.assert_allclose(drifted[:, 0], path[1:, 0], atol=1e-6)
    np.testing.assert_array_equal(correction[:, 0], drifted[:, 0])
    in_map = correction[:, 1:4] + Rotation.from_quat(correction[:, 4:]).apply(drifted[:, 1:4])
    np.testing.assert_allclose(in_map, np.outer(PLACES[1:], optical @ along), atol=0.006)
    np.testing.assert_allclose(in_map[-1], path[-1, 1:4], atol=1e-6)
