"""Models of the zoo with prompts, and what comes out of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from .models import prompt_parameters
from .zoo import HEADS, ZOO

PROMPTS = {"num_visual_prompts": 3, "num_kv_prompts": 2, "num_segments": 4}


def make(name, attention="sdpa"):
    if "upernet" in name or name == "swinv2":
        attention = "eager"  # the only one that transformers lets them have
    return {**ZOO, **HEADS}[name].make(attention=attention)


def inputs(name, batch_size=3):
    return {**ZOO, **HEADS}[name].inputs(batch_size)


def adapt(model, **config):
    """With prompts of ordinary size, which reach a loss."""
    model = get_peft_model(model, E2VPTConfig(**{**PROMPTS, **config})).eval()
    with torch.no_grad():
        for parameter in prompt_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def run(model, inputs, **kwargs):
    torch.manual_seed(0)  # some models mask tokens at random
    return model(**inputs, **kwargs)


def tensors(output):
    return [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def assert_close(actual, expected):
    assert len(actual) == len(expected) > 0
    for mine, theirs in zip(actual, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, E2VPTLayer)}


def first_layer(model):
    return next(iter(adapted_layers(model).values()))


def assert_refused(model, config, words):
    """With a ValueError that has these words, and nothing is changed."""
    before = {name: type(module) for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError) as raised:
        get_peft_model(model, E2VPTConfig(**config))
    for word in words:
        assert word in str(raised.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not hasattr(model, "peft_config")
