"""A prefix through transformers' attention interface, for any self-attention that calls it.

transformers routes self-attention through `ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation,
...)`, so that no code of any model has to be rewritten. The stations of one forward call:

1. The tuner layer's `forward` calls the attention that it wraps. Around that, an
   [`~e2vpt_peft.attention.prefix.Attending`] waits to hear that the prefix was used.
2. The attention reads `self.config._attn_implementation`. Its `config` has been replaced by a [`PrefixedConfig`], a
   view of the real one, which asks the layer whether the running pass has a prefix (`has_prefix`).
3. If it has none, the view gives the model's own setting, and the pass is that of the bare backbone.
4. If it has one, the view names [`prefix_attention`], which the attention then calls with its queries, keys and
   values.
5. [`prefix_attention`] asks the layer for the prefix (`prefix`): visual prompts through the site's norm and
   projections, and key-value prompts as they are.
6. It puts the prefix in front of keys and values, makes room for it in the mask
   ([`~e2vpt_peft.attention.mask.extend_mask`]), and hands over to the implementation that the model is set to.
7. That implementation reads settings from the module that it is given. It is given the layer, which has the real
   config and whatever else the attention has; given the attention, it would find the view and itself again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .beside import add_beside
from .flex import avoid_faulty_head_size
from .mask import extend_mask
from .prefix import PrefixSource, WayIn, attending, prepend

PREFIX_ATTENTION = "e2vpt_prefix"
"""The name of [`prefix_attention`] in transformers' attention interface."""


class ThroughInterface(WayIn):
    """The way in for attention that calls transformers' attention interface.

    Args:
        eager (`Callable`): The eager attention function that the architecture passes to the interface.
        attention (`str`): What errors call the attention.
    """

    expected = "called transformers' attention interface by the name in self.config._attn_implementation"

    def __init__(self, eager: Callable[..., Any], attention: str) -> None:
        self.eager = eager
        self.attention = attention

    def attach(self, attention: nn.Module, source: PrefixSource) -> None:
        attention.config = PrefixedConfig(attention.config, source, self.eager)  # type: ignore[assignment]

    def detach(self, attention: nn.Module) -> None:
        attention.config = self.config(attention)

    def config(self, attention: nn.Module) -> Any:
        config: Any = attention.config
        return config._config if isinstance(config, PrefixedConfig) else config

    def set_config(self, attention: nn.Module, config: Any) -> None:
        view: Any = attention.config
        view._config = config

    def implementation(self, config: Any) -> str:
        implementation: str = config._attn_implementation
        return implementation


class PrefixedConfig:
    """Reads through to the config of an adapted attention module, and names `prefix_attention` while there is a
    prefix.

    Nothing is copied, so that `model.set_attn_implementation(...)`, which writes to the real config, keeps its effect.
    """

    def __init__(self, config: Any, source: PrefixSource, eager: Callable[..., Any]) -> None:
        self._config = config
        self._source = source
        self._eager = eager

    @property
    def _attn_implementation(self) -> str:
        # The layer has just asked itself, unless somebody runs the wrapped attention alone.
        has_prefix = attending(self._source) is not None or self._source.has_prefix
        return PREFIX_ATTENTION if has_prefix else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name in ("_config", "_source", "_eager") or name.startswith("__"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self._config, name)


def prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """Attention over `[prefix ; keys]` and `[prefix ; values]`, by the implementation that the model is set to.

    Args:
        module (`nn.Module`): The adapted attention module.
        query, key, value (`torch.Tensor`): Of shape (batch size, heads, sequence length, head size).
        attention_mask: As the configured implementation takes it.

    Returns:
        What that implementation returns: outputs, and attention weights or `None`. Attention weights have a column for
        every prefix row, before those of the sequence.

    Raises:
        ValueError: The attention has a window that the implementation counts from the first key.
    """
    view: Any = module.config
    source, implementation = view._source, view._config._attn_implementation
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
    prefix = source.prefix(query.shape[0], query.dtype, query.device)
    count = prefix.keys.shape[1]
    attention_mask = extend_mask(
        attention_mask, count, query, key.shape[2], implementation, visible=prefix.visible, bias=prefix.bias
    )
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0))
    key, value = prepend(prefix.keys, key), prepend(prefix.values, value)
    unpadded, scaling = query, kwargs.get("scaling")
    if implementation == "flex_attention":
        query, key, kwargs["scaling"] = avoid_faulty_head_size(query, key, scaling)
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, view._eager)
    current = attending(source)
    if current is not None:  # else the wrapped attention was called by itself
        current.is_done = current.hands_over = True
    result = attend(source, query, key, value, attention_mask, **kwargs)
    if current is not None:
        current.hands_over = False
    if prefix.beside is None:
        return result
    output, *others = result
    return add_beside(output.transpose(1, 2), unpadded, prefix.beside, scaling).transpose(1, 2), *others


def eager_attention_of(forward: Any) -> Callable[..., Any] | None:
    """The eager attention function that a `forward` passes to the attention interface; `None` if it calls no such."""
    # By the names in its bytecode: the call itself may come after branches that depend on the inputs.
    names = forward.__code__.co_names
    if "get_interface" not in names:
        return None
    eager = next((name for name in names if name.endswith("eager_attention_forward")), None)
    return forward.__globals__[eager] if eager is not None else None


AttentionInterface.register(PREFIX_ATTENTION, prefix_attention)
