"""Gradient checkpointing: less memory, the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from e2vpt_peft import E2VPTConfig

from ..support.models import TINY_MODELS, images, tiny_vit

DEPTHS = pytest.mark.parametrize("visual_prompt_depth", ["deep", "shallow"])
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False])


def adapted(model: PreTrainedModel, visual_prompt_depth: str, dropout: float = 0.0) -> PeftModel:
    config = E2VPTConfig(
        num_visual_prompts=4,
        visual_prompt_depth=visual_prompt_depth,  # type: ignore[arg-type]
        prompt_dropout=dropout,
        kv_prompt_dropout=dropout,
        modules_to_save=["classifier"],
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).train()


def gradients(model: PeftModel) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    torch.manual_seed(1)
    model(pixel_values=images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def counting_passes(model: PeftModel) -> Iterator[list[int]]:
    """Counts the passes through the last layer, of which checkpointing needs twice as many."""
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    passes: list[int] = []
    handle = stack[-1].attention.register_forward_pre_hook(lambda *args: passes.append(1))
    yield passes
    handle.remove()


def assert_same_gradients(checkpointed: PeftModel, plain: PeftModel) -> None:
    with counting_passes(plain) as plain_passes:
        expected = gradients(plain)
    with counting_passes(checkpointed) as passes:
        actual = gradients(checkpointed)
    assert len(passes) == 2 * len(plain_passes)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.abs().max() > 0, f"the gradient of {name} is zero"
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


@DEPTHS
@REENTRANT
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("architecture", TINY_MODELS)
def test_enabled_after_wrapping(
    architecture: str, dropout: float, use_reentrant: bool, visual_prompt_depth: str
) -> None:
    model = adapted(TINY_MODELS[architecture](), visual_prompt_depth, dropout)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_gradients(model, adapted(TINY_MODELS[architecture](), visual_prompt_depth, dropout))


@DEPTHS
@REENTRANT
def test_enabled_before_wrapping(use_reentrant: bool, visual_prompt_depth: str) -> None:
    backbone = tiny_vit()
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_gradients(adapted(backbone, visual_prompt_depth, 0.5), adapted(tiny_vit(), visual_prompt_depth, 0.5))


@DEPTHS
@REENTRANT
def test_enabled_by_the_name_of_transformers_5(use_reentrant: bool, visual_prompt_depth: str) -> None:
    model = adapted(tiny_vit(), visual_prompt_depth)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_gradients(model, adapted(tiny_vit(), visual_prompt_depth))


@DEPTHS
def test_enabled_without_arguments(visual_prompt_depth: str) -> None:
    model = adapted(tiny_vit(), visual_prompt_depth)
    model.gradient_checkpointing_enable()
    assert_same_gradients(model, adapted(tiny_vit(), visual_prompt_depth))


@DEPTHS
def test_every_second_layer(visual_prompt_depth: str) -> None:
    model = adapted(tiny_vit(), visual_prompt_depth)
    model.activation_checkpointing_enable(every_n_layers=2)
    expected = gradients(adapted(tiny_vit(), visual_prompt_depth))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


@REENTRANT
def test_some_layers_only(use_reentrant: bool) -> None:
    def one_layer() -> PeftModel:
        config = E2VPTConfig(num_visual_prompts=4, prompt_dropout=0.0, layers_to_transform=[1])
        torch.manual_seed(0)
        return get_peft_model(tiny_vit(), config).train()

    model = one_layer()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same_gradients(model, one_layer())


def test_disabling_it_again() -> None:
    model = adapted(tiny_vit(), "deep")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.gradient_checkpointing_disable()
    expected = gradients(adapted(tiny_vit(), "deep"))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@DEPTHS
@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_trainer(arguments: dict[str, Any] | None, visual_prompt_depth: str, tmp_path: Path) -> None:
    samples = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images(6))]

    def train(gradient_checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapted(tiny_vit(), visual_prompt_depth, dropout=0.1)
        training_arguments = TrainingArguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs=arguments,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, training_arguments, train_dataset=samples).train()
        return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = train(gradient_checkpointing=False)
    for name, parameter in train(gradient_checkpointing=True).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-4)
