from __future__ import annotations

import pytest
import torch

from examples.benchmarks.alternatives import (
    compare_joining,
    compare_reading,
    concatenated,
    joined,
    main,
    share_dropout,
)


def test_the_ways_to_join_two_attentions_agree() -> None:
    """Which the comparison checks itself."""
    assert len(compare_joining(2, 5, rounds=1, length=9, heads=2)) == 4


def test_both_ways_to_read_beside_the_attention_agree() -> None:
    """Which the comparison checks itself."""
    assert compare_reading(2, 5, rounds=1, length=9, heads=2) > 0


def test_the_parts_of_dropout_are_those_of_a_whole() -> None:
    assert sum(share_dropout(4, rounds=1, batch_size=2, hidden_size=16)) == pytest.approx(1)


def test_all_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rounds", "1", "--batch-sizes", "1", "--rows", "3", "--rows-beside", "5"])
    printed = capsys.readouterr().out
    assert [printed.count(start) for start in ("| 1 | 3 |", "| 1 | 5 |", "| 50 |")] == [1, 1, 1]


def test_the_kernel_gives_the_log_sum_exp_no_gradient() -> None:
    """So that joined attention cannot be trained: gradients of values are right, those of queries and keys are not."""
    sequence = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
    prefix = [torch.randn(1, 3, 2, 16, requires_grad=True) for _ in range(2)]
    found, expected = (
        torch.autograd.grad(way(*sequence, *prefix).square().sum(), [*sequence, *prefix])
        for way in (joined, concatenated)
    )
    for index, right in enumerate([False, False, True, False, True]):
        assert torch.allclose(found[index], expected[index], atol=1e-4) == right
