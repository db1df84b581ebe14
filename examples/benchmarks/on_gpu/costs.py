"""What else costs time: many adapters, the optimiser, looking at each loss, other methods, other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import is_timm_available

from ..measuring.calls import TrainingStep, inference
from ..measuring.comparisons import BACKBONE, INFERENCE, LORA, PROBE, STEP, against, compare_mixed_batch, ours
from ..measuring.methods import (
    HEAD,
    add_adapters,
    build_e2vpt,
    build_linear_probe,
    copy_of,
    e2vpt_config,
    lora_config,
)
from ..measuring.rows import Row
from ..measuring.setup import NUM_LABELS
from .cases import Machine, NotHere
from .modes import EAGER
from .speeds import IMAGES, rates


def measure_mixed_batch(machine: Machine, adapters: int) -> list[Row]:
    """A batch in which that many adapters take turns, E²VPT's and LoRA's."""
    batch_size = 6 if machine.toy else 256
    return list(
        compare_mixed_batch(machine.setup, machine.backbone, machine.prompts, adapters, batch_size, machine.time)
    )


def measure_optimisers(machine: Machine, batch_size: int) -> list[Row]:
    """AdamW in its three forms."""
    kinds = {"AdamW": {}, "AdamW, for loop": {"foreach": False}, "AdamW, fused": {"fused": True}}
    images, labels = machine.setup.batch(batch_size)
    steps = {
        name: TrainingStep(build_e2vpt(machine.backbone, machine.prompts), images, labels, **options)
        for name, options in kinds.items()
    }
    return list(
        against(machine.setup, "training step time by optimiser", machine.time(steps), "AdamW", batch_size, EAGER)
    )


def measure_looks_at_the_loss(machine: Machine, batch_size: int) -> list[Row]:
    """Each step waits for its loss, as with `E2VPTTrainer`, or none does."""
    images, labels = machine.setup.batch(batch_size)
    steps = {
        name: TrainingStep(build_e2vpt(machine.backbone, machine.prompts), images, labels, looks_at_loss=looks)
        for name, looks in {"no look": False, "each loss looked at": True}.items()
    }
    times = machine.time(dict(steps), least_seconds=0.5)  # many steps in a row, so that a queue can build up
    return list(against(machine.setup, "training step time by looks at the loss", times, "no look", batch_size, EAGER))


METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "DoRA": lambda: lora_config(use_dora=True),
    "(IA)³": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], modules_to_save=HEAD
    ),
    "LayerNorm tuning": lambda: peft.LNTuningConfig(
        target_modules=["layernorm_before", "layernorm_after"], modules_to_save=HEAD
    ),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=HEAD),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj", "v_proj"], modules_to_save=HEAD),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj", "v_proj"], modules_to_save=HEAD),
}
"""Other methods of PEFT, at their own defaults."""


def measure_method(machine: Machine, name: str) -> list[Row]:
    """Inference and a training step with another method of PEFT, beside E²VPT."""
    batch_size = 3 if machine.toy else 32
    images, labels = machine.setup.batch(batch_size)
    models: dict[str, nn.Module] = {
        ours(machine.prompts): build_e2vpt(machine.backbone, machine.prompts),
        name: add_adapters(copy_of(machine.backbone), METHODS[name](), ("one",)),
    }
    calls = {model: inference(module, images) for model, module in {BACKBONE: machine.backbone, **models}.items()}
    times = machine.time(calls)
    models[PROBE] = build_linear_probe(machine.backbone)
    steps = machine.time({model: TrainingStep(module, images, labels) for model, module in models.items()})
    return [
        *against(machine.setup, INFERENCE, times, BACKBONE, batch_size, EAGER),
        *against(machine.setup, STEP, steps, PROBE, batch_size, EAGER),
    ]


def measure_timm(machine: Machine) -> list[Row]:
    """timm's ViT of the same size, bare and with an adapter, against transformers'."""
    if not is_timm_available():
        raise NotHere("timm is not installed")
    size = machine.setup.size
    sizes: dict[str, Any] = {"embed_dim": size.hidden_size, "depth": size.layers, "num_heads": size.heads}
    sizes |= {"img_size": size.image_size, "patch_size": size.patch_size}
    config = TimmWrapperConfig(
        architecture="vit_base_patch16_224",
        model_args=sizes,
        num_classes=NUM_LABELS,
        pretrained_cfg={"num_classes": NUM_LABELS},
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = TimmWrapperForImageClassification(config).to(machine.device, machine.setup.dtype)
        return model.requires_grad_(False)

    batch_size = 3 if machine.toy else 32
    images, _ = machine.setup.batch(batch_size)
    configs = {
        f"timm, {ours(machine.prompts)}": e2vpt_config(machine.prompts),
        f"timm, {LORA}": lora_config(target_modules=["qkv"]),
    }
    models: dict[str, nn.Module] = {BACKBONE: machine.backbone, "timm": build()}
    for name, adapter in configs.items():
        adapter.modules_to_save = ["head"]
        models[name] = add_adapters(build(), adapter, ("one",))
    times = machine.time({name: inference(model, images) for name, model in models.items()})
    return [
        *against(machine.setup, "inference time of timm's ViT", times, "timm", batch_size, EAGER),
        *rates(machine, IMAGES, times, batch_size, EAGER),
    ]
