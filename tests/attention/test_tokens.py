from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    ViTConfig,
    ViTForMaskedImageModeling,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from e2vpt_peft import E2VPTConfig, E2VPTLayer
from e2vpt_peft.attention.tokens import find_stack

from ..support.adapted import adapt
from ..support.bare import Bare, BareBlock
from ..support.models import SIZES, TINY_MODELS, images, prompt_parameters, randomized, tiny_vit

SHALLOW = {"visual_prompt_depth": "shallow", "num_visual_prompts": 4}
ON_BARE = {
    "target_modules": ["attn"], "attention_norm": "ln_1", "num_special_tokens": 1, "visual_prompt_depth": "shallow",
}  # fmt: skip


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
    bare = Bare()
    model = adapt(copy.deepcopy(bare), **ON_BARE, num_kv_prompts=num_kv_prompts)
    prompts = prompt_parameters(model)
    (tokens,) = [prompts[name] for name in prompts if "visual" in name]
    without_visual = {**ON_BARE, "num_kv_prompts": num_kv_prompts, "num_visual_prompts": 0}
    reference = adapt(copy.deepcopy(bare), **without_visual) if num_kv_prompts else bare
    for name, parameter in prompt_parameters(reference).items():
        parameter.copy_(prompts[name])
    x = torch.randn(2, 5, 8)
    expected = reference(torch.cat([x[:, :1], tokens.expand(2, -1, -1), x[:, 1:]], 1))
    torch.testing.assert_close(model(x), torch.cat([expected[:, :1], expected[:, 1 + len(tokens) :]], 1))
    assert not torch.allclose(model(x), bare(x))


class PooledBare(Bare):
    def forward(self, x):
        return super().forward(x).mean(1)


