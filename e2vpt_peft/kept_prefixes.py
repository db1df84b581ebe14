"""Projected prefixes of one layer, kept from one inference to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.compiler import is_compiling
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .attention.prefix import KeysAndValues, Prefix, Rows
from .route import Route
from .utils.seen import Place, Seen, can_be_seen, is_plain

PRE_DISPATCH = DispatchKey.PreDispatch
"""Included where there are modes above autograd, as `torch.export` and `make_fx(..., pre_dispatch=True)` have them."""

FIRST = 1
"""The first row that is anyone's. The one before is zero, for samples of a batch that have fewer rows than others."""


class Sources(NamedTuple):
    """All that the rows of one adapter are computed of.

    Attributes:
        places (`list[Place]`): Where prompts, norm and projections are found.
        modules (`list[nn.Module]`): Norm and projections, whose parameters count, too.
    """

    places: list[Place]
    modules: list[nn.Module]

    def can_be_seen(self) -> bool:
        """Whether any change of them is noticed."""
        found = [find(name) for find, name in self.places]
        found += [parameter for module in self.modules for parameter in module._parameters.values()]
        return all(map(is_plain, self.modules)) and all(
            can_be_seen(thing) for thing in found if isinstance(thing, torch.Tensor)
        )


class KeptRows(NamedTuple):
    """Where the rows of some adapters are.

    Attributes:
        storage (`torch.Tensor`): Keys and values of these and other adapters, (2, number of rows, heads, head size).
        kept (`list`): Where in there those of each adapter are.
    """

    storage: torch.Tensor
    kept: list[_Kept]

    def rows(self) -> list[Rows]:
        """The rows of each adapter."""
        return [one.rows for one in self.kept]

    def gather(self, route: Route, has_rows: Sequence[bool], batch_size: int) -> Prefix:
        """The prefix of a batch.

        Args:
            route ([`Route`]): The adapter of each sample.
            has_rows (`Sequence[bool]`): For each adapter of the route, whether it is one of these.
            batch_size (`int`): The batch size in the attention.
        """
        places = iter((one.start, *one.rows.counts()) for one in self.kept)
        starts, joint, beside = zip(*(next(places) if has else (0, 0, 0) for has in has_rows))
        keys, values = self._gather(route, starts, joint, batch_size)
        prefix = Prefix(keys, values, route.visible(joint, batch_size, self.storage.device))
        if not any(beside):
            return prefix
        ends = [start + length for start, length in zip(starts, joint)]
        return prefix._replace(beside=self._gather(route, ends, beside, batch_size))

    def _gather(self, route: Route, starts: Sequence[int], lengths: Sequence[int], batch_size: int) -> KeysAndValues:
        index = route.row_index(starts, lengths, batch_size, self.storage.device)
        keys, values = self.storage.index_select(1, index).unflatten(1, (batch_size, max(lengths)))
        return keys, values


class _Kept(NamedTuple):
    """The rows of one adapter, and what they were computed of.

    Attributes:
        start (`int`): The first row in the storage. Those beside the attention lie behind the others.
        rows ([`Rows`]): They, as views of it.
        places (`Seen`): Prompts, and where norm and projections are found.
        modules (`Seen`): Norm and projections. Adapters share it.
    """

    start: int
    rows: Rows
    places: Seen
    modules: Seen


