"""Tests of stereo frames through the networks: matches of left and right, matches over time, and metric motion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import chi2

from kpmatch_ros.bags import read_ground_truth, read_messages
from kpmatch_ros.cli import main
from kpmatch_ros.frames import Pair, StereoPair
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import Pose, PoseStatus, relative_motion
from kpmatch_ros.geometry.refinement import normalize_contrast, refine
from kpmatch_ros.geometry.stereo_camera import StereoCamera
from kpmatch_ros.imaging.images import to_array
from kpmatch_ros.parameters import Parameters
from simulation.bags import write_demo_bag

Registered = list[tuple[StereoPair, "Pair | None"]]


def register(bag: Path, **parameters: Any) -> Registered:
    """Register a bag of a rectified stereo pair in the front end."""
    front_end = FrontEnd(Parameters(device="cpu", precision="float32", rectified=True, **parameters))
    found: dict[str, list[Any]] = {}
    for topic, _, _, message in read_messages(bag):
        found.setdefault(topic, []).append(message)
    infos = [found[f"/{side}/camera_info"][0] for side in ("left", "right")]
    camera = StereoCamera.from_camera_infos(*infos, rectified=True)
    results = []
    for images in zip(found["/left/image_rect"], found["/right/image_rect"]):
        stamps = [image.header.stamp.sec * 10**9 + image.header.stamp.nanosec for image in images]
        result = front_end.register([to_array(image) for image in images], [stamps[0]] * 2, camera)
        assert result.stereo is not None
        results.append((result.stereo, result.pair))
    return results


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    bag = tmp_path_factory.mktemp("bag") / "stereo"
    write_demo_bag(bag, num_frames=4, baseline=0.12, encoding="mono8")
    yield bag


@pytest.fixture(scope="module")
def walked(walk: Path) -> Registered:
    return register(walk)


@pytest.fixture(scope="module")
def truth(walk: Path) -> dict[int, Pose]:
    stamps, poses = read_ground_truth(walk)
    return dict(zip(stamps.tolist(), poses))


def test_the_motion_of_a_walk_is_accurate_to_one_percent(walked: Registered, truth: dict[int, Pose]) -> None:
    assert walked[0][1] is None
    translation_errors, rotation_errors = [], []
    for _, pair in walked[1:]:
        assert pair is not None and pair.pose.status is PoseStatus.OK and pair.pose.metric
        motion = relative_motion(truth[pair.reference.stamp], truth[pair.current.stamp])
        error = np.linalg.norm(pair.pose.translation - motion.position) / np.linalg.norm(motion.position)
        translation_errors.append(error)
        turn = cv2.Rodrigues(motion.rotation @ pair.pose.rotation.T)[0]
        rotation_errors.append(np.degrees(np.linalg.norm(turn)))
    assert np.median(translation_errors) < 0.01, translation_errors
    assert max(rotation_errors) < 0.1, rotation_errors


def test_the_covariance_of_a_walk_covers_its_errors(walked: Registered, truth: dict[int, Pose]) -> None:
    squares = []
    for _, pair in walked[1:]:
        assert pair is not None
        motion = relative_motion(truth[pair.reference.stamp], truth[pair.current.stamp])
        turn = cv2.Rodrigues(motion.rotation @ pair.pose.rotation.T)[0].ravel()
        error = np.concatenate([motion.position - pair.pose.translation, turn])
        squares.append(error @ np.linalg.solve(pair.pose.covariance, error))
    assert max(squares) < chi2.ppf(0.999, 6), squares
    assert np.mean(squares) < chi2.ppf(0.95, 6), squares


def test_left_and_right_are_matched_in_every_frame(walked: Registered) -> None:
    for stereo, pair in walked:
        assert stereo.agreement.status is PoseStatus.OK and stereo.num_inliers > 400
        assert stereo.reference.stamp == stereo.current.stamp
        assert stereo.inliers is not None
        shift = (stereo.reference_points - stereo.points)[stereo.inliers]
        assert (np.abs(shift[:, 1]) < 1.5).all() and (shift[:, 0] > -1).all()
        assert np.median(shift[:, 0]) > 3, "most points are near enough for a disparity"
        assert pair is None or pair.current is stereo.reference
    assert [stereo.reset for stereo, _ in walked] == [True, False, False, False]
    assert [pair.reset for _, pair in walked[1:] if pair] == [True, False, False]


def test_tracks_and_keyframes_persist_in_stereo_mode(walk: Path) -> None:
    pairs = [
        pair
        for _, pair in register(
            walk, max_keypoints=256, reference="keyframe", keyframe_max_parallax=1000.0, keyframe_min_matches=10
        )
        if pair
    ]
    assert len({pair.reference.stamp for pair in pairs}) == 1
    first, last = (dict(zip(pair.track_ids.tolist(), pair.reference_points.tolist())) for pair in (pairs[0], pairs[-1]))
    shared = first.keys() & last.keys()
    assert len(shared) > 20 and all(first[track] == last[track] for track in shared)


def test_swapped_images_are_detected(walk: Path) -> None:
    front_end = FrontEnd(Parameters(device="cpu", precision="float32", max_keypoints=256))
    messages = {topic: message for topic, _, _, message in read_messages(walk)}
    camera = StereoCamera.from_camera_infos(
        messages["/left/camera_info"], messages["/right/camera_info"], rectified=True
    )
    left, right = (to_array(messages[f"/{side}/image_rect"]) for side in ("left", "right"))
    for stamp in (1, 2):
        result = front_end.register([right, left], [stamp, stamp], camera)
        assert result.stereo is not None and result.stereo.agreement.status is PoseStatus.FAILED
    assert result.pair is not None and result.pair.pose.status is PoseStatus.NO_CALIBRATION


def test_a_standing_drone_gets_no_motion_and_its_stereo_matches_fit_opencvs_rectification(
    recorded_data: Path, tmp_path: Path
) -> None:
    bag = recorded_data / "euroc_v101_still_stereo"
    words = ("--mode", "stereo", "--device", "cpu", "--precision", "float32", "--max-keypoints", "512")
    assert main(["bag", str(bag), str(tmp_path / "out"), *words, "--poses", str(tmp_path / "poses.txt")]) == 0
    found: dict[str, list[Any]] = {}
    for topic, _, _, message in read_messages(tmp_path / "out"):
        found.setdefault(topic, []).append(message)
    assert {topic: len(messages) for topic, messages in found.items()} == {
        "/stereo_matches": 12, "/matches": 11, "/relative_pose": 11
    }  # fmt: skip
    infos = {topic: message for topic, _, _, message in read_messages(bag) if topic.endswith("camera_info")}
    left, right = infos["/cam0/camera_info"], infos["/cam1/camera_info"]

    def rectify(points: np.ndarray, info: Any) -> np.ndarray:
        k, r, p = info.k.reshape(3, 3), info.r.reshape(3, 3), info.p.reshape(3, 4)
        return cv2.undistortPoints(points[:, None].astype(np.float64), k, info.d, R=r, P=p)[:, 0]

    on_line, depths = [], []
    for stereo in found["/stereo_matches"]:
        rectified = [
            rectify(points.reshape(-1, 2)[stereo.inliers == 1], info)
            for points, info in ((stereo.reference_points, left), (stereo.points, right))
        ]
        disparity, off = (rectified[0] - rectified[1]).T
        on_line.append(np.abs(off) < 1.5)
        depths.append(-right.p[3] / disparity)
    assert len(np.concatenate(on_line)) > 12 * 200
    assert np.concatenate(on_line).mean() >= 0.99
    assert (np.concatenate(depths) > 0).all() and 0.5 < np.median(np.concatenate(depths)) < 15

    def stands(position: np.ndarray, quaternion: np.ndarray) -> bool:
        return bool(np.linalg.norm(position) < 0.003 and np.degrees(Rotation.from_quat(quaternion).magnitude()) < 0.1)

    for pose in found["/relative_pose"]:
        assert pose.status in (PoseStatus.OK, PoseStatus.NO_TRANSLATION) and pose.metric
        p, q = pose.pose.pose.position, pose.pose.pose.orientation
        assert stands(np.array([p.x, p.y, p.z]), np.array([q.x, q.y, q.z, q.w]))
    path = np.loadtxt(tmp_path / "poses.txt")
    assert path.shape == (12, 8) and all(stands(row[1:4], row[4:]) for row in path), "the path does not drift"


# Refinement


def textured(shift: float, gain: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Return a blurred pattern shifted to the right by `shift` pixels, exact for any fraction of a pixel."""
    random = np.random.default_rng(3)
    x, y = np.meshgrid(np.arange(160.0) - shift, np.arange(120.0))
    waves = random.uniform(-0.8, 0.8, (40, 2))
    values = np.cos(x[..., None] * waves[:, 0] + y[..., None] * waves[:, 1] + np.arange(40)).sum(axis=2)
    return np.clip(gain * (110 + 9 * values) + offset, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (0.7, 30.0)], ids=["equal", "other exposure"])
