"""Are poses with fisheye and rational lenses as accurate as with common lenses, and is the covariance consistent?

    tools/with_ros python benchmarks/lenses.py             # 8 pairs of each lens; on one core some ten minutes
    tools/with_ros python benchmarks/lenses.py --lenses pinhole fisheye-190 --frames 3

A walk through the synthetic courtyard, with cameras of 640 x 480 pixels with these lenses. Six pinhole images, the
sides of a cube with twice the lens's resolution, are resampled along four rays per pixel, including rays from behind
the camera, and averaged. All lenses therefore give equally sharp images. The front end processes every film with the
default parameters. NEES is e' C^-1 e of the error e of a pose, with 5 degrees of freedom, and its covariance C. Its
mean is 5 if the covariance is correct.
"""

from __future__ import annotations

import argparse
import math

import cv2
import numpy as np

from benchmarks.overconfidence import judge
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose, PoseStatus, relative_motion
from kpmatch_ros.parameters import Parameters
from simulation import Scene, camera_path

_NOISE = 2.0  # grey levels
_FINER = 2  # number of rays along a side of a pixel, and of the cube's pixels per pixel of the lens
_KINECT = (0.48, -2.65, 6e-4, -3e-4, 1.57, 0.36, -2.48, 1.49)
_TILTED = (0.9, -3.5, 6e-4, 3e-4, 5.2, 0.75, -3.3, 5.0, 1e-3, -1e-3, 8e-4, 2e-4, 0.008, -0.006)
LENSES = {
    "pinhole": (520.0, "plumb_bob", (0.0,) * 5),
    "barrel": (520.0, "plumb_bob", (-0.28, 0.074, 2e-4, 2e-5, 0.0)),
    "rational-8": (305.0, "rational_polynomial", _KINECT),
    "rational-12": (420.0, "rational_polynomial", _TILTED[:12]),
    "rational-14": (420.0, "rational_polynomial", _TILTED),
    "fisheye-111": (330.0, "equidistant", (-0.01, 0.02, -0.015, 0.003)),
    "fisheye-144": (250.0, "equidistant", (0.02, -0.01, 0.003, -0.0005)),
    "fisheye-190": (150.0, "equidistant", (-0.01, 0.005, -0.002, 0.0001)),
}
"""Focal length in pixels, model and coefficients. Fisheye lenses are named by their horizontal angle of view, degrees;
the last one by its vertical angle: its image has black corners."""


def directions(camera: Camera) -> np.ndarray:
    """Return the directions (2 H, 2 W, 3) of the quarters of a camera's pixels, unit vectors; NaN outside the lens."""
    shape = (_FINER * camera.height, _FINER * camera.width)
    y, x = (np.indices(shape) + 0.5) / _FINER - 0.5  # the centre of the top-left pixel is (0, 0)
    if camera.distortion_model != "equidistant":
        rays = np.ones((*shape, 3))
        rays[..., :2] = camera.normalise(np.column_stack([x.ravel(), y.ravel()])).reshape(*shape, 2)
        return np.asarray(rays / np.linalg.norm(rays, axis=2, keepdims=True))
    # Camera supports only directions up to 89 degrees from the axis.
    x, y = (x - camera.matrix[0, 2]) / camera.matrix[0, 0], (y - camera.matrix[1, 2]) / camera.matrix[1, 1]
    angles = np.linspace(0, math.radians(130), 100_000)
    radii = angles * (1 + (angles[:, None] ** [2, 4, 6, 8]) @ camera.distortion)
    grows = np.maximum.accumulate(radii) == radii
    radius = np.hypot(x, y)
    angle = np.interp(radius, radii[grows], angles[grows], right=np.nan)
    across = np.sin(angle) / np.maximum(radius, 1e-12)
    return np.stack([x * across, y * across, np.cos(angle)], axis=-1)


