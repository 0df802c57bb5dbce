"""The node's own time per frame: from the arrival of an image to the published results, without the front end's work.

    OMP_NUM_THREADS=1 tools/with_ros python benchmarks/node_overhead.py              # 640x480, 1024 keypoints
    OMP_NUM_THREADS=1 tools/with_ros python benchmarks/node_overhead.py --features   # somebody subscribes to `features`

The real node runs in this process. A second process simulates a camera over DDS and subscribes to the node's messages.
The front end's work is extraction, matching and the pose. The rest is measured in two parts: deserialising the message
that DDS delivers (rclpy's work, before the node is called), and the node's own work: the transfer to the inference
thread, pixels, calibration, creating and publishing the messages.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, Image

from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.msg import FeatureArray, MatchArray, RelativePose
from kpmatch_ros.ros.node import MatcherNode
from simulation import Scene, camera_path, demo_camera


def film(frames: int) -> list[np.ndarray]:
    """Return grey images of the synthetic camera, 640x480."""
    views = Scene(seed=0).film(camera_path(frames), demo_camera(distorted=False))
    return [cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY) for view in views]


def image_of(pixels: np.ndarray, number: int) -> Image:
    """Return a mono8 message."""
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding="mono8", step=pixels.shape[1])
    message.header.frame_id = "camera"
    message.header.stamp.sec = number + 1
    message.data.frombytes(pixels.tobytes())
    return message


def play(frames: int, features: bool) -> None:
    """Run the other process: a camera that sends an image when the last image's pose has arrived."""
    rclpy.init()
    node = Node("camera")
    received: list[Any] = []
    qos = QoSProfile(depth=10)
    images = node.create_publisher(Image, "image", qos)
    infos = node.create_publisher(CameraInfo, "camera_info", qos)
    node.create_subscription(RelativePose, "relative_pose", received.append, qos)
    node.create_subscription(MatchArray, "matches", lambda message: None, qos)
    if features:
        node.create_subscription(FeatureArray, "features", lambda message: None, qos)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while not (images.get_subscription_count() and infos.get_subscription_count()):
        executor.spin_once(timeout_sec=0.1)
    time.sleep(1.0)
    info = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.0] * 5)
    matrix = demo_camera(distorted=False).matrix
    info.k = matrix.reshape(-1)
    info.p = np.c_[matrix, np.zeros(3)].reshape(-1)
    for number, pixels in enumerate(film(frames)):
        info.header.stamp.sec = number + 1
        infos.publish(info)
        images.publish(image_of(pixels, number))
        end = time.monotonic() + 30
        while len(received) < number and time.monotonic() < end:
            executor.spin_once(timeout_sec=0.05)
        for _ in range(4 if number else 60):  # the first frame has no pose
            executor.spin_once(timeout_sec=0.05)
    rclpy.shutdown()


def timed(method: Callable[..., Any], laps: list[float]) -> Callable[..., Any]:
    """Wrap a method so that it records its durations, in seconds."""

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            laps.append(time.perf_counter() - started)

    return wrapped


def main() -> None:
    """Print medians and 95th percentiles, milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--keypoints", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--features", action="store_true", help="subscribe to `features`")
    options = parser.parse_args()

    camera = multiprocessing.get_context("spawn").Process(target=play, args=(options.frames, options.features))
    front_end: list[float] = []
    FrontEnd.register = timed(FrontEnd.register, front_end)  # type: ignore[method-assign]
    rclpy.init()
    node = MatcherNode(
        parameter_overrides=[
            Parameter("device", value=options.device),
            Parameter("max_keypoints", value=options.keypoints),
            Parameter("queue", value="all"),
        ]
    )
    latencies: list[float] = []
    processed = node.monitor.processed

    def note(latency_ms: float, *rest: Any) -> None:
        latencies.append(latency_ms / 1e3)
        processed(latency_ms, *rest)

    node.monitor.processed = note  # type: ignore[method-assign]
    node.trigger_configure()
    node.trigger_activate()
    camera.start()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    while camera.is_alive():
        executor.spin_once(timeout_sec=0.1)
    node.end()
    rclpy.shutdown()

    serialized = serialize_message(image_of(film(1)[0], 0))
    making: list[float] = []
    for _ in range(100):
        timed(deserialize_message, making)(serialized, Image)
    own = np.subtract(latencies, front_end)[2:]  # the first frames are slow, because nothing is cached yet
    print(
        f"{len(own)} frames of 640x480 with {options.keypoints} keypoints, features "
        f"{'subscribed to' if options.features else 'not subscribed to'}; milliseconds, median (95th percentile)"
    )
    for name, laps in (("front end", front_end[2:]), ("rclpy creates the Image", making), ("the node's overhead", own)):
        print(f"{name:24} {1e3 * np.median(laps):8.2f} ({1e3 * np.percentile(laps, 95):.2f})")


if __name__ == "__main__":
    main()
