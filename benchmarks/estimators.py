"""Accuracy and speed of estimators of the relative pose, on the same matches.

    tools/with_ros python benchmarks/estimators.py --data FOLDER      # image pairs with ground truth, then scenes
    tools/with_ros python benchmarks/estimators.py                    # only simulated scenes

FOLDER holds image pairs and `pairs_with_gt.txt`, a line for each: image0 image1 rot0 rot1 K0(9) K1(9) T_0to1(16),
row-major, K for the images' size. They are matched once, with this package's default weights or others (--extractor,
--matcher). All estimators get the same matches, in several orders (--orders), because the result of RANSAC depends on
the order, and the results of only a few pairs would depend on chance.

The error of a pose is the larger of two angles: that of the rotation, and that between the directions of the
translations, including their sign. A missing pose has an error of 180 degrees. AUC at x degrees is the area under the
curve of the share of poses by their error, from 0 to x, divided by x.

It compares OpenCV's findEssentialMat with plain RANSAC and with three methods of the USAC family, each followed by
recoverPose; PoseLib, if it is installed (pip install poselib); and
kpmatch_ros.geometry.two_view.estimate_relative_pose.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.tables import format_table

Array = NDArray[np.float64]
BOUNDS = (5.0, 10.0, 20.0)  # degrees
CONFIDENCE = 0.99999  # of RANSAC
ITERATIONS = 10_000  # at most: OpenCV's 1,000 are too few, CONFIDENCE needs 4,700 if 70 % of the matches are wrong


class Motion(NamedTuple):
    """x_0 = rotation x_1 + translation; the translation's length is unknown."""

    rotation: Array
    translation: Array

    def inverse(self) -> Motion:
        return Motion(self.rotation.T, -self.rotation.T @ self.translation)


@dataclass(frozen=True)
class Problem:
    """Matches (M, 2) in pixels, their cameras, and the true motion."""

    points0: Array
    points1: Array
    camera0: Camera
    camera1: Camera
    truth: Motion
    resolution: float = 1.0  # distance between the positions that a keypoint can have, pixels

    def shuffled(self, seed: int) -> Problem:
        order = np.random.default_rng(seed).permutation(len(self.points0))
        return replace(self, points0=self.points0[order], points1=self.points1[order])


Estimator = Callable[[Problem, float], "Motion | None"]


# The estimators. They take a problem and the inlier threshold in pixels, and return a motion or None.


def without_distortion(problem: Problem) -> tuple[float, Array, Array]:
    """Return the cameras' mean focal length, and both points (M, 2) in pixels of a pinhole camera, from its centre."""
    focal = (problem.camera0.focal + problem.camera1.focal) / 2
    return focal, focal * problem.camera0.normalise(problem.points0), focal * problem.camera1.normalise(problem.points1)


