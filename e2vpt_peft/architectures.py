"""What is known about architectures, as data, and how an attention module is understood from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from torch import nn

from .attention import eager_attention_of


class Architecture(NamedTuple):
    """Where one architecture has its self-attention.

    Attributes:
        target_modules (`list[str]`): Endings of the names of its self-attention modules.
        attention_norm (`str`): The norm in front of the attention, an attribute of its parent or grandparent, or
        `"none"`.
        num_special_tokens (`int`): Tokens in front of the image tokens; shallow visual prompts go behind them.
    """

    target_modules: list[str]
    attention_norm: str
    num_special_tokens: int


ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture(["attention"], "layernorm_before", num_special_tokens=1),
    "deit": Architecture(["attention"], "layernorm_before", num_special_tokens=2),
    "dinov2": Architecture(["attention"], "norm1", num_special_tokens=1),
}
"""Architectures with ready-made targets, by the `model_type` of their config."""

# How attention modules name their parts, for any architecture that goes through the attention interface.
KEY_PROJECTIONS = ("k_proj", "key", "k_lin")
VALUE_PROJECTIONS = ("v_proj", "value", "v_lin")
HEAD_SIZES = ("head_dim", "attention_head_size", "attention_head_dim")
NUM_HEADS = ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads")
ATTENTION_NORMS = ("layernorm_before", "norm1", "layer_norm1", "rms_norm1", "attn_norm")
KEY_NORMS = ("k_norm", "key_norm", "k_layernorm")


class AttentionSite(NamedTuple):
    """One self-attention module in its model: all that a prefix needs to know of it.

    Attributes:
        eager_attention (`Callable`): The eager attention function of its architecture.
        key_projection, value_projection (`str`): Attributes of the attention.
        num_heads, head_size, hidden_size (`int`): Heads and head size of its keys, and size of its input.
        norm_owner (`Optional[nn.Module]`): The module that has the norm in front of the attention, if there is one.
        norm_name (`str`): The name of the norm there.
        patch_fan_in (`int`): The number of values in an image patch, by which the paper scales its initialisation.
        num_special_tokens (`int`): Tokens in front of the image tokens.
    """

    eager_attention: Callable[..., Any]
    key_projection: str
    value_projection: str
    num_heads: int
    head_size: int
    hidden_size: int
    norm_owner: Optional[nn.Module]
    norm_name: str
    patch_fan_in: int
    num_special_tokens: int


def find_attention_site(model: nn.Module, name: str, attention_norm: Optional[str] = None) -> AttentionSite:
    """Understand the self-attention module `name` of `model`.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the module in it.
        attention_norm (`Optional[str]`): `E2VPTConfig.attention_norm`, which has the last word.

    Raises:
        ValueError: The module is no self-attention that takes a prefix; the message says why.
    """
    attention = model.get_submodule(name)
    refusal = f"target_modules matches '{name}' ({type(attention).__name__}), "
    eager_attention = eager_attention_of(attention)
    if eager_attention is None:
        raise ValueError(
            refusal + "which is no self-attention that calls transformers' attention interface. Name the attention "
            "modules themselves, for example target_modules=['attention'] for ViT."
        )
    if getattr(attention, "is_causal", True):  # the attention interface takes a missing attribute for causal, too
        raise ValueError(refusal + "which is causal: E2VPT needs bidirectional attention.")
    key = _first_attribute(attention, KEY_PROJECTIONS)
    value = _first_attribute(attention, VALUE_PROJECTIONS)
    head_size = _first_attribute(attention, HEAD_SIZES)
    num_heads = _first_attribute(attention, NUM_HEADS)
    if key is None or value is None or not (head_size or num_heads) or not hasattr(attention, "config"):
        raise ValueError(refusal + "which has no separate key and value projections, head size and config.")
    key_norm = _first_attribute(attention, KEY_NORMS)
    if key_norm is not None and not isinstance(getattr(attention, key_norm), nn.Identity):
        raise ValueError(refusal + f"which normalises its keys ('{key_norm}'): that is not supported.")

    config: Any = attention.config
    projection: Any = getattr(attention, key)
    width = projection.out_features
    heads = width // getattr(attention, head_size) if head_size else getattr(attention, num_heads or "")
    architecture = ARCHITECTURES.get(getattr(config, "model_type", ""))
    norm_name = attention_norm or (architecture.attention_norm if architecture else None)
    owner, norm_name = _find_norm(model, name, norm_name, refusal)
    return AttentionSite(
        eager_attention=eager_attention,
        key_projection=key,
        value_projection=value,
        num_heads=heads,
        head_size=width // heads,
        hidden_size=projection.in_features,
        norm_owner=owner,
        norm_name=norm_name,
        patch_fan_in=_patch_fan_in(config, projection.in_features),
        num_special_tokens=architecture.num_special_tokens if architecture else 0,
    )


def _first_attribute(module: nn.Module, names: tuple[str, ...]) -> Optional[str]:
    return next((name for name in names if hasattr(module, name)), None)


def _find_norm(model: nn.Module, name: str, norm_name: Optional[str], refusal: str) -> tuple[Optional[nn.Module], str]:
    if norm_name == "none":
        return None, "none"
    path = name.split(".")
    ancestors = [model.get_submodule(".".join(path[:depth])) for depth in (len(path) - 1, len(path) - 2) if depth >= 0]
    for owner in ancestors:
        found = _first_attribute(owner, (norm_name,) if norm_name else ATTENTION_NORMS)
        if found is not None:
            return owner, found
    looked_for = f"attention_norm={norm_name!r}" if norm_name else f"a norm named one of {', '.join(ATTENTION_NORMS)}"
    names = sorted({child for owner in ancestors for child, _ in owner.named_children()})
    raise ValueError(
        refusal + f"whose parents have no {looked_for}. Deep visual prompts pass the norm in front of the "
        f"attention: set attention_norm to its name (the parents have: {', '.join(names)}), or to 'none' if the "
        "model has none there."
    )


def _patch_fan_in(config: Any, hidden_size: int) -> int:
    """Values in a patch: 3 p² for square colour patches; the hidden size for models without patches."""
    patch_size = getattr(config, "patch_size", None)
    if patch_size is None:
        return hidden_size
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)[-2:]
    return int(getattr(config, "num_channels", 3) * height * width)
