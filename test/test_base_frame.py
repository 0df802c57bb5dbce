"""Tests of odometry of a robot's base with the camera's transform from /tf_static, in the node and `kpmatch bag`."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from bag_harness import QUICK, by_topic
from rosbags.rosbag2 import Reader
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags import Bag, BagWriter, new_message, read_messages
from kpmatch_ros.bags.cameras import choose_cameras
from kpmatch_ros.bags.report import Report
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import Pose, PoseStatus, RelativePose
from kpmatch_ros.geometry.static_transforms import StaticTransforms
from kpmatch_ros.odometry import Odometry, OdometryPose, Twist, frame_fault, of_base
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.pipeline import Pipeline
from node_harness import running_node
from simulation.bags import write_demo_bag

# A camera 0.3 m in front of the base's origin, 0.1 m to its left and 0.5 m above it, turned to the left by 30 degrees.
OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
MOUNT = Pose(Rotation.from_euler("z", 30, degrees=True).as_matrix() @ OPTICAL, np.array([0.3, 0.1, 0.5]))


def transform(parent: str, child: str, pose: Pose, new: Any = new_message) -> Any:
    x, y, z = (float(value) for value in pose.position)
    qx, qy, qz, qw = (float(value) for value in Rotation.from_matrix(pose.rotation).as_quat())
    time = new("builtin_interfaces/msg/Time", sec=0, nanosec=0)
    return new(
        "geometry_msgs/msg/TransformStamped",
        header=new("std_msgs/msg/Header", stamp=time, frame_id=parent),
        child_frame_id=child,
        transform=new(
            "geometry_msgs/msg/Transform",
            translation=new("geometry_msgs/msg/Vector3", x=x, y=y, z=z),
            rotation=new("geometry_msgs/msg/Quaternion", x=qx, y=qy, z=qz, w=qw),
        ),
    )


def random_pose(random: np.random.Generator) -> Pose:
    return Pose(Rotation.random(random_state=int(random.integers(1 << 30))).as_matrix(), random.normal(size=3))


# The tree of frames


def test_a_transform_is_found_across_the_branches_of_the_tree() -> None:
    random = np.random.default_rng(0)
    in_base = {name: random_pose(random) for name in ("mast", "left", "right", "lidar")}
    in_mast = {
        name: Pose(
            in_base["mast"].rotation.T @ in_base[name].rotation,
            in_base["mast"].rotation.T @ (in_base[name].position - in_base["mast"].position),
        )
        for name in ("left", "right")
    }
    tree = StaticTransforms()
    tree.update(SimpleNamespace(transforms=[transform("mast", f"{name}", pose) for name, pose in in_mast.items()]))
    tree.update(SimpleNamespace(transforms=[transform("/base_link", "mast", in_base["mast"])]))
    tree.update(SimpleNamespace(transforms=[transform("base_link", "lidar", in_base["lidar"])]))
    for name in ("left", "right", "mast", "lidar"):
        found = tree.pose(f"/{name}", "base_link")
        assert found is not None
        np.testing.assert_allclose(found.rotation, in_base[name].rotation, atol=1e-9)
        np.testing.assert_allclose(found.position, in_base[name].position, atol=1e-9)
    across, back = tree.pose("left", "lidar"), tree.pose("lidar", "left")
    assert across is not None and back is not None
    np.testing.assert_allclose(across.rotation @ back.rotation, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(across.rotation @ back.position + across.position, 0, atol=1e-9)
    assert tree.pose("left", "odom") is None and tree.pose("wheel", "base_link") is None


def test_cycles_end_and_invalid_transforms_are_ignored() -> None:
    tree = StaticTransforms()
    broken = transform("base_link", "camera", MOUNT)
    broken.transform.rotation.w = broken.transform.rotation.x = 0.0
    broken.transform.rotation.y = broken.transform.rotation.z = 0.0
    lost = transform("base_link", "camera", MOUNT._replace(position=np.array([0, np.nan, 0])))
    tree.update(SimpleNamespace(transforms=[broken, lost, transform("", "camera", MOUNT)]))
    assert tree.pose("camera", "base_link") is None
    for w, taken in ((0.4, False), (2.1, False), (0.6, True), (1.9, True)):  # quaternion lengths: rounding changes them
        scaled = transform("robot", f"length {w}", Pose(np.eye(3), np.zeros(3)))
        scaled.transform.rotation.w = w
        tree.update(SimpleNamespace(transforms=[broken, scaled]))
        assert (tree.pose(f"length {w}", "robot") is not None) == taken
    tree.update(SimpleNamespace(transforms=[transform("a", "b", MOUNT), transform("b", "a", MOUNT)]))
    assert tree.pose("a", "nowhere") is None and tree.pose("a", "b") is not None


def test_a_second_parent_or_a_cycle_in_tf_is_detected() -> None:
    tree = StaticTransforms()
    links = [transform(*names, MOUNT) for names in (("map", "odom"), ("odom", "base_link"), ("base_link", "camera"))]
    tree.update(SimpleNamespace(transforms=links))
    assert "already connects 'base_link' and 'odom'" in frame_fault("base_link", "odom", tree)
    assert "already connects 'map' and 'odom'" in frame_fault("map", "odom", tree)
    assert "/tf_static gives 'camera' the parent 'base_link'. Set base_frame to 'map'" in frame_fault(
        "camera", "vo", tree
    )
    assert not frame_fault("map", "vo", tree) and not frame_fault("camera", "vo")


# From the camera's pose to the base's


def test_the_odometry_frame_begins_at_the_base() -> None:
    """The base drives 0.5 m forward and turns left, twice. The camera is mounted on it."""
    forward = Pose(Rotation.from_euler("z", 0.2).as_matrix(), np.array([0.5, 0.0, 0.0]))
    # The camera's step, from its next frame to the current one, through the base's frames.
    turn = MOUNT.rotation.T @ forward.rotation @ MOUNT.rotation
    moved = MOUNT.rotation.T @ (forward.rotation @ MOUNT.position + forward.position - MOUNT.position)
    step = RelativePose(PoseStatus.OK, turn, moved, 1e-4 * np.eye(6), True, 100, 90, 5.0, None)
    odometry = Odometry()
    found = []
    for number in (1, 2):
        reference, current = (SimpleNamespace(number=n, stamp=n * 10**8) for n in (number, number + 1))
        pair: Any = SimpleNamespace(reference=reference, current=current, reset=number == 1, pose=step)
        pose = odometry.add(pair)
        assert pose is not None
        found.append(of_base(pose, MOUNT))
    np.testing.assert_allclose(found[0].rotation, forward.rotation, atol=1e-9)
    np.testing.assert_allclose(found[0].position, forward.position, atol=1e-9)
    np.testing.assert_allclose(found[1].position, forward.position + forward.rotation @ forward.position, atol=1e-9)
    for each in found:  # the twist is in the base's own axes: 0.5 m and 0.2 rad in 0.1 s
        assert each.twist is not None
        np.testing.assert_allclose(each.twist.velocity[3:], [0, 0, 2.0], atol=1e-9)
        np.testing.assert_allclose(each.twist.velocity[:3], forward.rotation.T @ [5.0, 0, 0], atol=1e-9)


def test_covariance_and_twist_are_transformed_to_the_base() -> None:
    random = np.random.default_rng(1)
    factor, twist_factor = random.normal(size=(2, 6, 6)) * 1e-4
    camera = random_pose(random)
    exact = OdometryPose(*random_pose(random), factor @ factor.T, 3, Twist(random.normal(size=6), np.eye(6), 0.01))
    assert exact.twist is not None
    base = of_base(exact, camera)
    assert base.chain == 3 and base.twist is not None
    errors, twists = [], []
    for _ in range(4000):
        error, noise = factor @ random.normal(size=6), twist_factor @ random.normal(size=6)
        noisy = OdometryPose(
            cv2.Rodrigues(error[3:])[0] @ exact.rotation,
            exact.position + error[:3],
            exact.covariance,
            3,
            Twist(exact.twist.velocity + noise, np.eye(6), 0.01),
        )
        moved = of_base(noisy, camera)
        assert moved.twist is not None
        turned = cv2.Rodrigues(moved.rotation @ base.rotation.T)[0].ravel()
        errors.append(np.concatenate([moved.position - base.position, turned]))
        twists.append(moved.twist.velocity)
    still = Twist(np.zeros(6), twist_factor @ twist_factor.T, 0.01)
    stated = of_base(OdometryPose(exact.rotation, exact.position, exact.covariance, 3, still), camera)
    assert stated.twist is not None
    for samples, covariance in ((errors, base.covariance), (twists, stated.twist.covariance)):
        whitened = np.linalg.inv(np.linalg.cholesky(covariance)) @ np.cov(np.array(samples).T)
        spread = whitened @ np.linalg.inv(np.linalg.cholesky(covariance)).T
        np.testing.assert_allclose(spread, np.eye(6), atol=0.12)


# In the bag command


@pytest.fixture(scope="module")
def robot_bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stereo sequence of two frames, recorded with the robot's /tf_static."""
    folder = tmp_path_factory.mktemp("robot")
    write_demo_bag(folder / "plain", num_frames=2, size=(320, 240), baseline=0.5, encoding="mono8")
    static = new_message("tf2_msgs/msg/TFMessage", transforms=[transform("base_link", "left_optical_frame", MOUNT)])
    with BagWriter(folder / "in", "mcap") as writer:
        records = list(read_messages(folder / "plain"))
        for topic, _, stamp, message in records:
            writer.write(topic, message, stamp)
        writer.write("/tf_static", static, records[-1].stamp)  # after the images: it is used all the same
    return folder / "in"