def opencv(method: int) -> Estimator:
    """Estimator that uses findEssentialMat and recoverPose."""

    def estimate(problem: Problem, gate: float) -> Motion | None:
        # In pixels, because MAGSAC gives wrong results in units of the focal length.
        focal, points0, points1 = without_distortion(problem)
        matrix = np.diag([focal, focal, 1.0])
        if len(points0) < 5:
            return None
        essentials, mask = cv2.findEssentialMat(
            points0, points1, matrix, method=method, prob=CONFIDENCE, threshold=gate, maxIters=ITERATIONS
        )
        best, motion = 0, None
        for essential in [] if essentials is None else np.split(essentials, len(essentials) // 3):
            # By default, points farther than 50 baselines are ignored. With a small motion hardly any would remain.
            count, rotation, translation, _, _ = cv2.recoverPose(
                essential, points0, points1, matrix, distanceThresh=1e9, mask=mask.copy()
            )
            if count > best:  # OpenCV's motion maps points of image 0 to image 1
                best, motion = count, Motion(rotation, translation.ravel()).inverse()
        return motion

    return estimate


def ours(problem: Problem, gate: float) -> Motion | None:
    """Estimator of kpmatch_ros.geometry.two_view."""
    pose = estimate_relative_pose(
        problem.points0, problem.points1, problem.camera0, problem.camera1, max_reprojection_error=gate,
        keypoint_resolution=problem.resolution,
    )  # fmt: skip
    known = pose.status in (PoseStatus.OK, PoseStatus.AMBIGUOUS)  # AMBIGUOUS: the likelier motion, as the others give
    return Motion(pose.rotation, pose.translation) if known else None


def estimators() -> dict[str, Estimator]:
    """Return all estimators that are installed, by name."""
    found: dict[str, Estimator] = {
        "OpenCV RANSAC": opencv(cv2.RANSAC),
        "OpenCV USAC_DEFAULT": opencv(cv2.USAC_DEFAULT),
        "OpenCV USAC_ACCURATE": opencv(cv2.USAC_ACCURATE),
        "OpenCV USAC_MAGSAC": opencv(cv2.USAC_MAGSAC),
    }
    try:
        import poselib
    except ImportError:
        pass
    else:

        def lo_ransac(problem: Problem, gate: float) -> Motion | None:
            focal, *points = without_distortion(problem)
            camera = {"model": "SIMPLE_PINHOLE", "width": 0, "height": 0, "params": [focal, 0.0, 0.0]}
            pose, _ = poselib.estimate_relative_pose(*points, camera, camera, {"max_epipolar_error": gate}, {})
            return Motion(np.array(pose.R), np.array(pose.t)).inverse() if np.any(pose.t) else None

        found["PoseLib"] = lo_ransac
    found["kpmatch_ros"] = ours
    return found


# Measuring


def error_of(found: Motion | None, truth: Motion) -> tuple[float, float]:
    """Return the errors of the rotation and of the translation's direction, degrees."""
    if found is None:
        return 180.0, 180.0
    turned = Rotation.from_matrix(found.rotation.T @ truth.rotation).magnitude()
    a, b = found.translation, truth.translation
    return math.degrees(turned), math.degrees(math.atan2(np.linalg.norm(np.cross(a, b)), a @ b))


def area_under_curve(errors: Sequence[float], bound: float) -> float:
    """Mean of the share of errors up to x, over x from 0 to the bound: 0 to 1."""
    return float(np.mean(np.clip(1 - np.array(errors) / bound, 0, 1)))


def measure(estimator: Estimator, problems: Sequence[Problem], gate: float) -> tuple[list[tuple[float, float]], float]:
    """Return the errors and the median processor time of a call, milliseconds."""
    errors, times = [], []
    for problem in problems:
        started = time.process_time()
        found = estimator(problem, gate)
        times.append(time.process_time() - started)
        errors.append(error_of(found, problem.truth))
    return errors, 1e3 * float(np.median(times))


def compare(title: str, problems: Sequence[Problem], gate: float, only: str = "") -> None:
    """Print a table with a line for each estimator."""
    rows = [("", *(f"AUC@{bound:g}" for bound in BOUNDS), "rotation", "direction", "time")]
    for name, estimator in estimators().items():
        if only not in name:
            continue
        errors, milliseconds = measure(estimator, problems, gate)
        largest = [max(error) for error in errors]
        rotation, direction = np.median(errors, axis=0)
        rows.append(
            (
                name,
                *(f"{100 * area_under_curve(largest, bound):.1f}" for bound in BOUNDS),
                f"{rotation:.3f}°",
                f"{direction:.2f}°",
                f"{milliseconds:.1f} ms",
            )
        )
    print(f"\n{title}\n{format_table(rows, right=range(1, 7))}", flush=True)


# Image pairs


def read_pairs(folder: Path, **options: Any) -> Iterator[Problem]:
    """Yield the matched pairs of a folder; `options` are FeatureMatcher's."""
    from kpmatch_ros import FeatureMatcher

    matcher = FeatureMatcher(**options)
    for line in (folder / "pairs_with_gt.txt").read_text().splitlines():
        names, numbers = line.split()[:2], np.array(line.split()[2:], np.float64)
        if numbers[:2].any():
            raise SystemExit(f"{folder}: {names} are rotated, which is not supported here")
        truth = numbers[20:].reshape(4, 4)
        images = [cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2RGB) for name in names]
        (height0, width0), (height1, width1) = (image.shape[:2] for image in images)
        features = [matcher.extract(image) for image in images]
        matches = matcher.match(*features).numpy()
        points0, points1 = (
            np.asarray(one.numpy().keypoints[matches.indices[:, side]], np.float64) for side, one in enumerate(features)
        )
        yield Problem(
            points0,
            points1,
            Camera(width0, height0, numbers[2:11].reshape(3, 3)),
            Camera(width1, height1, numbers[11:20].reshape(3, 3)),
            Motion(truth[:3, :3], truth[:3, 3]).inverse(),  # T_0to1 maps points of image 0 to image 1
            max(width0, height0) / options["resize"] if options.get("resize") else 1.0,
        )


# Simulated scenes


