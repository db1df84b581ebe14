from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as t
from peft import get_peft_model
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from e2vpt_peft import E2VPTConfig
from e2vpt_peft.attention.interface import PREFIX_ATTENTION, PrefixedConfig, ThroughInterface, eager_attention_of
from e2vpt_peft.running_pass import passes_of

from ..support.adapted import adapt, adapted_layers
from ..support.insertion import inserted
from ..support.models import TINY_MODELS, images, randomized, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts
from ..support.zoo import ZOO


@pytest.fixture
def recorded_implementations():
    """Attention functions that note their names and hand over to sdpa."""
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for name in ("recorder_a", "recorder_b"):

        def attend(module, query, key, value, mask, name=name, **kwargs):
            calls.append((name, module.config._attn_implementation, key.shape[2] - query.shape[2]))
            return sdpa(module, query, key, value, mask, **kwargs)

        AttentionInterface.register(name, attend)
    yield calls
    for name in ("recorder_a", "recorder_b"):
        del ALL_ATTENTION_FUNCTIONS._global_mapping[name]


def test_the_models_own_implementation_is_followed_at_every_call(recorded_implementations):
    model = get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=4, num_kv_prompts=3)).eval()
    for name in ("recorder_a", "recorder_b"):
        recorded_implementations.clear()
        model.set_attn_implementation(name)
        model(pixel_values=images())
        assert recorded_implementations == [(name, name, 7)] * 3
        recorded_implementations.clear()
        with model.disable_adapter():
            model(pixel_values=images())
        assert recorded_implementations == [(name, name, 0)] * 3


def test_switching_between_eager_and_sdpa_keeps_the_prompts():
    model = get_peft_model(tiny_vit(attn_implementation="sdpa"), E2VPTConfig()).eval()
    sdpa = model(pixel_values=images()).logits
    model.set_attn_implementation("eager")
    assert model.base_model.model.config._attn_implementation == "eager"
    eager = model(pixel_values=images()).logits
    torch.testing.assert_close(eager, sdpa, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(pixel_values=images()).logits, sdpa)


@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())
def test_attention_maps_have_visual_then_key_value_prompts_then_the_sequence(make):
    model = make(attn_implementation="eager")
    length = 18 if model.config.model_type == "deit" else 17
    prompts = random_prompts(model, tokens=4, kv_prompts=3)
    prompts.keys = prompts.keys.clone()
    prompts.keys[:] = -100 * prompts.keys.sign()  # attended to by no query, or by far the most
    adapted = with_prompts(model, prompts, share_kv_prompts=False)
    attentions = adapted(pixel_values=images(), output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(3, 4, length, 4 + 3 + length)] * 3
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4, length))

    without_kv = with_prompts(make(attn_implementation="eager"), random_prompts(model, tokens=4, kv_prompts=0))
    first = without_kv(pixel_values=images(), output_attentions=True).attentions[0]
    visual_share = first[..., :4] / first[..., 4:].sum(-1, keepdim=True)
    with_kv = attentions[0][..., :4] / attentions[0][..., 7:].sum(-1, keepdim=True)
    finite = attentions[0][..., 7:].sum(-1) > 1e-6  # where the key-value prompts do not take everything
    torch.testing.assert_close(with_kv[finite], visual_share[finite], rtol=1e-3, atol=1e-5)


def test_shallow_prompts_are_rows_and_columns_behind_the_special_tokens():
    model = get_peft_model(
        tiny_vit(attn_implementation="eager"),
        E2VPTConfig(num_visual_prompts=4, num_kv_prompts=3, visual_prompt_depth="shallow"),
    ).eval()
    attentions = model(pixel_values=images(), output_attentions=True).attentions
    assert [attention.shape for attention in attentions] == [(3, 4, 21, 24)] * 3


