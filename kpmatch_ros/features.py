"""Features of an image and matches between two images, on any device. Does not depend on ROS."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kpmatch_ros.models.assignment import Assignment

__all__ = ["Array", "Features", "Matches", "all_to_numpy", "on_device", "to_numpy"]

Array = Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Features:
    """Keypoints of one image and their descriptors.

    Attributes:
        keypoints: (N, 2) float32 x, y in pixels of the original image; the centre of the top-left pixel is (0, 0).
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
        """Return a copy with NumPy arrays."""
        keypoints, scores, descriptors = all_to_numpy(self.keypoints, self.scores, self.descriptors)
        return replace(self, keypoints=keypoints, scores=scores, descriptors=descriptors)


@dataclass(frozen=True, eq=False)
class Matches:
    """Which keypoints of two images show the same point.

    Attributes:
        indices: (M, 2) int64, indices into the features of image 0 and of image 1.
        scores: (M,) float32 in [0, 1].
        layers: number of transformer layers run before the matcher stopped; 0 for a matcher without layers.
        assignment: for every keypoint of both images: its match or none, its score, and the number of layers after
            which it was pruned. A batch of one pair.
    """

    indices: Array
    scores: Array
    layers: int
    assignment: Assignment

    def __len__(self) -> int:
        return len(self.indices)

    def numpy(self) -> Matches:
        """Return a copy with NumPy arrays, also in the assignment."""
        indices, scores, *assignment = all_to_numpy(self.indices, self.scores, *self.assignment)
        return replace(self, indices=indices, scores=scores, assignment=Assignment(*assignment))  # type: ignore[arg-type]


def to_numpy(array: Array) -> np.ndarray:
    """Return a NumPy array as it is, or a tensor on any device as a NumPy array."""
    return array.cpu().numpy() if isinstance(array, Tensor) else array


def all_to_numpy(*arrays: Array) -> list[np.ndarray]:
    """Apply :func:`to_numpy` to several arrays, with a single wait for each GPU."""
    begun = [array.to("cpu", non_blocking=True) if isinstance(array, Tensor) else array for array in arrays]
    for device in {array.device for array in arrays if isinstance(array, Tensor) and array.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return [to_numpy(array) for array in begun]


def on_device(features: Features, device: torch.device, descriptor_size: int | None, matcher: str) -> Features:
    """Return the features as float32 tensors on a device, as the networks take them.

    Args:
        features: features of one image, from the extractor or from storage.
        device: the target device.
        descriptor_size: descriptor length that the matcher takes; None for any.
        matcher: name of the matcher, for error texts.

    Raises:
        ValueError: if the descriptors have another length, the numbers of keypoints, scores and descriptors differ, or
            the image size is not positive.
        TypeError: if ``features`` is not of type Features.
    """
    if not isinstance(features, Features):
        raise TypeError(f"match got a {type(features).__name__}; it takes Features, as extract returns them")
    keypoints, scores, descriptors = (
        _tensor(array, device) for array in (features.keypoints, features.scores, features.descriptors)
    )
    if descriptors.ndim != 2 or descriptor_size not in (None, descriptors.shape[1]):
        raise ValueError(
            f"the descriptors are of shape {tuple(descriptors.shape)}; the matcher {matcher} takes "
            f"(N, {descriptor_size or 'D'}): extract them with the extractor it was made for"
        )
    count = len(descriptors)
    for name, array, shape in (("keypoints", keypoints, (count, 2)), ("scores", scores, (count,))):
        if array.shape != shape:
            raise ValueError(
                f"the {name} are of shape {tuple(array.shape)} instead of {shape}: there are {count} descriptors"
            )
    width, height = (int(side) for side in features.size)
    if width < 1 or height < 1:
        raise ValueError(f"the features' image has {width} x {height} pixels; give its width and height")
    return Features(keypoints, scores, descriptors, (width, height))


def _tensor(array: Array, device: torch.device) -> Tensor:
    if not isinstance(array, Tensor):
        array = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))  # read-only memory of a message or a file
    return array.to(device, torch.float32)
