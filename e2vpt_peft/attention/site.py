"""One self-attention module understood: all that a prefix needs to know of it, and no other module's business."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from ..utils.seen import Place, place_of
from .architectures import Architecture, architecture_of
from .interception import PrefixMode, ProductsMode, SdpaMode, ThroughTorchFunctions, calls_sdpa
from .interface import ThroughInterface, eager_attention_of
from .prefix import WayIn, forwards_of
from .quiet import quietly

# How attention modules name their parts, for any architecture.
KEY_PROJECTIONS = ("k_proj", "key", "k_lin")
VALUE_PROJECTIONS = ("v_proj", "value", "v_lin")
FUSED_PROJECTIONS = ("Wqkv", "qkv")
HEAD_SIZES = ("head_dim", "attention_head_size", "attention_head_dim")
NUM_HEADS = ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads")
ATTENTION_NORMS = ("layernorm_before", "norm1", "layer_norm1", "rms_norm1", "attn_norm")
KEY_NORMS = ("k_norm", "key_norm", "k_layernorm")
# By which a module that takes other keys and values than its queries gives itself away.
CROSS_ATTENTION_INPUTS = {"encoder_hidden_states", "keys", "key"}


class NotAdaptable(ValueError):
    """A module is no self-attention that takes a prefix.

    Attributes:
        module (`str`): Its name and its class.
        reason (`str`): Why not, to be read behind that.
    """

    def __init__(self, name: str, attention: nn.Module, reason: str) -> None:
        self.module = f"'{name}' ({type(attention).__name__})"
        self.reason = reason
        super().__init__(f"target_modules matches {self.module}, {reason}")


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention module in its model.

    Attributes:
        attention (`nn.Module`): The module.
        config (`Any`): Its own config, or `None` if it has none.
        way_in (`WayIn`): How a prefix gets into it.
        key_projection, value_projection (`str`):
            Attributes of the attention; the same one if it projects queries, keys and values in one.
        key_norm (`Optional[str]`): The attribute that normalises projected keys, if there is one.
        num_heads, head_size, hidden_size (`int`): Heads and head size of its keys, and size of its input.
        norm_owner (`Optional[nn.Module]`): The module that has the norm in front of the attention, if there is one.
        norm_name (`str`): The name of the norm there.
        patch_fan_in (`int`): The number of values in an image patch, by which the paper scales its initialisation.
        num_special_tokens (`int`): Tokens in front of the others.
        num_tokens_behind (`int`): Tokens behind the others.
        takes_tokens (`bool`): Whether tokens can be inserted (see [`Architecture`]).
    """

    attention: nn.Module
    config: Any
    way_in: WayIn
    key_projection: str
    value_projection: str
    key_norm: str | None
    num_heads: int
    head_size: int
    hidden_size: int
    norm_owner: nn.Module | None
    norm_name: str
    patch_fan_in: int
    num_special_tokens: int
    num_tokens_behind: int
    takes_tokens: bool

    @property
    def norm(self) -> nn.Module | None:
        """The norm in front of the attention, if there is one.

        Looked up at every call, because it may be wrapped later, for example by `modules_to_save`.
        """
        return None if self.norm_owner is None else getattr(self.norm_owner, self.norm_name)

    def projections(self) -> list[nn.Module]:
        """The modules that make keys and values of normed states, and the norm of keys if there is one."""
        return [self._part(name) for name in self._projection_names()]

    def places(self) -> list[Place]:
        """Where norm and projections are found."""
        norm = [] if self.norm_owner is None else [place_of(self.norm_owner, self.norm_name)]
        return norm + [place_of(self.attention, name) for name in self._projection_names()]

    def _projection_names(self) -> list[str]:
        return sorted({self.key_projection, self.value_projection, self.key_norm or self.key_projection})

    def normalize(self, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Put states through the norm in front of the attention.

        Args:
            states (`torch.Tensor`): Of shape (..., hidden size).
            dtype (`torch.dtype`): The type to compute in where there is no norm, or it has no weight.
        """
        norm = self.norm
        weight = getattr(norm, "weight", None)
        states = states.to(dtype if weight is None else weight.dtype)
        return states if norm is None else quietly(norm, states)

    def project(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of normed states.

        Args:
            normed (`torch.Tensor`): Of shape (..., length, hidden size).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Keys and values, each (..., length, heads, head size).
        """
        heads = (self.num_heads, self.head_size)
        key_projection, value_projection = self._part(self.key_projection), self._part(self.value_projection)
        if self.key_projection == self.value_projection:
            _, keys, values = quietly(key_projection, normed).unflatten(-1, (3, *heads)).unbind(-3)
        else:
            keys = quietly(key_projection, normed).unflatten(-1, heads)
            values = quietly(value_projection, normed).unflatten(-1, heads)
        if self.key_norm is not None:
            key_norm = self._part(self.key_norm)
            if isinstance(key_norm, nn.Identity) or key_norm.weight.numel() == self.head_size:
                keys = quietly(key_norm, keys)
            else:  # over all heads together
                keys = quietly(key_norm, keys.flatten(-2)).unflatten(-1, heads)
        return keys, values

    def _part(self, name: str) -> Any:
        return getattr(self.attention, name)


def find_attention_site(
    model: nn.Module,
    name: str,
    attention_norm: str | None = None,
    num_special_tokens: int | None = None,
) -> AttentionSite:
    """Understand the self-attention module `name` of `model`.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the module in it.
        attention_norm (`Optional[str]`): `E2VPTConfig.attention_norm`, which has the last word.
        num_special_tokens (`Optional[int]`): `E2VPTConfig.num_special_tokens`, likewise.

    Raises:
        NotAdaptable: The module is no self-attention that takes a prefix; the message says why.
    """
    attention = model.get_submodule(name)
    architecture = architecture_of(attention)
    way_in = _find_way_in(name, attention, architecture)
    fused = _first_attribute(attention, FUSED_PROJECTIONS)
    key = fused or _first_attribute(attention, KEY_PROJECTIONS)
    value = fused or _first_attribute(attention, VALUE_PROJECTIONS)
    head_size = _first_attribute(attention, HEAD_SIZES)
    num_heads = _first_attribute(attention, NUM_HEADS)
    if key is None or value is None or not (head_size or num_heads):
        raise NotAdaptable(
            name, attention, "which has no key and value projections, or no head size, by a known name."
        )
    if fused and getattr(attention, "q_bias", None) is not None:
        raise NotAdaptable(
            name, attention, f"which adds the bias of its projection '{fused}' by itself: that is not supported."
        )
    key_norm = _first_attribute(attention, KEY_NORMS)
    config: Any = getattr(attention, "config", getattr(model, "config", None))
    projection: Any = getattr(attention, key)
    width = projection.out_features // (3 if fused else 1)
    heads = width // getattr(attention, head_size) if head_size else getattr(attention, num_heads or "")
    norm_owner, norm_name = _find_norm(model, name, attention_norm, architecture)
    special_tokens, tokens_behind = _count_tokens(architecture, config)
    return AttentionSite(
        attention=attention,
        config=getattr(attention, "config", None),
        way_in=way_in,
        key_projection=key,
        value_projection=value,
        key_norm=key_norm if isinstance(getattr(attention, key_norm or "", None), nn.Module) else None,
        num_heads=heads,
        head_size=width // heads,
        hidden_size=projection.in_features,
        norm_owner=norm_owner,
        norm_name=norm_name,
        patch_fan_in=_patch_fan_in(config, projection.in_features),
        num_special_tokens=special_tokens if num_special_tokens is None else num_special_tokens,
        num_tokens_behind=tokens_behind,
        takes_tokens=num_special_tokens is not None or architecture is None or architecture.takes_tokens,
    )


def _find_way_in(name: str, attention: nn.Module, architecture: Architecture | None) -> WayIn:
    eager: Callable[..., Any] | None = None
    mode: type[PrefixMode] | None = None
    for forward in forwards_of(attention):
        eager = eager_attention_of(forward)
        if eager is None and calls_sdpa(forward) and getattr(attention, "fused_attn", True):  # which is timm's switch
            mode = SdpaMode
        if eager is not None or mode is not None:
            break
    if eager is None and mode is None and architecture is not None and architecture.written_out:
        mode = ProductsMode
    if eager is None and mode is None:
        raise NotAdaptable(
            name,
            attention,
            "which is no self-attention that calls transformers' attention interface or PyTorch's "
            "scaled_dot_product_attention. Name the attention modules themselves, for example "
            "target_modules=['attention'] for ViT. Attention that multiplies its matrices by hand cannot be adapted "
            "where the package does not know how it does that.",
        )
    # The attention interface takes a missing attribute for causal, too.
    if getattr(attention, "is_causal", eager is not None):
        raise NotAdaptable(name, attention, "which is causal: E2VPT needs bidirectional attention.")
    inputs = inspect.signature(type(attention).forward).parameters.keys()
    if inputs & CROSS_ATTENTION_INPUTS:
        raise NotAdaptable(name, attention, "which is cross-attention: E2VPT needs self-attention.")
    known_as = f"'{name}' ({type(attention).__name__})"
    if eager is None:
        assert mode is not None
        return ThroughTorchFunctions(mode, known_as)
    if not hasattr(attention, "config"):
        raise NotAdaptable(name, attention, "which has no config.")
    return ThroughInterface(eager, known_as)


def _first_attribute(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if hasattr(module, name)), None)


