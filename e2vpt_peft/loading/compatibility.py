"""Whether an adapter fits a model: its targets, its `modules_to_save` and the backbone that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..attention.site import AttentionSite
from ..attention.tokens import find_stack
from ..config import E2VPTConfig
from ..saved_weights import NOTHING_LOADED

SIZES = {
    "num_layers": "number of layers",
    "hidden_size": "hidden size",
    "num_heads": "heads",
    "head_size": "head size",
}
"""What has to agree between an adapter and a backbone, and how messages call it."""


def check_model(
    config: E2VPTConfig,
    model: nn.Module,
    sites: Mapping[str, AttentionSite],
    is_target: Callable[[E2VPTConfig, str], bool],
) -> dict[str, Any] | None:
    """Refuse an adapter that a model cannot take.

    Args:
        config ([`E2VPTConfig`]): The adapter's configuration.
        model (`nn.Module`): The model, with the adapters that it has.
        sites (`Mapping[str, AttentionSite]`): The self-attention modules to adapt, by their names.
        is_target (`Callable`): Whether a configuration adapts the module of that name.

    Returns:
        `dict`: The sizes of the backbone, for the configuration to remember, see [`describe_backbone`].

    Raises:
        ValueError: It cannot. Nothing has been changed.
    """
    backbone = config.backbone
    _check_task(config, model)
    check_modules_to_save(model, config.modules_to_save)
    _check_modules_can_be_wrapped(model, config, sites)
    names = [name for name, _ in model.named_modules() if name and ".base_layer" not in name]
    in_any_layer = replace(config, layers_to_transform=None, layers_pattern=None)
    num_layers = sum(is_target(in_any_layer, name) for name in names)
    if config.target_modules == DUMMY_TARGET_MODULES:  # for which PEFT makes adapters without layers
        raise ValueError(f"target_modules={config.target_modules!r} matches no self-attention module.")
    if num_layers:  # otherwise PEFT complains about the targets
        backbone = describe_backbone(list(sites.values()), num_layers)
        check_backbone_sizes(config, backbone)
    _check_segments(config, sites)
    _check_layers_to_transform(config, names, is_target)
    if config.visual_prompt_depth == "shallow" and config.num_visual_prompts:
        _check_tokens_can_be_inserted(model, sites)
    return backbone


def check_modules_to_save(model: nn.Module, modules_to_save: Sequence[str] | None) -> None:
    """Refuse `modules_to_save` that cannot be trained.

    Raises:
        ValueError: One of them is quantised.
    """
    for name, module in matching_modules(model, modules_to_save or []).items():
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save={list(modules_to_save or [])} includes '{name}', which is quantised and cannot be "
                f"trained. Load the model without quantising it: for bitsandbytes, "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=['{name.rpartition('.')[2]}'])."
            )


def matching_modules(model: nn.Module, modules_to_save: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that PEFT takes for the `modules_to_save`, by their names, without what is inside of its wrappers.

    Args:
        model (`nn.Module`): The model.
        modules_to_save (`Sequence[str]`): The endings of their names.
    """
    endings = tuple(modules_to_save)
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name.endswith(endings) and not {"modules_to_save", "original_module"}.intersection(name.split("."))
    }


