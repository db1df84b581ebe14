"""Shallow visual prompts: real tokens, inserted in front of the first adapted layer and stripped behind the last."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .mask import extend_mask
from .prefix import WayIn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class TokenSource(Protocol):
    """What gives the tokens to insert, at each forward pass anew."""

    @property
    def implementation(self) -> str:
        """The attention implementation that the model is set to."""

    def num_inserted_tokens(self) -> int:
        """How many tokens the running forward pass inserts."""

    def inserted_tokens(self, batch_size: int) -> torch.Tensor:
        """The tokens, (batch size or 1, number, hidden size)."""

    def inserted_visibility(self, batch_size: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which of them each sample may see, bool, and what is added to their scores, both (batch size, number)."""


class TokenInsertion(WayIn):
    """The way in through a stack of layers: hooks that insert tokens, extend attention masks and strip the tokens
    again.

    Hidden states that leave the stack, recorded ones included, have the backbone's own shapes.

    Args:
        stack (`nn.ModuleList`): The layers of the transformer.
        ancestors (`list[nn.Module]`): The modules around it, which may return recorded hidden states.
        position (`int`): The number of special tokens in front of the others, behind which tokens are inserted.
    """

    def __init__(self, stack: nn.ModuleList, ancestors: list[nn.Module], position: int) -> None:
        self.stack, self.ancestors, self.position = stack, ancestors, position
        self.sources: dict[int, TokenSource] = {}
        """What gives the tokens in front of each layer, by the layer's index."""
        parameters = list(inspect.signature(type(stack[0]).forward).parameters)[1:]  # without self
        self.mask_index = parameters.index("attention_mask") if "attention_mask" in parameters else len(parameters)
        self.handles: list[RemovableHandle] = []

    def attach(self, attention: nn.Module, source: TokenSource) -> None:
        self.sources[self._index_of(attention)] = source
        if self.handles:
            return
        self.handles += [
            layer.register_forward_pre_hook(partial(self._enter_layer, index), with_kwargs=True)
            for index, layer in enumerate(self.stack)
        ]
        # In front of transformers' hook that records hidden states, if the model has been run before.
        self.handles.append(self.stack[-1].register_forward_hook(self._leave_stack, prepend=True))
        self.handles += [module.register_forward_hook(self._leave_model, prepend=True) for module in self.ancestors]

    def detach(self, attention: nn.Module) -> None:
        del self.sources[self._index_of(attention)]
        if not self.sources:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()

    def _index_of(self, attention: nn.Module) -> int:
        return next(
            index for index, layer in enumerate(self.stack) if any(part is attention for part in layer.modules())
        )

    def _enter_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sources = [self.sources[at] for at in sorted(self.sources) if at <= index]
        sources = [source for source in sources if source.num_inserted_tokens()]
        if not sources:
            return args, kwargs
        hidden_states = args[0]
        inserts_here = sources[-1] is self.sources.get(index)
        earlier = sources[:-1] if inserts_here else sources
        inserted_before = sum(source.num_inserted_tokens() for source in earlier)
        at = self.mask_index if self.mask_index < len(args) else None
        mask = kwargs.get("attention_mask") if at is None else args[at]
        extended = self._extend_mask(mask, sources, hidden_states, hidden_states.shape[1] - inserted_before)
        if inserts_here:
            if self.position > hidden_states.shape[1]:
                raise ValueError(
                    f"num_special_tokens={self.position} is beyond the {hidden_states.shape[1]} tokens of the "
                    "sequence: set it to the number of tokens in front of the others."
                )
            tokens = sources[-1].inserted_tokens(hidden_states.shape[0]).to(hidden_states.dtype)
            tokens = tokens.expand(hidden_states.shape[0], -1, -1)
            before, after = hidden_states[:, : self.position], hidden_states[:, self.position :]
            args = (torch.cat([before, tokens, after], 1), *args[1:])
        if extended is None:
            return args, kwargs
        if at is None:
            return args, {**kwargs, "attention_mask": extended}
        return (*args[:at], extended, *args[at + 1 :]), kwargs

    def _extend_mask(self, mask: Any, sources: list[TokenSource], hidden_states: torch.Tensor, length: int) -> Any:
        """Keys and queries for the inserted tokens, of which each sample may see its own."""
        for source in sources:
            count = source.num_inserted_tokens()
            visible, bias = source.inserted_visibility(hidden_states.shape[0])
            mask = extend_mask(
                mask,
                count,
                hidden_states,
                length,
                source.implementation,
                visible=visible,
                bias=bias,
                position=self.position,
                insert_queries=True,
            )
            length += count
        return mask

    def _leave_stack(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        count = sum(source.num_inserted_tokens() for source in self.sources.values())
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


def find_stack(model: nn.Module, name: str) -> tuple[nn.ModuleList, list[nn.Module]]:
    """The stack of layers that a module is in, and the modules around the stack.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the module in it.

    Raises:
        ValueError: It is in no stack.
    """
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = model.get_submodule(".".join(path[:depth]))
        if isinstance(parent, nn.ModuleList):
            return parent, [model.get_submodule(".".join(path[:above])) for above in range(depth)]
    raise ValueError(
        f"visual_prompt_depth='shallow': '{name}' is in no stack (nn.ModuleList) of layers. Use "
        "visual_prompt_depth='deep'."
    )
