"""Tests what a robot does to a node in days, within a minute: cycles, signals, kills, and changes under load."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image

from node_harness import NodeUnderTest, running_node, stamp_of

WIDTH, HEIGHT = 128, 96
KILLS = 8  # at random moments


@pytest.fixture
def frames(texture: Any) -> list[Image]:
    """Images of a camera that moves past a wall by 8 pixels per frame."""
    picture = texture(HEIGHT, WIDTH + 8 * 20, 3)
    views = [np.ascontiguousarray(picture[:, 8 * i : 8 * i + WIDTH]) for i in range(20)]
    return [Image(encoding="mono8", width=WIDTH, height=HEIGHT, step=WIDTH, data=view.tobytes()) for view in views]


def stamped(message: Image, seconds: float) -> Image:
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(seconds * 1e9), 1_000_000_000)
    return message


def change_state(node: NodeUnderTest, transition: int) -> None:
    request = ChangeState.Request(transition=Transition(id=transition))
    assert node.call(ChangeState, "matcher/change_state", request).success, node.log


class Resources:
    """The resources that a process holds at present."""

    def __init__(self, process: int) -> None:
        holder = psutil.Process(process)
        # Library pages do not count, because they are read on demand and released when memory is short. psutil cannot
        # distinguish them from shared memory, which does count.
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        self.memory = 1024 * sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem"))
        self.threads = holder.num_threads()
        self.files = holder.num_fds()


@pytest.mark.timeout(600)
def test_two_hundred_lifecycle_cycles_leak_no_resources(
    tmp_path: Path, random_folder: Callable[..., Path], frames: list[Image]
) -> None:
    folder = str(random_folder())
    cycle = (
        Transition.TRANSITION_CONFIGURE,
        Transition.TRANSITION_ACTIVATE,
        Transition.TRANSITION_DEACTIVATE,
        Transition.TRANSITION_CLEANUP,
    )
    # With resize, the images for the warm-up are as small as the camera's.
    network = {"extractor": folder, "matcher": folder, "max_keypoints": 60, "resize": WIDTH}
    with running_node(tmp_path, calibrated=False, autostart=False, **network) as node:
        held = []
        for number in range(200):
            node.wait_until_gone()
            for transition in cycle:
                change_state(node, transition)
                if transition == Transition.TRANSITION_ACTIVATE and number % 20 == 0:
                    node.matches.clear()
                    node.wait_until_connected()
                    for i in range(3):
                        node.send(stamped(frames[i], 10.0 * number + 0.1 * i))
                    node.wait_for(lambda: len(node.matches) == 2, "two pairs")
            held.append(Resources(node.process.pid))
        assert (held[-1].threads, held[-1].files) == (held[60].threads, held[60].files)
        # Memory cached by the allocator varies by 20 MB from cycle to cycle. The minimum of many cycles reveals a leak.
        early, late = (min(each.memory for each in some) for some in (held[60:100], held[160:]))
        assert late - early < 10e6
        node.wait_for(lambda: node.node.count_publishers("matches") == 0, "the topics to go")
        assert node.node.count_subscribers("image") == 0
        assert node.stop() == 0


def test_an_inactive_node_releases_the_memory_of_frames(tmp_path: Path, texture: Any) -> None:
    picture = Image(encoding="mono8", width=640, height=480, step=640, data=texture(480, 640, 2).tobytes())
    with running_node(tmp_path, calibrated=False) as node:
        node.wait_until_connected()
        before = Resources(node.process.pid).memory
        for i in range(3):
            node.send(stamped(picture, 1.0 + 0.1 * i))
        node.wait_for(lambda: len(node.matches) == 2, "two pairs")
        change_state(node, Transition.TRANSITION_DEACTIVATE)
        # Frames take about 40 MB in addition to the memory before the first frame. This is not compared with the memory
        # of the active node, because an active node also returns memory from time to time.
        assert Resources(node.process.pid).memory < before
        node.wait_until_gone()
        change_state(node, Transition.TRANSITION_ACTIVATE)
        node.wait_until_connected()
        for i in range(2):
            node.send(stamped(picture, 2.0 + 0.1 * i))
        node.wait_for(lambda: len(node.matches) == 3, "another pair")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_node_ends_cleanly_in_the_middle_of_inference(tmp_path: Path, sent: signal.Signals, texture: Any) -> None:
    # Large enough for several seconds of processing: the end must not wait for it.
    pixels = texture(1440, 1920, 1)
    large = Image(encoding="mono8", width=1920, height=1440, step=1920, data=pixels.tobytes())
    with running_node(tmp_path, calibrated=False, max_keypoints=4096) as node:
        node.wait_until_connected()
        node.send(stamped(large, 1.0))
        node.wait_for_figure("frames received", "1")
        node.process.send_signal(sent)
        started = time.monotonic()
        assert node.process.wait(timeout=30) == 0, node.log
        assert time.monotonic() - started < 2 + 3  # 2 s of its own, and 3 s for a busy machine
        assert "Traceback" not in node.log and "terminate" not in node.log


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_two_interrupts_while_the_weights_load_end_the_node_cleanly(tmp_path: Path, delay: float) -> None:
    with running_node(tmp_path, calibrated=False, max_keypoints=4096) as node:
        node.wait_for(node.is_discovered, "the node to be there")
        time.sleep(delay)
        for _ in range(2):
            node.process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert node.process.wait(timeout=30) in (0, 130), node.log
        assert "terminate" not in node.log and "Aborted" not in node.log


@pytest.mark.timeout(600)
def test_subscribers_receive_matches_again_after_the_node_was_killed_and_restarted(
    tmp_path: Path, random_folder: Callable[..., Path], frames: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Over UDP, because Fast DDS's shared memory does not survive every kill (docs/diagnostics.md). With LOCALHOST,
    # rmw_fastrtps uses shared memory regardless of the environment variable.
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")
    monkeypatch.setenv("ROS_STATIC_PEERS", "127.0.0.1")  # for machines on which multicast does not work
    folder = str(random_folder())
    random = np.random.default_rng(5)
    # With resize, the images for the warm-up are as small as the camera's.
    network = {"extractor": folder, "matcher": folder, "max_keypoints": 60, "resize": WIDTH}
    with running_node(tmp_path, calibrated=False, discovery_range="SUBNET", queue="latest", **network) as node:
        seconds = 0.0
        for restart in range(KILLS + 1):
            # Late matches of the killed node may still arrive. They have older stamps than the images sent from now on.
            since = seconds

            def frame_is_matched(since: float = since) -> bool:
                nonlocal seconds
                seconds += 0.05
                node.send(stamped(frames[int(seconds * 20) % len(frames)], seconds))
                node.spin(0.03)
                return any(stamp_of(match.header) > since + 0.01 for match in node.matches)

            node.wait_for(frame_is_matched, f"matches after restart {restart}")
            end = time.monotonic() + 0.5 * random.random()
            while time.monotonic() < end:
                frame_is_matched()
            if restart < KILLS:
                node.restart(signal.SIGKILL)
        assert node.stop() == 0


def test_random_parameter_changes_under_load_are_atomic(
    tmp_path: Path, random_folder: Callable[..., Path], frames: list[Image]
) -> None:
    folder = str(random_folder())
    random = np.random.default_rng(11)
    # Values of each parameter, with the valid ones first, and the number of valid ones.
    values: dict[str, tuple[list[Any], int]] = {
        "max_keypoints": ([20, 60, 100, 0, -3, 99999], 3),
        "keypoint_threshold": ([-1.0, 0.0, 0.2, 1.5, float("nan")], 3),
        "filter_threshold": ([0.0, 0.1, 0.3, -0.2, 7.0], 3),
        "depth_confidence": ([-1.0, 0.5, 0.95, 2.0], 3),
        "width_confidence": ([-1.0, 0.8, 0.99, -7.0], 3),
        "reference": (["previous", "keyframe", "next", ""], 2),
        "keyframe_min_matches": ([1, 50, 0], 2),
        "max_reprojection_error": ([0.5, 3.0, 0.0], 2),
        "nms_radius": ([3], 0),  # cannot change at run time
        "min_inliers": ([6, 15, "many"], 2),
    }
    with running_node(tmp_path, calibrated=False, extractor=folder, matcher=folder) as node:
        node.wait_until_connected()
        limits, number = [1024], 0
        for _ in range(150):
            node.send(stamped(frames[number % len(frames)], 1 + 0.1 * number))
            number += 1
            request, good, limit = SetParametersAtomically.Request(), True, limits[-1]
            for name in random.choice(list(values), random.integers(1, 4), replace=False):
                choices, good_ones = values[name]
                index = int(random.integers(0, len(choices)))
                good &= index < good_ones
                limit = choices[index] if name == "max_keypoints" else limit
                request.parameters.append(Parameter(str(name), value=choices[index]).to_parameter_msg())
            result = node.call(SetParametersAtomically, "matcher/set_parameters_atomically", request).result
            assert result.successful == good, (request.parameters, result.reason)
            assert good or result.reason
            limits.append(limit if good else limits[-1])
        node.wait_for_figure("frames waiting", "0")
        node.wait_for(lambda: len(node.matches) == number - 1, "every pair")
        # A refused set changes nothing, so no frame has a number of keypoints that was not accepted.
        for matches in node.matches:
            assert matches.num_keypoints <= max(limits)
        node.send(stamped(frames[0], 500.0))
        node.send(stamped(frames[1], 500.1))
        node.wait_for(lambda: len(node.matches) > number - 1, "the last pair")
        assert node.matches[-1].num_keypoints <= limits[-1]
        assert "Traceback" not in node.log
        assert node.stop() == 0
