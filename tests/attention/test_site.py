from __future__ import annotations

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch import nn

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.attention.tokens import TokenInsertion

from ..support.adapted import PROMPTS, adapt, adapted_layers, assert_refused, make
from ..support.models import SIZES, tiny_vit


def test_attention_norm_names_the_norm_of_an_unknown_model():
    model = tiny_vit()
    for layer in model.vit.layers:
        layer.oddly_named = layer.layernorm_before
    model.config.model_type = "unheard_of"
    config = {"target_modules": ["attention"], "num_segments": 1}
    found = get_peft_model(model, E2VPTConfig(**config, attention_norm="oddly_named"))
    assert {layer.site.norm_name for layer in adapted_layers(found).values()} == {"oddly_named"}


@torch.no_grad()
def test_num_special_tokens_tells_where_the_shallow_prompts_of_an_unknown_model_go():
    model = tiny_vit()
    model.config.model_type = "unheard_of"
    adapted = adapt(model, target_modules=["attention"], visual_prompt_depth="shallow", num_special_tokens=1)
    ways_in = [way_in for layer in adapted_layers(adapted).values() for way_in in layer.ways_in]
    (insertion,) = [way_in for way_in in ways_in if isinstance(way_in, TokenInsertion)]
    assert insertion.position == 1


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (tiny_vit, {"target_modules": ["mlp"]}, ["'vit.layers.0.mlp' (ViTMLP)", "no self-attention"]),
        (tiny_vit, {"target_modules": ["q_proj"]}, ["(Linear)", "no self-attention"]),
        (tiny_vit, {"attention_norm": "nonesuch"}, ["attention_norm='nonesuch'", "layernorm_before"]),
        (
            lambda: t.LlamaModel(t.LlamaConfig(vocab_size=20, num_key_value_heads=4, **SMALL)),
            {"target_modules": ["self_attn"]},
            ["LlamaAttention", "causal"],
        ),
        (
            lambda: t.GPT2LMHeadModel(t.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=20)),
            {"target_modules": ["attn"]},
            ["GPT2Attention", "causal"],
        ),
        (
            lambda: t.BertModel(t.BertConfig(vocab_size=20, **SMALL, is_decoder=True, add_cross_attention=True)),
            {"target_modules": ["crossattention.self"]},
            ["(BertCrossAttention)", "cross-attention"],
        ),
        (lambda: make("vjepa2"), {"target_modules": ["cross_attn"]}, ["(VJEPA2PoolerCrossAttention)", "cross-att"]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {"target_modules": ["0"]}, ["'0' (Linear)", "no self-attention"]),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_its_name_and_the_reason_and_nothing_is_changed(make, config, words):
    assert_refused(make(), config, words)


def test_sizes_need_not_be_those_of_vit_b():
    model = get_peft_model(tiny_vit(hidden_size=48, num_attention_heads=3), E2VPTConfig())
    site = model.base_model.model.vit.layers[0].attention.site
    assert (site.hidden_size, site.num_heads, site.head_size) == (48, 3, 16)
    assert site.patch_fan_in == 3 * SIZES["patch_size"] ** 2


@pytest.mark.parametrize(
    ("name", "values"), [("vit", 3 * 4 * 4), ("vivit", 3 * 2 * 4 * 4), ("videomae", 3 * 2 * 4 * 4), ("bert", 32)]
)
def test_initial_values_are_scaled_by_the_values_of_a_patch(name, values):
    layers = adapted_layers(get_peft_model(make(name), E2VPTConfig(**PROMPTS)))
    assert {layer.site.patch_fan_in for layer in layers.values()} == {values}
