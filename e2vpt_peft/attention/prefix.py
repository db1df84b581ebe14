"""A prefix: extra keys and values for one self-attention; who gives it, and by which way it gets in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class Prefix(NamedTuple):
    """Extra keys and values for one self-attention.

    Attributes:
        keys (`torch.Tensor`): Of shape (batch size or 1, prefix length, heads, head size).
        values (`torch.Tensor`): Of the same shape.
        visible (`Optional[torch.Tensor]`):
            Which rows each sample may see, bool, (batch size, prefix length), or `None` for all.
        bias (`Optional[torch.Tensor]`):
            What is added to the attention scores of each row, (batch size or 1, prefix length), or `None`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class PrefixSource(Protocol):
    """What gives an attention its prefix, at each forward pass anew."""

    config: Any
    """The config that the attention would have without a prefix."""

    @property
    def has_prefix(self) -> bool:
        """Whether the running forward pass needs a prefix."""

    def prefix(self, batch_size: int, dtype: torch.dtype) -> Prefix:
        """The prefix of the running forward pass, for a batch size and a type of the attention."""


class WayIn:
    """A way for prompts into one kind of attention. This one does nothing; the others say what they need."""

    def attach(self, attention: nn.Module, source: Any) -> None:
        """Have an attention take prompts from a source from now on."""

    def detach(self, attention: nn.Module) -> None:
        """Undo [`attach`]."""

    def running(self, source: Any) -> AbstractContextManager[Any]:
        """For one forward pass of the attention."""
        return nullcontext()

    def implementation(self, config: Any) -> str:
        """The attention implementation, as transformers names it, that the prefix is handed over to."""
        raise NotImplementedError


def prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Put the rows of a prefix in front of keys or values.

    Args:
        prefix (`torch.Tensor`): Of shape (batch size or 1, rows, heads, head size).
        states (`torch.Tensor`): Of shape (batch size, heads, length, head size).

    Returns:
        `torch.Tensor`: (batch size, heads, rows + length, head size).
    """
    # Joined as (batch, length, heads, head size), the layout in memory of what the projections give, because copying
    # whole rows is much faster than copying head by head.
    prefix = prefix.to(states.dtype).expand(states.shape[0], -1, -1, -1)
    return torch.cat([prefix, states.transpose(1, 2)], 1).transpose(1, 2)