def photograph(scene: Scene, pose: Pose, camera: Camera, rays: np.ndarray, seed: int) -> np.ndarray:
    """Render the grey image (H, W) of a camera with these directions (2 H, 2 W, 3)."""
    focal = _FINER * camera.focal
    width = round(focal / 0.49)  # a little over 90 degrees
    middle = (width - 1) / 2
    side = Camera(width, width, np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]]))
    turns = [cv2.Rodrigues(math.pi / 2 * np.array(axis))[0] for axis in _SIDES]
    which = np.argmax([np.nan_to_num(rays @ turn[:, 2], nan=-2.0) for turn in turns], axis=0)
    which[np.isnan(rays[..., 0])] = -1
    fine = np.zeros(rays.shape[:2], np.float32)
    for number, turn in enumerate(turns):
        mine = which == number
        if mine.any():
            view = cv2.cvtColor(scene.render(pose.rotation @ turn, pose.position, side).image, cv2.COLOR_RGB2GRAY)
            local = (rays @ turn).astype(np.float32)
            with np.errstate(all="ignore"):
                x, y = (np.float32(focal) * local[..., axis] / local[..., 2] + np.float32(middle) for axis in (0, 1))
            fine[mine] = cv2.remap(view, x, y, cv2.INTER_CUBIC)[mine]
    image = _pixels(fine)
    lit = _pixels(which >= 0) > 0
    image[lit] += np.random.default_rng(seed).normal(0, _NOISE, np.count_nonzero(lit))
    return np.asarray(np.clip(np.round(image), 0, 255).astype(np.uint8))


def _pixels(fine: np.ndarray) -> np.ndarray:
    """Average quarters of pixels (2 H, 2 W) to pixels (H, W)."""
    height, width = fine.shape
    return np.asarray(fine.reshape(height // _FINER, _FINER, width // _FINER, _FINER).mean(axis=(1, 3)))


_SIDES = [(0, 0, 0), (0, 1, 0), (0, -1, 0), (0, 2, 0), (1, 0, 0), (-1, 0, 0)]  # quarter turns


def main() -> None:
    """Print a line for each lens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lenses", nargs="+", choices=LENSES, default=list(LENSES), metavar="LENS")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--start", type=int, default=20, help="first frame of the walk")
    parser.add_argument("--seed", type=int, default=3, help="courtyard")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    front_end = FrontEnd(Parameters(device=options.device, precision="float32"))
    scene, poses = Scene(options.seed), camera_path(options.start + options.frames)[options.start :]
    print("lens         poses  rotation, median (largest)  direction, median (largest)  NEES, of 5  inliers of matches")
    for name in options.lenses:
        focal, model, coefficients = LENSES[name]
        matrix = np.array([[focal, 0, 0.503 * 640], [0, 1.002 * focal, 0.491 * 480], [0, 0, 1]])
        camera = Camera(640, 480, matrix, model, np.array(coefficients))
        rays, found, counts = directions(camera), [], []
        front_end.reset()
        for number, pose in enumerate(poses):
            image = photograph(scene, pose, camera, rays, 1000 * options.seed + number)
            pair = front_end.register_frame(image, (number + 1) * 10**8, camera)[1]
            if pair is not None and pair.pose.status is PoseStatus.OK:
                outcome = judge(pair.pose, relative_motion(poses[pair.reference.stamp // 10**8 - 1], pose))
                found.append((outcome.rotation, outcome.direction, outcome.nees))
                counts.append((pair.pose.num_inliers, pair.pose.num_matches))
        (turn, shift, _), (largest_turn, largest_shift, _) = np.median(found, axis=0), np.max(found, axis=0)
        inliers, matches = np.mean(counts, axis=0)
        print(
            f"{name:12s} {len(found)} of {options.frames - 1}  {turn:.4f} ({largest_turn:.4f}) degrees  {shift:.3f} "
            f"({largest_shift:.3f}) degrees  {np.mean(found, axis=0)[2]:.1f}  {inliers:.0f} of {matches:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
