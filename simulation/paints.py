"""The painters for the courtyard and the land beyond it: masonry, plaster, wood, tiles, leaves, hills."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from simulation.painting import (
    HALF,
    Canvas,
    Image,
    Paint,
    Painter,
    bend,
    dab,
    fractal,
    lying,
    mix,
    rgb,
    smooth,
)

LIMESTONE = np.stack(
    [
        rgb(206, 188, 152),
        rgb(190, 170, 134),
        rgb(172, 156, 128),
        rgb(214, 198, 166),
        rgb(180, 150, 112),
        rgb(160, 150, 134),
    ]
)
BRICK = np.stack([rgb(176, 98, 68), rgb(160, 84, 60), rgb(190, 116, 80), rgb(148, 88, 70), rgb(182, 104, 84)])
BASALT = np.stack(
    [
        rgb(142, 134, 124),
        rgb(126, 120, 114),
        rgb(158, 146, 130),
        rgb(112, 108, 106),
        rgb(148, 130, 112),
        rgb(168, 158, 142),
    ]
)
MORTAR, EARTH, HAZE, IRON = rgb(176, 162, 136), rgb(118, 108, 92), rgb(196, 208, 220), rgb(62, 56, 52)
OLIVE = np.stack([rgb(112, 124, 72), rgb(138, 148, 98), rgb(90, 104, 60), rgb(158, 164, 120)])
GREEN = np.stack([rgb(72, 104, 44), rgb(92, 128, 52), rgb(56, 86, 40), rgb(120, 148, 66)])
DARK = np.stack([rgb(72, 94, 54), rgb(88, 110, 62), rgb(60, 80, 50), rgb(106, 126, 74)])
FIELDS = np.stack([rgb(196, 176, 104), rgb(134, 146, 76), rgb(164, 158, 90), rgb(112, 130, 70), rgb(206, 188, 128)])


def courses(
    c: Canvas,
    course: tuple[float, float],
    length: tuple[float, float],
    joint: float,
    waver: float = 0.0,
    bond: bool = False,
) -> NDArray[np.int32]:
    """Labels (h, w) of stones that are laid in courses; 0 in the joints.

    Args:
        c: canvas.
        course: range of the height of a course, metres.
        length: range of the length of a stone, metres.
        joint: width of the joints, metres.
        waver: by how much the joints are bent, metres.
        bond: shift every second course by half a stone, as with bricks.
    """
    labels = np.zeros((c.h, c.w), np.int32)
    top, row, label, scale = -c.rng.uniform(0, course[0]), 0, 0, c.density
    while top * scale < c.h:
        tall = c.rng.uniform(*course)
        left = -length[0] * (0.5 * (row % 2) if bond else c.rng.uniform(0.1, 1))
        while left * scale < c.w:
            long = c.rng.uniform(*length)
            label += 1
            y0, y1, x0, x1 = (
                max(0, round(edge * scale))
                for edge in (top + joint / 2, top + tall - joint / 2, left + joint / 2, left + long - joint / 2)
            )
            labels[y0:y1, x0:x1] = label
            left += long
        top += tall
        row += 1
    return bend(c, labels, waver, 16 * waver) if waver else labels


def stones(
    c: Canvas,
    labels: NDArray[np.int32],
    tones: Image,
    mortar: Image,
    round_off: float,
    thick: float,
    rough: float = 0.004,
    vary: float = 0.12,
) -> Paint:
    """Paint labelled stones in varied tones.

    Args:
        c: canvas.
        labels: (h, w) of the stones; 0 is mortar.
        tones: (n, 3) colours of the stones.
        mortar: (3,) colour.
        round_off: distance from the edges over which a stone is rounded, metres.
        thick: mean height of the stones above the mortar, metres.
        rough: height of the grain, metres.
        vary: standard deviation of the brightness from stone to stone.
    """
    count = int(labels.max()) + 1
    tone = tones[c.rng.integers(0, len(tones), count)] * c.rng.normal(1, vary, (count, 1))
    tone *= c.rng.normal(1, 0.015, (count, 3))
    lift = c.rng.normal(thick, 0.25 * thick, count)
    tone[0], lift[0] = mortar, 0
    edge = cv2.distanceTransform((labels > 0).astype(np.uint8), cv2.DIST_L2, 3) / np.float32(c.density * round_off)
    grain, speckle = c.noise(0.12, 6, 0.7), c.speckle()
    # Stones are darker at their edges, where dirt settles.
    dirt = np.where(labels > 0, 0.72 + 0.28 * np.minimum(edge / np.float32(0.4), 1), np.float32(1))
    shade = (1 + 0.13 * grain + 0.06 * c.noise(0.5, 4) + 0.035 * speckle) * dirt
    swell = 1 - np.square(1 - np.minimum(edge, 1))
    relief = lift.astype(np.float32)[labels] * swell + rough * (0.4 + 0.6 * swell) * grain + 0.15 * rough * speckle
    return Paint(np.take(tone.astype(np.float32), labels, axis=0) * shade[..., None], relief)


def masonry(course: tuple[float, float] = (0.16, 0.32), length: tuple[float, float] = (0.22, 0.62)) -> Painter:
    """A painter of roughly squared stones, with ranges of the height of a course and the length of a stone, metres."""
    return lambda c: stones(c, courses(c, course, length, 0.022, 0.018), LIMESTONE, MORTAR, 0.035, 0.022)


def bricks(c: Canvas) -> Paint:
    labels = courses(c, (0.075, 0.075), (0.25, 0.25), 0.013, 0.004, bond=True)
    return stones(c, labels, BRICK, MORTAR, 0.012, 0.01, 0.002)


def pavers(c: Canvas) -> Paint:
    return stones(c, courses(c, (0.3, 0.3), (0.3, 0.3), 0.012), BRICK, MORTAR, 0.01, 0.004, 0.002)


def cobbles(c: Canvas) -> Paint:
    """Cobblestones: each texel belongs to the nearest of scattered points, and the borders are joints."""
    spacing = 0.135 * c.density
    y, x = np.mgrid[-1 : c.h / spacing + 1, -1 : c.w / spacing + 1]
    x += 0.5 * (np.arange(len(x))[:, None] % 2) + c.rng.uniform(0.23, 0.77, x.shape)
    y += c.rng.uniform(0.28, 0.72, y.shape)
    px, py = (x * spacing).astype(int), (y * spacing).astype(int)
    keep = (px >= 0) & (px < c.w) & (py >= 0) & (py < c.h)
    seeds = np.ones((c.h, c.w), np.uint8)
    seeds[py[keep], px[keep]] = 0
    labels = np.asarray(cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)[1])
    labels = bend(c, labels, 0.012, 0.12)
    inner = np.ones((c.h, c.w), np.uint8)
    inner[:, 1:] &= labels[:, 1:] == labels[:, :-1]
    inner[1:] &= labels[1:] == labels[:-1]
    labels[cv2.distanceTransform(inner, cv2.DIST_L2, 3) < 0.009 * c.density] = 0
    paint = stones(c, labels, BASALT, EARTH, 0.05, 0.022, 0.003, 0.08)
    moss = 0.6 * smooth(0.1, 0.9, c.noise(1.6)) * (labels == 0)
    sand = 0.55 * smooth(-0.3, 1.0, c.noise(2.5, 6)) * (labels > 0)
    return Paint(mix(mix(paint.albedo, rgb(104, 110, 70), moss), rgb(184, 164, 132), sand), paint.relief)


def plaster(tone: Image, bare: float) -> Painter:
    """A painter of lime plaster that has fallen off in places and shows masonry.

    It has fallen off where noise exceeds `bare`: a smaller value shows more masonry.
    """

    def paint(c: Canvas) -> Paint:
        under = masonry()(c)
        height = c.xy()[1]
        level = c.noise(1.7, 7, 0.6) + 0.9 * np.exp(-height / 0.5) - bare  # less plaster near the damp ground
        off = smooth(-0.01, 0.05, level)
        cloud, grain, runs = c.noise(0.9, 6), c.noise(0.06, 4, 0.8), c.noise((1.2, 0.07), 4)
        fresh = tone * (1 + 0.08 * cloud + 0.05 * grain + 0.05 * runs)[..., None]
        fresh = mix(fresh, rgb(150, 132, 108), 0.35 * smooth(0.2, 1.4, runs + cloud - height * 0.3))
        fresh *= (1 - 0.25 * smooth(-0.16, 0.0, level))[..., None]
        thick = 0.03 + 0.0035 * grain + 0.006 * cloud
        return Paint(mix(fresh, under.albedo, off), thick + (under.relief - thick) * off)

    return paint


def planks(tone: Image, wide: float = 0.13, peeling: Image | None = None, nails: bool = True) -> Painter:
    """A painter of upright boards about `wide` metres wide; `peeling` is the colour of old paint on them."""

    def paint(c: Canvas) -> Paint:
        count = max(1, round(c.w / c.density / wide))
        place = np.arange(c.w, dtype=np.float32) / c.w * count
        board = np.minimum(place.astype(int), count - 1)
        x = np.arange(c.w, dtype=np.float32) / c.density + c.rng.uniform(0, 50, count).astype(np.float32)[board]
        # The grain: growth rings cut lengthwise.
        fibre = c.noise((0.45, max(2 / c.density, 0.012)), 4, 0.8)
        rings = np.sin((x + 0.02 * c.noise((0.7, 0.1), 3)) * 330 + 2.0 * fibre)
        light = c.rng.normal(1, 0.08, count).astype(np.float32)[board] * (
            1 + 0.09 * rings + 0.12 * fibre + 0.05 * c.noise((0.6, 0.2))
        )
        albedo = tone * light[..., None]
        if peeling is not None:
            left = smooth(-0.7, -0.25, c.noise((0.5, 0.09), 6, 0.7))
            albedo = mix(albedo, peeling * (0.25 + 0.75 * light)[..., None], left)
        for _ in range(max(1, round(count * c.h / c.density * 0.8))):
            knot = c.rng.uniform(0.008, 0.018) * c.density
            dab(albedo, c.rng.uniform(0, c.w), c.rng.uniform(0, c.h), knot, 1.7 * knot, tone * np.float32(0.42), 0.8)
        if nails:
            head = 0.006 * c.density
            for i, across, y in itertools.product(range(count), (0.25, 0.75), (8 * head, c.h - 8 * head)):
                dab(albedo, (i + across) * c.w / count, y, head, head, IRON * np.float32(0.7), 0.9)
        gap = smooth(1 - 0.04 / wide, 1.0, np.abs(place - board - HALF) * 2)
        return Paint(albedo * (1 - 0.75 * gap)[:, None], 0.0012 * rings + 0.001 * fibre - 0.012 * gap)

    return paint


def crate(c: Canvas) -> Paint:
    """The side of a crate: boards behind a frame with a diagonal brace."""
    boards = planks(rgb(182, 142, 96), 0.12)(c)
    frame = lying(planks(rgb(158, 118, 76), 5.0, nails=False))(c)
    x, y = c.xy()
    wide, high = c.w / c.density, c.h / c.density
    brace = np.abs(x / wide - y / high) * min(wide, high) * 0.72
    rim = np.minimum(np.minimum(x, wide - x), np.minimum(y, high - y))
    solid = (rim < 0.075) | (brace < 0.045)
    edge = np.minimum(np.abs(rim - 0.075), np.where(rim > 0.075, np.abs(brace - 0.045), 1))
    albedo = np.where(solid[..., None], frame.albedo, boards.albedo * np.float32(0.9))
    albedo *= (0.6 + 0.4 * smooth(0, 0.012, edge))[..., None]
    return Paint(albedo, np.where(solid, 0.02 + frame.relief, boards.relief))


def staves(c: Canvas) -> Paint:
    """The side of a barrel, with four iron hoops."""
    wood, rust = planks(rgb(150, 112, 74), 0.1, nails=False)(c), c.noise(0.05, 4)
    place = c.xy()[1] / np.float32(c.h / c.density)
    hoop = np.abs(np.stack([place - middle for middle in (0.05, 0.27, 0.73, 0.95)])).min(axis=0) < 0.025
    iron = mix(IRON * (1 + 0.2 * rust)[..., None], rgb(120, 74, 48), 0.5 * smooth(0.2, 1.2, rust))
    return Paint(np.where(hoop[..., None], iron, wood.albedo), np.where(hoop, 0.006 + 0.002 * rust, wood.relief))


def roof(c: Canvas) -> Paint:
    """Roman roof tiles: half pipes in columns, where each row overlaps the next one below."""
    x, y = c.xy()
    x = (x + 0.02 * c.noise(0.6, 3)) / np.float32(0.21)
    column = np.floor(x)
    y = (y.max() - y) / np.float32(0.36) + np.float32(0.3) * np.sin(column * np.float32(2.4))
    row = np.floor(y)
    pipe, along = np.sin(np.pi * (x - column)), y - row
    tile = ((row + 1) * (column.max() + 2) + column + 1).astype(int)
    tones = np.concatenate([BRICK * np.float32(1.12), rgb(206, 150, 110)[None], rgb(150, 110, 88)[None]])
    count = int(tile.max()) + 1
    tone = (tones[c.rng.integers(0, len(tones), count)] * c.rng.normal(1, 0.1, (count, 1))).astype(np.float32)
    grain = c.noise(0.1, 5, 0.7)
    albedo = mix(
        tone[tile] * (1 + 0.12 * grain)[..., None],
        rgb(150, 146, 116),
        0.6 * smooth(0.5, 1.3, c.noise(0.5, 6) + 0.3 * grain),
    )
    shade = (0.55 + 0.45 * smooth(0.0, 0.35, pipe)) * (0.8 + 0.2 * smooth(0.0, 0.1, along))
    return Paint(albedo * shade[..., None], 0.06 * pipe + 0.025 * along + 0.003 * grain)


def terracotta(c: Canvas) -> Paint:
    """A clay pot made on a potter's wheel, with a band in relief."""
    x, y = c.xy()
    grain, cloud = c.noise(0.04, 4, 0.8), c.noise(0.3)
    turning = np.sin(y * 420 + 2 * cloud)
    albedo = mix(
        rgb(188, 106, 70) * (1 + 0.07 * grain + 0.04 * turning)[..., None],
        rgb(216, 178, 146),
        0.55 * smooth(0.1, 1.2, cloud + 0.4 * grain),
    )
    band = np.exp(-(((y - 0.72 * c.h / c.density) / 0.022) ** 2)) * (0.6 + 0.4 * np.sign(np.sin(x * 70)))
    return Paint(albedo, 0.0008 * turning + 0.001 * grain + 0.008 * band)


