"""A key-value prefix for self-attention that calls PyTorch's `scaled_dot_product_attention` itself.

Such modules (data2vec-vision, timm) have no attention interface to name another function in. While one of them runs, a
[`~torch.overrides.TorchFunctionMode`] puts the prefix into its call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .attention import extend_mask, prepend

if TYPE_CHECKING:
    from .layer import E2VPTLayer


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a module's own `forward` calls `scaled_dot_product_attention`."""
    forward = inspect.unwrap(type(module).forward)
    return "scaled_dot_product_attention" in forward.__code__.co_names


class PrefixMode(TorchFunctionMode):
    """Puts the prefix of a layer into the call of `scaled_dot_product_attention` that its attention makes.

    Args:
        layer ([`~e2vpt_peft.layer.E2VPTLayer`]): The adapted attention.
    """

    def __init__(self, layer: E2VPTLayer) -> None:
        super().__init__()
        self.layer: Optional[E2VPTLayer] = layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or self.layer is None:
            return func(*args, **kwargs)
        layer, self.layer = self.layer, None
        return _attend_with_prefix(layer, *args, **kwargs)

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and self.layer is not None:
            raise RuntimeError(
                f"{type(self.layer.base_layer).__name__} has not called scaled_dot_product_attention, so that its "
                "prompts had no effect. Let it: for timm, fused_attn=True."
            )


def _attend_with_prefix(
    layer: E2VPTLayer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Optional[torch.Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    if is_causal:
        raise ValueError(
            f"{type(layer.base_layer).__name__} ran with is_causal=True: E2VPT needs bidirectional attention."
        )
    prefix = layer.prefix(query.shape[0], query.dtype)
    attn_mask = extend_mask(attn_mask, prefix.keys.shape[1], prefix.visible, query, key.shape[2], "sdpa")
    key, value = prepend(prefix.keys, key), prepend(prefix.values, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