class _Store:
    """The rows of one layer, in one type and on one device. Rows that were written stay: others come behind them."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.storage = storage
        self.used = FIRST
        self.kept: dict[str, _Kept] = {}
        self.modules: list[nn.Module] = []
        self.seen_modules = Seen()

    def append(self, name: str, rows: Rows, places: Seen, modules: Seen) -> None:
        """Put the rows of an adapter behind the others."""
        start = self.used
        joint = self._write(rows.joint)
        beside = None if rows.beside is None else self._write(rows.beside)
        self.kept[name] = _Kept(start, Rows(joint, beside), places, modules)

    def _write(self, rows: KeysAndValues) -> KeysAndValues:
        start, self.used = self.used, self.used + rows[0].shape[1]
        there = self.storage[:, start : self.used].copy_(torch.cat(rows))
        return there[:1], there[1:]

    def see(self, sources: Sources) -> tuple[Seen, Seen]:
        """Note the state of what rows are about to be computed of."""
        if self.modules != sources.modules or not self.seen_modules.is_still():
            self.modules, self.seen_modules = sources.modules, Seen(modules=sources.modules)
        return Seen(sources.places), self.seen_modules

    def changed(self, names: Iterable[str]) -> list[str]:
        """Those adapters that have no rows here, or whose rows would be others today."""
        changed = []
        still: Seen | None = None  # most adapters have the same modules
        for name in names:
            kept = self.kept.get(name)
            if kept is None or not kept.places.is_still() or not (kept.modules is still or kept.modules.is_still()):
                changed.append(name)
            else:
                still = kept.modules
        return changed


class KeptPrefixes:
    """The keys and values of the adapters of one layer, as the attention takes them.

    What a prefix is computed of hardly ever changes during inference, so it is computed once. Nobody has to report a
    change: at each pass, all that the rows were computed of is compared with what it was (see
    [`~e2vpt_peft.utils.seen.Seen`]). Where a change would not be seen (norms and projections that another method
    has wrapped, sharded and quantised weights), nothing is kept, and the prefix is computed at each pass.

    The rows of all adapters are in one tensor, so that those of a mixed batch are one `index_select`.

    Attributes:
        enabled (`bool`): Whether to keep anything.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._stores: dict[tuple[object, ...], _Store] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[KeptPrefixes], tuple[bool]]:
        return type(self), (self.enabled,)  # a copy of the layer has other tensors

    def forget(self) -> None:
        """Free the memory. It is needed for changes that cannot be seen, too: those through `.data`, on a GPU."""
        self._stores = {}

    def rows(
        self,
        adapters: Sequence[str],
        dtype: torch.dtype,
        device: torch.device,
        sources: Callable[[str], Sources],
        compute: Callable[[list[str]], Sequence[Rows]],
    ) -> KeptRows | None:
        """The rows of some adapters, in their order; `None` if they cannot be kept.

        Args:
            adapters (`Sequence[str]`): Their names.
            dtype (`torch.dtype`), device (`torch.device`): Those of the attention.
            sources (`Callable`): Says what the rows of an adapter are computed of.
            compute (`Callable`): Computes the rows of some of the adapters, for all samples.
        """
        if not self.enabled or _is_recorded(device):
            return None
        key = (dtype, device, _autocast_type(device.type), _stream(device))
        store = self._stores.get(key)
        if store is None or store.changed(adapters):
            now = {name: sources(name) for name in adapters}
            if not all(one.can_be_seen() for one in now.values()):
                self._stores.pop(key, None)
                return None
            with self._lock, torch.inference_mode(False), torch.no_grad():
                store = self._stores[key] = _renew(self._stores.get(key), now, dtype, compute)
        return KeptRows(store.storage, [store.kept[name] for name in adapters])


def _renew(
    store: _Store | None,
    sources: Mapping[str, Sources],
    dtype: torch.dtype,
    compute: Callable[[list[str]], Sequence[Rows]],
) -> _Store:
    """A store that has the rows of `sources` as they are today: the given one, or a larger one."""
    names = list(sources) if store is None else store.changed(sources)
    book = store or _Store(torch.empty(0))
    seen = {name: book.see(sources[name]) for name in names}  # before they are read
    computed = dict(zip(names, compute(names)))
    needed = sum(sum(rows.counts()) for rows in computed.values())
    if store is None or store.used + needed > store.storage.shape[1]:
        store = _larger(book, needed, set(names), next(iter(computed.values())).joint[0].to(dtype))
    for name, rows in computed.items():
        store.append(name, rows, *seen[name])
    return store


def _larger(store: _Store, needed: int, replaced: set[str], example: torch.Tensor) -> _Store:
    """A store with room for more rows, and without those that are replaced or were left behind."""
    others = {name: kept for name, kept in store.kept.items() if name not in replaced}
    count = FIRST + sum(sum(kept.rows.counts()) for kept in others.values()) + needed
    # Some room for more, or else a thousand adapters, each new to the layer, would be copied a thousand times.
    larger = _Store(example.new_zeros(2, count + (count // 16 if others else 0), *example.shape[2:]))
    larger.modules, larger.seen_modules = store.modules, store.seen_modules
    for name, kept in others.items():
        larger.append(name, kept.rows, kept.places, kept.modules)
    return larger


def _autocast_type(device_type: str) -> torch.dtype | None:
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _stream(device: torch.device) -> int | None:
    """The stream that writes what is kept. On another one, an inference could read it before it is written."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _is_recorded(device: torch.device) -> bool:
    """Whether what runs now is recorded, to run again with other values: then nothing may become a constant."""
    # In each layer at each inference, so by the functions themselves: looking up `torch.jit.is_tracing` and asking for
    # a proxy mode, where there is no mode at all, take longer than all the rest.
    return (
        is_compiling()
        or _is_tracing()
        or _are_functorch_transforms_active()
        or (
            (_len_torch_dispatch_stack() or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH))
            and get_proxy_mode() is not None
        )
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )
