"""Attention masks with room for more keys, in the form of each attention implementation of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def extend_mask(
    mask: Any,
    count: int,
    states: torch.Tensor,
    length: int,
    implementation: str,
    *,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    position: int = 0,
    insert_queries: bool = False,
) -> Any:
    """An attention mask for `count` more keys at `position`, which every query may see, or only those of some samples.

    Args:
        mask:
            The mask as the implementation takes it: of shape (batch size or 1, heads or 1, queries or 1, keys),
            additive (eager) or boolean (sdpa), of shape (batch size, keys) (flash), a `BlockMask` (flex), or `None`.
        count (`int`): The number of new keys.
        states (`torch.Tensor`): Any tensor with the batch size, type and device of the attention.
        length (`int`): The number of keys so far.
        implementation (`str`): The name of the attention implementation.
        visible (`torch.Tensor`, *optional*): Which new keys each sample may see, bool, (batch size or 1, count).
        bias (`torch.Tensor`, *optional*): What to add to the scores of the new keys, (batch size or 1, count).
        position (`int`): Where the new keys are.
        insert_queries (`bool`): Whether as many new queries are there, too. They see what the first query sees.

    Returns:
        The mask, in the form that it had, or additive if there is a bias; `None` if there is nothing to mask.

    Raises:
        ValueError: The implementation takes no bias.
    """
    if bias is not None and (implementation == "flex_attention" or "flash" in implementation):
        raise ValueError(
            f"'{implementation}' takes no bias on the attention that prompts are paid, which 'attention_gate' needs: "
            "use model.set_attn_implementation('sdpa') or 'eager'."
        )
    if mask is None and visible is None and bias is None:
        return None
    if implementation == "flex_attention" and not isinstance(mask, torch.Tensor):
        return _extend_block_mask(mask, count, visible, states, length, position, insert_queries)
    if mask is None:
        is_additive = implementation == "eager" or bias is not None
        shape = (states.shape[0], length) if "flash" in implementation else (1, 1, 1, length)
        dtype = states.dtype if is_additive else torch.bool
        mask = torch.full(shape, 0 if is_additive else 1, dtype=dtype, device=states.device)
    elif mask.dtype == torch.bool and bias is not None:
        mask = _additive(mask, states.dtype)
    if visible is None:
        visible = torch.ones(1, count, dtype=torch.bool, device=mask.device)
    new = _additive(visible, mask.dtype) if mask.is_floating_point() else visible.to(mask.dtype)
    if bias is not None:
        new = new + bias
    if mask.dim() == 4:
        new = new[:, None, None]
    shape = torch.broadcast_shapes(mask.shape[:-1], new.shape[:-1])
    mask = mask.expand(*shape, -1)
    mask = torch.cat([mask[..., :position], new.expand(*shape, -1), mask[..., position:]], -1)
    if insert_queries and mask.dim() == 4 and mask.shape[-2] > 1:
        rows = mask[..., :1, :].expand(-1, -1, count, -1)
        mask = torch.cat([mask[..., :position, :], rows, mask[..., position:, :]], -2)
    return mask


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 for what may be seen, the lowest number for what may not."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _extend_block_mask(
    mask: Any,
    count: int,
    visible: torch.Tensor | None,
    states: torch.Tensor,
    length: int,
    position: int,
    insert_queries: bool,
) -> BlockMask:
    def may_see(batch: Any, head: Any, query: Any, key: Any) -> Any:
        is_new = (key >= position) & (key < position + count)
        sees_new = is_new
        if visible is not None:
            sees_new = is_new & visible[batch, (key - position).clamp(0, count - 1)]
        if mask is None:
            return ~is_new | sees_new
        old_key = torch.where(key < position, key, (key - count).clamp(min=0))
        old_query = query
        if insert_queries:
            old_query = torch.where(query < position, query, torch.where(query < position + count, 0, query - count))
        return sees_new | (~is_new & mask.mask_mod(batch, head, old_query, old_key))

    queries = (length if mask is None else mask.seq_lengths[0]) + (count if insert_queries else 0)
    return create_block_mask(may_see, states.shape[0], None, queries, length + count, device=str(states.device))
