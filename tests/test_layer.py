from __future__ import annotations

import copy
import types

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, eager_attention_forward

from e2vpt_peft import E2VPTConfig, E2VPTLayer
from e2vpt_peft.attention import prefix

from .support.adapted import adapt, first_layer
from .support.models import BESIDE, TINY_MODELS, images, tiny_vit
from .support.prompted import with_prompts
from .support.reference import random_prompts


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("field", ["prompt_dropout", "kv_prompt_dropout"])
def test_dropout_is_drawn_per_sample_and_in_training_only(depth, field):
    rates = {"prompt_dropout": 0.0, "kv_prompt_dropout": 0.0, field: 0.5}
    model = with_prompts(tiny_vit(), random_prompts(tiny_vit(), 4, 4, shallow=depth == "shallow"), **rates)
    twice = images(1).repeat(2, 1, 1, 1)

    same = model(pixel_values=twice).logits
    torch.testing.assert_close(same[0], same[1])
    torch.testing.assert_close(model(pixel_values=twice).logits, same)

    model.train()
    dropped = model(pixel_values=twice).logits
    assert not torch.allclose(dropped[0], dropped[1])
    assert not torch.allclose(dropped, model(pixel_values=twice).logits)


def test_prompts_of_an_adapter_that_is_not_active_are_not_trained():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig()))
    layer.update_layer("other", E2VPTConfig(), has_visual_prompts=True)
    for prompts in (layer.e2vpt_visual_prompts, layer.e2vpt_kv_prompts):
        assert prompts["default"].requires_grad and not prompts["other"].requires_grad
    layer.update_layer("default", E2VPTConfig(inference_mode=True), has_visual_prompts=True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_dropout_scales_what_it_keeps_so_that_the_mean_stays():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(prompt_dropout=0.25, kv_prompt_dropout=0.25)))
    prompts = layer.e2vpt_visual_prompts["default"].detach()
    layer.train()
    dropped = layer._visual_prompts("default", 4000)
    assert torch.allclose((dropped / prompts).unique().detach()[[0, -1]], torch.tensor([0.0, 1 / 0.75]))
    assert ((dropped == 0) | torch.isclose(dropped, prompts / 0.75)).all()
    torch.testing.assert_close(dropped.mean(0), prompts, atol=0.03, rtol=0)


def test_dropout_of_a_shared_prompt_hits_its_key_and_its_value_alike():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=0, kv_prompt_dropout=0.5)))
    layer.train()
    prefix = layer.prefix(6, torch.float32, torch.device("cpu"))
    assert torch.equal(prefix.keys, prefix.values)
    assert (prefix.keys == 0).any()


@pytest.mark.parametrize(
    ("config", "number"),
    [({"prompt_dropout": 0.0}, 15), ({"num_visual_prompts": 0}, 5), ({"visual_prompt_depth": "shallow"}, 5)],
    ids=["none", "of no visual prompts", "of shallow prompts, which are not in it"],
)
def test_without_dropout_a_prefix_has_no_batch_dimension(config, number):
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(**config)))
    layer.train()
    assert layer.prefix(64, torch.float32, torch.device("cpu")).keys.shape == (1, number, 4, 8)


@pytest.mark.parametrize(("field", "samples"), [("prompt_dropout", (64, 1)), ("kv_prompt_dropout", (1, 64))])
def test_only_the_kind_that_dropout_drops_of_has_a_batch_dimension(field, samples):
    rates = {"prompt_dropout": 0.0, "kv_prompt_dropout": 0.0, field: 0.5}
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(**rates, **BESIDE)))
    layer.train()
    prefix = layer.prefix(64, torch.float32, torch.device("cpu"))
    assert prefix.keys.shape == (samples[0], 10, 4, 8)
    assert prefix.beside[0].shape == prefix.beside[1].shape == (samples[1], 5, 4, 8)


def test_a_new_layer_takes_over_the_mode_of_its_attention():
    assert not first_layer(get_peft_model(tiny_vit(), E2VPTConfig())).training
    assert first_layer(get_peft_model(tiny_vit().train(), E2VPTConfig())).training


