"""Whether the weights of a saved adapter are whole, and what its configuration says, before anything is made of them.

PEFT puts an adapter into the model first and reads its weights then. By that time memory is spent and the model is
changed, so that a bad file has to be found out when the configuration is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .prompt_shapes import SEGMENT_MASK
from .saved_weights import (
    FLOATS,
    MAX_TENSORS,
    NOTHING_LOADED,
    ExpectedWeights,
    SavedWeights,
    check_finite,
    check_layers,
    check_names,
    check_segment_mask,
    check_shape,
    check_type,
    is_prompt,
)


def check_adapter_file(
    expected: ExpectedWeights,
    folder: str,
    subfolder: str | None = None,
    download: Mapping[str, Any] | None = None,
) -> SavedWeights | None:
    """Refuse weights that are pickled, damaged, of something else, not finite, or not what the configuration says.

    Only the names, types and shapes in the file's header are looked at before all of them are found to be right.

    Args:
        expected ([`ExpectedWeights`]): What the configuration that was saved with the weights says of them.
        folder (`str`): The folder, or the repository on the Hub, that both are in.
        subfolder (`str`, *optional*): The subfolder of that.
        download (`Mapping[str, Any]`, *optional*): Arguments of `hf_hub_download`.

    Returns:
        [`SavedWeights`]: What the file has, or `None` if a configuration stands there alone.

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
        return _check(expected, file)
    if pickled is not None:
        raise ValueError(
            f"{pickled} is a pickle, which can hide code, and no pickle is loaded. Save the adapter as safetensors, "
            "which is what save_pretrained does unless told otherwise, or, if you trust the file, convert it: "
            f"safetensors.torch.save_file(torch.load({WEIGHTS_NAME!r}, weights_only=True), "
            f"{SAFETENSORS_WEIGHTS_NAME!r}). {NOTHING_LOADED}"
        )
    if expected.must_exist:
        raise ValueError(
            f"{path} has the configuration of a saved adapter, but no {SAFETENSORS_WEIGHTS_NAME}: copy it again, "
            f"whole. For the configuration alone, call PeftConfig.from_pretrained. {NOTHING_LOADED}"
        )
    return None


def _existing(path: str) -> Path | None:
    return Path(path) if os.path.lexists(path) else None


def _downloaded(repository: str, name: str, subfolder: str | None, download: Any) -> Path | None:
    """The file, which PEFT finds in the cache later, or `None` if the repository has none of that name.

    A file that could not be asked for is not one that is not there: PEFT would ask once more, and load it unchecked.
    """
    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, **(download or {})))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE or (download or {}).get("local_files_only"):  # PEFT looks into the cache only, too
            return None
        raise ValueError(
            f"'{name}' of {repository} cannot be checked, as the Hub did not answer ({error.__cause__ or error}): try "
            f"again. {NOTHING_LOADED}"
        ) from error
    except EntryNotFoundError:
        return None


def _check(expected: ExpectedWeights, path: Path) -> SavedWeights:
    if not path.is_file():  # neither a folder nor a device that never ends
        raise ValueError(f"{path} is no file, but should hold the weights of the adapter. {NOTHING_LOADED}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise ValueError(
                    f"{path} has {len(names)} tensors. Up to {MAX_TENSORS} are read: an adapter has a few per layer. "
                    f"{NOTHING_LOADED}"
                )
            check_names(names, expected.modules_to_save, str(path))
            header = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in header.items()}
            for name, part in header.items():
                check_type(name, part.get_dtype(), str(path))
                check_shape(name, shapes[name], expected.shapes, str(path))
            check_layers(names, expected, str(path))
            for name in names:
                if is_prompt(name):
                    check_finite(name, file.get_tensor(name), str(path))
                elif header[name].get_dtype() in FLOATS:
                    check_finite(name, file.get_tensor(name), str(path), infinite=False)
                if name.endswith(f".{SEGMENT_MASK}"):
                    check_segment_mask(file.get_tensor(name), expected.segment_mask, str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged, cut short, or no safetensors file ({error}): get the adapter anew. {NOTHING_LOADED}"
        ) from error
    return SavedWeights(str(path), shapes)
