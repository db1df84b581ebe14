from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from e2vpt_peft.trainer.data import DataSample
from e2vpt_peft.trainer.phase import is_exact

from .toy import arguments

FIXED = DataSample(32, [], "", False, None)
RANDOM = replace(FIXED, draws=True)
UNSEEDED = {"accelerator_config": {"use_seedable_sampler": False}}
WORKERS = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
STOP, STOP_EPOCH = TrainerControl(should_training_stop=True), TrainerControl(should_epoch_stop=True)


@pytest.mark.parametrize(
    ("step", "epoch", "data", "control", "options", "exact"),
    [
        (2, 0.5, FIXED, None, {}, True),
        (2, 0.5, RANDOM, None, {}, False),  # the next batch is drawn already
        (4, 1.0, RANDOM, None, {}, True),
        (2, 0.5, FIXED, None, UNSEEDED, False),
        (4, 1.0, FIXED, None, UNSEEDED, True),
        (4, 1.0, RANDOM, None, WORKERS, False),
        (4, 1.0, FIXED, None, WORKERS, True),
        (4, 1.0, FIXED, STOP, {}, False),  # early stopping: Trainer would train on
        (8, 2.0, FIXED, STOP, {}, True),  # nothing is left
        (6, 1.5, FIXED, STOP, {}, False),  # max_steps: neither here
        (2, 0.5, FIXED, STOP_EPOCH, {}, False),
        (4, 1.5, FIXED, None, {}, False),  # an epoch was cut short: steps do not tell where it is
        (2, 0.5, FIXED, None, {"gradient_accumulation_steps": 2}, False),
        (1, 0.5, FIXED, None, {"gradient_accumulation_steps": 2}, True),
        (4, 1.0, FIXED, None, {"save_only_model": True}, False),
    ],
)
def test_from_which_checkpoints_a_phase_goes_on_exactly(
    step: int, epoch: float, data: Any, control: Any, options: Any, exact: bool, tmp_path: Path
) -> None:
    state = TrainerState(global_step=step, epoch=epoch, max_steps=8)
    assert is_exact(arguments(tmp_path, **options), state, control or TrainerControl(), 4, data) == exact


@pytest.mark.parametrize(("epoch", "control", "exact"), [(0.5, None, True), (1.2, None, False), (1.0, STOP, False)])
def test_data_without_a_length_go_on_in_their_first_pass_only(
    epoch: float, control: Any, exact: bool, tmp_path: Path
) -> None:
    state = TrainerState(global_step=4, epoch=epoch, max_steps=4)
    assert is_exact(arguments(tmp_path), state, control or TrainerControl(), None, FIXED) == exact
