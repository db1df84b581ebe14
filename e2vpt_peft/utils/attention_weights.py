"""What each attention of a model pays to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .modes import evaluating


@torch.no_grad()
def attention_weights(
    model: nn.Module, backbone: PreTrainedModel, inputs: Mapping[str, Any]
) -> Sequence[torch.Tensor]:
    """The attention weights of each layer in evaluation mode, whatever implementation the model is set to.

    Args:
        model (`nn.Module`): What is called; it is left as it was.
        backbone (`PreTrainedModel`): The model of transformers in it.
        inputs (`Mapping`): What it is called with.

    Returns:
        `Sequence[torch.Tensor]`: (batch size, heads, queries, keys) each; empty if the model returns none.
    """
    implementation = backbone.config._attn_implementation
    try:
        backbone.set_attn_implementation("eager")  # the only one that returns its weights
        with evaluating(model):
            weights: Sequence[torch.Tensor] | None = model(**inputs, output_attentions=True).attentions
    finally:
        backbone.set_attn_implementation(implementation)
    return weights or ()
