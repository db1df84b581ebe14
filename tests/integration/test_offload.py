"""Models that accelerate offloads after they were adapted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from e2vpt_peft import convert_to_kv_prompts, prune_prompts, rewind_prompts, score_prompts

from ..support.adapted import adapt
from ..support.models import images, tiny_vit


def to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def one_layer_to_disk(model: nn.Module, folder: Path) -> nn.Module:
    parts = {"vit.embeddings": "cpu", "vit.layernorm": "cpu", "classifier": "cpu"}
    layers = {f"vit.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    device_map: Any = {f"base_model.model.{name}": place for name, place in (parts | layers).items()}
    return accelerate.dispatch_model(model, device_map=device_map, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("offload", [to_cpu, to_disk, one_layer_to_disk])
@torch.no_grad()
def test_prompts_come_in_when_they_are_needed_and_go_again(offload: Any, depth: str, tmp_path: Path) -> None:
    model = adapt(tiny_vit(), visual_prompt_depth=depth, modules_to_save=["classifier"])
    layer = model.base_model.model.vit.layers[0 if depth == "shallow" else 1].attention
    expected = model(images()).logits
    model = offload(model, tmp_path)
    elsewhere = "cpu" if offload is one_layer_to_disk and depth == "shallow" else "meta"
    for _ in range(2):
        assert torch.equal(model(images()).logits, expected)
        assert layer.e2vpt_visual_prompts["default"].device.type == elsewhere


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@torch.no_grad()
def test_a_mixed_batch_of_an_offloaded_model(depth: str, tmp_path: Path) -> None:
    model = adapt(tiny_vit(), visual_prompt_depth=depth, modules_to_save=["classifier"])
    model.add_adapter("kv", type(model.peft_config["default"])(num_visual_prompts=0, num_kv_prompts=1))
    model.add_adapter("late", type(model.peft_config["default"])(layers_to_transform=[2]))
    names = ["default", "kv", "late"]
    heads = model.get_base_model().classifier
    for head in (heads.original_module, *heads.modules_to_save.values()):
        head.register_forward_hook(lambda *args: None)  # so that heads are called one by one, as offloaded ones are
    expected = model(images(), adapter_names=names).logits
    assert torch.equal(to_cpu(model, tmp_path)(images(), adapter_names=names).logits, expected)


TOKENS = [True, False, True]
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "score": lambda model: score_prompts(model, [{"pixel_values": images()}], progress_bar=False),
    "prune": lambda model: prune_prompts(model, token_mask=TOKENS),
    "rewind": rewind_prompts,
    "convert": convert_to_kv_prompts,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("offload", [to_cpu, to_disk, one_layer_to_disk])
@torch.no_grad()
def test_what_would_be_lost_at_the_next_pass_is_refused(offload: Any, change: Any, tmp_path: Path) -> None:
    """accelerate has the values, and would put the former ones into whatever was written."""
    model = adapt(tiny_vit())
    expected = model(images()).logits
    model = offload(model, tmp_path)
    with pytest.raises(ValueError, match="Adapter 'default' is offloaded by accelerate, which would"):
        change(model)
    assert torch.equal(model(images()).logits, expected)


@torch.no_grad()
def test_a_model_that_is_no_longer_offloaded_is_pruned(tmp_path: Path) -> None:
    model = to_cpu(adapt(tiny_vit()), tmp_path)
    remove_hook_from_submodules(model)
    reference = adapt(tiny_vit())
    reference.load_state_dict(model.state_dict())
    for each in (model, reference):
        prune_prompts(each, token_mask=TOKENS)
    assert torch.equal(model(images()).logits, reference(images()).logits)
