"""Rewinding: what is left of an adapter goes back to the start, to train again (section 3.3 of the paper)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..adapter import PromptedAdapter
from ..masks import PromptMasks
from ..utils.fields import check_choice
from .scores import find_prunable


def rewind_prompts(
    model: nn.Module,
    *,
    init: Literal["saved", "fresh"] = "saved",
    undo_pruning: bool = False,
    adapter_name: str | None = None,
) -> None:
    """Put what is left of an adapter, and the `modules_to_save` trained with it, back to the start, to train again.

    The initial values of prompts are kept on the [`E2VPTLayer`]s when an adapter is made, in the memory of the CPU
    (one more copy of the prompts, a few hundred kilobytes). They are in no file that `save_pretrained` writes, so
    that an adapter that was loaded has none. Modules of `modules_to_save` go back to the values of the backbone's own
    module, of which they are a copy.

    Args:
        model (`nn.Module`): The adapted model.
        init (`"saved"` or `"fresh"`):
            `"saved"` puts the initial values back (lottery-ticket rewinding), `"fresh"` draws new ones, as the
            published code does. Fresh values are the initial values from then on.
        undo_pruning (`bool`): Also bring back the prompts and segments that were pruned.
        adapter_name (`str`, *optional*): The adapter; the active one by default.

    Raises:
        ValueError: `init="saved"`, but the adapter was loaded from a file. Nothing is changed.
    """
    adapter = find_prunable(model, adapter_name)
    check_choice("init", init, ("saved", "fresh"))
    if init == "saved" and not has_initial_prompts(adapter):
        raise ValueError(
            f"The initial values of adapter '{adapter.name}' are not known, because it was loaded from a file. Use "
            "rewind_prompts(model, init='fresh') to start from new ones."
        )
    if undo_pruning:
        adapter.set_masks(PromptMasks.unpruned(adapter.config))
    for layer in adapter.layers:
        if init == "fresh":
            layer.draw_initial_prompts(adapter.name, layer.has_visual_prompts(adapter.name))
        layer.rewind(adapter.name)
    for module in adapter.saved_modules.values():
        module.modules_to_save[adapter.name].load_state_dict(module.original_module.state_dict())


def has_initial_prompts(adapter: PromptedAdapter) -> bool:
    """Whether the values that an adapter started from are known: not if it was loaded from a file."""
    return all(adapter.name in layer.initial_prompts for layer in adapter.layers)
