"""Tests that replay bags through the node over DDS: counts, stamps, tracks, repeatability, and errors of poses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags import GROUND_TRUTH
from kpmatch_ros.msg import MatchArray, RelativePose
from node_harness import NodeUnderTest, running_node
from simulation.bags import write_demo_bag


def replay(node: NodeUnderTest, bag: Path, image_topic: str, info_topic: str, most: int | None = None) -> int:
    """Publish at most ``most`` of a bag's images, and the calibrations, as recorded. Returns the number of images."""
    frames = 0
    with AnyReader([bag]) as reader:
        connections = [c for c in reader.connections if c.topic in (image_topic, info_topic)]
        for connection, _, raw in reader.messages(connections=connections):
            is_image = connection.topic == image_topic
            if is_image and frames == most:
                break
            (node.images if is_image else node.infos).publish(bytes(raw))
            frames += is_image
            node.spin(0.01)
    return frames


def run(
    tmp_path: Path, bag: Path, image_topic: str, info_topic: str, most: int | None = None, **parameters: Any
) -> NodeUnderTest:
    """Replay all frames or the first ones, and return the node with its messages. It has ended by then."""
    with running_node(tmp_path, **parameters) as node:
        node.wait_until_connected()
        frames = replay(node, bag, image_topic, info_topic, most)
        node.wait_for(lambda: len(node.poses) == len(node.matches) == frames - 1, "every pair", timeout=180)
        figures = node.wait_for_figure("frames processed", str(frames))
        assert figures["frames dropped"] == figures["frames rejected"] == "0"
        assert len(node.poses) == len(node.matches) == frames - 1
        assert node.stop() == 0
        return node


def stamp(header: Any) -> int:
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def rotation_of(pose: RelativePose) -> Rotation:
    q = pose.pose.pose.orientation
    return Rotation.from_quat([q.x, q.y, q.z, q.w])


def check_messages(node: NodeUnderTest) -> None:
    """Check the properties of every message of any bag."""
    before: MatchArray | None = None
    for matches, pose in zip(node.matches, node.poses):
        count = len(matches.scores)
        assert matches.header == pose.header and matches.reference == pose.reference
        assert len(matches.points) == len(matches.reference_points) == 2 * count
        assert len(matches.indices) == len(matches.reference_indices) == len(matches.track_ids) == count
        assert len(matches.inliers) in (0, count)
        assert len(matches.sigmas) == len(set(matches.track_ids)) == count
        assert all(0 < sigma <= 5 for sigma in matches.sigmas)
        indices = [i for i in matches.indices if i != MatchArray.NOT_DETECTED]
        reference_indices = [i for i in matches.reference_indices if i != MatchArray.NOT_DETECTED]
        assert len(set(indices)) == len(indices) and len(set(reference_indices)) == len(reference_indices)
        assert all(0 <= score <= 1 for score in matches.scores)
        assert max(indices, default=0) < max(matches.num_keypoints, 1)
        position = pose.pose.pose.position
        numbers = [position.x, position.y, position.z, *pose.pose.covariance, pose.median_parallax]
        assert np.isfinite(numbers).all() and np.isfinite(rotation_of(pose).as_quat()).all()
        length = np.linalg.norm([position.x, position.y, position.z])
        assert length == pytest.approx(1.0 if pose.status == RelativePose.OK else 0.0, abs=1e-9)
        if before is not None:
            assert stamp(matches.reference) == stamp(before.header), "each frame is matched with the one before"
            agrees = before.inliers or [1] * len(before.indices)  # a match that contradicts the motion ends its track
            known = {i: track for i, track, holds in zip(before.indices, before.track_ids, agrees) if holds}
            known.pop(MatchArray.NOT_DETECTED, None)
            continued = [known[i] for i in reference_indices if i in known]
            assert set(continued) <= set(matches.track_ids), "a keypoint matched again keeps its track"
            x0 = dict(zip(before.track_ids, before.points[::2]))
            x1 = dict(zip(matches.track_ids, matches.reference_points[::2]))
            assert all(x0[i] == x1[i] for i in x0.keys() & x1.keys()), "a track goes on where it was"
        before = matches


@pytest.fixture(scope="module")
def demo_bag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    bag = tmp_path_factory.mktemp("bag") / "demo"
    write_demo_bag(bag, num_frames=8)
    yield bag


def truth(bag: Path) -> dict[int, tuple[Rotation, np.ndarray]]:
    """Return the pose of the camera in the world, by stamp."""
    poses = {}
    with AnyReader([bag]) as reader:
        connections = [c for c in reader.connections if c.topic == GROUND_TRUTH]
        for connection, _, raw in reader.messages(connections=connections):
            message = reader.deserialize(raw, connection.msgtype)
            q, p = message.pose.orientation, message.pose.position
            poses[stamp(message.header)] = (Rotation.from_quat([q.x, q.y, q.z, q.w]), np.array([p.x, p.y, p.z]))
    return poses


