"""Short versions of the soak tests. docs/robustness.md has the counts of the long ones."""

from __future__ import annotations

import os

import pytest

from . import kill, long_life


@pytest.mark.slow
def test_adapters_come_and_go_without_a_trace() -> None:
    results = long_life.run(adapters=40, switches=60, rounds=40)
    assert {result["tensors"] for result in results.values()} == {0}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_searches_and_saves_come_out_whole() -> None:
    results = kill.run(kills=3, saves=3)
    assert sum(results["kill_searches"]["kills"].values()) >= 3
    assert results["kill_saves"]["kills"] == 3
