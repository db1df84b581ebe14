"""Whether the weights of a saved adapter are whole, and what its configuration says, before anything is made of them.

PEFT puts an adapter into the model first and reads its weights then. By that time memory is spent and the model is
changed, so that a bad file has to be found out when the configuration is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .prompt_shapes import KV_PROMPTS, PREFIX, VISUAL_PROMPTS

INSIDE_WRAPPERS = {"base_layer", "original_module", "modules_to_save"}
"""In a model, PEFT's wrappers have these in the names of weights; a saved adapter has none of them."""
NOT_DOWNLOADED = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)
"""The Hub's ways of saying that there is no such file. All other errors, a full disk among them, are the user's to
see."""
NOTHING_LOADED = "Nothing has been loaded."


FIELDS = {
    VISUAL_PROMPTS: "num_visual_prompts, token_mask, segment_mask",
    KV_PROMPTS: "num_kv_prompts, share_kv_prompts",
}
"""The fields of the configuration that the shapes of prompts follow from."""


class ExpectedWeights(NamedTuple):
    """What the file of an adapter has to hold, by its configuration.

    Attributes:
        shapes (`Sequence[Mapping[str, tuple[int, ...]]]`):
            Those of [`~e2vpt_peft.prompt_shapes.prompt_shapes`], for each size of attention that the backbone has; 0
            stands for any size.
        num_layers (`int`, *optional*): The number of layers of the backbone, if it is known.
        modules_to_save (`Sequence[str]`): The adapter's.
    """

    shapes: Sequence[Mapping[str, tuple[int, ...]]]
    num_layers: int | None
    modules_to_save: Sequence[str]


def check_adapter_file(
    expected: ExpectedWeights,
    folder: str,
    subfolder: str | None = None,
    download: Mapping[str, Any] | None = None,
) -> None:
    """Refuse weights that are pickled, damaged, of something else, not finite, or not what the configuration says.

    Only the names, types and shapes in the file's header are looked at before all of them are found to be right.
    Without any weights there is nothing to check: what is missing, PEFT says when it wants them.

    Args:
        expected ([`ExpectedWeights`]): What the configuration that was saved with the weights says of them.
        folder (`str`): The folder, or the repository on the Hub, that both are in.
        subfolder (`str`, *optional*): The subfolder of that.
        download (`Mapping[str, Any]`, *optional*): Arguments of `hf_hub_download`.

    Raises:
        ValueError: The weights are refused; the message has the file, what is wrong and what helps.
    """
    path = os.path.join(folder, subfolder or "")
    if os.path.isfile(os.path.join(path, CONFIG_NAME)):  # as PEFT finds out whether it is a local one
        file = _existing(os.path.join(path, SAFETENSORS_WEIGHTS_NAME))
        pickled = file or _existing(os.path.join(path, WEIGHTS_NAME))
    else:
        file = _downloaded(folder, SAFETENSORS_WEIGHTS_NAME, subfolder, download)
        pickled = file or _downloaded(folder, WEIGHTS_NAME, subfolder, download)
    if file is not None:
        _check(expected, file)
    elif pickled is not None:
        raise ValueError(
            f"{pickled} is a pickle, which can hide code, and no pickle is loaded. Save the adapter as safetensors, "
            "which is what save_pretrained does unless told otherwise, or, if you trust the file, convert it: "
            f"safetensors.torch.save_file(torch.load({WEIGHTS_NAME!r}, weights_only=True), "
            f"{SAFETENSORS_WEIGHTS_NAME!r}). {NOTHING_LOADED}"
        )


def _existing(path: str) -> Path | None:
    return Path(path) if os.path.lexists(path) else None


def _downloaded(repository: str, name: str, subfolder: str | None, download: Any) -> Path | None:
    """The file, which PEFT finds in the cache later, or `None` if there is none: PEFT says then what is wrong."""
    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **(download or {})))
    except NOT_DOWNLOADED:
        return None


def _check(expected: ExpectedWeights, path: Path) -> None:
    if not path.is_file():  # neither a folder nor a device that never ends
        raise ValueError(f"{path} is no file, but should hold the weights of the adapter. {NOTHING_LOADED}")
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
            check_names(list(header), expected.modules_to_save, str(path))
            _check_number_of_layers(expected.num_layers, path, header)
            for name, part in header.items():
                _check_shape(expected.shapes, path, name, part.get_shape(), part.get_dtype())
            for name in header:
                if is_prompt(name):
                    check_finite(name, file.get_tensor(name), str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged, cut short, or no safetensors file ({error}): get the adapter anew. {NOTHING_LOADED}"
        ) from error


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
            f"{where} has no prompts, but {_some(names)}: it is not the file of an E2VPT adapter. {NOTHING_LOADED}"
        )
    saved = [name for name in names if not is_prompt(name)]
    own = [name for name in saved if any(f"{module}." in name for module in modules_to_save or [])]
    foreign = [name for name in saved if name not in own or INSIDE_WRAPPERS.intersection(name.split("."))]
    if foreign:
        raise ValueError(
            f"{where} has {_some(foreign)}, which are neither prompts nor of modules_to_save="
            f"{list(modules_to_save or [])}, and would overwrite the backbone. If they belong to the adapter, name "
            "their modules in modules_to_save. If they are embeddings that PEFT has added, save the adapter with "
            f"save_embedding_layers=False. {NOTHING_LOADED}"
        )


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Refuse prompts that are NaN or infinite, with the name of the tensor.

    Raises:
        ValueError: They are.
    """
    if not tensor.is_meta and not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise ValueError(
            f"{where}: {count} of {tensor.numel()} values of '{name}' are NaN or infinite. The training that made "
            f"the adapter diverged, or the file is damaged. {NOTHING_LOADED}"
        )


def _check_number_of_layers(number: int | None, path: Path, names: Iterable[str]) -> None:
    layers = {name.rpartition(".")[0] for name in names if is_prompt(name)}
    if number is not None and len(layers) > number:
        raise ValueError(
            f"{path} has prompts for {len(layers)} layers, but the adapter was made for a backbone with {number}: "
            f"{_some(sorted(layers))}. The two files do not belong together, or one of them was changed. "
            f"{NOTHING_LOADED}"
        )


def _check_shape(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], path: Path, name: str, shape: list[int], dtype: str
) -> None:
    kind = name.rpartition(".")[2]
    if kind not in FIELDS:
        return
    allowed = list(dict.fromkeys(one[kind] for one in shapes if kind in one))
    if not dtype.startswith(("F", "BF")):
        raise ValueError(f"{path}: '{name}' has type {dtype}, but prompts are floating-point. {NOTHING_LOADED}")
    fits = any(
        len(shape) == len(one) and all(there == should or not should for there, should in zip(shape, one))
        for one in allowed
    )
    if not fits:
        words = " or ".join("(" + ", ".join(str(size or "any") for size in one) + ")" for one in allowed) or "none"
        raise ValueError(
            f"{path}: '{name}' has shape {tuple(shape)}, but by the configuration ({FIELDS[kind]}) it should be "
            f"{words}. The two files do not belong together, or one of them was changed: get the adapter anew. "
            f"{NOTHING_LOADED}"
        )


def _some(names: Sequence[str], limit: int = 3) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:limit])
    return (listed or "nothing at all") + (f" and {len(names) - limit} more" if len(names) > limit else "")
