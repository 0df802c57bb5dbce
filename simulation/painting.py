"""Tools of the painters: a canvas with noise, colours, and functions that shape and combine paints.

A painter is a function from a canvas to a paint. Equal canvas sizes and random states give equal paints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[Any]  # float32 unless stated otherwise
HALF = np.float32(0.5)


class Paint(NamedTuple):
    """The material of a surface, without light. Row 0 is at the top."""

    albedo: Image  # (h, w, 3), display-encoded RGB in [0, 1]
    relief: Image  # (h, w), metres above the surface; it affects the shading, but not the geometry
    alpha: NDArray[np.uint8] | None = None  # (h, w), values below 128 are holes; None if there are none


class Canvas:
    """The area for a painter: h x w texels, with `density` texels per metre, and a random state."""

    def __init__(self, rng: np.random.Generator, h: int, w: int, density: float) -> None:
        self.rng, self.h, self.w, self.density = rng, h, w, density

    def xy(self) -> tuple[Image, Image]:
        """The distance of each texel from the left and from the bottom, metres, (h, w) each."""
        row, column = np.mgrid[0 : self.h, 0 : self.w].astype(np.float32)
        return (column + HALF) / np.float32(self.density), (self.h - HALF - row) / np.float32(self.density)

    def noise(self, cell: float | tuple[float, float], octaves: int = 5, gain: float = 0.55) -> Image:
        """Fractal noise (h, w), about -1 to 1. Its largest features have `cell` metres, or that height and width."""
        tall, wide = (size * self.density for size in (cell if isinstance(cell, tuple) else (cell, cell)))
        return fractal(self.rng, self.h, self.w, tall, wide, octaves, gain)

    def speckle(self) -> Image:
        """White noise (h, w), standard deviation 1."""
        return self.rng.standard_normal((self.h, self.w), dtype=np.float32)

    def turned(self) -> Canvas:
        """The canvas with height and width swapped."""
        return Canvas(self.rng, self.w, self.h, self.density)


Painter = Callable[[Canvas], Paint]


def fractal(rng: np.random.Generator, h: int, w: int, tall: float, wide: float, octaves: int, gain: float) -> Image:
    """Noise (h, w) with features of `tall` x `wide` texels.

    Each further octave has half the size of the one before, and `gain` times its strength.
    """
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


def rgb(*values: float) -> Image:
    """A colour with values from 0 to 255, converted to float32 in [0, 1]."""
    return np.array(values, np.float32) / 255


def smooth(low: float, high: float, x: Any) -> Any:
    """A smooth step (3 t^2 - 2 t^3) from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Any, b: Any, share: Any) -> Any:
    """Interpolate from a to b. A share (h, w) applies to all three colour channels."""
    return a + (b - a) * (share[..., None] if isinstance(share, np.ndarray) and share.ndim == 2 else share)


def bend(c: Canvas, labels: Image, by: float, cell: float) -> NDArray[np.int32]:
    """The label image with its lines distorted by about `by` metres, in waves of `cell` metres."""
    x, y = np.meshgrid(np.arange(c.w, dtype=np.float32), np.arange(c.h, dtype=np.float32))
    x += c.noise(cell, 3) * np.float32(by * c.density)
    y += c.noise(cell, 3) * np.float32(by * c.density)
    bent = cv2.remap(labels.astype(np.float32), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    return bent.astype(np.int32)


def dab(image: Image, x: float, y: float, rx: float, ry: float, colour: Image, strength: float) -> None:
    """Paint a soft elliptical spot into an image. Centre and radii are in texels."""
    h, w = image.shape[:2]
    x0, x1 = max(0, int(x - 2 * rx)), min(w, int(x + 2 * rx) + 2)
    y0, y1 = max(0, int(y - 2 * ry)), min(h, int(y + 2 * ry) + 2)
    if x0 < x1 and y0 < y1:
        dy, dx = np.ogrid[y0 - y : y1 - y, x0 - x : x1 - x]
        share = strength * np.exp(-((dx / rx) ** 2 + (dy / ry) ** 2))[: y1 - y0, : x1 - x0]
        image[y0:y1, x0:x1] = mix(image[y0:y1, x0:x1], colour, share.astype(np.float32))


def lying(painter: Painter) -> Painter:
    """The painter with its paint turned by a right angle (transposed)."""

    def paint(c: Canvas) -> Paint:
        albedo, relief, _ = painter(c.turned())
        return Paint(np.ascontiguousarray(albedo.transpose(1, 0, 2)), np.ascontiguousarray(relief.T))

    return paint


def cut(painter: Painter, keep: Callable[[Image, Image], Any]) -> Painter:
    """The painter with holes where keep(x, y) is false; x and y are metres from the left and from the bottom."""
    return lambda c: painter(c)._replace(alpha=np.where(keep(*c.xy()), 255, 0).astype(np.uint8))


def disc(painter: Painter, inner: float, outer: float) -> Painter:
    """The painter cut to a ring between two radii, metres, on a square canvas 2 `outer` wide; a disc if inner = 0."""
    middle, half = (outer + inner) / 2, (outer - inner) / 2
    return cut(painter, lambda x, y: np.abs(np.hypot(x - outer, y - outer) - middle) <= half)
