"""How many operations a call makes that do work: on a GPU, about the number of kernels that it starts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .calls import Call


class OperationCounter(TorchDispatchMode):
    """Counts the operations that write memory, by name. Views, and calls that hand back what they were given (dropout
    in evaluation, a conversion to the type that a tensor has), do no work.

    Attributes:
        counts (`Counter`): From the name of an operation to how often it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_memory(value) for value in _tensors([args, kwargs or {}])}
        result = operation(*args, **(kwargs or {}))
        if operation._schema.is_mutable or any(_memory(value) not in given for value in _tensors(result)):
            self.counts[str(operation.overloadpacket)] += 1
        return result


def count_operations(call: Call) -> Counter[str]:
    """The operations of one call that do work, after a first call for what is made only once."""
    call()
    with OperationCounter() as counter:
        call()
    return counter.counts


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
