"""One bar for a training, in the place of what a `Trainer` prints."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class OneBar(TrainerCallback):
    """One bar for a whole training, on a terminal only, and nothing for evaluations.

    Args:
        title (`str`): What stands in front of it.
    """

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", disable=None, file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def show_one_bar(trainer: Trainer, title: str) -> None:
    """Show one bar for the training, and nothing else."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(OneBar(title))
