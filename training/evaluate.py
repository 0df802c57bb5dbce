"""Compare matchers on the same images, with the same number of keypoints and the same geometry: one table.

    python training/evaluate.py --weights runs/export --scannet FOLDER

Groups of pairs: views of held-out pictures through homographies, the same degraded (low light, noise, blur...),
graf1-graf3, aloe, and ScanNet pairs where a folder is given. A match is correct within 3 pixels of its true place; on
ScanNet, where its symmetric epipolar distance is under 5e-4.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from common import (
    Array,
    add_data_option,
    choose_device,
    degrade,
    generator,
    inside,
    log_line,
    pictures,
    project,
    random_crop,
    random_homography,
    read_rgb,
    versions,
    warp,
    write_json,
)
from torch import nn
from tqdm import tqdm
from train_superpoint import load_superpoint

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.models import LightGlue
from kpmatch_ros.models.aliked import ALIKED
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.disk import DISK

CORRECT = 3.0  # pixels
EPIPOLAR = 5e-4
SIZE = (640, 480)
BASE = (960, 720)
LARGE = 600  # pixels: the shorter side of pictures to take views of
ANGLES = (5, 10, 20)  # degrees
HOMOGRAPHY = 20  # what random numbers are for


# --- pairs -----------------------------------------------------------------------------------------------------------


@dataclass
class Pose:
    """The second camera against the first, x1 = rotation x0 + translation; the cameras' matrices (3, 3)."""

    rotation: Array
    translation: Array
    matrix0: Array
    matrix1: Array


@dataclass
class Pair:
    """Two RGB images (H, W, 3) uint8; ``correct`` judges matches (M, 2), (M, 2) -> (M,) bool."""

    group: str
    images: tuple[Array, Array]
    correct: Callable[[Array, Array], Array]
    pose: Pose | None = None


def by_homography(group: str, images: tuple[Array, Array], homography: Array) -> Pair:
    def correct(points0: Array, points1: Array) -> Array:
        return _near(project(homography, points0), points1)

    return Pair(group, images, correct)


def _near(expected: Array, points: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.linalg.norm(expected - points, axis=1) <= CORRECT


def homography_pairs(data: Path, count: int) -> Iterator[Pair]:
    """``count`` pairs in light that differs a little, then the same in grey and degraded."""
    found = [read_rgb(path) for path in pictures(data, "held-out")]
    large = [image for image in found if min(image.shape[:2]) >= LARGE]  # smaller ones would have to be blown up
    for number in range(count):
        rng = generator(HOMOGRAPHY, number)
        crop = random_crop(rng, large[number % len(large)], *BASE)
        between = np.zeros((3, 3))
        while shared(between) < 0.5:
            homographies = [random_homography(rng, BASE, SIZE, strength) for strength in (0.2, 0.7)]
            between = homographies[1] @ np.linalg.inv(homographies[0])
        views = [warp(crop, homography, SIZE) for homography in homographies]
        light = np.float32(rng.uniform(0.7, 1.3))
        second = views[1].astype(np.float32) * light + rng.standard_normal(views[1].shape, np.float32) * 3
        yield by_homography("homographies", (views[0], np.clip(second, 0, 255).astype(np.uint8)), between)
        greys = [degrade(rng, cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), 0.8) for view in views]
        yield by_homography("degraded", tuple(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB) for grey in greys), between)


def shared(homography: Array) -> float:
    """The share of an image of SIZE that a second one shows."""
    grid = np.stack(np.meshgrid(*(np.arange(0, side, 20) for side in SIZE)), axis=-1).reshape(-1, 2)
    return float(inside(project(homography, grid), SIZE).mean())


