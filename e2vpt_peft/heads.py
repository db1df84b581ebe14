"""Classification heads, and whatever else stands in `modules_to_save`, with different adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .routing import current_route


class RoutedModulesToSave(ModulesToSaveWrapper):
    """PEFT's wrapper of one of the `modules_to_save`, which sends each sample through its own adapter's copy.

    PEFT tells its wrapper the adapter names by a hook that it registers for every call: threads that share a model
    would see each other's hooks, and `torch.compile` cannot trace it. PEFT's wrapper also ignores the names if the
    active adapter has no copy, and does not know adapters without one. This class reads the running route instead.
    Samples of `"__base__"`, and of adapters that have no copy, go through the original module, as they do alone.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = current_route()
        if route is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            raise TypeError(
                f"adapter_names cannot divide the input of {type(self.original_module).__name__}, one of the "
                "modules_to_save, among the adapters: only modules that take a single tensor can be in "
                "modules_to_save then. Run the adapters one after the other."
            )
        copies = self.modules_to_save
        modules = [
            copies[name] if name in copies else self.original_module  # noqa: SIM401  (a ModuleDict has no get)
            for name in route.adapters
        ]
        return route.dispatch(args[0], modules)


def route_modules_to_save(model: nn.Module) -> None:
    """Make the `modules_to_save` of a model follow the route of the running forward pass."""
    for module in model.modules():
        if type(module) is ModulesToSaveWrapper:
            # PEFT makes the wrappers and takes no class for them; another class keeps parameters and their names.
            module.__class__ = RoutedModulesToSave


def check_modules_to_save(model: nn.Module, modules_to_save: Optional[Sequence[str]]) -> None:
    """Check that `modules_to_save` can be trained.

    Raises:
        ValueError: One of them is quantised.
    """
    for name, module in model.named_modules():
        if not any(name.endswith(ending) for ending in modules_to_save or []):  # as PEFT finds them
            continue
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save={list(modules_to_save or [])} includes '{name}', which is quantised and cannot be "
                f"trained. Load the model without quantising it: for bitsandbytes, "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=['{name.rpartition('.')[2]}'])."
            )
