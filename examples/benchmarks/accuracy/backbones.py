"""The backbone of a training: pretrained, at the size of its input that was asked for, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from datasets import ClassLabel
from torch import nn
from transformers import PreTrainedModel

from examples.data_and_backbone import load_backbone


def build(
    model: str, classes: int, seed: int, image_size: int | None = None, attention: str | None = None
) -> PreTrainedModel:
    """A pretrained image classifier with a new head.

    Args:
        model (`str`): A Hub id or a folder.
        classes (`int`): Of the new head.
        seed (`int`): Of its initial weights.
        image_size (`int`, *optional*): Height and width of the input, if not the backbone's own.
        attention (`str`, *optional*): transformers' `attn_implementation`, if not its own choice.
    """
    backbone = load_backbone(model, ClassLabel(num_classes=classes), seed)
    if image_size is not None:
        resize_positions(backbone, image_size)
    if attention is not None:
        backbone.set_attn_implementation(attention)
    return backbone


def resize_positions(model: PreTrainedModel, image_size: int) -> None:
    """Resize the table of learned positions once (bicubic, antialias), for another size of the input.

    Raises:
        ValueError: The model has no such table, or its patches do not divide the size.
    """
    patch = getattr(model.config, "patch_size", None)
    embeddings = next(
        (m for m in model.modules() if isinstance(getattr(m, "position_embeddings", None), nn.Parameter)), None
    )
    if embeddings is None or not isinstance(patch, int):
        raise ValueError(f"image_size={image_size}: {type(model).__name__} has no table of positions to resize.")
    if image_size < patch or image_size % patch:
        raise ValueError(f"image_size={image_size} must be a multiple of the size of a patch, {patch}.")
    table = embeddings.position_embeddings
    before, after = model.config.image_size // patch, image_size // patch
    special, patches = table.detach().float().split([table.shape[1] - before**2, before**2], dim=1)
    grid = patches.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (after, after), mode="bicubic", antialias=True)
    embeddings.position_embeddings = nn.Parameter(
        torch.cat([special, grid.flatten(2).mT], dim=1).to(table), requires_grad=table.requires_grad
    )
    model.config.image_size = image_size
    size = (image_size, image_size)
    embeddings.patch_embeddings.image_size = size
    embeddings.patch_embeddings.num_patches = after**2
    if hasattr(embeddings, "image_size"):  # ViT keeps another
        embeddings.image_size = size
