"""What is known about architectures, as one table."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn


class Architecture(NamedTuple):
    """Where one architecture has its self-attention, and its tokens.

    Attributes:
        attention (`str`): Where its self-attention modules are: the ending of their names, with N for an index.
        norm (`str` or `dict[str, str]`):
            The norm in front of the attention, an attribute of its parent or grandparent, or `"none"` (post-norm); by
            the class of the layer where that makes a difference.
        special_tokens (`int`): Tokens in front of the others, behind which shallow visual prompts go.
        more_special_tokens (`str`): The field of the model's config that has the number of further special tokens.
        tokens_behind (`str`): The field of the model's config that has the number of tokens behind the others.
        takes_tokens (`bool`):
            Whether tokens can be inserted, for shallow visual prompts. They cannot where there are windows, or
            positions that belong to the layers.
        modality (`"vision"`, `"audio"` or `"text"`): In models with several towers, the first of these is adapted.
        written_out (`bool`):
            Whether its attention may be written out as products and a softmax, in a way that
            [`~e2vpt_peft.attention.interception.ProductsMode`] follows.
    """

    attention: str
    norm: str | dict[str, str]
    special_tokens: int
    more_special_tokens: str = ""
    tokens_behind: str = ""
    takes_tokens: bool = True
    modality: Literal["vision", "audio", "text"] = "vision"
    written_out: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "aimv2_vision_model": Architecture("encoder.layers.N.attention", "rms_norm1", 0),
    "audio-spectrogram-transformer": Architecture("layers.N.attention", "layernorm_before", 2, modality="audio"),
    "beit": Architecture("layers.N.attention", "layernorm_before", 1, takes_tokens=False),
    "bert": Architecture("encoder.layer.N.attention.self", "none", 1, modality="text"),
    "clip_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 1),
    "data2vec-vision": Architecture(
        "encoder.layer.N.attention.attention", "layernorm_before", 1, written_out=True, takes_tokens=False
    ),
    "deit": Architecture("layers.N.attention", "layernorm_before", 2),
    "dinov2": Architecture("encoder.layer.N.attention", "norm1", 1),
    "dinov2_with_registers": Architecture("encoder.layer.N.attention", "norm1", 1, "num_register_tokens"),
    "dinov3_vit": Architecture("layer.N.attention", "norm1", 1, "num_register_tokens"),
    "distilbert": Architecture("transformer.layer.N.attention", "none", 1, modality="text"),
    "dpt": Architecture("encoder.layer.N.attention.attention", "layernorm_before", 1),
    "eomt": Architecture("layers.N.attention", "norm1", 1, "num_register_tokens", takes_tokens=False),
    "eomt_dinov3": Architecture("layers.N.attention", "norm1", 1, "num_register_tokens", takes_tokens=False),
    "ijepa": Architecture("layers.N.attention", "layernorm_before", 0),
    "internvl_vision": Architecture("encoder.layer.N.attention", "layernorm_before", 1),
    "modernbert": Architecture("layers.N.attn", "attn_norm", 1, modality="text", takes_tokens=False),
    "owlv2_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 1),
    "owlvit_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 1),
    "pixio": Architecture("layers.N.attention", "layernorm_before", 0, "n_cls_tokens"),
    "roberta": Architecture("encoder.layer.N.attention.self", "none", 1, modality="text"),
    "siglip2_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 0),
    "siglip_vision_model": Architecture("encoder.layers.N.self_attn", "layer_norm1", 0),
    "swin": Architecture("encoder.layers.N.blocks.N.attention", "layernorm_before", 0, takes_tokens=False),
    "swinv2": Architecture(
        "encoder.layers.N.blocks.N.attention.self", "none", 0, written_out=True, takes_tokens=False
    ),
    "timm": Architecture("blocks.N.attn", "norm1", 0, written_out=True, takes_tokens=False),
    "videomae": Architecture("encoder.layer.N.attention.attention", "layernorm_before", 0),
    "vit": Architecture("layers.N.attention", "layernorm_before", 1),
    "vit_mae": Architecture("layers.N.attention", "layernorm_before", 1),
    "vit_msn": Architecture("layers.N.attention", "layernorm_before", 1),
    "vivit": Architecture("layers.N.attention", "layernorm_before", 1),
    "vjepa2": Architecture("encoder.layer.N.attention", "norm1", 0, takes_tokens=False),
    "wav2vec2": Architecture(
        "encoder.layers.N.attention",
        {"Wav2Vec2EncoderLayer": "none", "Wav2Vec2EncoderLayerStableLayerNorm": "layer_norm"},
        0,
        modality="audio",
    ),
    "yolos": Architecture(
        "encoder.layer.N.attention.attention",
        "layernorm_before",
        1,
        tokens_behind="num_detection_tokens",
        takes_tokens=False,
    ),
}
"""Architectures with ready-made targets, by the `model_type` of the config of their attention modules, or, where those
have no config, by the package that they are from."""

MODALITIES = ("vision", "audio", "text")


def architecture_of(attention: nn.Module) -> Architecture | None:
    """What is known about the architecture that an attention module, adapted or not, belongs to."""
    path = type(getattr(attention, "base_layer", attention)).__module__.split(".")
    package = path[2] if path[:2] == ["transformers", "models"] else path[0]
    return ARCHITECTURES.get(getattr(getattr(attention, "config", None), "model_type", package))
