"""The surfaces of the courtyard, and of the land beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from simulation.painting import Canvas, Image, Paint, Painter, cut, disc, lying, rgb
from simulation.paints import (
    GREEN,
    LIMESTONE,
    MORTAR,
    OLIVE,
    bricks,
    bushy,
    cobbles,
    crate,
    creeper,
    cypress,
    grass,
    hewn,
    leaves,
    masonry,
    pavers,
    planks,
    plaster,
    ridge,
    roof,
    shutter,
    staves,
    stones,
    terracotta,
    window,
)
from simulation.poses import Vector
from simulation.surfaces import Flat, Round, Surface

EAST, NORTH, UP = np.eye(3)
EAVES = cut(roof, lambda x, y: y > 0.10 - 0.11 * np.sqrt(np.clip(1 - (((x / 0.21) % 1 - 0.5) * 2) ** 2, 0, 1)))
ARCHES, SPRING, SPAN = (2.0, 5.0, 8.0), 1.75, 1.1  # metres: centres, height of their feet, half their width


def furnish() -> list[Surface]:
    """All surfaces of the scene. Their order matters, because the index of a surface seeds its random state."""
    ground = Flat((4.0, 0.0, 0.0), UP, EAST, 12.0, 14.0, cobbles, 112)
    return [ground, *_house(), *_gallery(), *_parapet(), *_things(), *_land()]


def _house() -> Iterator[Surface]:
    """The house at the far end, with its front at x = 11."""
    yield _wall((11, 7.4), (11, -3.4), (0, 5.4), -EAST, plaster(rgb(226, 190, 134), 0.62), 112)
    yield _wall((11, -3.4), (16, -3.4), (0, 5.4), -NORTH, plaster(rgb(226, 190, 134), 0.55), 64)
    slope = np.array([math.cos(0.5), 0, math.sin(0.5)])
    yield Flat((12.6, 2.0, 6.35), np.cross(slope, NORTH), slope, 11.5, 4.6, roof, 96)
    yield Flat((10.8, 2.0, 5.28), -UP, EAST, 11.5, 0.6, planks(rgb(120, 92, 64), 0.16), 96)
    yield Flat((10.55, 2.0, 5.30), -EAST, UP, 11.5, 0.22, EAVES)
    # The door in its stone frame.
    yield Flat((10.92, 1.0, 1.15), -EAST, UP, 1.24, 2.3, planks(rgb(132, 104, 74), 0.16, rgb(60, 96, 118)), 200)
    for y in (0.27, 1.73):
        yield from _box((10.9, y, 0.0), (0.22, 0.22, 2.32), hewn, hidden="back above below")
    yield from _box((10.9, 1.0, 2.32), (0.24, 1.9, 0.26), hewn, hidden="back above")
    yield from _box((10.7, 1.0, 0.0), (0.6, 1.7, 0.14), hewn, hidden="back below")
    for y, z, wide, high in (
        (3.7, 1.15, 0.95, 1.3),
        (-1.6, 1.15, 0.95, 1.3),
        (3.7, 3.45, 0.9, 1.15),
        (1.0, 3.45, 0.9, 1.15),
        (-1.6, 3.45, 0.9, 1.15),
    ):
        yield Flat((10.975, y, z + high / 2), -EAST, UP, wide, high, window, 160)
        unseen = "back above" if z > 2 else "back below"
        yield from _box((10.93, y, z - 0.1), (0.24, wide + 0.3, 0.1), hewn, hidden=unseen)
        yield from _box((10.95, y, z + high), (0.14, wide + 0.24, 0.16), hewn, hidden="back above")
        for side in (-1, 1):
            yield from _box(
                (10.95, y + side * (wide / 2 + 0.25), z),
                (0.07, 0.48, high),
                shutter,
                density=180,
                hidden="back above below",
            )
    # Bougainvillea in three layers.
    for gap, leaf in ((0.10, 0.075), (0.19, 0.07), (0.27, 0.065)):
        yield Flat(
            (11 - gap, -0.35, 3.55),
            -EAST,
            UP,
            2.6 - gap,
            3.1 - gap,
            leaves(GREEN, leaf, creeper, rgb(206, 48, 116), 0.55),
        )


def _gallery() -> Iterator[Surface]:
    """The gallery on the left: an arcade half a metre thick, and the room behind it."""
    left, face, back = 0.5, 4.6, 5.1
    yield _wall((left, face), (11, face), (0, 4.3), -NORTH, _arcade, 112)
    behind = cut(masonry(), lambda x, y: ~_under_arches(10.5 - x, y))
    yield _wall((left, back), (11, back), (0, 4.3), NORTH, behind, 64)
    yield _wall((left, face), (left, back), (0, 4.3), -EAST, masonry())
    for x in (left + middle for middle in ARCHES):
        for side in (-1, 1):
            yield _wall(
                (x + side * SPAN, face),
                (x + side * SPAN, back),
                (0, SPRING),
                -side * EAST,
                masonry((0.35, 0.35), (0.5, 0.6)),
            )
        yield Round(
            (x, face, SPRING),
            (SPAN * SPAN, 0.0, 0.0),
            back - face,
            masonry((0.5, 0.5), (0.2, 0.22)),
            up=NORTH,
            seam=-EAST,
            arc=math.pi,
            hollow=True,
        )
    yield _wall((-3, 7.4), (11, 7.4), (0, 3.6), -NORTH, plaster(rgb(214, 168, 118), 0.7), 72)
    yield _wall((-3, face), (left, face), (0, 4.3), -NORTH, masonry(), 96)
    yield Flat((5.75, 6.25, 0.01), UP, EAST, 2.3, 10.5, pavers, 112)
    yield Flat((5.75, 6.25, 3.5), -UP, EAST, 2.3, 10.5, planks(rgb(116, 90, 64), 0.2), 48)
    slope = np.array([0, math.cos(0.42), math.sin(0.42)])
    yield Flat((4.0, 5.85, 4.87), np.cross(EAST, slope), slope, 14.2, 3.3, roof, 80)
    yield Flat((4.0, 4.45, 4.20), -UP, EAST, 0.5, 14.2, planks(rgb(120, 92, 64), 0.16), 64)
    yield Flat((4.0, 4.3, 4.22), -NORTH, UP, 14.2, 0.22, EAVES)


def _under_arches(x: Image, y: Image) -> Any:
    """Mask (h, w) bool of the points inside an arch, which are open; x and y in metres from the left and the bottom."""
    return np.any(
        [
            np.where(y <= SPRING, np.abs(x - middle) <= SPAN, np.hypot(x - middle, y - SPRING) <= SPAN)
            for middle in ARCHES
        ],
        axis=0,
    )


def _arcade(c: Canvas) -> Paint:
    """Paint masonry with arches of hewn stone."""
    wall = masonry((0.2, 0.34), (0.25, 0.7))(c)
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
    ashlar = stones(c, labels, LIMESTONE * np.float32(1.06), MORTAR, 0.025, 0.03, 0.002)
    return Paint(
        np.where(trim[..., None], ashlar.albedo, wall.albedo),
        np.where(trim, ashlar.relief + 0.01, wall.relief),
        np.where(_under_arches(x, y), 0, 255).astype(np.uint8),
    )


def _parapet() -> Iterator[Surface]:
    """The parapet on the right with its pillars, and the wall behind the viewer."""
    yield _wall((-3, -4.4), (11, -4.4), (0, 0.86), NORTH, masonry())
    yield _wall((-3, -4.32), (11, -4.32), (0.86, 0.94), NORTH, masonry((0.2, 0.2), (0.7, 1.1)))
    yield Flat((4.0, -4.6, 0.94), UP, EAST, 0.56, 14.0, masonry((0.7, 1.1), (0.6, 0.6)), 112)
    yield _wall((-3, -4.88), (11, -4.88), (-1, 0.94), -NORTH, masonry(), 24)
    yield _wall((11, -4.4), (11, -3.4), (0, 0.94), -EAST, masonry())
    yield _wall((-3, -4.6), (-3, 7.4), (0, 4.3), EAST, masonry(), 64)
    for x in (-0.6, 4.4, 9.4):
        yield from _box((x, -4.6, 0), (0.52, 0.6, 1.55), bricks, density=140)
        yield from _box((x, -4.6, 1.55), (0.64, 0.72, 0.1), hewn, density=140)
        yield from _potted((x, -4.6, 1.65), 0.17, 0.30, 0.30)


def _things() -> Iterator[Surface]:
    """The objects in the courtyard: a well, crates, barrels, pots and a bench."""
    well, timber = np.array([6.7, -1.5, 0.0]), planks(rgb(132, 102, 70), 0.12, nails=False)
    yield Round.cone(well, 0.78, 0.72, 0.78, masonry((0.18, 0.22), (0.25, 0.45)), density=160)
    yield Round.cone(well, 0.5, 0.5, 0.85, masonry(), density=80, hollow=True)
    yield Round.cone(well + UP * 0.78, 0.80, 0.80, 0.1, masonry((0.1, 0.1), (0.5, 0.7)), density=160)
    yield Flat(well + UP * 0.88, UP, EAST, 1.6, 1.6, disc(masonry((0.4, 0.8), (0.4, 0.8)), 0.5, 0.8))
    for side in (-1, 1):
        yield from _box(well + (0, side * 0.64, 0.88), (0.11, 0.11, 1.15), timber, density=200)
    yield Round.cone(well + (0, -0.9, 1.82), 0.055, 0.055, 1.8, timber, up=NORTH, seam=EAST, density=200)
    rope = planks(rgb(188, 160, 112), 0.02)
    yield Round.cone(well + (0, -0.12, 1.82), 0.085, 0.085, 0.3, rope, up=NORTH, seam=EAST, density=200)
    yield Round.barrel(well + (-0.02, 0.35, 0.88), 0.12, 0.135, 0.26, staves, density=240)
    yield from _box((5.1, 2.55, 0), (0.85, 0.85, 0.80), crate, 0.35, 200)
    yield from _box((5.2, 2.50, 0.80), (0.62, 0.62, 0.58), crate, 0.85, 200)
    yield from _box((4.75, 1.45, 0), (0.55, 0.75, 0.42), lying(planks(rgb(186, 146, 98), 0.15)), -0.3, 200)
    for x, y, r, high in ((6.35, 3.6, 0.32, 0.95), (7.15, 3.75, 0.33, 0.98)):
        yield Round.barrel((x, y, 0), r, r * 1.24, high, staves, density=180)
        yield Flat((x, y, high - 0.02), UP, EAST, 2 * r, 2 * r, disc(planks(rgb(140, 106, 72), 0.11), 0, r), 180)
    for x, y, r, high, bush in (
        (10.35, 2.35, 0.27, 0.5, 0.40),
        (10.35, -0.25, 0.27, 0.5, 0.40),
        (2.9, -2.75, 0.3, 0.52, 0.44),
        (3.75, -3.35, 0.2, 0.36, 0.30),
        (8.9, -3.6, 0.27, 0.5, 0.42),
        (8.8, 3.9, 0.26, 0.46, 0.40),
    ):
        yield from _potted((x, y, 0), r, high, bush)
    for x in (5.8, 7.0):
        yield from _box((x, -3.98, 0), (0.14, 0.4, 0.42), hewn)
    yield from _box((6.4, -3.98, 0.42), (1.7, 0.46, 0.07), lying(planks(rgb(158, 128, 92), 0.15)), density=180)


def _land() -> Iterator[Surface]:
    """The land beyond the parapet: an old olive tree, cypresses, bushes and hills."""
    yield Round.cone((2.3, -5.9, -1.0), 0.26, 0.17, 4.2, planks(rgb(128, 116, 98), 0.08, nails=False), density=96)
    for x, y, z, r in (
        (2.2, -5.8, 4.1, 1.25),
        (3.3, -5.3, 3.8, 0.95),
        (1.2, -6.2, 3.7, 1.0),
        (2.6, -6.6, 4.5, 1.0),
        (2.9, -5.0, 4.5, 0.8),
    ):
        yield Round.ball((x, y, z), r, leaves(OLIVE, 0.11, bushy(0.05)), 0.72, density=72)
        yield Round.ball((x, y, z), r * 0.75, leaves(OLIVE, 0.11, bushy(0.0)), 0.72, density=72)
    for x, y, high in (
        (8.2, -6.6, 6.6),
        (10.4, -7.4, 7.6),
        (12.9, -6.3, 6.0),
        (16.5, -9.0, 8.4),
        (20.0, -8.0, 8.0),
        (24, -13, 9),
    ):
        yield Flat((x, y, high / 2 - 1.0), (-x, -y, 0), UP, high * 0.24, high, cypress, 64)
    for x, y, r in ((6.0, -6.8, 1.0), (14.2, -7.6, 1.5), (18.0, -6.2, 1.6), (12.0, -9.5, 1.4)):
        yield Round.ball((x, y, -0.7), r, leaves(GREEN, 0.16, bushy(0.25)), 0.9, density=48)
    yield Flat((14.0, -15.0, -0.9), UP, EAST, 20.0, 40.0, grass, 16)
    away = np.array([0.83, -0.56, 0.0])
    for distance, base, high, rise, haze in (
        (90.0, 0.66, 18.0, 0.10, 0.12),
        (260.0, 0.62, 54.0, 0.14, 0.40),
        (700.0, 0.60, 190.0, 0.16, 0.66),
    ):
        foot = away * distance + UP * (1.4 + high * (0.5 - base) + 0.012 * distance)
        yield Flat(foot, -away, UP, 2.9 * distance, high, ridge(base, rise, haze), 560 / distance, far=True)


def _wall(
    start: tuple[float, float],
    end: tuple[float, float],
    z: tuple[float, float],
    normal: Vector,
    painter: Painter,
    density: float = 128.0,
) -> Surface:
    """An upright rectangle between two points (x, y) of the floor plan, from one height to another."""
    centre = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, (z[0] + z[1]) / 2)
    return Flat(centre, normal, UP, math.dist(start, end), z[1] - z[0], painter, density)


def _box(
    bottom: ArrayLike,
    size: tuple[float, float, float],
    painter: Painter,
    yaw: float = 0.0,
    density: float = 160.0,
    hidden: str = "below",
) -> Iterator[Surface]:
    """The faces of a box, without the `hidden` ones, which no camera sees.

    `bottom` is the centre of its lower face; `size` is its depth (along x, before it is turned by `yaw`), width and
    height, metres.
    """
    forward, left = np.array([math.cos(yaw), math.sin(yaw), 0]), np.array([-math.sin(yaw), math.cos(yaw), 0])
    depth, width, height = size
    middle = np.asarray(bottom, float) + UP * height / 2
    for name, normal, half, up, wide, high in (
        ("front", -forward, depth, UP, width, height),
        ("back", forward, depth, UP, width, height),
        ("left", left, width, UP, depth, height),
        ("right", -left, width, UP, depth, height),
        ("above", UP, height, forward, width, depth),
        ("below", -UP, height, forward, width, depth),
    ):
        if name not in hidden.split():
            yield Flat(middle + normal * half / 2, normal, up, wide, high, painter, density)


def _potted(base: ArrayLike, radius: float, high: float, bush: float) -> list[Surface]:
    """A potted shrub with orange flowers: a shell of leaves with holes around a denser one."""
    foot, rim = np.asarray(base, float), 0.16 * high
    crown = foot + UP * (high + bush * 0.72)
    return [
        Round.cone(foot, radius * 0.66, radius * 0.92, high - rim, terracotta, density=220),
        Round.cone(foot + UP * (high - rim), radius, radius * 1.02, rim, terracotta, density=220),
        Flat(foot + UP * (high - 0.03), UP, EAST, 2 * radius, 2 * radius, disc(grass, 0, radius), 64),
        Round.ball(crown, bush, leaves(GREEN, 0.075, bushy(0.3), rgb(236, 120, 60), 0.10), density=128),
        Round.ball(crown, bush * 0.82, leaves(GREEN, 0.075, bushy(0.6)), density=96),
    ]
