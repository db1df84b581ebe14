from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
)

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from .models import SIZES, TINY_MODELS, images, randomized, tiny_vit

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}


def adapted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, E2VPTLayer)]


@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())
def test_ready_made_targets_are_all_attentions_and_nothing_else(make):
    model = get_peft_model(make(), E2VPTConfig())
    assert len(adapted_names(model)) == 3
    classes = {type(module.base_layer).__name__ for module in model.modules() if isinstance(module, E2VPTLayer)}
    assert classes <= {"ViTAttention", "DeiTAttention", "Dinov2Attention"}


@pytest.mark.parametrize(
    "target_modules",
    [["attention"], ["layers.0.attention", "layers.1.attention", "layers.2.attention"], r".*\.layers\.\d+\.attention"],
)
def test_targets_by_hand(target_modules):
    assert len(adapted_names(get_peft_model(tiny_vit(), E2VPTConfig(target_modules=target_modules)))) == 3


def test_any_module_that_uses_the_attention_interface_can_be_targeted():
    clip = randomized(CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=4, **SMALL)))
    bare = clip(images()).last_hidden_state
    model = get_peft_model(clip, E2VPTConfig(target_modules=["self_attn"]))
    adapted = model(pixel_values=images()).last_hidden_state
    assert len(adapted_names(model)) == 2
    assert adapted.shape == bare.shape
    assert not torch.allclose(adapted, bare)
    site = next(module for module in model.modules() if isinstance(module, E2VPTLayer)).site
    assert site.norm_name == "layer_norm1"


def test_a_post_norm_model_needs_attention_norm_none():
    bert = randomized(BertModel(BertConfig(vocab_size=20, **SMALL)))
    with pytest.raises(ValueError, match="attention_norm to its name .*or to 'none'"):
        get_peft_model(bert, E2VPTConfig(target_modules=["self"]))
    assert adapted_names(bert) == []
    model = get_peft_model(bert, E2VPTConfig(target_modules=["self"], attention_norm="none"))
    ids = torch.arange(6).view(2, 3)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)
    mask = (torch.arange(7) < 3).long().expand(2, -1)
    expected = model(input_ids=ids).last_hidden_state
    actual = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :3]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_attention_norm_names_the_norm_of_an_unknown_model():
    model = tiny_vit()
    for layer in model.vit.layers:
        layer.oddly_named = layer.layernorm_before
    model.config.model_type = "unheard_of"
    config = {"target_modules": ["attention"], "num_segments": 1}
    found = get_peft_model(model, E2VPTConfig(**config, attention_norm="oddly_named"))
    assert {layer.site.norm_name for layer in found.modules() if isinstance(layer, E2VPTLayer)} == {"oddly_named"}


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (tiny_vit, {"target_modules": ["mlp"]}, ["'vit.layers.0.mlp' (ViTMLP)", "no self-attention"]),
        (tiny_vit, {"target_modules": ["q_proj"]}, ["(Linear)", "no self-attention"]),
        (tiny_vit, {"target_modules": ["nowhere"]}, ["nowhere", "not found in the base model"]),
        (tiny_vit, {"attention_norm": "nonesuch"}, ["attention_norm='nonesuch'", "layernorm_before"]),
        (tiny_vit, {"num_segments": 7}, ["num_segments=7", "hidden size 32"]),
        (tiny_vit, {"layers_to_transform": [1, 9]}, ["layers_to_transform=[1, 9]", "no layer 9"]),
        (tiny_vit, {"layers_to_transform": -1}, ["layers_to_transform=-1", "no layer -1"]),
        (tiny_vit, {"layers_to_transform": [7]}, ["7"]),
        (
            lambda: LlamaModel(LlamaConfig(vocab_size=20, num_key_value_heads=4, **SMALL)),
            {"target_modules": ["self_attn"]},
            ["LlamaAttention", "causal"],
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=20)),
            {"target_modules": ["attn"]},
            ["GPT2Attention"],
        ),
        (
            lambda: LlamaModel(LlamaConfig(vocab_size=20, **SMALL)),
            {},
            ["target_modules=None", "'llama'", "vit"],
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {"target_modules": ["0"]}, ["'0' (Linear)", "no self-attention"]),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_its_name_and_the_reason_and_nothing_is_changed(make, config, words):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError) as raised:
        get_peft_model(model, E2VPTConfig(**config))
    for word in words:
        assert word in str(raised.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not hasattr(model, "peft_config")


def test_a_refused_second_adapter_leaves_the_first_as_it_was():
    model = get_peft_model(tiny_vit(), E2VPTConfig()).eval()
    before = model(pixel_values=images()).logits
    with pytest.raises(ValueError, match="num_segments=7"):
        model.add_adapter("second", E2VPTConfig(num_segments=7))
    assert list(model.peft_config) == ["default"]
    assert model.get_model_status().available_adapters == ["default"]
    assert torch.equal(model(pixel_values=images()).logits, before)


def test_sizes_need_not_be_those_of_vit_b():
    model = get_peft_model(tiny_vit(hidden_size=48, num_attention_heads=3), E2VPTConfig())
    site = model.base_model.model.vit.layers[0].attention.site
    assert (site.hidden_size, site.num_heads, site.head_size) == (48, 3, 16)
    assert site.patch_fan_in == 3 * SIZES["patch_size"] ** 2
