"""Tests that the compiled geometry gives NumPy's results, and that everything works without it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from compiled_geometry import ROOT, SOURCES, build, needed, with_compiler, with_numpy
from geometry_fuzz import align_spoilt_patches, check_alignment, patches_to_find, undistort_hostile_points

import kpmatch_ros
from kpmatch_ros.cli import doctor
from kpmatch_ros.geometry import compiled
from kpmatch_ros.geometry.lens import undistort
from kpmatch_ros.geometry.patches import Alignment, align, cut, no_change, signed
from kpmatch_ros.imaging.images import MAX_SIDE

SIZE = (320, 240)


def interpolation_step() -> float:
    """Return the step of OpenCV's interpolation in pixels: 1/32 in version 4, none in version 5."""
    ramp = np.tile(np.arange(8, dtype=np.float32), (8, 1))
    place = np.full((1, 1), 3 + 1 / 128, np.float32)
    seen = cv2.remap(ramp, place, np.full_like(place, 3), cv2.INTER_LINEAR)
    return 0.0 if abs(seen[0, 0] - place[0, 0]) < 1e-6 else 1 / 32


@pytest.fixture(scope="module")
def film(walk: list[np.ndarray]) -> list[np.ndarray]:
    """Two consecutive images of the demo sequence."""
    return [signed(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)) for image in walk[:2]]


def compare(ours: Alignment, numpys: Alignment, at_least: int) -> None:
    """Check that both find the same patches at the same places, and at least ``at_least`` of them."""
    step = interpolation_step()
    assert (ours.good == numpys.good).mean() > (0.98 if step else 0.998)  # a patch at a limit may differ
    good = ours.good & numpys.good
    assert good.sum() >= at_least
    for name, values in vars(numpys).items():
        mine = getattr(ours, name)
        assert mine.dtype == values.dtype and mine.shape == values.shape
        assert np.array_equal(np.isnan(mine), np.isnan(values)), name
    # OpenCV 4 samples each pixel up to half a step from its position. For strongly deformed patches, the iterations
    # amplify that: one in ten may differ by more. One version may also stop iterating before the other does.
    share, loose = (90, step) if step else (99, 0.0)
    assert np.abs(ours.points - numpys.points)[good].max() < 0.02 or step
    for name, tolerance in (("points", 1e-3 + loose), ("shapes", 1e-4 + loose / 2), ("correlation", 1e-3 + loose / 2)):
        difference = np.abs(getattr(ours, name) - getattr(numpys, name))[good]
        assert np.percentile(difference, share) < tolerance, name
    # The sigmas result from differences of large sums of squares. An AMD EPYC without AVX-512 needs 0.032 at the edge.
    difference = np.abs(ours.sigmas / numpys.sigmas - 1)[good]
    assert np.percentile(difference, share) < 0.05 + 4 * loose


@needed
@pytest.mark.parametrize("shifts", [0, 1, 3])
@pytest.mark.parametrize("deformed", [0.0, 0.1, 0.5])
def test_patches_are_aligned_as_by_numpy(film: list[np.ndarray], shifts: int, deformed: float) -> None:
    random = np.random.default_rng(shifts)
    corners = cv2.goodFeaturesToTrack((film[0][::2, ::2] + 128).astype(np.uint8), 300, 0.01, 5)[:, 0]
    anywhere = random.uniform(-10, np.array(SIZE) + 10, (1200, 2))  # including the borders and points outside
    points = np.concatenate([corners, anywhere]).astype(np.float32)
    patches = cut(film[0], points)
    start = points + random.normal(0, 0.7, points.shape).astype(np.float32)
    shapes = no_change(len(points)) + random.normal(0, deformed, (len(points), 2, 2)).astype(np.float32)
    for image, at_least in zip(film, (10, 3)):  # the second image has moved: few patches are found, some by chance
        arguments = patches, image, start, shapes, shifts
        compare(align(*arguments), with_numpy(align, *arguments), at_least)


@needed
def test_patches_at_the_border_are_aligned_as_by_numpy(film: list[np.ndarray]) -> None:
    width, height = SIZE
    side = np.arange(-2.1, 12, 0.75, dtype=np.float32)  # no value at a limit
    near, along = (grid.ravel() for grid in np.meshgrid(side, np.arange(20, height - 20, 20, dtype=np.float32)))
    for points in ((near, along), (width - 1 - near, along), (along, near), (along, height - 1 - near)):
        places = np.stack(points, axis=1)
        arguments = cut(film[0], places), film[0], places, no_change(len(places))
        compare(align(*arguments), with_numpy(align, *arguments), 50)


