"""A synthetic camera in a synthetic courtyard: images whose geometry is known exactly.

The scene is made of flat and round surfaces with painted textures, all drawn here from a seed; the camera has any pose
and lens. Every pixel is traced through the lens to the nearest surface, so depth and motion are exact, and two views
differ as those of a real camera do: parallax, occlusion, perspective, a sky at infinity.

The world frame is REP-103's: x forward, y left, z up, metres; the ground is z = 0. The camera frame is the optical one:
x right, y down, z forward. Pixel (0, 0) is the centre of the top-left pixel.

    scene = Scene(seed=0)
    views = list(scene.film(camera_path(40), demo_camera()))
    rotation, translation = relative_motion(views[0], views[1])
"""
from __future__ import annotations

import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kpmatch_ros.camera import Camera

__all__ = ["Pose", "Scene", "View", "camera_path", "demo_camera", "look", "relative_motion", "stereo_right"]

Vector = NDArray[np.float64]
Image = NDArray[Any]  # float32 unless said otherwise

NEAR = 0.05  # metres; what is nearer is not seen
HALF = np.float32(0.5)
CHUNK = 16384  # samples at a time: they stay in the cache, and cv2.remap takes rows of up to 32767


# --- camera ---------------------------------------------------------------------------------------------------------


class Pose(NamedTuple):
    """Pose of a camera in the world: x_world = rotation x_camera + position."""

    rotation: Vector  # (3, 3)
    position: Vector  # (3,), metres


@dataclass(frozen=True, eq=False)
class View:
    """What a camera sees. The image is RGB; depth is along the optical axis, at the pixel's centre, inf in the sky."""

    image: NDArray[np.uint8]  # (H, W, 3)
    depth: NDArray[np.float32]  # (H, W), metres
    rotation: Vector  # (3, 3), x_world = rotation x_camera + position
    position: Vector  # (3,), metres
    camera: Camera


def demo_camera(width: int = 640, height: int = 480, distorted: bool = True) -> Camera:
    """63 degrees wide, the principal point a little off the centre, and a little barrel distortion, as in real ones."""
    matrix = np.array([[0.8125 * width, 0, 0.503 * width], [0, 0.8140 * width, 0.491 * height], [0, 0, 1]])
    return Camera(width, height, matrix, "plumb_bob", np.array([-0.17, 0.045, 0.0008, -0.0005, 0.0]) * distorted)


