"""Different adapters in one batch: which adapter each sample of the running forward pass goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional

import torch
import torch.nn.functional as F

BASE_MODEL = "__base__"
"""The adapter name that stands for the model without an adapter, as everywhere in PEFT."""


class Route:
    """The adapter of each sample of a batch.

    Args:
        sample_adapters (`Sequence[str]`): One adapter name per sample.
    """

    def __init__(self, sample_adapters: Sequence[str]) -> None:
        self.adapters = list(dict.fromkeys(sample_adapters))
        """The adapters that occur, each once."""
        self.index = torch.tensor([self.adapters.index(name) for name in sample_adapters])
        """For each sample, where its adapter stands in `adapters`."""

    def gather(self, rows: Sequence[torch.Tensor], batch_size: int) -> torch.Tensor:
        """Give each sample the rows of its adapter.

        Args:
            rows (`Sequence[torch.Tensor]`):
                For each of `adapters`, its rows, of shape (1, number of rows, ...).
            batch_size (`int`):
                A multiple of the number of samples where the model cuts an image into windows, which are neighbours.

        Returns:
            `torch.Tensor`: (batch size, largest number of rows, ...), padded with zeros.
        """
        longest = max(part.shape[1] for part in rows)
        padded = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])) for part in rows]
        return torch.cat(padded).index_select(0, self._index(batch_size, rows[0].device))

    def visible(self, lengths: Sequence[int], batch_size: int, device: torch.device) -> Optional[torch.Tensor]:
        """Which of the gathered rows are a sample's own, (batch size, largest number of rows); `None` if all are.

        Args:
            lengths (`Sequence[int]`): For each of `adapters`, its number of rows.
            batch_size (`int`): As for `gather`.
            device (`torch.device`): Where to put the result.
        """
        if min(lengths) == max(lengths):
            return None
        own = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        return own.to(device).index_select(0, self._index(batch_size, device))

    def _index(self, batch_size: int, device: torch.device) -> torch.Tensor:
        return self.index.to(device).repeat_interleave(batch_size // len(self.index))


class _CurrentRoute:
    """Holds the route of the running forward pass.

    A context variable, so that threads that share a model do not see each other's route. `torch.compile` cannot trace
    those, for which reason compiled code reads a plain attribute instead, as in transformers' output capturing.
    Compiled models are therefore not for several threads with different adapters at once.
    """

    def __init__(self) -> None:
        self.in_context: ContextVar[Optional[Route]] = ContextVar("e2vpt_route", default=None)
        self.in_compiled_code: Optional[Route] = None


_current = _CurrentRoute()


def current_route() -> Optional[Route]:
    """The route of the running forward pass; `None` if all samples go through the active adapters."""
    return _current.in_compiled_code if torch.compiler.is_compiling() else _current.in_context.get()


@contextmanager
def route_samples(sample_adapters: Sequence[str]) -> Iterator[None]:
    """Send each sample of the forward passes in this context through its own adapter."""
    outer, _current.in_compiled_code = _current.in_compiled_code, Route(sample_adapters)
    compiling = torch.compiler.is_compiling()
    token = None if compiling else _current.in_context.set(_current.in_compiled_code)
    try:
        yield
    finally:
        _current.in_compiled_code = outer
        if token is not None:
            _current.in_context.reset(token)
