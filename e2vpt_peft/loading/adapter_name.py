"""Whether an adapter can have the name that it is given in a model."""

from __future__ import annotations

import warnings
from pathlib import PurePosixPath, PureWindowsPath

from peft import PeftConfig
from torch import nn

from ..adapter import adapter_names
from ..config import E2VPTConfig
from ..layer import E2VPTLayer
from ..route import BASE_MODEL


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse the name of a new adapter that cannot be used, before anything is changed.

    Args:
        model (`nn.Module`): The model, with the adapters that it has.
        adapter_name (`str`): The name of the new one.

    Raises:
        ValueError:
            The name is taken, reserved, one that PyTorch cannot give to a parameter, or the name of a part of the
            model: PEFT tells adapters apart by the names of their parameters, so that of other adapters it would leave
            out whatever is in that part when it saves them.
    """
    refusal = f"adapter_name={adapter_name!r} "
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"Adapter with name '{adapter_name}' already exists. Choose another adapter_name, or delete that adapter "
            "first."
        )
    if adapter_name == BASE_MODEL:
        raise ValueError(refusal + "stands for the model without an adapter: choose another name.")
    if not adapter_name or "." in adapter_name:
        raise ValueError(
            refusal + "must have at least one character and no dot, as it becomes part of parameter names."
        )
    if PurePosixPath(adapter_name).is_absolute() or PureWindowsPath(adapter_name).anchor:
        raise ValueError(
            refusal + "is an absolute path, and the adapter would be saved there: the name becomes that of a folder "
            "inside of the one that it is saved to."
        )
    if any(hasattr(container, adapter_name) for container in (nn.ParameterDict(), nn.ModuleDict())):
        raise ValueError(refusal + "is the name of a method of PyTorch's containers: choose another name.")
    if adapter_name in _names_of_parts(model):
        raise ValueError(
            refusal + "is also the name of a part of the model, which would spoil other adapters on saving: choose "
            "another name."
        )


def check_other_method(other: PeftConfig | None, config: PeftConfig, adapter_name: str) -> None:
    """Warn of an adapter that has the name of another method's, and refuse it if their heads would be one.

    PEFT keeps one configuration for each name.

    Args:
        other ([`~peft.PeftConfig`], *optional*): The configuration that the model has under that name.
        config ([`~peft.PeftConfig`]): That of the adapter that is about to be put into it.
        adapter_name (`str`): The name.

    Raises:
        ValueError: The other method has `modules_to_save` that this adapter has not.
    """
    if other is None or isinstance(other, E2VPTConfig):
        return
    method = getattr(other.peft_type, "value", other.peft_type)
    refusal = f"adapter_name={adapter_name!r} is also the name of a {method} adapter of the model"
    heads = set(getattr(other, "modules_to_save", None) or []) - set(getattr(config, "modules_to_save", None) or [])
    if heads:
        raise ValueError(
            f"{refusal}, whose modules_to_save={sorted(heads)} would be saved with it: choose another name."
        )
    warnings.warn(
        f"{refusal}, whose configuration PEFT replaces: it can no longer be saved from this model. Give the prompts a "
        "name of their own.",
        stacklevel=4,
    )


def _names_of_parts(model: nn.Module) -> set[str]:
    names = {
        "base_model",
        "model",
        "base_layer",
        "modules_to_save",
        "original_module",
        *E2VPTLayer.adapter_layer_names,
    }
    for module in model.modules():
        if not isinstance(module, (nn.ModuleDict, nn.ParameterDict)):  # whose entries may be adapters
            names.update(name for name, _ in module.named_children())
            names.update(name for name, _ in module.named_parameters(recurse=False))
    return names
