"""Whether tensors and modules are still what they were when something was computed of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

PLAIN = {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity}
"""Modules whose output depends on nothing but their input, their parameters and `CONSTANTS`."""

CONSTANTS = ("eps", "variance_epsilon")
"""What norms call the number that they add to the variance."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element, what to compare it as: NumPy has no bfloat16, and NaN is not equal to itself."""


class SeenTensor:
    """A tensor as it was.

    PyTorch counts changes of a tensor in place (`_version`), and other memory has another address. Changes in place
    through `.data`, as moving averages of weights make them, have neither. On the CPU some values are compared for
    that reason: 20 or more in each row of prompts, 512 or more of a large matrix. On other devices, Python
    would have to wait for the device.

    Args:
        tensor (`torch.Tensor`): The tensor; one that [`can_be_seen`].
    """

    __slots__ = ("_content", "_memory", "_sample", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = tensor._version
        self._memory = tensor.detach()  # kept, so that no other tensor gets its address
        self._sample = _sample(self._memory)
        self._content = None if self._sample is None else self._sample.tobytes()

    def is_still(self, tensor: torch.Tensor | None) -> bool:
        """Whether a tensor is this one, unchanged."""
        return (
            tensor is not None
            and self._tensor() is tensor
            and self._version == tensor._version
            and self._memory.data_ptr() == tensor.data_ptr()
            and (self._sample is None or self._sample.tobytes() == self._content)
        )


class SeenModule:
    """A module as it was.

    Args:
        module (`nn.Module`): The module; one that [`is_plain`].
    """

    __slots__ = ("_constants", "_forward", "_module", "_parameters")

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._forward = type(module).forward
        self._constants = _constants(module)
        self._parameters = {
            name: None if tensor is None else SeenTensor(tensor) for name, tensor in module._parameters.items()
        }

    def is_still(self, module: nn.Module | None) -> bool:
        """Whether a module is this one, and computes what it did."""
        return (
            module is not None
            and self._module() is module
            and self._forward is type(module).forward
            and _constants(module) == self._constants
            and is_plain(module)
            and self._parameters.keys() == module._parameters.keys()
            and all(
                seen is tensor if seen is None else seen.is_still(tensor)
                for seen, tensor in zip(self._parameters.values(), module._parameters.values())
            )
        )


def can_be_seen(tensor: torch.Tensor | None) -> bool:
    """Whether a change of a tensor is noticed: it has no ways of its own (sharded, quantised, fake, lazy)."""
    return tensor is None or (type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_inference())


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one of those in torch and transformers whose output depends on its parameters alone, and
    nobody has wrapped it, or put another `forward` or computed weights into it."""
    kind = type(module)
    own = vars(module)
    return (
        (kind in PLAIN or (kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")))
        and "forward" not in own
        and not own["_modules"]
        and not own["_buffers"]
        and ("weight" in own["_parameters"] or kind is nn.Identity)
    )


def _constants(module: nn.Module) -> tuple[Any, ...]:
    own = vars(module)
    return tuple(own.get(name) for name in CONSTANTS)


def _sample(memory: torch.Tensor) -> Any:
    """Some of the values of a tensor on the CPU, as an array in the same memory."""
    if memory.device.type != "cpu" or memory.dim() == 0:
        return None
    values = memory.view(INTEGERS[memory.element_size()])
    if values.dim() == 2 and len(values) > 256:
        return values[:: len(values) // 32, :: values.shape[1] // 16 | 1].numpy()
    # An odd step comes upon every segment of a prompt, whatever their number: they are every 16th component or so.
    return values[..., :: min(values.shape[-1] // 24, 32) | 1].numpy()
