"""A narrower LightGlue that starts with the knowledge of a wide one.

The states of a wide LightGlue are mostly in a space of few dimensions. The states of the narrow one are coordinates in
this space. Each of its layers starts with the wide one's weights, restricted to this space: the strongest directions of
heads, the strongest frequencies of the rotary encoding, and the strongest channels of the feed-forward network, whose
last layer is fitted again. The low-rank approximations are optimal for the observed states (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import lightglue_loss
import torch
from evaluation_matchers import hash_of
from torch import Tensor, nn

from kpmatch_ros.models import LightGlue
from kpmatch_ros.models.lightglue_layers import (
    Attention,
    FeedForward,
    MatchAssignment,
    TokenConfidence,
    TransformerLayer,
)

__all__ = ["Coordinates", "Narrow", "load_narrow", "narrow", "save_narrow"]

RIDGE = 1e-4  # ridge regularisation, relative to the mean squared activation
WEAKEST = 0.1  # relative to the strongest direction of descriptors: weaker ones are treated as this strong


@dataclass
class Coordinates:
    """Map between narrow states y and wide states x: x is about ``out @ y + origin``, y is ``into @ (x - origin)``.

    Attributes:
        out: (wide, narrow).
        into: (narrow, wide).
        origin: (wide,).
    """

    out: Tensor
    into: Tensor
    origin: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Return the narrow states (…, narrow) of wide states (…, wide)."""
        return (x - self.origin) @ self.into.T

    def linear(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Convert weight and bias of a linear layer from wide to narrow states."""
        return weight @ self.out, bias + weight @ self.origin


@dataclass
class Narrow:
    """A narrow LightGlue to train, and the coordinates of its states in the wide one's."""

    model: LightGlue
    coordinates: Coordinates


@dataclass
class Activations:
    """Observed inputs and outputs of a half of a layer of the wide LightGlue: rows of points.

    Attributes:
        x: (M, C) input states.
        message: (M, C) messages from the attention.
        after: (M, C) output states.
    """

    x: list[Tensor] = field(default_factory=list)
    message: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, message: Tensor, after: Tensor) -> None:
        for rows, value in ((self.x, x), (self.message, message), (self.after, after)):
            rows.append(value.reshape(-1, value.shape[-1]))


@torch.no_grad()
def narrow(wide: LightGlue, batches: Iterable[lightglue_loss.Batch], width: int) -> Narrow:
    """Create a LightGlue of ``width`` channels from a trained one, by its states on some batches.

    Args:
        wide: a LightGlue that is not fused.
        batches: batches with a few thousand points in all.
        width: a multiple of twice the number of heads.

    Raises:
        ValueError: cross-attention has different weights for keys and queries.
    """
    for number, layer in enumerate(_layers(wide)):
        attention = layer.cross_attention
        if not all(torch.equal(*pair) for pair in zip(attention.q_proj.parameters(), attention.k_proj.parameters())):
            raise ValueError(f"cross-attention of layer {number} has different weights for keys and queries")
    activations = [(Activations(), Activations()) for _ in wide.transformer_layers]
    for batch in batches:
        _record(wide, batch, activations)
    rows = [torch.cat(half.x) for halves in activations for half in halves] + [torch.cat(activations[-1][1].after)]
    covariance = sum((x.T @ x / x.square().sum() for x in rows), torch.zeros(()))
    model = LightGlue(
        **{**wide.config, "descriptor_dim": width, "num_key_value_heads": wide.config["num_attention_heads"]}
    ).to(covariance.device)
    coordinates = _coordinates(torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width], wide, model)
    pairs = _strongest_frequencies(wide, [torch.cat(halves[0].x) for halves in activations], width)
    model.positional_encoder.projector.weight.copy_(wide.positional_encoder.projector.weight[pairs])
    for own, layer, halves in zip(_layers(model), _layers(wide), activations):
        own.cross_attention.k_proj = own.cross_attention.q_proj
        _narrow_half(
            own.self_attention, own.self_mlp, layer.self_attention, layer.self_mlp, halves[0], coordinates, pairs
        )
        _narrow_half(
            own.cross_attention, own.cross_mlp, layer.cross_attention, layer.cross_mlp, halves[1], coordinates, None
        )
    for mine, theirs in zip(model.match_assignment_layers, wide.match_assignment_layers):
        _narrow_assignment(cast(MatchAssignment, mine), cast(MatchAssignment, theirs), coordinates)
    for mine, theirs in zip(model.token_confidence, wide.token_confidence):
        token = cast(TokenConfidence, theirs).token
        _linear(cast(TokenConfidence, mine).token, *coordinates.linear(token.weight, token.bias))
    return Narrow(model, coordinates)


