"""Tests of the node's service match_features: Python and C++ clients, bad requests, and continuous frames."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.serialization import deserialize_message, serialize_message
from test_node import FAST, HEIGHT, WIDTH, calibration, change_state, image, textured

from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from kpmatch_ros.ros.inbox import Inbox, Remaining
from kpmatch_ros.srv import MatchFeatures
from node_harness import NodeUnderTest, running_node

# Frames and requests alternate


def taken(inbox: Inbox[str, int], count: int) -> list[str | int | None]:
    return [inbox.take() for _ in range(count)]


def test_no_more_than_one_request_comes_between_two_frames() -> None:
    inbox: Inbox[str, int] = Inbox(latest=False, memory=100)
    for number in range(4):
        assert inbox.ask(number) and inbox.put(f"frame {number}", 1) == 0
    assert taken(inbox, 8) == [0, "frame 0", 1, "frame 1", 2, "frame 2", 3, "frame 3"]


def test_under_overload_a_request_waits_for_one_frame_at_most() -> None:
    inbox: Inbox[str, int] = Inbox(latest=True, memory=100)
    for number in range(3):
        inbox.put(f"frame {2 * number}", 1)
        assert inbox.take() == f"frame {2 * number}"
        inbox.put("overtaken", 1)
        assert inbox.put(f"frame {2 * number + 1}", 1) == 1
        inbox.ask(number)  # while frames keep arriving
        assert taken(inbox, 2) == [number, f"frame {2 * number + 1}"]


def test_requests_without_frames_are_answered_in_order_and_at_most_16_wait() -> None:
    inbox: Inbox[str, int] = Inbox(latest=True, memory=100)
    accepted = [inbox.ask(number) for number in range(20)]
    assert accepted == [True] * 16 + [False] * 4
    assert taken(inbox, 3) == [0, 1, 2]
    assert inbox.close() == Remaining(0, list(range(3, 16))) and not inbox.ask(20) and inbox.take() is None


def test_with_queue_all_the_oldest_frames_are_dropped_above_a_memory_limit() -> None:
    inbox: Inbox[str, int] = Inbox(latest=False, memory=100)
    sizes = (40, 60, 1, 50, 500, 100)
    assert [inbox.put(f"frame {number}", size) for number, size in enumerate(sizes)] == [0, 0, 1, 1, 2, 1]
    assert taken(inbox, 1) == ["frame 5"] and inbox.put("frame 6", 100) == 0
    assert taken(inbox, 1) == ["frame 6"] and inbox.close() == Remaining(0, [])
    assert inbox.put("too late", 1) == 1


def test_the_inbox_counts_the_frames_dropped_since_the_previous_one_taken() -> None:
    inbox: Inbox[str, int] = Inbox(latest=True, memory=100)
    for count in (0, 3, 1, 0):
        for number in range(count + 1):
            inbox.put(f"frame {number}", 1)
        inbox.ask(0)
        assert set(taken(inbox, 2)) == {0, f"frame {count}"} and inbox.overtaken == count


@pytest.mark.parametrize("latest", [False, True])
def test_an_item_put_last_waits_for_the_frames_before_it_and_displaces_none(latest: bool) -> None:
    inbox: Inbox[str, int] = Inbox(latest=latest, memory=100)
    inbox.put("frame 0", 100)
    inbox.put_last("silent for 1 s")
    inbox.ask(0)
    inbox.put_last("silent for 2 s")
    inbox.ask(1)
    assert taken(inbox, 4) == [0, "frame 0", 1, "silent for 2 s"]
    inbox.put_last("silent for 3 s")
    assert taken(inbox, 1) == ["silent for 3 s"], "it needs no frame to be taken"


def test_an_item_put_last_is_discarded_if_a_frame_arrives_first_or_the_inbox_closes() -> None:
    inbox: Inbox[str, int] = Inbox(latest=False, memory=100)
    inbox.put_last("silent")
    inbox.put("frame 0", 1)
    inbox.ask(0)
    assert taken(inbox, 2) == [0, "frame 0"]
    assert inbox.ask(1) and inbox.ask(2)
    assert taken(inbox, 2) == [1, 2], "nothing comes between two requests"
    inbox.put_last("silent again")
    assert inbox.close() == Remaining(0, []), "no frame is lost with it"
    inbox.put_last("too late")
    assert inbox.take() is None


# The node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeUnderTest]:
    reliable = {"qos_overrides./image.subscription.reliability": "reliable"}  # with best effort, a frame may be lost
    with running_node(tmp_path_factory.mktemp("node"), queue="latest", **FAST, **reliable) as started:
        yield started


@pytest.fixture(scope="module")
def features(node: NodeUnderTest) -> list[FeatureArray]:
    """Return the features of two frames."""
    node.subscribe(FeatureArray, "features", node.features.append)
    node.wait_until_connected()
    node.wait_for(lambda: node.node.count_subscribers("features"), "the subscription")
    for number in range(2):
        node.send(image(textured(6 * number), 100.0 + number), calibration(100.0 + number))
        node.wait_for(lambda: len(node.features) == number + 1, "a frame's features")  # noqa: B023
    node.wait_for(lambda: node.matches, "the matches")
    return node.features[:2]


def request_for(features: list[FeatureArray], focal: float = 300.0) -> MatchFeatures.Request:
    infos = [calibration(0.0, focal), calibration(0.0, focal)]
    return MatchFeatures.Request(
        reference_features=features[0],
        features=features[1],
        reference_camera_info=infos[0],
        camera_info=infos[1],
    )


def ask(node: NodeUnderTest, request: MatchFeatures.Request) -> MatchFeatures.Response:
    response: MatchFeatures.Response = node.call(MatchFeatures, "match_features", request)
    return response


def test_a_python_client_gets_the_matches_of_two_frames(node: NodeUnderTest, features: list[FeatureArray]) -> None:
    response = ask(node, request_for(features))
    assert (response.success, response.message) == (True, "")
    matches, published = response.matches, node.matches[0]
    assert (matches.header, matches.reference) == (features[1].header, features[0].header)
    assert (matches.pairing, len(matches.track_ids), matches.reset) == (MatchArray.REQUESTED, 0, False)
    pairs = [set(zip(m.reference_indices, m.indices)) for m in (matches, published)]
    assert len(pairs[0]) > 50 and len(pairs[0] & pairs[1]) > 0.9 * len(pairs[0])
    moved = np.reshape(matches.points, (-1, 2)) - np.reshape(matches.reference_points, (-1, 2))
    assert np.median(moved, axis=0) == pytest.approx([-6, 0], abs=0.3)
    assert response.relative_pose.num_matches == len(matches.scores) == len(matches.inliers)
    assert ask(node, request_for(features, 0.0)).relative_pose.status == RelativePose.NO_CALIBRATION


def test_a_cpp_client_gets_the_same_answer_as_a_python_client(
    node: NodeUnderTest,
    features: list[FeatureArray],
    cpp_programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", str(node.node.context.get_domain_id()))
    files = [tmp_path / "reference.cdr", tmp_path / "current.cdr", tmp_path / "matches.cdr"]
    for file, message in zip(files, features):
        file.write_bytes(serialize_message(message))

    def run(*words: Any) -> tuple[int, str, str]:
        command = [cpp_programs / "match_features", f"{node.namespace}/match_features", *files, *words]
        client = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        node.wait_for(lambda: client.poll() is not None, "the client to end")
        out, err = client.communicate()
        return client.returncode, out, err

    status, out, err = run(300, WIDTH / 2, HEIGHT / 2)
    assert (status, err) == (0, "")
    expected = ask(node, request_for(features))
    matches = deserialize_message(files[2].read_bytes(), MatchArray)
    matches.match_ms = expected.matches.match_ms
    assert matches == expected.matches
    printed = dict(line.split(" ", 1) for line in out.splitlines())
    pose = expected.relative_pose
    assert [int(printed[name]) for name in ("status", "num_matches", "num_inliers")] == [
        pose.status, pose.num_matches, pose.num_inliers
    ]  # fmt: skip
    t = pose.pose.pose.position
    assert [float(value) for value in printed["translation"].split()] == pytest.approx([t.x, t.y, t.z], abs=1e-5)
    read = subprocess.run(
        [str(cpp_programs / "read_message"), "MatchArray"], input=files[2].read_bytes(), capture_output=True
    )
    assert (read.returncode, read.stderr) == (0, b"")  # the message keeps the contract

    broken = FeatureArray(extractor=features[1].extractor, width=WIDTH, height=HEIGHT, descriptor_size=128)
    files[1].write_bytes(serialize_message(broken))
    assert run() == (1, "", "features: there are no features; choose an image that has some\n")


def test_invalid_requests_are_refused_and_the_node_goes_on(node: NodeUnderTest, features: list[FeatureArray]) -> None:
    random = np.random.default_rng(0)
    node.wait_for_news()
    before, refused = answers(node), 0
    for number in range(40):
        request = request_for([deserialize_message(serialize_message(message), FeatureArray) for message in features])
        side = (request.features, request.reference_features)[number % 2]
        kind = number % 10
        if kind == 0:
            side.points[int(random.integers(len(side.points)))] = float(random.choice([np.nan, np.inf, -1.0, 1e30]))
        elif kind == 1:
            side.descriptors = side.descriptors[: int(random.integers(len(side.descriptors)))]
        elif kind == 2:
            side.descriptor_size = int(random.choice([0, 1, 64, 256, 2**32 - 1]))
        elif kind == 3:
            side.extractor = str(random.choice(["disk", "", "\x01", "é" * 1000]))
        elif kind == 4:
            side.scores = side.scores[:-1]
        elif kind == 5:
            side.width, side.height = (int(value) for value in random.choice([0, 1, 2**32 - 1], 2))
        elif kind == 6:
            request.camera_info.k = random.normal(size=9) * 10.0 ** random.integers(-300, 300)
        elif kind == 7:
            request.camera_info.d = [float(value) for value in random.normal(size=random.integers(0, 20)) * 1e3]
        elif kind == 8:
            side.descriptors[0] = float(random.choice([np.nan, 1e38]))
        else:
            request = MatchFeatures.Request()
        response = ask(node, request)
        refused += not response.success
        assert bool(response.message) != response.success
        assert response.success or response.relative_pose.status == RelativePose.FAILED
    assert refused >= 36
    assert ask(node, request_for(features)).success
    node.wait_for(lambda: sum(answers(node)) == sum(before) + 41, "all to be counted")
    assert answers(node) == (before[0] + 41 - refused, before[1] + refused) and node.process.poll() is None


def answers(node: NodeUnderTest) -> tuple[int, int]:
    """Return how many requests the node reports as answered and as refused."""
    figures = node.figures()
    return int(figures.get("match_features answered", 0)), int(figures.get("match_features refused", 0))


def test_under_overload_a_call_is_answered_within_two_frames(node: NodeUnderTest, features: list[FeatureArray]) -> None:
    client = node.node.create_client(MatchFeatures, "match_features")
    node.wait_for(client.service_is_ready, "the service")
    passed = []
    second = 200.0
    for _ in range(5):
        before = len(node.matches)
        node.wait_for(lambda: flood(node, second) and len(node.matches) > before, "frames")  # noqa: B023
        before, answer = len(node.matches), client.call_async(request_for(features))
        end = answer.done
        while not end():
            second += 0.01
            flood(node, second)
        assert answer.result().success
        passed.append(len(node.matches) - before)
        second += 0.01
    node.wait_for(lambda: int(node.figures()["frames dropped"]) > 0, "frames that were overtaken")
    assert max(passed) <= 2, passed


def flood(node: NodeUnderTest, second: float) -> bool:
    """Send more frames than the node can process."""
    node.images.publish(image(textured(0), second))
    node.spin(0.005)
    return True


def test_an_inactive_node_refuses_requests_with_the_reason(node: NodeUnderTest, features: list[FeatureArray]) -> None:
    assert change_state(node, "deactivate")
    response = ask(node, request_for(features))
    assert (response.success, response.message) == (
        False,
        "the node is inactive: activate the node to have it process images",
    )
    assert change_state(node, "activate")
    assert ask(node, request_for(features)).success
    assert node.stop() == 0
