"""A module that stands for another one, whose place in a model it has taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class StandIn(nn.Module):
    """A module that has what another one has: what is not its own is read there, and set there.

    Whoever took the other one out of the model gets this one now, and may know nothing of it. Its own is what its
    class has, what it had when [`StandIn.close`] was called, and what is private, by which frameworks keep what they
    know of a module.

    Args:
        base_layer (`nn.Module`): The other one.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def close(self) -> None:
        """Set what is new on the other module from now on."""
        self._is_closed = True

    def _is_own(self, name: str) -> bool:
        own = self.__dict__
        is_closed = "_is_closed" in own
        return not is_closed or name in own or name in own["_modules"] or name[0] == "_" or hasattr(type(self), name)

    def __getattr__(self, name: str) -> Any:
        # Many times in each pass, so first what is asked for most often, and no exception that is caught.
        own = self.__dict__
        modules: dict[str, Any] = own.get("_modules", {})
        if name in modules:
            return modules[name]
        if name[0] == "_" or "base_layer" not in modules or name in own["_parameters"] or name in own["_buffers"]:
            return super().__getattr__(name)
        return getattr(modules["base_layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and not issubclass(value, StandIn):  # FSDP2 and others make a subclass of its own
            self.base_layer.__class__ = value
        elif self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.base_layer, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.base_layer, name)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Register a buffer of the other module."""
        self.base_layer.register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter of the other module."""
        self.base_layer.register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule to the other module."""
        self.base_layer.add_module(name, module)
