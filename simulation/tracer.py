"""Finds the nearest surface along rays: through a lens, or parallel as a beam of light."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose
from simulation.painting import Image
from simulation.poses import Vector
from simulation.surfaces import Flat, Hit, Surface

NEAR = 0.05  # metres; nearer surfaces are not visible
CHUNK = 16384  # samples at a time: they fit in the cache, and cv2.remap takes rows of at most 32767
OFFSETS = ((-3 / 8, -1 / 8), (1 / 8, -3 / 8), (3 / 8, 1 / 8), (-1 / 8, 3 / 8))  # points in a pixel for its mean


class Rays:
    """A grid of rays through (x, y, 1); x and y are (H, W)."""

    def __init__(self, x: Image, y: Image) -> None:
        self.x, self.y = x.astype(np.float32), y.astype(np.float32)
        # By column, the highest x up to it and the lowest x from it on; by row, the same for y. These are sorted, so
        # that windows are found by bisection.
        self._bounds = [
            (np.minimum.accumulate(values.min(axis=axis)[::-1])[::-1], np.maximum.accumulate(values.max(axis=axis)))
            for values, axis in ((self.y, 1), (self.x, 0))
        ]

    def windows(self, low: Vector, high: Vector) -> NDArray[np.intp]:
        """First row, end row, first column, end column (N, 4) of the rays in boxes from low to high (x, y), (N, 2)."""
        return np.stack(
            [
                index
                for axis, (lowest, highest) in zip((1, 0), self._bounds)
                for index in (
                    np.searchsorted(highest, low[:, axis]),
                    np.searchsorted(lowest, high[:, axis], side="right"),
                )
            ],
            axis=1,
        )


@functools.lru_cache(maxsize=4)
def ray_grids(camera: Camera) -> tuple[Rays, list[Rays]]:
    """Rays through the centres of all pixels, and a list with the rays through each of OFFSETS in all pixels."""
    y, x = np.mgrid[0 : camera.height, 0 : camera.width]
    rays, slope = camera.normalise_with_jacobian(np.stack([x.ravel(), y.ravel()], axis=1))
    if not np.isfinite(rays).all():
        raise ValueError(f"the lens with distortion {camera.distortion.tolist()} has no direction for some pixels")
    shifted = (rays + slope @ np.array(offset) for offset in ((0.0, 0.0), *OFFSETS))
    centres, *others = (Rays(*grid.T.reshape(2, camera.height, camera.width)) for grid in shifted)
    return centres, others


class Seen(NamedTuple):
    """A surface that may be visible, and its pose relative to the camera: x_local = turn x_camera + offset."""

    surface: Surface
    turn: Image
    offset: Image
    box: Vector  # from `_bounds`


class Tracer:
    """Finds the nearest surface along rays."""

    def __init__(self, surfaces: Iterable[Surface], pose: Pose, parallel: bool = False) -> None:
        """Select the surfaces that rays in a camera frame may meet.

        The rays start at the pose's position and go through (x, y, 1). If `parallel`, they start at (x, y, 0) and go
        along z.
        """
        self.rotation, self.parallel = pose.rotation, parallel
        seen = []
        for surface in surfaces:
            if parallel or surface.faces(pose.position):
                turn, offset = surface.axes @ pose.rotation, surface.axes @ (pose.position - surface.origin)
                box = _bounds((surface.corners() - offset) @ turn, parallel)
                if box is not None:
                    seen.append(Seen(surface, turn.astype(np.float32), offset.astype(np.float32), box))
        self.seen = sorted(seen, key=lambda entry: float(entry.box[0, 2]))  # nearest first: it may hide the others

    def windows(self, rays: Rays) -> NDArray[np.intp]:
        """The part of the grid in which each of `seen` may be visible, (N, 4), see :meth:`Rays.windows`."""
        boxes = np.array([entry.box for entry in self.seen]).reshape(-1, 2, 3)
        return rays.windows(boxes[:, 0, :2], boxes[:, 1, :2])

    @staticmethod
    def within(
        windows: NDArray[np.intp], tile: tuple[slice, slice], margin: int = 0
    ) -> list[tuple[int, tuple[slice, slice]]]:
        """The indices of `seen` that may be visible in a tile, each with its part of the tile, widened by `margin`."""
        rows, columns = tile
        low = np.array([rows.start, rows.start, columns.start, columns.start])
        end = np.array([rows.stop, rows.stop, columns.stop, columns.stop])
        inside = np.clip(windows + np.array([-margin, margin, -margin, margin]), low, end) - low
        found = np.flatnonzero((inside[:, 0] < inside[:, 1]) & (inside[:, 2] < inside[:, 3]))
        return [
            (int(index), (slice(top, bottom), slice(left, right)))
            for index, (top, bottom, left, right) in zip(found, inside[found])
        ]

    def trace(
        self, x: Image, y: Image, among: Iterable[tuple[int, Any]], focal: float
    ) -> tuple[Image, NDArray[np.int16]]:
        """Depth along z (inf if a ray meets nothing), and the index in `seen` of the surface that a ray meets (or -1).

        `among` gives the indices of the surfaces to test, nearest first, each with the part of x and y to test.
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
                    new[where] = (
                        entry.surface.mask.filtered(
                            hit.u[where] * scale, hit.v[where] * scale, size * scale, blend=False
                        )
                        > 127
                    )
            np.copyto(depth[part], hit.z, where=new)
            np.copyto(which[part], np.int16(index), where=new)
        return depth, which

    def colour(self, index: int, x: Image, y: Image, focal: float) -> Image:
        """Colours (n, 3) at the intersections of rays (n,) with one surface of `seen`."""
        entry = self.seen[index]
        scale, taps, step = np.float32(entry.surface.density), 1, np.zeros(2, np.float32)
        if isinstance(entry.surface, Flat):
            # The footprint on a slanted plane is long: average several samples along it instead of one blurred sample.
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

    def _meet(self, entry: Seen, x: Image, y: Image) -> Hit:
        along = [row[0] * x + row[1] * y for row in entry.turn]
        if self.parallel:
            return entry.surface.meet([a + b for a, b in zip(along, entry.offset)], entry.turn[:, 2])
        return entry.surface.meet(entry.offset, [a + b for a, b in zip(along, entry.turn[:, 2])])

    def _footprint(self, z: Image, facing: Image, focal: float) -> Image:
        """Size in metres of a sample's footprint on the surface; its area is z^2 / (focal^2 |n . d|)."""
        if self.parallel:
            return np.full(z.shape, 1 / focal, np.float32)
        return z / np.sqrt(np.maximum(facing, np.float32(1e-3))) / np.float32(focal)


def _bounds(points: Vector, parallel: bool) -> Vector | None:
    """Lowest and highest (x, y, depth), (2, 3), of rays that meet a body with these corners; None if it is behind."""
    if not parallel:
        ahead = points[:, 2] > NEAR
        if not ahead.any():
            return None
        if not ahead.all():  # add the points where its edges and diagonals cross the plane z = NEAR
            near, behind = points[ahead][:, None], points[~ahead][None]
            share = (near[..., 2:] - NEAR) / (near[..., 2:] - behind[..., 2:])
            points = np.concatenate([points[ahead], (near + share * (behind - near)).reshape(-1, 3)])
        points = np.concatenate([points[:, :2] / points[:, 2:], points[:, 2:]], axis=1)
    return np.stack([points.min(axis=0), points.max(axis=0)])


def split_tiles(height: int, width: int, size: int = 128) -> Iterator[tuple[slice, slice]]:
    for top, left in itertools.product(range(0, height, size), range(0, width, size)):
        yield slice(top, min(top + size, height)), slice(left, min(left + size, width))