def _find_norm(
    model: nn.Module, name: str, attention_norm: str | None, architecture: Architecture | None
) -> tuple[nn.Module | None, str]:
    """The module that has the norm in front of the attention, and the norm's name there."""
    path = name.split(".")
    ancestors = [model.get_submodule(".".join(path[:depth])) for depth in (len(path) - 1, len(path) - 2) if depth >= 0]
    norm_name = attention_norm
    if norm_name is None and architecture is not None:
        norm_name = architecture.norm if isinstance(architecture.norm, str) else None
        if isinstance(architecture.norm, dict):
            norm_name = architecture.norm.get(type(ancestors[0]).__name__)
    if norm_name == "none":
        return None, "none"
    for owner in ancestors:
        found = _first_attribute(owner, (norm_name,) if norm_name else ATTENTION_NORMS)
        if found is not None:
            norm = getattr(owner, found)
            # Norms have vectors; anything else may be the attention itself, and never come to an end.
            if not isinstance(norm, nn.Module) or any(parameter.dim() > 1 for parameter in norm.parameters()):
                raise NotAdaptable(
                    name,
                    model.get_submodule(name),
                    f"for which attention_norm={found!r} is no norm, but {type(norm).__name__}.",
                )
            return owner, found
    looked_for = f"attention_norm={norm_name!r}" if norm_name else f"norm named one of {', '.join(ATTENTION_NORMS)}"
    names = sorted({child for owner in ancestors for child, _ in owner.named_children()})
    raise NotAdaptable(
        name,
        model.get_submodule(name),
        f"whose parents have no {looked_for}. Deep visual prompts pass the norm in front of the attention: set "
        f"attention_norm to its name (the parents have: {', '.join(names)}), or to 'none' if the model has none "
        "there.",
    )


def _count_tokens(architecture: Architecture | None, config: Any) -> tuple[int, int]:
    """The numbers of tokens in front of the others, and behind them."""
    if architecture is None:
        return 0, 0
    front, more, behind = architecture.special_tokens, architecture.more_special_tokens, architecture.tokens_behind
    return front + (getattr(config, more) if more else 0), getattr(config, behind) if behind else 0


def _patch_fan_in(config: Any, hidden_size: int) -> int:
    """Values in a patch, 3 p² for square colour patches; the hidden size for models without patches."""
    patch_size = getattr(config, "patch_size", None)
    tubelet_size = getattr(config, "tubelet_size", 1)
    if isinstance(tubelet_size, (list, tuple)):  # frames, height and width
        patch_size, tubelet_size = tuple(tubelet_size)[1:], tubelet_size[0]
    if patch_size is None:
        return hidden_size
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    return int(prod((getattr(config, "num_channels", 3), tubelet_size, height, width)))
