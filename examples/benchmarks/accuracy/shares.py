"""The share of attention that goes to prompts, layer by layer."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.utils.attention_weights import attention_weights

IMAGES = 64


def shares_of_prefix(model: nn.Module, pixels: torch.Tensor) -> list[float] | None:
    """The mean over images, heads and tokens of what each layer's attention pays to its prefix.

    Shallow visual prompts are tokens, and not counted; nor are key-value prompts beside the attention.

    Args:
        model (`nn.Module`): A model with or without prompts.
        pixels (`torch.Tensor`): Images as the model reads them; the first 64 are looked at.

    Returns:
        `list[float]`: A number for each layer, or `None` if the model has no prompts in a prefix.
    """
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    if not isinstance(config, E2VPTConfig):
        return None
    deep = config.num_visual_prompts if config.visual_prompt_depth == "deep" else 0
    if not deep and config.num_kv_prompts == config.num_kv_prompts_beside:
        return None
    weights = attention_weights(model, model.get_base_model(), {"pixel_values": pixels[:IMAGES]})
    return [float(layer[..., : layer.shape[-1] - layer.shape[-2]].sum(-1).mean()) for layer in weights]