@needed
def test_points_and_shapes_that_are_not_finite_are_not_found(film: list[np.ndarray]) -> None:
    points = np.full((8, 2), 100, np.float32)
    patches, shapes = cut(film[0], points), no_change(8)
    points[1], points[2, 1], points[3], points[4] = np.nan, np.nan, np.inf, -1e30
    shapes[5, 0, 0], shapes[6] = np.nan, 0
    arguments = patches, film[0], points, shapes, 1
    found, expected = align(*arguments), with_numpy(align, *arguments)
    assert found.good.tolist() == expected.good.tolist() == [True, *6 * [False], True]
    # The other fields of failed patches may differ, except for points that are NaN.
    np.testing.assert_array_equal(np.isnan(found.points[:3]), np.isnan(expected.points[:3]))


@needed
def test_empty_input_is_accepted_and_mismatched_arrays_are_refused(film: list[np.ndarray]) -> None:
    points = np.full((3, 2), 50, np.float32)
    patches = cut(film[0], points)
    assert len(align(patches[:0], film[0], points[:0], no_change(0)).points) == 0
    for wrong in ((patches[:2], points, no_change(3)), (patches[:, 1:], points, no_change(3))):
        with pytest.raises(ValueError, match="shape"):
            align(wrong[0], film[0], *wrong[1:])


@needed
def test_inputs_are_not_modified_and_may_have_any_memory_layout(film: list[np.ndarray]) -> None:
    points = np.random.default_rng(0).uniform(20, 200, (50, 2)).astype(np.float32)
    patches, shapes = cut(film[0], points), no_change(50)
    given = patches.copy(), film[0].copy(), points.copy(), shapes.copy()
    found = align(patches, film[0], points, shapes, 1)
    assert all(np.array_equal(*both) for both in zip(given, (patches, film[0], points, shapes)))
    columns = [np.asfortranarray(each) for each in given]
    assert all(np.array_equal(*both) for both in zip(vars(align(*columns, 1)).values(), vars(found).values()))


@needed
def test_random_patches_in_images_of_any_size_are_aligned_as_by_numpy() -> None:
    random = np.random.default_rng(0)
    found: tuple[list[Alignment], ...] = ([], [])
    for _ in range(100):
        patches, image, start, shapes = patches_to_find(random, 1)
        arguments = patches, image, start, shapes, int(random.integers(0, 4))
        for parts, part in zip(found, (align(*arguments), with_numpy(align, *arguments))):
            parts.append(part)
            check_alignment(part, image)
    ours, numpys = (Alignment(*map(np.concatenate, zip(*(vars(part).values() for part in parts)))) for parts in found)
    compare(ours, numpys, 150)


@needed
def test_corrupted_patches_are_not_found_and_do_not_affect_the_others() -> None:
    for seed in range(200):
        align_spoilt_patches(np.random.default_rng(seed))


