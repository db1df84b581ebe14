"""What a model card says of the model that an adapter is in."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
)

from ..adapter import PromptedAdapter, active_adapters

TASKS: list[tuple[str, Any]] = [
    *TASK_MAPPING.items(),
    ("image-segmentation", MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
    ("video-classification", MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
]
"""The Hub's names of tasks, with the classes of transformers for them."""


def card_adapter(model: nn.Module, name: str | None = None) -> PromptedAdapter:
    """The adapter that a card is about.

    Args:
        model (`nn.Module`): The adapted model.
        name (`str`, *optional*): The adapter's name; the first active one by default.

    Raises:
        ValueError: The model has no such E2VPT adapter.
    """
    active = active_adapters(model)
    return PromptedAdapter.find(model, active[0] if name is None and active else name)


def count_all_parameters(model: nn.Module) -> int:
    """Of the whole model, as `print_trainable_parameters` counts them."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()[1]
    return sum(parameter.numel() for parameter in model.parameters())


def find_base_model(adapter: PromptedAdapter) -> str | None:
    """Where the backbone was loaded from."""
    if adapter.config.base_model_name_or_path:
        return adapter.config.base_model_name_or_path
    return (adapter.backbone.name_or_path or None) if isinstance(adapter.backbone, PreTrainedModel) else None


def find_task(backbone: nn.Module) -> str | None:
    """The Hub's name of the task that a model is for, by its class."""
    name = type(backbone).__name__
    return next((task for task, classes in TASKS if name in classes.values()), None)
