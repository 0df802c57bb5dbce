"""Tests that the real node reports or tolerates nodes that are started, remapped or mixed wrongly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import rclpy
from lifecycle_msgs.srv import ChangeState
from sensor_msgs.msg import CameraInfo, Image

from kpmatch_ros.msg import MatchArray
from kpmatch_ros.parameters import ParameterError, Parameters
from kpmatch_ros.ros.outputs import output_names
from kpmatch_ros.ros.topic_names import check_topics
from node_harness import SMALL, running_node

WIDTH, HEIGHT = 64, 48


def image(seconds: float, frame: str = "camera") -> Image:
    message = Image(encoding="mono8", width=WIDTH, height=HEIGHT, step=WIDTH, data=bytes(WIDTH * HEIGHT))
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(seconds * 1e9), 10**9)
    message.header.frame_id = frame
    return message


@pytest.mark.parametrize("arguments", [("camera_info:=image", "camera_info"), ("matches:=image", "matches")])
def test_topics_remapped_onto_one_another_are_reported(tmp_path: Path, arguments: tuple[str, str]) -> None:
    remapping, name = arguments
    with running_node(tmp_path, ("-r", remapping), autostart=False, **SMALL) as node:
        node.wait_for(node.is_discovered, "the node")
        request = ChangeState.Request()
        request.transition.label = "configure"
        assert not node.call(ChangeState, "matcher/change_state", request).success
        said = f"image and {name} are both the topic {node.namespace}/image"
        node.wait_for(lambda: said in node.message(), "the topic to be named")
        assert said in node.log and "Traceback" not in node.log


def test_cameras_that_are_swapped_by_remapping_stay_swapped(tmp_path: Path) -> None:
    swapped = ("-r", "left/image:=right/image", "-r", "right/image:=left/image")
    with running_node(tmp_path, swapped, mode="stereo", **SMALL) as node:
        left = node.node.create_publisher(Image, "left/image", 10)
        node.wait_for(left.get_subscription_count, "the node to subscribe")
        node.wait_until_known()
        number = 0

        def silent_camera_is_named() -> bool:
            nonlocal number
            number += 1
            left.publish(image(100 + 0.1 * number))
            said = rf"no image on {node.namespace}/right/image for [0-9.]+ s, \d+ images of the other camera"
            return re.search(said, node.message()) is not None

        node.wait_for(silent_camera_is_named, "the silent camera to be named")


def test_two_cameras_may_share_a_mask_topic_but_not_an_image_topic() -> None:
    def resolve(name: str) -> str:
        return {"left/mask": "/mask", "right/mask": "/mask", "right/image": "/left/image"}.get(name, f"/{name}")

    check_topics({"left/mask": "mask", "right/mask": "mask"}, resolve)
    with pytest.raises(ParameterError, match="left/image and right/image are both the topic /left/image"):
        check_topics({"left/image": "left/image", "right/image": "right/image"}, resolve)
    check_topics(output_names(Parameters(mode="stereo", publish_odometry=True)), resolve)


@pytest.mark.parametrize(
    ("override", "transition", "topic"),
    [("image.subscription.reliability", "activate", "image"), ("matches.publisher.depth", "configure", "matches")],
)
def test_an_invalid_quality_of_service_override_is_reported(
    tmp_path: Path, override: str, transition: str, topic: str
) -> None:
    overrides = {f"qos_overrides./{override}": "relyable"}
    with running_node(tmp_path, autostart=False, **SMALL, **overrides) as node:
        node.wait_for(node.is_discovered, "the node")
        for label in ("configure", "activate")[: 2 if transition == "activate" else 1]:
            request = ChangeState.Request()
            request.transition.label = label
            assert node.call(ChangeState, "matcher/change_state", request).success == (label != transition)
        said = f"qos_overrides of {topic}: "
        node.wait_for(lambda: said in node.message(), "the override to be named")
        assert "best_effort" in node.message() and "Traceback" not in node.log


def test_a_parameter_without_effect_is_logged_once_when_the_node_is_configured(tmp_path: Path) -> None:
    with running_node(tmp_path, mode="stereo", base_frame="base_link", **SMALL) as node:
        node.wait_for(lambda: "active: waiting" in node.log, "the node to be active")
        said = "base_frame is 'base_link' and has no effect: it needs publish_odometry True, which is False"
        assert said in node.log and node.log.count("has no effect: it needs") == 1


def test_another_node_on_the_same_topics_is_reported(tmp_path: Path) -> None:
    with running_node(tmp_path, **SMALL) as node:
        node.wait_until_connected()
        node.wait_for_news()
        assert "another node" not in node.message()
        ns = node.namespace
        other = node.node.create_publisher(MatchArray, "matches", 10)
        said = f"another node publishes on {ns}/matches too ({ns}/peer)"
        node.wait_for(lambda: said in node.message(), "the other node to be named")
        node.node.destroy_publisher(other)
        node.wait_for(lambda: "another node" not in node.message(), "its end to be noticed")


def test_two_publishers_of_calibrations_are_reported(tmp_path: Path) -> None:
    with running_node(tmp_path, **SMALL) as node:
        node.wait_until_connected()
        other = rclpy.create_node("other", namespace=node.namespace, context=node.node.context)
        infos = other.create_publisher(CameraInfo, "camera_info", 10)
        said = f"2 publishers send on {node.namespace}/camera_info"
        node.wait_for(lambda: said in node.message(), "the two to be named")
        assert "calibrations of several cameras are mixed" in node.message() and infos is not None
        other.destroy_node()


def test_two_cameras_on_one_topic_do_not_flood_the_log(tmp_path: Path) -> None:
    frames = 40
    with running_node(tmp_path, calibrated=False, **SMALL) as node:
        node.wait_until_connected()
        for number in range(frames):
            node.send(image(100 + 0.01 * number, "ab"[number % 2]))
        figures = node.wait_for_figure("frames processed", str(frames))
        assert figures["interruptions"] == str(frames - 1)
        assert 1 <= node.log.count("the frame_id changed") < frames / 2
