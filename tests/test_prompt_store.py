from __future__ import annotations

import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig

from .support.adapted import first_layer
from .support.models import tiny_vit


def test_prompts_have_the_documented_shapes():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(num_visual_prompts=7, num_kv_prompts=6)))
    assert layer.e2vpt_visual_prompts["default"].shape == (7, 32)
    assert layer.e2vpt_kv_prompts["default"].shape == (4, 6, 8)
    separate = first_layer(get_peft_model(tiny_vit(), E2VPTConfig(num_kv_prompts=6, share_kv_prompts=False)))
    assert separate.e2vpt_kv_prompts["default"].shape == (2, 4, 6, 8)


def test_prompts_in_shards_are_not_compared_with_what_they_started_from():
    layer = first_layer(get_peft_model(tiny_vit(), E2VPTConfig()))
    for prompts in (layer.e2vpt_visual_prompts["default"], layer.e2vpt_kv_prompts["default"]):
        prompts.ds_id, prompts.data = 7, torch.empty(0)  # as ZeRO 3 leaves them between two passes
    layer.forget_initial_prompts_if_untrained("default")
    assert layer.initial_prompts == {}
