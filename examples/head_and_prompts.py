"""An optimizer with a learning rate for the head, and another for prompts."""

from __future__ import annotations

import torch

from e2vpt_peft import create_optimizer


def make_optimizer(
    model: torch.nn.Module, head_learning_rate: float, prompt_learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW. Prompts of both kinds have the same rate, and do not decay."""
    ratio = prompt_learning_rate / head_learning_rate
    return create_optimizer(
        model,
        lr=head_learning_rate,
        visual_prompt_lr_ratio=ratio,
        kv_prompt_lr_ratio=ratio,
        weight_decay=1e-4,
    )
