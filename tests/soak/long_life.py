"""A model that lives long: adapters come and go, are switched, saved and loaded. Memory stays flat, outputs exact.

As a script: `python -m tests.soak.long_life --adapters 1000 --switches 10000 --rounds 1000`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..peft_contract.common import KINDS, adapted, assert_unchanged, logits, snapshot
from ..support.models import tiny_vit

WARM_UP = 200
"""Rounds before memory is looked at, in which caches and the pools of the allocator fill."""


def resident_kilobytes() -> int:
    """The memory of this process that is in use, on Linux with glibc."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what is free, of which small pieces would be kept
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0])


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def repeat(times: int, once: Callable[[int], None]) -> dict[str, int]:
    """Do something many times; returns by how much memory and the number of tensors grew since the first rounds."""
    warm_up = min(WARM_UP, times // 2)
    for number in range(warm_up):
        once(number)
    tensors, memory = tensors_alive(), resident_kilobytes()
    for number in range(warm_up, times):
        once(number)
    return {"times": times, "tensors": tensors_alive() - tensors, "kilobytes": resident_kilobytes() - memory}


def saved_adapters(folder: Path) -> dict[str, torch.Tensor]:
    """Adapters of every kind on disk, and the logits of each."""
    expected = {}
    for kind, config in KINDS.items():
        model = adapted(**config)
        model.save_pretrained(folder / kind)
        expected[kind] = logits(model)
    return expected


def load_and_delete(folder: Path, times: int) -> dict[str, int]:
    """Load adapters beside one that stays, use them, delete them; at the end the model is what it was."""
    expected = saved_adapters(folder)
    model = adapted(adapter_name="stays")
    alone = logits(model)
    kinds = list(expected)

    def once(number: int) -> None:
        kind, name = kinds[number % len(kinds)], f"guest{number}"
        model.load_adapter(folder / kind, name)
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[kind])
        model.set_adapter("stays")
        model.delete_adapter(name)

    for number in range(len(kinds)):  # the first shallow adapter puts hooks on the layers, which stay for the next
        once(number)
    before = snapshot(model)
    grown = repeat(times, once)
    assert torch.equal(logits(model), alone)
    assert_unchanged(model, before)
    return grown


def switch(folder: Path, times: int) -> dict[str, int]:
    """Switch among adapters of every kind on one model, none among them, and use each."""
    expected = saved_adapters(folder)
    backbone = tiny_vit()
    none = logits(backbone)
    kinds = list(expected)
    model = PeftModel.from_pretrained(backbone, folder / kinds[0], adapter_name=kinds[0])
    for kind in kinds[1:]:
        model.load_adapter(folder / kind, kind)

    def once(number: int) -> None:
        choice = number % (len(kinds) + 1)
        if choice == len(kinds):
            with model.disable_adapter():
                assert torch.equal(logits(model), none)
        else:
            model.set_adapter(kinds[choice])
            assert torch.equal(logits(model), expected[kinds[choice]])

    return repeat(times, once)


def save_and_load(folder: Path, times: int) -> dict[str, int]:
    """Hand an adapter on from model to model, by way of the disk."""
    models: list[Any] = [adapted()]
    expected = logits(models[0])

    def once(number: int) -> None:
        models[0].save_pretrained(folder / "round")
        models[0] = PeftModel.from_pretrained(tiny_vit(), folder / "round")
        assert torch.equal(logits(models[0]), expected)

    return repeat(times, once)


def run(adapters: int, switches: int, rounds: int) -> dict[str, dict[str, int]]:
    """All three, each in a folder of its own."""
    warnings.simplefilter("ignore")
    results = {}
    for part, times in ((load_and_delete, adapters), (switch, switches), (save_and_load, rounds)):
        with tempfile.TemporaryDirectory() as folder:
            results[part.__name__] = part(Path(folder), times)
        print(part.__name__, results[part.__name__], flush=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--switches", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=1000)
    run(**vars(parser.parse_args()))
