"""SuperPoint: a network that detects keypoints in a grey image and computes their descriptors.

DeTone, Malisiewicz, Rabinovich: SuperPoint: Self-Supervised Interest Point Detection and Description, CVPR Workshops
2018 (arXiv:1712.07629).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kpmatch_ros.models.base import Extractor, rounded_up
from kpmatch_ros.models.checkpoint import Checkpoint
from kpmatch_ros.models.compiled import (
    CompiledConvolutions,
    has_tiles,
    image_parts,
    may_process,
    pixel_scores,
    transforms,
)
from kpmatch_ros.models.detections import (
    Detections,
    are_finite,
    clear_border,
    clear_masked,
    read_out,
    select_keypoints,
    suppress_non_maxima,
    unless_masked,
    vector,
    within_border,
)
from kpmatch_ros.models.transformed import uses_transform

__all__ = ["SuperPoint"]

CELL = 8  # pixels: each 8 x 8 cell of the image has one vector of scores and one descriptor
WINDOWS = 4096  # number of windows of 3 x 3 cells that are copied at a time
BAND = 8 << 20  # bytes of activations of one band, when a processor convolves an image band by band


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, followed by 2 x 2 max pooling if ``pooling``.

    Attributes:
        in_bands: on a processor, compute a large image band by band and pool with comparisons. The results are the
            same.
        compiled: computes the block instead of PyTorch, see :meth:`SuperPoint.use_compiled`; None for PyTorch.
    """

    def __init__(self, inputs: int, outputs: int, pooling: bool) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv_b = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.channels = outputs
        self.pooling = pooling
        self.in_bands = True
        self.compiled: CompiledConvolutions | None = None

    def forward(self, x: Tensor) -> Tensor:
        if is_usable(self.compiled, self.conv_b, x):
            if self._goes_to_bfloat16(x):
                return self.compiled(image_parts(x))
            if x.dtype == self.dtype and (self.conv_a.in_channels > 1 or x.dtype == torch.float32):
                return self.compiled(x)
        height = x.shape[2]
        rows = height
        conv_a: Callable[[Tensor], Tensor] = self.conv_a
        if self._lightly(x) and self._goes_to_bfloat16(x):
            x, conv_a = in_parts(x), PartsConvolution(self.conv_a)
        if self.pooling and self._lightly(x):
            # Band by band: at 640 x 480 the first block's activations are 79 MB. They would not fit into the cache, and
            # the operating system would have to supply their pages again for every image.
            rows = max(BAND // (self.channels * x[:, 0, 0].numel() * x.element_size()), 8) // 2 * 2
        if rows >= height:
            return self._rows(x, conv_a, 0, height)
        cuts = [*range(0, height - 1, rows), height]  # a band of a single row would vanish in the pooling
        return torch.cat([self._rows(x, conv_a, top, bottom) for top, bottom in zip(cuts, cuts[1:])], dim=2)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_b.weight.dtype

    def use_compiled(self, dtype: torch.dtype) -> None:
        if CompiledConvolutions.fits(dtype, self.channels):
            in_parts = self.conv_a.in_channels == 1 and dtype == torch.bfloat16
            first = PartsConvolution(self.conv_a) if in_parts else self.conv_a
            convolutions = [(conv.weight, cast(Tensor, conv.bias)) for conv in (first, self.conv_b)]
            self.compiled = CompiledConvolutions(convolutions, self.pooling, dtype)

    def _goes_to_bfloat16(self, x: Tensor) -> bool:
        """Whether the block takes a float32 image and continues in bfloat16, see :meth:`SuperPoint.to_precision`."""
        return self.conv_a.in_channels == 1 and (x.dtype, self.dtype) == (torch.float32, torch.bfloat16)

    def _rows(self, x: Tensor, conv_a: Callable[[Tensor], Tensor], top: int, bottom: int) -> Tensor:
        """Return the output for the rows ``top`` to ``bottom`` of x."""
        # At a cut a convolution sees zeros instead of the image's next row, so its outermost row there is discarded.
        above, below = int(top > 0), int(bottom < x.shape[2])
        x = conv_a(x[:, :, top - 2 * above : bottom + 2 * below])
        if x.dtype == torch.float32:  # keep what autocast made narrower: training would convert it back and forth
            x = x.to(self.dtype)
        x = relu_(x)
        x = self.conv_b(x[:, :, above : x.shape[2] - below])
        return self._finish(x[:, :, above : x.shape[2] - below])

    def _finish(self, x: Tensor) -> Tensor:
        # ReLU and the maximum commute, so ReLU after pooling has a quarter of the work.
        if not self.pooling:
            return relu_(x)
        return relu_(_halved(x) if self._lightly(x) else F.max_pool2d(x, 2))

    def _lightly(self, x: Tensor) -> bool:
        return self.in_bands and x.device.type == "cpu" and not self.training


def compiled_convolution(conv: nn.Conv2d, dtype: torch.dtype) -> CompiledConvolutions | None:
    """Compile a 3 x 3 convolution with ReLU; None if this processor or data type does not support it."""
    if not CompiledConvolutions.fits(dtype, conv.out_channels):
        return None
    return CompiledConvolutions([(conv.weight, cast(Tensor, conv.bias))], False, dtype)


def is_usable(compiled: CompiledConvolutions | None, conv: nn.Conv2d, x: Tensor) -> TypeGuard[CompiledConvolutions]:
    """Whether a compiled convolution may process x: the network's precision may have changed since compilation."""
    return compiled is not None and compiled.dtype == conv.weight.dtype and may_process(x)


def in_parts(image: Tensor) -> Tensor:
    """Split an image (B, 1, H, W), float32, for :class:`PartsConvolution`: (B, 4, H, W), bfloat16."""
    high = image.bfloat16()
    low = (image - high).bfloat16()
    parts = torch.cat([high, low, high, torch.ones_like(high)], dim=1)
    return parts.contiguous(memory_format=torch.channels_last)


class PartsConvolution:
    """A 3 x 3 convolution of an image in bfloat16 that is as exact as one in float32 whose result is rounded.

    Image and weights are sums of two bfloat16 numbers each. Their product is the sum of three partial products,
    accumulated in float32. The output is bfloat16: a float32 convolution writes twice as many bytes, which a conversion
    to bfloat16 would then have to read again.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        assert conv.bias is not None
        high, self.bias = conv.weight.bfloat16(), conv.bias.bfloat16()
        low = (conv.weight - high).bfloat16()
        rest = torch.zeros_like(high)
        rest[:, 0, 1, 1] = (conv.bias - self.bias).bfloat16()  # a kernel's centre is never in the zero padding
        self.weight = torch.cat([high, high, low, rest], dim=1).contiguous(memory_format=torch.channels_last)

    def __call__(self, parts: Tensor) -> Tensor:
        return F.conv2d(parts, self.weight, self.bias, padding=1)


def relu_(x: Tensor) -> Tensor:
    """ReLU, in place."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not x.requires_grad:
        # A bfloat16 has its sign in the same bit as an int16, and a processor compares integers three times as fast.
        x.view(torch.int16).clamp_(min=0)
        return x
    return F.relu(x, inplace=True)


class Encoder(nn.Module):
    """The shared backbone: (B, 1, H, W) image to (B, C, H/8, W/8) feature map."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        inputs = [1, *sizes[:-1]]
        last = len(sizes) - 1
        self.conv_blocks = nn.ModuleList(ConvBlock(inputs[i], sizes[i], pooling=i < last) for i in range(len(sizes)))

    def forward(self, image: Tensor) -> Tensor:
        x = image.to(next(self.parameters()).dtype)
        for block in self.conv_blocks:
            x = block(x)
        return x


class KeypointDecoder(nn.Module):
    """Maps features to the score of each pixel: a softmax over a cell's 64 pixels and "no keypoint in this cell"."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv_score_a = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.conv_score_b = nn.Conv2d(hidden, outputs, 1)
        self.compiled: CompiledConvolutions | None = None  # see ConvBlock

    def use_compiled(self, dtype: torch.dtype) -> None:
        self.compiled = compiled_convolution(self.conv_score_a, dtype)

    def forward(self, features: Tensor) -> Tensor:
        if is_usable(self.compiled, self.conv_score_a, features) and features.dtype == self.compiled.dtype:
            hidden = self.compiled(features).permute(0, 2, 3, 1)  # channels last, as in memory
            return pixel_scores(_convolved(hidden.to(self.conv_score_b.weight.dtype), self.conv_score_b).float())
        hidden = relu_(self.conv_score_a(features))
        logits = self.conv_score_b(hidden.to(self.conv_score_b.weight.dtype))
        # float32 from here on: in half precision neighbouring scores become equal, and suppression then keeps both or
        # neither (LightGlue-ONNX #77).
        scores = logits.float().softmax(dim=1)[:, :-1]
        return F.pixel_shuffle(scores, CELL).squeeze(1)


class DescriptorDecoder(nn.Module):
    """Maps features to one unit descriptor per cell."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.conv_descriptor_a = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.conv_descriptor_b = nn.Conv2d(hidden, outputs, 1)
        self.compiled: CompiledConvolutions | None = None  # see ConvBlock

    def use_compiled(self, dtype: torch.dtype) -> None:
        self.compiled = compiled_convolution(self.conv_descriptor_a, dtype)

    def forward(self, features: Tensor) -> Tensor:
        hidden = relu_(self.conv_descriptor_a(features))
        descriptors = self.conv_descriptor_b(hidden.to(self.conv_descriptor_b.weight.dtype))
        return F.normalize(descriptors.float(), dim=1)

    def at(self, features: Tensor, keypoints: Tensor, round_up: bool = False) -> Tensor:
        """Sample descriptors at keypoints, computed only for the cells around them.

        The result equals :func:`sample_descriptors` of :meth:`forward`.

        Args:
            features: (B, C, h, w).
            keypoints: (B, N, 2) x, y in pixels.
            round_up: round the number of cells up to one of a few values, see
                :func:`kpmatch_ros.models.base.rounded_up`.

        Returns:
            (B, N, D).
        """
        batch, _, height, width = features.shape
        corners, weights = cells_around(keypoints, height, width)
        first = torch.arange(batch, device=features.device)[:, None, None] * (height * width)
        cells, places = (corners + first).unique(return_inverse=True)
        if is_usable(self.compiled, self.conv_descriptor_a, features):
            hidden = self.compiled(features).permute(0, 2, 3, 1).flatten(0, 2)
            descriptors = _convolved(hidden[cells].to(self.conv_descriptor_b.weight.dtype), self.conv_descriptor_b)
        else:
            descriptors = self._of_cells(features, cells, rounded_up(len(cells)) if round_up else len(cells))
        samples = (F.normalize(descriptors.float(), dim=1)[places] * weights[..., None]).sum(dim=2)
        return F.normalize(samples, dim=2)

    def _of_cells(self, features: Tensor, cells: Tensor, count: int) -> Tensor:
        """Return ``count`` descriptors: those of ``cells``, then the first cell's as padding.

        Args:
            features: (B, C, h, w).
            cells: indices into the cells of all images.
            count: at least the number of cells.
        """
        _, channels, height, width = features.shape
        # The pixels of a row are contiguous with their channels, so each row of a 3 x 3 window is 3 C numbers in
        # succession.
        padded = F.pad(features.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
        rows = padded.as_strided((padded[..., 0].numel() - 2, 3 * channels), (channels, 1))
        image, y, x = cells // (height * width), cells // width % height, cells % width
        top = F.pad((image * (height + 2) + y) * (width + 2) + x, (0, count - len(cells)))
        found = []
        for part in torch.stack([top + i * (width + 2) for i in range(3)], dim=1).split(WINDOWS):
            windows = rows.index_select(0, part.flatten()).view(-1, 9 * channels)
            hidden = relu_(_convolved(windows, self.conv_descriptor_a))
            found.append(_convolved(hidden.to(self.conv_descriptor_b.weight.dtype), self.conv_descriptor_b))
        return torch.cat(found)


class SuperPoint(Extractor):
    """Detector and descriptor. Build it with :meth:`from_pretrained`.

    Args:
        config: any of the keys of :attr:`DEFAULTS`, named as in `transformers`' ``SuperPointConfig``. `transformers`
            does not know ``subpixel``: its keypoints are whole pixels.

    Attributes:
        subpixel: refine keypoints to a fraction of a pixel; for weights that were trained with this refinement.
        stays_float32: :meth:`to_precision` changes nothing, see :meth:`use_compiled`.
    """

    MODEL_TYPE = "superpoint"
    CHANNELS = 1  # grey images
    RESOLUTION = 1.0  # keypoints are whole pixels, or fractions that are hardly more exact
    DEFAULTS = {
        "encoder_hidden_sizes": [64, 64, 128, 128],
        "decoder_hidden_size": 256,
        "keypoint_decoder_dim": 65,
        "descriptor_decoder_dim": 256,
        "keypoint_threshold": 0.005,
        "max_keypoints": -1,
        "nms_radius": 4,
        "border_removal_distance": 4,
        "subpixel": False,
    }

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        sizes = list(self.config["encoder_hidden_sizes"])
        hidden = self.config["decoder_hidden_size"]
        self.require("encoder_hidden_sizes", len(sizes) == 4, f"four numbers, for cells of {CELL} pixels")
        outputs = CELL**2 + 1
        self.require("keypoint_decoder_dim", self.config["keypoint_decoder_dim"] == outputs, f"{outputs}")
        self.subpixel: bool = self.config["subpixel"]
        self.stays_float32 = False
        self.encoder = Encoder(sizes)
        self.keypoint_decoder = KeypointDecoder(sizes[-1], hidden, outputs)
        self.descriptor_decoder = DescriptorDecoder(sizes[-1], hidden, self.config["descriptor_decoder_dim"])
        self.requires_grad_(False).eval()

    @classmethod
    def prepare(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Translate a Hugging Face or an authors' checkpoint into this module's configuration and parameter names."""
        if checkpoint.config.get("model_type") != "superpoint" and "keypoint_detector_config" in checkpoint.config:
            checkpoint = checkpoint.part("keypoint_detector_config", "keypoint_detector.")
        if "conv1a.weight" not in checkpoint.tensors:
            return checkpoint
        heads = {
            "Pa": "keypoint_decoder.conv_score_a",
            "Pb": "keypoint_decoder.conv_score_b",
            "Da": "descriptor_decoder.conv_descriptor_a",
            "Db": "descriptor_decoder.conv_descriptor_b",
        }
        tensors = {}
        for name, tensor in checkpoint.tensors.items():
            layer, kind = name.rsplit(".", 1)
            block = re.fullmatch(r"conv(\d)([ab])", layer)
            if block:
                layer = f"encoder.conv_blocks.{int(block[1]) - 1}.conv_{block[2]}"
            else:
                layer = heads.get(layer.removeprefix("conv"), layer)
            tensors[f"{layer}.{kind}"] = tensor
        blocks = sum(name.endswith("conv_a.weight") and name.startswith("encoder.") for name in tensors)
        config = {
            "model_type": "superpoint",
            "encoder_hidden_sizes": [tensors[f"encoder.conv_blocks.{i}.conv_a.weight"].shape[0] for i in range(blocks)],
            "decoder_hidden_size": checkpoint.tensors["convPa.weight"].shape[0],
            "descriptor_decoder_dim": checkpoint.tensors["convDb.weight"].shape[0],
        }
        return Checkpoint({**config, **checkpoint.config}, tensors, checkpoint.source)

    def to_precision(self, dtype: torch.dtype) -> SuperPoint:
        """Convert the weights, except those that influence the keypoints most.

        8 bits of mantissa cannot distinguish neighbouring grey values. With the first convolution in bfloat16, 6 % of
        the keypoints change; with it in float32, 1 %. The last convolution of each decoder turns small differences into
        scores and descriptors. These three convolutions are 2 % of the arithmetic and stay as they are.
        """
        if self.stays_float32:
            return self
        precise = {
            self.encoder.conv_blocks[0].conv_a,
            self.keypoint_decoder.conv_score_b,
            self.descriptor_decoder.conv_descriptor_b,
        }
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in precise:
                module.to(dtype)
        return self

    def use_compiled(self, dtype: torch.dtype) -> SuperPoint:
        """Compute convolutions on the processor with src/superpoint.c or src/transformed.c where possible.

        Without matrix tiles (AMX), compiled float32 convolutions take less time than PyTorch's in bfloat16. The network
        then stays in float32.
        """
        self.stays_float32 = transforms() and (dtype == torch.float32 or not has_tiles())
        for part in (*self.encoder.conv_blocks, self.keypoint_decoder, self.descriptor_decoder):
            part = cast(ConvBlock | KeypointDecoder | DescriptorDecoder, part)
            part.use_compiled(torch.float32 if self.stays_float32 else dtype)
        return self

    @property
    def descriptor_size(self) -> int:
        return self.config["descriptor_decoder_dim"]

    def forward(self, image: Tensor, allowed: Tensor | None = None) -> Detections:
        batch, _, height, width = image.shape
        if height < CELL or width < CELL:
            return Detections.none(batch, self.descriptor_size, image.device)
        features = self.encoder(image)
        scores = self.keypoint_decoder(features)
        # On a processor it is faster to compute descriptors only for the cells around a few hundred keypoints than for
        # the whole map, unless the map is computed with the Winograd transform.
        transformed = uses_transform(self.descriptor_decoder.conv_descriptor_a, features)
        if image.device.type != "cpu" or self.training or transformed:
            return self.select(scores, self.descriptor_decoder(features), allowed)
        keypoints, best, mask = self._detect(scores, allowed)
        round_up = self.round_up and self.dtype == torch.bfloat16
        descriptors = self.descriptor_decoder.at(features, keypoints, round_up)
        return Detections(keypoints, best, descriptors, mask, are_finite(scores))

    def dense(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores and descriptors for all positions of an image (B, 1, H, W) of at least 8 x 8 pixels.

        Returns:
            scores (B, H, W) in [0, 1] and unit descriptors (B, D, H/8, W/8), both float32. H and W are rounded down to
            multiples of 8.
        """
        features = self.encoder(image)
        return self.keypoint_decoder(features), self.descriptor_decoder(features)

    def select(self, scores: Tensor, descriptors: Tensor, allowed: Tensor | None = None) -> Detections:
        """Select keypoints from the results of :meth:`dense`; ``allowed`` as for :meth:`forward`."""
        keypoints, best, mask = self._detect(scores, allowed)
        return Detections(keypoints, best, sample_descriptors(descriptors, keypoints), mask, are_finite(scores))

    def _detect(self, scores: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The keypoints in scores (B, H, W), as from :func:`select_keypoints`, refined if :attr:`subpixel`."""
        maxima = clear_masked(clear_border(suppress_non_maxima(scores, self.nms_radius), self.border), allowed)
        keypoints, best, mask = select_keypoints(maxima, self.keypoint_threshold, self.max_keypoints)
        if self.subpixel:
            read = within_border(read_out(scores, keypoints), scores, self.border)
            keypoints = unless_masked(read, keypoints, allowed) * mask[..., None]
        return keypoints, best, mask

    @property
    def dtype(self) -> torch.dtype:
        return self.keypoint_decoder.conv_score_a.weight.dtype


def sample_descriptors(descriptors: Tensor, keypoints: Tensor) -> Tensor:
    """Sample a descriptor map bilinearly at keypoints, and normalise to unit length.

    As in the authors' code, the centres of the map's corner cells are placed at (3.5, 3.5) and (W-1, H-1). This shifts
    samples by up to 3.5 pixels at the far borders. Published weights were trained with this shift.

    Args:
        descriptors: (B, D, H/8, W/8).
        keypoints: (B, N, 2) x, y in pixels.

    Returns:
        (B, N, D).
    """
    grid = _positions(keypoints, *descriptors.shape[-2:]) * 2 - 1
    samples = F.grid_sample(descriptors, grid[:, None].to(descriptors.dtype), align_corners=True)[:, :, 0]
    return F.normalize(samples, dim=1).transpose(1, 2)


def cells_around(keypoints: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Find the four cells around each keypoint and their bilinear weights, as :func:`sample_descriptors` uses them.

    Args:
        keypoints: (B, N, 2) x, y in pixels.
        height: height of the map, cells.
        width: width of the map, cells.

    Returns:
        indices (B, N, 4) into the map's cells, row by row, and weights (B, N, 4) float32, 0 for cells outside.
    """
    size = vector(width, height, like=keypoints)
    place = _positions(keypoints, height, width) * (size - 1)
    steps = keypoints.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    corners = place.floor()[..., None, :] + steps  # (B, N, 4, 2)
    weights = (1 - (place[..., None, :] - corners).abs()).prod(dim=-1)
    inside = ((corners >= 0) & (corners < size)).all(dim=-1)
    x, y = corners.clamp(min=0).minimum(size - 1).long().unbind(dim=-1)
    return y * width + x, weights * inside


def _positions(keypoints: Tensor, height: int, width: int) -> Tensor:
    """Positions in a descriptor map, from 0 at the first cell to 1 where :func:`sample_descriptors` has the last."""
    far_corner = vector(width * CELL - CELL / 2 - 0.5, height * CELL - CELL / 2 - 0.5, like=keypoints)
    return (keypoints - CELL / 2 + 0.5) / far_corner


def _convolved(windows: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Apply a convolution to its windows (..., rows x columns x channels)."""
    return F.linear(windows, convolution.weight.permute(0, 2, 3, 1).flatten(1), convolution.bias)


def _halved(x: Tensor) -> Tensor:
    """2 x 2 max pooling of (B, C, H, W). PyTorch's takes three times as long: it records each maximum's position."""
    x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
    x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(x[..., ::2], x[..., 1::2])
