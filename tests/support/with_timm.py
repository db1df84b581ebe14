"""Tests of timm's models, which tests/attention/test_timm.py runs in a process of their own."""

from __future__ import annotations

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from timm.layers import set_fused_attn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from e2vpt_peft import E2VPTConfig, check_prefix, keep_prefixes
from e2vpt_peft.attention.interception import ProductsMode

from .adapted import PROMPTS, adapt, adapted_layers
from .models import images, prompt_parameters, randomized

VITS = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 32},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_base_patch16_siglip_224": {"img_size": 32},
    "vit_tiny_patch16_224 with normed keys": {"img_size": 32, "qk_norm": True},
}
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4}
VIT = "vit_tiny_patch16_224"


def make(name=VIT, **config):
    return randomized(timm.create_model(name.partition(" ")[0], **{**SIZES, "img_size": 32, **config}))


@pytest.mark.parametrize("name", VITS)
def test_a_prefix_equals_inserted_tokens(name):
    model = adapt(make(name, **VITS[name]))
    size = VITS[name]["img_size"]
    assert len(adapted_layers(model)) == 2
    assert check_prefix(model, {"x": images(2, size)}) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", VITS)
def test_prefixes_are_kept_until_a_norm_changes(name):
    model, pixels = adapt(make(name, **VITS[name])), images(2, VITS[name]["img_size"])
    first = model(pixels)
    layers = list(adapted_layers(model).values())
    kept = [dict(layer.kept_prefixes._stores) for layer in layers]
    assert all(kept)
    assert torch.equal(model(pixels), first)
    assert [layer.kept_prefixes._stores for layer in layers] == kept
    for layer in layers:
        layer.site.norm.eps = 1.0
    changed = model(pixels)
    assert not torch.allclose(changed, first)
    keep_prefixes(model, False)
    torch.testing.assert_close(changed, model(pixels))


def test_an_adapter_is_trained_saved_and_loaded(tmp_path):
    model = get_peft_model(make(num_classes=5), E2VPTConfig(**PROMPTS, modules_to_save=["head"])).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-1)
    labels = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(images(4, 32)), labels)
        losses.append(float(loss))
        loss.backward()
        assert all(parameter.grad is not None for parameter in prompt_parameters(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(num_classes=5), tmp_path)
    assert torch.equal(loaded(images(4, 32)), model(images(4, 32)))


@torch.no_grad()
def test_the_wrapper_of_transformers():
    config = TimmWrapperConfig(
        architecture=VIT, model_args={**SIZES, "img_size": 32}, num_classes=5, pretrained_cfg={"num_classes": 5}
    )
    bare = randomized(TimmWrapperForImageClassification(config))
    shape = bare(pixel_values=images(3, 32)).logits.shape
    model = adapt(bare)
    assert len(adapted_layers(model)) == 2
    assert model(pixel_values=images(3, 32)).logits.shape == shape
    assert check_prefix(model, {"pixel_values": images(3, 32)}) < 1e-5


@torch.no_grad()
def test_attention_without_fusion_gives_the_same():
    fused = adapt(make(qk_norm=True))
    set_fused_attn(False)
    try:
        written_out = get_peft_model(make(qk_norm=True), E2VPTConfig(**PROMPTS)).eval()
    finally:
        set_fused_attn(True)
    written_out.load_state_dict(fused.state_dict())
    assert all(layer.site.way_in.mode is ProductsMode for layer in adapted_layers(written_out).values())
    torch.testing.assert_close(written_out(images(2, 32)), fused(images(2, 32)), rtol=1e-5, atol=1e-5)


def test_attention_that_loses_its_fusion_afterwards_is_an_error():
    model = adapt(make())
    for layer in adapted_layers(model).values():
        layer.base_layer.fused_attn = False
    with pytest.raises(RuntimeError, match=r"\(Attention\) has not called scaled_dot_product_attention"):
        model(images(2, 32))


def test_a_bias_that_is_added_outside_the_projection_is_refused():
    with pytest.raises(ValueError, match=r"adds the bias of its projection 'qkv' by itself"):
        get_peft_model(make("beit_base_patch16_224"), E2VPTConfig(**PROMPTS))
