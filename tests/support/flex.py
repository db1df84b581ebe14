"""PyTorch's own compiled flex attention, without any code of the package: is it right on this CPU?"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

LENGTHS = (24, 31, 40)  # with 8, 15 and 8 keys behind the last whole block of 16


def states(length: int, head_size: int) -> torch.Tensor:
    """Queries, keys or values, with NaN behind the last of each head, so that a result that reads them shows it."""
    padded = torch.full((2, 2, length + 16, head_size), torch.nan)
    padded[:, :, :length] = torch.randn(2, 2, length, head_size)
    return padded[:, :, :length]


@torch.no_grad()  # of which flex attention has none on a CPU
def fault_of_torch(head_size: int) -> str | None:
    """What is wrong with PyTorch's compiled flex attention for heads of this size, or `None` if nothing is seen."""
    torch._dynamo.reset()  # may have been compiled for other settings
    try:
        for length in LENGTHS:
            query, key, value = (states(length, head_size) for _ in range(3))
            try:
                actual = torch.compile(flex_attention)(query, key, value)
            except Exception as error:  # inductor has no common type for what it does not support
                return f"torch {torch.__version__} cannot compile flex attention for this CPU: {type(error).__name__}"
            error = (actual - F.scaled_dot_product_attention(query, key, value)).abs().max().item()
            if not error < 1e-5:  # nor is NaN
                return (
                    f"flex attention of torch {torch.__version__} is wrong on this CPU by itself: {error:.2g} from "
                    f"scaled_dot_product_attention with {length} keys and heads of {head_size}"
                )
        return None
    finally:
        torch._dynamo.reset()


@functools.cache
def fault_on_this_cpu() -> str | None:
    # A size that the package never changes: where only small heads are wrong, the package has to avoid it.
    return fault_of_torch(32)


def skip_where_torch_is_wrong() -> None:
    """For tests of compiled flex attention, which can say nothing about the package where PyTorch's is wrong."""
    fault = fault_on_this_cpu()
    if fault is not None:
        pytest.skip(fault)
