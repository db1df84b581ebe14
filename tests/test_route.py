from __future__ import annotations

from typing import Any

import pytest
import torch

from e2vpt_peft.route import Route


def test_a_route_lists_each_adapter_once_whatever_the_order_of_the_samples() -> None:
    route = Route(["b", "a", "b", "c"])
    assert route.adapters == ["a", "b", "c"] == Route(["c", "c", "b", "a"]).adapters
    assert route.index.tolist() == [1, 0, 1, 2]
    assert route.counts == [1, 2, 1]


@pytest.mark.parametrize("windows", [1, 4])
def test_a_route_gives_every_window_of_a_sample_its_adapter(windows: int) -> None:
    route = Route(["b", "a", "b"])
    rows = [torch.full((1, 2, 3), 1.0), torch.full((1, 4, 3), 2.0)]
    gathered = route.gather(rows, 3 * windows)
    assert gathered.shape == (3 * windows, 4, 3)
    assert gathered[:, 0, 0].tolist() == [2.0] * windows + [1.0] * windows + [2.0] * windows
    assert gathered[windows, 2:].abs().max() == 0
    visible = route.visible([2, 4], 3 * windows, torch.device("cpu"))
    assert visible is not None
    assert visible.sum(1).tolist() == [4] * windows + [2] * windows + [4] * windows


def test_a_route_hides_nothing_when_all_adapters_have_equally_many_rows() -> None:
    assert Route(["b", "a"]).visible([3, 3], 2, torch.device("cpu")) is None


@pytest.mark.parametrize("windows", [1, 3])
def test_a_route_sends_every_window_of_a_sample_through_its_module(windows: int) -> None:
    route = Route(["c", "a", "b", "c"])  # an order that is not its own inverse
    states = torch.arange(4.0 * windows)[:, None]
    sizes = []

    def module(offset: float) -> Any:
        def forward(part: torch.Tensor) -> torch.Tensor:
            sizes.append(len(part))
            return part + offset

        return forward

    out = route.dispatch(states, [module(100.0), module(200.0), module(300.0)])
    offsets = torch.tensor([300.0, 100.0, 200.0, 300.0]).repeat_interleave(windows)[:, None]
    assert torch.equal(out, states + offsets)
    assert sizes == [windows, windows, 2 * windows]
