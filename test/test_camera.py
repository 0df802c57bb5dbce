"""Tests of the calibration: what camera_info means for the received image, and directions of pixels for real lenses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpmatch_ros.geometry.camera import CalibrationError, Camera
from kpmatch_ros.geometry.lens import fold

pytestmark = pytest.mark.usefixtures("geometry")

K = (458.654, 0.0, 367.215, 0.0, 457.296, 248.375, 0.0, 0.0, 1.0)
P = (436.2, 0.0, 364.4, -48.0, 0.0, 436.2, 256.9, 0.0, 0.0, 0.0, 1.0, 0.0)

# Lenses as in real calibrations: name, model, coefficients, focal length, width, height, and the part of the image in
# which the model behaves like a lens.
LENSES = [
    ("drone", "plumb_bob", (-0.28340811, 0.07395907, 0.00019359, 1.76e-05, 0.0), 458.0, 752, 480, 1.0),
    ("four coefficients", "plumb_bob", (-0.28, 0.07, 0.0002, -0.0001), 458.0, 752, 480, 1.0),
    ("pincushion", "plumb_bob", (0.3, 0.1, 0.002, 0.001, 0.0), 400.0, 640, 480, 1.0),
    ("webcam with a fold", "plumb_bob", (-0.35, 0.12, 0.001, -0.001, -0.02), 350.0, 640, 480, 0.8),
    ("depth camera", "rational_polynomial", (0.48, -2.65, 6e-4, -3e-4, 1.57, 0.36, -2.48, 1.49), 610.0, 1280, 720, 1.0),
    (
        "tilted sensor",
        "rational_polynomial",
        (0.1, 0.02, 1e-4, 1e-4, 0.01, 0.4, 0.05, 0.01, 0.001, -0.001, 0.001, 2e-4, 0.01, -0.01),
        700.0,
        1280,
        800,
        1.0,
    ),
    ("fisheye", "equidistant", (0.1, -0.05, 0.02, -0.01), 350.0, 848, 480, 0.98),
    ("fisheye beyond 180 degrees", "equidistant", (-0.01, 0.02, -0.015, 0.003), 285.0, 848, 800, 0.84),
]


def camera_info(**changes: Any) -> SimpleNamespace:
    """Return a ROS 2 sensor_msgs/CameraInfo with these fields changed."""
    roi = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0, do_rectify=False)
    values: dict[str, Any] = dict(
        width=752,
        height=480,
        distortion_model="plumb_bob",
        d=[-0.28, 0.07, 0.0002, 1e-05, 0.0],
        k=list(K),
        p=list(P),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )
    return SimpleNamespace(**{**values, **changes})


def region(x: int, y: int, width: int, height: int) -> SimpleNamespace:
    return SimpleNamespace(x_offset=x, y_offset=y, width=width, height=height, do_rectify=False)


def lens(model: str, coefficients: tuple[float, ...], focal: float, width: int, height: int) -> Camera:
    matrix = [[focal, 0, width / 2 + 3.3], [0, 1.01 * focal, height / 2 - 2.2], [0, 0, 1]]
    return Camera(width, height, np.array(matrix), model, np.array(coefficients))


def pixel_grid(camera: Camera, step: int = 16) -> np.ndarray:
    x, y = np.meshgrid(np.arange(0, camera.width, step), np.arange(0, camera.height, step))
    return np.column_stack([x.ravel(), y.ravel()]).astype(np.float64)


def project(camera: Camera, normalised: np.ndarray) -> np.ndarray:
    """Project with OpenCV's forward model."""
    rays = np.column_stack([normalised, np.ones(len(normalised))])[:, None]
    model = cv2.fisheye if camera.distortion_model == "equidistant" else cv2
    pixels, _ = model.projectPoints(rays, np.zeros(3), np.zeros(3), camera.matrix, camera.distortion)
    return np.asarray(pixels).reshape(-1, 2)