def opencv_pairs(data: Path) -> Iterator[Pair]:
    """graf1-graf3 and aloe, from Debian's opencv-doc."""
    folder = data / "unpacked/opencv-doc/usr/share/doc/opencv-doc/examples/data"
    store = cv2.FileStorage(str(folder / "H1to3p.xml"), cv2.FILE_STORAGE_READ)
    graf = store.getNode("H13").mat()
    store.release()
    yield by_homography("graf1-graf3", (read_rgb(folder / "graf1.png"), read_rgb(folder / "graf3.png")), graf)
    # Half as large, like what cameras give; the disparity is in pixels of the whole.
    images = tuple(
        cv2.resize(read_rgb(folder / name), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        for name in ("aloeL.jpg", "aloeR.jpg")
    )
    disparity = cv2.imread(str(folder / "aloeGT.png"), cv2.IMREAD_GRAYSCALE)[::2, ::2] / 2

    def correct(points0: Array, points1: Array) -> Array:
        x, y = np.round(points0).astype(int).T
        d = disparity[y.clip(0, len(disparity) - 1), x.clip(0, disparity.shape[1] - 1)]
        return (d > 0) & _near(points0 - np.c_[d, np.zeros_like(d)], points1)

    yield Pair("aloe", images, correct)


def scannet_pairs(folder: Path) -> Iterator[Pair]:
    """The pairs of ``pairs_with_gt.txt``: names, rotations, K0, K1 (9), T_0to1 (16)."""
    for line in (folder / "pairs_with_gt.txt").read_text().splitlines():
        names, numbers = line.split()[:2], np.array(line.split()[4:], dtype=float)
        originals = [read_rgb(folder / name) for name in names]
        images = tuple(cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA) for image in originals)
        scale = np.diag([SIZE[0] / originals[0].shape[1], SIZE[1] / originals[0].shape[0], 1.0])
        motion = numbers[18:].reshape(4, 4)
        pose = Pose(
            motion[:3, :3], motion[:3, 3], scale @ numbers[:9].reshape(3, 3), scale @ numbers[9:18].reshape(3, 3)
        )
        yield Pair("ScanNet", images, by_epipolar_lines(pose), pose)


def by_epipolar_lines(pose: Pose) -> Callable[[Array, Array], Array]:
    x, y, z = pose.translation
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose.rotation

    def correct(points0: Array, points1: Array) -> Array:
        rays0, rays1 = (
            np.c_[(p - k[:2, 2]) / np.diag(k)[:2], np.ones(len(p))]
            for p, k in ((points0, pose.matrix0), (points1, pose.matrix1))
        )
        lines1, lines0 = rays0 @ essential.T, rays1 @ essential
        product = (rays1 * lines1).sum(axis=1)
        weights = 1 / (lines1[:, :2] ** 2).sum(axis=1) + 1 / (lines0[:, :2] ** 2).sum(axis=1)
        return product**2 * weights < EPIPOLAR

    return correct


# --- matchers --------------------------------------------------------------------------------------------------------


class Matcher(Protocol):
    def __call__(self, image0: Array, image1: Array) -> tuple[Array, Array, int]:
        """Matched points (M, 2), (M, 2) of two RGB images, and how many keypoints there were in both on average."""


class Learned:
    """An extractor and its LightGlue, all layers, nothing pruned."""

    def __init__(self, extractor: nn.Module, matcher: LightGlue, keypoints: int, device: torch.device) -> None:
        self.extractor, self.matcher, self.device = extractor.to(device), matcher.to(device), device
        # The best so many, whatever their score: thresholds mean different things to different networks.
        self.extractor.max_keypoints, self.extractor.keypoint_threshold = keypoints, 0.0  # type: ignore[assignment]
        self.matcher.depth_confidence = self.matcher.width_confidence = -1.0
        self.colour = getattr(extractor, "CHANNELS", 1) == 3

    @torch.inference_mode()
    def __call__(self, image0: Array, image1: Array) -> tuple[Array, Array, int]:
        found = [self.extractor(self._pixels(image)) for image in (image0, image1)]
        features0, features1 = (
            ImageFeatures(
                f.keypoints[f.mask][None],
                f.descriptors[f.mask][None],
                torch.tensor([image.shape[1::-1]], device=self.device),
            )
            for f, image in zip(found, (image0, image1))
        )
        matches = self.matcher(features0, features1).matches0[0]
        chosen = matches >= 0
        points = features0.keypoints[0, chosen], features1.keypoints[0, matches[chosen]]
        count = (features0.num_keypoints + features1.num_keypoints) // 2
        return points[0].cpu().numpy(), points[1].cpu().numpy(), count

    def _pixels(self, image: Array) -> torch.Tensor:
        seen = image if self.colour else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
        return torch.from_numpy(seen).to(self.device).permute(2, 0, 1)[None].float() / 255


