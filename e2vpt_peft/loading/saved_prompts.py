"""Whether saved prompts are all those of an adapter in a model, and no others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import nn

from ..adapter import PromptedAdapter
from ..config import E2VPTConfig
from ..layer import E2VPTLayer
from ..masks import PromptMasks
from ..prompt_shapes import SEGMENT_MASK, Sizes, saved_shapes, sizes_in
from ..saved_weights import (
    NOTHING_LOADED,
    PEFT_PREFIX,
    check_finite,
    check_segment_mask,
    is_prompt,
    some,
)
from .compatibility import SIZES, explain_misfit
from .former_names import former_names
from .layer_names import match_layers

Shape = tuple[int, ...]


class ExpectedPrompts(NamedTuple):
    """The prompts of one adapter in a model.

    Attributes:
        shapes (`Mapping[str, tuple[int, ...]]`): Their shapes, by the names that they have in a saved adapter.
        sizes (`Mapping[str, Sizes]`): The sizes of the attention of each layer, by its name.
        former (`Mapping[str, str]`): Names of attention modules by those of a former layout.
        modules (`Set[str]`): The names of all modules of the model.
    """

    shapes: Mapping[str, Shape]
    sizes: Mapping[str, Sizes]
    former: Mapping[str, str]
    modules: Set[str]


def prompts_to_come(config: E2VPTConfig, model: nn.Module, sites: Mapping[str, Sizes]) -> ExpectedPrompts:
    """The prompts that an adapter is about to have in a model.

    Args:
        config ([`E2VPTConfig`]): Its configuration.
        model (`nn.Module`): The model.
        sites (`Mapping[str, Sizes]`): The self-attention modules that it adapts, by their names, in their order.
    """
    masks = PromptMasks.of(config)
    is_deep = config.visual_prompt_depth == "deep"
    shapes: dict[str, Shape] = {}
    for number, (name, site) in enumerate(sites.items()):
        for kind, shape in saved_shapes(config, site, masks, is_deep or number == 0).items():
            shapes[f"{name}.{kind}"] = shape
    return ExpectedPrompts(shapes, dict(sites), former_names(model), _module_names(model))


def prompts_in(model: nn.Module, adapter_name: str) -> ExpectedPrompts:
    """The prompts that an adapter has in a model.

    Args:
        model (`nn.Module`): The model, without PEFT's wrapper around it.
        adapter_name (`str`): The adapter.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, E2VPTLayer)}
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.adapter_configs}
    shapes: dict[str, Shape] = {}
    for name, layer in layers.items():
        config, has_visual_prompts = layer.adapter_configs[adapter_name], layer.has_visual_prompts(adapter_name)
        for kind, shape in saved_shapes(config, layer.site, PromptMasks.of(config), has_visual_prompts).items():
            shapes[f"{name}.{kind}"] = shape
    sites = {name: layer.site for name, layer in layers.items()}
    return ExpectedPrompts(shapes, sites, former_names(model), _module_names(model))


