from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as t
from peft import get_peft_model
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.attention.site import NotAdaptable, _patch_fan_in, find_attention_site
from e2vpt_peft.attention.tokens import TokenInsertion

from ..support.adapted import PROMPTS, adapt, adapted_layers, assert_refused, inputs, make
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


def without_a_config():
    model = tiny_vit()
    for layer in model.vit.layers:
        del layer.attention.config
    return model


def with_keys_of_another_name():
    model = tiny_vit()
    for layer in model.vit.layers:
        layer.attention.project_keys = layer.attention.k_proj
        del layer.attention.k_proj
    return model


@pytest.mark.parametrize(
    ("make", "config", "words"),
    [
        (without_a_config, {}, ["'vit.layers.0.attention' (ViTAttention)", "which has no config."]),
        (with_keys_of_another_name, {}, ["'vit.layers.0.attention' (ViTAttention)", "no key and value projections"]),
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


def test_patches_have_three_channels_where_the_config_does_not_say():
    assert _patch_fan_in(SimpleNamespace(patch_size=4), 32) == 3 * 4 * 4
    assert _patch_fan_in(SimpleNamespace(patch_size=4, num_channels=1), 32) == 4 * 4


def site_of(name, **config):
    return next(iter(adapted_layers(adapt(make(name), **config)).values())).site


@pytest.mark.parametrize("name", ["vit", "swin", "modernbert", "dinov3_vit", "internvl_vision", "distilbert"])
@torch.no_grad()
def test_projected_rows_are_the_keys_and_values_that_the_attention_makes(name):
    """Of the first layer, seen where they go to the attention function. Where keys are rotated, the first is not."""
    model, seen = adapt(make(name), num_visual_prompts=0), {}
    layer = next(iter(adapted_layers(model).values()))

    def enter(module, args, kwargs):
        seen["states"] = (args or tuple(kwargs.values()))[0]

    layer.base_layer.register_forward_pre_hook(enter, with_kwargs=True)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, mask, **kwargs):
        seen.setdefault("rows", (key[:, :, 2:], value[:, :, 2:]))  # behind the 2 key-value prompts
        return attend(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("recorder", record)
    try:
        model.set_attn_implementation("recorder")
        model(**inputs(name))
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["recorder"]
    keys, values = layer.site.project(seen["states"])
    assert keys.shape[-2:] == (layer.site.num_heads, layer.site.head_size)
    torch.testing.assert_close(values.transpose(1, 2), seen["rows"][1])
    length = 1 if name in ("modernbert", "dinov3_vit") else keys.shape[1]
    torch.testing.assert_close(keys[:, :length].transpose(1, 2), seen["rows"][0][:, :, :length])


@pytest.mark.parametrize(
    ("name", "key", "value", "norm", "special", "behind"),
    [
        ("vit", "k_proj", "v_proj", "layernorm_before", 1, 0),
        ("deit", "k_proj", "v_proj", "layernorm_before", 2, 0),
        ("bert", "key", "value", "none", 1, 0),
        ("modernbert", "Wqkv", "Wqkv", "attn_norm", 1, 0),
        ("beit", "k_proj", "v_proj", "layernorm_before", 1, 0),
        ("yolos", "key", "value", "layernorm_before", 1, 5),
        ("eomt", "k_proj", "v_proj", "norm1", 5, 0),
        ("dinov3_vit", "k_proj", "v_proj", "norm1", 4, 0),
        ("pixio", "k_proj", "v_proj", "layernorm_before", 3, 0),
    ],
)
def test_what_is_known_of_a_site(name, key, value, norm, special, behind):
    site = site_of(name)
    names = (site.key_projection, site.value_projection, site.norm_name)
    assert (*names, site.num_special_tokens, site.num_tokens_behind) == (key, value, norm, special, behind)
    assert (site.norm is None) is (norm == "none")
    assert site.takes_tokens is (name not in ("beit", "yolos", "eomt", "modernbert"))


def test_a_number_of_special_tokens_has_the_last_word():
    vit, beit = (find_attention_site(make(name), at, num_special_tokens=7) for name, at in AT.items())
    assert (vit.num_special_tokens, vit.takes_tokens) == (beit.num_special_tokens, beit.takes_tokens) == (7, True)


AT = {"vit": "vit.layers.0.attention", "beit": "beit.layers.0.attention"}


def test_what_is_no_norm_is_refused():
    with pytest.raises(NotAdaptable, match="for which attention_norm='mlp' is no norm, but ViTMLP"):
        find_attention_site(tiny_vit(), AT["vit"], attention_norm="mlp")


def test_a_refusal_has_the_module_and_the_reason_apart():
    with pytest.raises(NotAdaptable) as raised:
        find_attention_site(tiny_vit(), "vit.layers.0.mlp")
    error = raised.value
    assert error.module == "'vit.layers.0.mlp' (ViTMLP)"
    assert error.reason.startswith("which is no self-attention that calls")
    assert str(error) == f"target_modules matches {error.module}, {error.reason}"


def test_states_are_normed_in_the_type_of_the_norm():
    site = site_of("vit")
    assert site.normalize(torch.randn(2, 32, dtype=torch.float64), torch.bfloat16).dtype == torch.float32
    assert site_of("bert").normalize(torch.randn(2, 32, dtype=torch.float64), torch.bfloat16).dtype == torch.bfloat16