def test_whole_pixel_matches_are_refined_under_any_exposure(gain: float, offset: float) -> None:
    random = np.random.default_rng(0)
    points0 = np.round(random.uniform(20, 100, (60, 2)))
    guess = points0 + (3, 0) + random.integers(-1, 2, points0.shape)
    found = refine(normalize_contrast(textured(0)), normalize_contrast(textured(3.4, gain, offset)), points0, guess)
    error = found - points0 - (3.4, 0)
    assert np.isfinite(found).all() and np.abs(error).max() < 0.1


def test_matches_on_a_slanted_surface_are_refined_to_a_twentieth_of_a_pixel() -> None:
    random = np.random.default_rng(0)
    image = textured(0)
    slant = np.array([[1.06, 0.12, -9.3], [0.0, 1.03, -2.6]])  # stretched and sheared as from another viewpoint
    seen = cv2.warpAffine(image, slant, image.shape[::-1], flags=cv2.INTER_CUBIC)
    points0 = np.round(random.uniform(20, 100, (60, 2)))
    expected = points0 @ slant[:, :2].T + slant[:, 2]
    found = refine(normalize_contrast(image), normalize_contrast(seen), points0, np.round(expected))
    assert np.isfinite(found).all()
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05


def test_matches_that_cannot_be_refined_are_nan() -> None:
    image = normalize_contrast(textured(0))
    assert np.isnan(refine(image, np.zeros_like(image), np.array([[50.0, 50.0]]), np.array([[50.0, 50.0]]))).all()
    unknown = np.array([[np.nan, np.nan], [50.0, 50.0]])
    found = refine(image, image, unknown, np.array([[50.0, 50.0], [50.0, 50.0]]))
    assert np.isnan(found[0]).all() and np.abs(found[1] - 50).max() < 0.01
    assert refine(image, image, np.zeros((0, 2)), np.zeros((0, 2))).shape == (0, 2)
    far = refine(image, normalize_contrast(textured(8)), np.array([[50.0, 50.0]]), np.array([[50.0, 50.0]]))
    assert np.isnan(far).all(), "a shift larger than a detector's error means another point"
