"""Whether an adapter fits a model: its name, its targets, the backbone that it was made for, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..adapter import adapter_names
from ..adapter_file import NOTHING_LOADED, check_finite, is_prompt
from ..attention.site import AttentionSite
from ..attention.tokens import find_stack
from ..config import E2VPTConfig
from ..layer import E2VPTLayer
from ..prompt_shapes import sizes_in
from ..route import BASE_MODEL

PEFT_PREFIX = "base_model.model."
"""What PEFT puts in front of the names of parameters in a saved adapter."""
SIZES = {
    "num_layers": "number of layers",
    "hidden_size": "hidden size",
    "num_heads": "heads",
    "head_size": "head size",
}
"""What has to agree between an adapter and a backbone, and how messages call it."""


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse the name of a new adapter that cannot be used, before anything is changed.

    Args:
        model (`nn.Module`): The model, with the adapters that it has.
        adapter_name (`str`): The name of the new one.

    Raises:
        ValueError:
            The name is taken, reserved, one that PyTorch cannot give to a parameter, or the name of a part of the
            model: PEFT tells adapters apart by the names of their parameters, so that of other adapters it would leave
            out whatever is in that part when it saves them.
    """
    refusal = f"adapter_name={adapter_name!r} "
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"Adapter with name '{adapter_name}' already exists. Choose another adapter_name, or delete that adapter "
            "first."
        )
    if adapter_name == BASE_MODEL:
        raise ValueError(refusal + "stands for the model without an adapter: choose another name.")
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            refusal + "must have at least one character and no dot, as it becomes part of parameter names."
        )
    if any(hasattr(container, adapter_name) for container in (nn.ParameterDict(), nn.ModuleDict())):
        raise ValueError(refusal + "is the name of a method of PyTorch's containers: choose another name.")
    if adapter_name in _names_of_parts(model):
        raise ValueError(
            refusal + "is also the name of a part of the model, which would spoil other adapters on saving: choose "
            "another name."
        )


def _names_of_parts(model: nn.Module) -> set[str]:
    names = {
        "base_model",
        "model",
        "base_layer",
        "modules_to_save",
        "original_module",
        *E2VPTLayer.adapter_layer_names,
    }
    for module in model.modules():
        if not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):  # whose entries may be adapters
            names.update(name for name, _ in module.named_children())
            names.update(name for name, _ in module.named_parameters(recurse=False))
    return names


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
    check_modules_to_save(model, config.modules_to_save)
    names = [name for name, _ in model.named_modules() if name and ".base_layer" not in name]
    in_any_layer = replace(config, layers_to_transform=None, layers_pattern=None)
    num_layers = sum(is_target(in_any_layer, name) for name in names)
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
    for name, module in model.named_modules():
        if not any(name.endswith(ending) for ending in modules_to_save or []):  # as PEFT finds them
            continue
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save={list(modules_to_save or [])} includes '{name}', which is quantised and cannot be "
                f"trained. Load the model without quantising it: for bitsandbytes, "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=['{name.rpartition('.')[2]}'])."
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
        raise ValueError(
            f"{_misfit(differences, config.base_model_name_or_path)} If the adapter is a new one, give it a new "
            "configuration: this one belongs to the model that it was used with first."
        )


def check_saved_prompts(
    layers: Mapping[str, E2VPTLayer], model: nn.Module, prompts: Mapping[str, torch.Tensor]
) -> None:
    """Refuse saved prompts that cannot be for this model, before any of them is loaded.

    Only what comes from the backbone is checked: keys that are missing or too many, and numbers of prompts, are
    reported by PEFT, which can be told to ignore them.

    Args:
        layers (`Mapping[str, E2VPTLayer]`): The adapted modules of the model, by their names.
        model (`nn.Module`): The model that these are in.
        prompts (`Mapping[str, torch.Tensor]`): Saved prompts, by their names in that model.

    Raises:
        ValueError: Sizes differ; the message has them all. Or values are not finite.
    """
    differences: dict[str, str] = {}
    for key, tensor in prompts.items():
        name, _, kind = key.rpartition(".")
        if name not in layers:
            continue
        for size, saved in sizes_in(kind, tensor.shape).items():
            here = getattr(layers[name].site, size)
            if saved != here:
                differences.setdefault(size, f"{SIZES[size]} {saved} (this model: {here})")
    known = {name for name, _ in model.named_modules()}
    saved_for = {key.rpartition(".")[0] for key in prompts}
    if saved_for - known and saved_for > set(layers):
        differences["num_layers"] = f"{SIZES['num_layers']} {len(saved_for)} (this model: {len(layers)})"
    if differences:
        raise ValueError(_misfit([differences[size] for size in SIZES if size in differences]))
    for key, tensor in prompts.items():
        check_finite(key, tensor, "The state dict of the adapter")


def check_nothing_overwritten(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Refuse saved tensors that would be loaded into the backbone, or into another adapter.

    Args:
        model (`nn.Module`): The model that they are for.
        adapter_name (`str`): The adapter that is loaded.
        names (`Iterable[str]`): Names of saved tensors, those of `modules_to_save` in the model's own form.

    Raises:
        ValueError: There are such.
    """
    own = f".modules_to_save.{adapter_name}."
    there = {name.removeprefix(PEFT_PREFIX) for name in model.state_dict()}
    foreign = [name for name in names if not is_prompt(name) and own not in name]
    foreign = [name for name in foreign if name.removeprefix(PEFT_PREFIX) in there]
    if foreign:
        raise ValueError(
            f"The state dict of the adapter has '{foreign[0]}' ({len(foreign)} such tensors), which is a weight of "
            "the model and neither a prompt nor of modules_to_save: loading it would overwrite the model. "
            f"{NOTHING_LOADED}"
        )


def _misfit(differences: list[str], base_model: str | None = None) -> str:
    backbone = f" ({base_model})" if base_model else ""
    return (
        f"The adapter does not fit this model: it was made for a backbone with {', '.join(differences)}. "
        f"Load it into the backbone that it was trained on{backbone}. {NOTHING_LOADED}"
    )
