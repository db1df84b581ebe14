"""The tuner layer: a self-attention module with prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn, Optional

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .architectures import AttentionSite
from .attention import Prefix, PrefixedConfig
from .config import E2VPTConfig
from .heads import RoutedModulesToSave
from .routing import current_route, route_samples

if TYPE_CHECKING:
    from .shallow import TokenInsertion

CANNOT_MERGE = (
    "E2VPT adapters cannot be merged: prompts are extra keys and values in the attention, to which no change of the "
    "backbone's weights is equivalent. Keep the adapter, which costs little, or take it off with `unload()`."
)


class E2VPTLayer(nn.Module, BaseTunerLayer):
    """A self-attention module with the prompts of every adapter.

    Deep visual prompts `P` of layer `l` are thrown away behind it, so that all they do is to be attended to. With the
    norm in front of the attention and its projections, they are exactly the prefix `[k(norm(P)) ; K]`, `[v(norm(P)) ;
    V]`, and key-value prompts are the same thing without norm and projection (equations 3 and 5 of the paper). Both
    are computed here and joined to the sequence's own keys and values by [`~e2vpt_peft.attention.prefix_attention`].

    With `output_attentions=True` (eager attention), the columns of an attention map are, in this order: for every
    active adapter its deep visual prompts, then its key-value prompts; after those the tokens of the sequence.
    Shallow visual prompts are tokens of the sequence, behind the special tokens, and have rows as well.

    Args:
        base_layer (`nn.Module`): The self-attention module.
        site ([`~e2vpt_peft.architectures.AttentionSite`]): What is known about it.
    """

    adapter_layer_names = ("e2vpt_visual_prompts", "e2vpt_kv_prompts")
    other_param_names = ("adapter_configs",)

    def __init__(self, base_layer: nn.Module, site: AttentionSite) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config: Any = base_layer.config
        # In a tuple, to keep the norm's owner, which is an ancestor, out of the module tree. The norm itself is
        # looked up at every call, because it may be wrapped later, for example by `modules_to_save`.
        self._site = (site,)
        self.e2vpt_visual_prompts = nn.ParameterDict()
        self.e2vpt_kv_prompts = nn.ParameterDict()
        self.adapter_configs: dict[str, E2VPTConfig] = {}
        self.token_insertion: Optional[TokenInsertion] = None
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.training = base_layer.training
        base_layer.config = PrefixedConfig(self.config, self)  # type: ignore[assignment]

    @property
    def site(self) -> AttentionSite:
        return self._site[0]

    def update_layer(self, adapter_name: str, config: E2VPTConfig, has_visual_prompts: bool) -> None:
        """Add the prompts of an adapter, initialised as in the paper.

        Args:
            adapter_name (`str`): The name of the adapter.
            config ([`E2VPTConfig`]): Its configuration.
            has_visual_prompts (`bool`): Whether it has visual prompts here: shallow ones exist in one layer only.
        """
        site = self.site
        self.adapter_configs[adapter_name] = config
        if has_visual_prompts:
            shape: tuple[int, ...] = (config.num_visual_prompts, site.hidden_size)
            self.e2vpt_visual_prompts[adapter_name] = nn.Parameter(torch.empty(shape))
        if config.num_kv_prompts:
            shape = (site.num_heads, config.num_kv_prompts, site.head_size)
            shape = shape if config.share_kv_prompts else (2, *shape)
            self.e2vpt_kv_prompts[adapter_name] = nn.Parameter(torch.empty(shape))
        self.reset_prompts(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_prompts(self, adapter_name: str) -> None:
        """Draw the prompts of an adapter anew.

        Visual prompts are uniform in ±sqrt(6 / (3 p² + D)), with p the patch size and D the hidden size (as VPT);
        key-value prompts are Kaiming-uniform, in ±sqrt(6 / (n d)), with n their number and d the head size.
        """
        site = self.site
        if adapter_name in self.e2vpt_visual_prompts:
            bound = math.sqrt(6 / (site.patch_fan_in + site.hidden_size))
            self.e2vpt_visual_prompts[adapter_name].uniform_(-bound, bound)
        if adapter_name in self.e2vpt_kv_prompts:
            prompts = self.e2vpt_kv_prompts[adapter_name]
            bound = math.sqrt(6 / (prompts.shape[-2] * site.head_size))
            prompts.uniform_(-bound, bound)

    @property
    def has_prefix(self) -> bool:
        """Whether the running forward pass needs a prefix in this layer."""
        return not self.disable_adapters and any(map(self._in_prefix, self._running_adapters()))

    def prefix(self, batch_size: int, dtype: torch.dtype) -> Prefix:
        """The prefix of the running forward pass: for each adapter its deep visual prompts, then its key-value
        prompts.

        Args:
            batch_size (`int`): The batch size in the attention, a multiple of the number of samples in windowed
            models.
            dtype (`torch.dtype`): The type to compute in, for models without a norm in front of the attention.
        """
        adapters = self._running_adapters()
        samples = self._samples(batch_size)
        deep = [name for name in adapters if name in self.e2vpt_visual_prompts and not self._is_shallow(name)]
        projected = self._project({name: self._visual_prompts(name, samples) for name in deep}, dtype)
        keys, values = [], []
        for name in adapters:
            rows = [projected[name]] if name in projected else []
            rows += [self._kv_prompts(name, samples)] if name in self.e2vpt_kv_prompts else []
            rows = rows or [self._no_rows(dtype)]
            dtype = rows[0][0].dtype
            keys.append(torch.cat([row[0].to(dtype) for row in rows], 1))
            values.append(torch.cat([row[1].to(dtype) for row in rows], 1))
        route = current_route()
        if route is None:
            return Prefix(torch.cat(keys, 1), torch.cat(values, 1))
        visible = route.visible([part.shape[1] for part in keys], batch_size, keys[0].device)
        return Prefix(route.gather(keys, batch_size), route.gather(values, batch_size), visible)

    def num_tokens(self) -> int:
        """The number of shallow visual prompts that the running forward pass inserts in front of this layer."""
        counts = self._token_counts()
        if self.disable_adapters or not any(counts):
            return 0
        return sum(counts) if current_route() is None else max(counts)

    def tokens(self, batch_size: int) -> torch.Tensor:
        """Shallow visual prompts of the running forward pass, (batch size or 1, [`num_tokens`], hidden size)."""
        samples = self._samples(batch_size)
        adapters = self._running_adapters()
        prompts = {name: self._visual_prompts(name, samples) for name in adapters if self._inserts_tokens(name)}
        route = current_route()
        if route is None:
            return torch.cat(list(prompts.values()), 1)
        nothing = next(iter(prompts.values()))[:, :0]
        return route.gather([prompts.get(name, nothing) for name in adapters], batch_size)

    def visible_tokens(self, batch_size: int) -> Optional[torch.Tensor]:
        """Which of [`tokens`] each sample may see, (batch size, [`num_tokens`]), or `None` if all."""
        route = current_route()
        if route is None:
            return None
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        return route.visible(self._token_counts(), batch_size, device)

    def _token_counts(self) -> list[int]:
        adapters = self._running_adapters()
        return [self.e2vpt_visual_prompts[name].shape[0] if self._inserts_tokens(name) else 0 for name in adapters]

    def _running_adapters(self) -> list[str]:
        route = current_route()
        return self.active_adapters if route is None else route.adapters

    def _is_shallow(self, adapter_name: str) -> bool:
        return self.adapter_configs[adapter_name].visual_prompt_depth == "shallow"

    def _inserts_tokens(self, adapter_name: str) -> bool:
        return adapter_name in self.e2vpt_visual_prompts and self._is_shallow(adapter_name)

    def _in_prefix(self, adapter_name: str) -> bool:
        is_deep = adapter_name in self.e2vpt_visual_prompts and not self._is_shallow(adapter_name)
        return is_deep or adapter_name in self.e2vpt_kv_prompts

    def _samples(self, batch_size: int) -> int:
        """The batch dimension of the prompts: 1 unless dropout makes them differ from sample to sample."""
        configs = [self.adapter_configs[name] for name in self._running_adapters() if name in self.adapter_configs]
        drops = any(config.prompt_dropout or config.kv_prompt_dropout for config in configs)
        return batch_size if self.training and drops else 1

    def _visual_prompts(self, adapter_name: str, samples: int) -> torch.Tensor:
        """(samples, number of prompts, hidden size)"""
        prompts = self.e2vpt_visual_prompts[adapter_name].expand(samples, -1, -1)
        return self._drop(prompts, self.adapter_configs[adapter_name].prompt_dropout)

    def _kv_prompts(self, adapter_name: str, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each (samples, number of prompts, heads, head size)"""
        config, prompts = self.adapter_configs[adapter_name], self.e2vpt_kv_prompts[adapter_name]
        parts = [prompts] if config.share_kv_prompts else list(prompts.unbind(0))
        parts = [
            self._drop(part.transpose(0, 1).expand(samples, -1, -1, -1), config.kv_prompt_dropout) for part in parts
        ]
        return parts[0], parts[-1]

    def _drop(self, prompts: torch.Tensor, probability: float) -> torch.Tensor:
        return F.dropout(prompts, probability, self.training) if probability else prompts

    def _project(
        self, prompts: dict[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each adapter's visual prompts, each (samples, number of prompts, heads, head size)"""
        if not prompts:
            return {}
        site = self.site
        norm = getattr(site.norm_owner, site.norm_name) if site.norm_owner is not None else nn.Identity()
        if current_route() is None or not isinstance(norm, RoutedModulesToSave):
            return self._project_together(prompts, norm, dtype)
        projected = {}
        for name, part in prompts.items():  # each through its own norm
            with route_samples([name]):
                projected.update(self._project_together({name: part}, norm, dtype))
        return projected

    def _project_together(
        self, prompts: dict[str, torch.Tensor], norm: Any, dtype: torch.dtype
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        weight = getattr(norm, "weight", None)
        normed = norm(torch.cat(list(prompts.values()), 1).to(dtype if weight is None else weight.dtype))
        lengths = [part.shape[1] for part in prompts.values()]
        heads = (self.site.num_heads, self.site.head_size)
        keys, values = (
            getattr(self.base_layer, name)(normed).unflatten(-1, heads).split(lengths, 1)
            for name in (self.site.key_projection, self.site.value_projection)
        )
        return dict(zip(prompts, zip(keys, values)))

    def _no_rows(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        device, _ = self._get_base_layer_device_and_dtype(self.base_layer)
        empty = torch.empty(1, 0, self.site.num_heads, self.site.head_size, dtype=dtype, device=device)
        return empty, empty

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # An attention has no weight of its own: prompts go where its key projection is.
        return super()._get_base_layer_device_and_dtype(getattr(base_layer, self.site.key_projection))

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> NoReturn:
        """Always raises: prompts cannot be merged into weights."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        """Always raises: nothing is ever merged."""
        raise ValueError(CANNOT_MERGE)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the attention, for which attention implementations take this wrapper."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "E2VPT does not support nn.DataParallel, which Trainer uses when one process sees several GPUs. Start the "
            "script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
