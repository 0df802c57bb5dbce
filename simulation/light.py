"""Sun, sky and their light. The light is computed once and baked into the textures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.geometry.pose import Pose
from simulation.painting import HALF, Image, fractal, mix, rgb, smooth
from simulation.poses import Vector
from simulation.surfaces import Round, Surface, Texture
from simulation.tracer import CHUNK, Rays, Tracer, split_tiles

SUN = np.array([-0.46, -0.62, 0.63]) / np.linalg.norm([-0.46, -0.62, 0.63])
SUNLIGHT = np.array([1.0, 0.89, 0.70], np.float32) * np.float32(3.3)
ZENITH, HORIZON = np.array([0.36, 0.52, 0.86], np.float32), np.array([0.78, 0.82, 0.88], np.float32)
BOUNCE = np.array([0.34, 0.28, 0.20], np.float32)
LIGHT_DENSITY = 22.0  # light samples per metre
MIDDLE, REACH = np.array([4.0, 1.0, 1.5]), 9.5  # centre and radius, metres, of the region with shadows
SUNS, SKIES = 4, 12  # number of directions from which the light of the sun and of the sky comes
SKY_SIZE, SKY_TOP, SKY_END = (480, 2000), 75.0, -8.0  # texels; elevation of the first and the last row, degrees


def illuminate(surfaces: Sequence[Surface], pool: ThreadPoolExecutor) -> None:
    """Light all surfaces: sun with soft shadows, light from the whole sky, and light reflected by the ground."""
    near = [surface for surface in surfaces if not surface.far]
    turns = 2.4 * np.arange(SKIES) + 1.0  # steps of the golden angle spread the directions evenly
    suns = [SUN + 0.012 * math.sqrt((i + 0.5) / SUNS) * _sideways(SUN, turn) for i, turn in enumerate(turns[:SUNS])]
    heights = (np.arange(SKIES) + 0.5) / SKIES
    flat = np.sqrt(1 - heights**2)
    skies = np.stack([flat * np.cos(turns), flat * np.sin(turns), heights], axis=1)
    # The light samples of all surfaces are in one array, so that each light is looked up once.
    grids: list[tuple[int, int]] = []
    points, normals = [], []
    for surface in near:
        fine = min(LIGHT_DENSITY, 300 / max(surface.height, surface.width))
        rows, columns = (max(6, math.ceil(size * fine)) for size in (surface.height, surface.width))
        grid = _grid(surface, (rows, columns))
        grids.append((rows, columns))
        points.append(surface.points(*grid).reshape(-1, 3))
        normals.append(np.broadcast_to(surface.directions(*grid)[0], (rows, columns, 3)).reshape(-1, 3))
    at, facing = np.concatenate(points), np.concatenate(normals)
    lit = list(
        pool.map(
            lambda light: _Shadow(near, *light).lit(at, facing),
            [(sun, 704, 0.03) for sun in suns] + [(sky, 224, 0.10) for sky in skies],
        )
    )
    sun_seen = np.mean(lit[:SUNS], axis=0)
    sky, sky_seen = np.zeros((len(at), 3), np.float32), np.zeros(len(at), np.float32)
    for direction, seen in zip(skies, lit[SUNS:]):
        part = seen * np.maximum(facing @ direction.astype(np.float32), 0) * np.float32(2 / SKIES)
        sky_seen += part
        sky += part[:, None] * mix(HORIZON, ZENITH, np.float32(direction[2]))
    # Light reflected by sunlit ground and walls: less in corners, more from below.
    sky += BOUNCE * (0.35 + 1.3 * sky_seen + 0.25 * (1 - facing[:, 2]))[:, None]
    ends = np.cumsum([rows * columns for rows, columns in grids])

    def bake(number: int) -> None:
        mine = slice(ends[number] - math.prod(grids[number]), ends[number])
        _bake(near[number], sky[mine].reshape(*grids[number], 3), sun_seen[mine].reshape(grids[number]))

    list(pool.map(bake, range(len(near))))
    for surface in surfaces:
        if surface.far:
            surface.texture = Texture(_develop(surface.paint.albedo**2 * np.float32(1.75)))


def _grid(surface: Surface, shape: tuple[int, int]) -> tuple[Image, Image]:
    """u and v, (h, w) each, of the centres of the cells when a surface is divided into h x w cells."""
    u = (np.arange(shape[1], dtype=np.float32) + HALF) * np.float32(surface.width / shape[1])
    v = (np.arange(shape[0], dtype=np.float32) + HALF) * np.float32(surface.height / shape[0])
    across, down = np.meshgrid(u, v)
    return across, down


def _bake(surface: Surface, sky: Image, sun_seen: Image) -> None:
    """Compute a surface's texture from its paint and the light that falls on it."""
    paint = surface.paint
    h, w = paint.relief.shape
    sky, sun_seen = (cv2.resize(array, (w, h), interpolation=cv2.INTER_LINEAR) for array in (sky, sun_seen))
    # The slopes of the relief turn the normal; its hollows receive less light from the sky.
    normal, right, down = surface.directions(*_grid(surface, (h, w)))
    sun = SUN.astype(np.float32)
    rise_u, rise_v = (
        np.asarray(cv2.Sobel(paint.relief, cv2.CV_32F, *order, ksize=1, scale=surface.density / 2))
        for order in ((1, 0), (0, 1))
    )
    cosine = (normal @ sun - rise_u * (right @ sun) - rise_v * (down @ sun)) / np.sqrt(1 + rise_u**2 + rise_v**2)
    hollow = paint.relief - cv2.GaussianBlur(paint.relief, (0, 0), 0.03 * surface.density)
    if surface.mask is not None and isinstance(surface, Round):
        cosine = 0.35 + 0.65 * cosine  # leaves point in all directions and let light through
    light = (
        sky * np.clip(1 + 22 * hollow, 0.45, 1.25)[..., None] + SUNLIGHT * (np.maximum(cosine, 0) * sun_seen)[..., None]
    )
    surface.texture = Texture(_develop(np.square(np.maximum(paint.albedo, np.float32(0.03))) * light))
    del surface.paint


