"""Projected prefixes of one layer, kept from one inference to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .attention.prefix import Prefix
from .route import Route
from .utils.seen import SeenModule, SeenTensor, can_be_seen, is_plain

KeysAndValues = tuple[torch.Tensor, torch.Tensor]

FIRST = 1
"""The first row that is anyone's. The one before is zero, for samples of a batch that have fewer rows than others."""


class Sources(NamedTuple):
    """All that the rows of one adapter are computed of.

    Attributes:
        modules (`Sequence[nn.Module]`): Norms and projections.
        tensors (`Sequence[torch.Tensor]`): Prompts, and where they belong.
    """

    modules: Sequence[nn.Module]
    tensors: Sequence[torch.Tensor]

    def can_be_seen(self) -> bool:
        """Whether any change of them is noticed."""
        parameters = [parameter for module in self.modules for parameter in module._parameters.values()]
        return all(map(is_plain, self.modules)) and all(map(can_be_seen, [*self.tensors, *parameters]))


class KeptRows(NamedTuple):
    """Where the rows of some adapters are.

    Attributes:
        storage (`torch.Tensor`): Keys and values of these and other adapters, (2, number of rows, heads, head size).
        starts, lengths (`list[int]`): For each adapter, its first row in there, and how many it has.
    """

    storage: torch.Tensor
    starts: list[int]
    lengths: list[int]

    def parts(self) -> list[KeysAndValues]:
        """Keys and values of each adapter, (1, number, heads, head size) each."""
        places = [slice(start, start + length) for start, length in zip(self.starts, self.lengths)]
        return [(self.storage[:1, place], self.storage[1:, place]) for place in places]

    def gather(self, route: Route, has_rows: Sequence[bool], batch_size: int) -> Prefix:
        """The prefix of a batch.

        Args:
            route ([`Route`]): The adapter of each sample.
            has_rows (`Sequence[bool]`): For each adapter of the route, whether it is one of these.
            batch_size (`int`): The batch size in the attention.
        """
        places = iter(zip(self.starts, self.lengths))
        starts, lengths = zip(*(next(places) if has else (0, 0) for has in has_rows))
        device = self.storage.device
        index = route.row_index(starts, lengths, batch_size, device)
        rows = self.storage.index_select(1, index).unflatten(1, (batch_size, -1))
        return Prefix(rows[0], rows[1], route.visible(lengths, batch_size, device))


class _Kept(NamedTuple):
    """The rows of one adapter, and what they were computed of."""

    start: int
    length: int
    modules: list[SeenModule]
    tensors: list[SeenTensor]


class _Store:
    """The rows of one layer, in one type and on one device. Rows that were written stay: others come behind them."""

    def __init__(self, storage: torch.Tensor) -> None:
        self.storage = storage
        self.used = FIRST
        self.kept: dict[str, _Kept] = {}

    def append(self, rows: KeysAndValues) -> tuple[int, int]:
        """Put rows, each (number, heads, head size), behind the others. Returns where they start, and their number."""
        start, length = self.used, len(rows[0])
        for place, part in zip(self.storage, rows):
            place[start : start + length] = part
        self.used += length
        return start, length

    def see(self, sources: Sources) -> tuple[list[SeenModule], list[SeenTensor]]:
        """Note the state of what rows are about to be computed of. Adapters share what is noted of a module."""
        known = {seen for kept in self.kept.values() for seen in kept.modules}
        modules = [
            next((seen for seen in known if seen.is_still(module)), None) or SeenModule(module)
            for module in sources.modules
        ]
        return modules, [SeenTensor(tensor) for tensor in sources.tensors]

    def changed(self, sources: Mapping[str, Sources]) -> list[str]:
        """Those adapters that have no rows here, or whose rows would be others today."""
        checked: dict[tuple[int, int], bool] = {}
        return [name for name, now in sources.items() if not self._is_still(self.kept.get(name), now, checked)]

    def _is_still(self, kept: _Kept | None, now: Sources, checked: dict[tuple[int, int], bool]) -> bool:
        if kept is None or len(kept.tensors) != len(now.tensors) or len(kept.modules) != len(now.modules):
            return False
        if not all(seen.is_still(tensor) for seen, tensor in zip(kept.tensors, now.tensors)):
            return False
        for seen, module in zip(kept.modules, now.modules):
            pair = (id(seen), id(module))
            if pair not in checked:  # most adapters have the same modules
                checked[pair] = seen.is_still(module)
            if not checked[pair]:
                return False
        return True


