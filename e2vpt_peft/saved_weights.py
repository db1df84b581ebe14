"""What the tensors of a saved adapter have to be: their names, types, shapes and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from .prompt_shapes import KV_PROMPTS, PREFIX, SEGMENT_MASK, VISUAL_PROMPTS

INSIDE_WRAPPERS = {"base_layer", "original_module", "modules_to_save"}
"""In a model, PEFT's wrappers have these in the names of weights; a saved adapter has none of them."""
PEFT_PREFIX = "base_model.model."
"""What PEFT puts in front of the names of parameters in a saved adapter."""
NOTHING_LOADED = "Nothing has been loaded."
MAX_TENSORS = 20_000
"""An adapter has a few tensors per layer, and those of its `modules_to_save`."""
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
"""The types, as safetensors names them, that prompts may be saved in."""


FIELDS = {
    VISUAL_PROMPTS: "num_visual_prompts, token_mask, segment_mask",
    KV_PROMPTS: "num_kv_prompts, share_kv_prompts, kv_prompt_activation",
    SEGMENT_MASK: "num_visual_prompts, num_segments, segment_mask",
}
"""The fields of the configuration that the shapes of prompts follow from."""


class ExpectedWeights(NamedTuple):
    """What the file of an adapter has to hold, by its configuration.

    Attributes:
        shapes (`Sequence[Mapping[str, tuple[int, ...]]]`):
            Those of [`~e2vpt_peft.prompt_shapes.saved_shapes`], for each size of attention that the backbone has; 0
            stands for any size.
        num_layers (`int`, *optional*): The number of layers of the backbone, if it is known.
        modules_to_save (`Sequence[str]`): The adapter's.
        is_shallow (`bool`): Whether visual prompts are in one layer only.
        in_all_layers (`bool`): Whether the adapter has prompts in all layers.
        segment_mask (`Sequence[Sequence[bool]]`, *optional*): Which segments it keeps.
        must_exist (`bool`): Whether there must be a file: PEFT marks configurations that it saves with weights.
    """

    shapes: Sequence[Mapping[str, tuple[int, ...]]]
    num_layers: int | None
    modules_to_save: Sequence[str]
    is_shallow: bool = False
    in_all_layers: bool = False
    segment_mask: Sequence[Sequence[bool]] | None = None
    must_exist: bool = False


class SavedWeights(NamedTuple):
    """What the header of an adapter's file says.

    Attributes:
        file (`str`): The file.
        shapes (`Mapping[str, tuple[int, ...]]`): The shapes of its tensors, by their names.
        heads_are_compared_later (`bool`):
            Whether PEFT may be told to ignore that a head has another size, which it tells only as it loads them.
    """

    file: str
    shapes: Mapping[str, tuple[int, ...]]
    heads_are_compared_later: bool = False


def is_prompt(name: str) -> bool:
    """Whether a tensor of that name in a saved adapter holds prompts."""
    return name.rpartition(".")[2].startswith(PREFIX)


def check_names(names: Sequence[str], modules_to_save: Sequence[str] | None, where: str) -> None:
    """Refuse weights that are not those of an adapter.

    PEFT would load a tensor that has the name of a weight of the backbone into the backbone.

    Args:
        names (`Sequence[str]`): The names of saved tensors.
        modules_to_save (`Sequence[str]`, *optional*): The adapter's.
        where (`str`): What they were saved in, for the message.

    Raises:
        ValueError: There are no prompts, or something is neither a prompt nor of the `modules_to_save`.
    """
    if not any(map(is_prompt, names)):
        raise ValueError(
            f"{where} has no prompts, but {some(names)}: it is not the file of an E2VPT adapter. {NOTHING_LOADED}"
        )
    endings = tuple(modules_to_save or ())
    foreign = [name for name in names if not is_prompt(name) and not _is_in_module(name, endings)]
    if foreign:
        raise ValueError(
            f"{where} has {some(foreign)}, which are neither prompts nor of modules_to_save="
            f"{list(modules_to_save or [])}, and would overwrite the backbone. If they belong to the adapter, name "
            "their modules in modules_to_save. If they are embeddings that PEFT has added, save the adapter with "
            f"save_embedding_layers=False. {NOTHING_LOADED}"
        )


