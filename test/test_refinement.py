"""Tests that matches between images with a large change of angle or scale are refined, guided by their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from kpmatch_ros.geometry.flow import Neighbours
from kpmatch_ros.geometry.refinement import align_matches, normalize_contrast

pytestmark = pytest.mark.usefixtures("geometry")

Texture = Callable[[int, int, int], np.ndarray]
SIZE = (320, 240)


def turned(degrees: float, scale: float, slant: float) -> np.ndarray:
    """Return a homography (3, 3) about the image's centre: rotation, scale, and a slant to one side."""
    middle = np.array([[1, 0, -SIZE[0] / 2], [0, 1, -SIZE[1] / 2], [0, 0, 1]])
    cosine, sine = scale * np.cos(np.radians(degrees)), scale * np.sin(np.radians(degrees))
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [slant, 0, 1]])
    return np.asarray(np.linalg.inv(middle) @ turn @ middle)


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    found = np.column_stack([points, np.ones(len(points))]) @ homography.T
    return np.asarray(found[:, :2] / found[:, 2:])


def rough_matches(image: np.ndarray, homography: np.ndarray, wrong: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return corners of an image and their noisy detections in the other: 1 pixel off, some at random positions."""
    draw = np.random.default_rng(0)
    points0 = cv2.goodFeaturesToTrack(image, 400, 0.01, 6)[:, 0].astype(np.float64)
    points1 = project(homography, points0) + draw.uniform(-1, 1, points0.shape)
    inside = ((points1 > 12) & (points1 < np.array(SIZE) - 13)).all(axis=1)
    points0, points1 = points0[inside], points1[inside]
    others = draw.random(len(points1)) < wrong
    points1[others] = draw.uniform(12, np.array(SIZE) - 13, (others.sum(), 2))
    return points0, points1


@pytest.mark.parametrize(
    ("degrees", "scale", "slant"), [(30, 1, 0), (-50, 1.2, 0), (0, 1.5, 0), (10, 0.75, 0), (15, 1.1, 1e-3)]
)
def test_matches_of_a_rotated_scaled_or_slanted_surface_are_refined_accurately(
    degrees: float, scale: float, slant: float, texture: Texture
) -> None:
    homography = turned(degrees, scale, slant)
    image0 = texture(SIZE[1], SIZE[0], 4)
    image1 = cv2.warpPerspective(image0, homography, SIZE, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    points0, points1 = rough_matches(image0, homography, wrong=0.1)
    found = align_matches(normalize_contrast(image0), normalize_contrast(image1), points0, points1)
    right = np.linalg.norm(points1 - project(homography, points0), axis=1) < 2
    errors = np.linalg.norm(found.points - project(homography, points0), axis=1)[found.good & right]
    assert right.sum() > 60
    assert len(errors) > 0.85 * right.sum()  # without the neighbours: 0.03 to 0.78
    assert np.median(errors) < 0.1  # 0.07 to 1.7


def test_a_deformation_is_estimated_from_neighbours_even_if_30_percent_are_wrong() -> None:
    draw = np.random.default_rng(1)
    shape = np.array([[0.9, -0.6], [0.5, 1.3]])
    points = draw.uniform(0, 300, (200, 2))
    targets = points @ shape.T + (20, 30)
    targets[draw.permutation(200)[:60]] += draw.uniform(-60, 60, (60, 2))
    found = Neighbours(points, targets).deformations(np.arange(200))
    errors = np.abs(found - shape).max(axis=(1, 2))
    assert np.median(errors) < 0.02
    assert np.mean(errors < 0.1) > 0.85


@pytest.mark.parametrize("points", [0, 5, 15])
def test_few_neighbours_give_no_deformation(points: int) -> None:
    places = np.random.default_rng(2).uniform(0, 300, (points, 2))
    found = Neighbours(places, 1.5 * places).deformations(np.arange(points))
    assert found.shape == (points, 2, 2) and (found == np.eye(2)).all()


def test_neighbours_that_suggest_an_implausible_deformation_give_none() -> None:
    points = np.random.default_rng(3).uniform(0, 300, (100, 2))
    for targets in (points * (-1, 1), points * 0.01, points * 5, np.full_like(points, np.nan)):
        assert (Neighbours(points, targets).deformations(np.arange(100)) == np.eye(2)).all()
