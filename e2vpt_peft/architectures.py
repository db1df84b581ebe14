"""What is known about architectures, as data, and how an attention module is understood from it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple, Optional

from torch import nn

from .attention import eager_attention_of
from .interception import ProductsMode, SdpaMode, calls_sdpa


class Architecture(NamedTuple):
    """Where one architecture has its self-attention.

    Attributes:
        attention (`str`): Where its self-attention modules are: the ending of their names, with N for an index.
        norm (`str` or `dict[str, str]`):
            The norm in front of the attention, an attribute of its parent or grandparent, or `"none"` (post-norm); by
            the class of the layer where that makes a difference.
        special_tokens (`Optional[int]`):
            Tokens in front of the others, behind which shallow visual prompts go. `None` where no token can be
            inserted, because there are windows, or positions that belong to the layers.
        more_special_tokens (`str`): The field of the model's config that has the number of further special tokens.
        modality (`"vision"`, `"audio"` or `"text"`): In models with several towers, the first of these is adapted.
        written_out (`bool`):
            Whether its attention may be written out as products and a softmax, in a way that
            [`~e2vpt_peft.interception.ProductsMode`] follows.
    """

    attention: str
    norm: str | dict[str, str]
    special_tokens: Optional[int]
    more_special_tokens: str = ""
    modality: Literal["vision", "audio", "text"] = "vision"
    written_out: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "aimv2_vision_model": Architecture("encoder.layers.N.attention", "rms_norm1", 0),
    "audio-spectrogram-transformer": Architecture("layers.N.attention", "layernorm_before", 2, modality="audio"),
    "beit": Architecture("layers.N.attention", "layernorm_before", None),
    "bert": Architecture("encoder.layer.N.attention.self", "none", 1, modality="text"),
    "clip_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 1),
    "data2vec-vision": Architecture("encoder.layer.N.attention.attention", "layernorm_before", None, written_out=True),
    "deit": Architecture("layers.N.attention", "layernorm_before", 2),
    "dinov2": Architecture("encoder.layer.N.attention", "norm1", 1),
    "dinov2_with_registers": Architecture("encoder.layer.N.attention", "norm1", 1, "num_register_tokens"),
    "dinov3_vit": Architecture("layer.N.attention", "norm1", 1, "num_register_tokens"),
    "distilbert": Architecture("transformer.layer.N.attention", "none", 1, modality="text"),
    "dpt": Architecture("encoder.layer.N.attention.attention", "layernorm_before", 1),
    "eomt": Architecture("layers.N.attention", "norm1", None),
    "eomt_dinov3": Architecture("layers.N.attention", "norm1", None),
    "ijepa": Architecture("layers.N.attention", "layernorm_before", 0),
    "internvl_vision": Architecture("encoder.layer.N.attention", "layernorm_before", 1),
    "modernbert": Architecture("layers.N.attn", "attn_norm", None, modality="text"),
    "owlv2_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 1),
    "owlvit_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 1),
    "pixio": Architecture("layers.N.attention", "layernorm_before", 0, "n_cls_tokens"),
    "roberta": Architecture("encoder.layer.N.attention.self", "none", 1, modality="text"),
    "siglip2_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 0),
    "siglip_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 0),
    "swin": Architecture("encoder.layers.N.blocks.N.attention", "layernorm_before", None),
    "swinv2": Architecture("encoder.layers.N.blocks.N.attention.self", "none", None, written_out=True),
    "timm": Architecture("blocks.N.attn", "norm1", None, written_out=True),
    "videomae": Architecture("encoder.layer.N.attention.attention", "layernorm_before", 0),
    "vit": Architecture("layers.N.attention", "layernorm_before", 1),
    "vit_mae": Architecture("layers.N.attention", "layernorm_before", 1),
    "vit_msn": Architecture("layers.N.attention", "layernorm_before", 1),
    "vivit": Architecture("layers.N.attention", "layernorm_before", 1),
    "vjepa2": Architecture("encoder.layer.N.attention", "norm1", None),
    "wav2vec2": Architecture(
        "encoder.layers.N.attention",
        {"Wav2Vec2EncoderLayer": "none", "Wav2Vec2EncoderLayerStableLayerNorm": "layer_norm"},
        0,
        modality="audio",
    ),
    "yolos": Architecture("encoder.layer.N.attention.attention", "layernorm_before", None),
}
"""Architectures with ready-made targets, by the `model_type` of the config of their attention modules, or, where those
have no config, by the package that they are from."""

MODALITIES = ("vision", "audio", "text")

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


class AttentionSite(NamedTuple):
    """One self-attention module in its model: all that a prefix needs to know of it.

    Attributes:
        eager_attention (`Optional[Callable]`):
            The eager attention function of its architecture, if it goes through transformers' attention interface.
        interception (`Optional[type]`): Else, the mode of [`~e2vpt_peft.interception`] by which a prefix is put in.
        key_projection, value_projection (`str`):
            Attributes of the attention; the same one if it projects queries, keys and values in one.
        key_norm (`Optional[str]`): The attribute that normalises projected keys, if there is one.
        num_heads, head_size, hidden_size (`int`): Heads and head size of its keys, and size of its input.
        norm_owner (`Optional[nn.Module]`): The module that has the norm in front of the attention, if there is one.
        norm_name (`str`): The name of the norm there.
        patch_fan_in (`int`): The number of values in an image patch, by which the paper scales its initialisation.
        num_special_tokens (`Optional[int]`):
            Tokens in front of the others, or `None` if no token can be inserted (see [`Architecture`]).
    """

    eager_attention: Optional[Callable[..., Any]]
    interception: Optional[type[SdpaMode | ProductsMode]]
    key_projection: str
    value_projection: str
    key_norm: Optional[str]
    num_heads: int
    head_size: int
    hidden_size: int
    norm_owner: Optional[nn.Module]
    norm_name: str
    patch_fan_in: int
    num_special_tokens: Optional[int]


def find_default_targets(model: nn.Module) -> list[str]:
    """The self-attention modules that are adapted when no `target_modules` are given.

    Args:
        model (`nn.Module`): The model.

    Returns:
        `list[str]`: A single ending of names if it means the same modules, else all their names; empty if none of the
        model's architectures is known. In models with several towers those of the first of [`MODALITIES`].
    """
    found: dict[str, list[str]] = {modality: [] for modality in MODALITIES}
    endings = set()
    for name, module in model.named_modules():
        architecture = architecture_of(module)
        if architecture is not None and re.search(_pattern(architecture.attention), name):
            found[architecture.modality].append(name)
            endings.add(architecture.attention.rpartition("N.")[2])
    names = next((found[modality] for modality in MODALITIES if found[modality]), [])
    for ending in endings:
        if [name for name, _ in model.named_modules() if name.endswith(f".{ending}")] == names:
            return [ending]
    return names


def explain_no_default_targets(model: nn.Module) -> str:
    """Why there are no default targets for a model, for people who may not know what its attention is made of."""
    message = "target_modules=None: there are no ready-made targets for this model"
    for name, module in model.named_modules():
        is_innermost = not any("Attention" in type(part).__name__ for part in list(module.modules())[1:])
        if "Attention" not in type(module).__name__ or not is_innermost:
            continue
        try:
            find_attention_site(model, name)
        except ValueError as error:
            return f"{message}. {str(error).replace('target_modules matches', 'It has', 1)}"
        return (
            f"{message}, but '{name}' ({type(module).__name__}) looks like an attention that can be adapted. Set "
            "target_modules to the names of the self-attention modules, and check the result with check_prefix."
        )
    return f"{message}, which has no module with 'Attention' in the name of its class."


def architecture_of(attention: nn.Module) -> Optional[Architecture]:
    """What is known about the architecture that an attention module, adapted or not, belongs to."""
    path = type(getattr(attention, "base_layer", attention)).__module__.split(".")
    package = path[2] if path[:2] == ["transformers", "models"] else path[0]
    return ARCHITECTURES.get(getattr(getattr(attention, "config", None), "model_type", package))


def _pattern(names: str) -> str:
    return r"(^|\.)" + re.escape(names).replace("N", r"\d+") + "$"


def find_attention_site(
    model: nn.Module,
    name: str,
    attention_norm: Optional[str] = None,
    num_special_tokens: Optional[int] = None,
) -> AttentionSite:
    """Understand the self-attention module `name` of `model`.

    Args:
        model (`nn.Module`): The model.
        name (`str`): The name of the module in it.
        attention_norm (`Optional[str]`): `E2VPTConfig.attention_norm`, which has the last word.
        num_special_tokens (`Optional[int]`): `E2VPTConfig.num_special_tokens`, likewise.

    Raises:
        ValueError: The module is no self-attention that takes a prefix; the message says why.
    """
    attention = model.get_submodule(name)
    refusal = f"target_modules matches '{name}' ({type(attention).__name__}), "
    architecture = architecture_of(attention)
    eager_attention = eager_attention_of(attention)
    interception = None if eager_attention is not None else _interception_of(attention, architecture)
    if eager_attention is None and interception is None:
        raise ValueError(
            refusal + "which is no self-attention that calls transformers' attention interface or PyTorch's "
            "scaled_dot_product_attention. Name the attention modules themselves, for example "
            "target_modules=['attention'] for ViT. Attention that multiplies its matrices by hand cannot be adapted "
            "where the package does not know how it does that."
        )
    # The attention interface takes a missing attribute for causal, too.
    if getattr(attention, "is_causal", eager_attention is not None):
        raise ValueError(refusal + "which is causal: E2VPT needs bidirectional attention.")
    inputs = inspect.signature(type(attention).forward).parameters.keys()
    if inputs & CROSS_ATTENTION_INPUTS:
        raise ValueError(refusal + "which is cross-attention: E2VPT needs self-attention.")
    fused = _first_attribute(attention, FUSED_PROJECTIONS)
    key = fused or _first_attribute(attention, KEY_PROJECTIONS)
    value = fused or _first_attribute(attention, VALUE_PROJECTIONS)
    head_size = _first_attribute(attention, HEAD_SIZES)
    num_heads = _first_attribute(attention, NUM_HEADS)
    if key is None or value is None or not (head_size or num_heads):
        raise ValueError(refusal + "which has no key and value projections, or no head size, by a known name.")
    if fused and getattr(attention, "q_bias", None) is not None:
        raise ValueError(
            refusal + f"which adds the bias of its projection '{fused}' by itself: that is not supported."
        )
    if eager_attention is not None and not hasattr(attention, "config"):
        raise ValueError(refusal + "which has no config.")
    key_norm = _first_attribute(attention, KEY_NORMS)

    config: Any = getattr(attention, "config", getattr(model, "config", None))
    projection: Any = getattr(attention, key)
    width = projection.out_features // (3 if fused else 1)
    heads = width // getattr(attention, head_size) if head_size else getattr(attention, num_heads or "")
    owner, norm_name = _find_norm(model, name, attention_norm, architecture, refusal)
    special_tokens: Optional[int] = 0
    if num_special_tokens is not None:
        special_tokens = num_special_tokens
    elif architecture is not None:
        special_tokens = architecture.special_tokens
        if special_tokens is not None and architecture.more_special_tokens:
            special_tokens += getattr(config, architecture.more_special_tokens)
    return AttentionSite(
        eager_attention=eager_attention,
        interception=interception,
        key_projection=key,
        value_projection=value,
        key_norm=key_norm if isinstance(getattr(attention, key_norm or "", None), nn.Module) else None,
        num_heads=heads,
        head_size=width // heads,
        hidden_size=projection.in_features,
        norm_owner=owner,
        norm_name=norm_name,
        patch_fan_in=_patch_fan_in(config, projection.in_features),
        num_special_tokens=special_tokens,
    )


def _interception_of(
    attention: nn.Module, architecture: Optional[Architecture]
) -> Optional[type[SdpaMode | ProductsMode]]:
    if calls_sdpa(attention) and getattr(attention, "fused_attn", True):  # which is timm's switch
        return SdpaMode
    return ProductsMode if architecture is not None and architecture.written_out else None


def _first_attribute(module: nn.Module, names: tuple[str, ...]) -> Optional[str]:
    return next((name for name in names if hasattr(module, name)), None)


def _find_norm(
    model: nn.Module, name: str, attention_norm: Optional[str], architecture: Optional[Architecture], refusal: str
) -> tuple[Optional[nn.Module], str]:
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
                raise ValueError(
                    refusal + f"for which attention_norm={found!r} is no norm, but {type(norm).__name__}."
                )
            return owner, found
    looked_for = f"attention_norm={norm_name!r}" if norm_name else f"a norm named one of {', '.join(ATTENTION_NORMS)}"
    names = sorted({child for owner in ancestors for child, _ in owner.named_children()})
    raise ValueError(
        refusal + f"whose parents have no {looked_for}. Deep visual prompts pass the norm in front of the "
        f"attention: set attention_norm to its name (the parents have: {', '.join(names)}), or to 'none' if the "
        "model has none there."
    )


def _patch_fan_in(config: Any, hidden_size: int) -> int:
    """Values in a patch, 3 p² for square colour patches; the hidden size for models without patches."""
    patch_size = getattr(config, "patch_size", None)
    tubelet_size = getattr(config, "tubelet_size", 1)
    if isinstance(tubelet_size, (list, tuple)):  # frames, height and width
        patch_size, tubelet_size = tuple(tubelet_size)[1:], tubelet_size[0]
    if patch_size is None:
        return hidden_size
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)[-2:]
    return int(prod((getattr(config, "num_channels", 3), tubelet_size, height, width)))