def look(position: ArrayLike, yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Pose:
    """A camera at `position`, looking along x turned by yaw (left), pitch (down) and roll (clockwise), radians."""
    cy, sy, cp, sp, cr, sr = (f(angle) for angle in (yaw, pitch, roll) for f in (math.cos, math.sin))
    turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    nod = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    lean = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    optical = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    return Pose(turn @ nod @ lean @ optical, np.asarray(position, dtype=np.float64))


def relative_motion(reference: View | Pose, current: View | Pose) -> Pose:
    """Pose of the current camera in the reference camera's optical frame: x_ref = rotation x_cur + position."""
    return Pose(reference.rotation.T @ current.rotation, reference.rotation.T @ (current.position - reference.position))


def stereo_right(left: Pose, baseline: float) -> Pose:
    """The right camera of a rectified stereo pair, `baseline` metres to the right of the left one."""
    return Pose(left.rotation, left.position + left.rotation[:, 0] * baseline)


def camera_path(motions: int | Iterable[tuple[str, int]] = 40, step: float = 0.25) -> list[Pose]:
    """A smooth round through the courtyard, for ever if need be: one lap is about 60 frames.

    `motions` is a number of frames, or parts one after the other such as [("walk", 20), ("rotate", 8), ("still", 5)],
    each so many frames with that motion after them: walking moves `step` metres to the next frame, in all directions in
    turn, and turns by 1 to 3 degrees; rotating only turns, by 2 to 6 degrees; standing still does neither. Raises
    ValueError for a motion it does not know.
    """
    parts = [("walk", motions)] if isinstance(motions, int) else list(motions)
    # A closed curve, a lying eight with some height, is tabulated and walked along at a constant speed.
    angle = np.linspace(0, 2 * np.pi, 4001)
    curve = np.stack([0.9 + 2.3 * np.sin(angle - 1.2), 0.1 + 1.25 * np.sin(2 * angle + 0.7),
                      1.55 + 0.22 * np.sin(3 * angle)], axis=1)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    poses, walked, turned = [], 0.0, 2.2
    for motion, frames in parts:
        if motion not in ("walk", "rotate", "still") or frames < 0:
            raise ValueError(f"a motion is ('walk' | 'rotate' | 'still', frames), not {(motion, frames)!r}")
        for _ in range(frames):
            place = np.array([np.interp(walked % length[-1], length, axis) for axis in curve.T])
            yaw = -0.10 + 0.32 * math.sin(turned)
            pitch = 0.04 + 0.12 * math.cos(turned)  # fastest where yaw rests
            poses.append(look(place, yaw, pitch, 0.04 * math.sin(0.83 * turned)))
            walked += step if motion == "walk" else 0.0
            turned += {"walk": 0.14, "rotate": 0.30, "still": 0.0}[motion]
    return poses


# --- surfaces -------------------------------------------------------------------------------------------------------


class Paint(NamedTuple):
    """A surface before the light falls on it, row 0 at the top."""

    albedo: Image  # (h, w, 3), display-encoded RGB in [0, 1]
    relief: Image  # (h, w), metres above the surface: shades the texture, moves nothing
    alpha: NDArray[np.uint8] | None = None  # (h, w), below 128 is a hole


class _Canvas:
    """What a painter paints on: h x w texels, `density` of them to the metre."""

    def __init__(self, rng: np.random.Generator, h: int, w: int, density: float) -> None:
        self.rng, self.h, self.w, self.density = rng, h, w, density

    def xy(self) -> tuple[Image, Image]:
        """Metres from the left and from the bottom, both (h, w)."""
        row, column = np.mgrid[0:self.h, 0:self.w].astype(np.float32)
        return (column + HALF) / np.float32(self.density), (self.h - HALF - row) / np.float32(self.density)

    def noise(self, cell: float | tuple[float, float], octaves: int = 5, gain: float = 0.55) -> Image:
        """Fractal noise (h, w) with features of `cell` metres (or that height and width) downwards, about -1 to 1."""
        tall, wide = (size * self.density for size in (cell if isinstance(cell, tuple) else (cell, cell)))
        return _fractal(self.rng, self.h, self.w, tall, wide, octaves, gain)

    def speckle(self) -> Image:
        return self.rng.standard_normal((self.h, self.w), dtype=np.float32)

    def turned(self) -> _Canvas:
        """The same lying on its side."""
        return _Canvas(self.rng, self.w, self.h, self.density)


Painter = Callable[[_Canvas], Paint]


def _fractal(rng: np.random.Generator, h: int, w: int, tall: float, wide: float, octaves: int, gain: float) -> Image:
    rows, columns = math.ceil(h / tall) + 2, math.ceil(w / wide) + 2
    total, weight, power = rng.standard_normal((rows, columns), dtype=np.float32), 1.0, 1.0
    for _ in range(octaves - 1):
        if min(tall, wide) < 2 or rows > 2 * h or columns > 2 * w:
            break
        rows, columns, tall, wide, weight = 2 * rows, 2 * columns, tall / 2, wide / 2, weight * gain
        total = np.asarray(cv2.resize(total, (columns, rows), interpolation=cv2.INTER_CUBIC), np.float32)
        total += np.float32(weight) * rng.standard_normal((rows, columns), dtype=np.float32)
        power += weight * weight
    size = max(w, round(columns * wide)), max(h, round(rows * tall))
    return cv2.resize(total, size, interpolation=cv2.INTER_CUBIC)[-h:, -w:] / np.float32(math.sqrt(power) * 1.3)


class _Texture:
    """An image with ever smaller copies of itself, so that each sample is the mean over a pixel's footprint."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        levels: list[Any] = [image]
        while len(levels) < 2 or (min(levels[-1].shape[:2]) > 4 and len(levels) < 9):
            height, width = levels[-1].shape[:2]
            levels.append(cv2.resize(levels[-1], ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA))
        # All levels in one image, the smaller ones below each other to the right of the first.
        height, width = image.shape[:2]
        rows = max(height, sum(level.shape[0] for level in levels[1:]))
        self.atlas = np.zeros((rows, width + (width + 1) // 2, *image.shape[2:]), np.uint8)
        table, top = [], 0
        for i, level in enumerate(levels):
            h, w = level.shape[:2]
            x, y = (width, top) if i else (0, 0)
            self.atlas[y:y + h, x:x + w] = level
            table.append((w / width, h / height, w - 1, h - 1, x, y))
            top += h if i else 0
        self.table = np.array(table, np.float32)

    def at(self, x: Image, y: Image, level: int) -> NDArray[np.uint8]:
        """Samples at texel coordinates of the first level, continuous, 0 at the image's edge."""
        sx, sy, right, bottom, left, top = self.table[level]
        column = np.minimum(np.maximum(x * sx - HALF, 0), right) + left
        row = np.minimum(np.maximum(y * sy - HALF, 0), bottom) + top
        samples: Any = cv2.remap(self.atlas, column.reshape(1, -1), row.reshape(1, -1), cv2.INTER_LINEAR)
        return samples[0]

    def filtered(self, x: Image, y: Image, footprint: Image, blend: bool = True) -> Image:
        """Samples (n, ...) averaged over `footprint` texels: between the two nearest levels, or from the nearest."""
        level = np.log2(footprint)
        np.minimum(np.maximum(level, 0, out=level), np.float32(len(self.table) - 1.001), out=level)
        lower = (level if blend else level + HALF).astype(np.int8)
        first, last = int(lower.min()), int(lower.max())
        result = np.empty((len(x), *self.atlas.shape[2:]), np.float32)
        for k in range(first, last + 1):
            where: Any = np.flatnonzero(lower == k) if first < last else slice(None)
            across, down, share = x[where], y[where], level[where] - np.float32(k)
            if not len(across):
                continue
            fine: Image = self.at(across, down, k)
            if blend:
                share = share.reshape(-1, *[1] * (fine.ndim - 1))
                fine = fine + share * (self.at(across, down, k + 1).astype(np.float32) - fine)
            result[where] = fine
        return result


class _Hit(NamedTuple):
    """Where rays o + z d meet a surface."""

    z: Image
    u: Image  # metres from the left edge
    v: Image  # metres from the top edge
    facing: Image  # |normal . d|
    inside: NDArray[np.bool_]  # within the surface's outline


class _Surface:
    """A painted surface with coordinates u to the right and v downwards from its top left corner, metres."""

    mask: _Texture | None = None  # holes
    paint: Paint  # until the light is baked into
    texture: _Texture

    def __init__(self, axes: Sequence[Vector], origin: Vector, width: float, height: float, painter: Painter,
                 density: float, far: bool = False) -> None:
        self.axes, self.origin = np.stack(axes), origin  # rows: the local axes in the world
        self.width, self.height, self.density = width, height, density  # metres, metres, texels per metre
        self.painter, self.far = painter, far  # far: too far away for shadows

    def corners(self) -> Vector:
        """Corners (N, 3) in local coordinates of a body that holds the surface."""
        raise NotImplementedError

    def faces(self, position: Vector) -> bool:
        """Whether it can be seen from a point in the world."""
        return True

    def meet(self, o: Any, d: Any) -> _Hit:
        """Where rays o + z d meet it; o and d are three coordinates in the local frame, arrays or numbers."""
        raise NotImplementedError

    def points(self, u: Image, v: Image) -> Image:
        """World coordinates (h, w, 3) of u and v, each (h, w)."""
        raise NotImplementedError

    def directions(self, u: Image, v: Image) -> tuple[Image, Image, Image]:
        """Normal, and where u and v grow, in the world: (h, w, 3), or (1, 1, 3) where it is the same everywhere."""
        raise NotImplementedError


class _Flat(_Surface):
    """A rectangle, seen from the side its normal points to; local axes: right, down, normal."""

    def __init__(self, centre: ArrayLike, normal: ArrayLike, up: ArrayLike, width: float, height: float,
                 painter: Painter, density: float = 128.0, far: bool = False) -> None:
        out = np.asarray(normal, float) / np.linalg.norm(normal)
        right = np.cross(np.asarray(up, float), out)
        right /= np.linalg.norm(right)
        down = np.cross(right, out)
        corner = np.asarray(centre, float) - right * width / 2 - down * height / 2
        super().__init__((right, down, out), corner, width, height, painter, density, far)

    def corners(self) -> Vector:
        return np.array([[0, 0, 0], [self.width, 0, 0], [0, self.height, 0], [self.width, self.height, 0]], float)

    def faces(self, position: Vector) -> bool:
        return bool(self.axes[2] @ (position - self.origin) > 0)

    def meet(self, o: Any, d: Any) -> _Hit:
        z = o[2] / -d[2]
        u = o[0] + z * d[0]
        v = o[1] + z * d[1]
        return _Hit(z, u, v, np.abs(d[2]), (u >= 0) & (u <= self.width) & (v >= 0) & (v <= self.height))

    def points(self, u: Image, v: Image) -> Image:
        right, down, _ = self.axes.astype(np.float32)
        return self.origin.astype(np.float32) + u[..., None] * right + v[..., None] * down

    def directions(self, u: Image, v: Image) -> tuple[Image, Image, Image]:
        right, down, normal = self.axes.astype(np.float32)[:, None, None]
        return normal, right, down


class _Round(_Surface):
    """Part of a surface of revolution: r^2 = a + b h + c h^2 at height h above the bottom, from 0 to `height`.

    Cylinders, cones, balls and barrels are all of this kind. `up` is the axis, `seam` the direction where the texture
    begins; `arc` is how far it goes round; `hollow` shows the inside instead of the outside.
    """

    def __init__(self, bottom: ArrayLike, profile: tuple[float, float, float], height: float, painter: Painter,
                 density: float = 128.0, up: ArrayLike = (0, 0, 1), seam: ArrayLike = (1, 0.1, 0),
                 arc: float = 2 * math.pi, hollow: bool = False) -> None:
        axis = np.asarray(up, float) / np.linalg.norm(up)
        first = np.asarray(seam, float) - axis * (axis @ np.asarray(seam, float))
        first /= np.linalg.norm(first)
        a, b, c = profile
        h = np.linspace(0, height, 50)
        self.radius = float(np.sqrt((a + b * h + c * h * h).max()))
        self.profile, self.arc, self.hollow = profile, arc, hollow
        super().__init__((first, np.cross(axis, first), axis), np.asarray(bottom, float), self.radius * arc, height,
                         painter, density)

    @classmethod
    def cone(cls, bottom: ArrayLike, r0: float, r1: float, height: float, painter: Painter, **more: Any) -> _Round:
        """Radius r0 at the bottom and r1 at the top."""
        slope = (r1 - r0) / height
        return cls(bottom, (r0 * r0, 2 * r0 * slope, slope * slope), height, painter, **more)

    @classmethod
    def ball(cls, centre: ArrayLike, radius: float, painter: Painter, flat: float = 1.0, **more: Any) -> _Round:
        """An ellipsoid, `flat` times as high as wide."""
        high = radius * flat
        bottom = np.asarray(centre, float) - [0, 0, high]
        return cls(bottom, (0.0, 2 * radius * radius / high, -1 / flat**2), 2 * high, painter, **more)

    @classmethod
    def barrel(cls, bottom: ArrayLike, r0: float, r1: float, height: float, painter: Painter, **more: Any) -> _Round:
        """Radius r0 at both ends and r1 in the middle."""
        bulge = 4 * (r1 * r1 - r0 * r0) / height
        return cls(bottom, (r0 * r0, bulge, -bulge / height), height, painter, **more)

    def corners(self) -> Vector:
        r = self.radius
        return np.array([[x, y, z] for x in (-r, r) for y in (-r, r) for z in (0, self.height)], float)

    def meet(self, o: Any, d: Any) -> _Hit:
        a, b, c = (np.float32(value) for value in self.profile)
        qa = d[0] * d[0] + d[1] * d[1] - c * d[2] * d[2]
        qb = o[0] * d[0] + o[1] * d[1] - (b / 2 + c * o[2]) * d[2]
        qc = o[0] * o[0] + o[1] * o[1] - (a + (b + c * o[2]) * o[2])
        root = np.sqrt(np.maximum(qb * qb - qa * qc, 0))
        z = ((root if self.hollow else -root) - qb) / qa
        x, y, h = (start + z * step for start, step in zip(o, d))
        angle = np.arctan2(y, x)
        angle = np.where(angle < 0, angle + np.float32(2 * np.pi), angle)
        lean = b / 2 + c * h
        facing = np.abs(x * d[0] + y * d[1] - lean * d[2]) / np.sqrt(x * x + y * y + lean * lean + 1e-12)
        inside = (root > 0) & (qa > 0) & (h >= 0) & (h <= self.height) & (angle <= self.arc)
        return _Hit(z, angle * np.float32(self.radius), self.height - h, facing, inside)

    def _profile_at(self, u: Image, v: Image) -> tuple[Image, Image, Image, Image]:
        """Cosine and sine of the angle, height, and radius."""
        a, b, c = self.profile
        h = self.height - v
        return np.cos(u / self.radius), np.sin(u / self.radius), h, np.sqrt(np.maximum(a + b * h + c * h * h, 1e-8))

    def points(self, u: Image, v: Image) -> Image:
        cos, sin, h, r = self._profile_at(u, v)
        local = np.stack([r * cos, r * sin, h], -1).astype(np.float32)
        return local @ self.axes.astype(np.float32) + self.origin.astype(np.float32)

    def directions(self, u: Image, v: Image) -> tuple[Image, Image, Image]:
        cos, sin, h, r = self._profile_at(u, v)
        lean = (self.profile[1] / 2 + self.profile[2] * h) / r
        size = np.sqrt(1 + lean * lean)
        side = -1 / size if self.hollow else 1 / size
        local = ((cos * side, sin * side, -lean * side), (-sin, cos, 0 * u),
                 (-lean * cos / size, -lean * sin / size, -1 / size))
        normal, right, down = (np.stack(xyz, -1).astype(np.float32) @ self.axes.astype(np.float32) for xyz in local)
        return normal, right, down


# --- tracing --------------------------------------------------------------------------------------------------------


class _Rays:
    """A grid of rays through (x, y, 1), each (H, W)."""

    def __init__(self, x: Image, y: Image) -> None:
        self.x, self.y = x.astype(np.float32), y.astype(np.float32)
        # Lowest and highest x up to each column, y up to each row: in order, so that windows are found by bisection.
        self._bounds = [
            (np.minimum.accumulate(values.min(axis=axis)[::-1])[::-1], np.maximum.accumulate(values.max(axis=axis)))
            for values, axis in ((self.y, 1), (self.x, 0))]

    def windows(self, low: Vector, high: Vector) -> NDArray[np.intp]:
        """First row, end row, first column, end column (N, 4) of the rays between low and high, both (x, y) (N, 2)."""
        return np.stack([index for axis, (lowest, highest) in zip((1, 0), self._bounds)
                         for index in (np.searchsorted(highest, low[:, axis]),
                                       np.searchsorted(lowest, high[:, axis], side="right"))], axis=1)


OFFSETS = ((-3 / 8, -1 / 8), (1 / 8, -3 / 8), (3 / 8, 1 / 8), (-1 / 8, 3 / 8))  # points in a pixel, to average


@functools.lru_cache(maxsize=4)
def _ray_grids(camera: Camera) -> tuple[_Rays, list[_Rays]]:
    """Rays through the centres of the pixels, and through each of OFFSETS in all of them."""
    y, x = np.mgrid[0:camera.height, 0:camera.width]
    rays, slope = camera.normalise_with_jacobian(np.stack([x.ravel(), y.ravel()], axis=1))
    if not np.isfinite(rays).all():
        raise ValueError(f"the lens with distortion {camera.distortion.tolist()} has no direction for some pixels")
    shifted = (rays + slope @ np.array(offset) for offset in ((0.0, 0.0), *OFFSETS))
    centres, *others = (_Rays(*grid.T.reshape(2, camera.height, camera.width)) for grid in shifted)
    return centres, others


class _Seen(NamedTuple):
    """A surface and how the camera lies to it: x_local = turn x_camera + offset."""

    surface: _Surface
    turn: Image
    offset: Image
    box: Vector  # from `_bounds`


class _Tracer:
    """Finds the nearest surface along rays."""

    def __init__(self, surfaces: Iterable[_Surface], pose: Pose, parallel: bool = False) -> None:
        """Rays from the position through (x, y, 1) in the camera frame; parallel ones along z, from (x, y, 0)."""
        self.rotation, self.parallel = pose.rotation, parallel
        seen = []
        for surface in surfaces:
            if parallel or surface.faces(pose.position):
                turn, offset = surface.axes @ pose.rotation, surface.axes @ (pose.position - surface.origin)
                box = _bounds((surface.corners() - offset) @ turn, parallel)
                if box is not None:
                    seen.append(_Seen(surface, turn.astype(np.float32), offset.astype(np.float32), box))
        self.seen = sorted(seen, key=lambda entry: float(entry.box[0, 2]))  # the nearer, the more it hides

    def windows(self, rays: _Rays) -> NDArray[np.intp]:
        """Where in the grid each of `seen` may show up, (N, 4)."""
        boxes = np.array([entry.box for entry in self.seen]).reshape(-1, 2, 3)
        return rays.windows(boxes[:, 0, :2], boxes[:, 1, :2])

    @staticmethod
    def within(windows: NDArray[np.intp], tile: tuple[slice, slice], margin: int = 0
               ) -> list[tuple[int, tuple[slice, slice]]]:
        """Which of `seen` may show up in a tile, and in which part of it."""
        rows, columns = tile
        low = np.array([rows.start, rows.start, columns.start, columns.start])
        end = np.array([rows.stop, rows.stop, columns.stop, columns.stop])
        inside = np.clip(windows + np.array([-margin, margin, -margin, margin]), low, end) - low
        found = np.flatnonzero((inside[:, 0] < inside[:, 1]) & (inside[:, 2] < inside[:, 3]))
        return [(int(index), (slice(top, bottom), slice(left, right)))
                for index, (top, bottom, left, right) in zip(found, inside[found])]

    def trace(self, x: Image, y: Image, among: Iterable[tuple[int, Any]], focal: float
              ) -> tuple[Image, NDArray[np.int16]]:
        """Depth along z, inf where nothing is met, and which of `seen` is met, -1 where none is.

        `among` names the surfaces that may be met, nearest first, each with the part of x and y to look in.
        """
        depth, which = np.full(x.shape, np.inf, np.float32), np.full(x.shape, -1, np.int16)
        for index, part in among:
            entry = self.seen[index]
            if entry.box[0, 2] > depth[part].max():
                continue
            hit = self._meet(entry, x[part], y[part])
            new = hit.inside & (hit.z < depth[part])
            if not self.parallel:
                new &= hit.z > NEAR
            if entry.surface.mask is not None:
                where = np.nonzero(new)
                if where[0].size:
                    scale = np.float32(entry.surface.density)
                    size = self._footprint(hit.z[where], hit.facing if self.parallel else hit.facing[where], focal)
                    new[where] = entry.surface.mask.filtered(
                        hit.u[where] * scale, hit.v[where] * scale, size * scale, blend=False) > 127
            np.copyto(depth[part], hit.z, where=new)
            np.copyto(which[part], np.int16(index), where=new)
        return depth, which

    def colour(self, index: int, x: Image, y: Image, focal: float) -> Image:
        """Colours (n, 3) where rays (n,) meet one of `seen`."""
        entry = self.seen[index]
        scale, taps, step = np.float32(entry.surface.density), 1, np.zeros(2, np.float32)
        if isinstance(entry.surface, _Flat):
            # A slanting plane's footprint is long: several samples along it instead of one that is blurred all round.
            normal, middle = entry.turn[2], len(x) // 2
            slant = abs(normal[0] * x[middle] + normal[1] * y[middle] + normal[2])
            taps = min(4, max(1, round(0.7 / max(float(slant), 1e-3))))
            step = normal[:2] / np.float32(max(float(np.hypot(*normal[:2])), 1e-6) * focal * taps)
        total = np.zeros((len(x), 3), np.float32)
        for tap in range(taps):
            shift = step * np.float32(tap - (taps - 1) / 2)
            hit = self._meet(entry, x + shift[0], y + shift[1])
            size = self._footprint(hit.z, hit.facing, focal) * (scale / np.float32(math.sqrt(taps)))
            total += entry.surface.texture.filtered(hit.u * scale, hit.v * scale, size, blend=taps == 1)
        return total / np.float32(taps)

    def _meet(self, entry: _Seen, x: Image, y: Image) -> _Hit:
        along = [row[0] * x + row[1] * y for row in entry.turn]
        if self.parallel:
            return entry.surface.meet([a + b for a, b in zip(along, entry.offset)], entry.turn[:, 2])
        return entry.surface.meet(entry.offset, [a + b for a, b in zip(along, entry.turn[:, 2])])

    def _footprint(self, z: Image, facing: Image, focal: float) -> Image:
        """Size in metres of a sample on the surface; its area is z^2 / (focal^2 |n . d|)."""
        if self.parallel:
            return np.full(z.shape, 1 / focal, np.float32)
        return z / np.sqrt(np.maximum(facing, np.float32(1e-3))) / np.float32(focal)


def _bounds(points: Vector, parallel: bool) -> Vector | None:
    """Lowest and highest (x, y, depth), (2, 3), at which rays meet a body with these corners; None if they do not."""
    if not parallel:
        ahead = points[:, 2] > NEAR
        if not ahead.any():
            return None
        if not ahead.all():  # add where its edges and diagonals enter
            near, behind = points[ahead][:, None], points[~ahead][None]
            share = (near[..., 2:] - NEAR) / (near[..., 2:] - behind[..., 2:])
            points = np.concatenate([points[ahead], (near + share * (behind - near)).reshape(-1, 3)])
        points = np.concatenate([points[:, :2] / points[:, 2:], points[:, 2:]], axis=1)
    return np.stack([points.min(axis=0), points.max(axis=0)])


def _tiles(height: int, width: int, size: int = 128) -> Iterator[tuple[slice, slice]]:
    for top, left in itertools.product(range(0, height, size), range(0, width, size)):
        yield slice(top, min(top + size, height)), slice(left, min(left + size, width))


# --- scene ----------------------------------------------------------------------------------------------------------


class Scene:
    """A courtyard on a sunny afternoon, 14 by 12 metres, with hills beyond its wall.

    The seed decides the stones, leaves and clouds, not what stands where; the same seed gives the same bytes. Building
    takes some seconds, an image of 640x480 about a third of one, on one core; more cores share both.
    """

    def __init__(self, seed: int = 0) -> None:
        self._surfaces = _furnish()

        def paint(index: int) -> None:
            surface = self._surfaces[index]
            rows, columns = (max(4, round(size * surface.density)) for size in (surface.height, surface.width))
            rng = np.random.default_rng([seed, index])
            albedo, relief, alpha = surface.painter(_Canvas(rng, rows, columns, surface.density))
            surface.paint = Paint(albedo.astype(np.float32, copy=False), relief.astype(np.float32, copy=False), alpha)
            if alpha is not None:
                surface.mask = _Texture(alpha)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(paint, range(len(self._surfaces))))
            self._sky = _sky(np.random.default_rng([seed, len(self._surfaces)]))
            _light(self._surfaces, pool)

    def film(self, poses: Iterable[Pose], camera: Camera, *, noise: float = 0.0, noise_seed: int = 0) -> Iterator[View]:
        """The views from one pose after the other; all cores work on the next ones meanwhile."""
        workers = os.cpu_count() or 1
        _ray_grids(camera)  # once, not once in every thread
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[View]] = deque()
            for number, pose in enumerate(poses):
                waiting.append(pool.submit(self.render, *pose, camera, noise=noise, noise_seed=noise_seed + number))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def render(self, rotation: ArrayLike, position: ArrayLike, camera: Camera, *, noise: float = 0.0,
               noise_seed: int = 0) -> View:
        """What `camera` sees from the pose x_world = rotation x_camera + position.

        `noise` is the sensor's, in grey levels (standard deviation), drawn from `noise_seed`. Raises ValueError where
        the camera's distortion has no inverse within the image.
        """
        pose = Pose(np.asarray(rotation, np.float64), np.asarray(position, np.float64))
        tracer = _Tracer(self._surfaces, pose)
        focal = math.sqrt(camera.matrix[0, 0] * camera.matrix[1, 1])
        rays, points = _ray_grids(camera)
        windows = tracer.windows(rays)
        tiles = list(_tiles(camera.height, camera.width))
        depth = np.empty((camera.height, camera.width), np.float32)
        which = np.empty((camera.height, camera.width), np.int16)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for tile in tiles:
                depth[tile], which[tile] = tracer.trace(rays.x[tile], rays.y[tile], tracer.within(windows, tile), focal)
            image = self._shade(tracer, which.ravel(), rays.x.ravel(), rays.y.ravel(), focal).reshape(*which.shape, 3)
            # Where surfaces meet, a pixel is the mean of four points in it.
            square = np.ones((3, 3), np.uint8)
            edges: Any = cv2.dilate(which, square) != cv2.erode(which, square)
            for tile in tiles:
                edge = edges[tile]
                if edge.any():
                    x, y = (np.concatenate([grid[tile][edge] for grid in grids])
                            for grids in ([point.x for point in points], [point.y for point in points]))
                    among = [(index, ...) for index, _ in tracer.within(windows, tile, margin=1)]
                    met = tracer.trace(x, y, among, 2 * focal)[1]
                    colours = self._shade(tracer, met, x, y, 2 * focal)
                    image[tile][edge] = colours.reshape(len(points), -1, 3).mean(axis=0)
        if noise:
            image += np.random.default_rng(noise_seed).standard_normal(image.shape, np.float32) * np.float32(noise)
        return View(np.round(np.clip(image, 0, 255)).astype(np.uint8), depth, *pose, camera)

    def _shade(self, tracer: _Tracer, which: NDArray[np.int16], x: Image, y: Image, focal: float) -> Image:
        """Colours (n, 3) of rays (n,) that meet `which` of the tracer's surfaces, -1 for the sky."""
        colour = np.empty((len(which), 3), np.float32)
        order = np.argsort(which, kind="stable")
        starts = np.searchsorted(which, np.arange(-1, len(tracer.seen) + 1), sorter=order)
        for index, (start, end) in enumerate(itertools.pairwise(starts), -1):
            for first in range(start, end, CHUNK):
                mine = order[first:min(first + CHUNK, end)]
                if index >= 0:
                    colour[mine] = tracer.colour(index, x[mine], y[mine], focal)
                else:
                    ahead = np.stack([x[mine], y[mine], np.ones_like(x[mine])])
                    colour[mine] = _sky_at(self._sky, tracer.rotation.astype(np.float32) @ ahead)
        return colour


