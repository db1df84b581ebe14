"""A phase that is cut off: what Trainer does not keep of it, and which checkpoints it goes on from exactly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import Progress
from .data import DataSample


class PhaseProgress(TrainerCallback):
    """Counts the loss of a phase from its first step on, also of the part before an interruption.

    Attributes:
        resumed ([`Progress`], *optional*): That of the checkpoint from which the phase goes on.
        loss (`float`): The sum of the losses of all steps.
    """

    def __init__(self) -> None:
        self.resumed: Progress | None = None
        self.loss = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss = 0.0 if self.resumed is None else self.resumed.loss
        if self.resumed is not None and self.resumed.best is not None:
            # Trainer knows its path, which is another one when the output directory has moved.
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / self.resumed.best)


def is_exact(
    args: TrainingArguments, state: TrainerState, control: TrainerControl, batches: int | None, sample: DataSample
) -> bool:
    """Whether Trainer goes on from a checkpoint that it saves now as if it had not been interrupted.

    Trainer finds the place in the data by the number of steps, and puts the random state back to what it is now. What
    it cannot put back:

    - That the training is over, or the epoch, before its last step: it would train on.
    - Random numbers that were drawn for the batches that are fetched already: augmented samples would be others. The
      same holds for the order of the samples if their sampler draws from the global generator.
    - The random state of workers that live on from epoch to epoch.
    - How often data without a length were gone through.
    - The optimizer, if it is not saved.

    Args:
        args (`TrainingArguments`): Of the phase.
        state (`TrainerState`), control (`TrainerControl`): The Trainer's at the time of saving.
        batches (`int`, *optional*): Of an epoch, if that is known.
        sample ([`DataSample`]): Of the training data.
    """
    epoch, step = float(state.epoch or 0), state.global_step
    if args.save_only_model:
        return False
    if batches is None:
        steps_fit = epoch < 1
    else:
        steps_fit = step == round(epoch * math.ceil(batches / args.gradient_accumulation_steps))
    is_over = control.should_training_stop or control.should_epoch_stop
    seedable = args.accelerator_config.use_seedable_sampler  # type: ignore[union-attr]
    if batches is not None and epoch.is_integer():
        lives_on = args.dataloader_num_workers > 0 and args.dataloader_persistent_workers
        return steps_fit and not (sample.draws and lives_on) and (not is_over or step >= state.max_steps)
    return steps_fit and not is_over and not sample.draws and seedable