class Sift:
    """SIFT, matched with Lowe's ratio test in both directions."""

    def __init__(self, keypoints: int, ratio: float = 0.8) -> None:
        self.detector, self.ratio = cv2.SIFT_create(keypoints), ratio

    def __call__(self, image0: Array, image1: Array) -> tuple[Array, Array, int]:
        found = [
            self.detector.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None) for image in (image0, image1)
        ]
        points = [np.array([keypoint.pt for keypoint in keypoints]).reshape(-1, 2) for keypoints, _ in found]
        count = sum(map(len, points)) // 2
        if min(map(len, points)) < 2:
            return np.zeros((0, 2)), np.zeros((0, 2)), count
        forth, back = self._passing(found[0][1], found[1][1]), self._passing(found[1][1], found[0][1])
        mutual = [(i, j) for i, j in forth.items() if back.get(j) == i]
        index0, index1 = np.array(mutual, int).reshape(-1, 2).T
        return points[0][index0], points[1][index1], count

    def _passing(self, descriptors0: Array, descriptors1: Array) -> dict[int, int]:
        two = cv2.BFMatcher().knnMatch(descriptors0, descriptors1, k=2)
        return {best.queryIdx: best.trainIdx for best, second in two if best.distance < self.ratio * second.distance}


def make_matcher(name: str, arguments: argparse.Namespace, device: torch.device) -> Matcher:
    teachers, keypoints = arguments.data / "teachers", arguments.keypoints
    if name == "ours":
        extractor = load_superpoint(arguments.superpoint or arguments.weights)
        return Learned(extractor, LightGlue.from_pretrained(arguments.weights), keypoints, device)
    if name == "aliked":
        return Learned(
            ALIKED.from_pretrained(teachers / "aliked-n16.pth"),
            LightGlue.from_pretrained(teachers / "aliked_lightglue.pth"),
            keypoints,
            device,
        )
    if name == "disk":
        return Learned(
            DISK.from_pretrained(teachers / "disk-depth-save.pth"),
            LightGlue.from_pretrained(teachers / "disk_lightglue.pth"),
            keypoints,
            device,
        )
    return Sift(keypoints)


