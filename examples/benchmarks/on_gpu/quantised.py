"""Backbones in 8 and 4 bits."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import BitsAndBytesConfig, TorchAoConfig, ViTForImageClassification

from ..measuring.calls import TrainingStep
from ..measuring.methods import HEAD, add_adapters, build_backbone, build_linear_probe, e2vpt_config
from .cases import Facts, Machine, NotHere


def int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEAD)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=HEAD,
    )


def int8_weights() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEAD)


QUANTISATIONS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bitsandbytes, 8 bits": ("bitsandbytes", int8),
    "bitsandbytes, 4 bits": ("bitsandbytes", nf4),
    "torchao, int8 weights": ("torchao", int8_weights),
}
"""The library, and the configuration."""


def check_quantised(machine: Machine, name: str) -> Facts:
    """With a quantised backbone the logits are nearly those of the backbone as it was, and prompts train."""
    library, quantisation = QUANTISATIONS[name]
    if importlib.util.find_spec(library) is None:
        raise NotHere(f"{library} is not installed")
    setup = machine.small(torch.bfloat16)
    images, labels = setup.batch(8)
    backbone = build_backbone(setup)
    # bitsandbytes packs weights for inference on CPUs, and does not train afterwards: one is for training alone.
    as_it_was, small, trained = (
        adapted(model, machine)
        for model in (backbone, quantised(backbone, quantisation()), quantised(backbone, quantisation()))
    )
    with torch.no_grad():
        logits = [model.eval()(pixel_values=images).logits.float().flatten() for model in (as_it_was, small)]
    similarity = F.cosine_similarity(*logits, dim=0).item()
    step = TrainingStep(trained, images, labels)
    losses = []
    for _ in range(8):
        with torch.no_grad():
            losses.append(F.cross_entropy(trained(pixel_values=images).logits.float(), labels).item())
        step()
    facts = {"cosine of logits": similarity, "first loss": losses[0], "last loss": losses[-1]}
    if not (similarity > 0.95 and losses[-1] < losses[0]):
        raise AssertionError(str(facts))
    return facts


def quantised(backbone: ViTForImageClassification, quantisation: Any) -> ViTForImageClassification:
    """A quantised copy, made as users make it: on the way from a file."""
    with tempfile.TemporaryDirectory() as folder:
        build_linear_probe(backbone).save_pretrained(folder)
        small = ViTForImageClassification.from_pretrained(
            folder, quantization_config=quantisation, dtype=backbone.dtype, device_map={"": backbone.device}
        )
    return small.requires_grad_(False)


def adapted(model: ViTForImageClassification, machine: Machine) -> PeftModel:
    torch.manual_seed(0)
    return add_adapters(model, e2vpt_config(machine.prompts), ("one",))
