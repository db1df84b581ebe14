"""Put given prompts into a model, by way of the public API."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from .reference import Prompts


def with_prompts(model: nn.Module, prompts: Prompts, **config: Any) -> PeftModel:
    """Adapt `model` with the prompts that the reference takes."""
    visual, keys, values = prompts.visual, prompts.keys, prompts.values
    counts = {
        "num_visual_prompts": 0 if visual is None else visual.shape[1],
        "num_kv_prompts": 0 if keys is None else keys.shape[2],
        "share_kv_prompts": keys is values,
        "kv_prompt_activation": "gelu" if prompts.gelu else None,
        "visual_prompt_depth": "deep" if visual is None or len(visual) > 1 else "shallow",
    }
    peft_model = get_peft_model(model, E2VPTConfig(**{**counts, "num_segments": 1, **config}))
    set_prompts(peft_model, prompts)
    return peft_model.eval()


@torch.no_grad()
def set_prompts(model: nn.Module, prompts: Prompts, adapter_name: str = "default") -> None:
    layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
    for index, layer in enumerate(layers):
        if adapter_name in layer.e2vpt_visual_prompts:
            layer.e2vpt_visual_prompts[adapter_name].copy_(prompts.visual[index])
        if adapter_name in layer.e2vpt_kv_prompts:
            keys, values = prompts.keys[index], prompts.values[index]
            shared = prompts.keys is prompts.values
            given, parameter = keys if shared else torch.stack([keys, values]), layer.e2vpt_kv_prompts[adapter_name]
            parameter.copy_(given.view(parameter.shape))
