"""LightGlue: a transformer that matches two sets of keypoints, and stops as soon as it is sure.

Lindenberger, Sarlin, Pollefeys: LightGlue: Local Feature Matching at Light Speed, ICCV 2023 (arXiv:2306.13643).
Equation numbers below are the paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.models.assignment import Assignment, ImageFeatures, attention_weights, common_masks, mutual_matches
from kpmatch_ros.models.base import PretrainedNetwork
from kpmatch_ros.models.checkpoint import Checkpoint
from kpmatch_ros.weights import WeightsError

__all__ = ["LightGlue"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class PositionalEncoder(nn.Module):
    """Rotary encoding of 2-D positions: learned frequencies, one rotation per pair of channels (eq. 6)."""

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.projector = nn.Linear(2, head_size // 2, bias=False)

    def forward(self, positions: Tensor) -> Tensor:
        """(B, N, 2) normalised positions to rotations (B, 1, N, head size / 2): complex numbers of length 1."""
        angles = self.projector(positions)[:, None]
        return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, heads, N, head size) by its angle, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class Heads(NamedTuple):
    """What the points of an image ask, answer to and tell: (B, heads, N, head size) each."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Multi-head attention, with fewer key and value heads than query heads where so configured."""

    def __init__(self, size: int, heads: int, key_value_heads: int, bias: bool) -> None:
        super().__init__()
        self.head_size = size // heads
        self.groups = heads // key_value_heads
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, key_value_heads * self.head_size, bias=bias)
        self.v_proj = nn.Linear(size, key_value_heads * self.head_size, bias=bias)
        self.o_proj: nn.Module = nn.Linear(size, size, bias=bias)

    def project(self, x: Tensor, rotation: Tensor | None = None) -> Heads:
        """The parts that the points x (B, N, C) take in attention."""
        query = self._heads(self.q_proj(x))
        key = query if self.k_proj is self.q_proj else self._heads(self.k_proj(x))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        return Heads(query, self._shared(key), self._shared(self._heads(self.v_proj(x))))

    def forward(self, points: Heads, source: Heads, mask: Tensor | None) -> Tensor:
        """Messages (B, N, C) to points from a source of M points; ``mask`` (B, M) marks the source's real ones."""
        message = F.scaled_dot_product_attention(
            points.query, source.key, source.value, attn_mask=None if mask is None else mask[:, None, None, :]
        )
        return self.o_proj(message.transpose(1, 2).flatten(-2))

    def share_equal_projections(self) -> None:
        """Compute queries and keys once where their weights are the same, as in the authors' cross-attention."""
        if all(torch.equal(*pair) for pair in zip(self.q_proj.parameters(), self.k_proj.parameters())):
            self.k_proj = self.q_proj

    def weights(self, points: Heads, source: Heads, mask: Tensor | None) -> Tensor:
        """How much (B, heads, N, M) each point listens to each of the source, arguments as for :meth:`forward`."""
        return attention_weights(points.query, source.key, mask)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def _shared(self, heads: Tensor) -> Tensor:
        return heads if self.groups == 1 else heads.repeat_interleave(self.groups, dim=1)


class FeedForward(nn.Module):
    """What a point makes of its own state and the message it received (eq. 2)."""

    def __init__(self, size: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * size, 2 * size)
        self.layer_norm = nn.LayerNorm(2 * size)
        self.activation = _ACTIVATIONS[activation]
        self.fc2 = nn.Linear(2 * size, size)

    def forward(self, x: Tensor, message: Tensor) -> Tensor:
        hidden = self.layer_norm(self.fc1(torch.cat([x.to(message.dtype), message], dim=-1)))
        return x + self.fc2(self.activation(hidden))

    def absorb(self, projection: nn.Module) -> None:
        """Take messages as they are before this linear layer from now on."""
        assert isinstance(projection, nn.Linear)
        of_message = self.fc1.weight[:, projection.out_features :]
        if projection.bias is not None:
            self.fc1.bias.add_(of_message @ projection.bias)
        of_message.copy_(of_message @ projection.weight)


