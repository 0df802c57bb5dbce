"""What all networks with weights share: their configuration, loading them, and the numbers of points they take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kpmatch_ros.models.checkpoint import Checkpoint, build
from kpmatch_ros.weights import WeightsError

if TYPE_CHECKING:
    from kpmatch_ros.models.detections import Detections

__all__ = ["LARGEST_IMAGE", "Extractor", "PretrainedNetwork", "rounded_up"]

LARGEST_IMAGE = 3840 * 2176  # pixels: SuperPoint's first layers take 6 GB of memory for it in float32

Self = TypeVar("Self", bound="PretrainedNetwork")

# What a configuration may say of how the networks work. A wider window takes memory without end, more iterations time.
_RANGES = {
    "nms_radius": (0, 64),
    "refinement_radius": (0, 16),
    "border_removal_distance": (0, 65535),
    "max_keypoints": (-1, 1 << 20),
    "sinkhorn_iterations": (1, 1000),
}


def rounded_up(count: int) -> int:
    """The next of few numbers of points: 64, multiples of 128 up to 1024, of 256 up to 2048, and so on.

    oneDNN compiles the layers in bfloat16 for each number of points, and keeps some 2 MB for each.
    """
    if count <= 64:
        return 64
    step = max(128, 2 ** math.ceil(math.log2(count)) // 8)
    return math.ceil(count / step) * step


class PretrainedNetwork(nn.Module):
    """A network that is built from a configuration and loads its weights with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`.

    Attributes:
        config: every key of :attr:`DEFAULTS`, with the value given or else the default.
        round_up: compute with few different numbers of points (:func:`rounded_up`), by padding. The results are the
            same, but for rounding.
        is_traced: it is seen by :func:`kpmatch_ros.models.trace`, and runs without CUDA graphs.

    Raises:
        WeightsError: no network can work so.
    """

    MODEL_TYPE: ClassVar[str]
    """What a Hugging Face ``config.json`` calls the network."""

    DEFAULTS: ClassVar[dict[str, Any]]
    """The default configuration."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = {**self.DEFAULTS, **config}
        self.round_up = False
        self.is_traced = False
        for key, value in self.config.items():
            if key in _RANGES:
                low, high = _RANGES[key]
                self.require(key, low <= value <= high, f"from {low} to {high}")
            elif type(self.DEFAULTS.get(key)) in (int, list):  # channels, layers and the like
                numbers = value if isinstance(value, (list, tuple)) else [value]
                self.require(key, all(n >= 1 for n in numbers if not isinstance(n, str)), "1 or more")

    def require(self, key: str, holds: bool, wanted: str) -> None:
        """Refuse a configuration unless something ``holds``: a sentence says which value is ``wanted`` for a key."""
        if not holds:
            raise WeightsError(f"{key} is {self.config[key]!r:.80}; it must be {wanted}")

    @classmethod
    def from_pretrained(cls: type[Self], source: str | Path, **options: Any) -> Self:
        """Load weights from a registered name, a folder or a file.

        Args:
            source: a registered name (``kpmatch weights list``), a Hugging Face folder, a ``.safetensors`` file, or
                the original authors' ``.pth`` file. The folder of a matcher may hold its extractor too.
            options: keys of :attr:`DEFAULTS`. They replace the checkpoint's own.

        Raises:
            WeightsError: there are no such weights, they are damaged, or they are of another network.
        """
        return build(cls, source, options)

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate a checkpoint into this network's configuration and names of tensors."""
        raise NotImplementedError


class Extractor(PretrainedNetwork):
    """A network that finds and describes keypoints; the attributes select them and may change between two images.

    Attributes:
        keypoint_threshold: lowest score of a keypoint.
        max_keypoints: largest number of keypoints of an image; -1 for all.
        nms_radius: two keypoints are further apart than this, pixels.
        border: no keypoint is nearer to the image's sides, pixels.
    """

    CHANNELS: ClassVar[int]
    """What it sees: 1 for grey, 3 for RGB."""

    RESOLUTION: ClassVar[float]
    """Pixels between neighbouring positions that a keypoint can have; 0 for any position."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.keypoint_threshold: float = self.config["keypoint_threshold"]
        self.max_keypoints: int = self.config["max_keypoints"]
        self.nms_radius: int = self.config["nms_radius"]
        self.border: int = self.config["border_removal_distance"]

    @property
    def descriptor_size(self) -> int:
        """Length D of a descriptor."""
        return self.config["descriptor_dim"]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the convolutions."""
        raise NotImplementedError

    def forward(self, image: Tensor, allowed: Tensor | None = None) -> Detections:
        """Find and describe keypoints.

        Args:
            image: (B, 1, H, W) grey values in [0, 1], float; or (B, 3, H, W) RGB where :attr:`CHANNELS` is 3.
            allowed: (B, H, W) bool, false where no keypoint may be.

        Returns:
            the keypoints, padded to the largest number in the batch.
        """
        raise NotImplementedError

    def to_precision(self: Self, dtype: torch.dtype) -> Self:
        """Convert the weights, or as many of them as bear it."""
        return self.to(dtype)
