"""A key-value prefix for self-attention that has no attention interface to name another function in.

While such a module runs, a [`~torch.overrides.TorchFunctionMode`] puts the prefix into the functions that it calls:
into PyTorch's `scaled_dot_product_attention` (data2vec-vision, timm), or into the two products and the softmax of
attention that is written out (swinv2). What cannot be followed raises an error, so that prompts are never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .beside import add_beside
from .mask import extend_mask
from .prefix import (
    Attending,
    KeysAndValues,
    PrefixSource,
    WayIn,
    attending,
    is_traced_for_training,
    prepend,
)


class ThroughTorchFunctions(WayIn):
    """The way in for attention that calls no attention interface.

    Args:
        mode (`type[PrefixMode]`): How the prefix is put in.
        attention (`str`): What errors call the attention.
    """

    def __init__(self, mode: type[PrefixMode], attention: str) -> None:
        self.mode = mode
        self.attention = attention
        self.expected = mode.expected

    def running(self, source: PrefixSource) -> AbstractContextManager[Any]:
        if attending(source) is not None or not source.has_prefix:
            return nullcontext()
        return self._intercepted(Attending(source, self.attention, self.expected))

    @contextmanager
    def _intercepted(self, current: Attending) -> Iterator[None]:
        if is_traced_for_training(current.source):
            with self.mode(current):
                yield
            current.check()
        else:
            with current, self.mode(current):
                yield

    def implementation(self, config: Any) -> str:
        return self.mode.implementation


def calls_sdpa(forward: Any) -> bool:
    """Whether a `forward` calls `scaled_dot_product_attention`."""
    return "scaled_dot_product_attention" in forward.__code__.co_names


class PrefixMode(TorchFunctionMode):
    """Puts a prefix into the torch functions that an attention calls.

    Args:
        current (`Attending`): The pass of the attention that the prefix is for.
    """

    implementation: str
    """What transformers calls an attention that does the same."""

    expected: str
    """What the attention has to do."""

    def __init__(self, current: Attending) -> None:
        super().__init__()
        self.attending = current
        self.source = current.source
        self.attention = current.attention


class SdpaMode(PrefixMode):
    """Puts a prefix into the call of `scaled_dot_product_attention` that an attention makes."""

    implementation = "sdpa"
    expected = "called scaled_dot_product_attention (timm: set fused_attn=True)"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.attending.is_done = True
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        if is_causal:
            raise ValueError(f"{self.attention} ran with is_causal=True: E2VPT needs bidirectional attention.")
        prefix = self.source.prefix(query.shape[0], query.dtype, query.device)
        attn_mask = extend_mask(
            attn_mask,
            prefix.keys.shape[1],
            query,
            key.shape[2],
            self.implementation,
            visible=prefix.visible,
            bias=prefix.bias,
        )
        key, value = prepend(prefix.keys, key), prepend(prefix.values, value)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **kwargs)
        if prefix.beside is None:
            return output
        return add_beside(output, query, prefix.beside, kwargs.get("scale"))


# What may happen to attention scores between the first product and the second, by the names of PyTorch's functions.
SCALING = {"mul", "div", "truediv"}
ADDING = {"add", "iadd", "masked_fill"}
RESHAPING = {"view", "reshape", "contiguous", "float", "to", "type_as"}


class ProductsMode(PrefixMode):
    """Puts a prefix into attention that is written out: `softmax(q k^T ...) v`.

    The scores of the prefix are kept beside those of the sequence: both are scaled alike, only the latter have a
    position bias or a mask, one softmax is over both, and the second product is the sum of both parts. Keys that are
    normalised before the first product (cosine attention) are so in the prefix, too.
    """

    implementation = "eager"
    expected = "computed its attention as expected, by two products and a softmax"

    def __init__(self, current: Attending) -> None:
        super().__init__(current)
        self.normalized: list[torch.Tensor] = []
        self.own: torch.Tensor | None = None
        """The scores, later probabilities, of the sequence: (batch size, heads, length, length)."""
        self.prefixed: torch.Tensor | None = None
        """Those of the prefix: (batch size, heads, length, prefix length)."""
        self.values: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.beside: torch.Tensor | None = None
        """The scores, later activations, of what is read beside the attention, and its values."""
        self.values_beside: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__.strip("_")
        if self.own is not None and not self.attending.is_done and any(arg is self.own for arg in args):
            return self._follow(func, name, args, kwargs)
        result = func(*args, **kwargs)
        if self.own is not None:
            return result
        if name == "normalize" or (name == "transpose" and self._is_normalized(args[0])):
            self.normalized.append(result)
        elif name == "matmul" and args[0].dim() == 4 and result.shape[-2] == result.shape[-1]:
            self._start(args[0], args[1], result)
        return result

    def _is_normalized(self, tensor: torch.Tensor) -> bool:
        return any(tensor is other for other in self.normalized)

    def _start(self, query: torch.Tensor, key: torch.Tensor, scores: torch.Tensor) -> None:
        prefix = self.source.prefix(query.shape[0], query.dtype, query.device)
        self.own = scores
        self.prefixed, self.values = self._scores(query, key, (prefix.keys, prefix.values))
        if prefix.beside is not None:
            self.beside, self.values_beside = self._scores(query, key, prefix.beside)
        if prefix.visible is not None:
            self.prefixed = self.prefixed.masked_fill(~prefix.visible[:, None, None], float("-inf"))
        self.bias = prefix.bias

    def _scores(self, query: torch.Tensor, key: torch.Tensor, rows: KeysAndValues) -> KeysAndValues:
        """The scores of more keys, and their values."""
        keys, values = (part.transpose(1, 2).to(query.dtype) for part in rows)
        if self._is_normalized(key):
            keys = F.normalize(keys, dim=-1)
        return query @ keys.transpose(-1, -2), values

    def _follow(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        assert self.prefixed is not None and self.values is not None
        if name == "softmax":
            count = self.prefixed.shape[-1]
            if self.bias is not None:  # here, behind the scaling of the scores
                self.prefixed = self.prefixed + self.bias[:, None, None]
            if self.beside is not None:
                self.beside = F.gelu(self.beside)
            both = torch.cat([self.prefixed, args[0].view(*self.prefixed.shape[:-1], -1)], -1)
            self.prefixed, self.own = func(both, *args[1:], **kwargs).tensor_split([count], -1)
            return self.own
        result = func(*args, **kwargs)
        if name in SCALING and args[0] is self.own and _is_one_per_row(args[1]):
            self.prefixed = func(self.prefixed, args[1])
            if self.beside is not None:
                self.beside = func(self.beside, args[1])
        elif name == "dropout":
            self.prefixed = func(self.prefixed, *args[1:], **kwargs)
        elif name == "matmul" and args[0] is self.own:
            self.attending.is_done = True
            result = result + self.prefixed @ self.values
            if self.beside is not None and self.values_beside is not None:
                result = result + self.beside @ self.values_beside
            return result
        elif name not in ADDING | RESHAPING:
            raise RuntimeError(
                f"{self.attention} does something to its attention scores by which prompts cannot be followed: {name}."
            )
        self.own = result
        return result


def _is_one_per_row(factor: Any) -> bool:
    return not isinstance(factor, torch.Tensor) or factor.dim() == 0 or factor.shape[-1] == 1
