"""How long do tracks live, and how accurate are they? The package and optical flow, compared with exact geometry.

    tools/with_ros python benchmarks/tracks.py  # on a processor some minutes
    tools/with_ros python benchmarks/tracks.py --sequences walk third

A camera walks through the synthetic courtyard. The points are the keypoints of the first frame. KLT is OpenCV's
pyramidal optical flow (Lucas and Kanade; window 21, 4 levels, forward-backward check of 1 pixel) from the same points.
The table has a row for each age. It gives the shares of visible points that are alive, and that are alive and within 3
pixels of their true position, and the median and 90 % error of those alive.

Sequences: walk, 640x480 with noise of 2 grey levels; third, every third frame of it; exposure, whose brightness falls
to 60 % at the third frame; blur, whose frames from the third on are blurred over 9 pixels; gap, with five black frames
after the third; back, every third frame to the fifth one and back again. Beside a depth edge a point may be on either
surface.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from kpmatch_ros.bags import Bag
from kpmatch_ros.bags.cameras import choose_cameras
from kpmatch_ros.feature_matcher import FeatureMatcher
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose, cross_matrix
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.tracking.tracks import NOT_DETECTED
from simulation import Scene, View, camera_path, demo_camera

_NOISE = 2.0  # grey levels
_RIGHT = 3.0  # pixels
_BLUR = 9  # pixels
_EDGE = 5  # pixels
_EVEN = 2e-5  # relative to the inverse depth: its largest deviation from a linear function on a plane
_SEQUENCES = ("walk", "third", "exposure", "blur", "gap", "back")


class Frame(NamedTuple):
    """An image, and the view that has its geometry; None for a black image."""

    image: np.ndarray
    view: View | None


@dataclass(frozen=True)
class Followed:
    """Points of the first frame in a later one: positions (N, 2), NaN where lost.

    Standard deviations (N,) and inliers (N,) are known only for the package's tracks.
    """

    points: np.ndarray
    sigmas: np.ndarray
    inliers: np.ndarray


def project(points: np.ndarray, view0: View, view1: View, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Project points (N, 2) of view 0 to view 1 by view 0's depth; also return which of them are visible there, (N,).

    Beside a depth edge, a point may be on either surface. The positions are therefore (3, N, 2): by the depth at the
    point, and by the nearest and the farthest depth around it. If the surroundings are one plane, all three use the
    point's own depth.
    """
    focal, centre = camera.matrix[[0, 1], [0, 1]], camera.matrix[:2, 2]
    inverse = np.where(np.isfinite(view0.depth), 1 / view0.depth, 0).astype(np.float32)
    x, y = points.astype(np.float32).T
    around = np.ones((_EDGE, _EDGE), np.uint8)
    near = np.stack(
        [
            cv2.remap(each, x, y, cv2.INTER_LINEAR).ravel()
            for each in (inverse, cv2.dilate(inverse, around), cv2.erode(inverse, around))
        ]
    )
    even = one_plane(inverse, points)
    near[1:, even] = near[0, even]
    rays = np.c_[(points - centre) / focal, np.ones(len(points))]
    world = (rays / np.maximum(near, 1e-6)[..., None]) @ view0.rotation.T + view0.position
    seen = (world - view1.position) @ view1.rotation
    found = seen[..., :2] / seen[..., 2:] * focal + centre
    depth = np.where(np.isfinite(view1.depth), view1.depth, 1e6).astype(np.float32)
    x, y = found[0].astype(np.float32).T
    surface = cv2.remap(depth, x, y, cv2.INTER_NEAREST).ravel()
    visible = (near[0] > 1e-6) & (seen[0, :, 2] > 0.1) & (seen[0, :, 2] < 1.02 * surface) & (found[0] > 4).all(axis=1)
    return found, visible & (found[0, :, 0] < camera.width - 5) & (found[0, :, 1] < camera.height - 5)


