"""Short versions of the soak tests. docs/robustness.md has the counts of the long ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import fuzz, long_life, mixed_batches


@pytest.mark.slow
def test_adapters_come_and_go_without_a_trace() -> None:
    results = long_life.run(adapters=40, switches=60, rounds=40)
    assert {result["tensors"] for result in results.values()} == {0}


def test_mixed_batches_in_threads_are_right_or_refused() -> None:
    outcomes = mixed_batches.soak(calls=60, threads=3)
    assert set(outcomes) == {"right", "refused"} and sum(outcomes.values()) == 60


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_searches_and_saves_come_out_whole() -> None:
    # In a process of its own: one that has computed in several threads must not fork.
    process = subprocess.run(
        [sys.executable, "-m", "tests.soak.kill", "--kills", "3", "--saves", "3"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "kill_searches" in process.stdout and "kill_saves {'kills': 3" in process.stdout


@pytest.mark.slow
def test_damaged_adapters_are_refused_or_harmless_at_every_entrance() -> None:
    results = fuzz.run(inputs=200, seed=0)
    assert {entrance for entrance, _ in results["outcomes"]} == set(fuzz.ENTRANCES)
    assert {outcome.partition(" ")[0] for _, outcome in results["outcomes"]} == {"refused", "taken"}
    wrong = {key: found[0] for key, found in results["wrong"].items() if key[0] not in fuzz.NOT_OURS}
    assert wrong == {}
