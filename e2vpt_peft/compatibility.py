"""Whether an adapter fits a model: its name, and the backbone that it was made for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

import torch
from torch import nn

from .adapter_file import NOTHING_LOADED, check_finite, is_prompt
from .architectures import AttentionSite
from .config import E2VPTConfig
from .layer import E2VPTLayer
from .routing import BASE_MODEL

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
        ValueError: The name is taken, reserved, one that PyTorch cannot give to a parameter, or the name of a part of
        the model: PEFT tells adapters apart by the names of their parameters, so that of other adapters it would leave
        out whatever is in that part when it saves them.
    """
    refusal = f"adapter_name={adapter_name!r} "
    if any(isinstance(layer, E2VPTLayer) and adapter_name in layer.adapter_configs for layer in model.modules()):
        raise ValueError(refusal + "is the name of an adapter that the model has already.")
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


def check_backbone(config: E2VPTConfig, found: Mapping[str, Any]) -> None:
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
        raise ValueError(_misfit(differences, config.base_model_name_or_path))


def check_prompts(layers: Mapping[str, E2VPTLayer], model: nn.Module, prompts: Mapping[str, torch.Tensor]) -> None:
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
        site = layers[name].site
        sizes: dict[str, tuple[int, int]] = {}
        if kind == "e2vpt_visual_prompts" and tensor.dim() == 2:  # with pruned segments they are one flat tensor
            sizes = {"hidden_size": (tensor.shape[-1], site.hidden_size)}
        elif kind == "e2vpt_kv_prompts" and tensor.dim() in (3, 4):
            sizes = {
                "num_heads": (tensor.shape[-3], site.num_heads),
                "head_size": (tensor.shape[-1], site.head_size),
            }
        for size, (saved, here) in sizes.items():
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


def check_backbone_untouched(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
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


def _misfit(differences: list[str], base_model: Optional[str] = None) -> str:
    backbone = f" ({base_model})" if base_model else ""
    return (
        f"The adapter does not fit this model: it was made for a backbone with {', '.join(differences)}. "
        f"Load it into the backbone that it was trained on{backbone}. {NOTHING_LOADED}"
    )
