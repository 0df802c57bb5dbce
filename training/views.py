"""Pairs of views with known geometry, created on the training device from photographs and rooms.

A photograph gives two views of a plane. A room gives two views with parallax and occlusion, known from its depth; the
training simulates its lighting. Each view is resampled once, by its own homography. For a photograph, this is the
complete geometry. For a view of a room, it is a rotation and a zoom of the same camera.
"""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from common import log_line
from shards import Rooms, decode_normals, photo_names, read_photos, read_rooms
from torch import Tensor
from torch.nn import functional as F

SIZE = (640, 480)  # width, height of a view
AGREES = 0.03  # relative difference of two depths up to which they belong to the same surface
EDGE = 0.10  # relative difference of neighbouring depths above which the point is ignored

VISIBLE, UNKNOWN, HIDDEN = 1, 0, -1


class Geometry(Protocol):
    """Maps points between the two views of each pair."""

    def places(self, points: Tensor, of: int) -> tuple[Tensor, Tensor]:
        """Map points of view ``of`` (0 or 1) into the other view.

        Args:
            points: (B, N, 2) x, y in pixels.

        Returns:
            positions (B, N, 2), and states (B, N) int8: VISIBLE, HIDDEN (outside the other view, or occluded) or
            UNKNOWN.
        """


@dataclass
class ViewPairs:
    """B pairs of views, (B, 1, H, W) in [0, 1], before any degradation."""

    images: tuple[Tensor, Tensor]
    geometry: Geometry


def apply(homographies: Tensor, points: Tensor) -> Tensor:
    """Map points (B, N, 2) by homographies (B, 3, 3). Points behind the camera get coordinates far away."""
    mapped = points @ homographies[:, :, :2].transpose(1, 2) + homographies[:, None, :, 2]
    depth = mapped[..., 2:]
    return torch.where(depth > 1e-6, mapped[..., :2] / depth.clamp(min=1e-6), torch.full_like(mapped[..., :2], -1e4))


def inside(points: Tensor, size: tuple[int, int], margin: float = 0.0) -> Tensor:
    """Return which of the points (…, 2) are in an image of this width and height, (…) bool."""
    limit = points.new_tensor(size) - 1 - margin
    return ((points >= margin) & (points <= limit)).all(dim=-1)


def nearest(maps: Tensor, points: Tensor) -> Tensor:
    """Return the values (B, N) of maps (B, H, W) at the pixels nearest to points (B, N, 2)."""
    _, height, width = maps.shape
    at = points.round().long()
    x, y = at[..., 0].clamp(0, width - 1), at[..., 1].clamp(0, height - 1)
    return maps.flatten(1).gather(1, y * width + x)


def are_mutual(forth: Tensor, back: Tensor) -> Tensor:
    """Whether (B, N) the indices (B, N) of points of the other view lead back, by the other points' indices (B, M)."""
    return back.gather(1, forth) == torch.arange(forth.shape[1], device=forth.device)


@dataclass
class Planar:
    """Geometry of two views of a photograph: ``homographies`` (B, 3, 3) map each view's pixels to the other's."""

    homographies: tuple[Tensor, Tensor]
    size: tuple[int, int] = SIZE

    def places(self, points: Tensor, of: int) -> tuple[Tensor, Tensor]:
        places = apply(self.homographies[of], points)
        return places, torch.where(inside(places, self.size), VISIBLE, HIDDEN).to(torch.int8)


class Source(Protocol):
    """Pictures from which pairs of views are created."""

    def __len__(self) -> int: ...

    def pairs(self, draw: torch.Generator, count: int, size: tuple[int, int] = SIZE) -> ViewPairs:
        """Create ``count`` pairs of views of random pictures, (H, W) = ``size[::-1]``."""


# --- homographies ---


