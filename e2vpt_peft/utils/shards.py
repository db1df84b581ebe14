"""Models whose parameters are spread over processes, by FSDP or DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def refuse_shards(model: nn.Module) -> None:
    """Engines that hold the parameters put those back that they know: other ones are neither used nor kept.

    Raises:
        ValueError: The model is sharded.
    """
    wrapped = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    if wrapped or any(_is_zero3(parameter) for parameter in model.parameters()):
        raise ValueError(
            "The model is in shards (FSDP, or DeepSpeed's ZeRO 3), which would not notice other prompts: shard a "
            "copy.deepcopy of it, and bring the values that were trained back into the whole one (load_state_dict)."
        )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return isinstance(tensor, DTensor) or _is_zero3(tensor)


@contextmanager
def gathered(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors in full, on every process, whether they are sharded or not. All processes have to come here."""
    tensors = list(tensors)
    if any(map(_is_zero3, tensors)):
        import deepspeed

        with deepspeed.zero.GatheredParameters(tensors):
            yield tensors
    else:
        yield [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _is_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # how DeepSpeed itself tells them
