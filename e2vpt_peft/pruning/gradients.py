"""Gradients in float64 of models in any precision."""

from __future__ import annotations

import torch

SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)
"""Powers of two, which change no digit; the first is the largest that float16 has."""


def gradients_of(
    values: torch.Tensor, inputs: list[torch.Tensor], weights: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The gradients of a weighted sum of values, in float64. They can be asked for again.

    The sum is scaled: float16 has no numbers below 6e-8, and of a model that is sure of its answers most gradients are
    smaller than that.

    Args:
        values (`torch.Tensor`): Of any shape.
        inputs (`list[torch.Tensor]`): What to differentiate by.
        weights (`torch.Tensor`, *optional*): The weights in the sum, of the shape of the values. 1 by default.
    """
    weights = torch.ones_like(values) if weights is None else weights
    for scale in SCALES:
        scaled = torch.autograd.grad(values, inputs, weights * scale, retain_graph=True)
        gradients = [gradient.double() / scale for gradient in scaled]
        if all(gradient.isfinite().all() for gradient in gradients):
            break  # otherwise the scaled ones may have been too large for float16
    return gradients
