"""Tests that every parameter has one declaration, and that the declaration rejects all wrong values."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kpmatch_ros.parameter_file import applies, read_parameter_file, read_sections
from kpmatch_ros.parameters import (
    PROFILES,
    Declaration,
    ParameterError,
    Parameters,
    declaration,
    declarations,
)

CONFIGURATION = Path(__file__).resolve().parents[1] / "config" / "matcher.yaml"

# These names are used in launch files. Those with a star may change while the node runs.
CONTRACT = (
    "mode extractor matcher device precision max_keypoints* keypoint_threshold* nms_radius border resize "
    "filter_threshold* depth_confidence* width_confidence* reference* keyframe_min_matches* keyframe_max_parallax* "
    "queue image_transport rectified max_reprojection_error* min_inliers* sync_tolerance autostart"
)


def wrong_values(item: Declaration) -> list[Any]:
    wrong: list[Any] = [None, [item.default], {}]
    if item.type is not str:
        wrong += ["wrong", ""]
    if item.type is not bool:
        wrong += [True]
    if item.type in (bool, str):
        wrong += [0, 1.5]
    if item.type is int:
        wrong += [0.5, float(item.default), 10**30]
    if item.type is float:
        wrong += [10**400, math.nan, math.inf, -math.inf]
    if item.minimum is not None:
        wrong += [item.type(item.minimum - 1), item.type(-(10**12))]
        if item.special is not None:
            wrong = [value for value in wrong if value != item.special]
            wrong += [(item.minimum + item.special) / 2, item.special - 1]
    if item.maximum is not None:
        wrong += [item.type(item.maximum + 1), item.type(10**12)]
    if item.choices:
        wrong += ["wrong", "", item.choices[0].upper(), item.choices[0] + " "]
    if item.pattern:
        wrong += ["wrong value", f"{item.default} ", f"{item.default}\n"]
        wrong += [""] if item.default else []  # a parameter with an empty default may be empty
    return wrong


each_parameter = pytest.mark.parametrize("item", declarations(), ids=lambda item: item.name)


@each_parameter
def test_wrong_values_are_refused_and_named(item: Declaration) -> None:
    for value in wrong_values(item):
        with pytest.raises(ParameterError, match=rf"^{item.name} is {re.escape(repr(value))}; ."):
            Parameters(**{item.name: value})
        with pytest.raises(ParameterError, match=f"^{item.name} is "):
            Parameters().replace({item.name: value})


def right_values(item: Declaration) -> list[Any]:
    right = [item.default, *item.choices]
    right += [item.type(limit) for limit in (item.minimum, item.maximum, item.special) if limit is not None]
    if item.type is bool:
        right += [True, False]
    if item.name == "device":
        right += ["auto", "cpu", "cuda", "cuda:0", "cuda:12"]
    return right


@each_parameter
def test_allowed_values_are_accepted(item: Declaration) -> None:
    for value in right_values(item):
        parameters = Parameters().replace({item.name: value})
        assert getattr(parameters, item.name) == value
        assert type(getattr(parameters, item.name)) is item.type


@pytest.mark.parametrize("device", ["cuda:", "cuda:-1", "cuda:x", "gpu", "cuda:999999999999", "CPU", "mps:0"])
def test_an_invalid_device_is_refused(device: str) -> None:
    with pytest.raises(ParameterError, match="device is "):
        Parameters(device=device)


def test_integers_are_accepted_for_floats() -> None:
    assert Parameters(max_gap=2).max_gap == 2.0
    assert type(Parameters(max_gap=2).max_gap) is float


def test_float16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"precision float16 .* float32, bfloat16 or auto"):
        Parameters(device="cpu", precision="float16")
    with pytest.raises(ParameterError, match="precision float16"):
        Parameters(device="cpu").replace({"precision": "float16"})


def test_equal_names_for_base_frame_and_odom_frame_are_refused() -> None:
    with pytest.raises(ParameterError, match="base_frame and odom_frame are both 'odom'"):
        Parameters(mode="stereo", publish_odometry=True, base_frame="odom")


def test_replacing_values_changes_neither_the_others_nor_the_original() -> None:
    original = Parameters(max_keypoints=77, queue="all")
    changed = original.replace({"max_keypoints": 88, "resize": 640})
    assert (original.max_keypoints, original.resize) == (77, 0)
    assert (changed.max_keypoints, changed.resize, changed.queue) == (88, 640, "all")
    with pytest.raises(dataclasses.FrozenInstanceError):
        original.max_keypoints = 5  # type: ignore[misc]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"no parameter 'max_keypoint'.*max_keypoints"):
        Parameters().replace({"max_keypoint": 5})


def test_the_parameters_users_rely_on_exist_and_are_dynamic_as_promised() -> None:
    dynamic = {item.name: item.dynamic for item in declarations()}
    for entry in CONTRACT.split():
        assert dynamic[entry.removesuffix("*")] == entry.endswith("*"), entry


def test_every_parameter_is_described() -> None:
    for item in declarations():
        assert len(item.description) > 20
        assert item.description[0].islower() or item.description.startswith("LightGlue")
        assert not item.description.endswith(".")


def test_the_configuration_file_sets_every_parameter_to_its_default() -> None:
    parsed = yaml.safe_load(CONFIGURATION.read_text())
    assert list(parsed) == ["/**"]
    values = parsed["/**"]["ros__parameters"]
    # Parameters that a profile sets must not be in the file, because they would override the profile.
    named = [item for item in declarations() if item.name not in {*PROFILES["fast"]}]
    assert list(values) == [item.name for item in named]
    for item in named:
        assert values[item.name] == item.default
        assert type(values[item.name]) is item.type  # ROS reads 1 and 1.0 as different types
    assert Parameters(**values) == Parameters()


def test_a_profile_sets_several_parameters_and_explicit_values_take_precedence(tmp_path: Path) -> None:
    assert Parameters.given({}) == Parameters.given({"profile": "accurate"}) == Parameters()
    fast = Parameters.given({"profile": "fast"})
    assert (fast.extractor, fast.matcher) == ("superpoint-open-fast", "lightglue-superpoint-open-fast")
    assert (fast.max_keypoints, fast.depth_confidence) == (512, 0.9)
    assert Parameters.given({"profile": "fast", "max_keypoints": 700}).max_keypoints == 700
    assert Parameters.given({"profile": "fast", "depth_confidence": -1.0}).depth_confidence == -1.0
    with pytest.raises(ParameterError, match="profile is 'fastest'; it must be one of accurate, fast"):
        Parameters.given({"profile": "fastest"})
    file = tmp_path / "parameters.yaml"
    file.write_text(CONFIGURATION.read_text().replace("profile: accurate", "profile: fast"))
    assert read_parameter_file(file) == fast
    file.write_text("/**:\n  ros__parameters:\n    max_keypoints: 300\n")
    mixed = read_parameter_file(file, options={"profile": "fast"})
    assert (mixed.matcher, mixed.max_keypoints) == ("lightglue-superpoint-open-fast", 300)


# fmt: off
SPELLINGS = [
    "y", "N", "on", "No", "true", "FALSE", "1_000", "1:30", "0x10", "-0x1F", "010", "-010", "08", "+5", "-0", "1e-3",
    "1E3", ".5", "5.", "-.5e2", ".inf", "-.INF", ".nan", "inf", "nan", "2024-01-01", "99999999999", "0b11", "0o17",
    "1d", "~", "null", "'5'", '"true"', "'y'", "/dev/null", "nearest",
]
# fmt: on


def test_values_in_parameter_files_are_read_as_a_ros_node_reads_them(tmp_path: Path) -> None:
    import rclpy
    from rclpy.node import Node

    file = tmp_path / "parameters.yaml"
    lines = "".join(f"    p{number}: {text}\n" for number, text in enumerate(SPELLINGS))
    file.write_text(f"/**:\n  ros__parameters:\n{lines}")
    context = rclpy.Context()
    rclpy.init(context=context, args=["--ros-args", "--params-file", str(file)])
    node = Node(
        "matcher",
        context=context,
        automatically_declare_parameters_from_overrides=True,
        start_parameter_services=False,
        enable_rosout=False,
    )
    try:
        expected = {text: node.get_parameter(f"p{number}").value for number, text in enumerate(SPELLINGS)}
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)
    ((_, values),) = read_sections(file)
    found = dict(zip(SPELLINGS, values.values()))
    # compared as text, because nan is not equal to nan, but True is equal to 1
    assert {text: repr(value) for text, value in found.items()} == {
        text: repr(value) for text, value in expected.items()
    }


def test_a_section_may_appear_twice(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    section = "/**:\n  ros__parameters:\n"
    file.write_text(f"{section}    max_keypoints: 300\n    border: 7\n{section}    max_keypoints: 301\n")
    assert read_parameter_file(file) == Parameters(max_keypoints=301, border=7)


def test_a_section_may_be_nested_below_the_root(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    file.write_text("/:\n  matcher:\n    ros__parameters: {border: 7}\n")
    assert read_parameter_file(file) == Parameters(border=7)


def test_a_file_with_a_yaml_alias_is_refused_as_in_ros(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    file.write_text("/a: &a {ros__parameters: {border: 7}}\n/matcher: *a\n")
    with pytest.raises(ParameterError, match=r"is not a YAML file: ROS accepts no YAML alias.*line 2"):
        read_parameter_file(file)


@pytest.mark.parametrize("section", ["/matcher(", "/[matcher", "/m.tcher", "/matcher?", "/matche+r"])
def test_a_section_name_is_not_a_regular_expression(section: str, tmp_path: Path) -> None:
    assert not applies(section, "/matcher")
    file = tmp_path / "parameters.yaml"
    file.write_text(f'"{section}":\n  ros__parameters:\n    max_keypoints: 300\n')
    with pytest.raises(ParameterError, match="has no section for /matcher"):
        read_parameter_file(file)


def test_numpy_numbers_and_paths_are_accepted_as_values(tmp_path: Path) -> None:
    given = Parameters.given({"max_keypoints": np.int64(300), "filter_threshold": np.float32(0.25), "min_inliers": 20,
                              "max_gap": np.int32(3), "mask": tmp_path / "mask.png"})  # fmt: skip
    assert given == Parameters(
        max_keypoints=300, filter_threshold=0.25, min_inliers=20, max_gap=3.0, mask=str(tmp_path / "mask.png")
    )
    assert type(given.max_keypoints) is int and type(given.filter_threshold) is type(given.max_gap) is float
    for name, value in (("max_keypoints", np.float64(300)), ("max_keypoints", np.True_), ("max_gap", 10**400)):
        with pytest.raises(ParameterError, match=f"{name} is "):
            Parameters.given({name: value})


def test_off_may_be_written_without_quotes_where_yaml_reads_false() -> None:
    assert Parameters(stretch=yaml.safe_load("off")).stretch == "off"
    for name, value in (("stretch", True), ("queue", False)):
        with pytest.raises(ParameterError, match=f"{name} is {value}; it must be a str"):
            Parameters(**{name: value})


def test_a_value_without_effect_is_reported_with_what_it_needs() -> None:
    assert Parameters().idle() == []
    (said,) = Parameters(providers="cuda, cpu").idle()
    assert said == "providers is 'cuda, cpu' and has no effect: it needs backend 'onnxruntime', which is 'torch'"
    assert Parameters(providers="cuda, cpu", backend="onnxruntime").idle() == []
    values = {"base_frame": "base_link", "keyframe_min_matches": 50, "ratio_threshold": 0.8, "lost_tracks": 5}
    reported = Parameters.given({**values, "refine": False}).idle()
    assert {text.split()[0] for text in reported} == values.keys()
    served = {"publish_odometry": True, "mode": "stereo", "reference": "keyframe", "matcher": "nearest"}
    assert Parameters.given({**values, **served}).idle() == []
    in_onnx = {"backend": "onnxruntime", "profile": "fast"}
    assert Parameters.given(in_onnx).idle() == [], "nobody chose the profile's depth_confidence"
    (said,) = Parameters.given({**in_onnx, "depth_confidence": 0.5}).idle()
    assert said.startswith("depth_confidence is 0.5 and has no effect: it needs backend 'torch'")


def test_a_profile_with_none_of_its_values_in_effect_is_reported() -> None:
    assert Parameters.given({"profile": "fast", "max_keypoints": 300}).idle() == []
    (said,) = Parameters(profile="fast").idle()
    assert said.startswith("profile is 'fast' and has no effect: extractor, matcher, max_keypoints, depth_confidence")


def test_what_a_parameter_needs_is_a_valid_setting_and_is_in_its_description() -> None:
    for item in declarations():
        if item.needs is not None:
            declaration(item.needs[0]).check(item.needs[1])
            assert item.needs[0] in item.description, item.name