@torch.no_grad()
def test_what_comes_behind_the_last_layer_in_the_same_module_sees_no_prompts():
    whole = adapt(Bare(), **ON_BARE, num_kv_prompts=0)
    pooled = adapt(PooledBare(), **ON_BARE, num_kv_prompts=0)
    pooled.load_state_dict(whole.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(pooled(x), whole(x).mean(1))


class TupleBlock(BareBlock):
    """Returns something beside the hidden states, as layers used to."""

    def forward(self, x):
        return super().forward(x), "beside"


class TupleBare(Bare):
    """Returns all hidden states, and some that are of fewer tokens."""

    def __init__(self, skips_last):
        super().__init__()
        self.blocks = torch.nn.ModuleList([TupleBlock(), TupleBlock()])
        self.skips_last = skips_last

    def forward(self, x):
        states = []
        for block in self.blocks[: 1 if self.skips_last else 2]:
            x, beside = block(x)
            states.append(x)
        return x, (*states, x[:, :2]), beside


@pytest.mark.parametrize("skips_last", [False, True])
@torch.no_grad()
def test_layers_and_models_may_return_tuples(skips_last):
    plain, backbone = Bare(), TupleBare(skips_last)
    backbone.load_state_dict(plain.state_dict())
    model = adapt(backbone, **ON_BARE, num_kv_prompts=0)
    plain.blocks = plain.blocks[: 1 if skips_last else 2]
    x, (tokens,) = torch.randn(2, 5, 8), prompt_parameters(model).values()
    expected = plain(torch.cat([x[:, :1], tokens.expand(2, -1, -1), x[:, 1:]], 1))
    states, recorded, beside = model(x)
    torch.testing.assert_close(states, torch.cat([expected[:, :1], expected[:, 1 + len(tokens) :]], 1))
    assert [state.shape[1] for state in recorded] == [5] * (len(recorded) - 1) + [2] and beside == "beside"


class MaskedBlock(BareBlock):
    def forward(self, x, attention_mask, factor):
        self.mask = attention_mask
        return factor * super().forward(x)


class MaskedBare(Bare):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([MaskedBlock(), MaskedBlock()])

    def forward(self, x):
        mask = torch.zeros(len(x), 1, x.shape[1], x.shape[1])
        for block in self.blocks:
            x = block(x, mask, 2.0)
        return x


@torch.no_grad()
def test_what_comes_behind_the_mask_by_position_is_handed_on():
    model = adapt(MaskedBare(), **ON_BARE, num_kv_prompts=0)
    assert model(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    assert {tuple(block.mask.shape) for block in model.base_model.model.blocks} == {(2, 1, 8, 8)}


def wav2vec2(kept=(0, 1, 2)):
    """In training mode, though nothing but layers is dropped."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    speech = {
        "conv_dim": [16] * 2, "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "apply_spec_augment": False,
    }  # fmt: skip
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout")
    torch.manual_seed(0)
    model = Wav2Vec2Model(Wav2Vec2Config(**sizes, **speech, **dict.fromkeys(dropouts, 0.0), layerdrop=0.5))
    model.encoder.layers = torch.nn.ModuleList(model.encoder.layers[index] for index in kept)
    model = get_peft_model(model, E2VPTConfig(**SHALLOW, num_kv_prompts=0, prompt_dropout=0.0))
    with torch.no_grad():
        (prompts,) = prompt_parameters(model).values()
        prompts.copy_(torch.randn(prompts.shape, generator=torch.Generator().manual_seed(1)))
    return model.train()


SOUND = torch.randn(2, 400, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kept", [(0, 1, 2), (1, 2), (0, 2), (0, 1), (1,), (2,)])
def test_whichever_layers_are_dropped_the_others_see_the_prompts(kept, monkeypatch):
    expected_model = wav2vec2(kept)
    expected_model.base_model.model.config.layerdrop = 0.0
    expected = expected_model(SOUND).last_hidden_state
    model = wav2vec2()
    draws = iter(float(index in kept) for index in range(3))
    rand = torch.rand
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **opts: next(draws) if size == ([],) else rand(*size, **opts))
        output = model(SOUND, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected)
    assert {state.shape for state in output.hidden_states} == {expected.shape}
    output.last_hidden_state.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prompt_parameters(model).values())


def test_if_all_layers_are_dropped_nothing_is_stripped():
    model = wav2vec2()
    model.base_model.model.config.layerdrop = 1.0
    assert model(SOUND).last_hidden_state.shape == wav2vec2().eval()(SOUND).last_hidden_state.shape


def test_dropped_layers_under_checkpointing_are_refused():
    model = wav2vec2()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="layerdrop=0.5 drops layers.* set model.config.layerdrop = 0"):
        for _ in range(9):  # all layers may be dropped
            model(SOUND)


def shallow_vit():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW, num_kv_prompts=0)).eval()
    return model, model.base_model.model.vit


@torch.no_grad()
def test_last_layers_may_be_cut_off_afterwards():
    model, vit = shallow_vit()
    before = tiny_vit()
    before.vit.layers = before.vit.layers[:2]
    expected = get_peft_model(before, E2VPTConfig(**SHALLOW, num_kv_prompts=0)).eval()
    for own, other in zip(prompt_parameters(expected).values(), prompt_parameters(model).values()):
        own.copy_(other)
    vit.layers = vit.layers[:2]
    output = model(pixel_values=images(), output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected(pixel_values=images()).logits)
    assert {state.shape[1] for state in output.hidden_states} == {17}


@torch.no_grad()
def test_a_layer_that_was_cut_off_has_no_prompts():
    (_, vit), plain = shallow_vit(), tiny_vit().eval()
    cut, vit.layers = vit.layers[2], vit.layers[:2]
    states = torch.randn(2, 17, SIZES["hidden_size"])
    torch.testing.assert_close(cut(states), plain.vit.layers[2](states))


def test_the_layer_that_has_the_prompts_may_not_be_cut_off():
    model, vit = shallow_vit()
    vit.layers = vit.layers[1:]
    with pytest.raises(RuntimeError, match="was taken out of 'layers' after adapting: cut the layers first"):
        model(pixel_values=images())


def test_layers_that_somebody_else_runs_are_refused():
    model, vit = shallow_vit()
    states = torch.randn(2, 17, SIZES["hidden_size"])
    with pytest.raises(RuntimeError, match="ViTLayer was called by itself.* need a call of ViTModel"):
        vit.layers[0](states)
    with model.disable_adapter():
        assert vit.layers[0](states).shape == states.shape


def test_a_pass_that_ended_in_an_error_leaves_nothing_behind(recwarn):
    model, vit = shallow_vit()
    expected = model(pixel_values=images()).logits
    handle = vit.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    recwarn.clear()
    with pytest.raises(ZeroDivisionError):
        model(pixel_values=images())
    assert not recwarn, "a hook of ours had no error of its own"
    handle.remove()
    assert torch.equal(model(pixel_values=images()).logits, expected)
    with pytest.raises(RuntimeError, match="was called by itself"):
        vit.layers[1](torch.randn(2, 17, SIZES["hidden_size"]))


def test_a_model_that_runs_inside_another_has_a_pass_of_its_own():
    model, vit = shallow_vit()
    inner, _ = shallow_vit()
    expected, of_inner, seen = model(pixel_values=images()).logits, inner(pixel_values=images()).logits, []
    vit.layers[1].register_forward_pre_hook(lambda *_: seen.append(inner(pixel_values=images()).logits))
    assert torch.equal(model(pixel_values=images()).logits, expected)
    assert torch.equal(seen[0], of_inner)


def test_more_special_tokens_than_there_are_tokens_are_refused():
    model = get_peft_model(tiny_vit(), E2VPTConfig(**SHALLOW, num_special_tokens=18)).eval()
    with pytest.raises(ValueError, match="num_special_tokens=18 is more than the 17 tokens of the sequence"):
        model(pixel_values=images())


def test_a_stack_is_the_innermost_list_that_a_module_is_in():
    model = torch.nn.ModuleDict({
        "stages": torch.nn.ModuleList([torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([BareBlock()])})]),
        "neck": BareBlock(),
    })  # fmt: skip
    found = {name: find_stack(model, name) for name in ("stages.0.blocks.0.attn", "stages.0.blocks.0", "stages.0")}
    assert [stack.name for stack in found.values()] == ["blocks", "blocks", "stages"]
    assert [len(stack.ancestors) for stack in found.values()] == [3, 3, 1]
    with pytest.raises(ValueError, match="'neck.attn' is in no stack .* Use visual_prompt_depth='deep'"):
        find_stack(model, "neck.attn")
