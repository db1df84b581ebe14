from __future__ import annotations

import torch

from e2vpt_peft.pruning.gradients import gradients_of


def test_small_gradients_survive_float16():
    """Of a model that is sure of its answers, most are below what float16 has."""
    values = torch.ones(3, requires_grad=True)
    loss = values.half().float().sum() * 1e-9
    (vanished,) = torch.autograd.grad(loss, [values], retain_graph=True)
    assert vanished.count_nonzero() == 0
    (gradient,) = gradients_of(loss, [values])
    torch.testing.assert_close(gradient, torch.full((3,), 1e-9, dtype=torch.float64), rtol=1e-2, atol=0)


def test_gradients_that_are_too_large_when_scaled_are_computed_with_a_smaller_scale():
    values = torch.ones(3, requires_grad=True)
    loss = (values.half().float() * 30000).sum()
    (gradient,) = gradients_of(loss, [values])
    torch.testing.assert_close(gradient, torch.full((3,), 30000.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_no_scale_changes_a_digit():
    for factor in (3, 101, 30000):  # which each takes another scale in float16
        values = torch.ones(3, requires_grad=True)
        (gradient,) = gradients_of((values.half().float() * factor).sum(), [values])
        assert (gradient == factor).all()
