"""All cases, in order of worth: first that the package works, then numbers, then accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from . import checks, costs
from .attention import KERNELS, check_attention
from .cases import Case
from .compilation import check_compiled
from .modes import COMPILED, COMPILED_GRAPH, EAGER, GRAPH
from .peak import measure_peak
from .programs import check_tests, run_accuracy_suite
from .quantised import QUANTISATIONS, check_quantised
from .speeds import measure_inference, measure_training
from .trainer import check_search

PEAK = "numbers: peak"
MIXED = "numbers: adapters in a batch, {}"
HALF = ("bfloat16", "float16")


def plan(toy: bool) -> list[Case]:
    """The cases; those of toys have small batches and few adapters."""
    one, some, many = (1, 2, 3) if toy else (1, 32, 256)
    adapters = (1, 2, 6) if toy else (1, 16, 256)
    return [
        Case("works: tests", check_tests, 40),
        *each("works: {}", checks.check_precision, 4, dtype=("float32", *HALF)),
        *each("works: autocast, {}", checks.check_autocast, 3, dtype=HALF),
        Case("works: mixed batch", checks.check_mixed_batch, 3),
        Case("works: kept prefixes", checks.check_kept_prefixes, 3),
        *each("works: sdpa, {}", partial(check_attention, implementation="sdpa"), 3, kernel=KERNELS),
        Case("works: flash attention", partial(check_attention, implementation="flash_attention_2"), 5),
        Case("works: search, killed and resumed, bfloat16", partial(check_search, precision="bf16"), 60),
        Case(PEAK, measure_peak, 3),
        *inference(EAGER, 10, some, one, many),
        *training(EAGER, 12, some),
        *inference(GRAPH, 10, one, some),
        Case("works: compiled", check_compiled, 25),
        *inference(COMPILED, 60, some),
        Case("works: compiled, CUDA graphs", partial(check_compiled, mode="reduce-overhead"), 25),
        *inference(COMPILED_GRAPH, 60, one),
        *each(MIXED, costs.measure_mixed_batch, 8, adapters=adapters[:2]),
        *each("works: {}", check_quantised, 6, name=QUANTISATIONS),
        Case("works: flex attention", partial(check_attention, implementation="flex_attention"), 40),
        *training(EAGER, 12, many, one),
        *each("numbers: optimisers, batch {}", costs.measure_optimisers, 6, batch_size=(some, one)),
        *each("numbers: looks at the loss, batch {}", costs.measure_looks_at_the_loss, 8, batch_size=(some, one)),
        *training(COMPILED, 90, some),
        Case("numbers: timm", costs.measure_timm, 10),
        *each("numbers: {}", costs.measure_method, 8, name=costs.METHODS),
        *each(MIXED, costs.measure_mixed_batch, 60, adapters=adapters[2:]),
        *inference(GRAPH, 10, many),
        *inference(COMPILED, 60, one, many),
        *inference(COMPILED_GRAPH, 60, some, many),
        Case("works: search, killed and resumed, float16", partial(check_search, precision="fp16"), 60),
        Case("accuracy", run_accuracy_suite, 60),
    ]


def each(name: str, run: Callable[..., Any], seconds: float, /, **argument: Iterable[Any]) -> list[Case]:
    """A case for each value of an argument, which stands in its name."""
    ((keyword, values),) = argument.items()
    return [Case(name.format(value), partial(run, **{keyword: value}), seconds) for value in values]


def inference(mode: str, seconds: float, *batch_sizes: int) -> list[Case]:
    run = partial(measure_inference, mode=mode)
    return each(f"numbers: inference, {mode}, batch {{}}", run, seconds, batch_size=batch_sizes)


def training(mode: str, seconds: float, *batch_sizes: int) -> list[Case]:
    run = partial(measure_training, mode=mode)
    return each(f"numbers: training, {mode}, batch {{}}", run, seconds, batch_size=batch_sizes)
