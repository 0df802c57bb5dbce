"""Does a rotation's covariance include the effect of a translation that is too small to be observed?

    tools/with_ros python benchmarks/hidden_translation.py                 # rendered, the truth is known
    tools/with_ros python benchmarks/hidden_translation.py --bag FOLDER    # and a recording of a standing stereo pair

One camera, the status NO_TRANSLATION, default parameters. NEES is e' C^-1 e of the rotation's error e and its
covariance C. Its mean is 3 and its median 2.37 if the covariance is correct.

Rendered: a camera in the courtyard moves by the given millimetres in any direction and rotates by a few hundredths of a
degree. Turns: it rotates by 2 to 6 degrees without translation.

The recording: the rotations estimated by the left and by the right camera alone are compared in one frame, and C is the
sum of both covariances. The rectification comes from the camera infos. Frames n apart are every n-th frame, starting
with each of the first n.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.bags import read_messages
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose, PoseStatus, RelativePose, relative_motion
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.parameters import Parameters
from simulation import Scene, camera_path, demo_camera

STEPS = (0.0, 0.0001, 0.0003, 0.001)  # metres
APART = (1, 2, 3, 4, 5)  # frames


def estimate(images: Iterable[np.ndarray], camera: Camera, keypoints: int = 1024) -> list[RelativePose]:
    """Return the pose of every image but the first, relative to the one before."""
    front_end = FrontEnd(Parameters(device="cpu", precision="float32", max_keypoints=keypoints))
    pairs = [front_end.register([image], [(i + 1) * 10**8], camera).pair for i, image in enumerate(images)]
    return [pair.pose for pair in pairs if pair is not None]


def nees(error: np.ndarray, covariance: np.ndarray) -> float:
    return float(error @ np.linalg.solve(covariance, error))


def report(title: str, values: Sequence[float], pairs: int) -> None:
    found = np.array(values) if values else np.full(1, np.nan)
    print(
        f"{title:34} NEES mean {found.mean():7.2f} median {np.median(found):7.2f} largest {found.max():7.1f}"
        f"   NO_TRANSLATION {len(values)} of {pairs}",
        flush=True,
    )


def rendered(title: str, paths: Iterable[list[Pose]]) -> None:
    """Print the NEES of a rendered camera's rotations, with one path per courtyard."""
    camera, values, pairs = demo_camera(), [], 0
    for seed, path in enumerate(paths):
        film = Scene(seed).film(path, camera, noise=2.0, noise_seed=100 * seed)
        poses = estimate((cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY) for view in film), camera)
        pairs += len(poses)
        for pose, before, now in zip(poses, path, path[1:]):
            if pose.status is PoseStatus.NO_TRANSLATION:
                turn = relative_motion(before, now).rotation @ pose.rotation.T
                values.append(nees(Rotation.from_matrix(turn).as_rotvec(), pose.covariance[3:, 3:]))
    report(title, values, pairs)


def small_steps(length: float, seed: int, frames: int = 6) -> list[Pose]:
    random, poses = np.random.default_rng(seed), camera_path([("walk", 3 + 7 * seed)])[-1:]
    while len(poses) < frames:
        step = random.normal(size=3)
        turn = Rotation.from_rotvec(random.normal(0, 2e-4, 3)).as_matrix()
        poses.append(Pose(poses[-1].rotation @ turn, poses[-1].position + length * step / np.linalg.norm(step)))
    return poses


def read_side(bag: Path, side: str) -> tuple[list[np.ndarray], Camera, np.ndarray]:
    """Read the images of a camera, its calibration, and its rectifying rotation (3, 3)."""
    records = list(read_messages(bag, [f"{side}/image_raw", f"{side}/camera_info"]))
    images = [to_array(record.message) for record in records if record.topic.endswith("image_raw")]
    info = next(record.message for record in records if record.topic.endswith("camera_info"))
    return images, Camera.from_camera_info(info, rectified=False), np.asarray(info.r).reshape(3, 3)


def difference(poses: Sequence[RelativePose], rectify: Sequence[np.ndarray]) -> float:
    """NEES of the difference between the rotations estimated by the two cameras of a standing pair, in one frame."""
    turns = [r @ Rotation.from_matrix(pose.rotation).as_rotvec() for r, pose in zip(rectify, poses)]
    covariances = [r @ pose.covariance[3:, 3:] @ r.T for r, pose in zip(rectify, poses)]
    return nees(turns[0] - turns[1], covariances[0] + covariances[1])


def recorded(bag: Path, sides: Sequence[str]) -> None:
    """Print how far the left and the right camera of a standing pair differ."""
    images, cameras, rectify = zip(*(read_side(bag, side) for side in sides))
    for keypoints, apart in [*((1024, apart) for apart in APART), (512, 1)]:
        values, pairs = [], 0
        for start in range(apart):
            both = [estimate(film[start::apart], camera, keypoints) for film, camera in zip(images, cameras)]
            for poses in zip(*both):
                pairs += 1
                if all(pose.status is PoseStatus.NO_TRANSLATION for pose in poses):
                    values.append(difference(poses, rectify))
        report(f"{bag.name:.16}, {keypoints} points, {apart} apart", values, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bag", type=Path, help="a recording of a standing stereo pair")
    parser.add_argument("--sides", nargs=2, default=["/cam0", "/cam1"], help="its cameras (default /cam0 /cam1)")
    parser.add_argument(
        "--scenes", type=int, default=6, help="number of courtyards, with 5 pairs for each step (default 6)"
    )
    options = parser.parse_args()
    cv2.setNumThreads(1)
    seeds = range(options.scenes)
    for step in STEPS:
        rendered(f"steps of {1000 * step:.1f} mm", [small_steps(step, seed) for seed in seeds])
    rendered("turns", [camera_path([("walk", 2 + 7 * seed), ("rotate", 9)])[2 + 7 * seed :] for seed in seeds])
    if options.bag is not None:
        recorded(options.bag, options.sides)


if __name__ == "__main__":
    main()
