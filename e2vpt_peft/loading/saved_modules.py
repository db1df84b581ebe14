"""The `modules_to_save` of an adapter: whether the model has them, and whether it has a new head that nobody saves."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from peft import PeftConfig, TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..config import E2VPTConfig
from ..layer import E2VPTLayer

HEADS_OF_TASKS: dict[str | None, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
"""What PEFT adds to the `modules_to_save` of these tasks, if the model has it."""


def check_saved_modules_exist(config: E2VPTConfig, model: nn.Module, targets: Collection[str]) -> None:
    """Refuse `modules_to_save` that PEFT would not find, and leave out without a word.

    Args:
        config ([`E2VPTConfig`]): The adapter's configuration.
        model (`nn.Module`): The model, with the adapters that it has.
        targets (`Collection[str]`): The names of the attentions that will be adapted.

    Raises:
        ValueError: The model has no module of that name; the message has the nearest one.
    """
    names = [_name_when_adapted(name, targets) for name, _ in model.named_modules() if name]
    for wanted in config.modules_to_save or []:
        if wanted in HEADS_OF_TASKS.get(config.task_type, ()) or any(name.endswith(wanted) for name in names):
            continue
        heads = [name for name, child in model.named_children() if _is_outside(child, name, targets)]
        endings = {".".join(name.split(".")[-1 - wanted.count(".") :]) for name in names}
        meant = get_close_matches(wanted, sorted(endings), n=1) or get_close_matches(
            wanted, sorted(heads), n=1, cutoff=0
        )
        raise ValueError(
            f"modules_to_save={sorted(config.modules_to_save or [])} has {wanted!r}, but no module of the model has a "
            f"name that ends like that. {f'Is {meant[0]!r} meant?' if meant else 'Leave it out.'}"
        )


def warn_of_new_head(model: nn.Module, configs: Iterable[PeftConfig]) -> None:
    """Warn of a head with newly initialised weights that no adapter trains and saves.

    transformers marks parameters that have come out of a checkpoint, so that nothing is said of heads that were
    loaded, of models without a head, or of models that come from no checkpoint at all.

    Args:
        model (`nn.Module`): The adapted model.
        configs (`Iterable[PeftConfig]`): The configurations of all its adapters.
    """
    if not re.search("For[A-Z]", type(model).__name__) or not any(map(_is_loaded, model.parameters())):
        return
    saved = {name for config in configs for name in getattr(config, "modules_to_save", None) or []}
    saved.update(name for config in configs for name in HEADS_OF_TASKS.get(config.task_type, ()))
    new = [name for name, child in model.named_children() if _is_new(child) and not name.endswith(tuple(saved))]
    if new:
        warnings.warn(
            f"The weights of {', '.join(map(repr, new))} are newly initialised, and no adapter has this head in its "
            f"modules_to_save: it is neither trained nor saved. Pass modules_to_save={new} to train and save it.",
            stacklevel=2,
        )


def _name_when_adapted(name: str, targets: Collection[str]) -> str:
    """The name by which PEFT looks for it, after attentions have been wrapped."""
    around = next((target for target in targets if name.startswith(f"{target}.")), None)
    if around is None or name.startswith(f"{around}.base_layer"):
        return name
    return f"{around}.base_layer{name.removeprefix(around)}"


def _is_outside(child: nn.Module, name: str, targets: Collection[str]) -> bool:
    return any(True for _ in child.parameters()) and not any(target.startswith(f"{name}.") for target in targets)


def _is_new(child: nn.Module) -> bool:
    """Whether it is frozen, with parameters that all come from no checkpoint, and has no part with its own adapter."""
    parameters = list(child.parameters())
    if any(isinstance(part, (E2VPTLayer, ModulesToSaveWrapper)) for part in child.modules()):
        return False
    return bool(parameters) and not any(
        _is_loaded(parameter) or parameter.requires_grad or not parameter.is_floating_point()
        for parameter in parameters
    )


def _is_loaded(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "_is_hf_initialized", False))