def test_a_sliding_window_under_flash_attention_is_refused(recorded_implementations):
    AttentionInterface.register("flash_stub", lambda *args, **kwargs: None)
    try:
        model = get_peft_model(tiny_vit(), E2VPTConfig()).eval()
        model.base_model.model.config._attn_implementation_internal = "flash_stub"
        with pytest.raises(ValueError, match="sliding window.*set_attn_implementation"):
            model.base_model.model.vit.layers[0].attention(torch.randn(2, 17, 32), sliding_window=8)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["flash_stub"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_position_bias_is_one_of_the_sequence_and_none_of_the_prompts(implementation):
    """Which T5 and its kin hand over beside the mask. Of those, this one names its projections as others do."""
    sizes = {"hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 30}
    config = t.Pix2StructTextConfig(**sizes, is_decoder=False, use_cache=False, initializer_range=0.02)
    model = randomized(t.Pix2StructTextModel(config))
    model.set_attn_implementation(implementation)
    adapter = {"target_modules": ["self_attention.attention"], "attention_norm": "layer_norm"}
    model = get_peft_model(model, E2VPTConfig(num_visual_prompts=0, num_kv_prompts=3, **adapter)).eval()
    layer = next(iter(adapted_layers(model).values()))
    attention, states = layer.base_layer, torch.randn(2, 6, 32)
    query, key, value = (
        part(states).view(2, 6, 4, 8).transpose(1, 2) for part in (attention.query, attention.key, attention.value)
    )
    rows = layer.e2vpt_kv_prompts["default"].expand(2, -1, -1, -1)
    bias = attention.compute_bias(6, 6)
    assert bias.std() > 0.1
    weights = torch.cat([query @ rows.mT, query @ key.mT + bias], -1).softmax(-1)
    expected = attention.output((weights @ torch.cat([rows, value], 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(states)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_real_config_is_not_changed_and_reads_through():
    model = tiny_vit()
    config = copy.deepcopy(model.config)
    adapted = get_peft_model(model, E2VPTConfig())
    assert model.config.to_dict() == config.to_dict()
    view = adapted.base_model.model.vit.layers[0].attention.base_layer.config
    assert view._attn_implementation == PREFIX_ATTENTION
    assert view.hidden_size == 32
    with pytest.raises(AttributeError):
        _ = view.no_such_field


def test_an_attention_that_is_detached_has_the_very_config_that_it_had():
    model = tiny_vit()
    attentions = [layer.attention for layer in model.vit.layers]
    configs = [attention.config for attention in attentions]
    way_in = ThroughInterface(eager_attention_of(type(attentions[0]).forward), "'attention'")

    class Source:
        config, has_prefix = configs[0], False

    for _ in range(2):
        way_in.attach(attentions[0], Source())
        assert isinstance(attentions[0].config, PrefixedConfig)
        assert attentions[1].config is configs[1] is model.config
        way_in.detach(attentions[0])
        assert attentions[0].config is configs[0] is model.config


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_an_implementation_that_takes_no_bias_refuses_one(implementation):
    model = get_peft_model(tiny_vit(), E2VPTConfig()).eval()
    attention = model.base_model.model.vit.layers[0].attention
    model.base_model.model.config._attn_implementation_internal = implementation

    def biased(layer, prefix, batch_size):
        return prefix._replace(bias=torch.zeros(1, 15))

    with (
        passes_of(model).running(edit_prefix=biased),
        pytest.raises(ValueError, match=f"'{implementation}' takes no bias"),
    ):
        attention(torch.randn(2, 17, 32))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_a_copy_of_a_model_has_prompts_and_a_config_of_its_own(copy_of, depth):
    model = get_peft_model(tiny_vit(), E2VPTConfig(visual_prompt_depth=depth)).eval()
    before = model(pixel_values=images()).logits
    other = copy_of(model)
    assert torch.equal(other(pixel_values=images()).logits, before)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "e2vpt_" in name:
                parameter.add_(1)
    other.set_attn_implementation("eager")
    assert torch.equal(model(pixel_values=images()).logits, before)
    assert not torch.allclose(other(pixel_values=images()).logits, before)
    assert model.base_model.model.config._attn_implementation != "eager"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_a_causal_text_tower_sees_its_prompts_and_no_later_word(attention):
    config = copy.deepcopy(ZOO["clip_vision_model"].config)
    config._attn_implementation = attention
    model = randomized(t.CLIPTextModel._from_config(config.text_config, attn_implementation=attention))
    reference = randomized(t.CLIPTextModel._from_config(config.text_config, attn_implementation=attention))
    ids = torch.randint(3, 30, (2, 7))
    adapted = adapt(model, target_modules=["self_attn"], num_kv_prompts=0)
    actual = adapted(input_ids=ids).last_hidden_state
    prompts = [layer.e2vpt_visual_prompts["default"] for layer in adapted_layers(adapted).values()]
    with inserted(reference.encoder.layers, prompts):
        expected = reference(input_ids=ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    other = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 30], 1)
    torch.testing.assert_close(adapted(input_ids=other).last_hidden_state[:, :5], actual[:, :5])
