"""How prompts are scored on one batch: the six methods, and their table.

Each is a function from a [`Probe`] to scores of the prompts, float64, (prompts,), and of their segments, (prompts,
segments); the lowest are pruned first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..attention.prefix import Prefix
from ..layer import E2VPTLayer
from .gradients import gradients_of
from .probe import Probe
from .segment_removal import rise_without_segments, rise_without_segments_by_layer

TokensAndSegments = tuple[torch.Tensor, torch.Tensor]
Method = Callable[[Probe], TokensAndSegments]


def signed(probe: Probe) -> TokensAndSegments:
    """The published code's: d loss / d mask, for masks of ones on tokens and on segments, shared by all layers."""
    leaves = [prompts.clone().requires_grad_() for prompts in probe.prompts]
    gradients = gradients_of(probe.loss(leaves), leaves)
    segments = torch.zeros(probe.kept.shape, dtype=torch.float64)
    for gradient, prompts in zip(gradients, probe.prompts):  # whose hidden sizes may differ
        products = (gradient * prompts.double()).cpu()
        segments += products.unflatten(-1, (-1, probe.segments)).sum(-2)
    return segments.sum(-1), segments


def absolute(probe: Probe) -> TokensAndSegments:
    """The paper's (eq. 6): the absolute value of that."""
    tokens, segments = signed(probe)
    return tokens.abs(), segments.abs()


def first_order(probe: Probe) -> TokensAndSegments:
    """Minus that: the first-order change of the loss when a token, or a segment, is taken away."""
    tokens, segments = signed(probe)
    return -tokens, -segments


def leave_one_out(probe: Probe) -> TokensAndSegments:
    """The change of the loss when one token, or one segment, is missing: a forward pass for each."""
    return _tokens_left_out(probe), _segments_left_out(probe)


def removal(probe: Probe) -> TokensAndSegments:
    """The default: tokens left out one at a time, segments by [`rise_without_segments`]."""
    return _tokens_left_out(probe), rise_without_segments(probe)


def removal_by_layer(probe: Probe) -> TokensAndSegments:
    """The same for one layer at a time: scores have one more dimension in front, layers."""
    loss = probe.value()
    tokens = torch.zeros(len(probe.prompts), len(probe.prompts[0]), dtype=torch.float64)
    for layer, token in np.ndindex(*tokens.shape):
        prompts = list(probe.prompts)
        prompts[layer] = torch.cat([prompts[layer][:token], prompts[layer][token + 1 :]])
        tokens[layer, token] = probe.value(prompts) - loss
    return tokens, rise_without_segments_by_layer(probe)


def attention_gate(probe: Probe) -> TokensAndSegments:
    """Tokens by the derivative with respect to a bias on the attention that they are paid, in all layers, heads and
    queries; segments as [`removal`] does."""
    count = len(probe.prompts[0])
    bias = torch.zeros(count, device=probe.prompts[0].device, requires_grad=True)

    def gate(layer: E2VPTLayer, prefix: Prefix, batch_size: int) -> Prefix:
        others = bias.new_zeros(prefix.keys.shape[1] - count)
        return prefix._replace(bias=torch.cat([bias, others])[None])

    with probe.running(token_bias=bias) if probe.is_shallow else probe.running(edit_prefix=gate):
        loss = probe.loss()
    (gradient,) = gradients_of(loss, [bias])
    return gradient.cpu().abs(), rise_without_segments(probe)


SCORING_METHODS: dict[str, Method] = {
    "removal": removal,
    "leave_one_out": leave_one_out,
    "absolute": absolute,
    "signed": signed,
    "first_order": first_order,
    "attention_gate": attention_gate,
}
"""The scores of tokens and segments on one batch, by the name of the method."""


def _tokens_left_out(probe: Probe) -> torch.Tensor:
    """The change of the loss when one token is removed from all layers."""
    loss, count = probe.value(), len(probe.prompts[0])
    if count == 1:  # there is no model with fewer to compare with, and nothing to choose from
        return torch.zeros(1, dtype=torch.float64)
    others = [[index for index in range(count) if index != left_out] for left_out in range(count)]
    return torch.stack([probe.value([prompts[kept] for prompts in probe.prompts]) - loss for kept in others])


def _segments_left_out(probe: Probe) -> torch.Tensor:
    """The change of the loss when one segment of one token is set to zero in all layers."""
    loss = probe.value()
    changes = torch.zeros(probe.kept.shape, dtype=torch.float64)
    for token, segment in probe.kept.nonzero().tolist():
        replaced = []
        for prompts in probe.prompts:
            prompts = prompts.clone()
            prompts[token, segment :: probe.segments] = 0
            replaced.append(prompts)
        changes[token, segment] = probe.value(replaced) - loss
    return changes
