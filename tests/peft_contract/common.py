"""What the tests of PEFT's contract share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from ..support.models import images, tiny_vit

DEEP: dict[str, Any] = {}
SHALLOW = {"visual_prompt_depth": "shallow"}
SHALLOW_ALONE = {"visual_prompt_depth": "shallow", "num_kv_prompts": 0}
KINDS = {"deep": DEEP, "shallow": SHALLOW, "shallow without key-value prompts": SHALLOW_ALONE}


def small_config(**config: Any) -> E2VPTConfig:
    return E2VPTConfig(**{"num_visual_prompts": 2, "num_kv_prompts": 3, "modules_to_save": ["classifier"], **config})


def adapted(backbone: nn.Module | None = None, adapter_name: str = "default", **config: Any) -> PeftModel:
    """A tiny ViT with prompts and with a classifier that training has moved away from the backbone's."""
    model = get_peft_model(backbone or tiny_vit(), small_config(**config), adapter_name=adapter_name).eval()
    move_heads(model)
    return model


@torch.no_grad()
def move_heads(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "modules_to_save." in name:
            parameter.add_(torch.randn_like(parameter))


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    return model(images(), **inputs).logits


def layers_of(model: nn.Module) -> list[E2VPTLayer]:
    return [module for module in model.modules() if isinstance(module, E2VPTLayer)]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that an operation that is refused must leave alone."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for part in ("modules", "trainable", "adapters", "hooks"):
        assert after[part] == before[part], part
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][name], before["state"][name]) for name in before["state"])


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