def test_poses_of_a_camera_walk_agree_with_the_truth(tmp_path: Path, demo_bag: Path) -> None:
    node = run(tmp_path, demo_bag, "/camera/image_raw", "/camera/camera_info")
    check_messages(node)
    world = truth(demo_bag)
    rotation_errors, direction_errors = [], []
    for pose in node.poses:
        assert pose.status == RelativePose.OK
        assert not pose.metric and pose.num_inliers > 100 and pose.median_parallax > 1
        (r0, p0), (r1, p1) = world[stamp(pose.reference)], world[stamp(pose.header)]
        rotation_errors.append(np.degrees((rotation_of(pose).inv() * (r0.inv() * r1)).magnitude()))
        direction = r0.inv().apply(p1 - p0)
        position = pose.pose.pose.position
        cosine = np.dot([position.x, position.y, position.z], direction) / np.linalg.norm(direction)
        direction_errors.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    assert np.median(rotation_errors) < 0.02, rotation_errors
    assert np.median(direction_errors) < 0.5, direction_errors


def test_onnxruntime_gives_the_matches_of_pytorch_in_a_replay(tmp_path: Path, demo_bag: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    runs = []
    options: dict[str, Any] = {"precision": "float32", "depth_confidence": -1.0, "width_confidence": -1.0}
    for backend in ("torch", "onnxruntime"):
        (tmp_path / backend).mkdir()
        node = run(
            tmp_path / backend,
            demo_bag,
            "/camera/image_raw",
            "/camera/camera_info",
            backend=backend,
            providers="tensorrt,cpu",
            device="cpu",
            refine=False,
            resize=320,
            max_keypoints=256,
            **options,
        )
        check_messages(node)
        rows = [
            (i, *np.float32([*m.reference_points[2 * k : 2 * k + 2], *m.points[2 * k : 2 * k + 2]]).round(2).tolist())
            for i, m in enumerate(node.matches)
            for k in range(len(m.scores))
        ]
        runs.append(set(rows))
    assert "tensorrt (not built in); it runs on cpu" in node.figures()["onnxruntime"]
    assert "tensorrt (not built in); it runs on cpu" in node.log
    assert len(runs[0]) > 500
    assert len(runs[0] & runs[1]) >= 0.99 * len(runs[0] | runs[1])


def test_a_replay_of_every_frame_gives_the_same_messages_every_time(tmp_path: Path, demo_bag: Path) -> None:
    def content(node: NodeUnderTest) -> list[str]:
        for matches in node.matches:
            matches.extract_ms = matches.match_ms = 0.0  # only the measured times differ
        return [repr(message) for message in [*node.matches, *node.poses]]

    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        # Without forking, because forked nodes would have the same random numbers.
        topics = ("/camera/image_raw", "/camera/camera_info")
        node = run(tmp_path / name, demo_bag, *topics, 4, fork=False, max_keypoints=512)
        runs.append(content(node))
    assert runs[0] == runs[1]


def test_a_keyframe_stays_the_reference_while_it_is_seen_well(tmp_path: Path, demo_bag: Path) -> None:
    node = run(
        tmp_path,
        demo_bag,
        "/camera/image_raw",
        "/camera/camera_info",
        reference="keyframe",
        keyframe_max_parallax=30.0,
        max_keypoints=512,
    )
    references = [stamp(matches.reference) for matches in node.matches]
    currents = [stamp(matches.header) for matches in node.matches]
    assert len(set(references)) < len(references), "a keyframe serves several frames"
    assert references == sorted(references) and all(r < c for r, c in zip(references, currents))
    by_reference = zip(references, references[1:], node.matches, node.matches[1:])
    for reference, following, matches, next_matches in by_reference:
        if reference == following:
            first = dict(zip(matches.reference_indices, matches.track_ids))
            second = dict(zip(next_matches.reference_indices, next_matches.track_ids))
            shared = first.keys() & second.keys() - {MatchArray.NOT_DETECTED}
            assert len(shared) > 20 and all(first[i] == second[i] for i in shared)


def test_a_handheld_camera_at_one_frame_a_second_gives_a_message_for_every_pair(
    tmp_path: Path, recorded_data: Path
) -> None:
    bag = recorded_data / "tum_fr3_office_1hz"
    node = run(tmp_path, bag, "/camera/image_raw", "/camera/camera_info")
    check_messages(node)
    assert len(node.matches) == len(node.poses) == 16
    assert sum(pose.status == RelativePose.OK for pose in node.poses) >= 13


def test_a_standing_camera_gets_poses_with_almost_no_rotation(tmp_path: Path, recorded_data: Path) -> None:
    bag = recorded_data / "euroc_v101_still_stereo"
    node = run(tmp_path, bag, "/cam0/image_raw", "/cam0/camera_info", 6)
    check_messages(node)
    assert len(node.matches) == len(node.poses) == 5
    for pose in node.poses:
        assert pose.status in (RelativePose.OK, RelativePose.NO_TRANSLATION)
        assert np.degrees(rotation_of(pose).magnitude()) < 0.2
