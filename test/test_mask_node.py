"""Tests of the node with masks from files and from a topic."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from test_masks import left_third, under
from test_node import FAST, HEIGHT, WIDTH, FeatureArray, image, textured

from node_harness import running_node


def test_masks_from_a_topic_and_a_file_both_apply_and_missing_masks_are_counted(tmp_path: Path) -> None:
    body = left_third(HEIGHT, WIDTH)[::-1, ::-1]
    assert cv2.imwrite(str(tmp_path / "body.png"), body)
    with running_node(tmp_path, calibrated=False, mask=tmp_path / "body.png", **FAST) as node:
        features: list[FeatureArray] = []
        node.subscribe(FeatureArray, "features", features.append)
        masks = node.node.create_publisher(Image, "mask", QoSProfile(depth=10))
        node.wait_until_connected()
        node.wait_for(masks.get_subscription_count, "the subscription to masks")
        third, numbers = left_third(HEIGHT, WIDTH), itertools.count()

        def points(mask: np.ndarray | None) -> np.ndarray:
            """Return the keypoints of the next frame. Its mask is sent after it."""
            number, frames = next(numbers), len(features) + 1
            node.send(image(textured(4 * number), 100 + number))
            node.spin(0.05)
            if mask is not None:
                masks.publish(image(mask, 100 + number))
            node.wait_for(lambda: len(features) == frames, "the frame")
            return np.array(features[-1].points).reshape(-1, 2)

        # On a busy machine a mask may arrive a second late, and its frame is processed without it. Then the frame is
        # repeated.
        unmasked = 0
        for mask in (third, third, None, 0 * third):
            for _ in range(5):
                found = points(mask)
                assert len(found) > 20 or not (mask is None or mask.any())
                hides = under(third, found) == 0
                unmasked += not hides
                if hides or mask is None:
                    break
            assert under(body, found) == 0
            assert hides == (mask is not None)
        assert len(found) == 0, "the last mask hides everything"
        topic = f"{node.namespace}/image"
        figures = node.wait_for_figure(f"mask hides everything: {topic}", "1")
        assert figures[f"no mask: {topic}"] == str(unmasked)
        assert "the mask hides all of an image" in node.message()
        assert node.stop() == 0


@pytest.mark.parametrize("queue", ["latest", "all"])
def test_a_missing_mask_file_is_refused_when_the_node_configures(tmp_path: Path, queue: str) -> None:
    with running_node(tmp_path, mask="/none/body.png", queue=queue, **FAST) as node:
        assert node.process.wait(60) == 1
        assert "mask is '/none/body.png', which cannot be read: No such file or directory" in node.log


def test_frames_whose_masks_never_arrive_are_processed_and_counted(tmp_path: Path) -> None:
    # With best effort, a frame may be lost.
    reliable = {"qos_overrides./image.subscription.reliability": "reliable"}
    with running_node(tmp_path, calibrated=False, queue="latest", sync_tolerance=0.05, **FAST, **reliable) as node:
        node.subscribe(FeatureArray, "features", node.features.append)
        masks = node.node.create_publisher(Image, "mask", QoSProfile(depth=10))
        node.wait_until_connected()
        node.wait_for(masks.get_subscription_count, "the subscription to masks")
        for number in range(1, 6):
            node.send(image(textured(4 * number), 100 + number))
            # Waiting for matches would not work: the first frame has none, and a second frame may displace it.
            node.wait_for(lambda: len(node.features) == number, "the frame")  # noqa: B023
        figures = node.wait_for_figure("frames processed", "5")
        assert figures[f"no mask: {node.namespace}/image"] == "5"
        assert node.stop(signal.SIGINT) == 0
