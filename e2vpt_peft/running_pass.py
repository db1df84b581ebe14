"""What is known of the forward pass that is running in this thread, beside the model and its inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .attention.prefix import Prefix
from .route import Route


@dataclass(frozen=True)
class RunningPass:
    """One forward pass, or several alike.

    Attributes:
        route ([`Route`], *optional*):
            The adapter of each sample; `None` if all samples go through the active adapters.
        edit_prefix (`Callable`, *optional*):
            Is given each layer, its prefix and the batch size, and returns the prefix to use.
        token_bias (`torch.Tensor`, *optional*):
            What is added to the attention that shallow visual prompts are paid, (number of prompts,).
    """

    route: Route | None = None
    edit_prefix: Callable[[Any, Prefix, int], Prefix] | None = None
    token_bias: torch.Tensor | None = None


class _ThisThread(threading.local):
    """A thread-local object rather than a context variable, because `torch.compile` traces the one and not the
    other."""

    def __init__(self) -> None:
        self.running = RunningPass()


_this_thread = _ThisThread()


def running_pass() -> RunningPass:
    """The forward pass that is running in this thread."""
    return _this_thread.running


@contextmanager
def running(**changes: Any) -> Iterator[None]:
    """Forward passes in this context, and in this thread, are different in these attributes of [`RunningPass`]."""
    outer = _this_thread.running
    _this_thread.running = replace(outer, **changes)
    try:
        yield
    finally:
        _this_thread.running = outer
