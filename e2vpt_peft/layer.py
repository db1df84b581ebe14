"""The tuner layer: a self-attention module with prompts."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from .attention.prefix import KeysAndValues, Prefix, Rows, WayIn, attending, is_traced_for_training, join, side_by_side
from .attention.site import AttentionSite
from .kept_prefixes import KeptPrefixes, KeptRows, Sources
from .mixed_batch import RoutedModulesToSave
from .prompt_store import PromptStore
from .route import Route
from .running_pass import Passes
from .utils.seen import Place, place_of

CANNOT_MERGE = (
    "E2VPT adapters cannot be merged: prompts are extra keys and values in the attention, to which no change of the "
    "backbone's weights is equivalent. Keep the adapter, which costs little (in compiled and exported models, call "
    "`e2vpt_peft.convert_to_kv_prompts` first), or take it off with `unload()`."
)


class E2VPTLayer(PromptStore):
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

    def __init__(self, base_layer: nn.Module, site: AttentionSite) -> None:
        super().__init__(base_layer, site)
        self.kept_prefixes = KeptPrefixes()
        self.passes = Passes()  # the tuner replaces it by one that all layers of the model share
        self.stack = ""  # the tuner puts in the name of the stack of blocks that the attention is in
        self.training = base_layer.training
        self.ways_in: list[WayIn] = []
        self.close()
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

    def keep_kv_prompts_only(self, adapter_name: str, kv_prompts: torch.Tensor) -> None:
        """Put key-value prompts in the place of all its prompts, see [`PromptStore.keep_kv_prompts_only`]."""
        super().keep_kv_prompts_only(adapter_name, kv_prompts)
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

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "E2VPT does not support nn.DataParallel, which Trainer uses when one process sees several GPUs. Start the "
            "script with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


def _gather(adapters: list[Rows], route: Route, batch_size: int) -> Prefix:
    """The prefix of a batch that mixes adapters, of the rows of each that occurs in it."""
    joint = [rows.joint for rows in adapters]
    nothing = (joint[0][0][:, :0], joint[0][1][:, :0])
    beside = [rows.beside or nothing for rows in adapters]
    visible = route.visible([keys.shape[1] for keys, _ in joint], batch_size, joint[0][0].device)
    keys, values = route.gather_both(joint, batch_size)
    has_beside = any(rows.beside for rows in adapters)
    return Prefix(keys, values, visible, beside=route.gather_both(beside, batch_size) if has_beside else None)
