"""What is known of the forward pass that is running in this thread, beside the model and its inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

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


class Passes(threading.local):
    """The forward passes of one adapted model, one in each thread. All its layers share this object.

    Another adapted model that runs inside such a pass has passes of its own, and so has a copy of the model.

    A thread-local object rather than a context variable, because `torch.compile` traces the one and not the other.

    Attributes:
        current ([`RunningPass`]): The one that is running in this thread.
    """

    def __init__(self) -> None:
        self.current = RunningPass()

    @contextmanager
    def running(self, **changes: Any) -> Iterator[None]:
        """Forward passes in this context, and in this thread, are different in these attributes of [`RunningPass`]."""
        outer = self.current
        self.current = replace(outer, **changes)
        try:
            yield
        finally:
            self.current = outer

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        # Copying and pickling keep that layers share one object, and nothing of what is running.
        return type(self), ()


def passes_of(model: nn.Module) -> Passes:
    """The passes that the adapted layers of a model share; new ones if it has no such layer."""
    found = (getattr(module, "passes", None) for module in model.modules())
    return next((passes for passes in found if isinstance(passes, Passes)), None) or Passes()
