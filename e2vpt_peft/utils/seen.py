"""Whether tensors and modules are still what they were when something was computed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

Place = tuple[Callable[[str], Any], str]
"""How something is found: a function, and what to give it. That of a dictionary, `get`, finds `None`, too."""

PLAIN = {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity}
"""Modules whose output depends on nothing but their input, their parameters and `CONSTANTS`."""

NORMS = (("transformers.models.", "RMSNorm"), ("timm.layers.norm", "LayerNorm"), ("timm.layers.norm", "RmsNorm"))
"""Norms of libraries that are as plain: how the names of their modules begin, and those of their classes end."""

CONSTANTS = ("eps", "variance_epsilon", "_fast_norm")
"""What norms call the number that they add to the variance, and timm whether it computes in the type of its input."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element, what to compare it as: NumPy has no bfloat16, and NaN is not equal to itself."""

FEW, MANY = 32, 256
"""How many values of a large tensor are compared; of a tensor that is found by itself, two in each row, up to many."""


class Seen:
    """Things as they were, and the places where they were found.

    All that is compared is in flat lists. It is compared in each layer at each inference, between products that leave
    nothing in the CPU's caches, so that every object that has to be looked at costs time.

    PyTorch counts changes of a tensor in place (`_version`), and other memory has another address. Changes in place
    through `.data`, as moving averages of weights make them, have neither. On the CPU some values are compared for
    that reason, two in each prompt and 32 in each weight. On other devices, Python would have to wait for the device.

    Args:
        places (`Iterable[Place]`):
            Where things are found: functions, and what to give them. Of a tensor that is found, the values are
            watched as well; it has to be one that [`can_be_seen`].
        modules (`Iterable[nn.Module]`): Modules that have to compute what they did; each one that [`is_plain`].
    """

    __slots__ = ("_contents", "_emptiness", "_found", "_kinds", "_memory", "_tensors")

    def __init__(self, places: Iterable[Place] = (), modules: Iterable[nn.Module] = ()) -> None:
        self._found: list[tuple[Callable[[str], Any], str, Any]] = []
        self._kinds: list[tuple[nn.Module, type[nn.Module], Any]] = []
        self._emptiness: list[dict[str, Any]] = []
        self._tensors: list[tuple[torch.Tensor, int, int]] = []
        self._contents: list[tuple[Any, bytes]] = []
        self._memory: list[torch.Tensor] = []
        for place in places:
            self._see(place, MANY)
        for module in modules:
            self._kinds.append((module, type(module), type(module).forward))
            own = vars(module)
            self._emptiness += [own["_modules"], own["_buffers"]]
            for name in ("forward", "_parameters", *(name for name in CONSTANTS if name in own)):
                self._see((own.get, name), FEW)
            for name in own["_parameters"]:
                self._see((own["_parameters"].get, name), FEW)

    def _see(self, place: Place, most: int) -> None:
        find, name = place
        thing = find(name)
        self._found.append((find, name, thing))
        if isinstance(thing, torch.Tensor):
            self._tensors.append((thing, thing._version, thing.data_ptr()))
            memory = thing.detach()  # kept, so that no other tensor gets its address
            self._memory.append(memory)
            values = _sample(memory, most)
            if values is not None:
                self._contents.append((values, values.tobytes()))

    def is_still(self) -> bool:
        """Whether the same things are found, unchanged."""
        # Loops of their own are quicker than `all` of generators.
        for find, name, thing in self._found:
            if find(name) is not thing:
                return False
        for tensor, version, address in self._tensors:
            if tensor.data_ptr() != address or tensor._version != version:
                return False
        for module, kind, forward in self._kinds:
            if type(module) is not kind or kind.forward is not forward:
                return False
        for values, content in self._contents:
            if values.tobytes() != content:
                return False
        return not any(self._emptiness)


def place_of(owner: nn.Module, name: str, kind: str = "_modules") -> Place:
    """Where a module, a parameter or a buffer of another module is, or would be.

    Args:
        owner (`nn.Module`): The other module.
        name (`str`): Its name there.
        kind (`str`): Which of `_modules`, `_parameters` and `_buffers` it belongs to.
    """
    part = vars(owner)[kind]
    if name not in part and hasattr(owner, name):  # found elsewhere, as by wrappers, or computed
        return partial(getattr, owner), name
    return part.get, name


def can_be_seen(tensor: torch.Tensor | None) -> bool:
    """Whether a change of a tensor is noticed: it has no ways of its own (sharded, quantised, fake, lazy)."""
    return tensor is None or (type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_inference())


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one of those in torch, transformers and timm whose output depends on its parameters alone,
    and nobody has wrapped it, or put another `forward` or computed weights into it."""
    kind = type(module)
    own = vars(module)
    return (
        (kind in PLAIN or any(kind.__module__.startswith(of) and kind.__name__.endswith(name) for of, name in NORMS))
        and "forward" not in own
        and not own["_modules"]
        and not own["_buffers"]
        and ("weight" in own["_parameters"] or kind is nn.Identity)
    )


def _sample(memory: torch.Tensor, most: int) -> Any:
    """Some of the values of a tensor on the CPU, as an array in the same memory."""
    if memory.device.type != "cpu" or memory.dim() == 0:
        return None
    values, width = memory.view(INTEGERS[memory.element_size()]), memory.shape[-1]
    if not memory.is_contiguous():
        return values[..., :: min(width // 24, 32) | 1].numpy()
    # Each value is a line of memory to wait for. The step is odd, so that it comes upon all segments of prompts; if it
    # is longer than a row, it goes by the golden ratio of a row to the side, so that it comes upon all heads.
    step = memory.numel() // min(max(FEW, 2 * memory.numel() // width), most)
    step += int(0.382 * width) if step >= width else 0
    return values.view(-1)[:: step | 1].numpy()