def _grid(surface: _Surface, shape: tuple[int, int]) -> tuple[Image, Image]:
    """u and v, (h, w), of the middles of a surface's texels when it is divided into h x w."""
    u = (np.arange(shape[1], dtype=np.float32) + HALF) * np.float32(surface.width / shape[1])
    v = (np.arange(shape[0], dtype=np.float32) + HALF) * np.float32(surface.height / shape[0])
    across, down = np.meshgrid(u, v)
    return across, down


# --- light: computed once and baked into the textures ---------------------------------------------------------------


SUN = np.array([-0.46, -0.62, 0.63]) / np.linalg.norm([-0.46, -0.62, 0.63])
SUNLIGHT = np.array([1.0, 0.89, 0.70], np.float32) * np.float32(3.3)
ZENITH, HORIZON = np.array([0.36, 0.52, 0.86], np.float32), np.array([0.78, 0.82, 0.88], np.float32)
BOUNCE = np.array([0.34, 0.28, 0.20], np.float32)
LIGHT_DENSITY = 22.0  # light samples per metre
MIDDLE, REACH = np.array([4.0, 1.0, 1.5]), 9.5  # the ball in which shadows are looked for
SUNS, SKIES = 4, 12  # directions from which their light comes


def _light(surfaces: Sequence[_Surface], pool: ThreadPoolExecutor) -> None:
    """Sun with soft shadows, light from the whole sky, and what the ground throws back."""
    near = [surface for surface in surfaces if not surface.far]
    turns = 2.4 * np.arange(SKIES) + 1.0  # the golden angle spreads directions evenly
    suns = [SUN + 0.012 * math.sqrt((i + 0.5) / SUNS) * _sideways(SUN, turn) for i, turn in enumerate(turns[:SUNS])]
    heights = (np.arange(SKIES) + 0.5) / SKIES
    flat = np.sqrt(1 - heights**2)
    skies = np.stack([flat * np.cos(turns), flat * np.sin(turns), heights], axis=1)
    # All light samples of all surfaces in one list, so that each light is looked up once.
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
    lit = list(pool.map(lambda light: _Shadow(near, *light).lit(at, facing),
                        [(sun, 704, 0.03) for sun in suns] + [(sky, 224, 0.10) for sky in skies]))
    sun_seen = np.mean(lit[:SUNS], axis=0)
    sky, sky_seen = np.zeros((len(at), 3), np.float32), np.zeros(len(at), np.float32)
    for direction, seen in zip(skies, lit[SUNS:]):
        part = seen * np.maximum(facing @ direction.astype(np.float32), 0) * np.float32(2 / SKIES)
        sky_seen += part
        sky += part[:, None] * _mix(HORIZON, ZENITH, np.float32(direction[2]))
    # What sunlit ground and walls throw back: less in corners, more from below.
    sky += BOUNCE * (0.35 + 1.3 * sky_seen + 0.25 * (1 - facing[:, 2]))[:, None]
    ends = np.cumsum([rows * columns for rows, columns in grids])

    def bake(number: int) -> None:
        mine = slice(ends[number] - math.prod(grids[number]), ends[number])
        _bake(near[number], sky[mine].reshape(*grids[number], 3), sun_seen[mine].reshape(grids[number]))

    list(pool.map(bake, range(len(near))))
    for surface in surfaces:
        if surface.far:
            surface.texture = _Texture(_develop(surface.paint.albedo ** 2 * np.float32(1.75)))


