"""Models whose parameters are spread over processes, by FSDP or DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

IN_SHARDS = (
    "The model is in shards (FSDP, or DeepSpeed's ZeRO 3), which would not notice new prompts: keep it whole, train a "
    "copy.deepcopy of it in shards, and bring the values that were trained back by load_state_dict, as E2VPTTrainer does."
)


def refuse_shards(model: nn.Module) -> None:
    """Engines that hold the parameters put those back that they know: other ones are neither used nor kept.

    Raises:
        ValueError: The model is sharded.
    """
    wrapped = any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())
    if wrapped or any(_is_zero3(parameter) for parameter in model.parameters()):
        raise ValueError(IN_SHARDS)


@contextmanager
def gathered(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Sharded tensors in full, on every process; all of them have to come here. Tensors that are whole stay as they are."""
    tensors = list(tensors)
    if any(map(_is_zero3, tensors)):
        import deepspeed

        with deepspeed.zero.GatheredParameters(tensors):
            yield tensors
    else:
        yield [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _is_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # how DeepSpeed itself tells them
