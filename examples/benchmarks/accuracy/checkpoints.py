"""What is left of a training that was killed: its state, in a file of a folder next to the results."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .records import key

History = list[tuple[int, float]]
"""Epochs at which a training was judged, and its accuracies there."""


class Checkpoints:
    """A folder of states, each under the settings of its training. None of them is ever half-written.

    Args:
        folder (`Path`): Made when there is something to write.
        seconds (`float`): The state of a training is written at most that often.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def path(self, settings: dict[str, Any]) -> Path:
        return self.folder / hashlib.sha256(key(settings).encode()).hexdigest()[:32]

    def read(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The state that was written last, if any. No pickled code is run."""
        path = self.path(settings)
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None

    def write(self, settings: dict[str, Any], state: dict[str, Any]) -> None:
        """Replace the state at one blow. Several processes may write the same one."""
        path = self.path(settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"{path.name}.", delete=False) as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)

    def forget(self, settings: dict[str, Any]) -> None:
        """Remove a state, and what a process that was killed left of one."""
        for path in self.folder.glob(f"{self.path(settings).name}*"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Clock:
    """The seconds of a training, those before a kill included."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds


def random_state(model: nn.Module) -> list[torch.Tensor]:
    """Of the CPU, and of the GPU that the model is on, if it is on one."""
    device = next(model.parameters()).device
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(model: nn.Module, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for of_gpu in state[1:]:
        torch.cuda.set_rng_state(of_gpu, next(model.parameters()).device)


class Progress:
    """Lets a training go on where it was killed, and be judged on its way.

    Args:
        checkpoints ([`Checkpoints`], *optional*): Where its state is written.
        settings (`dict[str, Any]`, *optional*): Of the training.
        clock ([`Clock`], *optional*): Of the training.
        keep (`bool`): Whether to write the state at the end, for others that go on from there.
        rungs (`Collection[int]`): The epochs after which it is judged.
        judge (`Callable`, *optional*): Gives the accuracy of the model.
        report (`Callable`, *optional*): Told the history each time it grows, from its beginning if the training goes
            on. May raise to stop the training.
    """

    def __init__(
        self,
        checkpoints: Checkpoints | None = None,
        settings: dict[str, Any] | None = None,
        clock: Clock | None = None,
        keep: bool = False,
        rungs: Collection[int] = (),
        judge: Callable[[nn.Module], float] = lambda model: float("nan"),
        report: Callable[[History], None] = lambda history: None,
    ) -> None:
        self.checkpoints, self.settings, self.clock, self.keep = checkpoints, settings or {}, clock or Clock(), keep
        self.rungs, self.judge, self.report = rungs, judge, report
        self.history: History = []
        self.written = time.perf_counter()

    def resume(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> int:
        """Bring all to the state that was written last. Returns the number of finished epochs."""
        state = self.checkpoints and self.checkpoints.read(self.settings)
        if not state:
            return 0
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        set_random_state(model, state["random"])
        self.clock.seconds = state["seconds"]
        self.history = state["history"]
        for number in range(1, len(self.history) + 1):
            self.report(self.history[:number])
        return state["epoch"]

    def is_due(self, last: bool) -> bool:
        assert self.checkpoints is not None
        return self.keep if last else time.perf_counter() - self.written >= self.checkpoints.seconds

    def after(self, epoch: int, last: bool, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
        """Called at the end of each epoch, counted from 1."""
        if epoch in self.rungs:
            self.history = [*self.history, (epoch, self.judge(model))]
        if self.checkpoints and self.is_due(last):
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
            state = {
                "model": {name: value for name, value in model.state_dict().items() if name not in frozen},
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": random_state(model),
                "seconds": self.clock.seconds,
                "history": self.history,
                "epoch": epoch,
            }
            self.checkpoints.write(self.settings, state)
            self.written = time.perf_counter()
        if epoch in self.rungs:
            self.report(self.history)