def lens_image(model: str, coefficients: tuple[float, ...], tangents: np.ndarray) -> np.ndarray:
    """Return OpenCV's radius in the image of directions in the plane y = 0, in focal lengths."""
    camera = SimpleNamespace(distortion_model=model, matrix=np.eye(3), distortion=np.array(coefficients))
    return project(camera, np.column_stack([tangents, np.zeros_like(tangents)]))[:, 0]  # type: ignore[arg-type]


def refusal_of(info: Any, rectified: bool = False) -> tuple[str, str]:
    with pytest.raises(CalibrationError) as caught:
        Camera.from_camera_info(info, rectified=rectified)
    return caught.value.reason, str(caught.value)


# Lenses


@pytest.mark.parametrize("name,model,coefficients,focal,width,height,part", LENSES, ids=[entry[0] for entry in LENSES])
def test_directions_project_back_to_their_pixels(
    name: str, model: str, coefficients: tuple[float, ...], focal: float, width: int, height: int, part: float
) -> None:
    camera = lens(model, coefficients, focal, width, height)
    pixels = pixel_grid(camera)
    normalised = camera.normalise(pixels)
    good = np.isfinite(normalised).all(axis=1)
    assert good.mean() >= part
    np.testing.assert_allclose(project(camera, normalised[good]), pixels[good], atol=1e-6)
    np.testing.assert_allclose(camera.project(normalised[good]), pixels[good], atol=1e-6)


@pytest.mark.parametrize("entry", LENSES, ids=[entry[0] for entry in LENSES])
def test_empty_input_gives_empty_output(entry: Any) -> None:
    camera, none = lens(*entry[1:-1]), np.zeros((0, 2))
    assert camera.project(none).shape == camera.normalise(none).shape == (0, 2)
    assert camera.normalise_with_jacobian(none)[1].shape == (0, 2, 2)


@pytest.mark.parametrize("name,model,coefficients,focal,width,height,part", LENSES, ids=[entry[0] for entry in LENSES])
def test_the_jacobian_is_the_derivative_of_the_directions(
    name: str, model: str, coefficients: tuple[float, ...], focal: float, width: int, height: int, part: float
) -> None:
    camera = lens(model, coefficients, focal, width, height)
    pixels = camera.matrix[:2, 2] + np.random.default_rng(0).uniform(-0.3, 0.3, (50, 2)) * min(width, height)
    _, jacobian = camera.normalise_with_jacobian(pixels)
    for axis in range(2):
        step = np.eye(2)[axis] * 0.01
        difference = (camera.normalise(pixels + step) - camera.normalise(pixels - step)) / 0.02
        np.testing.assert_allclose(jacobian[:, :, axis], difference, atol=2e-5 / focal * np.abs(jacobian).max() * focal)


def test_without_distortion_a_direction_is_the_offset_over_the_focal_length() -> None:
    camera = Camera(640, 480, np.array([[500.0, 0, 320], [0, 400.0, 240], [0, 0, 1]]))
    np.testing.assert_allclose(camera.normalise(np.array([[320.0, 240], [820, 640]])), [[0, 0], [1, 1]], atol=1e-12)
    assert camera.focal == 450


def test_skew_is_respected() -> None:
    matrix = np.array([[500.0, 7.0, 320], [0, 400.0, 240], [0, 0, 1]])
    for model, coefficients in (("", ()), ("plumb_bob", (-0.2, 0.05, 0.001, 0.001, 0.0))):
        camera = Camera(640, 480, matrix, model, np.array(coefficients))
        x, y = cv2.undistortPoints(np.array([[[0.3, -0.2]]]), np.eye(3), np.array(coefficients or (0.0,) * 5))[0, 0]
        pixel = matrix @ [0.3, -0.2, 1]
        np.testing.assert_allclose(camera.normalise(pixel[None, :2]), [[x, y]], atol=1e-4)