def save_narrow(file: Path, made: Narrow, wide: LightGlue) -> None:
    """Write a narrow LightGlue, its coordinates and a hash of the wide one to a file, atomically."""
    state = {
        "config": made.model.config,
        "tensors": made.model.state_dict(),
        "coordinates": vars(made.coordinates),
        "wide": hash_of([wide]),
    }
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


def load_narrow(file: Path, wide: LightGlue, width: int, device: torch.device) -> Narrow:
    """Read a file of :func:`save_narrow`.

    Raises:
        ValueError: the narrow LightGlue was made from another wide one, or has another width.
    """
    state = torch.load(file, map_location=device, weights_only=True)
    there, own = state["config"]["descriptor_dim"], hash_of([wide])
    kept = state.get("wide", own)  # older files do not have it
    if there != width or kept != own:
        teacher = "the same" if kept == own else "another"
        raise ValueError(
            f"{file} has {there} channels of {teacher} teacher, not {width} of this one: choose another --out folder"
        )
    model = LightGlue(**state["config"])
    model.load_state_dict(state["tensors"])
    return Narrow(model.to(device), Coordinates(**state["coordinates"]))


def _coordinates(basis: Tensor, wide: LightGlue, model: LightGlue) -> Coordinates:
    """Return coordinates in an orthonormal basis (wide, narrow), chosen so that the narrow one reads raw descriptors.

    If descriptors and narrow states have the same size, the narrow one has no input projection: its first states are
    the descriptors themselves.
    """
    first = wide.input_projection
    weight, bias = torch.eye(len(basis)).to(basis), torch.zeros(len(basis)).to(basis)
    if isinstance(first, nn.Linear):
        weight, bias = first.weight, first.bias
    if isinstance(model.input_projection, nn.Linear):
        _linear(model.input_projection, basis.T @ weight, basis.T @ bias)
        return Coordinates(basis, basis.T.contiguous(), torch.zeros(len(basis)).to(basis))
    u, s, v = torch.linalg.svd(basis.T @ weight)
    s = s.clamp(min=WEAKEST * float(s[0]))
    return Coordinates(basis @ (u * s) @ v, (v.T / s) @ u.T @ basis.T, basis @ (basis.T @ bias))


def _layers(model: LightGlue) -> list[TransformerLayer]:
    return [cast(TransformerLayer, layer) for layer in model.transformer_layers]


def _weight(layer: Any) -> Tensor:
    return cast(Tensor, layer.weight)


def _bias(layer: Any) -> Tensor:
    return cast(Tensor, layer.bias)


