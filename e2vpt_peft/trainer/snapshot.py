"""All that an adapter is, as named tensors: its values and masks, and the values that it started from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..importance import prompted_layers
from ..masks import segment_mask, token_mask
from ..pruning import set_masks
from ..shards import gathered

Snapshot = dict[str, torch.Tensor]
TOKENS, SEGMENTS = "token_mask", "segment_mask"


def take_snapshot(model: nn.Module, adapter_name: str) -> Snapshot:
    """The masks of an adapter and the values of all that is trained with it, on the CPU.

    Args:
        model (`nn.Module`): The adapted model.
        adapter_name (`str`): The adapter, which must be active.

    Returns:
        `dict[str, torch.Tensor]`: To be given to [`restore_snapshot`].
    """
    config = prompted_layers(model, adapter_name)[1][0].adapter_configs[adapter_name]
    values = {name: _copy(tensor) for name, tensor in _trained(model, adapter_name)}
    return {**values, TOKENS: token_mask(config), SEGMENTS: segment_mask(config)}


@torch.no_grad()
def restore_snapshot(model: nn.Module, adapter_name: str, snapshot: Snapshot) -> None:
    """Give an adapter the masks and values of a snapshot. Parameters that change their size are new tensors."""
    set_masks(model, snapshot[TOKENS], snapshot[SEGMENTS], adapter_name)
    for name, tensor in _trained(model, adapter_name):
        tensor.copy_(snapshot[name])


@torch.no_grad()
def copy_trained(source: nn.Module, target: nn.Module, adapter_name: str) -> None:
    """Give a model the values of all that is trained in a copy of it, which may be in shards."""
    copied = [tensor for _, tensor in _trained(source, adapter_name)]
    with gathered(copied) as values:
        for (_, tensor), value in zip(_trained(target, adapter_name), values, strict=True):
            tensor.copy_(value)


def take_initial_values(model: nn.Module, adapter_name: str) -> Snapshot:
    """What [`rewind_prompts`] goes back to: the initial prompts, where they are known, and the backbone's modules."""
    values = {}
    for index, layer in enumerate(prompted_layers(model, adapter_name)[1]):
        for kind, tensor in layer.initial_prompts.get(adapter_name, {}).items():
            values[f"{index}.{kind}"] = _copy(tensor)
    for name, wrapper in _saved_modules(model, adapter_name):
        for key, tensor in wrapper.original_module.state_dict().items():
            values[f"{name}:{key}"] = _copy(tensor)
    return values


def restore_initial_values(model: nn.Module, adapter_name: str, values: Snapshot) -> None:
    """Have [`rewind_prompts`] go back to these values."""
    for index, layer in enumerate(prompted_layers(model, adapter_name)[1]):
        known = {kind: values[f"{index}.{kind}"].clone() for kind in ("visual", "kv") if f"{index}.{kind}" in values}
        if known:
            layer.initial_prompts[adapter_name] = known
    for name, wrapper in _saved_modules(model, adapter_name):
        module = wrapper.original_module
        module.load_state_dict({key: values[f"{name}:{key}"] for key in module.state_dict()})


def _trained(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, wrapper in _saved_modules(model, adapter_name):
        for key, buffer in wrapper.modules_to_save[adapter_name].named_buffers():
            yield f"{name}:{key}", buffer


def _saved_modules(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            yield name, module


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone().contiguous()
