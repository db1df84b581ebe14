"""What a model card says that can be seen from the model."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Optional

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
)

from ..config import E2VPTConfig
from ..layer import E2VPTLayer

TASKS: list[tuple[str, Any]] = [
    *TASK_MAPPING.items(),
    ("image-segmentation", MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
    ("video-classification", MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
]
"""The Hub's names of tasks, with the classes of transformers for them."""


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an active E²VPT adapter, of which there can be a card."""
    return any(_active(layer) for layer in model.modules() if isinstance(layer, E2VPTLayer))


def _active(layer: E2VPTLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.adapter_configs]


class AdapterFacts:
    """An adapter, its size and its backbone.

    Args:
        model (`nn.Module`): The adapted model.
        name (`str`, *optional*): The adapter's name; the first active one by default.

    Raises:
        ValueError: The model has no such E²VPT adapter.
    """

    def __init__(self, model: nn.Module, name: Optional[str] = None) -> None:
        layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
        known = sorted({known for layer in layers for known in layer.adapter_configs})
        if name is None:
            name = next((active for layer in layers for active in _active(layer)), None)
        if name is None or name not in known:
            raise ValueError(f"adapter_name={name!r} is no E²VPT adapter of this model, which has {known}.")
        self.name = name
        self.layers = [layer for layer in layers if name in layer.adapter_configs]
        self.config: E2VPTConfig = self.layers[0].adapter_configs[name]
        self.model = model
        self.backbone: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def visual_layers(self) -> list[E2VPTLayer]:
        return [layer for layer in self.layers if self.name in layer.e2vpt_visual_prompts]

    @property
    def is_pruned(self) -> bool:
        return self.config.token_mask is not None or self.config.segment_mask is not None

    @property
    def prompt_parameters(self) -> int:
        kinds = [prompts for layer in self.layers for prompts in (layer.e2vpt_visual_prompts, layer.e2vpt_kv_prompts)]
        return sum(prompts[self.name].numel() for prompts in kinds if self.name in prompts)

    @property
    def prompt_parameters_before_pruning(self) -> int:
        visual = sum(layer.e2vpt_visual_prompts[self.name].numel() for layer in self.visual_layers)
        before = sum(self.config.num_visual_prompts * layer.site.hidden_size for layer in self.visual_layers)
        return self.prompt_parameters - visual + before

    @cached_property
    def trained_modules(self) -> dict[str, nn.Module]:
        """The `modules_to_save`, by their names in the backbone."""
        return {
            name: module.modules_to_save[self.name]
            for name, module in self.backbone.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and self.name in module.modules_to_save
        }

    @property
    def other_parameters(self) -> int:
        modules = self.trained_modules.values()
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    @property
    def all_parameters(self) -> int:
        """Of the whole model, as `print_trainable_parameters` counts them."""
        if isinstance(self.model, PeftModel):
            return self.model.get_nb_trainable_parameters()[1]
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def base_model(self) -> Optional[str]:
        """Where the backbone was loaded from."""
        if self.config.base_model_name_or_path:
            return self.config.base_model_name_or_path
        return (self.backbone.name_or_path or None) if isinstance(self.backbone, PreTrainedModel) else None

    @property
    def task(self) -> Optional[str]:
        """The Hub's name of the task that the backbone's class is for."""
        backbone = type(self.backbone).__name__
        return next((task for task, classes in TASKS if backbone in classes.values()), None)
