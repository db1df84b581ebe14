from __future__ import annotations

import random

import numpy as np
import pytest
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


def test_nor_in_those_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    put_back: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["of the first", "of the second"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    with random_state_kept():
        assert put_back == []
    assert put_back == [["of the first", "of the second"]]
