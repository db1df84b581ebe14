"""What is compared, as data: the first table below. A method makes the trainable model out of a backbone.

Visual prompt tuning (VPT) is E²VPT without key-value prompts, and is run as that. Every method trains the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from e2vpt_peft import E2VPTConfig
from examples.data_and_backbone import HEAD

from .tasks import Task

Adapt = Callable[[PreTrainedModel, Task], nn.Module]


@dataclass(frozen=True)
class Pruning:
    """What is pruned after tuning, by a score on the first so many images (or all), and how training goes on."""

    tokens: bool = True
    segments: bool = True
    rewind: bool = True
    importance: str = "removal"
    images: int | None = None


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name (`str`): Its name in results and tables.
        learning_rate (`float`): The middle of the learning rates that are tried, see [`recipes.Recipe`].
        adapt (`Callable`): Makes what is to be trained trainable, and nothing else.
        pruning ([`Pruning`], *optional*): Prune the trained prompts and train again.
        same_search (`str`, *optional*): The method that differs in pruning alone, whose learning rate serves here.
        cached (`bool`): Only the head is trained, so that features are computed once.
        variants (`tuple[Mapping]`): Options of `adapt` that are searched together with the learning rate.
        variant (`Mapping`, *optional*): The one of them that this is.
        kv_lr_ratio (`float`, *optional*): See [`training.Optimisation`].
    """

    name: str
    learning_rate: float
    adapt: Adapt
    pruning: Pruning | None = None
    same_search: str | None = None
    cached: bool = False
    variants: tuple[Mapping[str, Any], ...] = ()
    variant: Mapping[str, Any] | None = None
    kv_lr_ratio: float | None = None

    @property
    def searched_as(self) -> str:
        return self.same_search or self.name

    def each_variant(self) -> list[Method]:
        """The method as each of its variants; itself if there are none."""
        return [
            replace(self, adapt=partial(self.adapt, **variant), variants=(), variant=variant)
            for variant in self.variants
        ] or [self]


def train_parameters(model: PreTrainedModel, task: Task, endings: tuple[str, ...]) -> nn.Module:
    """Train the model's own parameters: those whose names have one of the endings, and the head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(endings) or name.startswith(f"{HEAD}."))
    return model


def add_adapter(model: PreTrainedModel, task: Task, config: Callable[..., PeftConfig], **options: Any) -> nn.Module:
    """One of PEFT's methods."""
    return get_peft_model(model, config(**{"modules_to_save": [HEAD], **options}))


def norms_of(model: nn.Module) -> list[str]:
    """The names of all LayerNorms."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]


def tune_norms(model: PreTrainedModel, task: Task) -> nn.Module:
    """PEFT's LayerNorm tuning, of every LayerNorm."""
    return add_adapter(model, task, LNTuningConfig, target_modules=norms_of(model))


def add_prompts(model: PreTrainedModel, task: Task, **options: Any) -> nn.Module:
    """E²VPT with the task's numbers of prompts, or others."""
    counts = {"num_visual_prompts": task.visual_prompts, "num_kv_prompts": task.kv_prompts}
    return add_adapter(model, task, E2VPTConfig, **{**counts, **options})


def add_prompts_and_train_norms(model: PreTrainedModel, task: Task, **options: Any) -> nn.Module:
    """The same, and every LayerNorm is trained with the prompts."""
    return add_prompts(model, task, modules_to_save=[HEAD, *norms_of(model)], **options)


def add_lora_and_prompts(model: PreTrainedModel, task: Task) -> nn.Module:
    """Prompts on top of LoRA, both trained."""
    model = add_prompts(get_peft_model(model, LoraConfig(**LORA), adapter_name="lora"), task)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    return model


def e2vpt(
    name: str = "E²VPT",
    pruning: Pruning | None = None,
    same_search: str | None = None,
    learning_rate: float = 3e-2,
    kv_lr_ratio: float | None = None,
    **options: Any,
) -> Method:
    """A variant of E²VPT."""
    adapt = partial(add_prompts, **options)
    return Method(name, learning_rate, adapt, pruning, same_search, kv_lr_ratio=kv_lr_ratio)


LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16}
MORE_PROMPTS: dict[str, Any] = {"num_visual_prompts": 50, "num_kv_prompts": 20, "share_kv_prompts": False}
"""About five times as many parameters as (10, 5) have."""
LORA_SIZE: dict[str, Any] = {"num_visual_prompts": 16, "num_kv_prompts": 8, "share_kv_prompts": False}
"""As many parameters as LoRA of rank 8 has."""
BESIDE: dict[str, Any] = {**LORA_SIZE, "kv_prompt_activation": "gelu"}
"""The same, and key-value prompts take no attention from the sequence."""
ALL_BESIDE: dict[str, Any] = {**BESIDE, "num_visual_prompts": 0, "num_kv_prompts": 16}
"""As many parameters, all of key-value prompts beside the attention."""

METHODS = (
    Method("linear probe", 3e-2, partial(train_parameters, endings=()), cached=True),
    Method("full fine-tuning", 3e-4, partial(train_parameters, endings=("",))),
    Method("BitFit", 1e-2, partial(train_parameters, endings=(".bias",))),
    Method("LayerNorm tuning", 1e-2, tune_norms),
    Method(
        "(IA)³",
        3e-2,
        partial(
            add_adapter, config=IA3Config, target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]
        ),
    ),
    Method("LoRA", 3e-3, partial(add_adapter, config=LoraConfig, **LORA)),
    Method("LoRA and E²VPT", 3e-3, add_lora_and_prompts),
    e2vpt("VPT-Shallow", visual_prompt_depth="shallow", num_kv_prompts=0),
    e2vpt("VPT-Deep", num_kv_prompts=0),
    e2vpt("E²VPT"),
    e2vpt("E²VPT, pruned", pruning=Pruning(), same_search="E²VPT"),
    e2vpt("E²VPT, more prompts", learning_rate=3e-3, kv_lr_ratio=1, **MORE_PROMPTS),
    e2vpt("E²VPT, LoRA's size", learning_rate=3e-3, kv_lr_ratio=1, **LORA_SIZE),
    e2vpt("E²VPT, LoRA's size, GELU", learning_rate=1e-2, kv_lr_ratio=1, **BESIDE),
    e2vpt("E²VPT, all beside", learning_rate=1e-2, kv_lr_ratio=1, **ALL_BESIDE),
    Method("E²VPT, more prompts, norms", 3e-3, partial(add_prompts_and_train_norms, **MORE_PROMPTS), kv_lr_ratio=1),
    replace(e2vpt("E²VPT, prompts searched", learning_rate=1e-2), variants=({}, MORE_PROMPTS)),
)


def choose(methods: tuple[Method, ...], names: list[str] | None) -> list[Method]:
    """Some of the methods, by name.

    Raises:
        ValueError: A name is not there.
    """
    known = [method.name for method in methods]
    if unknown := sorted(set(names or []) - set(known)):
        raise ValueError(f"methods has {unknown}, but must be among {', '.join(map(repr, known))}.")
    return [method for method in methods if names is None or method.name in names]
