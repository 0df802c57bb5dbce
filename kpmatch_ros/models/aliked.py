"""ALIKED: a light network with subpixel keypoints, and descriptors sampled at learned, deformable positions.

Zhao, Wu, Chen, Chen, Xu, Li: ALIKED: A Lighter Keypoint and Descriptor Extraction Network via Deformable
Transformation, IEEE Transactions on Instrumentation and Measurement 2023 (arXiv:2304.03608).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kpmatch_ros.models.base import Extractor
from kpmatch_ros.models.checkpoint import Checkpoint
from kpmatch_ros.models.detections import (
    Detections,
    are_finite,
    clear_border,
    clear_masked,
    select_keypoints,
    suppress_non_maxima,
    unless_masked,
    vector,
    within_border,
)

__all__ = ["ALIKED"]

STRIDES = (1, 2, 8, 32)  # pixels between neighbouring features, for each level
SMALLEST = 8  # pixels: a narrower or lower image has no keypoints


class DeformableConv(nn.Module):
    """A 3 x 3 convolution whose nine taps have learned, input-dependent offsets (Dai et al., ICCV 2017)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.offset_conv = nn.Conv2d(inputs, 2 * 9, 3, padding=1)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        furthest = max(height, width) / 4
        # Positions in float32: half precision cannot distinguish neighbouring pixels.
        offsets = self.offset_conv(x).float().clamp(-furthest, furthest).unflatten(1, (9, 2))  # y, then x
        taps = torch.arange(9, device=x.device)[:, None, None]
        rows = torch.arange(height, device=x.device)[:, None] + torch.div(taps, 3, rounding_mode="floor") - 1
        columns = torch.arange(width, device=x.device) + taps % 3 - 1
        grid = (
            torch.stack([(offsets[:, :, 1] + columns) * 2 + 1, (offsets[:, :, 0] + rows) * 2 + 1], dim=-1)
            / grid_size(x)
            - 1
        )
        samples = F.grid_sample(x.float(), grid.flatten(1, 2), align_corners=False)  # zero outside, like zero padding
        samples = samples.unflatten(2, (9, height)).flatten(1, 2).to(x.dtype)
        return F.conv2d(samples, self.conv.weight.flatten(1)[:, :, None, None], self.conv.bias)


def grid_size(x: Tensor) -> Tensor:
    """Width and height of a map (..., H, W)."""
    return vector(x.shape[-1], x.shape[-2], like=x.new_empty((), dtype=torch.float32))


