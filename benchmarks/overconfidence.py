"""How often is a relative pose wrong although it claims to be reliable?

    tools/with_ros python benchmarks/overconfidence.py            # planes and bodies, seconds
    tools/with_ros python benchmarks/overconfidence.py --walks    # and the rendered walk, with one and with two cameras

A pose is "wrong and sure" if its status is OK and its error exceeds five of its own standard deviations and also half a
degree of rotation or five degrees of the translation's direction. With two cameras, five degrees are 9 % of the
distance.

Planes: 300 points of a tilted plane, 640 x 480 pixels, 0.1 to 0.5 pixels of noise, 10 % wrong matches. Bodies: 600
matches of a scene of 2 to 10 metres depth, 0.1 pixels of noise, 10 % wrong matches; the lower part of the image shows
the robot's own body, which moves with the camera.

Movers: 500 matches of such a scene, 0.3 pixels of noise, 10 % wrong matches; the camera stands or rotates. One or three
round objects, each covering the given share of the image, move by 1.5 to 30 pixels and grow or shrink by up to a tenth.
Any translation is wrong.

Weak: 40 to 160 matches of whole or nearly whole pixels (0.4 to 1.2 pixels of noise, half of the pairs with the tails of
Student's distribution of three degrees of freedom) and 10 to 35 % wrong ones, half of them near the true position; wide
baselines, rotations of 3 to 35 degrees. The scene is a floor and a box on it, a small part of the image, two planes, or
a plane with a few points in front of it. Coarse keypoints: a floor and a box, with a noise of 1.5 to 4 pixels, above
the inlier threshold.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose, PoseStatus, RelativePose, relative_motion
from kpmatch_ros.geometry.refinement import REFINED_RESOLUTION
from kpmatch_ros.geometry.two_view import estimate_relative_pose

CAMERA = Camera(640, 480, np.array([[500.0, 0, 319.5], [0, 500.0, 239.5], [0, 0, 1]]))
TILTS = (0, 15, 30, 45, 60)  # degrees
MOTIONS = ("sideways", "towards", "any")
WEAK = ("floor and box", "small area", "two planes", "plane and a few points", "coarse keypoints")
BODIES = (0.15, 0.25, 0.33, 0.4, 0.5, 0.6)  # share of the image
MOVERS = ((0.05, 1), (0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1), (0.05, 3), (0.1, 3))  # share of the image, objects

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """Matches, pixels (n, 2), of two views of CAMERA, and the true motion, of any length."""

    points0: Array
    points1: Array
    truth: Pose

    resolution: float = REFINED_RESOLUTION

    def estimate(self) -> RelativePose:
        return estimate_relative_pose(self.points0, self.points1, CAMERA, CAMERA, keypoint_resolution=self.resolution)


def plane(tilt: float, motion: str, seed: int, count: int = 300) -> Problem:
    """Points of one plane, tilted by ``tilt`` degrees; a motion sideways, towards the plane, or in any direction."""
    random = np.random.default_rng(seed)
    around = random.uniform(0, 2 * math.pi)
    normal = Rotation.from_rotvec(math.radians(tilt) * np.array([math.cos(around), math.sin(around), 0.0])).apply(
        [0.0, 0.0, 1.0]
    )
    direction = {
        "sideways": np.append(_unit(random.normal(size=2)), 0.0),
        "towards": _unit(np.array([0.0, 0.0, 1.0]) + 0.05 * random.normal(size=3)),
        "any": _unit(random.normal(size=3)),
    }[motion]
    truth = Pose(_turn(random, 5.0), direction * random.uniform(0.1, 0.3))  # the plane is at a distance of 1

    def depths(rays: Array) -> Array:
        return 1.0 / np.maximum(rays @ normal / normal[2], 1e-3)

    return _see(random, truth, depths, count, noise=random.uniform(0.1, 0.5))


def body(part: float, seed: int, count: int = 600) -> Problem:
    """A scene, and in front of it, in the lower part of the image, the robot's own body."""
    random = np.random.default_rng(seed)
    step = np.array([random.normal(0, 0.05), random.normal(0, 0.02), random.uniform(0.15, 0.35)])
    truth = Pose(_turn(random, 3.0), step)
    noise = 0.1
    scene = _see(random, truth, lambda rays: 1 / random.uniform(0.1, 0.5, len(rays)), count, noise)
    own = scene.points0[:, 1] > (1 - part) * CAMERA.height
    right = own & (random.uniform(size=count) > 0.1)
    scene.points1[right] = scene.points0[right] + noise * random.normal(size=(right.sum(), 2))
    return scene


