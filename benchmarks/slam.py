"""How accurate is a back-end on the topics? The example's, on two rounds through the courtyard, with exact poses.

    tools/with_ros python benchmarks/slam.py --cache ../cache         # on a processor half an hour the first time
    tools/with_ros python benchmarks/slam.py --cache ../cache --hard  # the same at dusk, see dusk.py

The images and the matcher's messages are cached by the code and the settings that created them: 211 stereo frames of
480x360, 14 cm apart, noise of 2 grey levels, baseline 12 cm. It needs GTSAM, evo and matplotlib. The absolute
trajectory error is evo's RMS error after a rigid alignment.

KLT is OpenCV's pyramidal optical flow (window 21, 4 levels, forward-backward check of 1 pixel) from frame to frame and
from left to right. It starts at the same keypoints, where there is no track within 8 pixels. Its motion is estimated by
the package's own estimator.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import gtsam
import numpy as np
from evo.core.metrics import APE, PoseRelation
from evo.core.trajectory import PoseTrajectory3D
from scipy.spatial.transform import Rotation

import kpmatch_ros
import simulation
from benchmarks import dusk
from benchmarks.code_hash import hash_of_code
from examples.stereo_slam.picture import draw
from examples.stereo_slam.slam import StereoSlam
from kpmatch_ros import match_request
from kpmatch_ros.bags import Bag, new_message, read_ground_truth, read_messages
from kpmatch_ros.bags.cameras import choose_cameras
from kpmatch_ros.bags.replay import replay
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import Pose
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.messages import nanoseconds
from kpmatch_ros.parameters import Parameters
from simulation.bags import write_demo_bag

_FRAMES, _SIZE, _BASELINE = 211, (480, 360), 0.12
_STEP = 14.945 / 105  # metres: a round is 105 frames
_TOPICS = ("features", "stereo_matches", "matches", "relative_pose")
_FLOW = {"winSize": (21, 21), "maxLevel": 4, "criteria": (3, 30, 0.01)}
_APART = 8  # pixels: smallest distance of a new track from the others
_KLT_SIGMA = 0.3  # pixels

Messages = Iterable[tuple[str, Any]]


def rounds(cache: Path, hard: bool) -> Path:
    """Return the bag of the rounds. It is created unless this version of the code has already done so."""
    options = {"num_frames": _FRAMES, "step": _STEP, "size": _SIZE, "baseline": _BASELINE, "encoding": "mono8"}
    files = [*Path(simulation.__file__).parent.rglob("*"), Path(dusk.__file__)]
    bag = cache / f"{'dusk' if hard else 'easy'}-{hash_of_code(files, **options)}" / "rounds"
    if bag.exists():
        return bag
    bag.parent.mkdir(parents=True, exist_ok=True)
    if hard:
        dusk.write_dusk_bag(bag, _FRAMES)
    else:
        write_demo_bag(bag, **options)
    return bag


def outputs(bag: Path, name: str, parameters: Parameters) -> Path:
    """Return the bag of the matcher's messages. It is created unless this code did so with the same parameters.

    The file of chained poses is beside it.
    """
    package = Path(kpmatch_ros.__file__).parent
    out = bag.with_name(f"{name}-{hash_of_code(package.rglob('*'), **asdict(parameters))}")
    if not out.exists():
        with Bag(bag) as opened:
            cameras = choose_cameras(opened, "stereo", {})
            replay(opened, out, cameras, parameters, poses=out.with_suffix(".txt"), features=True)
    return out


def recorded(bag: Path) -> Iterator[tuple[str, Any]]:
    """Yield those messages of a bag that the back-end subscribes to."""
    for record in read_messages(bag, [f"/{topic}" for topic in _TOPICS]):
        yield record.topic[1:], record.message


def camera_infos(bag: Path) -> list[Any]:
    """Return the CameraInfo messages of the left and the right camera."""
    return [next(read_messages(bag, [f"/{side}/camera_info"])).message for side in ("left", "right")]


class Klt:
    """Tracks by optical flow, as messages like the matcher's."""

    def __init__(self, bag: Path, features: Path, most: int) -> None:
        """Track the images of a bag, from the keypoints in the matcher's messages, with at most ``most`` tracks."""
        self._bag, self._features, self._most = bag, features, most
        self._camera = StereoCamera.from_camera_infos(*camera_infos(bag), rectified=True)

    def messages(self) -> Iterator[tuple[str, Any]]:
        """Yield the messages that a node would publish."""
        keypoints = {
            nanoseconds(message.header.stamp): np.reshape(message.points, (-1, 2))
            for topic, message in recorded(self._features)
            if topic == "features" and message.header.frame_id.startswith("left")
        }
        images: list[list[Any]] = [
            [record.message for record in read_messages(self._bag, [f"/{side}/image_rect"])]
            for side in ("left", "right")
        ]
        points, ids, next_id = np.zeros((0, 2), np.float32), np.zeros(0, np.int64), 1
        before: SimpleNamespace | None = None
        for left, right in zip(*images):
            grey = [np.ascontiguousarray(to_array(message)) for message in (left, right)]
            rows = np.arange(0)
            if before is not None:
                points, alive = flow(before.grey, grey[0], before.points)
                points, ids, rows = points[alive], before.ids[alive], np.flatnonzero(alive)
            tracked = len(points)
            free = np.ones(grey[0].shape, np.uint8)
            for x, y in points.astype(int).tolist():
                cv2.circle(free, (x, y), _APART, 0, -1)
            fresh = keypoints[nanoseconds(left.header.stamp)]
            x, y = fresh.astype(int).T
            fresh = fresh[free[y, x] > 0][: self._most - tracked]
            points = np.concatenate([points, fresh.astype(np.float32)])
            ids = np.concatenate([ids, np.arange(next_id, next_id + len(fresh))])
            next_id += len(fresh)
            beside, seen = flow(grey[0], grey[1], points)
            seen &= (abs(beside[:, 1] - points[:, 1]) < 1.0) & (beside[:, 0] < points[:, 0])
            now = SimpleNamespace(
                header=left.header, grey=grey[0], points=points, ids=ids, right=np.where(seen[:, None], beside, np.nan)
            )
            yield "stereo_matches", self._stereo(now, right.header)
            if before is not None:
                pose = estimate_stereo_motion(
                    before.points[rows],
                    before.right[rows],
                    points[:tracked],
                    now.right[:tracked],
                    self._camera,
                    self._camera,
                    keypoint_resolution=0.0,
                )
                yield "matches", self._matches(before, now, rows, pose.inliers)
                turn = Rotation.from_matrix(pose.rotation).as_quat()
                place = SimpleNamespace(
                    position=SimpleNamespace(**dict(zip("xyz", pose.translation))),
                    orientation=SimpleNamespace(**dict(zip("xyzw", turn))),
                )
                yield (
                    "relative_pose",
                    SimpleNamespace(
                        header=left.header,
                        reference=before.header,
                        pose=SimpleNamespace(pose=place, covariance=pose.covariance.ravel()),
                        metric=pose.metric,
                        status=int(pose.status),
                    ),
                )
            before = now

    @staticmethod
    def _stereo(now: SimpleNamespace, header: Any) -> SimpleNamespace:
        rows = np.flatnonzero(np.isfinite(now.right[:, 0]))
        return SimpleNamespace(
            header=header,
            reference=now.header,
            reference_num_keypoints=len(now.points),
            reference_indices=rows,
            reference_points=now.points[rows].ravel(),
            points=now.right[rows].ravel(),
            sigmas=np.full(len(rows), _KLT_SIGMA),
            inliers=np.ones(len(rows), np.uint8),
        )

    @staticmethod
    def _matches(before: SimpleNamespace, now: SimpleNamespace, rows: np.ndarray, inliers: Any) -> SimpleNamespace:
        return SimpleNamespace(
            header=now.header,
            reference=before.header,
            reset=False,
            track_ids=now.ids[: len(rows)],
            points=now.points[: len(rows)].ravel(),
            reference_points=before.points[rows].ravel(),
            indices=np.arange(len(rows)),
            reference_indices=rows,
            sigmas=np.full(len(rows), _KLT_SIGMA),
            inliers=() if inliers is None else inliers,
        )


