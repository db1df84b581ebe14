"""Shallow visual prompts: real tokens, inserted in front of the first adapted layer and stripped behind the last."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .mask import extend_mask
from .prefix import WayIn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class TokenSource(Protocol):
    """What gives the tokens to insert, at each forward pass anew."""

    config: Any
    """The attention's own config."""

    @property
    def implementation(self) -> str:
        """The attention implementation that the model is set to."""

    def num_inserted_tokens(self) -> int:
        """How many tokens the running forward pass inserts."""

    def inserted_tokens(self, batch_size: int) -> torch.Tensor:
        """The tokens, (batch size or 1, number, hidden size)."""

    def inserted_visibility(
        self, batch_size: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which of them each sample may see, bool, and what is added to their scores, both (batch size, number)."""


@dataclass(frozen=True)
class Stack:
    """The layers of a transformer.

    Attributes:
        ancestors (`tuple[nn.Module, ...]`): The modules around the layers, from the model to the one that runs them.
        name (`str`): What the last of those calls its layers.
    """

    ancestors: tuple[nn.Module, ...]
    name: str

    @property
    def layers(self) -> nn.ModuleList:
        """Looked up at every call, because users cut layers off an adapted model."""
        layers: nn.ModuleList = getattr(self.ancestors[-1], self.name)
        return layers


@dataclass(frozen=True)
class StackPass:
    """One pass through a stack of layers.

    Attributes:
        insertion (`TokenInsertion`): What inserts tokens into it.
        num_inserted (`int`): How many of its sources have their tokens among the hidden states now.
        outer (`StackPass`, *optional*): The pass that this one is in, of another model.
    """

    insertion: TokenInsertion
    num_inserted: int = 0
    outer: StackPass | None = None


class _ThisThread(threading.local):
    """A thread-local object rather than a context variable, because `torch.compile` traces the one and not the
    other."""

    def __init__(self) -> None:
        self.running: StackPass | None = None


_this_thread = _ThisThread()


class TokenInsertion(WayIn):
    """The way in through a stack of layers: hooks that insert tokens, extend attention masks and strip the tokens
    again.

    Tokens are inserted in front of the layer that has them, or of the first layer that runs behind it, if that one is
    dropped (LayerDrop); they are stripped behind the last layer, or else where the module that runs the layers ends.
    Hidden states that leave this module, recorded ones included, have the backbone's own shapes.

    Args:
        stack ([`Stack`]): The layers.
        position (`int`): The number of special tokens in front of the others, behind which tokens are inserted.
    """

    def __init__(self, stack: Stack, position: int) -> None:
        self.stack, self.position = stack, position
        self.sources: list[tuple[nn.Module, TokenSource]] = []
        """Layers, and what gives the tokens in front of them."""
        parameters = list(inspect.signature(type(stack.layers[0]).forward).parameters)[1:]  # without self
        self.mask_index = parameters.index("attention_mask") if "attention_mask" in parameters else len(parameters)
        self.handles: list[RemovableHandle] = []

    def attach(self, attention: nn.Module, source: TokenSource) -> None:
        self.sources.append((self._layer_around(attention), source))
        if self.handles:
            return
        *others, runner = self.stack.ancestors
        self.handles.append(runner.register_forward_pre_hook(self._enter_stack))
        for layer in self.stack.layers:
            self.handles.append(layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
            # In front of transformers' hook that records hidden states, if the model has been run before.
            self.handles.append(layer.register_forward_hook(self._leave_layer, prepend=True))
        self.handles.append(runner.register_forward_hook(self._leave_stack, prepend=True, always_call=True))
        self.handles += [module.register_forward_hook(self._leave_model, prepend=True) for module in others]

    def detach(self, attention: nn.Module) -> None:
        layer = self._layer_around(attention)
        self.sources = [(other, source) for other, source in self.sources if other is not layer]
        if not self.sources:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()

    def _layer_around(self, attention: nn.Module) -> nn.Module:
        return next(layer for layer in self.stack.layers if any(part is attention for part in layer.modules()))

    def _running_sources(self) -> list[tuple[int, TokenSource]]:
        """What inserts tokens in the running forward pass, in the order of the layers, whose indices are given."""
        layers = list(self.stack.layers)
        sources = [(_index(layers, layer), source) for layer, source in self.sources if source.num_inserted_tokens()]
        if any(index is None for index, _ in sources):
            raise RuntimeError(
                f"A layer with shallow visual prompts was taken out of '{self.stack.name}' after adapting: cut the "
                "layers first, then adapt the model, or use visual_prompt_depth='deep'."
            )
        return sorted(((index or 0, source) for index, source in sources), key=itemgetter(0))

    def _num_inserted(self, layer: nn.Module, index: int, sources: list[tuple[int, TokenSource]]) -> int:
        """How many of the sources have their tokens among the states that enter a layer."""
        if self._is_checkpointed(layer):
            # It may run once more in the backward pass, when nothing is known of the forward pass any more.
            if getattr(sources[0][1].config, "layerdrop", 0):
                raise RuntimeError(
                    f"layerdrop={sources[0][1].config.layerdrop} drops layers, which shallow visual prompts cannot "
                    "follow under gradient checkpointing: set model.config.layerdrop = 0, or use "
                    "visual_prompt_depth='deep'."
                )
            return sum(at < index for at, _ in sources)
        running = _this_thread.running
        if running is None or running.insertion is not self:
            runner = type(self.stack.ancestors[-1]).__name__
            raise RuntimeError(
                f"{type(layer).__name__} was called by itself. Shallow visual prompts need a call of {runner}, which "
                "runs all layers: use that, or visual_prompt_depth='deep', or model.disable_adapter()."
            )
        return running.num_inserted

    def _is_checkpointed(self, layer: nn.Module) -> bool:
        """Whether layers, all or some, are computed again in the backward pass."""
        return layer.training and any(getattr(other, "gradient_checkpointing", False) for other in self.stack.layers)

    def _note(self, layer: nn.Module, num_inserted: int) -> None:
        running = _this_thread.running
        if running is not None and not self._is_checkpointed(layer) and running.num_inserted != num_inserted:
            _this_thread.running = StackPass(self, num_inserted, running.outer)

    def _enter_stack(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _this_thread.running = StackPass(self, outer=_this_thread.running)

    def _enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = _index(list(self.stack.layers), layer)
        if index is None:  # cut off, and called by somebody else
            return args, kwargs
        sources = [(at, source) for at, source in self._running_sources() if at <= index]
        if not sources:
            return args, kwargs
        hidden_states = args[0]
        num_inserted = self._num_inserted(layer, index, sources)
        length = hidden_states.shape[1] - _count(sources[:num_inserted])
        at = self.mask_index if self.mask_index < len(args) else None
        mask = kwargs.get("attention_mask") if at is None else args[at]
        extended = self._extend_mask(mask, [source for _, source in sources], hidden_states, length)
        for _, source in sources[num_inserted:]:
            hidden_states = self._insert(source.inserted_tokens(hidden_states.shape[0]), hidden_states)
        args = (hidden_states, *args[1:])
        self._note(layer, len(sources))
        if extended is None:
            return args, kwargs
        if at is None:
            return args, {**kwargs, "attention_mask": extended}
        return (*args[:at], extended, *args[at + 1 :]), kwargs

    def _insert(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.position > hidden_states.shape[1]:
            raise ValueError(
                f"num_special_tokens={self.position} is more than the {hidden_states.shape[1]} tokens of the "
                "sequence: set it to the number of tokens that stand in front of those of the input."
            )
        tokens = tokens.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        return torch.cat([hidden_states[:, : self.position], tokens, hidden_states[:, self.position :]], 1)

    def _extend_mask(self, mask: Any, sources: list[TokenSource], hidden_states: torch.Tensor, length: int) -> Any:
        """Keys and queries for the inserted tokens, of which each sample may see its own."""
        for source in sources:
            count = source.num_inserted_tokens()
            visible, bias = source.inserted_visibility(hidden_states.shape[0], hidden_states.device)
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

    def _leave_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        layers = list(self.stack.layers)
        if layer is not layers[-1]:
            return output
        sources = self._running_sources()
        if not sources:
            return output
        self._note(layer, 0)
        return self._strip_first(output, _count(sources))

    def _leave_stack(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        running = _this_thread.running
        assert running is not None
        _this_thread.running = running.outer
        if output is None:  # an error is on its way
            return output
        if running.num_inserted:  # the last layer did not run
            output = self._strip_first(output, _count(self._running_sources()[: running.num_inserted]))
        return self._leave_model(module, args, output)

    def _strip_first(self, output: Any, count: int) -> Any:
        """Strip tokens from the hidden states that a layer or a model returns, alone or before anything else."""
        if isinstance(output, tuple):
            return (self._strip(output[0], count), *output[1:])
        if isinstance(output, dict):
            name = next(iter(output))
            output[name] = self._strip(output[name], count)
            return output
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


def _index(layers: list[nn.Module], layer: nn.Module) -> int | None:
    return next((index for index, other in enumerate(layers) if other is layer), None)


def _count(sources: list[tuple[int, TokenSource]]) -> int:
    return sum(source.num_inserted_tokens() for _, source in sources)


def find_stack(model: nn.Module, name: str) -> Stack:
    """The stack of layers that a module is in.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the module in it.

    Raises:
        ValueError: It is in no stack.
    """
    stack = stack_name(model, name)
    if stack is None:
        raise ValueError(
            f"visual_prompt_depth='shallow': '{name}' is in no stack (nn.ModuleList) of layers. Use "
            "visual_prompt_depth='deep'."
        )
    path = stack.split(".")
    ancestors = tuple(model.get_submodule(".".join(path[:above])) for above in range(len(path)))
    return Stack(ancestors, path[-1])


def stack_name(model: nn.Module, name: str) -> str | None:
    """The name of the innermost stack of layers that a module is in, or `None`.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the module in it.
    """
    path = name.split(".")
    around = (".".join(path[:depth]) for depth in range(len(path) - 1, 0, -1))
    return next((outer for outer in around if isinstance(model.get_submodule(outer), nn.ModuleList)), None)