def masked_body(part: float, seed: int, count: int = 600) -> Problem:
    """The scene of :func:`body` with a mask over the robot's body: as many keypoints, all of them above it."""
    found = body(part, seed, round(count / (1 - part)))
    above = found.points0[:, 1] <= (1 - part) * CAMERA.height
    return Problem(found.points0[above], found.points1[above], found.truth)


def mover(part: float, stands: bool, seed: int, things: int = 1) -> Problem:
    """Independently moving objects, each covering a share of the image, with a camera that stands or rotates."""
    random = np.random.default_rng(seed)
    truth = Pose(_turn(random, 0.0 if stands else 5.0), np.zeros(3))
    scene = _see(random, truth, lambda rays: 1 / random.uniform(0.1, 0.5, len(rays)), 500, noise=0.3)
    radius = math.sqrt(part * CAMERA.width * CAMERA.height / math.pi)
    for _ in range(things):
        middle = random.uniform((0.2 * CAMERA.width, 0.2 * CAMERA.height), (0.8 * CAMERA.width, 0.8 * CAMERA.height))
        move = math.exp(random.uniform(math.log(1.5), math.log(30))) * _unit(random.normal(size=2))
        away = scene.points0 - middle
        on_it = np.linalg.norm(away, axis=1) < radius
        scene.points1[on_it] += move + random.uniform(-0.1, 0.1) * away[on_it]
    return scene


def weak(kind: str, seed: int) -> Problem:
    """A scene, one of WEAK, that hardly constrains the motion."""
    random = np.random.default_rng(seed)
    noise = random.uniform(1.5, 4.0) if kind == "coarse keypoints" else random.uniform(0.4, 1.2)
    wrong, count = random.uniform(0.1, 0.35), int(random.integers(40, 160))
    while True:
        depths, corners = _surfaces(kind, random)
        turn = math.radians(random.uniform(3, 35)) * _unit(random.normal(size=3) * (0.5, 1.0, 0.3))
        shift = random.uniform(0.2, 1.2) * _unit(random.normal(size=3) * (1.0, 0.3, 0.8))
        truth = Pose(Rotation.from_rotvec(turn).as_matrix(), shift)
        try:
            exact = _see(random, truth, depths, count, noise=0.0, wrong=0.0, corners=corners)
        except LookupError:  # the overlap of the two cameras' images is too small
            continue
        both = np.hstack([exact.points0, exact.points1])
        both += noise * (random.standard_t(3, both.shape) if seed % 2 else random.normal(size=both.shape))
        lost = random.permutation(count) < wrong * count
        near = lost & (random.uniform(size=count) < 0.5)
        both[lost, 2:] = random.uniform((0, 0), (CAMERA.width, CAMERA.height), (lost.sum(), 2))
        both[near, 2:] = exact.points1[near] + random.normal(0, 8, (near.sum(), 2))
        if seed % 3 == 0:
            both = np.round(both)
        return Problem(both[:, :2].copy(), both[:, 2:].copy(), truth, resolution=1.0)


def _surfaces(kind: str, random: np.random.Generator) -> tuple[Callable[[Array], Array], Array]:
    """Return a function for depths (n,) of rays (n, 3), and the corners (2, 2) of the image part that has matches."""
    whole = np.array([[0.0, 0.0], [CAMERA.width, CAMERA.height]])
    one, other = (_unit(np.append(random.normal(0, 0.5, 2), 1.0)) for _ in range(2))
    near, far = random.uniform(1.5, 3.0, 2)
    if kind in ("floor and box", "coarse keypoints"):
        pitch, height, side = math.radians(random.uniform(10, 40)), random.uniform(1.0, 1.6), random.uniform(-0.8, 0.8)
        up, width = np.array([0.0, -math.cos(pitch), -math.sin(pitch)]), random.uniform(0.5, 1.5)

        def floor_and_box(rays: Array) -> Array:
            floor = np.minimum(-height / np.minimum(rays @ up, -1e-3), 20.0)
            box = near / np.maximum(rays @ one, 0.1)
            points = rays * box[:, None]
            above = points @ up + height
            return np.where((np.abs(points[:, 0] - side) < width) & (above > 0) & (above < 0.9), box, floor)

        return floor_and_box, whole + [[0, 120], [0, 0]]
    if kind == "small area":
        corner, size, relief = random.uniform((60, 60), (400, 280)), random.uniform(120, 180), random.uniform(0.1, 0.4)
        return lambda rays: near * (1 + relief * random.uniform(-1, 1, len(rays))), np.array([corner, corner + size])
    if kind == "two planes":
        edge = random.uniform(-0.25, 0.25)
        return lambda rays: np.where(rays[:, 0] < edge, near / (rays @ one), far / (rays @ other)), whole
    part = random.uniform(0.03, 0.15)
    return (
        lambda rays: (
            near
            / np.maximum(rays @ one, 0.1)
            * np.where(random.uniform(size=len(rays)) < part, random.uniform(0.5, 0.95, len(rays)), 1.0)
        )
    ), whole