def _check_modules_can_be_wrapped(model: nn.Module, config: E2VPTConfig, sites: Mapping[str, AttentionSite]) -> None:
    """PEFT says so when the adapter is in the model already, or when it is loaded."""
    found = matching_modules(model, config.modules_to_save or [])
    refusal = f"modules_to_save={list(config.modules_to_save or [])} "
    adapted = tuple(f"{name}." for name in sites)
    for name, module in found.items():
        if isinstance(module, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise ValueError(
                f"{refusal}includes '{name}', which is a {type(module).__name__} and is never called itself: name the "
                "modules in it."
            )
        name = name.replace(".base_layer", "")
        if name.startswith(adapted) or name in sites:
            raise ValueError(
                f"{refusal}includes '{name}', which is in an attention that gets prompts, where PEFT cannot copy a "
                "module. Train it with LoRA, or leave that attention to modules_to_save alone (exclude_modules)."
            )
        outer = next((other for other in found if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(
                f"{refusal}includes '{outer}' and, inside of it, '{name}': PEFT would copy the one into the other. "
                "Write out more of the name of the one that is meant."
            )


def _check_task(config: E2VPTConfig, model: nn.Module) -> None:
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"task_type={str(config.task_type)!r} is for models that generate, which {type(model).__name__} does not: "
            "leave task_type out."
        )


def _check_segments(config: E2VPTConfig, sites: Mapping[str, AttentionSite]) -> None:
    for name, site in sites.items():
        if config.num_visual_prompts and site.hidden_size % config.num_segments:
            raise ValueError(
                f"num_segments={config.num_segments} does not divide the hidden size {site.hidden_size} of "
                f"'{name}': choose a divisor of {site.hidden_size}."
            )


def _check_layers_to_transform(
    config: E2VPTConfig, names: Sequence[str], is_target: Callable[[E2VPTConfig, str], bool]
) -> None:
    requested = config.layers_to_transform
    for index in [requested] if isinstance(requested, int) else requested or []:
        only = replace(config, layers_to_transform=[index])
        if not any(is_target(only, name) for name in names):
            raise ValueError(
                f"layers_to_transform={requested!r}: there is no layer {index} among the modules that "
                "target_modules matches. Layers are counted from 0."
            )


def _check_tokens_can_be_inserted(model: nn.Module, sites: Mapping[str, AttentionSite]) -> None:
    for name, site in sites.items():
        if not site.takes_tokens:
            raise ValueError(
                f"visual_prompt_depth='shallow': no tokens can be inserted in front of '{name}' "
                f"({type(site.attention).__name__}), whose windows or positions would not fit. Use "
                "visual_prompt_depth='deep'."
            )
    stacks = {id(find_stack(model, name).layers) for name in sites}
    if len(stacks) > 1:
        raise ValueError(
            f"visual_prompt_depth='shallow': the targets {list(sites)} stand in {len(stacks)} stacks of layers, but "
            "shallow prompts go through one. Narrow target_modules, or use visual_prompt_depth='deep'."
        )


def describe_backbone(sites: Sequence[AttentionSite], num_layers: int) -> dict[str, Any]:
    """The sizes of a backbone that an adapter depends on.

    Args:
        sites (`Sequence[AttentionSite]`): The adapted self-attention modules.
        num_layers (`int`): The number of layers to choose from.

    Returns:
        `dict`: For each of [`SIZES`] a number, or a list with a number for each site where they differ.
    """
    description: dict[str, Any] = {"num_layers": num_layers}
    for name in ("hidden_size", "num_heads", "head_size"):
        values = [getattr(site, name) for site in sites]
        if values:
            description[name] = values[0] if len(set(values)) == 1 else values
    return description


def check_backbone_sizes(config: E2VPTConfig, found: Mapping[str, Any]) -> None:
    """Refuse to put an adapter into a backbone other than the one that it was made for.

    Args:
        config ([`E2VPTConfig`]): The adapter's configuration, with `backbone` if it was saved.
        found (`Mapping[str, Any]`): The description of the backbone at hand.

    Raises:
        ValueError: The sizes differ; the message has them all.
    """
    made_for = config.backbone or {}
    differences = [
        f"{label} {made_for[name]} (this model: {found[name]})"
        for name, label in SIZES.items()
        if name in made_for and name in found and made_for[name] != found[name]
    ]
    if differences:
        misfit = explain_misfit(differences, config.base_model_name_or_path)
        raise ValueError(
            f"{misfit} If the adapter is a new one, give it a new configuration: this one belongs to the model that "
            "it was used with first."
        )


def explain_misfit(differences: list[str], base_model: str | None = None) -> str:
    """Why an adapter does not fit a model, and which it is for."""
    backbone = f" ({base_model})" if base_model else ""
    return (
        f"The adapter does not fit this model: it was made for a backbone with {', '.join(differences)}. "
        f"Load it into the backbone that it was trained on{backbone}. {NOTHING_LOADED}"
    )
