"""No tensor is left behind on the CPU when the model is elsewhere.

Without an accelerator, the meta device stands for it: every path runs there, and no operation may get tensors of two
devices (but for single numbers and copies).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e2vpt_peft import (
    E2VPTConfig,
    PromptScores,
    convert_to_kv_prompts,
    keep_prefixes,
    prune_prompts,
    rewind_prompts,
)

from ..support.models import BESIDE, images, tiny_vit
from ..support.zoo import ZOO
from ..test_mixed_batch import MIXES, adapted

COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of several devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and func._schema.name not in COPIES:
            raise AssertionError(f"{func} has tensors on {sorted(devices)}")
        return func(*args, **(kwargs or {}))


@contextmanager
def one_device() -> Iterator[None]:
    with OneDevice():
        yield


def check(model: PeftModel, inputs: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> None:
    """Inference, twice, with kept prefixes and without, and a training step."""
    inputs = inputs or {"pixel_values": images(3)}
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    for enabled in (True, False):
        keep_prefixes(model, enabled)
        for guard in (torch.no_grad, torch.inference_mode):
            model.eval()
            with guard(), one_device():
                for _ in range(2):
                    assert next(iter(model(**inputs, **kwargs).values())).device.type == "meta"
    if not kwargs:
        model.train()
        with one_device():
            next(iter(model(**inputs).values())).float().sum().backward()
        trained = [parameter for name, parameter in model.named_parameters() if "e2vpt_" in name]
        assert any(parameter.grad is not None for parameter in trained)
        model.eval()


def test_an_operation_on_two_devices_is_noticed() -> None:
    with pytest.raises(AssertionError, match="cpu"), one_device():
        torch.empty(3, device="meta") + torch.empty(3)


PATHS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"visual_prompt_depth": "shallow"},
    "separate": {"share_kv_prompts": False, "kv_prompt_dropout": 0.1},
    "beside": BESIDE,
    "visual only": {"num_kv_prompts": 0},
    "key-value only": {"num_visual_prompts": 0},
}


def model_with(**config: Any) -> PeftModel:
    return get_peft_model(tiny_vit(), E2VPTConfig(**{"num_visual_prompts": 4, "num_segments": 4, **config}))


@pytest.mark.parametrize("before", [True, False], ids=["moved", "adapted there"])
@pytest.mark.parametrize("path", PATHS)
def test_prompts_of_every_kind(path: str, before: bool) -> None:
    if before:
        model = model_with(**PATHS[path]).to("meta")
    else:
        model = get_peft_model(tiny_vit().to("meta"), E2VPTConfig(**PATHS[path]))
    check(model)


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "clip_vision_model", "dinov3_vit", "internvl_vision"])
def test_attention_of_every_kind(name: str) -> None:
    model = ZOO[name].make().to("meta").eval()
    inputs = {key: tensor.to("meta") for key, tensor in ZOO[name].inputs(2).items()}
    with torch.no_grad(), one_device():
        model(**inputs)
        adapted_model = get_peft_model(model, E2VPTConfig(num_visual_prompts=3)).eval()
        for _ in range(2):
            adapted_model(**inputs)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_pruning_and_rewinding(depth: str) -> None:
    model = model_with(visual_prompt_depth=depth).to("meta")
    with one_device():
        prune_prompts(model, PromptScores(torch.rand(4), torch.rand(4, 4)), token_rate=0.25, segment_rate=0.5)
    check(model)
    with one_device():
        rewind_prompts(model)
    check(model)
    with one_device():
        rewind_prompts(model, init="fresh", undo_pruning=True)
    check(model)


@pytest.mark.parametrize("is_pruned", [False, True])
def test_conversion(is_pruned: bool) -> None:
    model = model_with(modules_to_save=["classifier", "layernorm_before"]).to("meta")
    if is_pruned:
        prune_prompts(model, PromptScores(torch.rand(4), torch.rand(4, 4)), token_rate=0.25, segment_rate=0.5)
    with one_device():
        convert_to_kv_prompts(model)
    check(model)


@pytest.mark.parametrize("mix", MIXES)
def test_mixed_batches(mix: str) -> None:
    model = adapted(tiny_vit(), MIXES[mix]).to("meta")
    check(model, adapter_names=["visual", "__base__", "kv"])
    check(model, adapter_names=["flowers", "digits", "kv"])


def test_several_active_adapters() -> None:
    model = adapted(tiny_vit(), MIXES["deep"], heads=[]).to("meta")
    model.base_model.set_adapter(["flowers", "kv"])
    check(model)


@pytest.mark.parametrize("beside", [False, True], ids=["from_pretrained", "load_adapter"])
def test_a_loaded_adapter(beside: bool, tmp_path: Path) -> None:
    """Loaded on the CPU and moved: PEFT itself leaves adapters of a backbone on the meta device on the CPU."""
    model = model_with()
    prune_prompts(model, PromptScores(torch.rand(4), torch.rand(4, 4)), token_rate=0.25, segment_rate=0.5)
    model.save_pretrained(tmp_path)
    if beside:
        model.load_adapter(tmp_path, "other", is_trainable=True)
        model.set_adapter("other")
    else:
        model = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    check(model.to("meta"))
