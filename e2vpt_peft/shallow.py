"""Shallow visual prompts: real tokens, inserted in front of the first adapted layer and stripped behind the last "
"layer."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attention import extend_mask

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from .layer import E2VPTLayer


class TokenInsertion:
    """Hooks on a stack of layers that insert shallow visual prompts, extend attention masks and strip the prompts
    again.

    Hidden states that leave the stack, recorded ones included, have the backbone's own shapes.

    Args:
        stack (`nn.ModuleList`): The layers of the transformer.
        ancestors (`list[nn.Module]`): The modules around it, which may return recorded hidden states.
        num_special_tokens (`int`): Tokens in front of the image tokens, behind which prompts are inserted.
    """

    def __init__(self, stack: nn.ModuleList, ancestors: list[nn.Module], num_special_tokens: int) -> None:
        self.position = num_special_tokens
        self.owners: dict[int, E2VPTLayer] = {}
        """The adapted attention of each layer in front of which prompts are inserted, by the layer's index."""
        parameters = list(inspect.signature(type(stack[0]).forward).parameters)[1:]  # without self
        self.mask_index = parameters.index("attention_mask") if "attention_mask" in parameters else len(parameters)
        self.handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True)
            for index, layer in enumerate(stack)
        ]
        # In front of transformers' hook that records hidden states, if the model has been run before.
        self.handles.append(stack[-1].register_forward_hook(self._leave_stack, prepend=True))
        self.handles += [module.register_forward_hook(self._leave_model, prepend=True) for module in ancestors]

    def remove(self) -> None:
        """Take off all hooks."""
        for handle in self.handles:
            handle.remove()

    def _enter_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owners = [self.owners[at] for at in sorted(self.owners) if at <= index and self.owners[at].num_tokens()]
        if not owners:
            return args, kwargs
        hidden_states = args[0]
        inserts_here = owners[-1] is self.owners.get(index)
        inserted_before = sum(owner.num_tokens() for owner in (owners[:-1] if inserts_here else owners))
        at = self.mask_index if self.mask_index < len(args) else None
        mask = kwargs.get("attention_mask") if at is None else args[at]
        extended = self._extend_mask(mask, owners, hidden_states, hidden_states.shape[1] - inserted_before)
        if inserts_here:
            tokens = owners[-1].tokens(hidden_states.shape[0]).to(hidden_states.dtype)
            tokens = tokens.expand(hidden_states.shape[0], -1, -1)
            before, after = hidden_states[:, : self.position], hidden_states[:, self.position :]
            args = (torch.cat([before, tokens, after], 1), *args[1:])
        if extended is None:
            return args, kwargs
        if at is None:
            return args, {**kwargs, "attention_mask": extended}
        return (*args[:at], extended, *args[at + 1 :]), kwargs

    def _extend_mask(self, mask: Any, owners: list[E2VPTLayer], hidden_states: torch.Tensor, length: int) -> Any:
        """Keys and queries for the inserted tokens, of which each sample may see its own."""
        for owner in owners:
            count, visible = owner.num_tokens(), owner.visible_tokens(hidden_states.shape[0])
            implementation = owner.config._attn_implementation
            mask = extend_mask(
                mask, count, visible, hidden_states, length, implementation, self.position, insert_queries=True
            )
            length += count
        return mask

    def _leave_stack(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        count = sum(owner.num_tokens() for owner in self.owners.values())
        if isinstance(output, tuple):
            return (self._strip(output[0], count), *output[1:])
        return self._strip(output, count)

    def _leave_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Strip prompts from recorded hidden states, of which the last one that leaves the stack has none."""
        values = output if isinstance(output, tuple) else tuple(output.values()) if isinstance(output, dict) else ()
        if not values or not isinstance(values[0], torch.Tensor) or values[0].dim() != 3:
            return output
        length = values[0].shape[1]
        if isinstance(output, dict):
            for name, value in output.items():
                output[name] = self._strip_all(value, length)
            return output
        return tuple(self._strip_all(value, length) for value in output)

    def _strip_all(self, value: Any, length: int) -> Any:
        if not isinstance(value, tuple):
            return value
        return tuple(
            self._strip(state, state.shape[1] - length)
            if isinstance(state, torch.Tensor) and state.dim() == 3
            else state
            for state in value
        )

    def _strip(self, hidden_states: torch.Tensor, count: int) -> torch.Tensor:
        if count <= 0:
            return hidden_states
        return torch.cat([hidden_states[:, : self.position], hidden_states[:, self.position + count :]], 1)
