"""Automatic mixed precision, on the CPU in bfloat16."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from e2vpt_peft import E2VPTConfig

from ..support.models import TINY_MODELS, images, prompt_parameters


@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", TINY_MODELS)
def test_gradients_are_finite_and_close_to_those_in_float32(
    architecture: str, attention: str, visual_prompt_depth: str
) -> None:
    config = E2VPTConfig(num_visual_prompts=4, visual_prompt_depth=visual_prompt_depth, prompt_dropout=0.0)
    model = get_peft_model(TINY_MODELS[architecture](attn_implementation=attention), config).train()
    batch = {"pixel_values": images(8), "labels": torch.arange(8) % 5}
    expected_loss = model(**batch).loss
    expected_loss.backward()
    prompts = prompt_parameters(model)
    expected = {name: prompt.grad.clone() for name, prompt in prompts.items()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss.float(), expected_loss, atol=0.02, rtol=0.02)
    for name, prompt in prompts.items():
        assert prompt.dtype == prompt.grad.dtype == torch.float32
        assert prompt.grad.isfinite().all()
        similarity = torch.cosine_similarity(prompt.grad.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.98, f"{name}: {similarity}"


def test_a_mixed_batch() -> None:
    model = get_peft_model(TINY_MODELS["vit"](), E2VPTConfig(modules_to_save=["classifier"]), adapter_name="a")
    model.add_adapter("b", E2VPTConfig(num_visual_prompts=3, modules_to_save=["classifier"]))
    names = ["b", "__base__", "a"]
    expected = model.eval()(images(), adapter_names=names).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images(), adapter_names=names).logits
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.05)