def hewn(c: Canvas) -> Paint:
    """A single block of pale hewn stone."""
    x, y = c.xy()
    grain = c.noise(0.08, 5, 0.75)
    rim = np.minimum(np.minimum(x, c.w / c.density - x), np.minimum(y, c.h / c.density - y))
    shade = (1 + 0.10 * grain + 0.09 * c.noise(0.4) + 0.04 * c.speckle()) * (0.8 + 0.2 * smooth(0, 0.025, rim))
    return Paint(rgb(206, 192, 162) * shade[..., None], 0.01 * smooth(0, 0.02, rim) + 0.003 * grain)


def window(c: Canvas) -> Paint:
    """A window: panes that mirror the sky, in a pale frame."""
    x, y = c.xy()
    wide, high = c.w / c.density, c.h / c.density
    mirrored = smooth(-0.5, 1.6, c.noise(0.6, 4) - 0.8 + 2.0 * y / high)
    glass = mix(rgb(36, 44, 52), rgb(128, 150, 168), 0.8 * mirrored)
    pane = wide / 2, high / max(2, round(high / 0.34))
    bar = np.minimum(*(np.abs((at / size + HALF) % 1 - HALF) * size for at, size in zip((x, y), pane))) < 0.024
    wood = rgb(196, 190, 172) * (1 + 0.1 * c.noise(0.1, 5, 0.7))[..., None]
    return Paint(np.where(bar[..., None], wood, glass), (0.012 * bar).astype(np.float32))


