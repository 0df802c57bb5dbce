"""How accurate and consistent is one camera's pose, with and without a standard deviation for each match?

    tools/with_ros python benchmarks/one_camera.py           # six courtyards: on one core some ten minutes
    tools/with_ros python benchmarks/one_camera.py --seeds 7 --steps 1 --frames 5

A walk through synthetic courtyards, with the demo's camera (640 x 480, lens distortion), noise of 2 grey levels and
default parameters; every frame, every second one and so on. Each pose is estimated twice from the same matches. NEES is
e' C^-1 e of the error e of a pose, with 5 degrees of freedom, and its covariance C. Its mean is 5 if the covariance is
correct. The method was chosen on --seeds 1 2 3 4 5 6 --start 14; the default seeds were not used for it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from benchmarks.overconfidence import Outcome, judge
from kpmatch_ros import frame_motion
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose, relative_motion
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.parameters import Parameters
from simulation import Scene, camera_path, demo_camera

_NOISE = 2.0  # grey levels
KINDS = ("equal sigmas", "own sigmas")


class Twice:
    """Replaces the front end's pose estimation: estimates each pose with and without standard deviations."""

    def __init__(self) -> None:
        self.poses: dict[str, RelativePose] = {}

    def __call__(self, *matches: Any, sigmas: np.ndarray | None, **options: Any) -> RelativePose:
        self.poses = {
            kind: estimate_relative_pose(*matches, sigmas=given, **options)
            for kind, given in zip(KINDS, (None, sigmas))
        }
        return self.poses[KINDS[1]]


def report(label: str, outcomes: list[Outcome], pairs: int) -> None:
    """Print a row: RMS, median and maximum of both errors, mean and median of the NEES."""
    rotation, direction, nees = np.array([(one.rotation, one.direction, one.nees) for one in outcomes]).T
    print(
        f"{label}  {len(outcomes):3d} of {pairs:3d} OK"
        + "".join(
            f"  {np.sqrt(np.mean(error**2)):.4f} {np.median(error):.4f} {error.max():.4f}"
            for error in (rotation, direction)
        )
        + f"  {np.mean(nees):.1f} {np.median(nees):.1f}",
        flush=True,
    )


def main() -> None:
    """Print two rows for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9, 10, 11, 12], help="courtyards")
    parser.add_argument("--frames", type=int, default=13, help="number of frames in each courtyard")
    parser.add_argument("--start", type=int, default=0, help="first frame of the walk")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 3], help="distance between the frames of a pair, frames"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    camera, path = demo_camera(), camera_path(options.start + options.frames)[options.start :]
    twice = Twice()
    frame_motion.estimate_relative_pose = twice  # type: ignore[assignment]
    front_end = FrontEnd(Parameters(device=options.device, precision="float32"))
    outcomes: dict[tuple[int, str], list[Outcome]] = {(step, kind): [] for step in options.steps for kind in KINDS}
    pairs = dict.fromkeys(options.steps, 0)
    for seed in options.seeds:
        images = [view.image for view in Scene(seed).film(path, camera, noise=_NOISE, noise_seed=1000 * seed)]
        for step in options.steps:
            for first in range(step):
                front_end.reset()
                for number in range(first, len(path), step):
                    pair = front_end.register([images[number]], [(number + 1) * 10**8], camera).pair
                    if pair is None:
                        continue
                    pairs[step] += 1
                    truth = relative_motion(path[pair.reference.stamp // 10**8 - 1], path[number])
                    for kind, pose in twice.poses.items():
                        if pose.status is PoseStatus.OK:
                            outcomes[step, kind].append(judge(pose, truth))
    print(
        "step     sigmas                      rotation, RMS, median, largest (degrees)  direction  NEES, mean, median"
    )
    for (step, kind), found in outcomes.items():
        report(f"every {step}  {kind:12s}", found, pairs[step])


if __name__ == "__main__":
    main()
