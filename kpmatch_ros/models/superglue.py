"""SuperGlue: a graph neural network that matches two sets of keypoints by optimal transport.

Sarlin, DeTone, Malisiewicz, Rabinovich: SuperGlue: Learning Feature Matching with Graph Neural Networks, CVPR 2020
(arXiv:1911.11763). Equation numbers below are the paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.models.assignment import (
    Assignment,
    ImageFeatures,
    attend,
    attention_weights,
    common_masks,
    mutual_matches,
)
from kpmatch_ros.models.base import PretrainedNetwork, rounded_up
from kpmatch_ros.models.checkpoint import Checkpoint
from kpmatch_ros.weights import WeightsError

__all__ = ["SuperGlue"]


class HiddenLayer(nn.Module):
    """Linear, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.batch_norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.relu(self.batch_norm(x.flatten(0, 1)).view_as(x))


def perceptron(sizes: list[int]) -> nn.Sequential:
    """Hidden layers of ``sizes[1:-1]`` channels, then a linear one."""
    hidden = [HiddenLayer(inputs, outputs) for inputs, outputs in zip(sizes[:-2], sizes[1:-1])]
    return nn.Sequential(*hidden, nn.Linear(sizes[-2], sizes[-1]))


class KeypointEncoder(nn.Module):
    """Encodes a keypoint's position and detection score, to be added to its descriptor (eq. 2)."""

    def __init__(self, hidden_sizes: list[int], size: int) -> None:
        super().__init__()
        self.encoder = perceptron([3, *hidden_sizes, size])

    def forward(self, positions: Tensor, scores: Tensor) -> Tensor:
        """(B, N, 2) normalised positions and (B, N) scores to (B, N, C)."""
        return self.encoder(torch.cat([positions, scores[..., None]], dim=-1))