@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_training_changes_only_prompts_and_modules_to_save(make, depth):
    model = get_peft_model(make(), E2VPTConfig(modules_to_save=["classifier"], visual_prompt_depth=depth)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = {name for name in before if "e2vpt_" in name or "modules_to_save.default" in name}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    labels = torch.tensor([0, 1, 2])
    for _ in range(2):
        model(pixel_values=images(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == expected


def test_the_norm_is_looked_up_at_every_call_so_that_it_may_be_wrapped_later():
    model = with_prompts(tiny_vit(), random_prompts(tiny_vit(), 4, 0))
    block = model.base_model.model.vit.layers[0]
    calls = []

    class Wrapped(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            calls.append(x.shape)
            return self.norm(x)

    before = model(pixel_values=images()).logits
    block.layernorm_before = Wrapped(block.layernorm_before)
    assert torch.equal(model(pixel_values=images()).logits, before)
    assert calls == [(3, 17, 32), (1, 4, 32)]


def test_data_parallel_is_refused_in_words():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig()))
    with pytest.raises(RuntimeError, match="accelerate launch"):
        layer._replicate_for_data_parallel()


# Attention that somebody has changed


def written_out(self, hidden_states, *args, **kwargs):
    """Attention without the interface, as people patch it in to see or to merge something."""
    heads = (*hidden_states.shape[:-1], -1, 8)
    q, k, v = (part(hidden_states).view(heads).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
    return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), weights


def through_the_interface(self, hidden_states, *args, **kwargs):
    heads = (*hidden_states.shape[:-1], -1, 8)
    q, k, v = (part(hidden_states).view(heads).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
    outputs, weights = attend(self, q, k, v, None, scaling=8**-0.5)
    return self.o_proj(outputs.flatten(2)), weights


def patched(forward, way, when):
    """A model whose second attention has another forward, set on the module that a user sees, or on the one inside."""
    model = tiny_vit()
    if when == "before":
        change(model.vit.layers[1].attention, forward, way)
    model = adapt(model)
    attention = model.base_model.model.vit.layers[1].attention
    if when == "after":
        change(attention, forward, way)
    elif when == "inside":
        change(attention.base_layer, forward, way)
    return model


def change(attention, forward, way):
    if way == "class":
        attention.__class__ = type("Patched", (ViTAttention,), {"forward": forward})
    elif way == "method":
        attention.forward = types.MethodType(forward, attention)
    else:  # a function that knows the module
        attention.forward = lambda *args, **kwargs: forward(attention, *args, **kwargs)


WAYS = [
    (way, when)
    for way in ("class", "method", "function")
    for when in ("before", "after", "inside")
    if (way, when) != ("class", "before")
]


@pytest.mark.parametrize(("way", "when"), WAYS)
def test_an_attention_that_loses_its_prefix_is_an_error(way, when):
    model = patched(written_out, way, when)
    with pytest.raises(RuntimeError, match=r"'vit.layers.1.attention' \(ViTAttention\) has not called .* interface"):
        model(images())
    with model.disable_adapter():
        torch.testing.assert_close(model(images()).logits, tiny_vit()(images()).logits)
    assert prefix._this_thread.attending is None


@pytest.mark.parametrize(("way", "when"), WAYS)
def test_a_forward_that_calls_the_interface_has_the_prefix(way, when):
    expected = patched(through_the_interface, way, "never")
    model = patched(through_the_interface, way, when)
    model.load_state_dict(expected.state_dict())
    torch.testing.assert_close(model(images()).logits, expected(images()).logits)


def test_a_forward_around_the_former_one_has_the_prefix():
    model = adapt(tiny_vit())
    expected, seen = model(images()).logits, []
    for layer in model.base_model.model.vit.layers:
        former = layer.attention.forward

        def forward(*args, former=former, **kwargs):
            seen.append(former(*args, **kwargs))
            return seen[-1]

        layer.attention.forward = forward
    assert torch.equal(model(images()).logits, expected)
    assert len(seen) == 3


def test_an_attention_that_is_called_by_its_forward_is_checked_as_well():
    layer = first_layer(patched(written_out, "method", "inside").base_model.model.vit.layers[1])
    with pytest.raises(RuntimeError, match="has not called"):
        layer.forward(torch.randn(2, 17, 32))


def test_an_attention_that_attends_twice_has_the_prefix_both_times():
    def twice(self, hidden_states, *args, **kwargs):
        first, weights = through_the_interface(self, hidden_states)
        second, _ = through_the_interface(self, hidden_states)
        assert torch.equal(first, second)
        return first, weights

    model = patched(twice, "method", "after")
    expected = patched(twice, "method", "never")
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()).logits, expected(images()).logits)


# Other attention implementations


def test_one_attention_can_have_another_implementation():
    model = adapt(tiny_vit())
    attention, expected = first_layer(model), model(images()).logits
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "eager"
    torch.testing.assert_close(model(images()).logits, expected)
    assert [layer.implementation for layer in model.modules() if isinstance(layer, E2VPTLayer)] == [
        "eager",
        "sdpa",
        "sdpa",
    ]
    assert model.unload().vit.layers[0].attention.config._attn_implementation == "eager"