def random_homographies(
    draw: torch.Generator, centre: Tensor, scale: Tensor, strength: Tensor, size: tuple[int, int] = SIZE
) -> Tensor:
    """Draw homographies (B, 3, 3) from a source image to views of it.

    Args:
        centre: (B, 2) the source's point that is near the view's centre.
        scale: (B,) source pixels per view pixel.
        strength: (B,) 0 for a plain crop, 1 for strong rotations, tilts and changes of scale.
    """
    count, device = len(scale), scale.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=draw, device=device)

    angle = normal() * 0.35 * strength
    zoom = torch.exp(normal() * 0.28 * strength) / scale
    aspect = torch.exp(normal() * 0.08 * strength)
    extent = torch.tensor(size, device=device, dtype=torch.float32)
    tilt = normal(2) * 0.30 * strength[:, None] / extent
    shift = normal(2) * 0.08 * strength[:, None] * extent
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    # Rotation and tilt about the centre, in pixels of the view.
    turn = torch.stack([cos * aspect, -sin, zero, sin * aspect, cos, zero, tilt[:, 0], tilt[:, 1], one], -1).view(
        -1, 3, 3
    )
    cut = torch.stack([zoom, zero, -zoom * centre[:, 0], zero, zoom, -zoom * centre[:, 1], zero, zero, one], -1).view(
        -1, 3, 3
    )
    middle = (extent - 1) / 2 + shift
    back = torch.stack([one, zero, middle[:, 0], zero, one, middle[:, 1], zero, zero, one], -1).view(-1, 3, 3)
    return back @ turn @ cut


def resample(images: Tensor, sizes: Tensor, homographies: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    """Resample images to views (B, 1, H, W).

    Each pixel is the mean of four samples, because a sensor's pixel has an area.
    Images are continued by reflection beyond their borders.

    Args:
        images: (B, 1, h, w) float, padded on the right and below.
        sizes: (B, 2) width and height without padding.
        homographies: (B, 3, 3) from the image to the view.
    """
    width, height = size
    device = images.device
    x = torch.arange(2 * width, device=device) / 2 - 0.25
    y = torch.arange(2 * height, device=device) / 2 - 0.25
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2)
    source = apply(torch.linalg.inv(homographies), grid.expand(len(images), -1, -1))
    last = (sizes - 1).to(source)[:, None]
    source = last - (source.remainder(2 * last) - last).abs()
    whole = torch.tensor(images.shape[:1:-1], device=device) - 1
    source = (source / whole * 2 - 1).view(len(images), 2 * height, 2 * width, 2)
    sampled = F.grid_sample(images, source.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=True)
    return F.avg_pool2d(sampled.float(), 2)


# --- photographs ---