def _is_in_module(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a saved tensor is one of the `modules_to_save`, which PEFT finds by the endings of their names."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    modules = accumulate(parts[:-1], "{}.{}".format)
    return not INSIDE_WRAPPERS.intersection(parts) and any(module.endswith(endings) for module in modules)


def check_finite(name: str, tensor: torch.Tensor, where: str, infinite: bool = True) -> None:
    """Refuse weights that are NaN or infinite, with the name of the tensor.

    Args:
        name (`str`): The name.
        tensor (`torch.Tensor`): The weights.
        where (`str`): What they are in, for the message.
        infinite (`bool`): Whether infinite values are refused: buffers of a head, such as masks, may have some.

    Raises:
        ValueError: There are such values.
    """
    if tensor.is_meta:
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # PyTorch cannot tell it of 8 bits
    bad = ~values.isfinite() if infinite else values.isnan()
    if bad.any():
        raise ValueError(
            f"{where}: {int(bad.sum())} of {tensor.numel()} values of '{name}' are NaN or infinite. The training that "
            f"made the adapter diverged, or the file is damaged. {NOTHING_LOADED}"
        )


def check_segment_mask(saved: torch.Tensor, expected: Sequence[Sequence[bool]] | None, where: str) -> None:
    """Refuse visual prompts of other segments than the configuration says.

    Args:
        saved (`torch.Tensor`): The mask beside the prompts; numbers, so that it survives an average of state dicts.
        expected (`Sequence[Sequence[bool]]`, *optional*): The mask in the configuration.
        where (`str`): What the prompts are in, for the message.

    Raises:
        ValueError: The masks differ.
    """
    mask = torch.tensor(expected or [], dtype=torch.float32)
    if saved.is_meta or (saved.shape == mask.shape and torch.allclose(saved.cpu().float(), mask, atol=0.01)):
        return
    raise ValueError(
        f"{where} has visual prompts of other segments than segment_mask says: they are those of another pruning, or "
        "one of the files was changed. Delete the adapter that is there, if any, and load this one with its own "
        f"configuration: load_adapter(folder, another_name). {NOTHING_LOADED}"
    )


def check_type(name: str, dtype: str, where: str) -> None:
    """Refuse prompts that are no floating-point numbers, and complex numbers.

    Raises:
        ValueError: The type, as safetensors names it, is one that the tensor cannot have.
    """
    if is_prompt(name) and dtype not in FLOATS and not name.endswith(f".{SEGMENT_MASK}"):
        raise ValueError(f"{where}: '{name}' has type {dtype}, but prompts are floating-point. {NOTHING_LOADED}")
    if dtype.startswith("C"):
        raise ValueError(f"{where}: '{name}' has type {dtype}, but weights are real numbers. {NOTHING_LOADED}")


def check_layers(names: Iterable[str], expected: ExpectedWeights, where: str) -> None:
    """Refuse an adapter of which some layers lack prompts. Shallow visual prompts are in one layer.

    Raises:
        ValueError: There are more or fewer than the configuration says.
    """
    layers: dict[str, set[str]] = {kind: set() for kind in FIELDS}
    for name in names:
        layer, _, kind = name.rpartition(".")
        if kind in layers:
            layers[kind].add(layer)
    found = set().union(*layers.values())
    if expected.num_layers is not None and len(found) > expected.num_layers:
        raise ValueError(
            f"{where} has prompts for {len(found)} layers, but the adapter was made for a backbone with "
            f"{expected.num_layers}: {some(sorted(found))}. The two files do not belong together, or one of them was "
            f"changed. {NOTHING_LOADED}"
        )
    number = expected.num_layers if expected.num_layers is not None and expected.in_all_layers else len(found)
    for kind in dict.fromkeys(kind for one in expected.shapes for kind in one):
        in_one = expected.is_shallow and kind != KV_PROMPTS
        wanted = 1 if in_one else number
        if len(layers[kind]) != wanted and kind != SEGMENT_MASK:
            without = [] if in_one else sorted(found - layers[kind])
            lacking = f" It has none for {some(without)}." if without else ""
            raise ValueError(
                f"{where} has {kind} for {len(layers[kind])} layers, but by the configuration there should be "
                f"{wanted}.{lacking} Those that are missing would be random: get the adapter anew. {NOTHING_LOADED}"
            )


def check_shape(
    name: str, shape: tuple[int, ...], shapes: Sequence[Mapping[str, tuple[int, ...]]], where: str
) -> None:
    """Refuse prompts of another shape than any that the configuration allows, and unknown ones.

    Raises:
        ValueError: The message names the fields of the configuration that the shape follows from.
    """
    kind = name.rpartition(".")[2]
    if not is_prompt(name):
        return
    if kind not in FIELDS:
        raise ValueError(
            f"{where} has '{name}', which this version of e2vpt_peft does not know: it was saved by a newer one. "
            f"Upgrade. {NOTHING_LOADED}"
        )
    allowed = list(dict.fromkeys(one[kind] for one in shapes if kind in one))
    fits = any(
        len(shape) == len(one) and all(there == should or not should for there, should in zip(shape, one))
        for one in allowed
    )
    if not fits:
        words = " or ".join("(" + ", ".join(str(size or "any") for size in one) + ")" for one in allowed) or "none"
        raise ValueError(
            f"{where}: '{name}' has shape {shape}, but by the configuration ({FIELDS[kind]}) it should be "
            f"{words}. The two files do not belong together, or one of them was changed: get the adapter anew. "
            f"{NOTHING_LOADED}"
        )


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first of many names, for a message."""
    listed = ", ".join(f"'{name}'" for name in names[:limit])
    return (listed or "nothing at all") + (f" and {len(names) - limit} more" if len(names) > limit else "")
