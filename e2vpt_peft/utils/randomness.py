"""Random numbers drawn for a look at something, which leave no trace in those that are drawn afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Afterwards the generators of Python, NumPy and PyTorch are in the state in which they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def seed_host(seed: int) -> None:
    """Seed what data on the CPU are drawn with."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def host_random_state() -> tuple[Any, ...]:
    """The state of these generators, to be compared."""
    _, keys, position, *rest = np.random.get_state()
    return random.getstate(), keys.tobytes(), position, rest, torch.get_rng_state().numpy().tobytes()  # type: ignore