class Photos:
    """Photographs on the device, padded to the same size."""

    def __init__(self, images: list[np.ndarray], device: torch.device) -> None:
        height, width = (max(image.shape[i] for image in images) for i in (0, 1))
        self.pixels = torch.zeros(len(images), 1, height, width, dtype=torch.uint8)
        for i, image in enumerate(images):
            self.pixels[i, 0, : image.shape[0], : image.shape[1]] = torch.from_numpy(image)
        self.pixels = self.pixels.to(device)
        self.sizes = torch.tensor([image.shape[::-1] for image in images], device=device)

    def __len__(self) -> int:
        return len(self.pixels)

    def pairs(self, draw: torch.Generator, count: int, size: tuple[int, int] = SIZE) -> ViewPairs:
        """Create ``count`` pairs of views of random photographs."""
        images, sizes, moves = self.views(draw, count, size)
        views = [resample(images, sizes, move, size) for move in moves]
        forth = moves[1] @ torch.linalg.inv(moves[0])
        return ViewPairs((views[0], views[1]), Planar((forth, torch.linalg.inv(forth)), size))

    def views(
        self, draw: torch.Generator, count: int, size: tuple[int, int] = SIZE
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draw ``count`` photographs and two views of each.

        Returns:
            the images (B, 1, h, w), their sizes (B, 2), and the homographies (B, 3, 3) from the images to both views.
        """
        device = self.pixels.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=draw, device=device)

        chosen = torch.randint(len(self), (count,), generator=draw, device=device)
        images, sizes = self.pixels[chosen].float() / 255, self.sizes[chosen]
        largest = (sizes / torch.tensor(size, device=device)).amin(dim=1)
        smallest = (0.55 * largest).clamp(max=0.75)
        scale = smallest * (largest / smallest) ** torch.rand(count, generator=draw, device=device)
        room = (sizes - scale[:, None] * torch.tensor(size, device=device)).clamp(min=0) / 2
        centre = (sizes - 1) / 2 + uniform(-1, 1, 2) * room
        flip = torch.where(torch.rand(count, generator=draw, device=device) < 0.5, -1.0, 1.0)
        mirror = torch.diag_embed(torch.stack([flip, torch.ones_like(flip), torch.ones_like(flip)], dim=1))
        mirror[:, 0, 2] = torch.where(flip < 0, size[0] - 1.0, 0.0)
        moves = []
        for low, high in ((0.1, 0.7), (0.3, 1.3)):
            move = random_homographies(draw, centre, scale, uniform(low, high), size)
            moves.append(mirror @ move)
        if torch.rand((), generator=draw, device=device) < 0.5:
            moves.reverse()
        return images, sizes, moves


# --- rooms ---


@dataclass
class Spatial:
    """Geometry of two views of a room, each the resampled image of a camera with depth.

    Attributes:
        cuts: homographies from each camera's image to its view, (B, 3, 3).
        matrices: the cameras' matrices, (B, 3, 3).
        poses: camera to world, (B, 4, 4).
        depths: (B, 1, h, w) along the optical axis, 0 where there is nothing.
        step: image pixels per sample of the depth.
        camera_size: width and height of the cameras' images.
    """

    cuts: tuple[Tensor, Tensor]
    matrices: tuple[Tensor, Tensor]
    poses: tuple[Tensor, Tensor]
    depths: tuple[Tensor, Tensor]
    step: float
    camera_size: tuple[int, int]
    size: tuple[int, int] = SIZE

    def places(self, points: Tensor, of: int) -> tuple[Tensor, Tensor]:
        here, there = of, 1 - of
        pixels = apply(torch.linalg.inv(self.cuts[here]), points)
        known = inside(pixels, self.camera_size)
        depth, spread = self._depth(here, pixels)
        known &= (depth > 0) & (spread < EDGE)
        rays = apply(torch.linalg.inv(self.matrices[here]), pixels)
        rays = torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1) * depth.clamp(min=1e-3)[..., None]
        motion = torch.linalg.inv(self.poses[there]) @ self.poses[here]
        seen = rays @ motion[:, :3, :3].transpose(1, 2) + motion[:, None, :3, 3]
        z = seen[..., 2]
        pixels = (seen @ self.matrices[there].transpose(1, 2))[..., :2] / z.clamp(min=1e-3)[..., None]
        places = apply(self.cuts[there], pixels)
        outside = (z <= 0.05) | ~inside(places, self.size) | ~inside(pixels, self.camera_size)
        other, _ = self._depth(there, pixels)
        farthest = self._farthest(there, pixels)
        occluded = (farthest > 0) & (z > farthest * (1 + AGREES))
        agrees = (other > 0) & ((z / other.clamp(min=1e-3) - 1).abs() < AGREES)
        # A view may continue a camera's image by reflection. Only points that no view shows are hidden.
        gone = known & ((outside & ~inside(places, self.size)) | (z <= 0.05) | (~outside & occluded))
        state = torch.where(gone, HIDDEN, torch.where(known & ~outside & agrees, VISIBLE, UNKNOWN))
        return places, state.to(torch.int8)

    def _depth(self, view: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Depth (B, N) at an image's pixels, and the relative difference of its four samples.

        Inverse depth is linear in the image of a plane, so its interpolation is exact there.
        """
        depth = self.depths[view]
        batch, _, height, width = depth.shape
        at = pixels / self.step
        low = at.floor().clamp(at.new_zeros(2), at.new_tensor([width - 2, height - 2]))
        part = at - low  # may exceed 1: the image extends some pixels beyond the last sample
        x, y = low.long().unbind(dim=-1)
        flat = depth.view(batch, -1)
        corners = torch.stack([flat.gather(1, (y + j) * width + x + i) for j in (0, 1) for i in (0, 1)], dim=-1)
        weights = torch.stack(
            [
                (1 - part[..., 0]) * (1 - part[..., 1]),
                part[..., 0] * (1 - part[..., 1]),
                (1 - part[..., 0]) * part[..., 1],
                part[..., 0] * part[..., 1],
            ],
            dim=-1,
        )
        empty = (corners <= 0).any(dim=-1)
        inverse = (weights / corners.clamp(min=1e-3)).sum(dim=-1)
        spread = corners.amax(dim=-1) / corners.amin(dim=-1).clamp(min=1e-3) - 1
        return torch.where(empty, 0.0, 1 / inverse.clamp(min=1e-6)), torch.where(empty, 1.0, spread)

    def _farthest(self, view: int, pixels: Tensor) -> Tensor:
        """The largest depth within a sample of an image's pixel; a point behind it is certainly hidden."""
        return nearest(F.max_pool2d(self.depths[view], 3, stride=1, padding=1)[:, 0], pixels / self.step)


class RoomViews:
    """Views of rooms on the device: albedo, normals, depth and poses, and the pairs that overlap."""

    def __init__(self, shards: list[Rooms], device: torch.device, overlap: float = 0.15) -> None:
        self.albedo = torch.from_numpy(np.concatenate([np.stack(s.images) for s in shards])[:, None]).to(device)
        self.light = torch.from_numpy(np.concatenate([np.stack(s.light) for s in shards])[:, None]).to(device)
        self.known_light = torch.tensor([bool((light < 255).any()) for s in shards for light in s.light], device=device)
        normals = np.concatenate([decode_normals(s.normals) for s in shards]).astype(np.float16)
        self.normals = torch.from_numpy(normals).to(device)
        self.depth = torch.from_numpy(np.concatenate([s.depth for s in shards])[:, None].astype(np.float32)).to(device)
        self.matrices = torch.from_numpy(np.concatenate([s.K for s in shards]).astype(np.float32)).to(device)
        poses = torch.from_numpy(np.concatenate([s.T_world_camera for s in shards])).to(device)
        self.poses = poses.float()
        first = np.cumsum([0, *(len(s.images) for s in shards)])
        kept = [s.pairs[s.overlaps.min(axis=1) >= overlap] + start for s, start in zip(shards, first)]
        self.pairs_of = torch.from_numpy(np.concatenate(kept)).to(device)
        self.camera_size = (self.albedo.shape[3], self.albedo.shape[2])
        self.step = self.albedo.shape[3] / self.depth.shape[3]

    def __len__(self) -> int:
        return len(self.pairs_of)

    def only(self, chosen: Tensor) -> RoomViews:
        """The same views with only the chosen pairs (P,)."""
        same = copy.copy(self)
        same.pairs_of = self.pairs_of[chosen]
        return same

    def pairs(self, draw: torch.Generator, count: int, size: tuple[int, int] = SIZE) -> ViewPairs:
        """Create ``count`` pairs of overlapping views. The light is the same in both views for about 70 %."""
        device = self.albedo.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=draw, device=device)

        chosen = self.pairs_of[torch.randint(len(self), (count,), generator=draw, device=device)]
        swap = torch.rand(count, generator=draw, device=device) < 0.5
        chosen = torch.where(swap[:, None], chosen.flip(1), chosen)
        points = [self._world(chosen[:, i]) for i in (0, 1)]
        lamps = self._lamps(draw, points[0])
        others = self._lamps(draw, points[0])
        relit = torch.rand(count, generator=draw, device=device) < 0.33
        moved = tuple(torch.where(relit.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(lamps, others))
        # Two of three pairs are under the room's own lamps. In a quarter of these, the second view has other lamps.
        first = torch.rand(count, generator=draw, device=device) < 0.33
        own = (first, first | (torch.rand(count, generator=draw, device=device) < 0.25))
        fit = min(self.camera_size[0] / size[0], self.camera_size[1] / size[1])
        cuts, views = [], []
        for i, light in ((0, lamps), (1, moved)):
            index = chosen[:, i]
            lit = self._lit(index, points[i], light, own[i])
            middle = torch.tensor(self.camera_size, device=device) / 2 - 0.5
            centre = middle + uniform(-0.08, 0.08, 2) * torch.tensor(self.camera_size, device=device)
            cut = random_homographies(draw, centre.float(), fit * uniform(0.7, 1.0), uniform(0.0, 0.5), size)
            sizes = torch.tensor([self.camera_size], device=device).expand(count, 2)
            views.append(resample(lit, sizes, cut, size))
            cuts.append(cut)
        geometry = Spatial(
            (cuts[0], cuts[1]),
            (self.matrices[chosen[:, 0]], self.matrices[chosen[:, 1]]),
            (self.poses[chosen[:, 0]], self.poses[chosen[:, 1]]),
            (self.depth[chosen[:, 0]], self.depth[chosen[:, 1]]),
            self.step,
            self.camera_size,
            size,
        )
        return ViewPairs((views[0], views[1]), geometry)

    def _world(self, index: Tensor) -> Tensor:
        """Return points (B, h, w, 3) of the views' surfaces in the world frame."""
        depth = self.depth[index, 0]
        height, width = depth.shape[1:]
        x = torch.arange(width, device=depth.device) * self.step
        y = torch.arange(height, device=depth.device) * self.step
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2).float()
        rays = apply(torch.linalg.inv(self.matrices[index]), grid.expand(len(index), -1, -1))
        rays = torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1) * depth.view(len(index), -1, 1)
        pose = self.poses[index]
        return (rays @ pose[:, :3, :3].transpose(1, 2) + pose[:, None, :3, 3]).view(len(index), height, width, 3)

    def _lamps(self, draw: torch.Generator, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw positions (B, 3 lamps, 3), strengths (B, 3) and ambient light (B,), near what a view shows."""
        count, device = len(points), points.device
        flat = points.view(count, -1, 3)
        centre = flat.mean(dim=1, keepdim=True)
        size = flat.std(dim=1, keepdim=True).clamp(0.3, 5.0)
        places = centre + 2.0 * size * torch.randn(count, 3, 3, generator=draw, device=device)
        strengths = torch.exp(torch.randn(count, 3, generator=draw, device=device))
        ambient = 0.15 + 0.5 * torch.rand(count, generator=draw, device=device)
        return places, strengths, ambient

    def _lit(self, index: Tensor, points: Tensor, light: tuple[Tensor, Tensor, Tensor], own: Tensor) -> Tensor:
        """Render lit pictures (B, 1, H, W) in [0, 1], sRGB-coded, of the views, with Lambertian surfaces.

        Args:
            own: (B,) bool, true for views lit by ``light``, false for views lit by the room's own lamps.
        """
        places, strengths, ambient = light
        normals = self.normals[index].float()
        shading = torch.zeros_like(points[..., 0])
        for i in range(places.shape[1]):
            towards = places[:, None, None, i] - points
            squared = towards.square().sum(dim=-1).clamp(min=0.04)
            cosine = ((normals * towards).sum(dim=-1) / squared.sqrt()).clamp(min=0)
            shading += strengths[:, i, None, None] * cosine / squared
        mean = shading.mean(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        shading = ambient[:, None, None] + (1 - ambient[:, None, None]) * (shading / mean).clamp(max=6)
        albedo = (self.albedo[index].float() / 255) ** 2.2
        shading = self._enlarged(shading[:, None], albedo)
        room = (self.light[index].float() / 255) ** 2.2  # light of the room's own lamps, with shadows
        room = room / room.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
        dim = ambient.view(-1, 1, 1, 1) * 0.6
        by_lamps = (own | ~self.known_light[index]).view(-1, 1, 1, 1)
        shading = torch.where(by_lamps, shading, dim + (1 - dim) * room)
        lit = albedo * shading
        exposure = 0.35 / lit.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-4)
        return (lit * exposure).clamp(0, 1) ** (1 / 2.2)

    def _enlarged(self, shading: Tensor, albedo: Tensor) -> Tensor:
        """Upsample shading (B, 1, h, w) to the size of the albedo (B, 1, H, W), without crossing the albedo's edges.

        This is joint bilateral upsampling (Kopf et al., SIGGRAPH 2007). Otherwise an object's shading would extend
        beyond its outline.
        """
        height, width = albedo.shape[2:]
        x, y = (torch.arange(n, device=albedo.device) / self.step for n in (width, height))
        small = albedo[:, :, (torch.arange(shading.shape[2], device=albedo.device) * self.step).long()]
        small = small[..., (torch.arange(shading.shape[3], device=albedo.device) * self.step).long()]
        total, weights = torch.zeros_like(albedo), torch.full_like(albedo, 1e-6)
        for j in (-1, 0, 1):
            row = (y.round().long() + j).clamp(0, shading.shape[2] - 1)
            for i in (-1, 0, 1):
                column = (x.round().long() + i).clamp(0, shading.shape[3] - 1)
                near = (-(y - row).square()[:, None] - (x - column).square()).exp()
                alike = (-((small[:, :, row][..., column] - albedo) / 0.05).square()).exp() + 1e-4
                weight = near * alike
                total = total + weight * shading[:, :, row][..., column]
                weights = weights + weight
        return total / weights


def are_for_validation(names: list[str]) -> np.ndarray:
    """Return (N,) bool, which of the named items are for validation: about one in twenty, by a hash of the name alone.

    If none were chosen, the first by hash is.
    """
    codes = np.array([zlib.crc32(name.encode()) for name in names])
    chosen = codes % 20 == 0
    return chosen if chosen.any() else codes == codes.min()


def load(folder: Path, device: torch.device) -> tuple[list[Source], list[Source]]:
    """Load the shards of a folder: the sources to train on (logged), and the sources for validation.

    About one in twenty photographs and one in twenty clusters of views are for validation, by
    :func:`are_for_validation`.

    Raises:
        FileNotFoundError: there are no photographs.
    """
    paths = sorted(folder.glob("photos_*.npz"))
    images = [image for path in paths for image in read_photos(path)]
    if not images:
        raise FileNotFoundError(f"{folder} holds no photos_*.npz: create them with training/prepare.py")
    chosen = are_for_validation([name for path in paths for name in photo_names(path)])
    trained: list[Source] = [Photos([image for image, each in zip(images, chosen) if not each], device)]
    validation: list[Source] = [Photos([image for image, each in zip(images, chosen) if each], device)]
    shards = [rooms for path in sorted(folder.glob("rooms_*.npz")) if (rooms := read_rooms(path)).images]
    if shards:
        rooms = RoomViews(shards, device)
        views = [name for s in shards for name in s.names]
        # render.py names a view by its room, its place in it, and its number there.
        places = [views[i].rpartition("_")[0] for i in rooms.pairs_of[:, 0].tolist()]
        held_out = torch.from_numpy(are_for_validation(places)).to(device)
        trained.append(rooms.only(~held_out))
        validation.append(rooms.only(held_out))
    for source in trained:
        log_line(f"{type(source).__name__}: {len(source)} for training")
    return trained, validation
