"""The values that prompts start from."""

from __future__ import annotations

import math

import torch
from torch import nn

from .attention.site import AttentionSite
from .config import E2VPTConfig
from .prompt_shapes import KV_PROMPTS, VISUAL_PROMPTS, prompt_shapes

TRUNC_NORMAL_STD = 0.02
"""Of `init_weights="trunc_normal"`: what transformers and timm initialise the tokens of a ViT with."""


KEY_STD = 0.5
"""Of key prompts that are read through GELU, whose values start at zero: queries of about 1 give scores of about 1."""


def draw_prompts(config: E2VPTConfig, site: AttentionSite, has_visual_prompts: bool) -> dict[str, torch.Tensor]:
    """Initial values for the prompts of an adapter in one attention, pruned ones included; see `init_weights`.

    Args:
        config ([`E2VPTConfig`]): The adapter's configuration.
        site ([`~e2vpt_peft.attention.site.AttentionSite`]): The attention.
        has_visual_prompts (`bool`): Whether there are visual prompts here, or in another layer only.

    Returns:
        `dict[str, torch.Tensor]`: By the names of the parameters, on the CPU, of the shapes of [`prompt_shapes`].
    """
    fans = {
        VISUAL_PROMPTS: site.patch_fan_in + site.hidden_size,  # as in VPT, which has it for all layers
        KV_PROMPTS: config.num_kv_prompts * site.head_size,
    }
    shapes = prompt_shapes(config, site, has_visual_prompts=has_visual_prompts)
    prompts = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name, values in prompts.items():
        if config.init_weights == "trunc_normal":
            nn.init.trunc_normal_(values, std=TRUNC_NORMAL_STD, a=-2 * TRUNC_NORMAL_STD, b=2 * TRUNC_NORMAL_STD)
        else:
            bound = math.sqrt(6 / fans[name])
            values.uniform_(-bound, bound)
        if name == KV_PROMPTS and config.kv_prompt_activation is not None:
            values[0].normal_(std=KEY_STD)
            values[1].zero_()
    return prompts
