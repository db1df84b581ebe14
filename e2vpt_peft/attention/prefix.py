"""A prefix: extra keys and values for one self-attention; who gives it, and by which way it gets in."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Prefix(NamedTuple):
    """Extra keys and values for one self-attention.

    Attributes:
        keys (`torch.Tensor`): Of shape (batch size or 1, prefix length, heads, head size).
        values (`torch.Tensor`): Of the same shape.
        visible (`Optional[torch.Tensor]`):
            Which rows each sample may see, bool, (batch size, prefix length), or `None` for all.
        bias (`Optional[torch.Tensor]`):
            What is added to the attention scores of each row, (batch size or 1, prefix length), or `None`.
        beside (`Optional[tuple[torch.Tensor, torch.Tensor]]`):
            More keys and values, which are in no softmax with the sequence
            ([`~e2vpt_peft.attention.beside.add_beside`]), or `None`. Rows of zeros have no effect.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    beside: KeysAndValues | None = None


class Rows(NamedTuple):
    """What one adapter gives to a prefix.

    Attributes:
        joint (`tuple[torch.Tensor, torch.Tensor]`):
            Keys and values in the softmax with the sequence, (batch size or 1, number, heads, head size) each.
        beside (`Optional[tuple[torch.Tensor, torch.Tensor]]`): Those beside it, likewise; see [`Prefix`].
    """

    joint: KeysAndValues
    beside: KeysAndValues | None = None

    def counts(self) -> tuple[int, int]:
        """The numbers of both."""
        return self.joint[0].shape[1], 0 if self.beside is None else self.beside[0].shape[1]


def side_by_side(adapters: Sequence[Rows]) -> Prefix:
    """The prefix of samples that all go through the same adapters."""
    beside = [rows.beside for rows in adapters if rows.beside is not None]
    return Prefix(*join([rows.joint for rows in adapters]), beside=join(beside) if beside else None)


def join(parts: Sequence[KeysAndValues]) -> KeysAndValues:
    """Rows behind one another. Those that are the same for all samples meet those that are not."""
    if len(parts) == 1:  # of a single tensor, cat would make a copy
        return parts[0]
    size = max(keys.shape[0] for keys, _ in parts)
    keys, values = (torch.cat([part.expand(size, -1, -1, -1) for part in kind], 1) for kind in zip(*parts))
    return keys, values


class PrefixSource(Protocol):
    """What gives an attention its prefix, at each forward pass anew."""

    config: Any
    """The config that the attention would have without a prefix."""

    @property
    def has_prefix(self) -> bool:
        """Whether the running forward pass needs a prefix."""

    def prefix(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Prefix:
        """The prefix of the running forward pass, for a batch size, a type and a device of the attention."""


class _ThisThread(threading.local):
    """A thread-local object rather than a context variable, because `torch.compile` traces the one and not the
    other."""

    def __init__(self) -> None:
        self.attending: Attending | None = None


_this_thread = _ThisThread()


class Attending:
    """A context: one forward pass of an adapted attention, which has to use its prefix.

    Attention whose `forward`, class or config somebody has replaced would otherwise run as that of the bare backbone,
    and nothing would say so.

    Args:
        source (`PrefixSource`): What gives the prefix.
        attention (`str`): What errors call the attention.
        expected (`str`): What the attention has to do, for errors: "has not ...".

    Attributes:
        is_done (`bool`): Whether the prefix was used. The way in sets it.
        hands_over (`bool`): Whether the attention implementation is running that the prefix was handed over to.
    """

    def __init__(self, source: PrefixSource, attention: str, expected: str) -> None:
        self.source, self.attention, self.expected = source, attention, expected
        self.is_done = self.hands_over = False
        self.outer: Attending | None = None

    def __enter__(self) -> Attending:
        self.outer = _this_thread.attending
        _this_thread.attending = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        _this_thread.attending = self.outer
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise an error if the prefix was not used."""
        if not self.is_done:
            raise RuntimeError(
                f"{self.attention} has not {self.expected}, so that its prompts had no effect. Probably its forward, "
                "its class or its config was replaced: let the new one do that, or put the old one back, or run "
                "without prompts in model.disable_adapter()."
            )


def attending(source: PrefixSource) -> Attending | None:
    """The pass of the attention of this source that is running in this thread, if any."""
    current = _this_thread.attending
    return current if current is not None and current.source is source else None


def is_traced_for_training(source: Any) -> bool:
    """Whether `torch.compile` traces a training step. A layer that is checkpointed may then change nothing outside of
    itself, so that nothing can be noted of a running pass."""
    return source.training and torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()


class WayIn:
    """A way for prompts into one kind of attention. This one does nothing; the others say what they need.

    Attributes:
        attention (`str`): What errors call the attention.
        expected (`str`): What the attention has to do for its prefix to be used, for errors: "has not ...".
    """

    attention: str
    expected: str

    def attach(self, attention: nn.Module, source: Any) -> None:
        """Have an attention take prompts from a source from now on."""

    def detach(self, attention: nn.Module) -> None:
        """Undo [`attach`]."""

    def running(self, source: Any) -> AbstractContextManager[Any]:
        """For one forward pass of the attention, which raises a RuntimeError at its end if the prefix was not used.

        Entered again in the same pass, it does nothing. A training step that `torch.compile` traces is not checked
        where the way in does not see the prefix used by itself.
        """
        if attending(source) is not None or is_traced_for_training(source) or not source.has_prefix:
            return nullcontext()
        return Attending(source, self.attention, self.expected)

    def config(self, attention: nn.Module) -> Any:
        """The config that an attention would have without this way in, or `None`."""
        return getattr(attention, "config", None)

    def set_config(self, attention: nn.Module, config: Any) -> None:
        """Give an attention another one."""
        attention.config = config

    def implementation(self, config: Any) -> str:
        """The attention implementation, as transformers names it, that the prefix is handed over to."""
        raise NotImplementedError


def forwards_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The functions that a module may run: the `forward` that somebody gave this one instance, then its class's."""
    forwards = [inspect.unwrap(forward) for forward in (vars(module).get("forward"), type(module).forward) if forward]
    return [forward for forward in forwards if hasattr(forward, "__code__")]


def prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Put the rows of a prefix in front of keys or values.

    Args:
        prefix (`torch.Tensor`): Of shape (batch size or 1, rows, heads, head size).
        states (`torch.Tensor`): Of shape (batch size, heads, length, head size).

    Returns:
        `torch.Tensor`: (batch size, heads, rows + length, head size).
    """
    if not prefix.shape[1]:
        return states
    # Joined as (batch, length, heads, head size), the layout in memory of what the projections give, because copying
    # whole rows is much faster than copying head by head.
    prefix = prefix.to(states.dtype).expand(states.shape[0], -1, -1, -1)
    if not prefix.is_cpu:
        # A GPU copies whole rows only if all that it joins is contiguous, as the sequence is. Else it copies element
        # by element, which is much slower. A CPU copies whole rows in any case.
        prefix = prefix.contiguous()
    return torch.cat([prefix, states.transpose(1, 2)], 1).transpose(1, 2)
