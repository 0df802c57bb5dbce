"""The complete courtyard: built, painted and lit once, then rendered for any camera and pose."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kpmatch_ros.geometry.camera import Camera
from kpmatch_ros.geometry.pose import Pose
from simulation.courtyard import furnish
from simulation.light import illuminate, paint_sky, sky_colours
from simulation.painting import Canvas, Image, Paint
from simulation.poses import View
from simulation.surfaces import Texture
from simulation.tracer import CHUNK, Tracer, ray_grids, split_tiles


class Scene:
    """A courtyard on a sunny afternoon, 14 by 12 metres, with hills beyond its wall.

    The seed determines the stones, leaves and clouds, but not the places of objects. Equal seeds give equal bytes. On
    one core, building the scene takes some seconds, and an image of 640x480 about a third of a second. More cores share
    this work.
    """

    def __init__(self, seed: int = 0) -> None:
        self._surfaces = furnish()

        def paint(index: int) -> None:
            surface = self._surfaces[index]
            rows, columns = (max(4, round(size * surface.density)) for size in (surface.height, surface.width))
            rng = np.random.default_rng([seed, index])
            albedo, relief, alpha = surface.painter(Canvas(rng, rows, columns, surface.density))
            surface.paint = Paint(albedo.astype(np.float32, copy=False), relief.astype(np.float32, copy=False), alpha)
            if alpha is not None:
                surface.mask = Texture(alpha)
            del surface.painter  # functions like these cannot be pickled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(paint, range(len(self._surfaces))))
            self._sky = paint_sky(np.random.default_rng([seed, len(self._surfaces)]))
            illuminate(self._surfaces, pool)

    def film(self, poses: Iterable[Pose], camera: Camera, *, noise: float = 0.0, noise_seed: int = 0) -> Iterator[View]:
        """Yield the views from one pose after the other. Meanwhile, all cores render the next ones.

        The arguments are those of :meth:`render`; `noise_seed` grows by one from view to view.
        """
        workers = os.cpu_count() or 1
        ray_grids(camera)  # fill the cache once, not once in every thread
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[View]] = deque()
            for number, pose in enumerate(poses):
                waiting.append(pool.submit(self.render, *pose, camera, noise=noise, noise_seed=noise_seed + number))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def render(
        self, rotation: ArrayLike, position: ArrayLike, camera: Camera, *, noise: float = 0.0, noise_seed: int = 0
    ) -> View:
        """Render what `camera` sees from the pose x_world = rotation x_camera + position.

        `noise` is the standard deviation of the sensor's noise in grey levels, drawn from `noise_seed`. Raises
        ValueError if the camera's distortion has no inverse somewhere in the image.
        """
        pose = Pose(np.asarray(rotation, np.float64), np.asarray(position, np.float64))
        tracer = Tracer(self._surfaces, pose)
        focal = math.sqrt(camera.matrix[0, 0] * camera.matrix[1, 1])
        rays, points = ray_grids(camera)
        windows = tracer.windows(rays)
        tiles = list(split_tiles(camera.height, camera.width))
        depth = np.empty((camera.height, camera.width), np.float32)
        which = np.empty((camera.height, camera.width), np.int16)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for tile in tiles:
                depth[tile], which[tile] = tracer.trace(rays.x[tile], rays.y[tile], tracer.within(windows, tile), focal)
            image = self._shade(tracer, which.ravel(), rays.x.ravel(), rays.y.ravel(), focal).reshape(*which.shape, 3)
            # At the borders of surfaces, a pixel is the mean of four points in it.
            square = np.ones((3, 3), np.uint8)
            edges: Any = cv2.dilate(which, square) != cv2.erode(which, square)
            for tile in tiles:
                edge = edges[tile]
                if edge.any():
                    x, y = (
                        np.concatenate([grid[tile][edge] for grid in grids])
                        for grids in ([point.x for point in points], [point.y for point in points])
                    )
                    among = [(index, ...) for index, _ in tracer.within(windows, tile, margin=1)]
                    met = tracer.trace(x, y, among, 2 * focal)[1]
                    colours = self._shade(tracer, met, x, y, 2 * focal)
                    image[tile][edge] = colours.reshape(len(points), -1, 3).mean(axis=0)
        if noise:
            image += np.random.default_rng(noise_seed).standard_normal(image.shape, np.float32) * np.float32(noise)
        return View(np.round(np.clip(image, 0, 255)).astype(np.uint8), depth, *pose, camera)

    def _shade(self, tracer: Tracer, which: NDArray[np.int16], x: Image, y: Image, focal: float) -> Image:
        """Colours (n, 3) of rays (n,). `which` is the index in `tracer.seen` of the surface met, or -1 for the sky."""
        colour = np.empty((len(which), 3), np.float32)
        order = np.argsort(which, kind="stable")
        starts = np.searchsorted(which, np.arange(-1, len(tracer.seen) + 1), sorter=order)
        for index, (start, end) in enumerate(itertools.pairwise(starts), -1):
            for first in range(start, end, CHUNK):
                mine = order[first : min(first + CHUNK, end)]
                if index >= 0:
                    colour[mine] = tracer.colour(index, x[mine], y[mine], focal)
                else:
                    ahead = np.stack([x[mine], y[mine], np.ones_like(x[mine])])
                    colour[mine] = sky_colours(self._sky, tracer.rotation.astype(np.float32) @ ahead)
        return colour