class Attention(nn.Module):
    """Multi-head attention (eqs. 4 and 5)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # The same groups and names as in `transformers`, so that tensors have the same names in both.
        self.self = nn.ModuleDict({name: nn.Linear(size, size) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(size, size)})

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Return the messages to x (B, N, C) from source (B, M, C); ``mask`` (B, M) is true for the source's points."""
        query, key, value = self._heads("query", x), self._heads("key", source), self._heads("value", source)
        message = attend(query, key, value, mask)
        return self.output["dense"](message.transpose(1, 2).flatten(-2))

    def weights(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights (B, heads, N, M) of x for the points of source, arguments as for :meth:`forward`."""
        return attention_weights(self._heads("query", x), self._heads("key", source), mask)

    def _heads(self, projection: str, x: Tensor) -> Tensor:
        return self.self[projection](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Propagation(nn.Module):
    """One layer of the graph network: a message updates each point's state (eq. 3)."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(size, heads)
        self.mlp = perceptron([2 * size, 2 * size, size])

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Return the new states of x (B, N, C), which attends to source (B, M, C)."""
        return x + self.mlp(torch.cat([x, self.attention(x, source, mask)], dim=-1))


class GraphNetwork(nn.Module):
    """Layers in which points attend to the points of their own image ("self") or of the other image ("cross")."""

    def __init__(self, size: int, heads: int, types: list[str]) -> None:
        super().__init__()
        self.types = types
        self.layers = nn.ModuleList(Propagation(size, heads) for _ in types)

    def forward(self, x0: Tensor, x1: Tensor, mask0: Tensor | None, mask1: Tensor | None) -> tuple[Tensor, Tensor]:
        for layer, kind in zip(self.layers, self.types):
            if kind == "cross":
                x0, x1 = layer(x0, x1, mask1), layer(x1, x0, mask0)
            else:
                x0, x1 = layer(x0, x0, mask0), layer(x1, x1, mask1)
        return x0, x1


class SuperGlue(PretrainedNetwork):
    """The matcher. Build it with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`, named as in `transformers`' ``SuperGlueConfig``.

    Attributes:
        steps_between: parameter of the optimal transport, see :func:`sinkhorn`.
    """

    MODEL_TYPE = "superglue"
    DEFAULTS = {
        "hidden_size": 256,
        "keypoint_encoder_sizes": [32, 64, 128, 256],
        "gnn_layers_types": ["self", "cross"] * 9,
        "num_attention_heads": 4,
        "sinkhorn_iterations": 100,
        "matching_threshold": 0.0,
    }

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        size, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        types = list(self.config["gnn_layers_types"])
        if size % heads:
            raise WeightsError(f"SuperGlue cannot split {size} channels into {heads} heads")
        unknown = sorted(set(types) - {"self", "cross"})
        if unknown:
            raise WeightsError(f"SuperGlue supports the layer types self and cross, not {', '.join(map(str, unknown))}")
        self.keypoint_encoder = KeypointEncoder(list(self.config["keypoint_encoder_sizes"]), size)
        self.gnn = GraphNetwork(size, heads, types)
        self.final_projection = nn.ModuleDict({"final_proj": nn.Linear(size, size)})
        self.bin_score = nn.Parameter(torch.ones(()))
        self.sinkhorn_iterations: int = self.config["sinkhorn_iterations"]
        self.steps_between = STEPS_BETWEEN
        self.filter_threshold: float = self.config["matching_threshold"]
        self.requires_grad_(False).eval()

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate a Hugging Face or an authors' checkpoint into this module's configuration and parameter names."""
        if "final_proj.weight" in checkpoint.tensors:
            return _from_authors(checkpoint)
        tensors = {k: v for k, v in checkpoint.tensors.items() if not k.startswith("keypoint_detector.")}
        # This module has no option for the detector, and dropout is used only in training.
        others = ("keypoint_detector_config", "attention_probs_dropout_prob")
        config = {key: value for key, value in checkpoint.config.items() if key not in others}
        return Checkpoint(config, tensors, checkpoint.source)

    def to_precision(self, dtype: torch.dtype) -> SuperGlue:
        """Convert the weights of the graph network to ``dtype``, except its batch norms.

        The keypoint encoder keeps its precision: 8 bits of mantissa cannot distinguish neighbouring pixels.
        """
        for module in (*self.gnn.modules(), self.final_projection["final_proj"]):
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    @property
    def input_dim(self) -> int:
        """Size of the descriptors that the matcher takes."""
        return self.config["hidden_size"]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the layers."""
        return next(self.final_projection.parameters()).dtype

    def forward(self, image0: ImageFeatures, image1: ImageFeatures) -> Assignment:
        """Match the features of B pairs of images.

        Raises:
            ValueError: the detection scores are missing.
        """
        if image0.scores is None or image1.scores is None:
            raise ValueError("SuperGlue needs the keypoints' detection scores, and one of the images has none")
        batch, count0, count1 = len(image0.keypoints), image0.num_keypoints, image1.num_keypoints
        if count0 == 0 or count1 == 0:
            return Assignment.empty(batch, count0, count1, image0.keypoints.device)
        if self.round_up:
            image0, image1 = image0.padded(rounded_up(count0)), image1.padded(rounded_up(count1))
        mask0, mask1 = common_masks(image0, image1)
        image0, image1 = image0._replace(mask=mask0), image1._replace(mask=mask1)
        return self.assign(*self.states(image0, image1), mask0, mask1).first(count0, count1)

    def states(self, image0: ImageFeatures, image1: ImageFeatures) -> tuple[Tensor, Tensor]:
        """The states (B, N, C) of both images' points after the last layer.

        Both images need scores. Either both or none of them has a mask.
        """
        assert image0.scores is not None and image1.scores is not None
        x0, x1 = self._encode(image0, image0.scores), self._encode(image1, image1.scores)
        x0, x1 = self.gnn(x0, x1, image0.mask, image1.mask)
        # In float32: half precision cannot distinguish the best two of a thousand scores.
        projection = self.final_projection["final_proj"]
        return projection(x0).float(), projection(x1).float()

    def assign(self, x0: Tensor, x1: Tensor, mask0: Tensor | None, mask1: Tensor | None) -> Assignment:
        """Match points by the states from :meth:`states`."""
        similarity = x0 @ x1.transpose(-1, -2) / math.sqrt(x0.shape[-1])
        plan = transport(similarity, self.bin_score, self.sinkhorn_iterations, mask0, mask1, self.steps_between)
        return mutual_matches(plan, torch.exp, self.filter_threshold).after(len(self.gnn.layers))

    def _encode(self, image: ImageFeatures, scores: Tensor) -> Tensor:
        positions = normalise_keypoints(image.keypoints.float(), image.size)
        return (image.descriptors + self.keypoint_encoder(positions, scores.float())).to(self.dtype)


def normalise_keypoints(keypoints: Tensor, size: Tensor) -> Tensor:
    """Convert pixels to positions relative to the image's centre, in units of 0.7 times its longer side.

    Args:
        keypoints: (B, N, 2) x, y.
        size: (B, 2) width, height.
    """
    size = size.to(keypoints)[:, None]
    return (keypoints - size / 2) / (size.amax(dim=-1, keepdim=True) * 0.7)


STEPS_BETWEEN = 15  # iterations as matrix-vector products between two iterations in the logarithmic domain
LARGEST_CHANGE = 40.0  # of a factor's logarithm in these products: float32 can represent exp(-87) to exp(88)


def transport(
    similarity: Tensor,
    bin_score: Tensor,
    iterations: int,
    mask0: Tensor | None = None,
    mask1: Tensor | None = None,
    steps_between: int = STEPS_BETWEEN,
) -> Tensor:
    """Solve the optimal transport between the images' points, with a dustbin for unmatched points (eqs. 7 to 9).

    Args:
        similarity: (B, N0, N1) float32.
        bin_score: () similarity of any point with the dustbin.
        iterations: iterations of Sinkhorn's algorithm.
        mask0: (B, N0) bool, true for points, false for padding, which takes no part; None without padding.
        mask1: (B, N1), None if ``mask0`` is None.
        steps_between: see :func:`sinkhorn`.

    Returns:
        logarithms (B, N0, N1) of the share of point i of image 0 that goes to point j of image 1; -inf for padding.
    """
    if mask0 is None or mask1 is None:
        mask0, mask1 = (torch.ones_like(similarity.select(dim, 0), dtype=torch.bool) for dim in (2, 1))
    pairs = mask0[:, :, None] & mask1[:, None, :]
    augmented = torch.cat(
        [similarity.masked_fill(~pairs, -torch.inf), bin_score.expand_as(similarity[:, :, :1])], dim=2
    )
    augmented = torch.cat([augmented, bin_score.expand_as(augmented[:, :1])], dim=1)
    # A point has weight 1 and padding weight 0. A dustbin can take all of the other image's points.
    count0, count1 = (mask.sum(dim=1, keepdim=True).clamp(min=1) for mask in (mask0, mask1))
    log_rows = torch.cat([mask0, count1], dim=1).to(similarity).log()
    log_columns = torch.cat([mask1, count0], dim=1).to(similarity).log()
    row_factors, column_factors = sinkhorn(augmented, log_rows, log_columns, iterations, steps_between)
    plan = augmented + row_factors[:, :, None] + column_factors[:, None, :]
    return plan[:, :-1, :-1].masked_fill(~pairs, -torch.inf)


def sinkhorn(
    matrix: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int, steps_between: int = STEPS_BETWEEN
) -> tuple[Tensor, Tensor]:
    """Scale the rows and columns of exp(matrix) in turn until both have the given sums.

    Iterations in the logarithmic domain can represent every factor, but need an exponential per entry and iteration.
    Therefore most iterations are products of vectors with the matrix as scaled so far, as in Schmitzer: Stabilized
    Sparse Scaling Algorithms, SIAM J. Sci. Comput. 2019 (arXiv:1610.06519). For a thousand points this is ten times as
    fast. If a factor changes so much in these products that float32 may lose entries, they are discarded and repeated
    in the logarithmic domain.

    Args:
        matrix: (B, R, C) logarithms of the entries.
        log_rows: (B, R) logarithms of the sums of the rows, -inf for padding.
        log_columns: (B, C) logarithms of the sums of the columns, -inf for padding.
        iterations: how often the rows and then the columns are scaled.
        steps_between: number of iterations as products between two in the logarithmic domain. With 0, all iterations
            use logarithms, and no operation depends on a value, so that they can be traced to a graph.

    Returns:
        logarithms of the rows' (B, R) and of the columns' (B, C) factors.
    """
    u, v = torch.zeros_like(log_rows), torch.zeros_like(log_columns)
    v = v.masked_fill(log_columns == -torch.inf, -torch.inf)  # exclude padding from the first iteration on
    rows, columns = log_rows.exp()[..., None], log_columns.exp()[..., None]
    smallest = torch.finfo(matrix.dtype).tiny
    while iterations > 0:
        u = log_rows - (matrix + v[:, None, :]).logsumexp(dim=2)
        v = log_columns - (matrix + u[:, :, None]).logsumexp(dim=1)
        iterations -= 1
        steps = min(iterations, steps_between)
        if steps == 0:
            continue
        scaled = (matrix + u[:, :, None] + v[:, None, :]).exp()
        b = torch.ones_like(columns)
        for _ in range(steps):
            a = rows / (scaled @ b).clamp(min=smallest)
            b = columns / (scaled.transpose(1, 2) @ a).clamp(min=smallest)
        change_u, change_v = (torch.where(sums > 0, x.log(), 0.0)[..., 0] for sums, x in ((rows, a), (columns, b)))
        if torch.cat([change_u, change_v], dim=1).abs().max() < LARGEST_CHANGE:
            u, v, iterations = u + change_u, v + change_v, iterations - steps
    return u, v


def _from_authors(checkpoint: Checkpoint) -> Checkpoint:
    """Convert the authors' ``.pth`` (magicleap/SuperGluePretrainedNetwork) to this module's names."""
    heads = 4  # fixed in the authors' code
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(".weight") and tensor.ndim == 3:
            tensor = tensor[..., 0]  # a convolution of width 1 is a linear layer
        # The authors interleave the heads' channels; here a head's channels are contiguous. For the merging layer this
        # concerns the inputs.
        if name.endswith(".attn.merge.weight"):
            tensor = tensor.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2)
        elif ".attn.proj." in name:
            tensor = tensor.unflatten(0, (-1, heads)).transpose(0, 1).flatten(0, 1)
        for i, projection in enumerate(("query", "key", "value")):
            name = name.replace(f".attn.proj.{i}.", f".attention.self.{projection}.")
        name = name.replace(".attn.merge.", ".attention.output.dense.")
        name = re.sub(r"^kenc\.", "keypoint_encoder.", name)
        name = re.sub(r"^final_proj\.", "final_projection.final_proj.", name)
        tensors[name] = tensor
    tensors = {_grouped(name, tensors): tensor for name, tensor in tensors.items()}
    encoder_layers = sum(bool(re.fullmatch(r"keypoint_encoder\..*\.linear\.weight", name)) for name in tensors)
    layers = sum(name.endswith(".query.weight") for name in tensors)
    config = {
        "model_type": "superglue",
        "hidden_size": tensors["final_projection.final_proj.weight"].shape[0],
        "keypoint_encoder_sizes": [
            tensors[f"keypoint_encoder.encoder.{i}.linear.weight"].shape[0] for i in range(encoder_layers)
        ],
        "gnn_layers_types": (["self", "cross"] * layers)[:layers],
        "num_attention_heads": heads,
        "matching_threshold": 0.2,  # the authors' default
    }
    return Checkpoint({**config, **checkpoint.config}, tensors, checkpoint.source)


def _grouped(name: str, names: Collection[str]) -> str:
    """Rename a tensor: the authors count a linear layer, its batch norm and its ReLU as three layers, here as one."""
    found = re.fullmatch(r"(keypoint_encoder\.encoder|gnn\.layers\.\d+\.mlp)\.(\d+)\.(\w+)", name)
    if not found:
        return name
    block, index, kind = found[1], int(found[2]), found[3]
    if index % 3 == 1:
        return f"{block}.{index // 3}.batch_norm.{kind}"
    hidden = f"{block}.{index + 1}.running_var" in names
    return f"{block}.{index // 3}.{'linear.' if hidden else ''}{kind}"