@pytest.mark.parametrize("coefficients", [(0.43, -0.124, 0, 0, -0.102), (0.35, -0.2, 1e-3, -1e-3, 0.0)])
def test_directions_up_to_the_fold_of_a_pincushion_lens_are_found(
    coefficients: tuple[float, ...],
) -> None:
    """The pixels lie outside of the fold. An earlier search started there and did not converge."""
    camera = lens("plumb_bob", coefficients, 275, 640, 480)
    radius, angle = np.meshgrid(np.linspace(0, 0.97, 60), np.linspace(0, 2 * np.pi, 40))
    radius *= fold(camera.distortion_model, camera.distortion.tobytes())
    directions = np.column_stack([(radius * np.cos(angle)).ravel(), (radius * np.sin(angle)).ravel()])
    pixels = camera.project(directions)
    shown = ((pixels >= 0) & (pixels < (640, 480))).all(axis=1)
    assert shown.sum() > 500
    np.testing.assert_allclose(camera.normalise(pixels[shown]), directions[shown], atol=1e-6)


def test_pixels_beyond_the_fold_of_the_lens_model_have_no_direction() -> None:
    matrix = np.array([[300.0, 0, 190], [0, 300.0, 145], [0, 0, 1]])
    camera = Camera(380, 290, matrix, "plumb_bob", np.array([-0.4, 0, 0, 0]))
    # r (1 - 0.4 r^2) has its maximum 0.608 at r = 0.913.
    inside, outside = camera.normalise(np.array([[190 + 0.6 * 300, 145], [190 + 0.62 * 300, 145]]))
    assert inside[0] < 0.913 and math.isclose(inside[0] * (1 - 0.4 * inside[0] ** 2), 0.6, abs_tol=1e-9)
    assert np.isnan(outside).all()


@pytest.mark.parametrize(
    ("model", "coefficients", "fold"),
    [
        ("plumb_bob", (-0.41, -0.065, 0.0, 0.0, 0.078), 0.98),
        ("plumb_bob", (-0.244, 0.025, 0.0, 0.0), 1.47),
        ("plumb_bob", (-0.46, 0.038, 0.001, 0.0, 0.012), 0.93),
        ("rational_polynomial", (-0.41, -0.065, 0.0, 0.0, 0.078, 0.0, 0.0, 0.0, 1e-4, 0.0, 1e-4, 0.0), 0.98),
        ("equidistant", (-0.6, 0.15, 0.0, 0.0), 1.35),
    ],
)
def test_a_lens_model_that_is_not_monotonic_has_no_directions_beyond_its_fold(
    model: str, coefficients: tuple[float, ...], fold: float
) -> None:
    focal = 200.0
    image = lens_image(model, coefficients, np.linspace(0, fold, 400))
    assert (np.diff(image) > 0).all()
    # Most of the image lies inside the fold, because Camera would refuse the lens otherwise.
    camera = Camera(200, 140, np.array([[focal, 0, 100], [0, focal, 70], [0, 0, 1]]), model, np.array(coefficients))
    inside = camera.normalise(np.column_stack([100 + focal * image[:-5], np.full(395, 70.0)]))
    np.testing.assert_allclose(inside[:, 0], np.linspace(0, fold, 400)[:-5], atol=0.002)
    # At these pixels the model shows directions beyond the fold.
    further = np.linspace(image[-1] + 2 / focal, 2.0, 200)
    assert np.isnan(camera.normalise(np.column_stack([100 + focal * further, np.full(200, 70.0)]))).all()
    outside = camera.project(np.column_stack([np.linspace(1.02 * fold, 20, 200), np.zeros(200)]))
    assert np.isnan(outside).all()


