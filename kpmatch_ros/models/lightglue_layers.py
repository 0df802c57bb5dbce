"""The layers of LightGlue. Equation and section numbers refer to the paper, see :mod:`kpmatch_ros.models.lightglue`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.models import compiled
from kpmatch_ros.models.assignment import Assignment, attend, attention_weights, mutual_matches, mutual_of_best

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "FeedForward",
    "MatchAssignment",
    "Points",
    "PositionalEncoder",
    "TokenConfidence",
    "TransformerLayer",
]

_LOW = -1e30  # added to a similarity so that its exponential is 0
_ACROSS_AT_ONCE = 1024  # points up to which a head's float32 similarities were seen to stay in the cache

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class PositionalEncoder(nn.Module):
    """Rotary encoding of 2-D positions: learned frequencies, one rotation per pair of channels (eq. 6).

    Attributes:
        as_complex: rotations are complex numbers; if false, pairs of real numbers, because ONNX has no complex numbers.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.projector = nn.Linear(2, head_size // 2, bias=False)
        self.as_complex = True

    def forward(self, positions: Tensor) -> Tensor:
        """Compute rotations for normalised positions (B, N, 2): unit complex numbers (B, 1, N, head size / 2).

        If :attr:`as_complex` is false, they are cosine and sine (B, 1, N, head size / 2, 2).
        """
        angles = self.projector(positions)[:, None]
        if not self.as_complex:
            return torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair of channels of x (B, heads, N, head size) by its angle, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if not rotation.is_complex():
        (x0, x1), (cosine, sine) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([x0 * cosine - x1 * sine, x0 * sine + x1 * cosine], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
    return turned.flatten(-2).to(x.dtype)


class Heads(NamedTuple):
    """Queries, keys and values of an image's points, (B, heads, N, head size) each."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Multi-head attention; keys and values may have fewer heads than queries.

    Attributes:
        head_by_head: compute bfloat16 on a processor head by head, from large matrix products. On processors with
            matrix tiles (AMX), PyTorch's attention takes a third of that time; on others it takes longer.
        joint: computes queries, keys and values with one matrix product, see :meth:`join_projections`.
    """

    def __init__(self, size: int, heads: int, key_value_heads: int, bias: bool) -> None:
        super().__init__()
        self.head_size = size // heads
        self.heads, self.key_value_heads = heads, key_value_heads
        self.q_proj = nn.Linear(size, size, bias=bias)
        self.k_proj = nn.Linear(size, key_value_heads * self.head_size, bias=bias)
        self.v_proj = nn.Linear(size, key_value_heads * self.head_size, bias=bias)
        self.o_proj: nn.Module = nn.Linear(size, size, bias=bias)
        self.joint: nn.Linear | None = None
        self.head_by_head = True

    def project(self, x: Tensor, rotation: Tensor | None = None) -> Heads:
        """Return queries, keys and values of the points x (B, N, C)."""
        together = torch.cat([part(x) for part in self._parts()], dim=-1) if self.joint is None else self.joint(x)
        heads = together.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        value = heads[:, -self.key_value_heads :]
        heads = heads[:, : -self.key_value_heads]  # queries, then keys unless they are the same
        if rotation is not None and heads.is_cuda:
            heads = rotate(heads, rotation)  # both at once: on a GPU the number of kernels determines the time
        query, key = heads[:, : self.heads], heads[:, -self.key_value_heads :]
        if rotation is not None and not heads.is_cuda:
            query, key = rotate(query, rotation), rotate(key, rotation)  # one by one, so that they stay in the cache
        return Heads(query, self._shared(key), self._shared(value))

    def forward(self, points: Heads, source: Heads, mask: Tensor | None) -> Tensor:
        """Return messages (B, N, C) to points from a source of M points; ``mask`` (B, M) is true for real ones."""
        if self._computes_head_by_head(points.query) and points is source:
            message = _attend_by_heads(points, mask)
        else:
            message = attend(points.query, source.key, source.value, mask)
        return self._output(message)

    def both_ways(
        self, heads0: Heads, heads1: Heads, mask0: Tensor | None, mask1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the messages that two images' points receive from each other; masks as for :meth:`forward`."""
        most = max(heads0.query.shape[2], heads1.query.shape[2])
        at_once = self.k_proj is self.q_proj and self._computes_head_by_head(heads0.query)
        if at_once and most <= _ACROSS_AT_ONCE and not (heads0.query.requires_grad or self._forward_hooks):
            message0, message1 = _attend_across(heads0, heads1, mask0, mask1)
            return self._output(message0), self._output(message1)
        return self(heads0, heads1, mask1), self(heads1, heads0, mask0)

    def _computes_head_by_head(self, numbers: Tensor) -> bool:
        return self.head_by_head and numbers.dtype == torch.bfloat16 and numbers.device.type == "cpu"

    def share_equal_projections(self) -> None:
        """Compute queries and keys only once if their weights are equal, as in the authors' cross-attention."""
        if all(torch.equal(*pair) for pair in zip(self.q_proj.parameters(), self.k_proj.parameters())):
            self.k_proj = self.q_proj

    def join_projections(self) -> None:
        """Compute queries, keys and values with one matrix product: on a GPU each product needs a kernel launch."""
        parts = self._parts()
        weight = torch.cat([part.weight for part in parts])
        place: Any = {"device": weight.device, "dtype": weight.dtype}
        self.joint = nn.Linear(weight.shape[1], weight.shape[0], bias=parts[0].bias is not None, **place)
        self.joint.weight.copy_(weight)
        if parts[0].bias is not None:
            self.joint.bias.copy_(torch.cat([part.bias for part in parts]))
        self.joint.requires_grad_(False)
        for part in parts:
            del part.weight, part.bias  # keep the modules: other code checks whether k_proj is q_proj

    def _parts(self) -> list[nn.Linear]:
        """The projections to queries, keys and values; without that to keys if the keys are the queries."""
        return [self.q_proj, self.v_proj] if self.k_proj is self.q_proj else [self.q_proj, self.k_proj, self.v_proj]

    def weights(self, points: Heads, source: Heads, mask: Tensor | None) -> Tensor:
        """Attention weights (B, heads, N, M) of each point for each of the source, arguments as for :meth:`forward`."""
        return attention_weights(points.query, source.key, mask)

    def _output(self, message: Tensor) -> Tensor:
        return cast(Tensor, self.o_proj(message.transpose(1, 2).flatten(-2)))

    def _shared(self, heads: Tensor) -> Tensor:
        groups = self.heads // self.key_value_heads
        return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)


def _attend_by_heads(heads: Heads, mask: Tensor | None) -> Tensor:
    """Compute self-attention with similarities in bfloat16.

    On a processor without matrix tiles it takes a third less time than PyTorch's. It is not precise enough for
    cross-attention, whose similarities reach 2000, where bfloat16 has steps of 8.

    Args:
        heads: queries, keys and values of an image's N points.
        mask: (B, N) bool, as for :meth:`Attention.forward`.

    Returns:
        The messages (B, heads, N, head size).
    """
    batch, count, points, size = heads.query.shape
    message = heads.query.new_empty(batch, points, count, size).transpose(1, 2)
    rows = max(2**20 // points, 128)  # rows of one head at a time: 2 MB of similarities stay in the cache
    lows = _low_where_masked(mask, heads.query.dtype, batch)
    for b, h, first in itertools.product(range(batch), range(count), range(0, points, rows)):
        some = slice(first, first + rows)
        similarity = F.linear(heads.query[b, h, some] / math.sqrt(size), heads.key[b, h], lows[b])
        message[b, h, some] = similarity.softmax(dim=-1) @ heads.value[b, h]
    return message


def _attend_across(heads0: Heads, heads1: Heads, mask0: Tensor | None, mask1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute cross-attention in both directions where queries equal keys. Float32 similarities are computed once.

    The weights are powers of two, which PyTorch computes in half the time of exponentials.

    Args:
        heads0: queries, keys and values of image 0, N points.
        heads1: queries, keys and values of image 1, M points.
        mask0: (B, N) bool, as for :meth:`Attention.forward`.
        mask1: (B, M).

    Returns:
        The messages (B, heads, N, head size) and (B, heads, M, head size).
    """
    batch, count, _, size = heads0.query.shape
    message0, message1 = (torch.empty_like(heads.query) for heads in (heads0, heads1))
    lows0, lows1 = (_low_where_masked(mask, torch.float32, batch) for mask in (mask0, mask1))
    for b, h in itertools.product(range(batch), range(count)):
        query, key = heads0.query[b, h].float() * (math.log2(math.e) / math.sqrt(size)), heads1.key[b, h].float()
        similarity = F.linear(query, key, lows1[b])
        message0[b, h] = _weighted_mean(similarity - similarity.amax(dim=1, keepdim=True), heads1.value[b, h])
        low0 = lows0[b]
        if low0 is not None:
            similarity += low0[:, None]
        message1[b, h] = _weighted_mean(similarity.sub_(similarity.amax(dim=0)).T, heads0.value[b, h])
    return message0, message1


def _weighted_mean(exponents: Tensor, values: Tensor) -> Tensor:
    """Average the values (M, C) with the weights 2^exponents (N, M), whose largest in each row is 1: (N, C)."""
    weights = exponents.clamp_min_(-100).exp2_()  # subnormal numbers would take processors far longer
    return (weights.to(values.dtype) @ values) / weights.sum(dim=1, keepdim=True)


def _low_where_masked(mask: Tensor | None, dtype: torch.dtype, batch: int) -> Sequence[Tensor | None]:
    """For each image of a batch, the term (N,) to add to similarities with its points: very negative for padding."""
    if mask is None:
        return [None] * batch
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, _LOW).unbind()


class FeedForward(nn.Module):
    """Updates a point's state with the message it received (eq. 2)."""

    def __init__(self, size: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * size, 2 * size)
        self.layer_norm = nn.LayerNorm(2 * size)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(2 * size, size)

    def forward(self, x: Tensor, message: Tensor, rounded: Tensor | None = None) -> Tensor:
        """Return the new states of points x (B, N, C).

        Args:
            message: (B, N, C) the messages that the points received.
            rounded: the points' states in the precision of the message, if already computed.
        """
        states = x.to(message.dtype) if rounded is None else rounded
        hidden = self.layer_norm(self.fc1(torch.cat([states, message], dim=-1)))
        return x + self.fc2(self.activation(hidden))

    def absorb(self, projection: nn.Module) -> None:
        """Merge a linear layer of the messages into this layer. From then on, messages must come without it."""
        assert isinstance(projection, nn.Linear)
        of_message = self.fc1.weight[:, projection.out_features :]
        if projection.bias is not None:
            self.fc1.bias.add_(of_message @ projection.bias)
        of_message.copy_(of_message @ projection.weight)


class TransformerLayer(nn.Module):
    """Self-attention within each image, then cross-attention between the two (section 3.1).

    Attributes:
        as_one_batch: compute both images as one batch if they have equally many points. This takes half as many
            kernels, each with twice the work. It is faster on a GPU, which a single image leaves half idle.
        compiled: computes the layer instead of PyTorch, see :meth:`use_compiled`; None for PyTorch.
    """

    def __init__(self, size: int, heads: int, key_value_heads: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.self_attention = Attention(size, heads, key_value_heads, bias)
        self.self_mlp = FeedForward(size, activation)
        self.cross_attention = Attention(size, heads, key_value_heads, bias)
        self.cross_mlp = FeedForward(size, activation)
        self.as_one_batch = False
        self.compiled: compiled.CompiledLayer | None = None

    def forward(self, points0: Points, points1: Points) -> tuple[Tensor, Tensor]:
        """Return the new states of both images' points."""
        if self.compiled is not None and self.compiled.dtype == self.dtype and compiled.may_process(points0.x):
            # A layer compiled for bfloat16 may temporarily be in float32, so the types are compared.
            return self.compiled(points0, points1)
        alike = points0.x.shape == points1.x.shape and (points0.mask is None) == (points1.mask is None)
        if self.as_one_batch and alike:
            return self._as_one_batch(points0, points1)
        x0, x1 = (self._within(points.x, points.rotation, points.mask) for points in (points0, points1))
        rounded0, rounded1 = x0.to(self.dtype), x1.to(self.dtype)
        heads0, heads1 = self.cross_attention.project(rounded0), self.cross_attention.project(rounded1)
        message0, message1 = self.cross_attention.both_ways(heads0, heads1, points0.mask, points1.mask)
        return self.cross_mlp(x0, message0, rounded0), self.cross_mlp(x1, message1, rounded1)

    def _as_one_batch(self, points0: Points, points1: Points) -> tuple[Tensor, Tensor]:
        x, rotation = torch.cat([points0.x, points1.x]), torch.cat([points0.rotation, points1.rotation])
        mask = other_mask = None
        if points0.mask is not None and points1.mask is not None:
            mask, other_mask = torch.cat([points0.mask, points1.mask]), torch.cat([points1.mask, points0.mask])
        x = self._within(x, rotation, mask)
        rounded = x.to(self.dtype)
        heads = self.cross_attention.project(rounded)
        pairs = len(points0.x)
        others = Heads(heads.query, heads.key.roll(pairs, 0), heads.value.roll(pairs, 0))  # of the other image
        x = self.cross_mlp(x, self.cross_attention(heads, others, other_mask), rounded)
        return x[:pairs], x[pairs:]

    def _within(self, x: Tensor, rotation: Tensor, mask: Tensor | None) -> Tensor:
        rounded = x.to(self.dtype)
        heads = self.self_attention.project(rounded, rotation)
        return self.self_mlp(x, self.self_attention(heads, heads, mask), rounded)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the matrix products."""
        return self.self_mlp.fc1.weight.dtype

    def fuse(self) -> None:
        """See :meth:`LightGlue.fuse`."""
        if self.self_attention.joint is not None:
            return
        for attention, mlp in ((self.self_attention, self.self_mlp), (self.cross_attention, self.cross_mlp)):
            mlp.absorb(attention.o_proj)
            attention.o_proj = nn.Identity()
        self.cross_attention.share_equal_projections()
        for attention in (self.self_attention, self.cross_attention):
            attention.join_projections()

    def use_compiled(self, dtype: torch.dtype) -> None:
        """See :meth:`LightGlue.use_compiled`."""
        fits = compiled.CompiledLayer.fits(self, dtype)
        self.compiled = compiled.CompiledLayer(self, dtype) if fits else None


class MatchAssignment(nn.Module):
    """Assignment from the similarity of every pair and the matchability of every point (eqs. 7 to 9).

    Attributes:
        compiled: finds the best pairs on a processor instead of PyTorch, see :meth:`use_compiled`; None for PyTorch.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.final_projection = nn.Linear(size, size)
        self.matchability = nn.Linear(size, 1)
        self.compiled: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    def forward(self, points0: Points, points1: Points) -> Tensor:
        """Return the log probabilities (B, N0, N1) that two points match; -inf for padding."""
        similarity = self._similarity(points0, points1)
        real = _pairs(points0.mask, points1.mask)
        if real is not None:
            similarity = similarity.masked_fill(~real, torch.finfo(similarity.dtype).min)
        scores = similarity.log_softmax(dim=2) + _log_softmax_of_columns(similarity)
        scores += self._certainty(points0)[..., None]
        scores += self._certainty(points1)[:, None, :]
        return scores if real is None else scores.masked_fill(~real, -torch.inf)

    def mutual_matches(self, points0: Points, points1: Points, threshold: float) -> Assignment:
        """The matches of B pairs of images, N0 and N1 at least 1, whose scores exceed a threshold."""
        masked = points0.mask is not None or points1.mask is not None
        usable = self.compiled is not None and compiled.has_vectors() and compiled.may_process(points0.x)
        if masked or self.compiled is None or not usable:
            return mutual_matches(self(points0, points1), torch.exp, threshold)
        parts = self._similarity(points0, points1), self._certainty(points0), self._certainty(points1)
        best0, best1, most0 = (torch.stack(each) for each in zip(*map(self.compiled, *parts)))
        return mutual_of_best(best0, best1, most0.exp(), threshold)

    def use_compiled(self) -> None:
        """See :meth:`LightGlue.use_compiled`."""
        self.compiled = compiled.best_pairs if compiled.has_vectors() else None

    def _similarity(self, points0: Points, points1: Points) -> Tensor:
        # In float32: a score is a product of four probabilities, and half precision cannot distinguish the best two.
        projected0, projected1 = (self.final_projection(points.x).float() for points in (points0, points1))
        return projected0 / math.sqrt(projected0.shape[-1]) @ projected1.transpose(-1, -2)

    def _certainty(self, points: Points) -> Tensor:
        """Log probability (B, N) that a point has a match."""
        return F.logsigmoid(self.matchability(points.x).float())[..., 0]

    def matchabilities(self, x: Tensor) -> Tensor:
        """Probability (B, N) that a point has a match (eq. 8)."""
        return self.matchability(x).float().sigmoid()[..., 0]


def _log_softmax_of_columns(x: Tensor) -> Tensor:
    """Log softmax over dimension 1 of (B, N0, N1)."""
    if x.is_cuda:
        # Reduce along the last dimension in memory. Along another one, 1024 x 1024 values take an H100 0.54 ms, which
        # is a fifth of LightGlue's time.
        return x.transpose(1, 2).contiguous().log_softmax(dim=2).transpose(1, 2)
    return x.log_softmax(dim=1)


def _pairs(mask0: Tensor | None, mask1: Tensor | None) -> Tensor | None:
    if mask0 is None:
        return None if mask1 is None else mask1[:, None, :]
    return mask0[:, :, None] if mask1 is None else mask0[:, :, None] & mask1[:, None, :]


class TokenConfidence(nn.Module):
    """Confidence of each point that its match, or its lack of a match, is final (eq. 10)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.token = nn.Linear(size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the confidence (B, N), a probability."""
        return self.token(x).float().sigmoid()[..., 0]


@dataclass
class Points:
    """The points of one image between the layers.

    Attributes:
        x: (B, N, C) states, float32.
        rotation: the rotary encoding of their positions.
        mask: (B, N) bool, true for points, false for padding; None without padding.
        index: int64, for the remaining points of a single image, their indices among the given keypoints. Dropped
            points and padding, which is last, are not included.
        layers: (count,) int64, for each given keypoint the number of layers that it took part in. Only valid for a
            single pair.
    """

    x: Tensor
    rotation: Tensor
    mask: Tensor | None
    index: Tensor
    layers: Tensor

    def __len__(self) -> int:
        return self.x.shape[1]

    def keep(self, keep: Tensor, rounded: Callable[[int], int] | None = None) -> None:
        """Drop the points of a single image for which ``keep`` (N,) is false.

        Args:
            keep: (N,) bool, false for padding.
            rounded: returns the number of points to compute with, given the number of points that are kept. Padding
                fills up the difference.
        """
        chosen = keep.nonzero()[:, 0]
        count = len(chosen)
        if count == len(self.index):
            return
        self.index = self.index[chosen]
        if rounded is not None:
            behind = min(rounded(count), len(self)) - count
            chosen = torch.cat([chosen, keep.logical_not().nonzero()[:behind, 0]])
        self.x = self.x[:, chosen]
        self.rotation = self.rotation[:, :, chosen]
        self.mask = None if len(chosen) == count else keep[None, chosen]