def _linear(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


def _record(wide: LightGlue, batch: lightglue_loss.Batch, activations: list[tuple[Activations, Activations]]) -> None:
    now = lightglue_loss.encoded(wide, batch)
    for layer, (within, across) in zip(_layers(wide), activations):
        middle = []
        for points in now:
            heads = layer.self_attention.project(points.x, points.rotation)
            message = layer.self_attention(heads, heads, None)
            middle.append(layer.self_mlp(points.x, message))
            within.add(points.x, message, middle[-1])
        heads0, heads1 = (layer.cross_attention.project(x) for x in middle)
        states = []
        for x, own, other in ((middle[0], heads0, heads1), (middle[1], heads1, heads0)):
            message = layer.cross_attention(own, other, None)
            states.append(layer.cross_mlp(x, message))
            across.add(x, message, states[-1])
        now = [replace(p, x=x) for x, p in zip(states, now)]


def _strongest_frequencies(wide: LightGlue, states: list[Tensor], width: int) -> Tensor:
    """Return the rotary encoding's channel pairs that queries and keys use most, (narrow head size / 2,)."""
    strength: Tensor | float = 0.0
    for layer, x in zip(_layers(wide), states):
        energies = []
        for projection in (layer.self_attention.q_proj, layer.self_attention.k_proj):
            pairs = projection(x).unflatten(1, (wide.config["num_attention_heads"], -1, 2))
            energies.append(pairs.square().sum(dim=3).mean(dim=0))
        product = energies[0] * energies[1]
        strength = strength + (product / product.sum(dim=1, keepdim=True)).sum(dim=0)
    count = width // wide.config["num_attention_heads"] // 2
    return cast(Tensor, strength).topk(count).indices.sort().values


def _root(rows: Tensor) -> Tensor:
    """Return the symmetric square root (C, C) of the second-moment matrix of rows (M, C)."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _range(matrix: Tensor, root: Tensor, rank: int) -> Tensor:
    """Return the orthonormal basis (K, rank) that keeps most of ``matrix`` (K, C) times vectors with this ``root``."""
    return torch.linalg.svd(matrix @ root, full_matrices=False).U[:, :rank]


def _narrow_half(
    own: Attention,
    mlp: FeedForward,
    wide: Attention,
    wide_mlp: FeedForward,
    activations: Activations,
    space: Coordinates,
    pairs: Tensor | None,
) -> None:
    """Fill one half of a layer: attention, and the feed-forward network behind it.

    It is self-attention with the rotary encoding's ``pairs``, or cross-attention if ``pairs`` is None.
    """
    x, message, after = torch.cat(activations.x), torch.cat(activations.message), torch.cat(activations.after)
    size, small, width = wide.head_size, own.head_size, len(space.into)
    scale = (small / size) ** 0.25  # similarities are divided by the square root of the head's size
    root = _root(x)
    if pairs is None:
        weight, bias = _weight(wide.q_proj).unflatten(0, (-1, size)), _bias(wide.q_proj).unflatten(0, (-1, size))
        ranges = [_range(of_head, root, small).T for of_head in weight]
        parts = [space.linear(r @ w, r @ b) for r, w, b in zip(ranges, weight, bias)]
        _linear(own.q_proj, *(scale * torch.cat(part) for part in zip(*parts)))
    else:
        kept = torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()
        rows = (torch.arange(wide.q_proj.out_features // size).to(kept)[:, None] * size + kept).flatten()
        for mine, theirs in ((own.q_proj, wide.q_proj), (own.k_proj, wide.k_proj)):
            _linear(mine, *(scale * part for part in space.linear(theirs.weight[rows], theirs.bias[rows])))
    # The subspace of a message that the feed-forward network reads.
    first = wide_mlp.fc1
    of_x, of_message = first.weight.chunk(2, dim=1)
    read = _range(of_message, _root(message), width)  # (2 C, narrow)
    out = cast(nn.Linear, wide.o_proj)
    to_read = read.T @ of_message
    value_weight, value_bias = (
        _weight(wide.v_proj).unflatten(0, (-1, size)),
        _bias(wide.v_proj).unflatten(0, (-1, size)),
    )
    columns, values = [], []
    for weight, bias, projection in zip(value_weight, value_bias, out.weight.unflatten(1, (-1, size)).unbind(1)):
        head = to_read @ projection  # (narrow, head)
        column = _range(head @ weight, root, small)
        columns.append(column)
        values.append(space.linear(column.T @ head @ weight, column.T @ head @ bias))
    _linear(own.v_proj, *(torch.cat(part) for part in zip(*values)))
    _linear(own.o_proj, torch.cat(columns, dim=1), to_read @ out.bias)
    # The channels with the strongest effect. The last layer is fitted to their outputs.
    hidden = first(torch.cat([x, message], dim=1))
    active = wide_mlp.activation(wide_mlp.layer_norm(hidden))
    effect = active.var(dim=0) * (space.into @ wide_mlp.fc2.weight).square().sum(dim=0)
    chosen = effect.topk(2 * width).indices.sort().values
    of_state, constant = space.linear(of_x, first.bias)
    _linear(mlp.fc1, torch.cat([of_state, read], dim=1)[chosen], constant[chosen])
    few = hidden[:, chosen]
    stretch = (few.std(dim=1) / hidden.std(dim=1)).mean()
    shift = ((few.mean(dim=1) - hidden.mean(dim=1)) / hidden.std(dim=1)).mean()
    norm = wide_mlp.layer_norm
    _linear(mlp.layer_norm, norm.weight[chosen] * stretch, norm.bias[chosen] + norm.weight[chosen] * shift)
    narrow_message = message @ to_read.T
    active = mlp.activation(mlp.layer_norm(mlp.fc1(torch.cat([space.of(x), narrow_message], dim=1))))
    target = (after - x) @ space.into.T
    active = torch.cat([active, torch.ones_like(active[:, :1])], dim=1)
    gram = active.T @ active / len(active)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, active.T @ target / len(active))
    _linear(mlp.fc2, solved[:-1].T, solved[-1])


def _narrow_assignment(own: MatchAssignment, wide: MatchAssignment, space: Coordinates) -> None:
    weight, bias = space.linear(wide.final_projection.weight, wide.final_projection.bias)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    scale = (weight.shape[1] / weight.shape[0]) ** 0.25  # similarities are divided by the square root of the width
    _linear(own.final_projection, scale * s[:, None] * v, scale * u.T @ bias)
    _linear(own.matchability, *space.linear(wide.matchability.weight, wide.matchability.bias))
