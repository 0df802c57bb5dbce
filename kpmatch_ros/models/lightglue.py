"""LightGlue: a transformer that matches two sets of keypoints, and stops as soon as it is confident.

Lindenberger, Sarlin, Pollefeys: LightGlue: Local Feature Matching at Light Speed, ICCV 2023 (arXiv:2306.13643).
Equation numbers below are the paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from kpmatch_ros.models.assignment import Assignment, ImageFeatures, common_masks
from kpmatch_ros.models.base import PretrainedNetwork, rounded_up
from kpmatch_ros.models.checkpoint import Checkpoint
from kpmatch_ros.models.lightglue_layers import (
    ACTIVATIONS,
    MatchAssignment,
    Points,
    PositionalEncoder,
    TokenConfidence,
    TransformerLayer,
)
from kpmatch_ros.weights import WeightsError

__all__ = ["LightGlue", "PendingBool", "normalise_keypoints"]


class PendingBool:
    """A bool that a device is still computing. The host waits for it only when it reads the value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def __bool__(self) -> bool:
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.value)


class LightGlue(PretrainedNetwork):
    """The matcher. Build it with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`, named as in `transformers`' ``LightGlueConfig``; ``input_dim`` is
            the size of the extractor's descriptors.

    Attributes:
        depth_confidence: matching stops when more than this share of points is confident; -1 never stops.
        width_confidence: a confident point is dropped when the probability that it has no match is at least this; -1
            drops none.
        filter_threshold: lowest score of a match.
        run_ahead: start the next layer before the host knows whether matching may stop, and discard the layer's result
            if it may. This keeps a GPU busy while the host decides. The matches are the same.
        prune_above: points are dropped only from images with more points than this.
    """

    MODEL_TYPE = "lightglue"
    DEFAULTS = {
        "input_dim": 256,
        "descriptor_dim": 256,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "hidden_act": "gelu",
        "attention_bias": True,
        "depth_confidence": 0.95,
        "width_confidence": 0.99,
        "filter_threshold": 0.1,
    }

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        size, heads = self.config["descriptor_dim"], self.config["num_attention_heads"]
        key_value_heads = self.config["num_key_value_heads"] or heads
        if size % (2 * heads) or heads % key_value_heads:
            raise WeightsError(
                f"LightGlue cannot split {size} channels into {heads} heads with {key_value_heads} key and value "
                "heads, each of an even number of channels"
            )
        if self.config["hidden_act"] not in ACTIVATIONS:
            raise WeightsError(
                f"LightGlue does not support the activation {self.config['hidden_act']!r}, "
                f"only {', '.join(ACTIVATIONS)}"
            )
        layers = self.config["num_hidden_layers"]
        self.input_projection = nn.Identity() if self.input_dim == size else nn.Linear(self.input_dim, size)
        self.positional_encoder = PositionalEncoder(size // heads)
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(size, heads, key_value_heads, self.config["attention_bias"], self.config["hidden_act"])
            for _ in range(layers)
        )
        self.match_assignment_layers = nn.ModuleList(MatchAssignment(size) for _ in range(layers))
        self.token_confidence = nn.ModuleList(TokenConfidence(size) for _ in range(layers - 1))
        self.depth_confidence: float = self.config["depth_confidence"]
        self.width_confidence: float = self.config["width_confidence"]
        self.filter_threshold: float = self.config["filter_threshold"]
        self.run_ahead = False
        self.prune_above = 0
        self.requires_grad_(False).eval()

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate a Hugging Face or an authors' checkpoint into this module's configuration and parameter names."""
        config = dict(checkpoint.config)
        if "matcher.log_assignment.0.final_proj.weight" in checkpoint.tensors:
            # A file of cvg/glue-factory, such as LighterGlue's, also holds the extractor.
            own = {k.removeprefix("matcher."): v for k, v in checkpoint.tensors.items() if k.startswith("matcher.")}
            checkpoint = replace(checkpoint, tensors=own)
        if "log_assignment.0.final_proj.weight" in checkpoint.tensors:
            config, tensors = _from_authors(checkpoint)
        else:
            tensors = {k: v for k, v in checkpoint.tensors.items() if not k.startswith("keypoint_detector.")}
            # Ignore the detector, and keys that follow from others, such as the width of the MLP.
            detector = config.pop("keypoint_detector_config", None) or {}
            for derived in ("hidden_size", "intermediate_size", "head_dim", "trust_remote_code"):
                config.pop(derived, None)
            if "descriptor_decoder_dim" in detector:
                config["input_dim"] = detector["descriptor_decoder_dim"]
        return Checkpoint(config, tensors, checkpoint.source)

    @torch.no_grad()
    def fuse(self) -> LightGlue:
        """Merge neighbouring linear layers for inference. The matches stay the same, but the tensor names change.

        The output projection of the attention is merged into the layer that reads its messages. If queries and keys of
        cross-attention have the same weights, as in the authors' networks, they are computed once. One matrix product
        computes queries, keys and values. Fusing a second time changes nothing.
        """
        for layer in self._layers:
            layer.fuse()
        return self

    def leave_attention_to_pytorch(self) -> LightGlue:
        """Let PyTorch compute the attention: for bfloat16 on a processor with matrix tiles, see :class:`Attention`."""
        for layer in self._layers:
            layer.self_attention.head_by_head = layer.cross_attention.head_by_head = False
        return self

    def use_compiled(self, dtype: torch.dtype) -> LightGlue:
        """Use the compiled code for the processor where possible; call :meth:`fuse` first.

        Args:
            dtype: data type of the layers.
        """
        for layer in self._layers:
            layer.use_compiled(dtype)
        for assignment in self.match_assignment_layers:
            cast(MatchAssignment, assignment).use_compiled()
        return self

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled networks compute the layers."""
        return all(layer.compiled is not None for layer in self._layers)

    def match_as_one_batch(self) -> LightGlue:
        """Compute both images as one batch: for a GPU, see :class:`TransformerLayer`."""
        for layer in self._layers:
            layer.as_one_batch = True
        return self

    def to_precision(self, dtype: torch.dtype) -> LightGlue:
        """Convert the weights of the transformer's layers.

        The points' states stay float32, because they are sums of all layers' changes. The small layers that read the
        states stay float32 too: scores are products of four probabilities, and half precision cannot distinguish the
        best two of a thousand. The positions also stay float32, because 8 bits of mantissa cannot distinguish
        neighbouring pixels.
        """
        self.transformer_layers.to(dtype)
        return self

    @property
    def input_dim(self) -> int:
        """Size of the descriptors that the matcher takes."""
        return self.config["input_dim"]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the layers."""
        return self._layers[0].dtype

    @property
    def _layers(self) -> list[TransformerLayer]:
        return cast(list[TransformerLayer], list(self.transformer_layers))

    def forward(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        """Match the features of B pairs of images; detection scores are not used."""
        batch, count0, count1 = len(image0.keypoints), image0.num_keypoints, image1.num_keypoints
        if count0 == 0 or count1 == 0:
            return Assignment.empty(batch, count0, count1, image0.keypoints.device)
        adaptive = self.depth_confidence > 0 or self.width_confidence > 0
        if adaptive and (batch > 1 or image0.mask is not None or image1.mask is not None):
            # Each pair stops and drops points independently: pairs are matched one by one, without their padding.
            return self._one_by_one(image0, image1)
        if self.round_up:
            image0, image1 = image0.padded(rounded_up(count0)), image1.padded(rounded_up(count1))
        mask0, mask1 = common_masks(image0, image1)
        points0, points1 = self.encode(image0._replace(mask=mask0)), self.encode(image1._replace(mask=mask1))
        for points, count in ((points0, count0), (points1, count1)):
            points.index, points.layers = points.index[:count], points.layers[:count]
        layers = self._run_layers(points0, points1)
        left0, left1 = len(points0.index), len(points1.index)
        if left0 == 0 or left1 == 0:
            assignment = Assignment.empty(batch, left0, left1, image0.keypoints.device)
        else:
            assignment = self._assign(points0, points1, layers).first(left0, left1)
        return _unpruned(assignment, points0, points1, count0, count1, layers)

    def match_all(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        """Compute :meth:`forward` with all layers and points, whatever the confidences are, and without host decisions.

        Args:
            image0: features with at least one keypoint, and with a mask if ``image1`` has one.
            image1: features with at least one keypoint, and with a mask if ``image0`` has one.
        """
        points0, points1 = self.encode(image0), self.encode(image1)
        for layer in self.transformer_layers:
            points0.x, points1.x = layer(points0, points1)
        return self.assign(points0, points1, len(self.transformer_layers))

    def assign(self, points0: Points, points1: Points, layers: int) -> Assignment:
        """Return the matches after ``layers`` layers. No point must have been dropped before."""
        return self._assign(points0, points1, layers).after(layers)

    def are_sure(self, points0: Points, points1: Points, layer: int) -> Tensor:
        """Whether enough points of a pair are confident after a layer, () bool.

        Args:
            layer: index of the layer, from 0; not the last layer.
        """
        unsure = torch.zeros((), dtype=torch.float64, device=points0.x.device)
        total = torch.zeros_like(unsure)
        for points in (points0, points1):
            below = self.token_confidence[layer](points.x) < self._confidence_threshold(layer)
            unsure += (below if points.mask is None else below & points.mask).sum()
            total += len(points) if points.mask is None else points.mask.sum()
        return 1 - unsure / total > self.depth_confidence

    def _assign(self, points0: Points, points1: Points, layers: int) -> Assignment:
        assignment = cast(MatchAssignment, self.match_assignment_layers[layers - 1])
        return assignment.mutual_matches(points0, points1, self.filter_threshold)

    def encode(self, image: ImageFeatures) -> Points:
        """Return the points of B images as the first layer takes them."""
        positions = normalise_keypoints(image.keypoints.float(), image.size)
        device = image.keypoints.device
        return Points(
            x=self.input_projection(image.descriptors.float()),
            rotation=self.positional_encoder(positions),
            mask=image.mask,
            index=torch.arange(image.num_keypoints, device=device),
            layers=torch.ones(image.num_keypoints, dtype=torch.int64, device=device),
        )

    def states(self, image0: ImageFeatures, image1: ImageFeatures) -> Iterator[tuple[Points, Points]]:
        """Yield both images' points after each layer, without stopping or dropping points; for training.

        The states are float32 and keep their gradients.
        """
        mask0, mask1 = common_masks(image0, image1)
        points0, points1 = self.encode(image0._replace(mask=mask0)), self.encode(image1._replace(mask=mask1))
        for layer in self.transformer_layers:
            x0, x1 = layer(points0, points1)
            points0, points1 = replace(points0, x=x0.float()), replace(points1, x=x1.float())
            yield points0, points1

    def _run_layers(self, points0: Points, points1: Points) -> int:
        """Run the points through the layers, dropping and stopping as configured; returns the number of layers run."""
        last = len(self.transformer_layers) - 1
        count0, count1 = len(points0.index), len(points1.index)
        prunes = [self.width_confidence > 0 and count > self.prune_above for count in (count0, count1)]
        ahead = self.run_ahead and not any(prunes)  # pruning waits for the number of remaining points anyway
        enough: PendingBool | None = None  # whether enough points are confident after the layers so far
        for i, layer in enumerate(self.transformer_layers):
            before = points0.x, points1.x
            points0.x, points1.x = layer(points0, points1)
            if enough:
                points0.x, points1.x = before
                return i
            if i == last:
                break
            confidence0 = confidence1 = None
            if self.depth_confidence > 0:
                confidence0, confidence1 = self._confidences(points0, i), self._confidences(points1, i)
                enough = PendingBool(self._are_sure(confidence0, confidence1, i, count0 + count1))
                if not ahead and enough:
                    return i + 1
            if any(prunes):
                for points, confidence, dropped in zip((points0, points1), (confidence0, confidence1), prunes):
                    if dropped:
                        self._prune(points, confidence, i)
                    points.layers[points.index] += 1
                if len(points0.index) == 0 or len(points1.index) == 0:
                    return i + 1
        return last + 1

    def _confidences(self, points: Points, layer: int) -> Tensor:
        """Confidences (N,) of the points of a single image; 1 for padding."""
        confidence = cast(Tensor, self.token_confidence[layer](points.x))[0]
        return confidence if points.mask is None else confidence.masked_fill(~points.mask[0], 1.0)

    def _are_sure(self, confidence0: Tensor, confidence1: Tensor, layer: int, total: int) -> Tensor:
        """Whether enough of the ``total`` points are confident; pruned points count as confident (section 3.3)."""
        unsure = (torch.cat([confidence0, confidence1]) < self._confidence_threshold(layer)).sum()
        return 1 - unsure.double() / total > self.depth_confidence

    def _prune(self, points: Points, confidence: Tensor | None, layer: int) -> None:
        """Drop the points that confidently have no match (section 3.3)."""
        assignment = cast(MatchAssignment, self.match_assignment_layers[layer])
        keep = assignment.matchabilities(points.x)[0] > 1 - self.width_confidence
        if confidence is not None:
            keep |= confidence <= self._confidence_threshold(layer)
        points.keep(keep if points.mask is None else keep & points.mask[0], rounded_up if self.round_up else None)

    def _confidence_threshold(self, layer: int) -> float:
        """The confidence above which a point is confident, stricter in early layers: 0.8 + 0.1 exp(-4 l / L)."""
        return 0.8 + 0.1 * math.exp(-4 * layer / len(self.transformer_layers))

    def _one_by_one(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        total = Assignment.empty(
            len(image0.keypoints), image0.num_keypoints, image1.num_keypoints, image0.keypoints.device
        )
        for i in range(len(image0.keypoints)):
            (unpadded0, real0), (unpadded1, real1) = _without_padding(image0, i), _without_padding(image1, i)
            pair = _spread(self(unpadded0, unpadded1), real0, real1, image0.num_keypoints, image1.num_keypoints)
            for field, values in zip(total, pair):
                field[i] = values[0]
        return total


def _without_padding(images: ImageFeatures, i: int) -> tuple[ImageFeatures, Tensor]:
    """Return image i of a batch without padding, and the indices of its real keypoints."""
    if images.mask is None:
        real = torch.arange(images.num_keypoints, device=images.keypoints.device)
    else:
        real = images.mask[i].nonzero()[:, 0]
    one = slice(i, i + 1)
    return ImageFeatures(images.keypoints[one, real], images.descriptors[one, real], images.size[one]), real


def normalise_keypoints(keypoints: Tensor, size: Tensor) -> Tensor:
    """Convert pixels to positions relative to the image's centre, in units of half its longer side.

    Args:
        keypoints: (B, N, 2) x, y.
        size: (B, 2) width, height.
    """
    size = size.to(keypoints)[:, None]
    return (keypoints - size / 2) / (size.amax(dim=-1, keepdim=True) / 2)


def _unpruned(
    assignment: Assignment, points0: Points, points1: Points, count0: int, count1: int, layers: int
) -> Assignment:
    """Expand the assignment of the remaining points to one of all points before pruning."""
    assignment = assignment.after(layers)
    if len(points0.index) == count0 and len(points1.index) == count1:
        return assignment
    spread = _spread(assignment, points0.index, points1.index, count0, count1)
    return spread._replace(layers0=points0.layers[None], layers1=points1.layers[None])


def _spread(assignment: Assignment, index0: Tensor, index1: Tensor, count0: int, count1: int) -> Assignment:
    """Expand an assignment of the points ``index0`` and ``index1`` to one of ``count0`` and ``count1`` points."""
    batch = len(assignment.layers)
    total = Assignment.empty(batch, count0, count1, index0.device)

    def renamed(matches: Tensor, names: Tensor) -> Tensor:
        if len(names) == 0:
            return matches
        return torch.where(matches < 0, matches, names[matches.clamp(min=0)])

    total.matches0[:, index0] = renamed(assignment.matches0, index1)
    total.matches1[:, index1] = renamed(assignment.matches1, index0)
    total.scores0[:, index0] = assignment.scores0
    total.scores1[:, index1] = assignment.scores1
    total.layers0[:, index0] = assignment.layers0
    total.layers1[:, index1] = assignment.layers1
    return total._replace(layers=assignment.layers)


def _from_authors(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of the authors' ``.pth`` (cvg/LightGlue) with this module's names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        # Older files have the layer's number after the block's name: self_attn.0 instead of transformers.0.self_attn.
        name = re.sub(r"^(self_attn|cross_attn)\.(\d+)\.", r"transformers.\2.\1.", name)
        if name == "confidence_thresholds" or re.fullmatch(r"log_assignment\.\d+\.r", name):
            continue  # computed from the number of layers; left over from an experiment of the authors
        name = re.sub(r"^input_proj\.", "input_projection.", name)
        name = re.sub(r"^posenc\.Wr\.", "positional_encoder.projector.", name)
        name = re.sub(r"^token_confidence\.(\d+)\.token\.0\.", r"token_confidence.\1.token.", name)
        name = re.sub(r"^log_assignment\.(\d+)\.final_proj\.", r"match_assignment_layers.\1.final_projection.", name)
        name = re.sub(r"^log_assignment\.", "match_assignment_layers.", name)
        name = re.sub(r"^transformers\.", "transformer_layers.", name)
        for block in ("self", "cross"):
            for old, new in (("0", "fc1"), ("1", "layer_norm"), ("3", "fc2")):
                name = name.replace(f".{block}_attn.ffn.{old}.", f".{block}_mlp.{new}.")
        name = name.replace(".self_attn.", ".self_attention.").replace(".cross_attn.", ".cross_attention.")
        name = name.replace(".out_proj.", ".o_proj.").replace(".to_out.", ".o_proj.").replace(".to_v.", ".v_proj.")
        if ".Wqkv." in name:
            # Interleaved: a channel's query, key and value are adjacent.
            for part, projection in zip(tensor.unflatten(0, (-1, 3)).unbind(1), ("q_proj", "k_proj", "v_proj")):
                tensors[name.replace("Wqkv", projection)] = part
        elif ".to_qk." in name:
            for projection in ("q_proj", "k_proj"):
                tensors[name.replace("to_qk", projection)] = tensor
        else:
            tensors[name] = tensor
    size = tensors["match_assignment_layers.0.final_projection.weight"].shape[0]
    head_size = 2 * tensors["positional_encoder.projector.weight"].shape[0]
    input_projection = tensors.get("input_projection.weight")
    config = {
        "model_type": "lightglue",
        "descriptor_dim": size,
        "input_dim": size if input_projection is None else input_projection.shape[1],
        "num_hidden_layers": sum(name.endswith(".final_projection.weight") for name in tensors),
        "num_attention_heads": size // head_size,
    }
    return config, tensors
