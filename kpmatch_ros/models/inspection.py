"""Records hidden states and attention maps of the networks, on request.

It uses hooks: the networks have no code for it, so it costs nothing when it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kpmatch_ros.models import lightglue, lightglue_layers, superglue, superpoint

__all__ = ["Trace", "trace"]

_ATTENTION = (lightglue_layers.Attention, superglue.Attention)
# Modules whose outputs are the states of one image's points.
_STATES = (lightglue_layers.FeedForward, superglue.Propagation)


@dataclass
class Trace:
    """Recorded tensors, in the order of their computation.

    Attributes:
        hidden_states: for a matcher (B, N, C), image 0 and image 1 in turn: the first layer's input, then the states
            after each attention block (LightGlue has two per layer: self, cross). For SuperPoint (B, C, H, W): the
            output of each block of convolutions.
        attentions: for a matcher (B, heads, N, M), image 0 and image 1 in turn: the attention weights of N points for
            M points, in each attention block. Empty for SuperPoint.
    """

    hidden_states: list[Tensor] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)


@contextmanager
def trace(network: nn.Module) -> Iterator[Trace]:
    """Record the hidden states and attention maps of a SuperPoint, LightGlue or SuperGlue while the context is open.

    Attention maps need N x M numbers for each head and layer, and are computed a second time for the record. If
    LightGlue stops early or prunes points, it matches a batch pair by pair, and the records are also pair by pair.
    Pruned points are missing from later records. On a GPU the network runs without CUDA graphs during the recording,
    and so may prune points.

    Example::

        with trace(matcher.matcher) as recorded:
            matcher.match(features0, features1)
        first_self_attention0, first_self_attention1 = recorded.attentions[:2]

    Raises:
        TypeError: for any other network.
    """
    if not isinstance(network, (superpoint.SuperPoint, lightglue.LightGlue, superglue.SuperGlue)):
        raise TypeError(f"{type(network).__name__} has no states to record; SuperPoint, LightGlue and SuperGlue do")
    recorded = Trace()

    def record_weights(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        with torch.no_grad():
            recorded.attentions.append(module.weights(*arguments))

    def record_output(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        recorded.hidden_states.append(output)

    def record_inputs(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        recorded.hidden_states += arguments[:2]

    with ExitStack() as stack:
        stack.callback(setattr, network, "is_traced", network.is_traced)
        network.is_traced = True
        for module in network.modules():
            if isinstance(module, _ATTENTION):
                handle = module.register_forward_hook(record_weights)
            elif isinstance(module, (*_STATES, superpoint.ConvBlock)):
                handle = module.register_forward_hook(record_output)
            elif isinstance(module, superglue.GraphNetwork):
                handle = module.register_forward_pre_hook(record_inputs)
            elif isinstance(network, lightglue.LightGlue) and module is network.input_projection:
                handle = module.register_forward_hook(record_output)
            elif isinstance(module, lightglue_layers.TransformerLayer):
                # A compiled layer does not call its submodules, so it has nothing to record.
                stack.callback(setattr, module, "compiled", module.compiled)
                module.compiled = None
                continue
            else:
                continue
            stack.callback(handle.remove)
        yield recorded
