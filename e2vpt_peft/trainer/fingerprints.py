"""Short descriptions of what a search depends on and what is too large to be written down.

They tell apart what differs by accident, not what somebody has made to look the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..adapter import PromptedAdapter
from ..layer import E2VPTLayer

_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NAMES = ("_name_or_path", "transformers_version")
"""Fields of a backbone's configuration that say where it comes from, not what it is."""


def fingerprint(thing: Any) -> str:
    """Of data: tensors, arrays, images, text and numbers, in lists and dictionaries; of other things, their type."""
    found = hashlib.blake2b(digest_size=8)
    for part in _parts(thing):
        found.update(part)
    return found.hexdigest()


def _parts(thing: Any) -> Iterator[bytes]:
    yield type(thing).__name__.encode()
    if isinstance(thing, Mapping):
        for key in sorted(thing, key=str):
            yield str(key).encode()
            yield from _parts(thing[key])
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            yield from _parts(one)
    elif thing is None or isinstance(thing, (str, bytes, int, float)):
        yield repr(thing).encode()
    else:
        array = np.asarray(_bits(thing) if isinstance(thing, torch.Tensor) else thing)
        if array.dtype != object:
            yield repr((str(getattr(thing, "dtype", array.dtype)), array.shape)).encode()
            yield array.tobytes()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as integers, which NumPy knows and whose sum has no rounding."""
    tensor = tensor.detach().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.cpu().view(_OF_SIZE[tensor.element_size()])


def describe_backbone(adapter: PromptedAdapter) -> dict[str, Any]:
    """What does not change in a search: the backbone's configuration, its modules and its frozen weights.

    Of each parameter a weighted sum of its values is taken, as integers of their bits: exact, and on its device, at
    the speed of its memory.
    """
    layers = [module for module in adapter.model.modules() if isinstance(module, E2VPTLayer)]
    # What is pruned changes its size.
    changing = {id(part) for layer in layers for part in (layer, *layer.children()) if part is not layer.base_layer}
    config = getattr(adapter.backbone, "config", None)
    fields = config.to_dict() if isinstance(config, PreTrainedConfig) else {}
    return {
        "class": type(adapter.backbone).__qualname__,
        "config": {name: value for name, value in fields.items() if name not in _NAMES},
        "attention": getattr(config, "_attn_implementation", None),
        "modules": fingerprint(
            [
                (name, type(module).__qualname__, module.extra_repr())
                for name, module in adapter.model.named_modules()
                if id(module) not in changing
            ]
        ),
        "weights": fingerprint(
            {
                name: (str(parameter.dtype), str(tuple(parameter.shape)), _sum(parameter))
                for name, parameter in _frozen(adapter)
            }
        ),
    }


def _frozen(adapter: PromptedAdapter) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters that no phase changes. `modules_to_save` start from what the state of the search has."""
    saved = {id(parameter) for wrapper in adapter.saved_modules.values() for parameter in wrapper.parameters()}
    for name, parameter in adapter.model.named_parameters():
        if not parameter.requires_grad and id(parameter) not in saved and ".e2vpt_" not in name:
            yield name, parameter


def _sum(parameter: torch.Tensor) -> int | None:
    """The sum of the bits; none of weights that are elsewhere (offloaded) or packed by a quantiser of its own.

    Each element counts by its place, or changes could cancel each other.
    """
    if parameter.is_meta:
        return None
    try:
        tensor = parameter.detach().contiguous()
        elements = tensor.view(_OF_SIZE[tensor.element_size()]).flatten()
        places = torch.arange(1, len(elements) + 1, device=tensor.device)
        return int(places.mul_(elements).sum())
    except (KeyError, NotImplementedError, RuntimeError):
        return None


def describe(thing: Any) -> Any:
    """A function by its name and its code, an object by its class. What a closure holds is not seen."""
    if isinstance(thing, functools.partial):
        return {"of": describe(thing.func), "args": fingerprint(thing.args), "keywords": fingerprint(thing.keywords)}
    if isinstance(thing, (list, tuple)):
        return [describe(one) for one in thing]
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if thing is None or isinstance(thing, (str, int, float)):
        return thing
    code = getattr(thing, "__code__", None)
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return name if code is None else f"{name} {fingerprint(list(_code(code)))}"


def _code(code: CodeType) -> Iterator[Any]:
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:  # the order of a set is another one in every process
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