def _module_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def check_prompts(saved: Mapping[str, Shape], expected: ExpectedPrompts, where: str) -> dict[str, str]:
    """Refuse saved prompts that are not all that the adapter has in this model, and no others.

    A prompt that is missing would stay random, and one that has no place would be left out without a word.

    Args:
        saved (`Mapping[str, tuple[int, ...]]`): The shapes of saved tensors by their names, prompts or not.
        expected ([`ExpectedPrompts`]): What the adapter has.
        where (`str`): What they were saved in, for the message.

    Returns:
        `dict[str, str]`: The names of the prompts in the model by their saved names, both as in a saved adapter.

    Raises:
        ValueError: Prompts are missing, are for other layers or of other shapes.
    """
    split = {name: name.removeprefix(PEFT_PREFIX).rpartition(".") for name in saved if is_prompt(name)}
    layers = {layer for layer, _, _ in split.values()}
    found = match_layers(layers, {name.rpartition(".")[0] for name in expected.shapes}, expected.former)
    names = {name: f"{found[layer]}.{kind}" for name, (layer, _, kind) in split.items()}
    shapes = {names[name]: tuple(saved[name]) for name in names}
    _check_sizes(shapes, expected)
    wrong = {name: shape for name, shape in shapes.items() if expected.shapes.get(name, shape) != shape}
    optional = {name for name in expected.shapes if name.endswith(f".{SEGMENT_MASK}")}  # a number of releases lack it
    missing = sorted(set(expected.shapes) - set(shapes) - optional)
    unknown = sorted(set(shapes) - set(expected.shapes))
    faults = [f"it has no {some(missing)}, which would stay random"] if missing else []
    faults += [f"it has {some(unknown)}, for which there is no place"] if unknown else []
    faults += [f"'{name}' has shape {shape}, but here it has {expected.shapes[name]}" for name, shape in wrong.items()]
    if faults or len(shapes) < len(names):
        raise ValueError(
            f"{where} has other prompts than the adapter has in this model: {'; '.join(faults[:3])}. It was saved "
            "with another configuration, from another model, or not whole. Into a new adapter, load_adapter(folder, "
            "another_name) loads a file with the configuration that is beside it; load_state_dict(strict=False) "
            f"replaces some of the prompts only. {NOTHING_LOADED}"
        )
    return {name: f"{PEFT_PREFIX}{known}" for name, known in names.items()}


def _check_sizes(shapes: Mapping[str, Shape], expected: ExpectedPrompts) -> None:
    """Of another backbone, the sizes that differ say more than shapes."""
    differences: dict[str, str] = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        for size, saved in sizes_in(kind, shape).items() if layer in expected.sizes else ():
            here = getattr(expected.sizes[layer], size)
            if saved not in (here, 0):  # nothing is that of no backbone
                differences.setdefault(size, f"{SIZES[size]} {saved} (this model: {here})")
    layers, present = ({name.rpartition(".")[0] for name in names} for names in (shapes, expected.shapes))
    if layers > present and layers - expected.modules:
        differences["num_layers"] = f"{SIZES['num_layers']} {len(layers)} (this model: {len(present)})"
    if differences:
        raise ValueError(explain_misfit([differences[size] for size in SIZES if size in differences]))


def check_values(tensors: Mapping[str, torch.Tensor], config: E2VPTConfig) -> None:
    """Refuse prompts that are not finite, or of other segments than the configuration says.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): Saved prompts by their names.
        config ([`E2VPTConfig`]): The configuration of the adapter that they are for.

    Raises:
        ValueError: They are.
    """
    where = "The state dict of the adapter"
    segments = PromptMasks.of(config).segments.tolist()
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point and not name.endswith(f".{SEGMENT_MASK}"):
            raise ValueError(f"{where}: '{name}' has type {tensor.dtype}, but prompts are floating-point.")
        check_finite(name, tensor, where)
        if name.endswith(f".{SEGMENT_MASK}"):
            check_segment_mask(tensor, segments, where)


def check_before_saving(prompts: Mapping[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
    """Refuse to save an adapter that could not be loaded again; values that are not finite, a warning tells.

    Args:
        prompts (`Mapping[str, torch.Tensor]`): What is about to be saved, by the names that it has in the file.
        model (`nn.Module`): The model that it is from.
        adapter_name (`str`): The adapter.

    Raises:
        ValueError: Prompts are missing, or have other shapes than in the model.
    """
    backbone = model.get_base_model() if isinstance(model, PeftModel) else model
    expected = prompts_in(backbone, adapter_name)
    shapes = {name: tuple(tensor.shape) for name, tensor in prompts.items()}
    check_prompts(shapes, expected, f"What is about to be saved of adapter '{adapter_name}'")
    try:
        check_values(prompts, PromptedAdapter.find(backbone, adapter_name).config)
    except ValueError as error:
        warnings.warn(f"The adapter is saved, but cannot be loaded. {error}", RuntimeWarning, stacklevel=2)
