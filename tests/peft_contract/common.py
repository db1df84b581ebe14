"""What the tests of PEFT's contract share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from ..support.models import BESIDE, images, tiny_vit

DEEP: dict[str, Any] = {}
SHALLOW = {"visual_prompt_depth": "shallow"}
SHALLOW_ALONE = {"visual_prompt_depth": "shallow", "num_kv_prompts": 0}
KINDS = {"deep": DEEP, "beside": BESIDE, "shallow": SHALLOW, "shallow without key-value prompts": SHALLOW_ALONE}


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
    configs = getattr(model, "peft_config", {})
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "modes": [name for name, module in model.named_modules() if module.training],
        "adapters": {name: str(config) for name, config in configs.items()},
        "active": [str(module.active_adapters) for module in model.modules() if isinstance(module, E2VPTLayer)],
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "configs": [str(vars(model).get(name)) for name in ("config", "generation_config")],
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The parts of two snapshots that differ."""
    found = [part for part in before if part != "state" and before[part] != after[part]]
    old, new = before["state"], after["state"]
    same = old.keys() == new.keys() and all(
        old[name].dtype == new[name].dtype and torch.equal(old[name], new[name]) for name in old
    )
    return found if same else [*found, "state"]


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    assert differences(before, snapshot(model)) == []


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
