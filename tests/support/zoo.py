"""A tiny random model of every architecture with ready-made targets, with a head that people adapt it for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as t
from transformers import PreTrainedModel

from .models import images, randomized

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 4}
MLP_RATIO = {name: value for name, value in IMAGE.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 30, "max_position_embeddings": 40}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
}
MAE: dict[str, Any] = {
    **IMAGE,
    "mask_ratio": 0.0,
    "decoder_hidden_size": 32,
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 48,
}
WAVES: dict[str, Any] = {
    **SIZES,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}

Inputs = dict[str, torch.Tensor]


def pixels(batch_size: int = 3, size: int = 16) -> Inputs:
    return {"pixel_values": images(batch_size, size)}


def frames(name: str = "pixel_values", number: int = 4) -> Callable[[int], Inputs]:
    def make(batch_size: int = 3) -> Inputs:
        return {name: images(batch_size * number).unflatten(0, (batch_size, number))}

    return make


def text(batch_size: int = 3) -> Inputs:
    """Sentences of different lengths."""
    ids = torch.randint(3, 30, (batch_size, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([9, 4, 6, 9, 2, 7])[:batch_size, None]
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}


def sound(batch_size: int = 3) -> Inputs:
    """Waves of different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(400) < torch.tensor([400, 240, 320, 400, 200, 360])[:batch_size, None]
    return {"input_values": torch.randn(batch_size, 400, generator=generator) * mask, "attention_mask": mask.long()}