def _see(
    random: np.random.Generator,
    truth: Pose,
    depths: Callable[[Array], Array],
    count: int,
    noise: float,
    wrong: float = 0.1,
    corners: Array | None = None,
) -> Problem:
    """Return matches of a scene. Raises LookupError if the current camera sees too little of it."""
    low, high = ((0, 0), (CAMERA.width, CAMERA.height)) if corners is None else corners
    found: list[Array] = []
    for _ in range(200):
        pixels = random.uniform(low, high, (4 * count, 2))
        rays = np.column_stack([CAMERA.normalise(pixels), np.ones(len(pixels))])
        depth = depths(rays)
        seen = (rays * depth[:, None] - truth.position) @ truth.rotation
        ahead = (seen[:, 2] > 0.05) & (depth > 0)
        image = seen[ahead] @ CAMERA.matrix.T
        both = np.hstack([pixels[ahead], image[:, :2] / image[:, 2:]])
        found.append(both[((both[:, 2:] >= 0) & (both[:, 2:] < (CAMERA.width, CAMERA.height))).all(axis=1)])
        if sum(map(len, found)) >= count:
            break
    else:
        raise LookupError("the current camera sees too little of this scene")
    both = np.concatenate(found)[:count]
    both += noise * random.normal(size=both.shape)
    lost = random.permutation(count) < wrong * count
    both[lost, 2:] = random.uniform((0, 0), (CAMERA.width, CAMERA.height), (lost.sum(), 2))
    return Problem(both[:, :2].copy(), both[:, 2:].copy(), truth)


def _turn(random: np.random.Generator, degrees: float) -> Array:
    return Rotation.from_rotvec(math.radians(degrees) * random.normal(size=3) / math.sqrt(3)).as_matrix()


