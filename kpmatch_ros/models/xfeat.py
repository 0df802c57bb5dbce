"""XFeat: a network small enough for processors, with a separate keypoint detector that works on single pixels.

Potje, Cadar, Araujo, Martins, Nascimento: XFeat: Accelerated Features for Lightweight Image Matching, CVPR 2024
(arXiv:2404.19174). This module implements the sparse variant.
"""

from __future__ import annotations

import re
from typing import Any, cast

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
    vector,
)

__all__ = ["XFeat"]

CELL = 8  # pixels of the image for each feature
MULTIPLE = 32  # the sides of the network's input are multiples of this, the stride of the coarsest features

# For each convolution of the backbone: inputs, outputs, kernel size, stride.
_BACKBONE = (
    ((1, 4, 3, 1), (4, 8, 3, 2), (8, 8, 3, 1), (8, 24, 3, 2)),
    ((24, 24, 3, 1), (24, 24, 3, 1)),
    ((24, 64, 3, 2), (64, 64, 3, 1), (64, 64, 1, 1)),
    ((64, 64, 3, 2), (64, 64, 3, 1), (64, 64, 3, 1)),
    ((64, 128, 3, 2), (128, 128, 3, 1), (128, 128, 3, 1), (128, 64, 1, 1)),
)
_FUSION = ((64, 64, 3, 1), (64, 64, 3, 1), (64, 64, 1, 1))
_RELIABILITY = ((64, 64, 1, 1), (64, 64, 1, 1), (64, 1, 1, 1))
_KEYPOINTS = ((64, 64, 1, 1), (64, 64, 1, 1), (64, 64, 1, 1), (64, 65, 1, 1))


class Convolutions(nn.ModuleList):
    """Convolutions in sequence, each followed by a ReLU, the last one only if ``rectified``."""

    def __init__(self, layers: tuple[tuple[int, int, int, int], ...], rectified: bool) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2)
            for inputs, outputs, size, stride in layers
        )
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self):
            # A layer may have another precision than the one before, see XFeat.to_precision.
            x = conv(x.to(cast(Tensor, conv.weight).dtype))
            if self.rectified or number < len(self) - 1:
                x = F.relu(x, inplace=True)
        return x


class XFeat(Extractor):
    """Detector and descriptor. Build it with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`: the selection of keypoints. ``keypoint_threshold`` is the lowest
            value in the keypoint heatmap. A keypoint's score is that value times the reliability at its position.
    """

    MODEL_TYPE = "xfeat"
    CHANNELS = 3  # colour images, of which the network sees the mean of the three channels
    RESOLUTION = 1.0  # keypoints are whole pixels
    DEFAULTS = {
        "descriptor_dim": 64,
        "keypoint_threshold": 0.05,
        "max_keypoints": -1,
        "nms_radius": 2,
        "border_removal_distance": 1,
    }

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        size = _FUSION[-1][1]
        self.require("descriptor_dim", self.descriptor_size == size, f"{size}")
        self.skip = nn.Conv2d(1, 24, 1)
        self.backbone = nn.ModuleList(Convolutions(layers, rectified=True) for layers in _BACKBONE)
        self.fusion = Convolutions(_FUSION, rectified=False)
        self.reliability_head = Convolutions(_RELIABILITY, rectified=False)
        self.keypoint_head = Convolutions(_KEYPOINTS, rectified=False)
        self.requires_grad_(False).eval()

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate the authors' checkpoint into this module's parameter names."""
        return _from_authors(checkpoint) if "heatmap_head.2.weight" in checkpoint.tensors else checkpoint

    @property
    def dtype(self) -> torch.dtype:
        return self.fusion[0].weight.dtype  # type: ignore[return-value]

    def to_precision(self, dtype: torch.dtype) -> XFeat:
        """Convert the weights, except those that influence the keypoints most.

        8 bits of mantissa cannot distinguish neighbouring grey values, so layers that read pixels stay float32.
        """
        precise = {self.backbone[0][0], self.skip, *self.keypoint_head, self.reliability_head[-1]}  # type: ignore[index]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in precise:
                module.to(dtype)
        return self

    def forward(self, image: Tensor, allowed: Tensor | None = None) -> Detections:
        """See :meth:`Extractor.forward`.

        As in the authors' code, an image whose sides are not multiples of 32 is scaled down to such sides.
        """
        batch, _, height, width = image.shape
        rows, columns = height // MULTIPLE * MULTIPLE, width // MULTIPLE * MULTIPLE
        if min(rows, columns) == 0:
            return Detections.none(batch, self.descriptor_size, image.device)
        grey = image.mean(dim=1, keepdim=True)
        if (rows, columns) != (height, width):
            grey = F.interpolate(grey, (rows, columns), mode="bilinear", align_corners=False)
            if allowed is not None:
                seen = F.interpolate(allowed[:, None].float(), (rows, columns), mode="bilinear", align_corners=False)
                allowed = seen[:, 0] > 0.999  # all pixels that contribute must be allowed
        features, heat, reliability = self._look(grey)
        maxima = suppress_non_maxima(heat, self.nms_radius, again=0) * (heat > self.keypoint_threshold)
        maxima = clear_masked(clear_border(maxima, self.border), allowed)
        scores = maxima * _between(reliability, _every_pixel(heat), "bilinear")[:, 0]
        keypoints, scores, mask = select_keypoints(scores, 0.0, self.max_keypoints, self.round_up)
        descriptors = F.normalize(_between(features, keypoints[:, None], "bicubic")[:, :, 0], dim=1).transpose(1, 2)
        scale = vector(width / columns, height / rows, like=keypoints)
        keypoints = ((keypoints + 0.5) * scale - 0.5) * mask[..., None]
        return Detections(keypoints, scores, descriptors, mask, are_finite(heat) & are_finite(reliability))

    def _look(self, grey: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit features (B, 64, H/8, W/8), keypoint heatmap (B, H, W) and reliability (B, 1, H/8, W/8)."""
        grey = F.instance_norm(grey)
        x = self.backbone[0](grey)
        skipped = self.skip(F.avg_pool2d(grey, 4).to(self.skip.weight.dtype))
        x = self.backbone[1](x + skipped.to(x.dtype))
        x3 = self.backbone[2](x)
        x4 = self.backbone[3](x3)
        x5 = self.backbone[4](x4)
        coarse = [F.interpolate(each, x3.shape[-2:], mode="bilinear", align_corners=False) for each in (x4, x5)]
        features = self.fusion(x3 + coarse[0] + coarse[1])
        # float32 from here on: in half precision neighbouring scores become equal, and neither is a strict maximum.
        heat = self.keypoint_head(F.pixel_unshuffle(grey, CELL)).float().softmax(dim=1)[:, :-1]
        reliability = self.reliability_head(features).float().sigmoid()
        return F.normalize(features.float(), dim=1), F.pixel_shuffle(heat, CELL)[:, 0], reliability