STEREO = (*QUICK, "--mode", "stereo", "--rectified", "--publish-odometry")


def test_the_bag_command_takes_the_camera_transform_from_the_bag(kpmatch: Any, robot_bag: Path, tmp_path: Path) -> None:
    def odometry(name: str, *words: str) -> tuple[list[Any], list[Any]]:
        status, _, err = kpmatch("bag", str(robot_bag), str(tmp_path / name), *STEREO, *words)
        assert status == 0, err
        found = by_topic(tmp_path / name)
        return [record.message for record in found["/odometry"]], found.get("/tf", [])

    (camera, *_), transforms = odometry("camera")
    assert camera.child_frame_id == "left_optical_frame" and not transforms, "the bag already gives it a parent"
    (base, *_), (first, *_) = odometry("base", "--base-frame", "base_link", "--odom-frame", "map")
    assert (base.header.frame_id, base.child_frame_id) == ("map", "base_link")
    assert first.message.transforms[0].child_frame_id == "base_link"
    rotation = Rotation.from_quat([getattr(camera.pose.pose.orientation, name) for name in "xyzw"]).as_matrix()
    position = np.array([getattr(camera.pose.pose.position, name) for name in "xyz"])
    expected = of_base(OdometryPose(rotation, position, np.eye(6), 0), MOUNT)
    np.testing.assert_allclose([getattr(base.pose.pose.position, name) for name in "xyz"], expected.position, atol=1e-9)
    assert odometry("quiet", "--base-frame", "base_link", "--no-publish-tf")[1] == []


