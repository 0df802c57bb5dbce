"""Tests of the Python API in other programs: stored features, torch images, and one network for several users."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import kpmatch_ros
from kpmatch_ros import Camera, FeatureMatcher, Features, FrontEnd, Matches, Parameters, StereoCamera
from kpmatch_ros.bags.demo import demo_frames
from kpmatch_ros.geometry.stereo_agreement import check_stereo_matches
from kpmatch_ros.geometry.stereo_motion import estimate_stereo_motion
from kpmatch_ros.geometry.two_view import estimate_relative_pose

Image = NDArray[np.uint8]
PARAMETERS = Parameters(device="cpu", precision="float32", max_keypoints=200)
HEIGHT, WIDTH = 120, 160
CAMERA = Camera(WIDTH, HEIGHT, np.array([[150.0, 0, 79.5], [0, 150.0, 59.5], [0, 0, 1]]))


@pytest.fixture(scope="module")
def matcher() -> FeatureMatcher:
    return FeatureMatcher(PARAMETERS)


@pytest.fixture(scope="module")
def images(texture: Callable[..., Image]) -> list[Image]:
    """Two views of a textured plane, shifted by 9 pixels."""
    wide = texture(HEIGHT, WIDTH + 20, 4)
    return [np.ascontiguousarray(wide[:, x : x + WIDTH]) for x in (0, 9)]


@pytest.fixture(scope="module")
def features(matcher: FeatureMatcher, images: list[Image]) -> list[Features]:
    return [features.numpy() for features in matcher.extract_batch(images)]


@pytest.fixture(scope="module")
def expected(matcher: FeatureMatcher, features: list[Features]) -> Matches:
    return matcher.match(*features).numpy()


# Stored features


def arrays(features: Features, change: Callable[[Any], Any]) -> Features:
    return replace(
        features,
        keypoints=change(features.keypoints),
        scores=change(features.scores),
        descriptors=change(features.descriptors),
    )


def read_only(array: Any) -> Any:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # read-only, as from a message or a file


@pytest.mark.parametrize(
    "change",
    [
        read_only,
        np.asfortranarray,
        lambda array: array.astype(np.float64),
        lambda array: array.astype(">f4"),
        lambda array: array.tolist(),
        lambda array: array[::-1].copy()[::-1],
        lambda array: torch.from_numpy(array.copy()).double(),
        lambda array: pickle.loads(pickle.dumps(torch.from_numpy(array.copy()))),
    ],
    ids=["read-only", "columns", "float64", "big-endian", "lists", "reversed", "tensors", "pickled"],
)
def test_features_match_in_any_array_type_and_memory_layout(
    matcher: FeatureMatcher, features: list[Features], expected: Matches, change: Callable[[Any], Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = matcher.match(arrays(features[0], change), arrays(features[1], change)).numpy()
    assert len(expected) > 50
    assert np.array_equal(found.indices, expected.indices) and np.array_equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"descriptors": np.ones((10, 128), np.float32)}, r"keypoints are of shape \(\d+, 2\) instead of \(10, 2\)"),
        ({"keypoints": np.ones((10, 2))}, r"keypoints are of shape \(10, 2\)"),
        ({"keypoints": np.ones((200, 3))}, r"keypoints are of shape \(200, 3\)"),
        ({"scores": np.ones(10)}, r"scores are of shape \(10,\)"),
        ({"size": (0, 0)}, "0 x 0 pixels"),
    ],
)
def test_features_with_inconsistent_shapes_are_refused(
    matcher: FeatureMatcher, features: list[Features], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        matcher.match(replace(features[0], **changes), features[1])


def test_results_can_be_searched_in_lists_and_put_into_sets(
    matcher: FeatureMatcher, features: list[Features], images: list[Image]
) -> None:
    front_end = FrontEnd(PARAMETERS, matcher)
    results = [front_end.register([image], [stamp], CAMERA) for stamp, image in enumerate(images)]
    pair = results[1].pair
    assert pair is not None
    for kept in (features, results, [results[0].frame, results[1].frame], [None, pair], [None, expected]):
        assert kept.index(kept[1]) == 1 and len(set(map(id, kept))) == len(set(kept))  # type: ignore[arg-type]


# A front end


def registered(front_end: FrontEnd, images: list[Any], stamps: Any = (0, 10**8), **options: Any) -> Any:
    for image, stamp in zip(images, stamps):
        result = front_end.register([image], [stamp], CAMERA, **options)
    return result.pair


def test_a_front_end_takes_the_parameters_of_the_networks_it_is_given(images: list[Image]) -> None:
    few = FeatureMatcher(PARAMETERS, max_keypoints=40)
    assert FrontEnd(matcher=few).parameters.max_keypoints == 40
    other = FrontEnd(PARAMETERS.replace({"max_keypoints": 30}), few)
    assert len(other.register(images[:1], [0]).frame.keypoints) == 30


def test_a_front_end_accepts_torch_images_and_masks(matcher: FeatureMatcher, images: list[Image]) -> None:
    tensors = [torch.from_numpy(np.dstack([image] * 3)) for image in images]
    found = registered(FrontEnd(PARAMETERS, matcher), tensors, masks=[torch.ones(HEIGHT, WIDTH, dtype=torch.bool)])
    plain = registered(FrontEnd(PARAMETERS, matcher), [tensor.numpy() for tensor in tensors])
    assert len(plain.points) > 50 and np.array_equal(found.points, plain.points)


def test_the_next_image_may_reuse_the_memory_of_the_previous_one(matcher: FeatureMatcher, images: list[Image]) -> None:
    plain = registered(FrontEnd(PARAMETERS, matcher), images)
    front_end, memory = FrontEnd(PARAMETERS, matcher), np.empty_like(images[0])
    for stamp, image in enumerate(images):
        memory[:] = image
        result = front_end.register([memory], [stamp * 10**8], CAMERA)
    assert result.pair is not None and np.array_equal(result.pair.points, plain.points)


def test_an_image_that_is_refused_changes_nothing(matcher: FeatureMatcher, images: list[Image]) -> None:
    plain = registered(FrontEnd(PARAMETERS, matcher), images)
    front_end = FrontEnd(PARAMETERS, matcher)
    front_end.register([images[0]], [0], CAMERA)
    with pytest.raises(ValueError, match="float64"):
        front_end.register([images[1] / 255], [10**12], CAMERA)  # with a much later stamp
    pair = front_end.register([images[1]], [10**8], CAMERA).pair
    assert pair is not None and np.array_equal(pair.points, plain.points)


@pytest.mark.parametrize("stamps", [np.array([5, 10**8], np.uint64), np.array([5, 10**8])])
def test_numpy_integers_are_accepted_as_stamps(matcher: FeatureMatcher, images: list[Image], stamps: Any) -> None:
    front_end = FrontEnd(PARAMETERS, matcher)
    assert registered(front_end, images, stamps) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert front_end.register([images[0]], [stamps[0]]).pair is None  # the time goes back


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stamps": [0.1]}, "a stamp is 0.1; it must be a whole number of nanoseconds"),
        ({"stamps": [None]}, "a stamp is None"),
        ({"camera": np.eye(3)}, r"must be a kpmatch_ros\.Camera, not a ndarray: use Camera\(width, height, matrix\)"),
        ({"frame_ids": "camera"}, "frame_ids is 'camera'"),
        ({"frame_ids": [None]}, "frame_ids has None"),
        ({"masks": None}, "masks is None"),
        ({"stamps": 5}, "stamps is 5; it must be a list with one item for each image"),
        ({"images": None}, "images is None"),
        ({"images": ["a.png"]}, "the image is a str"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_by_name(
    matcher: FeatureMatcher, images: list[Image], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        FrontEnd(PARAMETERS, matcher).register(**{"images": images[:1], "stamps": [0], **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stamps": []}, "stamps has the length 0, not 1"),
        ({"stamps": [1, 2]}, "stamps has the length 2, not 1"),
        ({"frame_ids": []}, "frame_ids has the length 0, not 1 to 2"),
        ({"masks": [None] * 3}, "masks has the length 3, not 1 to 2"),
        ({"images": []}, "images has the length 0, not 1 to 2"),
    ],
)
def test_a_list_of_the_wrong_length_is_refused_by_name(
    matcher: FeatureMatcher, images: list[Image], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        FrontEnd(PARAMETERS, matcher).register(**{"images": images[:1], "stamps": [0], **given})


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"cameras": (CAMERA,)}, ValueError, "cameras has the length 1, not 2"),
        ({"cameras": None}, TypeError, "cameras is None"),
        ({"cameras": CAMERA}, TypeError, "cameras is Camera"),
        ({"stamps": (1,)}, ValueError, "stamps has the length 1, not 2"),
        ({"stamps": (1.5, 2.5)}, TypeError, "a stamp is 1.5"),
        ({"frame_ids": ("cam0",)}, ValueError, "frame_ids has the length 1, not 2"),
        ({"frame_ids": "cam0"}, TypeError, "frame_ids is 'cam0'"),
    ],
)
def test_match_features_requires_two_cameras_stamps_and_frame_ids(
    matcher: FeatureMatcher, features: list[Features], given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        FrontEnd(PARAMETERS, matcher).match_features(*features, **given)


def test_match_features_refuses_a_matrix_instead_of_a_camera(matcher: FeatureMatcher, features: list[Features]) -> None:
    with pytest.raises(TypeError, match=r"the camera must be a kpmatch_ros\.Camera, not a ndarray"):
        FrontEnd(PARAMETERS, matcher).match_features(*features, cameras=(CAMERA, np.eye(3)))  # type: ignore[arg-type]


def test_motion_estimation_refuses_wrong_types_of_cameras() -> None:
    points, pair = np.zeros((20, 2)), StereoCamera(CAMERA, CAMERA, np.eye(3), np.array([-0.1, 0, 0]))
    with pytest.raises(TypeError, match=r"the camera must be a kpmatch_ros\.Camera, not a ndarray"):
        estimate_relative_pose(points, points, CAMERA, np.eye(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the stereo camera must be a kpmatch_ros\.StereoCamera, not a Camera"):
        estimate_stereo_motion(points, points, points, points, pair, CAMERA)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the stereo camera must be a kpmatch_ros\.StereoCamera, not a Camera"):
        check_stereo_matches(points, points, CAMERA)  # type: ignore[arg-type]


def test_configuring_other_networks_does_not_rename_the_loaded_ones(matcher: FeatureMatcher) -> None:
    loaded = matcher.parameters
    other = PARAMETERS.replace({"extractor": "disk", "matcher": "nearest", "max_keypoints": 77})
    front_end = FrontEnd(other, matcher)
    front_end.configure(other)
    assert front_end.parameters == matcher.parameters
    assert (matcher.parameters.extractor, matcher.parameters.matcher) == (loaded.extractor, loaded.matcher)
    assert matcher.extractor.max_keypoints == matcher.parameters.max_keypoints == 77
    matcher.configure(PARAMETERS)


def test_the_code_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "rclpy" not in code]
    frames, info = list(demo_frames(2)), next(demo_frames(1)).camera_info
    names: dict[str, Any] = {
        "image0": frames[0].image,
        "image1": frames[1].image,
        "matrix": np.reshape(info.k, (3, 3)),
        "distortion": info.d,
        "frames": [(frame.image, 10**8 * number) for number, frame in enumerate(frames)],
    }
    for code in blocks:
        exec(code, names)
    assert len(names["points0"]) > 100 and " OK " in capsys.readouterr().out


def test_every_public_name_exists() -> None:
    assert all(getattr(kpmatch_ros, name).__name__ == name for name in kpmatch_ros.__all__)


@pytest.mark.parametrize("refine", [False, True])
def test_a_buffer_that_is_used_for_every_image_changes_no_result(texture: Any, refine: bool) -> None:
    """`refine` is off for two frames, and the first frame has no calibration."""
    wide = texture(240, 420, 3)
    views = [np.ascontiguousarray(wide[:, 3 * i : 3 * i + 320]) for i in range(4)]
    camera = Camera(320, 240, np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]]))
    matcher = FeatureMatcher(matcher="nearest", device="cpu", precision="float32", max_keypoints=128)
    found = []
    for buffer in (None, np.empty_like(views[0])):
        front_end = FrontEnd(matcher.parameters.replace({"refine": False}), matcher)
        for i, view in enumerate(views):
            if i == 2:
                front_end.configure(front_end.parameters.replace({"refine": refine}))
            if buffer is not None:
                buffer[:] = view
            pair = front_end.register([view if buffer is None else buffer], [i * 10**8], camera if i else None).pair
            if pair is not None:
                found.append((pair.points, pair.pose.rotation))
    assert len(found) == 6
    for (points, rotation), (again, turned) in zip(found[:3], found[3:]):
        np.testing.assert_array_equal(points, again)
        np.testing.assert_array_equal(rotation, turned)