@needed
def test_an_image_is_refused_only_if_a_side_exceeds_the_limit_of_the_node() -> None:
    points = np.float32([[20, 20], [32_740, 20]])
    for height, width in ((40, MAX_SIDE), (MAX_SIDE, 40)):
        image = signed(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
        there = points if width > height else points[:, ::-1]
        assert align(cut(image, there), image, there, no_change(2)).good.all()
    patches = cut(image, points[:, ::-1])
    # With the second size, whose number of rows is not exact in float32, the C code once read past the end.
    for shape in ((40, 2 * MAX_SIDE + 1), (2**25 + 7, 4)):
        with pytest.raises(ValueError, match="has a side of more than 32766"):
            align(patches, np.broadcast_to(np.float32(0), shape), points, no_change(2))


LENSES = [
    ("plumb_bob", (-0.28340811, 0.07395907, 0.00019359, 1.76e-05)),
    ("plumb_bob", (-0.35, 0.12, 0.001, -0.001, -0.02)),
    ("plumb_bob", (-0.4, 0.0, 0.0, 0.0, 0.0)),  # folds over inside the image
    ("plumb_bob", (0.3, 0.1, 0.002, 0.001, 0.0)),
    ("rational_polynomial", (0.48, -2.65, 6e-4, -3e-4, 1.57, 0.36, -2.48, 1.49)),
]


@needed
@pytest.mark.parametrize(("model", "coefficients"), LENSES)
def test_lens_distortion_is_undone_as_by_numpy(model: str, coefficients: tuple[float, ...]) -> None:
    distorted = np.random.default_rng(0).normal(0, 0.5, (2000, 2))
    distorted[:6] = [(0, 0), (np.nan, 0), (0, np.inf), (49, 1), (-60, 0), (1e200, 1e-320)]
    for points in (distorted, np.asfortranarray(distorted), distorted[:0]):
        arguments = points, model, np.array(coefficients)
        for ours, numpys in zip(undistort(*arguments), with_numpy(undistort, *arguments)):
            assert ours.shape == numpys.shape and ours.dtype == numpys.dtype
            # Rounding of doubles. It is larger for the jacobian at a fold, whose determinant is nearly zero.
            np.testing.assert_allclose(ours, numpys, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("call", [pytest.param(lambda f, x: f(x), id="compiled", marks=needed), with_numpy])
def test_undistortion_with_any_coefficients_gives_valid_directions_or_nan(call: Callable[..., Any]) -> None:
    for seed in range(200):
        call(undistort_hostile_points, np.random.default_rng(seed))


@with_compiler
def test_random_input_causes_no_undefined_behaviour_in_c(tmp_path: Path) -> None:
    # A separate program, which ends on an overflow or on an unaligned or foreign memory access. It is compiled without
    # optimisation, which takes longer than 40 cases gain from it and may remove such an operation with its check.
    package = tmp_path / "kpmatch_ros"
    installed = Path(kpmatch_ros.__file__).parent
    for folder in ("geometry", "imaging", "runtime"):
        shutil.copytree(installed / folder, package / folder, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(installed / "__init__.py", package)
    library = package / "geometry" / compiled.LIBRARY.name
    undefined = ["-fsanitize=undefined", "-fsanitize=float-cast-overflow", "-fsanitize-undefined-trap-on-error"]
    if build(library, "-O0", "-fopenmp-simd", *undefined).returncode:
        pytest.skip("the compiler has no such sanitizers")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, ROOT / "test" / "geometry_fuzz.py", "40", library]
    ran = subprocess.run(program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr


# Availability


def test_the_built_package_contains_the_compiled_library() -> None:
    if ROOT in Path(kpmatch_ros.__file__).parents and "site-packages" not in kpmatch_ros.__file__:
        pytest.skip("this is the checkout, not what was built from it")
    assert compiled.available()


def test_a_missing_library_gives_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.open_library(tmp_path / "none.so") is None


def test_a_file_that_is_not_a_library_gives_a_warning(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.warns(RuntimeWarning, match=r"text\.so cannot be loaded"):
        assert compiled.open_library(tmp_path / "text.so") is None


@needed
def test_a_library_for_another_processor_gives_a_warning(tmp_path: Path) -> None:
    content = bytearray(compiled.LIBRARY.read_bytes())
    content[18] = 183 if content[18] != 183 else 62  # e_machine of ELF: AArch64, x86-64
    (tmp_path / "other.so").write_bytes(content)
    with pytest.warns(RuntimeWarning, match=f"cannot be loaded on {platform.machine()}.*Rebuild the package"):
        assert compiled.open_library(tmp_path / "other.so") is None


@with_compiler
@pytest.mark.parametrize(
    ("source", "text"),
    [("int kpmatch_version(void) { return 99; }", "has version 99"), ("int other;", "cannot be loaded")],
)
def test_a_library_of_another_version_gives_a_warning(tmp_path: Path, source: str, text: str) -> None:
    (tmp_path / "other.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "other.so", "other.c"], cwd=tmp_path, check=True)
    with pytest.warns(RuntimeWarning, match=text):
        assert compiled.open_library(tmp_path / "other.so") is None


SOURCE = "".join(map(Path.read_text, SOURCES))
FUNCTIONS = re.findall(r"^(?:void|int\d+_t) (\w+)\(", SOURCE, re.M)


@with_compiler
@pytest.mark.parametrize("lacking", FUNCTIONS)
def test_a_library_that_lacks_a_function_gives_a_warning(tmp_path: Path, lacking: str) -> None:
    version = re.search(r"^#define VERSION (\d+)", SOURCE, re.M)
    assert version is not None
    stubs = [f"int kpmatch_version(void) {{ return {version[1]}; }}"]
    stubs += [f"void {name}(void) {{}}" for name in FUNCTIONS if name != lacking]
    (tmp_path / "other.c").write_text("\n".join(stubs))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "other.so", "other.c"], cwd=tmp_path, check=True)
    with pytest.warns(RuntimeWarning, match=f"cannot be loaded.*{lacking}"):
        assert compiled.open_library(tmp_path / "other.so") is None


@with_compiler
def test_the_c_source_compiles_without_warnings(tmp_path: Path) -> None:
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wno-unknown-pragmas", "-Werror"]
    done = build(tmp_path / "plain.so", "-O1", *strict)
    assert not done.returncode, done.stderr
    assert compiled.open_library(tmp_path / "plain.so") is not None


def test_the_doctor_reports_whether_the_compiled_geometry_is_in_use() -> None:
    (finding,) = doctor.check_geometry()
    assert finding.level == doctor.OK and finding.text.startswith("compiled" if compiled.available() else "NumPy")
    (finding,) = with_numpy(lambda: list(doctor.check_geometry()))
    assert finding.text.startswith("NumPy")


@needed
def test_the_library_does_not_flush_denormal_numbers_in_the_process(tmp_path: Path) -> None:
    # A library linked with -ffast-math has a constructor that flushes denormal numbers to zero in the whole process.
    question = (
        "import numpy as np, kpmatch_ros.geometry.compiled as c; assert c.available(); print(np.float32(1e-40) / 2)"
    )
    # In another folder, so that Python finds the installed package and not the source checkout.
    ran = subprocess.run([sys.executable, "-c", question], cwd=tmp_path, capture_output=True, text=True)
    assert not ran.returncode and float(ran.stdout) > 0, ran.stderr
