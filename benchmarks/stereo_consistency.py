"""Are stereo poses as accurate as their covariance says? Errors and NEES on the package's own stereo walk.

    tools/with_ros python benchmarks/stereo_consistency.py  # 200 pairs; on a processor it takes half an hour
    tools/with_ros python benchmarks/stereo_consistency.py --seeds 10 --frames 11

A walk through the synthetic courtyard is cut into as many parts as there are seeds, each with another courtyard. The
front end processes every part with the default parameters. NEES, the normalised estimation error squared, is e' C^-1 e
of the error e of a pose, 6 numbers, and its covariance C. If the covariance is correct and the errors of successive
pairs are independent, its mean is 6, within bounds from chi-square (Bar-Shalom, Li and Kirubarajan, Estimation with
Applications to Tracking and Navigation, 2001, 5.4.2). The NEES of each part's odometry, which chains the poses, shows
whether they are independent.

Constants were chosen on --seeds 1 2 3 4 5 6 7 8 9 --frames 33 --start 200; the default seeds were not used for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import cv2
import numpy as np
from scipy.stats import chi2

from kpmatch_ros.frames import Pair
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import Pose, PoseStatus, relative_motion
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.odometry import Odometry
from kpmatch_ros.parameters import Parameters
from simulation import Scene, camera_path, demo_camera, stereo_right

_NOISE = 2.0  # grey levels
_AXES = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # axes of the first camera in the odometry frame (REP-103)


def pairs(front_end: FrontEnd, seed: int, poses: list[Pose], baseline: float) -> Iterator[tuple[Pair, Pose]]:
    """Yield the front end's pairs of frames along a path, and the true motions."""
    eye = demo_camera(distorted=False)
    camera = StereoCamera(eye, eye, np.eye(3), np.array([-baseline, 0.0, 0.0]))
    scene = Scene(seed)
    films = [
        scene.film(path, eye, noise=_NOISE, noise_seed=10**6 * side + 1000 * seed)
        for side, path in enumerate((poses, [stereo_right(pose, baseline) for pose in poses]))
    ]
    front_end.reset()
    for number, views in enumerate(zip(*films)):
        left, right = (cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY) for view in views)
        pair = front_end.register([left, right], [(number + 1) * 10**8] * 2, camera).pair
        if pair is not None:
            reference = pair.reference.stamp // 10**8 - 1
            yield pair, relative_motion(poses[reference], poses[number])


def nees(true: Pose, rotation: np.ndarray, position: np.ndarray, covariance: np.ndarray) -> float:
    """Return the NEES of a pose whose covariance refers to fixed axes."""
    error = np.concatenate([true.position - position, cv2.Rodrigues(true.rotation @ rotation.T)[0].ravel()])
    return float(error @ np.linalg.solve(covariance, error))


def main() -> None:
    """Print errors and NEES, the mean NEES after each part and all figures at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14], help="courtyards")
    parser.add_argument("--frames", type=int, default=41, help="stereo frames of each part")
    parser.add_argument("--start", type=int, default=0, help="first frame of the walk")
    parser.add_argument("--baseline", type=float, default=0.12, help="metres")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    front_end = FrontEnd(Parameters(device=options.device, precision="float32", rectified=True))
    step = options.frames - 1
    path = camera_path(options.start + step * len(options.seeds) + 1)[options.start :]
    shares, angles, squares, chained, lost = [], [], [], [], 0
    for part, seed in enumerate(options.seeds):
        poses, odometry, begun = path[part * step : (part + 1) * step + 1], Odometry(), None
        for number, (pair, motion) in enumerate(pairs(front_end, seed, poses, options.baseline), 1):
            place = odometry.add(pair)
            if place is not None and place.chain == 0:
                begun = poses[pair.reference.stamp // 10**8 - 1] if begun is None else begun
                way = relative_motion(begun, poses[number])
                true = Pose(_AXES @ way.rotation, _AXES @ way.position)
                chained.append(nees(true, place.rotation, place.position, place.covariance))
            if pair.pose.status is not PoseStatus.OK:
                lost += 1
                continue
            found = pair.pose
            squares.append(nees(motion, found.rotation, found.translation, found.covariance))
            off = np.linalg.norm(motion.position - found.translation)
            shares.append(100 * off / np.linalg.norm(motion.position))
            angles.append(np.degrees(np.linalg.norm(cv2.Rodrigues(motion.rotation @ found.rotation.T)[0])))
        print(f"courtyard {seed}: mean NEES up to here {np.mean(squares):.2f} over {len(squares)} pairs", flush=True)
    low, high = chi2.ppf([0.025, 0.975], 6 * len(squares)) / len(squares)
    print(f"{len(squares)} pairs with a pose, {lost} without")
    print(f"translation: median error {np.median(shares):.3f} % of the distance moved, largest {max(shares):.3f} %")
    print(f"rotation: median error {np.median(angles):.4f} degrees, largest {max(angles):.4f}")
    within = np.mean(np.array(squares) < chi2.ppf(0.95, 6))
    print(
        f"NEES: mean {np.mean(squares):.2f}, 95 % bounds {low:.2f} to {high:.2f}; median {np.median(squares):.2f} of "
        f"{chi2.median(6):.2f}; {within:.1%} of the pairs below the 95 % point"
    )
    print(f"NEES of odometry: mean {np.mean(chained):.2f} over chains of up to {step} frames")


if __name__ == "__main__":
    main()
