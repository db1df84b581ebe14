"""The peak memory of a training step."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .calls import Call, TrainingStep


def peak_memory(step: TrainingStep, model: nn.Module, device: torch.device) -> int:
    """The most bytes that `model` and one training step of it hold at any moment.

    That is its weights and optimiser state, which exist before, plus the highest rise above what is allocated when the
    step begins: from the allocator's own count on a GPU, from every single allocation and release that torch's
    profiler records on a CPU. So it is exact and repeatable, temporaries within an operation included, and other
    models in the process do not count. (What a library takes past torch's allocator is not seen.)
    """
    step()
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    resting = sum(tensor.nbytes for tensor in [*tensors.values(), *step.state])
    return resting + peak_rise(step, device)


def peak_rise(call: Call, device: torch.device) -> int:
    """The most bytes that a call holds at any moment, beyond what is held when it begins."""
    return _peak_rise_cuda(call, device) if device.type == "cuda" else _peak_rise_cpu(call)


def _peak_rise_cuda(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_rise_cpu(call: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak
