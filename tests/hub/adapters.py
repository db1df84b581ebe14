"""Adapters that the client's process makes, pushes and loads."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from ..peft_contract.common import adapted, logits
from ..support.models import tiny_vit


def push(
    repo: str, seed: int = 0, adapter_name: str = "default", token: str = "hf_ann", **options: Any
) -> torch.Tensor:
    """Push an adapter, different for every seed, and return what it computes."""
    torch.manual_seed(seed)
    model = adapted(adapter_name=adapter_name)
    model.push_to_hub(repo, token=token, **options)
    return logits(model)


def load(repo: str, **options: Any) -> torch.Tensor:
    """What the adapter of a repository computes."""
    return logits(PeftModel.from_pretrained(tiny_vit(), repo, **options))