def _bake(surface: _Surface, sky: Image, sun_seen: Image) -> None:
    """Paint under the light that falls on it becomes the texture."""
    paint = surface.paint
    h, w = paint.relief.shape
    sky, sun_seen = (cv2.resize(array, (w, h), interpolation=cv2.INTER_LINEAR) for array in (sky, sun_seen))
    # Relief: its slopes turn the normal, its hollows see less of the sky.
    normal, right, down = surface.directions(*_grid(surface, (h, w)))
    sun = SUN.astype(np.float32)
    rise_u, rise_v = (np.asarray(cv2.Sobel(paint.relief, cv2.CV_32F, *order, ksize=1, scale=surface.density / 2))
                      for order in ((1, 0), (0, 1)))
    cosine = (normal @ sun - rise_u * (right @ sun) - rise_v * (down @ sun)) / np.sqrt(1 + rise_u**2 + rise_v**2)
    hollow = paint.relief - cv2.GaussianBlur(paint.relief, (0, 0), 0.03 * surface.density)
    if surface.mask is not None and isinstance(surface, _Round):
        cosine = 0.35 + 0.65 * cosine  # leaves point everywhere and let light through
    light = sky * np.clip(1 + 22 * hollow, 0.45, 1.25)[..., None] + SUNLIGHT * (
        np.maximum(cosine, 0) * sun_seen)[..., None]
    surface.texture = _Texture(_develop(np.square(np.maximum(paint.albedo, np.float32(0.03))) * light))
    del surface.paint


class _Shadow:
    """What the light from one direction reaches: the scene's depth along parallel rays."""

    def __init__(self, surfaces: Sequence[_Surface], direction: Vector, size: int, bias: float) -> None:
        direction = direction / np.linalg.norm(direction)
        side = _sideways(direction, 0.0)
        self.axes = np.stack([side, np.cross(side, direction), -direction])
        self.scale, self.bias, self.direction = size / (2 * REACH), np.float32(bias), direction.astype(np.float32)
        tracer = _Tracer(surfaces, Pose(self.axes.T, MIDDLE), parallel=True)
        grid = (np.arange(size) + 0.5) / self.scale - REACH
        rays = _Rays(*np.meshgrid(grid, grid))
        windows = tracer.windows(rays)
        self.depth = np.empty((size, size), np.float32)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for tile in _tiles(size, size, 192):
                self.depth[tile] = tracer.trace(rays.x[tile], rays.y[tile], tracer.within(windows, tile), self.scale)[0]
        self.depth[np.isinf(self.depth)] = 1e3

    def lit(self, points: Image, normals: Image) -> Image:
        """How much of the light reaches the points (n, 3), from 0 to 1."""
        result = []
        for first in range(0, len(points), CHUNK):
            facing, at = normals[first:first + CHUNK], points[first:first + CHUNK]
            slant = np.clip(facing @ self.direction, 0.15, 1)
            local = (at + facing * self.bias - MIDDLE.astype(np.float32)) @ self.axes.T.astype(np.float32)
            place = (local[:, :2].T + np.float32(REACH)) * np.float32(self.scale) - HALF
            nearest: Any = cv2.remap(self.depth, place[:1], place[1:], cv2.INTER_LINEAR,
                                     borderMode=cv2.BORDER_CONSTANT, borderValue=[1e3])
            # Fading over the thickness of `bias`, so that a surface does not shade itself.
            result.append(np.clip((nearest[0] - local[:, 2]) / self.bias + 1 + HALF / slant, 0, 1))
        return np.concatenate(result)


def _sideways(direction: Vector, angle: float) -> Vector:
    """A unit vector square to `direction`, turned about it by `angle`."""
    first = np.cross(direction, (0.31, 0.95, 0.07))
    first /= np.linalg.norm(first)
    return np.asarray(math.cos(angle) * first + math.sin(angle) * np.cross(direction, first))


def _develop(light: Image) -> NDArray[np.uint8]:
    """From light to display-encoded bytes, with a film's soft shoulder (Narkowicz's fit to the ACES curve)."""
    x = light * np.float32(0.42)
    film = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    return np.round(np.sqrt(film) * 255).astype(np.uint8)


SKY_SIZE, SKY_TOP, SKY_END = (480, 2000), 75.0, -8.0  # texels; elevation of the first and the last row, degrees


def _sky(rng: np.random.Generator) -> _Texture:
    """Azimuth from behind round by the right, elevation downwards."""
    h, w = SKY_SIZE
    azimuth = np.linspace(np.pi, -np.pi, w, dtype=np.float32)[None]
    elevation = np.radians(np.linspace(SKY_TOP, SKY_END, h, dtype=np.float32))[:, None]
    height = np.sin(np.maximum(elevation, 0.0))
    # Clouds lie on a plane overhead, so they crowd towards the horizon.
    reach, size = np.cos(elevation) / (height + 0.13), 1200
    px, py = (((f(azimuth) * reach / 16 + 0.5) * size).astype(np.float32) for f in (np.cos, np.sin))

    def overhead(noise: Image, dx: float = 0.0, dy: float = 0.0) -> Image:
        return np.asarray(cv2.remap(noise, px + np.float32(dx), py + np.float32(dy), cv2.INTER_CUBIC,
                                    borderMode=cv2.BORDER_REFLECT))

    billow, wisps = _fractal(rng, size, size, 150, 150, 8, 0.58), _fractal(rng, size, size, 60, 240, 7, 0.6)
    thick = overhead(billow)
    lit = _smooth(-0.6, 0.7, thick - overhead(billow, 9 * SUN[0], 9 * SUN[1]))
    even = np.ones_like(azimuth)
    colour = _mix(_rgb(206, 222, 236), _rgb(72, 128, 196), (1 - np.exp(-height * 3.2)) * even)
    towards = np.cos(elevation) * (np.cos(azimuth) * SUN[0] + np.sin(azimuth) * SUN[1]) + height * SUN[2]
    colour = _mix(colour, _rgb(255, 240, 214), 0.5 * np.exp(-6 * (1 - towards)))
    colour = _mix(colour, _rgb(250, 250, 252), 0.25 * _smooth(0.0, 1.2, overhead(wisps)))
    colour = _mix(colour, _mix(_rgb(178, 188, 204), _rgb(255, 250, 240), lit), 0.95 * _smooth(-0.15, 0.5, thick))
    colour = _mix(colour, _rgb(222, 228, 232), 0.75 * np.exp(-height / 0.06) * even)
    return _Texture(np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8))


