"""Compares the results of exported graphs in ONNX Runtime with those of the networks in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kpmatch_ros.models.assignment import Assignment, ImageFeatures
from kpmatch_ros.models.detections import Detections
from kpmatch_ros.models.export import ExportError, Graph
from kpmatch_ros.models.lightglue import LightGlue
from kpmatch_ros.models.onnx_providers import ON_PROCESSOR, RequestedProviders
from kpmatch_ros.models.superglue import SuperGlue
from kpmatch_ros.models.superpoint import SuperPoint

__all__ = ["SAME_PLACE", "Parity", "RuntimeMissing", "Session", "compare"]

SAME_PLACE = 0.01  # pixels: subpixel keypoints may differ by rounding


class RuntimeMissing(ExportError):
    """ONNX Runtime is not installed."""


@dataclass(frozen=True)
class Parity:
    """Differences between ONNX Runtime's and PyTorch's results.

    Attributes:
        pairs: number of matched image pairs.
        score_difference: largest difference of the detection scores of any pixel.
        descriptor_difference: largest difference of any descriptor component of any cell.
        matches: number of PyTorch's matches in all pairs.
        equal: number of matches that both found, at the same positions in both images.
        total: number of matches that at least one of them found.
        match_score_difference: largest difference of the scores of matches that both found.
    """

    pairs: int
    score_difference: float
    descriptor_difference: float
    matches: int
    equal: int
    total: int
    match_score_difference: float

    @property
    def share(self) -> float:
        """Share of the matches that both found among those that at least one found; 0 without any."""
        return self.equal / self.total if self.total else 0.0


class Session:
    """A graph in ONNX Runtime.

    Args:
        file: the graph's file.
        graph: the graph's inputs and outputs.
        requested: the requested execution providers.

    Attributes:
        graph: the graph's inputs and outputs.
        providers: the requested providers that are in use, in order of preference.

    Raises:
        RuntimeMissing: ONNX Runtime is not installed.
        ExportError: ONNX Runtime has none of the requested providers.
    """

    def __init__(self, file: Path, graph: Graph, requested: RequestedProviders = ON_PROCESSOR) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeMissing(f"onnxruntime is not installed ({error}): pip install onnx onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.graph = graph
        self._session = requested.start(
            lambda providers: onnxruntime.InferenceSession(str(file), options, providers=providers), file, graph
        )
        self.providers = requested.started(self._session)

    def has_input(self, name: str) -> bool:
        """Whether the graph has an input of this name."""
        return any(port.name == name for port in self.graph.inputs)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the graph. Inputs and outputs are in the graph's order."""
        arrays = {
            port.name: np.ascontiguousarray(tensor.numpy(), dtype=port.dtype)
            for port, tensor in zip(self.graph.inputs, tensors)
        }
        return tuple(map(torch.from_numpy, self._session.run(None, arrays)))


@torch.no_grad()
def compare(
    extractor: SuperPoint,
    matcher: LightGlue | SuperGlue,
    sessions: tuple[Session, Session],
    images: Sequence[Tensor],
    slots: int | None,
) -> Parity:
    """Extract and match consecutive images with the networks and with their graphs, each with its own keypoints.

    Args:
        extractor: a float32 network on the processor.
        matcher: a float32 network on the processor that uses all layers and points.
        sessions: the graphs of both.
        images: (1, 1, H, W) grey values in [0, 1].
        slots: number of keypoints in the matcher's graph including padding; None if it is dynamic.
    """
    dense, match = sessions
    score_difference = descriptor_difference = match_score_difference = 0.0
    ours: list[ImageFeatures] = []
    theirs: list[ImageFeatures] = []
    for image in images:
        expected, found = extractor.dense(image), dense(image)
        score_difference = max(score_difference, _difference(expected[0], found[0]))
        descriptor_difference = max(descriptor_difference, _difference(expected[1], found[1]))
        ours.append(_features(extractor.select(*expected), image))
        theirs.append(_features(extractor.select(found[0], found[1]), image))
    matches = equal = total = 0
    for i in range(len(images) - 1):
        rows, scores = _matches(matcher(ours[i], ours[i + 1]), ours[i], ours[i + 1])
        graph_rows, graph_scores = _matches(_run(match, theirs[i], theirs[i + 1], slots), theirs[i], theirs[i + 1])
        partner = _partners(rows, graph_rows)
        both = partner >= 0
        matches += len(rows)
        equal += int(both.sum())
        total += len(rows) + len(graph_rows) - int(both.sum())
        match_score_difference = max(match_score_difference, _difference(scores[both], graph_scores[partner[both]]))
    return Parity(
        len(images) - 1, score_difference, descriptor_difference, matches, equal, total, match_score_difference
    )


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _features(found: Detections, image: Tensor) -> ImageFeatures:
    """Return the features of one image without padding, and therefore without a mask."""
    size = torch.tensor([[image.shape[3], image.shape[2]]], dtype=torch.float32, device=image.device)
    real = found.mask[0]
    return ImageFeatures(found.keypoints[:, real], found.descriptors[:, real], size, scores=found.scores[:, real])


def _run(match: Session, image0: ImageFeatures, image1: ImageFeatures, slots: int | None) -> Assignment:
    """Return the assignment that a matcher's graph computes."""
    count0, count1 = image0.num_keypoints, image1.num_keypoints
    empty = Assignment.empty(1, count0, count1, image0.keypoints.device)
    if count0 == 0 or count1 == 0:
        return empty  # a graph needs at least one keypoint
    with_scores = match.has_input("detection_scores0")
    found = match(*_inputs(image0, slots, with_scores), *_inputs(image1, slots, with_scores))
    names = ("matches0", "matches1", "scores0", "scores1")
    return empty._replace(
        **{name: tensor[:, :count] for name, tensor, count in zip(names, found, (count0, count1) * 2)}
    )


def _inputs(features: ImageFeatures, slots: int | None, with_scores: bool) -> list[Tensor]:
    """Return the features of one image as inputs of a graph."""
    assert features.scores is not None
    behind = 0 if slots is None else slots - features.num_keypoints
    tensors = [
        F.pad(features.keypoints, (0, 0, 0, behind)),
        F.pad(features.descriptors, (0, 0, 0, behind)),
        F.pad(torch.ones_like(features.scores, dtype=torch.bool), (0, behind)),
        features.size,
    ]
    return [*tensors, F.pad(features.scores, (0, behind))] if with_scores else tensors


def _matches(found: Assignment, image0: ImageFeatures, image1: ImageFeatures) -> tuple[Tensor, Tensor]:
    """Return the matches of one pair: x, y in both images (M, 4), pixels, and their scores (M,)."""
    index0 = (found.matches0[0] >= 0).nonzero()[:, 0]
    index1 = found.matches0[0, index0]
    return torch.cat([image0.keypoints[0, index0], image1.keypoints[0, index1]], dim=1), found.scores0[0, index0]


def _partners(rows: Tensor, others: Tensor) -> Tensor:
    """For each of the matches ``rows`` (M, 4), return its index among ``others``, -1 if it is missing there."""
    if len(rows) == 0 or len(others) == 0:
        return torch.full((len(rows),), -1, device=rows.device)
    nearest = torch.cdist(rows, others, p=torch.inf).min(dim=1)
    return torch.where(nearest.values <= SAME_PLACE, nearest.indices, -1)
