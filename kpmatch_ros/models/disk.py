"""DISK: a U-Net that computes a score and a descriptor for every pixel, trained by reinforcement learning.

Tyszkiewicz, Fua, Trulls: DISK: Learning local features with policy gradient, NeurIPS 2020 (arXiv:2006.13566).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.models.base import Extractor
from kpmatch_ros.models.checkpoint import Checkpoint
from kpmatch_ros.models.detections import Detections, are_finite, clear_border, clear_masked, select_keypoints

__all__ = ["DISK"]


class Conv(nn.Module):
    """Instance norm, PReLU and a convolution. Without ``gated``, only the convolution."""

    def __init__(self, inputs: int, outputs: int, size: int, gated: bool = True) -> None:
        super().__init__()
        self.gate = nn.PReLU(inputs) if gated else None
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.gate is None else activate(x, self.gate))


def activate(x: Tensor, gate: nn.PReLU) -> Tensor:
    """Normalise each channel of each image to mean 0 and variance 1, then apply PReLU."""
    # F.instance_norm would copy channels-last tensors twice. Mean and variance are computed for each row first and then
    # over all rows, because a single sum over all pixels loses precision.
    mean = x.permute(0, 2, 3, 1).mean(dim=2, dtype=torch.float32).mean(dim=1)
    centred = x - mean[:, :, None, None].to(x.dtype)
    norms = torch.linalg.vector_norm(centred.permute(0, 2, 3, 1), dim=2, dtype=torch.float32)
    scale = (norms.square().mean(dim=1) / x.shape[3] + 1e-5).rsqrt()
    return gate(centred.mul_(scale[:, :, None, None].to(x.dtype)))


class Head(nn.Module):
    """The last layer: scores of all pixels, and descriptors of selected pixels.

    In the authors' code one convolution computes both for every pixel. That is 80 % of all the work, and nearly all of
    it is for descriptors that are not used.
    """

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.gate = nn.PReLU(inputs)
        self.score = nn.Conv2d(inputs, 1, size, padding=size // 2)
        self.descriptor = nn.Conv2d(inputs, outputs, size)

    def scores(self, x: Tensor) -> Tensor:
        """Compute the scores (B, H, W) from activated features (B, C, H, W)."""
        # In float32: in half precision neighbouring scores become equal, and then neither of them is a strict maximum.
        weight, bias = (parameter.float() for parameter in self.score.parameters())
        return F.conv2d(x.float(), weight, bias, padding=self.score.padding)[:, 0]

    def descriptors(self, x: Tensor, keypoints: Tensor) -> Tensor:
        """Compute unit descriptors (B, N, D) at keypoints (B, N, 2), whole pixels x, y."""
        (height, width), size = x.shape[-2:], self.descriptor.kernel_size[0]
        steps = torch.arange(size, device=x.device) - size // 2
        rows, columns = keypoints[..., 1:].long() + steps, keypoints[..., :1].long() + steps
        inside = ((rows >= 0) & (rows < height))[..., :, None] & ((columns >= 0) & (columns < width))[..., None, :]
        rows, columns = rows.clamp(0, height - 1)[..., :, None], columns.clamp(0, width - 1)[..., None, :]
        image = torch.arange(len(x), device=x.device)[:, None, None, None]
        patches = x.permute(0, 2, 3, 1)[image, rows, columns] * inside[..., None]  # (B, N, size, size, C)
        weight = self.descriptor.weight.permute(0, 2, 3, 1).flatten(1)
        return F.normalize(F.linear(patches.flatten(2), weight, self.descriptor.bias).float(), dim=-1)


class UNet(nn.Module):
    """Computes the head's input features from an image (B, 3, H, W), whose sides are multiples of 2^(len(down) - 1)."""

    def __init__(self, down: list[int], up: list[int], size: int) -> None:
        super().__init__()
        skipped = [3, *down[:-1]][::-1]
        self.down = nn.ModuleList(
            Conv(inputs, outputs, size, gated=i > 0) for i, (inputs, outputs) in enumerate(zip([3, *down], down))
        )
        self.up = nn.ModuleList(
            Conv(below + beside, outputs, size) for below, beside, outputs in zip([down[-1], *up], skipped, up)
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.down[0](image)
        passed = []
        for conv in self.down[1:]:
            passed.append(x)
            x = conv(F.avg_pool2d(x, 2))
        for conv in self.up:
            x = conv(join(x, passed.pop()))
        return join(x, passed.pop())


def join(below: Tensor, beside: Tensor) -> Tensor:
    """Upsample features of half the size, and concatenate them with those of the skip connection."""
    return torch.cat([F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=False), beside], dim=1)


