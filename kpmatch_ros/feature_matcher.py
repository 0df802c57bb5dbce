"""Image to features, features to matches: the networks behind one plain interface, without ROS."""
from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from kpmatch_ros import weights
from kpmatch_ros.models import LightGlue, NearestNeighbour, SuperPoint
from kpmatch_ros.parameters import ParameterError, Parameters

__all__ = ["FeatureMatcher", "Features", "Matches"]

Array = Tensor | np.ndarray

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as OpenCV and the authors of SuperPoint convert colour to grey


@dataclass(frozen=True)
class Features:
    """Keypoints of one image and their descriptors.

    Attributes:
        keypoints: (N, 2) float32 x, y in pixels of the image given; the centre of the top-left pixel is (0, 0).
        scores: (N,) float32 detection scores, best first.
        descriptors: (N, D) float32 unit vectors.
        size: width and height of the image, pixels.
    """

    keypoints: Array
    scores: Array
    descriptors: Array
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.keypoints)

    def numpy(self) -> Features:
        """The same with NumPy arrays."""
        return replace(
            self,
            keypoints=_numpy(self.keypoints),
            scores=_numpy(self.scores),
            descriptors=_numpy(self.descriptors),
        )


@dataclass(frozen=True)
class Matches:
    """Which keypoints of two images show the same point.

    Attributes:
        indices: (M, 2) int64, indices into the features of image 0 and of image 1.
        scores: (M,) float32 in [0, 1].
        layers: transformer layers run before the matcher was sure; 0 where that has no meaning.
    """

    indices: Array
    scores: Array
    layers: int

    def __len__(self) -> int:
        return len(self.indices)

    def numpy(self) -> Matches:
        """The same with NumPy arrays."""
        return replace(self, indices=_numpy(self.indices), scores=_numpy(self.scores))


def _numpy(array: Array) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, Tensor) else array


