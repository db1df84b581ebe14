"""What a model consists of, to put it back when a change of it fails half-way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from torch import nn

CONTAINERS = (dict, OrderedDict, list, set)
"""Attributes of these types change without being replaced."""


class Structure:
    """The modules of a model and all that hangs on them, as they are now.

    Modules, parameters, buffers, hooks, modes, `requires_grad` and plain attributes are remembered. Values of tensors
    are not copied: this is for changes that put things in and take things out.

    Args:
        model (`nn.Module`): The model.
        others (`Iterable[Any]`): More objects whose attributes are to be remembered.
    """

    def __init__(self, model: nn.Module, others: Iterable[Any] = ()) -> None:
        self._attributes = [(thing, type(thing), _remember(thing)) for thing in (*model.modules(), *others)]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for thing, kind, attributes in self._attributes:
            if type(thing) is not kind:
                thing.__class__ = kind
            vars(thing).clear()
            for name, (value, content) in attributes.items():
                vars(thing)[name] = value
                if content is not None:
                    _refill(value, content)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad = requires_grad


def _remember(thing: Any) -> dict[str, tuple[Any, Any]]:
    """Attributes by name, each with what is in it if it is a container."""
    return {name: (value, value.copy() if type(value) in CONTAINERS else None) for name, value in vars(thing).items()}


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    else:
        container.clear()
        container.update(content)
