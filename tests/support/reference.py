"""VPT and E²VPT by token insertion, written from the paper's equations alone: the reference that the tuner must equal.

Nothing of the package is used here, and of transformers only the modules that hold weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Prompts:
    """Prompts of a model with L layers, hidden size D, and H heads of size d.

    Attributes:
        visual: (L, tokens, D) if deep, (1, tokens, D) if shallow, or `None`.
        keys, values: (L, H, prompts, d) each, or `None`.
        gelu: Whether keys and values are in no softmax, but beside it: `gelu(q K^T / sqrt(d)) V` is added.
    """

    visual: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    gelu: bool = False


@dataclass
class Parts:
    """What differs between the reference's architectures."""

    special_tokens: int
    norm1: str
    norm2: str
    scales: bool = False
    mean_patches_in_head: bool = False


PARTS = {
    "vit": Parts(1, "layernorm_before", "layernorm_after"),
    "deit": Parts(2, "layernorm_before", "layernorm_after"),
    "dinov2": Parts(1, "norm1", "norm2", scales=True, mean_patches_in_head=True),
}


def token_insertion(
    model: nn.Module,
    pixel_values: torch.Tensor,
    prompts: Prompts,
    key_mask: torch.Tensor | None = None,
    interpolate_pos_encoding: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A classifier with prompts as tokens (VPT, eqs. 4 to 9) and as rows of keys and values (E²VPT, eq. 5).

    Args:
        key_mask: Which tokens of the backbone's own sequence may be attended to, (batch size, length).

    Returns:
        Logits, (batch size, classes), and the hidden states around the layers without the prompts, L + 1 times (batch
        size, length, D).
    """
    parts = PARTS[model.config.model_type]
    backbone = getattr(model, model.config.model_type)
    layers = backbone.encoder.layer if hasattr(backbone, "encoder") else backbone.layers
    kwargs = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
    special, heads = parts.special_tokens, model.config.num_attention_heads
    x = backbone.embeddings(pixel_values, **kwargs)
    batch, tokens, states = x.shape[0], 0, [x]
    for index, layer in enumerate(layers):
        if prompts.visual is not None and index < len(prompts.visual):
            new = prompts.visual[index].to(x.dtype).expand(batch, -1, -1)
            x = torch.cat([x[:, :special], new, x[:, special + tokens :]], dim=1)
            tokens = new.shape[1]
        y = getattr(layer, parts.norm1)(x)
        attention = layer.attention
        q, k, v = (
            p(y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        visible = torch.ones(batch, k.shape[2], dtype=torch.bool)
        if key_mask is not None:
            visible = torch.cat([key_mask[:, :special], visible[:, :tokens], key_mask[:, special:]], dim=1)
        beside = 0.0
        if prompts.gelu:
            scores = torch.einsum("bhnd,hpd->bhnp", q, prompts.keys[index].to(q.dtype)) / q.shape[-1] ** 0.5
            beside = torch.einsum("bhnp,hpd->bhnd", F.gelu(scores), prompts.values[index].to(q.dtype))
        elif prompts.keys is not None and prompts.values is not None:
            k = torch.cat([k, prompts.keys[index].to(k.dtype).expand(batch, -1, -1, -1)], dim=2)
            v = torch.cat([v, prompts.values[index].to(v.dtype).expand(batch, -1, -1, -1)], dim=2)
            visible = F.pad(visible, (0, prompts.keys.shape[2]), value=True)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = F.softmax(scores.masked_fill(~visible[:, None, None], float("-inf")), dim=-1)
        y = attention.o_proj((weights @ v + beside).transpose(1, 2).flatten(2))
        x = x + (layer.layer_scale1(y) if parts.scales else y)
        y = layer.mlp(getattr(layer, parts.norm2)(x))
        x = x + (layer.layer_scale2(y) if parts.scales else y)
        states.append(torch.cat([x[:, :special], x[:, special + tokens :]], dim=1))
    final = backbone.layernorm(states[-1])
    head = torch.cat([final[:, 0], final[:, 1:].mean(1)], -1) if parts.mean_patches_in_head else final[:, 0]
    return model.classifier(head), states


def random_prompts(
    model: nn.Module,
    tokens: int,
    kv_prompts: int,
    shallow: bool = False,
    share: bool = True,
    seed: int = 0,
    gelu: bool = False,
) -> Prompts:
    """Prompts of ordinary size, in float64 so that a cast to any type loses no more than that type's rounding."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shape = (layers, heads, kv_prompts, config.hidden_size // heads)
    visual = torch.randn(1 if shallow else layers, tokens, config.hidden_size, generator=generator)
    keys = torch.randn(shape, generator=generator)
    values = keys if share else torch.randn(shape, generator=generator)
    return Prompts(visual if tokens else None, keys if kv_prompts else None, values if kv_prompts else None, gelu)
