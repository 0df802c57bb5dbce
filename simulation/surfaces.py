"""Flat and round surfaces, their intersections with rays, and their textures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulation.painting import HALF, Image, Paint, Painter
from simulation.poses import Vector


class Texture:
    """An image and smaller copies of it (a mipmap), so that each sample is the mean over a pixel's footprint."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        levels: list[Any] = [image]
        while len(levels) < 2 or (min(levels[-1].shape[:2]) > 4 and len(levels) < 9):
            height, width = levels[-1].shape[:2]
            levels.append(cv2.resize(levels[-1], ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA))
        # All levels are in one image, the smaller ones below each other to the right of the first.
        height, width = image.shape[:2]
        rows = max(height, sum(level.shape[0] for level in levels[1:]))
        self.atlas = np.zeros((rows, width + (width + 1) // 2, *image.shape[2:]), np.uint8)
        table, top = [], 0
        for i, level in enumerate(levels):
            h, w = level.shape[:2]
            x, y = (width, top) if i else (0, 0)
            self.atlas[y : y + h, x : x + w] = level
            table.append((w / width, h / height, w - 1, h - 1, x, y))
            top += h if i else 0
        self.table = np.array(table, np.float32)

    def at(self, x: Image, y: Image, level: int) -> NDArray[np.uint8]:
        """Samples of a level. Coordinates are continuous, in texels of the first level, and 0 at the image's edge."""
        sx, sy, right, bottom, left, top = self.table[level]
        column = np.minimum(np.maximum(x * sx - HALF, 0), right) + left
        row = np.minimum(np.maximum(y * sy - HALF, 0), bottom) + top
        samples: Any = cv2.remap(self.atlas, column.reshape(1, -1), row.reshape(1, -1), cv2.INTER_LINEAR)
        return samples[0]

    def filtered(self, x: Image, y: Image, footprint: Image, blend: bool = True) -> Image:
        """Samples (n, ...) averaged over `footprint` texels.

        With `blend` they are interpolated between the two nearest levels; otherwise they come from the nearest level.
        """
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


class Hit(NamedTuple):
    """The intersections of rays o + z d with a surface."""

    z: Image
    u: Image  # metres from the left edge
    v: Image  # metres from the top edge
    facing: Image  # |normal . d|
    inside: NDArray[np.bool_]  # within the surface's outline


class Surface:
    """A painted surface with coordinates u to the right and v downwards from its top left corner, metres."""

    mask: Texture | None = None  # alpha of the paint; None without holes
    painter: Painter  # until the surface is painted
    paint: Paint  # until light is baked into the texture
    texture: Texture

    def __init__(
        self,
        axes: Sequence[Vector],
        origin: Vector,
        width: float,
        height: float,
        painter: Painter,
        density: float,
        far: bool = False,
    ) -> None:
        self.axes, self.origin = np.stack(axes), origin  # the rows of axes are the local axes in the world
        self.width, self.height, self.density = width, height, density  # metres, metres, texels per metre
        self.painter, self.far = painter, far  # far: too far away to have or cast shadows

    def corners(self) -> Vector:
        """Corners (N, 3), in local coordinates, of a body that contains the surface."""
        raise NotImplementedError

    def faces(self, position: Vector) -> bool:
        """Whether the surface can be seen from a point in the world."""
        return True

    def meet(self, o: Any, d: Any) -> Hit:
        """The intersections with rays o + z d; o and d are three local coordinates each, arrays or numbers."""
        raise NotImplementedError

    def points(self, u: Image, v: Image) -> Image:
        """World coordinates (h, w, 3) of the points with surface coordinates u and v, (h, w) each."""
        raise NotImplementedError

    def directions(self, u: Image, v: Image) -> tuple[Image, Image, Image]:
        """Normals, and directions of growing u and v, in the world: (h, w, 3) each, or (1, 1, 3) if constant."""
        raise NotImplementedError


class Flat(Surface):
    """A rectangle, visible only from the side to which its normal points. Local axes: right, down, normal."""

    def __init__(
        self,
        centre: ArrayLike,
        normal: ArrayLike,
        up: ArrayLike,
        width: float,
        height: float,
        painter: Painter,
        density: float = 128.0,
        far: bool = False,
    ) -> None:
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

    def meet(self, o: Any, d: Any) -> Hit:
        z = o[2] / -d[2]
        u = o[0] + z * d[0]
        v = o[1] + z * d[1]
        return Hit(z, u, v, np.abs(d[2]), (u >= 0) & (u <= self.width) & (v >= 0) & (v <= self.height))

    def points(self, u: Image, v: Image) -> Image:
        right, down, _ = self.axes.astype(np.float32)
        return self.origin.astype(np.float32) + u[..., None] * right + v[..., None] * down

    def directions(self, u: Image, v: Image) -> tuple[Image, Image, Image]:
        right, down, normal = self.axes.astype(np.float32)[:, None, None]
        return normal, right, down


class Round(Surface):
    """Part of a surface of revolution: r^2 = a + b h + c h^2 at height h above the bottom, from 0 to `height`.

    Cylinders, cones, balls and barrels are surfaces of this kind.

    Args:
        bottom: centre of the bottom.
        profile: (a, b, c).
        height: along the axis, metres.
        painter: of the surface.
        density: texels per metre.
        up: the axis.
        seam: direction in which the texture begins.
        arc: angle that the surface covers around the axis, radians.
        hollow: the inside is visible, instead of the outside.
    """

    def __init__(
        self,
        bottom: ArrayLike,
        profile: tuple[float, float, float],
        height: float,
        painter: Painter,
        density: float = 128.0,
        up: ArrayLike = (0, 0, 1),
        seam: ArrayLike = (1, 0.1, 0),
        arc: float = 2 * math.pi,
        hollow: bool = False,
    ) -> None:
        axis = np.asarray(up, float) / np.linalg.norm(up)
        first = np.asarray(seam, float) - axis * (axis @ np.asarray(seam, float))
        first /= np.linalg.norm(first)
        a, b, c = profile
        h = np.linspace(0, height, 50)
        self.radius = float(np.sqrt((a + b * h + c * h * h).max()))
        self.profile, self.arc, self.hollow = profile, arc, hollow
        super().__init__(
            (first, np.cross(axis, first), axis), np.asarray(bottom, float), self.radius * arc, height, painter, density
        )

    @classmethod
    def cone(cls, bottom: ArrayLike, r0: float, r1: float, height: float, painter: Painter, **more: Any) -> Round:
        """A cone with radius r0 at the bottom and r1 at the top."""
        slope = (r1 - r0) / height
        return cls(bottom, (r0 * r0, 2 * r0 * slope, slope * slope), height, painter, **more)

    @classmethod
    def ball(cls, centre: ArrayLike, radius: float, painter: Painter, flat: float = 1.0, **more: Any) -> Round:
        """An ellipsoid that is `flat` times as high as wide."""
        high = radius * flat
        bottom = np.asarray(centre, float) - [0, 0, high]
        return cls(bottom, (0.0, 2 * radius * radius / high, -1 / flat**2), 2 * high, painter, **more)

    @classmethod
    def barrel(cls, bottom: ArrayLike, r0: float, r1: float, height: float, painter: Painter, **more: Any) -> Round:
        """A barrel with radius r0 at both ends and r1 in the middle."""
        bulge = 4 * (r1 * r1 - r0 * r0) / height
        return cls(bottom, (r0 * r0, bulge, -bulge / height), height, painter, **more)

    def corners(self) -> Vector:
        r = self.radius
        return np.array([[x, y, z] for x in (-r, r) for y in (-r, r) for z in (0, self.height)], float)

    def meet(self, o: Any, d: Any) -> Hit:
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
        return Hit(z, angle * np.float32(self.radius), self.height - h, facing, inside)

    def _profile_at(self, u: Image, v: Image) -> tuple[Image, Image, Image, Image]:
        """Cosine and sine of the angle around the axis, height above the bottom, and radius."""
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
        local = (
            (cos * side, sin * side, -lean * side),
            (-sin, cos, 0 * u),
            (-lean * cos / size, -lean * sin / size, -1 / size),
        )
        normal, right, down = (np.stack(xyz, -1).astype(np.float32) @ self.axes.astype(np.float32) for xyz in local)
        return normal, right, down
