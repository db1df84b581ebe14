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
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
        ValueError: The attention is causal, or has a window that the implementation counts from the first key.
    """
    layer: E2VPTLayer = module.config._layer  # type: ignore[assignment, union-attr]
    implementation: str = layer.config._attn_implementation
    if kwargs.get("is_causal"):  # sdpa would silently drop the last keys
        raise ValueError(f"{type(module).__name__} ran with is_causal=True: E2VPT needs bidirectional attention.")
    if kwargs.get("sliding_window") is not None and "flash" in implementation:
        raise ValueError(
            f"{type(module).__name__} has a sliding window, from which '{implementation}' would exclude the "
            "prompts. Use model.set_attn_implementation('sdpa') or 'eager'."
        )
    prefix = layer.prefix(query.shape[0], query.dtype)
    attention_mask = _extend_mask(attention_mask, prefix, query, key, implementation)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (prefix.keys.shape[1], 0))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, layer.site.eager_attention)
    # The wrapper stands in for its base layer because it has the real config, which the implementations may read.
    return attend(layer, query, _prepend(prefix.keys, key), _prepend(prefix.values, value), attention_mask, **kwargs)


def eager_attention_of(module: nn.Module) -> Optional[Callable[..., Any]]:
    """The eager attention function that a module passes to the attention interface; `None` if it does not call "
    "that."""
    forward = inspect.unwrap(type(module).forward)
    names = forward.__code__.co_names
    if "get_interface" not in names:
        return None
    eager = next((name for name in names if name.endswith("eager_attention_forward")), None)
    return forward.__globals__[eager] if eager is not None else None


def open_mask(implementation: str, states: torch.Tensor, length: int) -> torch.Tensor:
    """A mask that hides nothing, for `length` keys, as the implementation takes it."""
    if "flash" in implementation:
        return torch.ones(states.shape[0], length, dtype=torch.bool, device=states.device)
    if implementation == "eager":  # adds its mask to the scores
        return torch.zeros(1, 1, 1, length, dtype=states.dtype, device=states.device)
    return torch.ones(1, 1, 1, length, dtype=torch.bool, device=states.device)


def pad_mask(mask: torch.Tensor, count: int, dim: int, position: int = 0) -> torch.Tensor:
    """Insert `count` entries that hide nothing at `position` of dimension `dim` of a bool, integer or additive "
    "mask."""
    shape = list(mask.shape)
    shape[dim] = count
    fill = mask.new_zeros(shape) if mask.is_floating_point() else mask.new_ones(shape)
    before, after = mask.split([position, mask.shape[dim] - position], dim)
    return torch.cat([before, fill, after], dim)


def _prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    # Joined as (batch, length, heads, head size), the layout in memory of what the projections give, because copying
    # whole rows is much faster than copying head by head.
    prefix = prefix.to(states.dtype).expand(states.shape[0], -1, -1, -1)
    return torch.cat([prefix, states.transpose(1, 2)], 1).transpose(1, 2)


def _extend_mask(mask: Any, prefix: Prefix, query: torch.Tensor, key: torch.Tensor, implementation: str) -> Any:
    """Let every query see the prefix, or of it what is visible to its sample.

    The implementations take a mask of shape (batch, heads or 1, queries, keys), additive (eager) or boolean (sdpa), of
    shape (batch, keys) (flash), a `BlockMask` (flex), or `None`.
    """
    length, visible = prefix.keys.shape[1], prefix.visible
    if mask is None and visible is None:
        return None
    if implementation == "flex_attention" and not isinstance(mask, torch.Tensor):
        return _extend_block_mask(mask, length, visible, query, key)
    if mask is None:
        mask = open_mask(implementation, query, key.shape[2])
    mask = pad_mask(mask, length, dim=-1)
    return mask if visible is None else hide(mask, visible)


def hide(mask: torch.Tensor, visible: torch.Tensor, position: int = 0) -> torch.Tensor:
    """Hide from each sample the keys behind `position` that are not `visible`, a bool tensor (batch size, keys)."""
    before, after = position, mask.shape[-1] - position - visible.shape[-1]
    visible = F.pad(visible, (before, after), value=True)
    if mask.dim() == 4:
        visible = visible[:, None, None]
    if mask.is_floating_point():
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    return mask * visible


def _extend_block_mask(
    mask: Any, length: int, visible: Optional[torch.Tensor], query: torch.Tensor, key: torch.Tensor
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible_or_inner(batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
        in_prefix = k < length
        prefix_visible = in_prefix if visible is None else in_prefix & visible[batch, k.clamp(max=length - 1)]
        inner = ~in_prefix if mask is None else ~in_prefix & mask.mask_mod(batch, head, q, (k - length).clamp(min=0))
        return prefix_visible | inner

    return create_block_mask(
        visible_or_inner,
        B=query.shape[0],
        H=None,
        Q_LEN=query.shape[2],
        KV_LEN=key.shape[2] + length,
        device=key.device,
    )


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
