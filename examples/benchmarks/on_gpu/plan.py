"""All cases, in order of worth: first that the package works, then numbers, then accuracy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

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
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def plan(toy: bool) -> list[Case]:
    """The cases; those of toys have small batches and few adapters."""
    one, some, many = (1, 2, 3) if toy else (1, 32, 256)
    adapters = (1, 2, 6) if toy else (1, 16, 256)
    cases: list[tuple[str, float, Callable[..., Any]]] = [
        ("works: tests", 40, check_tests),
        ("works: float32", 5, partial(checks.check_precision, dtype=torch.float32)),
        *((f"works: {name}", 3, partial(checks.check_precision, dtype=dtype)) for name, dtype in HALF.items()),
        *(
            (f"works: autocast, {name}", 3, partial(checks.check_autocast, dtype=dtype))
            for name, dtype in HALF.items()
        ),
        ("works: mixed batch", 3, checks.check_mixed_batch),
        ("works: kept prefixes", 3, checks.check_kept_prefixes),
        *(
            (f"works: sdpa, {name}", 3, partial(check_attention, implementation="sdpa", kernel=name))
            for name in KERNELS
        ),
        ("works: flash attention", 5, partial(check_attention, implementation="flash_attention_2")),
        ("works: search, killed and resumed, bfloat16", 60, partial(check_search, precision="bf16")),
        (PEAK, 3, measure_peak),
        *inference(EAGER, 10, some, one, many),
        *training(EAGER, 12, some),
        *inference(GRAPH, 10, one, some),
        ("works: compiled", 25, check_compiled),
        *inference(COMPILED, 60, some),
        ("works: compiled, CUDA graphs", 25, partial(check_compiled, mode="reduce-overhead")),
        *inference(COMPILED_GRAPH, 60, one),
        *mixed(8, *adapters[:2]),
        *((f"works: {name}", 6, partial(check_quantised, name=name)) for name in QUANTISATIONS),
        ("works: flex attention", 40, partial(check_attention, implementation="flex_attention")),
        *training(EAGER, 12, many, one),
        *(
            (f"numbers: optimisers, batch {size}", 6, partial(costs.measure_optimisers, batch_size=size))
            for size in (some, one)
        ),
        *(
            (
                f"numbers: looking at the loss, batch {size}",
                8,
                partial(costs.measure_looking_at_the_loss, batch_size=size),
            )
            for size in (some, one)
        ),
        *training(COMPILED, 90, some),
        ("numbers: timm", 10, costs.measure_timm),
        *((f"numbers: {name}", 8, partial(costs.measure_method, name=name)) for name in costs.METHODS),
        *mixed(60, adapters[2]),
        *inference(GRAPH, 10, many),
        *inference(COMPILED, 60, one, many),
        *inference(COMPILED_GRAPH, 60, some, many),
        ("works: search, killed and resumed, float16", 60, partial(check_search, precision="fp16")),
        ("accuracy", 60, run_accuracy_suite),
    ]
    return [Case(name, run, seconds) for name, seconds, run in cases]


def inference(mode: str, seconds: float, *batch_sizes: int) -> list[tuple[str, float, Callable[..., Any]]]:
    return [
        (f"numbers: inference, {mode}, batch {size}", seconds, partial(measure_inference, mode=mode, batch_size=size))
        for size in batch_sizes
    ]


def training(mode: str, seconds: float, *batch_sizes: int) -> list[tuple[str, float, Callable[..., Any]]]:
    return [
        (f"numbers: training, {mode}, batch {size}", seconds, partial(measure_training, mode=mode, batch_size=size))
        for size in batch_sizes
    ]


def mixed(seconds: float, *adapters: int) -> list[tuple[str, float, Callable[..., Any]]]:
    return [
        (f"numbers: {number} adapters in a batch", seconds, partial(costs.measure_mixed_batch, adapters=number))
        for number in adapters
    ]