class Block(nn.Module):
    """Two convolutions, deformable or not; with ``shortcut``, a third one connects input and output."""

    def __init__(self, inputs: int, outputs: int, deformable: bool, shortcut: bool) -> None:
        super().__init__()

        def conv(channels: int) -> nn.Module:
            return DeformableConv(channels, outputs) if deformable else nn.Conv2d(channels, outputs, 3, padding=1)

        self.conv_a = conv(inputs)
        self.conv_b = conv(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_b(F.selu(self.conv_a(x), inplace=True))
        return F.selu(y if self.shortcut is None else y + self.shortcut(x), inplace=True)


class Encoder(nn.Module):
    """Computes features at four scales, each (B, dim / 4, H / stride, W / stride), from an image (B, 3, H, W)."""

    def __init__(self, sizes: list[int], dim: int) -> None:
        super().__init__()
        inputs = [3, *sizes[:-1]]
        self.blocks = nn.ModuleList(
            Block(inputs[i], sizes[i], deformable=i >= 2, shortcut=i >= 1) for i in range(len(sizes))
        )
        self.projections = nn.ModuleList(nn.Conv2d(size, dim // 4, 1, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        stride = 1
        for block, projection, next_stride in zip(self.blocks, self.projections, STRIDES):
            if next_stride > stride:
                x = F.avg_pool2d(x, next_stride // stride)
            stride = next_stride
            x = block(x)
            levels.append(F.selu(projection(x), inplace=True))
        return levels


class ScoreHead(nn.Module):
    """Computes the score of each pixel from the features of all scales."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 8, 1, bias=False)
        sizes = [8, 4, 4, 1]
        self.convs = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False) for inputs, outputs in zip(sizes[:-1], sizes[1:])
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Return the scores (B, H, W) in [0, 1] of the padded image."""
        # Bilinear upsampling and a 1 x 1 convolution commute: 8 channels are upsampled instead of 128. In float32: in
        # half precision neighbouring scores become equal, and suppression and refinement need their differences.
        parts = self.reduction.weight.split([level.shape[1] for level in levels], dim=1)
        x = torch.stack(
            [
                F.interpolate(F.conv2d(level, part).float(), levels[0].shape[-2:], mode="bilinear", align_corners=True)
                for level, part in zip(levels, parts)
            ]
        ).sum(dim=0)
        for conv in self.convs:
            x = F.conv2d(F.selu(x), conv.weight.float(), padding=1)  # type: ignore[arg-type,operator]
        return x.sigmoid()[:, 0]


@dataclass
class FeatureMap:
    """One unit vector for each pixel, computed on request: a thousand keypoints need only a quarter of them.

    Attributes:
        levels: features at four scales of the padded image.
        padding: columns of padding at the left, rows of padding at the top.
        width: width of the image without padding, pixels.
        height: height of the image without padding, pixels.
    """

    levels: list[Tensor]
    padding: tuple[int, int]
    width: int
    height: int

    def at(self, pixels: Tensor) -> Tensor:
        """Return the vectors (B, P, C) at pixels (B, P, 2), whole x, y."""
        far_corner = grid_size(self.levels[0]) - 1
        grid = (pixels + vector(*self.padding, like=pixels)) / far_corner * 2 - 1
        samples = [F.grid_sample(level.float(), grid[:, None], align_corners=True)[:, :, 0] for level in self.levels]
        return F.normalize(torch.cat(samples, dim=1), dim=1).transpose(1, 2)

    def between(self, positions: Tensor) -> Tensor:
        """Return the vectors (B, P, C) at positions (B, P, 2) x, y; bilinear, zero outside the image."""
        first = positions.floor()
        size = vector(self.width, self.height, like=positions)
        total = positions.new_zeros(())
        for x in (0, 1):
            for y in (0, 1):
                pixels = first + vector(x, y, like=positions)
                inside = ((pixels >= 0) & (pixels < size)).all(dim=-1)
                weights = (1 - (positions - pixels).abs()).prod(dim=-1) * inside
                total = total + self.at(torch.minimum(pixels.clamp(min=0), size - 1)) * weights[..., None]
        return total


class DescriptorHead(nn.Module):
    """Describes a keypoint with features at positions that the features around it select (SDDH, section III-C)."""

    def __init__(self, dim: int, samples: int) -> None:
        super().__init__()
        self.offset_a = nn.Linear(9 * dim, 2 * samples)
        self.offset_b = nn.Linear(2 * samples, 2 * samples)
        self.feature = nn.Linear(dim, dim, bias=False)
        self.aggregation = nn.Linear(samples * dim, dim, bias=False)

    def forward(self, features: FeatureMap, keypoints: Tensor) -> Tensor:
        """Return unit descriptors (B, N, dim) at keypoints (B, N, 2), pixels."""
        batch, count = keypoints.shape[:2]
        furthest = max(features.width, features.height) / 4
        # The 3 x 3 pixels around the keypoint, moved inside the image at its border. As in the authors' code, the last
        # row and column are never used.
        limit = vector(features.width - 4, features.height - 4, like=keypoints)
        corner = torch.minimum((keypoints.floor() - 1).clamp(min=0), limit)
        taps = torch.arange(9, device=keypoints.device)
        patch = corner[:, :, None] + torch.stack([taps % 3, torch.div(taps, 3, rounding_mode="floor")], dim=-1)
        around = features.at(patch.flatten(1, 2)).unflatten(1, (count, 9)).flatten(2)
        dtype = self.offset_a.weight.dtype
        offsets = self.offset_b(F.selu(self.offset_a(around.to(dtype)))).float().clamp(-furthest, furthest)
        offsets = offsets.unflatten(2, (2, -1)).transpose(2, 3)  # (B, N, samples, 2)
        sampled = features.between((keypoints[:, :, None] + offsets).flatten(1, 2)).to(dtype)
        samples = F.selu(self.feature(sampled)).reshape(batch, count, self.aggregation.in_features)
        described = self.aggregation(samples)
        return F.normalize(described.float(), dim=-1)


class ALIKED(Extractor):
    """Detector and descriptor. Build it with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`: the channels of the four scales (``encoder_sizes``) and of the
            descriptor, the number of ``samples`` of a descriptor, and the selection of keypoints.

    Attributes:
        border: see :class:`Extractor`. The configured border applies to the peaks before refinement, as in the authors'
            code, so that a keypoint may be about a pixel nearer to the sides. Any other value also applies after it.
    """

    MODEL_TYPE = "aliked"
    CHANNELS = 3  # colour images
    RESOLUTION = 0.0  # keypoints are fractions of a pixel
    DEFAULTS = {
        "encoder_sizes": [16, 32, 64, 128],
        "descriptor_dim": 128,
        "samples": 16,
        "keypoint_threshold": 0.2,
        "max_keypoints": -1,
        "nms_radius": 2,
        "refinement_radius": 2,
        "border_removal_distance": 2,
    }

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        sizes, dim = list(self.config["encoder_sizes"]), self.config["descriptor_dim"]
        self.require("encoder_sizes", len(sizes) == len(STRIDES), f"{len(STRIDES)} numbers, one for each scale")
        self.require("descriptor_dim", dim % len(STRIDES) == 0, f"a multiple of {len(STRIDES)}, of equal parts")
        self.encoder = Encoder(sizes, dim)
        self.score_head = ScoreHead(dim)
        self.descriptor_head = DescriptorHead(dim, self.config["samples"])
        # The authors' code has one radius for suppression and refinement, but the scores were trained for 2. Refinement
        # with a radius of 4 loses 7 % of the correct matches.
        self.refinement_radius: int = self.config["refinement_radius"]
        self.requires_grad_(False).eval()

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate the authors' checkpoint into this module's configuration and parameter names."""
        if "desc_head.agg_weights" not in checkpoint.tensors:
            return checkpoint
        return _from_authors(checkpoint)

    @property
    def dtype(self) -> torch.dtype:
        return self.score_head.reduction.weight.dtype

    def forward(self, image: Tensor, allowed: Tensor | None = None) -> Detections:
        batch, _, height, width = image.shape
        if min(height, width) < SMALLEST:
            return Detections.none(batch, self.descriptor_size, image.device)
        padded, padding = pad_to_multiple(image.expand(-1, 3, -1, -1).to(self.dtype), STRIDES[-1])
        levels = self.encoder(padded)
        left, top = padding
        scores = self.score_head(levels)[:, top : top + height, left : left + width]
        peaks = clear_border(suppress_non_maxima(scores, self.nms_radius), self.border)
        peaks = clear_masked(peaks, allowed)
        keypoints, _, mask = select_keypoints(peaks, self.keypoint_threshold, self.max_keypoints, self.round_up)
        finite = are_finite(scores)
        if keypoints.shape[1] == 0:
            return Detections.none(batch, self.descriptor_size, image.device)._replace(finite=finite)
        refined, refined_scores = refine(scores, keypoints, self.refinement_radius)
        if self.border != self.config["border_removal_distance"]:
            refined = within_border(refined, scores, self.border)
        keypoints = unless_masked(refined, keypoints, allowed)
        scores, order = refined_scores.masked_fill(~mask, -1.0).sort(dim=1, descending=True)
        mask = mask.gather(1, order)
        scores = scores * mask
        keypoints = keypoints.gather(1, order[..., None].expand_as(keypoints)) * mask[..., None]
        descriptors = self.descriptor_head(FeatureMap(levels, padding, width, height), keypoints)
        return Detections(keypoints, scores, descriptors, mask, finite)


def pad_to_multiple(image: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Replicate an image's outermost pixels on all sides until width and height are multiples of ``multiple``.

    Returns:
        the padded image, and the number of columns added at the left and of rows added at the top.
    """
    extra_height, extra_width = (-size % multiple for size in image.shape[-2:])
    left, top = extra_width // 2, extra_height // 2
    return F.pad(image, (left, extra_width - left, top, extra_height - top), mode="replicate"), (left, top)


def refine(scores: Tensor, keypoints: Tensor, radius: int, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """Refine keypoints to the softmax-weighted centre of the scores around them (DKD, section III-B).

    Args:
        scores: (B, H, W).
        keypoints: (B, N, 2) x, y of the peaks, whole pixels.
        radius: radius of the square of scores around a peak, pixels.
        temperature: temperature of the softmax: with a smaller one, the highest scores weigh more.

    Returns:
        keypoints (B, N, 2), and the scores (B, N) at their refined positions.
    """
    padded = F.pad(scores, (radius, radius, radius, radius))
    steps = torch.arange(2 * radius + 1, device=scores.device)
    shift_y, shift_x = (shift.flatten() for shift in torch.meshgrid(steps, steps, indexing="ij"))
    whole = keypoints.long()
    index = (whole[..., 1:] + shift_y) * padded.shape[-1] + whole[..., :1] + shift_x  # (B, N, window)
    window = padded.flatten(1).gather(1, index.flatten(1)).view_as(index)
    shares = (window / temperature).softmax(dim=-1)
    shifts = torch.stack([shift_x, shift_y], dim=-1).float() - radius
    keypoints = keypoints + shares @ shifts
    grid = (keypoints * 2 + 1) / grid_size(scores) - 1
    return keypoints, F.grid_sample(scores[:, None], grid[:, None], align_corners=False)[:, 0, 0]


def _from_authors(checkpoint: Checkpoint) -> Checkpoint:
    """Convert the authors' ``.pth`` (Shiaoming/ALIKED) to this module's names, and fold the batch norms."""
    theirs = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    tensors: dict[str, Tensor] = {}
    for block in range(4):
        ours = f"encoder.blocks.{block}"
        for layer, new in (("1", "conv_a"), ("2", "conv_b")):
            conv, norm = f"block{block + 1}.conv{layer}", f"block{block + 1}.bn{layer}"
            target = f"{ours}.{new}"
            if f"{conv}.regular_conv.weight" in theirs:
                for kind in ("weight", "bias"):
                    tensors[f"{target}.offset_conv.{kind}"] = theirs[f"{conv}.offset_conv.{kind}"]
                conv, target = f"{conv}.regular_conv", f"{target}.conv"
            mean, variance = theirs[f"{norm}.running_mean"], theirs[f"{norm}.running_var"]
            tensors[f"{target}.weight"], tensors[f"{target}.bias"] = fuse_conv_bn_weights(
                theirs[f"{conv}.weight"], None, mean, variance, 1e-5, theirs[f"{norm}.weight"], theirs[f"{norm}.bias"]
            )
        if block > 0:
            for kind in ("weight", "bias"):
                tensors[f"{ours}.shortcut.{kind}"] = theirs[f"block{block + 1}.downsample.{kind}"]
        tensors[f"encoder.projections.{block}.weight"] = theirs[f"conv{block + 1}.weight"]
    tensors["score_head.reduction.weight"] = theirs["score_head.0.weight"]
    for i in range(3):
        tensors[f"score_head.convs.{i}.weight"] = theirs[f"score_head.{2 * i + 2}.weight"]
    aggregation = theirs["desc_head.agg_weights"]  # (samples, in, out)
    tensors["descriptor_head.aggregation.weight"] = aggregation.flatten(0, 1).T
    # A pixel's channels are adjacent here; in the authors' file, a channel's pixels.
    tensors["descriptor_head.offset_a.weight"] = theirs["desc_head.offset_conv.0.weight"].permute(0, 2, 3, 1).flatten(1)
    tensors["descriptor_head.offset_a.bias"] = theirs["desc_head.offset_conv.0.bias"]
    tensors["descriptor_head.offset_b.weight"] = theirs["desc_head.offset_conv.2.weight"].flatten(1)
    tensors["descriptor_head.offset_b.bias"] = theirs["desc_head.offset_conv.2.bias"]
    tensors["descriptor_head.feature.weight"] = theirs["desc_head.sf_conv.weight"].flatten(1)
    config = {
        "model_type": "aliked",
        "encoder_sizes": [tensors[f"encoder.projections.{block}.weight"].shape[1] for block in range(4)],
        "descriptor_dim": aggregation.shape[2],
        "samples": aggregation.shape[0],
    }
    return Checkpoint({**config, **checkpoint.config}, tensors, checkpoint.source)
