"""The golden vectors of the published code, made in float64 (see shared/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import ViTConfig, ViTForImageClassification

from e2vpt_peft import E2VPTConfig

FOLDER = Path(__file__).parent
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
LAYERS = 3

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def load(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def golden_model(golden: dict[str, torch.Tensor], dtype: torch.dtype, **config: Any) -> PeftModel:
    backbone = ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=7,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",  # eager computes its softmax in float32
        )
    ).to(dtype)
    weights = {name.removeprefix("backbone."): value for name, value in golden.items() if name.startswith("backbone.")}
    backbone.load_state_dict(weights, strict=True)
    config = {"num_visual_prompts": 4, "num_kv_prompts": 3, "num_segments": 8, **config}
    model = get_peft_model(backbone, E2VPTConfig(modules_to_save=["classifier"], **config)).eval()
    with torch.no_grad():
        for name, value in golden_parameters(golden).items():
            model.get_parameter(name).copy_(value)
    return model


def golden_parameters(golden: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The golden prompts, or what belongs to them, under the names of the model's parameters."""
    visual, parameters = golden[f"{prefix}visual_prompts"], {}
    for index in range(LAYERS):
        attention = f"base_model.model.vit.layers.{index}.attention"
        if index < len(visual):
            parameters[f"{attention}.e2vpt_visual_prompts.default"] = visual[index]
        if f"{prefix}kv_prompts" in golden:
            parameters[f"{attention}.e2vpt_kv_prompts.default"] = golden[f"{prefix}kv_prompts"][index]
        else:
            separate = torch.stack([golden[f"{prefix}key_prompts"][index], golden[f"{prefix}value_prompts"][index]])
            parameters[f"{attention}.e2vpt_kv_prompts.default"] = separate
    return parameters


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[expected.dtype])


@both_dtypes
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit_deep_shared_kv", {}),
        ("vit_deep_separate_kv", {"share_kv_prompts": False}),
        ("vit_shallow", {"visual_prompt_depth": "shallow"}),
    ],
)
def test_logits_loss_and_gradients_are_those_of_the_published_code(
    name: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    golden = load(name, dtype)
    model = golden_model(golden, dtype, **config)

    output = model(pixel_values=golden["pixel_values"], labels=golden["labels"])
    output.loss.backward()

    assert_close(output.logits, golden["logits"])
    assert_close(output.loss, golden["loss"])
    for parameter_name, expected in golden_parameters(golden, prefix="grad.").items():
        assert_close(model.get_parameter(parameter_name).grad, expected)
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert_close(head.weight.grad, golden["grad.classifier.weight"])
    assert_close(head.bias.grad, golden["grad.classifier.bias"])


@both_dtypes
def test_a_disabled_adapter_gives_the_plain_backbone(dtype: torch.dtype) -> None:
    golden = load("vit_deep_shared_kv", dtype)
    model = golden_model(golden, dtype)
    with model.disable_adapter():
        assert_close(model(pixel_values=golden["pixel_values"]).logits, golden["logits_without_prompts"])


@both_dtypes
def test_masked_prompts_and_gradients_of_the_masks_are_those_of_the_published_code(dtype: torch.dtype) -> None:
    """The published code multiplies prompts by masks; component j of a token belongs to segment j mod segments."""
    golden = load("vit_masked", dtype)
    model = golden_model(golden, dtype)
    tokens, segments = golden["token_mask"].requires_grad_(), golden["segment_mask"].requires_grad_()
    expanded = segments.repeat(1, 32 // segments.shape[1])
    assert_close(expanded.detach(), golden["segment_mask_expanded"])
    parameters = {name: value.requires_grad_() for name, value in golden_parameters(golden).items()}
    masked = {
        name: value * expanded * tokens[:, None] if "visual" in name else value for name, value in parameters.items()
    }

    inputs = {"pixel_values": golden["pixel_values"], "labels": golden["labels"]}
    output = functional_call(model, masked, args=(), kwargs=inputs)
    output.loss.backward()

    assert_close(output.logits, golden["logits"])
    assert_close(output.loss, golden["loss"])
    for name, expected in golden_parameters(golden, prefix="grad.").items():
        assert_close(parameters[name].grad, expected)
    assert_close(tokens.grad, golden["grad.token_mask"])
    assert_close(segments.grad, golden["grad.segment_mask"])


@both_dtypes
def test_a_removed_token_is_as_in_the_published_code_with_a_token_less(dtype: torch.dtype) -> None:
    golden = load("vit_masked", dtype)
    expanded = golden["segment_mask"].repeat(1, 4)
    kept = [0, 2, 3]
    golden["visual_prompts"] = (golden["visual_prompts"] * expanded)[:, kept]
    model = golden_model(golden, dtype, num_visual_prompts=3)
    assert_close(model(pixel_values=golden["pixel_values"]).logits, golden["logits_token_removed"])
