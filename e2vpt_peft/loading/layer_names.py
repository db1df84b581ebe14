"""Which layer of a model each layer of a saved adapter is.

Names differ where the adapter was saved from another class of the same backbone (`layers.0.attention` of a `ViTModel`
is `vit.layers.0.attention` of a `ViTForImageClassification`), from a wrapped or compiled model, or under a former
layout of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..saved_weights import PEFT_PREFIX

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "module"})
"""Parts of names that wrappers add: FSDP, `torch.compile`, and DDP or nn.DataParallel."""


def match_layers(saved: Iterable[str], present: Iterable[str], former: Mapping[str, str]) -> dict[str, str]:
    """The layers of a model by the names that they have in a saved adapter.

    Names are changed in one and the same way for all layers, and only if all of them are found that way.

    Args:
        saved (`Iterable[str]`): The names of the adapter's layers as they were saved, without [`PEFT_PREFIX`].
        present (`Iterable[str]`): The names of the layers that have this adapter in the model.
        former (`Mapping[str, str]`): Present names by former names, see [`~e2vpt_peft.loading.former_names`].

    Returns:
        `dict[str, str]`: Present names by saved names, which are the same where no way was found.
    """
    names = {name: former.get(name, name) for name in saved}
    wanted = set(present)
    if wanted.issuperset(names.values()):
        return names
    here = {_unwrapped(name): name for name in sorted(wanted)}
    there = {name: _unwrapped(known) for name, known in names.items()}
    there = {name: former.get(known, known) for name, known in there.items()}
    for added, removed in _prefixes(min(there.values(), default=""), here):
        moved = {name: added + known.removeprefix(removed) for name, known in there.items()}
        if sorted(moved.values()) == sorted(here):
            return {name: here[known] for name, known in moved.items()}
    return names


def _prefixes(name: str, here: Iterable[str]) -> Iterable[tuple[str, str]]:
    """What might have to be put in front of saved names, and what taken away."""
    yield "", ""
    for known in here:
        if known.endswith(f".{name}"):
            yield known.removesuffix(name), ""
        if name.endswith(f".{known}"):
            yield "", name.removesuffix(known)


def _unwrapped(name: str) -> str:
    while name.startswith(PEFT_PREFIX):
        name = name.removeprefix(PEFT_PREFIX)
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