def test_a_fisheye_pixel_ninety_degrees_off_the_axis_has_no_direction() -> None:
    coefficients = np.array([0.0, 0.0, 0.0, 1e-12])  # equidistant to the last digit, but not "no distortion"
    camera = Camera(1000, 1000, np.array([[300.0, 0, 500], [0, 300.0, 500], [0, 0, 1]]), "equidistant", coefficients)
    angles = np.radians([30.0, 85.0, 90.0, 95.0])
    normalised, jacobian = camera.normalise_with_jacobian(np.column_stack([500 + 300 * angles, np.full(4, 500.0)]))
    np.testing.assert_allclose(normalised[:2, 0], np.tan(angles[:2]), rtol=1e-6)
    assert np.isnan(normalised[2:]).all() and np.isnan(jacobian[2:]).all()


def test_a_zero_distortion_has_no_effect_for_any_model() -> None:
    matrix = np.array([[300.0, 0, 320], [0, 300.0, 240], [0, 0, 1]])
    for model in ("", "plumb_bob", "rational_polynomial", "equidistant"):
        for count in (0, 4):
            camera = Camera(640, 480, matrix, model, np.zeros(count))
            np.testing.assert_array_equal(camera.normalise(np.array([[620.0, 240.0]])), [[1.0, 0.0]])


