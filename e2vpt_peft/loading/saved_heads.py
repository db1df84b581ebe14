"""Whether saved weights of `modules_to_save` are those of a model, and nothing else is loaded beside the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..config import E2VPTConfig
from ..saved_weights import INSIDE_WRAPPERS, NOTHING_LOADED, PEFT_PREFIX, SavedWeights, is_prompt, some
from .compatibility import matching_modules
from .saved_modules import HEADS_OF_TASKS

Shape = tuple[int, ...]


def check_nothing_overwritten(model: nn.Module, adapter_name: str, names: Iterable[str]) -> None:
    """Refuse saved tensors that would be loaded into the backbone, or into another adapter.

    Args:
        model (`nn.Module`): The model that they are for.
        adapter_name (`str`): The adapter that is loaded.
        names (`Iterable[str]`): Names of saved tensors, those of `modules_to_save` in the model's own form.

    Raises:
        ValueError: There are such.
    """
    own = f".modules_to_save.{adapter_name}."
    there = {name.removeprefix(PEFT_PREFIX) for name in model.state_dict()}
    foreign = [name for name in names if not is_prompt(name) and own not in name]
    foreign = [name for name in foreign if name.removeprefix(PEFT_PREFIX) in there]
    if foreign:
        raise ValueError(
            f"The state dict of the adapter has '{foreign[0]}' ({len(foreign)} such tensors), which is a weight of "
            "the model and neither a prompt nor of modules_to_save: loading it would overwrite the model. "
            f"{NOTHING_LOADED}"
        )


def check_heads(saved: SavedWeights, config: E2VPTConfig, model: nn.Module) -> None:
    """Refuse an adapter whose `modules_to_save` are not those of the model, which PEFT would find out too late.

    Args:
        saved ([`SavedWeights`]): What the header of its file says.
        config ([`E2VPTConfig`]): Its configuration.
        model (`nn.Module`): The model that it is about to be put into.

    Raises:
        ValueError: Weights are missing, unknown or of other sizes.
    """
    endings = [*(config.modules_to_save or ()), *HEADS_OF_TASKS.get(config.task_type, ())]
    shapes: dict[str, Shape] = {}
    for name, module in matching_modules(model, endings).items():
        original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        for key, value in original.state_dict().items():
            shapes[f"{PEFT_PREFIX}{name}.{key}"] = tuple(value.shape)
    if any(INSIDE_WRAPPERS.intersection(name.split(".")) for name in shapes):  # around other adapters
        return
    found = {name: shape for name, shape in saved.shapes.items() if not is_prompt(name)}
    missing, unknown = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    if missing or unknown:
        faults = [f"has no {some(missing)}"] if missing else []
        faults += [f"has {some(unknown)}, which the model lacks"] if unknown else []
        raise ValueError(
            f"{saved.file} {', and '.join(faults)}: its modules_to_save={list(config.modules_to_save or [])} are not "
            "those of this model. Load it into the class of model that it was saved from, without wrappers such as "
            f"torch.compile or DDP around it. {NOTHING_LOADED}"
        )
    if not saved.heads_are_compared_later:
        check_head_sizes(found, shapes, saved.file)


def check_head_sizes(saved: Mapping[str, Shape], here: Mapping[str, Shape], where: str) -> None:
    """Refuse weights of `modules_to_save` that are of another size, as a head for other classes is.

    Args:
        saved (`Mapping[str, tuple[int, ...]]`): The shapes of saved weights, by their names.
        here (`Mapping[str, tuple[int, ...]]`): Those of the model's, by the same names.
        where (`str`): What they were saved in, for the message.

    Raises:
        ValueError: A size differs.
    """
    wrong = {name: shape for name, shape in saved.items() if name in here and here[name] != shape}
    for name, shape in wrong.items():
        raise ValueError(
            f"size mismatch for {name}: {where} has shape {shape}, and this model {here[name]} ({len(wrong)} such "
            "tensors). Load the backbone with as many classes (num_labels=...) as the adapter was trained for, or "
            f"pass ignore_mismatched_sizes=True, which leaves the head as it is here. {NOTHING_LOADED}"
        )


def refuse_other_sizes_before_loading(model: nn.Module, give_up: Callable[[], None]) -> None:
    """Let the next `load_state_dict` refuse sizes that differ as a whole, where PyTorch would load all the others.

    It is only there that PEFT has left out what it was told to ignore.

    Args:
        model (`nn.Module`): The model that is about to be loaded into.
        give_up (`Callable`): Called if it is refused.
    """

    def check(module: nn.Module, state_dict: Mapping[str, torch.Tensor], *_: Any) -> None:
        handle.remove()
        here = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        try:
            check_head_sizes({name: tuple(value.shape) for name, value in state_dict.items()}, here, "the adapter")
        except ValueError:
            give_up()
            raise

    handle = model.register_load_state_dict_pre_hook(check)