class TransformerLayer(nn.Module):
    """Self-attention within each image, then cross-attention between the two (section 3.1)."""

    def __init__(self, size: int, heads: int, key_value_heads: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.self_attention = Attention(size, heads, key_value_heads, bias)
        self.self_mlp = FeedForward(size, activation)
        self.cross_attention = Attention(size, heads, key_value_heads, bias)
        self.cross_mlp = FeedForward(size, activation)

    def forward(self, points0: Points, points1: Points) -> tuple[Tensor, Tensor]:
        """The new states of both images' points."""
        x0, x1 = (self._within(points) for points in (points0, points1))
        heads0, heads1 = (self.cross_attention.project(x.to(self.dtype)) for x in (x0, x1))
        return (
            self.cross_mlp(x0, self.cross_attention(heads0, heads1, points1.mask)),
            self.cross_mlp(x1, self.cross_attention(heads1, heads0, points0.mask)),
        )

    def _within(self, points: Points) -> Tensor:
        heads = self.self_attention.project(points.x.to(self.dtype), points.rotation)
        return self.self_mlp(points.x, self.self_attention(heads, heads, points.mask))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its products."""
        return self.self_mlp.fc1.weight.dtype

    def fuse(self) -> None:
        """As :meth:`LightGlue.fuse`."""
        for attention, mlp in ((self.self_attention, self.self_mlp), (self.cross_attention, self.cross_mlp)):
            mlp.absorb(attention.o_proj)
            attention.o_proj = nn.Identity()
        self.cross_attention.share_equal_projections()


class MatchAssignment(nn.Module):
    """Similarity of every pair and matchability of every point, to an assignment (eqs. 7 to 9)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.final_projection = nn.Linear(size, size)
        self.matchability = nn.Linear(size, 1)

    def forward(self, points0: Points, points1: Points) -> Tensor:
        """Logarithms (B, N0, N1) of the probabilities that two points match; -inf for padding."""
        # In float32: a score is a product of four probabilities, and half precision cannot tell the best two apart.
        projected0, projected1 = (self.final_projection(points.x).float() for points in (points0, points1))
        similarity = projected0 @ projected1.transpose(-1, -2) / math.sqrt(projected0.shape[-1])
        real = _pairs(points0.mask, points1.mask)
        if real is not None:
            similarity = similarity.masked_fill(~real, torch.finfo(similarity.dtype).min)
        logits0, logits1 = (self.matchability(points.x).float() for points in (points0, points1))
        certainty = F.logsigmoid(logits0) + F.logsigmoid(logits1).transpose(-1, -2)
        scores = similarity.log_softmax(dim=2) + similarity.log_softmax(dim=1) + certainty
        return scores if real is None else scores.masked_fill(~real, -torch.inf)

    def matchabilities(self, x: Tensor) -> Tensor:
        """Probability (B, N) that a point has a match (eq. 8)."""
        return self.matchability(x).float().sigmoid()[..., 0]


def _pairs(mask0: Tensor | None, mask1: Tensor | None) -> Tensor | None:
    if mask0 is None or mask1 is None:
        return None
    return mask0[:, :, None] & mask1[:, None, :]


class TokenConfidence(nn.Module):
    """How sure each point is that its match, or having none, will not change any more (eq. 10)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.token = nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Probability (B, N)."""
        return self.token(x).float().sigmoid()[..., 0]


@dataclass
class Points:
    """The points of one image on their way through the layers.

    Attributes:
        x: (B, N, C) states, float32.
        rotation: the rotary encoding of their positions.
        mask: (B, N) bool, true for real points; None where all are.
        index: (N,) where they stand among the keypoints given; points that were pruned are gone from it.
        layers: (count,) int64 layers each of the keypoints given took part in. Only for a single pair.
    """

    x: Tensor
    rotation: Tensor
    mask: Tensor | None
    index: Tensor
    layers: Tensor

    def __len__(self) -> int:
        return self.x.shape[1]

    def keep(self, keep: Tensor) -> None:
        """Drop the points for which ``keep`` (N,) is false."""
        chosen = keep.nonzero()[:, 0]
        self.x = self.x[:, chosen]
        self.rotation = self.rotation[:, :, chosen]
        self.index = self.index[chosen]


class OnItsWay:
    """A truth value that a device is still working out. The host waits for it when it asks, not before."""

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
        run_ahead: begin the next layer before it is known whether the last one was enough, and drop what it made if it
            was. For a GPU, which would stand still while the host looks; the matches are the same.
        prune_above: points are dropped only from images with more of them than this.
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
        if size % heads or heads % key_value_heads:
            raise WeightsError(
                f"LightGlue cannot split {size} channels into {heads} heads with {key_value_heads} key and value heads"
            )
        if self.config["hidden_act"] not in _ACTIVATIONS:
            raise WeightsError(
                f"LightGlue does not know the activation {self.config['hidden_act']!r}, only {', '.join(_ACTIVATIONS)}"
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
        """Translate a checkpoint of either family into this module's configuration and parameter names."""
        config = dict(checkpoint.config)
        if "log_assignment.0.final_proj.weight" in checkpoint.tensors:
            config, tensors = _from_authors(checkpoint)
        else:
            tensors = {k: v for k, v in checkpoint.tensors.items() if not k.startswith("keypoint_detector.")}
            # The detector and what follows from other keys, such as the width of the MLP, are no settings of ours.
            detector = config.pop("keypoint_detector_config", None) or {}
            for derived in ("hidden_size", "intermediate_size", "head_dim", "trust_remote_code"):
                config.pop(derived, None)
            if "descriptor_decoder_dim" in detector:
                config["input_dim"] = detector["descriptor_decoder_dim"]
        return Checkpoint(config, tensors, checkpoint.source)

    @torch.no_grad()
    def fuse(self) -> LightGlue:
        """Merge neighbouring linear layers, for inference: the matches stay, the names of the tensors do not.

        Attention's output projection goes into the layer that reads its messages; where queries and keys of
        cross-attention have the same weights, as in the authors' networks, they are computed once.
        """
        for layer in self.transformer_layers:
            cast(TransformerLayer, layer).fuse()
        return self

    def to_precision(self, dtype: torch.dtype) -> LightGlue:
        """Convert the weights of the transformer's layers.

        The points' states stay float32, as sums of all layers' changes, and so do the small layers that read them:
        scores are products of four probabilities, and half precision cannot tell the best two of a thousand apart. Nor
        can 8 bits of mantissa tell neighbouring pixels apart, so the positions stay as well.
        """
        self.transformer_layers.to(dtype)
        return self

    @property
    def input_dim(self) -> int:
        """Size of the descriptors it takes."""
        return self.config["input_dim"]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the layers."""
        return cast(TransformerLayer, self.transformer_layers[0]).dtype

    def forward(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        """Match the features of B pairs of images; detection scores play no part."""
        batch, count0, count1 = len(image0.keypoints), image0.num_keypoints, image1.num_keypoints
        if count0 == 0 or count1 == 0:
            return Assignment.empty(batch, count0, count1, image0.keypoints.device)
        adaptive = self.depth_confidence > 0 or self.width_confidence > 0
        if adaptive and (batch > 1 or image0.mask is not None or image1.mask is not None):
            # Each pair stops and drops points in its own time: pairs are matched one by one, without their padding.
            return self._one_by_one(image0, image1)
        mask0, mask1 = common_masks(image0, image1)
        points0, points1 = self.encode(image0._replace(mask=mask0)), self.encode(image1._replace(mask=mask1))
        layers = self._run_layers(points0, points1)
        if len(points0) == 0 or len(points1) == 0:
            assignment = Assignment.empty(batch, len(points0), len(points1), image0.keypoints.device)
        else:
            scores = self.match_assignment_layers[layers - 1](points0, points1)
            assignment = mutual_matches(scores, torch.exp, self.filter_threshold)
        return _unpruned(assignment, points0, points1, count0, count1, layers)

    def encode(self, image: ImageFeatures) -> Points:
        """The points of B images as they enter the first layer."""
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
        """Both images' points after each layer in turn, nothing stopped or dropped: what training looks at."""
        mask0, mask1 = common_masks(image0, image1)
        points0, points1 = self.encode(image0._replace(mask=mask0)), self.encode(image1._replace(mask=mask1))
        for layer in self.transformer_layers:
            x0, x1 = layer(points0, points1)
            points0, points1 = replace(points0, x=x0.float()), replace(points1, x=x1.float())
            yield points0, points1

    def _run_layers(self, points0: Points, points1: Points) -> int:
        """Run the points through the layers, dropping and stopping as configured; the number of layers run."""
        last = len(self.transformer_layers) - 1
        total = len(points0) + len(points1)
        prunes = self.width_confidence > 0 and max(len(points0), len(points1)) > self.prune_above
        ahead = self.run_ahead and not prunes  # how many points are left has to be waited for anyway
        enough: OnItsWay | None = None  # whether the points are sure after the layers so far
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
                confidence0 = self.token_confidence[i](points0.x)[0]
                confidence1 = self.token_confidence[i](points1.x)[0]
                enough = OnItsWay(self._are_sure(confidence0, confidence1, i, total))
                if not ahead and enough:
                    return i + 1
            if prunes:
                self._prune(points0, confidence0, i)
                self._prune(points1, confidence1, i)
                if len(points0) == 0 or len(points1) == 0:
                    return i + 1
        return last + 1

    def _are_sure(self, confidence0: Tensor, confidence1: Tensor, layer: int, total: int) -> Tensor:
        """Whether enough of the ``total`` points are sure, the pruned ones among them (section 3.3)."""
        unsure = (torch.cat([confidence0, confidence1]) < self._confidence_threshold(layer)).sum()
        return 1 - unsure.double() / total > self.depth_confidence

    def _prune(self, points: Points, confidence: Tensor | None, layer: int) -> None:
        """Drop the points that are sure of having no match (section 3.3)."""
        assignment = cast(MatchAssignment, self.match_assignment_layers[layer])
        keep = assignment.matchabilities(points.x)[0] > 1 - self.width_confidence
        if confidence is not None:
            keep |= confidence <= self._confidence_threshold(layer)
        points.keep(keep)
        points.layers[points.index] += 1

    def _confidence_threshold(self, layer: int) -> float:
        """Stricter in early layers: 0.8 + 0.1 exp(-4 l / L)."""
        return 0.8 + 0.1 * math.exp(-4 * layer / len(self.transformer_layers))

    def _one_by_one(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        total = Assignment.empty(
            len(image0.keypoints), image0.num_keypoints, image1.num_keypoints, image0.keypoints.device
        )
        for i in range(len(image0.keypoints)):
            (alone0, real0), (alone1, real1) = _without_padding(image0, i), _without_padding(image1, i)
            pair = _spread(self(alone0, alone1), real0, real1, image0.num_keypoints, image1.num_keypoints)
            for field, values in zip(total, pair):
                field[i] = values[0]
        return total


def _without_padding(images: ImageFeatures, i: int) -> tuple[ImageFeatures, Tensor]:
    """Image i of a batch, and which of its keypoints are real, as indices."""
    if images.mask is None:
        real = torch.arange(images.num_keypoints, device=images.keypoints.device)
    else:
        real = images.mask[i].nonzero()[:, 0]
    one = slice(i, i + 1)
    return ImageFeatures(images.keypoints[one, real], images.descriptors[one, real], images.size[one]), real


def normalise_keypoints(keypoints: Tensor, size: Tensor) -> Tensor:
    """Pixels to positions around the image's centre, in units of half its longer side.

    Args:
        keypoints: (B, N, 2) x, y.
        size: (B, 2) width, height.
    """
    size = size.to(keypoints)[:, None]
    return (keypoints - size / 2) / (size.amax(dim=-1, keepdim=True) / 2)


def _unpruned(
    assignment: Assignment, points0: Points, points1: Points, count0: int, count1: int, layers: int
) -> Assignment:
    """The assignment of the points that are left, as one of all the points there were."""
    assignment = assignment._replace(layers=torch.full_like(assignment.layers, layers))
    if len(points0) == count0 and len(points1) == count1:
        return assignment._replace(
            layers0=torch.full_like(assignment.layers0, layers), layers1=torch.full_like(assignment.layers1, layers)
        )
    spread = _spread(assignment, points0.index, points1.index, count0, count1)
    return spread._replace(layers0=points0.layers[None], layers1=points1.layers[None])


def _spread(assignment: Assignment, index0: Tensor, index1: Tensor, count0: int, count1: int) -> Assignment:
    """An assignment of points ``index0`` and ``index1`` as one of ``count0`` and ``count1`` points."""
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
    """Configuration and tensors of the authors' ``.pth`` (cvg/LightGlue) under this module's names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        # Older files count the layers behind the block's name: self_attn.0 instead of transformers.0.self_attn.
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
            # Interleaved: query, key and value of a channel stand next to each other.
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
