"""Tests that stored features match as two frames do, or are refused with a reason, without an effect on the frames."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kpmatch_ros import FeatureMatcher, Features, Parameters
from kpmatch_ros.bags import camera_info_message, new_message
from kpmatch_ros.frames import Frame
from kpmatch_ros.front_end import FrontEnd
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import PoseStatus
from kpmatch_ros.kept_features import FeatureError
from kpmatch_ros.match_request import answer
from kpmatch_ros.messages import Pairing, feature_array, match_array, relative_pose

Image = NDArray[np.uint8]
HEIGHT, WIDTH = 120, 160
CAMERA = Camera(WIDTH, HEIGHT, np.array([[150.0, 0, 79.5], [0, 150.0, 59.5], [0, 0, 1]]))
PARAMETERS = Parameters(device="cpu", precision="float32", max_keypoints=300, keypoint_threshold=0.0005)


@pytest.fixture(scope="module")
def matcher() -> FeatureMatcher:
    return FeatureMatcher(PARAMETERS)


@pytest.fixture
def front_end(matcher: FeatureMatcher) -> FrontEnd:
    made = FrontEnd(PARAMETERS, matcher)
    made.configure(PARAMETERS)
    return made


@pytest.fixture(scope="module")
def images(texture: Callable[..., Image]) -> list[Image]:
    """Two views of a textured plane, shifted by 9 pixels."""
    wide = texture(HEIGHT, WIDTH + 20, 4)
    return [np.ascontiguousarray(wide[:, x : x + WIDTH]) for x in (0, 9)]


@pytest.fixture
def features(matcher: FeatureMatcher, images: list[Image]) -> list[Features]:
    return [features.numpy() for features in matcher.extract_batch(images)]


# The front end


def test_stored_features_give_the_matches_of_the_matcher_and_a_pose(
    front_end: FrontEnd, features: list[Features]
) -> None:
    pair = front_end.match_features(features[0], features[1], (CAMERA, CAMERA), (5, 7), ("left", "left"))
    expected = front_end.matcher.match(*features).numpy()
    assert np.array_equal(pair.indices, expected.indices) and np.array_equal(pair.scores, expected.scores)
    moved = pair.points - pair.reference_points
    assert len(moved) > 100 and (np.linalg.norm(moved + (9, 0), axis=1) < 3).mean() > 0.9
    assert (pair.reference.stamp, pair.current.stamp, pair.current.frame_id, pair.reset) == (5, 7, "left", False)
    assert len(pair.track_ids) == 0 and pair.pose.num_matches == len(moved)
    assert pair.pose.status in (PoseStatus.OK, PoseStatus.AMBIGUOUS, PoseStatus.NO_TRANSLATION)


def test_without_a_calibration_there_are_matches_and_the_pose_has_the_status_no_calibration(
    front_end: FrontEnd, features: list[Features]
) -> None:
    for cameras in ((None, None), (CAMERA, None), (None, CAMERA)):
        pair = front_end.match_features(*features, cameras=cameras)
        assert len(pair.indices) > 100 and pair.pose.status is PoseStatus.NO_CALIBRATION


def test_matching_stored_features_has_no_effect_on_the_frames(
    matcher: FeatureMatcher, images: list[Image], features: list[Features]
) -> None:
    found = []
    for asked in (False, True):
        front_end = FrontEnd(PARAMETERS, matcher)
        for number, image in enumerate([*images, images[0]]):
            _, pair = front_end.register_frame(image, number + 1, CAMERA)
            if asked:
                front_end.match_features(*features, cameras=(CAMERA, CAMERA), stamps=(10**12, 0))
        assert pair is not None
        found.append(pair)
    assert np.array_equal(found[0].track_ids, found[1].track_ids) and found[1].reference.stamp == 2
    assert np.array_equal(found[0].points, found[1].points)
    assert np.array_equal(found[0].pose.translation, found[1].pose.translation)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Features], Features]:
    def change_it(features: Features) -> Features:
        return replace(features, **{name: change(np.array(getattr(features, name)))})

    return change_it


def with_value(index: Any, value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[index] = value
        return array

    return change


FAULTS: list[tuple[Callable[[Features], Features], str]] = [
    (changed("keypoints", with_value((3, 1), np.nan)), "keypoints hold NaN"),
    (changed("scores", with_value(0, np.inf)), "scores hold NaN or infinity"),
    (changed("descriptors", with_value((0, 5), np.nan)), "descriptors hold NaN"),
    (changed("descriptors", lambda d: 3 * d), "a descriptor has the length 3 instead of 1"),
    (changed("descriptors", with_value(0, 0.0)), "a descriptor has the length 0 instead of 1"),
    (changed("descriptors", lambda d: 1e38 * d), "a descriptor has the length 1e\\+38"),
    (changed("descriptors", lambda d: d[:, :100]), "descriptors are of shape .* from another extractor"),
    (changed("scores", lambda s: s[1:]), "scores are of shape"),
    (changed("keypoints", with_value((0, 0), WIDTH)), r"the point \(160, .* outside of the image of 160 x 120"),
    (changed("keypoints", with_value((0, 1), -0.6)), "outside of the image"),
    (lambda f: replace(f, size=(0, HEIGHT)), "the image has 0 x 120 pixels"),
    (lambda f: replace(f, size=(WIDTH, 2**32 - 1)), "the image has 160 x 4294967295 pixels"),
    (lambda f: Features(f.keypoints[:0], f.scores[:0], f.descriptors[:0], f.size), "there are no features"),
    (
        lambda f: Features(*(np.repeat(a, 9, axis=0) for a in (f.keypoints, f.scores, f.descriptors)), f.size),
        "more than max_keypoints \\(300\\)",
    ),
]


@pytest.mark.parametrize(("change", "said"), FAULTS, ids=[said for _, said in FAULTS])
@pytest.mark.parametrize("side", [0, 1])
def test_features_that_cannot_be_used_are_refused_with_the_reason(
    front_end: FrontEnd, features: list[Features], change: Callable[[Features], Features], said: str, side: int
) -> None:
    features[side] = change(features[side])
    name = ("reference_features", "features")[side]
    with pytest.raises(FeatureError, match=f"^{name}: .*{said}"):
        front_end.match_features(*features)


def test_stored_features_are_still_matched_after_max_keypoints_is_lowered(
    matcher: FeatureMatcher, features: list[Features]
) -> None:
    """A robot that lowers its load keeps its map."""
    front_end = FrontEnd(PARAMETERS, matcher)
    before = front_end.match_features(*features)
    front_end.configure(PARAMETERS.replace({"max_keypoints": 50}))
    after = front_end.match_features(*features)
    assert np.array_equal(before.indices, after.indices) and len(after.indices) > 100
    front_end.configure(PARAMETERS)


def test_a_calibration_of_another_size_is_refused(front_end: FrontEnd, features: list[Features]) -> None:
    other = Camera(2 * WIDTH, 2 * HEIGHT, CAMERA.matrix)
    with pytest.raises(
        FeatureError, match=r"^features: the image is 160x120 pixels but its calibration is for 320x240"
    ):
        front_end.match_features(*features, cameras=(CAMERA, other))


# Messages


def request_for(features: list[Features], camera: Camera | None = CAMERA) -> Any:
    """Return a request of the service."""
    arrays = [
        feature_array(frame_of(item, number), PARAMETERS.extractor, new_message) for number, item in enumerate(features)
    ]
    none = new_message("sensor_msgs/msg/CameraInfo")
    info = none if camera is None else camera_info_message(camera, 0, "camera")
    return SimpleNamespace(
        reference_features=arrays[0],
        features=arrays[1],
        reference_camera_info=copy.deepcopy(info),
        camera_info=copy.deepcopy(info),
    )


def frame_of(features: Features, number: int) -> Frame:
    none = np.zeros(0, np.uint64)
    keypoints = np.asarray(features.keypoints)
    return Frame(number, 10**9 + number, np.zeros((0, 0)), f"camera {number}", None, features, keypoints, none, 0.0)


def respond(front_end: FrontEnd, request: Any) -> Any:
    return answer(front_end, request, SimpleNamespace(), new_message)


def test_a_request_is_answered_with_matches_and_pose(front_end: FrontEnd, features: list[Features]) -> None:
    response = respond(front_end, request_for(features))
    pair = front_end.match_features(*features, (CAMERA, CAMERA), (10**9, 10**9 + 1), ("camera 0", "camera 1"))
    expected = match_array(pair, Pairing.REQUESTED, PARAMETERS.extractor, PARAMETERS.matcher, new_message)
    expected.match_ms = response.matches.match_ms
    assert (response.success, response.message) == (True, "")
    assert repr(response.matches) == repr(expected) and len(expected.scores) > 100
    assert len(response.matches.inliers) == len(expected.scores)
    assert repr(response.relative_pose) == repr(relative_pose(pair, new_message))
    without = respond(front_end, request_for(features, None))
    assert without.success and without.relative_pose.status == PoseStatus.NO_CALIBRATION


REQUEST_FAULTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda r: setattr(r.features, "extractor", "disk"), "features: they are from the extractor 'disk', but this node"),
    (lambda r: setattr(r.features, "extractor", ""), "they are from the extractor ''"),
    (lambda r: setattr(r.features, "descriptor_size", 64), "descriptors holds .* numbers, but .* require"),
    (lambda r: setattr(r.features, "descriptor_size", 0), "descriptors holds"),
    (lambda r: setattr(r.features, "descriptor_size", 2**32 - 1), "descriptors holds"),
    (lambda r: setattr(r.features, "points", r.features.points[:-1]), "points holds .* numbers"),
    (lambda r: setattr(r.features, "scores", r.features.scores[:-1]), "points holds .* numbers"),
    (lambda r: setattr(r.features, "width", 0), "the image has 0 x 120 pixels"),
    (lambda r: r.features.points.__setitem__(0, np.nan), "keypoints hold NaN"),
    (lambda r: setattr(r, "features", empty(2**32 - 1)), "descriptors are of shape|there are no features"),
    (lambda r: setattr(r, "reference_features", empty(128)), "reference_features: there are no features"),
    (lambda r: setattr(r.camera_info, "width", 5), "features: the image is 160x120 pixels but its calibration"),
    (lambda r: r.camera_info.k.__setitem__(2, np.nan), "camera_info of features: "),
    (lambda r: r.reference_camera_info.k.__setitem__(0, 0), "camera_info of reference_features: .* not calibrated"),
    (lambda r: set_unknown_lens_model(r.camera_info), "camera_info of features: .*glass"),
]


def set_unknown_lens_model(info: Any) -> None:
    info.distortion_model, info.d = "glass", np.ones(5)


def empty(descriptor_size: int) -> Any:
    return new_message(
        "kpmatch_ros/msg/FeatureArray", width=WIDTH, height=HEIGHT, descriptor_size=descriptor_size,
        extractor=PARAMETERS.extractor,
    )  # fmt: skip


@pytest.mark.parametrize(("break_it", "said"), REQUEST_FAULTS, ids=[said for _, said in REQUEST_FAULTS])
def test_a_request_that_cannot_be_used_is_refused_with_the_reason(
    front_end: FrontEnd, features: list[Features], break_it: Callable[[Any], Any], said: str
) -> None:
    import re

    request = request_for(features)
    break_it(request)
    response = respond(front_end, request)
    assert not response.success and re.search(said, response.message), response.message
    assert response.relative_pose.status == PoseStatus.FAILED and response.relative_pose.pose.pose.orientation.w == 1
    assert response.matches.header == request.features.header and len(response.matches.scores) == 0
