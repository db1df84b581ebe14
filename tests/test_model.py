from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from e2vpt_peft import E2VPTConfig, E2VPTLayer

from .support.models import BESIDE, TINY_MODELS, images, prompt_parameters, tiny_vit

DEPTHS = pytest.mark.parametrize("depth", ["deep", "shallow"])


def snapshot(model):
    types = {name: type(module) for name, module in model.named_modules()}
    return types, {name: value.clone() for name, value in model.state_dict().items()}, model(images()).logits


@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS.keys())
@DEPTHS
def test_unload_gives_back_the_very_backbone(make, depth):
    backbone = make()
    types, state, logits = snapshot(backbone)
    config = backbone.vit.layers[0].attention.config if hasattr(backbone, "vit") else None

    model = get_peft_model(backbone, E2VPTConfig(visual_prompt_depth=depth, modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    unloaded = model.unload().eval()

    assert unloaded is backbone
    new_types, new_state, new_logits = snapshot(unloaded)
    assert new_types == types
    assert new_state.keys() == state.keys()
    assert all(torch.equal(new_state[name], value) for name, value in state.items())
    assert torch.equal(new_logits, logits)
    assert not hasattr(unloaded, "peft_config")
    if config is not None:
        assert unloaded.vit.layers[0].attention.config is config
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(unloaded, E2VPTConfig())


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_raises_an_error_that_says_why_and_changes_nothing(method):
    model = get_peft_model(tiny_vit(), E2VPTConfig()).eval()
    types, state, logits = snapshot(model)
    with pytest.raises(ValueError, match="cannot be merged.*extra keys and values"):
        getattr(model, method)()
    new_types, new_state, new_logits = snapshot(model)
    assert new_types == types
    assert all(torch.equal(new_state[name], value) for name, value in state.items())
    assert torch.equal(new_logits, logits)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize(
    ("config", "layers", "visual", "kv"),
    [
        ({}, 3, 3, 3),
        ({"num_kv_prompts": 0}, 3, 3, 0),
        ({"num_visual_prompts": 0}, 3, 0, 3),
        ({"layers_to_transform": [0, 2]}, 2, 2, 2),
        ({"layers_to_transform": 1}, 1, 1, 1),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, 1, 1, 1),
        ({"exclude_modules": ["layers.0.attention"]}, 2, 2, 2),
        ({"exclude_modules": r".*layers\.[01]\.attention"}, 1, 1, 1),
    ],
)
def test_prompts_are_where_the_config_says(config, layers, visual, kv):
    model = get_peft_model(tiny_vit(), E2VPTConfig(**config))
    assert len([module for module in model.modules() if isinstance(module, E2VPTLayer)]) == layers
    names = list(prompt_parameters(model))
    assert sum("visual" in name for name in names) == visual
    assert sum("kv" in name for name in names) == kv
    model.eval()(pixel_values=images()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in prompt_parameters(model).values())


@DEPTHS
@pytest.mark.parametrize(
    "kind",
    [{}, {"share_kv_prompts": False}, BESIDE],
    ids=["shared", "separate", "beside"],
)
def test_save_and_load_give_the_same_function_whatever_the_seed(tmp_path, depth, kind):
    config = E2VPTConfig(visual_prompt_depth=depth, modules_to_save=["classifier"], **kind)
    model = get_peft_model(tiny_vit(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    expected = model(pixel_values=images()).logits
    model.save_pretrained(tmp_path)

    torch.manual_seed(123)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert torch.equal(loaded(pixel_values=images()).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_vit(), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again = get_peft_model(tiny_vit(), E2VPTConfig(), adapter_name="other")
    again.load_adapter(tmp_path, "loaded")
    again.set_adapter("loaded")
    assert torch.equal(again.eval()(pixel_values=images()).logits, expected)


def test_a_file_holds_prompts_and_modules_to_save_and_nothing_else(tmp_path):
    get_peft_model(tiny_vit(), E2VPTConfig(modules_to_save=["classifier"])).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    prefix = "base_model.model."
    expected = {f"{prefix}classifier.weight", f"{prefix}classifier.bias"}
    for index in range(3):
        expected |= {f"{prefix}vit.layers.{index}.attention.e2vpt_{kind}_prompts" for kind in ("visual", "kv")}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected


def test_the_adapter_of_a_vit_b_is_under_0_6_megabytes(tmp_path):
    with torch.device("meta"):
        backbone = ViTModel(ViTConfig(), add_pooling_layer=False)
    model = get_peft_model(backbone.to_empty(device="cpu"), E2VPTConfig(num_visual_prompts=10, num_kv_prompts=5))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * (10 * 768 + 5 * 768)
    assert size < 600_000


def test_a_model_without_a_pooler_or_head_works_too():
    torch.manual_seed(0)
    backbone = tiny_vit().vit
    bare = backbone(images()).last_hidden_state
    output = get_peft_model(backbone, E2VPTConfig()).eval()(images())
    assert output.last_hidden_state.shape == bare.shape
    assert not torch.allclose(output.last_hidden_state, bare)
