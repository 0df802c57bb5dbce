"""Runs raw stereo cameras with the matcher and examples/stereo_slam, for test_stereo_slam.py, with tf2_msgs.

The lenses have distortion, and each camera is rotated against the rectified pair. Prints the received path and TF as
JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import QoSProfile
from scipy.spatial.transform import Rotation
from sensor_msgs.msg import CameraInfo, Image
from test_stereo_node import BASELINE, FAR, FOCAL, HEIGHT, LOWER, NEAR, UPPER, WIDTH, stamped

from node_harness import running_node

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PLACES = [0.06 * step for step in (0, 1, 2, 3, 2, 1, 0)]  # metres to the right, in the rectified pair's frame
TURNS = {"left": (0.02, 0.035, -0.015), "right": (-0.01, -0.02, 0.02)}  # radians, rotation vectors: R of camera_info
MATRICES = {"left": (310.0, 308.0, 158.0, 122.0), "right": (304.0, 305.0, 163.0, 118.0)}
LENSES = {"left": (-0.2, 0.05, 0.001, -0.0005, 0.0), "right": (-0.18, 0.04, -0.0008, 0.0006, 0.0)}
PARAMETERS = {"mode": "stereo", "rectified": False, "max_keypoints": 200}


def calibration(side: str) -> CameraInfo:
    fx, fy, cx, cy = MATRICES[side]
    message = CameraInfo(width=WIDTH, height=HEIGHT, distortion_model="plumb_bob", d=list(LENSES[side]))
    message.k = [fx, 0.0, cx, 0.0, fy, cy, 0.0, 0.0, 1.0]
    message.r = Rotation.from_rotvec(TURNS[side]).as_matrix().ravel().tolist()
    offset = -FOCAL * BASELINE if side == "right" else 0.0
    message.p = [FOCAL, 0.0, WIDTH / 2, offset, 0.0, FOCAL, HEIGHT / 2, 0.0, 0.0, 0.0, 1.0, 0.0]
    return message


def view(side: str, x: float) -> np.ndarray:
    """Return the image of test_stereo_node.py's two walls from one side's raw camera, with the left camera at `x`."""
    info = calibration(side)
    k, r, p = (np.reshape(values, shape) for values, shape in ((info.k, (3, 3)), (info.r, (3, 3)), (info.p, (3, 4))))
    grid = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), axis=-1).reshape(-1, 1, 2).astype(np.float64)
    at = cv2.undistortPoints(grid, k, np.array(info.d), R=r, P=p[:, :3]).reshape(HEIGHT, WIDTH, 2).astype(np.float32)
    x += BASELINE if side == "right" else 0.0
    shown = [
        cv2.remap(wall, at[..., 0] + np.float32(300 + FOCAL * x / depth), at[..., 1], cv2.INTER_LINEAR,
                  borderMode=cv2.BORDER_REFLECT)
        for wall, depth in ((UPPER, FAR), (LOWER, NEAR))
    ]  # fmt: skip
    return np.where(at[..., 1] < HEIGHT / 2, *shown)


def seconds(stamp: Any) -> float:
    return float(stamp.sec + stamp.nanosec * 1e-9)


def main(folder: Path) -> None:
    from tf2_msgs.msg import TFMessage

    with running_node(folder, **PARAMETERS) as node:
        paths: list[PathMessage] = []
        transforms: list[Any] = []
        node.subscribe(PathMessage, "path", paths.append)
        node.subscribe(TFMessage, "/tf", lambda message: transforms.extend(message.transforms))
        command = [sys.executable, "-m", "stereo_slam.node", "--ros-args", "-r", f"__ns:={node.namespace}"]
        command += ["-p", "keyframe_step:=0.05", "-p", "loop_path:=0.2"]
        environment = {**os.environ, "ROS_DOMAIN_ID": str(node.node.context.get_domain_id()), "OMP_NUM_THREADS": "1"}
        log = folder / "slam.log"
        with log.open("w") as stream:
            slam = subprocess.Popen(command, cwd=EXAMPLES, env=environment, stdout=stream, stderr=stream)
        try:
            peers = {
                (side, kind): node.node.create_publisher(kind, f"{side}/{topic}", QoSProfile(depth=100))
                for side in ("left", "right")
                for kind, topic in ((Image, "image"), (CameraInfo, "camera_info"))
            }
            topics = ("matches", "stereo_matches", "relative_pose")
            node.wait_for(lambda: all(peer.get_subscription_count() for peer in peers.values()), "the node")
            node.wait_for(lambda: all(node.node.count_subscribers(topic) > 1 for topic in topics), "the back-end")
            node.wait_for(lambda: node.node.count_subscribers("features"), "the back-end to subscribe to features")
            node.wait_until_known()

            def send(frame: int, x: float) -> None:
                for (side, kind), peer in peers.items():
                    message: Any = calibration(side)
                    if kind is Image:
                        data = view(side, x).tobytes()
                        message = Image(encoding="mono8", width=WIDTH, height=HEIGHT, step=WIDTH, data=data)
                    peer.publish(stamped(message, 10 + 0.1 * frame, f"{side}_optical"))
                node.wait_for(lambda: len(node.poses) == frame, "the matcher")

            sent = 0
            # Messages to or from the back-end are lost until both sides have discovered each other.
            while not paths or not transforms:
                send(sent, PLACES[0])
                node.spin(0.5)
                sent += 1
                assert sent < 100, log.read_text()
            for frame, x in enumerate(PLACES, sent):
                send(frame, x)
            last = 10 + 0.1 * frame
            node.wait_for(lambda: abs(seconds(paths[-1].poses[-1].header.stamp) - last) < 0.01, "the whole path")
            node.wait_for(lambda: abs(seconds(transforms[-1].header.stamp) - last) < 0.01, "TF of every frame")
            node.wait_for(lambda: "loop closed: frame" in log.read_text(), "a loop")
        finally:
            slam.send_signal(signal.SIGINT)
            slam.wait(timeout=30)
    assert slam.returncode == 0, f"exit status {slam.returncode}: {log.read_text()}"

    def flat(stamp: Any, place: Any, turn: Any) -> list[float]:
        return [seconds(stamp), place.x, place.y, place.z, turn.x, turn.y, turn.z, turn.w]

    links = [
        [each.header.frame_id, each.child_frame_id]
        + flat(each.header.stamp, each.transform.translation, each.transform.rotation)
        for each in transforms[-2 * (len(PLACES) - 1) :]
    ]
    steps = [
        flat(each.header.stamp, each.pose.position, each.pose.orientation) for each in paths[-1].poses[-len(PLACES) :]
    ]
    print(json.dumps({"path": steps, "frame": paths[-1].header.frame_id, "tf": links}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
