"""The loss of a SuperPoint, from pairs of views with known geometry: the positions of points, and their descriptors.

- *Consensus*: an averaged copy of the network (a mean teacher, Tarvainen and Valpola, NeurIPS 2017) sees both views
  before their degradation. Points are where its two outputs agree after one has been warped to the other view. This is
  homographic adaptation (SuperPoint, section 5) with two views, continuously during the training. Both views learn the
  same points of the scene, to a fraction of a pixel.
- *Reprojection*: the network's own points, refined to a fraction of a pixel, have to coincide in both views
  (ALIKE, Zhao et al., IEEE Transactions on Multimedia 2022, eq. 9).
- *Descriptors*: each point has to be distinguished from all others of the other view (InfoNCE, van den Oord et al.,
  2018).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from views import VISIBLE, Geometry, are_mutual

from kpmatch_ros.models import SuperPoint
from kpmatch_ros.models.detections import read_out
from kpmatch_ros.models.superpoint import CELL, sample_descriptors

BORDER = 6  # pixels along the sides without points
POINTS = 1100  # number of labels of a view that is completely visible in the other one
LEAST = 5e-4  # lowest agreement of the two maps (their geometric mean) for a point
APART = 3  # pixels: labels are maxima within this distance in x and y
CANDIDATES = 400  # number of the network's own points, for the reprojection
DESCRIBED = 512  # number of labels of a pair whose descriptors are compared
CLOSE = 3.0  # pixels: largest distance of own points of both views that are the same point of the scene
TEMPERATURE = 0.07


class Outputs(NamedTuple):
    """Logits (B, 65, H/8, W/8) and unit descriptors (B, D, H/8, W/8), float32."""

    logits: Tensor
    descriptors: Tensor


def run(model: SuperPoint, images: Tensor) -> Outputs:
    """Compute the network's two maps; convolutions run in the precision of autocast."""
    features = model.encoder(images)
    decoder = model.keypoint_decoder
    logits = decoder.conv_score_b(F.relu(decoder.conv_score_a(features)))
    return Outputs(logits.float(), model.descriptor_decoder(features).float())


def probabilities(logits: Tensor) -> Tensor:
    """Return for each pixel the probability (B, H, W) that it is its cell's point."""
    return F.pixel_shuffle(logits.softmax(dim=1)[:, :-1], CELL)[:, 0]


class Labels(NamedTuple):
    """The same points of the scene in both views, (B, N, 2) each, and which of them are valid, (B, N).

    ``covered``: for each view (B, H/8, W/8) bool, the cells with known ground truth.
    """

    points: tuple[Tensor, Tensor]
    valid: Tensor
    covered: tuple[Tensor, Tensor]


