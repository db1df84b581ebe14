"""Times side by side, and what becomes of them: ratios with their spread."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch

from .calls import Call

LEAST_ROUNDS = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""Time that passes, or time that this process runs: on one thread of a busy CPU, the one tells little."""


class Spread(NamedTuple):
    """Median and quartiles over rounds."""

    value: float
    low: float
    high: float
    rounds: int


def time_side_by_side(
    calls: dict[str, Call],
    device: torch.device,
    rounds: int,
    seconds: float = 60,
    least_seconds: float = 0.02,
    seed: int = 0,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of one call of each in each round. Every round has all calls, in random order.

    Args:
        calls (`dict[str, Callable]`): What to time.
        device (`torch.device`): Where the calls run.
        rounds (`int`): How many rounds at the most.
        seconds (`float`): About how long it may take in all. There are 5 rounds at the least, or as many as `rounds`.
        least_seconds (`float`): Short calls are repeated within a round until they take about this long.
        seed (`int`): Seed of the order.
        clock (`str`): One of [`CLOCKS`].
    """
    order = random.Random(seed)
    for call in calls.values():
        call()  # warm-up: allocators, kernels, optimiser state, kept prefixes
    once = {name: _seconds(call, 1, device, clock) for name, call in calls.items()}
    repeats = max(1, round(least_seconds / max(once.values())))
    rounds = min(rounds, max(LEAST_ROUNDS, int(seconds / (repeats * sum(once.values())))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(_seconds(calls[name], repeats, device, clock) / repeats)
    return times


def _seconds(call: Call, repeats: int, device: torch.device, clock: str) -> float:
    synchronize(device)
    start = CLOCKS[clock]()
    for _ in range(repeats):
        call()
    synchronize(device)
    return CLOCKS[clock]() - start


def synchronize(device: torch.device) -> None:
    """Wait for what runs on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The ratio of two series, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator)])


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of some values."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(median(values), low, high, len(values))
