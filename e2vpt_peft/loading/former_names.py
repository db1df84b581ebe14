"""Names that self-attention modules had in former versions of transformers, for adapters that were saved there.

transformers rearranges its models now and then (`vit.encoder.layer.0.attention.attention` has become
`vit.layers.0.attention`) and renames the weights of older checkpoints on the fly. The names of prompts follow from its
tables, which know the projections beside them. PEFT does the same for LoRA only.
"""

from __future__ import annotations

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from ..attention.interface import eager_attention_of
from ..attention.prefix import forwards_of
from ..attention.site import KEY_PROJECTIONS
from ..config import E2VPTConfig
from ..layer import E2VPTLayer


def former_names(model: nn.Module) -> dict[str, str]:
    """The names of self-attention modules in the layout of older checkpoints, where they had others.

    Args:
        model (`nn.Module`): The model, with or without adapters.

    Returns:
        `dict[str, str]`: Present names by former names.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    # Changes of the prefix are left out: those tell the checkpoints of a model and of its parts from each other.
    renamings = [
        conversion.reverse_transform()
        for conversion in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if type(conversion) is WeightRenaming
    ]
    names = {}
    for name, module in model.named_modules():
        attention = module.base_layer if isinstance(module, E2VPTLayer) else module
        if name.endswith(".base_layer") or not any(map(eager_attention_of, forwards_of(attention))):
            continue
        for projection in KEY_PROJECTIONS:
            if hasattr(attention, projection):
                key = f"{name}.{projection}.weight"
                for renaming in renamings:
                    key, _ = renaming.rename_source_key(key)
                names[key.rpartition(".")[0].rpartition(".")[0]] = name
    present = {name for name, _ in model.named_modules()}
    return {former: name for former, name in names.items() if former not in present}


def target_present_layout(config: E2VPTConfig, model: nn.Module) -> None:
    """Write targets of a former layout into the configuration as they are called in `model`.

    Args:
        config ([`E2VPTConfig`]): The configuration of an adapter.
        model (`nn.Module`): The model that it goes into.
    """
    if config.target_modules is None:
        return
    if any(check_target_module_exists(config, name) for name, _ in model.named_modules() if name):
        return
    targets = {name for former, name in former_names(model).items() if check_target_module_exists(config, former)}
    if targets:
        config.target_modules = targets  # type: ignore[assignment]
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