def shutter(c: Canvas) -> Paint:
    """A window shutter: slats in a frame, with peeling paint."""
    wood = planks(rgb(140, 118, 90), 0.5, rgb(76, 120, 108), nails=False)(c)
    x, y = c.xy()
    wide, high = c.w / c.density, c.h / c.density
    inner = (np.minimum(x, wide - x) > 0.06) & (np.minimum(y, high - y) > 0.07) & (np.abs(y - high / 2) > 0.035)
    slat = 1 - (y / np.float32(0.052)) % 1
    shade = np.where(inner, 0.5 + 0.55 * slat, np.float32(1))
    return Paint(wood.albedo * shade[..., None], np.where(inner, 0.02 * slat - 0.02, wood.relief))


def grass(c: Canvas) -> Paint:
    """Dry earth and grass."""
    grain = c.noise(0.15, 5, 0.75)
    albedo = mix(rgb(178, 158, 104), rgb(112, 122, 62), smooth(-0.7, 0.8, c.noise(3, 6)))
    return Paint(albedo * (1 + 0.2 * grain)[..., None], 0.02 * grain)


def leaves(
    greens: Image,
    size: float,
    thickness: Callable[[Canvas, Image], Image],
    blossom: Image | None = None,
    flowers: float = 0.0,
) -> Painter:
    """A painter of foliage with holes: leaves of `size` metres where thickness(canvas, noise) is above about 0.2.

    A fraction of about `flowers` of the leaves has the colour `blossom`.
    """

    def paint(c: Canvas) -> Paint:
        lumps = c.noise(0.6)
        thick = thickness(c, lumps)
        albedo = np.zeros((c.h, c.w, 3), np.float32) + greens[0] * np.float32(0.32)
        alpha = (thick > 0.22).astype(np.uint8) * 255
        count = int(2.6 * c.h * c.w / (c.density * size) ** 2)
        px, py, order = c.rng.uniform(0, c.w, count), c.rng.uniform(0, c.h, count), np.linspace(0, 1, count)
        grows = thick[py.astype(int), px.astype(int)] > c.rng.uniform(-0.05, 0.2, count)
        colour = greens[c.rng.integers(0, len(greens), count)] * (0.45 + 0.6 * order)[:, None]  # later ones on top
        if blossom is not None:
            colour[c.rng.random(count) < flowers * (0.3 + 1.4 * order)] = blossom
        colour *= c.rng.uniform(0.75, 1.2, (count, 1))
        turn, long = c.rng.uniform(0, 2 * np.pi, count), size * c.density * c.rng.uniform(0.35, 0.65, count)
        dx, dy = np.cos(turn) * long, np.sin(turn) * long
        outline = np.stack(
            [px - dx, py - dy, px - 0.45 * dy, py + 0.45 * dx, px + dx, py + dy, px + 0.45 * dy, py - 0.45 * dx], axis=1
        )
        corners = np.round(outline * 16).astype(np.int32).reshape(-1, 4, 2)  # in sixteenths of a texel
        for i in np.flatnonzero(grows):
            cv2.fillConvexPoly(albedo, corners[i], colour[i].tolist(), cv2.LINE_8, 4)
            cv2.fillConvexPoly(alpha, corners[i], [255.0], cv2.LINE_8, 4)
        return Paint(albedo, 0.05 * lumps, alpha)

    return paint