@dataclass(frozen=True)
class Scene:
    """Random points in front of a camera that rotates by a few degrees and moves, with noise and wrong matches.

    Depths are 2 to 10 metres unless the scene is a plane. A part of the points may move independently, as one body.
    """

    title: str
    moved: tuple[float, float, float] = (0.4, 0.1, 0.2)  # metres, roughly
    turned: float = 6.0  # degrees
    outliers: float = 0.3
    plane: bool = False
    moving: float = 0.0
    noise: float = 0.5  # pixels

    def problem(self, count: int, seed: int) -> Problem:
        random = np.random.default_rng(seed)
        camera = Camera(640, 480, np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]]))
        size = (camera.width, camera.height)
        rotation = Rotation.from_rotvec(np.radians(self.turned) * random.normal(size=3) / math.sqrt(3)).as_matrix()
        translation = np.array(self.moved) * random.uniform(0.5, 1.5, 3)
        tilt = random.uniform(-0.15, 0.15, 2)
        body = random.uniform(0.2, 0.5) * np.array([random.choice([-1, 1]), random.uniform(-0.3, 0.3), 0])
        found: list[Array] = []
        while sum(map(len, found)) < count:
            pixels0 = random.uniform((0, 0), size, (4 * count, 2))
            rays = np.column_stack([camera.normalise(pixels0), np.ones(4 * count)])
            inverse_depth = random.uniform(0.1, 0.5, 4 * count)
            if self.plane:
                inverse_depth = rays @ (*tilt, 0.25)
            points = rays / np.maximum(inverse_depth, 0.05)[:, None]
            nearest = np.argsort(-inverse_depth)[: round(self.moving * len(points))]
            points[nearest] += body
            seen = (points - translation) @ rotation
            ahead = seen[:, 2] > 0.3
            pixels1 = seen[ahead] @ camera.matrix.T
            both = np.hstack([pixels0[ahead], pixels1[:, :2] / pixels1[:, 2:]])
            found.append(both[((both[:, 2:] >= 0) & (both[:, 2:] < size)).all(axis=1)])
        pixels = random.permutation(np.concatenate(found))[:count]
        pixels += self.noise * random.normal(size=pixels.shape)
        wrong = random.permutation(count) < round(self.outliers * count)
        pixels[wrong, 2:] = random.uniform((0, 0), size, (wrong.sum(), 2))
        return Problem(pixels[:, :2], pixels[:, 2:], camera, camera, Motion(rotation, translation), 0.0)


SCENES = (
    Scene("general motion, 30 % wrong matches"),
    Scene("general motion, 60 % wrong matches", outliers=0.6),
    Scene("a plane, 30 % wrong matches", plane=True),
    Scene("forward motion, 30 % wrong matches", moved=(0.02, 0.01, 0.5)),
    Scene("small parallax (about 4 pixels), 30 % wrong matches", moved=(0.03, 0.01, 0.01), turned=2.0),
    Scene("foreground of 25 % that moves on its own, 20 % wrong matches", moving=0.25, outliers=0.2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="image pairs with ground truth")
    parser.add_argument(
        "--orders", type=int, default=10, help="number of orders of the matches of each pair (default 10)"
    )
    parser.add_argument("--gate", type=float, default=1.0, help="inlier threshold, pixels (default 1)")
    parser.add_argument("--extractor", default="superpoint-open")
    parser.add_argument("--matcher", default="lightglue-superpoint-open")
    parser.add_argument("--precision", default="float32", help="of the networks (default float32)")
    parser.add_argument(
        "--resize", type=int, default=0, help="longest image side for the extractor, pixels (default: original size)"
    )
    parser.add_argument("--max-keypoints", type=int, default=1024)
    parser.add_argument(
        "--matches", type=int, nargs="*", default=[300], help="number of matches of a scene (default 300)"
    )
    parser.add_argument("--scenes", type=int, default=50, help="number of scenes of each kind, 0 for none (default 50)")
    parser.add_argument("--only", default="", help="only estimators whose names contain this text")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.data is not None:
        names = ("extractor", "matcher", "precision", "resize", "max_keypoints")
        pairs = list(read_pairs(options.data, **{name: getattr(options, name) for name in names}))
        title = f"{len(pairs)} image pairs, {', '.join(str(len(pair.points0)) for pair in pairs)} matches"
        shuffled = [pair.shuffled(order) for pair in pairs for order in range(options.orders)]
        compare(f"{title}, in {options.orders} orders", shuffled, options.gate, options.only)
    for count in options.matches if options.scenes else ():
        for scene in SCENES:
            problems = [scene.problem(count, seed) for seed in range(options.scenes)]
            compare(f"{options.scenes} scenes of {count} matches: {scene.title}", problems, options.gate, options.only)


if __name__ == "__main__":
    main()