def _sky_at(sky: _Texture, direction: Image) -> NDArray[np.uint8]:
    """Colours (n, 3) in directions (3, n) in the world."""
    x, y, z = direction
    elevation = np.degrees(np.arctan2(z, np.hypot(x, y)))
    azimuth = np.arctan2(y, x)
    return sky.at((np.float32(np.pi) - azimuth) * np.float32(SKY_SIZE[1] / (2 * np.pi)),
                  (np.float32(SKY_TOP) - elevation) * np.float32(SKY_SIZE[0] / (SKY_TOP - SKY_END)), 0)


# --- paint ----------------------------------------------------------------------------------------------------------


def _rgb(*values: float) -> Image:
    return np.array(values, np.float32) / 255


def _smooth(low: float, high: float, x: Any) -> Any:
    """From 0 at `low` to 1 at `high`, without a kink."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(a: Any, b: Any, share: Any) -> Any:
    """From a to b; a share (h, w) goes for all three colours."""
    return a + (b - a) * (share[..., None] if isinstance(share, np.ndarray) and share.ndim == 2 else share)


LIMESTONE = np.stack([_rgb(206, 188, 152), _rgb(190, 170, 134), _rgb(172, 156, 128), _rgb(214, 198, 166),
                      _rgb(180, 150, 112), _rgb(160, 150, 134)])
BRICK = np.stack([_rgb(176, 98, 68), _rgb(160, 84, 60), _rgb(190, 116, 80), _rgb(148, 88, 70), _rgb(182, 104, 84)])
BASALT = np.stack([_rgb(142, 134, 124), _rgb(126, 120, 114), _rgb(158, 146, 130), _rgb(112, 108, 106),
                   _rgb(148, 130, 112), _rgb(168, 158, 142)])
MORTAR, EARTH, HAZE, IRON = _rgb(176, 162, 136), _rgb(118, 108, 92), _rgb(196, 208, 220), _rgb(62, 56, 52)
OLIVE = np.stack([_rgb(112, 124, 72), _rgb(138, 148, 98), _rgb(90, 104, 60), _rgb(158, 164, 120)])
GREEN = np.stack([_rgb(72, 104, 44), _rgb(92, 128, 52), _rgb(56, 86, 40), _rgb(120, 148, 66)])
DARK = np.stack([_rgb(72, 94, 54), _rgb(88, 110, 62), _rgb(60, 80, 50), _rgb(106, 126, 74)])
FIELDS = np.stack([_rgb(196, 176, 104), _rgb(134, 146, 76), _rgb(164, 158, 90), _rgb(112, 130, 70),
                   _rgb(206, 188, 128)])


def _courses(c: _Canvas, course: tuple[float, float], length: tuple[float, float], joint: float, waver: float = 0.0,
             bond: bool = False) -> NDArray[np.int32]:
    """Labels (h, w) of stones laid in courses, 0 in the joints; ranges of their height and length, metres.

    `waver` bends the joints; `bond` lays every second course half a stone further, as bricks are.
    """
    labels = np.zeros((c.h, c.w), np.int32)
    top, row, label, scale = -c.rng.uniform(0, course[0]), 0, 0, c.density
    while top * scale < c.h:
        tall = c.rng.uniform(*course)
        left = -length[0] * (0.5 * (row % 2) if bond else c.rng.uniform(0.1, 1))
        while left * scale < c.w:
            long = c.rng.uniform(*length)
            label += 1
            y0, y1, x0, x1 = (max(0, round(edge * scale)) for edge in (
                top + joint / 2, top + tall - joint / 2, left + joint / 2, left + long - joint / 2))
            labels[y0:y1, x0:x1] = label
            left += long
        top += tall
        row += 1
    return _bend(c, labels, waver, 16 * waver) if waver else labels


def _bend(c: _Canvas, labels: Image, by: float, cell: float) -> NDArray[np.int32]:
    """A label image whose lines waver by about `by` metres over `cell` metres."""
    x, y = np.meshgrid(np.arange(c.w, dtype=np.float32), np.arange(c.h, dtype=np.float32))
    x += c.noise(cell, 3) * np.float32(by * c.density)
    y += c.noise(cell, 3) * np.float32(by * c.density)
    bent = cv2.remap(labels.astype(np.float32), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    return bent.astype(np.int32)


def _stones(c: _Canvas, labels: NDArray[np.int32], tones: Image, mortar: Image, round_off: float, thick: float,
            rough: float = 0.004, vary: float = 0.12) -> Paint:
    """Stones of varied tones, rounded off over `round_off` metres at their edges, `thick` metres above the mortar."""
    count = int(labels.max()) + 1
    tone = tones[c.rng.integers(0, len(tones), count)] * c.rng.normal(1, vary, (count, 1))
    tone *= c.rng.normal(1, 0.015, (count, 3))
    lift = c.rng.normal(thick, 0.25 * thick, count)
    tone[0], lift[0] = mortar, 0
    edge = cv2.distanceTransform((labels > 0).astype(np.uint8), cv2.DIST_L2, 3) / np.float32(c.density * round_off)
    grain, speckle = c.noise(0.12, 6, 0.7), c.speckle()
    # Dirt settles where the stone meets the mortar.
    dirt = np.where(labels > 0, 0.72 + 0.28 * np.minimum(edge / np.float32(0.4), 1), np.float32(1))
    shade = (1 + 0.13 * grain + 0.06 * c.noise(0.5, 4) + 0.035 * speckle) * dirt
    swell = 1 - np.square(1 - np.minimum(edge, 1))
    relief = lift.astype(np.float32)[labels] * swell + rough * (0.4 + 0.6 * swell) * grain + 0.15 * rough * speckle
    return Paint(np.take(tone.astype(np.float32), labels, axis=0) * shade[..., None], relief)


def _masonry(course: tuple[float, float] = (0.16, 0.32), length: tuple[float, float] = (0.22, 0.62)) -> Painter:
    """Roughly squared stones."""
    return lambda c: _stones(c, _courses(c, course, length, 0.022, 0.018), LIMESTONE, MORTAR, 0.035, 0.022)


def _bricks(c: _Canvas) -> Paint:
    labels = _courses(c, (0.075, 0.075), (0.25, 0.25), 0.013, 0.004, bond=True)
    return _stones(c, labels, BRICK, MORTAR, 0.012, 0.01, 0.002)


def _pavers(c: _Canvas) -> Paint:
    return _stones(c, _courses(c, (0.3, 0.3), (0.3, 0.3), 0.012), BRICK, MORTAR, 0.01, 0.004, 0.002)


def _cobbles(c: _Canvas) -> Paint:
    """Every texel belongs to the nearest of scattered points; the borders are joints."""
    spacing = 0.135 * c.density
    y, x = np.mgrid[-1:c.h / spacing + 1, -1:c.w / spacing + 1]
    x += 0.5 * (np.arange(len(x))[:, None] % 2) + c.rng.uniform(0.23, 0.77, x.shape)
    y += c.rng.uniform(0.28, 0.72, y.shape)
    px, py = (x * spacing).astype(int), (y * spacing).astype(int)
    keep = (px >= 0) & (px < c.w) & (py >= 0) & (py < c.h)
    seeds = np.ones((c.h, c.w), np.uint8)
    seeds[py[keep], px[keep]] = 0
    labels = np.asarray(cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1])
    labels = _bend(c, labels, 0.012, 0.12)
    inner = np.ones((c.h, c.w), np.uint8)
    inner[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    inner[1:] &= labels[1:] == labels[:-1]
    labels[cv2.distanceTransform(inner, cv2.DIST_L2, 3) < 0.009 * c.density] = 0
    paint = _stones(c, labels, BASALT, EARTH, 0.05, 0.022, 0.003, 0.08)
    moss = 0.6 * _smooth(0.1, 0.9, c.noise(1.6)) * (labels == 0)
    sand = 0.55 * _smooth(-0.3, 1.0, c.noise(2.5, 6)) * (labels > 0)
    return Paint(_mix(_mix(paint.albedo, _rgb(104, 110, 70), moss), _rgb(184, 164, 132), sand), paint.relief)


def _plaster(tone: Image, bare: float) -> Painter:
    """Lime plaster, fallen off in places so that masonry shows; `bare` is where on the noise's scale that begins."""
    def paint(c: _Canvas) -> Paint:
        under = _masonry()(c)
        height = c.xy()[1]
        level = c.noise(1.7, 7, 0.6) + 0.9 * np.exp(-height / 0.5) - bare  # bare near the ground, where the damp is
        off = _smooth(-0.01, 0.05, level)
        cloud, grain, runs = c.noise(0.9, 6), c.noise(0.06, 4, 0.8), c.noise((1.2, 0.07), 4)
        fresh = tone * (1 + 0.08 * cloud + 0.05 * grain + 0.05 * runs)[..., None]
        fresh = _mix(fresh, _rgb(150, 132, 108), 0.35 * _smooth(0.2, 1.4, runs + cloud - height * 0.3))
        fresh *= (1 - 0.25 * _smooth(-0.16, 0.0, level))[..., None]
        thick = 0.03 + 0.0035 * grain + 0.006 * cloud
        return Paint(_mix(fresh, under.albedo, off), thick + (under.relief - thick) * off)
    return paint