def bushy(cover: float) -> Callable[[Canvas, Image], Image]:
    return lambda c, lumps: cover + 0.6 * lumps


def creeper(c: Canvas, lumps: Image) -> Image:
    """The thickness of a climbing plant, for :func:`leaves`: less towards the bottom and the sides."""
    x, y = c.xy()
    return 0.9 - 1.3 * np.abs(x * c.density / c.w * 2 - 1) ** 3 - 1.25 * (1 - y * c.density / c.h) ** 1.5 + 0.55 * lumps


def cypress(c: Canvas) -> Paint:
    """A cypress: the outline of a flame, shaded as if it were round."""
    x, y = c.xy()
    across, down = np.abs(x * c.density / c.w * 2 - 1), 1 - y * c.density / c.h
    half = 0.92 * np.sqrt(down * (1.12 - down**3))
    paint = leaves(DARK, 0.1, lambda _, lumps: 3.2 * (half - across) + 0.22 * lumps)(c)
    swell = np.sqrt(np.clip(1 - (across / np.maximum(half, 0.05)) ** 2, 0, 1))
    return paint._replace(relief=paint.relief + 0.45 * swell)


def ridge(base: float, rise: float, haze: float) -> Painter:
    """A painter of a range of hills with woods and fields, in front of which lies `haze` (0 to 1).

    Their outline varies by about `rise` around `base`, both as fractions of the canvas's height.
    """

    def paint(c: Canvas) -> Paint:
        wide, high = c.w / c.density, c.h / c.density
        y = c.xy()[1] / np.float32(high)
        line = base + rise * fractal(c.rng, 2, c.w, 9, c.w / 4.2, 7, 0.45)[0]
        fuzz = 0.006 * fractal(c.rng, 2, c.w, 9, 12, 3, 0.8)[0]
        fields = courses(c, (high / 22, high / 12), (wide / 44, wide / 20), 2 / c.density)
        fields = bend(c, fields, high / 20, high / 5)
        tone = FIELDS[c.rng.integers(0, len(FIELDS), int(fields.max()) + 1)]
        rows = 1 + 0.10 * np.sin(np.arange(c.w, dtype=np.float32) * 0.9 + fields.astype(np.float32) * 1.7)
        woods = smooth(-0.1, 0.15, c.noise((high / 7, wide / 16), 7, 0.75) + 1.2 * (y - 0.45))
        trees = rgb(64, 84, 52) * (1 + 0.35 * c.noise(7 / c.density, 3))[..., None]
        albedo = mix(tone[fields] * rows[..., None], trees, np.maximum(woods, 0.8 * (fields == 0)))
        albedo = mix(albedo, HAZE, np.minimum(haze + 0.12 * (1 - y / base), 0.95))
        return Paint(albedo, np.zeros_like(y), ((y < line + fuzz) * 255).astype(np.uint8))

    return paint
