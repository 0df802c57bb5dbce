"""OpenCV 5's ALIKED and LightGlueMatcher for `kpmatch bench --against opencv`, with this package's weights.

Both classes read an ONNX file and run it in OpenCV's DNN module. According to their source code, the graphs have these
inputs and outputs:

- `ALIKED`: `image` (1, C, H, W) in [0, 1]; `keypoints` (N, 2) x, y from -1 to 1 across the image, `descriptors` (N, D)
  and `scores` (N,). The class also works for SuperPoint.
- `LightGlueMatcher`: `kpts0`, `desc0`, `kpts1`, `desc1`, each (1, N, ...); `matches0` (M, 2) int64 and `mscores0` (M,).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kpmatch_ros import FeatureMatcher
from kpmatch_ros.models import ALIKED, LightGlue, SuperPoint
from kpmatch_ros.models.assignment import ImageFeatures
from kpmatch_ros.models.export import DensePart, Graph, Port, WholeMatcher, export_module
from kpmatch_ros.models.lightglue import normalise_keypoints

__all__ = ["OpenCV"]

Image = NDArray[np.uint8]


class PeerFeatures(NamedTuple):
    """The features of an image.

    Attributes:
        points: (N, 2) float32 x, y, pixels.
        positions: (N, 2) float32, the same normalised for LightGlue.
        descriptors: (N, D) float32 unit vectors.
    """

    points: NDArray[np.float32]
    positions: NDArray[np.float32]
    descriptors: NDArray[np.float32]


class OpenCV:
    """SuperPoint or ALIKED in `cv2.ALIKED`, LightGlue with all its layers in `cv2.LightGlueMatcher`.

    The graphs are exported on demand and not kept. The extractor's graph has a fixed image size and number of
    keypoints. It is exported at the first image of a size.

    Attributes:
        name: its name with version and precision.
    """

    INSTALL: ClassVar[str] = "pip install 'opencv-python-headless>=5' onnx onnxruntime"
    KEEPS_FEATURES: ClassVar[bool] = True

    def __init__(self, matcher: FeatureMatcher, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            raise ValueError(f"it computes only in float32, not in {str(dtype).removeprefix('torch.')}")
        if matcher.device.type != "cpu":
            raise ValueError("its networks run only on the processor: compare with --device cpu")
        if not hasattr(cv2, "LightGlueMatcher"):
            raise ImportError(f"OpenCV {cv2.__version__} has no LightGlueMatcher")
        import onnxruntime  # noqa: F401

        ours = FeatureMatcher(matcher.parameters.replace({"precision": "float32", "device": "cpu"}))
        if not isinstance(ours.extractor, (SuperPoint, ALIKED)) or not isinstance(ours.matcher, LightGlue):
            kinds = f"{type(ours.extractor).__name__} and {type(ours.matcher).__name__}"
            raise ValueError(f"only SuperPoint or ALIKED with LightGlue can be compared, not {kinds}")
        self.name = f"OpenCV {cv2.__version__} float32"
        self._network: SuperPoint | ALIKED = ours.extractor
        self._extractors: dict[tuple[int, int], Any] = {}
        cv2.setNumThreads(torch.get_num_threads())
        with tempfile.TemporaryDirectory() as scratch, _without_warnings():
            file = Path(scratch) / "matcher.onnx"
            _write_matcher(ours.matcher, file)
            self._matcher: Any = cv2.LightGlueMatcher.create(str(file), matcher.parameters.filter_threshold)

    def max_keypoints(self, count: int) -> None:
        """Keep at most `count` keypoints per image from now on."""
        if count != self._network.max_keypoints:
            self._network.max_keypoints = count
            self._extractors.clear()

    def extract(self, image: Image) -> PeerFeatures:
        """Return the features of an image."""
        height, width = image.shape[:2]
        if (width, height) not in self._extractors:
            self._extractors[width, height] = self._make_extractor(width, height)
        found, descriptors = self._extractors[width, height].detectAndCompute(self._seen(image), None)
        real = [i for i, keypoint in enumerate(found) if keypoint.response > 0]
        points = np.asarray(cv2.KeyPoint.convert(found), np.float32).reshape(-1, 2)[real]
        # OpenCV would normalise positions to a square. Without image sizes it uses the given positions unchanged.
        size = torch.tensor([[width, height]])
        return PeerFeatures(
            points, normalise_keypoints(torch.from_numpy(points)[None], size)[0].numpy(), descriptors[real]
        )

    def match(self, reference: PeerFeatures, image: Image) -> int:
        """Return the number of matches between extracted features and an image."""
        return len(self.pairs(reference, self.extract(image)))

    def pairs(self, features0: PeerFeatures, features1: PeerFeatures) -> NDArray[np.int64]:
        """Return the indices (M, 2) of matching points."""
        if len(features0.points) == 0 or len(features1.points) == 0:
            return np.empty((0, 2), np.int64)
        self._matcher.setPairInfo(features0.positions, features1.positions)
        found = self._matcher.match(features0.descriptors, features1.descriptors)
        return np.array([(one.queryIdx, one.trainIdx) for one in found], np.int64).reshape(-1, 2)

    def _seen(self, image: Image) -> Image:
        """Convert an image to grey, or to BGR, which `cv2.ALIKED` converts to RGB."""
        if self._network.CHANNELS == 1:
            return np.asarray(image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR if image.ndim == 2 else cv2.COLOR_RGB2BGR))

    def _make_extractor(self, width: int, height: int) -> Any:
        with tempfile.TemporaryDirectory() as scratch, _without_warnings():
            file = Path(scratch) / "extractor.onnx"
            _write_extractor(self._network, file, width, height)
            options = cv2.ALIKED.Params()
            options.inputSize = (width, height)
            return cv2.ALIKED.create(str(file), options)


class _WholeExtractor(nn.Module):
    """An extractor with the selection of keypoints; padding has score 0.

    The graph has a fixed number of keypoints. With a dynamic number, OpenCV 5.0.0 returned zeros instead of the last
    keypoint if an image had more of them than the one before.
    """

    def __init__(self, network: SuperPoint | ALIKED) -> None:
        super().__init__()
        self.network: Any = (
            DensePart(network).extractor if isinstance(network, SuperPoint) else copy.deepcopy(network).float()
        )
        self.network.round_up = False

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.network, SuperPoint):
            found = self.network.select(*self.network.dense(image))
        else:
            found = self.network(image)
        size = torch.tensor(image.shape[:1:-1], dtype=torch.float32)
        return found.keypoints[0] * 2 / size - 1, found.descriptors[0], found.scores[0] * found.mask[0]


def _write_extractor(network: SuperPoint | ALIKED, file: Path, width: int, height: int) -> None:
    """Export an extractor with its number of keypoints, for images of one size."""
    import onnxruntime

    channels = network.CHANNELS
    count = min(network.max_keypoints, width * height)
    graph = Graph(
        (Port("image", "float32", (1, channels, height, width)),),
        (
            Port("keypoints", "float32", (count, 2)),
            Port("descriptors", "float32", (count, network.descriptor_size)),
            Port("scores", "float32", (count,)),
        ),
    )
    export_module(_WholeExtractor(network), [torch.zeros(1, channels, height, width)], graph, file)
    # OpenCV 5.0.0 treats an integer cast to float as an integer and refuses to divide it by a float ("All inputs should
    # have equal types"). Constant folding removes such operations.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])


class _PairMatcher(nn.Module):
    """A LightGlue that returns a match for each point, -1 for no match, which OpenCV drops."""

    def __init__(self, matcher: LightGlue) -> None:
        super().__init__()
        self.matcher: Any = WholeMatcher(matcher).matcher

    def forward(self, kpts0: Tensor, kpts1: Tensor, desc0: Tensor, desc1: Tensor) -> tuple[Tensor, Tensor]:
        square = torch.full((1, 2), 2.0)  # an image size for which normalised positions are pixels from the centre
        found = self.matcher.match_all(ImageFeatures(kpts0 + 1, desc0, square), ImageFeatures(kpts1 + 1, desc1, square))
        matches = found.matches0[0]
        return torch.stack([torch.arange(matches.shape[0]), matches], dim=1), found.scores0[0]


def _write_matcher(matcher: LightGlue, file: Path) -> None:
    """Export a matcher with all its layers, for any number of keypoints."""
    numbers = {"N0": 24, "N1": 40}  # for tracing
    inputs = tuple(
        Port(f"{kind}{i}", "float32", (1, f"N{i}", length))
        for kind, length in (("kpts", 2), ("desc", matcher.input_dim))
        for i in (0, 1)
    )
    graph = Graph(inputs, (Port("matches0", "int64", ("N0", 2)), Port("mscores0", "float32", ("N0",))))
    examples = [torch.rand(*(numbers[n] if isinstance(n, str) else n for n in port.shape)) for port in inputs]
    export_module(_PairMatcher(matcher), examples, graph, file)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress OpenCV's warning that its networks have no choice of targets, which its own setting causes."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
