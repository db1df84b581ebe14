from __future__ import annotations

import pytest
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig, prune_prompts
from e2vpt_peft.masks import PromptMasks
from e2vpt_peft.prompt_shapes import KV_PROMPTS, VISUAL_PROMPTS, AttentionSizes, prompt_shapes, sizes_in

from .support.adapted import adapted_layers, make
from .support.models import tiny_vit

KINDS = {
    "shared": {},
    "separate": {"share_kv_prompts": False},
    "shallow": {"visual_prompt_depth": "shallow"},
    "visual alone": {"num_kv_prompts": 0},
    "key-value alone": {"num_visual_prompts": 0},
}
KEEP = [True, False, True, True]
ROWS = [[True, False, True, True], [False] * 4, [True] * 4, [False, True, True, False]]
PRUNED = {
    "unpruned": {},
    "prompts": {"token_mask": KEEP},
    "segments": {"segment_mask": [ROWS[0], *[[True] * 4] * 3]},
    "both": {"token_mask": KEEP, "segment_mask": ROWS},
}
SIZES = AttentionSizes(hidden_size=32, num_heads=4, head_size=8)


def config(**fields):
    return E2VPTConfig(**{"num_visual_prompts": 4, "num_kv_prompts": 3, "num_segments": 4, **fields})


def actual_shapes(layer):
    kinds = {VISUAL_PROMPTS: layer.e2vpt_visual_prompts, KV_PROMPTS: layer.e2vpt_kv_prompts}
    return {name: tuple(tensors["default"].shape) for name, tensors in kinds.items() if "default" in tensors}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pruned", PRUNED)
def test_shapes_are_those_of_the_tensors_of_an_adapted_model(kind, pruned):
    if kind == "key-value alone" and pruned != "unpruned":
        pytest.skip("nothing to prune")
    model = get_peft_model(tiny_vit(), config(**KINDS[kind], **PRUNED[pruned]))
    found = model.peft_config["default"]
    first, *others = adapted_layers(model).values()
    expected = prompt_shapes(found, first.site, PromptMasks.of(found))
    assert actual_shapes(first) == expected
    if kind == "shallow":  # in one layer only
        del expected[VISUAL_PROMPTS]
    assert all(actual_shapes(layer) == expected for layer in others)


def test_shapes_follow_the_sizes_of_each_stage_of_a_model():
    model = get_peft_model(make("swin"), config())
    prune_prompts(model, token_mask=KEEP)
    found, layers = model.peft_config["default"], adapted_layers(model).values()
    expected = [prompt_shapes(found, layer.site, PromptMasks.of(found)) for layer in layers]
    assert [actual_shapes(layer) for layer in layers] == expected
    assert [shapes[VISUAL_PROMPTS] for shapes in expected] == [(3, 16), (3, 16), (3, 32)]
    assert [shapes[KV_PROMPTS] for shapes in expected] == [(2, 3, 8), (2, 3, 8), (4, 3, 8)]


def test_without_masks_shapes_are_those_of_everything_whatever_the_config_has():
    assert prompt_shapes(config(**PRUNED["both"]), SIZES) == {VISUAL_PROMPTS: (4, 32), KV_PROMPTS: (4, 3, 8)}


def test_sizes_that_are_not_known_are_0():
    shapes = prompt_shapes(config(share_kv_prompts=False), AttentionSizes(head_size=8))
    assert shapes == {VISUAL_PROMPTS: (4, 0), KV_PROMPTS: (2, 0, 3, 8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pruned", ["unpruned", "prompts"])
def test_the_sizes_of_an_attention_are_read_from_the_shapes(kind, pruned):
    fields = config(**KINDS[kind], **({} if kind == "key-value alone" else PRUNED[pruned]))
    found = {}
    for name, shape in prompt_shapes(fields, SIZES, PromptMasks.of(fields)).items():
        found |= sizes_in(name, shape)
    expected = SIZES._asdict()
    if kind == "visual alone":
        expected = {"hidden_size": 32}
    elif kind == "key-value alone":
        del expected["hidden_size"]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [(VISUAL_PROMPTS, (20,)), (VISUAL_PROMPTS, ()), (KV_PROMPTS, (4, 8)), (KV_PROMPTS, ()), ("classifier", (5, 32))],
)
def test_other_shapes_say_nothing_of_an_attention(name, shape):
    assert sizes_in(name, shape) == {}
