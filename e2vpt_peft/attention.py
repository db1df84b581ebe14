"""A key-value prefix for any self-attention that calls transformers' attention interface.

transformers routes self-attention through `ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation,
...)`. An adapted module's `config` is replaced by a [`PrefixedConfig`], which names [`prefix_attention`] while there
is a prefix. That function puts the prefix in front of keys and values, extends the mask, and hands over to the
implementation that the model is set to: no code of any model is rewritten.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .flex import avoid_faulty_head_size

if TYPE_CHECKING:
    from .layer import E2VPTLayer


PREFIX_ATTENTION = "e2vpt_prefix"
"""The name of [`prefix_attention`] in transformers' attention interface."""


class Prefix(NamedTuple):
    """Extra keys and values for one self-attention.

    Attributes:
        keys (`torch.Tensor`): Of shape (batch size or 1, prefix length, heads, head size).
        values (`torch.Tensor`): Of the same shape.
        visible (`Optional[torch.Tensor]`): Which rows each sample may see, (batch size, prefix length), or `None` for
        all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible: Optional[torch.Tensor] = None


class PrefixedConfig:
    """Reads through to the config of an adapted attention module, and names `prefix_attention` while there is a
    prefix.

    Nothing is copied, so that `model.set_attn_implementation(...)`, which writes to the real config, keeps its effect.
    """

    def __init__(self, config: Any, layer: E2VPTLayer) -> None:
        self._config = config
        self._layer = layer

    @property
    def _attn_implementation(self) -> str:
        return PREFIX_ATTENTION if self._layer.has_prefix else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_layer") or name.startswith("__"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Attention over `[prefix ; keys]` and `[prefix ; values]`, by the implementation that the model is set to.

    Args:
        module (`nn.Module`): The adapted attention module.
        query, key, value (`torch.Tensor`): Of shape (batch size, heads, sequence length, head size).
        attention_mask: As the configured implementation takes it.

    Returns:
        `tuple`: What that implementation returns. Attention weights have a column for every prefix row, before those
        of the sequence.

    Raises:
        ValueError: The attention has a window that the implementation counts from the first key.
    """
    layer: E2VPTLayer = module.config._layer  # type: ignore[assignment, union-attr]
    implementation: str = layer.config._attn_implementation
    if kwargs.get("is_causal") and attention_mask is None and implementation == "sdpa":
        # A text encoder (CLIP) asks for a causal mask like that, which would be counted from the first key.
        length = key.shape[2]
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=key.device).tril()
        kwargs["is_causal"] = False
    if kwargs.get("sliding_window") is not None and "flash" in implementation:
        raise ValueError(
            f"{type(module).__name__} has a sliding window, from which '{implementation}' would exclude the "
            "prompts. Use model.set_attn_implementation('sdpa') or 'eager'."
        )
    prefix = layer.prefix(query.shape[0], query.dtype)
    attention_mask = extend_mask(
        attention_mask, prefix.keys.shape[1], prefix.visible, query, key.shape[2], implementation
    )
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (prefix.keys.shape[1], 0))
    eager: Any = layer.site.eager_attention
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    key, value = prepend(prefix.keys, key), prepend(prefix.values, value)
    if implementation == "flex_attention":
        query, key, kwargs["scaling"] = avoid_faulty_head_size(query, key, kwargs.get("scaling"))
    # The wrapper stands in for its base layer because it has the real config, which the implementations may read.
    return attend(layer, query, key, value, attention_mask, **kwargs)


def eager_attention_of(module: nn.Module) -> Optional[Callable[..., Any]]:
    """The eager attention function that a module passes to the attention interface; `None` if it calls no such."""
    forward = inspect.unwrap(type(module).forward)
    names = forward.__code__.co_names
    if "get_interface" not in names:
        return None
    eager = next((name for name in names if name.endswith("eager_attention_forward")), None)
    return forward.__globals__[eager] if eager is not None else None


def extend_mask(
    mask: Any,
    count: int,
    visible: Optional[torch.Tensor],
    states: torch.Tensor,
    length: int,
    implementation: str,
    position: int = 0,
    insert_queries: bool = False,
) -> Any:
    """An attention mask for `count` more keys at `position`, which every query may see, or only those of some samples.

    Args:
        mask:
            The mask as the implementation takes it: of shape (batch size or 1, heads or 1, queries or 1, keys),
            additive (eager) or boolean (sdpa), of shape (batch size, keys) (flash), a `BlockMask` (flex), or `None`.
        count (`int`): The number of new keys.
        visible (`Optional[torch.Tensor]`):
            Which of them each sample may see, (batch size or 1, count), or `None` for all. A floating point tensor is
            added to their attention scores instead (not for flash and flex attention).
        states (`torch.Tensor`): Any tensor with the batch size, type and device of the attention.
        length (`int`): The number of keys so far.
        implementation (`str`): The name of the attention implementation.
        position (`int`): Where the new keys are.
        insert_queries (`bool`): Whether as many new queries are there, too. They see what the first query sees.
    """
    if mask is None and visible is None:
        return None
    if implementation == "flex_attention" and not isinstance(mask, torch.Tensor):
        return _extend_block_mask(mask, count, visible, states, length, position, insert_queries)
    if mask is None:
        additive = implementation == "eager" or (visible is not None and visible.is_floating_point())
        shape = (states.shape[0], length) if "flash" in implementation else (1, 1, 1, length)
        dtype = states.dtype if additive else torch.bool
        mask = torch.full(shape, 0 if additive else 1, dtype=dtype, device=states.device)
    if mask.dtype == torch.bool and visible is not None and visible.is_floating_point():
        mask = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)
    if visible is None:
        visible = torch.ones(1, count, dtype=torch.bool, device=mask.device)
    if mask.is_floating_point() and visible.dtype == torch.bool:
        new = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)
    else:
        new = visible.to(mask.dtype)
    if mask.dim() == 4:
        new = new[:, None, None]
    shape = torch.broadcast_shapes(mask.shape[:-1], new.shape[:-1])
    mask = mask.expand(*shape, -1)
    mask = torch.cat([mask[..., :position], new.expand(*shape, -1), mask[..., position:]], -1)
    if insert_queries and mask.dim() == 4 and mask.shape[-2] > 1:
        rows = mask[..., :1, :].expand(-1, -1, count, -1)
        mask = torch.cat([mask[..., :position, :], rows, mask[..., position:, :]], -2)
    return mask


def _extend_block_mask(
    mask: Any,
    count: int,
    visible: Optional[torch.Tensor],
    states: torch.Tensor,
    length: int,
    position: int,
    insert_queries: bool,
) -> BlockMask:
    def may_see(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
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


def prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Put the rows of a prefix in front of keys or values.

    Args:
        prefix (`torch.Tensor`): Of shape (batch size or 1, rows, heads, head size).
        states (`torch.Tensor`): Of shape (batch size, heads, length, head size).

    Returns:
        `torch.Tensor`: (batch size, heads, rows + length, head size).
    """
    # Joined as (batch, length, heads, head size), the layout in memory of what the projections give, because copying
    # whole rows is much faster than copying head by head.
    prefix = prefix.to(states.dtype).expand(states.shape[0], -1, -1, -1)
    return torch.cat([prefix, states.transpose(1, 2)], 1).transpose(1, 2)


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
