"""Base classes of all networks with weights: configuration, loading, and rounding of the number of keypoints."""

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

LARGEST_IMAGE = 3840 * 2176  # pixels: SuperPoint's first layers need 6 GB of memory for such an image in float32

Self = TypeVar("Self", bound="PretrainedNetwork")

# Allowed ranges of configuration values. Without limits, a window could need any amount of memory, and the iterations
# any amount of time.
_RANGES = {
    "nms_radius": (0, 64),
    "refinement_radius": (0, 16),
    "border_removal_distance": (0, 65535),
    "max_keypoints": (-1, 1 << 20),
    "sinkhorn_iterations": (1, 1000),
}


def rounded_up(count: int) -> int:
    """Round a number of points up to one of a few values: 64, multiples of 128 to 1024, of 256 to 2048, and so on.

    oneDNN compiles the bfloat16 layers for each number of points, and keeps about 2 MB for each.
    """
    if count <= 64:
        return 64
    step = max(128, 2 ** math.ceil(math.log2(count)) // 8)
    return math.ceil(count / step) * step


class PretrainedNetwork(nn.Module):
    """Base class of networks that have a configuration and load their weights with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`.

    Attributes:
        config: every key of :attr:`DEFAULTS`, with the given or the default value.
        round_up: pad the points so that only a few different numbers of points occur (:func:`rounded_up`). The results
            are the same, except for rounding.
        is_traced: true while :func:`kpmatch_ros.models.trace` records the network; it then runs without CUDA graphs.

    Raises:
        WeightsError: the configuration is invalid.
    """

    MODEL_TYPE: ClassVar[str]
    """The name of the network in a Hugging Face ``config.json``."""

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
        """Raise WeightsError unless ``holds``; the text names the key and the value that is ``wanted``."""
        if not holds:
            raise WeightsError(f"{key} is {self.config[key]!r:.80}; it must be {wanted}")

    @classmethod
    def from_pretrained(cls: type[Self], source: str | Path, **options: Any) -> Self:
        """Load weights from a registered name, a folder or a file.

        Args:
            source: a registered name (``kpmatch weights list``), a Hugging Face folder, a ``.safetensors`` file, or
                the original authors' ``.pth`` file. The folder of a matcher may also hold its extractor.
            options: keys of :attr:`DEFAULTS`. They replace the checkpoint's values.

        Raises:
            WeightsError: the weights do not exist, are damaged, or belong to another network.
        """
        return build(cls, source, options)

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate a checkpoint into this network's configuration and tensor names."""
        raise NotImplementedError


class Extractor(PretrainedNetwork):
    """Base class of networks that detect keypoints and compute their descriptors.

    The attributes control the selection of keypoints. They may change between two images.

    Attributes:
        keypoint_threshold: lowest score of a keypoint.
        max_keypoints: largest number of keypoints of an image; -1 for all.
        nms_radius: two keypoints are more than this distance apart in x or in y, pixels.
        border: keypoints are at least this distance from the image's sides, pixels.
    """

    CHANNELS: ClassVar[int]
    """Number of channels of the input image: 1 for grey, 3 for RGB."""

    RESOLUTION: ClassVar[float]
    """Distance between neighbouring positions that a keypoint can have, pixels; 0 for any position."""

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
        """Detect keypoints and compute their descriptors.

        Args:
            image: (B, 1, H, W) grey values in [0, 1], float; or (B, 3, H, W) RGB where :attr:`CHANNELS` is 3.
            allowed: (B, H, W) bool, false where no keypoint may be.

        Returns:
            the keypoints, padded to the largest number in the batch.
        """
        raise NotImplementedError

    def to_precision(self: Self, dtype: torch.dtype) -> Self:
        """Convert the weights to ``dtype``; subclasses keep those layers as they are that need more precision."""
        return self.to(dtype)
