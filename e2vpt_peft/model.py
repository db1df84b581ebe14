"""The tuner: puts prompts into the self-attention modules of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .adapter import adapter_names
from .attention.site import AttentionSite, find_attention_site
from .attention.targets import explain_no_default_targets, find_default_targets
from .attention.tokens import TokenInsertion, find_stack
from .config import E2VPTConfig
from .layer import CANNOT_MERGE, E2VPTLayer
from .loading.adapter_name import check_adapter_name, check_other_method
from .loading.compatibility import check_model
from .loading.former_names import target_present_layout
from .loading.saved_heads import check_heads, check_nothing_overwritten, refuse_other_sizes_before_loading
from .loading.saved_modules import check_saved_modules_exist, warn_of_new_head
from .loading.saved_prompts import check_before_saving, check_prompts, check_values, prompts_in, prompts_to_come
from .mixed_batch import BlockStack, SampleCount, make_route, route_modules_to_save
from .prompt_shapes import PREFIX
from .running_pass import passes_of
from .saved_weights import SavedWeights, is_prompt
from .utils.structure import Structure


class E2VPTModel(BaseTuner):
    """
    The tuner that `get_peft_model` puts around a backbone for an [`E2VPTConfig`]; `model.base_model` is this.

    The method is described in https://huggingface.co/papers/2307.13770.

    Several threads may run the model at once, each with its own `adapter_names`. What PEFT changes on the model it
    changes for all of them: `disable_adapter()`, also as a context, `set_adapter(...)`, and adding or deleting an
    adapter. While other threads run the model, name the adapter of each sample in place of that, with `"__base__"`
    for the model without one.

    Example:

        ```py
        >>> from transformers import AutoModelForImageClassification
        >>> from peft import get_peft_model
        >>> from e2vpt_peft import E2VPTConfig

        >>> backbone = "google/vit-base-patch16-224-in21k"
        >>> model = AutoModelForImageClassification.from_pretrained(backbone, num_labels=100)
        >>> model = get_peft_model(model, E2VPTConfig(modules_to_save=["classifier"]))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = PREFIX
    tuner_layer_cls = E2VPTLayer
    target_module_mapping: dict[str, list[str]] = {}  # found in the model instead, see `find_default_targets`

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        adapters: dict[str, PeftConfig] = getattr(model, "peft_config", {})
        before = dict(adapters)
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        try:
            check_other_method(before.get(adapter_name), config, adapter_name)
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:  # PEFT has put the refused adapter beside those that the model has
            adapters.clear()
            adapters.update(before)
            if isinstance(model, PreTrainedModel) and not before:
                # transformers' `add_adapter` has set it already, and would look for the adapters in vain next time.
                vars(model).pop("_hf_peft_config_loaded", None)
            raise

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._saved_weights: SavedWeights | None = None
        """What the file of the adapter that is being put in says, if its configuration was read with it."""
        self._being_loaded: dict[str, Callable[[], None]] = {}
        """How adapters are taken out again whose weights have yet to be loaded."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, E2VPTConfig)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(find_default_targets(self.model))  # type: ignore[assignment]
            if not peft_config.target_modules:
                raise ValueError(explain_no_default_targets(self.model))
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check all targets, so that an error leaves the model as it was."""
        assert isinstance(peft_config, E2VPTConfig)
        names = [name for name, _ in model.named_modules() if name and ".base_layer" not in name]
        targets = [name for name in names if self._is_target(peft_config, name)]
        sites = {name: self._find_site(model, name, peft_config) for name in targets}
        check_saved_modules_exist(peft_config, model, targets)
        peft_config.backbone = check_model(peft_config, model, sites, self._is_target)
        if self._saved_weights is not None and sites:  # otherwise PEFT complains about the targets
            expected = prompts_to_come(peft_config, model, sites)
            check_prompts(self._saved_weights.shapes, expected, self._saved_weights.file)
            check_heads(self._saved_weights, peft_config, model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model, as [`~peft.tuners.tuners_utils.BaseTuner.inject_adapter`].

        If that fails, the model is what it was.
        """
        check_adapter_name(model, adapter_name)
        config = self.peft_config[adapter_name]
        assert isinstance(config, E2VPTConfig)
        saved: SavedWeights | None = vars(config).pop("saved_weights", None)
        layers = [module for module in model.modules() if isinstance(module, E2VPTLayer)]
        # The user's own configuration, too: PEFT and this class write into it what they find in the model.
        structure = Structure(model, [self, config, *(way_in for layer in layers for way_in in layer.ways_in)])
        self._saved_weights = saved
        self.passes = passes_of(model)
        try:
            target_present_layout(config, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            route_modules_to_save(model, self.passes)
        except Exception:
            _put_back(model, structure, layers)
            raise
        self._saved_weights = None
        if saved is not None and saved.heads_are_compared_later:
            self._being_loaded[adapter_name] = partial(self._take_out, adapter_name, structure, layers)
        if len(adapter_names(model)) == 1:  # once for a model
            warn_of_new_head(model, self.peft_config.values())

    def _take_out(self, adapter_name: str, structure: Structure, layers: list[E2VPTLayer]) -> None:
        """Undo the injection of an adapter."""
        _put_back(self.model, structure, layers)
        self.peft_config.pop(adapter_name, None)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, E2VPTConfig)
        if not self.active_adapters:  # all others have been deleted, and PEFT cannot set none active
            self.active_adapter = adapter_name
        is_shallow = peft_config.visual_prompt_depth == "shallow"
        is_first = adapter_name not in adapter_names(self.model)
        has_visual_prompts = peft_config.num_visual_prompts > 0 and (is_first or not is_shallow)
        if not has_visual_prompts and peft_config.num_kv_prompts == 0:
            return  # shallow visual prompts alone: only the first layer has any
        if isinstance(target, E2VPTLayer):
            layer = target
        else:
            layer = E2VPTLayer(target, self._find_site(self.model, current_key, peft_config))
            layer.passes = self.passes
            stack = BlockStack.around(self.model, current_key)
            layer.stack = stack.name
            if stack.is_first(target, E2VPTLayer):
                is_first_layer = not any(isinstance(module, E2VPTLayer) for module in self.model.modules())
                layer.attach(SampleCount(stack, self.model if is_first_layer else None))
        layer.update_layer(adapter_name, peft_config, has_visual_prompts)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if has_visual_prompts and is_shallow:
            self._insert_tokens(layer, current_key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, E2VPTLayer):  # unloading, where PEFT expects modules with a weight
            child.detach()
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _insert_tokens(self, layer: E2VPTLayer, name: str) -> None:
        """Let shallow prompts in through the stack that a layer is in, by the hooks that are there already."""
        stack = find_stack(self.model, name)
        neighbours = [module for module in stack.layers.modules() if isinstance(module, E2VPTLayer)]
        ways_in = [way_in for other in neighbours for way_in in other.ways_in if isinstance(way_in, TokenInsertion)]
        insertion = ways_in[0] if ways_in else TokenInsertion(stack, layer.site.num_special_tokens)
        if insertion not in layer.ways_in:
            layer.attach(insertion)

    def _is_target(self, peft_config: E2VPTConfig, name: str) -> bool:
        return bool(self._check_target_module_exists(peft_config, name))

    def unload(self) -> nn.Module:
        """
        Return the original backbone: prompts are removed and `modules_to_save` are given back their original modules.

        In this it differs from PEFT, which leaves the trained `modules_to_save` in place.
        """
        for module in self.model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter([])
        return super().unload()

    def _find_site(self, model: nn.Module, name: str, peft_config: E2VPTConfig) -> AttentionSite:
        module = model.get_submodule(name)
        if isinstance(module, E2VPTLayer):
            return module.site
        return find_attention_site(model, name, peft_config.attention_norm, peft_config.num_special_tokens)

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raises: prompts cannot be averaged."""
        raise ValueError(
            "E2VPT adapters cannot be combined into one: no average of prompts does what the prompts do. Several "
            "adapters can be active at once, `model.base_model.set_adapter([...])`, which puts their prompts side by "
            "side."
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it is the only active one, the first of the others becomes active in all layers.

        Args:
            adapter_name (`str`): The name of the adapter.
        """
        own = [name for name, config in self.peft_config.items() if isinstance(config, E2VPTConfig)]
        others = [name for name in own if name != adapter_name]
        if adapter_name in own and adapter_name in self.active_adapters and others:
            # PEFT would let each layer choose among the adapters that it has, which need not be the same everywhere.
            active = [name for name in self.active_adapters if name != adapter_name]
            if not active:
                active = others[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active and is deleted. Setting active adapter to {active[0]}.",
                    stacklevel=3,  # behind PeftModel.delete_adapter
                )
            self.set_adapter(active)
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The prompts of an adapter, after the checks that they have to pass when they are loaded.

        PEFT would also take what other methods have under the same name.
        """
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        ending = f".{adapter_name}"
        own = {name: tensor for name, tensor in tensors.items() if name.endswith(ending)}
        own = {name: tensor for name, tensor in own.items() if is_prompt(name.removesuffix(ending))}
        if own:  # processes that do not save are given an empty state dict by FSDP
            check_before_saving(
                {name.removesuffix(ending): tensor for name, tensor in own.items()}, model, adapter_name
            )
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Refuse what does not fit before any of it is loaded, and rename prompts that were saved under other names.

        An adapter that was put into the model to be loaded is taken out again.
        """
        assert isinstance(config, E2VPTConfig)
        tuner = model.base_model if isinstance(model, PeftModel) else None
        being_loaded = tuner._being_loaded if isinstance(tuner, E2VPTModel) else {}
        give_up = being_loaded.pop(adapter_name, lambda: None)
        backbone = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
            names = check_prompts(shapes, prompts_in(backbone, adapter_name), "The state dict")
            check_values({name: state_dict[name] for name in names}, config)
            check_nothing_overwritten(model, adapter_name, state_dict)
        except ValueError:
            give_up()
            raise
        for layer in backbone.modules():
            if isinstance(layer, E2VPTLayer):
                layer.forget_initial_prompts_if_untrained(adapter_name)
        renamed = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        refuse_other_sizes_before_loading(model, give_up)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Different adapters in one batch: send each sample through the adapter that `adapter_names` gives it."""
        adapter_names, route = kwargs.pop("adapter_names", None), None
        if adapter_names is not None:
            if self.training:
                raise ValueError("adapter_names is for inference: call model.eval() first.")
            route = make_route(adapter_names, list(self.peft_config), self.model, {**dict(enumerate(args)), **kwargs})
        if route is self.passes.current.route:
            yield
            return
        with self.passes.running(route=route):
            yield

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Enable activation checkpointing of the backbone in a way that prompts get their gradients.

        Reentrant checkpointing gives gradients to parameters only where an input of the layer requires one, too.

        Args:
            activation_checkpointing_kwargs (`dict`, *optional*):
                As for [`~transformers.PreTrainedModel.activation_checkpointing_enable`].
        """
        backbone: Any = self.model
        # Early versions of transformers 5 have the older name only.
        enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
        enable(activation_checkpointing_kwargs, **kwargs)
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            backbone.enable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' older name of [`activation_checkpointing_enable`]."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


def _put_back(model: nn.Module, structure: Structure, layers: list[E2VPTLayer]) -> None:
    """Make a model what it was, with the adapted layers that it had."""
    for module in list(model.modules()):
        if isinstance(module, E2VPTLayer) and not any(module is layer for layer in layers):
            module.detach()
    structure.restore()
