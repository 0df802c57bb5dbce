"""Tests from images to matches with the packaged weights: features are valid, in pixels of the original image."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kpmatch_ros import FeatureMatcher, Features, Matches, ParameterError, Parameters
from kpmatch_ros.imaging.images import ImageError

Image = NDArray[np.uint8]


# The threshold is low enough for hundreds of keypoints in small images.
PARAMETERS = Parameters(device="cpu", precision="float32", max_keypoints=300, keypoint_threshold=0.0005)


@pytest.fixture(scope="module")
def loaded() -> FeatureMatcher:
    return FeatureMatcher(PARAMETERS)


@pytest.fixture
def matcher(loaded: FeatureMatcher) -> FeatureMatcher:
    """The matcher with PARAMETERS, regardless of the test before."""
    loaded.configure(PARAMETERS)
    return loaded


def correct_share(
    matches: Matches, features0: Features, features1: Features, homography: NDArray[np.float64], pixels: float
) -> float:
    points0, points1 = features0.keypoints[matches.indices[:, 0]], features1.keypoints[matches.indices[:, 1]]
    expected = cv2.perspectiveTransform(np.asarray(points0, np.float64)[:, None], homography)[:, 0]
    return float((np.linalg.norm(expected - np.asarray(points1), axis=1) < pixels).mean())


def assert_valid(features: Features, width: int, height: int) -> None:
    found = features.numpy()
    count = len(features)
    assert (found.keypoints.shape, found.scores.shape) == ((count, 2), (count,))
    assert found.descriptors.shape == (count, 128)
    assert found.keypoints.dtype == found.scores.dtype == found.descriptors.dtype == np.float32
    for array in (found.keypoints, found.scores, found.descriptors):
        assert np.isfinite(array).all()
    assert features.size == (width, height)
    assert (found.keypoints >= -0.5).all()  # the image's area; in an enlarged image, positions are fractions of a pixel
    assert (found.keypoints <= (width - 0.5, height - 0.5)).all()
    assert (np.diff(found.scores) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(found.descriptors, axis=1), 1, atol=1e-5)


def same(first: Features, second: Features) -> bool:
    return all(
        torch.equal(torch.as_tensor(getattr(first, name)), torch.as_tensor(getattr(second, name)))
        for name in ("keypoints", "scores", "descriptors")
    )


# ------------------------------------------------------------------------------------------------------------ matching


def test_most_matches_of_two_views_show_the_same_point(
    matcher: FeatureMatcher, warped: tuple[Image, Image, NDArray[np.float64]]
) -> None:
    features0, features1 = (matcher.extract(image) for image in warped[:2])
    matches = matcher.match(features0, features1)
    assert len(matches) == len(matches.scores) > 80
    assert correct_share(matches, features0, features1, warped[2], pixels=3) > 0.9
    assert matches.indices.dtype == torch.int64
    assert 0 < matches.layers <= 9
    assert ((matches.scores > 0.1) & (matches.scores <= 1)).all()
    for column in matches.indices.T:
        assert len(column.unique()) == len(column)


def test_features_extracted_once_can_be_used_for_many_pairs(
    matcher: FeatureMatcher, warped: tuple[Image, Image, NDArray[np.float64]]
) -> None:
    features0, features1 = (matcher.extract(image) for image in warped[:2])
    before = [tensor.clone() for tensor in (features0.keypoints, features0.scores, features0.descriptors)]
    first = matcher.match(features0, features1)
    matcher.match(features1, features0)
    matcher.match(features0, features0)
    again = matcher.match(features0, features1)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.scores, again.scores)
    for tensor, copy in zip((features0.keypoints, features0.scores, features0.descriptors), before):
        assert torch.equal(tensor, copy)


def test_numpy_features_give_the_same_matches_as_tensors(
    matcher: FeatureMatcher, warped: tuple[Image, Image, NDArray[np.float64]]
) -> None:
    features0, features1 = (matcher.extract(image) for image in warped[:2])
    arrays0, arrays1 = features0.numpy(), features1.numpy()
    for array in (arrays0.keypoints, arrays0.scores, arrays0.descriptors):
        assert isinstance(array, np.ndarray)
    assert same(arrays0, features0)
    assert same(arrays0.numpy(), features0)
    expected, found = matcher.match(features0, features1), matcher.match(arrays0, arrays1)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    assert isinstance(found.numpy().indices, np.ndarray)
    assert found.numpy().indices.tolist() == found.indices.tolist()
    assert (found.numpy().layers, len(found.numpy())) == (found.layers, len(found))


def test_the_same_images_give_exactly_the_same_results(
    matcher: FeatureMatcher,
    warped: tuple[Image, Image, NDArray[np.float64]],
) -> None:
    results = []
    for each in (matcher, matcher, FeatureMatcher(PARAMETERS)):
        features0, features1 = (each.extract(image) for image in warped[:2])
        results.append((features0, each.match(features0, features1)))
    for features, matches in results[1:]:
        assert same(features, results[0][0])
        assert torch.equal(matches.indices, results[0][1].indices)
        assert torch.equal(matches.scores, results[0][1].scores)


def test_the_nearest_matcher_returns_mutual_nearest_neighbours(
    matcher: FeatureMatcher,
    warped: tuple[Image, Image, NDArray[np.float64]],
) -> None:
    nearest = FeatureMatcher(PARAMETERS, matcher="nearest")
    features0, features1 = (nearest.extract(image) for image in warped[:2])
    assert same(features0, matcher.extract(warped[0]))
    matches = nearest.match(features0, features1)
    similarity = features0.numpy().descriptors @ features1.numpy().descriptors.T
    best0, best1 = similarity.argmax(1), similarity.argmax(0)
    expected = [[i, j] for i, j in enumerate(best0) if best1[j] == i and similarity[i, j] > 0.1]
    assert matches.indices.tolist() == expected
    assert matches.layers == 0
    nearest.configure(nearest.parameters.replace({"ratio_threshold": 0.8}))
    strict = nearest.match(features0, features1)
    assert 20 < len(strict) < len(matches)
    shares = [correct_share(each, features0, features1, warped[2], pixels=3) for each in (matches, strict)]
    assert shares[1] > shares[0]


def test_bfloat16_keeps_most_matches(
    matcher: FeatureMatcher,
    warped: tuple[Image, Image, NDArray[np.float64]],
) -> None:
    half = FeatureMatcher(PARAMETERS, precision="bfloat16")
    features0, features1 = (half.extract(image) for image in warped[:2])
    assert_valid(features0, 240, 180)
    matches = half.match(features0, features1)
    reference = matcher.match(*(matcher.extract(image) for image in warped[:2]))
    assert len(matches) > 0.9 * len(reference)
    assert correct_share(matches, features0, features1, warped[2], pixels=3) > 0.9
    exact = [matcher.extract(image) for image in warped[:2]]
    pairs = {tuple(pair) for pair in half.match(*exact).indices.tolist()}
    expected = {tuple(pair) for pair in reference.indices.tolist()}
    assert len(pairs & expected) > 0.9 * len(expected)


# -------------------------------------------------------------------------------------------------------------- images


def test_grey_as_colour_gives_the_same_features(matcher: FeatureMatcher, warped: Any) -> None:
    expected = matcher.extract(warped[0]).numpy()
    found = matcher.extract(np.repeat(warped[0][..., None], 3, axis=2)).numpy()
    # Keypoints with nearly equal scores may have another order, because of rounding.
    order, order_found = (np.lexsort(each.keypoints.round(1).T) for each in (expected, found))
    np.testing.assert_allclose(found.keypoints[order_found], expected.keypoints[order], atol=1e-3)
    np.testing.assert_allclose(found.scores[order_found], expected.scores[order], atol=1e-4)
    np.testing.assert_allclose(found.descriptors[order_found], expected.descriptors[order], atol=1e-4)


@pytest.fixture(scope="module")
def colour(texture: Any) -> Image:
    """An RGB image with different channels."""
    return np.dstack([texture(96, 128, seed) for seed in (4, 5, 6)])


def points_of(features: Features) -> set[tuple[float, ...]]:
    return {tuple(point) for point in features.keypoints.round().tolist()}


def test_colours_are_converted_to_grey_as_in_opencv(matcher: FeatureMatcher, colour: Image) -> None:
    # OpenCV rounds the grey values.
    found = points_of(matcher.extract(colour))
    grey, swapped = (
        points_of(matcher.extract(cv2.cvtColor(colour, code))) for code in (cv2.COLOR_RGB2GRAY, cv2.COLOR_BGR2GRAY)
    )
    assert len(found & grey) > 0.9 * len(found)
    assert len(found & swapped) < 0.7 * len(found)


def layouts(colour: Image) -> dict[str, Image]:
    """Return the same RGB image in the memory layouts of image messages."""
    alpha = np.dstack([colour, np.full_like(colour[..., :1], 99)])
    padded = np.zeros((96, 150, 3), np.uint8)
    padded[:, :128] = colour
    read_only = colour.copy()
    read_only.flags.writeable = False
    bgr = np.ascontiguousarray(colour[..., ::-1])
    bgr.flags.writeable = False
    return {
        "bgr": np.ascontiguousarray(colour[..., ::-1])[..., ::-1],
        "read-only": read_only,
        "read-only bgr": bgr[..., ::-1],
        "rgba": alpha[..., :3],
        "bgra": np.ascontiguousarray(alpha[..., [2, 1, 0, 3]])[..., 2::-1],
        "padded rows": padded[:, :128],
        "upside down in memory": np.ascontiguousarray(colour[::-1])[::-1],
        "mirrored in memory": np.ascontiguousarray(colour[:, ::-1])[:, ::-1],
        "column by column": np.asfortranarray(colour),
    }


@pytest.mark.parametrize("layout", layouts(np.zeros((96, 128, 3), np.uint8)))
@pytest.mark.parametrize("resize", [0, 100])
def test_the_memory_layout_of_an_image_has_no_effect(
    matcher: FeatureMatcher, colour: Image, layout: str, resize: int
) -> None:
    matcher.configure(PARAMETERS.replace({"resize": resize}))
    image = layouts(colour)[layout]
    assert np.array_equal(image, colour)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = matcher.extract(image).numpy()
    expected = matcher.extract(colour).numpy()
    assert len(expected.keypoints) > 50
    np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=1e-4)
    np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-4)
    assert np.array_equal(image, layouts(colour)[layout])  # and the image is not changed


def test_an_image_may_be_a_tensor(matcher: FeatureMatcher, warped: Any) -> None:
    assert same(matcher.extract(torch.from_numpy(warped[0])), matcher.extract(warped[0]))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((48, 64), np.float32),
        np.zeros((48, 64), np.uint16),
        np.zeros((48, 64), bool),
        np.zeros((48, 64, 4), np.uint8),
        np.zeros((48, 64, 1), np.uint8),
        np.zeros((3, 48, 64), np.uint8),
        np.zeros((1, 1, 48, 64), np.uint8),
        np.zeros(64, np.uint8),
        np.zeros((0, 0), np.uint8),
        np.zeros((0, 5), np.uint8),
        np.zeros((5, 0, 3), np.uint8),
    ],
    ids=lambda image: f"{image.dtype} {image.shape}",
)
def test_an_array_that_is_not_an_image_is_refused(matcher: FeatureMatcher, image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"the image is .* must be uint8"):
        matcher.extract(image)


@pytest.mark.parametrize("given", ["a.png", None, [[0, 1]]], ids=["path", "None", "list"])
def test_an_image_that_is_not_an_array_is_refused_with_a_remedy(
    matcher: FeatureMatcher, warped: Any, given: Any
) -> None:
    with pytest.raises(TypeError, match=r"the image is a \w+; .* numpy\.asarray\(image\.convert\('RGB'\)\)"):
        matcher.extract(given)
    if given is not None:  # an invalid mask
        with pytest.raises(TypeError, match=r"the mask is a \w+; .* numpy\.asarray\(mask\.convert\('L'\)\)"):
            matcher.extract(warped[0], given)
    with pytest.raises(TypeError, match="it takes Features, as extract returns them"):
        matcher.match(warped[0], given)


def test_an_image_too_large_for_the_networks_is_refused_with_the_remedy(matcher: FeatureMatcher) -> None:
    huge = np.zeros((4320, 7680), np.uint8)
    with pytest.raises(ImageError, match=r"7680 x 4320 pixels is too large .* set the parameter resize") as error:
        matcher.extract(huge)
    assert error.value.reason == "size"
    matcher.configure(PARAMETERS.replace({"resize": 160}))
    matcher.extract(huge)


@pytest.mark.parametrize("resize", [0, 64])
@pytest.mark.parametrize("content", ["black", "white", "noise"])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (7, 7), (8, 8), (9, 17), (16, 16), (7, 900), (900, 7), (33, 200), (61, 67)]
)
def test_images_of_any_size_and_content_give_valid_features_that_can_be_matched(
    matcher: FeatureMatcher, content: str, height: int, width: int, resize: int
) -> None:
    matcher.configure(PARAMETERS.replace({"resize": resize}))
    value = {"black": 0, "white": 255}.get(content)
    noise = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    features = matcher.extract(noise if value is None else np.full((height, width), value, np.uint8))
    assert_valid(features, width, height)
    matches = matcher.match(features, features).numpy()
    assert matches.indices.shape == (len(matches.scores), 2)
    assert np.isfinite(matches.scores).all()


def test_a_covered_camera_gives_almost_no_matches(matcher: FeatureMatcher, warped: Any) -> None:
    # With the threshold published with the weights.
    matcher.configure(PARAMETERS.replace({"keypoint_threshold": -1.0}))
    picture, random = matcher.extract(warped[0]), np.random.default_rng(0)
    dark = [matcher.extract(random.normal(20, noise, (180, 240)).round().astype(np.uint8)) for noise in (0, 0, 1, 1)]
    for pair in ((dark[0], dark[1]), (dark[2], dark[3]), (dark[0], picture), (picture, dark[2])):
        assert len(matcher.match(*pair)) <= 3


# ------------------------------------------------------------------------------------------------------------- options


def test_keypoints_of_an_enlarged_image_are_in_pixels_of_the_original(matcher: FeatureMatcher, texture: Any) -> None:
    picture = texture(48, 64, 9)
    enlarged = matcher.extract(cv2.resize(picture, (192, 144), interpolation=cv2.INTER_LINEAR)).numpy()
    matcher.configure(PARAMETERS.replace({"resize": 192}))
    found = matcher.extract(picture).numpy()
    assert found.size == (64, 48)
    assert len(found.keypoints) > 30
    np.testing.assert_allclose(found.keypoints, (enlarged.keypoints - 1) / 3, atol=1e-4)


def test_keypoints_of_a_reduced_image_are_in_pixels_of_the_original(matcher: FeatureMatcher, texture: Any) -> None:
    picture = texture(96, 128, 8)
    expected = matcher.extract(picture).numpy()
    # Each pixel of the picture becomes a block of 3 x 3. At a third of the size, the result is the picture again.
    matcher.configure(PARAMETERS.replace({"resize": 128}))
    found = matcher.extract(np.kron(picture, np.ones((3, 3), np.uint8))).numpy()
    assert found.size == (384, 288)
    assert len(found.keypoints) > 50
    np.testing.assert_allclose(found.keypoints, 3 * expected.keypoints + 1, atol=1e-3)


@pytest.mark.parametrize(
    ("height", "width", "seen"), [(480, 640, (48, 64)), (640, 480, (64, 48)), (33, 640, (3, 64)), (1, 900, (1, 64))]
)
def test_resizing_sets_the_longest_side(
    matcher: FeatureMatcher, monkeypatch: pytest.MonkeyPatch, height: int, width: int, seen: tuple[int, int]
) -> None:
    shapes = []
    forward = matcher.extractor.forward
    monkeypatch.setattr(matcher.extractor, "forward", lambda image: shapes.append(image.shape) or forward(image))
    matcher.configure(PARAMETERS.replace({"resize": 64}))
    matcher.extract(np.zeros((height, width), np.uint8))
    assert shapes == [(1, 1, *seen)]


def test_max_keypoints_keeps_the_best_keypoints(matcher: FeatureMatcher, warped: Any) -> None:
    matcher.configure(PARAMETERS.replace({"max_keypoints": 16384}))
    everything = matcher.extract(warped[0])
    for count in (1, 7, 100):
        matcher.configure(PARAMETERS.replace({"max_keypoints": count}))
        best = matcher.extract(warped[0])
        assert len(best) == count < len(everything)
        assert torch.equal(best.keypoints, everything.keypoints[:count])
        assert torch.allclose(best.descriptors, everything.descriptors[:count], atol=1e-6)


def test_parameters_take_effect_while_running(matcher: FeatureMatcher, warped: Any) -> None:
    features0, features1 = (matcher.extract(image) for image in warped[:2])
    median = float(features0.scores.median())
    matcher.configure(PARAMETERS.replace({"keypoint_threshold": median}))
    assert (matcher.extract(warped[0]).scores > median).all()
    matcher.configure(PARAMETERS.replace({"keypoint_threshold": 1.0}))
    assert len(matcher.extract(warped[0])) == 0
    matcher.configure(PARAMETERS.replace({"nms_radius": 12, "subpixel": False}))
    points = matcher.extract(warped[0]).keypoints
    apart = (points[:, None] - points[None]).abs().amax(-1).fill_diagonal_(99)
    assert apart.min() > 12
    matcher.configure(PARAMETERS.replace({"border": 30, "subpixel": False}))
    points = matcher.extract(warped[0]).keypoints
    assert (points >= 30).all()
    assert (points < torch.tensor([240 - 30, 180 - 30])).all()
    matcher.configure(PARAMETERS.replace({"filter_threshold": 0.8}))
    assert 0 < matcher.match(features0, features1).scores.min() > 0.8
    matcher.configure(PARAMETERS.replace({"depth_confidence": -1.0, "width_confidence": -1.0}))
    assert matcher.match(features0, features1).layers == 9
    matcher.configure(PARAMETERS.replace({"depth_confidence": 0.01}))
    assert matcher.match(features0, features1).layers < 9
    matcher.configure(PARAMETERS)
    assert same(matcher.extract(warped[0]), features0)


def test_confidences_without_effect_are_reported_as_such(random_folder: Callable[..., Path]) -> None:
    def confidences_with(**options: Any) -> list[str]:
        options = {"device": "cpu", "precision": "float32", **options}
        matcher = FeatureMatcher.from_pretrained(random_folder(superglue=options.pop("superglue", None)), **options)
        return list(matcher.confidences().values())

    assert confidences_with(depth_confidence=0.9, width_confidence=-1.0) == ["0.9", "off"]
    lightglue = FeatureMatcher(PARAMETERS, width_confidence=0.9)
    for above, said in (
        (0, "0.9"),
        (100, "0.9, for images with more than 100 keypoints"),
        (4096, "no effect: up to 4096 keypoints per image, keeping all points is faster"),
    ):
        lightglue.matcher.prune_above = above  # type: ignore[union-attr]
        assert lightglue.confidences()["width_confidence"] == said
    no_lightglue = ["no effect: the matcher is not LightGlue"] * 2
    assert list(FeatureMatcher(PARAMETERS, matcher="nearest").confidences().values()) == no_lightglue
    assert confidences_with(superglue={}) == no_lightglue
    pytest.importorskip("onnxruntime")
    assert all(text.startswith("no effect: backend onnxruntime") for text in confidences_with(backend="onnxruntime"))


def test_a_folder_with_matcher_and_detector_uses_its_own_detector(
    random_folder: Callable[..., Path], texture: Any
) -> None:
    matcher = FeatureMatcher.from_pretrained(random_folder(), device="cpu", precision="float32", max_keypoints=50)
    features = matcher.extract(texture(64, 96, 0))
    assert features.descriptors.shape == (50, 64)
    assert len(matcher.match(features, features)) > 5


# ------------------------------------------------------------------------------------------------------ several at once


def test_a_batch_of_different_sizes_gives_the_same_features_as_each_image_alone(
    matcher: FeatureMatcher, texture: Any
) -> None:
    images = [texture(64, 96, 0), texture(80, 72, 1), texture(64, 96, 2), texture(5, 5, 3)]
    found = matcher.extract_batch(images)
    assert len(found) == len(images)
    for image, features in zip(images, found):
        alone = matcher.extract(image)
        assert features.size == alone.size == image.shape[::-1]
        assert torch.allclose(features.keypoints, alone.keypoints, atol=1e-3)
        assert torch.allclose(features.descriptors, alone.descriptors, atol=1e-5)
    assert matcher.extract_batch([]) == []


def test_the_assignment_covers_every_keypoint_of_both_images(matcher: FeatureMatcher, warped: Any) -> None:
    features = [matcher.extract(image) for image in warped[:2]]
    matches = matcher.match(*features)
    both = matches.assignment
    assert both.matches0.shape == both.scores0.shape == both.layers0.shape == (1, len(features[0]))
    assert both.matches1.shape == both.scores1.shape == both.layers1.shape == (1, len(features[1]))
    index0, index1 = matches.indices.T
    assert torch.equal(both.matches0[0, index0], index1) and torch.equal(both.matches1[0, index1], index0)
    assert torch.equal(both.scores1[0, index1], matches.scores)
    assert (both.matches0 >= 0).sum() == (both.matches1 >= 0).sum() == len(matches)
    assert both.layers0.max() <= matches.layers
    assert isinstance(matches.numpy().assignment.matches0, np.ndarray)


def test_features_with_another_descriptor_size_are_refused(matcher: FeatureMatcher, warped: Any) -> None:
    features = matcher.extract(warped[0])
    foreign = replace(features, descriptors=features.descriptors[:, :64])
    with pytest.raises(ValueError, match=r"shape \(\d+, 64\); the matcher lightglue-superpoint-open takes \(N, 128\)"):
        matcher.match(features, foreign)


def test_warming_up_does_not_change_the_results(matcher: FeatureMatcher) -> None:
    fresh = FeatureMatcher(PARAMETERS)
    fresh.warm_up(96, 64)
    image = np.random.default_rng(1).integers(0, 256, (64, 96), dtype=np.uint8)
    assert same(fresh.extract(image), matcher.extract(image))


def test_warming_up_accepts_the_largest_resize() -> None:
    matcher = FeatureMatcher(device="cpu", profile="fast", max_keypoints=64, resize=3341)
    matcher.warm_up()  # 640x480 would become 3341x2506 pixels, which is too large
    with pytest.raises(ImageError, match="3341 x 2506 pixels is too large"):
        matcher.extract(np.zeros((480, 640), np.uint8))


def test_unknown_options_and_wrong_values_are_refused() -> None:
    with pytest.raises(ParameterError, match="no parameter 'max_keypoint'"):
        FeatureMatcher(max_keypoint=3)
    with pytest.raises(ParameterError, match="max_keypoints is 0; it must be 1 to 16384"):
        FeatureMatcher(max_keypoints=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_gpu_finds_nearly_the_same_matches_as_the_cpu(matcher: FeatureMatcher, warped: Any, precision: str) -> None:
    on_gpu = FeatureMatcher(PARAMETERS, device="cuda", precision=precision)
    features = [on_gpu.extract(image) for image in warped[:2]]
    assert features[0].keypoints.is_cuda
    matches = on_gpu.match(*features).numpy()
    reference = matcher.match(*(matcher.extract(image) for image in warped[:2]))
    assert len(matches) > 0.9 * len(reference)
    assert correct_share(matches, features[0].numpy(), features[1].numpy(), warped[2], pixels=3) > 0.9
    on_gpu.match(features[0].numpy(), features[1].numpy())