NAMES = {"ours": "ours", "aliked": "ALIKED+LightGlue", "disk": "DISK+LightGlue", "sift": "SIFT, ratio test"}


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a matcher did with a pair; ``error`` of its pose in degrees, infinite without one, None without truth."""

    group: str
    keypoints: int
    matches: int
    correct: int
    error: float | None


def judge(pair: Pair, matcher: Matcher) -> Result:
    points0, points1, keypoints = matcher(*pair.images)
    points0, points1 = (points.astype(np.float64) for points in (points0, points1))
    correct = int(pair.correct(points0, points1).sum()) if len(points0) else 0
    error = None if pair.pose is None else pose_error(pair.pose, points0, points1)
    return Result(pair.group, keypoints, len(points0), correct, error)


def pose_error(truth: Pose, points0: Array, points1: Array) -> float:
    """The larger of the angles by which rotation and direction of translation are off, degrees."""
    cameras = [Camera(*SIZE, matrix) for matrix in (truth.matrix0, truth.matrix1)]
    found = estimate_relative_pose(points0, points1, *cameras, min_inliers=8)
    if found.status != PoseStatus.OK:
        return math.inf
    rotation, translation = found.rotation.T, -found.rotation.T @ found.translation
    turn = (np.trace(rotation.T @ truth.rotation) - 1) / 2
    along = translation @ truth.translation / np.linalg.norm(translation) / np.linalg.norm(truth.translation)
    return max(math.degrees(math.acos(np.clip(cosine, -1, 1))) for cosine in (turn, along))


def area_under_curve(errors: list[float], limit: float) -> float:
    """Mean, over all error bounds up to ``limit``, of the share of errors within the bound."""
    errors = sorted(errors)
    area = sum(max(0.0, limit - error) for error in errors)  # each error counts from its own size on
    return area / (limit * len(errors))


def table(results: dict[str, list[Result]]) -> list[dict[str, object]]:
    rows = []
    for group in dict.fromkeys(result.group for found in results.values() for result in found):
        for name, found in results.items():
            here = [result for result in found if result.group == group]
            matches, correct = (sum(getattr(result, kind) for result in here) for kind in ("matches", "correct"))
            row: dict[str, object] = {
                "group": group,
                "pairs": len(here),
                "matcher": NAMES[name],
                "keypoints": round(np.mean([result.keypoints for result in here])),
                "matches": matches / len(here),
                "correct": correct / len(here),
                "precision": float(np.mean([result.correct / max(result.matches, 1) for result in here])),
            }
            errors = [result.error for result in here if result.error is not None]
            if errors:
                row.update({f"AUC@{angle}": 100 * area_under_curve(errors, angle) for angle in ANGLES})
            rows.append(row)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    print(
        f"{'group':<14}{'pairs':>6} {'matcher':<18}{'keypoints':>10}{'matches':>9}{'correct':>9}{'precision':>11}"
        + "".join(f"{f'AUC@{angle}':>8}" for angle in ANGLES)
    )
    for row in rows:
        print(
            f"{row['group']:<14}{row['pairs']:>6} {row['matcher']:<18}{row['keypoints']:>10}{row['matches']:>9.1f}"
            f"{row['correct']:>9.1f}{row['precision']:>11.3f}"
            + "".join(f"{row[f'AUC@{angle}']:>8.1f}" for angle in ANGLES if f"AUC@{angle}" in row)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_option(parser)
    parser.add_argument("--weights", default="lightglue-superpoint-open", help="ours: a Hugging Face folder")
    parser.add_argument("--superpoint", help="ours: that LightGlue with another SuperPoint (a checkpoint.pt)")
    parser.add_argument("--scannet", type=Path, help="folder of ScanNet pairs with pairs_with_gt.txt")
    parser.add_argument("--matchers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--groups", nargs="+", help="only these groups of pairs")
    parser.add_argument("--homographies", type=int, default=24, help="pairs of held-out pictures")
    parser.add_argument("--keypoints", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    if arguments.weights == "lightglue-superpoint-open" and arguments.superpoint is None:
        arguments.superpoint = "superpoint-open"
    pairs = [*homography_pairs(arguments.data, arguments.homographies), *opencv_pairs(arguments.data)]
    if arguments.scannet is not None:
        pairs += scannet_pairs(arguments.scannet)
    if arguments.groups:
        pairs = [pair for pair in pairs if pair.group in arguments.groups]
    results = {}
    for name in arguments.matchers:
        matcher = make_matcher(name, arguments, device)
        results[name] = [judge(pair, matcher) for pair in tqdm(pairs, desc=NAMES[name], disable=None)]
    rows = table(results)
    show(rows)
    if arguments.json is not None:
        write_json(
            arguments.json,
            {
                "versions": versions(),
                "weights": str(arguments.weights),
                "superpoint": str(arguments.superpoint),
                "rows": rows,
            },
        )
        log_line(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
