"""What a user's training script does; as a script it goes on from the last checkpoint in FOLDER.

    accelerate launch -m tests.distributed.train FOLDER

The batch over all processes is the same for any number of them. Losses go to FOLDER/losses.json, the adapter to
FOLDER/adapter, what it was trained by to FOLDER/engine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from ..trainer.toy import TRAIN, VALIDATION, accuracy, adapted, arguments
from .on_cpu import allow_shards_on_cpu, engine

BATCH_SIZE = 8


def with_prompts(seed: int) -> PeftModel:
    return adapted(seed=seed, prompt_dropout=0.0)  # dropout would differ


def train(
    folder: str,
    processes: int,
    resume: bool = False,
    adapt: Callable[[int], PeftModel] = with_prompts,
    **options: Any,
) -> Trainer:
    keywords: dict[str, Any] = {
        "per_device_train_batch_size": BATCH_SIZE // processes,
        "num_train_epochs": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        **options,
    }
    trainer = Trainer(
        model=adapt(7 * int(resume)),
        args=arguments(folder, **keywords),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(folder, "adapter")))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(folder, "losses.json").write_text(json.dumps(losses))
        Path(folder, "engine").write_text(engine(trainer.model_wrapped))
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    use_cpu = not allow_shards_on_cpu()
    train(sys.argv[1], int(os.environ["WORLD_SIZE"]), resume=True, use_cpu=use_cpu)
