"""Different adapters in one batch: whose names may be given, and heads that each sample has of its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .route import BASE_MODEL
from .running_pass import running_pass


class RoutedModulesToSave(ModulesToSaveWrapper):
    """PEFT's wrapper of one of the `modules_to_save`, which sends each sample through its own adapter's copy.

    PEFT tells its wrapper the adapter names by a hook that it registers for every call: threads that share a model
    would see each other's hooks, and `torch.compile` cannot trace it. PEFT's wrapper also ignores the names if the
    active adapter has no copy, and does not know adapters without one. This class reads the running route instead.
    Samples of `"__base__"`, and of adapters that have no copy, go through the original module, as they do alone.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = running_pass().route
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


def check_adapter_names(adapter_names: Any, known: Sequence[str], samples: torch.Tensor | None) -> None:
    """Refuse `adapter_names` that do not give each sample of a batch an adapter.

    Args:
        adapter_names: What the user gave.
        known (`Sequence[str]`): The adapters of the model.
        samples (`torch.Tensor`, *optional*): The main input of the call.

    Raises:
        TypeError: They are no list.
        ValueError: There is an unknown one, or there are more or fewer than samples.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names={adapter_names!r} must be a list, of one adapter name per sample.")
    unknown = sorted(set(adapter_names) - {BASE_MODEL} - set(known))
    if unknown:
        raise ValueError(f"adapter_names has {unknown}, known are {[BASE_MODEL, *known]}.")
    if samples is not None and len(adapter_names) != len(samples):
        raise ValueError(
            f"adapter_names has {len(adapter_names)} names for {len(samples)} samples: give one name per sample."
        )
