"""Keys and values beside an attention: what queries read of them is added to what the attention gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._C import _are_functorch_transforms_active
from torch.compiler import is_compiling

from .prefix import KeysAndValues

WRITTEN_TO = ("cpu", "cuda")
"""Devices on which inference writes to the output of an attention, to be spared another tensor of its size.

On others it would have to be shown first that products come out right in a tensor that is not contiguous."""


def add_beside(
    output: torch.Tensor, query: torch.Tensor, rows: KeysAndValues, scaling: float | torch.Tensor | None
) -> torch.Tensor:
    """Add `gelu(s q K^T) V`, of keys and values beside an attention, to its output.

    Args:
        output (`torch.Tensor`):
            What the attention gives, (batch size, heads, queries, head size). In inference it may be written to.
        query (`torch.Tensor`): Of the same shape.
        rows (`tuple[torch.Tensor, torch.Tensor]`):
            Keys and values, (batch size or 1, number, heads, head size), fewer heads if several queries share one.
        scaling (`float` or `torch.Tensor`, *optional*): The scale `s` of the attention, 1 / sqrt(head size) if `None`.

    Returns:
        `torch.Tensor`: The sum, of the same shape.
    """
    keys, values = (part.to(query.dtype).transpose(1, 2) for part in rows)
    if keys.shape[1] != query.shape[1]:
        keys, values = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (keys, values))
    keys = keys * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    # A compiler sees to memory itself, and under functorch one of two tensors may stand for many.
    in_place = output.device.type in WRITTEN_TO and not (
        torch.is_grad_enabled() or is_compiling() or _are_functorch_transforms_active()
    )
    if len(keys) > 1:  # each sample has rows of its own
        read = F.gelu(query @ keys.mT) @ values
        return output.add_(read) if in_place else output + read
    # One product for each head, over the tokens of all samples. In memory, where tokens come before heads, this takes
    # no copy of queries and output. Scores are computed as rows by queries: a CPU is slow to multiply by a matrix of
    # few columns.
    size, heads, length, width = query.shape
    tokens = query.transpose(0, 1).reshape(heads, size * length, width)
    scores = F.gelu(torch.bmm(keys[0], tokens.mT)).mT
    if not in_place:
        return output + torch.bmm(scores, values[0]).view(heads, size, length, width).transpose(0, 1)
    both = output.transpose(0, 1).reshape(heads, size * length, width)
    # Under autocast, an attention may give another type than that of its queries.
    both.baddbmm_(scores.to(both.dtype), values[0].to(both.dtype))
    return both.view(heads, size, length, width).transpose(0, 1)