def _planks(tone: Image, wide: float = 0.13, peeling: Image | None = None, nails: bool = True) -> Painter:
    """Boards standing upright; `peeling` is the colour of old paint on them."""
    def paint(c: _Canvas) -> Paint:
        count = max(1, round(c.w / c.density / wide))
        place = np.arange(c.w, dtype=np.float32) / c.w * count
        board = np.minimum(place.astype(int), count - 1)
        x = np.arange(c.w, dtype=np.float32) / c.density + c.rng.uniform(0, 50, count).astype(np.float32)[board]
        # The grain: a tree's rings cut lengthwise.
        fibre = c.noise((0.45, max(2 / c.density, 0.012)), 4, 0.8)
        rings = np.sin((x + 0.02 * c.noise((0.7, 0.1), 3)) * 330 + 2.0 * fibre)
        light = c.rng.normal(1, 0.08, count).astype(np.float32)[board] * (
            1 + 0.09 * rings + 0.12 * fibre + 0.05 * c.noise((0.6, 0.2)))
        albedo = tone * light[..., None]
        if peeling is not None:
            left = _smooth(-0.7, -0.25, c.noise((0.5, 0.09), 6, 0.7))
            albedo = _mix(albedo, peeling * (0.25 + 0.75 * light)[..., None], left)
        for _ in range(max(1, round(count * c.h / c.density * 0.8))):
            knot = c.rng.uniform(0.008, 0.018) * c.density
            _dab(albedo, c.rng.uniform(0, c.w), c.rng.uniform(0, c.h), knot, 1.7 * knot, tone * np.float32(0.42), 0.8)
        if nails:
            head = 0.006 * c.density
            for i, across, y in itertools.product(range(count), (0.25, 0.75), (8 * head, c.h - 8 * head)):
                _dab(albedo, (i + across) * c.w / count, y, head, head, IRON * np.float32(0.7), 0.9)
        gap = _smooth(1 - 0.04 / wide, 1.0, np.abs(place - board - HALF) * 2)
        return Paint(albedo * (1 - 0.75 * gap)[:, None], 0.0012 * rings + 0.001 * fibre - 0.012 * gap)
    return paint


def _lying(painter: Painter) -> Painter:
    """The same turned by a right angle."""
    def paint(c: _Canvas) -> Paint:
        albedo, relief, _ = painter(c.turned())
        return Paint(np.ascontiguousarray(albedo.transpose(1, 0, 2)), np.ascontiguousarray(relief.T))
    return paint


def _dab(image: Image, x: float, y: float, rx: float, ry: float, colour: Image, strength: float) -> None:
    """A soft elliptical spot, in texels."""
    h, w = image.shape[:2]
    x0, x1 = max(0, int(x - 2 * rx)), min(w, int(x + 2 * rx) + 2)
    y0, y1 = max(0, int(y - 2 * ry)), min(h, int(y + 2 * ry) + 2)
    if x0 < x1 and y0 < y1:
        dy, dx = np.ogrid[y0 - y:y1 - y, x0 - x:x1 - x]
        share = strength * np.exp(-((dx / rx) ** 2 + (dy / ry) ** 2))[:y1 - y0, :x1 - x0]
        image[y0:y1, x0:x1] = _mix(image[y0:y1, x0:x1], colour, share.astype(np.float32))


def _crate(c: _Canvas) -> Paint:
    """Boards behind a frame with a diagonal brace."""
    boards = _planks(_rgb(182, 142, 96), 0.12)(c)
    frame = _lying(_planks(_rgb(158, 118, 76), 5.0, nails=False))(c)
    x, y = c.xy()
    wide, high = c.w / c.density, c.h / c.density
    brace = np.abs(x / wide - y / high) * min(wide, high) * 0.72
    rim = np.minimum(np.minimum(x, wide - x), np.minimum(y, high - y))
    solid = (rim < 0.075) | (brace < 0.045)
    edge = np.minimum(np.abs(rim - 0.075), np.where(rim > 0.075, np.abs(brace - 0.045), 1))
    albedo = np.where(solid[..., None], frame.albedo, boards.albedo * np.float32(0.9))
    albedo *= (0.6 + 0.4 * _smooth(0, 0.012, edge))[..., None]
    return Paint(albedo, np.where(solid, 0.02 + frame.relief, boards.relief))


def _staves(c: _Canvas) -> Paint:
    """The side of a barrel, with four iron hoops."""
    wood, rust = _planks(_rgb(150, 112, 74), 0.1, nails=False)(c), c.noise(0.05, 4)
    place = c.xy()[1] / np.float32(c.h / c.density)
    hoop = np.abs(np.stack([place - middle for middle in (0.05, 0.27, 0.73, 0.95)])).min(axis=0) < 0.025
    iron = _mix(IRON * (1 + 0.2 * rust)[..., None], _rgb(120, 74, 48), 0.5 * _smooth(0.2, 1.2, rust))
    return Paint(np.where(hoop[..., None], iron, wood.albedo), np.where(hoop, 0.006 + 0.002 * rust, wood.relief))


def _roof(c: _Canvas) -> Paint:
    """Roman tiles: half pipes in columns, each row overlapping the next below."""
    x, y = c.xy()
    x = (x + 0.02 * c.noise(0.6, 3)) / np.float32(0.21)
    column = np.floor(x)
    y = (y.max() - y) / np.float32(0.36) + np.float32(0.3) * np.sin(column * np.float32(2.4))
    row = np.floor(y)
    pipe, along = np.sin(np.pi * (x - column)), y - row
    tile = ((row + 1) * (column.max() + 2) + column + 1).astype(int)
    tones = np.concatenate([BRICK * np.float32(1.12), _rgb(206, 150, 110)[None], _rgb(150, 110, 88)[None]])
    count = int(tile.max()) + 1
    tone = (tones[c.rng.integers(0, len(tones), count)] * c.rng.normal(1, 0.1, (count, 1))).astype(np.float32)
    grain = c.noise(0.1, 5, 0.7)
    albedo = _mix(tone[tile] * (1 + 0.12 * grain)[..., None], _rgb(150, 146, 116),
                  0.6 * _smooth(0.5, 1.3, c.noise(0.5, 6) + 0.3 * grain))
    shade = (0.55 + 0.45 * _smooth(0.0, 0.35, pipe)) * (0.8 + 0.2 * _smooth(0.0, 0.1, along))
    return Paint(albedo * shade[..., None], 0.06 * pipe + 0.025 * along + 0.003 * grain)


def _terracotta(c: _Canvas) -> Paint:
    """A turned pot with a moulded band."""
    x, y = c.xy()
    grain, cloud = c.noise(0.04, 4, 0.8), c.noise(0.3)
    turning = np.sin(y * 420 + 2 * cloud)
    albedo = _mix(_rgb(188, 106, 70) * (1 + 0.07 * grain + 0.04 * turning)[..., None], _rgb(216, 178, 146),
                  0.55 * _smooth(0.1, 1.2, cloud + 0.4 * grain))
    band = np.exp(-(((y - 0.72 * c.h / c.density) / 0.022) ** 2)) * (0.6 + 0.4 * np.sign(np.sin(x * 70)))
    return Paint(albedo, 0.0008 * turning + 0.001 * grain + 0.008 * band)


def _hewn(c: _Canvas) -> Paint:
    """Pale stone in one piece."""
    x, y = c.xy()
    grain = c.noise(0.08, 5, 0.75)
    rim = np.minimum(np.minimum(x, c.w / c.density - x), np.minimum(y, c.h / c.density - y))
    shade = (1 + 0.10 * grain + 0.09 * c.noise(0.4) + 0.04 * c.speckle()) * (0.8 + 0.2 * _smooth(0, 0.025, rim))
    return Paint(_rgb(206, 192, 162) * shade[..., None], 0.01 * _smooth(0, 0.02, rim) + 0.003 * grain)


def _window(c: _Canvas) -> Paint:
    """Panes that mirror the sky, in a pale frame."""
    x, y = c.xy()
    wide, high = c.w / c.density, c.h / c.density
    mirrored = _smooth(-0.5, 1.6, c.noise(0.6, 4) - 0.8 + 2.0 * y / high)
    glass = _mix(_rgb(36, 44, 52), _rgb(128, 150, 168), 0.8 * mirrored)
    pane = wide / 2, high / max(2, round(high / 0.34))
    bar = np.minimum(*(np.abs((at / size + HALF) % 1 - HALF) * size for at, size in zip((x, y), pane))) < 0.024
    wood = _rgb(196, 190, 172) * (1 + 0.1 * c.noise(0.1, 5, 0.7))[..., None]
    return Paint(np.where(bar[..., None], wood, glass), (0.012 * bar).astype(np.float32))


def _shutter(c: _Canvas) -> Paint:
    """Slats in a frame, the paint peeling."""
    wood = _planks(_rgb(140, 118, 90), 0.5, _rgb(76, 120, 108), nails=False)(c)
    x, y = c.xy()
    wide, high = c.w / c.density, c.h / c.density
    inner = (np.minimum(x, wide - x) > 0.06) & (np.minimum(y, high - y) > 0.07) & (np.abs(y - high / 2) > 0.035)
    slat = 1 - (y / np.float32(0.052)) % 1
    shade = np.where(inner, 0.5 + 0.55 * slat, np.float32(1))
    return Paint(wood.albedo * shade[..., None], np.where(inner, 0.02 * slat - 0.02, wood.relief))


def _grass(c: _Canvas) -> Paint:
    """Dry earth and grass."""
    grain = c.noise(0.15, 5, 0.75)
    albedo = _mix(_rgb(178, 158, 104), _rgb(112, 122, 62), _smooth(-0.7, 0.8, c.noise(3, 6)))
    return Paint(albedo * (1 + 0.2 * grain)[..., None], 0.02 * grain)


def _leaves(greens: Image, size: float, thickness: Callable[[_Canvas, Image], Image], blossom: Image | None = None,
            flowers: float = 0.0) -> Painter:
    """Foliage with holes: leaves of `size` metres where thickness(canvas, noise) is above about 0.2."""
    def paint(c: _Canvas) -> Paint:
        lumps = c.noise(0.6)
        thick = thickness(c, lumps)
        albedo = np.zeros((c.h, c.w, 3), np.float32) + greens[0] * np.float32(0.32)
        alpha = (thick > 0.22).astype(np.uint8) * 255
        count = int(2.6 * c.h * c.w / (c.density * size) ** 2)
        px, py, order = c.rng.uniform(0, c.w, count), c.rng.uniform(0, c.h, count), np.linspace(0, 1, count)
        grows = thick[py.astype(int), px.astype(int)] > c.rng.uniform(-0.05, 0.2, count)
        colour = greens[c.rng.integers(0, len(greens), count)] * (0.45 + 0.6 * order)[:, None]  # the last lie on top
        if blossom is not None:
            colour[c.rng.random(count) < flowers * (0.3 + 1.4 * order)] = blossom
        colour *= c.rng.uniform(0.75, 1.2, (count, 1))
        turn, long = c.rng.uniform(0, 2 * np.pi, count), size * c.density * c.rng.uniform(0.35, 0.65, count)
        dx, dy = np.cos(turn) * long, np.sin(turn) * long
        outline = np.stack([px - dx, py - dy, px - 0.45 * dy, py + 0.45 * dx, px + dx, py + dy, px + 0.45 * dy,
                            py - 0.45 * dx], axis=1)
        corners = np.round(outline * 16).astype(np.int32).reshape(-1, 4, 2)  # in sixteenths of a texel
        for i in np.flatnonzero(grows):
            cv2.fillConvexPoly(albedo, corners[i], colour[i].tolist(), cv2.LINE_8, 4)
            cv2.fillConvexPoly(alpha, corners[i], [255.0], cv2.LINE_8, 4)
        return Paint(albedo, 0.05 * lumps, alpha)
    return paint


