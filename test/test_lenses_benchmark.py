"""Tests of benchmarks/lenses.py: images of all lenses are as sharp as their pixels allow, and no sharper."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.lenses import LENSES, directions, photograph
from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose

HERE = Pose(np.eye(3), np.zeros(3))


class Waves:
    """A scene at infinity, whose brightness is a wave of the horizontal angle with this length in radians."""

    def __init__(self, length: float) -> None:
        self.length = length

    def render(self, rotation: np.ndarray, position: np.ndarray, camera: Camera) -> SimpleNamespace:
        x, y = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
        rays = np.dstack([(x - camera.matrix[0, 2]) / camera.focal, (y - camera.matrix[1, 2]) / camera.focal])
        world = np.dstack([rays, np.ones_like(x)]) @ rotation.T
        grey = 128 + 100 * np.sin(2 * np.pi / self.length * np.arctan2(world[..., 0], world[..., 2]))
        return SimpleNamespace(image=np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("lens", ["pinhole", "fisheye-144", "fisheye-190"])
@pytest.mark.parametrize("pixels, least, most", [(1.25, 0.0, 0.4), (3.0, 0.7, 0.95), (12.0, 0.95, 1.03)])
def test_a_pixel_is_the_mean_over_its_area(lens: str, pixels: float, least: float, most: float) -> None:
    """For a wavelength of `pixels`, the contrast is |sin(a) / a| with a = pi / pixels: .23, .83, .99."""
    focal, model, coefficients = LENSES[lens]
    matrix = np.array([[focal, 0, 79.5], [0, focal, 59.5], [0, 0, 1]])
    camera = Camera(160, 120, matrix, model, np.array(coefficients))
    image = photograph(Waves(pixels / focal), HERE, camera, directions(camera), 0)
    contrast = np.sqrt(2) * image[50:70, 68:92].astype(float).std() / 100
    assert least < contrast < most


def test_the_samples_of_a_pixel_are_centred_on_its_ray() -> None:
    camera = Camera(160, 120, np.array([[200.0, 0, 70], [0, 200.0, 55], [0, 0, 1]]))
    rays = directions(camera)
    middles = rays.reshape(120, 2, 160, 2, 3).mean(axis=(1, 3))
    expected = camera.normalise(np.array([[0.0, 0.0], [159.0, 0.0], [30.0, 100.0]]))
    found = middles[[0, 0, 100], [0, 159, 30]]
    np.testing.assert_allclose(found[:, :2] / found[:, 2:], expected, atol=1e-5)
