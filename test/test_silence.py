"""Tests that the real node reports the correct reason why no messages arrive, for typical user errors."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import rclpy
from domain_coordinator import domain_id
from numpy.typing import NDArray
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kpmatch_ros.msg import MatchArray
from kpmatch_ros.parameter_file import read_parameter_file, without_effect
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.ros.inputs import Inputs
from node_harness import SMALL, running_node


def test_wrong_types_misspelt_parameters_two_publishers_and_similar_topics_are_reported(tmp_path: Path) -> None:
    with running_node(tmp_path, calibrated=False, filter_treshold=0.2, **SMALL) as node:
        ns = node.namespace
        node.node.destroy_publisher(node.images)
        other = node.node.create_publisher(CompressedImage, "image", 10)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        infos = node.node.create_publisher(CameraInfo, "camera_info", latched)
        infos.publish(CameraInfo(width=8, height=8, k=[9.0, 0.0, 4.0, 0.0, 9.0, 4.0, 0.0, 0.0, 1.0]))  # only once
        said = f"no image on {ns}/image"
        node.wait_for(lambda: said in node.message() and "its publisher sends" in node.message(), "the type")
        node.wait_for(lambda: "no calibration" not in node.message(), "the latched camera_info to arrive")
        text = node.message()
        assert "sends sensor_msgs/msg/CompressedImage, not sensor_msgs/msg/Image; set image_transport" in text
        assert (
            "'filter_treshold' does not exist and has no effect, did you mean filter_threshold?" in text
            and "filter_treshold" in node.log
        )

        node.node.destroy_publisher(other)
        second = rclpy.create_node("second", namespace=ns, context=node.node.context)
        offers = [each.create_publisher(Image, "image", 10) for each in (node.node, second)]
        node.wait_for(lambda: "2 publishers send on" in node.message(), "the two cameras")
        node.wait_for(lambda: "but nothing arrives" in node.message(), "the silence")
        assert "qos_overrides" not in node.message(), "with queue 'all' the subscription is reliable already"
        node.node.destroy_publisher(offers[0])
        second.destroy_node()
        elsewhere = node.node.create_publisher(Image, "camera/image", 10)
        node.wait_for(lambda: f"{ns}/camera/image is published" in node.message(), "the nearest topic")
        node.node.destroy_publisher(elsewhere)
        elsewhere = node.node.create_publisher(CompressedImage, "camera/compressed", 10)
        said = f"{ns}/camera/compressed is published: remap to it, and set image_transport to compressed"
        node.wait_for(lambda: said in node.message(), "the nearest topic of the other transport")
        beside = node.node.create_publisher(CompressedImage, "image/compressed", 10)
        said = f"nobody publishes it; {ns}/image/compressed is published: set image_transport to compressed"
        node.wait_for(lambda: said in node.message(), "the other transport")
        assert elsewhere is not None and beside is not None


def test_the_image_topic_may_be_remapped_to_the_compressed_topic_itself(tmp_path: Path) -> None:
    arguments = ("-r", "image:=camera/image_raw/compressed")
    with running_node(
        tmp_path, arguments, calibrated=False, image_transport="compressed", matcher="nearest", **SMALL
    ) as node:
        publisher = node.node.create_publisher(CompressedImage, "camera/image_raw/compressed", 10)
        node.wait_for(publisher.get_subscription_count, "the node on the topic that was given")
        node.node.destroy_publisher(publisher)
        raw = node.node.create_publisher(Image, "camera/image_raw", 10)
        said = f"nobody publishes it; {node.namespace}/camera/image_raw is published: set image_transport to raw"
        node.wait_for(lambda: said in node.message(), "the other transport")
        assert raw is not None


def test_images_on_the_default_topic_are_reported_if_the_remapped_topic_is_silent(tmp_path: Path) -> None:
    arguments = ("-r", "image:=wrong/image_raw")
    with running_node(tmp_path, arguments, calibrated=False, matcher="nearest", **SMALL) as node:
        ns = node.namespace
        said = f"no image on {ns}/wrong/image_raw for"
        node.wait_for(lambda: said in node.message(), "the silence")
        node.wait_for(lambda: f"{ns}/image is published: remap to it" in node.message(), "the default topic")


def test_a_misspelt_parameter_in_a_file_is_reported_with_the_closest_name_and_has_no_effect(tmp_path: Path) -> None:
    file = tmp_path / "matcher.yaml"
    file.write_text("/**:\n  ros__parameters:\n    max_keypoint: 100\n    min_inliers: 20\n    wheel_radius: 0.1\n")
    warnings: list[str] = []
    parameters = read_parameter_file(file, warn=warnings.append)
    assert parameters.min_inliers == 20 and parameters.max_keypoints == 1024
    assert (
        "'max_keypoint' does not exist and has no effect, did you mean max_keypoints?" in warnings[0]
        and "'wheel_radius' does not exist" in warnings[1]
    )


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("image", "-r image:=/"),
        ("image_topic", "-r image:=/"),
        ("left_camera_info", "-r left/camera_info:=/"),
        ("matching.max_keypoints", "did you mean max_keypoints?"),
    ],
)
def test_a_topic_or_group_given_as_a_parameter_is_reported(name: str, suggestion: str) -> None:
    (text,) = without_effect([name])
    assert f"{name!r} does not exist and has no effect, did you mean" in text and suggestion in text


def test_a_parameter_file_without_a_section_for_the_node_is_named_in_the_log(tmp_path: Path) -> None:
    other, own = tmp_path / "other.yaml", tmp_path / "own.yaml"
    other.write_text("matcher_node:\n  ros__parameters:\n    max_keypoints: 100\n")
    own.write_text("/**:\n  ros__parameters:\n    max_keypoints: 100\n")
    arguments = ("--params-file", str(other), "--params-file", str(own))
    with running_node(tmp_path, arguments, autostart=False) as node:
        said = (
            f"{other} has no section for {node.namespace}/matcher, so nothing in it has an effect; it has /matcher_node"
        )
        node.wait_for(lambda: said in node.log, "the file name in the log")
        assert str(own) not in node.log


def picture(pixels: NDArray[np.uint8], stamp: int) -> Image:
    height, width = pixels.shape
    message = Image(encoding="mono8", height=height, width=width, step=width, data=pixels.tobytes())
    message.header.stamp.nanosec = stamp % 10**9
    message.header.stamp.sec = stamp // 10**9
    return message


@pytest.mark.parametrize("queue", ["latest", "all"])
def test_a_calibration_publisher_that_appears_later_and_sends_nothing_does_not_stop_the_frames(
    tmp_path: Path, queue: str
) -> None:
    with running_node(tmp_path, calibrated=False, queue=queue, **SMALL) as node:
        node.wait_until_connected()
        arrived: list[float] = []
        node.subscribe(MatchArray, "matches", lambda _: arrived.append(time.monotonic()))
        texture = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
        silent, number = None, 0
        while silent is None or time.monotonic() < silent + 3:
            number += 1
            node.images.publish(picture(texture, number * 50_000_000))
            node.spin(0.05)
            if silent is None and len(arrived) > 10 and arrived[-1] > arrived[0] + 2:
                node.node.create_publisher(CameraInfo, "camera_info", QoSProfile(depth=10))
                silent = time.monotonic()
        assert max(np.diff([each for each in arrived if each > silent - 1])) < 0.9


def test_a_camera_counts_as_silent_after_two_seconds_once_the_node_is_active_again() -> None:
    with domain_id() as domain:
        context = rclpy.Context()
        rclpy.init(context=context, domain_id=domain)
        node = LifecycleNode("matcher", context=context)
        inputs = Inputs(node, Parameters(), *[lambda *_: None] * 4)
        inputs.subscribe()
        (camera,) = inputs._cameras  # noqa: SLF001
        for now in (0.0, 20.0, 40.0):
            camera.receive(now)
        assert camera.silent_after == 60.0, "three intervals"
        inputs.unsubscribe()
        inputs.subscribe()
        assert camera.silent_after == 2.0, "the driver may have changed since"
        node.destroy_node()
        rclpy.shutdown(context=context)
