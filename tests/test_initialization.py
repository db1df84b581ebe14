from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig

from .support.adapted import first_layer
from .support.models import BESIDE, images, prompt_parameters, tiny_vit


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_initialisation_is_uniform_within_the_papers_bounds(share, depth):
    config = E2VPTConfig(num_visual_prompts=500, num_kv_prompts=500, share_kv_prompts=share, visual_prompt_depth=depth)
    layer = first_layer(get_peft_model(tiny_vit(), config))
    bounds = {
        layer.e2vpt_visual_prompts["default"].detach(): math.sqrt(6 / (3 * 4**2 + 32)),
        layer.e2vpt_kv_prompts["default"].detach(): math.sqrt(6 / (500 * 8)),
    }
    for prompts, bound in bounds.items():
        assert 0.99 * bound < prompts.abs().max() <= bound
        assert abs(prompts.mean()) < 0.02 * bound
        assert prompts.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("share", [True, False])
def test_truncated_normal_initialisation(share):
    config = E2VPTConfig(
        num_visual_prompts=500, num_kv_prompts=500, share_kv_prompts=share, init_weights="trunc_normal"
    )
    layer = first_layer(get_peft_model(tiny_vit(), config))
    for prompts in (layer.e2vpt_visual_prompts["default"].detach(), layer.e2vpt_kv_prompts["default"].detach()):
        assert 0.039 < prompts.abs().max() <= 0.04
        assert abs(prompts.mean()) < 5e-4
        assert prompts.std() == pytest.approx(0.88 * 0.02, rel=0.02)  # 0.88: what cutting off at two deviations leaves


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    def prompts(seed):
        torch.manual_seed(seed)
        return torch.cat(
            [p.detach().flatten() for p in prompt_parameters(get_peft_model(tiny_vit(), E2VPTConfig())).values()]
        )

    assert torch.equal(prompts(3), prompts(3))
    assert not torch.allclose(prompts(3), prompts(4))


@pytest.mark.parametrize("init_weights", ["kaiming_uniform", "trunc_normal"])
@torch.no_grad()
def test_key_value_prompts_beside_the_attention_start_without_an_effect(init_weights):
    config = E2VPTConfig(
        num_visual_prompts=0,
        num_kv_prompts=500,
        init_weights=init_weights,
        **BESIDE,
    )
    backbone = tiny_vit().eval()
    expected = backbone(images()).logits
    model = get_peft_model(backbone, config).eval()
    torch.testing.assert_close(model(images()).logits, expected)
    keys, values = first_layer(model).e2vpt_kv_prompts["default"]
    assert keys.std() == pytest.approx(0.5, rel=0.02)
    assert not values.any()