def _every_pixel(heat: Tensor) -> Tensor:
    """Return x, y of all pixels of a heatmap (B, H, W), as (B, H, W, 2)."""
    y, x = (torch.arange(size, device=heat.device, dtype=heat.dtype) for size in heat.shape[1:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).expand(len(heat), -1, -1, -1)


def _between(values: Tensor, positions: Tensor, mode: str) -> Tensor:
    """Sample a map (B, C, H/8, W/8) at positions (B, R, N, 2), x and y in pixels: (B, C, R, N).

    As in the authors' code, with which the weights were trained, the first and the last pixel are placed on the outer
    edges of the map's cells. This is half a pixel off at the sides and correct in the middle.
    """
    far = vector(values.shape[-1] * CELL - 1, values.shape[-2] * CELL - 1, like=positions)
    return F.grid_sample(values, positions / far * 2 - 1, mode=mode, align_corners=False)


def _from_authors(checkpoint: Checkpoint) -> Checkpoint:
    """Convert the authors' file (verlab/accelerated_features) to this module's names, and fold batch norms.

    Their fine matcher is only for the semi-dense variant, and is left out.
    """
    theirs = {name: tensor.float() for name, tensor in checkpoint.tensors.items()}
    names = {f"block{i + 1}": f"backbone.{i}" for i in range(len(_BACKBONE))}
    names |= {"block_fusion": "fusion", "heatmap_head": "reliability_head", "keypoint_head": "keypoint_head"}
    tensors = {f"skip.{kind}": theirs[f"skip1.1.{kind}"] for kind in ("weight", "bias")}
    for name, tensor in theirs.items():
        found = re.fullmatch(r"(\w+)\.(\d+)(\.layer\.0)?\.weight", name)
        if not found or found[1] not in names:
            continue
        ours = f"{names[found[1]]}.{found[2]}"
        if found[3]:
            norm = f"{found[1]}.{found[2]}.layer.1"
            mean, variance = theirs[f"{norm}.running_mean"], theirs[f"{norm}.running_var"]
            fused = fuse_conv_bn_weights(tensor, None, mean, variance, 1e-5, None, None)
            tensors[f"{ours}.weight"], tensors[f"{ours}.bias"] = fused
        else:
            tensors[f"{ours}.weight"], tensors[f"{ours}.bias"] = tensor, theirs[f"{found[1]}.{found[2]}.bias"]
    return Checkpoint({"model_type": "xfeat", **checkpoint.config}, tensors, checkpoint.source)
