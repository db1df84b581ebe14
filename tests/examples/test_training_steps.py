"""Training steps of the accuracy benchmark that are recorded on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmarks.accuracy import methods, protocol, recipes, records, steps, training
from examples.benchmarks.accuracy.tasks import Task

METHODS = [methods.e2vpt(prompt_dropout=0.0), methods.choose(methods.METHODS, ["LoRA"])[0]]


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
@pytest.mark.parametrize("precision", steps.PRECISIONS)
def test_replayed_steps_train_as_eager_ones_do(
    method: methods.Method,
    precision: str,
    tiny_backbone: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = Task(data.name, "natural", "dataset", data.name)
    plan = recipes.Plan(tiny_backbone, str(data.parent), "quick", 6, 5, (0,), "cuda", precision=precision)
    bench = protocol.Bench(task, plan, records.Store(tmp_path / "out.jsonl"))
    how = training.Optimisation("adamw", 1e-2, 0.0, 6, 5, 0, precision)

    def trained() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model = bench.build(method, seed=0)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        training.train(model, bench.splits.train, bench.preprocessing, how)
        return before, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    replays: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    _, replayed = trained()
    assert len(replays) > 6  # all but the first steps and the last of each epoch
    monkeypatch.setattr(training, "make_step", lambda model, optimizer, how, _: steps.EagerStep(model, optimizer, how))
    before, eager = trained()
    for name, parameter in eager.items():
        moved = (parameter - before[name]).abs().mean()
        assert moved > 1e-3
        assert (replayed[name] - parameter).abs().mean() < 0.05 * moved, name
