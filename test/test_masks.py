"""Tests that nothing is detected under masks, that other keypoints replace hidden ones, and that poses are correct."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.imitation import Imitation
from benchmarks.overconfidence import judge, masked_body
from kpmatch_ros import FeatureMatcher, ParameterError, Parameters
from kpmatch_ros.cuda_graphs import CudaGraphs
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.pose import PoseStatus, RelativePose, relative_motion
from kpmatch_ros.imaging.masks import fit
from kpmatch_ros.models import ALIKED, DISK, SuperPoint, XFeat
from kpmatch_ros.sync.mask_sync import MaskSynchroniser
from simulation import camera_path, demo_camera
from simulation.bags import build_scene

Image = NDArray[np.uint8]
Array = NDArray[Any]

HEIGHT, WIDTH = 96, 144
FINE = Parameters(device="cpu", precision="float32", matcher="nearest", keypoint_threshold=0.0005)


def left_third(height: int = HEIGHT, width: int = WIDTH) -> Image:
    """Return a mask that is 0 in the left third, with a ragged edge."""
    mask = np.full((height, width), 255, np.uint8)
    for row in range(height):
        mask[row, : width // 3 + row % 3] = 0
    return mask


def under(mask: Array, keypoints: Array | Tensor) -> int:
    """Return the number of keypoints under a mask."""
    x, y = np.rint(np.asarray(keypoints)).astype(int).T
    return int((mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)] == 0).sum())


@pytest.fixture(scope="module")
def picture(texture: Callable[..., Image]) -> Image:
    return texture(HEIGHT, WIDTH, 3)


@pytest.fixture(scope="module")
def matcher() -> FeatureMatcher:
    return FeatureMatcher(FINE)


# Extractors


@pytest.fixture(params=["superpoint", "superpoint subpixel", "aliked", "disk", "xfeat"])
def extractor(request: pytest.FixtureRequest, small_superpoint: dict[str, Any], randomise_superpoint: Any) -> Any:
    """An extractor of each kind, with random weights that find keypoints everywhere."""
    torch.manual_seed(0)
    if request.param == "aliked":
        return ALIKED(keypoint_threshold=0.0)
    if request.param == "disk":
        return DISK(keypoint_threshold=-1e3)
    if request.param == "xfeat":
        return XFeat(keypoint_threshold=0.0)
    found = SuperPoint(**{**small_superpoint, "subpixel": request.param != "superpoint"})
    randomise_superpoint(found, 0)
    return found


def test_masked_keypoints_are_left_out_and_the_others_stay(extractor: Any, picture: Image) -> None:
    image, mask = torch.from_numpy(picture).float()[None, None] / 255, left_third()
    everywhere, elsewhere = extractor(image), extractor(image, torch.from_numpy(mask != 0)[None])
    assert under(mask, everywhere.keypoints[0]) > 20
    assert elsewhere.mask.sum() > 50 and under(mask, elsewhere.keypoints[0][elsewhere.mask[0]]) == 0
    clear = cv2.erode(mask, np.ones((13, 13), np.uint8))  # next to the mask, subpixel positions may differ
    expected = [tuple(p) for p in everywhere.keypoints[0].tolist() if under(clear, np.array([p])) == 0]
    found = {tuple(p) for p in elsewhere.keypoints[0].tolist()}
    assert len(expected) > 50 and found >= set(expected)


def test_other_keypoints_replace_masked_ones(extractor: Any, picture: Image) -> None:
    image, mask = torch.from_numpy(picture).float()[None, None] / 255, left_third()
    extractor.max_keypoints = 40
    found = extractor(image, torch.from_numpy(mask != 0)[None])
    assert extractor(image).mask.sum() == found.mask.sum() == 40
    assert under(mask, found.keypoints[0]) == 0


def test_recorded_cuda_graphs_apply_the_mask_of_each_call(extractor: Any, picture: Image) -> None:
    graphs, extractor.max_keypoints = CudaGraphs(Imitation()), 40
    image, third = torch.from_numpy(picture).float()[None, None] / 255, torch.from_numpy(left_third() != 0)[None]
    for inputs in ((image,), (image, third), (image, ~third), (image,), (image, third)):
        for found, expected in zip(graphs.run(extractor, *inputs), extractor(*inputs)):
            assert torch.equal(found, expected)
    assert len(graphs) == 2  # one with a mask, and one without


# Images and masks of all sizes


@pytest.mark.parametrize("resize", [0, 61, 100, 333])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2), (33, 77), (300, 500)])
def test_a_mask_of_any_size_hides_its_part_of_the_picture(picture: Image, resize: int, shape: tuple[int, int]) -> None:
    matcher = FeatureMatcher(FINE, resize=resize, subpixel=False)  # masks are scaled to whole pixels
    mask = left_third(*shape)
    found = matcher.extract(picture, mask).numpy()
    assert len(found) > 10
    assert under(mask, (found.keypoints + 0.5) * np.array(shape[::-1]) / (WIDTH, HEIGHT) - 0.5) == 0


def test_a_mask_is_scaled_to_the_nearest_pixel() -> None:
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    assert np.array_equal(fit(mask, 4, 4), np.kron(mask, np.ones((2, 2))) != 0)
    assert np.array_equal(fit(np.kron(mask, np.ones((3, 3), np.uint8)), 2, 2), mask != 0)


def test_two_images_extracted_as_a_batch_each_use_their_own_mask(matcher: FeatureMatcher, picture: Image) -> None:
    mask, other = left_third(), np.ascontiguousarray(picture[:, ::-1])
    first, second = matcher.extract_batch([picture, other], [None, mask])
    for found, alone in ((first, matcher.extract(picture)), (second, matcher.extract(other, mask != 0))):
        # Sorted, because keypoints with nearly equal scores may change places.
        columns = [np.sort(np.asarray(features.keypoints), axis=0) for features in (found, alone)]
        assert np.allclose(*columns, atol=0.01)
    assert under(mask, second.keypoints) == 0 < under(mask, first.keypoints)


def test_a_mask_that_hides_everything_leaves_no_keypoint(picture: Image) -> None:
    matcher = FeatureMatcher(FINE, precision="bfloat16")
    none, some = matcher.extract_batch([picture, picture], [np.zeros((5, 5), np.uint8), None])
    assert len(none) == 0 < len(some) and none.size == some.size
    assert matcher.repeated_in_float32 == 0
    assert len(matcher.match(none, some)) == 0


@pytest.mark.parametrize(
    "mask", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.float32), np.zeros((0, 2), np.uint8)], ids=str
)
def test_a_mask_with_a_wrong_shape_or_dtype_is_refused(matcher: FeatureMatcher, picture: Image, mask: Array) -> None:
    with pytest.raises(ValueError, match=r"the mask is .* must be uint8 or bool and \(H, W\)"):
        matcher.extract(picture, mask)
    with pytest.raises(ValueError, match="2 images and 1 masks"):
        matcher.extract_batch([picture, picture], [None])


# The parameters


def write(path: Path, pixels: Array) -> str:
    assert cv2.imwrite(str(path), pixels)
    return str(path)


@pytest.mark.parametrize("kind", ["grey", "colour", "16 bits", "jpeg"])
def test_image_files_of_any_kind_work_as_masks(
    matcher: FeatureMatcher, picture: Image, tmp_path: Path, kind: str
) -> None:
    mask = left_third()
    pixels: Array = {
        "grey": mask // 255,
        "colour": np.dstack([mask] * 3),
        "16 bits": (mask // 255).astype(np.uint16),
        "jpeg": np.where(np.arange(WIDTH) < WIDTH // 3, 0, 255)[None].repeat(HEIGHT, 0).astype(np.uint8),
    }[kind]
    file = write(tmp_path / ("mask.jpg" if kind == "jpeg" else "mask.png"), pixels)
    frame, _ = FrontEnd(FINE.replace({"mask": file}), matcher).register_frame(picture, 1)
    assert frame.mask is not None and np.array_equal(frame.mask, pixels.reshape(HEIGHT, WIDTH, -1)[..., 0] != 0)
    assert len(frame.keypoints) > 10 and under(frame.mask, frame.keypoints) == 0


def test_each_camera_has_a_mask_file_and_a_mask_given_with_the_image_applies_too(
    matcher: FeatureMatcher, picture: Image, tmp_path: Path
) -> None:
    left, right = left_third(), left_third()[::-1, ::-1]
    top = np.full((HEIGHT, WIDTH), 255, np.uint8)
    top[: HEIGHT // 3] = 0
    files = {"mask": write(tmp_path / "left.png", left), "mask_right": write(tmp_path / "right.png", right)}
    front_end = FrontEnd(FINE.replace({"mode": "stereo", **files}), matcher)
    for masks, hidden in (((None, None), (left, right)), ((None, top), (left, np.minimum(top, right)))):
        stereo = front_end.register([picture, picture], [1, 1], masks=masks).stereo
        assert stereo is not None
        for frame, mask in zip((stereo.reference, stereo.current), hidden):
            assert len(frame.keypoints) > 10 and under(mask, frame.keypoints) == 0
            assert frame.mask is not None and np.array_equal(frame.mask, mask != 0)


def test_no_point_of_the_right_image_is_refined_into_its_mask(matcher: FeatureMatcher, picture: Image) -> None:
    front_end, columns = FrontEnd(FINE.replace({"mode": "stereo"}), matcher), np.arange(WIDTH)
    right = np.roll(picture, -1, axis=1)
    stripes = np.where(columns % 6 < 3, 0, 255)[None].repeat(HEIGHT, 0).astype(np.uint8)  # a point can move 1.5 pixels
    for stamp in range(3):
        stereo = front_end.register([picture, right], [stamp, stamp], masks=[None, stripes]).stereo
        assert stereo is not None and len(stereo.points) > 10 and under(stripes, stereo.points) == 0
        assert len(stereo.points) == len(stereo.indices) == len(stereo.scores) == len(stereo.sigmas)


def test_a_frame_without_a_mask_has_none_and_lists_of_the_wrong_length_are_refused(
    matcher: FeatureMatcher, picture: Image
) -> None:
    front_end = FrontEnd(FINE, matcher)
    assert front_end.register_frame(picture, 1)[0].mask is None
    with pytest.raises(ValueError, match="masks has the length 0, not 1 to 2"):
        front_end.register([picture], [2], masks=[])
    with pytest.raises(ValueError, match="frame_ids has the length 1, not 2"):
        front_end.register([picture, picture], [2, 2], frame_ids=["left"])


def broken(path: Path) -> str:
    path.write_bytes(b"no picture")
    return str(path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: {"mask": str(folder / "none.png")}, r"mask is '.*none\.png'.*cannot be read: No such file"),
        (lambda folder: {"mask": str(folder)}, "cannot be read: Is a directory"),
        (lambda folder: {"mask": "a\0b"}, "cannot be read: embedded null byte"),
        (lambda folder: {"mask": broken(folder / "x.png")}, "not an image that OpenCV can read.*use a PNG"),
        (lambda folder: {"mask_right": "x.png"}, "mask_right is 'x.png', but the mode is mono"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, make: Callable[[Path], dict[str, str]], text: str
) -> None:
    with pytest.raises(ParameterError, match=text):
        FrontEnd(FINE.replace(make(tmp_path)))


def test_masks_after_a_jump_back_are_found_even_if_none_was_found_before_it() -> None:
    masks: MaskSynchroniser[int] = MaskSynchroniser(1, 10**7, 30, 10**9)
    again = [round((0.5 + 0.1 * i) * 1e9) for i in range(8)]
    for i, stamp in enumerate(again):
        masks.put(0, stamp, i)
    assert [masks.take(0, stamp) for stamp in (10 * 10**9, 10 * 10**9 + 10**8)] == [None, None]
    assert [masks.take(0, stamp) for stamp in again] == list(range(8))


# Poses with a robot's own body in the image


@pytest.mark.parametrize("part", [0.33, 0.4, 0.55])
def test_matches_beside_a_masked_body_give_correct_poses(part: float) -> None:
    for seed in range(5):
        problem = masked_body(part, seed)
        outcome = judge(problem.estimate(), problem.truth)
        assert outcome.status is PoseStatus.OK and not outcome.wrong_and_sure
        assert outcome.rotation < 0.1 and outcome.direction < 1


@pytest.fixture(scope="module")
def walk() -> tuple[list[Image], Any]:
    """Two images of the walk through the courtyard, and the motion between them."""
    poses = camera_path(23)[19:23:3]
    views = build_scene(0).film(poses, demo_camera(distorted=False), noise=2.0)
    return [cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY) for view in views], relative_motion(*poses)


@pytest.fixture(scope="module")
def default_matcher() -> FeatureMatcher:
    return FeatureMatcher(Parameters(device="cpu", precision="float32"))


@pytest.mark.parametrize("part", [0.33, 0.4, 0.55])
def test_the_pose_is_correct_if_the_robots_body_is_masked(
    default_matcher: FeatureMatcher, walk: Any, texture: Callable[..., Image], part: float
) -> None:
    images, truth = walk
    camera = demo_camera(distorted=False)
    top = round((1 - part) * camera.height)
    body = texture(camera.height - top, camera.width, 7)
    seen = [np.vstack([image[:top], body]) for image in images]
    mask = np.full((camera.height, camera.width), 255, np.uint8)
    mask[top:] = 0

    def pose(masks: list[Image | None]) -> RelativePose:
        front_end = FrontEnd(default_matcher.parameters, default_matcher)
        for number, image in enumerate(seen):
            pair = front_end.register([image], [10**8 * number + 1], camera, masks=masks).pair
        assert pair is not None
        return pair.pose

    masked = judge(pose([mask]), truth)
    assert masked.status is PoseStatus.OK and not masked.wrong_and_sure
    assert masked.rotation < 0.3 and masked.direction < 3
    if part > 0.5:
        assert pose([None]).status is not PoseStatus.OK  # more of the picture stands still than moves
