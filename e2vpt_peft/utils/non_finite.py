"""Where a loss that is NaN or infinite comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def explain_non_finite(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """The likely cause of a loss, or of gradients, that are not finite.

    Args:
        model (`nn.Module`): The model that gave the loss.
        batch (`Mapping[str, Any]`): What it was given.

    Returns:
        `str`: A sentence.
    """
    inputs = [name for name, value in batch.items() if not is_finite(value)]
    if inputs:
        return f"The batch has NaN or infinite values in {', '.join(inputs)}: look at the data."
    weights = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if weights:
        return (
            f"'{weights[0]}' ({len(weights)} weights) is NaN or infinite already: an update before has overflowed. "
            "Try a lower learning rate, gradient clipping (max_grad_norm) or a longer warm-up."
        )
    return (
        "Batch and weights are finite, so that the forward or backward pass has overflowed, as float16 does above "
        "65504. Try bfloat16 or float32, or a lower learning rate."
    )


def is_finite(value: Any) -> bool:
    """Whether a tensor has no NaN and no infinity; true of anything else."""
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