class _Shadow:
    """Shadow map for light from one direction: the scene's depth along parallel rays."""

    def __init__(self, surfaces: Sequence[Surface], direction: Vector, size: int, bias: float) -> None:
        direction = direction / np.linalg.norm(direction)
        side = _sideways(direction, 0.0)
        self.axes = np.stack([side, np.cross(side, direction), -direction])
        self.scale, self.bias, self.direction = size / (2 * REACH), np.float32(bias), direction.astype(np.float32)
        tracer = Tracer(surfaces, Pose(self.axes.T, MIDDLE), parallel=True)
        grid = (np.arange(size) + 0.5) / self.scale - REACH
        rays = Rays(*np.meshgrid(grid, grid))
        windows = tracer.windows(rays)
        self.depth = np.empty((size, size), np.float32)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for tile in split_tiles(size, size, 192):
                self.depth[tile] = tracer.trace(rays.x[tile], rays.y[tile], tracer.within(windows, tile), self.scale)[0]
        self.depth[np.isinf(self.depth)] = 1e3

    def lit(self, points: Image, normals: Image) -> Image:
        """The fraction of the light that reaches points (n, 3) with these normals (n, 3): (n,), 0 to 1."""
        result = []
        for first in range(0, len(points), CHUNK):
            facing, at = normals[first : first + CHUNK], points[first : first + CHUNK]
            slant = np.clip(facing @ self.direction, 0.15, 1)
            local = (at + facing * self.bias - MIDDLE.astype(np.float32)) @ self.axes.T.astype(np.float32)
            place = (local[:, :2].T + np.float32(REACH)) * np.float32(self.scale) - HALF
            nearest: Any = cv2.remap(
                self.depth, place[:1], place[1:], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=[1e3]
            )
            # The shadow fades in over the thickness of `bias`, so that a surface does not shade itself.
            result.append(np.clip((nearest[0] - local[:, 2]) / self.bias + 1 + HALF / slant, 0, 1))
        return np.concatenate(result)


def _sideways(direction: Vector, angle: float) -> Vector:
    """A unit vector perpendicular to `direction`, turned about it by `angle`, radians."""
    first = np.cross(direction, (0.31, 0.95, 0.07))
    first /= np.linalg.norm(first)
    return np.asarray(math.cos(angle) * first + math.sin(angle) * np.cross(direction, first))


def _develop(light: Image) -> NDArray[np.uint8]:
    """Convert light to display-encoded bytes, with the soft shoulder of film (Narkowicz's fit to the ACES curve)."""
    x = light * np.float32(0.42)
    film = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    return np.round(np.sqrt(film) * 255).astype(np.uint8)


def paint_sky(rng: np.random.Generator) -> Texture:
    """Paint the sky as a panorama: columns by azimuth from pi to -pi (x in the middle), rows by falling elevation."""
    h, w = SKY_SIZE
    azimuth = np.linspace(np.pi, -np.pi, w, dtype=np.float32)[None]
    elevation = np.radians(np.linspace(SKY_TOP, SKY_END, h, dtype=np.float32))[:, None]
    height = np.sin(np.maximum(elevation, 0.0))
    # The clouds lie in a plane overhead, so they are denser towards the horizon.
    reach, size = np.cos(elevation) / (height + 0.13), 1200
    px, py = (((f(azimuth) * reach / 16 + 0.5) * size).astype(np.float32) for f in (np.cos, np.sin))

    def overhead(noise: Image, dx: float = 0.0, dy: float = 0.0) -> Image:
        return np.asarray(
            cv2.remap(noise, px + np.float32(dx), py + np.float32(dy), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        )

    billow, wisps = fractal(rng, size, size, 150, 150, 8, 0.58), fractal(rng, size, size, 60, 240, 7, 0.6)
    thick = overhead(billow)
    lit = smooth(-0.6, 0.7, thick - overhead(billow, 9 * SUN[0], 9 * SUN[1]))
    even = np.ones_like(azimuth)
    colour = mix(rgb(206, 222, 236), rgb(72, 128, 196), (1 - np.exp(-height * 3.2)) * even)
    towards = np.cos(elevation) * (np.cos(azimuth) * SUN[0] + np.sin(azimuth) * SUN[1]) + height * SUN[2]
    colour = mix(colour, rgb(255, 240, 214), 0.5 * np.exp(-6 * (1 - towards)))
    colour = mix(colour, rgb(250, 250, 252), 0.25 * smooth(0.0, 1.2, overhead(wisps)))
    colour = mix(colour, mix(rgb(178, 188, 204), rgb(255, 250, 240), lit), 0.95 * smooth(-0.15, 0.5, thick))
    colour = mix(colour, rgb(222, 228, 232), 0.75 * np.exp(-height / 0.06) * even)
    return Texture(np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8))


def sky_colours(sky: Texture, direction: Image) -> NDArray[np.uint8]:
    """Colours (n, 3) of the sky in directions (3, n) in the world."""
    x, y, z = direction
    elevation = np.degrees(np.arctan2(z, np.hypot(x, y)))
    azimuth = np.arctan2(y, x)
    return sky.at(
        (np.float32(np.pi) - azimuth) * np.float32(SKY_SIZE[1] / (2 * np.pi)),
        (np.float32(SKY_TOP) - elevation) * np.float32(SKY_SIZE[0] / (SKY_TOP - SKY_END)),
        0,
    )
