from __future__ import annotations

import random

import numpy as np
import torch

from e2vpt_peft.utils.randomness import host_random_state, random_state_kept, seed_host


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_look_leaves_no_trace_in_the_generators() -> None:
    seed_host(3)
    expected = draw()
    seed_host(3)
    before = host_random_state()
    with random_state_kept():
        assert draw() == expected and host_random_state() != before
    assert host_random_state() == before and draw() == expected
