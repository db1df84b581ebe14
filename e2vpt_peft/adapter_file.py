"""Whether the weights of a saved adapter are whole, and what its configuration says, before anything is made of them.

PEFT puts an adapter into the model first and reads its weights then. By that time memory is spent and the model is
changed, so that a bad file has to be found out when the configuration is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .masks import segment_mask, token_mask

if TYPE_CHECKING:
    from .config import E2VPTConfig

PROMPTS = "e2vpt_"
"""What the names of prompts begin with, behind the name of their layer."""
INSIDE_WRAPPERS = {"base_layer", "original_module", "modules_to_save"}
"""In a model, PEFT's wrappers have these in the names of weights; a saved adapter has none of them."""
NOTHING_LOADED = "Nothing has been loaded."


def check_adapter_file(
    config: E2VPTConfig, folder: str, subfolder: Optional[str] = None, download: Optional[Mapping[str, Any]] = None
) -> None:
    """Refuse weights that are pickled, damaged, of something else, not finite, or not what the configuration says.

    Only the names, types and shapes in the file's header are looked at before all of them are found to be right.
    Without any weights there is nothing to check: what is missing, PEFT says when it wants them.

    Args:
        config ([`E2VPTConfig`]): The configuration that was saved with the weights.
        folder (`str`): The folder, or the repository on the Hub, that it was read from.
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
        _check(config, file)
    elif pickled is not None:
        raise ValueError(
            f"{pickled} is a pickle, which can hide code, and no pickle is loaded. Save the adapter as safetensors, "
            "which is what save_pretrained does unless told otherwise, or, if you trust the file, convert it: "
            f"safetensors.torch.save_file(torch.load({WEIGHTS_NAME!r}, weights_only=True), "
            f"{SAFETENSORS_WEIGHTS_NAME!r}). {NOTHING_LOADED}"
        )


def _existing(path: str) -> Optional[Path]:
    return Path(path) if os.path.lexists(path) else None


def _downloaded(repository: str, name: str, subfolder: Optional[str], download: Any) -> Optional[Path]:
    """The file, which PEFT finds in the cache later, or `None`: PEFT says then what is wrong."""
    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **(download or {})))
    except Exception:
        return None


def _check(config: E2VPTConfig, path: Path) -> None:
    if not path.is_file():  # neither a folder nor a device that never ends
        raise ValueError(f"{path} is no file, but should hold the weights of the adapter. {NOTHING_LOADED}")
    try:
        with safe_open(path, framework="pt") as file:
            header = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
            check_names(list(header), config.modules_to_save, str(path))
            _check_layers(config, path, header)
            for name, part in header.items():
                _check_shape(config, path, name, part.get_shape(), part.get_dtype())
            for name in header:
                if is_prompt(name):
                    check_finite(name, file.get_tensor(name), str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged, cut short, or no safetensors file ({error}): get the adapter anew. {NOTHING_LOADED}"
        ) from error


def is_prompt(name: str) -> bool:
    """Whether a tensor of that name in a saved adapter holds prompts."""
    return name.rpartition(".")[2].startswith(PROMPTS)


def check_names(names: Sequence[str], modules_to_save: Optional[Sequence[str]], where: str) -> None:
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


def _check_layers(config: E2VPTConfig, path: Path, names: Iterable[str]) -> None:
    layers = {name.rpartition(".")[0] for name in names if is_prompt(name)}
    number = (config.backbone or {}).get("num_layers")
    if number is not None and len(layers) > number:
        raise ValueError(
            f"{path} has prompts for {len(layers)} layers, but the adapter was made for a backbone with {number}: "
            f"{_some(sorted(layers))}. The two files do not belong together, or one of them was changed. "
            f"{NOTHING_LOADED}"
        )


def _check_shape(config: E2VPTConfig, path: Path, name: str, shape: list[int], dtype: str) -> None:
    kind = name.rpartition(".")[2]
    allowed, fields = None, ""
    if kind == "e2vpt_visual_prompts":
        allowed, fields = _visual_shapes(config), "num_visual_prompts, token_mask, segment_mask"
    elif kind == "e2vpt_kv_prompts":
        allowed, fields = _kv_shapes(config), "num_kv_prompts, share_kv_prompts"
    else:
        return
    if not dtype.startswith(("F", "BF")):
        raise ValueError(f"{path}: '{name}' has type {dtype}, but prompts are floating-point. {NOTHING_LOADED}")
    fits = any(
        len(shape) == len(one) and all(there == should or not should for there, should in zip(shape, one))
        for one in allowed
    )
    if not fits:
        words = " or ".join("(" + ", ".join(str(size or "any") for size in one) + ")" for one in allowed) or "none"
        raise ValueError(
            f"{path}: '{name}' has shape {tuple(shape)}, but by the configuration ({fields}) it should be {words}. "
            "The two files do not belong together, or one of them was changed: get the adapter anew. "
            f"{NOTHING_LOADED}"
        )


def _visual_shapes(config: E2VPTConfig) -> list[tuple[int, ...]]:
    """What visual prompts may be like, for each hidden size of the backbone; 0 stands for any size."""
    if not config.num_visual_prompts:
        return []
    kept = segment_mask(config)[token_mask(config)]
    if kept.all():
        return [(len(kept), size) for size in _sizes(config, "hidden_size")]
    return [(int(kept.sum()) * size // config.num_segments,) for size in _sizes(config, "hidden_size")]


def _kv_shapes(config: E2VPTConfig) -> list[tuple[int, ...]]:
    if not config.num_kv_prompts:
        return []
    shapes: list[tuple[int, ...]] = [
        (heads, config.num_kv_prompts, head_size)
        for heads in _sizes(config, "num_heads")
        for head_size in _sizes(config, "head_size")
    ]
    return shapes if config.share_kv_prompts else [(2, *shape) for shape in shapes]


def _sizes(config: E2VPTConfig, name: str) -> list[int]:
    """The sizes of the backbone, where they are known."""
    size = (config.backbone or {}).get(name, 0)
    return sorted(set(size)) if isinstance(size, list) else [size]


def _some(names: Sequence[str], limit: int = 3) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:limit])
    return (listed or "nothing at all") + (f" and {len(names) - limit} more" if len(names) > limit else "")