class FeatureMatcher:
    """Extracts and matches features.

    Args:
        parameters: a set of parameters; the defaults where not given.
        options: single parameters by name (see :class:`kpmatch_ros.parameters.Parameters`), such as ``extractor``,
            ``matcher``, ``device``, ``precision`` and ``max_keypoints``.

    Raises:
        ParameterError: when a parameter has a value it may not have, or the device is not there.
        WeightsError: when weights are missing or damaged, or extractor and matcher do not belong together.
    """

    def __init__(self, parameters: Parameters | None = None, **options: Any) -> None:
        self.parameters = (parameters or Parameters()).replace(options)
        self.device = choose_device(self.parameters.device)
        self.dtype = choose_precision(self.parameters.precision, self.device)
        self.extractor = self._load_extractor()
        self.matcher = self._load_matcher()
        self._published_threshold = self.extractor.keypoint_threshold
        self.configure(self.parameters)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> FeatureMatcher:
        """From a Hugging Face LightGlue folder, which holds its detector too."""
        return cls(extractor=str(folder), matcher=str(folder), **options)

    def configure(self, parameters: Parameters) -> None:
        """Take over the parameters that may change while running."""
        self.parameters = parameters
        published = parameters.keypoint_threshold < 0
        self.extractor.keypoint_threshold = self._published_threshold if published else parameters.keypoint_threshold
        self.extractor.max_keypoints = parameters.max_keypoints
        self.extractor.nms_radius = parameters.nms_radius
        self.extractor.border = parameters.border
        self.matcher.filter_threshold = parameters.filter_threshold
        if isinstance(self.matcher, LightGlue):
            self.matcher.depth_confidence = parameters.depth_confidence
            self.matcher.width_confidence = parameters.width_confidence
        else:
            self.matcher.ratio_threshold = parameters.ratio_threshold

    @torch.inference_mode()
    def extract(self, image: np.ndarray | Tensor) -> Features:
        """Find and describe the keypoints of an image.

        Args:
            image: uint8 grey (H, W) or RGB (H, W, 3).

        Raises:
            ValueError: when the image has another shape or type, or no pixels.
        """
        pixels = _numpy(image)
        is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
        if pixels.dtype != np.uint8 or not is_image or pixels.size == 0:
            raise ValueError(
                f"the image is {pixels.dtype} of shape {pixels.shape}; it must be uint8 and (H, W) grey or (H, W, 3) "
                "RGB, with at least one pixel"
            )
        height, width = pixels.shape[:2]
        seen = _resize(pixels, self.parameters.resize)
        found = self.extractor(self._upload(seen))
        real = found.mask[0]
        scale = found.keypoints.new_tensor([width / seen.shape[1], height / seen.shape[0]])
        return Features(
            keypoints=(found.keypoints[0][real] + 0.5) * scale - 0.5,
            scores=found.scores[0][real],
            descriptors=found.descriptors[0][real],
            size=(width, height),
        )

    @torch.inference_mode()
    def match(self, features0: Features, features1: Features) -> Matches:
        """Match the features of two images.

        Args:
            features0: of the reference image, as :meth:`extract` gives them (or their ``numpy()``).
            features1: of the current image.
        """
        keypoints, descriptors, sizes = zip(*(self._batch_of_one(f) for f in (features0, features1)))
        found = self.matcher(*keypoints, *descriptors, *sizes)
        index0 = (found.matches0[0] >= 0).nonzero()[:, 0]
        return Matches(
            indices=torch.stack([index0, found.matches0[0, index0]], dim=1),
            scores=found.scores0[0, index0],
            layers=int(found.layers[0]),
        )

    def warm_up(self, width: int = 640, height: int = 480) -> None:
        """Run everything once, so that the first frame costs what every frame costs."""
        noise = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
        features = self.extract(noise)
        self.match(features, features)

    def _upload(self, pixels: np.ndarray) -> Tensor:
        """uint8 pixels to a (1, 1, H, W) grey image in [0, 1] on the device."""
        luma = _LUMA
        if pixels.ndim == 3 and pixels.strides[2] < 0:  # a view of BGR as RGB
            pixels, luma = pixels[..., ::-1], luma[::-1]
        if min(pixels.strides) < 0 or not pixels.flags.writeable:  # neither of which torch takes
            pixels = pixels.copy()
        image = torch.from_numpy(pixels).to(self.device)
        grey = image.float() if image.ndim == 2 else image.float() @ torch.tensor(luma, device=self.device)
        return (grey / 255)[None, None]

    def _batch_of_one(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.as_tensor(features.keypoints, device=self.device)[None],
            torch.as_tensor(features.descriptors, device=self.device)[None],
            torch.tensor([features.size], device=self.device),
        )

    def _load_extractor(self) -> SuperPoint:
        extractor = SuperPoint.from_pretrained(self.parameters.extractor)
        # Channels-last is how convolutions run fastest on processors and tensor cores alike.
        return extractor.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _load_matcher(self) -> LightGlue | NearestNeighbour:
        name, extractor = self.parameters.matcher, self.parameters.extractor
        if name == "nearest":
            return NearestNeighbour()
        made_for = weights.REGISTRY[name].extractor if name in weights.REGISTRY else ""
        if made_for and extractor in weights.REGISTRY and extractor != made_for:
            raise weights.WeightsError(
                f"the matcher {name} was made for the extractor {made_for}, not for {extractor}: it would find next to "
                "no matches"
            )
        matcher = LightGlue.from_pretrained(name)
        if matcher.input_dim != self.extractor.descriptor_size:
            raise weights.WeightsError(
                f"the matcher {name} takes descriptors of size {matcher.input_dim}, but {extractor} makes descriptors "
                f"of size {self.extractor.descriptor_size}: they do not belong together"
            )
        return matcher.to(self.device).to_precision(self.dtype)


def _resize(pixels: np.ndarray, longest: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if longest in (0, max(height, width)):
        return pixels
    scale = longest / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def choose_device(name: str) -> torch.device:
    """The device a parameter names; ``auto`` is the GPU where there is one.

    Raises:
        ParameterError: when it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device is {name!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs; use cpu or "
            "auto, or install a PyTorch built for this machine's CUDA (kpmatch doctor)"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format a parameter names; ``auto`` is the fastest one that the device computes in hardware.

    Raises:
        ParameterError: when the device cannot compute in it.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if _processor_has_bfloat16() else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ParameterError("precision is 'float16', but the device is the CPU; use float32, bfloat16 or auto")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _processor_has_bfloat16() -> bool:
    if platform.system() != "Linux":
        return False
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(features & {"avx512_bf16", "amx_bf16", "bf16"})