def _bush(cover: float) -> Callable[[_Canvas, Image], Image]:
    return lambda c, lumps: cover + 0.6 * lumps


def _creeper(c: _Canvas, lumps: Image) -> Image:
    """Thinning out downwards and to the sides."""
    x, y = c.xy()
    return 0.9 - 1.3 * np.abs(x * c.density / c.w * 2 - 1) ** 3 - 1.25 * (1 - y * c.density / c.h) ** 1.5 + 0.55 * lumps


def _cypress(c: _Canvas) -> Paint:
    """The outline of a flame, lit as if it were round."""
    x, y = c.xy()
    across, down = np.abs(x * c.density / c.w * 2 - 1), 1 - y * c.density / c.h
    half = 0.92 * np.sqrt(down * (1.12 - down**3))
    paint = _leaves(DARK, 0.1, lambda _, lumps: 3.2 * (half - across) + 0.22 * lumps)(c)
    swell = np.sqrt(np.clip(1 - (across / np.maximum(half, 0.05)) ** 2, 0, 1))
    return paint._replace(relief=paint.relief + 0.45 * swell)


def _ridge(base: float, rise: float, haze: float) -> Painter:
    """A range of hills: an outline cut from a plane, woods and fields on it, paled by `haze`."""
    def paint(c: _Canvas) -> Paint:
        wide, high = c.w / c.density, c.h / c.density
        y = c.xy()[1] / np.float32(high)
        line = base + rise * _fractal(c.rng, 2, c.w, 9, c.w / 4.2, 7, 0.45)[0]
        fuzz = 0.006 * _fractal(c.rng, 2, c.w, 9, 12, 3, 0.8)[0]
        fields = _courses(c, (high / 22, high / 12), (wide / 44, wide / 20), 2 / c.density)
        fields = _bend(c, fields, high / 20, high / 5)
        tone = FIELDS[c.rng.integers(0, len(FIELDS), int(fields.max()) + 1)]
        rows = 1 + 0.10 * np.sin(np.arange(c.w, dtype=np.float32) * 0.9 + fields.astype(np.float32) * 1.7)
        woods = _smooth(-0.1, 0.15, c.noise((high / 7, wide / 16), 7, 0.75) + 1.2 * (y - 0.45))
        trees = _rgb(64, 84, 52) * (1 + 0.35 * c.noise(7 / c.density, 3))[..., None]
        albedo = _mix(tone[fields] * rows[..., None], trees, np.maximum(woods, 0.8 * (fields == 0)))
        albedo = _mix(albedo, HAZE, np.minimum(haze + 0.12 * (1 - y / base), 0.95))
        return Paint(albedo, np.zeros_like(y), ((y < line + fuzz) * 255).astype(np.uint8))
    return paint


def _cut(painter: Painter, keep: Callable[[Image, Image], Any]) -> Painter:
    """A painter whose paint is left only where keep(x, y) holds, metres from the left and from the bottom."""
    return lambda c: painter(c)._replace(alpha=np.where(keep(*c.xy()), 255, 0).astype(np.uint8))


def _disc(painter: Painter, inner: float, outer: float) -> Painter:
    middle, half = (outer + inner) / 2, (outer - inner) / 2
    return _cut(painter, lambda x, y: np.abs(np.hypot(x - outer, y - outer) - middle) <= half)


EAVES = _cut(_roof, lambda x, y: y > 0.10 - 0.11 * np.sqrt(np.clip(1 - (((x / 0.21) % 1 - 0.5) * 2) ** 2, 0, 1)))
ARCHES, SPRING, SPAN = (2.0, 5.0, 8.0), 1.75, 1.1  # middles of the arches, height of their feet, half their width


def _under_arches(x: Image, y: Image) -> Any:
    return np.any([np.where(y <= SPRING, np.abs(x - middle) <= SPAN, np.hypot(x - middle, y - SPRING) <= SPAN)
                   for middle in ARCHES], axis=0)


def _arcade(c: _Canvas) -> Paint:
    """Masonry with arches of hewn stone."""
    wall = _masonry((0.2, 0.34), (0.25, 0.7))(c)
    x, y = c.xy()
    labels, trim = np.zeros((c.h, c.w), np.int32), np.zeros((c.h, c.w), bool)
    for i, middle in enumerate(ARCHES):
        dx, dy = x - middle, y - SPRING
        distance, wedge, block = np.hypot(dx, dy), np.arctan2(dy, dx) / np.pi * 17, y / 0.35
        arch = (dy > 0) & (np.abs(distance - SPAN - 0.155) < 0.205)
        pier = (dy <= 0) & (np.abs(dx) > SPAN - 0.05) & (np.abs(dx) < SPAN + 0.30 + 0.1 * (np.floor(block) % 2))
        stone = arch & (np.abs(wedge - np.round(wedge)) * distance > 0.05) & (distance < SPAN + 0.345)
        labels[stone] = (100 * i + 1 + np.floor(wedge))[stone]
        stone = pier & (block % 1 > 0.05)
        labels[stone] = (100 * i + 40 + 2 * np.floor(block) + (dx > 0))[stone]
        trim |= arch | pier
    hewn = _stones(c, labels, LIMESTONE * np.float32(1.06), MORTAR, 0.025, 0.03, 0.002)
    return Paint(np.where(trim[..., None], hewn.albedo, wall.albedo), np.where(trim, hewn.relief + 0.01, wall.relief),
                 np.where(_under_arches(x, y), 0, 255).astype(np.uint8))


# --- what stands in the courtyard -----------------------------------------------------------------------------------


EAST, NORTH, UP = np.eye(3)


def _wall(start: tuple[float, float], end: tuple[float, float], z: tuple[float, float], normal: Vector,
          painter: Painter, density: float = 128.0) -> _Surface:
    """An upright rectangle between two points on the ground plan."""
    centre = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, (z[0] + z[1]) / 2)
    return _Flat(centre, normal, UP, math.dist(start, end), z[1] - z[0], painter, density)


def _box(bottom: ArrayLike, size: tuple[float, float, float], painter: Painter, yaw: float = 0.0,
         density: float = 160.0, hidden: str = "below") -> Iterator[_Surface]:
    """Depth (along x before it is turned by yaw), width and height. Faces that nobody will see are left out."""
    forward, left = np.array([math.cos(yaw), math.sin(yaw), 0]), np.array([-math.sin(yaw), math.cos(yaw), 0])
    depth, width, height = size
    middle = np.asarray(bottom, float) + UP * height / 2
    for name, normal, half, up, wide, high in (
            ("front", -forward, depth, UP, width, height), ("back", forward, depth, UP, width, height),
            ("left", left, width, UP, depth, height), ("right", -left, width, UP, depth, height),
            ("above", UP, height, forward, width, depth), ("below", -UP, height, forward, width, depth)):
        if name not in hidden.split():
            yield _Flat(middle + normal * half / 2, normal, up, wide, high, painter, density)


def _potted(base: ArrayLike, radius: float, high: float, bush: float) -> list[_Surface]:
    """A shrub with orange flowers: a shell of leaves with holes, round a denser one."""
    foot, rim = np.asarray(base, float), 0.16 * high
    crown = foot + UP * (high + bush * 0.72)
    return [
        _Round.cone(foot, radius * 0.66, radius * 0.92, high - rim, _terracotta, density=220),
        _Round.cone(foot + UP * (high - rim), radius, radius * 1.02, rim, _terracotta, density=220),
        _Flat(foot + UP * (high - 0.03), UP, EAST, 2 * radius, 2 * radius, _disc(_grass, 0, radius), 64),
        _Round.ball(crown, bush, _leaves(GREEN, 0.075, _bush(0.3), _rgb(236, 120, 60), 0.10), density=128),
        _Round.ball(crown, bush * 0.82, _leaves(GREEN, 0.075, _bush(0.6)), density=96),
    ]


