"""How a model runs: eager, compiled, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..measuring.agreement import check_close
from ..measuring.calls import Call, compiled, inference
from ..measuring.comparisons import COMPILED
from .cases import Machine, NotHere

EAGER, GRAPH, COMPILED_GRAPH = "eager", "CUDA graph", "compiled, CUDA graph"


def in_mode(machine: Machine, mode: str, model: nn.Module, images: torch.Tensor) -> Call:
    """An inference in a mode, checked to give what it gives in eager mode."""
    call = MODES[mode](machine, model, images)
    if mode != EAGER:
        expected = inference(model, images)()
        call()
        check_close(call(), expected, images.dtype, f"'{mode}' and eager mode")
    return call


def _compiled(machine: Machine, model: nn.Module, images: torch.Tensor) -> Call:
    return inference(model, images, compiled(model, machine.toy))


def _compiled_graph(machine: Machine, model: nn.Module, images: torch.Tensor) -> Call:
    needs_cuda(machine)
    return inference(model, images, compiled(model, machine.toy, mode="reduce-overhead"))


def _graph(machine: Machine, model: nn.Module, images: torch.Tensor) -> Call:
    """The kernels of an eager pass, recorded once and replayed."""
    needs_cuda(machine)
    call = inference(model, images)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


def needs_cuda(machine: Machine) -> None:
    if machine.device.type != "cuda":
        raise NotHere("CUDA graphs need CUDA")


MODES: dict[str, Callable[[Machine, nn.Module, torch.Tensor], Call]] = {
    EAGER: lambda machine, model, images: inference(model, images),
    GRAPH: _graph,
    COMPILED: _compiled,
    COMPILED_GRAPH: _compiled_graph,
}