class DISK(Extractor):
    """Detector and descriptor. Build it with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`: the channels of the U-Net on its contracting (``down``) and
            expanding (``up``) path, the ``kernel_size`` of its convolutions, the ``descriptor_dim``, and the selection
            of keypoints.
    """

    MODEL_TYPE = "disk"
    CHANNELS = 3  # colour images
    RESOLUTION = 1.0  # keypoints are whole pixels
    DEFAULTS = {
        "down": [16, 32, 64, 64, 64],
        "up": [64, 64, 64],
        "kernel_size": 5,
        "descriptor_dim": 128,
        "keypoint_threshold": 0.0,
        "max_keypoints": -1,
        "nms_radius": 2,
        "border_removal_distance": 2,
    }

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        down, up, size = list(self.config["down"]), list(self.config["up"]), self.config["kernel_size"]
        self.require("kernel_size", size % 2 == 1, "odd")
        self.require("up", 0 < len(up) == len(down) - 2, "two numbers shorter than down, for features of each pixel")
        self.unet = UNet(down, up, size)
        self.head = Head(up[-1] + down[0], self.config["descriptor_dim"], size)
        self.multiple = 2 ** (len(down) - 1)
        self.requires_grad_(False).eval()

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate the authors' checkpoint into this module's configuration and parameter names."""
        theirs = {}
        for name, tensor in checkpoint.tensors.items():
            found = re.search(r"\bunet\.path_.*", name)  # a detector inside a matcher has a prefix
            if found:
                theirs[found[0]] = tensor
        return _from_authors(theirs, checkpoint) if theirs else checkpoint

    @property
    def dtype(self) -> torch.dtype:
        return self.head.score.weight.dtype

    def forward(self, image: Tensor, allowed: Tensor | None = None) -> Detections:
        """See :meth:`Extractor.forward`; scores are log odds."""
        height, width = image.shape[-2:]
        image = image.expand(-1, 3, -1, -1).to(self.dtype)
        image = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple))
        features = activate(self.unet(image), self.head.gate)
        scores = self.head.scores(features)[:, :height, :width]
        peaks = clear_masked(clear_border(strict_maxima(scores, self.nms_radius), self.border), allowed)
        finite = are_finite(scores)
        scores = scores.masked_fill(~peaks, torch.finfo(scores.dtype).min)
        keypoints, scores, mask = select_keypoints(scores, self.keypoint_threshold, self.max_keypoints, self.round_up)
        return Detections(keypoints, scores, self.head.descriptors(features, keypoints), mask, finite)


def strict_maxima(scores: Tensor, radius: int) -> Tensor:
    """Whether each of the scores (B, H, W) is larger than all others within ``radius`` pixels in x and y."""
    if radius == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    height, width, window = scores.shape[-2], scores.shape[-1], 2 * radius + 1
    padded = F.pad(scores, [radius] * 4, value=-torch.inf)
    above = F.max_pool2d(padded[:, : height + radius - 1], (radius, window), stride=1)
    below = F.max_pool2d(padded[:, radius + 1 :], (radius, window), stride=1)
    rows = padded[:, radius:-radius]
    left = F.max_pool2d(rows[:, :, : width + radius - 1], (1, radius), stride=1)
    right = F.max_pool2d(rows[:, :, radius + 1 :], (1, radius), stride=1)
    return (scores > above) & (scores > below) & (scores > left) & (scores > right)


def _from_authors(theirs: dict[str, Tensor], checkpoint: Checkpoint) -> Checkpoint:
    """Convert the authors' tensors (cvlab-epfl/disk) to this module's names; their last convolution becomes two."""
    tensors = {}
    for name, tensor in theirs.items():
        name = re.sub(r"path_down\.(\d+)\.1\.", r"down.\1.", name)
        name = re.sub(r"path_up\.(\d+)\.conv\.", r"up.\1.", name)
        name = re.sub(r"\.1\.(\w+)$", r".gate.\1", name)
        tensors[re.sub(r"\.3\.(\w+)$", r".conv.\1", name)] = tensor
    ups = sum(bool(re.fullmatch(r"unet\.up\.\d+\.conv\.weight", name)) for name in tensors)
    downs = sum(bool(re.fullmatch(r"unet\.down\.\d+\.conv\.weight", name)) for name in tensors)
    last = f"unet.up.{ups - 1}"
    tensors["head.gate.weight"] = tensors.pop(f"{last}.gate.weight")
    for kind in ("weight", "bias"):
        both = tensors.pop(f"{last}.conv.{kind}")
        tensors[f"head.descriptor.{kind}"], tensors[f"head.score.{kind}"] = both[:-1], both[-1:]
    config = {
        "model_type": "disk",
        "down": [tensors[f"unet.down.{i}.conv.weight"].shape[0] for i in range(downs)],
        "up": [tensors[f"unet.up.{i}.conv.weight"].shape[0] for i in range(ups - 1)],
        "kernel_size": tensors["head.score.weight"].shape[-1],
        "descriptor_dim": tensors["head.descriptor.weight"].shape[0],
    }
    # The configuration of a matcher's folder belongs to the matcher.
    inside = "keypoint_detector_config" in checkpoint.config
    return Checkpoint({**config, **({} if inside else checkpoint.config)}, tensors, checkpoint.source)
