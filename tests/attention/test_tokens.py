from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import Dinov2Backbone, Dinov2Config, ViTConfig, ViTForMaskedImageModeling

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from ..support.adapted import adapt
from ..support.bare import Bare
from ..support.models import SIZES, TINY_MODELS, images, prompt_parameters, randomized, tiny_vit

SHALLOW = {"visual_prompt_depth": "shallow", "num_visual_prompts": 4}


def test_visual_prompts_exist_once_and_key_value_prompts_in_every_layer():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW))
    names = [name.split(".", 3)[-1] for name in prompt_parameters(model)]
    assert sum("visual" in name for name in names) == 1
    assert sum("kv" in name for name in names) == 3
    assert "layers.0.attention.e2vpt_visual_prompts.default" in names


def test_shallow_visual_prompts_alone_need_one_layer_only():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW, num_kv_prompts=0))
    assert len([module for module in model.modules() if isinstance(module, E2VPTLayer)]) == 1
    assert model.get_model_status().requires_grad == {"default": True}


@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())
@pytest.mark.parametrize("run_before", [False, True])
def test_hidden_states_have_the_backbones_shapes_whenever_recording_hooks_were_installed(make, run_before):
    model = make()
    if run_before:  # transformers installs its recording hooks at the first such call
        expected = model(images(), output_hidden_states=True).hidden_states
    else:
        expected = make()(images(), output_hidden_states=True).hidden_states
    adapted = get_peft_model(model, E2VPTConfig(**SHALLOW)).eval()
    for return_dict in (True, False):
        output = adapted(pixel_values=images(), output_hidden_states=True, return_dict=return_dict)
        states = output.hidden_states if return_dict else output[1]
        assert [state.shape for state in states] == [state.shape for state in expected]
    torch.testing.assert_close(states[0], expected[0])
    assert not torch.allclose(states[1], expected[1])


def test_a_dense_model_does_not_notice_the_prompts():
    config = Dinov2Config(**{**SIZES, "mlp_ratio": 2}, out_features=["stage1", "stage3"])
    backbone = randomized(Dinov2Backbone(config))
    expected = [feature.shape for feature in backbone(images()).feature_maps]
    adapted = get_peft_model(backbone, E2VPTConfig(**SHALLOW)).eval()
    assert [feature.shape for feature in adapted(images()).feature_maps] == expected

    mim = randomized(ViTForMaskedImageModeling(ViTConfig(**SIZES, intermediate_size=64, encoder_stride=4)))
    adapted = get_peft_model(mim, E2VPTConfig(**SHALLOW)).eval()
    masked = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    assert adapted(images(), bool_masked_pos=masked).reconstruction.shape == (3, 3, 16, 16)


def test_layers_to_transform_moves_the_insertion_to_the_first_of_them():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW, layers_to_transform=[1, 2])).eval()
    lengths = []
    for layer in model.base_model.model.vit.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    with_hidden_states = model(pixel_values=images(), output_hidden_states=True)
    assert lengths == [17, 21, 21]
    assert {state.shape[1] for state in with_hidden_states.hidden_states} == {17}


def test_several_active_adapters_insert_at_their_own_layers():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW, layers_to_transform=[1, 2]), adapter_name="late")
    model.add_adapter("early", E2VPTConfig(**{**SHALLOW, "num_visual_prompts": 2}))
    model.base_model.set_adapter(["late", "early"])
    model.eval()
    lengths = []
    for layer in model.base_model.model.vit.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    output = model(pixel_values=images(), output_hidden_states=True)
    assert lengths == [19, 23, 23]
    assert {state.shape[1] for state in output.hidden_states} == {17}


def test_a_disabled_or_unloaded_adapter_leaves_the_very_backbone():
    expected = tiny_vit()(images()).logits
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW)).eval()
    assert not torch.allclose(model(pixel_values=images()).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(pixel_values=images()).logits, expected)
    backbone = model.unload()
    assert torch.equal(backbone(images()).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())


def test_targets_in_several_stacks_are_refused():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 4}, text_config={**sizes, "vocab_size": 9}
    )
    with pytest.raises(ValueError, match="2 stacks|is causal"):
        get_peft_model(CLIPModel(config), E2VPTConfig(**SHALLOW, target_modules=["self_attn"]))


@pytest.mark.parametrize("num_kv_prompts", [0, 2])
@torch.no_grad()
def test_a_plain_model_without_a_config_takes_tokens(num_kv_prompts):
    """Its attention calls PyTorch's function, and no config says which implementation it is set to."""
    config = {"target_modules": ["attn"], "attention_norm": "ln_1", "num_kv_prompts": num_kv_prompts}
    bare = Bare()
    model = adapt(copy.deepcopy(bare), **config, visual_prompt_depth="shallow", num_special_tokens=1)
    prompts = prompt_parameters(model)
    (tokens,) = [prompts[name] for name in prompts if "visual" in name]
    reference = adapt(copy.deepcopy(bare), **config, num_visual_prompts=0) if num_kv_prompts else bare
    for name, parameter in prompt_parameters(reference).items():
        parameter.copy_(prompts[name])
    x = torch.randn(2, 5, 8)
    expected = reference(torch.cat([x[:, :1], tokens.expand(2, -1, -1), x[:, 1:]], 1))
    torch.testing.assert_close(model(x), torch.cat([expected[:, :1], expected[:, 1 + len(tokens) :]], 1))
    assert not torch.allclose(model(x), bare(x))


def test_a_place_beyond_the_sequence_is_an_error():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW, num_special_tokens=18)).eval()
    with pytest.raises(ValueError, match="num_special_tokens=18 is beyond the 17 tokens"):
        model(images())