def one_plane(inverse: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether the surroundings of points (N, 2) are one plane, (N,): the inverse depth (H, W) is linear there."""
    reach = _EDGE // 2 + 1  # between pixels, the nearest and the farthest depth are from two windows
    y, x = (each.ravel() for each in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    plane = np.c_[np.ones(len(x)), x, y]
    column, row = np.round(points).astype(int).T + reach
    around = np.pad(inverse, reach, mode="edge")[row[:, None] + y, column[:, None] + x]
    rest = around - around @ (plane @ np.linalg.pinv(plane))
    return np.asarray(abs(rest).max(axis=1) < _EVEN * around.mean(axis=1))


def offsets(points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return offsets (N, 2) in pixels of points (N, 2) from the nearest true position (3, N, 2); NaN for lost ones."""
    apart = points - truth
    nearest = np.where(np.isfinite(apart), apart, 0)
    which = np.linalg.norm(nearest, axis=2).argmin(axis=0)
    return np.asarray(apart[which, np.arange(len(points))])


def sequence(name: str, views: Sequence[View]) -> list[Frame]:
    """Return the frames of a sequence."""
    frames = [Frame(np.ascontiguousarray(view.image), view) for view in views]
    if name == "third":
        return frames[::3]
    if name == "back":
        return frames[:13:3] + frames[9::-3]
    if name == "exposure":
        return frames[:2] + [frame._replace(image=(0.6 * frame.image).astype(np.uint8)) for frame in frames[2:]]
    if name == "blur":
        kernel = np.full((1, _BLUR), 1 / _BLUR)
        return frames[:2] + [frame._replace(image=cv2.filter2D(frame.image, -1, kernel)) for frame in frames[2:]]
    if name == "gap":
        return frames[:3] + [Frame(np.zeros_like(frames[0].image), None)] * 5 + frames[8:]
    return frames[:14]


def flow(frames: Sequence[Frame], start: np.ndarray) -> Iterator[Followed]:
    """Track the points (N, 2) of the first frame with KLT."""
    grey = [cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY) for frame in frames]
    points, alive = start.astype(np.float32)[:, None], np.ones(len(start), bool)
    options = {"winSize": (21, 21), "maxLevel": 4, "criteria": (3, 30, 0.01)}
    for before, now in zip(grey, grey[1:]):
        moved, there, _ = cv2.calcOpticalFlowPyrLK(before, now, points, None, **options)
        back, here, _ = cv2.calcOpticalFlowPyrLK(now, before, moved, None, **options)
        alive &= (there.ravel() > 0) & (here.ravel() > 0) & (np.linalg.norm(back - points, axis=2).ravel() < 1.0)
        points = moved
        yield Followed(np.where(alive[:, None], points[:, 0], np.nan), np.full(len(start), np.nan), alive)


def tracks(frames: Sequence[Frame], front_end: FrontEnd, camera: Camera) -> Iterator[Followed]:
    """Yield the front end's tracks of the keypoints of the first frame."""
    front_end.reset()
    number: dict[int, int] = {}
    for i, frame in enumerate(frames):
        _, pair = front_end.register_frame(frame.image, (i + 1) * 10**8, camera)
        if pair is None:
            continue
        keypoints = pair.reference.keypoints
        if i == 1:
            number = {int(track): int(k) for track, k in zip(pair.track_ids, pair.indices[:, 0]) if k >= 0}
            first = len(keypoints)
        found = Followed(np.full((first, 2), np.nan), np.full(first, np.nan), np.zeros(first, bool))
        agree = np.ones(len(pair.points), bool) if pair.inliers is None else pair.inliers
        for track, point, sigma, inlier in zip(pair.track_ids.tolist(), pair.points, pair.sigmas, agree):
            if track in number:
                row = number[track]
                found.points[row], found.sigmas[row], found.inliers[row] = point, sigma, inlier
        yield found


