"""Tests that a sharp image is blurred like the other image before patches are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bag_harness import QUICK
from numpy.typing import NDArray

from kpmatch_ros.bags import BagWriter, read_messages
from kpmatch_ros.bags.demo import demo_frames
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.blur import equalise_blur, focus_kernel, gradient_energy, line_kernel, smeared_image
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.patches import Alignment, align, cut, no_change, signed
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.geometry.refinement import align_matches, normalize_contrast
from kpmatch_ros.parameters import Parameters
from kpmatch_ros.tracking.tracks import Links, Tracks, View
from simulation.bags import write_demo_bag

Texture = Callable[[int, int, int], NDArray[np.uint8]]
Image = NDArray[np.uint8]

SIZE, SHIFT = 320, 3
ALONG_ROWS = line_kernel(9, 0.0)


@pytest.fixture(scope="module")
def scene(texture: Texture) -> Image:
    return texture(SIZE + 40, SIZE + 40, 5)


def view_of(scene: Image, shift: int, kernel: NDArray[np.float32] | None = None, seed: int = 0) -> Image:
    """Return the scene, moved to the left by the shift, with blur and then noise."""
    image: NDArray[Any] = scene.astype(np.float32)
    if kernel is not None:
        image = cv2.filter2D(image, -1, kernel)
    image = image[20 : 20 + SIZE, 20 + shift : 20 + shift + SIZE]
    noise = np.random.default_rng(seed).normal(0, 2, image.shape)
    return normalize_contrast(np.clip(np.round(image + noise), 0, 255).astype(np.uint8))


def corners(image: Image) -> NDArray[np.float32]:
    found = cv2.goodFeaturesToTrack(image[30:-30, 30:-30], 150, 0.02, 8)
    return found[:, 0] + np.float32(30)


def median_error(found: Alignment, points: NDArray[np.float32]) -> float:
    """Return the median error of the patches that are found, pixels."""
    assert found.good.mean() > 0.85
    return float(np.median(np.linalg.norm(found.points - points + (SHIFT, 0), axis=1)[found.good]))


def inaccurate_start(points: NDArray[np.float32]) -> NDArray[np.float32]:
    away = np.random.default_rng(0).normal(0, 0.5, points.shape)
    return (points - (SHIFT, 0) + away).astype(np.float32)


@pytest.mark.parametrize(
    "kernel",
    [ALONG_ROWS, line_kernel(7, 1.0), line_kernel(15, 2.2), focus_kernel(2.0)],
    ids=["along rows", "aslant", "wide", "out of focus"],
)
@pytest.mark.parametrize("blurred", [0, 1], ids=["the first is blurred", "the second is blurred"])
def test_the_sharper_of_two_images_is_blurred_like_the_other(
    scene: Image, kernel: NDArray[np.float32], blurred: int
) -> None:
    kernels = [kernel if side == blurred else None for side in (0, 1)]
    pictures = [view_of(scene, SHIFT * side, each, side) for side, each in enumerate(kernels)]
    images = [signed(each) for each in pictures]
    points = corners(view_of(scene, 0))
    near = inaccurate_start(points)
    equalised = equalise_blur(*pictures, points, near)
    assert equalised is not None and equalised.smeared is None
    assert np.array_equal(equalised.images[blurred], images[blurred])
    assert not np.array_equal(equalised.images[1 - blurred], images[1 - blurred])
    with_blur, without = (
        align(cut(first, points), second, near, no_change(len(points)), 1)
        for first, second in (equalised.images, images)
    )
    assert median_error(with_blur, points) < 0.2
    assert with_blur.correlation.mean() > without.correlation.mean() + 0.02


def test_images_blurred_in_different_directions_are_both_blurred_further(scene: Image) -> None:
    images = view_of(scene, 0, ALONG_ROWS, 0), view_of(scene, SHIFT, line_kernel(9, np.pi / 2), 1)
    points = corners(view_of(scene, 0))
    equalised = equalise_blur(images[0], images[1], points, inaccurate_start(points))
    assert equalised is not None
    found = align(
        cut(equalised.images[0], points), equalised.images[1], inaccurate_start(points), no_change(len(points)), 1
    )
    assert median_error(found, points) < 0.2


@pytest.mark.parametrize("kernel", [None, ALONG_ROWS], ids=["sharp", "blurred"])
def test_two_equally_sharp_images_are_not_changed(scene: Image, kernel: NDArray[np.float32] | None) -> None:
    images = [view_of(scene, SHIFT * side, kernel, side) for side in (0, 1)]
    points = corners(view_of(scene, 0))
    assert equalise_blur(images[0], images[1], points, inaccurate_start(points)) is None


def test_no_blur_is_estimated_from_too_few_points_or_flat_images(scene: Image) -> None:
    images = view_of(scene, 0), view_of(scene, 0, ALONG_ROWS)
    points = corners(view_of(scene, 0))
    outside = np.full_like(points, np.nan)
    for few in (points[:0], points[:5], points - SIZE, outside):
        assert equalise_blur(images[0], images[1], few, few) is None
    flat = np.full_like(images[0], 128)
    assert equalise_blur(flat, flat, points, points) is None
    assert equalise_blur(images[0], flat, points, points) is None


@pytest.mark.parametrize("angle", [0.0, 1.0, 2.2])
def test_an_image_blurred_over_many_pixels_counts_as_smeared(scene: Image, angle: float) -> None:
    sharp = gradient_energy(view_of(scene, 0))
    for length, smeared in ((1, None), (9, None), (15, None), (33, 1), (41, 1), (61, 1)):
        energy = gradient_energy(view_of(scene, SHIFT, line_kernel(length, angle), 1))
        assert smeared_image(sharp, energy) == smeared
        assert smeared_image(energy, sharp) == (None if smeared is None else 0)
        assert smeared_image(energy, energy) is None


def test_a_defocused_flat_or_unrelated_image_does_not_count_as_smeared(scene: Image, texture: Texture) -> None:
    sharp = gradient_energy(view_of(scene, 0))
    others = [
        view_of(scene, 0, focus_kernel(6.0)),
        np.full((SIZE, SIZE), 128, np.uint8),
        normalize_contrast(texture(SIZE, SIZE, 9)),
        cv2.resize(view_of(scene, 0)[60:200, 60:200], (SIZE, SIZE), interpolation=cv2.INTER_CUBIC),
    ]
    for other in others:
        energy = gradient_energy(other)
        assert smeared_image(sharp, energy) is None and smeared_image(energy, sharp) is None


def test_a_blank_or_dark_image_does_not_count_as_smeared(scene: Image) -> None:
    """Contrast is normalised, so the noise becomes as strong as a scene."""
    tall = gradient_energy(cv2.resize(view_of(scene, 0), (SIZE, 3 * SIZE), interpolation=cv2.INTER_CUBIC))
    random = np.random.default_rng(0)
    covered = [np.zeros((SIZE, SIZE)), np.full((SIZE, SIZE), 128.0)]
    covered += [random.poisson(mean, (SIZE, SIZE)) for mean in (0.2, 1, 3)]
    covered += [128 + random.normal(0, deviation, (SIZE, SIZE)) for deviation in (0.5, 1, 2, 5)]
    assert tall[0, 0] > 2 * tall[1, 1]
    for other in covered:
        energy = gradient_energy(normalize_contrast(other.clip(0, 255).astype(np.uint8)))
        assert smeared_image(tall, energy) is None and smeared_image(energy, tall) is None


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_the_smallest_images_do_not_count_as_smeared(size: tuple[int, int]) -> None:
    energies = [gradient_energy(np.full(size, grey, np.uint8)) for grey in (3, 200)]
    assert all(energy.shape == (2, 2) for energy in energies) and smeared_image(*energies) is None


A, S = 1, 61  # blur of a frame, pixels


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize(
    ("blurs", "statuses", "references"),
    [
        ((A, S, A, A), "SOO", (0, 0, 2)),  # one frame is skipped
        ((A, S, S, A, A), "SSSO", (0, 0, 2, 3)),  # after two smeared frames, a sharp frame finds no usable reference
        ((S, A, A), "SO", (0, 1)),  # a smeared reference is replaced at once
    ],
)
def test_smeared_frames_get_no_pose_and_are_replaced_as_reference(
    blurs: tuple[int, ...], statuses: str, references: tuple[int, ...], refine: bool
) -> None:
    """S means TOO_FEW_MATCHES, because one of the two images is smeared; O means OK."""
    frames = list(demo_frames(len(blurs)))
    camera = Camera.from_camera_info(frames[0].camera_info, rectified=False)
    front_end = FrontEnd(Parameters(device="cpu", profile="fast", refine=refine))
    found, used = "", []
    for number, (frame, length) in enumerate(zip(frames, blurs)):
        image = cv2.filter2D(cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY), -1, line_kernel(length, 0.0))
        pair = front_end.register([image], [number * 10**8], camera).pair
        if pair is None:
            continue
        used.append(pair.reference.stamp // 10**8)
        if pair.smeared is None:
            assert pair.pose.status is PoseStatus.OK
            found += "O"
        else:
            assert pair.smeared == (0 if length == A else 1) and pair.pose.status is PoseStatus.TOO_FEW_MATCHES
            assert pair.inliers is not None and not pair.inliers.any() and (pair.sigmas == 5).all()
            found += "S"
    assert (found, tuple(used)) == (statuses, references)


def test_a_smeared_frame_is_not_used_as_reference_even_without_calibration() -> None:
    front_end = FrontEnd(Parameters(device="cpu", profile="fast"))
    statuses, used = [], []
    for number, frame in enumerate(demo_frames(3)):
        image = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        image = cv2.filter2D(image, -1, line_kernel(S, 0.0)) if number == 1 else image
        pair = front_end.register([image], [number * 10**8]).pair
        if pair is not None:
            statuses.append(pair.pose.status)
            used.append(pair.reference.stamp)
    assert statuses == 2 * [PoseStatus.NO_CALIBRATION] and used == [0, 0]


def test_a_smeared_image_is_reported_with_a_remedy(kpmatch: Any, tmp_path: Path) -> None:
    write_demo_bag(tmp_path / "sharp", num_frames=3, size=(320, 240), encoding="mono8")
    images = 0
    with BagWriter(tmp_path / "in") as bag:
        for topic, _, stamp, message in read_messages(tmp_path / "sharp"):
            if hasattr(message, "encoding"):
                images += 1
                if images == 2:
                    pixels = np.frombuffer(message.data, np.uint8).reshape(240, 320)
                    message.data = cv2.filter2D(pixels, -1, line_kernel(S, 0.0)).ravel()
            bag.write(topic, message, stamp)
    status, out, err = kpmatch("bag", str(tmp_path / "in"), str(tmp_path / "out"), *QUICK)
    assert status == 0 and "blur 1" in out
    assert "it has no pose: shorten the exposure" in err


def test_a_match_of_a_sharp_image_with_a_blurred_one_is_refined(scene: Image) -> None:
    images = view_of(scene, 0, None, 0), view_of(scene, SHIFT, ALONG_ROWS, 1)
    points = corners(images[0])
    assert median_error(align_matches(images[0], images[1], points, inaccurate_start(points)), points) < 0.15


def test_tracks_stay_accurate_through_blur_and_keep_their_first_patch(scene: Image) -> None:
    points = corners(view_of(scene, 0))

    def view(number: int, kernel: NDArray[np.float32] | None) -> View:
        keypoints = points if not number else points[:0]
        return View(
            view_of(scene, SHIFT * number, kernel, number),
            keypoints,
            np.eye(len(keypoints), 256, dtype=np.float32),
            1.0,
        )

    def errors(links: Links, number: int) -> NDArray[np.float64]:
        return np.linalg.norm(links.points - points[links.track_ids.astype(int) - 1] + (SHIFT * number, 0), axis=1)

    tracks, none = Tracks(300, 0), (np.zeros((0, 2), np.int64), np.zeros(0, np.float32))
    before, medians, shares = view(0, None), [], []
    for number in range(1, 6):
        now = view(number, ALONG_ROWS if 2 <= number <= 3 else None)
        links = tracks.follow(before, now, *none)
        tracks.advance(now, None)
        before = now
        medians.append(float(np.median(errors(links, number))))
        shares.append(len(links.points) / len(points))
        assert np.isfinite(links.sigmas).all()
        assert (errors(links, number) < 4 * links.sigmas).mean() > 0.9
    assert min(shares) > 0.8
    assert max(medians[1:3]) < 0.2
    assert medians[4] < 0.06  # sharp again: as exact as with the first patch, without the errors of the steps