@torch.no_grad()
def consensus(maps: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], geometry: Geometry, corners: float) -> Labels:
    """Find points on whose position the two maps (B, H, W) of probabilities agree.

    Args:
        images: (B, 1, H, W) the views without degradation.
        corners: weight of the smaller eigenvalue of the structure tensor relative to the maps, as its exponent.
    """
    first, second = (_blur(each[:, None], 1.0) for each in maps)
    if corners > 0:
        first, second = (each * _cornerness(image) ** corners for each, image in zip((first, second), images))
    batch, _, height, width = first.shape
    x, y = (torch.arange(n, device=first.device, dtype=torch.float32) for n in (width, height))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2).expand(batch, -1, -1)
    places, state = geometry.places(grid, 0)
    seen = (state == VISIBLE).view(batch, 1, height, width)
    common = (first * _at(second, places).view_as(first)).clamp(min=0).sqrt() * seen
    inner = torch.zeros_like(common)
    inner[:, :, BORDER:-BORDER, BORDER:-BORDER] = 1
    common = common * inner
    size = 2 * APART + 1
    maxima = (common == F.max_pool2d(common, size, stride=1, padding=APART)) & (common > LEAST)
    best, index = (common * maxima).view(batch, -1).topk(POINTS, dim=1)
    share = seen.float().mean(dim=(1, 2, 3))
    rank = torch.arange(POINTS, device=best.device)
    valid = (best > 0) & (rank < (share * POINTS)[:, None])
    points = torch.stack([index % width, index // width], dim=-1).float() + _peak_offset(common, index)
    there, state = geometry.places(points, 0)
    valid &= (state == VISIBLE) & ((there > BORDER) & (there < there.new_tensor((width, height)) - 1 - BORDER)).all(
        dim=-1
    )
    middles = _cell_middles(height, width, first.device).expand(batch, -1, -1)
    back = geometry.places(middles, 1)[1]
    covered0 = F.avg_pool2d(seen.float(), CELL)[:, 0] > 0.5
    covered1 = (back == VISIBLE).view(batch, height // CELL, width // CELL)
    return Labels((points, there), valid, (covered0, covered1))


def _cell_middles(height: int, width: int, device: torch.device) -> Tensor:
    x, y = (torch.arange(n // CELL, device=device) * CELL + (CELL - 1) / 2 for n in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(1, -1, 2)


def _at(maps: Tensor, points: Tensor) -> Tensor:
    """Sample (B, 1, H, W) bilinearly at points (B, N, 2): (B, N)."""
    limits = points.new_tensor(maps.shape[:1:-1]) - 1
    grid = (points / limits * 2 - 1)[:, None]
    return F.grid_sample(maps, grid, align_corners=True, padding_mode="zeros")[:, 0, 0]


def _blur(x: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    axis = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = (-axis.square() / (2 * sigma**2)).exp()
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))


def _cornerness(image: Tensor) -> Tensor:
    """The structure tensor's smaller eigenvalue (Shi and Tomasi, CVPR 1994), relative to the contrast around."""
    dx = F.pad(image[..., 2:] - image[..., :-2], (1, 1, 0, 0))
    dy = F.pad(image[..., 2:, :] - image[..., :-2, :], (0, 0, 1, 1))
    xx, yy, xy = (_blur(each, 1.2) for each in (dx * dx, dy * dy, dx * dy))
    smaller = (xx + yy) / 2 - (((xx - yy) / 2).square() + xy.square()).sqrt()
    contrast = _blur(xx + yy, 6.0)
    return smaller.clamp(min=0) / (contrast + 1e-3) + 1e-3


def _peak_offset(common: Tensor, index: Tensor) -> Tensor:
    """Subpixel offset (B, N, 2) of a maximum, by a parabola through the logarithms of three values."""
    width = common.shape[3]
    logs = (common.flatten(1) + 1e-9).log()
    index = index.clamp(width, logs.shape[1] - width - 1)  # without any maximum the index is 0
    middle = logs.gather(1, index)
    offsets = []
    for step in (1, width):
        before, after = logs.gather(1, index - step), logs.gather(1, index + step)
        bend = (2 * middle - before - after).clamp(min=1e-3)
        offsets.append(((after - before) / (2 * bend)).clamp(-0.5, 0.5))
    return torch.stack(offsets, dim=-1)


def detector_loss(logits: Tensor, points: Tensor, valid: Tensor, covered: Tensor) -> Tensor:
    """Cross entropy over the 65 classes of each covered cell.

    The target of a point between four pixels is shared bilinearly by them. The rest of a cell's probability is the
    class "no point".
    """
    batch, _, rows, columns = logits.shape
    height, width = rows * CELL, columns * CELL
    low = points.floor()
    part = points - low
    target = torch.zeros(batch, height * width, device=logits.device)
    for i in (0, 1):
        for j in (0, 1):
            x, y = low[..., 0].long() + i, low[..., 1].long() + j
            weight = (part[..., 0] if i else 1 - part[..., 0]) * (part[..., 1] if j else 1 - part[..., 1])
            inside = valid & (x >= 0) & (y >= 0) & (x < width) & (y < height)
            target.scatter_add_(1, (y * width + x).clamp(0, height * width - 1), weight * inside)
    cells = F.pixel_unshuffle(target.view(batch, 1, height, width), CELL)
    mass = cells.sum(dim=1, keepdim=True)
    cells = torch.cat([cells / mass.clamp(min=1), (1 - mass).clamp(min=0)], dim=1)
    entropy = -(cells * logits.log_softmax(dim=1)).sum(dim=1)
    return (entropy * covered).sum() / covered.sum().clamp(min=1)


def own_points(maps: Tensor, count: int, radius: int = 2) -> Tensor:
    """Return the ``count`` best maxima (B, N, 2) of maps (B, H, W), refined to subpixel positions, with gradients."""
    _, height, width = maps.shape
    size = 2 * radius + 1
    flat = maps.detach()[:, None]
    peaks = flat * (flat == F.max_pool2d(flat, size, stride=1, padding=radius))
    inner = torch.zeros_like(peaks)
    inner[:, :, BORDER:-BORDER, BORDER:-BORDER] = 1
    index = (peaks * inner).flatten(1).topk(count, dim=1).indices
    return soft_maximum(maps, index, radius)


def soft_maximum(maps: Tensor, index: Tensor, radius: int = 2) -> Tensor:
    """Refine the flat ``index`` (B, N) in maps (B, H, W) to subpixel positions (B, N, 2), with gradients."""
    width = maps.shape[2]
    return read_out(maps, torch.stack([index % width, index // width], dim=-1).float(), radius)


def reprojection_loss(points: tuple[Tensor, Tensor], geometry: Geometry) -> Tensor:
    """Mean distance in pixels of mutually nearest points that are close to each other's position."""
    total, count = torch.zeros((), device=points[0].device), torch.zeros((), device=points[0].device)
    there, state0 = geometry.places(points[0], 0)
    back, state1 = geometry.places(points[1], 1)
    away = torch.full((), 1e4, device=there.device)
    with torch.no_grad():
        forth = torch.cdist(there, points[1])
        forth = torch.where((state0 == VISIBLE)[:, :, None] & (state1 == VISIBLE)[:, None], forth, away)
        best0, best1 = forth.argmin(dim=2), forth.argmin(dim=1)
        mutual = are_mutual(best0, best1)
        near = mutual & (forth.amin(dim=2) < CLOSE)
    pick = best0[..., None].expand(-1, -1, 2)
    for distance in (there - points[1].gather(1, pick), points[0] - back.gather(1, pick)):
        length = (distance.square().sum(dim=-1) + 1e-4).sqrt()
        total = total + torch.where(near, length, 0.0).sum()
        count = count + near.sum()
    return total / count.clamp(min=1)


def descriptor_loss(draw: torch.Generator, descriptors: tuple[Tensor, Tensor], labels: Labels) -> Tensor:
    """Cross entropy over the points of the other view, in both directions."""
    valid = labels.valid
    # DESCRIBED random points.
    lots = torch.rand(valid.shape, generator=draw, device=valid.device)
    order = torch.where(valid, lots, -1.0).topk(DESCRIBED, dim=1).indices
    valid = valid.gather(1, order)
    pick = order[..., None].expand(-1, -1, 2)
    sampled = [sample_descriptors(d, p.gather(1, pick)) for d, p in zip(descriptors, labels.points)]
    similarity = sampled[0] @ sampled[1].transpose(1, 2) / TEMPERATURE
    # Points within a few pixels share most of their patch, so they are not used as negatives of each other.
    place = labels.points[0].gather(1, pick)
    neighbours = torch.cdist(place, place) < 6
    neighbours.diagonal(dim1=1, dim2=2).fill_(False)
    similarity = similarity.masked_fill(neighbours | ~(valid[:, :, None] & valid[:, None]), -1e4)
    positive = similarity.diagonal(dim1=1, dim2=2)
    loss = similarity.logsumexp(dim=2) + similarity.logsumexp(dim=1) - 2 * positive
    return torch.where(valid, loss, 0.0).sum() / (2 * valid.sum().clamp(min=1))


def losses(
    draw: torch.Generator, outputs: tuple[Outputs, Outputs], labels: Labels, geometry: Geometry
) -> dict[str, Tensor]:
    """Return the loss ``total`` and its parts, from the maps of both degraded views."""
    parts = {
        "points": sum(
            detector_loss(out.logits, points, labels.valid, covered)
            for out, points, covered in zip(outputs, labels.points, labels.covered)
        )
        / 2,
        "reprojection": reprojection_loss(
            tuple(own_points(probabilities(out.logits), CANDIDATES) for out in outputs),
            geometry,  # type: ignore[arg-type]
        ),
        "descriptors": descriptor_loss(draw, (outputs[0].descriptors, outputs[1].descriptors), labels),
    }
    parts["total"] = parts["points"] + 0.3 * parts["reprojection"] + parts["descriptors"]
    return parts


@torch.no_grad()
def found_again(maps: tuple[Tensor, Tensor], geometry: Geometry, count: int = 512) -> dict[str, float]:
    """Share of points repeated within 1 and 3 pixels; the figures called ``whole`` are for points at whole pixels."""
    figures: dict[str, float] = {}
    refined = [own_points(each, count) for each in maps]
    for name, points in (("", refined), ("whole ", [p.round() for p in refined])):
        there, state = geometry.places(points[0], 0)
        distance = torch.cdist(there, points[1]).amin(dim=2)
        visible = state == VISIBLE
        for limit in (1, 3):
            figures[f"{name}{limit} px"] = float(((distance < limit) & visible).sum() / visible.sum().clamp(min=1))
    return figures


__all__ = ["Labels", "Outputs", "consensus", "found_again", "losses", "probabilities", "run"]