def spectrogram(batch_size: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {"input_values": torch.randn(batch_size, 24, 16, generator=generator)}


def naflex(batch_size: int = 3) -> Inputs:
    """Images of different numbers of patches."""
    generator = torch.Generator().manual_seed(1)
    shapes = torch.tensor([[4, 4], [2, 3], [3, 4], [4, 4], [1, 5], [4, 2]])[:batch_size]
    mask = torch.arange(16) < shapes.prod(1, keepdim=True)
    patches = torch.randn(batch_size, 16, 48, generator=generator)
    return {"pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


class Case(NamedTuple):
    """A model with a head, its config, and its inputs."""

    model: type[PreTrainedModel]
    config: Any
    inputs: Callable[[int], Inputs] = pixels

    def make(self, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
        config = copy.deepcopy(self.config)  # which the model keeps, and tests change
        config._attn_implementation = attention
        return randomized(self.model._from_config(config, attn_implementation=attention), seed)


def labelled(config: type, **fields: Any) -> Any:
    return config(**fields, num_labels=5)


ZOO: dict[str, Case] = {
    "aimv2_vision_model": Case(t.Aimv2VisionModel, t.Aimv2VisionConfig(**IMAGE, is_native=False)),
    "audio-spectrogram-transformer": Case(
        t.ASTForAudioClassification,
        labelled(
            t.ASTConfig, **SIZES, patch_size=8, max_length=24, num_mel_bins=16, time_stride=8, frequency_stride=8
        ),
        spectrogram,
    ),
    "beit": Case(t.BeitForImageClassification, labelled(t.BeitConfig, **IMAGE, use_relative_position_bias=True)),
    "bert": Case(t.BertForSequenceClassification, labelled(t.BertConfig, **WORDS), text),
    "clip_vision_model": Case(
        t.CLIPForImageClassification,
        labelled(
            t.CLIPConfig,
            vision_config=IMAGE,
            text_config={**WORDS, "eos_token_id": 2, "projection_dim": 16},
            projection_dim=16,
        ),
    ),
    "data2vec-vision": Case(
        t.Data2VecVisionForImageClassification,
        labelled(t.Data2VecVisionConfig, **IMAGE, use_relative_position_bias=True),
    ),
    "deit": Case(t.DeiTForImageClassification, labelled(t.DeiTConfig, **IMAGE)),
    "dinov2": Case(t.Dinov2ForImageClassification, labelled(t.Dinov2Config, **MLP_RATIO)),
    "dinov2_with_registers": Case(
        t.Dinov2WithRegistersForImageClassification,
        labelled(t.Dinov2WithRegistersConfig, **MLP_RATIO, num_register_tokens=3),
    ),
    "dinov3_vit": Case(t.DINOv3ViTModel, t.DINOv3ViTConfig(**IMAGE, num_register_tokens=3)),
    "distilbert": Case(
        t.DistilBertForTokenClassification,
        labelled(t.DistilBertConfig, dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=30),
        text,
    ),
    "dpt": Case(
        t.DPTForDepthEstimation,
        t.DPTConfig(
            **{**IMAGE, "num_hidden_layers": 4},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[4, 4, 8, 8],
            fusion_hidden_size=8,
            reassemble_factors=[4, 2, 1, 0.5],
            is_hybrid=False,
        ),
    ),
    "eomt": Case(
        t.EomtForUniversalSegmentation,
        labelled(t.EomtConfig, **IMAGE, num_blocks=1, num_queries=3, num_upscale_blocks=1),
    ),
    "eomt_dinov3": Case(
        t.EomtDinov3ForUniversalSegmentation,
        labelled(t.EomtDinov3Config, **IMAGE, num_blocks=1, num_queries=3, num_upscale_blocks=1),
    ),
    "ijepa": Case(t.IJepaForImageClassification, labelled(t.IJepaConfig, **IMAGE)),
    "internvl_vision": Case(
        t.InternVLVisionModel,
        t.InternVLVisionConfig(
            **SIZES, image_size=[16, 16], patch_size=[4, 4], use_qk_norm=True, norm_type="rms_norm"
        ),
    ),
    "modernbert": Case(
        t.ModernBertForSequenceClassification,
        labelled(t.ModernBertConfig, **{**WORDS, "num_hidden_layers": 4}, pad_token_id=1, local_attention=4),
        text,
    ),
    "owlv2_vision_model": Case(t.Owlv2VisionModel, t.Owlv2VisionConfig(**IMAGE)),
    "owlvit_vision_model": Case(t.OwlViTVisionModel, t.OwlViTVisionConfig(**IMAGE)),
    "pixio": Case(t.PixioModel, t.PixioConfig(**MLP_RATIO, n_cls_tokens=3)),
    "roberta": Case(t.RobertaForTokenClassification, labelled(t.RobertaConfig, **WORDS), text),
    "siglip2_vision_model": Case(
        t.Siglip2ForImageClassification,
        labelled(
            t.Siglip2Config,
            vision_config={**SIZES, "patch_size": 4, "num_patches": 16},
            text_config={**WORDS, "projection_size": 32},
        ),
        naflex,
    ),
    "siglip_vision_model": Case(
        t.SiglipForImageClassification,
        labelled(t.SiglipConfig, vision_config=IMAGE, text_config={**WORDS, "projection_size": 32}),
    ),
    "swin": Case(t.SwinForImageClassification, labelled(t.SwinConfig, **SWIN), lambda n=3: pixels(n, 32)),
    "swinv2": Case(
        t.Swinv2ForImageClassification, labelled(t.Swinv2Config, **SWIN), lambda number=3: pixels(number, 32)
    ),
    "videomae": Case(
        t.VideoMAEForVideoClassification,
        labelled(t.VideoMAEConfig, **MAE, num_frames=4, tubelet_size=2),
        frames(),
    ),
    "vit": Case(t.ViTForImageClassification, labelled(t.ViTConfig, **IMAGE)),
    "vit_mae": Case(t.ViTMAEModel, t.ViTMAEConfig(**MAE)),
    "vit_msn": Case(t.ViTMSNForImageClassification, labelled(t.ViTMSNConfig, **IMAGE)),
    "vivit": Case(
        t.VivitForVideoClassification,
        labelled(t.VivitConfig, **SIZES, image_size=16, num_frames=4, tubelet_size=[2, 4, 4]),
        frames(),
    ),
    "vjepa2": Case(
        t.VJEPA2ForVideoClassification,
        labelled(
            t.VJEPA2Config,
            **MLP_RATIO,
            crop_size=16,
            frames_per_clip=4,
            tubelet_size=2,
            pred_hidden_size=32,
            pred_num_attention_heads=4,
            pred_num_hidden_layers=1,
            num_pooler_layers=1,
        ),
        frames("pixel_values_videos"),
    ),
    "wav2vec2": Case(
        t.Wav2Vec2ForSequenceClassification,
        labelled(t.Wav2Vec2Config, **WAVES, do_stable_layer_norm=True),
        sound,
    ),
    "yolos": Case(
        t.YolosForObjectDetection, labelled(t.YolosConfig, **{**IMAGE, "image_size": [16, 16]}, num_detection_tokens=5)
    ),
}

HEADS: dict[str, Case] = {
    "mae pretraining": Case(t.ViTMAEForPreTraining, t.ViTMAEConfig(**{**MAE, "mask_ratio": 0.5})),
    "vit masked images": Case(t.ViTForMaskedImageModeling, t.ViTConfig(**IMAGE, encoder_stride=4)),
    "beit masked images, one shared position bias": Case(
        t.BeitForMaskedImageModeling,
        t.BeitConfig(**IMAGE, vocab_size=7, use_shared_relative_position_bias=True, use_mask_token=True),
    ),
    "dpt depth on dinov2": Case(
        t.DPTForDepthEstimation,
        labelled(
            t.DPTConfig,
            backbone_config=t.Dinov2Config(
                **MLP_RATIO, out_features=["stage1", "stage2"], reshape_hidden_states=False
            ),
            neck_hidden_sizes=[4, 8],
            reassemble_factors=[2, 1],
            fusion_hidden_size=8,
        ),
    ),
    "upernet segmentation on swin": Case(
        t.UperNetForSemanticSegmentation,
        labelled(
            t.UperNetConfig,
            backbone_config=t.SwinConfig(**{**SWIN, "depths": [1, 1]}, out_features=["stage1", "stage2"]),
            hidden_size=8,
            pool_scales=[1, 2],
            use_auxiliary_head=False,
        ),
        lambda number=3: pixels(number, 32),
    ),
    "owlvit detection": Case(
        t.OwlViTForObjectDetection,
        t.OwlViTConfig(vision_config=IMAGE, text_config={**WORDS, "eos_token_id": 2}, projection_dim=32),
        lambda number=3: {**pixels(number), "input_ids": text(2 * number)["input_ids"]},  # two queries an image
    ),
    "beit segmentation": Case(
        t.BeitForSemanticSegmentation,
        labelled(t.BeitConfig, **{**IMAGE, "num_hidden_layers": 4}, out_indices=[1, 2, 3, 4], pool_scales=[1, 2]),
    ),
    "wav2vec2, post-norm": Case(t.Wav2Vec2ForSequenceClassification, labelled(t.Wav2Vec2Config, **WAVES), sound),
}
"""Some of these architectures under heads that do other things with them."""
