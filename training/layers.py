"""Pairs of views with parallax and occlusion, created on the training device from photographs alone.

Photographs are cut into shapes, which lie one in front of another. A homography of one photograph never shows where an
object hides what is behind it. Rooms do (:mod:`views`), but they have hardly any texture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from views import HIDDEN, SIZE, VISIBLE, Photos, ViewPairs, apply, inside, nearest, resample


@dataclass
class Layered:
    """Geometry of two views of L planar layers. A layer hides the layers before it.

    Attributes:
        homographies: (L, B, 3, 3) map each view's pixels of each layer to the other view's.
        labels: (B, H, W) int64, the layer that each pixel of each view shows. A pixel beside an outline counts as the
            layer in front, because an outline moves with it.
    """

    homographies: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor]
    size: tuple[int, int] = SIZE

    def places(self, points: Tensor, of: int) -> tuple[Tensor, Tensor]:
        layers = nearest(self.labels[of], points)
        mapped = torch.stack([apply(each, points) for each in self.homographies[of]])
        places = mapped.gather(0, layers[None, ..., None].expand(1, *points.shape))[0]
        visible = inside(places, self.size) & (nearest(self.labels[1 - of], places) == layers)
        return places, torch.where(visible, VISIBLE, HIDDEN).to(torch.int8)


class Layers:
    """Photographs cut into shapes, one in front of another: two views have parallax and occlusion.

    The camera's motion parallel to the image moves each pixel of a plane by an affine function of its place, along one
    direction for all planes (Hartley and Zisserman, Multiple View Geometry, 13.2, for a translation parallel to the
    image plane). The second view's homography follows.
    """

    LAYERS = 5
    PARALLAX = 0.12  # largest difference of the displacements of two layers, of the view's width
    SLANT = 0.06  # standard deviation of the change of the displacement, pixels per pixel

    def __init__(self, photos: Photos) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def pairs(self, draw: torch.Generator, count: int, size: tuple[int, int] = SIZE) -> ViewPairs:
        """Create ``count`` pairs of views of random layers."""
        device = self.photos.pixels.device
        angle = 2 * torch.pi * torch.rand(count, generator=draw, device=device)
        direction = torch.stack([angle.cos(), angle.sin()], dim=1)
        parallax = self.PARALLAX * size[0] * torch.rand(count, generator=draw, device=device)
        steps = torch.rand(count, self.LAYERS, generator=draw, device=device)
        nearness = (steps.cumsum(dim=1) - steps[:, :1]) / steps.sum(dim=1, keepdim=True)
        views = [torch.zeros(count, 1, size[1], size[0], device=device) for _ in range(2)]
        labels = [torch.zeros(count, size[1], size[0], dtype=torch.int64, device=device) for _ in range(2)]
        homographies: list[Tensor] = []
        for layer in range(self.LAYERS):
            images, sizes, moves = self.photos.views(draw, count, size)
            if layer == 0:
                common = moves[1] @ torch.linalg.inv(moves[0])  # the rotation and zoom that all layers share
            forth = common @ self._displaced(draw, direction, nearness[:, layer] * parallax, size)
            homographies.append(forth)
            shape = self._shapes(draw, count, images.shape[2:])
            for i, move in enumerate((moves[0], forth @ moves[0])):
                seen = resample(torch.cat([images, shape], dim=1), sizes, move, size)
                part = _coverage(seen[:, 1:]) if layer else torch.ones_like(seen[:, 1:])
                views[i] += part * (seen[:, :1] - views[i])
                near = F.max_pool2d(part, 3, stride=1, padding=1)[:, 0] > 0.5
                labels[i] = torch.where(near, layer, labels[i])
        forth = torch.stack(homographies)
        geometry = Layered((forth, torch.linalg.inv(forth)), (labels[0], labels[1]), size)
        return ViewPairs((views[0], views[1]), geometry)

    def _displaced(self, draw: torch.Generator, direction: Tensor, distance: Tensor, size: tuple[int, int]) -> Tensor:
        """Homographies (B, 3, 3) that displace a plane along a direction (B, 2), by a distance in the middle."""
        count, device = len(direction), direction.device
        slope = self.SLANT * torch.randn(count, 2, generator=draw, device=device)
        middle = (torch.tensor(size, device=device) - 1) / 2
        move = torch.eye(3, device=device).repeat(count, 1, 1)
        move[:, :2, :2] += direction[:, :, None] * slope[:, None]
        move[:, :2, 2] = direction * (distance - slope @ middle)[:, None]
        return move

    @staticmethod
    def _shapes(draw: torch.Generator, count: int, size: torch.Size) -> Tensor:
        """Draw shapes with round or with straight outlines, as fields (B, 1, h, w) that are positive inside.

        They cover about a fifth of the area.
        """
        device = draw.device
        height, width = size
        cells = int(torch.randint(4, 14, (), generator=draw, device=device))
        if torch.rand((), generator=draw, device=device) < 0.5:
            rough = torch.randn(count, 1, cells * 3 // 4, cells, generator=draw, device=device)
            return F.interpolate(rough, (height, width), mode="bicubic", align_corners=True) - 0.7
        seeds = torch.rand(count, cells * cells, 2, generator=draw, device=device)
        solid = torch.rand(count, 1, cells * cells, generator=draw, device=device) < 0.2
        x, y = ((torch.arange(n, device=device) + 0.5) / n for n in (width // 4, height // 4))
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2)
        distances = torch.cdist(grid.expand(count, -1, -1), seeds)
        field = distances.masked_fill(solid, 9).amin(dim=2) - distances.masked_fill(~solid, 9).amin(dim=2)
        field = field.view(count, 1, height // 4, width // 4)
        return F.interpolate(field, (height, width), mode="bilinear", align_corners=False)


def _coverage(field: Tensor) -> Tensor:
    """Return the part (B, 1, H, W) of each pixel that is inside a shape, from its field there."""
    down, across = torch.gradient(field, dim=(2, 3))
    return (field / (down.square() + across.square()).sqrt().clamp(min=1e-9) + 0.5).clamp(0, 1)
