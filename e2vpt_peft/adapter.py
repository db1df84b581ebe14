"""One E²VPT adapter in one model: what everything that looks at, scores, prunes or describes an adapter acts on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from math import prod

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .config import E2VPTConfig
from .layer import E2VPTLayer
from .masks import PromptMasks
from .prompt_shapes import prompt_shapes
from .running_pass import Passes


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all E²VPT adapters in a model."""
    return sorted({name for layer in _layers(model) for name in layer.adapter_configs})


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active E²VPT adapters in a model, in their order."""
    known = adapter_names(model)  # of which a layer need not have each
    active = (name for layer in _layers(model) for name in layer.active_adapters if name in known)
    return list(dict.fromkeys(active))


def keep_prefixes(model: nn.Module, enabled: bool = True) -> None:
    """Keep the projected prefixes of a model from one inference to the next, or compute them at each pass.

    They are kept by default, in eval mode and without gradients. At each pass, all that they were computed of is
    compared with what it was, so that they are never out of date. One change cannot be seen, and only on a GPU: a
    tensor that is changed in place through `.data`. Call `model.eval()` after that, which forgets all prefixes.

    They take 2 x (visual prompts + key-value prompts) x hidden size numbers for each layer and adapter: 0.55 MB with
    the default configuration, on ViT-B/16 in bfloat16.

    Args:
        model (`nn.Module`): The adapted model.
        enabled (`bool`): Whether to keep them. `False` also frees their memory.

    Example:

        ```py
        >>> from e2vpt_peft import keep_prefixes

        >>> keep_prefixes(model, False)
        ```
    """
    for layer in _layers(model):
        layer.kept_prefixes.enabled = enabled
        layer.kept_prefixes.forget()


@dataclass(frozen=True, eq=False)
class PromptedAdapter:
    """An adapter in a model.

    Attributes:
        model (`nn.Module`): The adapted model, a [`~peft.PeftModel`] or not.
        name (`str`): The adapter's name.
        layers (`Sequence[E2VPTLayer]`): The layers that have prompts of it, in the order of the model.

    Example:

        ```py
        >>> adapter = PromptedAdapter.find(model)
        >>> adapter.name, len(adapter.layers), adapter.masks.num_tokens, adapter.num_parameters()
        ('default', 12, 10, 138240)
        ```
    """

    model: nn.Module
    name: str
    layers: Sequence[E2VPTLayer]

    @classmethod
    def find(cls, model: nn.Module, name: str | None = None) -> PromptedAdapter:
        """Find an adapter, by default the active one.

        Args:
            model (`nn.Module`): The adapted model.
            name (`str`, *optional*): The adapter's name.

        Raises:
            ValueError: There is no such adapter, or none or several are active and none is named.
        """
        known = adapter_names(model)
        if name is None:
            active = active_adapters(model)
            if len(active) != 1:
                raise ValueError(f"adapter_name is needed: the active E2VPT adapters are {active}, of {known}.")
            name = active[0]
        if name not in known:
            raise ValueError(f"adapter_name={name!r} is no E2VPT adapter of this model, which has {known}.")
        return cls(model, name, [layer for layer in _layers(model) if name in layer.adapter_configs])

    def require_visual_prompts(self) -> None:
        """Refuse an adapter of key-value prompts alone, which are neither pruned nor converted.

        Raises:
            ValueError: It is one.
        """
        if not self.config.num_visual_prompts:
            raise ValueError(
                f"Adapter '{self.name}' has no visual prompts: there is nothing to score, to prune, to compare or "
                "to convert."
            )

    def require_values(self) -> None:
        """Refuse prompts that accelerate offloads: it would bring the former ones back at the next forward pass.

        Raises:
            ValueError: They are.
        """
        if any(layer.is_offloaded for layer in self.layers):
            raise ValueError(
                f"Adapter '{self.name}' is offloaded by accelerate, which would bring its former prompts back: score, "
                "prune, rewind and convert prompts before cpu_offload, disk_offload or dispatch_model, or after "
                "accelerate.hooks.remove_hook_from_submodules(model)."
            )

    @property
    def config(self) -> E2VPTConfig:
        """The configuration, the one object that `model.peft_config` and all layers have."""
        return self.layers[0].adapter_configs[self.name]

    @property
    def passes(self) -> Passes:
        """The running forward passes of the model."""
        return self.layers[0].passes

    @property
    def masks(self) -> PromptMasks:
        """Which prompts are kept."""
        return PromptMasks.of(self.config)

    def set_masks(self, masks: PromptMasks) -> None:
        """Keep other prompts. The values of those that stay are kept, and what comes back is zero.

        Parameters that change their size are new tensors.

        Args:
            masks ([`PromptMasks`]): For the visual prompts that the adapter had when it was made.

        Raises:
            ValueError: They keep nothing, which no file can hold. Nothing is changed.
        """
        masks.check_not_empty()
        # The masks in the config say how the parameters are to be read: all are read before any mask changes.
        values = [layer.full_prompts(self.name) for layer in self.visual_layers]
        # Other adapters, and other models, may have been made of the same config: theirs are not pruned.
        config = copy(self.config)
        masks.write_to(config)
        self.set_config(config)
        for layer, prompts in zip(self.visual_layers, values):
            layer.set_visual_prompts(self.name, prompts)

    def set_config(self, config: E2VPTConfig) -> None:
        """Put another configuration into the place of the adapter's, in `peft_config` and in all layers. The prompts
        have to be changed with it."""
        former = self.config
        for module in self.model.modules():
            configs = getattr(module, "peft_config", {})
            if configs.get(self.name) is former:
                configs[self.name] = config
        for layer in self.layers:
            layer.adapter_configs[self.name] = config

    @property
    def is_shallow(self) -> bool:
        """Whether its visual prompts are inserted in front of the first layer, in place of a prefix in each."""
        return self.config.visual_prompt_depth == "shallow"

    @property
    def visual_layers(self) -> list[E2VPTLayer]:
        """The layers that have visual prompts: all if they are deep, one if they are shallow."""
        return [layer for layer in self.layers if layer.has_visual_prompts(self.name)]

    def num_parameters(self, masks: PromptMasks | None = None) -> int:
        """The number of parameters of the prompts, without `modules_to_save`.

        Args:
            masks ([`PromptMasks`], *optional*): Those to count by: what a pruning would leave. As it is by default.
        """
        masks = self.masks if masks is None else masks
        shapes = [
            prompt_shapes(self.config, layer.site, masks, layer.has_visual_prompts(self.name)) for layer in self.layers
        ]
        return sum(prod(shape) for each in shapes for shape in each.values())

    @property
    def backbone(self) -> nn.Module:
        """The model without PEFT's wrapper around it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def saved_modules(self) -> dict[str, ModulesToSaveWrapper]:
        """PEFT's wrappers of the `modules_to_save`, by their names in the backbone."""
        return {
            name: module
            for name, module in self.backbone.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and self.name in module.modules_to_save
        }

    @property
    def trained_modules(self) -> dict[str, nn.Module]:
        """The adapter's own copies of the `modules_to_save`, by their names in the backbone."""
        return {name: wrapper.modules_to_save[self.name] for name, wrapper in self.saved_modules.items()}


def _layers(model: nn.Module) -> list[E2VPTLayer]:
    return [module for module in model.modules() if isinstance(module, E2VPTLayer)]