def flow(image0: np.ndarray, image1: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Track points (N, 2) of image 0 in image 1; also return which of them passed the forward-backward check, (N,)."""
    if not len(points):
        return points, np.zeros(0, bool)
    moved, there, _ = cv2.calcOpticalFlowPyrLK(image0, image1, points[:, None], None, **_FLOW)
    back, here, _ = cv2.calcOpticalFlowPyrLK(image1, image0, moved, None, **_FLOW)
    height, width = image1.shape
    inside = (moved[:, 0] >= 0).all(axis=1) & (moved[:, 0, 0] < width - 1) & (moved[:, 0, 1] < height - 1)
    good = (there.ravel() > 0) & (here.ravel() > 0) & (np.linalg.norm(back[:, 0] - points, axis=1) < 1.0) & inside
    return moved[:, 0], good


class Matcher:
    """Answers the back-end's requests, like the service match_features."""

    def __init__(self, parameters: Parameters) -> None:
        self._front_end = FrontEnd(parameters)

    def __call__(self, reference: Any, current: Any) -> Any:
        """Return the MatchArray of two FeatureArrays."""
        nothing = new_message("sensor_msgs/msg/CameraInfo")
        request = SimpleNamespace(
            reference_features=reference, features=current, reference_camera_info=nothing, camera_info=nothing
        )
        response = match_request.answer(self._front_end, request, SimpleNamespace(), new_message)
        if not response.success:
            raise SystemExit(f"match_features: {response.message}")
        return response.matches


def run(messages: Messages, infos: Sequence[Any], matcher: Matcher | None) -> tuple[StereoSlam, float]:
    """Run the back-end, with loop closures if there is a matcher; also return its own processor time, ms per frame."""
    slam, busy = StereoSlam(*infos, rectified=True), 0.0
    for topic, message in messages:
        started = time.process_time()
        slam.add(topic, message)
        busy += time.process_time() - started
        requests, slam.requests = slam.requests, []
        for request in requests if matcher is not None else ():
            answer = matcher(request.reference.features, request.current.features)
            started = time.process_time()
            slam.add_answer(request, answer)
            busy += time.process_time() - started
    return slam, busy / len(slam.stamps) * 1e3


def chain(messages: Messages) -> tuple[list[int], list[gtsam.Pose3]]:
    """Return stamps and poses that result from chaining the relative poses of consecutive frames."""
    stamps, poses = [], []
    for topic, message in messages:
        if topic == "relative_pose":
            if not poses:
                stamps.append(nanoseconds(message.reference.stamp))
                poses.append(gtsam.Pose3())
            p, q = message.pose.pose.position, message.pose.pose.orientation
            step = gtsam.Pose3(gtsam.Rot3.Quaternion(q.w, q.x, q.y, q.z), np.array([p.x, p.y, p.z]))
            stamps.append(nanoseconds(message.header.stamp))
            poses.append(poses[-1].compose(step))
    return stamps, poses


def positions(poses: Sequence[gtsam.Pose3]) -> np.ndarray:
    """Return the positions (N, 3), metres."""
    return np.array([pose.translation() for pose in poses])


def trajectory_error(stamps: Sequence[int], poses: Sequence[gtsam.Pose3], truth: dict[int, Pose]) -> float:
    """Return evo's absolute pose error of the positions after a rigid alignment, RMS in metres."""
    found = np.array([pose.matrix() for pose in poses])
    true = np.tile(np.eye(4), (len(stamps), 1, 1))
    for matrix, stamp in zip(true, stamps):
        matrix[:3, :3], matrix[:3, 3] = truth[stamp]
    seconds = np.array(stamps) * 1e-9
    estimate, reference = (PoseTrajectory3D(poses_se3=list(each), timestamps=seconds) for each in (found, true))
    estimate.align(reference)
    error = APE(PoseRelation.translation_part)
    error.process_data((reference, estimate))
    return float(error.get_all_statistics()["rmse"])


def main() -> None:
    """Print a table, and save a picture of the trajectories."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for images and messages, some 300 MB")
    parser.add_argument("--hard", action="store_true", help="six rounds at dusk, by a fast camera with few frames")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-keypoints", type=int, default=512)
    parser.add_argument("--variants", nargs="+", default=["tracks", "refine: false", "KLT"])
    options = parser.parse_args()
    bag = rounds(options.cache, options.hard)
    infos = camera_infos(bag)
    stamps, poses = read_ground_truth(bag)
    truth = dict(zip(stamps.tolist(), poses))
    places = np.array([pose.position for pose in poses])
    way = np.linalg.norm(np.diff(places, axis=0), axis=1).sum()
    ours = Parameters(mode="stereo", rectified=True, device=options.device, max_keypoints=options.max_keypoints)
    matcher = Matcher(ours)
    tracks = outputs(bag, "tracks", ours)
    print(f"{len(stamps)} frames, {way:.1f} m; absolute trajectory error in cm, and in % of the path length")
    print("                chained          smoothed         with loops       loops   ms per frame")
    for variant in options.variants:
        messages: list[tuple[str, Any]]
        if variant == "KLT":
            messages = list(Klt(bag, tracks, options.max_keypoints).messages())
        elif variant == "tracks":
            messages = list(recorded(tracks))
        else:
            messages = list(recorded(outputs(bag, "unrefined", replace(ours, refine=False))))
        chained = chain(messages)
        slam, milliseconds = run(messages, infos, None if variant == "KLT" else matcher)
        cells = []
        for each, found in (chained, (slam.stamps, slam.smoothed()), (slam.stamps, slam.poses())):
            error = trajectory_error(each, found, truth)
            cells.append(f"{100 * error:5.2f}  {100 * error / way:.3f} %")
        if variant == "KLT":
            cells[-1] = f"{'-':>14s}"
        print(f"{variant:14s}  {'   '.join(cells)}   {len(slam.graph.loops):5d}   {milliseconds:5.0f}", flush=True)
        if variant == "tracks" and options.picture is not None:
            shown = {"chained": chained[1], "smoothed": slam.smoothed(), "with loops": slam.poses()}
            draw(options.picture, {name: positions(found) for name, found in shown.items()}, places)


if __name__ == "__main__":
    main()
