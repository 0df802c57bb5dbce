"""Render views of furnished rooms: albedo, normals and depth, without lighting and noise.

A room is a folder with a Mitsuba ``scene.xml``, in metres or another unit, y upwards. Every material is diffuse in its
own colour, and panes of glass are omitted. Views come in clusters: one from a random position in the room, and others
from positions around it that look at the same point. The overlap of every pair of a cluster is computed from depth.

    python training/render.py --sources FOLDER --out FOLDER --clusters 300

It needs Mitsuba 3 (PyPI ``mitsuba``) and an LLVM library. A second call continues where the first one ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import cv2

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its products are only 3 x 3 here: threads would only wait

import drjit as dr
import mitsuba as mi
import numpy as np
import shards

mi.set_variant("llvm_ad_rgb")

Array = np.ndarray

WIDTH, HEIGHT = 640, 480
SAMPLES = 3  # rays in each direction through a pixel, for the albedo
PREVIEW = 8  # a preview has this many times fewer columns and rows
NEAREST = 0.3  # metres: smallest distance of a camera from anything
LIGHT = 0.995  # lowest albedo of a lamp's surface
VIEWS = 6  # number of views of a cluster
PAPERS = 16  # number of pictures for the wallpaper of a room
GLASS = {"dielectric", "thindielectric", "roughdielectric"}
METAL = {"conductor", "roughconductor"}


@dataclass(frozen=True)
class Room:
    """A room to render.

    Attributes:
        folder: its folder below the folder of sources.
        scale: metres per unit of the file.
        held_out: whether it is only for evaluation.
    """

    name: str
    folder: str
    scale: float = 1.0
    held_out: bool = False


ROOMS = (
    Room("kitchen", "mitsuba2-transient-scenes/kitchen"),
    Room("living-room", "mitsuba2-transient-scenes/living-room"),
    Room("staircase", "mitsuba2-transient-scenes/staircase"),
    Room("staircase2", "mitsuba2-transient-scenes/staircase2"),
    Room("classroom", "dppm-scenes/scenes/classroom"),
    Room("dining-room", "mitsuba2-transient-scenes/dining-room", scale=0.3),
    Room("bathroom2", "mitsuba2-transient-scenes/bathroom2", scale=0.08),
    Room("bathroom", "mitsuba2-transient-scenes/bathroom", held_out=True),
    Room("living-room-2", "dppm-scenes/scenes/living-room-2", held_out=True),
)


# --- reading a room ---------------------------------------------------------------------------------------------------


class Scene:
    """A room for ray casting.

    Args:
        folder: a folder with ``scene.xml``, meshes and textures.
        scale: metres per unit of the file.
    """

    def __init__(self, folder: Path, scale: float = 1.0) -> None:
        root = ElementTree.parse(folder / "scene.xml").getroot()
        self._folder = folder
        self._masked = False
        self.missing: list[str] = []
        materials = {element.get("id"): element for element in root.findall("bsdf")}
        self._plain: list[mi.BSDF] = []  # materials of one colour, which can get wallpaper
        self._paper: Paper | None = None
        self.lights: list[Light] = []
        content: dict[str, object] = {"type": "scene"}
        known: dict[str, object] = {}
        for number, shape in enumerate(root.findall("shape")):
            made = self._shape(shape, materials, known, scale)
            if made is not None:
                content[f"shape{number:05d}"] = made
        self.scene = mi.load_dict(content)
        placed = root.find("sensor/transform")
        if placed is None:
            raise ValueError(f"{folder / 'scene.xml'} has no camera, so a position inside the room is unknown")
        self.inside = scale * np.array(_transform(placed).matrix, float)[:3, 3]  # position of the author's camera

    def _shape(
        self,
        shape: ElementTree.Element,
        materials: dict[str | None, ElementTree.Element],
        known: dict[str, object],
        scale: float,
    ) -> dict[str, object] | None:
        """Mitsuba's dictionary of a shape; None for glass, and if the mesh is missing."""
        made: dict[str, object] = {"type": shape.get("type")}
        file = shape.find("string[@name='filename']")
        if file is not None:
            path = self._folder / str(file.get("value"))
            if not path.exists():
                self.missing.append(path.name)
                return None
            made["filename"] = str(path)
        transform = mi.ScalarTransform4f().scale(scale)
        placed = shape.find("transform")
        if placed is not None:
            transform = transform @ _transform(placed)
        made["to_world"] = transform
        flat = shape.find("boolean[@name='faceNormals']")
        if flat is None:
            flat = shape.find("boolean[@name='face_normals']")
        if flat is not None and made["type"] not in ("rectangle", "cube", "sphere", "disk", "cylinder"):
            made["face_normals"] = flat.get("value") == "true"
        for name in ("radius",):
            number = shape.find(f"float[@name='{name}']")
            if number is not None:
                made[name] = float(str(number.get("value")))
        centre = shape.find("point[@name='center']")
        if centre is not None:
            made["center"] = [float(str(centre.get(axis))) for axis in "xyz"]
        if shape.find("emitter") is not None:
            made["bsdf"] = _matt({"type": "rgb", "value": [1.0, 1.0, 1.0]})
            return made
        reference, own = shape.find("ref"), shape.find("bsdf")
        key = reference.get("id") if reference is not None else None
        material = own if own is not None else materials.get(key)
        if material is None:
            made["bsdf"] = _matt({"type": "rgb", "value": [0.5, 0.5, 0.5]})
            return made
        if key is not None and key in known:
            matt = known[key]
        else:
            matt = self._material(material)
            if matt is not None:
                one_colour = matt["bsdf"]["reflectance"]["type"] == "rgb"  # type: ignore[index]
                matt = mi.load_dict(matt)
                if one_colour:
                    self._plain.append(matt)
            if key is not None:
                known[key] = matt
        if matt is None:
            return None
        made["bsdf"] = matt
        return made

    def _material(self, material: ElementTree.Element) -> dict[str, object] | None:
        """The diffuse material of the same colour; None for glass."""
        every = [material, *material.iter("bsdf")]
        kinds = {element.get("type") for element in every}
        if kinds & GLASS:
            black = [element for element in material.iter("rgb") if _plain(element) == "speculartransmittance"]
            if not any(max(_numbers(element)) == 0 for element in black):
                return None
            return _matt({"type": "rgb", "value": [0.03, 0.03, 0.03]})
        wanted = ["specularreflectance"] if kinds & METAL else ["reflectance", "diffusereflectance"]
        colour: dict[str, object] = {"type": "rgb", "value": [0.5, 0.5, 0.5]}
        for element in material.iter():
            if element.tag in ("rgb", "texture", "srgb", "spectrum") and _plain(element) in wanted:
                colour = self._colour(element)
                break
        mask = next((element for element in every if element.get("type") == "mask"), None)
        opacity = None if mask is None else next((part for part in mask if _plain(part) == "opacity"), None)
        if opacity is not None and opacity.tag == "texture":
            return _matt(self._cut_out(colour, self._colour(opacity)))
        return _matt(colour)

    def _cut_out(self, colour: dict[str, object], opacity: dict[str, object]) -> dict[str, object]:
        """A texture of a colour that is -1 where it is transparent (Mitsuba's mask needs a newer LLVM)."""
        if opacity["type"] != "bitmap":
            return colour
        image = cv2.imread(str(opacity["filename"]), cv2.IMREAD_UNCHANGED)
        alpha = image if image.ndim == 2 else image[..., 3 if image.shape[2] == 4 else 0]
        values = np.empty((*alpha.shape, 3), np.float32)
        values[:] = colour.get("value", 0)
        if colour["type"] == "bitmap":
            picture = cv2.cvtColor(cv2.imread(str(colour["filename"]), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            values[:] = cv2.resize(shards.linear(picture), alpha.shape[::-1], interpolation=cv2.INTER_AREA)
        values[alpha < 128] = -1
        self._masked = True
        return {"type": "bitmap", "data": mi.TensorXf(values), "raw": True, "filter_type": "nearest"}

    def _colour(self, element: ElementTree.Element) -> dict[str, object]:
        if element.tag != "texture":
            numbers = _numbers(element)
            return {"type": "rgb", "value": [min(0.95, n) for n in (numbers * 3)[:3]]}
        file = next((part for part in element.iter("string") if part.get("name") == "filename"), None)
        path = self._folder / str(file.get("value")) if file is not None else None
        if path is None or not path.exists():
            self.missing.append(path.name if path else "texture")
            return {"type": "rgb", "value": [0.35, 0.3, 0.25]}
        made: dict[str, object] = {"type": "bitmap", "filename": str(path), "raw": False}
        scales = {part.get("name"): float(str(part.get("value"))) for part in element.iter("float")}
        both = scales.get("uvscale", 1.0)
        across, down = scales.get("uscale", both), scales.get("vscale", both)
        if (across, down) != (1.0, 1.0):
            made["to_uv"] = mi.ScalarTransform4f().scale([across, down, 1.0])
        placed = element.find("transform")
        if placed is not None:
            made["to_uv"] = _transform(placed)
        return made

    # --- rays

    def hits(self, origins: Array, directions: Array) -> tuple[Array, Array, Array]:
        """Cast rays.

        Args:
            origins: (N, 3) or (3,), metres.
            directions: (N, 3), of any length.

        Returns:
            (N,) distances to the hits in units of ``directions``, 0 without a hit; (N, 3) unit shading normals on the
            ray's side; (N, 3) albedo, proportional to light, 0 without a hit.
        """
        count = len(directions)
        o = mi.Point3f(np.ascontiguousarray(np.broadcast_to(origins, (count, 3)).T, np.float32))
        d = mi.Vector3f(np.ascontiguousarray(directions.T, np.float32))
        length = dr.norm(d)
        travelled, valid, normal, albedo, _ = self._trace(o, d / length, 0.01)
        distance = dr.select(valid, travelled / length, 0)
        dr.eval(distance, normal, albedo)
        return np.array(distance), np.array(normal).reshape(3, -1).T, np.array(albedo).reshape(3, -1).T

    def pixels(self, pose: Pose, pixels: Array) -> tuple[Array, Array]:
        """Return depth (N,) in metres at the pixels' centres, 0 for nothing, and world normals (N, 3)."""
        depth, normals, _ = self.hits(pose.T_world_camera[:3, 3], pixel_rays(pose, pixels))
        return depth, normals

    def colours(self, pose: Pose, pixels: Array, seed: int) -> tuple[Array, Array]:
        """Return albedo (N, 3) and incident light (N,), averaged over each pixel; 0 where there is nothing."""
        across, down, straight = (mi.Vector3f(*(float(v) for v in column)) for column in ray_matrix(pose).T)
        o = mi.Point3f(*(float(v) for v in pose.T_world_camera[:3, 3]))
        column, row = (mi.Float(np.ascontiguousarray(part, np.float32)) for part in pixels.T)
        random = mi.PCG32(size=len(pixels), initstate=seed)
        albedo, light = dr.zeros(mi.Color3f, len(pixels)), dr.zeros(mi.Float, len(pixels))
        across_pixel = dr.opaque(mi.Float, 0.7 / float(pose.K[0, 0]) / SAMPLES)
        # Literals would be compiled into the kernel, which would have to be compiled again for every view.
        dr.make_opaque(across, down, straight, o, albedo, light)
        for number in range(SAMPLES**2):
            left, top = dr.opaque(mi.Float, number % SAMPLES), dr.opaque(mi.Float, number // SAMPLES)
            x = column + (left + random.next_float32()) / SAMPLES - 0.5
            y = row + (top + random.next_float32()) / SAMPLES - 0.5
            d = dr.normalize(across * x + down * y + straight)
            travelled, valid, normal, colour, si = self._trace(o, d, across_pixel)
            albedo += colour
            for lamp in self.lights:
                light += self._light(lamp, o + d * travelled, normal, valid, random)
            dr.eval(albedo, light, random)
        return np.array(albedo / SAMPLES**2).reshape(3, -1).T, np.array(light / SAMPLES**2)

    def _light(self, lamp: Light, place: mi.Point3f, normal: mi.Normal3f, valid: mi.Bool, random: mi.PCG32) -> mi.Float:
        """Return the light that a random point of a lamp sends to a place, including shadows."""
        spread = mi.Vector3f(random.next_float32(), random.next_float32(), random.next_float32()) - 0.5
        start = place + normal * 2e-3
        way = (
            mi.Point3f(*(dr.opaque(mi.Float, float(v)) for v in lamp.position))
            + spread * dr.opaque(mi.Float, lamp.size)
            - start
        )
        distance = dr.norm(way)
        d = way / distance
        slant = dr.dot(normal, d)
        lit = valid & (slant > 0)
        ray = mi.Ray3f(start, d)
        ray.maxt = distance
        hidden = self.scene.ray_test(ray, lit)
        strength = dr.opaque(mi.Float, lamp.strength)
        return dr.select(lit & ~hidden, strength * slant / (distance * distance + 0.3), 0)

    def _trace(
        self, o: mi.Point3f, d: mi.Vector3f, across_pixel: mi.Float
    ) -> tuple[mi.Float, mi.Bool, mi.Normal3f, mi.Color3f, mi.SurfaceInteraction3f]:
        """Return the hits of unit rays: distance, validity, normal on the ray's side, albedo, and the interaction."""
        si = self.scene.ray_intersect(mi.Ray3f(o, d))
        travelled = mi.Float(si.t)
        albedo = si.bsdf().eval_diffuse_reflectance(si, si.is_valid())
        if self._masked:  # continue through transparent parts
            for _ in range(3):
                through = si.is_valid() & (albedo.x < 0)
                behind = self.scene.ray_intersect(mi.Ray3f(si.p + d * 1e-4, d), through)
                travelled = dr.select(through, travelled + behind.t + 1e-4, travelled)
                si = dr.select(through, behind, si)
                albedo = dr.select(through, behind.bsdf().eval_diffuse_reflectance(behind, behind.is_valid()), albedo)
        valid = si.is_valid() & (albedo.x >= 0)
        if self._paper is not None:
            albedo = self._paper.on(si, valid, albedo, travelled * across_pixel)
        normal = si.sh_frame.n
        normal = dr.select(dr.dot(normal, d) > 0, -normal, normal)
        return travelled, valid, normal, dr.select(valid, albedo, 0), si

    def paper(self, rng: np.random.Generator, pictures: list[Array]) -> None:
        """Put pictures (H, W) uint8 on most of the materials of one colour, like wallpaper; without any, remove it."""
        self._paper = Paper(rng, pictures, self._plain) if pictures else None

    def illuminate(self, rng: np.random.Generator) -> None:
        """Add some lamps to the room, near the ceiling or anywhere."""
        self.lights = []
        for position in wander(self, rng)[: int(rng.integers(2, 4))]:
            above = self.hits(position, np.array([[0.0, 1.0, 0.0]]))[0][0]
            position = position + [0, above * rng.uniform(0.3, 0.95), 0]
            self.lights.append(Light(position, float(rng.uniform(0.05, 0.5)), float(np.exp(rng.normal() * 0.6))))


@dataclass(frozen=True)
class Light:
    """A lamp: its position (3,) in metres, the side of the luminous cube in metres, and its brightness."""

    position: Array
    size: float
    strength: float


class Paper:
    """Pictures on materials of one colour. They are projected along the world's axes, independently of the view.

    Args:
        pictures: (H, W) uint8.
        materials: materials that may get wallpaper; about a quarter are left unchanged.
    """

    SIDE = 512
    LEVELS = 7  # of resolution, each with half of the one before

    def __init__(self, rng: np.random.Generator, pictures: list[Array], materials: list[mi.BSDF]) -> None:
        parts = []
        for picture in pictures:
            side = min(picture.shape)
            y, x = ((length - side) // 2 for length in picture.shape)
            image = cv2.resize(
                picture[y : y + side, x : x + side], (self.SIDE, self.SIDE), interpolation=cv2.INTER_AREA
            ).astype(np.float32)
            image = np.block([[image, image[:, ::-1]], [image[::-1], image[::-1, ::-1]]])  # so that tiles fit together
            image = (image - image.mean()) / max(image.std(), 1)
            for _ in range(self.LEVELS):
                parts.append(image.ravel())
                image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        self._texels = mi.Float(np.concatenate(parts))
        sides = 2 * self.SIDE // 2 ** np.arange(self.LEVELS)
        self._starts = mi.UInt32(np.concatenate([[0], np.cumsum(sides**2)[:-1]]).astype(np.uint32))
        self._picture_size = dr.opaque(mi.UInt32, int((sides**2).sum()))
        numbers = [int(dr.reinterpret_array(mi.UInt32, mi.BSDFPtr(material))[0]) for material in materials]
        count = max(numbers, default=0) + 1
        contrast, tile, which = np.zeros(count), np.ones(count), np.zeros(count, np.uint32)
        brightness, shift = np.ones(count), rng.random((2, count))
        for number in numbers:
            if rng.random() < 0.75:
                contrast[number] = rng.uniform(0.05, 0.45)
                tile[number] = np.exp(rng.uniform(*np.log([1.6, 8.0])))  # metres, of a picture and its mirror image
                which[number] = rng.integers(len(pictures))
                brightness[number] = rng.uniform(0.3, 0.9)
        self._count = dr.opaque(mi.UInt32, count)
        self._contrast, self._tile = mi.Float(contrast.astype(np.float32)), mi.Float(tile.astype(np.float32))
        self._which, self._brightness = mi.UInt32(which), mi.Float(brightness.astype(np.float32))
        self._shift = [mi.Float(part.astype(np.float32)) for part in shift]

    def on(self, si: mi.SurfaceInteraction3f, valid: mi.Bool, albedo: mi.Color3f, footprint: mi.Float) -> mi.Color3f:
        """Return the albedo with wallpaper; ``footprint`` is the size of a pixel on the surface, metres."""
        number = dr.reinterpret_array(mi.UInt32, si.bsdf())
        papered = valid & (number < self._count)
        contrast = dr.gather(mi.Float, self._contrast, number, papered)
        papered &= contrast > 0
        tile = dr.gather(mi.Float, self._tile, number, papered)
        normal = abs(si.n)
        flat = (normal.y > normal.x) & (normal.y > normal.z)
        side = ~flat & (normal.x > normal.z)
        u = dr.select(side, si.p.z, si.p.x) / tile + dr.gather(mi.Float, self._shift[0], number, papered)
        v = dr.select(flat, si.p.z, -si.p.y) / tile + dr.gather(mi.Float, self._shift[1], number, papered)
        level = dr.clip(dr.log2(dr.maximum(footprint / tile * (2 * self.SIDE), 1e-3)) + 0.5, 0, self.LEVELS - 1)
        level = mi.UInt32(dr.select(papered, level, 0))
        width = mi.UInt32(2 * self.SIDE) >> level
        start = dr.gather(mi.UInt32, self._which, number, papered) * self._picture_size + dr.gather(
            mi.UInt32, self._starts, level, papered
        )
        x, y = (u - dr.floor(u)) * mi.Float(width), (v - dr.floor(v)) * mi.Float(width)
        column, row = mi.UInt32(x), mi.UInt32(y)
        right, below = x - mi.Float(column), y - mi.Float(row)
        value = mi.Float(0)
        for i, weight in (
            (0, (1 - right) * (1 - below)),
            (1, right * (1 - below)),
            (2, (1 - right) * below),
            (3, right * below),
        ):
            c, r = (column + i % 2) & (width - 1), (row + i // 2) & (width - 1)
            value += weight * dr.gather(mi.Float, self._texels, start + r * width + c, papered)
        brightness = dr.gather(mi.Float, self._brightness, number, papered)
        changed = dr.clip(albedo * brightness * dr.maximum(1 + contrast * value, 0.05), 0.005, 0.97)
        return dr.select(papered, changed, albedo)


def _plain(element: ElementTree.Element) -> str:
    return str(element.get("name")).replace("_", "").lower()


def _numbers(element: ElementTree.Element) -> list[float]:
    text = str(element.get("value")).replace(",", " ")
    if text.startswith("#"):
        return [float(shards.linear(np.array(int(text[i : i + 2], 16), np.uint8))) for i in (1, 3, 5)]
    return [float(part.split(":")[-1]) for part in text.split()]


def _matt(colour: dict[str, object]) -> dict[str, object]:
    return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": colour}}


def _transform(element: ElementTree.Element) -> mi.ScalarTransform4f:
    """Read a ``<transform>`` by applying its parts in turn."""
    result = mi.ScalarTransform4f()
    for part in element:
        if part.tag == "matrix":
            step = mi.ScalarTransform4f(np.array(_numbers(part)).reshape(4, 4))
        else:
            common = part.get("value")
            axes = [
                float(
                    str(part.get(axis, common if common and part.tag == "scale" else (1 if part.tag == "scale" else 0)))
                )
                for axis in "xyz"
            ]
            if part.tag == "scale":
                step = mi.ScalarTransform4f().scale(axes)
            elif part.tag == "translate":
                step = mi.ScalarTransform4f().translate(axes)
            elif part.tag == "rotate":
                step = mi.ScalarTransform4f().rotate(axes, float(str(part.get("angle"))))
            else:
                raise ValueError(f"unknown transform: {part.tag}")
        result = step @ result
    return result


# --- cameras ----------------------------------------------------------------------------------------------------------


@dataclass
class Pose:
    """A camera: ``K`` (3, 3) in pixels of WIDTH x HEIGHT, ``T_world_camera`` (4, 4)."""

    K: Array
    T_world_camera: Array


def look(position: Array, direction: Array, roll: float, focal: float) -> Pose:
    """Return the camera at a position (3,) that looks along a direction (3,), rotated by ``roll`` radians about it."""
    forward = direction / np.linalg.norm(direction)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cos, sin = np.cos(roll), np.sin(roll)
    T = np.eye(4)
    T[:3, 0], T[:3, 1], T[:3, 2] = cos * right + sin * down, cos * down - sin * right, forward
    T[:3, 3] = position
    return Pose(np.array([[focal, 0, (WIDTH - 1) / 2], [0, focal, (HEIGHT - 1) / 2], [0, 0, 1.0]]), T)


def ray_matrix(pose: Pose) -> Array:
    """The matrix (3, 3) from a pixel (column, row, 1) to its ray in the world, with 1 m along the optical axis."""
    return pose.T_world_camera[:3, :3] @ np.linalg.inv(pose.K)


def pixel_rays(pose: Pose, pixels: Array) -> Array:
    """Return rays (N, 3) in the world through pixels (N, 2), with a component of 1 m along the optical axis."""
    across, down, straight = ray_matrix(pose).T
    return pixels[:, :1] * across + pixels[:, 1:] * down + straight


def grid(step: int = 1) -> Array:
    """Pixels (N, 2) as column, row, row by row: the centres of blocks of ``step`` x ``step`` pixels of an image."""
    rows, columns = np.mgrid[: HEIGHT // step, : WIDTH // step] * step + (step - 1) / 2
    return np.stack([columns.ravel(), rows.ravel()], 1)


@dataclass
class Preview:
    """A pose and its view on a coarse grid: depth, normals, albedo of (H / PREVIEW, W / PREVIEW)."""

    pose: Pose
    depth: Array
    normals: Array
    albedo: Array


def preview(scene: Scene, pose: Pose) -> Preview:
    depth, normals, albedo = scene.hits(pose.T_world_camera[:3, 3], pixel_rays(pose, grid(PREVIEW)))
    shape = (HEIGHT // PREVIEW, WIDTH // PREVIEW)
    return Preview(pose, depth.reshape(shape), normals.reshape(*shape, 3), albedo.reshape(*shape, 3))


def worth_it(seen: Preview, scale: float = 1.0) -> bool:
    """Whether a view shows enough, at a useful distance, and not only plain walls."""
    solid = seen.depth > 0
    good = solid & (seen.albedo.min(-1) < LIGHT)
    if good.mean() < 0.7:
        return False
    if not 1.0 * scale <= np.median(seen.depth[solid]) <= 6.0 or np.quantile(seen.depth[solid], 0.02) < NEAREST:
        return False
    grey = shards.srgb(seen.albedo.mean(-1)).astype(np.float32)
    shade = 128 * np.abs(seen.normals @ np.array([0.3, 0.8, 0.52]))
    changes = np.zeros(grey.shape, bool)
    for image in (grey, shade.astype(np.float32)):
        changes |= cv2.morphologyEx(image, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 12
    # At least 9 of the 4 x 3 parts of the view must show something.
    parts = cv2.resize(changes.astype(np.float32), (4, 3), interpolation=cv2.INTER_AREA)
    return bool(changes.mean() > 0.2 and (parts > 0.06).sum() >= 9)


def free(scene: Scene, positions: Array) -> Array:
    """Whether positions (N, 3) are in a room, at a reasonable height, and not too near to anything, (N,) bool."""
    directions = around()
    distance, _, _ = scene.hits(positions.repeat(len(directions), 0), np.tile(directions, (len(positions), 1)))
    distance = distance.reshape(len(positions), len(directions))
    met = distance > 0
    nearest = np.where(met, distance, np.inf).min(1)
    height = distance[:, 0]
    return (met.mean(1) > 0.85) & (nearest > NEAREST) & (height > 0.2) & (height < 1.8) & met[:, 1]


def around(count: int = 100) -> Array:
    """Unit vectors (N, 3) in all directions; the first points down, the second up."""
    i = np.arange(count) + 0.5
    height, turn = 1 - 2 * i / count, np.pi * (1 + 5**0.5) * i
    flat = np.sqrt(1 - height**2)
    return np.vstack([[0, -1, 0], [0, 1, 0], np.stack([flat * np.cos(turn), height, flat * np.sin(turn)], 1)])


def wander(scene: Scene, rng: np.random.Generator, count: int = 64) -> Array:
    """Return positions (N, 3) in the room that can be reached from the author's camera without crossing anything."""
    positions = np.tile(scene.inside, (count, 1))
    for _ in range(4):
        directions = rng.normal(size=(count, 3)) * [1, 0.3, 1]
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        distance = np.minimum(scene.hits(positions, directions)[0], 8)
        positions = positions + directions * (distance * rng.uniform(0.1, 0.9, count))[:, None]
    down = np.tile([0.0, -1.0, 0.0], (count, 1))
    below = scene.hits(positions, down)[0]
    positions[:, 1] += np.where(below > 0, rng.uniform(0.25, 1.75, count) - below, 0)
    return positions[free(scene, positions)]


def anchor(scene: Scene, rng: np.random.Generator) -> Preview | None:
    """Return a view from a random position; None if many tries found none."""
    for _ in range(100):
        for position in wander(scene, rng)[:8]:
            for _ in range(6):
                yaw, pitch = rng.uniform(-np.pi, np.pi), np.radians(rng.uniform(-35, 15))
                direction = np.array([np.cos(yaw) * np.cos(pitch), np.sin(pitch), np.sin(yaw) * np.cos(pitch)])
                roll = np.radians(np.clip(rng.normal() * 3, -8, 8))
                seen = preview(scene, look(position, direction, roll, np.exp(rng.uniform(*np.log([380, 700])))))
                if worth_it(seen):
                    return seen
    return None


def neighbour(scene: Scene, first: Preview, rng: np.random.Generator) -> Preview | None:
    """Return a view from another position of something that the first view shows; None if this try failed."""
    rows, columns = first.depth.shape
    row, column = rng.integers(rows // 4, 3 * rows // 4), rng.integers(columns // 4, 3 * columns // 4)
    depth = first.depth[row, column]
    if depth < 0.5:
        return None
    pixel = np.array([[column, row]]) * PREVIEW + (PREVIEW - 1) / 2
    centre = first.pose.T_world_camera[:3, 3]
    back = -pixel_rays(first.pose, pixel)[0] * depth  # from the target point to the camera
    spot = centre - back
    turn, tilt = np.radians(rng.uniform(-45, 45)), np.radians(rng.uniform(-15, 15))
    distance = np.linalg.norm(back)
    flat = np.hypot(back[0], back[2])
    heading, rise = np.arctan2(back[2], back[0]) + turn, np.arctan2(back[1], flat) + tilt
    away = np.array([np.cos(heading) * np.cos(rise), np.sin(rise), np.sin(heading) * np.cos(rise)])
    cosine = away @ back / distance
    if cosine < np.cos(np.radians(48)):
        return None
    position = spot + away * distance * np.exp(rng.uniform(*np.log([0.55, 1.8])))
    if not 0.1 * depth <= np.linalg.norm(position - centre) <= 1.2 * depth:
        return None
    clear, _, _ = scene.hits(position, (spot - position)[None])
    if not 0.97 < clear[0] < 1.03 or not free(scene, position[None])[0]:
        return None
    # The target point need not be in the centre of the other view.
    focal = np.exp(rng.uniform(*np.log([380, 700])))
    roll = np.radians(rng.uniform(-20, 20) if rng.random() < 0.5 else rng.normal() * 3)
    pose = look(position, spot - position, roll, focal)
    aim = pixel_rays(pose, np.array([[(WIDTH - 1) / 2, (HEIGHT - 1) / 2]]) + rng.normal(size=(1, 2)) * [90, 65])[0]
    seen = preview(scene, look(position, aim, roll, focal))
    if not worth_it(seen, 0.5):
        return None
    there, here = overlap(first, seen), overlap(seen, first)
    return seen if min(there, here) > 0.15 and max(there, here) < 0.92 else None


def overlap(one: Preview, other: Preview) -> float:
    """The share of one view's pixels whose surface the other view also shows."""
    depth = one.depth.ravel()
    step = HEIGHT // one.depth.shape[0]
    points = one.pose.T_world_camera[:3, 3] + pixel_rays(one.pose, grid(step)) * depth[:, None]
    inverse = np.linalg.inv(other.pose.T_world_camera)
    there = points @ inverse[:3, :3].T + inverse[:3, 3]
    z = np.maximum(there[:, 2], 1e-6)
    pixels = (there @ other.pose.K.T)[:, :2] / z[:, None]
    cells = np.round((pixels - (step - 1) / 2) / step)
    rows, columns = other.depth.shape
    inside = (depth > 0) & (there[:, 2] > 0.05) & (cells >= 0).all(1) & (cells < [columns, rows]).all(1)
    column, row = np.where(inside, cells[:, 0], 0).astype(int), np.where(inside, cells[:, 1], 0).astype(int)
    # On a slanted surface the nearest sample has another depth, so agreement with any neighbour is enough.
    lowest = cv2.erode(other.depth.astype(np.float32), np.ones((3, 3)))[row, column]
    highest = cv2.dilate(other.depth.astype(np.float32), np.ones((3, 3)))[row, column]
    same = inside & (other.depth[row, column] > 0) & (z > lowest * 0.99) & (z < highest * 1.01)
    return float(same.mean())


# --- views ------------------------------------------------------------------------------------------------------------


def render(scene: Scene, pose: Pose, rng: np.random.Generator) -> dict[str, Array]:
    """Render a view in full resolution.

    Returns:
        ``rgb`` (H, W, 3) and ``grey`` (H, W) uint8, sRGB-coded albedo, and ``light`` (H, W) float32, the incident light
        to multiply by the linear albedo, all averaged over each pixel; ``normals`` (H, W, 3) uint8, encoded world
        vectors, and ``depth`` (H, W) float32 metres, at the pixels' centres; ``K``, ``T_world_camera``.
    """
    depth, normals = scene.pixels(pose, grid())
    albedo, light = scene.colours(pose, grid(), int(rng.integers(1 << 30)))
    albedo = albedo.reshape(HEIGHT, WIDTH, 3)
    return {
        "rgb": shards.srgb(albedo),
        "grey": shards.srgb(albedo @ np.array([0.2126, 0.7152, 0.0722])),
        "light": light.reshape(HEIGHT, WIDTH).astype(np.float32),
        "normals": shards.encode_normals(normals.reshape(HEIGHT, WIDTH, 3)),
        "depth": depth.reshape(HEIGHT, WIDTH).astype(np.float32),
        "K": pose.K,
        "T_world_camera": pose.T_world_camera,
    }


def render_cluster(scene: Scene, room: Room, number: int, folder: Path, pictures: list[Array]) -> int:
    """Render a cluster of views into ``folder``; return the number of views.

    Args:
        pictures: (H, W) uint8 pictures for the wallpaper of the room; none leave it unchanged.
    """
    rng = np.random.default_rng([number, *room.name.encode()])
    scene.paper(rng, [pictures[i] for i in rng.choice(len(pictures), min(PAPERS, len(pictures)), replace=False)])
    scene.illuminate(rng)
    first = anchor(scene, rng)
    views = [] if first is None else [first]
    for _ in range(400):
        if not views or len(views) == VIEWS:
            break
        another = neighbour(scene, views[0], rng)
        if another is not None:
            views.append(another)
    if len(views) < 2:
        views = []
    names = [f"{room.name}_{number:04d}_{i}" for i in range(len(views))]
    full = []
    for name, view in zip(names, views):
        arrays = render(scene, view.pose, rng)
        if not full:
            unit = max(float(np.quantile(arrays["light"], 0.97)), 1e-6)  # the same for all views of the cluster
        arrays["light"] = shards.srgb(arrays["light"] / unit)
        full.append(Preview(view.pose, arrays["depth"][::4, ::4], arrays["normals"], arrays["grey"]))
        save(folder / f"{name}.npz", scene=np.array(room.name), cluster=np.array(number), **arrays)
    pairs = [(i, j) for i in range(len(views)) for j in range(i + 1, len(views))]
    shares = [(overlap_of_maps(full[i], full[j]), overlap_of_maps(full[j], full[i])) for i, j in pairs]
    text = json.dumps(
        {
            "scene": room.name,
            "cluster": number,
            "held_out": room.held_out,
            "papered": bool(pictures),
            "views": names,
            "pairs": pairs,
            "overlaps": [[round(share, 4) for share in both] for both in shares],
        }
    )
    partial = folder / f"{room.name}_{number:04d}.part"
    partial.write_text(text)
    os.replace(partial, partial.with_suffix(".json"))
    return len(views)


def overlap_of_maps(one: Preview, other: Preview) -> float:
    """Compute :func:`overlap` for maps whose sample (0, 0) is at the image's pixel (0, 0)."""
    step = HEIGHT // one.depth.shape[0]
    shift = (step - 1) / 2
    moved = []
    for view in (one, other):
        K = view.pose.K.copy()
        K[:2, 2] += shift
        moved.append(Preview(Pose(K, view.pose.T_world_camera), view.depth, view.normals, view.albedo))
    return overlap(*moved)


def save(path: Path, **arrays: Array) -> None:
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def numbered(rooms: list[Room], held_out: bool, first: int, count: int) -> list[tuple[int, Room]]:
    """Number ``count`` clusters from ``first`` on, for each of the rooms that are held out or that are not."""
    return [(number, room) for number in range(first, first + count) for room in rooms if room.held_out == held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder of the repositories with the rooms")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first cluster of each room for training")
    parser.add_argument("--clusters", type=int, default=60, help="number of clusters of each room for training")
    parser.add_argument(
        "--held-out-first", type=int, default=0, help="number of the first cluster of each room for evaluation"
    )
    parser.add_argument(
        "--held-out-clusters", type=int, default=25, help="number of clusters of each room for evaluation"
    )
    parser.add_argument(
        "--held-out-after", type=int, default=250, help="number of training views to render before those for evaluation"
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        nargs="*",
        default=[],
        help="shards of photographs that become wallpaper in every second cluster for training",
    )
    parser.add_argument("--held-out-pictures", type=Path, nargs="*", default=[], help="the same for evaluation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="render only these rooms")
    arguments = parser.parse_args()
    dr.set_thread_count(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    scenes: dict[str, Scene] = {}
    pictures = {
        held_out: [picture for path in paths for picture in shards.read_photos(path)]
        for held_out, paths in ((False, arguments.pictures), (True, arguments.held_out_pictures))
    }
    views = 0
    rooms = [room for room in ROOMS if not arguments.only or room.name in arguments.only]
    queue = numbered(rooms, False, arguments.first, arguments.clusters)
    waiting = numbered(rooms, True, arguments.held_out_first, arguments.held_out_clusters)
    turn = 0
    while queue or waiting:
        turn += 1
        evaluation = waiting and (not queue or (views >= arguments.held_out_after and turn % 2 == 0))
        number, room = (waiting if evaluation else queue).pop(0)
        done = arguments.out / f"{room.name}_{number:04d}.json"
        if done.exists():
            views += 0 if room.held_out else len(json.loads(done.read_text())["views"])
            continue
        start = time.monotonic()
        if room.name not in scenes:
            scenes[room.name] = Scene(arguments.sources / room.folder, room.scale)
            print(
                f"{room.name}: read in {time.monotonic() - start:.1f} s; missing {scenes[room.name].missing}",
                flush=True,
            )
        papers = pictures[room.held_out] if number % 2 else []
        count = render_cluster(scenes[room.name], room, number, arguments.out, papers)
        views += 0 if room.held_out else count
        print(
            f"{time.strftime('%H:%M:%S')} {room.name} {number}: {count} views in {time.monotonic() - start:.1f} s; "
            f"{views} for training",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
