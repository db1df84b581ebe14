"""The tuner: puts prompts into the self-attention modules of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, Optional

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .architectures import ARCHITECTURES, AttentionSite, find_attention_site
from .config import E2VPTConfig
from .layer import CANNOT_MERGE, E2VPTLayer
from .routing import BASE_MODEL, route_samples
from .shallow import TokenInsertion


class E2VPTModel(BaseTuner):
    """
    Creates an E²VPT model from a pretrained transformer: visual prompts and key-value prompts for a frozen backbone.

    The method is described in https://huggingface.co/papers/2307.13770.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`E2VPTConfig`]): The configuration of the E²VPT model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The model with prompts.

    Example:

        ```py
        >>> from transformers import AutoModelForImageClassification
        >>> from peft import get_peft_model
        >>> from e2vpt_peft import E2VPTConfig

        >>> model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k",
        num_labels=100)
        >>> model = get_peft_model(model, E2VPTConfig(modules_to_save=["classifier"]))
        >>> model.print_trainable_parameters()
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`E2VPTConfig`]): The configuration of the E²VPT model.
    """

    prefix: str = "e2vpt_"
    tuner_layer_cls = E2VPTLayer
    target_module_mapping = {name: architecture.target_modules for name, architecture in ARCHITECTURES.items()}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        model_type = model_config.get("model_type")
        assert isinstance(peft_config, E2VPTConfig)
        if peft_config.target_modules is None and model_type not in self.target_module_mapping:
            raise ValueError(
                f"target_modules=None: there are no ready-made targets for model type {model_type!r}, only for "
                f"{', '.join(sorted(self.target_module_mapping))}. Set target_modules to the names of the "
                "self-attention modules."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check all targets, so that an error leaves the model as it was."""
        assert isinstance(peft_config, E2VPTConfig)
        names = [
            name
            for name, module in model.named_modules()
            if name and ".base_layer" not in name and self._is_target(peft_config, name)
        ]
        sites = {name: self._find_site(model, name, peft_config) for name in names}
        for name, site in sites.items():
            if peft_config.num_visual_prompts and site.hidden_size % peft_config.num_segments:
                raise ValueError(
                    f"num_segments={peft_config.num_segments} does not divide the hidden size {site.hidden_size} of "
                    f"'{name}': choose a divisor of {site.hidden_size}."
                )
        if names and peft_config.layers_to_transform is not None:
            requested = peft_config.layers_to_transform
            for index in [requested] if isinstance(requested, int) else requested:
                only = replace(peft_config, layers_to_transform=[index])
                if not any(self._is_target(only, name) for name in names):
                    raise ValueError(
                        f"layers_to_transform={requested!r}: there is no layer {index} among the modules that "
                        "target_modules matches. Layers are counted from 0."
                    )
        if peft_config.visual_prompt_depth == "shallow" and peft_config.num_visual_prompts:
            stacks = {id(_find_stack(model, name)[0]) for name in names}
            if len(stacks) > 1:
                raise ValueError(
                    f"visual_prompt_depth='shallow': the targets {names} stand in {len(stacks)} stacks of layers, but "
                    "shallow prompts go through one. Narrow target_modules, or use visual_prompt_depth='deep'."
                )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: Optional[str] = None,
    ) -> None:
        assert isinstance(peft_config, E2VPTConfig)
        is_shallow = peft_config.visual_prompt_depth == "shallow"
        is_first = not any(
            adapter_name in layer.adapter_configs for layer in self.model.modules() if isinstance(layer, E2VPTLayer)
        )
        has_visual_prompts = peft_config.num_visual_prompts > 0 and (is_first or not is_shallow)
        if not has_visual_prompts and peft_config.num_kv_prompts == 0:
            return  # shallow visual prompts alone: only the first layer has any
        if isinstance(target, E2VPTLayer):
            layer = target
        else:
            layer = E2VPTLayer(target, self._find_site(self.model, current_key, peft_config))
        layer.update_layer(adapter_name, peft_config, has_visual_prompts)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if has_visual_prompts and is_shallow:
            self._insert_tokens(layer, current_key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, E2VPTLayer):  # unloading, where PEFT expects modules with a weight
            new_module.config = child.config
            setattr(parent, child_name, new_module)
            if child.token_insertion is not None:
                child.token_insertion.remove()
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _insert_tokens(self, layer: E2VPTLayer, name: str) -> None:
        stack, index, ancestors = _find_stack(self.model, name)
        neighbours = [module for module in stack.modules() if isinstance(module, E2VPTLayer)]
        insertion = next((other.token_insertion for other in neighbours if other.token_insertion), None)
        if insertion is None:
            insertion = TokenInsertion(stack, ancestors, layer.site.num_special_tokens)
        insertion.owners[index] = layer
        layer.token_insertion = insertion

    def _is_target(self, peft_config: E2VPTConfig, name: str) -> bool:
        return bool(self._check_target_module_exists(peft_config, name))

    def _find_site(self, model: nn.Module, name: str, peft_config: E2VPTConfig) -> AttentionSite:
        module = model.get_submodule(name)
        if isinstance(module, E2VPTLayer):
            return module.site
        return find_attention_site(model, name, peft_config.attention_norm)

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(CANNOT_MERGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Different adapters in one batch: send each sample through the adapter that `adapter_names` gives it."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first.")
        unknown = sorted(set(adapter_names) - {BASE_MODEL} - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapter_names has {unknown}, known are {[BASE_MODEL, *self.peft_config]}.")

        def pass_names_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "adapter_names": adapter_names}

        heads = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        handles = [head.register_forward_pre_hook(pass_names_on, with_kwargs=True) for head in heads]
        try:
            with route_samples(adapter_names):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Optional[dict[str, Any]] = None, **kwargs: Any
    ) -> None:
        """Enable activation checkpointing of the backbone in a way that prompts get their gradients.

        Reentrant checkpointing gives gradients to parameters only where an input of the layer requires one, too.

        Args:
            activation_checkpointing_kwargs (`dict`, *optional*):
                As for [`~transformers.PreTrainedModel.activation_checkpointing_enable`].
        """
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            self.model.enable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Optional[dict[str, Any]] = None, **kwargs: Any
    ) -> None:
        """transformers' older name of [`activation_checkpointing_enable`]."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


def _find_stack(model: nn.Module, name: str) -> tuple[nn.ModuleList, int, list[nn.Module]]:
    """The stack of layers that module `name` is in, the index of its layer, and the modules around the stack."""
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = model.get_submodule(".".join(path[:depth]))
        if isinstance(parent, nn.ModuleList):
            ancestors = [model.get_submodule(".".join(path[:above])) for above in range(depth)]
            return parent, int(path[depth]), ancestors
    raise ValueError(
        f"visual_prompt_depth='shallow': '{name}' is in no stack (nn.ModuleList) of layers. Use "
        "visual_prompt_depth='deep'."
    )
