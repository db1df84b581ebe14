"""The prompts of every adapter in one self-attention, as parameters."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention.site import AttentionSite
from .config import E2VPTConfig
from .initialization import draw_prompts
from .masks import PromptMasks
from .prompt_shapes import KV_PROMPTS, SEGMENT_MASK, VISUAL_PROMPTS, prompt_shapes
from .utils.shards import is_sharded
from .utils.stand_in import StandIn


class Prompts(nn.ParameterDict):
    """The prompts of one kind in one layer, by adapter. A forward pass gets them by a call, `prompts(adapter_name)`.

    So whatever brings in parameters for a `forward` (accelerate, which offloads an adapted model) brings these.
    """

    __call__ = nn.Module.__call__  # which nn.ParameterDict refuses

    def forward(self, adapter_name: str) -> torch.Tensor:
        prompts: torch.Tensor = self[adapter_name]
        return prompts

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate has the values, and brings them in for each pass: what is written here is lost."""
        return "_hf_hook" in vars(self) and any(parameter.is_meta for parameter in self.parameters())


class PromptStore(StandIn, BaseTunerLayer):
    """What a tuner layer keeps of each adapter: its prompts, which of them are pruned, and what they started from.

    Args:
        base_layer (`nn.Module`): The self-attention module.
        site ([`~e2vpt_peft.attention.site.AttentionSite`]): What is known about it.
    """

    adapter_layer_names = (VISUAL_PROMPTS, KV_PROMPTS)
    other_param_names = ("adapter_configs", "kept_components", SEGMENT_MASK, "initial_prompts")

    def __init__(self, base_layer: nn.Module, site: AttentionSite) -> None:
        super().__init__(base_layer)
        self.site = site
        self.in_features = self.out_features = site.hidden_size  # of the hidden states, as every PEFT layer says
        self.e2vpt_visual_prompts = Prompts()
        self.e2vpt_kv_prompts = Prompts()
        self.adapter_configs: dict[str, E2VPTConfig] = {}
        # Where the parameters of prompts with pruned segments belong; made from the config, so not saved.
        self.kept_components = BufferDict(persistent=False)
        # Saved with flat prompts, which mean nothing without it. Never read: a saved one is compared with the config.
        self.e2vpt_segment_mask = BufferDict(persistent=True)
        # What `rewind_prompts` goes back to: plain tensors on the CPU, which no state dict and no file has.
        self.initial_prompts: dict[str, dict[str, torch.Tensor]] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: E2VPTConfig, has_visual_prompts: bool) -> None:
        """Add the prompts of an adapter, with initial values.

        Args:
            adapter_name (`str`): The name of the adapter.
            config ([`E2VPTConfig`]): Its configuration.
            has_visual_prompts (`bool`): Whether it has visual prompts here: shallow ones exist in one layer only.
        """
        self.adapter_configs[adapter_name] = config
        self.draw_initial_prompts(adapter_name, has_visual_prompts)
        self.rewind(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def draw_initial_prompts(self, adapter_name: str, has_visual_prompts: bool) -> None:
        """Draw new initial values for the prompts of an adapter, pruned ones included; see `init_weights`."""
        config = self.adapter_configs[adapter_name]
        self.initial_prompts[adapter_name] = draw_prompts(config, self.site, has_visual_prompts)

    def rewind(self, adapter_name: str) -> None:
        """Put the prompts of an adapter, as far as they are not pruned, to their initial values."""
        initial = self.initial_prompts[adapter_name]
        if VISUAL_PROMPTS in initial:
            self.set_visual_prompts(adapter_name, initial[VISUAL_PROMPTS])
        if KV_PROMPTS in initial:
            _set_parameter(self.e2vpt_kv_prompts, adapter_name, initial[KV_PROMPTS])

    def forget_initial_prompts_if_untrained(self, adapter_name: str) -> None:
        """Drop the initial values of an adapter that is about to be loaded, if it was made to that end only.

        They are not what the loaded prompts started from. Those of an adapter that has been trained here stay, for
        example when a trainer loads its best checkpoint.
        """
        if self._is_untrained(adapter_name):
            self.initial_prompts.pop(adapter_name, None)

    def _is_untrained(self, adapter_name: str) -> bool:
        for name, initial in self.initial_prompts.get(adapter_name, {}).items():
            parameter = getattr(self, name)[adapter_name]
            # There are no values to compare. What is in shards cannot be rewound, either.
            if parameter.is_meta or is_sharded(parameter):
                return True
            current = self.full_prompts(adapter_name) if name == VISUAL_PROMPTS else parameter.detach()
            if not torch.equal(current.cpu(), initial.to(current.dtype)):
                return False
        return True

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate has the values of prompts, see [`Prompts`]."""
        return self.e2vpt_visual_prompts.is_offloaded or self.e2vpt_kv_prompts.is_offloaded

    def has_visual_prompts(self, adapter_name: str) -> bool:
        """Whether an adapter has visual prompts here: shallow ones exist in one layer only."""
        return adapter_name in self.e2vpt_visual_prompts

    def full_prompts(self, adapter_name: str) -> torch.Tensor:
        """The values of visual prompts, (number before pruning, hidden size), with zeros where they are pruned."""
        config = self.adapter_configs[adapter_name]
        kept = self.kept_prompts(adapter_name).detach()
        prompts = kept.new_zeros(prompt_shapes(config, self.site)[VISUAL_PROMPTS])
        prompts[PromptMasks.of(config).tokens.to(kept.device)] = kept
        return prompts

    def kept_prompts(self, adapter_name: str) -> torch.Tensor:
        """The visual prompts that are not pruned, (number, hidden size), with zeros in pruned segments."""
        prompts: torch.Tensor = self.e2vpt_visual_prompts(adapter_name)
        if prompts.dim() == 2:  # no segment is pruned, or whoever asks has put others in place of the parameter
            return prompts
        size = self._num_kept(adapter_name) * self.site.hidden_size
        # On the meta device, prompts wait for their values; PEFT does not always leave buffers where they are, too.
        components = self.kept_components[adapter_name].to(prompts.device)
        dense: torch.Tensor = prompts.new_zeros(size).index_copy(0, components, prompts)
        return dense.view(-1, self.site.hidden_size)

    def set_visual_prompts(self, adapter_name: str, prompts: torch.Tensor) -> None:
        """Give visual prompts, as far as the masks in the adapter's config keep them, new values.

        The parameter stays the same tensor unless its size changes.

        Args:
            adapter_name (`str`): The adapter.
            prompts (`torch.Tensor`): Values as [`full_prompts`] returns them.
        """
        masks = PromptMasks.of(self.adapter_configs[adapter_name])
        values = prompts[masks.tokens.nonzero()[:, 0].to(prompts.device)]  # numbers, which a GPU need not count
        components = masks.components(self.site.hidden_size)
        if components is not None:
            values = values.flatten()[components.to(values.device)]
        _set_parameter(self.e2vpt_visual_prompts, adapter_name, values)
        if components is not None:
            device = self.e2vpt_visual_prompts[adapter_name].device
            self.kept_components[adapter_name] = components if device.type == "meta" else components.to(device)
            mask = masks.segments.byte()
            self.e2vpt_segment_mask[adapter_name] = mask if device.type == "meta" else mask.to(device)
        elif adapter_name in self.kept_components:
            del self.kept_components[adapter_name]
            del self.e2vpt_segment_mask[adapter_name]

    def _num_kept(self, adapter_name: str) -> int:
        """The number of visual prompts that are not pruned."""
        prompts = self.e2vpt_visual_prompts[adapter_name]
        if prompts.dim() == 2:
            return len(prompts)
        config = self.adapter_configs[adapter_name]
        return config.num_visual_prompts if config.token_mask is None else sum(config.token_mask)

    def keep_kv_prompts_only(self, adapter_name: str, kv_prompts: torch.Tensor) -> None:
        """Put key-value prompts, which the adapter's configuration has by now, in the place of all its prompts.

        Args:
            adapter_name (`str`): The adapter.
            kv_prompts (`torch.Tensor`): See [`prompt_shapes`].
        """
        former = self.e2vpt_visual_prompts.pop(adapter_name)
        for things in (self.e2vpt_kv_prompts, self.kept_components, self.e2vpt_segment_mask, self.initial_prompts):
            if adapter_name in things:
                del things[adapter_name]
        values = kv_prompts.to(former.device, former.dtype)
        self.e2vpt_kv_prompts[adapter_name] = nn.Parameter(values.contiguous(), requires_grad=former.requires_grad)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        # An attention has no weight of its own: prompts go where its key projection is.
        return super()._get_base_layer_device_and_dtype(getattr(base_layer, self.site.key_projection))


@torch.no_grad()
def _set_parameter(parameters: nn.ParameterDict, name: str, values: torch.Tensor) -> None:
    """Give a parameter new values, in place if their number is the same."""
    if name not in parameters:
        parameters[name] = nn.Parameter(values.clone())
    elif parameters[name].shape == values.shape:
        parameters[name].copy_(values)
    else:
        old = parameters[name]
        parameters[name] = nn.Parameter(values.to(old.device, old.dtype), requires_grad=old.requires_grad)