def _house() -> Iterator[_Surface]:
    """At the far end, its front at x = 11."""
    yield _wall((11, 7.4), (11, -3.4), (0, 5.4), -EAST, _plaster(_rgb(226, 190, 134), 0.62), 112)
    yield _wall((11, -3.4), (16, -3.4), (0, 5.4), -NORTH, _plaster(_rgb(226, 190, 134), 0.55), 64)
    slope = np.array([math.cos(0.5), 0, math.sin(0.5)])
    yield _Flat((12.6, 2.0, 6.35), np.cross(slope, NORTH), slope, 11.5, 4.6, _roof, 96)
    yield _Flat((10.8, 2.0, 5.28), -UP, EAST, 11.5, 0.6, _planks(_rgb(120, 92, 64), 0.16), 96)
    yield _Flat((10.55, 2.0, 5.30), -EAST, UP, 11.5, 0.22, EAVES)
    # The door, in a frame of stone.
    yield _Flat((10.92, 1.0, 1.15), -EAST, UP, 1.24, 2.3, _planks(_rgb(132, 104, 74), 0.16, _rgb(60, 96, 118)), 200)
    for y in (0.27, 1.73):
        yield from _box((10.9, y, 0.0), (0.22, 0.22, 2.32), _hewn, hidden="back above below")
    yield from _box((10.9, 1.0, 2.32), (0.24, 1.9, 0.26), _hewn, hidden="back above")
    yield from _box((10.7, 1.0, 0.0), (0.6, 1.7, 0.14), _hewn, hidden="back below")
    for y, z, wide, high in ((3.7, 1.15, 0.95, 1.3), (-1.6, 1.15, 0.95, 1.3),
                             (3.7, 3.45, 0.9, 1.15), (1.0, 3.45, 0.9, 1.15), (-1.6, 3.45, 0.9, 1.15)):
        yield _Flat((10.975, y, z + high / 2), -EAST, UP, wide, high, _window, 160)
        unseen = "back above" if z > 2 else "back below"
        yield from _box((10.93, y, z - 0.1), (0.24, wide + 0.3, 0.1), _hewn, hidden=unseen)
        yield from _box((10.95, y, z + high), (0.14, wide + 0.24, 0.16), _hewn, hidden="back above")
        for side in (-1, 1):
            yield from _box((10.95, y + side * (wide / 2 + 0.25), z), (0.07, 0.48, high), _shutter, density=180,
                            hidden="back above below")
    # Bougainvillea, three layers deep.
    for gap, leaf in ((0.10, 0.075), (0.19, 0.07), (0.27, 0.065)):
        yield _Flat((11 - gap, -0.35, 3.55), -EAST, UP, 2.6 - gap, 3.1 - gap,
                    _leaves(GREEN, leaf, _creeper, _rgb(206, 48, 116), 0.55))


def _gallery() -> Iterator[_Surface]:
    """On the left: an arcade half a metre thick, and what is behind it."""
    left, face, back = 0.5, 4.6, 5.1
    yield _wall((left, face), (11, face), (0, 4.3), -NORTH, _arcade, 112)
    behind = _cut(_masonry(), lambda x, y: ~_under_arches(10.5 - x, y))
    yield _wall((left, back), (11, back), (0, 4.3), NORTH, behind, 64)
    yield _wall((left, face), (left, back), (0, 4.3), -EAST, _masonry())
    for x in (left + middle for middle in ARCHES):
        for side in (-1, 1):
            yield _wall((x + side * SPAN, face), (x + side * SPAN, back), (0, SPRING), -side * EAST,
                        _masonry((0.35, 0.35), (0.5, 0.6)))
        yield _Round((x, face, SPRING), (SPAN * SPAN, 0.0, 0.0), back - face, _masonry((0.5, 0.5), (0.2, 0.22)),
                     up=NORTH, seam=-EAST, arc=math.pi, hollow=True)
    yield _wall((-3, 7.4), (11, 7.4), (0, 3.6), -NORTH, _plaster(_rgb(214, 168, 118), 0.7), 72)
    yield _wall((-3, face), (left, face), (0, 4.3), -NORTH, _masonry(), 96)
    yield _Flat((5.75, 6.25, 0.01), UP, EAST, 2.3, 10.5, _pavers, 112)
    yield _Flat((5.75, 6.25, 3.5), -UP, EAST, 2.3, 10.5, _planks(_rgb(116, 90, 64), 0.2), 48)
    slope = np.array([0, math.cos(0.42), math.sin(0.42)])
    yield _Flat((4.0, 5.85, 4.87), np.cross(EAST, slope), slope, 14.2, 3.3, _roof, 80)
    yield _Flat((4.0, 4.45, 4.20), -UP, EAST, 0.5, 14.2, _planks(_rgb(120, 92, 64), 0.16), 64)
    yield _Flat((4.0, 4.3, 4.22), -NORTH, UP, 14.2, 0.22, EAVES)


def _parapet() -> Iterator[_Surface]:
    """On the right, with pillars; and a wall behind the viewer."""
    yield _wall((-3, -4.4), (11, -4.4), (0, 0.86), NORTH, _masonry())
    yield _wall((-3, -4.32), (11, -4.32), (0.86, 0.94), NORTH, _masonry((0.2, 0.2), (0.7, 1.1)))
    yield _Flat((4.0, -4.6, 0.94), UP, EAST, 0.56, 14.0, _masonry((0.7, 1.1), (0.6, 0.6)), 112)
    yield _wall((-3, -4.88), (11, -4.88), (-1, 0.94), -NORTH, _masonry(), 24)
    yield _wall((11, -4.4), (11, -3.4), (0, 0.94), -EAST, _masonry())
    yield _wall((-3, -4.6), (-3, 7.4), (0, 4.3), EAST, _masonry(), 64)
    for x in (-0.6, 4.4, 9.4):
        yield from _box((x, -4.6, 0), (0.52, 0.6, 1.55), _bricks, density=140)
        yield from _box((x, -4.6, 1.55), (0.64, 0.72, 0.1), _hewn, density=140)
        yield from _potted((x, -4.6, 1.65), 0.17, 0.30, 0.30)


def _things() -> Iterator[_Surface]:
    """A well, crates, barrels, pots and a bench."""
    well, timber = np.array([6.7, -1.5, 0.0]), _planks(_rgb(132, 102, 70), 0.12, nails=False)
    yield _Round.cone(well, 0.78, 0.72, 0.78, _masonry((0.18, 0.22), (0.25, 0.45)), density=160)
    yield _Round.cone(well, 0.5, 0.5, 0.85, _masonry(), density=80, hollow=True)
    yield _Round.cone(well + UP * 0.78, 0.80, 0.80, 0.1, _masonry((0.1, 0.1), (0.5, 0.7)), density=160)
    yield _Flat(well + UP * 0.88, UP, EAST, 1.6, 1.6, _disc(_masonry((0.4, 0.8), (0.4, 0.8)), 0.5, 0.8))
    for side in (-1, 1):
        yield from _box(well + (0, side * 0.64, 0.88), (0.11, 0.11, 1.15), timber, density=200)
    yield _Round.cone(well + (0, -0.9, 1.82), 0.055, 0.055, 1.8, timber, up=NORTH, seam=EAST, density=200)
    rope = _planks(_rgb(188, 160, 112), 0.02)
    yield _Round.cone(well + (0, -0.12, 1.82), 0.085, 0.085, 0.3, rope, up=NORTH, seam=EAST, density=200)
    yield _Round.barrel(well + (-0.02, 0.35, 0.88), 0.12, 0.135, 0.26, _staves, density=240)
    yield from _box((5.1, 2.55, 0), (0.85, 0.85, 0.80), _crate, 0.35, 200)
    yield from _box((5.2, 2.50, 0.80), (0.62, 0.62, 0.58), _crate, 0.85, 200)
    yield from _box((4.75, 1.45, 0), (0.55, 0.75, 0.42), _lying(_planks(_rgb(186, 146, 98), 0.15)), -0.3, 200)
    for x, y, r, high in ((6.35, 3.6, 0.32, 0.95), (7.15, 3.75, 0.33, 0.98)):
        yield _Round.barrel((x, y, 0), r, r * 1.24, high, _staves, density=180)
        yield _Flat((x, y, high - 0.02), UP, EAST, 2 * r, 2 * r, _disc(_planks(_rgb(140, 106, 72), 0.11), 0, r), 180)
    for x, y, r, high, bush in ((10.35, 2.35, 0.27, 0.5, 0.40), (10.35, -0.25, 0.27, 0.5, 0.40),
                                (2.9, -2.75, 0.3, 0.52, 0.44), (3.75, -3.35, 0.2, 0.36, 0.30),
                                (8.9, -3.6, 0.27, 0.5, 0.42), (8.8, 3.9, 0.26, 0.46, 0.40)):
        yield from _potted((x, y, 0), r, high, bush)
    for x in (5.8, 7.0):
        yield from _box((x, -3.98, 0), (0.14, 0.4, 0.42), _hewn)
    yield from _box((6.4, -3.98, 0.42), (1.7, 0.46, 0.07), _lying(_planks(_rgb(158, 128, 92), 0.15)), density=180)


def _land() -> Iterator[_Surface]:
    """Beyond the parapet: an old olive tree, cypresses, bushes, and hills."""
    yield _Round.cone((2.3, -5.9, -1.0), 0.26, 0.17, 4.2, _planks(_rgb(128, 116, 98), 0.08, nails=False), density=96)
    for x, y, z, r in ((2.2, -5.8, 4.1, 1.25), (3.3, -5.3, 3.8, 0.95), (1.2, -6.2, 3.7, 1.0), (2.6, -6.6, 4.5, 1.0),
                       (2.9, -5.0, 4.5, 0.8)):
        yield _Round.ball((x, y, z), r, _leaves(OLIVE, 0.11, _bush(0.05)), 0.72, density=72)
        yield _Round.ball((x, y, z), r * 0.75, _leaves(OLIVE, 0.11, _bush(0.0)), 0.72, density=72)
    for x, y, high in ((8.2, -6.6, 6.6), (10.4, -7.4, 7.6), (12.9, -6.3, 6.0), (16.5, -9.0, 8.4), (20.0, -8.0, 8.0),
                       (24, -13, 9)):
        yield _Flat((x, y, high / 2 - 1.0), (-x, -y, 0), UP, high * 0.24, high, _cypress, 64)
    for x, y, r in ((6.0, -6.8, 1.0), (14.2, -7.6, 1.5), (18.0, -6.2, 1.6), (12.0, -9.5, 1.4)):
        yield _Round.ball((x, y, -0.7), r, _leaves(GREEN, 0.16, _bush(0.25)), 0.9, density=48)
    yield _Flat((14.0, -15.0, -0.9), UP, EAST, 20.0, 40.0, _grass, 16)
    away = np.array([0.83, -0.56, 0.0])
    for distance, base, high, rise, haze in ((90.0, 0.66, 18.0, 0.10, 0.12), (260.0, 0.62, 54.0, 0.14, 0.40),
                                             (700.0, 0.60, 190.0, 0.16, 0.66)):
        foot = away * distance + UP * (1.4 + high * (0.5 - base) + 0.012 * distance)
        yield _Flat(foot, -away, UP, 2.9 * distance, high, _ridge(base, rise, haze), 560 / distance, far=True)


def _furnish() -> list[_Surface]:
    ground = _Flat((4.0, 0.0, 0.0), UP, EAST, 12.0, 14.0, _cobbles, 112)
    return [ground, *_house(), *_gallery(), *_parapet(), *_things(), *_land()]