class KeptPrefixes:
    """The keys and values of the adapters of one layer, as the attention takes them.

    What a prefix is computed of hardly ever changes during inference, so it is computed once. Nobody has to report a
    change: at each pass, all that the rows were computed of is compared with what it was (see
    [`~e2vpt_peft.utils.seen.SeenTensor`]). Where a change would not be seen (norms and projections that another method
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
        sources: Mapping[str, Sources],
        dtype: torch.dtype,
        compute: Callable[[list[str]], Sequence[KeysAndValues]],
    ) -> KeptRows | None:
        """The rows of some adapters, in the order of `sources`; `None` if they cannot be kept.

        Args:
            sources (`Mapping[str, Sources]`): By the name of each adapter, what its rows are computed of.
            dtype (`torch.dtype`): The type of the attention.
            compute (`Callable`): Computes the rows of some of the adapters, keys and values of (number, heads, head
                size) each.
        """
        device = next(iter(sources.values())).tensors[0].device
        if not self.enabled or _is_recorded(device):
            return None
        key = (dtype, device, _autocast_type(device.type))
        store = self._stores.get(key)
        if store is None or store.changed(sources):
            if not all(now.can_be_seen() for now in sources.values()):
                self._stores.pop(key, None)
                return None
            with self._lock, torch.inference_mode(False), torch.no_grad():
                store = self._stores[key] = _renew(self._stores.get(key), sources, dtype, compute)
        kept = [store.kept[name] for name in sources]
        return KeptRows(store.storage, [one.start for one in kept], [one.length for one in kept])


def _renew(
    store: _Store | None,
    sources: Mapping[str, Sources],
    dtype: torch.dtype,
    compute: Callable[[list[str]], Sequence[KeysAndValues]],
) -> _Store:
    """A store that has the rows of `sources` as they are today: the given one, or a larger one."""
    names = list(sources) if store is None else store.changed(sources)
    book = store or _Store(torch.empty(0))
    seen = {name: book.see(sources[name]) for name in names}  # before they are read
    computed = dict(zip(names, compute(names)))
    needed = sum(len(keys) for keys, _ in computed.values())
    if store is None or store.used + needed > store.storage.shape[1]:
        store = _larger(book, needed, set(names), next(iter(computed.values()))[0].to(dtype))
    for name, rows in computed.items():
        store.kept[name] = _Kept(*store.append(rows), *seen[name])
    return store


def _larger(store: _Store, needed: int, replaced: set[str], example: torch.Tensor) -> _Store:
    """A store with room for more rows, and without those that are replaced or were left behind."""
    others = {name: kept for name, kept in store.kept.items() if name not in replaced}
    count = FIRST + sum(kept.length for kept in others.values()) + needed
    # Some room for more, or else a thousand adapters, each new to the layer, would be copied a thousand times.
    larger = _Store(example.new_zeros(2, count + (count // 16 if others else 0), *example.shape[1:]))
    for name, kept in others.items():
        keys, values = store.storage[:, kept.start : kept.start + kept.length]
        larger.kept[name] = kept._replace(start=larger.append((keys, values))[0])
    return larger


def _autocast_type(device_type: str) -> torch.dtype | None:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _is_recorded(device: torch.device) -> bool:
    """Whether what runs now is recorded, to run again with other values: then nothing may become a constant."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or get_proxy_mode() is not None
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )
