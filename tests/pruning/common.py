"""What the tests of pruning share."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig, PromptScores
from e2vpt_peft.pruning import SCORING_METHODS

from ..support.models import images, tiny_vit
from ..support.prompted import with_prompts
from ..support.reference import random_prompts

SEGMENTS = 8
both_depths = pytest.mark.parametrize("depth", ["deep", "shallow"])


def adapted(depth="deep", seed=0, **config):
    """A model with 6 visual prompts whose parameters are all different from their initial values."""
    torch.manual_seed(seed)
    defaults = {
        "num_visual_prompts": 6,
        "num_kv_prompts": 3,
        "num_segments": SEGMENTS,
        "modules_to_save": ["classifier"],
    }
    model = get_peft_model(tiny_vit(), E2VPTConfig(visual_prompt_depth=depth, **{**defaults, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def scores(tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return PromptScores(torch.rand(tokens, generator=generator), torch.rand(tokens, SEGMENTS, generator=generator))


def layers_of(model):
    return [layer.attention for layer in model.base_model.model.vit.layers]


all_methods = pytest.mark.parametrize("method", SCORING_METHODS)
LABELS = torch.tensor([0, 1, 2, 3])


def data(batches=2):
    return [{"pixel_values": images(4, seed=seed), "labels": LABELS} for seed in range(batches)]


def prompted(shallow=False, dtype=torch.float64, scale=1.0, **config):
    prompts = random_prompts(tiny_vit(), 4, 2, shallow=shallow)
    prompts.visual *= scale
    return with_prompts(tiny_vit().to(dtype), prompts, num_segments=8, **config)


def double(batches):
    return [{**batch, "pixel_values": batch["pixel_values"].double()} for batch in batches]