@given(
    st.sampled_from(LENSES),
    st.lists(st.tuples(*2 * [st.floats(width=32)]), max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_any_pixel_gives_a_direction_or_nan_and_never_an_error(entry: Any, pixels: list[tuple[float, float]]) -> None:
    _, model, coefficients, focal, width, height, _ = entry
    camera = lens(model, coefficients, focal, width, height)
    points = np.array(pixels, dtype=np.float32).reshape(-1, 2)
    normalised, jacobian = camera.normalise_with_jacobian(points)
    assert normalised.shape == points.shape and jacobian.shape == (len(points), 2, 2)
    good = np.isfinite(normalised).all(axis=1)
    assert (good == np.isfinite(jacobian).all(axis=(1, 2))).all()
    assert not good[~np.isfinite(points).all(axis=1)].any()
    if good.any():
        np.testing.assert_allclose(project(camera, normalised[good]), points[good].astype(np.float64), atol=1e-5)


def test_points_of_another_shape_are_refused() -> None:
    camera = Camera(640, 480, np.array([[300.0, 0, 320], [0, 300.0, 240], [0, 0, 1]]))
    for points in (np.zeros(2), np.zeros((3, 3))):
        with pytest.raises(ValueError, match=r"\(N, 2\)"):
            camera.normalise(points)


# camera_info


def test_camera_info_gives_matrix_distortion_and_size() -> None:
    camera = Camera.from_camera_info(camera_info(), rectified=False)
    assert (camera.width, camera.height, camera.distortion_model) == (752, 480, "plumb_bob")
    np.testing.assert_array_equal(camera.matrix, np.reshape(K, (3, 3)))
    np.testing.assert_array_equal(camera.distortion, [-0.28, 0.07, 0.0002, 1e-05, 0.0])


def test_the_camera_keeps_its_values_when_the_message_is_reused() -> None:
    info = camera_info(k=np.array(K), d=np.array([0.1, 0.0, 0.0, 0.0, 0.0]))
    camera = Camera.from_camera_info(info, rectified=False)
    info.k[:], info.d[:] = 0, 0
    assert camera.matrix[0, 0] == K[0] and camera.distortion[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        camera.matrix[0, 0] = 1


def test_a_ros_1_camera_info_is_read() -> None:
    info = camera_info()
    old = SimpleNamespace(**{name.upper() if name in "kdp" else name: value for name, value in vars(info).items()})
    np.testing.assert_array_equal(Camera.from_camera_info(old, rectified=False).matrix, np.reshape(K, (3, 3)))


def test_a_real_camera_info_message_is_read() -> None:
    stores = pytest.importorskip("rosbags.typesys")
    store = stores.get_typestore(stores.Stores.ROS2_JAZZY)
    empty = store.types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    header = store.types["std_msgs/msg/Header"](store.types["builtin_interfaces/msg/Time"](0, 0), "camera")
    info = store.types["sensor_msgs/msg/CameraInfo"](
        header,
        480,
        752,
        "plumb_bob",
        np.array([-0.28, 0.07, 0.0002, 1e-05, 0.0]),
        np.array(K),
        np.eye(3).ravel(),
        np.array(P),
        0,
        0,
        empty,
    )
    camera = Camera.from_camera_info(info, rectified=False)
    expected = Camera.from_camera_info(camera_info(), rectified=False)
    pixel = np.array([[10.0, 20.0]])
    np.testing.assert_array_equal(camera.normalise(pixel), expected.normalise(pixel))


def test_a_region_of_interest_shifts_the_pixels_of_the_same_directions() -> None:
    whole = Camera.from_camera_info(camera_info(), rectified=False)
    part = Camera.from_camera_info(camera_info(roi=region(100, 60, 400, 300)), rectified=False)
    assert (part.width, part.height) == (400, 300)
    pixels = np.random.default_rng(0).uniform(0, 300, (20, 2))
    np.testing.assert_allclose(part.normalise(pixels), whole.normalise(pixels + (100, 60)), atol=1e-9)


def test_binning_scales_the_pixels_of_the_same_directions() -> None:
    whole = Camera.from_camera_info(camera_info(), rectified=False)
    binned = Camera.from_camera_info(camera_info(binning_x=2, binning_y=3), rectified=False)
    assert (binned.width, binned.height) == (376, 160)
    pixels = np.random.default_rng(0).uniform(0, 160, (20, 2))
    np.testing.assert_allclose(binned.normalise(pixels), whole.normalise(pixels * (2, 3)), atol=1e-9)


def test_the_region_of_interest_is_in_pixels_before_binning() -> None:
    whole = Camera.from_camera_info(camera_info(), rectified=False)
    both = Camera.from_camera_info(
        camera_info(roi=region(100, 60, 400, 300), binning_x=2, binning_y=2), rectified=False
    )
    assert (both.width, both.height) == (200, 150)
    np.testing.assert_allclose(
        both.normalise(np.array([[10.0, 20.0]])), whole.normalise(np.array([[120.0, 100.0]])), atol=1e-9
    )


def test_rectified_images_use_the_projection_without_distortion() -> None:
    camera = Camera.from_camera_info(camera_info(binning_x=2, binning_y=2), rectified=True)
    assert camera.distortion_model == "" and camera.distortion.size == 0
    np.testing.assert_allclose(camera.matrix, [[218.1, 0, 182.2], [0, 218.1, 128.45], [0, 0, 1]])


def test_directions_of_rectified_pixels_are_those_of_raw_pixels_rotated_by_r() -> None:
    turn = cv2.Rodrigues(np.array([0.01, -0.02, 0.015]))[0]
    raw = Camera.from_camera_info(camera_info(), rectified=False)
    rectified = Camera.from_camera_info(camera_info(), rectified=True)
    pixels = np.random.default_rng(0).uniform((200, 100), (550, 380), (20, 2))
    directions = np.column_stack([raw.normalise(pixels), np.ones(20)]) @ turn.T
    image = directions @ np.reshape(P, (3, 4))[:, :3].T
    np.testing.assert_allclose(
        rectified.normalise(image[:, :2] / image[:, 2:]), directions[:, :2] / directions[:, 2:], atol=1e-9
    )


def test_an_unknown_lens_model_is_accepted_for_rectified_images() -> None:
    info = camera_info(distortion_model="something new", d=[1.0, 2.0])
    assert Camera.from_camera_info(info, rectified=True).distortion.size == 0


# Refusals and their texts


def test_an_uncalibrated_camera_is_reported_as_uncalibrated() -> None:
    reason, text = refusal_of(camera_info(k=[0.0] * 9))
    assert reason == "uncalibrated" and "K[0]" in text and "camera_info_url" in text
    reason, text = refusal_of(camera_info(p=[0.0] * 12), rectified=True)
    assert reason == "uncalibrated" and "P[0]" in text


def test_a_camera_info_of_zeros_counts_as_uncalibrated() -> None:
    info = camera_info(width=0, height=0, k=[0.0] * 9, d=[], p=[0.0] * 12, distortion_model="")
    assert refusal_of(info)[0] == "uncalibrated"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(width=0),
            "width and height are 0x480, which is not a valid image size: set width and height to those of the full",
        ),
        (dict(height=0), "width and height are 752x0, which is not a valid image size: set width and height"),
        (
            dict(roi=region(10, 10, 0, 0)),
            "of the region of interest are 0x0, which is not a valid image size: set roi as",
        ),
        (dict(binning_x=1000), "width and height are 752x480 with binning 1000x1, which is not a valid image size"),
    ],
)
def test_an_empty_image_size_is_refused_with_its_cause(changes: dict[str, Any], said: str) -> None:
    reason, text = refusal_of(camera_info(**changes))
    assert reason == "size" and said in text