def test_a_base_frame_missing_in_tf_static_is_reported(kpmatch: Any, robot_bag: Path, tmp_path: Path) -> None:
    status, out, err = kpmatch("bag", str(robot_bag), str(tmp_path / "out"), *STEREO, "--base-frame", "base_footprint")
    assert status == 0
    assert "base_frame 1" in out and "/tf_static does not connect base_frame base_footprint" in err
    with Reader(tmp_path / "out") as reader:
        assert not {"/odometry", "/tf"} & {connection.topic for connection in reader.connections if connection.msgcount}


@pytest.mark.parametrize("frame", ["", "left_optical_frame", "/left_optical_frame"])
def test_a_frame_without_a_valid_name_is_reported_and_not_published_to_tf(
    kpmatch: Any, robot_bag: Path, tmp_path: Path, frame: str
) -> None:
    """The images have no frame_id, or the odometry frame's name."""
    with BagWriter(tmp_path / "in", "mcap") as writer:
        for topic, _, stamp, message in read_messages(robot_bag):
            if topic.endswith("image_rect"):
                message.header.frame_id = frame
            writer.write(topic, message, stamp)
    words = (*STEREO, "--odom-frame", "left_optical_frame")
    status, out, err = kpmatch("bag", str(tmp_path / "in"), str(tmp_path / "out"), *words)
    assert status == 0 and "odometry frames 1" in out
    assert ("have the camera's driver set it to the camera's optical frame" if not frame else "in itself") in err
    found = by_topic(tmp_path / "out")
    assert [record.message.child_frame_id for record in found["/odometry"]] == [frame]
    assert not found.get("/tf")


