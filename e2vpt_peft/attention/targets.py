"""Which modules are adapted when the user names none."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from .architectures import MODALITIES, architecture_of
from .site import NotAdaptable, find_attention_site

INPUTS = {"vision": ("image", "video"), "audio": ("audio",)}
"""What transformers calls the inputs of each modality."""


def find_default_targets(model: nn.Module) -> list[str]:
    """The self-attention modules that are adapted when no `target_modules` are given.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `list[str]`: A single ending of names if it means the same modules, else all their names; empty if none of the
        model's architectures is known. In models with several towers those of the first of [`MODALITIES`].

    Raises:
        ValueError: That tower is of no known architecture, but another one is.
    """
    found: dict[str, list[str]] = {modality: [] for modality in MODALITIES}
    endings = set()
    for name, module in model.named_modules():
        architecture = architecture_of(module)
        if architecture is not None and re.search(_pattern(architecture.attention), name):
            found[architecture.modality].append(name)
            endings.add(architecture.attention.rpartition("N.")[2])
    modality = next((modality for modality in MODALITIES if found[modality]), MODALITIES[0])
    names = found[modality]
    targets = next(([ending] for ending in endings if _ending_in(model, ending) == names), names)
    for earlier in MODALITIES[: MODALITIES.index(modality)]:
        tower = _find_tower(model, earlier)
        if tower is not None:
            raise ValueError(
                f"target_modules=None: there are no ready-made targets for the {earlier} tower, {tower}, but only for "
                f"the {modality} tower. To adapt the {modality} tower, set target_modules={targets}. To adapt the "
                f"{earlier} tower, set target_modules to the names of its self-attention modules."
            )
    return targets


def _ending_in(model: nn.Module, ending: str) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(f".{ending}")]


def _find_tower(model: nn.Module, modality: str) -> str | None:
    """The part of a model that takes inputs of a modality, as messages call it."""
    towers = [
        f"'{name}' ({type(module).__name__})" if name else f"{type(module).__name__}"
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and set(INPUTS[modality]) & set(_as_tuple(module.input_modalities))
    ]
    return towers[-1] if towers else None


def _as_tuple(modalities: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return (modalities,) if isinstance(modalities, str) else tuple(modalities)


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
