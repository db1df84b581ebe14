"""What is compared: models with the very same frozen weights, in the same memory."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from e2vpt_peft import E2VPTConfig

from ..token_insertion import insert_prompts
from .setup import NUM_LABELS, Prompts, Setup

HEAD = ["classifier"]


def build_backbone(setup: Setup) -> ViTForImageClassification:
    """A ViT with random weights, frozen. Speed does not depend on the weights."""
    torch.manual_seed(setup.seed)
    size = setup.size
    config = ViTConfig(
        image_size=size.image_size,
        patch_size=size.patch_size,
        hidden_size=size.hidden_size,
        intermediate_size=4 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_labels=NUM_LABELS,
        attn_implementation="sdpa",
    )
    model = ViTForImageClassification(config).to(setup.device, setup.dtype)
    return model.requires_grad_(False).eval()


def copy_of(backbone: ViTForImageClassification) -> ViTForImageClassification:
    """A copy with modules of its own and the same weights: not only equal ones, but the same memory.

    So no side has its weights in a better place, and many fit into memory. The classifier is copied.
    """
    shared = [*backbone.vit.parameters(), *backbone.vit.buffers()]
    return copy.deepcopy(backbone, memo={id(tensor): tensor for tensor in shared})


def build_linear_probe(backbone: ViTForImageClassification) -> ViTForImageClassification:
    """The backbone with nothing but its classifier trainable."""
    model = copy_of(backbone)
    model.classifier.requires_grad_(True)
    return model


def build_e2vpt(
    backbone: ViTForImageClassification, prompts: Prompts, adapters: Sequence[str] = ("one",)
) -> PeftModel:
    """E²VPT by this package, with the classifier trainable."""
    return add_adapters(copy_of(backbone), e2vpt_config(prompts), adapters)


def e2vpt_config(prompts: Prompts) -> E2VPTConfig:
    return E2VPTConfig(
        num_visual_prompts=prompts.visual,
        num_kv_prompts=prompts.kv,
        share_kv_prompts=not prompts.beside,
        kv_prompt_activation="gelu" if prompts.beside else None,
        prompt_dropout=prompts.dropout,
        modules_to_save=HEAD,
    )


def build_lora(backbone: ViTForImageClassification, adapters: Sequence[str] = ("one",)) -> PeftModel:
    """PEFT's LoRA in its most common setting, with the classifier trainable."""
    return add_adapters(copy_of(backbone), lora_config(), adapters)


def lora_config(**options: Any) -> LoraConfig:
    # Not the usual start, in which adapters change nothing, to tell one from the other.
    defaults: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(r=8, modules_to_save=HEAD, **{**defaults, **options})


def build_token_insertion(backbone: ViTForImageClassification, prompts: Prompts) -> ViTForImageClassification:
    """E²VPT as published, with the classifier trainable."""
    model = copy_of(backbone)
    insert_prompts(model, prompts.visual, prompts.kv, prompts.dropout)
    return model


def add_adapters(model: nn.Module, config: peft.PeftConfig, adapters: Sequence[str]) -> PeftModel:
    """Adapters of one configuration, all in the type of the backbone."""
    # With PEFT's default, a float32 adapter for bfloat16 weights, LoRA is slowed down by conversions that prompts do
    # not need.
    first, *others = adapters
    adapted = get_peft_model(model, config, adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        adapted.add_adapter(name, copy.deepcopy(config), autocast_adapter_dtype=False)
    return adapted


@torch.no_grad()
def copy_prompts(e2vpt: PeftModel, inserted: ViTForImageClassification, adapter: str = "one") -> None:
    """Give the token-insertion model the prompts and the classifier of the E²VPT model."""
    vit = e2vpt.get_base_model().vit
    for source, target in zip(vit.layers, inserted.vit.layers):
        target.visual_prompts.copy_(source.attention.e2vpt_visual_prompts[adapter])
        target.attention.kv_prompts.copy_(source.attention.e2vpt_kv_prompts[adapter])
    head = e2vpt.get_base_model().classifier.modules_to_save[adapter]
    inserted.classifier.load_state_dict(head.state_dict())
