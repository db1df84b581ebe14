from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from e2vpt_peft import E2VPTConfig, check_prefix
from e2vpt_peft.attention import site

from .peft_contract.common import assert_unchanged, snapshot
from .support.adapted import adapt, inputs, make
from .support.bare import Bare
from .support.models import BESIDE, images, tiny_vit
from .support.zoo import HEADS, ZOO


def swinv2():
    return make("swinv2")


def segformer():
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[16] * 4, num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16
    )
    return SegformerForSemanticSegmentation(config)


def detr():
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    return DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, use_timm_backbone=False, d_model=32, num_queries=5, **layers)
    )


@pytest.mark.parametrize("name", [name for name in [*ZOO, *HEADS] if name != "swinv2"])
def test_it_confirms_every_architecture_of_the_table(name):
    assert check_prefix(adapt(make(name)), inputs(name)) < 1e-5


def test_it_confirms_a_prefix_with_key_value_prompts_beside_the_attention():
    model = adapt(tiny_vit(), **BESIDE)
    assert check_prefix(model, {"pixel_values": images()}) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_it_leaves_the_model_as_it_was(training):
    model = get_peft_model(tiny_vit(), E2VPTConfig()).train(training)
    before, hooks, modes = snapshot(model), _hooks(model), [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    check_prefix(model, {"pixel_values": images()})
    assert_unchanged(model, before)
    assert _hooks(model) == hooks
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def _hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("make_model", [swinv2, segformer])
def test_it_says_so_where_no_tokens_can_be_inserted(make_model):
    model = adapt(make_model(), **({"target_modules": ["attention"]} if make_model is segformer else {}))
    pixel_values = torch.rand(2, 3, 64, 64)
    model(pixel_values)
    before = _hooks(model)  # transformers' own, which record hidden states
    with pytest.raises(ValueError, match="cannot judge this model: S.*Attention takes no tokens beside its own, so"):
        check_prefix(model, {"pixel_values": pixel_values})
    assert _hooks(model) == before


def test_errors_of_the_model_itself_are_its_own():
    with pytest.raises(ValueError, match="channel dimension of the pixel values"):
        check_prefix(adapt(tiny_vit()), {"pixel_values": images()[:, :1]})


def test_it_knows_position_embeddings_that_are_added_to_queries_and_keys():
    model = adapt(detr(), target_modules=r"model\.encoder\.layers\.\d+\.self_attn", attention_norm="none")
    assert check_prefix(model, {"pixel_values": torch.rand(2, 3, 64, 64)}) < 1e-5


def test_it_finds_a_wrong_norm():
    model = adapt(tiny_vit(), attention_norm="layernorm_after")
    hooks = _hooks(model)
    with pytest.raises(ValueError, match="attention 'base_model.*' is not what its norm 'layernorm_after' gives"):
        check_prefix(model, {"pixel_values": images()})
    assert _hooks(model) == hooks


def test_it_finds_a_norm_that_was_said_not_to_be_there():
    model = adapt(tiny_vit(), attention_norm="none")
    with pytest.raises(ValueError, match="not what enters its layer, though attention_norm='none'"):
        check_prefix(model, {"pixel_values": images()})


def test_it_finds_keys_that_are_changed_after_the_projection(monkeypatch):
    monkeypatch.setattr(site, "KEY_NORMS", ())
    with pytest.raises(ValueError, match="outputs differ by .* from those with inserted tokens"):
        check_prefix(adapt(make("internvl_vision")), inputs("internvl_vision"))


def test_it_takes_key_value_prompts_as_given():
    vit = adapt(tiny_vit(), share_kv_prompts=False)
    assert check_prefix(vit, {"pixel_values": images()}) < 1e-5


@pytest.mark.parametrize(
    ("config", "words"),
    [({"num_visual_prompts": 0}, "no visual prompts"), ({"visual_prompt_depth": "shallow"}, "shallow visual prompts")],
)
def test_it_needs_deep_visual_prompts(config, words):
    with pytest.raises(ValueError, match=words):
        check_prefix(get_peft_model(tiny_vit(), E2VPTConfig(**config)), {"pixel_values": images()})


def test_a_model_that_nobody_knows_can_be_described_and_checked():
    config = {"target_modules": ["attn"], "num_segments": 1}
    with pytest.raises(ValueError, match="attention_norm to its name .the parents have: .*ln_1"):
        get_peft_model(Bare(), E2VPTConfig(**config))
    model = adapt(Bare(), **config, attention_norm="ln_1")
    assert check_prefix(model, {"x": torch.randn(2, 5, 8)}) < 1e-5
