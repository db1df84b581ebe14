"""A compiled model follows its adapters."""

from __future__ import annotations

import torch

from ..measuring.agreement import check_close
from ..measuring.calls import TrainingStep, compiled, inference
from .cases import Facts, Machine
from .checks import adapted
from .modes import needs_cuda


def check_compiled(machine: Machine, mode: str = "default") -> Facts:
    """Compiled once, a model gives the eager results for each adapter, before and after a training step.

    With CUDA graphs, whatever lies in memory at the recording is what is read at each replay.
    """
    if mode == "reduce-overhead":
        needs_cuda(machine)
    setup = machine.small(torch.bfloat16)
    images, labels = setup.batch(4)
    model = adapted(setup, machine.prompts, ("one", "two"))
    forward = compiled(model, machine.toy, mode=mode)
    errors = {}

    def compare(name: str) -> None:
        expected = inference(model, images)()
        call = inference(model, images, forward)
        for turn in range(3):  # warm-up, recording, replay
            errors[f"{name}, turn {turn}"] = check_close(call().clone(), expected, setup.dtype, f"{name}, {mode}")

    for name in ("one", "two", "one"):
        model.set_adapter(name)
        compare(f"adapter {name}")
    TrainingStep(model, images, labels)()
    compare("after a training step")
    return {"largest error": max(errors.values()), "comparisons": len(errors)}
