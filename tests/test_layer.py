from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from .support.models import TINY_MODELS, images, tiny_vit
from .support.prompted import with_prompts
from .support.reference import random_prompts


def first_layer(model):
    return next(module for module in model.modules() if isinstance(module, E2VPTLayer))


def test_prompts_have_the_documented_shapes():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=7, num_kv_prompts=6)))
    assert layer.e2vpt_visual_prompts["default"].shape == (7, 32)
    assert layer.e2vpt_kv_prompts["default"].shape == (4, 6, 8)
    separate = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(num_kv_prompts=6, share_kv_prompts=False)))
    assert separate.e2vpt_kv_prompts["default"].shape == (2, 4, 6, 8)


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
    prefix = layer.prefix(6, torch.float32)
    assert torch.equal(prefix.keys, prefix.values)
    assert (prefix.keys == 0).any()


def test_without_dropout_a_prefix_has_no_batch_dimension():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(prompt_dropout=0.0)))
    layer.train()
    assert layer.prefix(64, torch.float32).keys.shape == (1, 15, 4, 8)


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


def test_the_wrapper_answers_for_its_attention():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig()))
    assert isinstance(layer, BaseTunerLayer)
    assert layer.num_attention_heads == 4
    assert layer.q_proj is layer.base_layer.q_proj
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


def test_data_parallel_is_refused_in_words():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig()))
    with pytest.raises(RuntimeError, match="accelerate launch"):
        layer._replicate_for_data_parallel()
