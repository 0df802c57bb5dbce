"""Tests that the evaluation's ground truth and figures are correct."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from training_scripts import TRAINING, photographs

import kpmatch_ros
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.two_view import estimate_relative_pose
from kpmatch_ros.models import DISK, LightGlue, SuperPoint

# isort: split
import evaluate
import evaluation_pairs
import shards
from evaluation_figures import Result, calibration, describe, markdown
from evaluation_matchers import Found, Learned, Ours, Refined, Sift, load_ours
from evaluation_truth import ByDepth, ByDisparity, ByHomography, Motion, pose_errors, project

Texture = Callable[[int, int, int], np.ndarray]
SaveFolder = Callable[..., Path]
Randomise = Callable[[nn.Module, int], None]
CPU = torch.device("cpu")
SIZE = (160, 120)
MATRIX = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])


def plane(normal: tuple[float, float, float], distance: float) -> np.ndarray:
    """Return the depth (120, 160) of the plane normal x = distance for a camera with MATRIX."""
    x, y = np.meshgrid(np.arange(160.0), np.arange(120.0))
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(MATRIX).T
    return distance / (rays @ np.array(normal))


def pose(shift: tuple[float, float, float], turn: float = 0.05) -> np.ndarray:
    """Return the pose (4, 4) from camera 0 to camera 1."""
    motion = np.eye(4)
    motion[:3, :3] = cv2.Rodrigues(np.array([0.0, turn, 0.02]))[0]
    motion[:3, 3] = shift
    return motion


def sift_errors(pair: evaluation_pairs.Pair) -> np.ndarray:
    """Return the errors of SIFT matches. If images and ground truth agree, most of them are small."""
    found = Sift(500)(*pair.images)
    assert len(found.points0) > 20
    return pair.truth.errors(found.points0, found.points1)


# --- truth -----------------------------------------------------------------------------------------------------------


def test_the_error_of_a_match_follows_from_the_depth_of_its_surface() -> None:
    motion = pose((0.2, 0.0, 0.1))
    normal, distance = (0.3, 0.1, 1.0), 3.0
    # The same plane in camera 1: n . R^T (y - t) = d.
    normal1 = motion[:3, :3] @ np.array(normal)
    depth1 = plane(tuple(normal1), distance + normal1 @ motion[:3, 3])
    truth = ByDepth((plane(normal, distance), depth1), (MATRIX, MATRIX), motion)
    points0 = np.random.default_rng(0).uniform((30, 20), (120, 100), (50, 2))
    homography = MATRIX @ (motion[:3, :3] + np.outer(motion[:3, 3], normal) / distance) @ np.linalg.inv(MATRIX)
    points1 = project(homography, points0)
    np.testing.assert_allclose(truth.errors(points0, points1), 0, atol=1e-3)
    np.testing.assert_allclose(truth.errors(points0, points1 + (3, 4)), 5, atol=1e-3)
    # In image 1 a nearer surface hides the plane. Where the depth in image 0 is unknown, the errors are NaN.
    hidden = ByDepth((plane(normal, distance), np.full_like(depth1, 1.0)), (MATRIX, MATRIX), motion)
    assert np.isinf(hidden.errors(points0, points1)).all()
    unknown = ByDepth((np.zeros_like(depth1), depth1), (MATRIX, MATRIX), motion)
    assert np.isnan(unknown.errors(points0, points1)).all()


def test_a_point_on_an_edge_may_lie_on_either_surface() -> None:
    depth0, depth1 = np.full((120, 160), 4.0), np.full((120, 160), 4.0)
    depth0[:, :80], depth1[:, :65] = 2.0, 2.0  # an edge at x = 79.5, seen at x = 64.5 from 0.2 m to the right
    motion = np.eye(4)
    motion[0, 3] = -0.2
    truth = ByDepth((depth0, depth1), (MATRIX, MATRIX), motion)
    points0 = np.array([[79.0, 60.0], [80.2, 60.0], [90.0, 60.0]])
    near, far = points0 - (15, 0), points0 - (7.5, 0)
    assert (truth.errors(points0[:2], near[:2]) < 1e-6).all()
    assert truth.errors(points0[2:], far[2:]) < 1e-6
    assert truth.errors(points0[2:], near[2:]) > 3


def test_sigmas_are_converted_to_the_cameras_pixels() -> None:
    """Image 1 is shown at half the size of its camera, and shifted."""
    points, sigmas = np.array([[10.0, 20.0], [300.0, 100.0]]), np.array([0.1, 0.5])
    camera, cut = Camera(*SIZE, MATRIX), np.array([[2.0, 0, 7], [0, 2, -3], [0, 0, 1]])
    whole = Motion(np.eye(3), np.ones(3), (camera, camera))
    np.testing.assert_array_equal(whole.sigmas_in_camera_pixels(points, sigmas), sigmas)
    cropped = Motion(np.eye(3), np.ones(3), (camera, camera), (np.eye(3), cut))
    np.testing.assert_allclose(cropped.sigmas_in_camera_pixels(points, sigmas), 2 * sigmas)


def test_an_ambiguous_pose_counts_as_a_pose() -> None:
    """For an oblique plane only one motion counts, because the other estimators in the table also return one."""
    rng = np.random.default_rng(0)
    camera = Camera(*SIZE, MATRIX)
    normal = np.array([0.0, np.sin(0.6), np.cos(0.6)])
    motion = pose((0.0, 0.0, -0.4))
    rays = np.hstack([rng.uniform((-0.4, -0.3), (0.4, 0.3), (200, 2)), np.ones((200, 1))])
    world = rays * (3.0 / (rays @ normal))[:, None]
    points0, points1 = (
        project(MATRIX, points[:, :2] / points[:, 2:]) + rng.normal(0, 0.2, (200, 2))
        for points in (world, world @ motion[:3, :3].T + motion[:3, 3])
    )
    found = estimate_relative_pose(points0, points1, camera, camera)
    assert found.status.name == "AMBIGUOUS"
    truth = Motion(motion[:3, :3], motion[:3, 3], (camera, camera))
    assert np.isfinite(pose_errors(truth, points0, points1, 0.0, 2)).all()


def test_matches_of_a_known_motion_have_no_epipolar_error_and_give_its_pose() -> None:
    rng = np.random.default_rng(0)
    motion = pose((0.3, 0.05, 0.1))
    camera = Camera(*SIZE, MATRIX)
    world = rng.uniform((-1, -0.7, 3), (1, 0.7, 8), (200, 3))
    points0, points1 = (
        project(MATRIX, points[:, :2] / points[:, 2:]) for points in (world, world @ motion[:3, :3].T + motion[:3, 3])
    )
    truth = Motion(motion[:3, :3], motion[:3, 3], (camera, camera))
    np.testing.assert_allclose(truth.errors(points0, points1), 0, atol=1e-9)
    assert (truth.errors(points0, points1[::-1]) < 3).mean() < 0.6
    assert pose_errors(truth, points0, points1, 0.0, 3).max() < 0.1
    assert np.isinf(pose_errors(truth, points0[:4], points1[:4], 0.0, 3)).all()
    wrong = Motion(motion[:3, :3], np.array([0.0, 0.3, -0.3]), (camera, camera))
    assert pose_errors(wrong, points0, points1, 0.0, 2).min() > 30
    # The matched images are rotated and scaled crops of the cameras' images.
    cut = np.array([[0.8, -0.6, 40], [0.6, 0.8, -20], [0, 0, 1]])
    cuts = Motion(motion[:3, :3], motion[:3, 3], (camera, camera), (np.linalg.inv(cut), np.eye(3)))
    np.testing.assert_allclose(cuts.errors(project(cut, points0), points1), 0, atol=1e-6)
    assert pose_errors(cuts, project(cut, points0), points1, 0.0, 2).max() < 0.1


def test_disparities_and_homographies_give_the_error_of_a_match() -> None:
    disparity = np.full((120, 160), 8.0)
    disparity[:, 100:] = 0
    points = np.array([[50.0, 60], [120, 60]])
    errors = ByDisparity(disparity).errors(points, points - (8, 3))
    assert errors[0] == 3
    assert np.isnan(errors[1])
    behind = np.array([[1.0, 0, 0], [0, 1, 0], [-0.02, 0, 1]])
    assert np.isinf(ByHomography(behind).errors(points, points)).tolist() == [True, True]


# --- groups ----------------------------------------------------------------------------------------------------------


def test_views_of_photographs_agree_with_their_homography(tmp_path: Path, texture: Texture) -> None:
    photographs(tmp_path, texture, "photos_heldout.npz")
    light = list(evaluation_pairs.groups(tmp_path, ["photographs"]))
    again = list(evaluation_pairs.photo_pairs(tmp_path, "photographs", evaluation_pairs.LIGHT))
    assert [pair.key for pair in light] == [pair.key for pair in again]
    assert len({pair.key for pair in light}) == 3
    for pair in light:
        assert pair.images[0].shape == (480, 640)
        assert np.median(sift_errors(pair)) < 0.5
    # The default is everything available: photographs, and the same ones degraded.
    every = list(evaluation_pairs.groups(tmp_path, None))
    assert [pair.group for pair in every] == 3 * ["photographs"] + 3 * ["degraded"]
    assert np.array_equal(every[0].truth.homography, every[3].truth.homography)  # type: ignore[attr-defined]


def test_validation_views_agree_with_their_geometry(tmp_path: Path, texture: Texture) -> None:
    photographs(tmp_path, texture, "photos_0.npz", 21)
    for pair in evaluation_pairs.validation_pairs(tmp_path, 2):
        assert pair.group == "validation photographs"
        assert pair.motion is None
        assert np.median(sift_errors(pair)) < 0.7


def test_poses_of_the_church_door_agree_with_colmap(tmp_path: Path, texture: Texture) -> None:
    folder = tmp_path / "lund_door"
    folder.mkdir()
    (folder / "cameras.txt").write_text("# cameras\n1 SIMPLE_RADIAL 1296 1936 2435 648 968 -0.03\n")
    poses = {"a.png": (0.0, (0.0, 0.0, 0.0)), "b.png": (0.1, (-1.0, 0.2, 0.3))}
    lines = ["# images"]
    for number, (name, (angle, shift)) in enumerate(poses.items()):
        cv2.imwrite(str(folder / name), texture(1936, 1296, number))
        lines += [
            f"{number} {np.cos(angle / 2)} 0 {np.sin(angle / 2)} 0 {' '.join(map(str, shift))} 1 {name}",
            "1 2 -1",
        ]
    (folder / "images.txt").write_text("\n".join(lines))
    (pair,) = evaluation_pairs.groups(tmp_path, ["lund"])
    world = np.random.default_rng(0).uniform((-2, -3, 8), (2, 3, 15), (50, 3))
    seen = []
    for angle, shift in poses.values():
        points = world @ cv2.Rodrigues(np.array([0, angle, 0]))[0].T + shift
        x = points[:, :2] / points[:, 2:]
        x = x * (1 - 0.03 * (x**2).sum(axis=1, keepdims=True)) * 2435 + (648, 968)  # in COLMAP's pixels
        seen.append(x * (432 / 1296, 640 / 1936) - 0.5)
    np.testing.assert_allclose(pair.truth.errors(*seen), 0, atol=1e-4)


def write_rooms_shard(path: Path, texture: Texture, clusters: int, views: int) -> shards.Rooms:
    """Write a shard of a wall, seen by cameras that move to the right from view to view."""
    image, encoded = texture(120, 320, 0), []
    for i in range(views):
        cut = np.ascontiguousarray(image[:, 15 * i : 15 * i + 160])  # 0.2 m, 2 m in front of the wall
        normals = np.tile([0.0, 0, -1], (120, 160, 1))
        encoded.append(shards.encode_view(cut, None, normals, plane((0.0, 0.0, 1.0), 2.0)))
    count = views * clusters
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, 0, 3] = 0.2 * (np.arange(count) % views)
    pairs = [(views * c + i, views * c + j) for c in range(clusters) for i in range(views) for j in range(i + 1, views)]
    shards.write_rooms(
        path,
        encoded * clusters,
        np.tile(MATRIX, (count, 1, 1)),
        poses,
        np.zeros(count),
        ["wall"],
        np.arange(count) // views,
        [f"view {i}" for i in range(count)],
        np.array(pairs),
        np.random.default_rng(0).uniform(0.2, 0.75, (len(pairs), 2)),
    )
    return shards.read_rooms(path)


def test_the_pairs_of_a_room_do_not_depend_on_the_other_rooms(tmp_path: Path, texture: Texture) -> None:
    path = tmp_path / "rooms_heldout.npz"
    few = evaluation_pairs.choose_pairs(write_rooms_shard(path, texture, 2, 4))
    many = evaluation_pairs.choose_pairs(write_rooms_shard(path, texture, 5, 4))
    assert few == many[: len(few)]
    assert len(few) == 12
    pair = next(evaluation_pairs.groups(tmp_path, ["rooms"]))
    assert np.median(sift_errors(pair)) < 0.2
    found = Sift(500)(*pair.images)
    assert pair.motion is not None
    assert np.median(pair.motion.errors(found.points0, found.points1)) < 0.2


def test_validation_views_of_rooms_agree_with_their_geometry(tmp_path: Path, texture: Texture) -> None:
    photographs(tmp_path, texture, "photos_0.npz", 2)
    write_rooms_shard(tmp_path / "rooms_0.npz", texture, 2, 2)
    pair = evaluation_pairs.validation_pairs(tmp_path, 1)[1]
    assert pair.group == "validation rooms"
    assert np.nanmedian(sift_errors(pair)) < 2  # pixels of a view that is four times as large as the camera's image
    found = Sift(500)(*pair.images)
    assert pair.motion is not None
    assert np.median(pair.motion.errors(found.points0, found.points1)) < 0.5


# --- matchers --------------------------------------------------------------------------------------------------------


def test_our_matcher_finds_the_packages_keypoints_with_optional_subpixel_positions(
    random_folder: SaveFolder, texture: Texture
) -> None:
    folder = random_folder()
    weights = load_ours("ours", str(folder), CPU)
    image = texture(120, 160, 0)
    superpoint = SuperPoint.from_pretrained(folder, keypoint_threshold=0.0, max_keypoints=200, nms_radius=2)
    expected = superpoint(torch.from_numpy(image)[None, None].float() / 255)
    whole, fraction = (Ours(weights, 200, 2, subpixel, 0.0, 0.1) for subpixel in (False, True))
    assert whole.key != fraction.key
    assert (whole.resolution, fraction.resolution) == (1.0, 0.0)
    found = whole.features(image)
    torch.testing.assert_close(found.keypoints, expected.keypoints)
    torch.testing.assert_close(found.descriptors, expected.descriptors)
    moved = (fraction.features(image).keypoints - found.keypoints).abs()
    assert 0 < moved.mean() < 1
    assert moved.max() <= 2


def test_sift_locates_the_centre_of_a_blob() -> None:
    y, x = np.mgrid[:200, :200]
    offsets = []
    for seed in range(20):
        centre = 100 + np.random.default_rng(seed).uniform(-0.5, 0.5, 2)
        blob = 60 + 150 * np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 8)
        points, _ = Sift(100).features(np.round(blob).astype(np.uint8))
        offsets.append(points[np.linalg.norm(points - centre, axis=1).argmin()] - centre)
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.05


def test_the_score_threshold_is_applied_to_other_lightglue_matchers(
    texture: Texture, randomise_lightglue: Randomise
) -> None:
    image = np.stack([texture(96, 128, 0)] * 3, axis=-1)
    torch.manual_seed(0)

    def peer(threshold: float) -> Learned:
        glue = LightGlue(input_dim=128, descriptor_dim=32, num_attention_heads=2, num_hidden_layers=1)
        randomise_lightglue(glue, 0)
        return Learned("DISK", disk, glue, 60, threshold, CPU)

    disk = DISK()
    every = peer(0.0)(image, image).scores
    middle = float(np.median(every))
    assert 0 < len(peer(middle)(image, image).scores) < len(every)
    assert peer(middle)(image, image).scores.min() >= middle and peer(middle).key != peer(0.0).key


# --- figures ---------------------------------------------------------------------------------------------------------


def result(
    errors: list[float], poses: list[float] | None = None, scores: list[float] | None = None, place: str = ""
) -> Result:
    points = np.array([[40.0 * i, 10] for i in range(len(errors))]).reshape(-1, 2)
    given = np.full(len(errors), np.nan) if scores is None else np.array(scores)
    posed = None if poses is None else np.array(poses)
    return Result(points, given, np.array(errors), 3.0, (100, 200), posed, place or str(errors))


def test_figures_count_only_matches_with_a_known_error() -> None:
    found = [
        result([0.5, 1.5, 2.5, np.inf, np.nan], [0.0, 5.0]),
        result([0.5], [np.inf, np.inf]),
        result([], [np.inf] * 2),
    ]
    described = describe({"ALIKED+LightGlue": found, "same": found}, "ALIKED+LightGlue")
    figures = described["matchers"]["same"]["figures"]
    assert figures["matches"]["value"] == 2
    assert figures["right"]["value"] == pytest.approx(4 / 3)
    assert figures["cells"]["value"] == pytest.approx(4 / 3)
    assert figures["precision"]["value"] == pytest.approx((0.75 + 1 + 0) / 3)
    assert figures["within 1 px"]["value"] == pytest.approx(2 / 5)
    assert figures["within 3 px"]["value"] == pytest.approx(4 / 5)
    assert figures["AUC at 10"]["value"] == pytest.approx(100 * 0.75 / 3)
    assert figures["AUC at 10"]["low"] == 0
    assert figures["AUC at 10"]["high"] == pytest.approx(75 * 2 / 3)
    difference = described["matchers"]["same"]["difference"]["right"]
    assert difference == {"value": 0, "low": 0, "high": 0}
    table = markdown({"rooms": described}, "ALIKED+LightGlue")
    assert table.startswith("### rooms, 3 pairs\n")
    assert "| same | 2 | 1 | 0.583 | 40 / 60 / 80 | 1.3 | 16.7 / 25.0 / 29.2 | +0.0 (+0.0 to +0.0) |" in table


def test_several_pairs_of_one_place_do_not_narrow_the_confidence_interval() -> None:
    places = [[0.5] * i for i in range(12)]
    alone = describe({"m": [result(errors, place=str(i)) for i, errors in enumerate(places)]}, "")
    thrice = describe({"m": [result(errors, place=str(i)) for i, errors in enumerate(places) for _ in range(3)]}, "")
    figures = [of["matchers"]["m"]["figures"]["right"] for of in (alone, thrice)]
    assert figures[0]["low"] < figures[0]["value"] - 1 and figures[0]["high"] > figures[0]["value"] + 1
    assert figures[1] == pytest.approx(figures[0])
    assert (thrice["pairs"], thrice["places"]) == (36, 12)
    assert markdown({"rooms": thrice}, "").startswith("### rooms, 36 pairs of 12 places\n")


def test_calibration_compares_scores_with_the_fraction_of_correct_matches() -> None:
    assert calibration([result([1.0])]) is None
    described = calibration(
        [result([1.0, 1.0, 9.0, np.nan], scores=[0.81, 0.89, 0.85, 0.85]), result([9.0], scores=[0.3])]
    )
    assert described is not None
    low, high = described["bins"]
    assert low == {"matches": 1, "score": 0.3, "right": 0.0}
    assert high["matches"] == 3
    assert high["right"] == pytest.approx(2 / 3)
    assert described["expected error"] == pytest.approx(0.25 * 0.3 + 0.75 * (0.85 - 2 / 3))


class CountingMatcher:
    """A matcher that knows the truth and counts its calls."""

    name, key, resolution = "counting", "counting", 0.0

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        self.calls += 1
        world = np.random.default_rng(0).uniform((-1, -0.7, 3), (1, 0.7, 8), (60, 3))
        moved = world + (0.3, 0, 0)
        points0, points1 = (project(MATRIX, points[:, :2] / points[:, 2:]) for points in (world, moved))
        return Found(points0, points1, np.full(60, 0.9), (60, 60))


def test_results_are_computed_once_and_cached(tmp_path: Path) -> None:
    camera = Camera(*SIZE, MATRIX)
    motion = Motion(np.eye(3), np.array([0.3, 0, 0]), (camera, camera))
    images = np.zeros((120, 160), np.uint8), np.ones((120, 160), np.uint8)
    pairs = [evaluation_pairs.Pair("rooms", str(i), (images[0] + i, images[1]), motion, motion) for i in range(2)]
    matcher = CountingMatcher()
    for _ in range(2):
        figures = evaluate.evaluate([matcher], iter(pairs), evaluate.Cache(tmp_path, 1))
        assert matcher.calls == 2
        assert figures["rooms"]["matchers"]["counting"]["figures"]["AUC at 5"]["value"] > 95
        assert figures["rooms"]["matchers"]["counting"]["figures"]["within 1 px"]["value"] == 1
    pairs.append(evaluation_pairs.Pair("rooms", "new", (images[1] + 1, images[1]), motion, motion))
    figures = evaluate.evaluate([matcher], iter(pairs), evaluate.Cache(tmp_path, 1), known=True)
    assert figures["rooms"]["pairs"] == matcher.calls == 2


@pytest.mark.parametrize(
    ("changed", "invalidated"),
    [
        ("package/models/lightglue.py", {"matches", "refined", "poses"}),
        ("package/models/libkpmatch_networks.so", {"matches", "refined", "poses"}),
        ("package/geometry/two_view.py", {"refined", "poses"}),
        ("package/geometry/libkpmatch_geometry.so", {"refined", "poses"}),
        ("scripts/evaluation_matchers.py", {"matches", "refined", "poses"}),
        ("scripts/evaluation_truth.py", {"poses"}),
        ("package/imaging/colour.py", {"refined", "poses"}),
        ("package/odometry.py", set()),
    ],
)
def test_a_change_of_the_code_invalidates_the_results_that_depend_on_it(
    tmp_path: Path, changed: str, invalidated: set[str]
) -> None:
    package = Path(kpmatch_ros.__file__).parent
    for folder in ("models", "runtime", "geometry", "imaging"):
        shutil.copytree(package / folder, tmp_path / "package" / folder)
        (tmp_path / "package" / folder / "__pycache__").mkdir(exist_ok=True)
    shutil.copy(package / "odometry.py", tmp_path / "package")
    shutil.copytree(TRAINING, tmp_path / "scripts")
    before = evaluate.code_hashes(tmp_path / "package", tmp_path / "scripts")
    with (tmp_path / changed).open("ab") as stream:
        stream.write(b"\n")
    after = evaluate.code_hashes(tmp_path / "package", tmp_path / "scripts")
    assert {kind for kind in before if before[kind] != after[kind]} == invalidated


def test_cached_poses_of_another_estimator_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera(*SIZE, MATRIX)
    motion = Motion(np.eye(3), np.array([0.3, 0, 0]), (camera, camera))
    image, matcher = np.zeros((120, 160), np.uint8), CountingMatcher()
    pair = evaluation_pairs.Pair("rooms", "0", (image, image), motion, motion)
    cache = evaluate.Cache(tmp_path, 1)
    evaluate.evaluate([matcher], iter([pair]), cache)
    assert cache.holds(matcher, pair)
    monkeypatch.setitem(cache.code, "poses", "of another estimator")
    assert not cache.holds(matcher, pair)
    monkeypatch.undo()
    assert cache.holds(matcher, pair)
    monkeypatch.setattr(evaluate, "ORDERS", 3)
    assert not cache.holds(matcher, pair)
    evaluate.evaluate([matcher], iter([pair]), cache)
    poses = cache.result(matcher, pair).poses
    assert poses is not None and len(poses) == 3
    assert matcher.calls == 1  # its cached matches are still valid


class RoundingMatcher:
    """Knows the positions after a shift of 2.5 pixels, and rounds them to whole pixels."""

    name, key, resolution = "rounded", "rounded", 1.0

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        points = np.stack(np.meshgrid(np.arange(30, 130, 10.0), np.arange(30, 90, 10.0)), axis=-1).reshape(-1, 2)
        return Found(points, points + (3, 2), np.full(len(points), 0.9), (len(points), len(points)))


def test_refined_matches_are_accurate_to_a_fraction_of_a_pixel(tmp_path: Path, texture: Texture) -> None:
    shift = np.array([[1, 0, 2.5], [0, 1, 2.5], [0, 0, 1.0]])
    image = texture(120, 160, 3)
    moved = cv2.warpPerspective(image, shift, SIZE, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    pair = evaluation_pairs.Pair("photographs", "0", (image, moved), ByHomography(shift))
    figures = evaluate.evaluate(
        [RoundingMatcher(), Refined(RoundingMatcher())], iter([pair]), evaluate.Cache(tmp_path, 1)
    )
    matchers = figures["photographs"]["matchers"]
    assert list(matchers) == ["rounded", "rounded, refined"]
    cache = evaluate.Cache(tmp_path, 1)
    errors = [
        np.median(cache.result(matcher, pair).errors) for matcher in (RoundingMatcher(), Refined(RoundingMatcher()))
    ]
    assert errors[0] == pytest.approx(np.hypot(0.5, 0.5), abs=0.01)
    assert errors[1] < 0.1
