"""All that an adapter is at one moment: its values and masks, and the values that it started from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..adapter import PromptedAdapter
from ..masks import PromptMasks
from ..utils.shards import gathered

TOKENS, SEGMENTS = "token_mask", "segment_mask"


@dataclass(frozen=True)
class AdapterSnapshot:
    """The masks of an adapter and the values of all that is trained with it, on the CPU.

    Attributes:
        masks ([`PromptMasks`]): Which prompts are kept.
        values (`Mapping[str, torch.Tensor]`): Trained parameters and buffers, by their names in the model.

    Example:

        ```py
        >>> before = AdapterSnapshot.of(adapter)
        >>> prune_prompts(model, scores, token_rate=0.5)
        >>> before.restore(adapter)
        ```
    """

    masks: PromptMasks
    values: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, adapter: PromptedAdapter) -> AdapterSnapshot:
        """Take one of an adapter, which must be active."""
        return cls(adapter.masks, {name: _copy(tensor) for name, tensor in trained_tensors(adapter)})

    @torch.no_grad()
    def restore(self, adapter: PromptedAdapter) -> None:
        """Give an adapter these masks and values. Parameters that change their size are new tensors."""
        adapter.set_masks(self.masks)
        for name, tensor in trained_tensors(adapter):
            tensor.copy_(self.values[name])

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All of it in one dictionary, for a file."""
        return {**self.values, TOKENS: self.masks.tokens, SEGMENTS: self.masks.segments}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> AdapterSnapshot:
        """What [`to_tensors`] returned, as a snapshot again."""
        values = {name: tensor for name, tensor in tensors.items() if name not in (TOKENS, SEGMENTS)}
        return cls(PromptMasks(tensors[TOKENS], tensors[SEGMENTS]), values)


@dataclass(frozen=True)
class InitialValues:
    """What [`rewind_prompts`] goes back to: the initial prompts, where they are known, and the backbone's modules.

    Attributes:
        values (`Mapping[str, torch.Tensor]`): By layer or module, on the CPU.
    """

    values: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, adapter: PromptedAdapter) -> InitialValues:
        """Those of an adapter."""
        values = {}
        for index, layer in enumerate(adapter.layers):
            for kind, tensor in layer.initial_prompts.get(adapter.name, {}).items():
                values[f"{index}.{kind}"] = _copy(tensor)
        for name, wrapper in adapter.saved_modules.items():
            for key, tensor in wrapper.original_module.state_dict().items():
                values[f"{name}:{key}"] = _copy(tensor)
        return cls(values)

    def restore(self, adapter: PromptedAdapter) -> None:
        """Have [`rewind_prompts`] go back to these values."""
        for index, layer in enumerate(adapter.layers):
            prefix = f"{index}."
            known = {key.removeprefix(prefix): key for key in self.values if key.startswith(prefix)}
            if known:
                layer.initial_prompts[adapter.name] = {kind: self.values[key].clone() for kind, key in known.items()}
        for name, wrapper in adapter.saved_modules.items():
            module = wrapper.original_module
            module.load_state_dict({key: self.values[f"{name}:{key}"] for key in module.state_dict()})


@torch.no_grad()
def copy_trained(source: nn.Module, adapter: PromptedAdapter) -> None:
    """Give an adapter the values of all that is trained in a copy of its model, which may be in shards."""
    copied = [tensor for _, tensor in trained_tensors(PromptedAdapter.find(source, adapter.name))]
    with gathered(copied) as values:
        for (_, tensor), value in zip(trained_tensors(adapter), values, strict=True):
            tensor.copy_(value)


def trained_tensors(adapter: PromptedAdapter) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained parameters, and the buffers of `modules_to_save`, by their names in the model."""
    yield from ((name, tensor) for name, tensor in adapter.model.named_parameters() if tensor.requires_grad)
    for name, wrapper in adapter.saved_modules.items():
        for key, buffer in wrapper.modules_to_save[adapter.name].named_buffers():
            yield f"{name}:{key}", buffer


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone().contiguous()
