"""A training step: as it is written or, on a GPU, recorded once as a CUDA graph and replayed.

A GPU is done with the kernels of a small model long before Python has started the next ones. A replay starts all of a
step at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import nn

Step = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes images as the model reads them, and labels."""

StepMaker = Callable[[nn.Module, torch.optim.Optimizer, str, int], Step]
"""Takes a model, the optimizer of what is trained, one of [`PRECISIONS`], and the number of images a step."""

PRECISIONS = ("float32", "bfloat16", "tf32")
"""tf32: float32, with products of the precision of TF32 where the device has it."""

EAGER_STEPS = 3
"""Steps before the recording, which make what is made once: libraries, the optimizer's state."""


def set_precision(precision: str) -> None:
    """Set this process to one of [`PRECISIONS`]."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Run a model in one of [`PRECISIONS`]; its weights are float32 either way."""
    # Nothing is kept of a weight that was cast: what is recorded would go on with it.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)


class EagerStep:
    """Forward, loss, backward, optimizer.

    Args:
        model (`nn.Module`): Called as a transformers model is.
        optimizer (`torch.optim.Optimizer`): Of what is trained.
        precision (`str`): One of [`PRECISIONS`].
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> None:
        self.model, self.optimizer, self.precision = model, optimizer, precision

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        with autocast(labels.device, self.precision):
            logits = self.model(pixel_values=pixels).logits
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class RecordedStep:
    """A step as a CUDA graph. It has to run [`on_its_stream`].

    The first steps are as they are written, and so is every batch of another size, such as the last one of an epoch.

    Args:
        step ([`EagerStep`]): What to record.
        batch_size (`int`): Of the batches that are replayed.
    """

    def __init__(self, step: EagerStep, batch_size: int) -> None:
        self.step, self.batch_size, self.done = step, batch_size, 0
        self.inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self.graph = torch.cuda.CUDAGraph()
        for group in step.optimizer.param_groups:  # a number would be replayed; this one is read at each replay
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        if self.done < EAGER_STEPS or len(labels) != self.batch_size:
            self.step(pixels, labels)
            self.done += 1
            return
        if self.inputs is None:
            self.inputs = pixels.clone(), labels.clone()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.step(*self.inputs)
        for place, value in zip(self.inputs, (pixels, labels)):
            place.copy_(value)
        self.graph.replay()


@contextmanager
def on_its_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, another stream than the default one, on which nothing can be recorded."""
    if device.type != "cuda":
        yield
        return
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, batch_size: int) -> Step:
    """A step of what is on a GPU, recorded, or of what is not."""
    step = EagerStep(model, optimizer, precision)
    on_gpu = next(model.parameters()).device.type == "cuda"
    return RecordedStep(step, batch_size) if on_gpu else step
