"""The tuner layer: a self-attention module with prompts."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention.prefix import KeysAndValues, Prefix, Rows, WayIn, attending, is_traced_for_training, join, side_by_side
from .attention.site import AttentionSite
from .config import E2VPTConfig
from .initialization import draw_prompts
from .kept_prefixes import KeptPrefixes, KeptRows, Sources
from .masks import PromptMasks
from .mixed_batch import RoutedModulesToSave
from .prompt_shapes import KV_PROMPTS, SEGMENT_MASK, VISUAL_PROMPTS, prompt_shapes
from .route import Route
from .running_pass import Passes
from .utils.seen import Place, place_of
from .utils.shards import is_sharded

CANNOT_MERGE = (
    "E2VPT adapters cannot be merged: prompts are extra keys and values in the attention, to which no change of the "
    "backbone's weights is equivalent. Keep the adapter, which costs little (in compiled and exported models, call "
    "`e2vpt_peft.convert_to_kv_prompts` first), or take it off with `unload()`."
)


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


class E2VPTLayer(nn.Module, BaseTunerLayer):
    """A self-attention module with the prompts of every adapter.

    The outputs of deep visual prompts `P` are discarded after their layer, so image tokens only ever attend to them.
    That makes them extra keys and values: the prefix `[k(norm(P)) ; K]`, `[v(norm(P)) ; V]`, with the norm in front of
    the attention and its projections. Key-value prompts are the same without norm and projection (equations 3 and 5 of
    the paper). Both are computed here; [`~e2vpt_peft.attention`] brings them to the attention.

    With `output_attentions=True` (eager attention), the columns of an attention map are, for every active adapter, its
    deep visual prompts and its key-value prompts, then the tokens of the sequence. Shallow visual prompts are tokens
    of the sequence, behind the special tokens, and have rows as well.

    Args:
        base_layer (`nn.Module`): The self-attention module.
        site ([`~e2vpt_peft.attention.site.AttentionSite`]): What is known about it.
    """

    adapter_layer_names = (VISUAL_PROMPTS, KV_PROMPTS)
    other_param_names = ("adapter_configs", "kept_components", SEGMENT_MASK, "initial_prompts")

    def __init__(self, base_layer: nn.Module, site: AttentionSite) -> None:
        super().__init__()
        self.base_layer = base_layer
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
        self.kept_prefixes = KeptPrefixes()
        self.passes = Passes()  # the tuner replaces it by one that all layers of the model share
        self.stack = ""  # the tuner puts in the name of the stack of blocks that the attention is in
        self.training = base_layer.training
        self.ways_in: list[WayIn] = []
        self.attach(site.way_in)

    def attach(self, way_in: WayIn) -> None:
        """Let prompts in by one more way."""
        way_in.attach(self.base_layer, self)
        self.ways_in.append(way_in)

    def detach(self) -> None:
        """Close all ways, so that the attention is as it was."""
        while self.ways_in:
            self.ways_in.pop().detach(self.base_layer)

    @property
    def config(self) -> Any:
        """The attention's own config, for attention implementations, which take this wrapper for the attention.

        While the attention runs, the view of it that names the prefix, for a `forward` that takes this wrapper so.
        """
        current = attending(self)
        if current is not None and not current.hands_over:
            return self.base_layer.config
        return self.site.way_in.config(self.base_layer)

    @config.setter
    def config(self, config: Any) -> None:
        self.site.way_in.set_config(self.base_layer, config)

    @property
    def implementation(self) -> str:
        """The attention implementation that the model is set to, as transformers names it."""
        return self.site.way_in.implementation(self.config)

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

    @property
    def has_prefix(self) -> bool:
        """Whether the running forward pass needs a prefix in this layer."""
        return not self.disable_adapters and any(map(self._is_in_prefix, self._running_adapters()))

    def prefix(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Prefix:
        """The prefix of the running forward pass: for each adapter its deep visual prompts, then its key-value
        prompts.

        Args:
            batch_size (`int`):
                The batch size in the attention, a multiple of the number of samples in windowed models.
            dtype (`torch.dtype`): The type of the attention.
            device (`torch.device`): Its device.
        """
        current, adapters = self.passes.current, self._running_adapters()
        if current.route is not None:
            current.route.count_once(batch_size, self.stack)
        in_prefix = [name for name in adapters if self._is_in_prefix(name)]
        kept = self._kept_rows(in_prefix, dtype, device)
        if current.route is not None:
            if kept is not None:
                return kept.gather(current.route, [name in in_prefix for name in adapters], batch_size)
            return _gather(self._compute_rows(adapters, batch_size, dtype), current.route, batch_size)
        prefix = side_by_side(self._compute_rows(in_prefix, batch_size, dtype) if kept is None else kept.rows())
        return prefix if current.edit_prefix is None else current.edit_prefix(self, prefix, batch_size)

    def _compute_rows(self, adapters: list[str], batch_size: int, dtype: torch.dtype) -> list[Rows]:
        """The rows of each adapter in the prefix; none of those that have no prompts there."""
        configs = self.adapter_configs
        with_deep = [name for name in adapters if self._has_deep_prompts(name)]
        with_kv = [name for name in adapters if name in self.e2vpt_kv_prompts]
        samples = self._samples(batch_size, [configs[name].prompt_dropout for name in with_deep])
        projected = self._project({name: self._visual_prompts(name, samples) for name in with_deep}, dtype)
        samples = self._samples(batch_size, [configs[name].kv_prompt_dropout for name in with_kv])
        kv_prompts = {name: self._kv_prompts(name, samples) for name in with_kv}
        nothing = next(keys for keys, _ in (*projected.values(), *kv_prompts.values()))[:1, :0]
        computed = []
        for name in adapters:
            joint, kv = projected.get(name), kv_prompts.get(name)
            if joint is not None and kv is not None:
                kv = kv[0].to(joint[0].dtype), kv[1].to(joint[1].dtype)
            beside = None
            if kv is not None and configs[name].num_kv_prompts_beside:
                kv, beside = None, kv
            parts = [part for part in (joint, kv) if part is not None]
            computed.append(Rows(join(parts or [(nothing, nothing)]), beside))
        return computed

    def _kept_rows(self, adapters: list[str], dtype: torch.dtype, device: torch.device) -> KeptRows | None:
        """The rows of adapters as an earlier inference has left them; `None` if they cannot be kept."""
        if self.training or torch.is_grad_enabled():
            return None

        def compute(names: list[str]) -> list[Rows]:
            return self._compute_rows(names, 1, dtype)

        return self.kept_prefixes.rows(adapters, dtype, device, self._sources, compute)

    def _sources(self, adapter_name: str) -> Sources:
        """All that the rows of an adapter in the prefix are computed of."""
        modules: list[nn.Module] = []
        places: list[Place] = []
        # Whoever replaces the forward of a container (accelerate's offloading) has other parameters for each call.
        for prompts in (self.e2vpt_visual_prompts, self.e2vpt_kv_prompts):
            places += [place_of(prompts, adapter_name, "_parameters"), (vars(prompts).get, "forward")]
            modules += [prompts] if "forward" in vars(prompts) else []
        if self._has_deep_prompts(adapter_name):
            places.append(place_of(self.kept_components, adapter_name, "_buffers"))
            places += self.site.places()
            norm = self.site.norm
            if isinstance(norm, RoutedModulesToSave):
                places.append((norm.module_for, adapter_name))
                norm = norm.module_for(adapter_name)
            modules += [*([] if norm is None else [norm]), *self.site.projections()]
        return Sources(places, modules)

    def num_inserted_tokens(self) -> int:
        """The number of shallow visual prompts that the running forward pass inserts in front of this layer."""
        counts = self._inserted_counts()
        if self.disable_adapters or not any(counts):
            return 0
        return sum(counts) if self.passes.current.route is None else max(counts)

    def inserted_tokens(self, batch_size: int) -> torch.Tensor:
        """Shallow visual prompts of the running forward pass, (batch size or 1, number, hidden size)."""
        adapters = self._running_adapters()
        inserted = [name for name in adapters if self._is_inserted(name)]
        samples = self._samples(batch_size, [self.adapter_configs[name].prompt_dropout for name in inserted])
        prompts = {name: self._visual_prompts(name, samples) for name in inserted}
        route = self.passes.current.route
        if route is None:
            return torch.cat(list(prompts.values()), 1)
        nothing = next(iter(prompts.values()))[:, :0]
        return route.gather([prompts.get(name, nothing) for name in adapters], batch_size)

    def inserted_visibility(
        self, batch_size: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which of [`inserted_tokens`] each sample may see, and what is added to their attention scores, both (batch
        size, number), or `None` for all and for nothing."""
        current = self.passes.current
        if current.route is None:
            return None, None if current.token_bias is None else current.token_bias.expand(batch_size, -1)
        return current.route.visible(self._inserted_counts(), batch_size, device), None

    def _inserted_counts(self) -> list[int]:
        adapters = self._running_adapters()
        return [self._num_kept(name) if self._is_inserted(name) else 0 for name in adapters]

    def _running_adapters(self) -> list[str]:
        route = self.passes.current.route
        if route is not None:
            return route.adapters
        active = self._active_adapter  # `active_adapters`, without the calls that PEFT's property makes
        return [active] if isinstance(active, str) else active

    def _is_shallow(self, adapter_name: str) -> bool:
        return self.adapter_configs[adapter_name].visual_prompt_depth == "shallow"

    def _is_inserted(self, adapter_name: str) -> bool:
        return self.has_visual_prompts(adapter_name) and self._is_shallow(adapter_name)

    def _has_deep_prompts(self, adapter_name: str) -> bool:
        return self.has_visual_prompts(adapter_name) and not self._is_shallow(adapter_name)

    def _is_in_prefix(self, adapter_name: str) -> bool:
        return adapter_name in self.e2vpt_kv_prompts or self._has_deep_prompts(adapter_name)

    def _samples(self, batch_size: int, dropout: list[float]) -> int:
        """The batch dimension of prompts: 1 unless dropout makes them differ from sample to sample."""
        return batch_size if self.training and any(dropout) else 1

    def _num_kept(self, adapter_name: str) -> int:
        """The number of visual prompts that are not pruned."""
        prompts = self.e2vpt_visual_prompts[adapter_name]
        if prompts.dim() == 2:
            return len(prompts)
        config = self.adapter_configs[adapter_name]
        return config.num_visual_prompts if config.token_mask is None else sum(config.token_mask)

    def _visual_prompts(self, adapter_name: str, samples: int) -> torch.Tensor:
        """(samples, number of prompts, hidden size)"""
        prompts = self.kept_prompts(adapter_name).expand(samples, -1, -1)
        return self._drop(prompts, self.adapter_configs[adapter_name].prompt_dropout)

    def _kv_prompts(self, adapter_name: str, samples: int) -> KeysAndValues:
        """Keys and values, each (samples, number of prompts, heads, head size)"""
        config, prompts = self.adapter_configs[adapter_name], self.e2vpt_kv_prompts(adapter_name)
        parts = [prompts] if config.share_kv_prompts else list(prompts.unbind(0))
        parts = [
            self._drop(part.transpose(-3, -2).expand(samples, -1, -1, -1), config.kv_prompt_dropout) for part in parts
        ]
        return parts[0], parts[-1]

    def _drop(self, prompts: torch.Tensor, probability: float) -> torch.Tensor:
        return F.dropout(prompts, probability, self.training) if probability else prompts

    def _project(self, prompts: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, KeysAndValues]:
        """Keys and values of each adapter's visual prompts, each (samples, number of prompts, heads, head size)"""
        if not prompts:
            return {}
        if self.passes.current.route is None or not isinstance(self.site.norm, RoutedModulesToSave):
            return self._project_together(prompts, dtype)
        projected = {}
        for name, part in prompts.items():  # each through its own norm
            with self.passes.running(route=Route([name])):
                projected.update(self._project_together({name: part}, dtype))
        return projected

    def _project_together(self, prompts: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, KeysAndValues]:
        normed = self.site.normalize(torch.cat(list(prompts.values()), 1), dtype)
        lengths = [part.shape[1] for part in prompts.values()]
        keys, values = (rows.split(lengths, 1) for rows in self.site.project(normed))
        return dict(zip(prompts, zip(keys, values)))

    def project_prompts(self, prompts: torch.Tensor) -> KeysAndValues:
        """What visual prompts become in the attention of this layer.

        Args:
            prompts (`torch.Tensor`): Of shape (number of prompts, hidden size).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Keys and values, each (number of prompts, heads, head size).
        """
        keys, values = self._project({"": prompts[None]}, self._projection_type(prompts.dtype))[""]
        return keys[0], values[0]

    @torch.no_grad()
    def as_kv_prompts(self, adapter_name: str) -> torch.Tensor:
        """All prompts of an adapter with deep visual prompts, as the attention gets them in evaluation mode: separate
        key-value prompts, (2, heads, number, head size)."""
        dtype = self._projection_type(self.e2vpt_visual_prompts[adapter_name].dtype)
        with self.passes.running(route=Route([adapter_name])):  # through its own norm, whichever adapter is active
            (rows,) = self._compute_rows([adapter_name], 1, dtype)
        return torch.cat(rows.joint).transpose(1, 2)

    def _projection_type(self, otherwise: torch.dtype) -> torch.dtype:
        """The type that projections compute in; another one for whole numbers, which compute in any."""
        _, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        return dtype if dtype is not None and dtype.is_floating_point else otherwise

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        # An attention has no weight of its own: prompts go where its key projection is.
        return super()._get_base_layer_device_and_dtype(getattr(base_layer, self.site.key_projection))

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
        self.kept_prefixes.forget()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the prompts of an adapter."""
        super().delete_adapter(adapter_name)
        self.kept_prefixes.forget()

    def train(self, mode: bool = True) -> E2VPTLayer:
        """Change to training, or to evaluation, and forget kept prefixes in any case."""
        self.kept_prefixes.forget()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> E2VPTLayer:
        self.kept_prefixes.forget()  # of another type, or on another device
        super()._apply(*args, **kwargs)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Always raises: prompts cannot be merged into weights."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> NoReturn:
        """Always raises: nothing is ever merged."""
        raise ValueError(CANNOT_MERGE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention, by `forward` or by what somebody has put in its place, and see that prompts were used."""
        if is_traced_for_training(self):
            return super().__call__(*args, **kwargs)
        with self.site.way_in.running(self):
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention, with the prompts of the running forward pass."""
        if attending(self) is not None:  # `__call__` waits for the prefix already
            return self.base_layer(*args, **kwargs)
        with self.site.way_in.running(self):
            return self.base_layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Forward missing attributes to the attention, for which attention implementations take this wrapper."""
        # Many times in each pass, so first what is asked for most often, and no exception that is caught.
        own = self.__dict__
        modules: dict[str, Any] = own.get("_modules", {})
        if name in modules:
            return modules[name]
        if name[0] == "_" or "base_layer" not in modules or name in own["_parameters"] or name in own["_buffers"]:
            return super().__getattr__(name)
        return getattr(modules["base_layer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is not of this wrapper's own on the attention, which would not see it here."""
        if name == "__class__" and not issubclass(value, E2VPTLayer):  # FSDP2 and others make a subclass of it
            self.base_layer.__class__ = value
        elif self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.base_layer, name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_own(name):
            super().__delattr__(name)
        else:
            delattr(self.base_layer, name)

    def _is_own(self, name: str) -> bool:
        """Whether an attribute is the wrapper's: its class has it, it had it when it was made, or it is private, by
        which frameworks keep what they know of a module. `ways_in` is the last one to be set in `__init__`."""
        own = self.__dict__
        is_made = "ways_in" in own
        return not is_made or name in own or name in own["_modules"] or name[0] == "_" or hasattr(type(self), name)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Register a buffer of the attention."""
        self.base_layer.register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter of the attention."""
        self.base_layer.register_parameter(name, param)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule to the attention."""
        self.base_layer.add_module(name, module)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "E2VPT does not support nn.DataParallel, which Trainer uses when one process sees several GPUs. Start the "
            "script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


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


def _gather(adapters: list[Rows], route: Route, batch_size: int) -> Prefix:
    """The prefix of a batch that mixes adapters, of the rows of each that occurs in it."""
    joint = [rows.joint for rows in adapters]
    nothing = (joint[0][0][:, :0], joint[0][1][:, :0])
    beside = [rows.beside or nothing for rows in adapters]
    visible = route.visible([keys.shape[1] for keys, _ in joint], batch_size, joint[0][0].device)
    keys, values = route.gather_both(joint, batch_size)
    has_beside = any(rows.beside for rows in adapters)
    return Prefix(keys, values, visible, beside=route.gather_both(beside, batch_size) if has_beside else None)
