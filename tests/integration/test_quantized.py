"""Quantised backbones, as far as they run on a CPU: bitsandbytes in 8 and 4 bits, torchao with int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig, ViTForImageClassification

from e2vpt_peft import E2VPTConfig, convert_to_kv_prompts

from ..support.models import images, prompt_parameters, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

SKIP = ["classifier"]  # a head that is to be trained must not be quantised
ADAPTER = {"num_visual_prompts": 4, "num_kv_prompts": 3, "prompt_dropout": 0.0, "modules_to_save": ["classifier"]}


def int8() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="8-bit backbones need bitsandbytes, which is not installed")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIP)


def nf4() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="4-bit backbones need bitsandbytes, which is not installed")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=SKIP,
    )


def int8_weights() -> TorchAoConfig:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="backbones with int8 weights need torchao, which is not installed"
    )
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=SKIP)


# What is quantised, and how much the result may differ from that with the dequantised weights: bitsandbytes rounds the
# activations as well (8 bits), or computes in bfloat16 when it does not train (4 bits).
QUANTIZATIONS = pytest.mark.parametrize(
    ("quantization", "tolerance"), [(int8, 0.1), (nf4, 0.05), (int8_weights, 1e-4)]
)
Quantization = Callable[[], Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "backbone"
    tiny_vit(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(path)
    return path


def quantized(checkpoint: Path, quantization: Quantization, attention: str = "sdpa") -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(
        checkpoint, quantization_config=quantization(), attn_implementation=attention
    )


def adapted(model: nn.Module, visual_prompt_depth: str = "deep") -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, E2VPTConfig(visual_prompt_depth=visual_prompt_depth, **ADAPTER))


def dequantized(checkpoint: Path, model: ViTForImageClassification) -> ViTForImageClassification:
    """A plain model with the weights that the quantised one stands for."""
    plain = ViTForImageClassification.from_pretrained(checkpoint)
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in SKIP:
            plain.get_submodule(name).weight.data = dequantized_weight(module).float()
            count += 1
    assert count == 2 * 6
    return plain


def dequantized_weight(module: nn.Linear) -> torch.Tensor:
    if type(module).__module__.startswith("bitsandbytes"):
        from bitsandbytes import functional

        if module.weight.dtype == torch.int8:
            return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.dequantize()


@QUANTIZATIONS
@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_result_is_that_of_the_dequantised_weights(
    checkpoint: Path, quantization: Quantization, tolerance: float, visual_prompt_depth: str, attention: str
) -> None:
    backbone = quantized(checkpoint, quantization, attention)
    reference = adapted(dequantized(checkpoint, backbone), visual_prompt_depth).eval()
    model = adapted(backbone, visual_prompt_depth).eval()
    with torch.no_grad():
        expected = reference(images()).logits
        torch.testing.assert_close(model(images()).logits, expected, atol=tolerance, rtol=0.0)
        with reference.disable_adapter():
            assert (reference(images()).logits - expected).abs().max() > 3 * tolerance


@QUANTIZATIONS
@pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
def test_gradients_are_those_of_the_dequantised_weights(
    checkpoint: Path, quantization: Quantization, tolerance: float, visual_prompt_depth: str
) -> None:
    backbone = quantized(checkpoint, quantization)
    reference = adapted(dequantized(checkpoint, backbone), visual_prompt_depth).train()
    model = adapted(backbone, visual_prompt_depth).train()
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    reference(**batch).loss.backward()
    model(**batch).loss.backward()
    expected = prompt_parameters(reference)
    for name, prompt in prompt_parameters(model).items():
        assert prompt.dtype == torch.float32
        similarity = torch.cosine_similarity(prompt.grad.flatten(), expected[name].grad.flatten(), dim=0)
        assert similarity > 0.99, f"{name}: {similarity}"


@QUANTIZATIONS
def test_prompts_train_and_a_saved_adapter_gives_the_same_result(
    checkpoint: Path, quantization: Quantization, tolerance: float, tmp_path: Path
) -> None:
    model = adapted(quantized(checkpoint, quantization)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(checkpoint, quantization), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images()).logits, model.eval()(images()).logits, atol=1e-5, rtol=0)


@QUANTIZATIONS
def test_a_mixed_batch(checkpoint: Path, quantization: Quantization, tolerance: float) -> None:
    model = adapted(quantized(checkpoint, quantization))
    model.add_adapter("other", E2VPTConfig(**{**ADAPTER, "num_visual_prompts": 2}))
    model.eval()
    with torch.no_grad():
        mixed = model(images(), adapter_names=["other", "__base__", "default"]).logits
        default = model(images()).logits
        model.set_adapter("other")
        other = model(images()).logits
        with model.disable_adapter():
            base = model(images()).logits
    # Which activations bitsandbytes keeps out of its 8 bits depends on the whole batch.
    torch.testing.assert_close(mixed, torch.stack([other[0], base[1], default[2]]), atol=tolerance, rtol=0)


@QUANTIZATIONS
def test_unloading_gives_the_quantised_backbone_back(
    checkpoint: Path, quantization: Quantization, tolerance: float
) -> None:
    backbone = quantized(checkpoint, quantization).eval()
    with torch.no_grad():
        expected = backbone(images()).logits
        model = get_peft_model(backbone, E2VPTConfig(num_visual_prompts=4)).eval()
        torch.testing.assert_close(model.unload()(images()).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_is_refused_in_words(checkpoint: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which is not installed")
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["none"])
    backbone = ViTForImageClassification.from_pretrained(checkpoint, quantization_config=quantization)
    names = [name for name, _ in backbone.named_modules()]
    with pytest.raises(ValueError, match=r"'classifier', which is quantised.*llm_int8_skip_modules=\['classifier'\]"):
        get_peft_model(backbone, E2VPTConfig(modules_to_save=["classifier"]))
    assert [name for name, _ in backbone.named_modules()] == names


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_prepared_for_training_with_checkpointing(checkpoint: Path, use_reentrant: bool) -> None:
    from peft import prepare_model_for_kbit_training

    backbone = prepare_model_for_kbit_training(
        quantized(checkpoint, nf4), gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    model = adapted(backbone).train()
    model(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, prompt in prompt_parameters(model).items():
        assert prompt.grad is not None and prompt.grad.abs().max() > 0, name


@QUANTIZATIONS
@torch.no_grad()
def test_converted_prompts_give_the_same_result(
    checkpoint: Path, quantization: Quantization, tolerance: float
) -> None:
    model = adapted(quantized(checkpoint, quantization)).eval()
    expected = model(images()).logits
    convert_to_kv_prompts(model)
    torch.testing.assert_close(model(images()).logits, expected, atol=1e-5, rtol=0)
