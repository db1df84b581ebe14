"""Which modules are adapted when the user names none."""

from __future__ import annotations

import re

from torch import nn

from .architectures import MODALITIES, architecture_of
from .site import NotAdaptable, find_attention_site


def find_default_targets(model: nn.Module) -> list[str]:
    """The self-attention modules that are adapted when no `target_modules` are given.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `list[str]`: A single ending of names if it means the same modules, else all their names; empty if none of the
        model's architectures is known. In models with several towers those of the first of [`MODALITIES`].
    """
    found: dict[str, list[str]] = {modality: [] for modality in MODALITIES}
    endings = set()
    for name, module in model.named_modules():
        architecture = architecture_of(module)
        if architecture is not None and re.search(_pattern(architecture.attention), name):
            found[architecture.modality].append(name)
            endings.add(architecture.attention.rpartition("N.")[2])
    names = next((found[modality] for modality in MODALITIES if found[modality]), [])
    for ending in endings:
        if [name for name, _ in model.named_modules() if name.endswith(f".{ending}")] == names:
            return [ending]
    return names


def explain_no_default_targets(model: nn.Module) -> str:
    """Why there are no default targets for a model, for people who may not know what its attention is made of."""
    message = "target_modules=None: there are no ready-made targets for this model"
    for name, module in model.named_modules():
        is_innermost = not any("Attention" in type(part).__name__ for part in list(module.modules())[1:])
        if "Attention" not in type(module).__name__ or not is_innermost:
            continue
        try:
            find_attention_site(model, name)
        except NotAdaptable as error:
            return f"{message}. It has {error.module}, {error.reason}"
        return (
            f"{message}, but '{name}' ({type(module).__name__}) looks like an attention that can be adapted. Set "
            "target_modules to the names of the self-attention modules, and check the result with check_prefix."
        )
    return f"{message}, which has no module with 'Attention' in the name of its class."


def _pattern(names: str) -> str:
    return r"(^|\.)" + re.escape(names).replace("N", r"\d+") + "$"
