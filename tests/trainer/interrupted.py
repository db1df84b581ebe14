"""A search that is cut off after some events.

`python -m tests.trainer.interrupted FOLDER EVENTS OPTIONS` starts or resumes one that kills itself. The benchmark of a
GPU runs it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from e2vpt_peft import E2VPTTrainer
from e2vpt_peft.utils import files

from . import toy


class Interruption(BaseException):
    """Not an Exception, as SIGKILL is not."""


class Events(TrainerCallback):
    """Counts all that is a moment to be killed at, and calls `stop` at one of them."""

    def __init__(self, last: float, stop: Callable[[], None]) -> None:
        self.count, self.last, self.stop = 0, last, stop
        self.folders: list[str] = []

    def happen(self) -> None:
        self.count += 1
        if self.count >= self.last:
            self.stop()

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        self.folders.append(os.path.basename(args.output_dir))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.happen()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.happen()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.happen()


class InterruptedTrainer(E2VPTTrainer):
    events: Events

    def _save_rng_state(self, output_dir: str) -> None:
        self.events.happen()  # in the middle of a checkpoint
        super()._save_rng_state(output_dir)


class _Os:
    """The module `os`, with an event in the middle of every atomic write."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def replace(self, *paths: Any) -> None:
        self.events.happen()
        os.replace(*paths)
        self.events.happen()


def start(folder: Any, events: Events, resume: bool, **options: Any) -> Any:
    """Start or resume a search.

    As soon as the initial values are on disk, with a model that is initialised with others: it must not matter.
    """
    records = Path(folder) / "_pruning_state" / "state.json"
    seed = 1000 if records.exists() and "start" in json.loads(records.read_text())["records"] else 0
    pruning, callbacks = options.pop("pruning", {}), options.pop("callbacks", [])
    keywords = {name: options.pop(name) for name in list(options) if name in toy.TRAINER_KEYWORDS}
    trainer = InterruptedTrainer(
        **{
            "model": toy.adapted(seed=seed),
            "args": toy.arguments(folder, **options),
            "train_dataset": toy.TRAIN,
            "eval_dataset": toy.VALIDATION,
            "compute_metrics": toy.accuracy,
            "pruning_config": toy.pruning(**pruning),
            "callbacks": [*callbacks, events],
            **keywords,
        }
    )
    trainer.events = events
    files.os = _Os(events)  # type: ignore[assignment]
    try:
        return trainer, trainer.train(resume_from_checkpoint=resume)
    finally:
        files.os = os


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, number, given = sys.argv[1:]
    kill = Events(float(number), lambda: os.kill(os.getpid(), signal.SIGKILL))
    finished, _ = start(target, kill, (Path(target) / "_pruning_state").exists(), **json.loads(given))
    finished.save_model(str(Path(target) / "result"))