def test_an_image_of_another_size_is_refused_naming_both() -> None:
    camera = Camera.from_camera_info(camera_info(), rectified=False)
    camera.check_size(752, 480)
    with pytest.raises(CalibrationError, match=r"1504x960.*752x480") as caught:
        camera.check_size(1504, 960)
    assert caught.value.reason == "size"


@pytest.mark.parametrize(
    "model,coefficients", [("double_sphere", (0.1, 0.0, 0.0, 0.0)), ("", (0.1, 0.0, 0.0, 0.0)), ("fov", (0.9,))]
)
def test_an_unknown_lens_model_is_refused_naming_the_known_ones(model: str, coefficients: tuple[float, ...]) -> None:
    reason, text = refusal_of(camera_info(distortion_model=model, d=list(coefficients)))
    assert reason == "model" and all(known in text for known in ("plumb_bob", "rational_polynomial", "equidistant"))


@pytest.mark.parametrize(
    "changes",
    [
        dict(k=[math.nan, *K[1:]]),
        dict(k=[*K[:2], math.inf, *K[3:]]),
        dict(k=[-458.0, *K[1:]]),
        dict(k=[3.6, *K[1:]]),  # in millimetres
        dict(k=[0.61, 0, 0.49, 0, 0.95, 0.52, 0, 0, 1]),  # as fractions of the image size
        dict(k=[1e9, *K[1:]]),
        dict(k=np.reshape(K, (3, 3)).T.ravel()),  # in column order
        dict(k=list(K[:8])),
        dict(d=[math.nan, 0, 0, 0, 0]),
        dict(d=[0.1, 0.2, 0.3]),
        dict(distortion_model="equidistant", d=[0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_invalid_calibration_values_are_refused(changes: dict[str, Any]) -> None:
    assert refusal_of(camera_info(**changes))[0] == "value"


def test_a_directly_constructed_camera_is_checked_too() -> None:
    with pytest.raises(CalibrationError, match="focal lengths"):
        Camera(640, 480, np.eye(3))
    with pytest.raises(CalibrationError, match="shape"):
        Camera(640, 480, np.eye(4))


# The same lens in other representations


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        *((name, "equidistant") for name in ("fisheye", "Fisheye", "kannala_brandt", "KannalaBrandt", "Kannala-Brandt",
                                             "kannala_brandt4", "EQUIDISTANT", "kb4", "equi")),
        *((name, "plumb_bob") for name in ("radtan", "RadTan", "rad-tan", "radial-tangential", "Plumb Bob")),
        ("Rational Polynomial", "rational_polynomial"),
    ],
)  # fmt: skip
def test_common_aliases_of_lens_models_are_recognised(spelling: str, canonical: str) -> None:
    coefficients = {"equidistant": 4, "plumb_bob": 5, "rational_polynomial": 8}[canonical] * [0.01]
    ours = Camera.from_camera_info(camera_info(distortion_model=canonical, d=coefficients), rectified=False)
    theirs = Camera.from_camera_info(camera_info(distortion_model=spelling, d=coefficients), rectified=False)
    assert theirs.distortion_model == canonical
    pixels = pixel_grid(ours)
    assert np.array_equal(ours.normalise(pixels), theirs.normalise(pixels))


@pytest.mark.parametrize("model", ["equidistant", "fisheye", "plumb_bob", "radtan", "rational_polynomial"])
@pytest.mark.parametrize("zeros", [0, 1, 2, 4, 8, 20])
def test_trailing_zero_coefficients_change_nothing(model: str, zeros: int) -> None:
    coefficients = [0.02, -0.01, 0.001, 0.002]
    camera = Camera.from_camera_info(camera_info(distortion_model=model, d=coefficients), rectified=False)
    longer = Camera.from_camera_info(
        camera_info(distortion_model=model, d=coefficients + zeros * [0.0]), rectified=False
    )
    pixels = pixel_grid(camera)
    np.testing.assert_allclose(longer.normalise(pixels), camera.normalise(pixels), atol=1e-12)


@pytest.mark.parametrize(
    "model", ["none", "", "fov", "double_sphere", "Ω", "equidistant", "ds", "pinhole", "plumb_bob"]
)
@pytest.mark.parametrize("coefficients", [(), (0.0,), (0.0,) * 3, (0.0,) * 5, (0.0,) * 7])
def test_zero_coefficients_are_accepted_for_any_model_name(model: str, coefficients: tuple[float, ...]) -> None:
    info = camera_info(distortion_model=model, d=list(coefficients))
    camera = Camera.from_camera_info(info, rectified=False)
    assert not camera.distortion.any()
    assert np.isfinite(camera.normalise(pixel_grid(camera))).all()


# Impossible lenses


@pytest.mark.parametrize(
    ("model", "coefficients", "focal"),
    [
        ("plumb_bob", (-0.28340811, 0.00019359, 1.76e-05, 0.07395907, 0.0), 300.0),  # k1 p1 p2 k2
        ("plumb_bob", (0.07395907, -0.28340811, 0.00019359, 1.76e-05, 0.0), 250.0),  # k2 k1
        ("plumb_bob", (0.00019359, 1.76e-05, -0.28340811, 0.07395907, 0.0), 458.0),  # p1 p2 k1 k2
        ("plumb_bob", (0.1, -0.05, 0.02, -3.0), 350.0),
        ("rational_polynomial", (0.36, -2.48, 1.49, 0.48, -2.65, 6e-4, -3e-4, 1.57), 610.0),
        ("equidistant", (-0.5, 0.0, 0.0, 0.0), 200.0),
        ("equidistant", (0.02, -0.9, 0.1, 0.0), 250.0),
        # These fold over twice, so the scene is rotated by 180 degrees in nearly all of the image.
        ("plumb_bob", (-1e6, 0.0, 0.0, 0.0), 300.0),
        ("equidistant", (-1e6, 0.0, 0.0, 0.0), 200.0),
    ],
)
def test_a_lens_model_that_is_undefined_in_much_of_the_image_is_refused(
    model: str, coefficients: tuple[float, ...], focal: float
) -> None:
    matrix = [focal, 0, 376, 0, focal, 240, 0, 0, 1]
    reason, text = refusal_of(camera_info(distortion_model=model, d=list(coefficients), k=matrix))
    assert reason == "lens"
    assert " % of the image" in text and "order of the coefficients" in text and str(coefficients[0]) in text


def test_the_distortion_is_ignored_for_rectified_images() -> None:
    info = camera_info(d=[0.00019359, 1.76e-05, -0.28340811, 0.07395907, 0.0])
    assert not Camera.from_camera_info(info, rectified=True).distortion.any()
