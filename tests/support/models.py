"""Tiny random models, with norms, position embeddings and biases that hide no mistake."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 5,
}
BESIDE: dict[str, Any] = {"share_kv_prompts": False, "kv_prompt_activation": "gelu"}
"""Key-value prompts beside the attention."""


def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every parameter a random value: freshly made norms, biases and position embeddings are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() < 2 else 0.2)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def tiny_vit(seed: int = 0, **config: Any) -> ViTForImageClassification:
    sizes = {**SIZES, "intermediate_size": 64, **config}
    return randomized(ViTForImageClassification(ViTConfig(**sizes)), seed)  # type: ignore[return-value]


def tiny_deit(seed: int = 0, **config: Any) -> DeiTForImageClassification:
    sizes = {**SIZES, "intermediate_size": 64, **config}
    return randomized(DeiTForImageClassification(DeiTConfig(**sizes)), seed)  # type: ignore[return-value]


def tiny_dinov2(seed: int = 0, **config: Any) -> Dinov2ForImageClassification:
    sizes = {**SIZES, "mlp_ratio": 2, **config}
    return randomized(Dinov2ForImageClassification(Dinov2Config(**sizes)), seed)  # type: ignore[return-value]


TINY_MODELS = {"vit": tiny_vit, "deit": tiny_deit, "dinov2": tiny_dinov2}


def images(batch_size: int = 3, size: int = 16, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "e2vpt_" in name}