def main() -> None:
    """Print a table for each sequence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", nargs="+", default=_SEQUENCES, choices=_SEQUENCES)
    parser.add_argument("--seed", type=int, default=0, help="courtyard")
    parser.add_argument(
        "--bag", type=Path, help="a recording of one calibrated camera: print epipolar distances as well"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    camera = demo_camera(distorted=False)
    views = list(Scene(options.seed).film(camera_path(16), camera, noise=_NOISE))
    matcher = FeatureMatcher(Parameters(device=options.device, precision="float32"))
    report(options.sequences, views, camera, matcher)
    if options.bag is not None:
        epipolar(options.bag, matcher)


def report(names: Sequence[str], views: Sequence[View], camera: Camera, matcher: FeatureMatcher) -> None:
    """Print a table for each sequence, created from the views."""
    front_end = FrontEnd(replace(matcher.parameters, max_gap=0.0), matcher)
    for name in names:
        frames = sequence(name, views)
        first, _ = FrontEnd(front_end.parameters, matcher).register_frame(frames[0].image, 0)
        rows = zip(frames[1:], flow(frames, first.keypoints), tracks(frames, front_end, camera))
        print(
            f"\n{name}: shares alive and correct, median and 90 % error (pixels)\n"
            "  age   KLT                        tracks"
        )
        squares, agree = [], []
        for age, (frame, *found) in enumerate(rows, 1):
            if frame.view is None or frames[0].view is None:
                continue
            truth, visible = project(first.keypoints.astype(float), frames[0].view, frame.view, camera)
            cells = []
            for each in found:
                errors = np.linalg.norm(offsets(each.points, truth), axis=1)
                alive = visible & np.isfinite(errors)
                figures = np.percentile(errors[alive], [50, 90]) if alive.any() else (np.nan, np.nan)
                right = (errors[alive] < _RIGHT).sum() / visible.sum()
                cells.append(f"{alive.sum() / visible.sum():4.0%} {right:4.0%}  {figures[0]:5.2f} {figures[1]:6.2f}")
            alive = visible & np.isfinite(found[1].points).all(axis=1)
            squares.append((offsets(found[1].points, truth) / found[1].sigmas[:, None])[alive])
            agree.append(found[1].inliers[alive])
            print(f"  {age:3d}   {cells[0]}   {cells[1]}", flush=True)
        normalised, inliers = np.concatenate(squares), np.concatenate(agree)
        for kind, each in (("all", normalised), ("inliers", normalised[inliers])):
            print(
                f"  normalised squared error of a coordinate, {kind}: mean {np.mean(each**2):.2f}, "
                f"within 1.645 sigma {np.mean(np.abs(each) < 1.645):.0%}"
            )


def epipolar(bag: Path, matcher: FeatureMatcher) -> None:
    """For each pair of frames of a bag, print the points' distances from the epipolar lines of one motion.

    The motion is estimated from all unrefined matches, independently of the tracks and of KLT.
    """
    with Bag(bag) as opened:
        topics = choose_cameras(opened, "mono", {})[0]
        records = {record.topic: record.message for record in opened.messages([topics.camera_info])}
        images = [np.ascontiguousarray(to_array(each.message)) for each in opened.messages([topics.image])]
    camera = Camera.from_camera_info(records[topics.camera_info], rectified=False)
    plain, ours = (
        FrontEnd(replace(matcher.parameters, max_gap=0.0, refine=refine), matcher) for refine in (False, True)
    )
    print(f"\n{bag.name}: share of the keypoints found, median and 90 % distance from epipolar lines (pixels)")
    print("  pair  KLT                   tracks")
    grey: list[np.ndarray] = []
    for i, image in enumerate(images):
        grey.append(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        (_, judge), (_, pair) = (each.register_frame(image, i * 10**9, camera) for each in (plain, ours))
        if judge is None or pair is None or judge.pose.status is not PoseStatus.OK:
            continue
        before = pair.reference.stamp // 10**9
        if judge.reference.stamp != pair.reference.stamp:
            continue
        keypoints = pair.reference.keypoints
        own = pair.indices[:, 0] != NOT_DETECTED  # keypoints only, as for KLT: a carried track need not be a keypoint
        flowed = next(flow([Frame(images[each], None) for each in (before, i)], keypoints)).points
        known = np.isfinite(flowed[:, 0])
        cells = []
        for points0, points1 in ((keypoints[known], flowed[known]), (pair.reference_points[own], pair.points[own])):
            apart = sampson(points0, points1, judge.pose, camera)
            middle, most = np.percentile(apart, [50, 90]) if len(apart) else (np.nan, np.nan)
            cells.append(f"{len(apart) / len(keypoints):4.0%}  {middle:5.2f} {most:6.2f}")
        print(f"  {i:4d}  {cells[0]}   {cells[1]}", flush=True)


def sampson(points0: np.ndarray, points1: np.ndarray, pose: RelativePose, camera: Camera) -> np.ndarray:
    """Sampson distance (M,) in pixels of matches (M, 2) (Hartley and Zisserman, section 11.4.3)."""
    # x_ref = R x_cur + t, so that x_ref' [t] R x_cur = 0.
    essential = cross_matrix(pose.translation) @ pose.rotation
    rays = [np.c_[camera.normalise(points), np.ones(len(points))] for points in (points0, points1)]
    lines0, lines1 = rays[1] @ essential.T, rays[0] @ essential
    along = (rays[0] * lines0).sum(axis=1)
    slopes = (lines0[:, :2] ** 2).sum(axis=1) + (lines1[:, :2] ** 2).sum(axis=1)
    return np.asarray(camera.focal * abs(along) / np.sqrt(slopes))


if __name__ == "__main__":
    main()