def _unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one pair.

    Attributes:
        status: status of the pose.
        rotation: error of the rotation, degrees.
        direction: error of the translation's direction, degrees; NaN if the camera does not move.
        wrong_and_sure: see the beginning of this file. If the camera does not move, any translation is wrong.
        nees: e' C^-1 e of the error e; NaN unless the status is OK.
    """

    status: PoseStatus
    rotation: float
    direction: float
    wrong_and_sure: bool
    nees: float


def judge(pose: RelativePose, truth: Pose) -> Outcome:
    """Compare a pose with the truth."""
    turn = Rotation.from_matrix(truth.rotation @ pose.rotation.T).as_rotvec()
    length = float(np.linalg.norm(truth.position))
    rotation = math.degrees(float(np.linalg.norm(turn)))
    if length == 0:
        return Outcome(pose.status, rotation, math.nan, pose.status is PoseStatus.OK, math.nan)
    shift = truth.position - pose.translation if pose.metric else truth.position / length - pose.translation
    away = float(np.linalg.norm(shift)) / (length if pose.metric else 1.0)
    direction = math.degrees(2 * math.asin(min(1.0, away / 2)))
    if pose.status is not PoseStatus.OK:
        return Outcome(pose.status, rotation, direction, False, math.nan)
    above = [
        error @ error > 25 * (error @ block @ error) / max(error @ error, 1e-30)
        for error, block in ((turn, pose.covariance[3:, 3:]), (shift, pose.covariance[:3, :3]))
    ]
    wrong = (above[0] and rotation > 0.5) or (above[1] and direction > 5.0)
    error = np.concatenate([shift, turn])
    nees = float(error @ np.linalg.pinv(pose.covariance, rcond=1e-9, hermitian=True) @ error)
    return Outcome(pose.status, rotation, direction, bool(wrong), nees)


def report(title: str, outcomes: list[Outcome], milliseconds: float = math.nan) -> None:
    """Print a line: statuses, medians of the OK poses' errors, NEES, and the share that is wrong and sure.

    A consistent NEES has a mean of 5 and a median of 4.35 with one camera, and of 6 and 5.35 with two.
    """
    counts = Counter(outcome.status.name for outcome in outcomes)
    shares = " ".join(f"{name} {100 * number / len(outcomes):.0f}%" for name, number in counts.most_common())
    good = [outcome for outcome in outcomes if outcome.status is PoseStatus.OK]
    wrong = sum(outcome.wrong_and_sure for outcome in outcomes)
    middle = [
        np.median([getattr(one, name) for one in good]) if good else math.nan for name in ("rotation", "direction")
    ]
    nees = [one.nees for one in good] or [math.nan]
    print(
        f"{title:24} wrong and sure {wrong:3d} of {len(outcomes):3d} ({100 * wrong / len(outcomes):4.1f} %)  "
        f"median {middle[0]:.3f} deg {middle[1]:.2f} deg  "
        f"NEES mean {np.mean(nees):5.2f} median {np.median(nees):5.2f}  {milliseconds:5.1f} ms  {shares}",
        flush=True,
    )


def measure(title: str, problems: Iterable[Problem]) -> list[Outcome]:
    """Estimate, judge and report the poses of problems."""
    problems = list(problems)
    started = time.process_time()
    poses = [problem.estimate() for problem in problems]
    milliseconds = (time.process_time() - started) * 1e3 / len(problems)
    outcomes = [judge(pose, problem.truth) for pose, problem in zip(poses, problems)]
    report(title, outcomes, milliseconds)
    return outcomes


def walk(frames: int, seed: int, stereo: bool) -> Iterator[Outcome]:
    """Yield the outcomes of the rendered walk through the courtyard, with the default parameters."""
    from kpmatch_ros.front_end import FrontEnd
    from kpmatch_ros.geometry.stereo_camera import StereoCamera
    from kpmatch_ros.parameters import Parameters
    from simulation import Scene, camera_path, demo_camera, stereo_right

    baseline, eye = 0.12, demo_camera(distorted=False)
    front_end = FrontEnd(Parameters(device="cpu", rectified=True))
    poses = camera_path(frames + 20 * seed)[20 * seed :]
    paths = [poses, [stereo_right(pose, baseline) for pose in poses]] if stereo else [poses]
    rig = StereoCamera(eye, eye, np.eye(3), np.array([-baseline, 0.0, 0.0])) if stereo else eye
    # A frame's noise seed is the film's seed plus the frame's number. The two films' seeds are far apart, so that their
    # noise is independent.
    films = [Scene(seed).film(path, eye, noise=2.0, noise_seed=10**6 * side) for side, path in enumerate(paths)]
    for number, views in enumerate(zip(*films)):
        images = [cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY) for view in views]
        pair = front_end.register(images, [(number + 1) * 10**8] * len(images), rig).pair
        if pair is not None:
            yield judge(pair.pose, relative_motion(poses[pair.reference.stamp // 10**8 - 1], poses[number]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, default=200, help="pairs (default 200)")
    parser.add_argument("--bodies", type=int, default=100, help="pairs (default 100)")
    parser.add_argument("--movers", type=int, default=280, help="pairs (default 280)")
    parser.add_argument(
        "--weak", type=int, default=200, help="pairs of scenes that constrain the motion weakly (default 200)"
    )
    parser.add_argument("--walks", action="store_true", help="also the rendered walk")
    parser.add_argument("--frames", type=int, default=21, help="number of frames of the walk (default 21)")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    each = max(1, round(options.planes / len(TILTS) / len(MOTIONS)))
    planes = []
    for motion in MOTIONS:
        cases = [plane(tilt, motion, 100 * tilt + seed) for tilt in TILTS for seed in range(each)]
        planes += measure(f"planes, {motion}", cases)
    report("planes, all", planes)
    for part in BODIES:
        count = max(1, round(options.bodies / len(BODIES)))
        measure(f"body of {100 * part:.0f} %", [body(part, seed) for seed in range(count)])
        measure(f"body of {100 * part:.0f} %, masked", [masked_body(part, seed) for seed in range(count)])
    for part, things in MOVERS:
        count = max(1, round(options.movers / len(MOVERS) / 2))
        for stands in (True, False):
            title = f"{things} of {100 * part:.0f} % moves, {'stands' if stands else 'turns'}"
            measure(title, [mover(part, stands, 1000 + seed, things) for seed in range(count)])
    for kind in WEAK:
        count = max(1, round(options.weak / len(WEAK)))
        measure(kind, [weak(kind, seed) for seed in range(count)])
    if options.walks:
        report("walk, one camera", list(walk(options.frames, 1, stereo=False)))
        report("walk, stereo", list(walk(options.frames, 1, stereo=True)))


if __name__ == "__main__":
    main()