def test_a_frame_with_a_parent_in_tf_is_reported_and_gets_no_second_parent(
    kpmatch: Any, robot_bag: Path, tmp_path: Path
) -> None:
    """A driver connects the camera's optical frame to its body, and base_link is a child of base_footprint."""
    said = {}
    for base in ("", "base_link", "base_footprint"):
        with BagWriter(tmp_path / f"in{base}", "mcap") as writer:
            for topic, _, stamp, message in read_messages(robot_bag):
                writer.write(topic, message, stamp)
            below = new_message("tf2_msgs/msg/TFMessage", transforms=[transform("base_footprint", "base_link", MOUNT)])
            writer.write("/tf_static", below, stamp)
        words = (*STEREO, "--base-frame", base) if base else STEREO
        status, out, err = kpmatch("bag", str(tmp_path / f"in{base}"), str(tmp_path / f"out{base}"), *words)
        assert status == 0 and ("odometry frames 1" in out) == (base != "base_footprint")
        found = by_topic(tmp_path / f"out{base}")
        said[base] = err, len(found["/odometry"]), len(found.get("/tf", []))
    remedy = "Set base_frame to 'base_footprint', or publish_tf to false"
    assert f"/tf_static gives 'left_optical_frame' the parent 'base_link'. {remedy}" in said[""][0]
    assert f"/tf_static gives 'base_link' the parent 'base_footprint'. {remedy}" in said["base_link"][0]
    assert [counts for _, *counts in said.values()] == [[1, 0], [1, 0], [1, 1]]


# In the node


def test_no_odometry_chain_starts_before_the_camera_transform_is_known(robot_bag: Path) -> None:
    parameters = Parameters(
        mode="stereo", rectified=True, publish_odometry=True, base_frame="base_link",
        device="cpu", precision="float32", matcher="nearest", max_keypoints=256,
    )  # fmt: skip
    with Bag(robot_bag) as bag:
        cameras = choose_cameras(bag, "stereo", {})
    found: list[tuple[str, Any]] = []
    pipeline = Pipeline(
        FrontEnd(parameters), [camera.image for camera in cameras], lambda *message: found.append(message),
        lambda topic: False, Report(cameras), new_message,
    )  # fmt: skip

    def play() -> list[str]:
        """Return the frames of the odometry for the bag, after a reset."""
        found.clear()
        pipeline.request_reset()
        for topic, _, _, message in read_messages(robot_bag):
            for side, camera in enumerate(cameras):
                if topic == camera.camera_info:
                    pipeline.add_info(side, message)
                elif topic == camera.image and (received := pipeline.add_image(side, message)) is not None:
                    pipeline.process(received)
        return [message.header.frame_id for topic, message in found if topic == "odometry"]

    assert play() == play() == []
    pipeline.transforms.update(SimpleNamespace(transforms=[transform("base_link", "left_optical_frame", MOUNT)]))
    assert play() == ["odom"] and play() == ["odom_1"]


def test_the_node_takes_the_camera_transform_from_tf_static(
    tf2_environment: dict[str, str], robot_bag: Path, tmp_path: Path
) -> None:
    robot = Path(__file__).with_name("base_frame_robot.py")
    done = subprocess.run(
        [sys.executable, robot, robot_bag, tmp_path], env=tf2_environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (
        "/tf_static does not connect base_frame base_link and the camera's frame 'left_optical_frame'" in found["said"]
    )
    remedy = "change the publisher, or this node's parameter qos_overrides./tf_static.subscription.durability"
    assert f"its messages do not arrive; {remedy}" in found["volatility"]
    assert found["before"] == 0
    assert found["tf"] == found["frames"] and found["frames"][1] == "base_link"
    assert np.isfinite(found["position"]).all()


@pytest.mark.skipif(find_spec("tf2_msgs") is not None, reason="this ROS has tf2_msgs")
def test_without_tf2_msgs_the_node_warns_once_that_tf_is_not_published(tmp_path: Path) -> None:
    with running_node(tmp_path, profile="fast", mode="stereo", publish_odometry=True, matcher="nearest") as node:
        node.wait_for(lambda: node.node.count_publishers("odometry"), "the topic")
        assert node.stop() == 0
        assert node.log.count("odometry is published, but not to TF: tf2_msgs is not installed") == 1


@pytest.mark.skipif(find_spec("tf2_msgs") is not None, reason="this ROS has tf2_msgs")
def test_without_tf2_msgs_a_base_frame_is_refused(tmp_path: Path) -> None:
    parameters = {"mode": "stereo", "publish_odometry": True, "base_frame": "base_link", "matcher": "nearest"}
    with running_node(tmp_path, **parameters) as node:
        assert node.process.wait(timeout=60) == 1
        assert "base_frame is 'base_link', which needs /tf_static, but tf2_msgs is not installed" in node.log
        assert "Traceback" not in node.log
