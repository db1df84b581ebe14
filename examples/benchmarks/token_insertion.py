"""E²VPT as published, for comparison: visual prompts as tokens in the sequence, in a Hugging Face ViT.

The package gets the same function from a key-value prefix. Here, as in VPT and E²VPT (arXiv 2203.12119, 2307.13770),
each layer's visual prompts stand behind the cls token, so that they go through queries, output projection and MLP as
well, only to be replaced in front of the next layer. Key-value prompts are joined to keys and values in the attention.

This is meant to be as quick as the idea allows: the attention is torch's own fused one, prompts are replaced in a
single operation, and none are taken out behind the last layer, where the classifier reads the cls token alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, ViTForImageClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "sdpa_with_key_value_prompts"


def insert_prompts(
    model: ViTForImageClassification, num_visual_prompts: int, num_kv_prompts: int, prompt_dropout: float = 0.0
) -> None:
    """Freeze `model` but for its classifier, and give every layer `visual_prompts` and its attention `kv_prompts`.

    Args:
        model ([`~transformers.ViTForImageClassification`]): The model, changed in place.
        num_visual_prompts (`int`): Visual prompts per layer, 1 or more.
        num_kv_prompts (`int`): Key-value prompts per layer, shared by keys and values, 1 or more.
        prompt_dropout (`float`): Dropout probability on visual prompts, drawn per sample.
    """
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    config = model.config
    like = model.vit.embeddings.cls_token
    for index, layer in enumerate(model.vit.layers):
        prompts = torch.empty(num_visual_prompts, config.hidden_size, dtype=like.dtype, device=like.device)
        layer.visual_prompts = nn.Parameter(nn.init.uniform_(prompts, -0.1, 0.1))
        heads, size = config.num_attention_heads, layer.attention.head_dim
        prompts = torch.empty(heads, num_kv_prompts, size, dtype=like.dtype, device=like.device)
        layer.attention.kv_prompts = nn.Parameter(nn.init.uniform_(prompts, -0.1, 0.1))
        insert = _InsertTokens(prompt_dropout, replace=index > 0)
        layer.register_forward_pre_hook(insert)
    model.set_attn_implementation(ATTENTION)


class _InsertTokens:
    """Forward pre-hook of a layer: puts its visual prompts behind the cls token.

    Args:
        dropout (`float`): Dropout probability, drawn per sample.
        replace (`bool`): Whether the prompts of the layer before stand there already.
    """

    def __init__(self, dropout: float, replace: bool) -> None:
        self.dropout = dropout
        self.replace = replace

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = args
        prompts = layer.visual_prompts.expand(len(states), -1, -1)
        if self.dropout and layer.training:
            prompts = F.dropout(prompts, self.dropout)
        if self.replace:
            states = torch.slice_scatter(states, prompts, dim=1, start=1, end=1 + prompts.shape[1])
        else:
            states = torch.cat([states[:, :1], prompts, states[:, 1:]], dim=1)
        return states, *others


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    prompts = module.kv_prompts.transpose(0, 1).expand(len(key), -1, -1, -1)
    # Joined as (batch, length, heads, head size), which is how they lie in memory: quicker than head by head.
    key, value = (torch.cat([prompts, states.transpose(1, 2)], 1).transpose(1, 2) for states in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
