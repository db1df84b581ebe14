from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from e2vpt_peft import E2VPTConfig, prune_prompts, rewind_prompts

from ..support.models import BESIDE, images, prompt_parameters, tiny_vit
from .common import SEGMENTS, adapted, both_depths, layers_of, scores


@both_depths
@pytest.mark.parametrize("kind", [{}, BESIDE], ids=["in the softmax", "beside it"])
def test_rewinding_puts_survivors_and_the_head_back_to_their_initial_values(depth, kind):
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_vit(),
        E2VPTConfig(
            visual_prompt_depth=depth,
            num_visual_prompts=6,
            num_segments=SEGMENTS,
            modules_to_save=["classifier"],
            **kind,
        ),
    ).eval()
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    rewind_prompts(model)
    prune_prompts(fresh, scores(), token_rate=0.5, segment_rate=0.5)
    assert torch.equal(model(pixel_values=images()).logits, fresh(pixel_values=images()).logits)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in fresh.named_parameters() if p.requires_grad
    }


def test_rewinding_can_undo_the_pruning():
    torch.manual_seed(1)
    model = get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=6, num_segments=SEGMENTS)).eval()
    before = model(pixel_values=images()).logits
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    rewind_prompts(model, undo_pruning=True)
    assert torch.equal(model(pixel_values=images()).logits, before)
    assert model.peft_config["default"].token_mask is None


def test_rewinding_can_start_from_fresh_values():
    model = adapted()
    prune_prompts(model, scores(), token_rate=0.5, segment_rate=0.5)
    rewind_prompts(model)
    saved = model(pixel_values=images()).logits
    torch.manual_seed(77)
    rewind_prompts(model, init="fresh")
    fresh = model(pixel_values=images()).logits
    assert not torch.allclose(fresh, saved)
    rewind_prompts(model)  # fresh values are the initial ones from now on
    assert torch.equal(model(pixel_values=images()).logits, fresh)
    with pytest.raises(ValueError, match="init='stale'"):
        rewind_prompts(model, init="stale")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_was_loaded_has_no_initial_values_to_go_back_to(tmp_path, low_cpu_mem_usage):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_vit(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    before = loaded(pixel_values=images()).logits
    with pytest.raises(ValueError, match="loaded from a file.*init='fresh'"):
        rewind_prompts(loaded)
    assert torch.equal(loaded(pixel_values=images()).logits, before)
    rewind_prompts(loaded, init="fresh")
    rewind_prompts(loaded)


def test_loading_a_checkpoint_of_the_same_run_keeps_the_initial_values(tmp_path):
    model = adapted()
    rewind_to = [layer.initial_prompts["default"]["e2vpt_visual_prompts"].clone() for layer in layers_of(model)]
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    rewind_prompts(model)
    for layer, initial in zip(layers_of(model), rewind_to):
        assert torch.equal(layer.full_prompts("default"), initial)


def test_initial_values_are_in_no_state_dict_and_go_with_the_adapter():
    model = adapted()
    prune_prompts(model, scores(), segment_rate=0.5)
    assert not any("initial" in key or "kept" in key for key in model.state_dict())
    model.add_adapter("other", E2VPTConfig())
    model.delete_adapter("default")
    assert all(set(layer.initial_prompts) == {"other"} for layer in layers_of(model))
    assert all(len(list(layer.kept_components.keys())) == 0 for layer in layers_of(model))


def test_an_adapter_of_that_name_is_rewound_and_no_other():
    model = adapted()
    model.add_adapter("other", E2VPTConfig(num_visual_prompts=6, num_segments=SEGMENTS))
    initial = {name: p.clone() for name, p in prompt_parameters(model).items() if name.endswith(".other")}
    with torch.no_grad():
        for parameter in prompt_parameters(model).values():
            parameter.add_(1)
    before = {name: p.clone() for name, p in prompt_parameters(model).items() if name.endswith(".default")}
    rewind_prompts(model, adapter_name="other")
    for name, parameter in prompt_parameters(model).items():
        assert torch.equal(parameter, {**initial, **before}[name]), name
    assert model.active_adapters == ["default"]


def test_key_value_prompts_alone_are_refused():
    model = get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=0))
    with pytest.raises(ValueError, match="Adapter 'default' has no visual prompts"):
        rewind_prompts(model)
