"""Inference with ONNX Runtime instead of PyTorch."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kpmatch_ros.models.assignment import Assignment, ImageFeatures, common_masks
from kpmatch_ros.models.export import check_exportable, export_extractor, export_matcher
from kpmatch_ros.models.export_check import Session
from kpmatch_ros.models.lightglue import LightGlue
from kpmatch_ros.models.onnx_providers import ON_PROCESSOR, RequestedProviders, in_range
from kpmatch_ros.models.superglue import SuperGlue
from kpmatch_ros.models.superpoint import CELL, SuperPoint

__all__ = ["OnnxBackend"]

_TRACED = (64, 64), 64  # pixels, keypoints; both are dynamic


class OnnxBackend:
    """Runs an extractor and a matcher as ONNX graphs, with all layers, in float32.

    It exports the graphs itself, with dynamic numbers and sizes, and does not keep their files.

    Args:
        extractor: a SuperPoint.
        matcher: a LightGlue or SuperGlue.
        requested: the requested execution providers.

    Attributes:
        providers: the providers in use, by their names in :class:`RequestedProviders`, in order of preference.
        note: one sentence about requested providers that are missing; empty if none is.

    Raises:
        ExportError: the networks are of other types, onnx or ONNX Runtime is not installed, or ONNX Runtime has none
            of the requested providers.
    """

    def __init__(self, extractor: nn.Module, matcher: nn.Module, requested: RequestedProviders = ON_PROCESSOR) -> None:
        check_exportable(extractor, matcher)
        assert isinstance(extractor, SuperPoint) and isinstance(matcher, (LightGlue, SuperGlue))
        # The threshold may change while the node runs, so it is not part of the graph.
        every_match = copy.copy(matcher)
        every_match.filter_threshold = 0.0
        size, keypoints = _TRACED
        with tempfile.TemporaryDirectory(prefix="kpmatch_onnx_") as folder:
            files = Path(folder, "extractor.onnx"), Path(folder, "matcher.onnx")
            self._dense = Session(files[0], export_extractor(extractor, files[0], size, dynamic=True), requested)
            self._match = Session(files[1], export_matcher(every_match, files[1], keypoints, dynamic=True), requested)
        self._made_of = extractor, matcher, requested
        self.providers = self._match.providers
        self.note = requested.explain(self.providers)

    def __reduce__(self) -> tuple[Any, ...]:
        return OnnxBackend, self._made_of  # a copy exports its graphs again: ONNX Runtime's sessions cannot be copied

    def run(self, network: nn.Module, *inputs: Any) -> Any:
        """Return ``network(*inputs)``, for one of the two networks or for another network with the same weights."""
        if isinstance(network, SuperPoint):
            image, *allowed = inputs
            if min(image.shape[2:]) < CELL or not self._accepts(B=len(image), H=image.shape[2], W=image.shape[3]):
                return network(*inputs)
            scores, descriptors = self._dense(image)
            return network.select(scores, descriptors, *allowed)
        assert isinstance(network, (LightGlue, SuperGlue))
        layers = network.transformer_layers if isinstance(network, LightGlue) else network.gnn.layers
        image0, image1 = inputs
        if not self._accepts(B=len(image0.keypoints), N0=image0.num_keypoints, N1=image1.num_keypoints):
            return network(*inputs)
        return self._assignment(image0, image1, network.filter_threshold, len(layers))

    def _accepts(self, **numbers: int) -> bool:
        """Whether the graphs accept inputs of this size; otherwise PyTorch runs the network."""
        return "tensorrt" not in self.providers or in_range(**numbers)

    def _assignment(self, image0: ImageFeatures, image1: ImageFeatures, threshold: float, layers: int) -> Assignment:
        count0, count1 = image0.num_keypoints, image1.num_keypoints
        found = Assignment.empty(len(image0.keypoints), count0, count1, image0.keypoints.device)
        if count0 == 0 or count1 == 0:
            return found  # a graph needs at least one keypoint
        inputs = []
        for image, mask in zip((image0, image1), common_masks(image0, image1)):
            real = torch.ones_like(image.keypoints[..., 0], dtype=torch.bool) if mask is None else mask
            inputs += [image.keypoints, image.descriptors, real, image.size]
            if self._match.has_input("detection_scores0"):
                assert image.scores is not None
                inputs.append(image.scores)
        matches0, matches1, scores0, scores1 = self._match(*inputs)
        return found._replace(
            matches0=matches0.masked_fill(scores0 <= threshold, -1),
            matches1=matches1.masked_fill(scores1 <= threshold, -1),
            scores0=scores0,
            scores1=scores1,
        ).after(layers)
