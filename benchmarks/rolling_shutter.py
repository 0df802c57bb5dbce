"""How wrong are the poses of a rolling-shutter camera, and how much does `readout_time` improve them?

    tools/with_ros python benchmarks/rolling_shutter.py            # some fifteen minutes on one core
    tools/with_ros python benchmarks/rolling_shutter.py --seeds 7 --frames 5 --readouts 0.3

A walk through synthetic courtyards, with the demo's camera (640 x 480, lens distortion) and noise of 2 grey levels, on
a path that bends by 11 degrees and rotates by up to 3 degrees every 25 cm. A readout is given as a share of the
interval between two frames. Bands of four rows are rendered from the camera's pose when their middle is read. Poses are
estimated twice from the same matches: as for a global shutter, and with the readout time. The true motion is that
between the middle rows. NEES is e' C^-1 e of the error e of a pose and its covariance C. Its mean is 5 if C is correct.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, RotationSpline

from benchmarks.one_camera import report
from benchmarks.overconfidence import Outcome, judge
from kpmatch_ros import frame_motion
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose, PoseStatus, RelativePose, relative_motion
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.parameters import Parameters
from simulation import Scene, camera_path, demo_camera

_NOISE = 2.0  # grey levels
_ROWS = 4  # rows of a band
_STEP = 0.25  # metres between two poses of the path
_INTERVAL = 0.1  # seconds between two frames
KINDS = ("global", "rolling")


class Walk:
    """The camera's pose at any time, in frames."""

    def __init__(self, frames: int, step: float) -> None:
        path = camera_path(4 + math.ceil((frames + 2) * step / _STEP))
        times = np.arange(len(path)) * _STEP / step
        self._positions = CubicSpline(times, np.array([pose.position for pose in path]))
        self._rotations = RotationSpline(times, Rotation.from_matrix(np.array([pose.rotation for pose in path])))

    def __call__(self, time: float) -> Pose:
        return Pose(self._rotations(time).as_matrix(), self._positions(time))


def read_by_rows(scene: Scene, walk: Walk, camera: Camera, start: float, readout: float, seed: int) -> np.ndarray:
    """Render an image (H, W, 3) whose first row is read at time `start`, and whose last row `readout` frames later."""

    def band(row: int) -> np.ndarray:
        matrix = camera.matrix.copy()
        matrix[1, 2] -= row
        part = Camera(camera.width, _ROWS, matrix, camera.distortion_model, camera.distortion)
        return scene.render(*walk(start + readout * (row + _ROWS / 2) / camera.height), part).image

    with ThreadPoolExecutor() as pool:
        image = np.concatenate(list(pool.map(band, range(0, camera.height, _ROWS)))).astype(np.float32)
    image += np.random.default_rng(seed).standard_normal(image.shape, np.float32) * np.float32(_NOISE)
    return np.round(np.clip(image, 0, 255)).astype(np.uint8)


class Twice:
    """Replaces the front end's pose estimation: estimates each pose for a global shutter and with the readout time."""

    def __init__(self) -> None:
        self.poses: dict[str, RelativePose] = {}

    def __call__(self, *matches: Any, readout: float, before: Any, **options: Any) -> RelativePose:
        self.poses = {"global": estimate_relative_pose(*matches, **options)}
        self.poses["rolling"] = estimate_relative_pose(*matches, readout=readout, before=before, **options)
        return self.poses["rolling"]


def main() -> None:
    """Print two rows for each readout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9, 10], help="courtyards")
    parser.add_argument("--frames", type=int, default=9, help="number of frames in each courtyard")
    parser.add_argument(
        "--readouts",
        type=float,
        nargs="+",
        default=[0.1, 0.3, 0.6],
        help="readout times, as shares of the interval between two frames",
    )
    parser.add_argument("--step", type=float, default=0.05, help="metres from frame to frame")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    camera, walk, twice = demo_camera(), Walk(options.frames, options.step), Twice()
    frame_motion.estimate_relative_pose = twice  # type: ignore[assignment]
    outcomes: dict[tuple[float, str], list[Outcome]] = {
        (readout, kind): [] for readout in options.readouts for kind in KINDS
    }
    scenes = {seed: Scene(seed) for seed in options.seeds}
    print("readout  shutter         rotation, RMS, median, largest (degrees)  direction  NEES, mean, median")
    for readout in options.readouts:
        pairs = 0
        parameters = Parameters(device=options.device, precision="float32", readout_time=readout * _INTERVAL)
        front_end = FrontEnd(parameters)
        for seed, scene in scenes.items():
            front_end.reset()
            for number in range(options.frames):
                image = read_by_rows(scene, walk, camera, number + 1, readout, 1000 * seed + number)
                pair = front_end.register([image], [round(1e9 * _INTERVAL * (number + 1))], camera).pair
                if pair is None:
                    continue
                pairs += 1
                middle = number + 1 + readout / 2
                back = (pair.current.stamp - pair.reference.stamp) / (1e9 * _INTERVAL)
                truth = relative_motion(walk(middle - back), walk(middle))
                for kind, pose in twice.poses.items():
                    if pose.status is PoseStatus.OK:
                        outcomes[readout, kind].append(judge(pose, truth))
        for kind in KINDS:
            report(f"{readout:4.2f}  {kind:7s}", outcomes[readout, kind], pairs)


if __name__ == "__main__":
    main()
